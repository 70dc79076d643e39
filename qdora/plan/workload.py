"""The micro-batches that a plan assumes: those of the data if it can be read, else full ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import nlargest
from itertools import chain
from typing import Any

from qdora.data.batches import IGNORED, MicroBatch, StepLoader
from qdora.data.build_data import make_loader, micro_batch_tokens, num_steps_of
from qdora.data.mix import Mix
from qdora.plan.plan_contents import MicroBatchShape
from qdora.recipe.settings import Recipe

MOST_STEPS = 20_000
"""Steps whose sizes are compared; a plan says so if the run has more."""
_NUM_FIRST, _NUM_LARGE = 100, 50
"""Steps that are made: those at the beginning, and of each kind of large ones."""

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

    known: dict[tuple[int, int | None, int | None], list[int]] = {}  # plans differ in other things, mostly

    def workload(changed: Recipe) -> tuple[list[MicroBatchShape], int]:
        loader = make_loader(changed, mix, tokenizer)
        if changed.data != recipe.data or loader.streams:
            return assumed_workload(changed)
        steps = num_steps_of(changed, loader), changed.train.batch, changed.train.tokens_per_step
        if steps not in known:
            known[steps] = telling_steps(loader, steps[0])
        return largest_shapes(loader, known[steps])

    return workload


def telling_steps(loader: StepLoader, num_steps: int) -> list[int]:
    """Positions of the steps that a plan examines: the first, those with the longest examples, and the fullest."""
    steps = loader.step_sizes(min(num_steps, MOST_STEPS))
    longest = nlargest(_NUM_LARGE, steps, key=lambda step: step.longest)
    fullest = nlargest(_NUM_LARGE, steps, key=lambda step: step.num_tokens)
    return sorted({step.position for step in chain(steps[:_NUM_FIRST], longest, fullest)})


def largest_shapes(loader: StepLoader, positions: Iterable[int]) -> tuple[list[MicroBatchShape], int]:
    """The largest shapes of the steps at these positions (`not_exceeded`), and the most micro-batches of a step."""
    found: set[MicroBatchShape] = set()
    most = 1
    for position in positions:
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
