"""A job on a tiny model is disturbed at seeded moments: does the restart reach what an undisturbed job reaches?

Three lives, each of commands as a user gives them: train (through a base cache), export (merged and nf4-lora), study
(four cells on a pruned base, and their report). A moment is an operation on files. What happens there:

    kill, term, int    the signal; of the latter sometimes a second one a few operations later, which stops at once
    full, read_only    ENOSPC once, or at every write from then on, or beyond some bytes of a file; EROFS at all changes

Then the same command is given again, and that which a warning names. A lock that nobody holds may stay in a directory
that became read-only. Every life is forked from this process. Linux only.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from byte_tokenizer import write_model
from frame import bench, main, table, tabulated
from matplotlib.figure import Figure

from qdora.files.atomic import is_leftover
from qdora.files.run_directory import RunDirectory
from qdora.train import distributed as interrupt

MOST_SECONDS = 120
LIVES, EVENTS = ("train", "export", "study"), ("kill", "term", "int", "full", "read_only")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
REASONS = {"full": "the disk is full", "read_only": os.strerror(errno.EROFS)}
WORDS = {
    "kill": "SIGKILL",
    "term": "SIGTERM, sometimes twice",
    "int": "SIGINT, sometimes twice",
    "full": "the disk is full, once or from then on",
    "read_only": "the directory becomes read-only",
}
HEAVY = ("qdora.run.run", "qdora.export.export", "qdora.study.run", "qdora.study.report")
OPERATIONS, NUM_COMMANDS = range(2)  # what a life counts
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime", "shutil.rmtree")
_TAKES_ROOM = ("open", "os.mkdir", "os.link", "os.rename")


@dataclass(frozen=True)
class Moment:
    """What happens to a life at a share of its operations. `again`: operations until a second signal; `full`: once,
    always, or the most bytes of a file."""

    life: str
    event: str
    share: float
    again: int | None = None
    full: str | int = "once"


class End(NamedTuple):
    status: int  # exit code, or the negative number of a signal
    text: str
    counts: Sequence[int]


class Watch:
    """Counts this process's operations below a directory, and disturbs it at the moment."""

    def __init__(self, root: Path, counts: Any, moment: Moment | None, at: int) -> None:
        self.root, self.counts, self.moment, self.at = str(root), counts, moment, at
        self.refusal: int | None = None
        self.second_signal = -1
        self._is_inside = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _CHANGES and event != "open":
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], bytes) else args[0]
        is_relative = event in ("os.remove", "os.rmdir") and args[-1] != -1  # shutil.rmtree goes by descriptors
        if self._is_inside or not isinstance(path, str) or not (is_relative or path.startswith(self.root)):
            return
        self._is_inside = True
        try:
            self.counts[OPERATIONS] += 1
            if self.moment is not None and self.counts[OPERATIONS] == self.at:
                self._disturb(self.moment)
            elif self.moment is not None and self.counts[OPERATIONS] == self.second_signal:
                os.kill(os.getpid(), SIGNALS[self.moment.event])
        finally:
            self._is_inside = False
        writes = event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        code = self.refusal
        if code is not None and writes and (event in _TAKES_ROOM or code == errno.EROFS):
            if self.moment is not None and (self.moment.event, self.moment.full) == ("full", "once"):
                self.refusal = None
            raise OSError(code, os.strerror(code), path)

    def _disturb(self, moment: Moment) -> None:
        if moment.event in SIGNALS:
            if moment.again is not None:
                interrupt.SAME_REQUEST_SECONDS = 0.0
                self.second_signal = self.counts[OPERATIONS] + moment.again
            os.kill(os.getpid(), SIGNALS[moment.event])
        elif isinstance(moment.full, int):
            resource.setrlimit(resource.RLIMIT_FSIZE, (moment.full, resource.RLIM_INFINITY))
        else:
            self.refusal = errno.ENOSPC if moment.event == "full" else errno.EROFS


