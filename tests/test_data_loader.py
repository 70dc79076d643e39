"""Packed rows, micro-batches, the mix, optimizer steps and resuming, against plain loops and drawing one by one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data import mix as mix_module
from qdora.data.batches import (
    ATTENTION_COST,
    GROUP_COST,
    IGNORED,
    Batching,
    MicroBatch,
    StepLoader,
    micro_batches,
    micro_groups,
    packed_rows,
)
from qdora.data.mix import MixOrder, mix_shares
from qdora.data.mix_plan import plan_mix
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from tests.data_rows import fault_of, faults_of, mix_of, says

PAD = 0
SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=25)


def examples_of(lengths: Sequence[int], tasks: Sequence[str] = "ab", prefix: str = "", seed: int = 0) -> Any:
    """Random ids (never PAD), labels anywhere but on the first token and always on the last; the tasks in turn."""
    rng = np.random.default_rng([seed, len(lengths)])
    found = []
    for number, length in enumerate(lengths):
        mask = rng.random(length) < 0.5
        mask[0], mask[-1] = False, length > 1
        ids = rng.integers(1, 50, length).astype(np.int32)
        found.append(TokenizedExample(tasks[number % len(tasks)], f"{prefix}{number}", ids, mask))
    return found


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """The rule in plain loops: by falling length, into the row with the least room that is enough, else a new one."""
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fitting = [row for row in rows if sum(lengths[each] for each in row) + lengths[number] <= room]
        if fitting:
            max(fitting, key=lambda row: sum(lengths[each] for each in row)).append(number)
        else:
            rows.append([number])
    return rows


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, room=st.integers(1, 60))
def test_rows_are_those_of_best_fit(lengths: list[int], room: int) -> None:
    rows = packed_rows(examples_of(lengths), room)
    assert [[int(each.id) for each in row.examples] for row in rows] == best_fit(lengths, room)
    assert [len(row) for row in rows] == [sum(lengths[int(each.id)] for each in row.examples) for row in rows]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9), max_tokens=st.integers(1, 1500))
def test_groups_cost_the_least_of_all_ways_to_cut(lengths: list[int], max_tokens: int) -> None:
    groups: Any = micro_groups(examples_of(lengths), max_tokens)
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])  # equal lengths keep their order
    assert [int(example.id) for group in groups for example in group] == order
    ordered = [lengths[number] for number in order]

    def cost(sizes: list[int]) -> float:
        total, start = 0, 0
        for size in sizes:
            width = ordered[start]
            if size > 1 and size * width > max_tokens:
                return float("inf")
            total, start = total + size * width + GROUP_COST, start + size
        return total

    def ways(rest: int) -> Iterator[list[int]]:
        if rest == 0:
            yield []
        for size in range(1, rest + 1):
            for more in ways(rest - size):
                yield [size, *more]

    assert cost([len(group) for group in groups]) == min(map(cost, ways(len(ordered))))


def unpacked(micro: MicroBatch) -> list[tuple[str, str, list[int], list[int]]]:
    """(id, task, ids, labels) of its examples. In packed rows a position of 0 begins an example, or the padding."""
    found: list[tuple[str, str, list[int], list[int]]] = []
    rows = zip(micro.input_ids.tolist(), micro.labels.tolist(), micro.attention_mask.tolist(), strict=True)
    for row, (ids, labels, real) in enumerate(rows):
        if micro.packing is None:
            begins = sorted({0, sum(real)} - {len(real)})
            owners = [row] * sum(real) + [-1] * (len(real) - sum(real))
        else:
            packing = micro.packing
            positions, owners = (each[row].tolist() for each in (packing.position_ids, packing.example_index))
            begins = [place for place, position in enumerate(positions) if position == 0]
        for start, stop in pairwise([*begins, len(ids)]):
            here = slice(start, stop)
            (index,) = set(owners[here])
            assert set(real[here]) == {int(index >= 0)}
            if micro.packing is not None:
                assert positions[here] == list(range(stop - start))
            if index == -1:
                assert (set(ids[here]), set(labels[here]), stop) == ({PAD}, {IGNORED}, len(ids))
                continue
            task = micro.task_names[int(micro.task_ids[index])]
            found.append((micro.example_ids[index], task, ids[here], labels[here]))
    return found


@settings(max_examples=120, deadline=None)
@given(
    lengths=LENGTHS,
    layout=st.sampled_from([None, "rows", "single"]),
    room=st.one_of(st.none(), st.integers(1, 80)),
    most=st.integers(1, 200),
)
def test_micro_batches_hold_every_example_once(lengths: list[int], layout: Any, room: Any, most: int) -> None:
    examples = examples_of(lengths)
    batches = micro_batches(examples, Batching(most, PAD, layout, room), ["a", "b"])
    found = [each for micro in batches for each in unpacked(micro)]
    assert [each[0] for each in found] == [name for micro in batches for name in micro.example_ids]
    assert sorted(found, key=lambda each: int(each[0])) == [
        (each.id, each.task, each.input_ids.tolist(), np.where(each.loss_mask, each.input_ids, IGNORED).tolist())
        for each in examples
    ]
    for micro in batches:
        rows, width = micro.input_ids.shape
        assert rows * width <= most or (rows == 1 and width in lengths)
        assert width == micro.attention_mask.sum(dim=1).max()
        assert (micro.packing is None) == (layout is None)
        if layout == "single":
            assert (rows, int(micro.attention_mask.min())) == (1, 1)
        elif layout == "rows" and room is not None:
            assert width <= room or width in lengths
        tensors = [micro.input_ids, micro.attention_mask, micro.labels, micro.task_ids]
        tensors += [micro.packing.position_ids, micro.packing.example_index] if micro.packing else []
        assert {tensor.dtype for tensor in tensors} == {torch.int64}
        listed = [(name, ids.tolist(), labels.tolist()) for name, ids, labels in micro.examples()]
        assert listed == [(name, ids, labels) for name, _, ids, labels in unpacked(micro)]
    widths = [micro.input_ids.shape[1] for micro in batches]
    assert widths == sorted(widths, reverse=True)
    assert micro_batches([], Batching(most, PAD, layout, room), ["a", "b"]) == []  # a process without a share


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), room=st.integers(60, 500))
def test_rows_are_as_long_as_costs_the_least(lengths: list[int], room: int) -> None:
    """Padding and groups against attention over whole rows, at lengths of rows that grow by half."""

    def cost(shapes: list[tuple[int, int]]) -> float:
        return sum(rows * width * (1 + width / ATTENTION_COST) + GROUP_COST for rows, width in shapes)

    examples, costs, each = examples_of(lengths), [], max(lengths)
    rooms = [room]
    while each < room:  # such as 17, 26, 39
        rooms.append(each)
        each += (each + 1) // 2
    for each in rooms:
        groups = micro_groups(packed_rows(examples, each), 1000)
        costs.append(cost([(len(group), max(map(len, group))) for group in groups]))
    chosen = micro_batches(examples, Batching(1000, PAD, "rows", room), ["a", "b"])
    assert cost([tuple(micro.input_ids.shape) for micro in chosen]) == min(costs)


def tokenised(name, lengths, seed=0, tasks=None):
    examples = examples_of(lengths, tasks or [name], f"{name}-", seed)
    return TokenizedSet(name, tuple(examples), num_truncated=1, num_dropped=2)


def loader(sets, *, tokens=None, batch=None, micro=64, strategy="proportional", seed=0, position=0, max_epochs=None):
    mix = mix_of(sets, strategy=strategy, seed=seed, max_epochs=max_epochs)
    made = StepLoader(mix, Batching(micro, PAD), tokens_per_step=tokens, batch=batch)
    made.position = position
    return made


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
    shares = mix_shares(weights, "weights")
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


def test_epochs_seeds_and_sources_have_their_own_shuffles():
    drawn = [
        pairs(MixOrder([250, 250], [1, 1], seed), start, start + 500) for seed, start in ((0, 0), (0, 500), (1, 0))
    ]
    orders = [[index for source, index in each if source == which] for each in drawn for which in (0, 1)]
    assert len({tuple(order) for order in [*orders, range(250)]}) == 7
    assert pairs(MixOrder([250, 250], [1, 1], 0), 0, 500) == drawn[0]


def test_shares_caps_and_far_positions_by_hand():
    for sizes, strategy, options, shares in (
        ([10, 30], "proportional", {}, [0.25, 0.75]),
        ([10, 30], "equal", {}, [0.5, 0.5]),
        ([1, 3], "weights", {}, [0.25, 0.75]),
        ([1e308, 1e308], "weights", {}, [0.5, 0.5]),
        ([1e-300, 1e300], "weights", {}, [0, 1]),
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
    sets = [tokenised(name, [5] * size) for name, size in (("a", 100), ("b", 100), ("c", 7), ("d", 3))]
    # 0.29 * 100 is 28.999999999999996
    assert mix_of(sets, [None, 0.29, 1.5, 0.01]).order.caps == (None, 29, 10, 1)


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
    # a source may hold several tasks, and two sources the same one
    sets = [tokenised("a", first), tokenised("b", [5, 9, 7], seed=1, tasks="ba")]
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
        assert len(ids) == sum(
            max(1, int(each * part.num_examples + 1e-6)) for each, part in zip(most, sets, strict=True)
        )
        return
    assert steps.draws_for_steps(num_steps) == steps.position
    plan = plan_mix(steps, num_steps)
    assert (plan["num_steps"], plan["num_draws"]) == (num_steps, steps.position)
    for part, each in zip(plan["sources"], sets, strict=True):
        count = sum(id.startswith(part["name"]) for id in ids)
        assert (part["num_draws"], part["share_asked"]) == (count, 0.5)
        assert (part["epochs"], part["share_seen"]) == (count / each.num_examples, count / max(len(ids), 1))
        assert (part["num_examples"], part["num_tokens"]) == (each.num_examples, each.num_tokens)
        assert (part["num_truncated"], part["num_dropped"]) == (1, 2)


def test_epochs_end_with_the_caps():
    sets = [tokenised("a", [5, 6, 7] * 20), tokenised("b", [9] * 3, seed=1)]
    assert loader(sets, batch=4).draws_for_steps(2 * 10**9) == 8 * 10**9
    steps = loader(sets, batch=2, max_epochs=[0.5, 1.5])
    assert [steps.steps_for_epochs(epochs) for epochs in (0.5, 0.556, 1)] == [16, 17, 17]  # the caps leave 30 + 4 of 63


def test_other_data_mix_or_step_size_is_refused():
    sets = [tokenised("a", [5] * 20), tokenised("b", [7] * 10, seed=1)]
    state = loader(sets, batch=4).state_dict()
    one = sets[0].examples[0]
    other_mask = TokenizedSet("a", (TokenizedExample("a", "a-0", one.input_ids, ~one.loss_mask), *sets[0].examples[1:]))
    other_b = [sets[0], tokenised("b", [7] * 10, seed=5)]
    for changed, words in (
        (loader([tokenised("a", [5] * 20, seed=5), sets[1]], batch=4), "source a differs"),
        (loader([tokenised("a", [5] * 21), sets[1]], batch=4), "source a differs"),
        (loader([other_mask, sets[1]], batch=4), "source a differs"),
        (loader(other_b, batch=4), "source b differs"),
        (loader([TokenizedSet("c", sets[0].examples), sets[1]], batch=4), "source c differs"),
        (loader(sets, batch=4, seed=1), "the mix ... differs"),
        (loader(sets, batch=4, strategy="equal"), "the mix ... differs"),
        (loader(sets, batch=4, max_epochs=[None, 1]), "the mix ... differs"),
        (loader(sets, batch=5), "train.tokens_per_step or train.batch (4 examples, now 5 examples)"),
        (loader(sets, tokens=4), "train.tokens_per_step or train.batch ... now 4 tokens"),
    ):
        assert says(fault_of(changed.load_state_dict, state), f"--resume: {words}")
    assert len(faults_of(loader(other_b, batch=5).load_state_dict, state)) == 2
    same = loader(sets, batch=4, micro=7)
    same.load_state_dict(state | {"position": 12})
    assert same.position == 12
