"""The gradient of one step: forward and backward passes of its micro-batches.

The loss of a step is the summed NLL of all its micro-batches, in all processes, divided by the labelled tokens of all
of them. With the weights w_t of tasks t (`data.mix[].loss_weight`) it is sum_t w_t NLL_t / sum_t w_t tokens_t.

A micro-batch goes to a GPU in one copy, and the host waits once, for the numbers of the step; with experts also in
each of their blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qdora.adapter.norms import norms_checked_later, refresh, settle_norms, unchecked
from qdora.data.batches import IGNORED, MicroBatch, Packing, Step, StepLoader
from qdora.errors import RunFailure, UserError, first_line
from qdora.memory.oom import is_out_of_memory
from qdora.model.attention import (
    flash_inputs,
    flash_starts,
    known_masks,
    packed_mask_is_known,
    takes_flash_lengths,
)
from qdora.model.inject import adapted_layers
from qdora.recipe.settings import Recipe
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.distributed import Processes
from qdora.train.loss import labelled_nll

Metrics = dict[str, Any]
"""One line of metrics.jsonl."""
# The range of the loss scale, its start, and the steps without an overflow after which it doubles.
_LEAST, _START, _MOST = 2.0**-4, 2.0**7, 2.0**15
_PATIENCE = 500
# Each tensor of a copy to a GPU begins at a multiple of so many bytes, so that its part can be read in its dtype.
_UNIT = 8


class Shortage(NamedTuple):
    """A micro-batch that did not fit: its tokens with padding, and the first line of the allocator's message."""

    num_examples: int
    num_tokens: int
    reason: str

    def fault(self) -> str:
        """What is wrong if the micro-batch is a single example, which cannot be split."""
        what = f"out of memory with one example of {self.num_tokens:,} tokens by itself ({self.reason.rstrip('.')})"
        fix = "--resume -s memory.loss_chunk=64 or -s memory.checkpointing=true, or lower data.max_length in a new run"
        return f"{what}. Fix: {fix}."


