"""Adapters that keep the zeros of a pruned base: forward, norm, gradients and merge against float64, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qdora.errors import UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.inject import adapted_layers, inject
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops import masked_update
from qdora.ops.adapted_product import adapted_linear
from qdora.ops.dropout import draw_seed, dropped
from qdora.ops.packed import quantize
from qdora.ops.prune import prune_weight
from qdora.ops.sparsity import mask_bits, mask_from_bits, pattern_from
from qdora.run.load_run import load_run
from qdora.run.train import train_run
from tests import reference_prune as reference
from tests import tiny, tiny_adapted, tiny_run

NAMES = ("unstructured", "2:4", "rows", "columns")


def layer_of(
    pattern: str = "unstructured",
    *,
    kind: Any = "dora",
    out: int = 13,
    in_: int = 24,
    rank: int = 3,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    quant: str | None = None,
    masked: bool = True,
    moved: bool = True,
    **options: Any,
) -> AdaptedLinear:
    """A layer on a pruned random base, its parameters off their start."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(out, in_, generator=generator, dtype=torch.float64) * 0.1
    wanted = pattern_from(pattern, None if ":" in pattern else 0.4)
    pruned = prune_weight(weight, "magnitude", wanted)
    stored = quantize(pruned.weight.float(), quant, 64) if quant else pruned.weight.to(dtype)
    b = (torch.randn(out, generator=generator, dtype=torch.float64) * 0.1).to(dtype) if bias else None
    base = FrozenLinear(stored, b, mask_bits(pruned.keep_mask))
    layer = AdaptedLinear(base, kind=kind, rank=rank, dtype=dtype, masked=masked, generator=generator, **options)
    if dtype == torch.float64 and layer.magnitude is not None:
        layer.magnitude.data = layer.magnitude.data.double()
    if moved:
        tiny.move_all_parameters_(layer, seed=1)
    return layer


def numbers(layer: AdaptedLinear) -> dict[str, Any]:
    """The layer as the reference takes it."""
    keep = layer.base.keep_mask()
    assert keep is not None
    return {
        "weight": layer.base.dequantized(torch.float64).numpy(),
        "keep": keep.numpy(),
        "lora_a": layer.lora_A.detach().double().numpy(),
        "lora_b": layer.lora_B.detach().double().numpy(),
        "scaling": layer.alpha / layer.rank,
        "magnitude": None if layer.magnitude is None else layer.magnitude.detach().double().numpy(),
    }


