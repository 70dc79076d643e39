"""How long a step takes, from its FLOPs and bytes over rates that are stated or were measured on the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdora.memory.plan import DeviceKind, MicroBatchShape
from qdora.memory.simulated_copies import simulated_step
from qdora.memory.streaming import interleaved

BYTES_PER_DEQUANTISED = 4.6
"""A packed weight is read, its dense tile written and read again: 0.5 + 2 + 2 bytes, and a little for the scales."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        name: Of the device.
        flops: Of a 16-bit matrix product as it occurs in a layer, reached, not peak.
        bytes: Of memory read and written by an elementwise kernel, reached.
        copied: Bytes of blocks that come from the host's memory or, on a CPU, from the disk.
        measured: False for a stated rate.
    """

    name: str
    flops: float
    bytes: float
    copied: float
    measured: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


STATED: Mapping[DeviceKind, Rates] = {
    # Half of the 312 TFLOP/s and 80 % of the 1,555 GB/s of NVIDIA's A100 40 GB data sheet, and of PCIe 4.0's 31.5 GB/s.
    "cuda": Rates("A100 40GB (stated)", 156e12, 1.2e12, 25e9),
    # Two cores with AVX512-BF16: README, layer times. A disk of a rented machine, a round number.
    "cpu": Rates("two CPU cores (stated)", 1e12, 10e9, 1e9),
}


def rates_file() -> Path:
    """Where measured rates are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "qdora" / "rates.json"


def known_rates(device_kind: DeviceKind) -> Rates:
    """Those measured on this machine by `qdora doctor --measure`, else the stated ones."""
    try:
        found = json.loads(rates_file().read_text(encoding="utf-8"))[device_kind]
        copied = float(found.get("copied", STATED[device_kind].copied))
        return Rates(str(found["name"]), float(found["flops"]), float(found["bytes"]), copied, measured=True)
    except (OSError, ValueError, KeyError, TypeError):
        return STATED[device_kind]


@dataclass(frozen=True)
class Work:
    """Sizes that the time of a step depends on.

    Attributes:
        num_linear: Weights of the linear layers inside the blocks.
        num_head: Weights of the output head.
        num_trainable: Parameters.
        attention_width: Query features of all blocks together: heads * head size * blocks.
        quantised: Whether the linear weights are.
        checkpointing: Whether the forward pass is computed twice.
        full: Whether the base itself is trained.
        row_bytes: Of a row of the embedding that comes from the host; 0 where it is on the device.
        num_blocks, num_streamed, block_bytes: Blocks, how many of them come and go, and bytes of the largest.
    """

    num_linear: int
    num_head: int
    num_trainable: int
    attention_width: int
    quantised: bool
    checkpointing: bool
    full: bool = False
    num_blocks: int = 1
    num_streamed: int = 0
    block_bytes: int = 0
    row_bytes: int = 0


def step_seconds(work: Work, shape: MicroBatchShape, num_micro_batches: int, rates: Rates) -> float:
    """Predicted time of an optimizer step.

    FLOPs: 2 a weight and token for each of the forward pass, its recomputation, and the gradient of the inputs (and of
    the weights, where they are trained); attention, which is causal, half of 4 * length a query feature and token, and
    two and a half times that in its backward pass. Bytes: what dequantising moves in each of these passes, and 30 a
    trainable parameter in the update. Sum over both, since tiles are dequantised between the products. Blocks that come
    and go add what a simulated schedule waits for them, an embedding on the host the copy of its rows.
    """
    passes = 2 + work.checkpointing
    tokens = shape.num_tokens
    products = 2.0 * (work.num_linear * (passes + work.full) + work.num_trainable * (passes + 1) * (not work.full))
    attention = 2.0 * shape.length * work.attention_width * (1 + work.checkpointing + 2.5)
    flops = tokens * (products + attention) + 4.0 * work.num_head * shape.num_labels
    num_bytes = work.num_linear * passes * (BYTES_PER_DEQUANTISED if work.quantised else 2.0)
    update = 30.0 * work.num_trainable / rates.bytes
    seconds = flops / rates.flops + num_bytes / rates.bytes + _waiting_seconds(work, tokens, rates)
    seconds += tokens * work.row_bytes / rates.copied
    return num_micro_batches * seconds + update


def _waiting_seconds(work: Work, num_tokens: int, rates: Rates) -> float:
    """What the passes of a micro-batch wait for blocks that are on their way."""
    if not work.num_streamed:
        return 0.0
    flops, num_bytes = 2.0 * num_tokens * work.num_linear, BYTES_PER_DEQUANTISED * work.num_linear
    forward = (flops / rates.flops + num_bytes / rates.bytes) / work.num_blocks
    streamed = interleaved(work.num_blocks, work.num_streamed)
    copy = work.block_bytes / rates.copied
    return simulated_step(work.num_blocks, streamed, copy, forward, 2 * forward).waiting_seconds
