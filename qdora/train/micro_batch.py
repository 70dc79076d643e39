"""The loss of one micro-batch: negative log-likelihood at the labelled positions only."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qdora.data.batching import IGNORED, Packing
from qdora.ops.loss import token_nll
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.output_head import LogitForm, head_nll, learn_form, tapped

logger = logging.getLogger(__name__)

# Each model's LogitForm, learnt from its first labelled batch; None: no known form reproduces its logits.
_FORMS: WeakKeyDictionary[nn.Module, LogitForm | None] = WeakKeyDictionary()
# Peak bytes for each logit when all exist at once: 16 bits, and three float32 copies (widened, log-softmax, gradient).
_PLAIN_BYTES = 14


@dataclass(frozen=True)
class BatchLoss:
    """Losses of a micro-batch.

    Attributes:
        nll_sum: Scalar float32, nats summed over the labelled tokens, times their weights; differentiable.
        example_nll: (examples,) float32, the unweighted sum of each example; detached.
        example_tokens: (examples,) int64, labelled tokens per example, on the labels' device.
    """

    nll_sum: Tensor
    example_nll: Tensor
    example_tokens: Tensor


def batch_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    chunk: int | None = None,
    packing: Packing | None = None,
    weights: Tensor | None = None,
) -> BatchLoss:
    """Run the model and sum the NLL of labels[:, 1:] given the tokens before them.

    Logits are computed at labelled positions only, a chunk at a time: an answer of 5 tokens after a prompt of 200 takes
    5 rows of logits. The model's head is skipped for that; the head, and what the model does to its output, are applied
    here to the head's inputs. The result for a model's first batch is compared with the model's own logits. If they
    differ, the batch is run again, and from then on the model itself computes all logits at once, with a warning.

    Args:
        model: A transformers causal LM.
        input_ids: (rows, length) int64, on the model's device.
        attention_mask: (rows, length), 1 on real tokens, on the model's device. With `packing` the model does not get
            it: transformers then keeps attention inside each run of positions.
        labels: (rows, length) int64, not shifted; -100 where a token does not count, such as the first of an example.
            They stay on the CPU, so that the host does not wait for a GPU to look up positions.
        chunk: Labelled tokens whose logits exist at once; None: as many as make 128 MiB.
        packing: Which example each token belongs to, in rows of several examples; None: a row is an example. The model
            must have passed `packed_attention.packed_layout`.
        weights: (examples,) weight of each example's tokens in `nll_sum`; None: 1.
    Returns:
        BatchLoss; a batch without a labelled token gives a zero sum.
    """
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORED
    places = wanted.nonzero(as_tuple=True)
    rows, columns = (index.to(input_ids.device) for index in places)
    targets = labels[:, 1:][wanted[:, :-1]].to(input_ids.device)
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if packing is None:
        inputs["attention_mask"] = attention_mask
        owner, num_examples = places[0], len(labels)
    else:
        inputs["position_ids"] = packing.position_ids.to(input_ids.device)
        owner = packing.example_index.to(labels.device)[places]
        num_examples = int(packing.example_index.max()) + 1
    nll = _chunked(model, inputs, (rows, columns), targets, chunk)  # (num_labelled,)
    if nll is None:
        nll = _plain(model, inputs, (rows, columns), targets)
    zeros = torch.zeros(num_examples, dtype=nll.dtype, device=nll.device)
    example_nll = zeros.index_add(0, owner.to(nll.device), nll.detach())
    nll_sum = nll.sum() if weights is None else (nll * weights.to(nll.device)[owner.to(nll.device)]).sum()
    return BatchLoss(nll_sum, example_nll, torch.bincount(owner, minlength=num_examples))


def _chunked(
    model: nn.Module, inputs: dict[str, Any], labelled: tuple[Tensor, Tensor], targets: Tensor, chunk: int | None
) -> Tensor | None:
    """NLL of the labelled positions without the model's logits, or None if no known form reproduces those."""
    known = model in _FORMS
    form = _FORMS.get(model, LogitForm())
    if form is None:
        return None
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    random = None if known else random_state()
    with tapped(head, *labelled, probing=not known) as tap:
        logits = model(**inputs).logits
    if not known and len(targets):
        form = learn_form(model, head, tap, logits, targets)
        _FORMS[model] = form
        if form is None:
            _warn(model, len(targets), logits)
            assert random is not None
            set_random_state(random)  # as if the model had run once: a resumed run draws the same
            return None
    return head_nll(head, tap.hidden, targets, form, chunk)


def _plain(model: nn.Module, inputs: dict[str, Any], labelled: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """NLL of the labelled positions from the model's own logits, all of them at once."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][labelled].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    return token_nll(logits.reshape(-1, logits.shape[-1]), targets)


def _warn(model: nn.Module, num_tokens: int, logits: Tensor) -> None:
    config = getattr(model, "config", None)
    logger.warning(
        "%s: the operations after this model's head are not known, so memory.loss_chunk has no effect: the logits of "
        "all labelled tokens exist at once, about %.2f GiB for the %d of this micro-batch.",
        getattr(config, "model_type", type(model).__name__),
        num_tokens * logits.shape[-1] * _PLAIN_BYTES / 2**30,
        num_tokens,
    )
