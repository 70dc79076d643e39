"""Packed rows: every example once, none too long, best fit; and the micro-batches that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data.batching import ATTENTION_COST, GROUP_COST, IGNORED, Batching, MicroBatch, micro_batches, packed_rows
from qdora.data.loader import StepLoader
from qdora.data.mix import make_mix
from qdora.data.tokenize import TokenizedExample, TokenizedSet

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)
PAD = 0


def examples_of(lengths: Sequence[int], seed: int = 0) -> list[TokenizedExample]:
    """Random ids (never PAD), labels anywhere but on the first token; tasks a and b in turn."""
    rng = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(lengths):
        mask = rng.random(length) < 0.6
        mask[0] = False
        ids = rng.integers(1, 50, length).astype(np.int32)
        found.append(TokenizedExample("ab"[number % 2], str(number), ids, mask))
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


def fewest_rows(lengths: list[int], room: int) -> int:
    """Of all ways to pack."""
    best = len(lengths)

    def place(rest: list[int], rows: list[int]) -> None:
        nonlocal best
        if len(rows) >= best:
            return
        if not rest:
            best = len(rows)
            return
        for index, used in enumerate(rows):
            if used + rest[0] <= room:
                place(rest[1:], [*rows[:index], used + rest[0], *rows[index + 1 :]])
        place(rest[1:], [*rows, rest[0]])

    place(sorted(lengths, reverse=True), [])
    return best


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, room=st.integers(1, 60))
def test_rows_are_those_of_best_fit(lengths: list[int], room: int) -> None:
    examples = examples_of(lengths)
    rows = packed_rows(examples, room)
    assert [[int(each.id) for each in row.examples] for row in rows] == best_fit(lengths, room)
    assert sorted(int(each.id) for row in rows for each in row.examples) == list(range(len(lengths)))
    assert all(len(row) <= room or len(row.examples) == 1 for row in rows)
    assert [len(row) for row in rows] == [sum(lengths[int(each.id)] for each in row.examples) for row in rows]
    assert packed_rows(examples, room) == rows
    fullest = sorted(len(row) for row in rows)
    assert all(one + other > room for one, other in pairwise(fullest))  # no two rows would go into one


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_not_many_more_rows_than_the_fewest(lengths: list[int]) -> None:
    rows = packed_rows(examples_of(lengths), 20)
    assert len(rows) <= 3 / 2 * fewest_rows(lengths, 20)


def unpacked(micro: MicroBatch) -> list[tuple[str, str, list[int], list[int]]]:
    """(id, task, ids, labels) of its examples, read off the positions alone: a 0 begins an example."""
    assert micro.packing is not None
    found: list[tuple[str, str, list[int], list[int]]] = []
    for row in range(len(micro.input_ids)):
        begins = (micro.packing.position_ids[row] == 0).nonzero().flatten().tolist()
        for start, stop in pairwise([*begins, micro.input_ids.shape[1]]):
            assert micro.packing.position_ids[row, start:stop].tolist() == list(range(stop - start))
            (index,) = micro.packing.example_index[row, start:stop].unique().tolist()
            ids, labels = micro.input_ids[row, start:stop].tolist(), micro.labels[row, start:stop].tolist()
            real = micro.attention_mask[row, start:stop].unique().tolist()
            if index == -1:
                assert (ids, labels) == ([PAD] * len(ids), [IGNORED] * len(ids))
                assert (real, stop) == ([0], micro.input_ids.shape[1])
                continue
            assert real == [1]
            found.append((micro.example_ids[index], micro.task_names[int(micro.task_ids[index])], ids, labels))
    return found


@settings(max_examples=100, deadline=None)
@given(
    lengths=LENGTHS,
    layout=st.sampled_from(["rows", "single"]),
    room=st.one_of(st.none(), st.integers(1, 80)),
    most=st.integers(1, 200),
)
def test_packed_micro_batches_hold_every_example_once(lengths: list[int], layout: Any, room: Any, most: int) -> None:
    examples = examples_of(lengths)
    batches = micro_batches(examples, Batching(most, PAD, layout, room), ["a", "b"])
    found = [each for micro in batches for each in unpacked(micro)]
    assert [each[0] for each in found] == [name for micro in batches for name in micro.example_ids]
    assert sorted(found, key=lambda each: int(each[0])) == [
        (
            each.id,
            each.task,
            each.input_ids.tolist(),
            [
                token if wanted else IGNORED
                for token, wanted in zip(each.input_ids.tolist(), each.loss_mask, strict=True)
            ],
        )
        for each in examples
    ]
    for micro in batches:
        rows, width = micro.input_ids.shape
        assert rows * width <= most or (rows == 1 and width in lengths)
        if layout == "single":
            assert rows == 1
            assert bool(micro.attention_mask.all())
        elif room is not None:
            assert width <= room or width in lengths
        listed = [(name, ids.tolist(), labels.tolist()) for name, ids, labels in micro.examples()]
        assert listed == [(name, ids, labels) for name, _, ids, labels in unpacked(micro)]
    assert batches[0].input_ids.shape[1] == max(micro.input_ids.shape[1] for micro in batches)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS)
def test_examples_of_padded_micro_batches(lengths: list[int]) -> None:
    examples = {each.id: each for each in examples_of(lengths)}
    listed = {}
    for micro in micro_batches(list(examples.values()), Batching(100, PAD), ["a", "b"]):
        assert micro.packing is None
        listed |= {name: (ids.tolist(), (labels != IGNORED).tolist()) for name, ids, labels in micro.examples()}
    assert listed == {name: (each.input_ids.tolist(), each.loss_mask.tolist()) for name, each in examples.items()}


def test_a_label_on_a_first_token_is_refused() -> None:
    first = TokenizedExample("a", "0", np.ones(3, np.int32), np.ones(3, np.bool_))
    with pytest.raises(AssertionError):
        micro_batches([first], Batching(100, PAD, "rows", 50), ["a"])


@pytest.mark.parametrize("layout", ["rows", "single"])
def test_a_packed_step_has_the_examples_of_the_unpacked_one_and_goes_on_from_a_state(layout: Any) -> None:
    rng = np.random.default_rng(0)
    sets = [TokenizedSet("a", tuple(examples_of(rng.integers(2, 60, 50).tolist())))]
    order = make_mix(sets, strategy="proportional", seed=0, max_epochs=[None]).order

    def loader(**options: Any) -> StepLoader:
        return StepLoader(sets, order, tokens_per_step=400, batch=None, batching=Batching(128, PAD, **options))

    plain, packed, resumed = loader(), loader(packed=layout, row_tokens=64), loader(packed=layout, row_tokens=64)
    for _ in range(3):
        one, other = plain.next_step(), packed.next_step()
        assert one.num_label_tokens == other.num_label_tokens
        assert plain.position == packed.position
        ids = [sorted(name for micro in step.micro_batches for name in micro.example_ids) for step in (one, other)]
        assert ids[0] == ids[1]
    resumed.load_state_dict(plain.state_dict())  # packing belongs to the speed of a step, not to its content
    mine, theirs = packed.next_step(), resumed.next_step()
    for first, second in zip(mine.micro_batches, theirs.micro_batches, strict=True):
        assert first.packing is not None
        assert second.packing is not None
        assert torch.equal(first.input_ids, second.input_ids)
        assert torch.equal(first.labels, second.labels)
        assert torch.equal(first.packing.position_ids, second.packing.position_ids)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), room=st.integers(60, 500))
def test_rows_are_as_long_as_costs_the_least(lengths: list[int], room: int) -> None:
    """Padding and groups against attention over whole rows: neither the shortest nor the longest rows are better."""

    def cost(shapes: list[tuple[int, int]]) -> float:
        return sum(rows * width * (1 + width / ATTENTION_COST) + GROUP_COST for rows, width in shapes)

    examples = examples_of(lengths)
    chosen = micro_batches(examples, Batching(1000, PAD, "rows", room), ["a", "b"])
    for each in (max(lengths), room):
        one_row_each = [(1, len(row)) for row in packed_rows(examples, each)]
        assert cost([tuple(micro.input_ids.shape) for micro in chosen]) <= cost(one_row_each)


def test_equal_lengths_are_not_packed_for_nothing() -> None:
    (micro,) = micro_batches(examples_of([20] * 12), Batching(1000, PAD, "rows", 512), ["a", "b"])
    assert micro.input_ids.shape == (12, 20)


@pytest.mark.parametrize("layout", [None, "rows", "single"])
def test_a_process_without_a_share_has_no_micro_batch(layout: Any) -> None:
    assert micro_batches([], Batching(100, PAD, layout, 50), ["a"]) == []
