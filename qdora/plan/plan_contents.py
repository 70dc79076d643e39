"""The memory plan of a run: what is alive at each moment of a step, by component, and whether it fits.

A plan is made of moments (a block's forward or backward pass, the loss, the update). Each has the bytes of every
component that are alive at its own peak; the largest one is the peak of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qdora.recipe.byte_size import size_text

GIB, MIB = 2**30, 2**20

DeviceKind = Literal["cuda", "cpu"]

BASE = "packed base"
SCALES = "block scales"
MASKS = "masks"
DENSE = "embeddings, head, norms"
ADAPTERS = "adapters"
OPTIMIZER = "optimizer state"
GRADIENTS = "gradients"
CHECKPOINTS = "checkpoints"
FORWARD = "activations"
BACKWARD = "workspace of a block"
TILE = "dequantised tile"
LOSS = "logits and loss"
UPDATE = "workspace of the update"
STREAMING = "streaming slots"
CONTEXT = "context and libraries"
SLACK = "allocator slack"
OTHER = "other"

COMPONENTS = {
    BASE: "codes of the quantised linear layers, or all of their weights where they are not quantised",
    SCALES: "scales of the quantised layers",
    MASKS: "which weights of a pruned base are kept: a bit for each",
    DENSE: "everything else that is frozen",
    ADAPTERS: "lora_A, lora_B, magnitudes, and the norms that DoRA keeps",
    OPTIMIZER: "states, and the low bits of bf16 parameters",
    GRADIENTS: "of the trainable parameters, float32",
    CHECKPOINTS: "inputs of the blocks, from which their activations are computed again",
    FORWARD: "what else the forward pass has made and its backward pass reads",
    BACKWARD: "made in the backward pass of one block, with its recomputed activations",
    TILE: "the part of a frozen weight that is dense at the moment",
    LOSS: "one chunk of logits, and the gradient of the hidden states",
    UPDATE: "parameters of a group in float32 while they are updated",
    STREAMING: "places of the blocks that come and go",
    CONTEXT: "what the process has before the first tensor: a constant",
    SLACK: "rounding and fragmentation of the allocator: a constant share",
    OTHER: "ids, masks, positions",
}
"""Components in the order in which they are shown -> what they hold."""

CONTEXT_BYTES: Mapping[DeviceKind, int] = {"cuda": 600 * MIB, "cpu": 600 * MIB}
"""cuda: context, kernels and library workspaces of one process, a round number that is to be measured; cpu: the
interpreter with torch, transformers and bitsandbytes imported, see benchmarks/results/plan_accuracy.json."""

SLACK_SHARE: Mapping[DeviceKind, float] = {"cuda": 0.02, "cpu": 0.0}
"""Share of the tensors' bytes that the allocator holds beside them at the peak. A GPU's caching allocator rounds blocks
up and cannot join all freed ones: an estimate, to be measured."""


@dataclass(frozen=True)
class Moment:
    """A part of a step and the bytes alive at its own peak.

    Attributes:
        phase: "load", "gains", "forward", "loss", "backward" or "update".
        block: Which decoder block, counted from 0, or None.
        by_component: Component -> bytes, without those that have none.
    """

    phase: str
    block: int | None
    by_component: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """Of all components."""
        return sum(self.by_component.values())

    @property
    def name(self) -> str:
        """As in 'backward pass of block 79'."""
        said = {"load": "loading", "gains": "the norms before a step", "loss": "output head and loss"}
        passes = {"forward": "forward pass", "backward": "backward pass", "update": "the update"}
        text = said.get(self.phase) or passes[self.phase]
        return text if self.block is None else f"{text} of block {self.block}"


@dataclass(frozen=True)
class MicroBatchShape:
    """The micro-batch that a plan counts with.

    Attributes:
        rows, length: Of its token ids, padding counted.
        num_labels: Labelled positions.
        masked: Whether attention gets a mask: padded or packed rows.
        packed: Whether rows hold several examples.
        accumulated: Whether a step has other micro-batches before it, whose gradients are there.
    """

    rows: int
    length: int
    num_labels: int
    masked: bool
    packed: bool = False
    accumulated: bool = False

    @property
    def num_tokens(self) -> int:
        """Padding counted."""
        return self.rows * self.length


@dataclass(frozen=True)
class Change:
    """A way to need less.

    Attributes:
        setting: Override of the recipe, such as "memory.checkpointing=true".
        peak_bytes: With it and all changes before it.
        step_seconds: Predicted, likewise.
        neutral: Whether the trained numbers stay the same but for rounding.
    """

    setting: str
    peak_bytes: int
    step_seconds: float
    neutral: bool


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        device_kind: Where it is to run.
        moments: Of a step, in order.
        shape: The micro-batch.
        num_micro_batches: Most of a step.
        assumptions: What could not be known, one sentence each.
        pageable_bytes: Of the optimizer's state, what the driver can move to the host between updates.
        host_bytes: Of pinned host memory, for the blocks and checkpoints that are there.
        embedding_bytes: Of the input embedding, where it is in the host's memory, not pinned; else 0.
        block_bytes: Of the largest block's packed weights; 0 where it has none that could come and go.
        num_blocks, num_trainable, num_weights: Of the model.
        step_seconds: Predicted time of an optimizer step.
        rates: What it was predicted with.
        budget_bytes: Or None.
        changes: Cheapest first, each with all before it, until it fits; empty where it fits as it is.
    """

    device_kind: DeviceKind
    moments: Sequence[Moment]
    shape: MicroBatchShape
    num_micro_batches: int
    assumptions: Sequence[str] = ()
    pageable_bytes: int = 0
    host_bytes: int = 0
    embedding_bytes: int = 0
    block_bytes: int = 0
    num_blocks: int = 0
    num_trainable: int = 0
    num_weights: int = 0
    step_seconds: float | None = None
    rates: Mapping[str, Any] = field(default_factory=dict)
    budget_bytes: int | None = None
    changes: Sequence[Change] = ()

    @property
    def peak(self) -> Moment:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda moment: moment.num_bytes)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of live tensors at the peak."""
        return self.peak.num_bytes

    @property
    def components(self) -> dict[str, int]:
        """Component -> bytes at the peak, constants included, in the order of `COMPONENTS`."""
        constants = {
            CONTEXT: CONTEXT_BYTES[self.device_kind],
            SLACK: round(self.tensor_bytes * SLACK_SHARE[self.device_kind]),
        }
        found = {**self.peak.by_component, **constants}
        return {name: found[name] for name in COMPONENTS if found.get(name)}

    @property
    def peak_bytes(self) -> int:
        """Of everything, constants included."""
        return sum(self.components.values())

    @property
    def fits(self) -> bool | None:
        """None without a budget."""
        return None if self.budget_bytes is None else self.peak_bytes <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        phases: dict[str, int] = {}
        for moment in self.moments:
            phases[moment.phase] = max(phases.get(moment.phase, 0), moment.num_bytes)
        return {
            "device": self.device_kind,
            "peak_bytes": self.peak_bytes,
            "tensor_bytes": self.tensor_bytes,
            "peak_in": self.peak.name,
            "components": self.components,
            "phase_peak_bytes": phases,
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "pageable_bytes": self.pageable_bytes,
            "host_bytes": self.host_bytes,
            "embedding_bytes": self.embedding_bytes,
            "block_bytes": self.block_bytes,
            "micro_batch": {**vars(self.shape), "num_tokens": self.shape.num_tokens},
            "num_micro_batches": self.num_micro_batches,
            "num_blocks": self.num_blocks,
            "num_trainable": self.num_trainable,
            "num_weights": self.num_weights,
            "step_seconds": self.step_seconds,
            "rates": dict(self.rates),
            "assumptions": list(self.assumptions),
            "changes": [vars(change) for change in self.changes],
        }


def over_budget(plan: Plan) -> str:
    """Why a run does not start, in one line."""
    parts = sorted(plan.components.items(), key=lambda each: -each[1])[:3]
    largest = ", ".join(f"{name} {size_text(size)}" for name, size in parts)
    changes = "; ".join(change.setting for change in plan.changes)
    instead = f" Change, cheapest first: {changes}." if changes else ""
    return (
        f"memory.budget: {size_text(plan.budget_bytes or 0)}, but the run is planned to need "
        f"{size_text(plan.peak_bytes)} in the {plan.peak.name} ({largest}).{instead} Or start it all the same: --force."
    )
