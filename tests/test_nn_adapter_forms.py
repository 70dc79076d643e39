"""Every form of an adapter: numbers against float64 by kind x quant x dtype x masked x gated x experts, with all
parameters off their start; masks and gates in files; whole runs on a pruned base."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from qdora.adapter import dropout
from qdora.adapter.expert_product import ExpertTokens
from qdora.errors import UserError
from qdora.export.export import export_run
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.inject import adapted_layers, inject
from qdora.quant.packed import mask_bits, mask_from_bits
from qdora.rank.components import update_spectrum
from qdora.rank.curvature import plain_model
from qdora.recipe.options import ExportOptions
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from tests import reference, support
from tests.adapter_numbers import (
    arrays,
    assert_close,
    cut_tiles,
    errors_in_bf16,
    expected,
    expected_norm,
    expected_weight,
    make,
    plain_results,
    results,
    to_numpy,
)

COUNTS = (0, 1, 9, 4)
"""Tokens of each expert: none, one and many."""
ALL = [(kind, *rest) for kind in ("lora", "dora") for rest in itertools.product(*3 * [(False, True)])]
ALL += [("magnitude", False, False, stacked) for stacked in (False, True)]
SOME = [
    ("lora", False, True, True),
    ("dora", True, False, True),
    ("lora", True, True, False),
    ("dora", True, True, True),
]
SOME += [("dora", False, False, stacked) for stacked in (False, True)]
EXACT, SINGLE = (None, torch.float64), ("nf4 nested", torch.float32)
QUANTS = (None, "nf4", "fp4", "int8", "int4", "nf3 nested", "int2")
OTHERS = [(quant, torch.float32) for quant in QUANTS]
MATRIX = [(*form, *how) for how in (EXACT, SINGLE) for form in ALL] + [(*form, *how) for how in OTHERS for form in SOME]


def layer_of(kind: str, masked: bool, gated: bool, stacked: bool, **options: Any) -> Any:
    experts = {"num_experts": len(COUNTS)} if stacked else {}
    return make(kind=kind, masked=masked, gated=gated, **experts, **options)


def inputs(layer: Any, dtype: torch.dtype, stacked: bool) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...], Any]:
    """x in a layout of its own, dy, how the tokens divide, and the counts."""
    generator = torch.Generator().manual_seed(1)
    if not stacked:
        x = torch.randn(2, layer.in_features, 7, generator=generator, dtype=dtype).transpose(1, 2)
        return x, torch.randn(2, 7, layer.out_features, generator=generator, dtype=dtype), (), None
    x = torch.randn(14, 2 * layer.in_features, generator=generator, dtype=dtype)[:, ::2]
    dy = torch.randn(14, layer.expert_features, generator=generator, dtype=dtype)
    return x, dy, (ExpertTokens(COUNTS),), COUNTS


@pytest.mark.parametrize(("kind", "masked", "gated", "stacked", "quant", "dtype"), MATRIX)
def test_all_numbers_are_those_of_the_definition(kind, masked, gated, stacked, quant, dtype, monkeypatch):
    if dtype == torch.float32:
        cut_tiles(monkeypatch)
    layer = layer_of(kind, masked, gated, stacked, quant=quant, dtype=dtype)
    with torch.no_grad():
        layer.lora_B[..., 1, :] = 0.0  # row 1 of the base is zero, so g = 0; not where m = 0
        if layer.magnitude is not None:
            layer.magnitude[..., 3] = 0.0
    layer.parameters_changed()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    x, dy, tokens, counts = inputs(layer, dtype, stacked)
    assert not x.is_contiguous()
    found = results(layer, x, dy, *tokens)
    assert_close(found, expected(layer, x, dy, counts=counts), tolerance)
    ours, theirs = {"merged": layer.merged_weight(dtype)}, {"merged": expected_weight(layer)}
    if kind != "lora" or not stacked:
        ours["norm"], theirs["norm"] = layer.row_norm().flatten(), expected_norm(layer)
    if layer.magnitude is not None:
        ours["gain"] = layer.merged_gain().flatten()
        theirs["gain"] = reference.gain(to_numpy(layer.magnitude).ravel(), theirs["norm"])
    assert_close(ours, theirs, tolerance)
    with torch.inference_mode():
        assert torch.equal(layer.eval()(x, *tokens), found["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "masked", "gated", "stacked"), ALL)
def test_step_zero_is_the_quantised_base(
    kind: str, masked: bool, gated: bool, stacked: bool, dtype: torch.dtype
) -> None:
    layer = layer_of(kind, masked, gated, stacked, quant="nf4 nested", dtype=dtype, moved=False)
    x, _, tokens, _ = inputs(layer, dtype, stacked)
    out, base = layer(x, *tokens), layer.base(x, *tokens)
    if masked:  # its norm is summed in another order
        torch.testing.assert_close(out, base, rtol=0.0, atol=1e-5 if dtype == torch.float32 else 0.02)
        return
    assert torch.equal(out, base)
    if kind != "lora":
        assert torch.equal(layer.row_norm(), layer.magnitude)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 30),
    in_=st.integers(1, 70),
    rank=st.integers(1, 5),
    tokens=st.integers(0, 4),
    alpha=st.sampled_from([1e-3, 5.0, 1e3]),
    kind=st.sampled_from(["lora", "dora"]),
    masked=st.booleans(),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
)
def test_any_shape(out, in_, rank, tokens, alpha, kind, masked, bias, dropout) -> None:
    layer = make(
        out=out, in_=in_, rank=min(rank, out, in_), alpha=alpha, kind=kind, masked=masked, bias=bias, dropout=dropout
    ).eval()
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(tokens, size, generator=generator, dtype=torch.float64) for size in (in_, out))
    assert_close(results(layer, x, dy), expected(layer, x, dy), 1e-9)
    layer.train()
    assert layer(x).shape == (tokens, out)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_references_gradients_are_those_of_finite_differences_with_the_norm_held(kind: str) -> None:
    layer = make(kind=kind, masked=True, gated=True, out=4, in_=6, rank=2)
    rng = np.random.default_rng(0)
    x, dy, keep = rng.normal(size=(3, 6)), rng.normal(size=(3, 4)), rng.integers(0, 2, size=(3, 6)) * 2.0
    numbers, bias = arrays(layer), to_numpy(layer.base.bias)
    norm = expected_norm(layer)
    values = {"x": x} | {name: to_numpy(each) for name, each in layer.named_parameters()}
    wanted = expected(layer, torch.tensor(x), torch.tensor(dy), keep=keep)

    def objective(changed: dict[str, Any]) -> float:
        b = reference.gated(changed["lora_B"], changed["gate"])
        given = numbers | {"lora_a": changed["lora_A"], "lora_b": b, "magnitude": changed.get("magnitude")}
        return float((reference.forward(changed["x"], norm=norm, bias=bias, keep=keep, **given) * dy).sum())

    assert len(values) == (5 if kind == "dora" else 4)
    for name, value in values.items():
        for index in np.ndindex(value.shape):
            step = np.zeros(value.shape)
            step[index] = 1e-6
            off = objective(values | {name: value + step}) - objective(values | {name: value - step})
            assert off / 2e-6 == pytest.approx(wanted[name][index], rel=1e-6, abs=1e-8)
    merged = reference.merged_weight(**numbers)
    np.testing.assert_allclose(reference.forward(x, bias=bias, **numbers), x @ merged.T + bias, rtol=1e-12, atol=1e-14)
    given = torch.tensor(x), torch.tensor(dy)
    assert_close(plain_results(layer, *given), expected(layer, *given), 1e-10)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_zeroes_the_same_elements_in_both_directions_and_in_a_recompute(kind, masked, device, monkeypatch):
    """In slices of four tokens, drawn as on a CPU and as on a GPU."""
    monkeypatch.setattr(dropout, "device_kind", lambda _device: device)
    for name in ("_ELEMENTS_PER_SLICE", "_GPU_ELEMENTS_PER_SLICE"):
        monkeypatch.setattr(dropout, name, 300)
    layer = make(kind=kind, masked=masked, gated=device == "cpu", dropout=0.3)
    x, dy, _, _ = inputs(layer, torch.float64, None)
    torch.manual_seed(3)
    keep = to_numpy(dropout.dropped(torch.ones(14, 64, dtype=torch.float64), 0.3, dropout.draw_seed())) / 0.7
    assert 0.2 < (keep == 0).mean() < 0.4
    torch.manual_seed(3)
    found = results(layer, x, dy)
    assert_close(found, expected(layer, x, dy, keep=keep), 1e-10)
    layer.zero_grad()
    torch.manual_seed(3)
    again = checkpoint(layer, x, use_reentrant=False)
    again.backward(dy)
    assert torch.equal(again, found["y"])
    assert all(torch.equal(each.grad, found[name]) for name, each in layer.named_parameters())
    layer.eval()
    assert_close(results(layer, x, dy), expected(layer, x, dy), 1e-10)


@pytest.mark.parametrize(("bias", "gain"), [(10.0, 0), (300.0, 0), (0, 1e-3), (0, 0.02), (0, 0.1), (0, 3.0)])
def test_no_digits_drown_in_a_large_bias_or_in_small_and_large_gains(bias: float, gain: float) -> None:
    layer = make(out=48, in_=128, rank=4, bias=bool(bias), dtype=torch.bfloat16, quant="nf4", alpha=4.0)
    if layer.base.bias is not None:
        layer.base.bias *= bias / 0.1
    else:
        layer.magnitude.data = gain * layer.row_norm()
    ours, plain = errors_in_bf16(layer)
    for name, error in ours.items():
        assert 0 < error <= 2 * plain[name], (name, error, plain[name])


@settings(max_examples=12, deadline=None)
@given(
    out=st.integers(8, 40),
    in_=st.integers(32, 200),
    rank=st.integers(1, 8),
    alpha=st.sampled_from([0.01, 4.0, 3000.0]),
    kind=st.sampled_from(["lora", "dora"]),
    quant=st.sampled_from([None, "nf4", "fp4", "int8"]),
    masked=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_in_bf16_errors_are_at_most_twice_those_of_the_plain_formula(out, in_, rank, alpha, kind, quant, masked, seed):
    """Blocks that cross rows included. Mean of eight inputs: with rank 1 a gradient of B is one column, whose error is
    one number for all rows, now large, now near zero, in either formula."""
    form = {"out": out, "in_": in_, "rank": rank, "alpha": alpha, "kind": kind, "quant": quant, "masked": masked}
    layer = make(dtype=torch.bfloat16, seed=seed, **form)
    found = [errors_in_bf16(layer, seed=seed + number) for number in range(8)]
    for name in found[0][0]:
        error, plain = (np.mean([each[side][name] for each in found]) for side in (0, 1))
        # A rounding of 2^-9 is allowed where the plain formula happens to lose less.
        assert error <= 2 * max(plain, 2.0**-9), (name, error, plain)


def test_a_live_row_of_magnitude_zero_has_its_gradient_in_bf16_too() -> None:
    """What stands in for a magnitude of 0 must not be lost in the products' dtype, nor in the row factor of lora_B."""
    layer = make(out=6, rank=2, bias=False, dtype=torch.bfloat16)
    layer.magnitude.data[3] = 0
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, size, generator=generator).bfloat16() for size in (64, 6))
    found, wanted = results(layer, x, dy), expected(layer, x, dy)
    assert float(found["y"][:, 3].abs().max()) < 1e-25
    np.testing.assert_allclose(float(found["magnitude"][3]), wanted["magnitude"][3], rtol=3e-2)


