"""Stop requests: after Ctrl-C, SIGTERM or a lost terminal, a run finishes its step, saves, and exits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from torch.distributed import is_torchelastic_launched

from qdora.files.console import END_SIGNALS, SAME_REQUEST_SECONDS, leave_closed_terminal
from qdora.train.distributed import Processes

_MESSAGE = b"\nStopping: the step is finished and saved first. A second signal stops at once, without saving.\n"


class StopRequest:
    """Whether one of the processes has been asked to stop."""

    def __init__(self, processes: Processes = Processes()) -> None:
        self.requested = False
        self._processes = processes

    def agreed(self) -> bool:
        """Whether one of the processes has been asked; must be called by all, and all get the same answer."""
        return any(self._processes.gather(self.requested))


@contextmanager
def stop_on_signal(processes: Processes = Processes()) -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and SIGHUP set the request; another signal, a second or more later, raises KeyboardInterrupt.

    A signal that is ignored stays so: SIGHUP under nohup, SIGINT in the background jobs of a script. Not so under
    torchrun: it handles these signals itself, passes them on, and kills processes that have not ended after 30 s.
    """
    request = StopRequest(processes)
    asked_at = 0.0

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        now = time.monotonic()
        first, request.requested = not request.requested, True
        if first:
            asked_at = now
            with suppress(OSError):
                os.write(2, _MESSAGE)  # no logger: the signal may have come while one holds its lock
        leave_closed_terminal(number)
        if not first and now - asked_at >= SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    every = is_torchelastic_launched()
    heeded = [number for number in END_SIGNALS if every or signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heeded}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