def lived(words: Sequence[Sequence[str]], root: Path, moment: Moment | None, at: int) -> End:
    """A process that runs commands of qdora one after the other until one fails, disturbed at its `at`-th operation.

    What it prints goes through a pipe, which no limit on files touches; a hanging one gets SIGALRM.
    """
    from qdora.cli import app

    counts, (ours, theirs) = multiprocessing.RawArray("q", 2), os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(theirs)
        text = os.fdopen(ours, errors="replace").read()
        return End(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text, list(counts))
    status = 1
    try:
        for number in (1, 2):
            os.dup2(theirs, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(MOST_SECONDS)
        os.environ["XDG_CACHE_HOME"] = str(root / "home")
        Watch(root, counts, moment, at)
        status = 0
        for each in words:
            try:
                app(list(each), standalone_mode=True)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(bool(end.code))
            if status:
                break
            counts[NUM_COMMANDS] += 1
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:  # outside of a command, where Python itself would stop
        status = 130
    finally:
        os._exit(status)


def prepare(root: Path) -> None:
    """Model, data, recipe and study; imports what the children need."""
    for name in HEAVY:
        importlib.import_module(name)
    Figure.savefig = lambda _figure, stream, **_options: stream.write("<svg></svg>")  # 40 % of a life's time
    write_model(root / "model")
    letters, sources = "abcdefghijklmnopqrstuvwxyz", []
    for name, step in (("next", 1), ("after", 2)):
        pairs = zip(letters, letters[step:] + letters[:step], strict=True)
        rows = [{"question": f"{name} of {a}?", "choices": [b, a], "answer": 0} for a, b in pairs]
        sources.append({"source": str(root / f"{name}.jsonl")})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"source": str(root / "model"), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        "data": {"mix": sources, "max_length": 64},
        "train": {"steps": 6, "batch": 4, "lr": 0.5, "optimizer": "adamw", "checkpoint_every": 1},
        "eval": {"limit": 3, "every": 2, "best_by": "macro"},
        "memory": {"budget": "4GiB"},
    }
    pruned = {"base.prune.method": "magnitude", "base.prune.sparsity": 0.5}
    study = {
        "recipe": str(root / "recipe.yaml"),
        "settings": pruned | {"train.steps": 2, "eval.every": None, "eval.best_by": None},
        "product": {"adapter": {kind: {"adapter.kind": kind} for kind in ("lora", "dora")}},
        "seeds": [0],
        "compare": {"reference": "lora"},
    }
    for name, document in (("recipe", recipe), ("study", study)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(document))


class Lives:
    """Runs lives in directories below `root`; `whole`: the undisturbed ones, and what they counted."""

    def __init__(self, root: Path, lives: Sequence[str] = LIVES) -> None:
        self.root, self.whole = root, dict[str, tuple[Path, End]]()
        prepare(root)
        for life in lives:
            place = self.place(life, f"whole-{life}")
            end = self.run(life, place)
            if end.status:
                raise RuntimeError(f"the undisturbed {life} fails:\n{end.text[-4000:]}")
            self.whole[life] = place, end

    def place(self, life: str, name: str) -> Path:
        """A directory in which the life can start: empty, or with the finished run that is exported."""
        if life == "export":
            shutil.copytree(self.whole["train"][0], self.root / name)
        (self.root / name).mkdir(exist_ok=True)
        return self.root / name

    def run(self, life: str, place: Path, moment: Moment | None = None, num_done: int = 0) -> End:
        """What a user types to start a life in a directory, or to start it again after `num_done` commands."""
        if life == "export":
            formats = ([], ["--format", "nf4-lora"])
            words = [["export", str(place / "run"), str(place / f"out{n}"), *each] for n, each in enumerate(formats)]
        elif life == "study":
            study = str(place / "study")
            words = [["study", str(self.root / "study.yaml"), "--dir", study, "--retry-failed"], ["report", study]]
        else:
            resume = ["--resume"] if (place / "run/recipe.yaml").exists() else []
            cache = f"base.cache={place / 'cache'}"
            words = [["train", str(self.root / "recipe.yaml"), "-s", cache, "-d", str(place / "run"), *resume]]
        at = 1 + int(moment.share * self.whole[life][1].counts[OPERATIONS]) if moment is not None else 0
        return lived(words[num_done:], place, moment, at)

    def disturbed(self, moment: Moment, name: str) -> tuple[End, list[str]]:
        """Disturb a life, start it again, and compare it with the undisturbed one: its end, and what is wrong."""
        place = self.place(moment.life, name)
        end = self.run(moment.life, place, moment)
        last = (end.text.strip().splitlines() or [""])[-1]
        signs = ("Traceback", "Logging error", "Exception ignored")
        faults = [f"prints {sign!r}" for sign in signs if sign in end.text]
        if end.status < 0 and -end.status != SIGNALS.get(moment.event):
            faults.append(f"dies of {signal.Signals(-end.status).name}")
        if end.status > 0 and (REASONS.get(moment.event, "") not in last or "--debug shows" in last):
            faults.append(f"no clear line: {last[:300]}")
        again, done = end, end.counts[NUM_COMMANDS]
        if end.status:
            again = self.run(moment.life, place, num_done=done)
        if "holds a finished export" in again.text:  # so the user goes on with the next command
            again = self.run(moment.life, place, num_done=done + 1)
        if pages := re.findall(r"Fix: qdora (report) (\S+)", end.text + again.text):
            lived(pages, self.root, None, 0)
        if end.status and again.status:
            faults.append(f"the restart ends with {again.status}: {again.text[-600:]}")
        ours, theirs = (outcome(moment.life, each) for each in (place, self.whole[moment.life][0]))
        names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if moment.event == "read_only":
            names = [name for name in names if not name.endswith("/.lock")]
        return end, faults + [f"other than undisturbed: {name}" for name in names]


