"""How long a step takes: its FLOPs and bytes over the rates of a device, and what it waits for streamed blocks."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qdora.files.atomic import atomic_write_json
from qdora.files.environment import cpu_name
from qdora.files.user_paths import cache_folder
from qdora.memory.streaming import NUM_SLOTS, Ring, interleaved
from qdora.ops.packed import dequantize, quantize
from qdora.plan.plan_contents import DeviceKind, MicroBatchShape

BYTES_PER_DEQUANTISED = 4.6
"""Bytes moved for each dequantised weight: read packed (0.5), write and read the dense tile (2 + 2), and scales."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: FLOPs reached (not the peak) in a 16-bit product of a layer's shape, bytes of
    memory that an elementwise kernel moves, and bytes copied from host memory (read from disk on a CPU).
    """

    name: str
    flops: float
    bytes: float
    copied: float


PCIE_4 = 25e9
"""Bytes a second in each direction: 80 % of the 31.5 GB/s that are stated for PCIe 4.0 with 16 lanes."""

STATED: Mapping[DeviceKind, Rates] = {
    # NVIDIA's A100 40 GB data sheet: half of 312 TFLOP/s, and 80 % of 1,555 GB/s
    "cuda": Rates("A100 40GB (stated)", 156e12, 1.2e12, PCIE_4),
    # Two cores with AVX512-BF16 (benchmarks, layer times); the disk of a rented machine, a round number
    "cpu": Rates("two CPU cores (stated)", 1e12, 10e9, 1e9),
}


def rates_file() -> Path:
    """The file of the measured rates."""
    return cache_folder("rates.json")


def known_rates(device_kind: DeviceKind) -> Rates:
    """The rates measured on this machine by `qdora doctor --measure`, else the stated ones."""
    try:
        found = json.loads(rates_file().read_text(encoding="utf-8"))[device_kind]
        copied = float(found.get("copied", STATED[device_kind].copied))
        return Rates(str(found["name"]), float(found["flops"]), float(found["bytes"]), copied)
    except (OSError, ValueError, KeyError, TypeError):
        return STATED[device_kind]


# (tokens, in, out) of the product: a layer of a 7B model on a GPU, a layer that takes a fraction of a second on a CPU
_SHAPES = {"cuda": (2048, 4096, 11008), "cpu": (256, 2048, 5632)}
_COPIED_BYTES = 256 << 20
_WARM_UP_SECONDS, _SECONDS = 2.0, 8.0


def measure_rates(*, seconds: float = _SECONDS) -> dict[str, dict[str, Any]]:
    """Measure the CPU and the GPU, if there is one; keep the rates in the user's cache for later plans.

    FLOPs: a product of bf16 matrices of a layer's shape. Bytes: dequantising an NF4 weight, which moves most of a
    step's bytes. Copies, on a GPU: from pinned host memory. Each rate is the median over `seconds`.
    """
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {kind: asdict(_measure(kind, seconds)) for kind in kinds}
    path = rates_file()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, {**(known if isinstance(known, dict) else {}), **found})
    return found


def _measure(kind: str, seconds: float) -> Rates:
    device = torch.device(kind)
    tokens, in_features, out_features = _SHAPES[kind]
    x = torch.randn(tokens, in_features, device=device).bfloat16()
    weight = torch.randn(out_features, in_features, device=device).bfloat16()
    packed = quantize(weight, "nf4")
    product = _seconds_of(lambda: x @ weight.T, device, seconds)
    decoding = _seconds_of(lambda: dequantize(packed, torch.bfloat16), device, seconds)
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    flops = 2.0 * tokens * in_features * out_features / product
    copied = STATED["cpu"].copied  # the disk is not measured
    if kind == "cuda":
        source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=device)
        copied = _COPIED_BYTES / _seconds_of(lambda: target.copy_(source, non_blocking=True), device, seconds)
    return Rates(name, flops, weight.numel() * BYTES_PER_DEQUANTISED / decoding, copied)


def _seconds_of(action: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call, after a warm-up."""

    def timed() -> float:
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    began = time.perf_counter()
    while time.perf_counter() - began < min(_WARM_UP_SECONDS, seconds):
        timed()
    found: list[float] = []
    began = time.perf_counter()
    while not found or time.perf_counter() - began < seconds:
        found.append(timed())
    return statistics.median(found)


