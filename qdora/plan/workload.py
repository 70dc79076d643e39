"""The micro-batches that a plan assumes: those of the data if it can be read, else full ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import nlargest
from itertools import chain
from typing import Any

from qdora.data.batching import IGNORED, MicroBatch
from qdora.data.build_data import make_loader, micro_batch_tokens, num_steps_of
from qdora.data.loader import StepLoader
from qdora.data.mix import Mix
from qdora.plan.plan_contents import MicroBatchShape
from qdora.recipe.settings import Recipe

_MANY_STEPS = 200
"""So many steps of each kind are examined: a run of 100,000 would take minutes."""

Workload = Callable[[Recipe], tuple[list[MicroBatchShape], int]]
"""workload(recipe) -> its largest micro-batches (at least one), and the most that a step has."""


def assumed_workload(recipe: Recipe) -> tuple[list[MicroBatchShape], int]:
    """A micro-batch of rows of data.max_length with every token labelled, and the number of them in a step."""
    longest = recipe.data.max_length
    step_rows = recipe.train.batch or max(1, -(-(recipe.train.tokens_per_step or 1) // longest))
    rows = min(max(1, micro_batch_tokens(recipe) // longest), step_rows)
    packed = recipe.data.packing
    count = max(1, -(-step_rows // rows))
    masked = packed or rows > 1
    return [MicroBatchShape(rows, longest, rows * (longest - 1), masked, packed, accumulated=count > 1)], count


def workload_of_data(recipe: Recipe, mix: Mix, tokenizer: Any) -> Workload:
    """The workload of tokenised data. `mix` belongs to `recipe.data`; for a recipe with other data settings, and for
    streamed data, full micro-batches are assumed.
    """

    def workload(changed: Recipe) -> tuple[list[MicroBatchShape], int]:
        loader = make_loader(changed, mix, tokenizer)
        if changed.data != recipe.data or loader.streams:
            return assumed_workload(changed)
        return largest_shapes(loader, num_steps_of(changed, loader))

    return workload


def largest_shapes(loader: StepLoader, num_steps: int) -> tuple[list[MicroBatchShape], int]:
    """The largest shapes of a run (`not_exceeded`), and the most micro-batches of a step; moves the loader.

    Examined are the first steps, and those with the longest examples and with the most tokens.
    """
    found: set[MicroBatchShape] = set()
    most = 1
    steps = loader.step_sizes(num_steps)
    longest = nlargest(_MANY_STEPS, steps, key=lambda step: step.longest)
    fullest = nlargest(_MANY_STEPS, steps, key=lambda step: step.num_tokens)
    for position in sorted({step.position for step in chain(steps[:_MANY_STEPS], longest, fullest)}):
        loader.position = position
        batches = loader.next_step().micro_batches
        most = max(most, len(batches))
        found.update(shape_of(batch, accumulated=index > 0) for index, batch in enumerate(batches))
    return not_exceeded(found), most


def shape_of(batch: MicroBatch, *, accumulated: bool) -> MicroBatchShape:
    """The shape of a micro-batch; `accumulated` if it is not the first of its step."""
    rows, length = batch.input_ids.shape
    num_labels = int((batch.labels[:, 1:] != IGNORED).sum())
    packed = batch.packing is not None
    # An unpadded batch has a mask of ones, which transformers leaves out.
    masked = packed or not bool(batch.attention_mask.all())
    return MicroBatchShape(rows, length, max(num_labels, 1), masked, packed=packed, accumulated=accumulated)


def not_exceeded(shapes: Iterable[MicroBatchShape]) -> list[MicroBatchShape]:
    """The shapes that no other one equals or exceeds in all of tokens, squared lengths, labels, masks and gradients."""

    def sizes(shape: MicroBatchShape) -> tuple[int, ...]:
        return (
            shape.num_tokens,
            shape.rows * shape.length**2,  # the scores of eager attention
            shape.rows * shape.length**2 * shape.masked,  # the mask of sdpa
            shape.num_labels,
            int(shape.masked),
            int(shape.packed),
            int(shape.accumulated),
        )

    kept: list[MicroBatchShape] = []
    for shape in sorted(shapes, key=sizes, reverse=True):
        mine = sizes(shape)
        if not any(all(a >= b for a, b in zip(sizes(other), mine, strict=True)) for other in kept):
            kept.append(shape)
    return kept
