"""AdamW and Lion on bf16 storage: no update is lost, the arithmetic is that of the papers, each part has its rate."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qdora.ops.low_rank_factors import nearest_bfloat16
from qdora.ops.split_float import join_float32, split_float32_
from qdora.recipe.train_settings import TrainConfig
from qdora.train import flat_group
from qdora.train.flat_group import OptimizerName
from qdora.train.optimizer import AdapterOptimizer, UpdateOutOfMemory
from qdora.train.schedule import Schedule
from tests import reference, tiny

NAMES = get_args(OptimizerName)
DTYPES = (torch.bfloat16, torch.float32)
FINITE = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The halves of `split_float32_` as new tensors."""
    high, low = torch.empty(master.shape, dtype=torch.bfloat16), torch.empty(master.shape, dtype=torch.int16)
    split_float32_(master.clone(), high, low)
    return high, low


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.float32, st.integers(1, 20), elements=FINITE))
def test_split_and_join_is_exact_and_the_high_half_is_the_nearest_bf16(values: np.ndarray) -> None:
    master = torch.from_numpy(values.copy())
    high, low = split(master)
    assert torch.equal(join_float32(high, low), master)
    # Nearest: the error is at most half the distance of neighbouring bf16 numbers, a power of two per binade.
    for value, rounded in zip(values.tolist(), high.double().tolist(), strict=True):
        exponent = max(math.frexp(value)[1] - 1, -126) if value else -126
        assert abs(rounded - value) <= 2.0 ** (exponent - 7) / 2 or math.isinf(rounded)


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=2, max_side=5), elements=FINITE))
def test_split_of_any_shape_is_exact_and_the_high_half_is_what_the_layers_round_to(values: np.ndarray) -> None:
    master = torch.from_numpy(np.array(values))
    high, low = split(master)
    assert torch.equal(join_float32(high, low), master)
    assert torch.equal(high, nearest_bfloat16(master))


