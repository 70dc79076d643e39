"""Compare an export with the running model by their logits.

Three sets of logits on the same held-out text:

    running     the adapter model as it runs, in its compute dtype
    reference   the same model, computed in float32
    exported    what was reloaded, computed in float32

exported - reference is the error of the export and of its dtype; reference - running is what the running model's 16-bit
arithmetic costs. A right export is closer to the reference than the running model is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.layer import FrozenLinear, evaluation_mode
from qdora.data.example import Example
from qdora.data.sources import run_examples
from qdora.errors import UserError
from qdora.model.attention import softcap_of
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")

_POSITIONS = 64  # compared at a time: bounds the float64 copies of the logits to 64 x vocabulary
# Relative error of one rounding to the dtype.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# In units of the spread (standard deviation over the vocabulary) of the logits. Measured on SmolLM2-135M, all layers
# adapted: rounding its weights costs 2.7 roundings in float16 and 3.3 in bfloat16 on average, another order of float32
# sums 3e-6. The largest of 4 million differences is 8 to 13 times the mean.
_ROUNDINGS_ALLOWED = 16.0
_ARITHMETIC_ALLOWED = 3e-5
_MAX_OVER_MEAN = 40.0
# A rare position amplifies any rounding a hundredfold (bfloat16 arithmetic: 30 at one of 579, 0.4 in the median), so
# the largest error allowed there is in units of the running model's own error, scaled from its dtype to the stored one.
# Measured: 0.26 in the median, at most 0.78. Above 1, since each of the two errors is one draw.
_OVER_OWN_NOISE = 2.0
_NUM_TEXTS = 24  # about 2,000 tokens: enough for a maximum over positions to be meaningful
_MAX_TOKENS, _MAX_LENGTH = 2048, 512
_DIFFER = {
    "mean_logit_difference": "the logits of the export differ from those of the trained model",
    "kl_mean": "the probabilities of the export differ from those of the trained model (KL, in nats)",
}
_FALLBACK = "The quick brown fox jumps over the lazy dog, and then it rests in the shade of an old oak tree."
NARROW = (torch.float16, torch.bfloat16)


# --- the text


@dataclass(frozen=True)
class ComparisonText:
    """Token ids to compare logits on, and their texts if they come from a tokenizer."""

    sequences: Sequence[Sequence[int]]
    texts: Sequence[str] = ()
    tokenizer: PreTrainedTokenizerBase | None = None


def comparison_text(tokenizer: PreTrainedTokenizerBase, examples: Mapping[str, Sequence[Example]]) -> ComparisonText:
    """The text of 24 examples, at most 512 tokens of each and 2,048 in total."""
    texts, sequences, left = texts_of(examples), list[list[int]](), _MAX_TOKENS
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])[: min(_MAX_LENGTH, left)]
        if ids:
            sequences.append(ids)
            left -= len(ids)
    return ComparisonText(sequences, texts, tokenizer)


def texts_of(by_task: Mapping[str, Sequence[Example]]) -> list[str]:
    """The texts of 24 examples with their answers, spread over the tasks; a fixed sentence if there are none."""
    picked = [task[index] for index in range(_NUM_TEXTS) for task in by_task.values() if index < len(task)]
    texts = [
        "\n".join(turn.content for turn in example.messages) if example.messages else example.prompt + example.answer
        for example in picked[:_NUM_TEXTS]
    ]
    return [text for text in texts if text] or [_FALLBACK]


def validation_examples(recipe: Recipe) -> dict[str, list[Example]]:
    """The validation examples of a run by task; empty, with a warning, if its data cannot be read."""
    try:
        return run_examples(recipe, "validation")
    except UserError as error:
        logger.warning("The run's data cannot be read (%s); the check uses a fixed sentence.", error.faults[0])
        return {}


# --- the logits


@dataclass
class LogitDifference:
    """The difference between two sets of logits, by position."""

    largest: list[float] = field(default_factory=list)  # |difference|
    mean: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)  # nats
    same: list[float] = field(default_factory=list)  # 1 where both have the same argmax

    def add(self, logits: Tensor, other: Tensor) -> None:
        """Add positions, (positions, vocabulary). KL(logits || other) in float64: it is of second order."""
        pairs = zip(torch.split(logits, _POSITIONS), torch.split(other.to(logits.device), _POSITIONS), strict=True)
        for first, second in ((first.double(), second.double()) for first, second in pairs):
            gap = (first - second).abs()
            log_p, log_q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
            self.largest += gap.amax(dim=1).tolist()
            self.mean += gap.mean(dim=1).tolist()
            self.kl += (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0.0).tolist()
            self.same += (first.argmax(dim=-1) == second.argmax(dim=-1)).double().tolist()

    def to_dict(self) -> dict[str, Any]:
        """Largest and mean |difference of logits|, largest and mean KL in nats, share of equal argmax; NaN stays."""
        largest, kl = torch.tensor(self.largest).double(), torch.tensor(self.kl).double()
        return {
            "max_logit_difference": float(largest.max()),
            "mean_logit_difference": sum(self.mean) / len(self.mean),
            "kl_max": float(kl.max()),
            "kl_mean": sum(self.kl) / len(self.kl),
            "argmax_agreement": sum(self.same) / len(self.same),
        }


@dataclass
class Comparison:
    """The three differences over all sequences."""

    exported_vs_running: LogitDifference = field(default_factory=LogitDifference)
    exported_vs_reference: LogitDifference = field(default_factory=LogitDifference)
    reference_vs_running: LogitDifference = field(default_factory=LogitDifference)
    spread: list[float] = field(default_factory=list)  # standard deviation over the vocabulary, by position


def compare_logits(model: PreTrainedModel, exported: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Comparison:
    """Compare all three sets of logits on every sequence of token ids; `exported` is in float32, on any devices."""
    device = next(model.parameters()).device
    # accelerate's hooks, which only a model on several devices has, move the inputs themselves.
    elsewhere = device if hasattr(exported, "_hf_hook") else next(exported.parameters()).device
    total = Comparison()
    with evaluation_mode(model):
        for ids in sequences:
            tokens = torch.tensor([ids], device=device)
            running = logits_of(model, tokens)
            with float32_arithmetic(model):
                reference = logits_of(model, tokens)
            other = logits_of(exported, tokens.to(elsewhere))
            total.exported_vs_running.add(running, other)
            total.exported_vs_reference.add(reference, other)
            total.reference_vs_running.add(running, reference)
            total.spread += reference.float().std(dim=-1).tolist()
    return total


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(positions, vocabulary) of one text; `tokens` is (1, positions)."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0]


@contextmanager
def float32_arithmetic(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` in float32 inside the block: every 16-bit parameter and buffer is widened, which is exact.

    Frozen layers stay as they are: they compute in the dtype of the activations.
    """
    parameters: list[tuple[torch.nn.Parameter, Tensor]] = []
    buffers: list[tuple[torch.nn.Module, str, Tensor]] = []
    attention = model.config._attn_implementation
    try:
        if attention is not None and "flash" in attention:  # flash kernels have no float32
            model.set_attn_implementation("sdpa" if softcap_of(model.config) is None else "eager")
        for parameter in model.parameters():  # each once, shared ones too
            if parameter.dtype in NARROW:
                parameters.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
        for module in model.modules():
            if isinstance(module, FrozenLinear):
                continue
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dtype in NARROW:
                    buffers.append((module, name, buffer))
                    module._buffers[name] = buffer.float()
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def verdict(
    total: Comparison | None, faults: list[str], stored: torch.dtype, running_dtype: torch.dtype, *, lossy: bool = False
) -> dict[str, Any]:
    """Decide whether an export passes, from its logits and the `faults` found before; returns JSON values.

    The mean difference of the logits may be 16 roundings to `stored` of their spread, or the running model's own error
    scaled from its dtype to the stored one; the mean KL the squared difference. Of a `lossy` format only NaN is a
    fault. `ill_conditioned` counts positions over the tolerance that the running model's own error explains.
    """
    result: dict[str, Any] = {
        name: str(dtype).removeprefix("torch.") for name, dtype in (("dtype", stored), ("running_dtype", running_dtype))
    }
    if total is None:
        return {"passed": not faults, "faults": faults, **result, "num_positions": 0}
    error, noise = total.exported_vs_reference.to_dict(), total.reference_vs_running.to_dict()
    errors, noises = total.exported_vs_reference.largest, total.reference_vs_running.largest
    spread = sum(total.spread) / len(total.spread)
    # A model that runs in float32 has no error of its own.
    scale = ROUNDING[stored] / ROUNDING.get(running_dtype, 1.0)
    mean = max(_ROUNDINGS_ALLOWED * ROUNDING[stored] * spread, scale * noise["mean_logit_difference"])
    mean = math.inf if lossy else mean + _ARITHMETIC_ALLOWED * spread
    tolerance = {"mean_logit_difference": mean, "max_logit_difference": _MAX_OVER_MEAN * mean, "kl_mean": mean * mean}
    over = [at for at, own in enumerate(errors) if not own <= tolerance["max_logit_difference"]]  # NaN is over
    wrong = [at for at in over if not errors[at] <= _OVER_OWN_NOISE * scale * noises[at]]
    faults = faults + [
        f"{what} by {error[name]:.3g} on average (allowed {tolerance[name]:.3g})"
        for name, what in _DIFFER.items()
        if not error[name] <= tolerance[name]
    ]
    if wrong:
        worst = max(wrong, key=lambda at: math.inf if math.isnan(errors[at]) else errors[at])
        allowed = f"(allowed {tolerance['max_logit_difference']:.3g}), most at position {worst}"
        faults.append(f"{_DIFFER['mean_logit_difference']} by up to {errors[worst]:.3g} {allowed}")
    return {
        "passed": not faults,
        "faults": faults,
        **result,
        "num_positions": len(errors),
        "ill_conditioned": len(over) - len(wrong),
        "logit_spread": spread,
        "exported_vs_running": total.exported_vs_running.to_dict(),
        "exported_vs_reference": error,
        "reference_vs_running": noise,
        "tolerance": tolerance,
    }
