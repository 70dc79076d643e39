"""Stopping a run without losing it: Ctrl-C, SIGTERM and a lost terminal finish the step, save, and leave."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from qdora.train.distributed import Processes

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

# A launcher passes on what the terminal has already sent to the whole group: so soon, it is the same request.
SAME_REQUEST_SECONDS = 1.0

_SAID = b"\nStopping: the step is finished and saved first. A second signal stops at once, without saving.\n"


class StopRequest:
    """Whether someone has asked the run to stop; of several processes, any of them."""

    def __init__(self, processes: Processes | None = None) -> None:
        self.requested = False
        self._processes = processes or Processes()

    def agreed(self) -> bool:
        """Whether one of the processes has been asked, told to all of them alike; to be called by all."""
        return self._processes.any(self.requested)


@contextmanager
def stop_on_signal(processes: Processes | None = None) -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and SIGHUP set the request; a second one, a second or more later, raises KeyboardInterrupt.

    What is being written then is taken back: a checkpoint appears whole or not at all.
    """
    request = StopRequest(processes)
    asked_at = 0.0

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        now = time.monotonic()
        if not request.requested:
            request.requested, asked_at = True, now
            with suppress(OSError):
                os.write(2, _SAID)  # not by a logger, in whose lock or buffer the signal may have come
        elif now - asked_at >= SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
