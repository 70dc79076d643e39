"""What a run decides from its steps: the rate, smaller micro-batches, the loss scale, bad steps, the best step.

Each policy has a `state_dict` of JSON values, with which a resumed run goes on.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from qdora.data.batches import IGNORED, MicroBatch, Step, StepLoader
from qdora.errors import first_line
from qdora.files.atomic import json_bytes
from qdora.memory.oom import free_memory, is_out_of_memory
from qdora.recipe.settings import TrainConfig

# Steps that must fit before micro-batches grow for the first time.
_FIRST_WAIT = 32
# The range of the loss scale, its start, and the steps without an overflow after which it doubles.
_LEAST, _START, _MOST = 2.0**-4, 2.0**7, 2.0**15
_PATIENCE = 500
# A loss is compared with the median of the last 32 applied steps; with fewer than 8, no loss is a spike.
_WINDOW, _LEAST_LOSSES = 32, 8

logger = logging.getLogger("qdora")


class Schedule:
    """The learning rate of a run of `num_steps`.

    Warm-up rises linearly and reaches `train.lr` at its last step. The rate then stays (constant) or falls to
    `train.lr_end`, linearly or along half a cosine (arXiv 1608.03983, without restarts). It would reach that end one
    step after the last, so no step is spent at rate 0.

    A run that is extended keeps the warm-up that it started with. From the first further step on its rate is that of a
    run of the new length: the same as before for constant, otherwise higher.
    """

    def __init__(self, train: TrainConfig, num_steps: int) -> None:
        self._train, self._num_steps = train, num_steps
        # As written in the recipe: 0.07 * 100 is 7.000000000000001 in floating point.
        share = Fraction(repr(train.warmup)) if isinstance(train.warmup, float) else None
        self._warmup = min(train.warmup if share is None else math.ceil(share * num_steps), num_steps)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, 0 to num_steps - 1."""
        train, warmup = self._train, self._warmup
        if step < warmup:
            return train.lr * (step + 1) / warmup
        if train.schedule == "constant":
            return train.lr
        progress = (step - warmup) / max(1, self._num_steps - warmup)
        share = (1 - progress) if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return train.lr_end + (train.lr - train.lr_end) * share

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"num_steps": self._num_steps, "warmup": self._warmup}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on after `step` steps; a warning says what follows if the run is longer now."""
        self._warmup = state["warmup"]
        if state["num_steps"] != self._num_steps:
            then = "" if self._train.schedule == "constant" else f", {self.rate(step):.3g} at first"
            logger.warning(
                "The run has %d steps now, %d before: from step %d on the learning rate is that of a %s schedule of "
                "%d steps with the old warm-up%s.",
                *(self._num_steps, state["num_steps"], step + 1, self._train.schedule, self._num_steps, then),
            )


class Shortage(NamedTuple):
    """A micro-batch that did not fit: its tokens with padding, and the first line of the allocator's message."""

    num_examples: int
    num_tokens: int
    reason: str

    def fault(self) -> str:
        """What is wrong if the micro-batch is a single example, which cannot be split."""
        return (
            f"out of memory with one example of {self.num_tokens:,} tokens by itself ({self.reason.rstrip('.')}). "
            "Fix: resume with --resume and -s memory.loss_chunk=64, with -s memory.checkpointing=true if it is off, or "
            "on a GPU with -s memory.offload_activations=true or -s base.residency=host. Or start a new run with fewer "
            "tokens (data.max_length with data.too_long), a smaller adapter.rank or another base.quant."
        )


class OutOfMemory(Exception):
    """Its argument is a Shortage. It keeps the frames that it passed, and their tensors, alive."""


