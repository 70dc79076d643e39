"""The gradient of one step: forward and backward passes of its micro-batches.

The loss of a step is the summed NLL of all its micro-batches, in all processes, divided by the labelled tokens of all
of them, so neither padding nor the split into micro-batches changes it. With the weights w_t of tasks t
(`data.mix[].loss_weight`) it is sum_t w_t NLL_t / sum_t w_t tokens_t.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qdora.adapter.norms import norms_checked_later, refresh, settle_norms, unchecked
from qdora.adapter.rows import ids_on_host
from qdora.data.batches import IGNORED, MicroBatch, Packing, Step, StepLoader
from qdora.model.attention import flash_inputs, known_masks, packed_mask_is_known, takes_flash_lengths
from qdora.model.inject import adapted_layers
from qdora.recipe.settings import Recipe
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.distributed import Processes
from qdora.train.gates import Gates
from qdora.train.loss import tapped_routers
from qdora.train.output_head import labelled_nll
from qdora.train.policies import BadStep, LossScale, Shortage, shortage_of
from qdora.train.sent_batch import SentLabels, send_batch, send_labels

Metrics = dict[str, Any]
"""One line of metrics.jsonl."""
TaskWeights = Mapping[str, float]
"""Task -> weight of its tokens in the loss, above 0."""


@dataclass(frozen=True)
class StepGradient:
    """A step's gradient, which lies in the parameters' `grad` unless it could not be computed.

    Attributes:
        fault: Why it could not be computed, or None.
        example_nll: (examples,) of each of this process's micro-batches; on the device, so that nothing waits for it.
        shortage: The micro-batch that did not fit into memory, or None.
    """

    batch: Step
    metrics: Metrics
    fault: str | None
    example_nll: list[Tensor]
    shortage: Shortage | None = None

    @property
    def overflowed(self) -> bool:
        """Whether the loss is finite and its gradient is not."""
        if self.fault is not None:
            return False
        return math.isfinite(self.metrics["loss"]) and not math.isfinite(self.metrics["gradient_norm"])

    def bad_step(self, number: int, reason: str) -> BadStep:
        """The record of this step when its update is not applied."""
        try:
            known = [value for part in self.example_nll for value in part.tolist()]
        except RuntimeError:  # nothing can be read from a GPU after some errors
            known = []
        num_mine = sum(len(micro.example_ids) for micro in self.batch.micro_batches)
        nll = known if len(known) == num_mine else [math.nan] * num_mine
        norm = self.metrics.get("gradient_norm", math.nan)
        return BadStep(number, reason, self.batch, self.metrics["loss"], gradient_norm=norm, example_nll=nll)


def step_gradient(
    model: nn.Module,
    batch: Step,
    *,
    device: torch.device,
    loss_chunk: int | None = None,
    weights: TaskWeights | None = None,
    loss_scale: LossScale | None = None,
    router_aux_loss: float = 0.0,
    gradient_norm: Callable[[], Tensor] | None = None,
    gates: Gates | None = None,
) -> tuple[Metrics, list[Tensor]]:
    """Accumulate the gradient of this process's part of a step's loss into the parameters, which must have none.

    The host waits for a GPU once, at the end. There it learns, too, whether a row norm was wrong (`unchecked`); the
    gradient is then computed again.

    Args:
        loss_chunk: Labelled tokens whose logits exist at once; None: as many as make 128 MiB.
        weights: Weight of each task's tokens in the loss; None: all count the same.
        router_aux_loss: Factor of the routers' auxiliary loss. That of a step is the mean over the micro-batches of all
            processes, each weighted by its tokens without padding.
        gradient_norm: Of the gradient when it is complete, for the step's numbers; None if it is not complete here.
        gates: They get their gradient from the numbers that are read at the end.
    Returns:
        The step's numbers, with the unweighted NLL per task, and without its factor the auxiliary loss if it has one;
        and the NLL of each micro-batch's examples, (examples,).
    Raises:
        OutOfMemory: A micro-batch did not fit.
    """
    names = batch.micro_batches[0].task_names if batch.micro_batches else []
    tokens = torch.zeros(len(names), dtype=torch.int64)
    later = device.type != "cpu"
    random = random_state() if later else {}
    while True:
        with norms_checked_later(later):
            nll, aux, example_nll = _accumulate(
                model,
                batch,
                device,
                tokens.zero_(),
                loss_chunk=loss_chunk,
                weights=weights,
                loss_scale=loss_scale,
                router_aux_loss=router_aux_loss,
            )
        doubts = unchecked(adapted_layers(model).values())
        numbers = {"nll": [nll], "flags": list(doubts.values()), "aux": [aux]}
        numbers["norm"] = [] if gradient_norm is None else [gradient_norm()]
        numbers["gates"] = [] if gates is None else [gates.gradient()]
        # All at once, so that the host waits once.
        flat = {name: [each.to(device).double().view(-1) for each in tensors] for name, tensors in numbers.items()}
        joined = torch.cat([each for tensors in flat.values() for each in tensors])
        read = joined.tolist()
        borders = itertools.accumulate((sum(map(len, tensors)) for tensors in flat.values()), initial=0)
        values = {name: read[slice(*ends)] for name, ends in zip(flat, itertools.pairwise(borders), strict=True)}
        if not settle_norms(doubts, values["flags"]):
            break
        model.zero_grad()
        set_random_state(random)
    if gates is not None:
        gates.take_gradient(values["gates"])
    task_numbers = zip(names, values["nll"], tokens.tolist(), strict=True)
    metrics = {
        "loss": sum(values["nll"]) / batch.num_label_tokens,
        "num_tokens": batch.num_tokens,
        "num_label_tokens": batch.num_label_tokens,
        "num_examples": batch.num_examples,
        "tasks": {name: {"nll_sum": each, "num_tokens": count} for name, each, count in task_numbers if count},
    }
    if router_aux_loss > 0:
        metrics["router_aux_loss"] = values["aux"][0]
    return metrics if gradient_norm is None else {"gradient_norm": values["norm"][0], **metrics}, example_nll


def over_processes(metrics: Metrics, fault: str | None, processes: Processes) -> tuple[Metrics, str | None]:
    """The numbers of a step summed over the processes, and the fault of the first process that has one."""
    mine = {name: metrics[name] for name in ("loss", "router_aux_loss") if name in metrics}
    per_rank = processes.gather({"fault": fault, "sums": mine, "tasks": metrics.get("tasks", {})})
    for rank, theirs in enumerate(per_rank):
        if theirs["fault"] is not None:
            return metrics, f"process {rank}: {theirs['fault']}"
    tasks: dict[str, dict[str, Any]] = {}
    for name, numbers in (pair for theirs in per_rank for pair in theirs["tasks"].items()):
        total = tasks.setdefault(name, {"nll_sum": 0.0, "num_tokens": 0})
        for key in total:
            total[key] += numbers[key]
    sums = {name: sum(theirs["sums"][name] for theirs in per_rank) for name in mine}
    return metrics | sums | {"tasks": tasks}, None


def prepare_model_gains(model: nn.Module) -> None:
    """Compute the gains of the coming passes; for their norms alone no block is fetched that is not resident."""
    layers = adapted_layers(model).values()
    refresh(layer for layer in layers if layer.base.residency is None or layer.base.share is not None)


def _accumulate(
    model: nn.Module,
    batch: Step,
    device: torch.device,
    tokens: Tensor,
    *,
    loss_chunk: int | None,
    weights: TaskWeights | None,
    loss_scale: LossScale | None,
    router_aux_loss: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The backward passes of `step_gradient`, without a wait for a GPU.

    Adds the labelled tokens of each task to `tokens`, (tasks,) int64 on the CPU. Returns the NLL of each task, (tasks,)
    float32; the auxiliary loss without its factor; the NLL of each micro-batch's examples.
    """
    total: float = batch.num_label_tokens
    if weights is not None:
        total = sum(weights[name] * count for name, count in batch.task_label_tokens.items())
    prepare_model_gains(model)
    nll = torch.zeros(len(tokens), dtype=torch.float32, device=device)
    aux = torch.zeros((), dtype=torch.float32, device=device)
    example_nll = []
    for micro in batch.micro_batches:
        with shortage_of(micro), ExitStack() as stack:
            weight = None if weights is None else _example_weights(weights, micro)
            sent = send_batch(micro, weight, device)
            stack.enter_context(known_masks(model, sent.labels.packing, device))
            stack.enter_context(ids_on_host(model, micro.input_ids))
            options: dict[str, Any] = {"chunk": loss_chunk, "packing": micro.packing, "weights": weight}
            options |= {"routers": router_aux_loss > 0, "sent": sent.labels}
            loss = batch_loss(model, sent.input_ids, sent.attention_mask, micro.labels, **options)
            objective = loss.nll_sum
            if loss.router_loss is not None:
                share = int(micro.attention_mask.sum()) / batch.num_tokens if micro.example_ids else 0.0
                objective = objective + router_aux_loss * share * total * loss.router_loss
                aux += share * loss.router_loss.detach()
            part = objective / total if loss_scale is None else objective * loss_scale.value
            part.backward()  # type: ignore[no-untyped-call]
            nll.index_add_(0, sent.task_ids, loss.example_nll.float())
        if micro.example_ids:
            example_nll.append(loss.example_nll)
        tokens.index_add_(0, micro.task_ids, loss.example_tokens)
    if loss_scale is not None and batch.micro_batches:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / (loss_scale.value * total))
    return nll, aux, example_nll


