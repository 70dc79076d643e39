"""When is a checkpoint whole: complete.json lists its files, and their sizes and check sums agree."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from qdora.atomic_files import atomic_write_json

COMPLETE = "complete.json"


def write_complete(path: Path, step: int) -> None:
    """List the files below `path` in its complete.json: the last file to be written.

    Raises:
        ValueError: Something there is not a regular file.
        OSError: From reading or writing.
    """
    files = sorted(file for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
    for file in files:
        if file.is_symlink() or not file.is_file():
            raise ValueError(f"{file}: a checkpoint holds regular files only")
    listed = {file.relative_to(path).as_posix(): _size_and_sum(file) for file in files}
    atomic_write_json(path / COMPLETE, {"step": step, "files": listed})


def checkpoint_fault(path: Path, *, sums: bool = True) -> str | None:
    """Why a checkpoint directory is not whole, or None if it is.

    Args:
        path: A step-N directory.
        sums: Also compare the CRC-32 of every file, which reads all of it; else sizes only.
    """
    try:
        listed = json.loads((path / COMPLETE).read_bytes())["files"]
        for name, wanted in listed.items():
            file = path / name
            if not file.resolve().is_relative_to(path.resolve()):
                return f"{name} is outside"
            size = file.stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes in place of {wanted['bytes']}"
            if sums and _size_and_sum(file) != wanted:
                return f"{name} has changed"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE} is damaged"
    return None


def _size_and_sum(file: Path) -> dict[str, Any]:
    """Size and CRC-32: against torn writes and bad disks, not against malice."""
    total = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total = zlib.crc32(block, total)
        return {"bytes": stream.tell(), "crc32": f"{total:08x}"}
