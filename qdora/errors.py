"""The three ways in which qdora stops early: the user's mistake, a failure, an interrupt. Work stays on disk."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

_MOST_CHARACTERS = 2000


class UserError(ValueError):
    """A mistake in what the user gave: a file, a recipe, an argument. The command line exits with 2.

    The message has one line per fault: where it is, what is wrong, what was given, what it must be, the nearest name.
    """

    def __init__(self, *faults: str) -> None:
        # A damaged file may bring in control characters, or a name of a megabyte.
        lines = ("".join(each if each.isprintable() else " " for each in fault) for fault in faults)
        self.faults: tuple[str, ...] = tuple(line[:_MOST_CHARACTERS] for line in lines)
        super().__init__("\n".join(self.faults))


class HubFailure(UserError):
    """What is named cannot be had from the Hub: no connection, no access, no such name or split."""


class NoTokenizer(UserError):
    """A model without the files of a tokenizer."""


class NotFinite(UserError):
    """A weight that has NaN or infinite entries."""


class RunFailure(RuntimeError):
    """A run that cannot continue: a full disk, a NaN loss, a failed check. The command line exits with 1.

    The message is one line, and names the paths `safe`, which hold finished work.
    """

    def __init__(self, message: str, safe: Sequence[Path | str] = ()) -> None:
        self.safe: tuple[str, ...] = tuple(str(path) for path in safe)
        kept = f" Safe on disk: {', '.join(self.safe)}." if self.safe else ""
        super().__init__(message + kept)


class DiskFull(RunFailure):
    """A RunFailure because the disk is full."""


class Diverged(RunFailure):
    """A RunFailure because a number is not finite or a loss jumped: the training went wrong, not the machine."""


class Interrupted(Exception):
    """A run that was asked to stop and stopped. The command line exits with 130.

    `checkpoint` is the newest whole one, of `step` optimizer steps, or None. If not `saved`, after a second signal, the
    steps after it are lost. `how` ends the sentence "Continue with", with its blank or colon.
    """

    def __init__(self, step: int, checkpoint: Path | None, *, saved: bool = True, how: str = " --resume.") -> None:
        self.step, self.checkpoint, self.saved = step, checkpoint, saved
        if saved:
            text = f"stopped after step {step}; saved to {checkpoint}."
        elif checkpoint is not None:
            text = f"stopped at once. Safe on disk: {checkpoint} (step {step})."
        else:
            text = "stopped at once; no checkpoint was written yet, so the run starts again at step 0."
        super().__init__(f"{text} Continue with{how}")

    def with_command(self, words: Sequence[str]) -> Interrupted:
        """The same, with the words of the command that goes on."""
        return Interrupted(self.step, self.checkpoint, saved=self.saved, how=f": {shlex.join(words)}")


USER_MISTAKE, FAILURE, INTERRUPT = 2, 1, 130
"""Exit codes of a command."""


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends by this error."""
    if isinstance(error, UserError):
        return USER_MISTAKE
    return INTERRUPT if isinstance(error, Interrupted | KeyboardInterrupt) else FAILURE


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named(error: BaseException) -> str:
    """Class and first line of an error, such as 'ValueError: too long'; the class alone if it has no message."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def not_one_of(where: str, value: object, allowed: Iterable[str]) -> str:
    """The fault of a value that is not in a list: '--split: got 'tset', must be one of train, test. Did you ...?'"""
    names = list(allowed)
    return f"{where}: got {value!r}, must be one of {', '.join(names)}.{nearest(str(value), names)}"


def first_few(names: Sequence[str], most: int = 5) -> str:
    """'a, b and 3 more': the first `most` names, and how many others there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The allowed name closest to `name` as ' Did you mean ...?', or '' if none is close."""
    names = {each.lower(): each for each in reversed(list(allowed))}
    close = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return f" Did you mean '{names[close[0]]}'?" if close else ""


def nearest_entry(directory: Path, name: str) -> str:
    """' Did you mean ...?' for a missing entry of a directory, or '' if none is close."""
    try:
        return nearest(name, os.listdir(directory))
    except OSError:
        return ""


def nearest_path(path: Path) -> str:
    """`nearest_entry` of the first missing part of a path."""
    while path.parent != path and not os.path.exists(path.parent):  # unlike the method it never raises
        path = path.parent
    return nearest_entry(path.parent, path.name)


def not_there(path: Path, kind: str, fix: str) -> str:
    """The fault of a directory that is not what it must be: 'runs/x: is not a run (it has no recipe.yaml). Fix: ...'

    `kind` is 'a run (it has no recipe.yaml)'. A directory that does not exist gets the nearest name instead.
    """
    what = f"is not {kind}." if os.path.exists(path) else f"no such directory.{nearest_path(path)}"
    return f"{path}: {what} Fix: {fix}"
