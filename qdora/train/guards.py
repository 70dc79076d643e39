"""A run's policies (rate, smaller micro-batches, bad steps), and checks of its model before the first step.

What a checkpoint keeps of a policy, as JSON, is named by its `STATE`. Checks are in log.txt.
"""

from __future__ import annotations

import inspect
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.adapter.layer import evaluation_mode
from qdora.adapter.norms import refresh
from qdora.data.batches import IGNORED, PackedLayout, Step, StepLoader
from qdora.errors import RunFailure, UserError
from qdora.memory.oom import free_memory
from qdora.model.attention import attention_of, flash_inputs, flash_starts, takes_flash_lengths
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import block_list
from qdora.recipe.settings import TrainConfig
from qdora.train.distributed import Processes
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.passes import Shortage, batch_loss

# A loss is compared with the median of the last 32 applied steps; with fewer than 8, no loss is a spike.
_WINDOW, _LEAST_LOSSES = 32, 8
# Tokens of the probed example, of that before it in each of two rows (whose borders differ), and of both beside it.
_PROBED, _BEFORE, _BESIDE = 9, (7, 4), 13
# Largest root mean square between a packed example and the same one alone, in units of rounding (SmolLM2-135M: 1.5).
_SPREAD = 8.0
# Least rounding in units of the logits; an example that sees its neighbour moves logits by more than 0.1.
_LEAST = 1e-4
# Relative differences allowed between the losses of two processes that divide a base, in float32 and in 16 bits.
_ROUNDING, _ROUNDING_16 = 1e-5, 5e-3
_NUM_TOKENS = 32

logger = logging.getLogger("qdora")


class Schedule:
    """The learning rate of a run of `num_steps`.

    Warm-up rises linearly and reaches `train.lr` at its last step. The rate then stays (constant) or falls to
    `train.lr_end`, linearly or along half a cosine (arXiv 1608.03983), which it would reach one step after the last.
    A run that is extended keeps its warm-up.
    """

    STATE = "num_steps", "warmup"

    def __init__(self, train: TrainConfig, num_steps: int) -> None:
        self._train, self.num_steps = train, num_steps
        # 0.07 * 100 is 7.000000000000001 in floating point.
        share = isinstance(train.warmup, float)
        self.warmup = min(math.ceil(train.warmup * num_steps - 1e-9) if share else int(train.warmup), num_steps)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, 0 to num_steps - 1."""
        train, warmup = self._train, self.warmup
        if step < warmup:
            return train.lr * (step + 1) / warmup
        if train.schedule == "constant":
            return train.lr
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        share = (1 - progress) if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return train.lr_end + (train.lr - train.lr_end) * share


class Backoff:
    """Tokens of a micro-batch: half as many when memory runs out."""

    STATE = "asked", "used"

    def __init__(self, loader: StepLoader) -> None:
        self._batching = loader.batching
        self.asked = self.used = loader.batching.max_tokens

    def shrink(self, shortage: Shortage) -> dict[str, Any] | None:
        """Halve the tokens, outside the `except` block of the error, which keeps the tensors of its frames alive.
        Returns the line to log, or None if the micro-batch was a single example."""
        before = self._batching.max_tokens
        if shortage.num_examples == 1:
            return None
        self._batching.max_tokens = self.used = min(before, shortage.num_tokens) // 2
        free_memory()
        return {"tokens_before": before, "tokens_after": self.used, "reason": shortage.reason}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, unless the recipe asks for another size now."""
        if state["asked"] == self.asked:
            self._batching.max_tokens = self.used = state["used"]


def batch_examples(batch: Step, example_nll: Sequence[Tensor]) -> list[dict[str, Any]]:
    """This process's examples of a step, as JSON values; `nll_sum` is NaN if it is not known. `example_nll` are the
    summed NLL of each example, (examples,) of each micro-batch."""
    try:
        losses = [value for part in example_nll for value in part.tolist()]
    except RuntimeError:  # nothing can be read from a GPU after some errors
        losses = []
    known = iter(losses)
    return [
        {
            "id": id,
            "task": micro.task_names[task],
            "nll_sum": next(known, math.nan),
            "num_label_tokens": int((labels != IGNORED).sum()),
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
        }
        for micro in batch.micro_batches
        for task, (id, ids, labels) in zip(micro.task_ids.tolist(), micro.examples(), strict=True)
    ]


