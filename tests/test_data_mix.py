"""The order of examples: exact epochs, asked shares, the same from any position."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data import mix as mix_module
from qdora.data.mix import MixOrder, make_mix, mix_shares, most_draws
from qdora.data.tokenize import TokenizedExample, TokenizedSet

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5)
WEIGHTS = st.lists(st.floats(0.05, 20), min_size=5, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)


def pairs(order, start, stop):
    sources, indices = order.draws(start, stop)
    return list(zip(sources.tolist(), indices.tolist(), strict=True))


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_every_example_once_an_epoch(sizes, seed, epoch):
    order = MixOrder(sizes, sizes, seed)
    total = sum(sizes)
    drawn = pairs(order, epoch * total, (epoch + 1) * total)
    assert sorted(drawn) == [(source, index) for source, size in enumerate(sizes) for index in range(size)]


def test_epochs_and_seeds_have_their_own_shuffles():
    order = MixOrder([300, 200], [3, 2], 0)
    first = pairs(order, 0, 500)
    assert first != pairs(order, 500, 1000)
    assert first != pairs(MixOrder([300, 200], [3, 2], 1), 0, 500)
    assert first == pairs(MixOrder([300, 200], [3, 2], 0), 0, 500)
    assert first != sorted(first)


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, weights=WEIGHTS, seed=SEEDS, num=st.integers(1, 9000))
def test_shares_are_met_from_the_first_draws_on(sizes, weights, seed, num):
    shares = mix_shares(sizes, "weights", weights=weights[: len(sizes)])
    order = MixOrder(sizes, shares, seed)
    sources, _ = order.draws(0, num)
    counts = np.bincount(sources, minlength=len(sizes))
    assert (np.abs(counts - num * shares) <= 0.5 + shares * len(sizes) / 2 + 1e-6).all()
    assert order.counts(num).tolist() == counts.tolist()


def test_shares_within_a_percent_after_ten_thousand_draws():
    sizes = [9427, 16113, 33410, 3368, 40398, 2251, 1119, 4957]
    for strategy in ("equal", "temperature", "proportional", "weights"):
        weights = [1, 2, 3, 4, 5, 6, 7, 8] if strategy == "weights" else None
        shares = mix_shares(sizes, strategy, temperature=3.0, weights=weights)
        counts = MixOrder(sizes, shares, 0).counts(10_000)
        np.testing.assert_allclose(counts / 10_000, shares, rtol=0.01)
        # and in every window of 116 draws, which is about an optimizer step
        sources, _ = MixOrder(sizes, shares, 0).draws(5000, 5116)
        assert np.abs(np.bincount(sources, minlength=8) - 116 * shares).max() <= 3


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, weights=WEIGHTS, seed=SEEDS)
def test_no_example_is_repeated_before_all_of_its_source_have_been(sizes, weights, seed):
    order = MixOrder(sizes, mix_shares(sizes, "weights", weights=weights[: len(sizes)]), seed)
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


@settings(max_examples=20, deadline=None)
@given(
    sizes=SIZES,
    weighted=st.booleans(),
    seed=SEEDS,
    start=st.integers(0, 20_000),
    num=st.integers(1, 300),
)
def test_any_position_gives_what_the_uninterrupted_order_gives(sizes, weighted, seed, start, num):
    shares = mix_shares(sizes, "weights", weights=list(range(1, len(sizes) + 1))) if weighted else sizes
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
    order = MixOrder(sizes, sizes, seed)
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
    np.testing.assert_allclose(mix_shares([10, 30], "proportional"), [0.25, 0.75])
    np.testing.assert_allclose(mix_shares([10, 30], "equal"), [0.5, 0.5])
    np.testing.assert_allclose(mix_shares([10, 30], "weights", weights=[1, 3]), [0.25, 0.75])
    np.testing.assert_allclose(mix_shares([10, 30], "weights", weights=[1e308, 1e308]), [0.5, 0.5])
    np.testing.assert_allclose(mix_shares([1, 16], "temperature", temperature=2.0), [0.2, 0.8])
    np.testing.assert_allclose(mix_shares([1, 16], "temperature", temperature=1.0), [1 / 17, 16 / 17])
    np.testing.assert_allclose(mix_shares([1, 10**6], "temperature", temperature=0.01), [0, 1], atol=1e-12)
    np.testing.assert_allclose(mix_shares([1, 1], "weights", weights=[1e-300, 1e300]), [0, 1], atol=1e-12)
    assert MixOrder([1, 10**6], mix_shares([1, 10**6], "temperature", temperature=0.01), 0).counts(99)[1] == 99


def one_at_a_time(shares, caps, num):
    """The sources of the first draws: always the one whose next draw is due first, the first of several."""
    taken, found = [0] * len(shares), []
    while len(found) < num:
        due = [
            (turn + 0.5) / share if cap is None or turn < cap else float("inf")
            for turn, share, cap in zip(taken, shares, caps, strict=True)
        ]
        if min(due) == float("inf"):
            break
        found.append(due.index(min(due)))
        taken[found[-1]] += 1
    return found


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=4),
    caps=st.lists(st.one_of(st.none(), st.integers(1, 200)), min_size=4, max_size=4),
    block=st.integers(2, 60),
    data=st.data(),
)
def test_a_source_that_is_used_up_leaves_its_share_to_the_others(weights, caps, block, data):
    """Against drawing one by one; small blocks, so that sources end inside blocks and at their borders."""
    caps = caps[: len(weights)]
    sizes = [7] * len(weights)
    shares = mix_shares(sizes, "weights", weights=weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix_module, "_BLOCK", block)
        order = MixOrder(sizes, shares, 0, caps)
        expected = one_at_a_time(order.shares.tolist(), caps, 500)
        num = len(expected)
        assert order.length == (None if None in caps else sum(caps))
        assert num == min(500, order.length or 500)
        assert order.draws(0, num)[0].tolist() == expected
        stop = data.draw(st.integers(0, num))
        assert order.counts(stop).tolist() == [expected[:stop].count(source) for source in range(len(weights))]
        start = data.draw(st.integers(0, num - 1))
        assert pairs(MixOrder(sizes, shares, 0, caps), start, num) == pairs(order, 0, num)[start:]


def test_caps_by_hand():
    """100 draws of a, ended at 10, and of b, without an end, at equal shares: 10 pairs, then b alone."""
    order = MixOrder([5, 40], [0.5, 0.5], 0, [10, None])
    sources, indices = order.draws(0, 100)
    assert sources[:20].tolist() == [0, 1] * 10
    assert (sources[20:] == 1).all()
    assert Counter(indices[sources == 0].tolist()) == dict.fromkeys(range(5), 2)
    assert order.counts(10**11).tolist() == [10, 10**11 - 10]
    # three sources: the shares of those that are left keep their proportion, 1 to 3
    counts = MixOrder([9, 9, 9], [0.5, 0.125, 0.375], 0, [100, None, None]).counts(100_100)
    assert counts.tolist() == [100, 25_000, 75_000]


def test_most_draws():
    assert most_draws(100, None) is None
    assert most_draws(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996
    assert most_draws(7, 1.5) == 10
    assert most_draws(3, 0.01) == 1
    assert most_draws(3, 1e308) > 10**18


def test_an_order_that_ends():
    sets = [tokenised("a", [2] * 30), tokenised("b", [3] * 10)]
    order = make_mix(sets, max_epochs=[2.0, 1.0]).order
    drawn = Counter(pairs(order, 0, 70))
    assert drawn == {**dict.fromkeys([(0, i) for i in range(30)], 2), **dict.fromkeys([(1, i) for i in range(10)], 1)}
    assert order.counts(70).tolist() == [60, 10]
    for wrong in ((69, 71), (70, 71)):
        with pytest.raises(AssertionError):
            order.draws(*wrong)


def test_a_stream_is_counted_and_not_shuffled():
    """The index of a source without a size is the number of the draw from it, at any position."""
    order = MixOrder([10, None], [0.5, 0.5], 0)
    for start in (0, 12345):
        sources, indices = order.draws(start, start + 999)
        first = int(order.counts(start)[1])
        assert indices[sources == 1].tolist() == list(range(first, first + int((sources == 1).sum())))


def tokenised(name, sizes):
    ones = [
        TokenizedExample(name, str(n), np.ones(size, np.int32), np.arange(size) > 0) for n, size in enumerate(sizes)
    ]
    return TokenizedSet(name, tuple(ones), num_truncated=1, num_dropped=2)
