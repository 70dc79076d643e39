"""The order of examples: exact epochs, asked shares, the same from any position."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data.mix import MixOrder, make_mix, mix_shares
from qdora.data.tokenize import TokenizedExample, TokenizedSet

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5)
WEIGHTS = st.lists(st.floats(0.05, 20), min_size=5, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)


def pairs(order, start, stop):
    sources, indices = order.draws(start, stop)
    return list(zip(sources.tolist(), indices.tolist(), strict=True))


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_every_example_once_an_epoch(sizes, seed, epoch):
    order = MixOrder(sizes, None, seed)
    total = sum(sizes)
    drawn = pairs(order, epoch * total, (epoch + 1) * total)
    assert sorted(drawn) == [(source, index) for source, size in enumerate(sizes) for index in range(size)]


def test_epochs_and_seeds_have_their_own_shuffles():
    order = MixOrder([300, 200], None, 0)
    first = pairs(order, 0, 500)
    assert first != pairs(order, 500, 1000)
    assert first != pairs(MixOrder([300, 200], None, 1), 0, 500)
    assert first == pairs(MixOrder([300, 200], None, 0), 0, 500)
    assert first != sorted(first)


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, weights=WEIGHTS, seed=SEEDS, num=st.integers(1, 9000))
def test_shares_are_met_from_the_first_draws_on(sizes, weights, seed, num):
    shares = mix_shares(sizes, "equal", weights=weights[: len(sizes)])
    order = MixOrder(sizes, shares, seed)
    sources, _ = order.draws(0, num)
    counts = np.bincount(sources, minlength=len(sizes))
    assert (np.abs(counts - num * shares) <= 0.5 + shares * len(sizes) / 2 + 1e-6).all()
    assert order.counts(num).tolist() == counts.tolist()


def test_shares_within_a_percent_after_ten_thousand_draws():
    sizes = [9427, 16113, 33410, 3368, 40398, 2251, 1119, 4957]
    for strategy in ("equal", "temperature", "proportional"):
        shares = mix_shares(sizes, strategy, temperature=3.0, weights=[1, 2, 3, 4, 5, 6, 7, 8])
        counts = MixOrder(sizes, shares, 0).counts(10_000)
        np.testing.assert_allclose(counts / 10_000, shares, rtol=0.01)
        # and in every window of 116 draws, which is about an optimizer step
        sources, _ = MixOrder(sizes, shares, 0).draws(5000, 5116)
        assert np.abs(np.bincount(sources, minlength=8) - 116 * shares).max() <= 3


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, weights=WEIGHTS, seed=SEEDS)
def test_no_example_is_repeated_before_all_of_its_source_have_been(sizes, weights, seed):
    order = MixOrder(sizes, mix_shares(sizes, "equal", weights=weights[: len(sizes)]), seed)
    per_source: dict[int, list[int]] = {}
    for source, index in pairs(order, 0, 5000):
        per_source.setdefault(source, []).append(index)
    for source, indices in per_source.items():
        size = sizes[source]
        for start in range(0, len(indices), size):
            cycle = indices[start : start + size]
            assert len(set(cycle)) == len(cycle)
            assert set(cycle) <= set(range(size))
        times = Counter(indices)
        assert max(times.values()) - min(times[index] for index in range(size)) <= 1


@settings(max_examples=50, deadline=None)
@given(
    sizes=SIZES,
    weighted=st.booleans(),
    seed=SEEDS,
    start=st.integers(0, 20_000),
    num=st.integers(1, 300),
)
def test_any_position_gives_what_the_uninterrupted_order_gives(sizes, weighted, seed, start, num):
    shares = mix_shares(sizes, "equal", weights=list(range(1, len(sizes) + 1))) if weighted else None
    uninterrupted = pairs(MixOrder(sizes, shares, seed), 0, start + num)[start:]
    fresh = MixOrder(sizes, shares, seed)
    assert pairs(fresh, start, start + num) == uninterrupted
    again = MixOrder(sizes, shares, seed)
    assert [again[start + offset] for offset in range(min(num, 20))] == uninterrupted[:20]


def test_sources_of_one_size_have_their_own_shuffles():
    drawn = pairs(MixOrder([50, 50], [0.5, 0.5], 0), 0, 100)
    first, second = ([index for source, index in drawn if source == which] for which in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=SEEDS, num=st.integers(0, 500))
def test_counts_of_exact_epochs(sizes, seed, num):
    order = MixOrder(sizes, None, seed)
    expected = [0] * len(sizes)
    for source, _ in pairs(order, 0, num) if num else []:
        expected[source] += 1
    assert order.counts(num).tolist() == expected


def test_a_far_position_needs_no_walk():
    order = MixOrder([1000, 30], [0.7, 0.3], 0)
    far = 10**11
    assert order.counts(far).tolist() == [7 * 10**10, 3 * 10**10]
    assert pairs(order, far, far + 5000)[4990:] == pairs(MixOrder([1000, 30], [0.7, 0.3], 0), far + 4990, far + 5000)


def test_shares_by_hand():
    assert mix_shares([10, 30], "proportional") is None
    assert mix_shares([10, 30], "proportional", weights=[2, 2]) is None
    np.testing.assert_allclose(mix_shares([10, 30], "proportional", weights=[3, 1]), [0.5, 0.5])
    np.testing.assert_allclose(mix_shares([10, 30], "equal"), [0.5, 0.5])
    np.testing.assert_allclose(mix_shares([10, 30], "equal", weights=[1, 3]), [0.25, 0.75])
    np.testing.assert_allclose(mix_shares([1, 16], "temperature", temperature=2.0), [0.2, 0.8])
    np.testing.assert_allclose(mix_shares([1, 16], "temperature", temperature=1.0), [1 / 17, 16 / 17])
    np.testing.assert_allclose(mix_shares([1, 10**6], "temperature", temperature=0.01), [0, 1], atol=1e-12)


def tokenised(name, sizes):
    ones = [
        TokenizedExample(name, str(n), np.ones(size, np.int32), np.arange(size) > 0) for n, size in enumerate(sizes)
    ]
    return TokenizedSet(name, tuple(ones), num_truncated=1, num_dropped=2)


def test_summary():
    mix = make_mix([tokenised("a", [2] * 30), tokenised("b", [3] * 10)], strategy="equal", seed=1)
    a, b = mix.summary(80)
    assert (a.name, a.num_examples, a.num_tokens, a.num_truncated, a.num_dropped) == ("a", 30, 60, 1, 2)
    assert a.num_draws + b.num_draws == 80
    assert b.share == pytest.approx(0.5, abs=0.03)
    assert b.epochs == b.num_draws / 10  # four times through the small source
    a, b = make_mix([tokenised("a", [2] * 30), tokenised("b", [3] * 10)]).summary()
    assert (a.num_draws, a.share, a.epochs, b.num_draws) == (30, 0.75, 1.0, 10)