class OutOfMemory(RunFailure):
    """A micro-batch did not fit. It keeps the frames that it passed, and their tensors, alive."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(f"out of memory in a micro-batch of {shortage.num_tokens:,} tokens: {shortage.reason}")
        self.shortage = shortage


class LossScale:
    """The factor of a step's summed loss in a float16 backward pass; the float32 gradients are divided by it.

    Source: Mixed Precision Training, arXiv 1710.03740, sec. 3.2.
    """

    STATE = "value", "num_good"

    def __init__(self) -> None:
        self.value, self.num_good = _START, 0

    def halve(self) -> bool:
        """After an overflow: half the factor, and whether the step is worth another try."""
        self.num_good = 0
        if self.value <= _LEAST:
            return False
        self.value /= 2
        return True

    def applied(self) -> None:
        """Count a step without an overflow; after many of them the factor doubles."""
        self.num_good += 1
        if self.num_good == _PATIENCE:
            self.value, self.num_good = min(2 * self.value, _MOST), 0


def step_gradient(
    model: nn.Module,
    batch: Step,
    *,
    loss_chunk: int | None = None,
    weights: Mapping[str, float] | None = None,
    loss_scale: LossScale | None = None,
    norm: Callable[[], Tensor] | None = None,
) -> tuple[Metrics, list[Tensor]]:
    """Accumulate the gradient of this process's part of a step's loss into the parameters, which must have none.

    The host waits for a GPU once, at the end; if it then learns that a row norm was wrong (`unchecked`), the gradient
    is computed again. `norm` of the gradient is read with the step's other numbers.

    Returns the step's numbers, with the unweighted NLL per task; and the NLL of each micro-batch's examples,
    (examples,), on the device.
    """
    names = batch.micro_batches[0].task_names if batch.micro_batches else list(batch.task_label_tokens)
    device = next(model.parameters()).device
    later = device.type != "cpu"
    random = random_state() if later else {}
    total: float = batch.num_label_tokens
    if weights is not None:
        total = sum(weights[name] * count for name, count in batch.task_label_tokens.items())
    while True:
        nll = torch.zeros(len(names), dtype=torch.float32, device=device)
        example_nll = []
        with norms_checked_later(later):
            layers = adapted_layers(model).values()
            # For norms alone no block is fetched that is not resident.
            refresh(layer for layer in layers if layer.base.residency is None or layer.base.share is not None)
            for micro in batch.micro_batches:
                weight = (
                    None if weights is None else torch.tensor([weights[name] for name in names])[micro.task_ids]
                )
                try:
                    tensors = label_tensors(micro.labels, micro.packing, weight)
                    tensors |= {
                        name: getattr(micro, name) for name in ("input_ids", "attention_mask", "task_ids")
                    }
                    sent = send(tensors, device)
                    packing = micro.packing and Packing(sent["position_ids"], sent["example_index"])
                    with known_masks(model, packing, device):
                        loss = batch_loss(
                            model,
                            sent["input_ids"],
                            sent["attention_mask"],
                            micro.labels,
                            chunk=loss_chunk,
                            packing=micro.packing,
                            weights=weight,
                            sent=sent,
                        )
                        scaled = loss.nll_sum / total if loss_scale is None else loss.nll_sum * loss_scale.value
                        scaled.backward()  # type: ignore[no-untyped-call]
                    nll.index_add_(0, sent["task_ids"], loss.example_nll.float())
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    short = Shortage(len(micro.example_ids), micro.input_ids.numel(), first_line(error))
                    raise OutOfMemory(short) from error
                if micro.example_ids:
                    example_nll.append(loss.example_nll)
            if loss_scale is not None and batch.micro_batches:
                factor = 1.0 / (loss_scale.value * total)
                torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], factor)
        doubts = unchecked(layers)
        # All at once, so that the host waits once.
        numbers = [nll, *doubts.values(), *([] if norm is None else [norm()])]
        joined = torch.cat([each.to(device).double().view(-1) for each in numbers])
        read = joined.tolist()
        if not settle_norms(doubts, read[len(names) : len(names) + len(doubts)]):
            break
        model.zero_grad()
        set_random_state(random)
    tasks = {}
    for name, nll_sum in zip(names, read, strict=False):  # the flags are behind the sums
        if count := batch.task_label_tokens.get(name):
            tasks[name] = {"nll_sum": nll_sum, "num_tokens": count}
    metrics = {
        "loss": sum(read[: len(names)]) / batch.num_label_tokens,
        "num_tokens": batch.num_tokens,
        "num_label_tokens": batch.num_label_tokens,
        "num_examples": batch.num_examples,
        "tasks": tasks,
    }
    return metrics if norm is None else {"gradient_norm": read[-1], **metrics}, example_nll


def label_tensors(labels: Tensor, packing: Packing | None, weights: Tensor | None) -> dict[str, Tensor]:
    """The labelled positions of a micro-batch: rows, columns, targets (the next token) and owners (its example),
    (num_labelled,) int64; weights, the packing, and starts, (examples + 1,) int32, where the examples of a single
    packed row begin, and its end. All on the CPU, like `labels`, (rows, length)."""
    is_labelled = torch.zeros_like(labels, dtype=torch.bool)
    is_labelled[:, :-1] = labels[:, 1:] != IGNORED
    rows, columns = is_labelled.nonzero(as_tuple=True)
    tensors = {"rows": rows, "columns": columns, "targets": labels[:, 1:][is_labelled[:, :-1]], "owners": rows}
    if weights is not None:
        tensors["weights"] = weights
    if packing is not None:
        tensors |= {**vars(packing), "owners": packing.example_index[rows, columns]}
        if len(labels) == 1:
            tensors["starts"] = flash_starts(packing.position_ids)
    return tensors


def send(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors from the CPU to `device`; for a GPU joined in pinned memory: one copy, no wait of the host."""
    if device.type == "cpu":
        return dict(tensors)
    sizes = [-(-tensor.nbytes // _UNIT) * _UNIT for tensor in tensors.values()]
    joined = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for part, tensor in zip(torch.split(joined, sizes), tensors.values(), strict=True):
        part[: tensor.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    parts = zip(torch.split(joined.to(device, non_blocking=True), sizes), tensors.items(), strict=True)
    return {name: part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for part, (name, tensor) in parts}


class BatchLoss(NamedTuple):
    """Losses of a micro-batch, float32 nats."""

    nll_sum: Tensor  # scalar, summed over the labelled tokens, times their weights; differentiable
    example_nll: Tensor  # (examples,) unweighted sum of each example; detached


def batch_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    chunk: int | None = None,
    packing: Packing | None = None,
    weights: Tensor | None = None,
    sent: dict[str, Tensor] | None = None,
) -> BatchLoss:
    """Run the model, a transformers causal LM, and sum the NLL of labels[:, 1:] given the tokens before them.

    `input_ids` and `attention_mask`, 1 on real tokens, are (rows, length) on the model's device; with `packing` the
    model gets no mask: transformers then keeps attention inside each run of positions (`guards.packed_layout`).
    `labels`, (rows, length) int64 on the CPU, are -100 where a token does not count. `weights` are (examples,). `sent`
    are the `label_tensors` on the device, if they are there.
    """
    there = sent or send(label_tensors(labels, packing, weights), input_ids.device)
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if packing is None or packed_mask_is_known():
        inputs["attention_mask"] = attention_mask
    num_examples = len(labels)
    if packing is not None:
        num_examples = int(packing.example_index.max()) + 1
        inputs["position_ids"] = there["position_ids"]
        if "starts" in there and takes_flash_lengths(model):
            inputs |= flash_inputs(there["starts"], packing.position_ids)
    nll = labelled_nll(model, inputs, (there["rows"], there["columns"]), there["targets"], chunk)
    zeros = torch.zeros(num_examples, dtype=nll.dtype, device=nll.device)
    example_nll = zeros.index_add(0, there["owners"], nll.detach())
    nll_sum = nll.sum() if weights is None else (nll * there["weights"][there["owners"]]).sum()
    return BatchLoss(nll_sum, example_nll)


def even_passes(batch: Step, processes: Processes) -> Step:
    """The step with empty micro-batches behind this process's own: each pass gathers a divided base from all."""
    if not processes.shards:
        return batch
    mine = batch.micro_batches
    ids = torch.zeros(1, 2, dtype=torch.int64)
    names = mine[0].task_names if mine else list(batch.task_label_tokens)
    none, task_ids = torch.full_like(ids, IGNORED), torch.zeros(1, dtype=torch.int64)
    empty = MicroBatch(ids, torch.ones_like(ids), none, task_ids, task_names=names, example_ids=[])
    num_missing = max(processes.gather(len(mine))) - len(mine)
    return replace(batch, micro_batches=[*mine, *[empty] * num_missing])


def task_weights(recipe: Recipe, loader: StepLoader) -> dict[str, float] | None:
    """The weight of every task of the training data, or None if no source has a `loss_weight`. UserError if sources
    give a task different weights."""
    if all(source.loss_weight is None for source in recipe.data.mix):
        return None
    weights = dict[str, float]()
    for source, part in zip(recipe.data.mix, loader.tokenised, strict=True):
        for task in part.task_names:
            weight = source.loss_weight or 1.0
            if weights.setdefault(task, weight) != weight:
                what = f"task {task} has loss_weight {weights[task]:g} in one source and {weight:g} in {source.label}."
                raise UserError(f"data.mix: {what}")
    return weights
