"""The gradient of one step: forward and backward passes of its micro-batches.

The loss of a step is the summed NLL of all its micro-batches, in all processes, divided by the labelled tokens of all
of them, so neither padding nor the split into micro-batches changes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdora.adapter.host_embedding import ids_on_host
from qdora.adapter.prepared_gains import norms_checked_later, prepare_gains, settle_norms, unchecked
from qdora.adapter.shared_norms import prepare_shared_gains
from qdora.data.batches import Packing, Step
from qdora.model.inject import adapted_layers
from qdora.model.patches import flash_inputs, known_masks, packed_mask_is_known, takes_flash_lengths
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.hooks import Metrics, Reading
from qdora.train.loss_scale import LossScale
from qdora.train.out_of_memory import shortage_of
from qdora.train.output_head import labelled_nll
from qdora.train.router_loss import tapped_routers
from qdora.train.sent_batch import SentLabels, send_batch, send_labels
from qdora.train.task_weights import TaskWeights, example_weights


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
    reading: Reading | None = None,
) -> tuple[Metrics, list[Tensor]]:
    """Accumulate the gradient of this process's part of a step's loss into the parameters, which must have none.

    The host waits for a GPU once, at the end. There it learns, too, whether a row norm was wrong (`unchecked`); the
    gradient is then computed again.

    Args:
        loss_chunk: Labelled tokens whose logits exist at once; None: as many as make 128 MiB.
        weights: Weight of each task's tokens in the loss; None: all count the same.
        loss_scale: For a model that computes in float16.
        router_aux_loss: Factor of the routers' auxiliary loss. That of a step is the mean over the micro-batches of all
            processes, each weighted by its tokens without padding.
        gradient_norm: Of the gradient when it is complete, for the step's numbers; None if it is not complete here.
        reading: What else is read at the end.
    Returns:
        The step's numbers, with the unweighted NLL per task, and without its factor the auxiliary loss if it has one;
        and the NLL of each micro-batch's examples, (examples,).
    Raises:
        OutOfMemory: A micro-batch did not fit.
    """
    total: float = batch.num_label_tokens
    if weights is not None:
        total = sum(weights[name] * count for name, count in batch.task_label_tokens.items())
    names = batch.micro_batches[0].task_names if batch.micro_batches else []
    tokens = torch.zeros(len(names), dtype=torch.int64)
    later = device.type != "cpu"
    random = random_state() if later else {}
    while True:
        with norms_checked_later(later):
            nll, aux, example_nll = _accumulate(
                model,
                batch,
                total,
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
        numbers["others"] = [] if reading is None else [reading.numbers()]
        read = _read_at_once(numbers, device)
        if not settle_norms(doubts, read["flags"]):
            break
        model.zero_grad()
        set_random_state(random)
    if reading is not None:
        reading.take(read["others"])
    task_numbers = zip(names, read["nll"], tokens.tolist(), strict=True)
    metrics = {
        "loss": sum(read["nll"]) / batch.num_label_tokens,
        "num_tokens": batch.num_tokens,
        "num_label_tokens": batch.num_label_tokens,
        "num_examples": batch.num_examples,
        "tasks": {name: {"nll_sum": each, "num_tokens": count} for name, each, count in task_numbers if count},
    }
    if router_aux_loss > 0:
        metrics["router_aux_loss"] = read["aux"][0]
    return metrics if gradient_norm is None else {"gradient_norm": read["norm"][0], **metrics}, example_nll


def _read_at_once(numbers: dict[str, list[Tensor]], device: torch.device) -> dict[str, list[float]]:
    """The values of tensors of 0 or 1 dimensions, for which the host waits once."""
    flat = {name: [each.to(device).double().view(-1) for each in tensors] for name, tensors in numbers.items()}
    joined = torch.cat([each for tensors in flat.values() for each in tensors])
    read = joined.tolist()
    borders = itertools.accumulate((sum(map(len, tensors)) for tensors in flat.values()), initial=0)
    return {name: read[start:end] for name, (start, end) in zip(flat, itertools.pairwise(borders), strict=True)}


def prepare_model_gains(model: nn.Module) -> None:
    """Compute the gains of the coming passes; for their norms alone no block is fetched that is not resident."""
    layers = adapted_layers(model).values()
    prepare_gains(layer for layer in layers if layer.base.residency is None)
    prepare_shared_gains(layers)


def _accumulate(
    model: nn.Module,
    batch: Step,
    total: float,
    device: torch.device,
    tokens: Tensor,
    *,
    loss_chunk: int | None,
    weights: TaskWeights | None,
    loss_scale: LossScale | None,
    router_aux_loss: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The backward passes of `step_gradient`, without a wait for a GPU.

    Args:
        total: What the sum of the losses is divided by.
        tokens: (tasks,) int64 on the CPU, to which the labelled tokens are added.
    Returns:
        The NLL of each task, (tasks,) float32; the auxiliary loss without its factor; the NLL of each micro-batch's
        examples.
    """
    prepare_model_gains(model)
    nll = torch.zeros(len(tokens), dtype=torch.float32, device=device)
    aux = torch.zeros((), dtype=torch.float32, device=device)
    example_nll = []
    for micro in batch.micro_batches:
        with shortage_of(micro), ExitStack() as stack:
            weight = None if weights is None else example_weights(weights, micro)
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

    Logits are computed at labelled positions only, a chunk at a time: an answer of 5 tokens after a prompt of 200 takes
    5 rows of logits. The model's head is skipped for that; the head, and what the model does to its output, are applied
    here to the head's inputs. The result for a model's first batch is compared with the model's own logits. If they
    differ, the batch is run again, and from then on the model itself computes all logits at once, with a warning.
    A batch without a labelled token gives a zero sum.

    Args:
        model: A transformers causal LM.
        input_ids, attention_mask: (rows, length) on the model's device; 1 on real tokens. With `packing` the model
            gets no mask: transformers then keeps attention inside each run of positions.
        labels: (rows, length) int64 on the CPU, where positions are looked up; not shifted; -100 where a token does
            not count, such as the first of an example.
        chunk: Labelled tokens whose logits exist at once; None: as many as make 128 MiB.
        packing: The example of each token, if the model has passed `packed_attention.packed_layout`; None: a row each.
        weights: (examples,) weight of each example's tokens in `nll_sum`; None: 1.
        routers: Also compute the routers' auxiliary loss (`router_loss.py`), over all tokens but padding.
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
