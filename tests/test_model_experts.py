"""Mixtures of experts: loading, adapter files and MXFP4 of many architectures, and their forward pass against loops."""

from __future__ import annotations

import inspect
import json
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

from qdora.adapter import expert_product, expert_tokens
from qdora.adapter.expert_linear import AdaptedExperts, BareExperts, ExpertLinear, FrozenExperts
from qdora.errors import UserError
from qdora.export.nf4_lora import check_foldable
from qdora.model import experts
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.experts import routers, stacks, use_expert_layers_
from qdora.model.inject import adapted_layer, adapted_layers, frozen_like, inject, linear_layers, replace_module
from qdora.model.load import Quantization, settle_stored
from qdora.model.stored_tensors import StoredPacked, StoredTensor, stored_rows
from qdora.model.weight_conversion import taken_for_experts
from qdora.quant.packed import PackedWeight, dequantize, empty_packed, quantize
from qdora.quant.sparsity import mask_bits
from tests import reference, support
from tests.reference import Array
from tests.support import load_checkpoint

IDS = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(7))
TURNED = ("gpt_oss", "llama4_text")  # transformers keeps their weights transposed


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(IDS).logits
    return found


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.std()))


def saved(model: Any, directory: Path, quant: str) -> Path:
    save_adapter(model, directory, base_name_or_path="model", revision=None, base_quant={"quant": quant})
    return directory


@pytest.mark.parametrize("name", support.MIXTURES)
def test_a_published_checkpoint_gives_the_logits_of_transformers(tmp_path, name):
    """Experts are quantised as they are read; the result is as if the stack had been quantised at once."""
    support.write_mixture(tmp_path, name)
    library = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load_checkpoint(tmp_path)
    if name == "granitemoe" and not stacks(model):
        pytest.skip("this release of transformers has no interface for Granite's experts")
    assert len(stacks(model)) >= 2
    assert_close(logits(model), logits(library))
    if name in ("qwen3_moe", "granitemoe", *TURNED):
        for path, stack in stacks(load_checkpoint(tmp_path, quant="nf4")).items():
            assert isinstance(stack, FrozenExperts)
            weight = library.get_parameter(path).detach()
            matrix = (weight.mT if name in TURNED else weight).flatten(0, 1)
            assert torch.equal(stack.dequantized(), dequantize(quantize(matrix, "nf4")))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize(
    "options", [{}, {"kind": "lora", "share": "B"}, {"gated": True}, {"targets": ["*experts.down_proj"]}], ids=str
)
def test_padding_for_cards_without_a_grouped_product_changes_no_number(tmp_path, monkeypatch, name, options):
    """Outputs and gradients, in float64."""
    options = dict(options)
    gated = options.pop("gated", False)
    model, layers = support.adapted_mixture(tmp_path, name, **options)
    for layer in layers.values() if gated else ():
        layer.add_gate()
        nn.init.uniform_(layer.gate, 0.5, 1.5)
    parameters = [each for each in model.parameters() if each.requires_grad]

    def results() -> list[Tensor]:
        out = model(IDS).logits
        return [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]

    plain, counts = results(), []
    monkeypatch.setattr(expert_product, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(expert_tokens, "_MOST_PADDING", 1.0)
    monkeypatch.setattr(expert_tokens, "_WORTH_COPIES", -1)
    monkeypatch.setattr(
        experts, "padded_tokens", lambda each: (counts.append(each), expert_tokens.padded_tokens(each))[1]
    )
    for one, other in zip(plain, results(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
    assert bool(counts) == (name != "llama4_text"), "Llama 4's experts have no interface"


def test_rows_of_padding_are_zeros_in_every_derivative():
    order, inverse = torch.tensor([1, -1, 0, 3, 2, -1]), torch.tensor([2, 0, 4, 3])
    x = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    assert not experts._Spread.apply(x, order, inverse, 2)[[1, 5]].any()
    for through in (
        lambda x: experts._Spread.apply(x, order, inverse, 2).tanh(),
        lambda x: experts._Spread.apply(experts._Spread.apply(x, order, inverse, 2).tanh(), inverse, order, 1),
    ):
        assert torch.autograd.gradcheck(through, (x,))
        assert torch.autograd.gradgradcheck(through, (x,))


def test_routers_and_gates_of_shared_experts_stay_as_they_are(tmp_path):
    support.write_mixture(tmp_path, "qwen2_moe", torch.bfloat16)
    model = load_checkpoint(tmp_path, quant="nf4", compute_dtype=torch.bfloat16)
    inject(model, rank=2)
    assert routers(model) == {f"model.layers.{index}.mlp.shared_expert_gate" for index in range(2)}
    for block in model.model.layers:
        assert type(block.mlp.shared_expert_gate) is nn.Linear
        assert block.mlp.gate.weight.dtype == torch.bfloat16
        assert not block.mlp.gate.weight.requires_grad


# --- adapters


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("share", ["none", "A", "B"])
def test_an_adapter_file_holds_the_layers(tmp_path, kind, share):
    support.write_mixture(tmp_path / "model", "mixtral")
    model = load_checkpoint(tmp_path / "model", quant="nf4")
    layers = inject(model, kind=kind, rank=4, expert_rank=2, share=share, targets=["q_proj", "experts"])
    assert sum(isinstance(layer, AdaptedExperts) for layer in layers.values()) == 4
    support.move_adapters_(layers)
    again, directory = load_checkpoint(tmp_path / "model", quant="nf4"), saved(model, tmp_path / "adapter", "nf4")
    read = load_adapter(again, directory)
    assert {path: layer.lora_A.shape for path, layer in read.items()} == {
        path: layer.lora_A.shape for path, layer in layers.items()
    }
    assert torch.equal(logits(again), logits(model))
    name = "base_model.model.model.layers.0.mlp.experts.lora_magnitude_vector"
    tensors = load_file(directory / "adapter_model.safetensors")
    assert (tensors[name].shape == (4, 64)) if kind == "dora" else (name not in tensors)


FAST = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in support.MIXTURES]
)
def test_peft_computes_the_logits_of_lora_on_all_layers(tmp_path, name):
    """Dense layers whose names are those of single experts are there, too, and have ranks and scalings of their own."""
    support.write_mixture(tmp_path / "model", name)
    model = load_checkpoint(tmp_path / "model")
    layers = inject(model, kind="lora", rank=4, expert_rank=2, rank_pattern={"down_proj": 3})
    support.move_adapters_(layers)
    directory = saved(model, tmp_path / "adapter", "none")
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before, wanted = logits(library), logits(model)
    adapted = PeftModel.from_pretrained(library, str(directory))
    assert float((before - wanted).abs().max()) > 0.1 * float(wanted.std())
    assert_close(logits(adapted), wanted, 1e-4)
    again = load_checkpoint(tmp_path / "model")
    read = load_adapter(again, directory)
    assert {path: layer.rank for path, layer in read.items()} == {path: layer.rank for path, layer in layers.items()}
    assert torch.equal(logits(again), wanted)


def test_ranks_of_experts(tmp_path):
    support.write_mixture(tmp_path, "mixtral")
    layers = inject(load_checkpoint(tmp_path, quant="nf4"), rank=4, rank_pattern={"down_proj": 3}, expert_rank=2)
    ranks = {path.rpartition(".")[2]: layer.rank for path, layer in layers.items()}
    assert ranks == {"gate_up_proj": 2, "down_proj": 3} | dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 4)
    assert adapted_layers(load_checkpoint(tmp_path)) == {}
    with pytest.raises(UserError, match=r"adapter\.experts: no target is an expert"):
        inject(load_checkpoint(tmp_path, quant="nf4"), rank=4, expert_rank=2, targets=["q_proj"])
    with pytest.raises(UserError, match=r"v_proj, experts, all-linear, a path, .* Did you mean 'experts'\?"):
        inject(load_checkpoint(tmp_path, quant="nf4"), rank=4, targets=["expert"])


