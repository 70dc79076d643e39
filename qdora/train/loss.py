"""From the last hidden state to the loss: the output head, what a model does to its logits, and the NLL per token.

The logits of all tokens never exist at once: those of a chunk are turned in place into their own gradient, and
multiplied with the head again. One gradient of the size of the hidden states remains for the backward pass.

Gemma caps its logits, Granite divides them, Cohere multiplies them: the config proposes forms, and a comparison with
the model's own logits decides.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qdora.adapter.layer import FrozenLinear, is_plain_linear
from qdora.memory.shard import release
from qdora.model.attention import text_config
from qdora.quant.kernels import device_kind
from qdora.quant.tiles import Weight, dense_weight
from qdora.train.checkpoint import random_state, set_random_state

CHUNK_BYTES = 2**27
"""Logits of an automatic chunk: 523 tokens of a 128k vocabulary in bf16."""
LEAST_CHUNK = 16
"""Tokens of the shortest automatic chunk; every chunk reads the whole head twice."""
# Logits widened to float32 at a time. On a CPU 4 MiB, which stay in its cache: 1.5 times as fast as 128 MiB.
_SLICE_LOGITS = 2**23
_CPU_SLICE_LOGITS = 2**20
# Bytes per logit of a checkpointed head: two 16-bit copies, and three in float32 (widened, log-softmax, gradient).
_CHECKPOINTED_BYTES = 16
# Fields of transformers' configs. Granite divides, HyperCLOVA X multiplies by a field of that name: both are tried.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")
# Positions at which logits are compared, also with larger hidden states: a cap of 30 does not show in logits near 1.
_PROBED = 4
_PROBE_FACTORS = (1.0, 16.0, 256.0)
# Each model's LogitForm, learnt from its first labelled batch; None: no known form reproduces its logits.
_FORMS: WeakKeyDictionary[nn.Module, LogitForm | None] = WeakKeyDictionary()

logger = logging.getLogger("qdora")


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each position, (num_tokens,) float32; logits are (num_tokens, vocabulary)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, reduction="none")


def auto_chunk(vocabulary: int, bytes_per_logit: int) -> int:
    """Tokens whose logits take `CHUNK_BYTES`."""
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

    `hidden` is (num_tokens, in); both products run in its dtype, the softmax in float32 (float64 for float64). The
    frozen head W, (vocabulary, in), is dense or packed. `softcap` is c (Gemma 2, arXiv 2408.00118, sec. 2). Returns
    (num_tokens,) float32 (float64 for float64), nats, differentiable once, with respect to `hidden` only.
    """
    if chunk is None:
        chunk = auto_chunk(weight.shape[0], hidden.element_size())
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad  # gradients are off inside the function
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
        # once_differentiable would not notice: the saved gradient looks like a constant
        if torch.is_grad_enabled():
            raise RuntimeError("the chunked loss has no second derivative; token_nll of a model's logits has.")
        (upstream,) = grads
        (gradient,) = ctx.saved_tensors
        # In place on a copy: the upstream gradient (1 / tokens of the step) stays in float32 until it is multiplied.
        return gradient.clone().mul_(upstream[:, None]), *[None] * 7


def _nll_and_gradient_(
    z: Tensor, labels: Tensor, scale: float, softcap: float | None, wants_gradient: bool
) -> Tensor:
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
        loss = total.log() - of_label  # (rows, 1)
        nll[rows] = loss[:, 0]
        if not wants_gradient:
            continue
        values.div_(total).scatter_(1, label, torch.expm1(-loss))  # softmax, minus 1 at the label
        if slope is not None:
            values.mul_(slope)
        if scale != 1.0:
            values.mul_(scale)
        if values.dtype != z.dtype:
            z[rows].copy_(values)
    return nll