def test_in_bf16_the_gates_products_norm_and_merge_have_the_same_numbers() -> None:
    """B diag(gate) is rounded to bf16 once: a layer whose B holds that is the same, bit for bit."""
    layer = make(gated=True, dtype=torch.bfloat16, quant="nf4")
    folded = make(dtype=torch.bfloat16, quant="nf4")
    with torch.no_grad():
        folded.lora_B.copy_(layer.gated_B())
    folded.parameters_changed()
    assert torch.equal(folded.lora_B, layer.stored_B())
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(layer(x.to(dtype)), folded(x.to(dtype)))
    assert torch.equal(layer.merged_weight(), folded.merged_weight())
    assert torch.equal(layer.row_norm(), folded.row_norm())
    layer.lora_B.grad_dtype = torch.float32
    layer(x.bfloat16()).float().square().sum().backward()
    assert not torch.equal(layer.lora_B.grad, layer.lora_B.grad.bfloat16().float()), "the gradient of B was rounded"


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_without_its_dead_components_a_layer_is_the_same(kind: str, stacked: bool, rank_stabilized: bool) -> None:
    layer = layer_of(kind, False, True, stacked, rank=5, rank_stabilized=rank_stabilized)
    layer.gate.data.copy_(torch.tensor([0.7, 0.0, -1.3, 0.0, 0.1]))
    x, dy, tokens, counts = inputs(layer, torch.float64, stacked)
    wanted, merged, scaling = expected(layer, x, dy, counts=counts), layer.merged_weight(torch.float64), layer.scaling
    parameters, per_rank = list(layer.parameters()), layer.parameters_per_rank
    assert_close(results(layer, x, dy, *tokens), wanted, 1e-10)
    layer.keep_components_((layer.gate != 0).nonzero()[:, 0])
    assert (layer.rank, layer.lora_A.shape[-2], layer.lora_B.shape[-1], len(layer.gate)) == (3, 3, 3, 3)
    assert layer.scaling == pytest.approx(scaling, rel=1e-15)
    assert layer.parameters_per_rank == per_rank
    assert per_rank * 3 == layer.lora_A.numel() + layer.lora_B.numel()
    assert all(old is new for old, new in zip(parameters, layer.parameters(), strict=True))
    after = results(layer, x, dy, *tokens)
    assert_close({"y": after["y"]}, {"y": wanted["y"]}, 1e-10)
    assert_close(after, expected(layer, x, dy, counts=counts), 1e-10)
    torch.testing.assert_close(layer.merged_weight(torch.float64), merged, rtol=1e-12, atol=1e-13)


