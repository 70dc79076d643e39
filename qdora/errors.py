"""The three ways in which qdora stops early: the user's mistake, a failure, an interrupt. Work stays on disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave: a file, a recipe, an argument. The command line exits with 2.

    The message is one line per fault: where, what is wrong, what was given, what is allowed, the nearest name.
    """

    def __init__(self, *faults: str) -> None:
        self.faults: tuple[str, ...] = faults
        super().__init__("\n".join(faults))


class RunFailure(RuntimeError):
    """A run that could not go on: a full disk, a NaN loss, a failed check. The command line exits with 1.

    Args:
        message: What happened, in one line.
        safe: Paths that hold finished work; they are named in the message so that nobody has to search for it.
    """

    def __init__(self, message: str, safe: Sequence[Path | str] = ()) -> None:
        self.safe: tuple[str, ...] = tuple(str(path) for path in safe)
        kept = f" Safe on disk: {', '.join(self.safe)}." if self.safe else ""
        super().__init__(message + kept)


class Interrupted(Exception):
    """A run that was asked to stop and did, after `step` steps, with a whole checkpoint. The command exits with 130."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step, self.checkpoint = step, checkpoint
        super().__init__(f"stopped after step {step}; saved to {checkpoint}. Go on with --resume.")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The allowed name closest to `name` as ' Did you mean ...?', or '' where none is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
