"""Operations of PEFT on one tiny 4-bit model, each by PEFT's own layer and by qdora's: the same results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from operator import methodcaller as call
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import bnb as peft_bnb
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qdora.peft

IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))
OWN = {name: vars(peft_bnb.Linear4bit)[name] for name in ("resolve_lora_variant", "forward", "merge", "unmerge")}
LAYER = "base_model.model.model.layers.0.mlp.up_proj"
warnings.filterwarnings("ignore", message=".*(rounding errors|4-bit linear|meta parameter).*")


def unpatch() -> None:
    for name, method in OWN.items():
        setattr(peft_bnb.Linear4bit, name, method)


def base_model(dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None, **options: Any) -> Any:
    """One Llama block, its linear layers in 4 bits; bitsandbytes' rewriting for AVX512-BF16 is off."""
    settings = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.uint8, "blocksize": 64}
    packing = {name: options.pop(name, default) for name, default in settings.items()}
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | options))).to(dtype)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if type(linear) is nn.Linear:
                    setattr(parent, name, quantized(linear, compute or dtype, packing))
    model.is_loaded_in_4bit = True
    return model


def quantized(linear: nn.Linear, compute: torch.dtype, packing: dict[str, Any]) -> Any:
    bias = linear.bias is not None
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=bias, compute_dtype=compute)
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, module=layer, **packing)
    if bias:
        layer.bias = nn.Parameter(torch.randn_like(linear.bias), requires_grad=False)
    layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def lora_config(**options: Any) -> LoraConfig:
    settings = {"use_dora": True, "target_modules": "all-linear", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(settings | options))


