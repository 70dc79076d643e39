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
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from qdora.errors import FAILURE, Interrupted, RunFailure, UserError, exit_code, named
from qdora.files.atomic import json_text
from qdora.files.console import END_SIGNALS, SAME_REQUEST_SECONDS, is_told_here, leave_closed_terminal, show_only
from qdora.files.machine import CONCURRENT_MANAGED_ACCESS, VIRTUAL_MEMORY_MANAGEMENT, device_attribute
from qdora.recipe.options import Options

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
    """Make flags of the fields of an `Options` parameter; turn errors into one line and an exit code.

    Adds --debug, --quiet and --json.
    """
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    classes = {each.name: each.annotation for each in parameters if _is_options(each.annotation)}
    plain = [each for each in parameters if each.name not in classes]
    flags = [_flag(name, field) for options in classes.values() for name, field in options.model_fields.items()]
    shared = [_parameter("json_", False, Json), _parameter("quiet", False, Quiet), _parameter("debug", False, Debug)]

    @functools.wraps(function)
    def run(*args: Any, json_: bool, quiet: bool, debug: bool, **kwargs: Any) -> None:
        ask(debug=_asked.debug or debug, quiet=_asked.quiet or quiet, json=_asked.json or json_)
        _set_up_output()
        if function.__name__ in COMPUTING:
            let_segments_grow()
        try:
            for name, options in classes.items():
                given = {field: kwargs.pop(field) for field in options.model_fields}
                kwargs[name] = options(**{field: value for field, value in given.items() if value not in (None, [])})
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

    signature = inspect.Signature([*plain, *flags, *shared])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    return run


def _is_options(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Options)


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """The flag of a field. Its values are text, numbers and paths as given: pydantic checks them."""
    kind, default, text = _plain_type(field.annotation), field.default, field.description or ""
    if kind is not bool and default not in (None, ()) and "efault" not in text:
        text = f"{text.rstrip('.')}; default: {default}."
    flags = [f"--{name.replace('_', '-')}", *(["-t"] if name == "tasks" else [])]
    kind, default = (bool, default) if kind is bool else (kind | None, None)
    return _parameter(name, default, Annotated[kind, typer.Option(*flags, help=" ".join(text.split()))])


def _plain_type(annotation: Any) -> Any:
    """`Annotated[int, ...] | None` -> int, `Literal["a"]` -> str, `tuple[str, ...]` -> list[str]."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return str
    if origin is tuple:
        return list[_plain_type(inner[0])]  # type: ignore[misc]
    return annotation if origin is None else _plain_type(inner[0])


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
    (`train/distributed.py`).
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
