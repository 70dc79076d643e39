"""What models reach that know nothing, by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from qdora.study.guesses import UNIFORM_SHARE, unigram_nll


def test_a_unigram_model_by_hand() -> None:
    counted, scored, size = [3, 3, 3, 5], [3, 5, 7, 3], 10
    counts = Counter(counted)
    expected = 0.0
    for token in scored:
        expected -= math.log((1 - UNIFORM_SHARE) * counts[token] / 4 + UNIFORM_SHARE / size) / 4
    assert unigram_nll(counted, scored, size) == pytest.approx(expected, rel=1e-12)
    assert sum(math.exp(-unigram_nll(counted, [token], size)) for token in range(size)) == pytest.approx(1.0)
