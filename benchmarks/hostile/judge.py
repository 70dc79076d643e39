"""Judge one hostile case: the real code reads it in a forked process, under limits, and may leave only two ways.

A case ends in one of these verdicts:

    clear          refused with one clear line for each fault, and the exit code of the user's mistakes (or of a
                   failure, where the case says that this is right)
    right          read, and the result is the one that it must be
    undetectable   read, and the result differs only where the format has no check sum that could show it
    fault          anything else: a traceback, an exit code of a bug, a wrong result, a hang, too much memory, a file
                   written or read outside the case's directory, a dead process

The parent imports and warms up everything once; a fork then costs some 20 ms, starts from a clean state, and can be
killed. The peak of its memory is VmHWM, which Linux can set back. Linux only.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from measure import status_bytes

from qdora.cli.verb import explain
from qdora.errors import FAILURE, INTERRUPT, USER_MISTAKE, RunFailure

SECONDS = 30
"""CPU time of a case."""
WAIT = 10 * SECONDS
"""Time of a case on the clock, which a busy machine stretches: it ends what waits without working."""
MEMORY_BASE = 128 << 20
"""What any case may take beside twice its file: lazily imported libraries, a tiny model, a tokenizer."""
_HARD_MEMORY = 4 << 30
"""Address space that a case may add. Above it allocations fail, so that the machine survives."""
_LINE, _LINES = 900, 12
"""Longest clear line, and most lines (UserError: one for each fault; 10 and the number of the others)."""

Verdict = Literal["clear", "right", "undetectable", "fault"]
Judged = tuple[Verdict, str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile input.

    `write` makes the files of the case in an empty directory and returns how many bytes they have. `read` runs the real
    code on them and returns JSON values. `judge` gets these and says what they are worth; `refuse` says whether a
    clear refusal is right.
    """

    part: str
    number: int
    what: str
    write: Callable[[Path], int]
    read: Callable[[Path], Any]
    judge: Callable[[Any], Judged]
    may_refuse: bool = True
    may_read_outside: bool = False
    """Whether the case may name a path outside its directory, as a recipe may."""
    may_fail: bool = False
    """Whether exit code 1 with a RunFailure is right, too: a damaged disk is no mistake of the user."""


@dataclass(frozen=True)
class Outcome:
    """What a case came to: verdict, what happened, and what it cost."""

    part: str
    number: int
    what: str
    verdict: Verdict
    happened: str
    seconds: float
    memory_bytes: int
    file_bytes: int


def judged(case: Case, folder: Path) -> Outcome:
    """Run a case in a fork, with `folder` for its files; the folder is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    canary = _canary(folder)
    inside = folder / "case"
    inside.mkdir()
    began = time.perf_counter()
    status, said = _forked(case, inside)
    seconds = time.perf_counter() - began
    report = _report(said)
    verdict, happened = _verdict(case, status, report, inside)
    if _canary_text(folder) != canary or sorted(each.name for each in folder.iterdir()) != ["canary", "case"]:
        verdict, happened = "fault", f"changed files outside its directory; {happened}"
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(
        case.part,
        case.number,
        case.what,
        verdict,
        happened.replace(str(inside), "<case>"),
        round(seconds, 3),
        int(report.get("memory", 0)),
        int(report.get("bytes", 0)),
    )


def _canary(folder: Path) -> str:
    (folder / "canary").mkdir(parents=True)
    (folder / "canary" / "secret.json").write_text('{"secret": 1}\n')
    return _canary_text(folder)


def _canary_text(folder: Path) -> str:
    return repr([(str(each), each.read_bytes()) for each in sorted((folder / "canary").iterdir())])


def _forked(case: Case, inside: Path) -> tuple[int, bytes]:
    """The wait status of the child (-1: it was stopped here), and what it sent."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _in_child(case, inside, writing)
        except BaseException:
            _send(writing, {"harness": traceback.format_exc()})
        finally:
            os._exit(0)
    os.close(writing)
    said, stopped = bytearray(), False
    deadline = time.monotonic() + WAIT
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            stopped = True
            break
        block = os.read(reading, 1 << 20)
        if not block:
            break
        said += block
    os.close(reading)
    _, status = os.waitpid(child, 0)
    return (-1 if stopped else status), bytes(said)


def _send(writing: int, values: dict[str, Any]) -> None:
    content = json.dumps(values).encode() + b"\n"
    while content:
        content = content[os.write(writing, content) :]


def _report(said: bytes) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for line in said.splitlines():
        report |= json.loads(line)
    return report