def tokens(count: int = 6, in_: int = 24, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, in_, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


@pytest.fixture(params=[1, 5, 1024])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(masked_update, "_ROWS", request.param)
    return request.param


# ------------------------------------------------------------------------------------------------ against float64


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("pattern", NAMES)
def test_forward_norm_and_merge(pattern: str, kind: str, quant: str | None, rows_at_once: int) -> None:
    layer = layer_of(pattern, kind=kind, quant=quant)
    given = numbers(layer)
    merged, norm = reference.masked_weight(**given)
    x = tokens()
    bias = layer.base.bias.numpy()
    out = layer(x).detach().numpy()
    # A quantised base has its norms in float32.
    tolerance = 1e-12 if quant is None else 2e-6
    np.testing.assert_allclose(out, reference.masked_forward(x.numpy(), **given, bias=bias), rtol=0, atol=tolerance)
    np.testing.assert_allclose(out, x.numpy() @ merged.T + bias, rtol=0, atol=tolerance)
    np.testing.assert_allclose(layer.row_norm().numpy(), norm, rtol=tolerance, atol=1e-15)
    np.testing.assert_allclose(
        layer.merged_weight(torch.float64).numpy(), merged, rtol=1e-7 if quant else 1e-12, atol=1e-7 if quant else 0
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("pattern", ["unstructured", "rows"])
def test_gradients(pattern: str, kind: str, dropout: float, rows_at_once: int) -> None:
    layer = layer_of(pattern, kind=kind, dropout=dropout).train()
    x = tokens().requires_grad_()
    dy = torch.randn(6, 13, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    drop = None
    if dropout:
        torch.manual_seed(3)
        seed = draw_seed()
        drop = dropped(torch.ones_like(x), dropout, seed).detach().numpy() / (1 - dropout)
        assert 0 < (drop == 0).mean() < 0.6
    torch.manual_seed(3)
    out = layer(x)
    out.backward(dy)
    given = numbers(layer)
    expected = reference.masked_forward(x.detach().numpy(), **given, bias=layer.base.bias.numpy(), drop=drop)
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=0, atol=1e-12)
    dx, da, db, dm = reference.masked_gradients(x.detach().numpy(), dy.numpy(), **given, drop=drop)
    np.testing.assert_allclose(x.grad.numpy(), dx, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(layer.lora_A.grad.numpy(), da, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(layer.lora_B.grad.numpy(), db, rtol=1e-10, atol=1e-13)
    if layer.magnitude is not None:
        np.testing.assert_allclose(layer.magnitude.grad.numpy(), dm, rtol=1e-10, atol=1e-13)


def test_gradcheck_with_the_norm_held_fixed() -> None:
    layer = layer_of("2:4", out=6, in_=8, rank=2)
    gain = layer.gain(torch.float64)
    weight, bits = layer.base.stored_weight, layer.base.keep_bits
    norm = (layer.magnitude / gain.value).detach()

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        held = type(gain)((m / norm).detach(), m.detach().reciprocal())
        bias = layer.base.bias
        return adapted_linear(x, weight, a, b, 1.5, bias=bias, magnitude=m, gain=held, keep_bits=bits)

    inputs = [tokens(3, 8), layer.lora_A.detach(), layer.lora_B.detach(), layer.magnitude.detach()]
    assert torch.autograd.gradcheck(run, [each.clone().requires_grad_() for each in inputs])


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_bfloat16_is_no_worse_than_the_plain_formula(kind: str) -> None:
    layer = layer_of("2:4", kind=kind, out=64, in_=128, rank=8, bias=False, dtype=torch.bfloat16, quant="nf4")
    given = numbers(layer)
    x = tokens(40, 128, torch.bfloat16).requires_grad_()
    dy = tokens(40, 64, torch.bfloat16)
    out = layer(x)
    out.backward(dy)
    exact = reference.masked_weight(**given)[0]
    expected = x.detach().double().numpy() @ exact.T
    base = layer.base.dequantized(torch.bfloat16)
    delta = (layer.lora_B @ layer.lora_A).detach() * layer.scaling * layer.base.keep_mask()
    plain = x.detach() @ base.T + x.detach() @ delta.bfloat16().T
    if layer.magnitude is not None:
        norm = (base.float() + delta.float()).norm(dim=1)
        plain = plain * (layer.magnitude.detach() / norm).bfloat16()
    error = np.linalg.norm(out.detach().double().numpy() - expected)
    assert error <= 2 * np.linalg.norm(plain.double().numpy() - expected)
    dx = dy.double().numpy() @ exact
    assert np.linalg.norm(x.grad.double().numpy() - dx) < 0.01 * np.linalg.norm(dx)


@pytest.mark.parametrize("pattern", NAMES)
def test_the_fresh_layer_is_the_base_and_a_zero_row_stays_zero(pattern: str) -> None:
    layer = layer_of(pattern, moved=False, bias=False)
    x = tokens()
    torch.testing.assert_close(layer(x).detach(), x @ layer.base.dequantized(torch.float64).T, rtol=1e-14, atol=1e-14)
    moved = layer_of("rows", bias=False)
    gone = ~moved.base.keep_mask().any(dim=1)
    assert int(gone.sum()) == 5
    assert not moved(x)[:, gone].any()
    assert bool(moved(x).isfinite().all())


def test_without_pruned_weights_it_is_the_plain_layer() -> None:
    layer = layer_of("unstructured")
    layer.base.keep_bits = mask_bits(torch.ones(13, 24, dtype=torch.bool))
    masked = layer(tokens())
    layer.masked = False
    layer.parameters_changed()
    torch.testing.assert_close(masked, layer(tokens()), rtol=1e-12, atol=1e-12)


def test_an_input_in_any_layout_with_dropout() -> None:
    layer = layer_of(dropout=0.3)
    values = torch.randn(1, 24, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for x in (values.transpose(1, 2), values.transpose(1, 2).contiguous()):
        leaf = x.detach().requires_grad_()
        torch.manual_seed(5)
        y = layer(leaf)
        y.sum().backward()
        found.append((y.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_frozen_magnitude_keeps_no_output() -> None:
    layer = layer_of()
    assert layer.magnitude is not None
    sizes: dict[bool, list[int]] = {}
    for trains in (True, False):
        layer.magnitude.requires_grad_(trains)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = layer(tokens(5))
        sizes[trains] = [t.numel() for t in kept if t.shape == y.shape]
    assert sizes == {True: [5 * 13], False: []}


def test_the_norm_follows_the_parameters() -> None:
    layer = layer_of("2:4").eval()
    x = tokens()
    _, norm = reference.masked_weight(**numbers(layer))
    np.testing.assert_allclose(layer.merged_gain().numpy(), layer.magnitude.detach().numpy() / norm, rtol=1e-12)
    with torch.no_grad():
        before = layer(x)
        layer.lora_B += 0.3
        after = layer(x)
    assert not torch.equal(before, after)
    expected = reference.masked_forward(x.numpy(), **numbers(layer), bias=layer.base.bias.numpy())
    np.testing.assert_allclose(after.numpy(), expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ files and errors


def test_masked_adapters_are_saved_and_refused_by_peft(tmp_path: Path) -> None:
    from peft import PeftConfig

    model, again = masked_model(), masked_model()
    layers = inject(model, rank=2, masked=True, generator=torch.Generator().manual_seed(0))
    tiny_adapted.move(layers)
    save_adapter(model, tmp_path / "a", base_name_or_path="x", revision=None, base_quant={"quant": "none"})
    loaded = load_adapter(again, tmp_path / "a")
    assert all(layer.masked for layer in loaded.values())
    assert torch.equal(tiny_adapted.logits(model), tiny_adapted.logits(again))
    with pytest.raises((KeyError, ValueError), match="MASKED"):
        PeftConfig.from_pretrained(str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"keep, but 14 adapted layers were not pruned \(e.g. model.layers.0"):
        load_adapter(tiny_adapted.base(), tmp_path / "a")


def masked_model() -> nn.Module:
    """A tiny Llama whose linear layers but the head are pruned to 2:4."""
    model = tiny_adapted.base()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            pruned = prune_weight(module.weight.data, "magnitude", pattern_from("2:4"))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FrozenLinear(pruned.weight, None, mask_bits(pruned.keep_mask)))
    return model


def test_a_mask_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="pruned here"):
        AdaptedLinear(FrozenLinear(torch.randn(4, 8)), rank=2, masked=True)
    with pytest.raises(UserError, match=r"adapter\.mask: keep, but 14 adapted layers were not pruned"):
        inject(tiny_adapted.base(), rank=2, masked=True)


# ------------------------------------------------------------------------------------------------ whole runs


def merged_zeros(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor == 0 for name, tensor in load_file(directory / "model.safetensors").items()}


RUNS = [("dora", "nf4", "2:4"), ("dora", "none", "unstructured"), ("lora", "int8", "2:4")]
RUNS += [("magnitude", "nf4", "unstructured")]
SLOW_RUNS = [("dora", "nf4", "unstructured"), ("dora", "none", "2:4"), ("lora", "int8", "unstructured")]
SLOW_RUNS += [("magnitude", "nf4", "2:4")]


@pytest.mark.parametrize(
    "kind, quant, pattern", [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in SLOW_RUNS)]
)
def test_trained_and_merged_the_zeros_are_those_of_the_pruned_base(
    tmp_path: Path, kind: str, quant: str, pattern: str
) -> None:
    prune: dict[str, Any] = {"method": "magnitude", "pattern": pattern}
    if pattern == "unstructured":
        prune["sparsity"] = 0.6
    adapter: dict[str, Any] = {"adapter__kind": kind}
    if kind == "magnitude":
        adapter |= {"adapter__rank": ..., "adapter__alpha": ..., "adapter__dropout": ...}
    else:
        adapter |= {"adapter__mask": "keep"}
    recipe = tiny_run.recipe(
        tmp_path,
        base__prune=prune,
        base__quant=quant,
        train__lr=1e-2,
        eval__tasks=[],
        eval__limit=...,
        train__checkpoint_every=...,
        **adapter,
    )
    train_run(recipe, tmp_path / "run")
    options = ExportOptions(dtype="float32", audit=(kind, pattern) == ("dora", "2:4"))
    result = export_run(tmp_path / "run", tmp_path / "merged", options)
    assert result["verification"]["passed"]
    if "audit" in result:
        check_audit(result["audit"], quant)
    assert result["zeros"] == {"pruned": result["zeros"]["pruned"], "kept": result["zeros"]["pruned"]}
    zeros = merged_zeros(tmp_path / "merged")
    trained = load_run(tmp_path / "run")
    layers = adapted_layers(trained.model)
    assert len(layers) == 14
    for path, layer in layers.items():
        found = zeros[f"{path}.weight"]
        bits = layer.base.keep_bits
        start = layer.base.dequantized()
        assert not torch.equal(layer.merged_weight(), start), path
        if kind == "magnitude":
            # Only rows are scaled: every zero of the base is there, those of its quantisation, too.
            assert torch.equal(found, start == 0)
            assert not layer.lora_B.any()
        else:
            assert torch.equal(mask_bits(~found), bits), path
        keep = mask_from_bits(bits, tuple(start.shape))
        assert bool(found[~keep].all())
        if pattern == "2:4":
            assert int((~found).view(-1, 4).sum(1).max()) <= 2


def check_audit(audit: dict[str, Any], quant: str) -> None:
    """The merge is the model; there is no source to merge on, and no plain LoRA that masks."""
    forms = audit["forms"]
    assert forms["merged"]["logits"]["kl_mean"] < 1e-8
    assert forms["base"]["logits"]["kl_mean"] > 1e-6
    assert forms["original"]["why_not"] == "the base is pruned, and the source's own weights are not"
    assert "plain LoRA cannot mask B A" in forms["nf4-lora"]["why_not"]
    assert ("logits" in forms["requantized"]) == (quant == "nf4")


def test_an_adapter_that_ignores_the_mask_merges_dense_and_says_so(tmp_path: Path) -> None:
    prune = {"method": "magnitude", "pattern": "2:4"}
    recipe = tiny_run.recipe(tmp_path, base__prune=prune, train__steps=2, eval__tasks=[], eval__limit=...)
    train_run(recipe, tmp_path / "run")
    result = export_run(tmp_path / "run", tmp_path / "merged", ExportOptions(dtype="float32", audit=True))
    assert result["zeros"]["kept"] < 0.01 * result["zeros"]["pruned"]
    forms = result["audit"]["forms"]
    assert forms["merged"]["logits"]["kl_mean"] < 1e-8
    assert "why_not" in forms["original"]
    with pytest.raises(UserError, match=r"--requantize: not possible, the base is pruned\. Fix: remove --requantize"):
        export_run(tmp_path / "run", tmp_path / "again", ExportOptions(requantize=True))


def test_masked_adapters_are_not_exported_for_peft(tmp_path: Path) -> None:
    prune = {"method": "magnitude", "pattern": "2:4"}
    recipe = tiny_run.recipe(
        tmp_path, base__prune=prune, adapter__mask="keep", train__steps=1, eval__tasks=[], eval__limit=...
    )
    train_run(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="PEFT cannot mask B A"):
        export_run(tmp_path / "run", tmp_path / "peft", ExportOptions(format_="peft"))
    with pytest.raises(UserError, match="plain LoRA cannot mask B A"):
        export_run(tmp_path / "run", tmp_path / "folded", ExportOptions(format_="nf4-lora"))