def test_masks_of_experts_are_whole_bytes():
    model = support.mixture("qwen3_moe", hidden_size=62, moe_intermediate_size=62)
    use_expert_layers_(model)
    layers = {path: each for path, each in linear_layers(model).items() if isinstance(each, BareExperts)}
    for path, stack in layers.items():
        keep = torch.ones(stack.out_features, stack.in_features, dtype=torch.bool)
        replace_module(model, path, frozen_like(stack, stack.weight.detach(), None, mask_bits(keep)))
    fault = r"adapter\.mask: keep, but each expert of .*down_proj has 3844 weights"
    with pytest.raises(UserError, match=fault) as raised:
        inject(model, rank=2, targets="down_proj", masked=True)
    assert len(raised.value.faults) == 1


@pytest.mark.parametrize("name", support.MIXTURES)
def test_dense_layers_that_peft_takes_for_experts(name):
    """By PEFT's own change of a config that names each of them by its path."""
    model, ours = support.mixture(name), support.mixture(name)
    use_expert_layers_(ours)
    ends = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    dense = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and path.endswith(ends)]
    config = LoraConfig(target_modules=[*dense, "o_proj"])
    convert_peft_config_for_transformers(config, model, None)
    assert taken_for_experts(ours, dense) == set(dense) - set(config.target_modules)