def test_files_and_analyses_take_the_gated_factor(tmp_path: Path) -> None:
    """An adapter that is written with gates is read without them, and computes the same."""
    model = support.adapted_model("llama", quant="nf4")
    for number, layer in enumerate(adapted_layers(model).values()):
        layer.add_gate()
        layer.gate.data.copy_(torch.tensor([0.5 + 0.01 * number, 0.0, 1.25]))  # type: ignore[union-attr]
    before = support.logits_of(model)
    save_adapter(model, tmp_path / "adapter", base_name_or_path="x", revision=None, base_quant={"quant": "nf4"})
    again = support.base_model("llama", quant="nf4")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(support.logits_of(again), before)
    for first, second in zip(adapted_layers(model).values(), adapted_layers(again).values(), strict=True):
        assert np.array_equal(update_spectrum(first).energies, update_spectrum(second).energies)
    with plain_model(model, ["model.layers.0.self_attn.q_proj"], norm="held"):
        torch.testing.assert_close(support.logits_of(model), before, rtol=1e-4, atol=1e-4)


RUNS = [("dora", "nf4", "2:4"), ("lora", "int8", "unstructured"), ("magnitude", "int2", "unstructured")]


@pytest.mark.parametrize("kind, quant, pattern", RUNS)
def test_trained_and_merged_the_zeros_are_those_of_the_pruned_base(tmp_path, kind, quant, pattern):
    prune: dict[str, Any] = {"method": "magnitude", "pattern": pattern}
    if pattern == "unstructured":
        prune["sparsity"] = 0.6
    adapter: dict[str, Any] = {"adapter__kind": kind, "adapter__mask": "keep"}
    if kind == "magnitude":
        adapter = {"adapter__kind": kind} | {f"adapter__{each}": ... for each in ("rank", "alpha", "dropout")}
    options: dict[str, Any] = {"eval__tasks": [], "eval__limit": ..., "train__checkpoint_every": ..., "train__lr": 1e-2}
    options |= {"base__prune": prune, "base__quant": quant} | adapter
    train_run(support.tiny_recipe(tmp_path, **options), tmp_path / "run")
    result = export_run(tmp_path / "run", tmp_path / "merged", ExportOptions(dtype="float32"))
    assert result["verification"]["passed"]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    layers = adapted_layers(load_run(tmp_path / "run").model)
    assert len(layers) == 14
    assert all(layer.masked == (kind != "magnitude") for layer in layers.values())
    for path, layer in layers.items():
        zeros, bits, start = merged[f"{path}.weight"] == 0, layer.base.keep_bits, layer.base.dequantized()
        assert not torch.equal(layer.merged_weight(), start), path
        if kind == "magnitude":
            # Only rows are scaled: every zero of the base is there, those of its quantisation, too.
            assert torch.equal(zeros, start == 0)
            assert not layer.lora_B.any()
        else:
            assert torch.equal(mask_bits(~zeros), bits), path
        keep = mask_from_bits(bits, (start.shape[0], start.shape[1]))
        assert bool(zeros[~keep].all())
        if pattern == "2:4":
            assert int((~zeros).view(-1, 4).sum(1).max()) <= 2
    if (kind, quant, pattern) != RUNS[0]:
        return
    for refused in ("peft", "nf4-lora"):
        with pytest.raises(UserError, match="cannot mask B A"):
            export_run(tmp_path / "run", tmp_path / refused, ExportOptions(format=refused))
    with pytest.raises((KeyError, ValueError), match="MASKED"):
        PeftConfig.from_pretrained(str(tmp_path / "run" / "adapter"))
    for call in (
        lambda model: load_adapter(model, tmp_path / "run" / "adapter"),
        lambda model: inject(model, rank=2, masked=True),
    ):
        with pytest.raises(UserError, match=r"keep.* was not pruned"):
            call(support.resident_model(tmp_path / "model"))


def test_an_adapter_that_ignores_the_mask_merges_dense(tmp_path: Path) -> None:
    prune = {"method": "magnitude", "pattern": "2:4"}
    recipe = support.tiny_recipe(tmp_path, base__prune=prune, train__steps=2, eval__tasks=[], eval__limit=...)
    train_run(recipe, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "merged", ExportOptions(dtype="float32"))
    weights = load_file(tmp_path / "merged" / "model.safetensors").items()
    values = torch.cat([weight.flatten() for name, weight in weights if "proj" in name])
    assert (values == 0).float().mean() < 0.01
    with pytest.raises(UserError, match=r"--requantize: .*pruned base"):
        export_run(tmp_path / "run", tmp_path / "again", ExportOptions(requantize=True))