def test_split_keeps_signed_zero_and_denormals() -> None:
    master = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 2**-126])
    joined = join_float32(*split(master))
    assert torch.equal(joined.view(torch.int32), master.view(torch.int32))


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Two matrices that get 8-bit states, one too small for them, and a magnitude that is long enough for them."""
    generator = torch.Generator().manual_seed(0)
    return {
        "up.lora_A": nn.Parameter((torch.randn(4, 1500, generator=generator) * 0.02).to(dtype)),
        "up.lora_B": nn.Parameter((torch.randn(1500, 4, generator=generator) * 0.02).to(dtype)),
        "up.magnitude": nn.Parameter(torch.rand(5008, generator=generator) + 0.5),
        "down.lora_B": nn.Parameter((torch.randn(3, 4, generator=generator) * 0.02).to(dtype)),
    }


def gradient_list(shape: torch.Size, steps: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=tuple(shape)).astype(np.float32) for _ in range(steps)]


def train(optimizer: AdapterOptimizer, *, steps: int, lr: float = 1e-3, first: int = 0) -> dict[str, list[np.ndarray]]:
    """Steps `first` to `first + steps` of random gradients, the same for the same step; returns them."""
    used: dict[str, list[np.ndarray]] = {key: [] for key in optimizer.parameters}
    for step in range(first, first + steps):
        for seed, (key, p) in enumerate(optimizer.parameters.items()):
            used[key] += gradient_list(p.shape, 1, 1000 * step + seed)
            p.grad = torch.from_numpy(used[key][-1])
        optimizer.step(lr)
        optimizer.zero_grad()
    return used


def expected(name: str, start: Tensor, grads: list[np.ndarray], **settings: Any) -> np.ndarray:
    rule = reference.lion if "lion" in name else reference.adamw
    return rule(start.detach().double().numpy(), [g.astype(np.float64) for g in grads], **settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_follows_the_paper_in_float64_whatever_the_storage(name: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    start = {key: p.detach().clone() for key, p in params.items()}
    optimizer = AdapterOptimizer(params, name=name, weight_decay=0.1)
    grads = train(optimizer, steps=60, lr=1e-4)
    for key, p in params.items():
        decay = 0.0 if key == "up.magnitude" else 0.1
        wanted = expected(name, start[key], grads[key], lr=1e-4, decay=decay)
        got = optimizer.master(key).double().numpy()
        if "8bit" in name and key in ("up.lora_A", "up.lora_B"):
            assert np.abs(got - wanted).max() > 2e-6  # the states are rounded, see the next test
        else:
            np.testing.assert_allclose(got, wanted, atol=2e-6, rtol=0)
        assert p.dtype == (torch.float32 if key == "up.magnitude" else dtype)
        if p.dtype == torch.bfloat16:
            assert torch.equal(p.detach(), nearest_bfloat16(optimizer.master(key)))
        else:
            assert torch.equal(p.detach(), optimizer.master(key))


# Mean error of the way after 20 steps plus 5 standard deviations over 20 seeds: 4 x 1500 normal numbers, blocks of 256.
@pytest.mark.parametrize("name, bound", [("paged_adamw_8bit", 0.0172), ("paged_lion_8bit", 0.0654)])
def test_8_bit_states_follow_the_paper_as_far_as_their_rounding_allows(name: Any, bound: float) -> None:
    for seed in range(3):
        start = torch.randn(4, 1500, generator=torch.Generator().manual_seed(seed)) * 0.02
        p = nn.Parameter(start.clone())
        optimizer = AdapterOptimizer({"lora_A": p}, name=name, weight_decay=0.1)
        grads = train(optimizer, steps=1, first=100 * seed)["lora_A"]
        wanted = expected(name, start, grads, lr=1e-3, decay=0.1)
        np.testing.assert_allclose(p.detach().double().numpy(), wanted, atol=1e-7)  # nothing has been rounded yet
        grads += train(optimizer, steps=19, first=100 * seed + 1)["lora_A"]
        way = expected(name, start, grads, lr=1e-3, decay=0.1) - start.double().numpy()
        assert reference.relative_error((p.detach() - start).double().numpy(), way) < bound


@pytest.mark.parametrize("name", NAMES)
def test_bf16_storage_equals_float32_storage_bit_for_bit_in_the_master(name: Any) -> None:
    short, long = parameters(torch.bfloat16), parameters(torch.float32)
    with torch.no_grad():
        for key in short:
            long[key].copy_(short[key].float())
    optimizers = [
        AdapterOptimizer(p, name=name, weight_decay=0.1, lr_ratios={"lora_B": 4.0, "magnitude": 0.5})
        for p in (short, long)
    ]
    for optimizer in optimizers:
        train(optimizer, steps=30, lr=3e-5)
    for key in short:
        assert torch.equal(optimizers[0].master(key), optimizers[1].master(key))
        assert not torch.equal(short[key].float(), parameters(torch.bfloat16)[key].float())


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_each_kind_of_parameter_has_its_rate(name: Any) -> None:
    params = parameters(torch.bfloat16)
    start = {key: p.detach().clone() for key, p in params.items()}
    ratios = {"lora_B": 16.0, "magnitude": 0.25}
    optimizer = AdapterOptimizer(params, name=name, weight_decay=0.5, lr_ratios=ratios)
    grads = train(optimizer, steps=10, lr=1e-4)
    for key, lr, decay in (
        ("up.lora_A", 1e-4, 0.5),
        ("up.lora_B", 1.6e-3, 0.5),
        ("down.lora_B", 1.6e-3, 0.5),
        ("up.magnitude", 2.5e-5, 0.0),
    ):
        wanted = expected(name, start[key], grads[key], lr=lr, decay=decay)
        np.testing.assert_allclose(optimizer.master(key).double().numpy(), wanted, atol=1e-6, rtol=0, err_msg=key)


def test_a_ratio_for_no_parameter_is_refused() -> None:
    with pytest.raises(
        ValueError, match="lr_ratios: lora_C names no parameter, must be one of lora_A, lora_B, magnitude"
    ):
        AdapterOptimizer(parameters(torch.bfloat16), lr_ratios={"lora_C": 2.0, "lora_B": 2.0})


def test_full_fine_tuning_decays_every_matrix_and_no_vector() -> None:
    params = {
        "embed.weight": nn.Parameter(torch.ones(5, 4)),
        "q_proj.weight": nn.Parameter(torch.ones(4, 4).bfloat16()),
        "q_proj.bias": nn.Parameter(torch.ones(4).bfloat16()),
        "norm.weight": nn.Parameter(torch.ones(4)),
    }
    optimizer = AdapterOptimizer(params, weight_decay=0.5)
    for p in params.values():
        p.grad = torch.zeros(p.shape)
    optimizer.step(0.1)
    for key in params:
        wanted = 0.95 if key in ("embed.weight", "q_proj.weight") else 1.0
        torch.testing.assert_close(optimizer.master(key), torch.full(params[key].shape, wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_updated_parameter_has_a_new_version(name: Any, dtype: torch.dtype) -> None:
    """What is computed from a parameter once (its row norm) is kept until the version changes."""
    params = parameters(dtype)
    optimizer = AdapterOptimizer(params, name=name)
    before = {key: (p._version, p.detach().clone()) for key, p in params.items()}
    for key, p in params.items():
        p.grad = None if key == "up.lora_A" else torch.ones(p.shape)
    optimizer.step(1e-3)
    for key, p in params.items():
        version, value = before[key]
        if key == "up.lora_A":
            assert torch.equal(p, value)
        else:
            assert p._version > version, key
            assert not torch.equal(p, value), key


@pytest.mark.parametrize("name", NAMES)
def test_parameters_updated_one_by_one_are_those_updated_together(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = AdapterOptimizer(parameters(torch.bfloat16), name=name, weight_decay=0.1)
    monkeypatch.setattr(flat_group, "_GROUP_ELEMENTS", 6000)
    alone = AdapterOptimizer(parameters(torch.bfloat16), name=name, weight_decay=0.1)
    matrices = (
        [["up.lora_A", "up.lora_B"], ["down.lora_B"]] if "8bit" in name else [["up.lora_A", "up.lora_B", "down.lora_B"]]
    )
    assert sorted(list(group.parameters) for group in together._groups) == sorted([*matrices, ["up.magnitude"]])
    assert [list(group.parameters) for group in alone._groups] == [[key] for key in alone.parameters]
    for optimizer in (together, alone):
        train(optimizer, steps=3)
    for key in together.parameters:
        assert torch.equal(together.master(key), alone.master(key)), key


class FailingAllocator(TorchDispatchMode):
    """Memory does not suffice for allocations number `first` to `last`; `count` is how many were asked for."""

    def __init__(self, first: float = math.inf, last: float = math.inf) -> None:
        super().__init__()
        self.first, self.last, self.count = first, last, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = any(each.alias_info is None for each in func._schema.returns)
        if is_new and isinstance(result, Tensor) and result.numel():
            self.count += 1
            if self.first <= self.count <= self.last:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")
        return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_an_update_that_does_not_fit_is_made_in_parts_or_leaves_whole_tensors(
    name: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out once, at any place, changes no bit. What never fits keeps its value and its states."""
    monkeypatch.setattr(flat_group, "_GROUP_ELEMENTS", 7_000)

    def after(num_updates: int, allocator: FailingAllocator) -> tuple[dict[str, list[Tensor]], list[str]]:
        """Key -> value and states after so many updates, the last one with this allocator; and what did not fit."""
        optimizer, left = AdapterOptimizer(parameters(torch.bfloat16), name=name, weight_decay=0.1), []
        text = ""
        for number in range(num_updates):
            for index, p in enumerate(optimizer.parameters.values()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * number + index))
            try:
                with allocator if number == num_updates - 1 else nullcontext():
                    optimizer.step(1e-2)
            except UpdateOutOfMemory as error:
                left, text = error.left, str(error)
        states = optimizer.state_tensors()
        assert not left or re.match(rf"out of memory in the update of {len(left)} of 4 .* 64.00 MiB\)$", text)
        return {
            key: [optimizer.master(key), *(states[each] for each in states if each.startswith(f"state/{key}/"))]
            for key in optimizer.parameters
        }, left

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(one, other, strict=True))

    counting = FailingAllocator()
    whole, _ = after(2, counting)
    place = int(torch.randint(1, counting.count + 1, (), generator=torch.Generator().manual_seed(seed)))
    once, left = after(2, FailingAllocator(place, place))
    assert left == []
    assert all(same(once[key], whole[key]) for key in whole)
    before, _ = after(1, FailingAllocator())
    never, left = after(2, FailingAllocator(place))
    assert len(left) > 0
    assert "up.magnitude" not in left  # stored in float32: its update needs no memory
    for key in whole:
        assert same(never[key], (before if key in left else whole)[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_in_another_memory_layout_is_updated_alike(name: Any, dtype: torch.dtype) -> None:
    """Alone in its group, of a size that no zeros need to fill up: nothing is joined, and the layout is all it has."""
    plain = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for value in (plain, plain.t().contiguous().t()):
        optimizer = AdapterOptimizer({"layer.lora_A": nn.Parameter(value.clone())}, name=name)
        (parameter,) = optimizer.parameters.values()
        assert parameter.is_contiguous() == value.is_contiguous()
        gradient = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
        for _ in range(2):
            parameter.grad = gradient.clone()
            optimizer.step(1e-2)
            assert torch.equal(parameter.grad, gradient)
        found.append(optimizer.master("layer.lora_A"))
        assert not torch.equal(parameter.detach(), value)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_decay_is_not_left_to_the_kernels(name: Any) -> None:
    """bitsandbytes' CUDA kernels decay after the update (AdamW) or through the gradient (32-bit Lion before 0.50)."""
    optimizer = AdapterOptimizer(parameters(torch.bfloat16), name=name, weight_decay=0.1)
    given = [group["weight_decay"] for each in optimizer._groups for group in each.inner.param_groups]
    assert set(given) == {0.0}


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


def rates(num_steps: int, **settings: Any) -> list[float]:
    train = TrainConfig(epochs=1, batch=1, **settings)
    return [Schedule(train, num_steps).rate(step) for step in range(num_steps)]


def test_learning_rates_by_hand() -> None:
    falling = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates(10, lr=1.0, schedule="linear", warmup=2) == pytest.approx(falling)
    cosine = [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    assert rates(4, lr=2.0, schedule="cosine", warmup=0) == pytest.approx(cosine)
    assert rates(5, lr=3.0, schedule="constant", warmup=0.3) == pytest.approx([1.5, 3.0, 3.0, 3.0, 3.0])
    assert rates(3, lr=1.0, schedule="linear", warmup=100)[0] == pytest.approx(1 / 3)
    assert rates(4, lr=1.0, schedule="linear", warmup=0, lr_end=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    cosine = [1.0, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)]
    assert rates(5, lr=1.0, schedule="cosine", warmup=1, lr_end=0.2) == pytest.approx(cosine)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_do_not_decay_and_rows_and_magnitudes_of_experts_have_float32_states(name: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.rows": (8, 1024), "head.weight": (64, 128), "up.lora_A": (64, 128), "experts.magnitude": (8, 1024)}
    params = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in shapes.items()}
    start = {key: p.detach().clone() for key, p in params.items()}
    optimizer = AdapterOptimizer(params, name=name, weight_decay=0.5, undecayed=["embed.rows", "head.weight"])
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(1e-2)
    assert torch.equal(params["embed.rows"], start["embed.rows"])
    assert torch.equal(params["head.weight"], start["head.weight"])
    assert torch.equal(params["experts.magnitude"], start["experts.magnitude"])
    torch.testing.assert_close(params["up.lora_A"].detach(), start["up.lora_A"] * (1 - 1e-2 * 0.5))
    for vectors in ("embed.rows", "experts.magnitude"):
        states = {key: each.dtype for key, each in optimizer.state_tensors().items() if vectors in key}
        assert len(states) >= 1
        assert torch.uint8 not in states.values()
    coarse = [each.dtype for key, each in optimizer.state_tensors().items() if "head.weight" in key]
    assert (torch.uint8 in coarse) == ("8bit" in name)
