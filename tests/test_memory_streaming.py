"""Blocks that take turns: never a wrong one in a slot, and the next one always on its way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdora.memory.streaming import NUM_SLOTS, Ring, interleaved


class Slots:
    """An engine that knows what lies where, and who may still read it."""

    def __init__(self) -> None:
        self.held: list[int | None] = [None] * NUM_SLOTS
        self.reading: int | None = None
        self.started: list[int] = []

    def start(self, block: int, slot: int, previous: int | None) -> None:
        assert slot != self.reading
        assert self.held[slot] == previous
        assert block not in self.held
        self.held[slot] = block
        self.started.append(block)

    def wait(self, slot: int) -> None:
        assert self.reading is None
        self.reading = slot

    def release(self, slot: int) -> None:
        assert self.reading == slot
        self.reading = None


@given(
    num_blocks=st.integers(1, 9),
    uses=st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=40),
)
def test_the_block_in_use_is_in_its_slot_whatever_the_order(num_blocks: int, uses: list[tuple[int, bool]]) -> None:
    engine = Slots()
    ring = Ring(num_blocks, engine)
    for block, turns_back in uses:
        ring.use(block % num_blocks, turns_back=turns_back)
        slot = ring.slot_of(block % num_blocks)
        assert engine.held[slot] == block % num_blocks
        assert engine.reading == slot
    assert set(engine.started) <= set(range(num_blocks))


def order(num_blocks: int, *, backward: bool) -> list[int]:
    forward = list(range(num_blocks))
    return forward + forward[::-1] if backward else forward


@pytest.mark.parametrize("backward", [True, False])
def test_what_comes_next_has_been_started_before_it_is_used(backward: bool) -> None:
    num_blocks = 12  # a multiple of the slots, or the first block of the next pass has to wait for the last of this one
    engine = Slots()
    ring = Ring(num_blocks, engine)
    ring.use(0, turns_back=backward)
    for block in 3 * order(num_blocks, backward=backward):
        assert block in engine.held
        ring.use(block, turns_back=backward)
    # Around a turn the slots hold what comes next already.
    per_pass = num_blocks - NUM_SLOTS if backward else num_blocks
    assert len(engine.started) <= (6 if backward else 3) * per_pass + 2 * NUM_SLOTS
    assert all(ring.slot_of(block) == block % NUM_SLOTS for block in range(num_blocks))


@given(num_blocks=st.integers(1, 200), share=st.floats(0, 1))
def test_interleaved_blocks_are_spread_evenly(num_blocks: int, share: float) -> None:
    count = round(share * num_blocks)
    chosen = interleaved(num_blocks, count)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == sorted(chosen)
    assert all(0 <= each < num_blocks for each in chosen)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    if count:
        # As much room before the first as behind the last, to a block.
        assert abs(chosen[0] - (num_blocks - 1 - chosen[-1])) <= 1 or num_blocks % count


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(ValueError, match="must be 0 to 4, got 5"):
        interleaved(4, 5)
