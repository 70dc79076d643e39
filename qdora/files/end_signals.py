"""Signals that end a process, as all verbs take them."""

from __future__ import annotations

import os
import signal
import stat
from contextlib import suppress

END_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

# A launcher repeats the signal that the terminal has sent to the whole group: within this time it is the same request.
SAME_REQUEST_SECONDS = 1.0


def leave_closed_terminal(number: int) -> None:
    """After SIGHUP print nowhere: the terminal is gone, and a failed write would hide why the process ends."""
    if number in (signal.SIGINT, signal.SIGTERM):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):  # closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):  # files and pipes still get the output
                os.dup2(nowhere, stream)