def outcome(life: str, place: Path) -> dict[str, Any]:
    """What must be equal after a life: name -> content without times and places, or a hash."""
    if life == "export":
        return {f"out{n}/{name}": value for n in range(2) for name, value in tree(place / f"out{n}").items()}
    found: dict[str, Any] = {}
    runs, above = {"run": place / "run"}, [place / "run", place / "cache"]
    if life == "study":
        above = [place / "study/cells"]
        runs = {cell.name: cell for cell in above[0].iterdir()}
        for file in (place / "study/results").glob("*.json"):
            found[file.stem] = without(json.loads(file.read_bytes()), "seconds")
        for file in (place / "study/report").glob("*.csv"):
            with file.open(newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if row.get("fact") not in ("hours", "failed attempts")]
            found[file.name] = without(rows, "seconds", "num_failures", "reason")
    for name, run in runs.items():
        found |= {f"{name}/{file}": value for file, value in tree(run).items()}
        found[f"{name}/metrics.jsonl"] = [without(line, "time") for line in RunDirectory(run).metrics()]
    return found | {f"leftover {path.name}": "" for each in above for path in each.rglob("*") if is_leftover(path)}


def tree(folder: Path) -> dict[str, Any]:
    """Every file below a folder: its bytes hashed, JSON without what times and places have put into it."""
    found: dict[str, Any] = {}
    for file in (path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"):
        name = file.relative_to(folder).as_posix()
        if name in ("recipe.yaml", "environment.json", "README.md", "report.html") or file.suffix == ".svg":
            found[name] = "is there"  # it names the directory or times
        elif file.parent.name == "eval" or file.name in ("export.json", "plan.json"):
            found[name] = without(json.loads(file.read_bytes()), "seconds", "directory", "run")
        else:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def without(value: Any, *keys: str) -> Any:
    """JSON values without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, *keys) for key, item in value.items() if key not in keys}
    return [without(item, *keys) for item in value] if isinstance(value, list) else value


SMOKE = (
    Moment("train", "kill", 0.45),
    Moment("train", "full", 0.55, full="always"),
    Moment("export", "int", 0.45),
    Moment("export", "term", 0.8),
)
"""A kill and a full disk between two checkpoints, and signals in an export: one before and one after the weights."""


def drawn(seed: int, count: int) -> Iterator[Moment]:
    """Seeded moments, every event in turn."""
    for index in range(count):
        draw = random.Random(f"{seed} {index}")
        life, event = draw.choices(LIVES, (8, 4, 4))[0], EVENTS[index % len(EVENTS)]
        again = draw.randrange(1, 12) if event in ("term", "int") and draw.random() < 0.3 else None
        full: str | int = draw.choice(["once", "always", 0, 500, draw.randrange(20_000)])
        yield Moment(life, event, draw.random(), again, full if event == "full" else "once")


@bench()
def moments(*, count: int = 200, seed: int = 0, smoke: bool) -> dict[str, Any]:
    torch.set_num_threads(1)  # a fork takes no threads along
    rows: dict[str, Counter[str]] = {}
    wrong: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        lives = Lives(Path(folder), LIVES[:2] if smoke else LIVES)
        for index, moment in enumerate(SMOKE if smoke else drawn(seed, count)):
            end, faults = lives.disturbed(moment, f"life-{index}")
            print(f"{index}: {moment}: {end.status} {'; '.join(faults)}", file=sys.stderr, flush=True)
            row = rows.setdefault(f"{moment.life}, {moment.event}", Counter())
            row.update(tried=1, stopped=int(bool(end.status)), right=int(not faults))
            wrong += [[str(moment), *(each.replace(folder, "") for each in faults)]] if faults else []
            shutil.rmtree(lives.root / f"life-{index}")
    number = sum(row["tried"] for row in rows.values())
    found = {name: dict(row) for name, row in sorted(rows.items())}
    return {"num_moments": number, "num_right": number - len(wrong), "moments": found, "faults": wrong}


@table("moments")
def moments_table(result: Any) -> str:
    def total(event: str, key: str) -> int:
        return sum(row[key] for name, row in result["moments"].items() if name.split(", ")[1] == event)

    columns = {
        "event, then the same command again": lambda event: WORDS[event],
        "jobs": lambda event: f"{total(event, 'tried')}",
        "ended by it": lambda event: f"{total(event, 'stopped')}",
        "bit for bit equal": lambda event: f"{total(event, 'right')} of {total(event, 'tried')}",
    }
    return tabulated(WORDS, columns)


if __name__ == "__main__":
    main()