@dataclass
class BadSteps:
    """Decides which steps are bad and whether they are skipped (`train.on_bad_step`, `max_skips`, `spike`)."""

    STATE = "losses", "in_a_row", "num_skipped"
    train: TrainConfig
    losses: list[float] = field(default_factory=list)
    in_a_row: int = 0
    num_skipped: int = 0

    def fault(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step of these numbers, or None."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                return f"{name} {value} is not finite"
        if self.train.spike is not None and len(self.losses) >= _LEAST_LOSSES:
            usual = statistics.median(self.losses)
            if loss > self.train.spike * usual:
                what = (
                    f"{self.train.spike:g} times {usual:.4g}, the median of the last {len(self.losses)} steps"
                )
                return f"loss {loss:.4g} is more than {what}"
        return None

    def applied(self, loss: float) -> None:
        """Count a step that was applied."""
        self.losses = [*self.losses, loss][-_WINDOW:]
        self.in_a_row = 0

    def skip(self) -> bool:
        """Whether a bad step is skipped, and then counted; otherwise the run has to stop before it."""
        if self.train.on_bad_step == "stop" or self.in_a_row >= self.train.max_skips:
            return False
        self.in_a_row += 1
        self.num_skipped += 1
        return True

    def advice(self, kept: Path) -> str:
        """What a user can do after a stop, whose batch is in the directory `kept` of the run."""
        skipped = f"The {self.in_a_row} steps before it were skipped. " if self.in_a_row else ""
        batch = "/".join(kept.parts[-2:])
        return f"{skipped}Fix: look at {batch}, then resume with a lower -s train.lr or with -s train.on_bad_step=skip."


@dataclass(frozen=True)
class Check:
    """The answer to one question."""

    state: Literal["passed", "warning"]
    text: str

    def log(self) -> None:
        """Write it to the log."""
        if self.state == "warning":
            logger.warning("%s", self.text)
        else:
            logger.info("Checked: %s", self.text)


@dataclass
class MissingGradientCheck:
    """Finds the trainable tensors that get no gradient other than zero in the first updates of a run."""

    num_updates = 3  # lora_A gets no gradient while lora_B is zero, that is, in the first one
    optimizer: AdapterOptimizer
    num_seen: int = 0
    arrived: dict[str, Tensor] = field(default_factory=dict)

    def updated(self) -> list[str] | None:
        """After the third update the tensors without a gradient in all three; otherwise None."""
        self.num_seen += 1
        if self.num_seen > self.num_updates:
            return None
        for name, parameter in self.optimizer.parameters.items():
            if parameter.grad is not None:
                # Stays on the device, so that the host does not wait for it.
                self.arrived[name] = parameter.grad.any() | self.arrived.get(name, False)
        if self.num_seen < self.num_updates:
            return None
        # Rows of new tokens have a gradient only in steps whose texts have such a token.
        optional, flags = self.optimizer.undecayed, [*self.arrived.values()]
        arrived = dict(zip(self.arrived, torch.stack(flags).tolist() if flags else (), strict=True))
        return [each for each in self.optimizer.parameters if each not in optional and not arrived.get(each)]


def layout_for(attention: str) -> PackedLayout:
    """The layout of packed rows for an attention implementation of transformers."""
    return "single" if "flash" in attention else "rows"


@torch.no_grad()
def packed_layout(model: PreTrainedModel) -> tuple[PackedLayout, str]:
    """The layout of packed rows for the model, and in words that their examples do not see each other; else UserError.

    transformers finds the borders of examples by positions that start again at 0, which not all models support.
    """
    name, config = model.config.model_type, model.config.get_text_config()
    attention = attention_of(model) or "its own code"
    layout = layout_for(attention)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(f"data.packing: must be false for {name}, which takes no position_ids (got true).")
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Tensor:
        return torch.randint(config.vocab_size, (length,), generator=generator)

    def rms(values: Tensor) -> float:
        return float(values.square().mean().sqrt())

    with evaluation_mode(model):
        probe = tokens(_PROBED)
        alone = _logits(model, probe[None])[0]
        # In a causal model later tokens have no effect, so this is the rounding error of a row of another length.
        rounding = _logits(model, torch.cat([probe, tokens(_BESIDE)])[None])[0, :_PROBED] - alone
        rows = [[tokens(before), probe, tokens(_BESIDE - before)] for before in 2 * _BEFORE]
        first, second = _probe_outputs(model, layout, rows[:2]), _probe_outputs(model, layout, rows[2:])
    eps = max(torch.finfo(model.dtype).eps, _LEAST)
    seen, wrong = float((first - second).abs().max()), rms(first - alone)
    most = max(float(rounding.abs().max()), float(eps * alone.abs().max()))
    most_wrong = _SPREAD * max(rms(rounding), eps * rms(alone))
    text = f"other tokens in one change logits of the next by {seen:.2g} (rounding: {most:.2g}), "
    text += f"packing by {wrong:.2g} in the root mean square (rounding: {most_wrong:.2g})."
    if seen <= most and wrong <= most_wrong:  # NaN fails both
        return layout, f"packed examples stay apart (attention by {attention}): {text}"
    what = f"{name} (attention by {attention}), which does not keep examples apart"
    raise UserError(f"data.packing: must be false for {what}: {text}")


def _logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    """(rows, length, vocabulary) float32."""
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False, **inputs).logits
    return logits.float()