@dataclass(frozen=True)
class BatchLoss:
    """Losses of a micro-batch, float32 nats."""

    nll_sum: Tensor
    """Scalar, summed over the labelled tokens, times their weights; differentiable."""
    example_nll: Tensor
    """(examples,) unweighted sum of each example; detached."""
    example_tokens: Tensor
    """(examples,) int64, labelled tokens per example, on the labels' device."""
    router_loss: Tensor | None = None
    """Scalar, the routers' auxiliary loss; differentiable. None if it was not asked for."""


def batch_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    chunk: int | None = None,
    packing: Packing | None = None,
    weights: Tensor | None = None,
    routers: bool = False,
    sent: SentLabels | None = None,
) -> BatchLoss:
    """Run the model and sum the NLL of labels[:, 1:] given the tokens before them.

    Logits are computed at labelled positions only, a chunk at a time (`output_head.labelled_nll`): an answer of 5
    tokens after a prompt of 200 takes 5 rows of logits. A batch without a labelled token gives a zero sum.

    Args:
        model: A transformers causal LM.
        input_ids, attention_mask: (rows, length) on the model's device; 1 on real tokens. With `packing` the model
            gets no mask: transformers then keeps attention inside each run of positions.
        labels: (rows, length) int64 on the CPU, where positions are looked up; not shifted; -100 where a token does
            not count, such as the first of an example.
        chunk: Labelled tokens whose logits exist at once; None: as many as make 128 MiB.
        packing: The example of each token, if the model has passed `checks.packed_layout`; None: a row each.
        weights: (examples,) weight of each example's tokens in `nll_sum`; None: 1.
        routers: Also compute the routers' auxiliary loss (`train/loss.py`), over all tokens but padding.
        sent: What `send_labels` makes of labels, packing and weights, if it is at hand.
    """
    sent = sent or send_labels(labels, packing, weights, input_ids.device)
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if packing is None or packed_mask_is_known():
        inputs["attention_mask"] = attention_mask
    if sent.packing is not None:
        inputs["position_ids"] = sent.packing.position_ids
        if len(sent.starts) and takes_flash_lengths(model):
            inputs |= flash_inputs(sent.starts, sent.longest)
    with tapped_routers(model) if routers else nullcontext() as tap:
        nll = labelled_nll(model, inputs, (sent.rows, sent.columns), sent.targets, chunk)
    zeros = torch.zeros(len(sent.example_tokens), dtype=nll.dtype, device=nll.device)
    example_nll = zeros.index_add(0, sent.owners, nll.detach())
    nll_sum = nll.sum() if sent.weights is None else (nll * sent.weights[sent.owners]).sum()
    router_loss = None if tap is None else tap.loss(attention_mask)
    return BatchLoss(nll_sum, example_nll, sent.example_tokens, router_loss)


