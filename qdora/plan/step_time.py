"""A copy engine on a clock of its own: when a step would end on a device with this bandwidth, without the device.

What a plan saves and spends where blocks are not on the device: arithmetic on the sizes of their packed tensors.

How long a step takes, from its FLOPs and bytes over rates that are stated or were measured on the machine.

qdora doctor --measure: what this machine's products and memory reach, for the time that a plan predicts.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from qdora.files.atomic import atomic_write_json
from qdora.files.environment import cpu_name
from qdora.memory.host_residency import Piece, pinned_bytes
from qdora.memory.streaming import Ring, Turns, interleaved
from qdora.model.load import Quantization, layers_to_quantize
from qdora.ops.packed import dequantize, empty_packed, quantize
from qdora.plan.plan_contents import BASE, CHECKPOINTS, DENSE, SCALES, STREAMING, DeviceKind, MicroBatchShape, Moment


class SimulatedCopies:
    """One channel that copies a block at a time, and one computation; the host that issues both takes no time.

    Args:
        copy_seconds: Of a block.
        num_slots: As many as the ring has.
    Attributes:
        seconds: When what was computed so far ends.
        copying_seconds: Time spent copying so far.
        waiting_seconds: Time in which the computation waited for a copy.
    """

    def __init__(self, copy_seconds: float, num_slots: int = 2) -> None:
        self.copy_seconds = copy_seconds
        self.seconds = self.copying_seconds = self.waiting_seconds = 0.0
        self._channel_free = 0.0
        self._released = [0.0] * num_slots
        self._copied = [0.0] * num_slots

    def start(self, block: int, slot: int, previous: int | None) -> None:
        """Copy when the channel and the slot are free."""
        begin = max(self._channel_free, self._released[slot])
        self._channel_free = self._copied[slot] = begin + self.copy_seconds
        self.copying_seconds += self.copy_seconds

    def wait(self, block: int, slot: int) -> None:
        """Let the computation go on when the copy has ended."""
        self.waiting_seconds += max(0.0, self._copied[slot] - self.seconds)
        self.seconds = max(self.seconds, self._copied[slot])

    def release(self, slot: int) -> None:
        """The slot is free when what was computed so far ends."""
        self._released[slot] = self.seconds

    def compute(self, seconds: float) -> None:
        """Compute for so long."""
        self.seconds += seconds


def simulated_step(
    num_blocks: int,
    streamed: Collection[int],
    copy_seconds: float,
    forward_seconds: float,
    backward_seconds: float,
    *,
    num_slots: int = 2,
    num_steps: int = 3,
) -> SimulatedCopies:
    """Forward and backward passes of a model; its last one, when the ring is in its stride.

    Args:
        num_blocks: Of the model.
        streamed: Which of them take turns.
        copy_seconds: Of a block.
        forward_seconds: Of a block.
        backward_seconds: Of a block, its recomputation included.
        num_slots: Of the ring.
        num_steps: Until the one that counts.
    Returns:
        The clock of the last pass: `seconds`, `copying_seconds` and `waiting_seconds` of that one alone.
    """
    order = sorted(streamed)
    engine = SimulatedCopies(copy_seconds, num_slots)
    ring = Ring(len(order), engine, num_slots)
    place = {block: index for index, block in enumerate(order)}
    before = (0.0, 0.0, 0.0)
    for step in range(num_steps):
        if step == num_steps - 1:
            before = (engine.seconds, engine.copying_seconds, engine.waiting_seconds)
        for blocks, seconds in (
            (range(num_blocks), forward_seconds),
            (range(num_blocks - 1, -1, -1), backward_seconds),
        ):
            for block in blocks:
                if block in place:
                    ring.use(place[block], turns_back=True)
                engine.compute(seconds)
    engine.seconds -= before[0]
    engine.copying_seconds -= before[1]
    engine.waiting_seconds -= before[2]
    return engine


NUM_SLOTS = 2
"""Blocks that are there at a time, as in both residencies."""


@dataclass(frozen=True)
class StreamedBlocks:
    """The blocks that take turns.

    Attributes:
        num_streamed: How many.
        codes, scales: Bytes of their packed tensors, all together.
        block_bytes: Of the largest block, in one piece.
        host_bytes: Of pinned host memory, as torch's allocator takes it; 0 for blocks on disk.
    """

    num_streamed: int
    codes: int
    scales: int
    block_bytes: int
    host_bytes: int

    @property
    def slot_bytes(self) -> int:
        """What they need on the device."""
        return NUM_SLOTS * self.block_bytes


def streamed_blocks(
    model: PreTrainedModel, wanted: Quantization, residency: Literal["host", "disk"], num_streamed: int | None
) -> StreamedBlocks:
    """Sizes of the blocks of a model that take turns.

    Args:
        model: Its parameters on the meta device, its linear layers in place.
        wanted: How they are held.
        residency: Where the blocks live.
        num_streamed: How many; None for all.
    Raises:
        UserError: See `Turns`.
    """
    turns = Turns(model, num_streamed)
    pieces = [Piece() for _ in range(len(turns))]
    codes = scales = 0
    for path in layers_to_quantize(model, wanted):
        turn = turns.of(path)
        if turn is None:
            continue
        rows, columns = model.get_submodule(path).weight.shape
        packed = empty_packed(wanted.kind, (rows, columns), wanted.block_size, wanted.double_quant, "meta")
        pieces[turn].add(path, packed)
        codes += packed.packed.nbytes
        scales += packed.num_bytes - packed.packed.nbytes
    sizes = [piece.num_bytes for piece in pieces]
    host = sum(map(pinned_bytes, sizes)) if residency == "host" else 0
    return StreamedBlocks(len(turns), codes, scales, max(sizes, default=0), host)


def with_streamed(moments: Sequence[Moment], streamed: StreamedBlocks) -> list[Moment]:
    """The moments of a step of the same model with these blocks away: their bytes less, and the slots."""
    found = []
    for moment in moments:
        sizes = dict(moment.by_component)
        sizes[BASE] -= streamed.codes
        sizes[SCALES] -= streamed.scales
        sizes[STREAMING] = streamed.slot_bytes
        found.append(Moment(moment.phase, moment.block, {name: size for name, size in sizes.items() if size}))
    return found


def without_embedding(moments: Sequence[Moment], num_bytes: int) -> list[Moment]:
    """The moments of a step of the same model whose input embedding, so many bytes, is on the host."""
    return [
        Moment(
            moment.phase, moment.block, {**moment.by_component, DENSE: moment.by_component.get(DENSE, 0) - num_bytes}
        )
        for moment in moments
    ]


def with_offloaded(moments: Sequence[Moment], num_blocks: int) -> tuple[list[Moment], int]:
    """The moments of a step whose checkpoints are on the host, and the pinned memory that takes.

    On the device are the input of the block in its backward pass, the one that is fetched meanwhile, and the last one.
    """
    largest = max((moment.by_component.get(CHECKPOINTS, 0) for moment in moments), default=0)
    each = largest // max(num_blocks, 1)
    found = []
    for moment in moments:
        sizes = dict(moment.by_component)
        sizes[CHECKPOINTS] = min(sizes.get(CHECKPOINTS, 0), 3 * each)
        found.append(Moment(moment.phase, moment.block, {name: size for name, size in sizes.items() if size}))
    return found, pinned_bytes(each) * max(num_blocks - 1, 0)


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


# (tokens, in, out) of the product; a layer of a 7B model on a GPU, and one that takes a CPU a fraction of a second.
_SHAPES = {"cuda": (2048, 4096, 11008), "cpu": (256, 2048, 5632)}
_COPIED_BYTES = 256 << 20
_WARM_UP_SECONDS, _SECONDS = 2.0, 8.0


def measure_rates(*, seconds: float = _SECONDS) -> dict[str, dict[str, Any]]:
    """Measure the CPU and, where there is one, the GPU; keep the result in the user's cache for later plans.

    FLOPs: a product of bf16 matrices of a layer's shape. Bytes: dequantising an NF4 weight, which is what moves most of
    a step's bytes. On a GPU also what comes from pinned host memory. The median over `seconds` of each counts.

    Returns:
        Device type -> `Rates.to_dict`.
    """
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {kind: _measure(kind, seconds).to_dict() for kind in kinds}
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
    copied = STATED["cpu"].copied  # of the disk, which is not measured
    if kind == "cuda":
        source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=device)
        copied = _COPIED_BYTES / _seconds_of(lambda: target.copy_(source, non_blocking=True), device, seconds)
    return Rates(name, flops, weight.numel() * BYTES_PER_DEQUANTISED / decoding, copied, measured=True)


def _seconds_of(action: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call."""

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
        f"{each['bytes'] / 1e9:.0f} GB/s where weights are dequantised\n"
        for kind, each in found.items()
    )