def _in_child(case: Case, inside: Path, writing: int) -> None:
    os.chdir(inside)
    os.environ["XDG_CACHE_HOME"] = str(inside / "home")  # what is kept for later starts is the user's, too
    faulthandler.disable()  # pytest turns it on; what a dying case says is in output.txt
    sys.dont_write_bytecode = True
    output = os.open(inside.parent.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logging.disable(logging.INFO)
    _send(writing, {"bytes": case.write(inside)})
    outside = _watch(inside, may_read_outside=case.may_read_outside)
    before = _reset_peak()
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _HARD_MEMORY,) * 2)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(spent.ru_utime + spent.ru_stime) + SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    ended: dict[str, Any]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ended = {"value": case.read(inside)}
    except BaseException as error:
        text, code = explain(error)
        frames = traceback.extract_tb(error.__traceback__)
        own = [each for each in frames if "/qdora/" in each.filename] or list(frames)
        place = f"{'/'.join(Path(own[-1].filename).parts[-2:])}:{own[-1].lineno}"
        ended = {"text": text, "code": code, "failure": isinstance(error, RunFailure), "place": place}
    ended["memory"] = max(0, status_bytes("VmHWM") - before)
    ended["outside"] = outside
    _send(writing, ended)


def _watch(inside: Path, *, may_read_outside: bool) -> list[str]:
    """A list that gets what Python code does outside `inside`: files written there, programs and connections."""
    found: list[str] = []
    root = os.path.realpath(inside)
    canary = os.path.join(os.path.dirname(root), "canary")
    busy = False

    def is_outside(path: Any) -> bool:
        if isinstance(path, int) or not isinstance(path, str | bytes | os.PathLike):
            return False
        text = os.fsdecode(path)
        real = os.path.realpath(text) if "\0" not in text else text
        return real != root and not real.startswith((root + os.sep, "/dev/", "/proc/"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            if event == "open":
                path, _, flags = arguments
                writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                if writes and is_outside(path):
                    found.append(f"writes {path!r}")
                elif not may_read_outside and "canary" in str(path) and os.path.realpath(path).startswith(canary):
                    found.append(f"reads {path!r}")
            elif event in _RUNS or any(is_outside(each) for each in arguments[: _CHANGES.get(event, 0)]):
                found.append(f"{event} {arguments!r}"[:200])
        finally:
            busy = False

    sys.addaudithook(hook)
    return found


_RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
# Event -> how many of its first arguments are paths that it changes.
_CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2}
_CHANGES |= {"os.truncate": 1, "os.chmod": 1, "shutil.rmtree": 1}


def _reset_peak() -> int:
    """Set the peak of this process's memory back to what it has now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmHWM")


def _address_space() -> int:
    return status_bytes("VmSize")


def _verdict(case: Case, status: int, report: dict[str, Any], inside: Path) -> Judged:
    if "harness" in report:
        raise RuntimeError(f"the harness itself failed on {case.what}:\n{report['harness']}")
    if status == -1:
        return "fault", f"waits for more than {WAIT} s"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return "fault", f"hangs: more than {SECONDS} s of CPU time"
    if os.WIFSIGNALED(status):
        return "fault", f"dies of {signal.Signals(os.WTERMSIG(status)).name}"
    if report["outside"]:
        return "fault", f"leaves its directory: {report['outside'][0]}"
    most = 2 * report["bytes"] + MEMORY_BASE
    if report["memory"] > most:
        taken = f"{report['memory'] >> 20} MiB for files of {report['bytes'] >> 20} MiB"
        return "fault", f"takes {taken}; {report.get('text', 'read')[:200]}"
    if "value" in report:
        return case.judge(report["value"])
    return _refusal(case, report)


def _refusal(case: Case, report: dict[str, Any]) -> Judged:
    text, code = str(report["text"]), int(report["code"])
    short = text if len(text) <= 400 else f"{text[:400]}..."
    if code == INTERRUPT or "--debug shows the traceback" in text or (code == FAILURE and not report["failure"]):
        return "fault", f"exit {code} at {report['place']}: {short}"
    if code == FAILURE and not case.may_fail:
        return "fault", f"exit {code}, which is for failures, of a mistake: {short}"
    assert code in (USER_MISTAKE, FAILURE)
    lines = text.split("\n")
    if not text.strip() or len(lines) > _LINES or any(not line.strip() for line in lines):
        return "fault", f"no clear line: {len(lines)} lines at {report['place']}: {short}"
    if max(map(len, lines)) > _LINE:
        return "fault", f"no clear line: {max(map(len, lines))} characters at {report['place']}: {short}"
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for line in lines for letter in line):
        return "fault", f"no clear line: control characters or half characters at {report['place']}: {short!r}"
    if "Traceback" in text:
        return "fault", f"a traceback: {short}"
    if not case.may_refuse:
        return "fault", f"refused, although its meaning is unchanged: {short}"
    return "clear", short
