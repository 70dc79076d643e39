"""How far q8_0 may be from what was rounded, on blocks of every size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.export.gguf import largest_share, q8_0_rounding

gguf = pytest.importorskip("gguf")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(-24, 10), st.sampled_from([0.0, 0.5, 0.99]))
def test_the_quantiser_stays_within(seed: int, exponent: int, zeros: float) -> None:
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((3, 64)) * 2.0**exponent).astype(np.float32)
    weight[random.random(weight.shape) < zeros] = 0
    stored = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    values = gguf.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
    allowed = q8_0_rounding(stored, values)
    assert largest_share(np.abs(values - weight), allowed) <= 1
    # A weight that is more than another step away is seen.
    steps = np.abs(weight).reshape(3, 2, 32).max(axis=2) / 127
    if steps[1, 1] > 2.0**-13:
        weight[1, 40] += 1.2 * steps[1, 1]
        assert largest_share(np.abs(values - weight), allowed) > 1


def test_no_error_is_no_share_and_nan_is_seen() -> None:
    zero = np.zeros(3, dtype=np.float32)
    assert largest_share(zero, zero) == 0
    assert largest_share(zero + 1, zero) == np.inf
    assert np.isnan(largest_share(np.array([0, np.nan], dtype=np.float32), zero[:2] + 1))
