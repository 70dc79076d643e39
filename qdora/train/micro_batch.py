"""One micro-batch through the model: negative log-likelihood at the labelled positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdora.ops.loss import token_nll


@dataclass(frozen=True)
class BatchLoss:
    """Losses of a micro-batch.

    Attributes:
        nll_sum: Scalar float32, nats summed over the labelled tokens; differentiable.
        example_nll: (batch,) float32, the same sum per example; detached.
        example_tokens: (batch,) int64, labelled tokens per example, on the labels' device.
    """

    nll_sum: Tensor
    example_nll: Tensor
    example_tokens: Tensor


def batch_loss(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> BatchLoss:
    """Run the model and sum the NLL of labels[:, 1:] given the tokens before them.

    Only the labelled positions reach the output head, so an answer of 5 tokens after a prompt of 200 costs 5 rows of
    logits, whatever the architecture does to its logits afterwards (scaling, soft capping).

    Args:
        model: A transformers causal LM.
        input_ids: (batch, length) int64, on the model's device.
        attention_mask: (batch, length), 1 on real tokens, on the model's device.
        labels: (batch, length) int64, -100 where a token does not count; not shifted. Left on the CPU, no position is
            looked up on the GPU, which would make the host wait for it.
    Returns:
        BatchLoss; a batch without a labelled token gives a zero sum.
    """
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != -100
    rows, columns = (index.to(input_ids.device) for index in wanted.nonzero(as_tuple=True))
    targets = labels[:, 1:][wanted[:, :-1]].to(input_ids.device)
    with _select_before_head(model, rows, columns):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    nll = token_nll(logits.reshape(-1, logits.shape[-1]), targets)  # (num_labelled,)
    zeros = torch.zeros(len(labels), dtype=nll.dtype, device=nll.device)
    return BatchLoss(nll.sum(), zeros.index_add(0, rows, nll.detach()), wanted.sum(dim=1))


@contextmanager
def _select_before_head(model: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """While active, the output head sees only the positions (rows[i], columns[i]), as (1, n, hidden)."""
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, columns].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
