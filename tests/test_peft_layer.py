"""Operations of PEFT on one tiny 4-bit model, each by PEFT's own layer and by qdora's: the same results."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from torch.nn.utils import parametrize, stateless
from transformers import LlamaConfig, LlamaForCausalLM

import qdora.peft

IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))
OWN = {name: vars(peft_bnb.Linear4bit)[name] for name in ("resolve_lora_variant", "forward", "merge", "unmerge")}
LAYER = "base_model.model.model.layers.0.mlp.up_proj"
warnings.filterwarnings("ignore", message=".*(rounding errors|4-bit linear|meta parameter).*")


@contextmanager
def patched() -> Iterator[None]:
    """PEFT's class with qdora's methods for a while."""
    qdora.peft.patch()
    try:
        yield
    finally:
        unpatch()


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


def moved(model: Any, seed: int = 5) -> Any:
    """All adapter parameters off their start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def make(base: dict[str, Any] | None = None, **options: Any) -> Any:
    model = base_model(**(base or {}))
    torch.manual_seed(1)
    return moved(get_peft_model(model, lora_config(**options)))


def out(model: Any, ids: Tensor = IDS) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.float().clone()


def loss(model: Any, ids: Tensor = IDS) -> Tensor:
    model.train()
    return model(input_ids=ids, labels=ids).loss


def grads(model: Any) -> list[Tensor]:
    """The loss, its gradients and the logits, which a layer must not have changed."""
    model.zero_grad()
    value = loss(model)
    value.backward()
    found = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
    return [value.detach(), *found, out(model)]


def trained(model: Any, make_optimizer: Callable[..., Any], steps: int = 3) -> Tensor:
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return out(model)


def layer_of(model: Any, path: str = LAYER) -> Any:
    return model.get_submodule(path)


def two(**second: Any) -> Any:
    model = make()
    torch.manual_seed(2)
    model.add_adapter("second", lora_config(**second))
    return moved(model, 7)


# Each operation returns tensors, or raises, in both arms alike.
OPERATIONS: dict[str, Callable[[Path], Any]] = {}


def operation(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    OPERATIONS[function.__name__] = function
    return function


def each(names: str, **choices: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One operation for each choice; `names` begins theirs."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, choice in choices.items():
            OPERATIONS[f"{names}_{name}"] = functools.partial(function, choice=choice)
        return function

    return add


@each(
    "gradients",
    dora={},
    lora={"use_dora": False},
    rslora={"use_rslora": True},
    rank_pattern={"rank_pattern": {"q_proj": 2, "up_proj": 8}, "alpha_pattern": {"up_proj": 3}},
    one_block={"layers_to_transform": [1], "target_modules": ["up_proj", "q_proj"]},
    excluded={"exclude_modules": ["q_proj"]},
    replicated={"layer_replication": [[0, 1], [0, 1]]},
    gaussian={"init_lora_weights": "gaussian"},
    random={"init_lora_weights": False},
    orthogonal={"init_lora_weights": "orthogonal"},
    pissa={"init_lora_weights": "pissa"},
    olora={"init_lora_weights": "olora"},
    eva={"init_lora_weights": "eva"},
    head={"modules_to_save": ["lm_head"]},
    embeddings={"target_modules": ["embed_tokens", "up_proj"]},
    plain_head={"target_modules": ["lm_head", "up_proj"]},
    token_indices={"trainable_token_indices": [1, 2]},
    bias_all={"bias": "all"},
    bias_lora_only={"bias": "lora_only"},
    lora_bias={"use_dora": False, "lora_bias": True},
)
def _(path: Path, choice: dict[str, Any]) -> Any:
    blocks = 2 if "layers_to_transform" in choice else 1
    return grads(make({"attention_bias": True, "num_hidden_layers": blocks}, **choice))


@each(
    "base",
    fp4={"quant_type": "fp4"},
    plain_scales={"compress_statistics": False},
    blocks_of_128={"blocksize": 128, "hidden_size": 128},
    blocks_of_32={"blocksize": 32},
    two_blocks={"num_hidden_layers": 2},
    stored_as_bfloat16={"quant_storage": torch.bfloat16},
    stored_as_float32={"quant_storage": torch.float32},
    bfloat16={"dtype": torch.bfloat16},
    bfloat16_products={"compute": torch.bfloat16},
    bfloat16_in_float32_products={"dtype": torch.bfloat16, "compute": torch.float32},
    float16={"dtype": torch.float16},
    no_bias={},
    mlp_bias={"mlp_bias": True},
)
def _(path: Path, choice: dict[str, Any]) -> Any:
    return grads(make(choice))


@each("kept_dtype", float32=torch.float32, bfloat16=torch.bfloat16)
def _(path: Path, choice: torch.dtype) -> Any:
    torch.manual_seed(1)
    return grads(moved(get_peft_model(base_model(choice), lora_config(), autocast_adapter_dtype=False)))


@each("autocast", dora=True, lora=False)
def _(path: Path, choice: bool) -> Any:
    model = make(use_dora=choice)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model)
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@each("checkpointing", direct=False, reentrant=True)
def _(path: Path, choice: bool) -> Any:
    model = make()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": choice})
    return grads(model)


@each(
    "three_steps",
    adamw=lambda p: torch.optim.AdamW(p, 1e-2),
    sgd=lambda p: torch.optim.SGD(p, 1e-1, momentum=0.9),
    bnb_adamw=lambda p: bnb.optim.AdamW32bit(p, 1e-2),
    decayed=lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.5),
)
def _(path: Path, choice: Any) -> Any:
    return trained(make(), choice)