def test_llama_4_computes_under_autocast_and_is_not_written_in_4_bits(tmp_path, monkeypatch):
    """A CPU lets index_copy take two dtypes under autocast, a GPU does not. transformers builds Llama 4's experts one
    by one in 4 bits, and finds no weights for them."""
    copied: list[tuple[torch.dtype, torch.dtype]] = []
    copy = Tensor.index_copy

    def seen(tensor: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        copied.append((tensor.dtype, source.dtype))
        return copy(tensor, dim, index, source)

    monkeypatch.setattr(Tensor, "index_copy", seen)
    support.write_mixture(tmp_path, "llama4_text")
    model = load_checkpoint(tmp_path, quant="nf4")
    support.move_adapters_(inject(model, rank=2, targets="experts"))
    wanted = logits(model)
    copied.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    assert len(copied) == 2
    assert all(one == other for one, other in copied)
    assert float((found.float() - wanted).square().mean()) < 0.01 * float(wanted.var())
    model = load_checkpoint(tmp_path, quant="nf4", skip=("lm_head", "experts"))
    inject(model, kind="lora", rank=2, targets=["o_proj"])
    with pytest.raises(UserError, match=r"does not load 4 layers .*gate_up_proj, a stack of experts\)\.") as raised:
        check_foldable(model, torch.float32)
    assert len(raised.value.faults) == 1


# --- MXFP4, and checkpoints that do not fit


def test_mxfp4_is_kept_bit_for_bit_or_quantised_again(tmp_path):
    """transformers dequantises the experts on a machine without a GPU."""
    support.write_mxfp4(tmp_path)
    library = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float()
    kept, again, dense = (
        load_checkpoint(tmp_path, quant="mxfp4"),
        load_checkpoint(tmp_path, quant="nf4"),
        load_checkpoint(tmp_path),
    )
    for path, stack in stacks(kept).items():
        assert isinstance(stack, FrozenExperts)
        assert stack.kind == "mxfp4"
        assert stack.get_buffer("absmax").dtype == torch.uint8
        weight = library.get_parameter(path).detach().mT.flatten(0, 1)
        assert torch.equal(stack.dequantized(), weight)
        assert torch.equal(dense.get_submodule(path).weight, weight)
        assert torch.equal(again.get_submodule(path).dequantized(), dequantize(quantize(weight, "nf4")))
    assert type(kept.model.layers[0].self_attn.q_proj) is nn.Linear
    assert_close(logits(kept), logits(library))
    support.move_adapters_(inject(kept, rank=2, targets="experts"))
    assert torch.isfinite(logits(kept)).all()


def test_of_mxfp4_weights_that_are_read_in_part_one_is_in_memory(monkeypatch):
    """A process of `train.parallel: shard` reads its own rows alone, which may not be the last ones."""
    monkeypatch.setattr("qdora.model.load._DENSE_PART_ELEMENTS", 4 * 32)
    forms = [empty_packed("mxfp4", (16, 32)) for _ in range(3)]
    for form in forms:
        form.packed.random_(generator=torch.Generator().manual_seed(0))
        form.absmax.random_(120, 125, generator=torch.Generator().manual_seed(1))
    alive: list[weakref.ref[PackedWeight]] = []

    def read(form: PackedWeight) -> PackedWeight:
        made = replace(form)
        alive.append(weakref.ref(made))
        return made

    packed = {
        name: StoredPacked(name, form.shape, "mxfp4", 32, double_quant=False, read=partial(read, form))
        for name, form in zip("abc", forms, strict=True)
    }
    stored, _ = settle_stored(packed, "mxfp4", Quantization("nf4", 64, double_quant=True, skip=()), set())
    for item, form in zip(stored.values(), forms, strict=True):
        assert isinstance(item, StoredTensor)
        assert torch.equal(stored_rows(item, slice(2, 9)), dequantize(form, torch.bfloat16)[2:9])
        assert sum(each() is not None for each in alive) == 1
    assert len(alive) == 3
    assert torch.equal(item.read(), dequantize(form, torch.bfloat16))
    assert [each() for each in alive] == [None] * 3


SCALES = "model.layers.1.mlp.experts.down_proj_scales"
LOST = [f"model.layers.1.mlp.experts.{part}_proj.weight" for part in ("2.up", "3.gate", "3.up", "3.down")]
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}


def nan_scale(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES][2, 5, 1] = 255


def without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