def noise(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(model: Any, seed: int = 5) -> Any:
    """All adapter parameters off their start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def make(
    base: dict[str, Any] | None = None, second: dict[str, Any] | None = None, widened: bool = True, **options: Any
) -> Any:
    model = base_model(**(base or {}))
    torch.manual_seed(1)
    model = moved(get_peft_model(model, lora_config(**options), autocast_adapter_dtype=widened))
    if second is not None:
        torch.manual_seed(2)
        model.add_adapter("second", lora_config(**second))
        moved(model, 7)
    return model


def out(model: Any, ids: Tensor = IDS) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.float().clone()


def loss(model: Any, ids: Tensor = IDS) -> Tensor:
    model.train()
    return model(input_ids=ids, labels=ids).loss


def trainable(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model: Any) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def grads(model: Any) -> list[Any]:
    """The loss, its gradients and the logits, which a layer must not have changed."""
    model.zero_grad()
    value = loss(model)
    value.backward()
    return [value, *(gradient.clone() for gradient in gradients(model)), out(model)]


def trained(model: Any, make_optimizer: Callable[..., Any]) -> Tensor:
    optimizer = make_optimizer(trainable(model))
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return out(model)


def layer_of(model: Any, path: str = LAYER) -> Any:
    return model.get_submodule(path)


def part_of(model: Any, name: str) -> Any:
    part = getattr(layer_of(model), name)
    return part if name == "base_layer" else part["default"]


Step = Callable[[Any], Any]  # with a model
Operation = Callable[[Path], Any]  # in a folder


def on(*steps: Step, **options: Any) -> Operation:
    """Make a model and take steps with it. The tensors that these return are the result, or the error of one."""
    return lambda path: [step(model) for model in [make(**options)] for step in steps or [grads]]


def in_layer(method: str, *arguments: Any) -> Step:
    return lambda model: getattr(layer_of(model), method)(*arguments)


def within(context: Callable[[Any], Any], step: Step) -> Step:
    def inside(model: Any) -> Any:
        with context(model):
            return step(model)

    return inside


def write(change: Callable[[str, Any], Any]) -> Step:
    """Change each parameter that is trained."""

    @torch.no_grad()
    def step(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                change(name, parameter)

    return step


def through(*shape: int, transposed: bool = False) -> Step:
    """The layer alone."""

    def step(model: Any) -> list[Tensor]:
        x = noise(*shape).requires_grad_()
        y = layer_of(model)(x.T if transposed else x)
        y.square().sum().backward()
        return [y, x.grad]

    return step


def under_autocast(model: Any) -> list[Any]:
    with torch.autocast("cpu", BF16):
        value = loss(model)
    value.backward()
    return [value, *gradients(model)]


def new_base(model: Any, quantize: bool) -> None:
    linear = nn.Linear(64, 128, bias=False).requires_grad_(False)
    linear.weight.data = noise(128, 64)
    layer_of(model).base_layer = quantized(linear, FLOAT, {"quant_type": "nf4"}) if quantize else linear


def new_base_weight(model: Any) -> None:
    weight = bnb.nn.Params4bit(noise(128, 64), requires_grad=False, quant_type="nf4")
    layer_of(model).base_layer.weight = weight.to("cpu")


def saved(path: Path, **options: Any) -> str:
    moved(make(**options), 9).save_pretrained(path / "other")
    return str(path / "other")


def loaded(options: dict[str, Any], step: Step = out) -> Operation:
    return lambda path: step(PeftModel.from_pretrained(base_model(), saved(path), **options))


def hotswapped(kind: dict[str, Any]) -> Operation:
    def run(path: Path) -> Any:
        other = saved(path, **kind)
        return on(out, lambda m: hotswap_adapter(m, other, "default", torch_device="cpu"), out, **kind)(path)

    return run


def each(prefix: str, operation: Callable[[Any], Operation], choices: dict[str, Any]) -> dict[str, Operation]:
    return {f"{prefix}_{name}": operation(choice) for name, choice in choices.items()}


def same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


LORA: dict[str, Any] = {"use_dora": False}
KINDS: dict[str, dict[str, Any]] = {"dora": {}, "lora": LORA}
BOTH = ["default", "second"]
BIASED = LORA | {"base": {"mlp_bias": True}, "lora_bias": True, "target_modules": ["up_proj"]}
BF16, FLOAT = torch.bfloat16, torch.float32
disabled = within(call("disable_adapter"), out)
merge, unmerge, inputs_require_grads = map(call, ("merge_adapter", "unmerge_adapter", "enable_input_require_grads"))
to_first, to_second, to_other = (call("set_adapter", name) for name in (*BOTH, "other"))
mixed_batch = within(lambda m: nullcontext(m.eval()), lambda m: m(input_ids=IDS, adapter_names=BOTH).logits)

GRADIENTS: dict[str, dict[str, Any]] = KINDS | {
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "up_proj": 8}, "alpha_pattern": {"up_proj": 3}},
    "head": {"modules_to_save": ["lm_head"]},
    "lora_bias": LORA | {"lora_bias": True},
}
BASES: dict[str, dict[str, Any]] = {
    "fp4": {"quant_type": "fp4"},
    "plain_scales": {"compress_statistics": False},
    "blocks_of_128": {"blocksize": 128, "hidden_size": 128},
    "stored_as_float32": {"quant_storage": FLOAT},
    "bfloat16": {"dtype": BF16},
    "bfloat16_in_float32_products": {"dtype": BF16, "compute": FLOAT},
    "float16": {"dtype": torch.float16},
    "mlp_bias": {"mlp_bias": True},
}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "decayed": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.5),
}
SHAPES = {"one": (64,), "two": (5, 64), "three": (2, 5, 64), "four": (2, 3, 4, 64), "none": (0, 64)}
HOOKS = {"doubles": lambda y: 2 * y, "reads": lambda y: None, "writes": lambda y: y.clamp_(-0.1, 0.1)}
FROZEN = same("lora_A", "lora_B") | {"lora_magnitude_vector": "lora_magnitude", "layer": "up_proj", "all": "lora_"}
# Each gives tensors, or raises, in both arms alike.
OPERATIONS: dict[str, Operation] = {
    **each("gradients", lambda c: on(base={"attention_bias": True}, **c), GRADIENTS),
    **each("base", lambda c: on(base=c), BASES),
    **each("kept_dtype", lambda c: on(base={"dtype": c}, widened=False), {"float32": FLOAT, "bfloat16": BF16}),
    **each("autocast", lambda c: on(under_autocast, **c), KINDS),
    **each(
        "checkpointing",
        lambda c: on(inputs_require_grads, call("gradient_checkpointing_enable", {"use_reentrant": c}), grads),
        {"direct": False, "reentrant": True},
    ),
    **each("three_steps", lambda c: on(lambda m: trained(m, c)), OPTIMIZERS),
    **each("merged", lambda c: on(call("merge_adapter", safe_merge=c), out), {"unsafely": False, "safely": True}),
    **each(
        "hook_on_the_layer", lambda c: on(in_layer("register_forward_hook", lambda *given: c(given[-1])), grads), HOOKS
    ),
    **each(
        "frozen",
        lambda c: on(write(lambda name, p: p.requires_grad_(c not in name)), inputs_require_grads, grads),
        FROZEN,
    ),
    **each("loaded", loaded, {"directly": {}, "frugally": {"low_cpu_mem_usage": True}}),
    "loaded_trainable": loaded({"is_trainable": True}, lambda m: [out(m), grads(m)]),
    **each("hotswapped", hotswapped, KINDS),
    **each("shape", lambda c: on(through(*c)), SHAPES),
    **each(
        "active",
        lambda c: on(lambda m: m.base_model.set_adapter(c), grads, second={}),
        {"both": BOTH, "first": BOTH[:1], "second": BOTH[1:]},
    ),
    "evaluated": on(out),
    "generated": on(
        lambda m: m.eval().generate(input_ids=IDS[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    ),
    "under_inference_mode_then_trained": on(within(lambda _: torch.inference_mode(), out), grads),
    "accumulated": on(lambda m: [loss(m, ids[None]).backward() for ids in IDS], gradients),
    "two_forwards_one_backward": on(lambda m: (loss(m) + loss(m, IDS[:, :5])).backward(), gradients),
    "backward_twice": on(lambda m: [(v := loss(m)).backward(retain_graph=True), v.backward()], gradients),
    "disabled": on(disabled, out),
    "disabled_while_merged": on(merge, disabled),
    "unmerged_then_trained": on(merge, unmerge, grads),
    "merged_and_unloaded": on(lambda m: out(m.merge_and_unload())),
    "unloaded": on(lambda m: out(m.unload())),
    "merged_by_name": on(call("merge_adapter", ["second"]), out, second=LORA),
    "two_merged": on(call("merge_adapter", BOTH), out, second=LORA),
    "two_merged_dora": on(call("merge_adapter", BOTH), out, second={}),
    "merged_bias": on(merge, out, unmerge, lambda m: layer_of(m).base_layer.bias, **BIASED),
    "scaled": on(
        out, in_layer("scale_layer", 3.0), out, in_layer("unscale_layer"), in_layer("set_scale", "default", 0.5), out
    ),
    "switched": on(out, to_second, grads, to_first, grads, to_second, grads, second=LORA | {"r": 8}),
    "deleted": on(to_second, call("delete_adapter", "default"), grads, second={}),
    "mixed_batch": on(mixed_batch, second=LORA, **LORA),
    "mixed_batch_of_dora": on(mixed_batch, second={}),
    "activated_lora": on(alora_invocation_tokens=[int(IDS[0, 5])], **LORA),
    "loaded_as_second": lambda path: on(lambda m: m.load_adapter(saved(path), "other"), to_other, out)(path),
    "adapter_state_set": on(
        out, lambda m: peft.set_peft_model_state_dict(m, peft.get_peft_model_state_dict(moved(make(), 9))), out
    ),
    "copied_into": on(out, write(lambda _, p: p.copy_(1.3 * p)), out),
    "data_written_between_modes": on(out, write(lambda _, p: p.data.mul_(1.3)), call("train"), out),
    "deep_copied": on(out, lambda m: trained(copy.deepcopy(m), lambda p: torch.optim.SGD(p, 0.1)), out),
    "base_replaced": on(out, lambda m: new_base(m, True), out),
    "base_weight_replaced": on(out, new_base_weight, out),
    "base_written": on(out, lambda m: layer_of(m).base_layer.weight.data[:100].fill_(0x5A), qdora.peft.changed, out),
    "base_in_16_bits": on(lambda m: new_base(m, False), grads),
    "inputs_not_contiguous": on(through(64, 5, transposed=True)),
    "zero_magnitude": on(lambda m: part_of(m, "lora_magnitude_vector").weight.data[3].zero_(), grads),
    "input_dtype_not_cast": on(within(peft.helpers.disable_input_dtype_casting, out)),
    "to_bfloat16_and_back": on(lambda m: grads(m.to(BF16).to(FLOAT))),
    "cast_to_bfloat16": on(lambda m: out(m.to(BF16))),
}

DIFFERENT = {
    "disabled_while_merged": "PEFT's unmerge quantises the base anew",
    "unmerged_then_trained": "PEFT's unmerge quantises the base anew",
    "two_merged_dora": "PEFT takes the norm of the second from a base that was unmerged so",
}
NARROW = ("bfloat16", "autocast", "float16")


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach().float()]
    values = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else ()
    return [tensor for value in values for tensor in flat(value)]


def outcome(name: str, path: Path) -> list[Tensor] | type[Exception]:
    """The tensors of an operation, or the type of its error."""
    path.mkdir()
    try:
        return flat(OPERATIONS[name](path))
    except Exception as error:
        return type(error)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_pefts_result(name, tmp_path):
    theirs = outcome(name, tmp_path / "theirs")
    qdora.peft.patch()
    ours = outcome(name, tmp_path / "ours")
    if name in DIFFERENT:
        assert isinstance(ours, type) or isinstance(theirs, type) or not close(name, ours, theirs)
    elif isinstance(theirs, type):
        assert ours is theirs
    else:
        assert not isinstance(ours, type), ours
        assert len(ours) == len(theirs) > 0
        assert close(name, ours, theirs)


def close(name: str, ours: list[Tensor], theirs: list[Tensor]) -> bool:
    tolerance = 5e-2 if any(word in name for word in NARROW) else 2e-3
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.numel()]
    return all(float((a - b).abs().max()) <= tolerance * float(b.abs().max()) for a, b in pairs)
