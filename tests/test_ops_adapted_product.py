"""The adapted layer against float64 loops: forward, every gradient, merge, norm, dropout, odd shapes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.dora import merged_weight, row_norm, squared_row_norm
from qdora.ops.packed import quantize
from qdora.train.optimizer import AdapterOptimizer
from tests import reference, tiny


def norm_of(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The row norm with products in the weight's own dtype."""
    squared = squared_row_norm(weight)
    return row_norm(weight, lora_A, lora_B, scaling, base_squared=squared, dtype=weight.dtype)


def to_numpy(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().numpy().copy()


def arrays(layer: AdaptedLinear) -> dict[str, Any]:
    return {
        "weight": to_numpy(layer.base.dequantized(torch.float64)),
        "lora_a": to_numpy(layer.lora_A),
        "lora_b": to_numpy(layer.lora_B),
        "scaling": layer.alpha / layer.rank,
        "magnitude": to_numpy(layer.magnitude),
    }


SHAPES = [(24, 40, 3), (1, 7, 1), (13, 64, 13), (64, 1, 1), (5, 96, 2)]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_every_gradient_in_float64(kind: str, bias: bool, shape: tuple[int, int, int]) -> None:
    out, in_, rank = shape
    layer = tiny.adapted_linear(out=out, in_=in_, rank=rank, bias=bias, kind=kind, alpha=5.0)
    tiny.move_all_parameters_(layer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, in_, 5, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
    dy = torch.randn(3, 5, out, generator=generator, dtype=torch.float64)
    assert not x.is_contiguous() or in_ == 1
    y = layer(x)
    y.backward(dy)

    numbers = arrays(layer)
    flat_x, flat_dy = to_numpy(x).reshape(-1, in_), to_numpy(dy).reshape(-1, out)
    expected = reference.forward(flat_x, bias=to_numpy(layer.base.bias), **numbers)
    expected_grads = reference.gradients(flat_x, flat_dy, **numbers)
    np.testing.assert_allclose(to_numpy(y).reshape(-1, out), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(to_numpy(x.grad).reshape(-1, in_), expected_grads.x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(to_numpy(layer.lora_A.grad), expected_grads.lora_a, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(to_numpy(layer.lora_B.grad), expected_grads.lora_b, rtol=1e-10, atol=1e-12)
    if kind == "dora":
        assert layer.magnitude is not None
        np.testing.assert_allclose(to_numpy(layer.magnitude.grad), expected_grads.magnitude, rtol=1e-10, atol=1e-12)
    else:
        assert layer.magnitude is None


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_equal_finite_differences_with_the_norm_held(kind: str) -> None:
    """The reference's chain rule itself is checked against differences of the reference's forward."""
    layer = tiny.adapted_linear(out=4, in_=6, rank=2, bias=True, kind=kind)
    tiny.move_all_parameters_(layer)
    numbers = arrays(layer)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(3, 6)), rng.normal(size=(3, 4))
    norm = reference.row_norm(numbers["weight"], numbers["lora_a"], numbers["lora_b"], numbers["scaling"])
    grads = reference.gradients(x, dy, **numbers)

    def objective(**changed: Any) -> float:
        inputs = {"x": x, **numbers, **changed}
        return float((reference.forward(**inputs, norm=norm) * dy).sum())

    named = {
        "x": (x, grads.x),
        "lora_a": (numbers["lora_a"], grads.lora_a),
        "lora_b": (numbers["lora_b"], grads.lora_b),
    }
    if kind == "dora":
        named["magnitude"] = (numbers["magnitude"], grads.magnitude)
    for name, (value, grad) in named.items():
        for index in np.ndindex(value.shape):
            plus, minus = value.copy(), value.copy()
            plus[index] += 1e-6
            minus[index] -= 1e-6
            difference = (objective(**{name: plus}) - objective(**{name: minus})) / 2e-6
            assert difference == pytest.approx(grad[index], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("quant", [None, "nf4", "fp4", "int8"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_merged_away_from_init(quant: str | None, kind: str, bias: bool) -> None:
    layer = tiny.adapted_linear(out=24, in_=72, rank=4, bias=bias, kind=kind, dtype=torch.float32, quant=quant)
    tiny.move_all_parameters_(layer)
    x = torch.randn(9, 72, generator=torch.Generator().manual_seed(2))
    merged = reference.merged_weight(**arrays(layer))
    assert reference.relative_error(to_numpy(layer.merged_weight()), merged) < 1e-6
    expected = to_numpy(x) @ merged.T + (to_numpy(layer.base.bias) if bias else 0.0)
    assert reference.relative_error(to_numpy(layer(x)), expected) < 1e-6


def plain_error(layer: AdaptedLinear, x: torch.Tensor, dy: torch.Tensor, expected: Any, grads: Any) -> dict[str, float]:
    """Errors of the textbook formula in the layer's own dtype: dense sum, its norm, autograd."""
    w = layer.base.dequantized(x.dtype)
    a, b = (p.detach().to(x.dtype).requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x = x.detach().requires_grad_()
    y = x @ w.T + layer.scaling * ((x @ a.T) @ b.T)
    m = None
    if layer.magnitude is not None:
        m = layer.magnitude.detach().to(x.dtype).requires_grad_()
        y = y * (m / (w + layer.scaling * (b @ a)).norm(dim=1).detach())
    if layer.base.bias is not None:
        y = y + layer.base.bias.to(x.dtype)
    y.backward(dy)
    errors = {
        "y": reference.relative_error(to_numpy(y), expected),
        "x": reference.relative_error(to_numpy(x.grad), grads.x),
        "a": reference.relative_error(to_numpy(a.grad), grads.lora_a),
        "b": reference.relative_error(to_numpy(b.grad), grads.lora_b),
    }
    if m is not None:
        errors["m"] = reference.relative_error(to_numpy(m.grad), grads.magnitude)
    return errors


def errors_in_bf16(layer: AdaptedLinear, seed: int = 3) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of the layer and of the plain formula against float64, both in bf16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, layer.in_features, generator=generator).bfloat16().requires_grad_()
    dy = torch.randn(64, layer.out_features, generator=generator).bfloat16()
    y = layer(x)
    y.backward(dy)
    numbers = arrays(layer)
    expected = reference.forward(to_numpy(x), bias=to_numpy(layer.base.bias), **numbers)
    grads = reference.gradients(to_numpy(x), to_numpy(dy), **numbers)
    ours = {
        "y": reference.relative_error(to_numpy(y), expected),
        "x": reference.relative_error(to_numpy(x.grad), grads.x),
        "a": reference.relative_error(to_numpy(layer.lora_A.grad), grads.lora_a),
        "b": reference.relative_error(to_numpy(layer.lora_B.grad), grads.lora_b),
    }
    if layer.magnitude is not None:
        ours["m"] = reference.relative_error(to_numpy(layer.magnitude.grad), grads.magnitude)
    return ours, plain_error(layer, x, dy, expected, grads)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_error_is_at_most_twice_that_of_the_plain_formula(kind: str, bias: bool) -> None:
    layer = tiny.adapted_linear(out=96, in_=128, rank=8, bias=bias, kind=kind, dtype=torch.bfloat16, quant="nf4")
    tiny.move_all_parameters_(layer)
    ours, plain = errors_in_bf16(layer)
    for name, error in ours.items():
        assert error <= 2 * plain[name], (name, error, plain[name])
        assert error > 0


@pytest.mark.parametrize("size", [10.0, 300.0])
def test_a_large_bias_does_not_drown_the_gradient_of_the_magnitude(size: float) -> None:
    layer = tiny.adapted_linear(out=48, in_=128, rank=4, bias=True, dtype=torch.bfloat16, quant="nf4")
    tiny.move_all_parameters_(layer, scale=0.05)
    assert layer.base.bias is not None
    layer.base.bias *= size / 0.1
    ours, plain = errors_in_bf16(layer)
    for name, error in ours.items():
        assert error <= 2 * plain[name], (name, error, plain[name])


@pytest.mark.parametrize("gain_", [1e-3, 0.02, 0.1, 3.0])
def test_small_and_large_gains_keep_their_digits(gain_: float) -> None:
    layer = tiny.adapted_linear(out=48, in_=128, rank=4, dtype=torch.bfloat16, quant="nf4")
    tiny.move_all_parameters_(layer, scale=0.05)
    assert layer.magnitude is not None
    with torch.no_grad():
        layer.magnitude.copy_(gain_ * layer.row_norm())
    ours, plain = errors_in_bf16(layer)
    for name, error in ours.items():
        assert error <= 2 * plain[name], (name, error, plain[name])


def test_row_norm_of_bf16_weights_where_the_adapter_shortens_the_row() -> None:
    """W A^T runs in bf16: a row left with 0.05 to 1 of its length is off by no more than bf16's own rounding."""
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(400, 2)), rng.normal(size=(2, 64))
    left = np.linspace(0.05, 0.99, 400)[:, None]
    w = torch.tensor(-(b @ a) / (1 - left)).bfloat16()
    a16, b16 = torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16()
    expected = reference.row_norm(w.double().numpy(), a16.double().numpy(), b16.double().numpy(), 1.0)
    got = norm_of(w, a16, b16, 1.0).double().numpy()
    assert np.max(np.abs(got / expected - 1)) < 2**-8 * 2


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    layer = tiny.adapted_linear(out=4, in_=6, rank=2)
    tiny.move_all_parameters_(layer)
    y = layer(torch.randn(3, 6, dtype=torch.float64)).square().sum()
    (gradient,) = torch.autograd.grad(y, [layer.lora_A], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 9),
    in_=st.integers(1, 17),
    rank=st.integers(1, 5),
    scaling=st.sampled_from([1e-3, 0.5, 2.0, 1e3]),
    seed=st.integers(0, 10**6),
)
def test_row_norm_is_exact_for_any_shape(out: int, in_: int, rank: int, scaling: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, a, b = rng.normal(size=(out, in_)), rng.normal(size=(rank, in_)), rng.normal(size=(out, rank))
    got = norm_of(torch.tensor(w), torch.tensor(a), torch.tensor(b), scaling)
    np.testing.assert_allclose(got.numpy(), reference.row_norm(w, a, b, scaling), rtol=1e-8)  # terms of 1e7 may cancel


@pytest.mark.parametrize("left", [0.5, 0.1, 1e-2, 1 / 400, 0.0])
def test_row_norm_where_the_adapter_cancels_the_row(left: float) -> None:
    """B A = -(1 - left) W on every row: the factored sum cancels, the direct norm must take over."""
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(6, 2)), rng.normal(size=(2, 32))
    w = -(b @ a) / (1 - left) * 0.5 if left < 1 else b @ a
    w32 = torch.tensor(w, dtype=torch.float32)
    a32, b32 = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    expected = reference.row_norm(w32.double().numpy(), a32.double().numpy(), b32.double().numpy(), 0.5)
    got = norm_of(w32, a32, b32, 0.5).double().numpy()
    scale = np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(got / scale, expected / scale, rtol=2e-5, atol=2e-7)


def test_zero_rows_of_an_nf4_base_train_and_merge_by_the_formula() -> None:
    """g = 0 in a zero row of W + s B A (row 1, which stays so), not where B moved (row 7) or where m = 0 (row 3)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 64, generator=generator)
    weight[[1, 7]] = 0
    layer = AdaptedLinear(FrozenLinear(quantize(weight, "nf4", 64, double_quant=True)), rank=2, dtype=torch.float32)
    tiny.move_all_parameters_(layer)
    assert layer.magnitude is not None
    with torch.no_grad():
        layer.lora_B[1], layer.magnitude[1], layer.magnitude[3] = 0, 0, 0
    x, dy = (torch.randn(4, size, generator=generator, requires_grad=True) for size in (64, 12))
    fixed = {name: value for name, value in arrays(layer).items() if name in ("weight", "scaling")}
    assert not fixed["weight"][[1, 7]].any()
    start = {name: value for name, value in arrays(layer).items() if name not in fixed}
    now, grads = start, {name: [] for name in start}
    optimizer = AdapterOptimizer(dict(layer.named_parameters()), name="adamw")
    for _ in range(3):
        y = layer(x)
        (dx,) = torch.autograd.grad(y, [x], dy, retain_graph=True)
        y.backward(dy)
        expected = reference.gradients(to_numpy(x), to_numpy(dy), **fixed, **now)
        np.testing.assert_allclose(to_numpy(y), reference.forward(to_numpy(x), **fixed, **now), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(to_numpy(dx), expected.x, rtol=1e-4, atol=1e-5)
        for name, values in grads.items():
            values.append(getattr(expected, name))
            got = to_numpy(layer.get_parameter(name.replace("_a", "_A").replace("_b", "_B")).grad)
            np.testing.assert_allclose(got, values[-1], rtol=1e-4, atol=1e-4)
        optimizer.step(0.01)
        optimizer.zero_grad()
        now = {name: reference.adamw(start[name], values, 0.01) for name, values in grads.items()}
    merged = to_numpy(layer.merged_weight())
    np.testing.assert_allclose(merged, reference.merged_weight(**fixed, **now), rtol=1e-3, atol=1e-5)
    assert [row for row in range(12) if not merged[row].any()] == [1]
    assert now["magnitude"][3] != 0


def test_a_live_row_of_magnitude_zero_has_its_gradient_in_bf16_too() -> None:
    """What stands in for a magnitude of 0 must not be lost in the products' dtype, nor in the row factor of lora_B."""
    torch.manual_seed(0)
    layer = tiny.adapted_linear(out=6, in_=64, rank=2, dtype=torch.bfloat16)
    tiny.move_all_parameters_(layer)
    assert layer.magnitude is not None
    with torch.no_grad():
        layer.magnitude[3] = 0
    x, dy = torch.randn(8, 64).bfloat16(), torch.randn(8, 6).bfloat16()
    y = layer(x)
    y.backward(dy)
    grads = reference.gradients(to_numpy(x), to_numpy(dy), **arrays(layer))
    assert float(y[:, 3].detach().abs().max()) < 1e-25
    np.testing.assert_allclose(float(layer.magnitude.grad[3]), grads.magnitude[3], rtol=3e-2)  # type: ignore[index]


def test_an_input_in_any_layout_with_dropout() -> None:
    layer = tiny.adapted_linear(out=24, in_=40, dropout=0.3)
    tiny.move_all_parameters_(layer)
    values = torch.randn(1, 40, 7, dtype=torch.float64)
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
    layer = tiny.adapted_linear(out=24, in_=8)
    assert layer.magnitude is not None
    sizes: dict[bool, list[int]] = {}
    for trains in (True, False):
        layer.magnitude.requires_grad_(trains)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = layer(torch.randn(5, 8, dtype=torch.float64))
        sizes[trains] = [t.numel() for t in kept if t.shape == y.shape]
    assert sizes == {True: [5 * 24], False: []}


def test_step_zero_is_exactly_the_base() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = tiny.adapted_linear(out=32, in_=64, dtype=dtype, quant="nf4", bias=True)
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(layer(x), layer.base(x))
        assert torch.equal(layer.row_norm(), layer.magnitude)


def test_dropout_by_its_own_mask_and_in_eval_mode() -> None:
    layer = tiny.adapted_linear(out=6, in_=50, rank=2, dropout=0.4, bias=True)
    tiny.move_all_parameters_(layer)
    x = torch.randn(8, 50, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(8, 6, dtype=torch.float64)
    numbers = arrays(layer)
    bias = to_numpy(layer.base.bias)
    # The mask is read off through an adapter that is the identity on a zero base, at the same seed.
    probe = AdaptedLinear(
        FrozenLinear(torch.zeros(50, 50, dtype=torch.float64)), kind="lora", rank=50, alpha=50.0, dropout=0.4,
        dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        probe.lora_A.copy_(torch.eye(50))
        probe.lora_B.copy_(torch.eye(50))
    torch.manual_seed(11)
    keep = to_numpy(probe(torch.ones(8, 50, dtype=torch.float64)))
    assert 0.25 < (keep == 0).mean() < 0.55
    np.testing.assert_allclose(keep[keep != 0], 1 / 0.6)
    torch.manual_seed(11)
    y = layer(x)
    y.backward(dy)
    np.testing.assert_allclose(to_numpy(y), reference.forward(to_numpy(x), bias=bias, keep=keep, **numbers), rtol=1e-9)
    grads = reference.gradients(to_numpy(x), to_numpy(dy), keep=keep, **numbers)
    np.testing.assert_allclose(to_numpy(x.grad), grads.x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(to_numpy(layer.lora_A.grad), grads.lora_a, rtol=1e-9, atol=1e-12)
    assert layer.magnitude is not None
    np.testing.assert_allclose(to_numpy(layer.magnitude.grad), grads.magnitude, rtol=1e-9)
    layer.eval()
    np.testing.assert_allclose(to_numpy(layer(x)), reference.forward(to_numpy(x), bias=bias, **numbers), rtol=1e-10)


def test_checkpoint_recomputes_the_same_dropout_mask() -> None:
    layer = tiny.adapted_linear(out=16, in_=16, rank=2, dropout=0.5)
    tiny.move_all_parameters_(layer)
    x = torch.randn(8, 16, dtype=torch.float64)
    results = []
    for use_checkpoint in (False, True):
        twin = copy.deepcopy(layer)
        torch.manual_seed(5)
        y = checkpoint(twin, x, use_reentrant=False) if use_checkpoint else twin(x)
        y.square().sum().backward()
        results.append((y.detach(), twin.lora_A.grad, twin.lora_B.grad))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_cast_of_the_model_leaves_scales_and_magnitudes_in_float32() -> None:
    layer = tiny.adapted_linear(out=32, in_=64, dtype=torch.float32, quant="nf4")
    before = (layer.base.dequantized().clone(), layer.magnitude.detach().clone())  # type: ignore[union-attr]
    layer.to(torch.bfloat16)
    assert layer.lora_A.dtype == torch.bfloat16
    assert layer.magnitude is not None
    assert layer.magnitude.dtype == torch.float32
    assert torch.equal(layer.base.dequantized(), before[0])
    assert torch.equal(layer.magnitude, before[1])


def test_shapes_that_do_not_chain_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(4, 5\), \(2, 5\) and \(3, 2\)"):
        norm_of(torch.zeros(4, 5), torch.zeros(2, 5), torch.zeros(3, 2), 1.0)
    with pytest.raises(ValueError, match="must be 1 to 5, got 6"):
        AdaptedLinear(FrozenLinear(torch.randn(5, 8)), rank=6)


def test_merge_makes_a_new_tensor() -> None:
    weight = torch.randn(3, 4)
    before = weight.clone()
    merged_weight(weight, torch.randn(2, 4), torch.randn(3, 2), 2.0, torch.rand(3))
    assert torch.equal(weight, before)
