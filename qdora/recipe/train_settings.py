"""The `train` and `eval` sections of a recipe: optimizer, schedule, what is saved and evaluated on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Strict

from qdora.recipe.section import (
    AutoTokens,
    Beta,
    Factor,
    Fault,
    Flag,
    NotNegative,
    Positive,
    Section,
    Seed,
    Text,
    Warmup,
    Whole,
    WholeOrZero,
    allowed,
)

MACRO = "macro"
"""eval.best_by: the average in which every task counts once."""


class TrainConfig(Section):
    """Optimizer, schedule and what is saved on the way."""

    steps: WholeOrZero | None = None
    """Optimizer steps. Either this or epochs."""
    epochs: Positive | None = None
    """Passes over the combined data. Either this or steps."""
    lr: Positive = 2e-4
    """Peak learning rate. QLoRA, arXiv 2305.14314, table 9 (7B and 13B)."""
    lr_ratio_B: Positive | None = None
    """Learning rate of lora_B in units of lr. None: 1. LoRA+ (arXiv 2402.12354) takes 16."""
    lr_ratio_magnitude: Positive | None = None
    """Learning rate of the magnitudes in units of lr. None: 1."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up."""
    lr_end: NotNegative = 0.0
    """Learning rate that linear and cosine end at."""
    warmup: Warmup = 0.05
    """Steps (whole number) or share of all steps (below 1) over which the learning rate rises from 0."""
    tokens_per_step: Whole | None = None
    """Tokens of an optimizer step, padding not counted. Either this or batch."""
    batch: Whole | None = None
    """Examples of an optimizer step. Either this or tokens_per_step."""
    micro_batch_tokens: AutoTokens = "auto"
    """Tokens, padding counted, of one forward pass; the rest of the step is accumulated. auto: 2,048 or max_length."""
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw", "paged_lion_8bit", "lion"] = "paged_adamw_8bit"
    """AdamW, or Lion (arXiv 2302.06675; its lr is 3 to 10 times smaller), with 8- or 32-bit states. paged: on CUDA they
    can move to the host (QLoRA, arXiv 2305.14314, sec. 3). Magnitudes always have 32-bit states."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of lora_A and lora_B (of all matrices under kind full); never of magnitudes."""
    betas: Annotated[tuple[Beta, Beta], allowed("two numbers, at least 0 and below 1")] | None = None
    """Decay of the two averages. None: 0.9, 0.999 (Adam, arXiv 1412.6980, sec. 2), or 0.9, 0.99 (Lion, sec. 5)."""
    eps: Positive = 1e-8
    """Adam's epsilon. Adam, arXiv 1412.6980, sec. 2."""
    clip: Positive | None = 1.0
    """Largest norm of the whole gradient; null: no clipping."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite, or whose loss is a spike, is never applied; its examples are kept in
    bad-steps/. stop: the run ends before it. skip: the run goes on with the next step."""
    max_skips: Whole = 5
    """Steps that may be skipped in a row; at the next bad one the run stops."""
    spike: Factor | None = None
    """A loss above so many times the median loss of the last 32 applied steps (8 at the least) is a spike. None: none
    is."""
    seed: Seed = 0
    """Seed of lora_A's start and of dropout."""
    log_every: Whole = 1
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: Whole | None = 100
    """Steps between checkpoints; null: only at the end, on an interrupt and on a failed step."""
    keep_checkpoints: Whole = 2
    """Checkpoints that stay on disk; older ones are removed, but for the best one (eval.best_by)."""

    def unused(self) -> dict[str, str]:
        found = {"eps": f"train.optimizer {self.optimizer} has none"} if "lion" in self.optimizer else {}
        found |= {"max_skips": "train.on_bad_step stop skips none"} if self.on_bad_step == "stop" else {}
        return found | ({"lr_end": "train.schedule constant does not fall"} if self.schedule == "constant" else {})

    def faults(self) -> Iterator[Fault]:
        for first, second in (("steps", "epochs"), ("tokens_per_step", "batch")):
            given = [name for name in (first, second) if getattr(self, name) is not None]
            if len(given) != 1:
                got = "both" if given else "neither"
                yield first, f"contradiction, got {got} of {first} and {second}, allowed: exactly one of them."
        if self.steps and isinstance(self.warmup, int) and self.warmup > self.steps:
            yield (
                "warmup",
                f"longer than the run, got {self.warmup} of {self.steps} steps, allowed: at most train.steps.",
            )
        if self.lr_end > self.lr:
            yield "lr_end", f"larger than the peak, got {self.lr_end}, allowed: at most train.lr ({self.lr})."
        micro, whole = self.micro_batch_tokens, self.tokens_per_step
        if isinstance(micro, int) and whole is not None and micro > whole:
            what = f"more than a whole step, got {micro}, allowed: at most train.tokens_per_step ({whole})."
            yield "micro_batch_tokens", what


class EvalConfig(Section):
    """Evaluation inside a training run; `qdora eval` does it afterwards."""

    tasks: tuple[Text, ...] | None = None
    """Names of sources in the mix. None: all that have validation data; []: no evaluation."""
    limit: Whole | None = None
    """Examples of each task. None: all of them."""
    method: Literal["loglikelihood", "generate"] = "loglikelihood"
    """loglikelihood: choices and answers are scored. generate: beside that the model answers in its own words, as in
    the DoRA paper (arXiv 2402.09353, sec. 5.1); only where choices differ in one word."""
    every: Whole | None = None
    """Optimizer steps between evaluations. None: none while training."""
    at_start: Flag = True
    """Evaluate before the first step: the quantised base."""
    at_end: Flag = True
    """Evaluate after the last step."""
    best_by: Text | None = None
    """What the best of the evaluated steps is chosen by: macro (average over the tasks) or the name of one task. Its
    checkpoint is kept, and adapter/ is that one. None: adapter/ is the last step's."""
    best_metric: Literal["nll_per_token", "acc", "acc_norm"] = "nll_per_token"
    """The metric that best_by compares. nll_per_token: lowest is best; the accuracies, of choices only: highest."""
    patience: Whole | None = None
    """Evaluations in a row without a better one after which the run stops early. None: it never does."""

    def unused(self) -> dict[str, str]:
        best = ("best_by", "best_metric", "patience")
        if self.tasks == ():
            names = ("limit", "method", "every", "at_start", "at_end", *best)
            return dict.fromkeys(names, "eval.tasks is empty")
        found = {}
        if self.best_by is None:
            found = dict.fromkeys(best[1:], "eval.best_by is not set")
        elif self.every is None:
            found = dict.fromkeys(best, "eval.every is not set: there is one evaluation after training, or none")
        if self.every is None and not self.at_start and not self.at_end:
            reason = "nothing is evaluated: every, at_start and at_end are off"
            found |= dict.fromkeys(("tasks", "limit", "method"), reason)
        return found


class InterferenceConfig(Section):
    """Which data sets pull the adapter in different directions."""

    every: Whole | None = None
    """Optimizer steps between measurements of the cosines between the tasks' gradients. None: none. Training itself
    stays the same, bit for bit."""
    examples: Annotated[int, Strict(), Field(ge=2), allowed("a whole number, 2 or more")] = 16
    """Validation examples of each task that gradients are measured on; with fewer, cosines are noisier and cheaper."""

    def unused(self) -> dict[str, str]:
        return {"examples": "interference.every is not set"} if self.every is None else {}