@contextmanager
def shortage_of(micro: MicroBatch) -> Iterator[None]:
    """Turn a failed allocation in the block into OutOfMemory; every other error passes unchanged."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(Shortage(len(micro.example_ids), micro.input_ids.numel(), first_line(error))) from error


class Backoff:
    """Tokens of a micro-batch: half as many when memory runs out, twice as many again after steps that fit.

    Memory may have been short for one long example, or for another program. After a growth that did not fit, the next
    one waits twice as long.
    """

    def __init__(self, loader: StepLoader) -> None:
        self._batching = loader.batching
        self._asked = loader.batching.max_tokens
        self._wait, self._num_good, self._has_grown = _FIRST_WAIT, 0, False

    def shrink(self, shortage: Shortage) -> dict[str, Any] | None:
        """Halve the tokens, counted from the micro-batch that did not fit, and release freed memory.

        Must be called outside the `except` block, where the error no longer keeps the tensors of its frames alive.
        Returns `tokens_before` and `tokens_after` (of a micro-batch, padding counted) and the `reason`, or None if the
        micro-batch was a single example.
        """
        before = self._batching.max_tokens
        if shortage.num_examples == 1 or before <= 1:
            return None
        self._batching.max_tokens = min(before, shortage.num_tokens) // 2
        if self._has_grown:
            self._wait *= 2
        self._num_good, self._has_grown = 0, False
        free_memory()
        return {"tokens_before": before, "tokens_after": self._batching.max_tokens, "reason": shortage.reason}

    def grow(self) -> dict[str, Any] | None:
        """Count a step that fitted. Returns `tokens_before` and `tokens_after` if the next one has more tokens."""
        before = self._batching.max_tokens
        self._num_good += 1
        if before >= self._asked or self._num_good < self._wait:
            return None
        self._batching.max_tokens = min(2 * before, self._asked)
        self._num_good, self._has_grown = 0, True
        return {"tokens_before": before, "tokens_after": self._batching.max_tokens}

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        waits = {"wait": self._wait, "num_good": self._num_good, "has_grown": self._has_grown}
        return {"asked": self._asked, "used": self._batching.max_tokens, **waits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, unless the recipe asks for another size now."""
        if state["asked"] == self._asked:
            self._batching.max_tokens = state["used"]
            self._wait, self._num_good, self._has_grown = (state[key] for key in ("wait", "num_good", "has_grown"))


class LossScale:
    """The factor of a step's summed loss in a float16 backward pass; the float32 gradients are divided by it.

    float16 holds nothing below 6e-8 and nothing above 65,504, and gradients pass both. The sum is not divided by the
    step's tokens before the backward pass: of 32,768 tokens each would have a gradient that underflows. A step whose
    gradients overflow is computed again with half the factor, so no step is lost.
    Source: Mixed Precision Training, arXiv 1710.03740, sec. 3.2.
    """

    def __init__(self) -> None:
        self.value = _START
        self._num_good = 0

    def halve(self) -> bool:
        """After an overflow: half the factor, and whether the step is worth another try."""
        self._num_good = 0
        if self.value <= _LEAST:
            return False
        self.value /= 2
        return True

    def applied(self) -> None:
        """Count a step without an overflow; after many of them the factor doubles."""
        self._num_good += 1
        if self._num_good == _PATIENCE:
            self.value, self._num_good = min(2 * self.value, _MOST), 0

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"value": self.value, "num_good": self._num_good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.value, self._num_good = state["value"], state["num_good"]


