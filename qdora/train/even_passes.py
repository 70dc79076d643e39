"""The same number of passes in all processes: where they divide the base, each pass gathers it from all of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from qdora.data.batches import IGNORED, MicroBatch, Step
from qdora.train.distributed import Processes

_EMPTY_TOKENS = 2


def even_passes(batch: Step, processes: Processes) -> Step:
    """The step with empty micro-batches behind this process's own, up to the most that a process has.

    An empty one has two tokens, no label and no example, so all its gradients are zero. Nothing changes where each
    process holds the whole base.
    """
    if not processes.shards:
        return batch
    mine = batch.micro_batches
    missing = max(processes.gather(len(mine))) - len(mine)
    names = mine[0].task_names if mine else list(batch.task_label_tokens)
    return replace(batch, micro_batches=[*mine, *(_empty(names) for _ in range(missing))])


def _empty(task_names: list[str]) -> MicroBatch:
    ids = torch.zeros(1, _EMPTY_TOKENS, dtype=torch.int64)
    return MicroBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.full_like(ids, IGNORED),
        task_ids=torch.zeros(1, dtype=torch.int64),
        task_names=task_names,
        example_ids=[],
    )
