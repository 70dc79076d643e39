"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdora.evaluation.metrics import (
    Estimate,
    choice_metrics,
    macro_average,
    mean_stderr,
    ratio_stderr,
    tie_credit,
)


def test_mean_and_standard_error() -> None:
    # mean 3; squared deviations 4 + 1 + 0 + 1 + 4 = 10; s^2 = 10 / 4; se = sqrt(2.5 / 5)
    found = mean_stderr([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3.0
    assert found.stderr == pytest.approx(math.sqrt(0.5), rel=1e-15)
    assert math.isnan(mean_stderr([2.0]).stderr)
    with pytest.raises(ValueError, match="no examples"):
        mean_stderr([])


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_standard_error_of_shares(hits: list[bool]) -> None:
    p, n = sum(hits) / len(hits), len(hits)
    assert mean_stderr(hits).stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), abs=1e-12)


def test_accuracies_by_hand() -> None:
    # example    ll            chars       best by sum   per character           best   gold
    # 0          -4, -6        2, 6        0             -2, -1                  1      0
    # 1          -3, -2, -9    3, 4, 30    1             -1, -0.5, -0.3          2      2
    # 2          -1, -5        1, 1        0             -1, -5                  0      0
    # 3          -8, -8.5      8, 17       0             -1, -0.5                1      1
    found = choice_metrics(
        [[-4.0, -6.0], [-3.0, -2.0, -9.0], [-1.0, -5.0], [-8.0, -8.5]],
        [[2, 6], [3, 4, 30], [1, 1], [8, 17]],
        [0, 2, 0, 1],
    )
    assert found.acc.value == 2 / 4
    assert found.acc.stderr == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    assert found.acc_norm.value == 3 / 4
    assert found.acc_norm.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert found.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert found.majority == 2 / 4  # gold is 0 twice, 2 and 1 once
    assert (found.num_ties, found.num_ties_norm) == (0, 0)


def test_ties_count_by_chance() -> None:
    assert tie_credit([-1.0, -1.0, -2.0], 0) == (0.5, True)
    assert tie_credit([-1.0, -1.0, -2.0], 1) == (0.5, True)
    assert tie_credit([-1.0, -1.0, -2.0], 2) == (0.0, False)
    assert tie_credit([-1.0, -2.0], 0) == (1.0, False)
    found = choice_metrics([[-3.0] * 4, [-2.0, -4.0]], [[1, 1, 1, 1], [1, 2]], [2, 0])
    assert found.acc.value == (1 / 4 + 1) / 2
    assert found.acc_norm.value == (1 / 4 + 1 / 2) / 2
    assert (found.num_ties, found.num_ties_norm) == (1, 2)


def test_constant_scores_give_chance_not_the_first_index() -> None:
    gold = [0] * 90 + [1] * 10  # argmax of constant scores would look like 90 %
    found = choice_metrics([[-1.0, -1.0]] * 100, [[1, 1]] * 100, gold)
    assert found.acc.value == found.chance == 0.5
    assert found.majority == 0.9


def test_broken_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        choice_metrics([[-1.0, float("nan")]], [[1, 1]], [0])
    with pytest.raises(ValueError, match="2 right answers"):
        choice_metrics([[-1.0, -2.0]], [[1, 1]], [0, 1])


def test_empty_choice_counts_as_one_character() -> None:
    assert choice_metrics([[-1.0, -3.0]], [[0, 2]], [0]).acc_norm.value == 1.0


def test_nll_of_answers_by_hand() -> None:
    per_example = mean_stderr([2.0, 6.0, 1.0])
    assert per_example.value == 3.0
    assert per_example.stderr == pytest.approx(math.sqrt((1 + 9 + 4) / 2 / 3))
    # R = 1.5; residuals 2 - 1.5, 6 - 6, 1 - 1.5 = 0.5, 0, -0.5; s^2 = 0.5 / 2; mean tokens 2; se = 0.5 / (2 sqrt 3)
    per_token = ratio_stderr([2.0, 6.0, 1.0], [1, 4, 1])
    assert per_token.value == 1.5
    assert per_token.stderr == pytest.approx(0.5 / (2 * math.sqrt(3)))


def test_ratio_of_proportional_values_is_certain() -> None:
    assert ratio_stderr([2.0, 4.0, 10.0], [1, 2, 5]) == Estimate(2.0, 0.0)
    assert math.isnan(ratio_stderr([2.0], [1]).stderr)
    with pytest.raises(ValueError, match="positive denominator"):
        ratio_stderr([1.0], [0])


def test_ratio_error_predicts_the_spread_of_repeated_samples() -> None:
    """2,000 samples of 200 answers, seed 0: spread of R 0.0497, mean predicted error 0.0494 (ratio 1.01)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, (2000, 200))
    nlls = tokens * rng.gamma(4.0, 0.5, tokens.shape)
    found = [ratio_stderr(nll, count) for nll, count in zip(nlls, tokens, strict=True)]
    spread = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.stderr for estimate in found]) == pytest.approx(spread, rel=0.06)


def test_macro_average_weighs_tasks_equally() -> None:
    found = macro_average([Estimate(0.2, 0.03), Estimate(0.6, 0.04)])
    assert found.value == pytest.approx(0.4)
    assert found.stderr == pytest.approx(0.05 / 2)
    assert math.isnan(macro_average([Estimate(0.2, 0.03), Estimate(0.6, float("nan"))]).stderr)
    with pytest.raises(ValueError, match="no tasks"):
        macro_average([])
