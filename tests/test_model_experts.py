"""Mixtures of experts: loading, training, adapter files and exports of many architectures."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qdora.errors import UserError
from qdora.export.nf4_lora import check_foldable
from qdora.model import experts
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.experts import routers, stacks, use_expert_layers_
from qdora.model.inject import adapted_layers, frozen_like, inject, linear_layers, replace_module
from qdora.model.load import Quantization, load_model, settle_stored
from qdora.model.source import resolve
from qdora.model.stored_tensors import StoredPacked, StoredTensor, stored_rows
from qdora.model.weight_conversion import taken_for_experts
from qdora.nn.expert_linear import AdaptedExperts, BareExperts, FrozenExperts
from qdora.ops import expert_product, expert_tokens
from qdora.ops.packed import PackedWeight, dequantize, empty_packed, quantize
from qdora.ops.sparsity import mask_bits
from tests import tiny_adapted, tiny_experts

IDS = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(7))


def load(directory: Path, **settings: Any) -> Any:
    return load_model(resolve(str(directory)), **{"quant": "none", "compute_dtype": torch.float32, **settings})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", tiny_experts.MODELS)
def test_a_published_checkpoint_gives_the_logits_of_transformers(tmp_path: Path, name: str) -> None:
    tiny_experts.write(tmp_path, name)
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())
    model = load(tmp_path)
    if name == "granitemoe" and not stacks(model):
        pytest.skip("this release of transformers has no interface for Granite's experts")
    assert len(stacks(model)) >= 2
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=2e-5 * float(wanted.std()))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize(
    "options", [{}, {"kind": "lora", "share": "B"}, {"gated": True}, {"targets": ["*experts.down_proj"]}], ids=str
)
def test_padding_for_cards_without_a_grouped_product_changes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    """Outputs and gradients, in float64."""
    options = dict(options)
    gated = options.pop("gated", False)
    model, layers = tiny_experts.adapted(tmp_path, name, **options)
    for layer in layers.values() if gated else ():
        layer.add_gate()
        nn.init.uniform_(layer.gate, 0.5, 1.5)
    parameters = [each for each in model.parameters() if each.requires_grad]

    def results() -> list[torch.Tensor]:
        out = model(IDS).logits
        first = torch.autograd.grad(out.square().mean(), parameters)
        return [out.detach(), *first]

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


def test_rows_of_padding_are_zeros_in_every_derivative() -> None:
    order, inverse = torch.tensor([1, -1, 0, 3, 2, -1]), torch.tensor([2, 0, 4, 3])
    x = torch.randn(2, 3, dtype=torch.float64).requires_grad_()

    assert not experts._Spread.apply(x, order, inverse, 2)[[1, 5]].any()
    for through in (
        lambda x: experts._Spread.apply(x, order, inverse, 2).tanh(),
        lambda x: experts._Spread.apply(experts._Spread.apply(x, order, inverse, 2).tanh(), inverse, order, 1),
    ):
        assert torch.autograd.gradcheck(through, (x,))
        assert torch.autograd.gradgradcheck(through, (x,))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text", "granitemoe"])
def test_the_codes_are_those_of_the_whole_stack(tmp_path: Path, name: str) -> None:
    """Experts are quantised as they are read; the result is as if the stack had been quantised at once."""
    tiny_experts.write(tmp_path, name)
    library = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load(tmp_path, quant="nf4")
    for path, stack in stacks(model).items():
        assert isinstance(stack, FrozenExperts)
        weight = library.get_parameter(path).detach()
        if name in ("gpt_oss", "llama4_text"):
            weight = weight.mT
        wanted = quantize(weight.flatten(0, 1), "nf4")
        assert torch.equal(stack.dequantized(), dequantize(wanted))


def test_routers_and_gates_of_shared_experts_stay_as_they_are(tmp_path: Path) -> None:
    tiny_experts.write(tmp_path, "qwen2_moe", torch.bfloat16)
    model = load(tmp_path, quant="nf4", compute_dtype=torch.bfloat16)
    inject(model, rank=2)
    assert routers(model) == {f"model.layers.{index}.mlp.shared_expert_gate" for index in range(2)}
    for block in model.model.layers:
        assert type(block.mlp.shared_expert_gate) is torch.nn.Linear
        assert block.mlp.gate.weight.dtype == torch.bfloat16
        assert not block.mlp.gate.weight.requires_grad


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("share", ["none", "A", "B"])
def test_an_adapter_file_holds_the_layers(tmp_path: Path, kind: Any, share: Any) -> None:
    tiny_experts.write(tmp_path / "model", "mixtral")
    model = load(tmp_path / "model", quant="nf4")
    layers = inject(model, kind=kind, rank=4, expert_rank=2, share=share, targets=["q_proj", "experts"])
    assert sum(isinstance(layer, AdaptedExperts) for layer in layers.values()) == 4
    tiny_adapted.move(layers)
    save_adapter(model, tmp_path / "adapter", base_name_or_path="model", revision=None, base_quant={"quant": "nf4"})
    again = load(tmp_path / "model", quant="nf4")
    read = load_adapter(again, tmp_path / "adapter")
    assert {path: tuple(layer.lora_A.shape) for path, layer in read.items()} == {
        path: tuple(layer.lora_A.shape) for path, layer in layers.items()
    }
    assert torch.equal(logits(again), logits(model))


FAST = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in tiny_experts.MODELS]
)
def test_peft_computes_the_logits_of_lora_on_all_layers(tmp_path: Path, name: str) -> None:
    """Dense layers whose names are those of single experts are there, too, and have ranks and scalings of their own."""
    from peft import PeftModel

    tiny_experts.write(tmp_path / "model", name)
    model = load(tmp_path / "model")
    layers = inject(model, kind="lora", rank=4, expert_rank=2, rank_pattern={"down_proj": 3})
    tiny_adapted.move(layers)
    save_adapter(model, tmp_path / "adapter", base_name_or_path="model", revision=None, base_quant={"quant": "none"})
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before = logits(library.eval())
    adapted = PeftModel.from_pretrained(library, str(tmp_path / "adapter")).eval()
    wanted = logits(model)
    assert float((before - wanted).abs().max()) > 0.1 * float(wanted.std())
    torch.testing.assert_close(logits(adapted), wanted, rtol=0, atol=1e-4 * float(wanted.std()))
    again = load(tmp_path / "model")
    read = load_adapter(again, tmp_path / "adapter")
    assert {path: layer.rank for path, layer in read.items()} == {path: layer.rank for path, layer in layers.items()}
    assert torch.equal(logits(again), wanted)


def test_peft_refuses_dora_on_experts(tmp_path: Path) -> None:
    from peft import PeftModel

    tiny_experts.write(tmp_path / "model", "mixtral")
    model = load(tmp_path / "model")
    inject(model, rank=2, targets="experts")
    save_adapter(model, tmp_path / "adapter", base_name_or_path="model", revision=None, base_quant={"quant": "none"})
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", framework="pt") as file:
        magnitude = file.get_tensor("base_model.model.model.layers.0.mlp.experts.lora_magnitude_vector")
    assert magnitude.shape == (4, 64)
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="use_dora"):
        PeftModel.from_pretrained(library, str(tmp_path / "adapter"))


def test_settings_of_experts_need_experts(tmp_path: Path) -> None:
    tiny_experts.write(tmp_path, "mixtral")
    with pytest.raises(UserError, match=r"adapter\.experts: no target is an expert"):
        inject(load(tmp_path, quant="nf4"), rank=4, expert_rank=2, targets=["q_proj"])
    allowed = "v_proj, experts, all-linear, a path, or a shell pattern over it such as 'model.layers.1.*'."
    with pytest.raises(UserError, match=re.escape(f"{allowed} Did you mean 'experts'?")):
        inject(load(tmp_path, quant="nf4"), rank=4, targets=["expert"])
    layers = inject(load(tmp_path, quant="nf4"), rank=4, rank_pattern={"down_proj": 3}, expert_rank=2)
    assert {path.rpartition(".")[2]: layer.rank for path, layer in layers.items()} == {
        "q_proj": 4,
        "k_proj": 4,
        "v_proj": 4,
        "o_proj": 4,
        "gate_up_proj": 2,
        "down_proj": 3,
    }
    assert adapted_layers(load(tmp_path)) == {}


def test_mxfp4_is_kept_bit_for_bit_or_quantised_again(tmp_path: Path) -> None:
    """transformers dequantises the experts on a machine without a GPU."""
    tiny_experts.write_mxfp4(tmp_path)
    library = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float().eval()
    kept = load(tmp_path, quant="mxfp4")
    again = load(tmp_path, quant="nf4")
    dense = load(tmp_path)
    for path, stack in stacks(kept).items():
        assert isinstance(stack, FrozenExperts)
        assert stack.kind == "mxfp4"
        assert stack.get_buffer("absmax").dtype == torch.uint8
        weight = library.get_parameter(path).detach().mT.flatten(0, 1)
        assert torch.equal(stack.dequantized(), weight)
        assert torch.equal(dense.get_submodule(path).weight, weight)
        assert torch.equal(again.get_submodule(path).dequantized(), dequantize(quantize(weight, "nf4")))
    assert type(kept.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(kept), logits(library), rtol=0, atol=2e-5 * float(logits(library).std()))
    tiny_adapted.move(inject(kept, rank=2, targets="experts"))
    assert torch.isfinite(logits(kept)).all()
    with pytest.raises(UserError, match=r"base\.quant: mxfp4 is read from checkpoints that hold it"):
        load(tiny_experts.write(tmp_path / "dense", "gpt_oss"), quant="mxfp4")


def test_of_mxfp4_weights_that_are_read_in_part_one_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
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
        found = stored_rows(item, slice(2, 9))
        assert torch.equal(found, dequantize(form, torch.bfloat16)[2:9])
        assert sum(each() is not None for each in alive) == 1
    assert len(alive) == 3
    assert torch.equal(item.read(), dequantize(form, torch.bfloat16))
    assert [each() for each in alive] == [None] * 3


def test_experts_whose_scales_are_no_numbers_are_refused(tmp_path: Path) -> None:
    tiny_experts.write_mxfp4(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][2, 5, 1] = 255
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for quant in ("mxfp4", "nf4"):
        with pytest.raises(UserError, match=rf"^model\.source: '{name}' has 1 block scales of 255, which mean NaN"):
            load(tmp_path, quant=quant)


@pytest.mark.parametrize("quant", ["nf4", "mxfp4"])
def test_a_config_that_says_mxfp4_of_dense_experts_is_named(tmp_path: Path, quant: str) -> None:
    tiny_experts.write(tmp_path, "gpt_oss")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(UserError, match=r"config\.json says .* mxfp4, but .* dense\. Fix: remove quant") as raised:
        load(tmp_path, quant=quant)
    assert len(raised.value.faults) == 1


@pytest.mark.parametrize("lost", [["2.up_proj"], ["3.gate_proj", "3.up_proj", "3.down_proj"]])
def test_missing_experts_are_named(tmp_path: Path, lost: list[str]) -> None:
    tiny_experts.make("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = [f"model.layers.1.mlp.experts.{name}.weight" for name in lost]
    for name in names:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as raised:
        load(tmp_path, quant="nf4")
    assert sorted(raised.value.faults) == sorted(
        f"model.source: the checkpoint has no tensor '{name}'." for name in names
    )


def test_llama_4_computes_under_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU lets index_copy take two dtypes under autocast, a GPU does not."""
    copied: list[tuple[torch.dtype, torch.dtype]] = []
    copy = torch.Tensor.index_copy

    def seen(tensor: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        copied.append((tensor.dtype, source.dtype))
        return copy(tensor, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_copy", seen)
    tiny_experts.write(tmp_path, "llama4_text")
    model = load(tmp_path, quant="nf4")
    tiny_adapted.move(inject(model, rank=2, targets="experts"))
    wanted = logits(model)
    copied.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    assert len(copied) == 2
    assert all(one == other for one, other in copied)
    assert float((found.float() - wanted).square().mean()) < 0.01 * float(wanted.var())


def test_dense_experts_that_transformers_replaces_in_4_bits_are_refused(tmp_path: Path) -> None:
    """It builds Llama 4's experts one by one then, and finds no weights for them."""
    tiny_experts.write(tmp_path, "llama4_text")
    model = load(tmp_path, quant="nf4", skip=("lm_head", "experts"))
    inject(model, kind="lora", rank=2, targets=["o_proj"])
    with pytest.raises(UserError, match=r"does not load 4 layers .*gate_up_proj, a stack of experts\)\.") as raised:
        check_foldable(model, torch.float32)
    assert len(raised.value.faults) == 1


def test_masks_of_experts_are_whole_bytes(tmp_path: Path) -> None:
    model = tiny_experts.make("qwen3_moe", hidden_size=62, moe_intermediate_size=62)
    use_expert_layers_(model)
    layers = {path: each for path, each in linear_layers(model).items() if isinstance(each, BareExperts)}
    for path, stack in layers.items():
        keep = torch.ones(stack.out_features, stack.in_features, dtype=torch.bool)
        replace_module(model, path, frozen_like(stack, stack.weight.detach(), None, mask_bits(keep)))
    with pytest.raises(
        UserError, match=r"adapter\.mask: keep, but each expert of .*down_proj has 3844 weights"
    ) as raised:
        inject(model, rank=2, targets="down_proj", masked=True)
    assert len(raised.value.faults) == 1


@pytest.mark.parametrize("name", tiny_experts.MODELS)
def test_dense_layers_that_peft_takes_for_experts(name: str) -> None:
    """By PEFT's own change of a config that names each of them by its path."""
    model, ours = tiny_experts.make(name), tiny_experts.make(name)
    use_expert_layers_(ours)
    ends = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    dense = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and path.endswith(ends)]
    config = LoraConfig(target_modules=[*dense, "o_proj"])
    convert_peft_config_for_transformers(config, model, None)
    assert taken_for_experts(ours, dense) == set(dense) - set(config.target_modules)
