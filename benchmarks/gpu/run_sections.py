"""Running sections one after another, each in a process of its own, and keeping what they found in one file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.part import ERROR_LINES
from gpu.sections import GRACE_SECONDS, SECTIONS, Section
from qdora.cli import let_segments_grow
from qdora.files.atomic import atomic_write_json

Document = dict[str, Any]
_LEAST_SECONDS = 20
"""With less than this left of the budget, no section is started."""


def run_all(
    document: Document, out: Path, names: Sequence[str], command: Sequence[str], *, seconds: float, folder: Path
) -> Document:
    """Run sections until the budget is spent; the file is written after each.

    Args:
        document: Head of the result; its "sections" are kept where they are not run again.
        out: The file.
        names: Of sections, in order.
        command: Starts a section's process when a name and what `_child` adds follow it.
        seconds: Budget for all.
        folder: For the sections' own files and logs.
    Returns:
        The document.
    """
    end = time.monotonic() + seconds
    sections = document.setdefault("sections", {})
    for name in names:
        left = end - time.monotonic()
        print(f"{name} ... ", end="", flush=True)
        if left < _LEAST_SECONDS:
            sections[name] = {"status": "skipped: no time left"}
        else:
            sections[name] = run_one(name, SECTIONS[name], command, left, folder)
        document["failed_checks"] = failed_checks(sections)
        atomic_write_json(out, document)
        print(sections[name]["status"], f"({sections[name].get('seconds', 0):.0f} s)", flush=True)
    return document


def run_one(name: str, section: Section, command: Sequence[str], left: float, folder: Path) -> dict[str, Any]:
    """One section's entry: status, seconds, what it found up to its end or death, and the last lines of its output."""
    allowed = min(section.seconds, left)
    part, log = folder / f"{name}.json", folder / f"{name}.log"
    part.unlink(missing_ok=True)
    call = [*command, "--child", name, "--part", str(part), "--seconds", str(allowed)]
    began = time.monotonic()
    status = _child(call, min(allowed + GRACE_SECONDS, left), log)
    entry: dict[str, Any] = {"status": status, "seconds": time.monotonic() - began, "result": _read(part)}
    if status != "done":
        entry["last_lines"] = log.read_text(errors="replace").splitlines()[-ERROR_LINES:]
    return entry


def _child(call: list[str], seconds: float, log: Path) -> str:
    """Run to the end, or to the limit: "done", "failed: ..." or "timed out". Its whole process group is ended."""
    environment = dict(os.environ)
    let_segments_grow(environment)  # as the qdora command does
    with log.open("w") as output:
        process = subprocess.Popen(
            call, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code is None:
        return "timed out"
    return "done" if code == 0 else f"failed: exit {code}"


def _read(part: Path) -> Any:
    try:
        return json.loads(part.read_text())
    except (OSError, ValueError):
        return {}


def failed_checks(sections: Mapping[str, Any]) -> list[str]:
    """Paths of all entries with `ok: false` and of all errors, for the eye that looks at one line."""
    return [path for name, entry in sections.items() for path in _failures(entry.get("result", {}), name)]


def _failures(found: Any, path: str) -> Iterator[str]:
    if not isinstance(found, dict):
        return
    if found.get("ok") is False or "error" in found:
        yield path
    for key, value in found.items():
        yield from _failures(value, f"{path} / {key}")


def own_command(script: str, smoke: bool) -> list[str]:
    """How a section's process is started."""
    return [sys.executable, script, *(["--smoke"] if smoke else [])]
