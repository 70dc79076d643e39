"""How every verb runs: the options of all verbs, errors as one line and an exit code, results on stdout."""

from __future__ import annotations

import functools
import inspect
import io
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any

import typer

from qdora.errors import FAILURE, Interrupted, RunFailure, UserError, exit_code, named
from qdora.files.atomic import json_text
from qdora.files.console import is_told_here, show_only
from qdora.files.end_signals import END_SIGNALS, SAME_REQUEST_SECONDS, leave_closed_terminal
from qdora.files.nvidia_driver import CONCURRENT_MANAGED_ACCESS, VIRTUAL_MEMORY_MANAGEMENT, device_attribute

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only results and errors, no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

COMPUTING = ("train", "evaluate", "export", "generate", "rank", "study")
"""Functions of the verbs that compute on a GPU."""

NOISY = ("transformers", "httpx", "datasets", "accelerate", "bitsandbytes", "matplotlib", "fsspec", "lm_eval")


@dataclass
class _Asked:
    """The options of this process, given before or after the verb."""

    debug: bool = False
    quiet: bool = False
    json: bool = False


_asked = _Asked()


def ask(*, debug: bool, quiet: bool, json: bool) -> None:
    """Set the options of this process. Those given after the verb are added to those before it."""
    _asked.debug, _asked.quiet, _asked.json = debug, quiet, json


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Add --debug, --quiet and --json to a verb, and turn its errors into one line and an exit code."""
    signature = inspect.signature(function)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("json_", Json), ("quiet", Quiet), ("debug", Debug))
    ]

    @functools.wraps(function)
    def run(*args: Any, json_: bool, quiet: bool, debug: bool, **kwargs: Any) -> None:
        ask(debug=_asked.debug or debug, quiet=_asked.quiet or quiet, json=_asked.json or json_)
        _set_up_output()
        if function.__name__ in COMPUTING:
            let_segments_grow()
        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:  # any error becomes one line
            if _asked.debug:
                raise
            text, code = explain(error)
            # All processes of a launch find the same mistake, so one per machine reports it.
            if not isinstance(error, UserError | Interrupted) or os.environ.get("LOCAL_RANK", "0") == "0":
                print(text, file=sys.stderr)
            raise typer.Exit(code) from None

    annotated = inspect.signature(function, eval_str=True).parameters.values()
    run.__signature__ = signature.replace(parameters=[*annotated, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*annotated, *shared)}
    return run


ALLOCATOR, OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
"""Settings of torch's allocators, read as torch is imported, and their older name, which torch reads, too."""


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's CUDA allocator extend its segments, unless the user has set it up or the driver cannot map memory.

    Micro-batches have many lengths. Segments of fixed sizes are cut into pieces that the next length does not fit.
    WSL2 and Jetsons say that they map memory and fail at it (github.com/pytorch/pytorch/issues/192330,
    github.com/ggml-org/llama.cpp/issues/4680). Neither has concurrent managed access.
    """
    needed = VIRTUAL_MEMORY_MANAGEMENT, CONCURRENT_MANAGED_ACCESS
    if not {ALLOCATOR, OLD_ALLOCATOR} & environment.keys() and all(map(device_attribute, needed)):
        environment[ALLOCATOR] = "expandable_segments:True"


def _set_up_output() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal shows the text of a model in escapes
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    is_first = os.environ.get("RANK", "0") == "0"  # all processes of a launch do the same things
    # The level is set on the handler: a run lowers that of its logger, so that log.txt gets everything.
    handler = logging.getLogger().handlers[0]
    handler.setLevel(logging.INFO if is_first and not _asked.quiet else logging.WARNING)
    handler.addFilter(functools.partial(is_told_here, is_first=is_first))
    warnings.filterwarnings("ignore", "CUDA initialization")  # `check_gpu` says why, or the GPU is hidden
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    show_only(progress=not _asked.quiet, results=not _asked.json)


def end_as_by_ctrl_c(environment: Mapping[str, str] = os.environ) -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that what they end is cleaned up and tells what is safe.

    A signal that is ignored stays so. A process of a launch keeps the defaults: its launcher ends it after another one
    has failed, and that one's reason is to be told, not this end. While a run takes steps it handles signals itself
    (`train/interrupt.py`).
    """
    if "WORLD_SIZE" in environment:
        return
    here, asked_at = os.getpid(), -math.inf

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != here:  # a worker that a library forks is ended by SIGTERM, too, and has nothing to tell
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        nonlocal asked_at
        before, asked_at = asked_at, time.monotonic()
        leave_closed_terminal(number)
        if asked_at - before >= SAME_REQUEST_SECONDS:  # else it would cut off what the first one has begun to clean up
            signal.default_int_handler(number, frame)

    for number in END_SIGNALS:
        if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


def explain(error: BaseException) -> tuple[str, int]:
    """The message of an error (one line; one per fault of a UserError) and its exit code."""
    text = f"{named(error)} (--debug shows the traceback)"
    if isinstance(error, UserError | Interrupted | RunFailure):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    return text, exit_code(error)


def emit(result: dict[str, Any], *, plain: str | None = None) -> None:
    """Print the result: with --json as one JSON document, else `plain`, unless the verb has printed it itself."""
    try:
        in_ascii = not (sys.stdout.encoding or "").lower().startswith("utf")
        sys.stdout.write(json_text(result, indent=2, in_ascii=in_ascii) + "\n" if _asked.json else plain or "")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails
        raise typer.Exit(FAILURE) from None


def wants_json() -> bool:
    """Whether --json was given: standard output is then one JSON document."""
    return _asked.json
