"""How long a step takes: its FLOPs and bytes over the rates of a device, and what it waits for streamed blocks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qdora.memory.streaming import NUM_SLOTS, Ring, interleaved
from qdora.plan.device_rates import BYTES_PER_DEQUANTISED, Rates
from qdora.plan.plan_contents import MicroBatchShape


@dataclass(frozen=True)
class Work:
    """Sizes that the time of a step depends on.

    Attributes:
        num_linear: Weights of the linear layers inside the blocks.
        attention_width: Query features of all blocks together: heads * head size * blocks.
        full: Whether the base itself is trained.
        block_bytes: Bytes of the largest streamed block.
        row_bytes: Bytes of a row of an embedding on the host; 0 if the embedding is on the device.
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

    FLOPs: 2 per weight and token in each pass: forward, recomputation, gradient of the inputs (and of the weights, if
    they are trained). Causal attention: half of 4 * length per query feature and token, and 2.5 times that backward.
    Bytes: those of dequantising in each pass, and 30 per trainable parameter in the update. The two times are added,
    since tiles are dequantised between the products. Streamed blocks add the waiting time of a simulated schedule, an
    embedding on the host adds the copy of its rows.
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
    """Time that the passes of a micro-batch wait for streamed blocks."""
    if not work.num_streamed:
        return 0.0
    flops, num_bytes = 2.0 * num_tokens * work.num_linear, BYTES_PER_DEQUANTISED * work.num_linear
    forward = (flops / rates.flops + num_bytes / rates.bytes) / work.num_blocks
    streamed = interleaved(work.num_blocks, work.num_streamed)
    copy = work.block_bytes / rates.copied
    return simulated_step(work.num_blocks, streamed, copy, forward, 2 * forward).waiting_seconds


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
    num_blocks: int,
    streamed: Collection[int],
    copy_seconds: float,
    forward_seconds: float,
    backward_seconds: float,
    *,
    num_steps: int = 3,
) -> SimulatedCopies:
    """Simulate forward and backward passes of a model with streamed blocks, whose numbers are given.

    The times are those of a block; `backward_seconds` includes the recomputation. Earlier steps bring the ring into its
    steady state: the three times of the result are of the last step alone.
    """
    order = sorted(streamed)
    engine = SimulatedCopies(copy_seconds)
    ring = Ring(len(order), engine)
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
