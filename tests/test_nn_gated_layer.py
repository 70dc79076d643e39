"""Gates of a layer: forward, gradients, norm, merge and the layer without its dead components, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.prepared_gains import prepare_gains
from qdora.ops.dropout import draw_seed, dropped
from tests import reference, reference_prune, test_nn_masked_adapter, tiny, tiny_adapted
from tests.test_ops_adapted_product import arrays, to_numpy

GATE = [0.7, 0.0, -1.3]


def gated_layer(gate: list[float] | None = None, **options: Any) -> AdaptedLinear:
    """Every parameter off its start."""
    layer = tiny.adapted_linear(rank=len(gate or GATE), **options)
    layer.add_gate()
    tiny.move_all_parameters_(layer)
    return set_gate(layer, gate or GATE)


def set_gate(layer: AdaptedLinear, gate: list[float]) -> AdaptedLinear:
    assert layer.gate is not None
    with torch.no_grad():
        layer.gate.copy_(torch.tensor(gate))
    return layer


def gated_arrays(layer: AdaptedLinear) -> dict[str, Any]:
    """The layer as the ungated formula takes it."""
    numbers = arrays(layer)
    return numbers | {"lora_b": reference.gated(numbers["lora_b"], to_numpy(layer.gate))}


def tokens(count: int = 7, in_: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_forward_norm_merge_and_every_gradient_in_float64(kind: str) -> None:
    layer = gated_layer(kind=kind, bias=True, alpha=5.0)
    x, dy = tokens().requires_grad_(), tokens(in_=24, seed=2)
    y = layer(x)
    y.backward(dy)
    numbers, bias = gated_arrays(layer), to_numpy(layer.base.bias)
    np.testing.assert_allclose(to_numpy(y), reference.forward(to_numpy(x), bias=bias, **numbers), rtol=1e-10)
    merged = reference.merged_weight(**numbers)
    np.testing.assert_allclose(layer.merged_weight(torch.float64).numpy(), merged, rtol=1e-10)
    np.testing.assert_allclose(to_numpy(y), to_numpy(x) @ merged.T + bias, rtol=1e-9)
    norm = reference.row_norm(*(numbers[name] for name in ("weight", "lora_a", "lora_b", "scaling")))
    np.testing.assert_allclose(layer.row_norm().numpy(), norm, rtol=1e-10)
    expected = reference.gradients(to_numpy(x), to_numpy(dy), **numbers)
    d_b, d_gate = reference.gate_gradients(expected.lora_b, to_numpy(layer.lora_B), to_numpy(layer.gate))
    assert layer.gate is not None
    for got, wanted in (
        (x.grad, expected.x),
        (layer.lora_A.grad, expected.lora_a),
        (layer.lora_B.grad, d_b),
        (layer.gate.grad, d_gate),
    ):
        np.testing.assert_allclose(to_numpy(got), wanted, rtol=1e-10, atol=1e-12)
    assert np.abs(d_gate).min() > 1e-4, "a dead component's gate has a gradient, too"
    if layer.magnitude is not None:
        np.testing.assert_allclose(to_numpy(layer.magnitude.grad), expected.magnitude, rtol=1e-10, atol=1e-12)


def test_the_gates_gradient_is_that_of_finite_differences_with_the_norm_held() -> None:
    layer, x, dy = gated_layer(), tokens(), tokens(in_=24, seed=2)
    layer(x).backward(dy)
    numbers = gated_arrays(layer)
    norm = reference.row_norm(*(numbers[name] for name in ("weight", "lora_a", "lora_b", "scaling")))
    gate, raw = to_numpy(layer.gate), arrays(layer)["lora_b"]

    def loss(values: Any) -> float:
        moved = numbers | {"lora_b": reference.gated(raw, values)}
        return float((reference.forward(to_numpy(x), norm=norm, **moved) * to_numpy(dy)).sum())

    step = 1e-6
    found = [(loss(gate + step * e) - loss(gate - step * e)) / (2 * step) for e in np.eye(3)]
    assert layer.gate is not None
    np.testing.assert_allclose(to_numpy(layer.gate.grad), found, rtol=1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_masked_with_dropout_in_float64(kind: str, dropout: float) -> None:
    layer = test_nn_masked_adapter.layer_of(kind=kind, dropout=dropout).train()
    layer.add_gate()
    set_gate(layer, GATE)
    x = test_nn_masked_adapter.tokens().requires_grad_()
    dy = torch.randn(6, 13, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    drop = None
    if dropout:
        torch.manual_seed(3)
        seed = draw_seed()
        drop = dropped(torch.ones_like(x), dropout, seed).detach().numpy() / (1 - dropout)
    torch.manual_seed(3)
    out = layer(x)
    out.backward(dy)
    given_ = test_nn_masked_adapter.numbers(layer)
    raw, gate = given_["lora_b"], to_numpy(layer.gate)
    given_ |= {"lora_b": reference.gated(raw, gate)}
    bias = to_numpy(layer.base.bias)
    expected = reference_prune.masked_forward(to_numpy(x), **given_, bias=bias, drop=drop)
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=1e-12)
    merged, norm = reference_prune.masked_weight(**given_)
    np.testing.assert_allclose(layer.merged_weight(torch.float64).numpy(), merged, rtol=1e-12)
    np.testing.assert_allclose(layer.row_norm().numpy(), norm, rtol=1e-12)
    dx, da, db, _ = reference_prune.masked_gradients(to_numpy(x), dy.numpy(), **given_, drop=drop)
    d_b, d_gate = reference.gate_gradients(db, raw, gate)
    assert layer.gate is not None
    for got, wanted in ((x.grad, dx), (layer.lora_A.grad, da), (layer.lora_B.grad, d_b), (layer.gate.grad, d_gate)):
        np.testing.assert_allclose(to_numpy(got), wanted, rtol=1e-10, atol=1e-13)


def test_dropout_zeroes_the_same_elements_with_a_gate_and_in_a_checkpoint() -> None:
    layer = gated_layer([1.0, 1.0, 1.0], dropout=0.3).train()
    plain = tiny.adapted_linear(rank=3, dropout=0.3).train()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "gate"})
    grads = []
    for run in (layer, plain, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(5)
        x = tokens().requires_grad_()
        run(x).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_a_gated_layer_is_the_ungated_one_bit_for_bit(dtype: torch.dtype, kind: str) -> None:
    layer = tiny.adapted_linear(kind=kind, dtype=dtype, quant="nf4", in_=64)
    tiny.move_all_parameters_(layer)
    x = tokens(in_=64).to(dtype).requires_grad_()
    found = []
    for _ in range(2):
        layer.zero_grad()
        layer.lora_B.grad_dtype = torch.float32
        y = layer(x)
        y.float().square().sum().backward()
        found.append([y.detach(), layer.merged_weight(), layer.lora_A.grad, layer.lora_B.grad])
        layer.add_gate()
    for before, after in zip(*found, strict=True):
        assert before is not None
        assert after is not None
        assert torch.equal(before, after)


def test_in_bf16_the_gates_products_norm_and_merge_have_the_same_numbers() -> None:
    """B diag(gate) is rounded to bf16 once: a layer whose B holds that is the same, bit for bit."""
    layer = gated_layer([0.3, 0.77, 1.21], dtype=torch.bfloat16, quant="nf4", in_=64)
    folded = tiny.adapted_linear(rank=3, dtype=torch.bfloat16, quant="nf4", in_=64)
    with torch.no_grad():
        folded.lora_A.copy_(layer.lora_A)
        folded.lora_B.copy_(layer.gated_B())
        assert folded.magnitude is not None
        assert layer.magnitude is not None
        folded.magnitude.copy_(layer.magnitude)
    assert torch.equal(folded.lora_B.float(), layer.gated_B())
    for dtype in (torch.bfloat16, torch.float32):
        x = tokens(in_=64).to(dtype)
        assert torch.equal(layer(x), folded(x))
    assert torch.equal(layer.merged_weight(), folded.merged_weight())
    assert torch.equal(layer.row_norm(), folded.row_norm())


def test_gradients_of_bf16_factors_arrive_in_float32() -> None:
    layer = gated_layer([0.3, 0.77, 1.21], dtype=torch.bfloat16)
    layer.lora_B.grad_dtype = torch.float32
    layer(tokens().bfloat16()).float().square().sum().backward()
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.dtype == torch.float32
    assert not torch.equal(layer.lora_B.grad, layer.lora_B.grad.bfloat16().float())


def test_the_gain_is_never_that_of_another_gate() -> None:
    layer = gated_layer()
    x = tokens()
    prepare_gains([layer])
    for gate in (GATE, [1.0, 1.0, 1.0], [0.0, 0.0, 0.5]):
        set_gate(layer, gate)
        prepare_gains([layer])
        expected = reference.forward(to_numpy(x), **gated_arrays(layer))
        np.testing.assert_allclose(to_numpy(layer(x)), expected, rtol=1e-9)
    layer.gate = None
    np.testing.assert_allclose(to_numpy(layer(x)), reference.forward(to_numpy(x), **arrays(layer)), rtol=1e-9)


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_without_its_dead_components_a_layer_is_the_same(kind: str, rank_stabilized: bool) -> None:
    layer = gated_layer([0.7, 0.0, -1.3, 0.0, 0.1], kind=kind, bias=True, rank_stabilized=rank_stabilized)
    assert layer.gate is not None
    x, scaling, merged = tokens(), layer.scaling, layer.merged_weight(torch.float64)
    before, parameters = layer(x).detach(), list(layer.parameters())
    layer.keep_components_((layer.gate != 0).nonzero()[:, 0])
    assert (layer.rank, layer.lora_A.shape, layer.lora_B.shape, len(layer.gate)) == (3, (3, 40), (24, 3), 3)
    assert layer.scaling == pytest.approx(scaling, rel=1e-15)
    assert all(old is new for old, new in zip(parameters, layer.parameters(), strict=True))
    torch.testing.assert_close(layer(x).detach(), before, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.merged_weight(torch.float64), merged, rtol=1e-13, atol=1e-13)
    layer(x).sum().backward()
    assert layer.gate.grad is not None
    assert layer.gate.grad.shape == (3,)


@given(
    rank=st.integers(1, 6),
    dead=st.sets(st.integers(0, 5)),
    kind=st.sampled_from(["lora", "dora"]),
    quant=st.sampled_from([None, "nf4"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_forward_merged_and_shrunk_agree(rank: int, dead: set[int], kind: str, quant: str | None, seed: int) -> None:
    values = torch.randn(rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[[k for k in dead if k < rank]] = 0.0
    values[seed % rank] = 0.9  # one stays
    dtype = torch.float32 if quant else torch.float64
    layer = gated_layer(values.tolist(), kind=kind, quant=quant, dtype=dtype, in_=64)
    x = tokens(in_=64)
    expected = to_numpy(x) @ reference.merged_weight(**gated_arrays(layer)).T
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if quant else {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(to_numpy(layer(x.to(dtype))), expected, **tolerance)
    assert layer.gate is not None
    layer.keep_components_((layer.gate != 0).nonzero()[:, 0])
    np.testing.assert_allclose(to_numpy(layer(x.to(dtype))), expected, **tolerance)


def test_a_cast_of_the_model_leaves_gates_in_float32() -> None:
    layer = gated_layer([0.123456789] * 3, dtype=torch.float32)
    layer.to(torch.bfloat16)
    assert layer.gate is not None
    assert layer.gate.dtype == torch.float32
    assert layer.gate[0].item() == torch.tensor(0.123456789).item()


def test_files_and_analyses_take_the_gated_factor(tmp_path: Any) -> None:
    """An adapter that is written with gates is read without them, and computes the same."""
    from qdora.analysis.differentiable import plain_model
    from qdora.analysis.update_gradient import update_spectrum
    from qdora.model.adapter_file import load_adapter, save_adapter
    from qdora.model.inject import adapted_layers

    model = tiny_adapted.adapted("llama", quant="nf4")
    for number, layer in enumerate(adapted_layers(model).values()):
        layer.add_gate()
        set_gate(layer, [0.5 + 0.01 * number, 0.0, 1.25])
    before = tiny_adapted.logits(model)
    save_adapter(model, tmp_path / "adapter", base_name_or_path="x", revision=None, base_quant={"quant": "nf4"})
    again = tiny_adapted.base("llama", quant="nf4")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(tiny_adapted.logits(again), before)
    for first, second in zip(adapted_layers(model).values(), adapted_layers(again).values(), strict=True):
        assert np.array_equal(update_spectrum(first).energies, update_spectrum(second).energies)
    with plain_model(model, ["model.layers.0.self_attn.q_proj"], norm="held"):
        torch.testing.assert_close(tiny_adapted.logits(model), before, rtol=1e-4, atol=1e-4)
