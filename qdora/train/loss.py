"""Negative log-likelihood per token, from logits or from hidden states and a frozen output head in chunks of tokens.

The loss of a step is a ratio of sums, never a mean of means, so nothing is averaged here.

In chunks the logits of all tokens never exist at once. Loss and gradient come from one pass: the logits of a chunk are
made, turned in place into their own gradient, and multiplied with the head again. One gradient of the size of the
hidden states remains for the backward pass.

At the end: the auxiliary loss of a mixture's routers, which models have one, and its value in a forward pass.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig

from qdora.errors import UserError
from qdora.quant.kernels import device_kind
from qdora.quant.tiles import Weight, dense_weight
from qdora.recipe.settings import Recipe

CHUNK_BYTES = 2**27
"""Logits of an automatic chunk: 523 tokens of a 128k vocabulary in bf16."""
LEAST_CHUNK = 16
"""Tokens of the shortest automatic chunk. Every chunk reads the whole head twice: with 16 tokens of a 49k vocabulary
that took 3 times as long on a CPU as with 256."""
# Logits widened to float32 at a time. On a CPU 4 MiB, which stay in its cache: 1.5 times as fast as 128 MiB.
_SLICE_LOGITS = 2**23
_CPU_SLICE_LOGITS = 2**20
_ROUTER_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""Those of transformers' function; a family whose function has others computes another loss."""


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


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, real: Tensor) -> Tensor:
    """E sum_e f_e P_e over the real tokens of all routers together; f is counted and has no gradient.

    f_e is how often expert e is among the `top_k` most probable ones, for each token; P_e its mean probability. It is
    `top_k` where all experts have the same probability, and E where all tokens choose the same experts for certain.

    Source: Switch Transformer, arXiv 2101.03961, eq. 4 to 6, for several choices as in transformers.

    Args:
        router_logits: Of each router, (tokens, E), any float dtype; the softmax runs in float32 (float64 for float64).
        real: (tokens,), 1 or True for tokens that are not padding; at least one.
    Returns: Scalar, float32 or float64.
    """
    num_experts = router_logits[0].shape[-1]
    wide = torch.promote_types(router_logits[0].dtype, torch.float32)
    device = router_logits[0].device
    weights = real.to(device, wide)
    chosen_by = real.to(device, torch.int64).unsqueeze(1).expand(-1, top_k).reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)  # integers: no order of sums
    probability = torch.zeros(num_experts, dtype=wide, device=device)
    for logits in router_logits:
        own = logits.to(device, wide)
        counts.scatter_add_(0, own.topk(top_k, dim=-1).indices.reshape(-1), chosen_by)
        probability = probability + weights @ torch.softmax(own, dim=-1)
    num_routed = weights.sum() * len(router_logits)
    return num_experts * (counts / num_routed * (probability / num_routed)).sum()


def check_router_loss(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise UserError if `train.router_aux_loss` is on and the recipe's model has no such loss.

    The model of the config, its text model, or the whole of images and texts may have one.
    """
    asked, text = recipe.train.router_aux_loss, config.get_text_config()
    if not asked:
        return
    if getattr(text, "router_aux_loss_coef", None) is not None:
        families = [MODEL_FOR_CAUSAL_LM_MAPPING.get(type(each), None) for each in (config, text)]
        families.append(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None))
        modules = {sys.modules[family.__module__] for family in families if family is not None}
        functions = filter(None, (getattr(module, "load_balancing_loss_func", None) for module in modules))
        if any(list(inspect.signature(function).parameters) == _ROUTER_PARAMETERS for function in functions):
            return
    raise UserError(
        f"train.router_aux_loss: must be 0 with {config.model_type}, got {asked:g}; it needs a causal model for "
        "which transformers has an auxiliary loss of routers."
    )


@dataclass
class RouterTap:
    """The logits of all routers in the latest forward pass, (tokens, experts) each, with their graph."""

    top_k: int
    logits: tuple[Tensor, ...] = ()

    def loss(self, real: Tensor) -> Tensor:
        """`load_balancing_loss` of a micro-batch; `real` is (rows, length), 1 on tokens that are not padding."""
        if not self.logits:  # not every config shows that no block has a router
            text = "must be 0 with this model: transformers gives no logits of routers"
            raise UserError(f"train.router_aux_loss: {text}.")
        return load_balancing_loss(self.logits, self.top_k, real.reshape(-1))


@contextmanager
def tapped_routers(model: Any) -> Iterator[RouterTap]:
    """Record what the routers of a model compute inside the block; for models that pass `check_router_loss`.

    The decoder is asked, not the model, which would also compute the loss itself and count the padding of packed rows.
    """
    tap = RouterTap(model.config.get_text_config().num_experts_per_tok)

    def ask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return args, kwargs | {"output_router_logits": True}

    def take(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        tap.logits = getattr(output, "router_logits", None) or ()

    decoder: nn.Module = model.get_decoder()
    with decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(take):
        yield tap