class BestSoFar:
    """The best value among a run's evaluations, in a tie the earlier one, and early stopping.

    Args:
        question: JSON values that define what is compared (metric, tasks, examples); values of another question are not
            comparable.
        higher: Whether higher is better.
        patience: Evaluations in a row without a better value that end the run; None: they never do.
    Attributes:
        judged: Step of the last evaluation that was judged, None before the first.
    """

    def __init__(self, question: Mapping[str, Any], *, higher: bool, patience: int | None) -> None:
        self.question, self.higher, self.patience = dict(question), higher, patience
        self.step: int | None = None
        self.value: float | None = None
        self.num_since = 0
        self.judged: int | None = None

    def judge(self, step: int, value: float) -> bool:
        """Take the value of the evaluation after `step` steps; returns whether it is the best so far."""
        assert math.isfinite(value), value
        self.judged = step
        better = self.value is None or (value > self.value if self.higher else value < self.value)
        if better:
            self.step, self.value, self.num_since = step, value, 0
        else:
            self.num_since += 1
        return better

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        return self.patience is not None and self.num_since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        numbers = {name: getattr(self, name) for name in ("step", "value", "num_since", "judged")}
        return {"question": self.question, **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of the same question."""
        assert state["question"] == self.question, (state["question"], self.question)
        for name in ("step", "value", "num_since", "judged"):
            setattr(self, name, state[name])


@dataclass(frozen=True)
class BadStep:
    """Step number `step`, from 1, which was not applied, with what this process knows of it.

    Attributes:
        loss, gradient_norm: Over all processes; NaN if unknown.
        example_nll: Summed NLL of each example, in the batch's order; NaN if unknown.
    """

    step: int
    reason: str
    batch: Step
    loss: float
    gradient_norm: float
    example_nll: list[float]

    def examples(self) -> list[dict[str, Any]]:
        """This process's examples of the step, as JSON values."""
        losses = iter(self.example_nll)
        return [
            {
                "id": name,
                "task": micro.task_names[task],
                "nll_sum": next(losses),
                "num_label_tokens": int((labels != IGNORED).sum()),
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
            }
            for micro in self.batch.micro_batches
            for task, (name, ids, labels) in zip(micro.task_ids.tolist(), micro.examples(), strict=True)
        ]

    def write(self, directory: Path, examples: list[dict[str, Any]], tokenizer: Any) -> None:
        """Write all processes' examples of the step, to look at them and to run them again.

        batch.json         why, the loss, and of each example its id, task, text, summed NLL (null for NaN), ids, labels
        batch.safetensors  input_ids, attention_mask, labels (examples, longest) int64; nll_sum (examples,) float64
        """
        document = {name: getattr(self, name) for name in ("step", "reason", "loss", "gradient_norm")}
        document["examples"] = [{"text": tokenizer.decode(each["input_ids"]), **each} for each in examples]
        (directory / "batch.json").write_bytes(json_bytes(document, indent=1))
        ids, labels = ([torch.tensor(each[name]) for each in examples] for name in ("input_ids", "labels"))
        tensors = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "nll_sum": torch.tensor([each["nll_sum"] for each in examples], dtype=torch.float64),
        }
        save_file(tensors, directory / "batch.safetensors")


class BadSteps:
    """Decides which steps are bad and whether they are skipped (`train.on_bad_step`, `max_skips`, `spike`).

    A step is bad if its loss or gradient is not finite, or if its loss is more than `spike` times the median of the
    last 32 applied steps. All processes decide alike, since they see the same numbers.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._in_a_row = 0
        self.num_skipped = 0

    def fault(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step of these numbers, or None."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                return f"{name} {value} is not finite"
        if self._train.spike is not None and len(self._losses) >= _LEAST_LOSSES:
            usual, num_losses = statistics.median(self._losses), len(self._losses)
            if loss > self._train.spike * usual:
                what = f"{self._train.spike:g} times {usual:.4g}, the median of the last {num_losses} steps"
                return f"loss {loss:.4g} is more than {what}"
        return None

    def applied(self, loss: float) -> None:
        """Count a step that was applied."""
        self._losses.append(loss)
        self._in_a_row = 0

    def skip(self) -> bool:
        """Whether a bad step is skipped, and then counted; otherwise the run has to stop before it."""
        if self._train.on_bad_step == "stop" or self._in_a_row >= self._train.max_skips:
            return False
        self._in_a_row += 1
        self.num_skipped += 1
        return True

    def advice(self, kept: Path) -> str:
        """What a user can do after a stop, whose batch is in the directory `kept` of the run."""
        look = f"Fix: look at the batch in {'/'.join(kept.parts[-2:])}"
        again = "then resume with --resume and a lower -s train.lr=... or -s train.clip=..."
        if self._train.on_bad_step == "stop":
            return f"{look}, {again}, or with -s train.on_bad_step=skip"
        few = {0: "", 1: "The step before it was skipped. "}
        return f"{few.get(self._in_a_row, f'The {self._in_a_row} steps before it were skipped. ')}{look}, {again}"

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        self._in_a_row, self.num_skipped = state["in_a_row"], state["num_skipped"]