def _probe_outputs(model: PreTrainedModel, layout: PackedLayout, rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Logits of the second example of each row, (rows, length, vocabulary) float32."""
    ids = torch.stack([torch.cat([*row]) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(len(part)) for part in row]) for row in rows])
    size = 1 if layout == "single" else len(rows)
    logits: list[Tensor] = []
    for own, at in zip(torch.split(ids, size), torch.split(positions, size), strict=True):
        inputs: dict[str, Any] = {"position_ids": at.to(model.device)}
        if layout == "single" and takes_flash_lengths(model):
            inputs |= flash_inputs(flash_starts(at).to(model.device), at)
        logits += _logits(model, own, **inputs)
    return torch.stack([out[len(row[0]) :][:_PROBED] for out, row in zip(logits, rows, strict=True)])


@torch.no_grad()
def check_division(model: PreTrainedModel, processes: Processes) -> str | None:
    """What was compared; None if the base is not divided. All processes call this together.

    A wrong byte in a gathered weight would train an adapter for a model that does not exist, at a plausible loss. So
    each process sums the bytes of every layer of its blocks as the forward pass reads them.
    """
    if not processes.shards:
        return None
    byte_sums = dict[str, int]()

    def read(block: nn.Module, _args: Any) -> None:
        for layer in frozen_layers(block).values():
            # In slices: torch sums bytes in an int64 copy of them.
            slices = (torch.split(each.reshape(-1).view(torch.uint8), 1 << 22) for each in layer.buffers())
            byte_sums[names[layer]] = sum(int(each.sum()) for tensors in slices for each in tensors)

    names, blocks = {layer: name for name, layer in frozen_layers(model).items()}, block_list(model)
    assert blocks is not None
    hooks = [block.register_forward_pre_hook(read) for block in blocks[1]]
    vocabulary = model.config.get_text_config().vocab_size
    labels = torch.randint(vocabulary, (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    refresh(layer for layer in adapted_layers(model).values() if layer.base.share is not None)
    ids = labels.to(model.device)
    with evaluation_mode(model):
        loss = float(batch_loss(model, ids, torch.ones_like(ids), labels).nll_sum / _NUM_TOKENS)
    for hook in hooks:
        hook.remove()
    results = processes.gather((loss, byte_sums))
    first_loss, first_sums = results[0]
    rounding = _ROUNDING if model.dtype == torch.float32 else _ROUNDING_16
    for rank, (loss, sums) in enumerate(results):
        wrong = [name for name, value in first_sums.items() if sums[name] != value]
        if wrong or not math.isclose(loss, first_loss, rel_tol=rounding):
            text = f"process {rank} has a loss of {loss:.8g}, process 0 of {first_loss:.8g}"
            text += f", and other bytes in {wrong[0]}" if wrong else ""
            raise RunFailure(f"train.parallel: the base is not the same when it is divided: {text}.")
    return f"all processes have the same {len(byte_sums)} layers and one loss with the divided base, {first_loss:.6g}."
