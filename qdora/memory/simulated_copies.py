"""A copy engine on a clock of its own: when a step would end on a device with this bandwidth, without the device."""

from __future__ import annotations

from collections.abc import Collection

from qdora.memory.streaming import Ring


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
