"""Stopping a run without losing it: Ctrl-C, SIGTERM and a lost terminal finish the step, save, and leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qdora.train.distributed import Processes

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


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
    """SIGINT, SIGTERM and SIGHUP set the request; a second SIGINT interrupts at once, as Python does by default."""
    request = StopRequest(processes)

    def ask(number: int, _frame: FrameType | None) -> None:
        if request.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.requested = True

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
