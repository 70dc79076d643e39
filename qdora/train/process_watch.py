"""Which process of a launch hangs, has failed or has ended, told to the others through the store of the launch.

Each process counts its messages to all others and, while it trains, its passes through parts of the model. A thread of
its own writes these counts to the store about once a second, and reads those of the others. A process is silent if its
thread writes nothing for `patience_seconds`, or if it is behind another one and neither has moved for so long: the rule
of a monitored barrier, without a message more. Where all make the same passes, the launch also ends if none has moved
for twice as long. What is found first is written to the store, so that all tell the same.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from qdora.errors import FAILURE, UserError, first_line
from qdora.files.live_process import has_ended, live_process

PATIENCE = "QDORA_PATIENCE"
"""Environment variable: seconds after which a process that does not move is silent."""

_PATIENCE_SECONDS = 300.0
# How long a process may take to end by itself after another's end, before its thread ends it: torch's collectives on
# the host cannot be called off, and launchers wait as long after SIGTERM.
_GRACE_SECONDS = 30.0
# A known fault is told this soon: where this process waits in a kernel, a launcher may kill it within the grace.
_TELLING_SECONDS = 2.0
_LOOKS = 20
"""Looks at the other processes within the patience, at least."""
_BEATS_OF_AN_END = 5
"""Beats that a process misses, once a connection is lost or the system no longer has it, until it counts as ended."""
_BEATS_TO_CLOSE = 10

logger = logging.getLogger("qdora")


def patience_seconds() -> float:
    """Seconds without a move after which a process counts as silent."""
    given = os.environ.get(PATIENCE, str(_PATIENCE_SECONDS))
    with suppress(ValueError):
        if 0 < float(given) < float("inf"):
            return float(given)
    raise UserError(f"{PATIENCE}: must be a number of seconds above 0, got {given!r}.")


@contextmanager
def sigterm_ignored() -> Iterator[None]:
    """Inside, SIGTERM has no effect: a launcher sends it as soon as another process has ended, and this one has yet to
    tell its reason. The launcher kills a process that has not ended after 30 s."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class ProcessWatch:
    """The watch of process `rank` of `size`, in a launch whose store is at MASTER_ADDR and MASTER_PORT.

    Attributes:
        newest: Gives the newest checkpoint of the run, or None.
        ends_itself: Whether this process is ending by an error of its own, which it tells.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.newest: Callable[[], Path | None] = lambda: None
        self.ends_itself = False
        self._patience = patience_seconds()
        self._beat = min(1.0, self._patience / _LOOKS)
        self._where = f"on {socket.gethostname()}"
        self._place, self._num_beats = (0, 0), 0
        self._counts_passes = self._compares_passes = self._roll_call = False
        self._seen: dict[int, _Seen] = {}
        self._looked_at = 0.0
        self._failure: dict[str, Any] | None = None
        self._fault: dict[str, Any] | None = None
        self._main_place = ""  # when the fault was learnt
        self._known, self._over = threading.Event(), threading.Event()
        self._keys = f"qdora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=self._patience)
        self._store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
        mine = live_process()
        if mine is not None:
            self._store.set(f"{self._keys}/{rank}/process", json.dumps(mine))
        self._exchange()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def knows(self) -> bool:
        """Whether a process is known to have failed, ended, or hung."""
        return self._known.is_set()

    @property
    def has_silence(self) -> bool:
        """Whether a process is silent, to which the connections may be open."""
        return self._fault is not None and "hangs" in self._fault

    def arrived(self) -> None:
        """This process is at its next message to all."""
        self._place = (self._place[0] + 1, 0)

    @contextmanager
    def counting(self, units: Sequence[nn.Module], *, together: bool) -> Iterator[None]:
        """Inside, each pass through a unit is a move, and without one a process is silent, even if its thread lives.

        Args:
            units: Modules; those that torch gathers, if the base is divided.
            together: Whether all processes make the same passes, so that one can be behind in them.
        """

        def moved(_module: nn.Module, _args: Any) -> None:
            self._place = (self._place[0], self._place[1] + 1)

        # Before torch gathers the unit: who waits there is ahead.
        with ExitStack() as hooks:
            for unit in units:
                hooks.enter_context(unit.register_forward_pre_hook(moved, prepend=True))
            self._counts_passes, self._compares_passes = True, together
            try:
                yield
            finally:
                self._counts_passes = False

    @contextmanager
    def without_passes(self) -> Iterator[None]:
        """Inside, the process moves as long as its thread lives, also within `counting`: a large file takes minutes."""
        before, self._counts_passes = self._counts_passes, False
        try:
            yield
        finally:
            self._counts_passes = before

    def failed(self, error: BaseException) -> None:
        """Tell the others that this process fails, and why."""
        self._failure = {"ranks": [self.rank], "what": f"failed: {first_line(error)}", "where": self._where}
        self._exchanged(3 * self._beat)

    def linger(self) -> None:
        """Let the others read why this process ends, if they read it from its memory."""
        if self.rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        with sigterm_ignored():
            time.sleep(2 * self._beat)

    def lost(self) -> str:
        """Why this process ends, after its connection to another one broke, or once one is known to have failed."""
        self._roll_call = True
        self._known.wait(3 * _BEATS_OF_AN_END * self._beat)
        self._over.set()
        return self._told()

    def close(self, *, well: bool = False) -> None:
        """End the watch. Whose process ends `well` is not missed by the others, which may have more to write."""
        self._over.set()
        # A thread that is still in torch's store when Python ends takes the process down by SIGABRT.
        self._thread.join(_BEATS_TO_CLOSE * self._beat)
        if well:
            with suppress(RuntimeError):  # the store has ended before
                self._store.delete_key(f"{self._keys}/{self.rank}/process")

    def way_on(self) -> str:
        """What to do once the run has ended, as the end of a sentence."""
        if self.newest() is None:
            return "run it again; it begins at its first step, since no checkpoint is saved."
        return "resume from the last checkpoint with --resume."

    def _told(self) -> str:
        resume = f"Fix: {self.way_on()}"
        if self._fault is None:
            return (
                f"process {self.rank}: the connection to the other processes of this run is lost: one of them has "
                f"ended, and its own message says why. {resume}"
            )
        ranks, what = self._fault["ranks"], self._fault["what"].removesuffix(".")
        if not ranks:
            text = f"all processes have hung: none has moved for {self._patience:g} s."
            return f"process {self.rank}: {text} This one waits in {self._main_place}. {resume}"
        if self.rank in ranks:
            return f"process {self.rank} {what}, so the others have ended. It is at {self._main_place}. {resume}"
        num_more = len(ranks) - 1
        more = f" and {num_more} {'other' if num_more == 1 else 'others'}" if num_more else ""
        where = self._fault["where"]
        who = f"process {ranks[0]} ({where})" if where else "process 0 or the launcher (torchrun)"
        return f"process {self.rank}: stopped, because {who}{more} {what}. {resume}"

    def _run(self) -> None:
        while not self._over.wait(self._beat) and not self.knows:
            if not self._exchanged(self._patience):
                self._learn(self._silence([0], ""))  # the launcher may hold the store
        early = min(_TELLING_SECONDS, _GRACE_SECONDS)
        if self._over.wait(early):
            return
        tells_late = self.ends_itself
        if not tells_late:
            self._log_fault()
        if not self._over.wait(_GRACE_SECONDS - early):
            if tells_late:
                self._log_fault()
            os._exit(FAILURE)

    def _log_fault(self) -> None:
        newest = self.newest()
        safe = "" if newest is None else f" Safe on disk: {newest}."
        logger.error("%s%s", self._told(), safe)

    def _exchanged(self, seconds: float) -> bool:
        """Whether the store answers within these seconds; it may never."""
        exchange = threading.Thread(target=self._exchange, daemon=True)
        exchange.start()
        for _ in range(_LOOKS):  # in parts: time for which the whole process is suspended counts as one of them
            exchange.join(seconds / _LOOKS)
        return not exchange.is_alive()

    def _exchange(self) -> None:
        """Write this process's counts, and read what is known of the others."""
        self._num_beats += 1
        place = [*self._place, 0 if self._counts_passes else self._num_beats]
        try:
            self._store.set(f"{self._keys}/{self.rank}", json.dumps([place, self._num_beats, self._where]))
            if self._failure is not None:
                self._tell(self._failure)
            if self._store.check([f"{self._keys}/fault"]):
                self._learn(json.loads(self._store.get(f"{self._keys}/fault")))
            elif self._roll_call or time.monotonic() - self._looked_at >= min(
                self._patience / _LOOKS, _BEATS_OF_AN_END * self._beat
            ):
                self._look(place)
        except RuntimeError:  # of torch's store, when its process has ended
            if not self._over.is_set():
                self._learn({"ranks": [0], "what": "has ended without a message", "where": ""})

    def _look(self, mine: list[int]) -> None:
        """Find processes that are silent, or with a lost connection have ended, and tell all."""
        now = time.monotonic()
        if now - self._looked_at >= self._patience / 2:
            self._seen.clear()  # after a suspension, perhaps of all processes, nobody counts as silent yet
        self._looked_at = now
        keys = [f"{self._keys}/{rank}" for rank in range(self.size)]
        if not self._store.check(keys):
            return  # some are about to start
        for rank, text in enumerate(self._store.multi_get(keys)):
            place, num_beats, where = json.loads(text)
            seen = self._seen.setdefault(rank, _Seen(place, num_beats, where, now))
            seen.update(place, num_beats, now)
        others = {rank: seen for rank, seen in self._seen.items() if rank != self.rank}
        ended = [rank for rank, each in others.items() if now - each.beat_at >= _BEATS_OF_AN_END * self._beat]
        silent = [rank for rank, each in others.items() if now - each.beat_at >= self._patience]
        stands = self.rank in self._seen and now - self._seen[self.rank].moved_at >= self._patience
        parts = 2 if self._compares_passes else 1
        behind = [
            rank
            for rank, each in others.items()
            if stands and now - each.moved_at >= self._patience and each.place[:parts] < mine[:parts]
        ]
        # The others wait for those that are most behind.
        last = [rank for rank in behind if others[rank].place[:parts] == min(others[r].place[:parts] for r in behind)]
        # With NCCL no connection tells of an end: the main thread waits in a kernel. A thread may miss more beats in a
        # process that lives, in a library's long call, so the system is asked.
        ended = [rank for rank in ended if self._roll_call or self._is_gone(rank)]
        if ended:
            self._tell({"ranks": ended, "what": "has ended without a message", "where": others[ended[0]].where})
        elif silent or last:
            found = silent or last
            self._tell(self._silence(found, others[found[0]].where))
        elif self._compares_passes and all(now - each.moved_at >= 2 * self._patience for each in self._seen.values()):
            self._tell(self._silence([], ""))

    def _is_gone(self, rank: int) -> bool:
        """Whether the process is one of this machine that has ended."""
        key = f"{self._keys}/{rank}/process"
        return self._store.check([key]) and has_ended(json.loads(self._store.get(key)))

    def _tell(self, fault: dict[str, Any]) -> None:
        """Write a fault to the store, if there is none yet, and learn the one that is there."""
        first = self._store.compare_set(f"{self._keys}/fault", "", json.dumps(fault))
        self._learn(json.loads(first))

    def _learn(self, fault: dict[str, Any]) -> None:
        self._fault, self._main_place = fault, _main_place()
        self._known.set()

    def _silence(self, ranks: list[int], where: str) -> dict[str, Any]:
        return {"ranks": ranks, "what": f"has not moved for {self._patience:g} s", "where": where, "hangs": True}


class _Seen:
    """What a process wrote last, and when it last changed."""

    def __init__(self, place: list[int], num_beats: int, where: str, now: float) -> None:
        self.place, self.num_beats, self.where = place, num_beats, where
        self.moved_at = self.beat_at = now

    def update(self, place: list[int], num_beats: int, now: float) -> None:
        if place != self.place:
            self.place, self.moved_at = place, now
        if num_beats != self.num_beats:
            self.num_beats, self.beat_at = num_beats, now


def _main_place() -> str:
    """Where the main thread is: file, line and function."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
