"""The run directory: everything a run leaves behind, written so that a kill or a full disk loses nothing finished.

recipe.yaml  environment.json  mix.json  metrics.jsonl  log.txt  checkpoints/step-N/  adapter/
trained.json  eval/*.json  report.html  README.md

A checkpoint is whole if the sizes and check sums in its complete.json agree.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from qdora.errors import Interrupted, RunFailure, UserError, first_line, named, not_there, refuse
from qdora.files.atomic import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    disk_failures,
    is_leftover,
    json_bytes,
    json_value,
    masked,
    read_json_object,
    remove_directory,
    remove_leftovers,
    work_lock,
)

logger = logging.getLogger("qdora")

LOCK = ".lock"
COMPLETE = "complete.json"
PLAN_FILE = "plan.json"
WARNING_MARK, FAILURE_MARK = "WARNING", "FAILURE"  # begin such lines of log.txt, behind the time

# Settings that do not decide what a run learns: how it fits into memory and what it writes.
WITHOUT_EFFECT: tuple[str, ...] = (
    "base.cache",
    "base.residency",
    "base.streamed_blocks",
    "data.cache",
    "memory",
)
WITHOUT_EFFECT += ("trackers", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints")
WITHOUT_EFFECT += ("train.micro_batch_tokens", "train.parallel")
# What a resumed run may change; some of it changes the numbers, which gets a run past a bad step or row.
MAY_CHANGE: tuple[str, ...] = (*WITHOUT_EFFECT, "eval", "interference", "data.max_bad_rows", "model.attention")
MAY_CHANGE += ("train.lr", "train.clip", "train.on_bad_step", "train.max_skips", "train.spike")
MAY_RISE: tuple[str, ...] = ("train.steps", "train.epochs")  # which extends a run


def is_below(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted setting is one of those named, or inside one, as data.mix[0].limit is inside data.mix."""
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def flat(value: Any, prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """{'train': {'lr': 1}} -> {'train.lr': 1}; a list is one value."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    start = f"{prefix}{separator}" if prefix else ""
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in flat(item, f"{start}{key}", separator).items()
    }


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def unharmed(name: str, fix: str = "") -> Iterator[None]:
    """For a file that only informs: a failure to write it is a warning, which ends with `fix`."""
    try:
        yield
    except Exception as error:
        logger.warning("%s was not written: %s%s", name, named(error), fix)


class RunDirectory:
    """One run's files, all below `path`; from `create_run`, `resume_run` or `open_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.log_file = path / "log.txt"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        if self.adapter.is_symlink():  # of an adopted run
            self.adapter = path / self.adapter.readlink()

    @property
    def has_begun(self) -> bool:
        return any(
            path.exists() for path in (self.metrics_file, self.checkpoints, self.adapter, self.path / "eval")
        )

    def evaluation_file(self, step: int) -> Path:
        return self.inside("eval", f"step-{step}.json")

    def checkpoint_path(self, step: int) -> Path:
        return self.inside("checkpoints", f"step-{step}")

    def inside(self, *parts: str) -> Path:
        """A path below the run directory; UserError if it leaves it by .., a link, or being absolute."""
        path, root = self.path.joinpath(*parts), self.path.resolve()
        if root not in path.resolve().parents:
            raise UserError(
                f"{self.path}: {Path(*parts)} is not inside the run. Fix: put it there, not a link."
            )
        return path

    def write_json(self, name: str, value: Any) -> None:
        """Write strict JSON, such as eval/step-0.json."""
        path = self.inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, value)

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, before the checkpoint of its step; readers skip one that was cut off."""
        _append(self.metrics_file, json_bytes(values))

    def read_json(self, name: str) -> dict[str, Any]:
        """What `write_json` wrote; empty without the file."""
        file = self.inside(name)
        return read_json_object(file) if file.is_file() else {}

    def adopted(self) -> dict[str, Any]:
        """{"adopted": what is known of the base} of an adapter that is taken for a run, else {}."""
        return {key: value for key, value in self.read_json("environment.json").items() if key == "adopted"}

    def metrics(self) -> list[dict[str, Any]]:
        return [values for _, values in _metrics_lines(self.metrics_file)]

    def last_step(self) -> int | None:
        lines = self.metrics()
        return int(lines[-1]["step"]) if lines else None

    def truncate_metrics(self, after_step: int, *, evaluates_again: bool = False) -> None:
        """Drop lines and own evaluations of later steps, and cut off lines.

        `evaluates_again` also drops the evaluation of `after_step`, which the run repeats.
        """
        for file in (self.path / "eval").glob("step-*.json"):
            match = re.fullmatch(r"step-(\d+)(-generated)?\.json", file.name)
            if match and int(match[1]) > after_step:
                file.unlink()
        if not self.metrics_file.exists():
            return
        dropped_at = after_step if evaluates_again else None
        content = b"".join(
            line + b"\n"
            for line, values in _metrics_lines(self.metrics_file)
            if values["step"] <= after_step and not ("eval" in values and values["step"] == dropped_at)
        )
        atomic_write_bytes(self.metrics_file, content)

    def log(self, text: str) -> None:
        """Add a line to log.txt: UTC time and `text`, without access tokens."""
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {' '.join(masked(text).splitlines())}\n"
        _append(self.log_file, line.encode("utf-8", "backslashreplace"))

    @contextmanager
    def checkpoint_directory(self, step: int) -> Iterator[Path]:
        """A directory to fill, which becomes the checkpoint of `step` when the block ends."""
        with atomic_directory(self.checkpoint_path(step)) as path:
            yield path
            write_complete(path, step)

    def result_directory(self, *parts: str) -> AbstractContextManager[Path]:
        """A directory to fill, which gets its name below the run when the block ends."""
        return atomic_directory(self.inside(*parts))

    def checkpoint_steps(self) -> list[int]:
        """Ascending, whole or not."""
        folders = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*") if path.is_dir())
        return sorted(int(step) for step in folders if step.isdecimal())

    def newest_checkpoint(self) -> Path | None:
        """The whole checkpoint of the largest step, None if there is none; RunFailure if all are damaged."""
        damaged: list[str] = []
        for path in self._newest_first():
            if (fault := checkpoint_fault(path)) is not None:
                damaged.append(f"{path.name}: {fault}")
                continue
            for line in damaged:
                logger.warning("Skipped a damaged checkpoint: %s. Using %s instead.", line, path)
            return path
        if damaged:
            raise RunFailure(f"{self.checkpoints}: all checkpoints are damaged ({'; '.join(damaged)}).")
        return None

    def what_is_safe(self) -> list[Path]:
        """The newest whole checkpoint, if there is one."""
        return [path for path in self._newest_first() if checkpoint_fault(path) is None][:1]

    def prune_checkpoints(self, keep: int, needs: Callable[[Path], int | None] = lambda _: None) -> int:
        """Keep the newest `keep` whole checkpoints and the steps they need; returns how many are removed."""
        whole = [path for path in self._newest_first() if checkpoint_fault(path, sums=False) is None]
        kept = {path.name for path in whole[:keep]} | {f"step-{needs(path)}" for path in whole[:keep]}
        # If none is whole, the damaged ones stay for inspection.
        removed = [path for path in self._newest_first() if whole and not (path in whole and path.name in kept)]
        for path in removed:
            remove_directory(path)
        return len(removed)

    def _newest_first(self) -> list[Path]:
        return [self.checkpoint_path(step) for step in reversed(self.checkpoint_steps())]


@contextmanager
def only_process(path: Path, *, resume: bool) -> Iterator[None]:
    """Let no other process train in the run directory while the block runs; a new one is made."""
    if resume and not path.is_dir():
        open_run(path)
    with ExitStack() as stack:
        with disk_failures(path, "choose another --run-dir"):
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(work_lock(path / LOCK, str(path)))
        yield


def create_run(path: Path, recipe: str, environment: Mapping[str, Any]) -> RunDirectory:
    """Start a run in a directory that is new or empty, or holds a run without a result. `recipe` is resolved YAML."""
    run = RunDirectory(path)
    if run.recipe_file.exists() and run.has_begun:
        raise UserError(f"{path}: holds a run. Fix: resume it with --resume, or choose another --run-dir.")
    with disk_failures(path, "choose another --run-dir"):
        path.mkdir(parents=True, exist_ok=True)
        # The environment is written first: a directory with another recipe.yaml alone may be somebody's own.
        others = sorted({entry.name for entry in path.iterdir() if not is_leftover(entry)} - {LOCK})
        if others and not run.environment_file.exists():
            raise UserError(
                f"{path}: must be new or empty (got {others[0]} in it). Fix: choose another --run-dir."
            )
        _clear(path)
        (path / PLAN_FILE).unlink(missing_ok=True)  # of an earlier start, whose recipe may have been another
        atomic_write_json(run.environment_file, environment)
        atomic_write_text(run.recipe_file, recipe)
    return run


def _clear(path: Path) -> None:
    remove_leftovers(path)
    for folder in path.iterdir():
        remove_leftovers(folder)


def chat_date_of(path: Path) -> str:
    """The day on which chats of a run are rendered, YYYY-MM-DD: of its first start, or today."""
    record = RunDirectory(path).read_json("environment.json")
    return str(record.get("chat_date") or date.today().isoformat())


def resume_run(path: Path, recipe: str, environment: Mapping[str, Any], *, before: str) -> RunDirectory:
    """Remove leftovers, and record what differs in the environment since the last start.

    `recipe` is the one to continue with, `before` the run's own with all defaults, both YAML. UserError if the recipe
    differs in a setting that changes the training.
    """
    run = open_run(path)
    old, new = flat(yaml.safe_load(before)), flat(yaml.safe_load(recipe))
    last, now = read_json_object(run.environment_file), json_value(environment)
    faults = []
    for key in dict.fromkeys((*old, *new)):
        was, got, can_rise = old.get(key), new.get(key), key in MAY_RISE
        # A length that is missing is reported by the other unit's line.
        if (
            was == got
            or is_below(key, MAY_CHANGE)
            or (can_rise and (got is None or (was is not None and got > was)))
        ):
            continue
        must = f"must be {was!r}{' or more' if can_rise and was is not None else ''}, as when the run started"
        moved = (
            f", or if a file was moved, write its path into {run.recipe_file}" if "/" in f"{was} {got}" else ""
        )
        faults.append(f"{path}: {key}: {must} (got {got!r}). Fix: start another --run-dir{moved}.")
    refuse(faults)
    _clear(path)
    if run.recipe_file.read_text(encoding="utf-8") != recipe:
        atomic_write_text(run.recipe_file, recipe)
    if former := {key: last.get(key) for key, value in now.items() if last.get(key) != value}:
        atomic_write_json(run.environment_file, {**last, **now, "former": [*last.get("former", []), former]})
    return run


def open_run(path: Path) -> RunDirectory:
    """A finished or interrupted run. UserError if there is none."""
    run = RunDirectory(path)
    if not run.recipe_file.is_file():
        raise UserError(not_there(path, "a run (it has no recipe.yaml)", "name the directory of a run."))
    return run


def _metrics_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line without its end, values) of every whole line."""
    content = path.read_bytes() if path.exists() else b""
    for line in content.split(b"\n"):
        with suppress(ValueError):  # a kill has cut the line off
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                yield line, values


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(content)


