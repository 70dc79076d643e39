"""From the last hidden state to the loss: what a model does to its logits, and the loss without all logits at once.

Models differ in what follows the output head: Gemma caps its logits, Granite divides them, Cohere multiplies them. The
config proposes forms, and a comparison with the model's own logits decides.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qdora.adapter.layer import FrozenLinear, is_plain_linear
from qdora.memory.shard import release
from qdora.model.attention import text_config
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.loss import auto_chunk, chunked_nll, token_nll

# Fields of transformers' configs. Cohere and Falcon-H1 multiply by their scale, Granite divides, and HyperCLOVA X
# multiplies by a field with Granite's name, so both are tried.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")
# Positions at which logits are compared, each also with a hidden state many times as large: a cap of 30 does not show
# in logits near 1.
_PROBED = 4
_PROBE_FACTORS = (1.0, 16.0, 256.0)
# Bytes per logit of a checkpointed head: two 16-bit copies, and three in float32 (widened, log-softmax, gradient).
_CHECKPOINTED_BYTES = 16
# Peak bytes for each logit when all exist at once: 16 bits, and three float32 copies (widened, log-softmax, gradient).
_PLAIN_BYTES = 14
# Each model's LogitForm, learnt from its first labelled batch; None: no known form reproduces its logits.
_FORMS: WeakKeyDictionary[nn.Module, LogitForm | None] = WeakKeyDictionary()

logger = logging.getLogger("qdora")


@dataclass(frozen=True)
class LogitForm:
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
    """Inputs and output of the head in one forward pass, which calls it `num_calls` times.

    Attributes:
        hidden: (num_labelled, hidden) states of all labelled positions, with their graph.
        probe: (num_probed, hidden) states that the head got instead; detached, unless it got all.
        raw: (num_probed, vocabulary) output of the head for `probe`, before the model changes it; detached.
    """

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    probe: Tensor = field(default_factory=lambda: torch.empty(0))
    raw: Tensor = field(default_factory=lambda: torch.empty(0))
    num_calls: int = 0


@contextmanager
def tapped(
    head: nn.Module, rows: Tensor, columns: Tensor, *, probing: bool = False, whole: bool = False
) -> Iterator[Tap]:
    """Record the head's inputs at (rows[i], columns[i]); the head itself computes some of them only, (1, n, hidden).

    Args:
        rows, columns: (num_labelled,) int64, on the model's device.
        probing: The head computes the positions that `learn_form` needs; otherwise only the first one.
        whole: The head computes all these positions, with their graph.
    """
    tap = Tap()

    def take(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tap.num_calls += 1
        tap.hidden = args[0][rows, columns]
        tap.probe = tap.hidden if whole else tap.hidden.detach()[: _PROBED if probing else 1]
        if probing:
            tap.probe = torch.cat([tap.probe * factor for factor in _PROBE_FACTORS])
        return (tap.probe.unsqueeze(0), *args[1:])

    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        tap.raw = output.detach()[0]

    with head.register_forward_pre_hook(take), head.register_forward_hook(keep) if probing else nullcontext():
        yield tap


@torch.no_grad()
def learn_form(model: nn.Module, head: nn.Module, tap: Tap, logits: Tensor, targets: Tensor) -> LogitForm | None:
    """The form of the model's own `logits` in a `probing` pass, or None if no known form reproduces them.

    The form whose logits are nearest to the model's must differ by no more than rounding, and so must the loss that
    `head_nll` computes for the same positions. `logits` are (1, num_probed, vocabulary), `targets` (num_labelled,).
    """
    if tap.num_calls != 1 or logits.shape != (1, *tap.raw.shape):
        return None
    given = logits[0]
    largest = given.abs().amax(dim=1).double()
    rounding = 4 * max(torch.finfo(dtype).eps for dtype in (tap.raw.dtype, given.dtype))

    def error(form: LogitForm) -> float:
        difference = (form.apply(tap.raw) - given).abs().amax(dim=1).double()
        return float((difference / largest.clamp_min(1e-30)).max())  # NaN fails every comparison

    errors = {form: error(form) for form in _proposals(getattr(model, "config", None))}
    form = min(errors, key=errors.__getitem__)
    if not errors[form] <= rounding:
        return None
    labels = targets[: len(tap.probe) // len(_PROBE_FACTORS)].repeat(len(_PROBE_FACTORS))
    if not _is_frozen_linear(head):
        return form  # head_nll calls the module itself
    ours = head_nll(head, tap.probe, labels, form, None)
    allowed = max(rounding, 1e-4) * largest  # 1e-4: other order of sums
    return form if bool(((ours - token_nll(given, labels)).abs() <= allowed).all()) else None


def _proposals(config: Any) -> list[LogitForm]:
    """Forms with a scale of the config, its inverse or 1, and a softcap or none; its own first, to win ties."""
    config = text_config(config)

    def numbers(names: tuple[str, ...]) -> list[float]:
        found = [getattr(config, name, None) for name in names]
        return [float(each) for each in found if isinstance(each, int | float) and each > 0]

    scales = [*(each for number in numbers(_SCALES) for each in (number, 1.0 / number)), 1.0]
    softcaps = [*numbers(_SOFTCAPS), None]
    return [LogitForm(scale, softcap) for scale, softcap in itertools.product(scales, softcaps)]


def proposed_form(config: Any) -> LogitForm:
    """The form of the logits that a model's config states."""
    return _proposals(config)[0]


