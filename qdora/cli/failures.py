"""What every verb shares: how an error becomes one line and an exit code, and how a result is printed."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from qdora.errors import Interrupted, RunFailure, UserError
from qdora.files.atomic import json_text

USER_MISTAKE, FAILURE, INTERRUPT = 2, 1, 130

# The last three lines stand for bugs: they, too, end in one line, and --debug shows where.
EXPECTED = (
    UserError,
    RunFailure,
    Interrupted,
    KeyboardInterrupt,
    OSError,
    MemoryError,
    RuntimeError,
    ValueError,
    ImportError,
    LookupError,
    TypeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
)

_options = {"debug": False}


def set_debug(on: bool) -> None:
    """Whether errors show where they were raised."""
    _options["debug"] = on


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turn what a verb raises into one line and an exit code; --debug lets it through."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except EXPECTED as error:
            if _options["debug"]:
                raise
            text, code = explain(error)
            # All processes of a launch read the same recipe and files: one a machine is enough to say what is wrong
            if not isinstance(error, UserError | Interrupted) or os.environ.get("LOCAL_RANK", "0") == "0":
                print(text, file=sys.stderr)
            raise typer.Exit(code) from None

    return run


def explain(error: BaseException) -> tuple[str, int]:
    """The line (or lines, one per fault) and the exit code of an error."""
    if isinstance(error, UserError):
        return str(error), USER_MISTAKE
    if isinstance(error, Interrupted):
        return str(error), INTERRUPT
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPT
    if isinstance(error, RunFailure):
        return str(error), FAILURE
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]} (qdora --debug shows where)", FAILURE


def emit(result: dict[str, Any], as_json: bool, *, plain: str | None = None) -> None:
    """One JSON document, or the verb's own text; a verb that shows its result while it runs gives no text."""
    if as_json:
        print(json_text(result, indent=2))
    elif plain is not None:
        sys.stdout.write(plain)