def write_complete(path: Path, step: int) -> None:
    """Write complete.json, the last file of a checkpoint, which lists the files below `path`."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    listed = {file.relative_to(path).as_posix(): _size_and_sum(file) for file in files}
    atomic_write_json(path / COMPLETE, {"step": step, "files": listed})


def checkpoint_fault(path: Path, *, sums: bool = True) -> str | None:
    """Why a step-N directory is not a whole checkpoint, or None; without `sums` by the sizes alone."""
    try:
        listed = json.loads((path / COMPLETE).read_bytes())["files"]
        for name, facts in listed.items():
            file = path / name
            if not file.resolve().is_relative_to(path.resolve()):
                return f"{name} is outside"
            size = file.stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes, not {facts['bytes']}"
            if sums and _size_and_sum(file) != facts:
                return f"{name} has changed"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE} is damaged"
    return None


def _size_and_sum(file: Path) -> dict[str, Any]:
    """Against torn writes and bad disks, not against malice."""
    total = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total = zlib.crc32(block, total)
        return {"bytes": stream.tell(), "crc32": f"{total:08x}"}


@contextmanager
def log_to(run: RunDirectory) -> Iterator[None]:
    """Copy what qdora logs into the run's log.txt."""

    def emit(record: logging.LogRecord) -> None:
        mark = f"{WARNING_MARK} " if record.levelno >= logging.WARNING else ""
        with suppress(OSError):  # the line goes on to the console, also with a full disk
            run.log(f"{mark}{record.getMessage()}")

    handler, level = logging.Handler(logging.INFO), logger.level
    handler.emit = emit  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def failures_logged(path: Path, verb: str) -> Iterator[None]:
    """Add a failure of `qdora <verb>` to the log.txt of a run: its traceback, then `FAILURE <verb>: <error>`."""
    try:
        yield
    except (UserError, Interrupted, BrokenPipeError):
        raise
    except Exception as error:
        run = RunDirectory(path)
        if run.recipe_file.is_file():
            kind = "" if isinstance(error, RunFailure) else f"{type(error).__name__}: "
            with suppress(OSError):  # a full disk must not hide the failure
                _append(
                    run.log_file, masked("".join(traceback.format_exception(error))).encode("utf-8", "replace")
                )
                run.log(f"{FAILURE_MARK} {verb}: {kind}{first_line(error)}")
        raise
