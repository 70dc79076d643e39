"""Negative log-likelihood per token, from logits or from hidden states and a frozen output head in chunks of tokens.

The loss of a step is a ratio of sums, never a mean of means, so nothing is averaged here.

In chunks the logits of all tokens never exist at once. Loss and gradient come from one pass: the logits of a chunk are
made, turned in place into their own gradient, and multiplied with the head again. One gradient of the size of the
hidden states remains for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qdora.quant.planned_device import device_kind
from qdora.quant.tiles import Weight, dense_weight

CHUNK_BYTES = 2**27
"""Logits of an automatic chunk: 523 tokens of a 128k vocabulary in bf16."""
LEAST_CHUNK = 16
"""Tokens of the shortest automatic chunk. Every chunk reads the whole head twice: with 16 tokens of a 49k vocabulary
that took 3 times as long on a CPU as with 256."""
# Logits widened to float32 at a time. On a CPU 4 MiB, which stay in its cache: 1.5 times as fast as 128 MiB.
_SLICE_LOGITS = 2**23
_CPU_SLICE_LOGITS = 2**20


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each position, (num_tokens,), in nats.

    `logits` are (num_tokens, vocabulary) of any float dtype; the softmax runs in float32 (float64 for float64).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, reduction="none")


def auto_chunk(vocabulary: int, bytes_per_logit: int) -> int:
    """Tokens whose logits take `CHUNK_BYTES`, at least `LEAST_CHUNK`."""
    return max(CHUNK_BYTES // (vocabulary * bytes_per_logit), LEAST_CHUNK)


def chunked_nll(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """-log softmax(logits)[label] of each token, with z = h W^T + bias and logits = c tanh(scale z / c), or scale z.

    Peak beside the result: the logits of one chunk in hidden's dtype (their gradient overwrites them), and 32 MiB (4
    MiB on a CPU; twice that with a softcap) of them in float32. The head is frozen; its gradient is not formed.

    Args:
        hidden: (num_tokens, in), any float dtype; both products run in it, the softmax in float32 (float64 for
            float64). Its gradient is rounded once per token to this dtype, and again after the product with the
            upstream gradient.
        weight: Head W, (vocabulary, in), dense or packed. A packed one is dequantised whole, once a call.
        labels: (num_tokens,) int64, each a vocabulary index.
        bias: (vocabulary,) or None.
        scale: Factor of all logits (Cohere's logit_scale; 1 / logits_scaling of Granite).
        softcap: c, above 0 (Gemma 2, arXiv 2408.00118, sec. 2), or None.
        chunk: Tokens whose logits exist at once, above 0 (default: `auto_chunk`).
    Returns: (num_tokens,) float32 (float64 for float64), nats; differentiable once, with respect to hidden only. A
        backward pass with create_graph=True raises RuntimeError.
    """
    if chunk is None:
        chunk = auto_chunk(weight.shape[0], hidden.element_size())
    if chunk < 1:
        raise ValueError(f"a chunk must have 1 token or more, got {chunk}.")
    # Asked here, since gradients are off inside the function.
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    trainable = [each for each in (weight, bias) if isinstance(each, Tensor) and each.requires_grad]
    assert not (torch.is_grad_enabled() and trainable), "the gradient of a trainable head would be lost"
    nll: Tensor = _ChunkedNll.apply(  # type: ignore[no-untyped-call, unused-ignore]
        hidden, weight, bias, labels, scale, softcap, chunk, wants_gradient
    )
    return nll


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Weight,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        wants_gradient: bool,
    ) -> Tensor:
        dense = dense_weight(weight, hidden.dtype)
        num_tokens, vocabulary = len(hidden), len(dense)
        nll = hidden.new_empty(num_tokens, dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = hidden.new_empty(hidden.shape) if wants_gradient else None
        # One buffer for all chunks: a CPU's allocator would fetch fresh pages for each.
        buffer = hidden.new_empty(min(chunk, num_tokens), vocabulary)
        for start in range(0, num_tokens, chunk):
            rows = slice(start, start + chunk)
            logits = buffer[: min(chunk, num_tokens - start)]
            if bias is None:
                torch.mm(hidden[rows], dense.T, out=logits)
            else:
                torch.addmm(bias.to(dense.dtype), hidden[rows], dense.T, out=logits)
            nll[rows] = _nll_and_gradient_(logits, labels[rows], scale, softcap, wants_gradient)
            if gradient is not None:
                torch.mm(logits, dense, out=gradient[rows])  # now d nll / d z
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would not notice: the saved gradient looks like a constant
            raise RuntimeError(
                "the chunked loss has no second derivative. Fix: take token_nll of the model's logits for curvature."
            )
        (upstream,) = grads
        (gradient,) = ctx.saved_tensors
        # In place on a copy: the upstream gradient (1 / tokens of the step) stays in float32 until it is multiplied.
        return gradient.clone().mul_(upstream[:, None]), *[None] * 7


def _nll_and_gradient_(z: Tensor, labels: Tensor, scale: float, softcap: float | None, wants_gradient: bool) -> Tensor:
    """NLL of raw logits z (tokens, vocabulary), (tokens,) float32; z becomes d nll / d z if a gradient is wanted."""
    wide = torch.promote_types(z.dtype, torch.float32)
    nll = z.new_empty(len(z), dtype=wide)
    limit = _CPU_SLICE_LOGITS if device_kind(z.device) == "cpu" else _SLICE_LOGITS
    num_rows = max(limit // z.shape[1], 1)
    for start in range(0, len(z), num_rows):
        rows = slice(start, start + num_rows)
        label = labels[rows, None]
        values = z[rows].to(wide)  # z itself if it is wide already
        slope = None
        if scale != 1.0:
            values.mul_(scale)
        if softcap is not None:
            values.div_(softcap).tanh_()
            if wants_gradient:
                slope = values.square().neg_().add_(1.0)
            values.mul_(softcap)
        values.sub_(values.amax(dim=1, keepdim=True))
        of_label = values.gather(1, label)
        total = values.exp_().sum(dim=1, keepdim=True)
        found = total.log() - of_label  # (rows, 1)
        nll[rows] = found[:, 0]
        if not wants_gradient:
            continue
        values.div_(total).scatter_(1, label, torch.expm1(-found))  # softmax, minus 1 at the label
        if slope is not None:
            values.mul_(slope)
        if scale != 1.0:
            values.mul_(scale)
        if values.dtype != z.dtype:
            z[rows].copy_(values)
    return nll
