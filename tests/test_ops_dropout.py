"""Dropout by drawn positions, or a GPU's mask: independent Bernoulli zeros, the same ones for the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from qdora.ops import dropout
from qdora.ops.dropout import draw_seed, drop_, dropped_slices, tokens_per_slice, zeroed, zeroed_
from tests import tiny


@pytest.fixture(params=["cpu", "cuda"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of device whose way to draw is taken."""
    monkeypatch.setattr(dropout, "device_kind", lambda _device: request.param)
    for name in ("_ELEMENTS_PER_SLICE", "_GPU_ELEMENTS_PER_SLICE"):
        monkeypatch.setattr(dropout, name, 40_000)
    return str(request.param)


def kept(shape: tuple[int, int], probability: float, seed: int) -> torch.Tensor:
    """1 where an element stays."""
    mask = torch.ones(shape)
    for tokens, zeros in dropped_slices(mask, probability, seed):
        copy = zeroed(mask[tokens], zeros)
        zeroed_(mask[tokens], zeros)
        assert torch.equal(copy, mask[tokens])
    return mask


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_share_rows_columns_and_pairs_are_those_of_independent_zeros(probability):
    shape = (1000, 400)
    zeros = 1 - kept(shape, probability, 7)
    std = math.sqrt(probability * (1 - probability))
    # Each bound is 5 standard deviations of the estimate.
    assert abs(float(zeros.mean()) - probability) < 5 * std / math.sqrt(zeros.numel())
    assert float((zeros.mean(dim=1) - probability).abs().max()) < 5 * std / math.sqrt(shape[1])
    assert float((zeros.mean(dim=0) - probability).abs().max()) < 5 * std / math.sqrt(shape[0])
    centred = (zeros - probability) / std
    for shift, dim in ((1, 0), (1, 1), (100, 0), (2, 1)):
        correlation = float((centred * centred.roll(shift, dim)).mean())
        assert abs(correlation) < 5 / math.sqrt(zeros.numel())
    assert float(zeros.var()) == pytest.approx(std**2, rel=0.02)


@pytest.mark.usefixtures("kind")
def test_a_seed_fixes_the_zeros_and_another_one_changes_them():
    first, again, other = (kept((64, 96), 0.5, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert float((first != other).float().mean()) > 0.4


def test_positions_are_inside_for_every_size_and_none_are_drawn_without_dropout():
    for shape in ((1, 1), (1, 7), (3, 5), (0, 4)):
        for seed in range(20):
            for tokens, positions in dropped_slices(torch.ones(shape), 0.6, seed):
                size = (tokens.stop - tokens.start) * shape[1]
                assert bool(((positions >= 0) & (positions < size)).all())
    assert drop_(torch.ones(4, 4), 0.0, 1).all()


def test_another_default_device_changes_nothing():
    torch.manual_seed(3)
    seed, x = draw_seed(), torch.ones(4, 8)
    (_, expected) = next(dropped_slices(x, 0.5, seed))
    with torch.device("meta"):
        torch.manual_seed(3)
        assert draw_seed() == seed
        (_, found) = next(dropped_slices(x, 0.5, seed))
    assert torch.equal(found, expected)


def test_a_seed_comes_from_the_generator_that_a_checkpoint_restores():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = draw_seed(), draw_seed()
    torch.set_rng_state(state)
    assert draw_seed() == first != second


def test_a_gpu_gets_few_slices():
    """4,096 tokens of 14336 features are 57 slices on a CPU and 2 on a GPU."""
    assert -(-4096 // tokens_per_slice(14336, "cpu")) == 57
    assert -(-4096 // tokens_per_slice(14336, "cuda")) == 2
    assert tokens_per_slice(1 << 30, "cuda") == 1


def test_the_layer_drops_the_same_in_both_directions(kind):
    """The layer is linear in x, with the same zeros in y = J x and dx = J^T dy; of dA the zeros are those of x."""
    layer = tiny.adapted_linear(kind="lora", in_=400, rank=2, dropout=0.4)
    tiny.move_all_parameters_(layer)
    x = torch.randn(250, 400, dtype=torch.float64, requires_grad=True)  # three slices
    dy = torch.randn(250, layer.out_features, dtype=torch.float64)
    out = layer(x)
    out.backward(dy)
    assert float((dy * out).sum()) == pytest.approx(float((x.grad * x).sum()), rel=1e-9)
    assert float((layer.lora_A.grad * layer.lora_A).sum()) == pytest.approx(
        float((layer.lora_B.grad * layer.lora_B).sum()), rel=1e-9
    )
    layer.eval()
    assert not torch.allclose(layer(x), out)
