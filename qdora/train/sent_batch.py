"""A micro-batch on its way from the host to a GPU, in one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdora.data.batches import IGNORED, MicroBatch, Packing
from qdora.model.attention import flash_lengths

# Each tensor of a copy begins at a multiple of so many bytes, so that its part can be read in its dtype.
_UNIT = 8


@dataclass(frozen=True)
class SentLabels:
    """The labelled positions of a micro-batch on the model's device, row by row."""

    rows: Tensor
    columns: Tensor
    """(num_labelled,) int64, like `rows`: the positions whose next token counts."""
    targets: Tensor
    """(num_labelled,) int64, that token."""
    owners: Tensor
    """(num_labelled,) int64, its example."""
    starts: Tensor
    """(examples + 1,) int32, where the examples of a single packed row begin, and its end; else empty."""
    packing: Packing | None
    weights: Tensor | None
    """(examples,) float32."""
    longest: int
    """Tokens of the longest example of a single packed row."""
    example_tokens: Tensor
    """(examples,) int64 on the CPU, labelled tokens of each example."""


@dataclass(frozen=True)
class SentBatch:
    """What a step needs of a micro-batch, on the model's device; as in `MicroBatch`."""

    input_ids: Tensor
    attention_mask: Tensor
    task_ids: Tensor
    labels: SentLabels


def send_batch(micro: MicroBatch, weights: Tensor | None, device: torch.device) -> SentBatch:
    """A micro-batch and the weights of its examples in one copy."""
    others = micro.input_ids, micro.attention_mask, micro.task_ids
    labels, (input_ids, attention_mask, task_ids) = _sent(micro.labels, micro.packing, weights, device, others)
    return SentBatch(input_ids, attention_mask, task_ids, labels)


def send_labels(labels: Tensor, packing: Packing | None, weights: Tensor | None, device: torch.device) -> SentLabels:
    """The labelled positions of (rows, length) labels, which are on the CPU and not shifted, in one copy."""
    return _sent(labels, packing, weights, device, ())[0]


def _sent(
    labels: Tensor, packing: Packing | None, weights: Tensor | None, device: torch.device, others: Sequence[Tensor]
) -> tuple[SentLabels, list[Tensor]]:
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORED
    rows, columns = wanted.nonzero(as_tuple=True)
    owner, num_examples, longest = rows, len(labels), 0
    starts = torch.empty(0, dtype=torch.int32)
    if packing is not None:
        owner = packing.example_index.to(labels.device)[rows, columns]
        num_examples = int(packing.example_index.max()) + 1
        if len(labels) == 1:
            starts, longest = flash_lengths(packing.position_ids)
    optional = [*([] if weights is None else [weights]), *([] if packing is None else vars(packing).values())]
    tensors = [rows, columns, labels[:, 1:][wanted[:, :-1]], owner, starts, *others, *optional]
    there = send(tensors, device)
    rest = there[5 + len(others) :]
    rows, columns, targets, owners, starts = there[:5]
    sent = SentLabels(
        rows,
        columns,
        targets,
        owners,
        starts,
        packing=None if packing is None else Packing(*rest[-2:]),
        weights=None if weights is None else rest[0],
        longest=longest,
        example_tokens=torch.bincount(owner, minlength=num_examples),
    )
    return sent, there[5 : 5 + len(others)]


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of any dtypes and shapes, from the CPU to `device`.

    For a GPU they are joined in pinned memory, from which a copy needs no wait of the host. torch keeps that memory
    until the copy is done.
    """
    if device.type == "cpu":
        return list(tensors)
    sizes = [-(-tensor.nbytes // _UNIT) * _UNIT for tensor in tensors]
    joined = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for place, tensor in zip(torch.split(joined, sizes), tensors, strict=True):
        place[: tensor.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    parts = zip(torch.split(joined.to(device, non_blocking=True), sizes), tensors, strict=True)
    return [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for part, tensor in parts]