@each("merged", unsafely=False, safely=True)
def _(path: Path, choice: bool) -> Any:
    model = make()
    model.merge_adapter(safe_merge=choice)
    return out(model)


@each("hooked_output_of", **{n: n for n in ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")})
def _(path: Path, choice: str) -> Any:
    model = make()
    part = getattr(layer_of(model), choice)
    (part if choice == "base_layer" else part["default"]).register_forward_hook(lambda *given: 2 * given[-1])
    return grads(model)


@each("hooked_input_of", **{name: name for name in ("base_layer", "lora_A", "lora_B", "lora_dropout")})
def _(path: Path, choice: str) -> Any:
    model = make()
    part = getattr(layer_of(model), choice)
    (part if choice == "base_layer" else part["default"]).register_forward_pre_hook(lambda _, args: (2 * args[0],))
    return grads(model)


@each("hook_on_the_layer", doubles=lambda y: 2 * y, reads=lambda y: None, writes=lambda y: y.clamp_(-0.1, 0.1))
def _(path: Path, choice: Any) -> Any:
    model = make()
    layer_of(model).register_forward_hook(lambda *given: choice(given[-1]))
    return grads(model)


@each("frozen", lora_A="lora_A", lora_B="lora_B", lora_magnitude_vector="lora_magnitude", layer="up_proj", all="lora_")
def _(path: Path, choice: str) -> Any:
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and choice not in name)
    model.enable_input_require_grads()
    return grads(model)


@each("weighted_merge", linear="linear", cat="cat", svd="svd", ties="ties")
def _(path: Path, choice: str) -> Any:
    model = make(use_dora=False)
    model.add_adapter("second", lora_config(use_dora=False))
    moved(model, 7)
    more = {"density": 0.5} if choice == "ties" else {}
    model.add_weighted_adapter(["default", "second"], [0.7, 0.6], "sum", combination_type=choice, **more)
    model.set_adapter("sum")
    return out(model)


@each("handwritten_steps", dora=True, lora=False)
def _(path: Path, choice: bool) -> Any:
    model, found = make(use_dora=choice), []
    for _ in range(5):
        found += grads(model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.5 * parameter.grad
    return found


@each("loaded", directly={}, frugally={"low_cpu_mem_usage": True}, trainable={"is_trainable": True})
def _(path: Path, choice: dict[str, Any]) -> Any:
    make().save_pretrained(path / "adapter")
    model = PeftModel.from_pretrained(base_model(), path / "adapter", **choice)
    return [out(model), *(grads(model) if "is_trainable" in choice else [])]


@each("shape", one=(64,), two=(5, 64), three=(2, 5, 64), four=(2, 3, 4, 64), none=(0, 64))
def _(path: Path, choice: tuple[int, ...]) -> Any:
    x = torch.randn(choice, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer_of(make())(x)
    y.square().sum().backward()
    return [y.detach(), x.grad]


@each("active", both=["default", "second"], first=["default"], second=["second"])
def _(path: Path, choice: list[str]) -> Any:
    model = two()
    model.base_model.set_adapter(choice)
    return grads(model)


@operation
def evaluated(path: Path) -> Any:
    return out(make())


@operation
def generated(path: Path) -> Any:
    model = make().eval()
    return model.generate(input_ids=IDS[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False)


@operation
def under_inference_mode_then_trained(path: Path) -> Any:
    model = make()
    with torch.inference_mode():
        first = model.eval()(input_ids=IDS).logits.clone()
    return [first.clone(), *grads(model)]


@operation
def accumulated(path: Path) -> Any:
    model = make()
    for ids in IDS:
        loss(model, ids[None]).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@operation
def two_forwards_one_backward(path: Path) -> Any:
    model = make()
    (loss(model) + loss(model, IDS[:, :5])).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@operation
def backward_twice(path: Path) -> Any:
    model = make()
    value = loss(model)
    value.backward(retain_graph=True)
    value.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@operation
def gradient_of_gradient(path: Path) -> Any:
    model = make()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (first,) = torch.autograd.grad(layer_of(model)(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)


@operation
def functional_call(path: Path) -> Any:
    model = make()
    values = {name: 1.1 * p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return stateless._functional_call(model, values, (), {"input_ids": IDS}).logits.detach()


@operation
def disabled(path: Path) -> Any:
    model = make()
    with model.disable_adapter():
        found = out(model)
    return [found, out(model)]


@operation
def disabled_while_merged(path: Path) -> Any:
    model = make()
    model.merge_adapter()
    with model.disable_adapter():
        return model(input_ids=IDS).logits.detach()


@operation
def unmerged_then_trained(path: Path) -> Any:
    model = make()
    model.merge_adapter()
    model.unmerge_adapter()
    return grads(model)


@operation
def merged_and_unloaded(path: Path) -> Any:
    return out(make().merge_and_unload())


@operation
def unloaded(path: Path) -> Any:
    return out(make().unload())


@operation
def merged_by_name(path: Path) -> Any:
    model = two(use_dora=False)
    model.merge_adapter(["second"])
    return out(model)


@operation
def two_merged(path: Path) -> Any:
    model = two(use_dora=False)
    model.merge_adapter(["default", "second"])
    return out(model)


@operation
def two_merged_dora(path: Path) -> Any:
    model = two()
    model.merge_adapter(["default", "second"])
    return out(model)


@operation
def merged_bias(path: Path) -> Any:
    model = make({"mlp_bias": True}, use_dora=False, lora_bias=True, target_modules=["up_proj"])
    model.merge_adapter()
    first = out(model)
    model.unmerge_adapter()
    return [first, layer_of(model).base_layer.bias.detach()]


@operation
def deltas(path: Path) -> Any:
    return layer_of(make()).get_delta_weight("default").detach()


@operation
def scaled(path: Path) -> Any:
    model = make()
    found = [out(model)]
    layer_of(model).scale_layer(3.0)
    found.append(out(model))
    layer_of(model).unscale_layer()
    layer_of(model).set_scale("default", 0.5)
    return [*found, out(model)]


@operation
def rescaled_for_a_while(path: Path) -> Any:
    model = make()
    with peft.helpers.rescale_adapter_scale(model, 0.3):
        found = out(model)
    return [found, out(model)]


@operation
def switched(path: Path) -> Any:
    model = two(use_dora=False, r=8)
    found = [out(model)]
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        found += grads(model)
    return found


@operation
def deleted(path: Path) -> Any:
    model = two()
    model.set_adapter("second")
    model.delete_adapter("default")
    return grads(model)


@operation
def deleted_and_added(path: Path) -> Any:
    model = two()
    found = out(model)
    model.delete_adapter("second")
    torch.manual_seed(4)
    model.add_adapter("second", lora_config(r=2))
    model.set_adapter("second")
    return [found, out(moved(model, 8))]


@each("hotswapped", dora=True, lora=False)
def _(path: Path, choice: bool) -> Any:
    moved(make(use_dora=choice), 9).save_pretrained(path / "other")
    model = make(use_dora=choice)
    found = out(model)
    hotswap_adapter(model, str(path / "other"), "default", torch_device="cpu")
    return [found, out(model)]


@operation
def mixed_batch(path: Path) -> Any:
    model = make(use_dora=False)
    model.add_adapter("second", lora_config(use_dora=False))
    moved(model, 7).eval()
    return model(input_ids=IDS, adapter_names=["default", "second"]).logits.detach()


@operation
def mixed_batch_of_dora(path: Path) -> Any:
    return two().eval()(input_ids=IDS, adapter_names=["default", "second"]).logits.detach()


@operation
def activated_lora(path: Path) -> Any:
    return grads(make(use_dora=False, alora_invocation_tokens=[int(IDS[0, 5])]))


@operation
def loaded_as_second(path: Path) -> Any:
    moved(make(), 9).save_pretrained(path / "other")
    model = make()
    model.load_adapter(path / "other", "other")
    model.set_adapter("other")
    return out(model)


@operation
def adapter_state(path: Path) -> Any:
    return peft.get_peft_model_state_dict(make())


@operation
def adapter_state_set(path: Path) -> Any:
    model, state = make(), peft.get_peft_model_state_dict(moved(make(), 9))
    found = out(model)
    peft.set_peft_model_state_dict(model, state)
    return [found, out(model)]


@operation
def whole_state_loaded(path: Path) -> Any:
    model = make()
    found = out(model)
    state = {name: value for name, value in moved(make(), 9).state_dict().items() if "lora_" in name}
    model.load_state_dict(state, strict=False)
    return [found, out(model)]


@operation
def state_assigned(path: Path) -> Any:
    model = make()
    found = out(model)
    state = {name: value for name, value in moved(make(), 9).state_dict().items() if "lora_" in name}
    model.load_state_dict(state, strict=False, assign=True)
    return [found, out(model)]


@operation
def copied_into(path: Path) -> Any:
    model = make()
    found = [out(model)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(1.3 * parameter)
    return [*found, out(model)]


@operation
def data_written_between_modes(path: Path) -> Any:
    model = make()
    found = [out(model)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.3)
    model.train()
    return [*found, out(model)]


@operation
def deep_copied(path: Path) -> Any:
    model = make()
    first = out(model)
    other = copy.deepcopy(model)
    return [first, trained(other, lambda p: torch.optim.SGD(p, 0.1)), out(model)]


@operation
def in_threads(path: Path) -> Any:
    model = make().eval()

    def run(index: int) -> Tensor:
        with torch.no_grad():
            return model(input_ids=(IDS + index) % 97).logits.clone()

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(run, range(8)))


@operation
def base_replaced(path: Path) -> Any:
    model = make()
    found = out(model)
    other = nn.Linear(64, 128, bias=False)
    nn.init.normal_(other.weight, generator=torch.Generator().manual_seed(6))
    layer_of(model).base_layer = quantized(other, torch.float32, {"quant_type": "nf4"})
    return [found, out(model)]


@operation
def base_weight_replaced(path: Path) -> Any:
    model = make()
    found = out(model)
    other = torch.randn(128, 64, generator=torch.Generator().manual_seed(6))
    layer_of(model).base_layer.weight = bnb.nn.Params4bit(other, requires_grad=False, quant_type="nf4").to("cpu")
    return [found, out(model)]


@operation
def base_written(path: Path) -> Any:
    model = make()
    found = out(model)
    layer_of(model).base_layer.weight.data[:100] = 0x5A
    qdora.peft.changed(model)
    return [found, out(model)]


@operation
def base_in_16_bits(path: Path) -> Any:
    model = make()
    layer_of(model).base_layer = nn.Linear(64, 128, bias=False).requires_grad_(False)
    nn.init.ones_(layer_of(model).base_layer.weight)
    return grads(model)


@operation
def parametrised(path: Path) -> Any:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = make()
    parametrize.register_parametrization(layer_of(model).lora_A["default"], "weight", Doubled())
    return grads(model)


@operation
def forward_of_its_own(path: Path) -> Any:
    model = make()
    factor = layer_of(model).lora_A["default"]
    factor.forward = lambda x: 2 * nn.functional.linear(x, factor.weight)
    return grads(model)


@operation
def kept_device_forward(path: Path) -> Any:
    """ms-swift gives each factor a forward of this name where lora_dtype is given."""
    model = make()
    factor = layer_of(model).lora_A["default"]

    def keep_device_forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x, factor.weight)

    factor.forward = keep_device_forward
    return grads(model)


@operation
def backward_hooked(path: Path) -> Any:
    model, seen = make(), []
    layer_of(model).register_full_backward_hook(lambda _, dx, dy: seen.extend([*dx, *dy]))
    return [*grads(model), *seen]


@operation
def factor_backward_hooked(path: Path) -> Any:
    model, seen = make(), []
    layer_of(model).lora_B["default"].register_full_backward_hook(lambda _, dx, dy: seen.extend([*dx, *dy]))
    return [*grads(model), *seen]


@operation
def inputs_not_contiguous(path: Path) -> Any:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer_of(make())(x.T)
    y.square().sum().backward()
    return [y.detach(), x.grad]


@operation
def zero_magnitude(path: Path) -> Any:
    model = make()
    layer_of(model).lora_magnitude_vector["default"].weight.data[3] = 0.0
    return grads(model)


@operation
def pefts_own_cache(path: Path) -> Any:
    model = make()
    with peft.helpers.DoraCaching():
        return [out(model), out(model)]


@operation
def injected(path: Path) -> Any:
    torch.manual_seed(1)
    return grads(moved(peft.inject_adapter_in_model(lora_config(task_type=None), base_model())))


@operation
def statuses(path: Path) -> Any:
    status = two().get_model_status()
    return torch.tensor([status.trainable_params, status.total_params, status.num_adapter_layers])


@operation
def input_dtype_not_cast(path: Path) -> Any:
    model = make()
    with peft.helpers.disable_input_dtype_casting(model):
        return out(model)


@operation
def clipped(path: Path) -> Any:
    model = make()
    loss(model).backward()
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)


@operation
def to_bfloat16_and_back(path: Path) -> Any:
    return grads(make().to(torch.bfloat16).to(torch.float32))


@operation
def cast_to_bfloat16(path: Path) -> Any:
    return out(make().to(torch.bfloat16))


@operation
def initial_weights_subtracted(path: Path) -> Any:
    make(init_lora_weights=False).save_pretrained(path / "first")
    model = moved(make(init_lora_weights=False), 9)
    model.save_pretrained(path / "second", path_initial_model_for_weight_conversion=str(path / "first"))
    return out(PeftModel.from_pretrained(base_model(), path / "second"))


DIFFERENT = {
    "disabled_while_merged": "PEFT's unmerge quantises the base anew",
    "unmerged_then_trained": "PEFT's unmerge quantises the base anew",
    "two_merged_dora": "PEFT takes the norm of the second from a base that was unmerged so",
    "gradient_of_gradient": "the gradients of our products have no graph",
}
BF16 = ("bfloat16", "autocast", "float16")


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach().float()]
    values = result.values() if isinstance(result, dict) else result
    return [tensor for value in values if value is not None for tensor in flat(value)]


def outcome(name: str, path: Path) -> list[Tensor] | type[Exception]:
    """The tensors of an operation, or the type of its error."""
    path.mkdir()
    try:
        return flat(OPERATIONS[name](path))
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_pefts_result(name: str, tmp_path: Path) -> None:
    theirs = outcome(name, tmp_path / "theirs")
    with patched():
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
    tolerance = 5e-2 if any(word in name for word in BF16) else 2e-3
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.numel()]
    return all(float((a - b).abs().max()) <= tolerance * float(b.abs().max()) for a, b in pairs)
