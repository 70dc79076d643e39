"""The batches of an evaluation, divided among processes that hold the same whole model.

They are the batches of a single process, so every score is the same, bit for bit: each process computes every n-th
batch and gets the results of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from qdora.errors import RunFailure

Result = TypeVar("Result")
Exchange = Callable[[Any], list[Any]]
"""The values of all processes, JSON types, from that of this one; raises where another process has failed."""


@dataclass(frozen=True)
class _Share:
    rank: int
    size: int
    exchange: Exchange


_SHARE: ContextVar[_Share | None] = ContextVar("share_of_batches", default=None)


@contextmanager
def batches_shared(rank: int, size: int, exchange: Exchange) -> Iterator[None]:
    """In the block, `results_of` computes every `size`-th batch here. All processes must evaluate the same.

    One in which the block raises must tell the others, which wait for its next exchange (`evaluate_together`).
    """
    before = _SHARE.set(_Share(rank, size, exchange))
    try:
        yield
    finally:
        _SHARE.reset(before)


def results_of(
    batches: Iterable[list[int]],
    compute: Callable[[list[int]], Sequence[Result]],
    report: Callable[[int], None] | None = None,
) -> dict[int, Result]:
    """The result of every item of the batches, computed here or in another process.

    Args:
        compute: A batch of items -> a result for each, of JSON types.
        report: Called with the number of items that are done, after each batch.
    Raises:
        RunFailure: The processes have different batches.
        Exception: What `compute` raises here, or the exchange if something has raised elsewhere.
    """
    share = _SHARE.get()
    found: dict[int, Result] = {}
    num_done = 0
    for number, batch in enumerate(batches):
        if share is None or number % share.size == share.rank:
            found.update(zip(batch, compute(batch), strict=True))
        num_done += len(batch)
        if report is not None:
            report(num_done)
    if share is None:
        return found
    all_found = {item: result for part in share.exchange(list(found.items())) for item, result in part}
    if len(all_found) != num_done:
        raise RunFailure("eval: the processes evaluate different examples. Fix: give all of them the same data.")
    return all_found
