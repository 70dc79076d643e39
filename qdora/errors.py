"""The three ways in which qdora stops early: the user's mistake, a failure, an interrupt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

USER_MISTAKE, FAILURE, INTERRUPT = 2, 1, 130  # exit codes of a command


class UserError(ValueError):
    """A mistake in what the user gave: a file, a recipe, an argument. One line per fault, of many the first 20."""

    def __init__(self, *faults: str) -> None:
        # A damaged file may bring in control characters, or a name of a megabyte.
        lines = (
            "".join(char if char.isprintable() else " " for char in fault) for fault in shorten(faults, 20)
        )
        self.faults: tuple[str, ...] = tuple(line[:2000] for line in lines)
        super().__init__("\n".join(self.faults))


class HubFailure(UserError):
    """No connection to the Hub, no access, no such name or split."""


class NoTokenizer(UserError): ...


class NotFinite(UserError): ...  # NaN or infinity in a weight


class RunFailure(RuntimeError):
    """A run that cannot continue: a full disk, a NaN loss, a failed check. `safe` are paths of finished work."""

    def __init__(self, message: str, safe: Sequence[Path | str] = ()) -> None:
        self.safe = tuple(map(str, safe))
        super().__init__(message + (f" Safe on disk: {', '.join(self.safe)}." if safe else ""))


class Diverged(RunFailure): ...  # a number is not finite or a loss jumped


class Interrupted(Exception):
    """Stopped after `step`; if not `saved`, by a second signal, the steps after `checkpoint` are lost."""

    def __init__(self, step: int, checkpoint: Path | None, *, saved: bool = True) -> None:
        text = f"stopped after step {step}; saved to {checkpoint}."
        if not saved:
            safe = (
                f"Safe on disk: {checkpoint} (step {step})" if checkpoint else "no checkpoint was written yet"
            )
            text = f"stopped at once. {safe}."
        super().__init__(f"{text} The same command continues, that of a training run with --resume.")


def refuse(faults: Sequence[str]) -> None:
    """UserError with these faults, if there are any."""
    if faults:
        raise UserError(*faults)


def exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return USER_MISTAKE
    return INTERRUPT if isinstance(error, Interrupted | KeyboardInterrupt) else FAILURE


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named(error: BaseException) -> str:
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def shorten(texts: Sequence[str], most: int = 10) -> list[str]:
    """The first texts and 'and 3 more'; all of them if it would be 1 more, so that shortening twice changes nothing."""
    more = len(texts) - most
    return list(texts) if more <= 1 else [*texts[:most], f"and {more:,} more"]


def first_few(names: Sequence[str], most: int = 5) -> str:
    """'a, b, and 3 more'."""
    return ", ".join(shorten(names, most))


def not_one_of(where: str, value: object, allowed: Iterable[str]) -> str:
    return f"{where}: got {value!r}, must be one of {', '.join(allowed)}."


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The allowed name closest to `name` as ' Did you mean ...?', or ''."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def not_there(path: Path, kind: str, fix: str) -> str:
    """The fault of a directory that is not `kind`, such as 'a run (it has no recipe.yaml)', or does not exist."""
    return f"{path}: {f'is not {kind}' if path.exists() else 'no such directory'}. Fix: {fix}"