def even_passes(batch: Step, processes: Processes) -> Step:
    """The step with empty micro-batches behind this process's own, up to the most that a process has.

    Where the processes divide the base, each pass gathers it from all of them. An empty micro-batch has two tokens, no
    label and no example, so all its gradients are zero.
    """
    if not processes.shards:
        return batch
    mine = batch.micro_batches
    ids = torch.zeros(1, 2, dtype=torch.int64)
    names = mine[0].task_names if mine else list(batch.task_label_tokens)
    none, task_ids = torch.full_like(ids, IGNORED), torch.zeros(1, dtype=torch.int64)
    empty = MicroBatch(ids, torch.ones_like(ids), none, task_ids, task_names=names, example_ids=[])
    missing = max(processes.gather(len(mine))) - len(mine)
    return replace(batch, micro_batches=[*mine, *[empty] * missing])


def task_weights(recipe: Recipe, loader: StepLoader) -> TaskWeights | None:
    """The weight of every task of the training data, or None if no source has a `loss_weight`."""
    if all(source.loss_weight is None for source in recipe.data.mix):
        return None
    return {task: weight for task, weight, _ in _weights(recipe, loader)}


def task_weight_faults(recipe: Recipe, loader: StepLoader) -> list[str]:
    """One line for each source that gives a task another weight than an earlier source does."""
    faults, known = [], dict[str, tuple[float, str]]()
    for task, weight, label in _weights(recipe, loader):
        first_weight, first = known.setdefault(task, (weight, label))
        if weight != first_weight:
            faults.append(
                f"data.mix: task {task} is in {first} with loss_weight {first_weight:g} and in {label} with "
                f"{weight:g}, allowed: one weight for a task, or another `name`."
            )
    return faults


def _example_weights(weights: TaskWeights, micro: MicroBatch) -> Tensor:
    """(examples,) float32: the weight of each example's tokens."""
    return torch.tensor([weights[name] for name in micro.task_names])[micro.task_ids]


def _weights(recipe: Recipe, loader: StepLoader) -> list[tuple[str, float, str]]:
    """(task, weight, label of the source) for each task of each source."""
    return [
        (task, 1.0 if source.loss_weight is None else source.loss_weight, source.label)
        for source, part in zip(recipe.data.mix, loader.tokenised, strict=True)
        for task in part.task_names
    ]
