"""A life of a model that is disturbed at seeded moments: does the restart reach what nothing would have disturbed?

    python benchmarks/hostile/moments.py [--count 200] [--seed 0] [--out FILE]

A random Llama of two blocks in NF4. Four lives, each of commands as a user gives them:

    train     start, plan, load (through a base cache), train, evaluate, checkpoints, best step
    export    of a finished run: merged, and nf4-lora
    study     four cells on a pruned base, and their report
    pair      two processes train one run, joined by gloo

A moment is an operation on files (an open, a rename, a removal, the start or end of a tensor file), a step, or a share
of the CPU time that the undisturbed life took. What happens there:

    kill        SIGKILL
    term, int   the signal; sometimes a second one a few operations later, which stops at once
    full        ENOSPC once, or at every write from then on, or no file can grow beyond some bytes (RLIMIT_FSIZE)

A disturbed life must end by itself, with one clear line if it could say one. The same commands again (train: --resume)
must then reach the undisturbed life's files bit for bit, but for times and places; a run removes older checkpoints to
go on with a full disk, so those may be missing. Beside them:

    second      a second process is started on the directory of a first, which is in the middle of its work
    read_only   from a moment on nothing in the life's directory can be changed; then it can again
    clock       the clock is set back a week, and files that were written before have times in the future
    cache       the base cache is removed, or replaced by that of another model, under a running job
    cut         a file of the newest checkpoint is cut short

Every life is a process of its own, forked from this one, which has imported all that it needs. Linux only.
"""

from __future__ import annotations

import csv
import errno
import gc
import hashlib
import importlib
import json
import math
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from byte_tokenizer import write_model
from matplotlib.figure import Figure
from measure import facts, launch_variables, parser_of, write

from qdora.files.atomic import is_leftover
from qdora.files.run_directory import RunDirectory
from qdora.train import interrupt, loop

