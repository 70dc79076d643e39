"""Negative log-likelihood, summed: the loss of a step is a ratio of sums, never a mean of means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each position, in float32.

    Args:
        logits: (num_tokens, vocabulary), any float dtype; the softmax runs in float32 (float64 for float64).
        labels: (num_tokens,) int64, each a vocabulary index.
    Returns:
        (num_tokens,) float32, nats.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, reduction="none")
