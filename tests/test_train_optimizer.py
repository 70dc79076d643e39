"""AdamW on bf16 storage: no update is lost, states survive, the arithmetic is Adam's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from qdora.ops.split_float import join_float32, split_float32
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.schedule import learning_rate
from tests import tiny

DTYPES = (torch.bfloat16, torch.float32)
FINITE = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False)


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.float32, st.integers(1, 20), elements=FINITE))
def test_split_and_join_is_exact_and_the_high_half_is_the_nearest_bf16(values: np.ndarray) -> None:
    master = torch.from_numpy(values.copy())
    high, low = split_float32(master)
    assert high.dtype == torch.bfloat16
    assert low.dtype == torch.int16
    assert torch.equal(join_float32(high, low), master)
    # Nearest: the error is at most half the distance of neighbouring bf16 numbers, a power of two per binade.
    for value, rounded in zip(values.tolist(), high.double().tolist(), strict=True):
        exponent = max(math.frexp(value)[1] - 1, -126) if value else -126
        assert abs(rounded - value) <= 2.0 ** (exponent - 7) / 2 or math.isinf(rounded)


def test_split_keeps_signed_zero_and_denormals() -> None:
    master = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 2**-126])
    joined = join_float32(*split_float32(master))
    assert torch.equal(joined.view(torch.int32), master.view(torch.int32))


def adam(values: np.ndarray, grads: list[np.ndarray], lr: float, decay: float) -> np.ndarray:
    """AdamW in float64, written out: arXiv 1711.05101, algorithm 2."""
    theta, m, v = values.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        g = g.astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        theta = theta - lr * decay * theta - lr * step
    return theta


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": nn.Parameter((torch.randn(4, 1500, generator=generator) * 0.02).to(dtype)),
        "b": nn.Parameter(torch.zeros(3, 4, dtype=dtype)),
        "magnitude": nn.Parameter(torch.rand(6, generator=generator) + 0.5),
    }


def gradient_list(shape: torch.Size, steps: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=tuple(shape)).astype(np.float32) for _ in range(steps)]


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_follows_float64_adamw_whatever_the_storage(name: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    start = {key: p.detach().float().numpy().copy() for key, p in params.items()}
    grads = {key: gradient_list(p.shape, 200, seed) for seed, (key, p) in enumerate(params.items())}
    optimizer = AdapterOptimizer(params, name=name, weight_decay=0.1)
    for step in range(200):
        for key, p in params.items():
            p.grad = torch.from_numpy(grads[key][step])
        optimizer.step(1e-4)
        optimizer.zero_grad()
    for key, p in params.items():
        expected = adam(start[key], grads[key], 1e-4, 0.0 if key == "magnitude" else 0.1)
        np.testing.assert_allclose(optimizer.master(key).double().numpy(), expected, atol=2e-6)
        assert p.dtype == (torch.float32 if key == "magnitude" else dtype)
        if p.dtype == torch.bfloat16:
            assert torch.equal(p.detach(), split_float32(optimizer.master(key))[0])
        else:
            assert torch.equal(p.detach(), optimizer.master(key))


def test_bf16_storage_equals_float32_storage_bit_for_bit_in_the_master() -> None:
    short, long = parameters(torch.bfloat16), parameters(torch.float32)
    with torch.no_grad():
        for key in short:
            long[key].copy_(short[key].float())
    optimizers = [AdapterOptimizer(p, name="adamw") for p in (short, long)]
    for step in range(50):
        for params, optimizer in zip((short, long), optimizers, strict=True):
            for seed, p in enumerate(params.values()):
                p.grad = torch.from_numpy(gradient_list(p.shape, 1, 100 * step + seed)[0])
            optimizer.step(3e-5)
    for key in short:
        assert torch.equal(optimizers[0].master(key), optimizers[1].master(key))
        assert not torch.equal(short[key].float(), parameters(torch.bfloat16)[key].float())


def test_a_layer_trains_bit_for_bit_alike_whatever_its_storage() -> None:
    """bf16 arithmetic, 30 steps of DoRA with dropout: the masters of bf16 storage are the float32-stored parameters."""
    layers = [
        tiny.adapted_linear(out=48, in_=64, rank=4, dtype=d, quant="nf4", bias=False, dropout=0.1) for d in DTYPES
    ]
    with torch.no_grad():
        layers[1].lora_A.copy_(layers[0].lora_A)
    optimizers = [AdapterOptimizer(dict(layer.named_parameters()), name="adamw") for layer in layers]
    for step in range(30):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        outputs = []
        for layer, optimizer in zip(layers, optimizers, strict=True):
            torch.manual_seed(step)
            y = layer(x)
            (y.float() - 0.1).square().sum().backward()
            optimizer.step(1e-2)
            optimizer.zero_grad()
            outputs.append(y.detach())
        assert torch.equal(*outputs), step
    for key in optimizers[0].parameters:
        assert torch.equal(optimizers[0].master(key), optimizers[1].master(key)), key
    assert not torch.equal(layers[0].lora_A.float(), layers[1].lora_A)


def test_small_steps_are_not_lost_as_they_are_in_plain_bf16() -> None:
    """The trap itself: 200 steps of 1e-4 on numbers near 1 move no plain bf16 parameter, and every one of ours."""
    plain = nn.Parameter(torch.linspace(1.0, 1.9, 64).reshape(8, 8).bfloat16())
    start = plain.detach().clone()
    torch_adam = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    ours = {"m": nn.Parameter(start.clone())}
    optimizer = AdapterOptimizer(ours, name="adamw")
    for _ in range(200):
        plain.grad = torch.ones_like(plain)
        torch_adam.step()
        ours["m"].grad = torch.ones(8, 8)
        optimizer.step(1e-4)
    assert torch.equal(plain, start)
    np.testing.assert_allclose(optimizer.master("m").numpy(), start.float().numpy() - 0.02, atol=1e-4)
    assert (ours["m"] != start).all()


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_state_survives_a_round_trip_bit_for_bit(name: Any) -> None:
    def advance(optimizer: AdapterOptimizer, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            for seed, p in enumerate(optimizer.parameters.values()):
                p.grad = torch.from_numpy(gradient_list(p.shape, 1, 1000 * step + seed)[0])
            optimizer.step(1e-3)
            optimizer.zero_grad()

    whole = AdapterOptimizer(parameters(torch.bfloat16), name=name)
    advance(whole, 0, 6)
    first = AdapterOptimizer(parameters(torch.bfloat16), name=name)
    advance(first, 0, 3)
    saved = {key: tensor.clone() for key, tensor in first.state_tensors().items()}
    second_parameters = {key: nn.Parameter(p.detach().clone()) for key, p in first.parameters.items()}
    second = AdapterOptimizer(second_parameters, name=name)
    second.load_state_tensors(saved)
    advance(second, 3, 3)
    for key in whole.parameters:
        assert torch.equal(whole.master(key), second.master(key))
    for key, tensor in whole.state_tensors().items():
        assert torch.equal(tensor, second.state_tensors()[key]), key
    if name == "paged_adamw_8bit":
        assert whole.state_tensors()["state/a/state1"].dtype == torch.uint8
        assert whole.state_tensors()["state/magnitude/exp_avg"].dtype == torch.float32


def test_state_of_other_parameters_is_refused() -> None:
    optimizer = AdapterOptimizer(parameters(torch.bfloat16), name="adamw")
    with pytest.raises(ValueError, match="residual/a is missing; residual/b is missing; state/z/step belongs"):
        optimizer.load_state_tensors({"state/z/step": torch.zeros(())})
    with pytest.raises(ValueError, match="float16"):
        AdapterOptimizer({"x": nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))})


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit"])
def test_a_missing_or_mis_shaped_state_is_refused(name: Any) -> None:
    optimizer = AdapterOptimizer(parameters(torch.bfloat16), name=name)
    for p in optimizer.parameters.values():
        p.grad = torch.ones(p.shape)
    optimizer.step(1e-3)
    whole = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    moment = "exp_avg" if name == "adamw" else "state1"
    fresh = AdapterOptimizer(parameters(torch.bfloat16), name=name)
    with pytest.raises(ValueError, match="does not fit"):
        fresh.load_state_tensors({key: t for key, t in whole.items() if key != f"state/a/{moment}"})
    with pytest.raises(ValueError, match="does not fit"):
        fresh.load_state_tensors(whole | {f"state/a/{moment}": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="state/b is missing"):
        fresh.load_state_tensors({key: t for key, t in whole.items() if not key.startswith("state/b/")})


def test_gradients_accumulate_in_float32() -> None:
    params = {"a": nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}
    AdapterOptimizer(params, name="adamw")
    for _ in range(300):
        (params["a"].float() * 0.01).sum().backward()
    assert params["a"].grad is not None
    assert params["a"].grad.dtype == torch.float32
    # bf16 accumulation stalls at 2.56 when 0.01 falls below half a unit in the last place.
    np.testing.assert_allclose(params["a"].grad.numpy(), 3.0, rtol=4e-3)


def test_gradient_norm_and_scaling() -> None:
    params = parameters(torch.bfloat16)
    optimizer = AdapterOptimizer(params, name="adamw")
    assert float(optimizer.gradient_norm()) == 0.0
    for p in params.values():
        p.grad = torch.full(p.shape, 2.0)
    count = sum(p.numel() for p in params.values())
    assert float(optimizer.gradient_norm()) == pytest.approx(2 * math.sqrt(count), rel=1e-6)
    optimizer.scale_gradients_(0.5)
    assert float(optimizer.gradient_norm()) == pytest.approx(math.sqrt(count), rel=1e-6)


def test_learning_rates_by_hand() -> None:
    rates = [learning_rate(s, 10, peak=1.0, schedule="linear", warmup=2) for s in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    rates = [learning_rate(s, 4, peak=2.0, schedule="cosine", warmup=0) for s in range(4)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    rates = [learning_rate(s, 5, peak=3.0, schedule="constant", warmup=0.3) for s in range(5)]
    assert rates == pytest.approx([1.5, 3.0, 3.0, 3.0, 3.0])
    assert learning_rate(0, 3, peak=1.0, schedule="linear", warmup=100) == pytest.approx(1 / 3)