class LogitForm(NamedTuple):
    """logits = softcap * tanh(scale * z / softcap), z the output of the head; scale * z without a softcap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, z: Tensor) -> Tensor:
        """The logits, in float32 (float64 for float64); z itself if the form changes nothing."""
        if self == LogitForm():
            return z
        scaled = z.to(torch.promote_types(z.dtype, torch.float32)) * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


@dataclass
class Tap:
    """Inputs and output of the head in one forward pass, which calls it `num_calls` times."""

    hidden: Tensor  # (num_labelled, hidden), with their graph
    raw: Tensor  # (num_probed, vocabulary), before the model changes it
    num_calls: int = 0


@contextmanager
def tapped(
    head: nn.Module, rows: Tensor, columns: Tensor, *, probing: bool = False, whole: bool = False
) -> Iterator[Tap]:
    """Record the head's inputs at (rows[i], columns[i]), (num_labelled,) int64 on the model's device. The head itself
    computes the first of them; with `probing` those that `learn_form` needs, with `whole` all, with their graph."""
    tap = Tap(torch.empty(0), torch.empty(0))

    def take(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tap.num_calls += 1
        tap.hidden = args[0][rows, columns]
        probe = tap.hidden if whole else tap.hidden.detach()[: _PROBED if probing else 1]
        if probing:
            probe = torch.cat([probe * factor for factor in _PROBE_FACTORS])
        return (probe.unsqueeze(0), *args[1:])

    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        tap.raw = output.detach()[0]

    with head.register_forward_pre_hook(take), head.register_forward_hook(keep) if probing else nullcontext():
        yield tap


@torch.no_grad()
def learn_form(model: nn.Module, tap: Tap, logits: Tensor) -> LogitForm | None:
    """The form whose logits differ from the model's own, (1, num_probed, vocabulary), in a `probing` pass by no more
    than rounding, or None."""
    if tap.num_calls != 1 or logits.shape != (1, *tap.raw.shape):
        return None
    own = logits[0]
    largest = own.abs().amax(dim=1).double()
    rounding = 4 * max(torch.finfo(dtype).eps for dtype in (tap.raw.dtype, own.dtype))

    def error(form: LogitForm) -> float:
        difference = (form.apply(tap.raw) - own).abs().amax(dim=1).double()
        return float((difference / largest.clamp_min(1e-30)).max())  # NaN fails every comparison

    errors = {form: error(form) for form in proposals(model.config)}
    form = min(errors, key=errors.__getitem__)
    return form if errors[form] <= rounding else None


def proposals(config: Any) -> list[LogitForm]:
    """The forms of the logits that a model's config may mean, the likeliest first."""
    config = text_config(config)

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(value) for value in values if isinstance(value, int | float) and value > 0]

    scales = [*(scale for number in numbers(_SCALES) for scale in (number, 1.0 / number)), 1.0]
    softcaps = [*numbers(_SOFTCAPS), None]
    return [LogitForm(scale, softcap) for scale, softcap in itertools.product(scales, softcaps)]


def labelled_nll(
    model: nn.Module,
    inputs: dict[str, Any],
    labelled: tuple[Tensor, Tensor],
    targets: Tensor,
    chunk: int | None,
) -> Tensor:
    """NLL of the labelled positions (rows, columns) with the tokens `targets` behind them, (num_labelled,) each.

    The model's head is skipped, and applied here to its inputs. If no known form reproduces the logits of a model's
    first batch, the model itself computes all logits at once.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    known, form = model in _FORMS, _FORMS.get(model, LogitForm())
    if form is not None:
        random = {} if known else random_state()
        with tapped(head, *labelled, probing=not known) as tap:
            logits = model(**inputs).logits
        if not known and len(targets):
            form = _FORMS[model] = learn_form(model, tap, logits)
        if form is not None:
            nll = head_nll(head, tap.hidden, targets, form, chunk)
            release(head)
            return nll
        text = "%s: what this model does to its logits is not known, so memory.loss_chunk has no effect."
        logger.warning(text, model.config.model_type)  # type: ignore[union-attr]
        set_random_state(random)  # as if the model had run once: a resumed run draws the same
        del tap, logits  # and their graph
    with tapped(head, *labelled, whole=True):
        logits = model(**inputs).logits
    return token_nll(logits.reshape(-1, logits.shape[-1]), targets)


def head_nll(head: nn.Module, hidden: Tensor, targets: Tensor, form: LogitForm, chunk: int | None) -> Tensor:
    """NLL of each token, (num_tokens,) float32, from its last hidden state, (num_tokens, hidden).

    Any head but a frozen linear one runs under a checkpoint, chunk by chunk, so that its parameters get gradients.
    """
    linear = isinstance(head, FrozenLinear) or is_plain_linear(head)
    if linear and not any(parameter.requires_grad for parameter in head.parameters()):
        weight: Any = head.stored_weight if isinstance(head, FrozenLinear) else head.weight
        bias: Any = head.bias
        return chunked_nll(
            hidden, weight, targets, bias=bias, scale=form.scale, softcap=form.softcap, chunk=chunk
        )
    if chunk is None:
        chunk = auto_chunk(int(getattr(head, "out_features", 2**16)), _CHECKPOINTED_BYTES)

    def nll_of(part: Tensor, labels: Tensor) -> Tensor:
        return token_nll(form.apply(head(part)), labels)

    parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    return torch.cat([checkpoint(nll_of, part, labels, use_reentrant=False) for part, labels in parts])