def labelled_nll(
    model: nn.Module, inputs: dict[str, Any], labelled: tuple[Tensor, Tensor], targets: Tensor, chunk: int | None
) -> Tensor:
    """NLL of the labelled positions, (num_labelled,): without the model's logits if a known form reproduces those.

    The model's head is skipped; the head, and what the model does to its output, are applied here to the head's inputs.
    The result for a model's first batch is compared with the model's own logits. If they differ, the batch is run
    again, and from then on the model itself computes all logits at once, with a warning.

    Args:
        labelled: Row and column of each position, (num_labelled,) int64, on the model's device.
        targets: (num_labelled,) int64, the token behind each position.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    known, form = model in _FORMS, _FORMS.get(model, LogitForm())
    if form is not None:
        random = None if known else random_state()
        with tapped(head, *labelled, probing=not known) as tap:
            logits = model(**inputs).logits
        if random is not None and len(targets):
            form = _FORMS[model] = learn_form(model, head, tap, logits, targets)
        if form is not None:
            nll = head_nll(head, tap.hidden, targets, form, chunk)
            release(head)
            return nll
        logger.warning(
            "%s: the operations after this model's head are not known, so memory.loss_chunk has no effect: the "
            "logits of all labelled tokens exist at once, about %.2f GiB for the %d of this micro-batch.",
            getattr(getattr(model, "config", None), "model_type", type(model).__name__),
            len(targets) * logits.shape[-1] * _PLAIN_BYTES / 2**30,
            len(targets),
        )
        assert random is not None
        set_random_state(random)  # as if the model had run once: a resumed run draws the same
        del tap, logits  # and their graph
    with tapped(head, *labelled, whole=True):
        logits = model(**inputs).logits
    return token_nll(logits.reshape(-1, logits.shape[-1]), targets)


def head_nll(head: nn.Module, hidden: Tensor, targets: Tensor, form: LogitForm, chunk: int | None) -> Tensor:
    """NLL of each token from its last hidden state, with the logits of a chunk of tokens at a time.

    A frozen linear head uses `chunked_nll`, which reads it once. Any other head (adapted, trained, of its own class)
    runs under a checkpoint, chunk by chunk, and again in the backward pass, so that its parameters get gradients.
    `hidden` is (num_tokens, hidden), `targets` (num_tokens,) int64; with `chunk` None the logits that exist at once
    make 128 MiB. Returns (num_tokens,) float32, nats.
    """
    if _is_frozen_linear(head):
        weight = head.stored_weight if isinstance(head, FrozenLinear) else head.weight
        options: Any = {"bias": head.bias, "scale": form.scale, "softcap": form.softcap, "chunk": chunk}
        return chunked_nll(hidden, weight, targets, **options)  # type: ignore[arg-type]
    if chunk is None:
        chunk = auto_chunk(int(getattr(head, "out_features", 2**16)), _CHECKPOINTED_BYTES)

    def nll_of(part: Tensor, labels: Tensor) -> Tensor:
        return token_nll(form.apply(head(part)), labels)

    parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    return torch.cat([checkpoint(nll_of, part, labels, use_reentrant=False) for part, labels in parts])


def _is_frozen_linear(head: nn.Module) -> bool:
    """Whether the head is h W^T + bias and nothing else, without trainable parameters."""
    linear = isinstance(head, FrozenLinear) or is_plain_linear(head)
    replaced = "forward" in vars(head)  # accelerate's offloading does that
    return linear and not replaced and not any(parameter.requires_grad for parameter in head.parameters())