def rates_text(found: dict[str, dict[str, Any]]) -> str:
    """A line for each device."""
    return "".join(
        f"{kind:<10}{each['name']}: {each['flops'] / 1e12:.2f} TFLOP/s in bf16 products, "
        f"{each['bytes'] / 1e9:.0f} GB/s when weights are dequantised\n"
        for kind, each in found.items()
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """Sizes that the time of a step depends on.

    Attributes:
        num_linear: Weights of the linear layers inside the blocks.
        head_chunk: Labelled tokens whose logits exist at once; None: all.
        attention_width: Query features of all blocks together: heads * head size * blocks.
        full: Whether the base itself is trained.
        block_bytes: Bytes of the largest streamed block.
        row_bytes: Bytes of a row of an embedding on the host; 0 if the embedding is on the device.
        share_met: Share of `num_linear` that a token meets; less than 1 in a mixture of experts. All are dequantised.
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
    share_met: float = 1.0
    head_chunk: int | None = None

    def block_seconds(self, shape: MicroBatchShape, rates: Rates) -> float:
        """Seconds of the forward pass of a block, without attention."""
        products = 2.0 * shape.num_tokens * self.num_linear * self.share_met / rates.flops
        return (products + BYTES_PER_DEQUANTISED * self.num_linear / rates.bytes) / max(self.num_blocks, 1)


def step_seconds(work: Work, shape: MicroBatchShape, num_micro_batches: int, rates: Rates) -> float:
    """Predicted time of an optimizer step.

    FLOPs: 2 per weight and token in each pass: forward, recomputation, gradient of the inputs (and of the weights, if
    they are trained). Causal attention: half of 4 * length per query feature and token, and 2.5 times that backward.
    Bytes: those of dequantising in each pass, and 30 per trainable parameter in the update. The two times are added,
    since tiles are dequantised between the products. Each chunk of the loss takes as long as its two products, or as
    reading the head's 16-bit weights for them, whichever is longer. Streamed blocks add the waiting time of a simulated
    schedule, an embedding on the host adds the copy of its rows.
    """
    passes = 2 + work.checkpointing
    tokens = shape.num_tokens
    products = 2.0 * (work.num_linear * (passes + work.full) + work.num_trainable * (passes + 1) * (not work.full))
    products *= work.share_met  # of the adapters, too, as if they were in proportion to their layers
    attention = 2.0 * shape.length * work.attention_width * (1 + work.checkpointing + 2.5)
    flops = tokens * (products + attention)
    num_bytes = work.num_linear * passes * (BYTES_PER_DEQUANTISED if work.quantised else 2.0)
    update = 30.0 * work.num_trainable / rates.bytes
    seconds = flops / rates.flops + num_bytes / rates.bytes + _head_seconds(work, shape.num_labels, rates)
    if work.num_streamed:
        forward, streamed = work.block_seconds(shape, rates), interleaved(work.num_blocks, work.num_streamed)
        copy = work.block_bytes / rates.copied
        seconds += simulated_step(work.num_blocks, streamed, copy, forward, 2 * forward).waiting_seconds
    seconds += tokens * work.row_bytes / rates.copied
    return num_micro_batches * seconds + update


def _head_seconds(work: Work, num_labels: int, rates: Rates) -> float:
    full, rest = divmod(num_labels, work.head_chunk or max(num_labels, 1))

    def chunk(tokens: int) -> float:
        return 4.0 * work.num_head * max(tokens / rates.flops, 1.0 / rates.bytes) if tokens else 0.0

    return full * chunk(work.head_chunk or num_labels) + chunk(rest)


class SimulatedCopies:
    """A simulated device: one channel that copies a block at a time, and one stream that computes.

    `seconds` is the end of everything computed so far; `waiting_seconds` is the time that it waited for copies.
    """

    def __init__(self, copy_seconds: float) -> None:
        self.copy_seconds = copy_seconds
        self.seconds = self.copying_seconds = self.waiting_seconds = 0.0
        self._channel_free = 0.0
        self._released = [0.0] * NUM_SLOTS
        self._copied = [0.0] * NUM_SLOTS

    def start(self, block: int, slot: int, previous: int | None) -> None:
        """Copy when the channel and the slot are free."""
        begin = max(self._channel_free, self._released[slot])
        self._channel_free = self._copied[slot] = begin + self.copy_seconds
        self.copying_seconds += self.copy_seconds

    def wait(self, slot: int) -> None:
        """Continue the computation after the copy has ended."""
        self.waiting_seconds += max(0.0, self._copied[slot] - self.seconds)
        self.seconds = max(self.seconds, self._copied[slot])

    def release(self, slot: int) -> None:
        """Free the slot at the end of what was computed so far."""
        self._released[slot] = self.seconds

    def compute(self, seconds: float) -> None:
        """Compute for some seconds."""
        self.seconds += seconds


def simulated_step(
    num_blocks: int, streamed: Collection[int], copy_seconds: float, forward_seconds: float, backward_seconds: float
) -> SimulatedCopies:
    """Simulate forward and backward passes of a model with streamed blocks, whose numbers are given.

    The times are those of a block; `backward_seconds` includes the recomputation. Earlier steps bring the ring into its
    steady state: the three times of the result are of the last step alone.
    """
    order = sorted(streamed)
    engine = SimulatedCopies(copy_seconds)
    ring = Ring(len(order), engine)
    place = {block: index for index, block in enumerate(order)}
    passes = ((range(num_blocks), forward_seconds), (range(num_blocks - 1, -1, -1), backward_seconds))
    for _ in range(3):
        before = (engine.seconds, engine.copying_seconds, engine.waiting_seconds)
        for blocks, seconds in passes:
            for block in blocks:
                if block in place:
                    ring.use(place[block], turns_back=True)
                engine.compute(seconds)
    engine.seconds -= before[0]
    engine.copying_seconds -= before[1]
    engine.waiting_seconds -= before[2]
    return engine
