"""The research formats nf3, nf2 and int4: their tables, rounding, honest sizes, and a model held in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch.utils._python_dispatch import TorchDispatchMode

from qdora.model.inject import frozen_layers, inject
from qdora.ops import codebooks
from qdora.ops.bnb_state import to_bnb_state
from qdora.ops.packed import BLOCK_SIZES, block_scales, dequantize, quantize, zero_packed
from qdora.ops.tiles import column_tiles, row_tiles
from tests import checkpoints, reference_quant

KINDS = ("nf3", "nf2", "int4")
BITS = {"nf3": 3, "nf2": 2, "int4": 4}


def normal_float(bits):
    """QLoRA's construction with scipy.stats: evenly spaced probabilities on each side of an exact 0."""
    half = 2 ** (bits - 1)
    end = 1 - 0.5 * (1 / (4 * half) + 1 / (4 * half - 2))
    positive = norm.ppf(np.linspace(end, 0.5, half + 1)[:-1])
    negative = -norm.ppf(np.linspace(end, 0.5, half)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]]))
    return values / values.max()


def table(kind):
    return np.arange(-7, 8) / 7 if kind == "int4" else normal_float(BITS[kind])


def test_the_construction_gives_the_nf4_of_the_paper():
    np.testing.assert_allclose(codebooks.normal_quantiles(4), reference_quant.NF4, atol=5e-7)
    np.testing.assert_allclose(normal_float(4), reference_quant.NF4, atol=5e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_tables(kind):
    values = codebooks.code_values(kind)
    np.testing.assert_allclose(values.double().numpy(), table(kind), rtol=2e-7, atol=0)
    assert len(values) == {"nf3": 8, "nf2": 4, "int4": 15}[kind]
    assert (values == 0).sum() == 1
    assert values.min() == -1
    assert values.max() == 1


class CudaDivision(TorchDispatchMode):
    """A tensor divided by a number is multiplied by the rounded reciprocal, as CUDA does it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * torch.tensor(args[1], dtype=args[0].dtype).reciprocal()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [*codebooks.CODE_BITS, codebooks.MXFP4])
def test_a_table_does_not_depend_on_how_a_device_divides(kind):
    expected = codebooks.code_values(kind)
    with CudaDivision():
        assert not torch.equal(torch.arange(8.0) / 7.0, (torch.arange(8.0).double() / 7.0).float())
        assert torch.equal(codebooks.code_values(kind), expected)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 140)),
    block_size=st.sampled_from(BLOCK_SIZES),
    seed=st.integers(0, 9),
)
def test_every_weight_takes_the_nearest_value(kind, shape, block_size, seed):
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()
    flat = weight.double().numpy().reshape(-1)
    dense = dequantize(quantize(weight, kind, block_size, double_quant=False)).double().numpy().reshape(-1)
    values = table(kind)
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        scale = np.abs(block).max()
        nearest = np.abs(block[:, None] / scale - values[None]).min(axis=1)
        got = np.abs(block - dense[start : start + block_size]) / scale
        np.testing.assert_allclose(got, nearest, atol=1e-6)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_and_pruning_afterwards_keeps_all_else(kind, double_quant):
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(16, 96, generator=torch.Generator().manual_seed(1)) < 0.5
    before = dequantize(quantize(weight * keep, kind, 64, double_quant))
    assert not before[~keep].any()
    packed = quantize(weight, kind, 64, double_quant)
    assert torch.equal(dequantize(zero_packed(packed, keep)), dequantize(packed) * keep)
    assert torch.equal(block_scales(zero_packed(packed, keep)), block_scales(packed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_where_packed_tightly(kind):
    numel = 64 * 1024
    plain = quantize(torch.randn(64, 1024), kind, 64, double_quant=False)
    assert plain.num_bytes == numel // 2 + 4 * numel // 64
    assert plain.num_packed_bytes == numel * BITS[kind] // 8 + 4 * numel // 64
    nested = quantize(torch.randn(64, 1024), kind, 64)
    assert nested.num_packed_bytes == nested.num_bytes - numel // 2 + numel * BITS[kind] // 8
    odd = quantize(torch.randn(3, 7), kind, 16, double_quant=False)
    assert odd.num_packed_bytes == -(-21 * BITS[kind] // 8) + 8
    for four in ("nf4", "fp4", "int8"):
        packed = quantize(torch.randn(4, 64), four)
        assert packed.num_packed_bytes == packed.num_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_those_of_the_dense_weight(kind):
    for shape in ((40, 96), (33, 128), (7, 31)):
        packed = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(2)), kind, 32)
        dense = dequantize(packed)
        assert torch.equal(torch.cat([tile.clone() for _, tile in row_tiles(packed, torch.float32)]), dense)
        assert torch.equal(torch.cat([tile.clone() for _, tile in column_tiles(packed, torch.float32)], 1), dense)


def test_fewer_bits_are_worse():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = {
        kind: (dequantize(quantize(weight, kind)) - weight).norm().item() for kind in ("nf4", "int4", "nf3", "nf2")
    }
    assert error["nf4"] < error["int4"] < error["nf3"] < error["nf2"]


def test_bitsandbytes_does_not_have_them():
    with pytest.raises(ValueError, match="must be one of nf4, fp4, int8, got nf3"):
        to_bnb_state(quantize(torch.randn(4, 64), "nf3"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_loaded_and_adapted_in_them(tmp_path: Path, kind, caplog):
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS["llama"])
    with caplog.at_level("INFO", logger="qdora"):
        model = checkpoints.load(tmp_path, quant=kind, block_size=16)
    assert any("is simulated" in line for line in caplog.messages) == (kind != "int4")
    start = checkpoints.logits(model)
    assert all(layer.kind == kind for layer in frozen_layers(model).values())
    inject(model, rank=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(checkpoints.logits(model), start, rtol=1e-4, atol=1e-4)
