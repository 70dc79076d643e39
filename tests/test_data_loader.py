"""The mix, optimizer steps, resuming, and what is said of them beforehand: all against drawing one by one."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data import mix as mix_module
from qdora.data.batching import Batching
from qdora.data.loader import StepLoader
from qdora.data.mix import MixOrder, make_mix, mix_shares, most_draws
from qdora.data.mix_plan import large_step_warning, plan_mix
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from tests.data_rows import fault_of, faults_of, says
from tests.test_data_batching import unpacked

PAD = 0
SEEDS = st.integers(0, 2**32 - 1)


def tokenised(name, lengths, seed=0):
    """Random ids (never PAD) and label masks with at least one label."""
    rng = np.random.default_rng([seed, len(lengths)])
    examples = []
    for number, length in enumerate(lengths):
        mask = rng.random(length) < 0.4
        mask[0], mask[-1] = False, True
        ids = rng.integers(1, 50, length).astype(np.int32)
        examples.append(TokenizedExample(name, f"{name}-{number}", ids, mask))
    return TokenizedSet(name, tuple(examples), num_truncated=1, num_dropped=2)


def loader(sets, *, tokens=None, batch=None, micro=64, strategy="proportional", seed=0, position=0, max_epochs=None):
    mix = make_mix(sets, strategy=strategy, seed=seed, max_epochs=max_epochs)
    made = StepLoader(sets, mix.order, tokens_per_step=tokens, batch=batch, batching=Batching(micro, PAD))
    made.position = position
    return made


# The mix


def pairs(order, start, stop):
    sources, indices = order.draws(start, stop)
    return list(zip(sources.tolist(), indices.tolist(), strict=True))


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


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=4),
    caps=st.lists(st.one_of(st.none(), st.integers(1, 200)), min_size=4, max_size=4),
    sizes=st.lists(st.one_of(st.none(), st.integers(1, 60)), min_size=4, max_size=4),
    block=st.integers(2, 60),
    seed=SEEDS,
    data=st.data(),
)
def test_the_order_is_that_of_drawing_one_by_one(weights, caps, sizes, block, seed, data):
    """Small blocks, so that sources end inside blocks and at their borders. A source without a size is a stream."""
    caps, sizes = caps[: len(weights)], sizes[: len(weights)]
    shares = mix_shares([1] * len(weights), "weights", weights=weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix_module, "_BLOCK", block)
        order = MixOrder(sizes, shares, seed, caps)
        expected = one_at_a_time(order.shares.tolist(), caps, 500)
        num = len(expected)
        assert order.length == (None if None in caps else sum(caps))
        assert num == min(500, order.length or 500)
        sources, indices = order.draws(0, num)
        assert sources.tolist() == expected
        for source, size in enumerate(sizes):
            drawn = indices[sources == source].tolist()
            if size is None:
                assert drawn == list(range(len(drawn)))
                continue
            for start in range(0, len(drawn), size):  # none comes twice before all have come
                assert len(set(drawn[start : start + size])) == len(drawn[start : start + size])
                assert set(drawn[start : start + size]) <= set(range(size))
        stop, start = data.draw(st.integers(0, num)), data.draw(st.integers(0, num - 1))
        assert order.counts(stop).tolist() == [expected[:stop].count(source) for source in range(len(weights))]
        fresh = MixOrder(sizes, shares, seed, caps)
        assert fresh[start] == pairs(order, start, num)[0]
        assert pairs(fresh, start, num) == pairs(order, 0, num)[start:]
        counts = np.bincount(sources, minlength=len(weights))
        if set(caps) == {None}:
            assert (np.abs(counts - num * shares) <= 0.5 + shares * len(weights) / 2 + 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5), seed=SEEDS, epoch=st.integers(0, 1000))
def test_every_example_once_an_epoch(sizes, seed, epoch):
    order, total = MixOrder(sizes, sizes, seed), sum(sizes)
    drawn = pairs(order, epoch * total, (epoch + 1) * total)
    assert sorted(drawn) == [(source, index) for source, size in enumerate(sizes) for index in range(size)]
    assert order.epoch_length == total


def test_epochs_seeds_and_sources_have_their_own_shuffles():
    first = pairs(MixOrder([250, 250], [1, 1], 0), 0, 500)
    assert first == pairs(MixOrder([250, 250], [1, 1], 0), 0, 500)
    others = [pairs(MixOrder([250, 250], [1, 1], 0), 500, 1000), pairs(MixOrder([250, 250], [1, 1], 1), 0, 500)]
    orders = [[index for source, index in drawn if source == which] for drawn in (first, *others) for which in (0, 1)]
    assert len({tuple(order) for order in [*orders, range(250)]}) == 7


def test_shares_caps_and_far_positions_by_hand():
    for sizes, strategy, options, shares in (
        ([10, 30], "proportional", {}, [0.25, 0.75]),
        ([10, 30], "equal", {}, [0.5, 0.5]),
        ([10, 30], "weights", {"weights": [1, 3]}, [0.25, 0.75]),
        ([10, 30], "weights", {"weights": [1e308, 1e308]}, [0.5, 0.5]),
        ([1, 1], "weights", {"weights": [1e-300, 1e300]}, [0, 1]),
        ([1, 16], "temperature", {"temperature": 2.0}, [0.2, 0.8]),
        ([1, 16], "temperature", {"temperature": 1.0}, [1 / 17, 16 / 17]),
        ([1, 10**6], "temperature", {"temperature": 0.01}, [0, 1]),
    ):
        found = mix_shares(sizes, strategy, **options)
        np.testing.assert_allclose(found, shares, atol=1e-12)
        assert found.min() > 0
    assert MixOrder([1, 10**6], mix_shares([1, 10**6], "temperature", temperature=0.01), 0).counts(99)[1] == 99
    # 100 draws of a, ended at 10, and of b, without an end, at equal shares: 10 pairs, then b alone
    order = MixOrder([5, 40], [0.5, 0.5], 0, [10, None])
    sources, indices = order.draws(0, 100)
    assert sources.tolist() == [0, 1] * 10 + [1] * 80
    assert Counter(indices[sources == 0].tolist()) == dict.fromkeys(range(5), 2)
    assert order.counts(10**11).tolist() == [10, 10**11 - 10]
    # the shares of those that are left keep their proportion, 1 to 3
    counts = MixOrder([9, 9, 9], [0.5, 0.125, 0.375], 0, [100, None, None]).counts(100_100)
    assert counts.tolist() == [100, 25_000, 75_000]
    order, far = MixOrder([1000, 30], [0.7, 0.3], 0), 10**11
    assert order.counts(far).tolist() == [7 * 10**10, 3 * 10**10]
    assert pairs(order, far, far + 5000)[4990:] == pairs(MixOrder([1000, 30], [0.7, 0.3], 0), far + 4990, far + 5000)
    # 0.29 * 100 is 28.999999999999996
    cases = [(100, None), (100, 0.29), (7, 1.5), (3, 0.01)]
    assert [most_draws(*case) for case in cases] == [None, 29, 10, 1]
    assert most_draws(3, 1e308) > 10**18


# Steps

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=30)
SIZE = st.one_of(st.tuples(st.integers(1, 150), st.none()), st.tuples(st.none(), st.integers(1, 20)))


def content(step):
    """(id, task, ids, labels) of every example of a step, sorted."""
    return sorted(each for micro in step.micro_batches for each in unpacked(micro))


@settings(max_examples=25, deadline=None)
@given(
    first=LENGTHS,
    size=SIZE,
    strategy=st.sampled_from(["proportional", "equal"]),
    cut=st.integers(0, 5),
    packed=st.sampled_from([None, "rows", "single"]),
    num_processes=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_steps_take_the_draws_in_turn_and_resume_anywhere(first, size, strategy, cut, packed, num_processes, seed):
    sets = [tokenised("a", first), tokenised("b", [5, 9, 7], seed=1)]
    options = {"tokens": size[0], "batch": size[1], "strategy": strategy, "seed": seed}
    steps, taken = loader(sets, **options), []
    for number in range(cut + 4):
        if number == cut:
            state = json.loads(json.dumps(steps.state_dict()))
        position = steps.position
        step = steps.next_step()
        drawn = [sets[source].examples[index] for source, index in pairs(steps.order, position, steps.position)]
        assert content(step) == sorted(
            (one.id, one.task, one.input_ids.tolist(), np.where(one.loss_mask, one.input_ids, -100).tolist())
            for one in drawn
        )
        lengths = [len(one) for one in drawn]
        assert (step.num_examples, step.num_tokens) == (len(drawn), sum(lengths))
        labels = Counter({"a": 0, "b": 0})
        for one in drawn:
            labels[one.task] += int(one.loss_mask.sum())
        assert (step.num_label_tokens, dict(step.task_label_tokens)) == (labels.total(), dict(+labels))
        if size[1] is not None:
            assert len(drawn) == size[1]
        else:  # full, and not before its last example
            assert size[0] <= sum(lengths) < size[0] + lengths[-1]
        taken.append(step)
    resumed = loader(sets, **options)
    resumed.load_state_dict(state)
    again = [resumed.next_step() for _ in range(4)]
    assert resumed.position == steps.position
    for one, other in zip(taken[cut:], again, strict=True):
        for mine, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(mine.input_ids, theirs.input_ids)
            assert torch.equal(mine.labels, theirs.labels)
    # how examples become micro-batches, and in how many processes, changes no step
    ranks = []
    for rank in range(num_processes):
        ranks.append(loader(sets, **options, micro=7 + seed))
        ranks[-1].batching = Batching(7 + seed, PAD, packed, 20 + seed)
        ranks[-1].rank, ranks[-1].num_processes = rank, num_processes
        ranks[-1].load_state_dict(state)
    for expected in taken[cut:]:
        parts = [each.next_step() for each in ranks]
        assert sorted(each for part in parts for each in content(part)) == content(expected)
        assert {part.num_label_tokens for part in parts} == {expected.num_label_tokens}
        sums = [sum(len(ids) for _, _, ids, _ in content(part)) for part in parts]
        assert max(sums) - min(sums) <= max(len(ids) for _, _, ids, _ in content(expected))


@settings(max_examples=12, deadline=None)
@given(
    lengths=LENGTHS,
    size=SIZE,
    most=st.lists(st.floats(0.2, 2.5), min_size=2, max_size=2),
    num_steps=st.integers(0, 30),
    epochs=st.floats(0.1, 3),
)
def test_what_is_said_beforehand_is_what_steps_take(lengths, size, most, num_steps, epochs):
    sets = [tokenised("a", lengths), tokenised("b", [5, 9, 7], seed=1)]
    steps = loader(sets, tokens=size[0], batch=size[1])
    said, counted = steps.steps_for_epochs(epochs), 0
    while steps.position < max(1, round(epochs * (len(lengths) + 3))):
        steps.next_step()
        counted += 1
    assert counted == said
    most = [most[0], None] if num_steps % 2 else most
    steps = loader(sets, tokens=size[0], batch=size[1], strategy="equal", max_epochs=most)
    ids, sizes = [], []
    while len(sizes) < num_steps and steps.position != steps.order.length:
        position, step = steps.position, steps.next_step()
        ids += [each[0] for each in content(step)]
        longest = max(len(each[2]) for each in content(step))
        sizes.append((position, step.num_examples, step.num_tokens, longest))
    assert steps.step_sizes(num_steps) == sizes
    if len(sizes) < num_steps:
        assert says(fault_of(steps.draws_for_steps, num_steps), f"must be at most {len(sizes):,}, because max_epochs")
        assert len(ids) == sum(max(1, int(each * len(part) + 1e-6)) for each, part in zip(most, sets, strict=True))
        return
    assert steps.draws_for_steps(num_steps) == steps.position
    by_id = {example.id: len(example) for part in sets for example in part.examples}
    tokens = [sum(by_id[id] for id in ids if id.startswith(name)) for name in "ab"]
    assert steps.tokens_of_draws(steps.position).tolist() == tokens
    plan = plan_mix(make_mix(sets, strategy="equal", max_epochs=most), steps, num_steps)
    assert (plan.num_steps, plan.num_draws, plan.is_exact) == (num_steps, steps.position, True)
    for part, each, number in zip(plan.sources, sets, tokens, strict=True):
        count = sum(id.startswith(part.name) for id in ids)
        assert (part.num_draws, part.num_tokens_seen, part.share_asked) == (count, number, 0.5)
        assert (part.epochs, part.share_seen) == (count / len(each), count / max(len(ids), 1))
        assert (part.num_examples, part.num_tokens) == (len(each), each.num_tokens)
        assert (part.num_truncated, part.num_dropped) == (1, 2)


def test_billions_of_draws_are_counted_by_passes_and_more_are_refused_at_once():
    sets = [tokenised("a", [5, 6, 7] * 20), tokenised("b", [9] * 3, seed=1)]
    steps = loader(sets, batch=4)
    assert steps.draws_for_steps(2 * 10**9) == 8 * 10**9
    assert steps.draws_for_steps(25 * 10**8) == 10**10
    counts = steps.order.counts(8 * 10**9 // 63 * 63).tolist()
    assert steps.tokens_of_draws(8 * 10**9 // 63 * 63).tolist() == [6 * counts[0], 9 * counts[1]]
    assert fault_of(steps.draws_for_steps, 25 * 10**8 + 1).startswith("train: the run would take more than 10,000,000,")
    for most in (None, 1e300):
        for num_steps, size in ((10**23, 4), (4, 10**23), (10**12, 1), (1, 10**400), (2**63, 2**63)):
            for options in ({"batch": size}, {"tokens": 9 * size}):
                steps = loader(sets, max_epochs=[most] * 2, **options)
                fault = fault_of(steps.draws_for_steps, num_steps)
                assert fault.startswith(("train: the run would take", "train.steps: must be at most"))
                for epochs in (1e15, 1e300, 1.7e308):
                    assert fault_of(steps.steps_for_epochs, epochs).startswith("train: the run would take more than")


def test_more_epochs_than_the_caps_leave_are_refused():
    steps = loader([tokenised("a", [5] * 20), tokenised("b", [7] * 3, seed=1)], batch=4, max_epochs=[1.5, 1.5])
    assert steps.steps_for_epochs(1.5) == 9  # 30 + 4 examples, not 34.5
    fault = fault_of(steps.steps_for_epochs, 2)
    assert says(fault, "train.epochs: 2 of 23 examples are 46 ... max_epochs ... leaves 34")


def test_other_data_mix_or_step_size_is_refused():
    sets = [tokenised("a", [5] * 20), tokenised("b", [7] * 10, seed=1)]
    state = loader(sets, batch=4).state_dict()
    one = sets[0].examples[0]
    other_mask = TokenizedSet("a", (TokenizedExample("a", "a-0", one.input_ids, ~one.loss_mask), *sets[0].examples[1:]))
    other_b = [sets[0], tokenised("b", [7] * 10, seed=5)]
    for changed, words in (
        (loader([tokenised("a", [5] * 20, seed=5), sets[1]], batch=4), "source a differs from the data"),
        (loader([tokenised("a", [5] * 21), sets[1]], batch=4), "source a differs from the data"),
        (loader([other_mask, sets[1]], batch=4), "source a differs from the data"),
        (loader(other_b, batch=4), "source b differs from the data"),
        (loader([TokenizedSet("c", sets[0].examples), sets[1]], batch=4), "source c differs from the data"),
        (loader(sets, batch=4, seed=1), "the mix differs"),
        (loader(sets, batch=4, strategy="equal"), "the mix differs"),
        (loader(sets, batch=4, max_epochs=[None, 1]), "the mix differs"),
        (loader(sets, batch=5), "train.tokens_per_step or train.batch ... then 4 examples in a step, now 5 examples"),
        (loader(sets, tokens=4), "train.tokens_per_step or train.batch ... now 4 tokens"),
    ):
        assert says(fault_of(changed.load_state_dict, state), f"--resume: {words} ... another --run-dir")
    assert len(faults_of(loader(other_b, batch=5).load_state_dict, state)) == 2
    same = loader(sets, batch=4, micro=7)
    same.load_state_dict(state | {"position": 12})
    assert same.position == 12
    del state["fingerprint"]["sets"]  # of an older checkpoint
    loader(sets, batch=4).load_state_dict(state)
    assert fault_of(loader(other_b, batch=4).load_state_dict, state).startswith("--resume: a source differs from")


def test_task_ids_name_tasks_not_sources():
    """A source may hold several tasks, and two sources the same one."""
    mixed = TokenizedSet("mixed", (*tokenised("x", [3, 4]).examples, *tokenised("y", [5]).examples))
    steps = loader([mixed, tokenised("x", [6], seed=2)], batch=4)
    assert steps.task_names == ["x", "y"]
    found = sorted((task, len(ids)) for _, task, ids, _ in content(steps.next_step()))
    assert found == [("x", 3), ("x", 4), ("x", 6), ("y", 5)]


@pytest.mark.parametrize(
    "batch, tokens, max_epochs, words",
    [
        (40, None, None, None),
        (100, None, None, "takes 100 examples ... only 40: each step repeats the data 2.5 times. Fix: lower train."),
        (100, None, [1.0, 1.0], None),  # the step ends with the data
        (None, 90, None, None),
        (None, 270, None, "takes 120 examples ... only 40: each step repeats the data 3.0 times"),
    ],
)
def test_a_step_larger_than_the_data_is_warned_of(batch, tokens, max_epochs, words):
    sets = [tokenised("a", [2] * 30), tokenised("b", [3] * 10)]
    steps = loader(sets, batch=batch, tokens=tokens, max_epochs=max_epochs)
    mix = make_mix(sets, max_epochs=max_epochs)
    warning = large_step_warning(plan_mix(mix, steps, 1))
    assert warning is None if words is None else says(warning, words)
