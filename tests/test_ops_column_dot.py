"""The sum over tokens of a product, column by column."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.ops.adapted_product import column_dot


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 70),
    out=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_sums_of_any_shape_against_float64(tokens, out, dtype, seed):
    rng = np.random.default_rng(seed)
    left, right = (torch.tensor(rng.normal(size=(tokens, out))).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.tensor(rng.normal(size=out)).to(wide)
    got = column_dot(left, right, factor)
    products = left.double().numpy() * right.double().numpy()
    expected = factor.double().numpy() * products.sum(axis=0)
    scale = np.abs(factor.double().numpy()) * np.abs(products).sum(axis=0) + 1e-30
    assert got.dtype == wide
    assert np.all(np.abs(got.double().numpy() - expected) <= (1e-14 if wide == torch.float64 else 2e-6) * scale)


def test_expanded_and_strided_inputs():
    left = torch.ones(1, 6).expand(5, 6)
    right = torch.arange(60.0).view(12, 5).T[:, ::2]
    assert not left.is_contiguous()
    assert not right.is_contiguous()
    torch.testing.assert_close(column_dot(left, right, torch.full((6,), 2.0)), 2 * right.sum(dim=0))


@pytest.mark.parametrize("size", [2.0**-100, 2.0**60])
def test_extreme_factors_keep_their_digits(size):
    """The factor is 1 / m, and m may be the 2^-100 that stands for 0."""
    left = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    right = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)) * size
    got = column_dot(left, right, torch.full((8,), 1 / size))
    torch.testing.assert_close(got.double(), (left.double() * (right.double() / size)).sum(0), rtol=1e-5, atol=1e-5)