# Model, change of its tensors and its config, quantisation, and words of each fault.
REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], dict[str, Any], str, list[str]]] = {
    "NaN": ("mxfp4", nan_scale, {}, "mxfp4", [f"^model.source: '{SCALES}' has 1 block scales of 255, which mean NaN"]),
    "config": ("gpt_oss", without(), MXFP4, "mxfp4", [r"config\.json says .* mxfp4, but .* dense\. Fix: remove quant"]),
    "dense": ("gpt_oss", without(), {}, "mxfp4", [r"base\.quant: mxfp4 is read from checkpoints that hold it"]),
    "one lost": ("qwen3_moe", without(LOST[0]), {}, "nf4", [f"the checkpoint has no tensor '{LOST[0]}'"]),
    "expert lost": ("qwen3_moe", without(*LOST[1:]), {}, "nf4", [f"has no tensor '{name}'" for name in LOST[1:]]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_experts_that_do_not_fit_are_named(tmp_path, case):
    name, change, config, quant, words = REFUSED[case]
    if name == "mxfp4":
        support.write_mxfp4(tmp_path)
    else:
        support.mixture(name).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(UserError) as raised:
        load_checkpoint(tmp_path, quant=quant)
    assert len(raised.value.faults) == len(words)
    assert all(any(re.search(each, fault) for fault in raised.value.faults) for each in words), raised.value


# --- the forward pass of every kind of expert module that transformers' interface knows

EXPERTS, HIDDEN, INNER, TOKENS = 4, 6, 5, 7
KINDS: dict[str, dict[str, bool]] = {
    "gate": {},
    "no gate": {"has_gate": False},
    "bias": {"has_bias": True},
    "transposed": {"is_transposed": True, "has_bias": True},
    "interleaved": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
    "norm of each expert": {"has_post_expert_norm": True},
    "no gate, transposed, bias": {"has_gate": False, "is_transposed": True, "has_bias": True},
}
# Early releases of transformers do not know all of them.
_KNOWN = inspect.signature(use_experts_implementation).parameters
KINDS = {name: flags for name, flags in KINDS.items() if flags.keys() <= {*_KNOWN}}


class Halved(nn.Module):
    """A norm that is easily computed by hand: x / (1 + |x|) / 2."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs()) / 2


def make(**flags: bool) -> Any:
    """A random module in float64."""
    gated, turned = flags.get("has_gate", True), flags.get("is_transposed", False)
    first = "gate_up_proj" if gated else "up_proj"

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.act_fn = nn.SiLU()
            self.post_expert_norm = Halved()
            for name, rows, columns in ((first, INNER * (1 + gated), HIDDEN), ("down_proj", HIDDEN, INNER)):
                size = (columns, rows) if turned else (rows, columns)
                weight = torch.randn(EXPERTS, *size, dtype=torch.float64) / math.sqrt(columns)
                self.register_parameter(name, nn.Parameter(weight))
                if flags.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows).double()))

        def forward(self, *_: Any) -> Tensor:
            raise NotImplementedError

    if not flags.get("is_concatenated", True):
        Experts._apply_gate = lambda _self, x: x[..., ::2].tanh() * x[..., 1::2]  # type: ignore[attr-defined]
    torch.manual_seed(0)
    return use_experts_implementation(**flags)(Experts)(SimpleNamespace(_experts_implementation=None))


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy().copy()


def routing() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts (expert 1 gets none, expert 3 one) and weights."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 3], [2, 0], [0, 2]])
    return x, index, torch.rand(index.shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("adapted", [None, "lora", "dora"])
def test_outputs_and_gradients_are_those_of_the_merged_weights_in_transformers(flags, adapted):
    """In float64; transformers multiplies each token by copies of its experts' weights."""
    module, theirs = make(**flags), make(**flags)
    holder = nn.ModuleList([module])
    use_expert_layers_(holder)  # type: ignore[arg-type]
    paths = [path for path, each in holder.named_modules() if isinstance(each, ExpertLinear)]
    assert len(paths) == 2
    for path in paths if adapted else ():
        layer: Any = adapted_layer(holder.get_submodule(path), kind=adapted, rank=2, alpha=3.0).double()
        replace_module(holder, path, layer)
        nn.init.normal_(layer.lora_B, 0, 0.5)
        if layer.magnitude is not None:
            layer.magnitude.data.mul_(1.3)
        for expert, weight in enumerate(getattr(theirs, path.rpartition(".")[2]).data):
            turned = weight.T if flags.get("is_transposed") else weight
            magnitude = None if layer.magnitude is None else array(layer.magnitude[expert])
            factors = array(layer.lora_A[expert]), array(layer.lora_B[expert])
            merged = reference.merged_weight(array(turned), *factors, layer.scaling, magnitude)
            turned.copy_(torch.from_numpy(merged))
    theirs.config._experts_implementation = "batched_mm"
    results = []
    for each in (module, theirs):
        x, index, share = routing()
        out = each(x, index, share)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, share))])
    for found, wanted in zip(*results, strict=True):
        # The norms of a float32 magnitude are float32.
        assert reference.relative_error(array(found), array(wanted)) < (1e-6 if adapted == "dora" else 1e-12)
