"""Packed rows, groups of rows and the micro-batches made of them, against plain loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data.batching import (
    ATTENTION_COST,
    GROUP_COST,
    IGNORED,
    Batching,
    MicroBatch,
    micro_batches,
    micro_groups,
    packed_rows,
)
from qdora.data.tokenize import TokenizedExample

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


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, room=st.integers(1, 60))
def test_rows_are_those_of_best_fit(lengths: list[int], room: int) -> None:
    rows = packed_rows(examples_of(lengths), room)
    assert [[int(each.id) for each in row.examples] for row in rows] == best_fit(lengths, room)
    assert [len(row) for row in rows] == [sum(lengths[int(each.id)] for each in row.examples) for row in rows]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9), max_tokens=st.integers(1, 1500))
def test_groups_cost_the_least_of_all_ways_to_cut(lengths: list[int], max_tokens: int) -> None:
    groups = micro_groups(examples_of(lengths), max_tokens)
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

    examples, costs, length = examples_of(lengths), [], max(lengths)
    for each in [*iter_rooms(length, room), room]:
        groups = micro_groups(packed_rows(examples, each), 1000)
        costs.append(cost([(len(group), max(map(len, group))) for group in groups]))
    chosen = micro_batches(examples, Batching(1000, PAD, "rows", room), ["a", "b"])
    assert cost([tuple(micro.input_ids.shape) for micro in chosen]) == min(costs)


def iter_rooms(length: int, most: int) -> Iterator[int]:
    """17, 26, 39, ... below `most`."""
    while length < most:
        yield length
        length += (length + 1) // 2
