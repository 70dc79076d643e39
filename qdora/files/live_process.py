"""Whether another process of this machine lives, from what it wrote about itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NUMBERS = "/proc/self/ns/pid"  # containers number their processes by themselves
_DEAD = ("Z", "X", "x")  # it has ended, and its parent has not asked yet


def live_process() -> list[str] | None:
    """What tells this process from all others of all machines; None if the system (not Linux) does not say."""
    place, pid = _place(), str(os.getpid())
    found = _state(pid)
    return None if place is None or found is None else [*place, pid, found[1]]


def has_ended(process: Sequence[str]) -> bool:
    """Whether a process that another one's `live_process` gave has ended; False for one of another machine."""
    *place, pid, start = process
    if place != _place():
        return False
    found = _state(pid)
    return found is None or found[1] != start or found[0] in _DEAD


def _place() -> list[str] | None:
    """This start of this machine, and the numbering of its processes."""
    try:
        return [_BOOT.read_text().strip(), os.readlink(_NUMBERS)]
    except OSError:
        return None


def _state(pid: str) -> tuple[str, str] | None:
    """State and start time of a process; None if there is none of this number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before may have blanks
    return fields[0], fields[19]