STEPS = 6
LIVES = ("train", "export", "study", "pair")
EVENTS = ("kill", "term", "int", "full")
WAYS = ("operation", "step", "time")
SIGNALS = {"kill": signal.SIGKILL, "clock": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
MOST_SECONDS = 120
"""A life that takes longer hangs; undisturbed, the longest takes 15 s on a busy core."""
HEAVY = (
    "qdora.cli.train",
    "qdora.run.train",
    "qdora.export.export_run",
    "qdora.study.runner",
    "qdora.study.report",
    "transformers.models.llama.modeling_llama",
    "matplotlib.backends.backend_svg",
    "pyarrow.parquet",
    "torch.distributed",
)
STILL = os.WEXITED | os.WNOHANG | os.WNOWAIT


@dataclass(frozen=True)
class Moment:
    """When something happens to a life, and what.

    Attributes:
        event: One of EVENTS, or of the cases beside them.
        way: One of WAYS.
        share: Place in the life, 0 to 1.
        again: Operations until a second signal; None for one signal.
        full: once, always, or the bytes that a file can have.
        rank: The process of a pair that it happens to; None: to both.
    """

    life: str
    event: str
    way: str
    share: float
    again: int | None = None
    full: str | int = "once"
    rank: int | None = 0

    def in_words(self) -> str:
        """For the list of faults."""
        more = f", {self.full}" if self.event == "full" else "" if self.again is None else f", again after {self.again}"
        who = f", process {self.rank}" if self.life == "pair" else ""
        return f"{self.life}: {self.event} at {self.share:.3f} by {self.way}{more}{who}"


class Shared:
    """Counts that a child writes and this process reads: operations, steps, whether its moment came, commands done."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 32)

    def __getitem__(self, index: int) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * index)[0])

    def __setitem__(self, index: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * index, value)


OPERATIONS, NUM_STEPS, CAME, NUM_COMMANDS = range(4)
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime", "shutil.rmtree")
_TAKES_ROOM = ("open", "os.mkdir", "os.link", "os.rename")


class Watch:
    """Counts a child's operations below a directory, and does something at one of them. It stays until the child ends.

    Args:
        root: The life's directory.
        counts: Where the counts go.
        operation, step: Number of the operation or step at which `action` is called, from 1; 0 for none.
    """

    def __init__(
        self, root: Path, counts: Shared, *, operation: int = 0, step: int = 0, action: Callable[[Watch], None]
    ) -> None:
        self.root, self.counts, self.action = str(root), counts, action
        self.operation, self.step = operation, step
        self.refusal: int | None = None
        self.refuses_once = False
        self.later: dict[int, Callable[[], None]] = {}
        self._inside = False
        self._watch_files()
        self._watch_steps()

    def came(self) -> None:
        """The moment is here."""
        self.counts[CAME] = 1
        self.action(self)

    def seen(self, event: str, path: str) -> None:
        """Count an operation; raises OSError if the disk refuses it."""
        if self._inside:
            return
        self._inside = True
        try:
            self.counts[OPERATIONS] += 1
            number = self.counts[OPERATIONS]
            if number == self.operation:
                self.came()
            if number in self.later:
                self.later.pop(number)()
        finally:
            self._inside = False
        room = event in _TAKES_ROOM or (self.refusal == errno.EROFS and event in _CHANGES)
        if self.refusal is not None and room:
            code, self.refusal = self.refusal, None if self.refuses_once else self.refusal
            raise OSError(code, os.strerror(code), path)

    def _watch_files(self) -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event not in _CHANGES and event != "open":
                return
            path = args[0]
            if isinstance(path, bytes):
                path = os.fsdecode(path)
            relative = event in ("os.remove", "os.rmdir") and args[-1] != -1  # shutil.rmtree goes by descriptors
            if not isinstance(path, str) or not (relative or path.startswith(self.root)):
                return
            writes = event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self.seen(event if writes else "read", path)

        sys.addaudithook(hook)

    def _watch_steps(self) -> None:
        real = loop.step_gradient

        def step_gradient(*args: Any, **options: Any) -> Any:
            found = real(*args, **options)
            self.counts[NUM_STEPS] += 1
            if self.counts[NUM_STEPS] == self.step:
                self.came()
            return found

        loop.step_gradient = step_gradient


def happens(moment: Moment) -> Callable[[Watch], None]:
    """What a child does to itself at the moment."""

    def act(watch: Watch) -> None:
        if moment.event in EVENTS and moment.event != "full":
            number = SIGNALS[moment.event]
            if moment.again is not None:
                interrupt.SAME_REQUEST_SECONDS = 0.0
                watch.later[watch.counts[OPERATIONS] + moment.again] = lambda: os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        elif moment.event == "full" and isinstance(moment.full, int):
            resource.setrlimit(resource.RLIMIT_FSIZE, (moment.full, resource.RLIM_INFINITY))
        elif moment.event == "full":
            watch.refusal, watch.refuses_once = errno.ENOSPC, moment.full == "once"
        elif moment.event == "read_only":
            watch.refusal = errno.EROFS
        elif moment.event == "second":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif moment.event == "clock":
            set_clock_back()
            watch.later[watch.counts[OPERATIONS] + (moment.again or 0)] = lambda: os.kill(os.getpid(), signal.SIGKILL)
        else:
            shutil.rmtree(Path(watch.root, "cache"), ignore_errors=True)
            if moment.event == "cache replaced":
                shutil.copytree(Path(watch.root).parent / "other-cache", Path(watch.root, "cache"))

    return act


def set_clock_back() -> None:
    """A week, for Python code; the monotonic clocks go on."""
    week, now, now_ns = 7 * 24 * 3600, time.time, time.time_ns
    gmtime, localtime = time.gmtime, time.localtime
    time.time = lambda: now() - week
    time.time_ns = lambda: now_ns() - week * 10**9
    time.gmtime = lambda seconds=None: gmtime(time.time() if seconds is None else seconds)
    time.localtime = lambda seconds=None: localtime(time.time() if seconds is None else seconds)


class Child:
    """A process that runs commands of qdora; what it prints goes through a pipe, which no limit on files touches.

    Attributes:
        status: Its exit code, or the negative number of a signal; None while it runs.
        spent: CPU seconds, in steps of a clock tick.
        hung: Whether it had to be killed.
    """

    def __init__(self, pid: int, counts: Shared, output: int) -> None:
        self.pid, self.counts, self._output = pid, counts, output
        self._said = bytearray()
        self.status: int | None = None
        self.spent, self.hung = 0.0, False
        os.set_blocking(output, False)

    def is_over(self) -> bool:
        """Whether it has ended; `status` then is its exit code, or the negative number of a signal."""
        if self.status is not None:
            return True
        self._read()
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        self.spent = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if os.waitid(os.P_PID, self.pid, STILL) is not None:
            self._read()
            os.close(self._output)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status is not None

    def text(self) -> str:
        """What it has printed."""
        return self._said.decode(errors="replace")

    def last_line(self) -> str:
        """The last line that it printed and that is not blank."""
        return next((line for line in reversed(self.text().splitlines()) if line.strip()), "")

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while block := os.read(self._output, 1 << 16):
                self._said += block


def send(children: Sequence[Child], number: int) -> None:
    """Send a signal to those that still run."""
    for child in children:
        if child.status is None:
            child.counts[CAME] = 1
            os.kill(child.pid, number)


def stop_hung(children: Sequence[Child]) -> None:
    """Kill those that still run; they hang."""
    for child in children:
        child.hung = child.hung or child.status is None
    send(children, signal.SIGKILL)


def started(
    commands: Sequence[Sequence[str]],
    root: Path,
    *,
    operation: int = 0,
    step: int = 0,
    action: Callable[[Watch], None] = lambda _: None,
    environment: dict[str, str] | None = None,
) -> Child:
    """Fork a process that runs the commands one after the other until one fails."""
    counts = Shared()
    ours, theirs = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(ours)
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.update({"XDG_CACHE_HOME": str(root / "home"), **(environment or {})})
            Watch(root, counts, operation=operation, step=step, action=action)
            status = run_commands(commands, counts)
            sys.stdout.flush()
            sys.stderr.flush()
        except KeyboardInterrupt:  # outside of a command, where Python itself would stop
            status = 130
        finally:
            os._exit(status)
    os.close(theirs)
    return Child(pid, counts, ours)


def run_commands(commands: Sequence[Sequence[str]], counts: Shared) -> int:
    """Run commands of qdora in this process; the status of the first that fails, or 0."""
    from qdora.cli import app

    for command in commands:
        try:
            app(list(command), standalone_mode=True)
        except SystemExit as end:
            if end.code:
                return end.code if isinstance(end.code, int) else 1
        counts[NUM_COMMANDS] += 1
    return 0


def prepare(root: Path) -> None:
    """Model, data, recipes and study; imports what the children need."""
    for name in HEAVY:
        importlib.import_module(name)
    # Drawing takes 40 % of a life's time, and writes nothing.
    Figure.savefig = lambda _figure, stream, **_options: stream.write("<svg></svg>")
    write_model(root / "model")
    write_model(root / "other", seed=1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for name, step in (("next", 1), ("after", 2)):
        rows = [
            {
                "task": name,
                "id": str(index),
                "context": "",
                "question": f"{name} of {letter}?",
                "choices": [letters[(index + step) % 26], letters[index]],
                "answer": 0,
            }
            for index, letter in enumerate(letters)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"source": str(root / "model"), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        "data": {"mix": [{"source": str(root / f"{name}.jsonl")} for name in ("next", "after")], "max_length": 64},
        "train": {"steps": STEPS, "batch": 4, "lr": 0.5, "optimizer": "adamw", "checkpoint_every": 1},
        "eval": {"limit": 3, "every": 2, "best_by": "macro"},
        "memory": {"budget": "4GiB"},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = {
        "recipe": str(root / "recipe.yaml"),
        "settings": {
            "train.steps": 2,
            "eval.every": None,
            "eval.best_by": None,
            "base.prune.method": "magnitude",
            "base.prune.sparsity": 0.5,
        },
        "product": {"adapter": {kind: {"adapter.kind": kind} for kind in ("lora", "dora")}},
        "seeds": [0],
        "compare": {"reference": "lora"},
    }
    (root / "study.yaml").write_text(yaml.safe_dump(study))


def commands(life: str, root: Path, place: Path) -> list[list[str]]:
    """What a user types to start a life in the directory `place`, or to start it again."""
    if life == "export":
        formats = ([], ["--format", "nf4-lora"])
        return [["export", str(place / "run"), str(place / f"out{n}"), *each] for n, each in enumerate(formats)]
    if life == "study":
        run = ["study", str(root / "study.yaml"), "--dir", str(place / "study"), "--retry-failed"]
        return [run, ["report", str(place / "study")]]
    resume = ["--resume"] if (place / "run/recipe.yaml").exists() else []
    cache = f"base.cache={place / 'cache'}"
    return [["train", str(root / "recipe.yaml"), "-s", cache, "-d", str(place / "run"), *resume]]


class Lives:
    """Runs lives in directories below `root`, and knows how the undisturbed ones end.

    Attributes:
        whole: Life -> its undisturbed directory.
        sizes: Life -> operations, steps and CPU seconds of each process of the undisturbed life.
    """

    def __init__(self, root: Path, lives: Sequence[str] = LIVES) -> None:
        self.root = root
        self.whole: dict[str, Path] = {}
        self.sizes: dict[str, list[tuple[int, int, float]]] = {}
        prepare(root)
        gc.freeze()  # a child's collections pass over what it shares with this process
        for life in lives:
            place = self.place(life, f"whole-{life}")
            children = self.run(life, place)
            if any(child.status for child in children):
                raise RuntimeError(f"the undisturbed {life} fails:\n{children[0].text()[-4000:]}")
            if life == "train":
                shutil.copytree(place / "cache", root / "other-cache")
                for file in (root / "other-cache").glob("*/base.json"):
                    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"key": "0" * 64, "source": "other"}))
            self.whole[life] = place
            self.sizes[life] = [(each.counts[OPERATIONS], each.counts[NUM_STEPS], each.spent) for each in children]

    def place(self, life: str, name: str) -> Path:
        """A directory in which the life can start: empty, or with the finished run that is exported."""
        place = self.root / name
        place.mkdir()
        if life == "export":
            for part in ("run", "cache"):
                shutil.copytree(self.whole["train"] / part, place / part)
        return place

    def run(
        self,
        life: str,
        place: Path,
        moment: Moment | None = None,
        *,
        num_done: int = 0,
    ) -> list[Child]:
        """Run a life's commands but the first `num_done` to their end, disturbed at the moment if there is one.

        In a pair the other process gets SIGTERM when one has failed, as a launcher sends it.
        """
        children = self.start(life, place, moment, num_done=num_done)
        waiting = moment is not None and moment.way == "time"
        failed_at, began = None, time.monotonic()
        while sum(child.is_over() for child in children) < len(children):
            now = time.monotonic()
            if moment is not None and waiting:
                rank = moment.rank or 0
                waiting = children[rank].spent < moment.share * self.sizes[life][rank][2]
                if not waiting:
                    send(children if moment.rank is None else [children[rank]], SIGNALS[moment.event])
            if failed_at is None and any(child.status for child in children):
                failed_at = now
            if failed_at is not None and now - failed_at > 1.0:
                failed_at = now + MOST_SECONDS  # once
                send(children, signal.SIGTERM)
            if now - began > MOST_SECONDS:
                stop_hung(children)
            time.sleep(0.002)
        return children

    def start(
        self,
        life: str,
        place: Path,
        moment: Moment | None = None,
        *,
        num_done: int = 0,
    ) -> list[Child]:
        """Start the processes of a life."""
        children = []
        for rank, variables in enumerate(launch_variables(2) if life == "pair" else [{}]):
            at = {}
            if moment is not None and moment.rank in (None, rank) and moment.way != "time":
                size = self.sizes[life][rank][("operation", "step").index(moment.way)]
                at = {moment.way: 1 + int(moment.share * size), "action": happens(moment)}
            children.append(
                started(
                    commands(life, self.root, place)[num_done:],
                    place,
                    environment=variables,
                    **at,
                )
            )
        return children

    def faults(self, life: str, place: Path, event: str = "") -> list[str]:
        """How a life's end differs from that of the undisturbed one."""
        ours, theirs = outcome(life, place), outcome(life, self.whole[life])
        names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if event == "full":
            names = [name for name in names if name in ours or not is_older_checkpoint(name, ours)]
        found = [f"{name} {'differs' if name in ours and name in theirs else 'is missing or new'}" for name in names]
        return found if len(found) < 6 else [*found[:5], f"and {len(found) - 5} more files"]


def outcome(life: str, place: Path) -> dict[str, Any]:
    """What must be equal after a life: name -> content without times and places, or a hash."""
    if life == "export":
        return {f"out{n}/{name}": value for n in range(2) for name, value in tree(place / f"out{n}").items()}
    if life == "study":
        found = {}
        for file in sorted((place / "study/results").glob("*.json")):
            found[f"results/{file.stem}"] = without(json.loads(file.read_bytes()), "seconds")
        for file in sorted((place / "study/report").glob("*.csv")):
            with file.open(newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if row.get("fact") not in ("hours", "failed attempts")]
            found[file.name] = without(rows, "seconds", "num_failures", "reason")
        for cell in sorted((place / "study/cells").iterdir()):
            found |= {f"{cell.name}/{name}": value for name, value in run_files(cell).items()}
        return found | leftovers(place / "study/cells")
    return run_files(place / "run") | leftovers(place / "run") | leftovers(place / "cache")


def is_older_checkpoint(name: str, kept: Iterable[str]) -> bool:
    """Whether a file is of a checkpoint that is gone as a whole, while a newer one of its run is kept."""
    found = re.match(r"(.*checkpoints/step-)(\d+)/", name)
    if found is None:
        return False
    steps = {int(each[1]) for file in kept if (each := re.match(re.escape(found[1]) + r"(\d+)/", file))}
    return int(found[2]) not in steps and max(steps, default=0) > int(found[2])


def run_files(run: Path) -> dict[str, Any]:
    """The results of a run."""
    lines = [without(line, "time") for line in RunDirectory(run).metrics()]
    return tree(run) | {"metrics.jsonl": lines}


def tree(folder: Path) -> dict[str, Any]:
    """Every file below a folder: its bytes hashed, JSON without what times and places have put into it."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.name == "log.txt":
            continue
        if name in ("recipe.yaml", "environment.json", "README.md", "report.html") or file.suffix == ".svg":
            found[name] = "is there"  # it names the directory or times
        elif file.parent.name == "eval" or file.name in ("export.json", "plan.json"):
            found[name] = without(json.loads(file.read_bytes()), "seconds", "directory", "run")
        else:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def leftovers(folder: Path) -> dict[str, str]:
    """Files of unfinished writes."""
    return {f"leftover {path.name}": "" for path in folder.rglob("*") if is_leftover(path)}


def without(value: Any, *keys: str) -> Any:
    """JSON values without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, *keys) for key, item in value.items() if key not in keys}
    return [without(item, *keys) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Found:
    """What became of a moment: whether it came, how its life ended, and what was wrong."""

    moment: Moment
    came: bool
    ends: tuple[int | None, ...]
    line: str
    faults: tuple[str, ...]


REASONS = {"full": "the disk is full", "read_only": os.strerror(errno.EROFS)}


def said_faults(child: Child, event: str) -> list[str]:
    """What is wrong with how a disturbed process ended and what it said."""
    text, status = child.text(), child.status or 0
    last = child.last_line()
    faults = ["hangs"] if child.hung else []
    faults += [f"prints {sign!r}" for sign in ("Traceback", "Logging error", "Exception ignored") if sign in text]
    if status < 0 and not child.hung and -status not in (SIGNALS.get(event), signal.SIGTERM):
        faults.append(f"dies of {signal.Signals(-status).name}")
    if status > 0:
        reason = REASONS.get(event)
        if reason is not None and reason not in last:
            faults.append(f"does not say {reason!r}: {last[:300]}")
        elif "--debug shows" in last:
            faults.append(f"no clear line: {last[:300]}")
    return faults


def disturbed(lives: Lives, moment: Moment, name: str) -> Found:
    """Disturb a life, start it again, and compare it with the undisturbed one; its directory stays if that differs."""
    place = lives.place(moment.life, name)
    children = lives.run(moment.life, place, moment)
    came = any(child.counts[CAME] for child in children)
    ends = tuple(child.status for child in children)
    hit = children[moment.rank or 0]
    faults = [fault for child in children for fault in said_faults(child, moment.event if child is hit else "other")]
    if moment.event == "clock":
        week = time.time() + 7 * 24 * 3600
        for path in place.rglob("*"):
            os.utime(path, (week, week))
    if moment.event == "cache replaced" and any(ends):
        shutil.rmtree(place / "cache")  # as the message says
    if any(ends):
        faults += restarted(lives, moment.life, place, min(child.counts[NUM_COMMANDS] for child in children))
    faults += lives.faults(moment.life, place, moment.event)
    if not faults:
        shutil.rmtree(place)
    line = hit.last_line() if hit.status else ""
    return Found(moment, came, ends, line.replace(str(lives.root), "..."), tuple(faults))


def restarted(lives: Lives, life: str, place: Path, num_done: int) -> list[str]:
    """Run a life again from the command that failed; what is wrong with that."""
    children = lives.run(life, place, num_done=num_done)
    return [f"the restart ends with {child.status}: {child.text()[-600:]}" for child in children if child.status]


def moments(seed: int, count: int) -> Iterator[Moment]:
    """Seeded moments, every event and way in turn."""
    for index in range(count):
        draw = random.Random(f"{seed} {index}")
        life = draw.choices(("train", "export", "study", "pair"), (8, 4, 4, 3))[0]
        event = EVENTS[index % len(EVENTS)]
        ways = [way for way in WAYS if (way != "step" or life != "export") and (way != "time" or event in SIGNALS)]
        way = draw.choice(ways if draw.random() < 0.5 else ["operation"])
        again = draw.randrange(1, 12) if event in ("term", "int") and way != "time" and draw.random() < 0.3 else None
        full: str | int = draw.choice(["once", "always", 0, 500, draw.randrange(20_000)])
        rank = draw.choice([0, 1] if event in ("kill", "full") else [0, 1, None]) if life == "pair" else 0
        yield Moment(life, event, way, draw.random(), again, full if event == "full" else "once", rank)


def cases(lives: Lives, seed: int, number: int) -> Iterator[Found]:
    """Seeded cases beside the moments, `number` of each kind."""
    for index in range(number):
        draw = random.Random(f"{seed} case {index}")
        life = draw.choices(("train", "export", "study", "pair"), (4, 2, 2, 1))[0]
        yield disturbed(lives, Moment(life, "read_only", "operation", draw.random()), f"read-only-{index}")
        life = draw.choices(("train", "export", "study"), (4, 2, 2))[0]
        after = draw.randrange(1, 100)
        yield disturbed(lives, Moment(life, "clock", "operation", draw.random(), after), f"clock-{index}")
        event = ("cache removed", "cache replaced")[index % 2]
        yield disturbed(lives, Moment("train", event, "operation", draw.uniform(0.3, 0.9)), f"cache-{index}")
        life = ("train", "export", "study")[index % 3]
        yield second(lives, Moment(life, "second", "operation", draw.random()), f"second-{index}")
        yield cut(lives, CUT[index % len(CUT)], draw.random(), f"cut-{index}")


def second(lives: Lives, moment: Moment, name: str) -> Found:
    """Stop a life in the middle, start the same in its directory, and let the first go on."""
    place = lives.place(moment.life, name)
    (first,) = lives.start(moment.life, place, moment)
    while not first.is_over() and os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    (other,) = lives.start(moment.life, place)
    began = time.monotonic()
    while not other.is_over() and time.monotonic() - began < MOST_SECONDS / 4:  # it may wait for what the first holds
        time.sleep(0.002)
    if first.status is None:
        os.kill(first.pid, signal.SIGCONT)
    while sum(child.is_over() for child in (first, other)) < 2:
        time.sleep(0.002)
        if time.monotonic() - began > MOST_SECONDS:
            stop_hung([first, other])
    faults = [fault for child in (first, other) for fault in said_faults(child, moment.event)]
    if first.status and other.status:
        faults.append("neither of the two reaches the end")
    faults += lives.faults(moment.life, place)
    if not faults:
        shutil.rmtree(place)
    refused = first if first.status else other
    line = refused.last_line() if refused.status else ""
    ends = (first.status, other.status)
    return Found(moment, bool(first.counts[CAME]), ends, line.replace(str(lives.root), "..."), tuple(faults))


CUT = (
    "adapter/adapter_model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "complete.json",
)


def cut(lives: Lives, file: str, share: float, name: str) -> Found:
    """Cut one file of the newest checkpoint of a finished run, remove its adapter, and resume it."""
    place = lives.root / name
    shutil.copytree(lives.whole["train"], place)
    shutil.rmtree(place / "run/adapter")
    path = place / f"run/checkpoints/step-{STEPS}" / file
    os.truncate(path, int(share * path.stat().st_size))
    faults = restarted(lives, "train", place, 0)
    if f"Skipped a damaged checkpoint: step-{STEPS}" not in (place / "run/log.txt").read_text():
        faults.append("does not say that it skips the damaged checkpoint")
    faults += lives.faults("train", place)
    if not faults:
        shutil.rmtree(place)
    return Found(Moment("train", "cut", "operation", share), True, (1,), file, tuple(faults))


SMOKE = (
    Moment("train", "kill", "operation", 0.45),
    Moment("train", "full", "operation", 0.55, full="always"),
    Moment("export", "int", "operation", 0.45),
    Moment("export", "term", "operation", 0.8),
)
"""A kill and a full disk between two checkpoints, and signals in an export: one before and one after the weights."""


def run(seed: int, count: int) -> dict[str, Any]:
    """Disturb lives at `count` seeded moments, and in one other case for every five of them; 0: SMOKE alone.

    Returns JSON values: for each life and event how many were tried, came before the life's end, stopped it, and ended
    right; and all faults, each with its moment and the last line that was said.
    """
    torch.set_num_threads(1)  # a fork takes no threads along
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lives = Lives(Path(folder), LIVES if count else ("train", "export"))
        chosen = moments(seed, count) if count else SMOKE
        lived = (disturbed(lives, moment, f"life-{index}") for index, moment in enumerate(chosen))
        found = []
        for each in chain(lived, cases(lives, seed, math.ceil(count / 25))):
            found.append(each)
            print(f"{len(found)}: {each.moment.in_words()}: {each.ends} {'; '.join(each.faults)}", file=sys.stderr)
    table: dict[str, Counter[str]] = {}
    for each in found:
        row = table.setdefault(f"{each.moment.life}, {each.moment.event}", Counter())
        row.update(tried=1, came=int(each.came), stopped=int(any(each.ends)), right=int(not each.faults))
    return {
        "seed": seed,
        "num_moments": len(found),
        "num_right": sum(not each.faults for each in found),
        "moments": {name: dict(row) for name, row in sorted(table.items())},
        "faults": [[each.moment.in_words(), each.line, *each.faults] for each in found if each.faults],
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """The whole harness; exits with 1 if a life does not end right."""
    parser = parser_of(__doc__, "moments", smoke="four moments")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = run(args.seed, 0 if args.smoke else args.count)
    write(args.out, facts(f"python benchmarks/hostile/moments.py --seed {args.seed} --count {args.count}") | found)
    sys.exit(0 if found["num_right"] == found["num_moments"] else 1)


if __name__ == "__main__":
    main()
