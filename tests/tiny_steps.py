"""Random examples, and optimizer steps of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdora.data.batching import Batching, micro_batches
from qdora.data.loader import Step
from qdora.data.tokenize import TokenizedExample

LENGTHS = (17, 12, 9, 9, 8, 5, 3, 1, 6, 2)


def examples(lengths: Sequence[int] = LENGTHS, tasks: str = "ab", seed: int = 0) -> list[TokenizedExample]:
    """Random ids (never 0), labels anywhere but on the first token; a task for each letter, in turn."""
    rng = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(lengths):
        mask = rng.random(length) < 0.6
        mask[-1], mask[0] = True, False
        ids = rng.integers(1, 50, length).astype(np.int32)
        found.append(TokenizedExample(tasks[number % len(tasks)], str(number), ids, mask))
    return found


def step_of(found: Sequence[TokenizedExample], batching: Batching) -> Step:
    """All of them in one step."""
    names = list(dict.fromkeys(each.task for each in found))
    labels = {name: sum(int(each.loss_mask.sum()) for each in found if each.task == name) for name in names}
    micro = micro_batches(found, batching, names)
    return Step(micro, sum(labels.values()), sum(map(len, found)), len(found), labels)
