"""Tokenised sources on disk, so that a later start, or another process of the run, does not tokenise them again.

A file for each source and everything that decides its tokens: its rows as they are in their files, the settings, the
tokenizer and the versions of the program. Files appear whole or not at all; a damaged one is made anew.

    ids (tokens) int32   mask (tokens) bool   lengths (examples) int64   tasks (examples) int32
    record (bytes) uint8: JSON of names and counts   sums (1) int64: CRC-32 of the others
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qdora import __version__
from qdora.data.chat_template import chat_settings
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.files.atomic import atomic_file, disk_reason, json_text
from qdora.files.console import OF_THIS_PROCESS
from qdora.files.machine import package_versions
from qdora.files.tensor_file import write_tensors

_FORMAT = 5
_LEAST_TOKENS = 2**18
"""Sources with fewer tokens are not kept: they are tokenised in a second."""
_UNUSED_SECONDS = 30 * 24 * 3600.0
"""Files that no start has used for so long are removed."""
_OWN = re.compile(r"\.?[0-9a-f]{32}\.safetensors(\.[0-9a-f]+\.partial)?")
"""Names of the cache's files, and of those that a kill left behind."""
_PARTS = ("ids", "mask", "lengths", "tasks", "record")

logger = logging.getLogger("qdora")


class TokenCache:
    """The tokenised sources in a directory, for one tokenizer; one without a Rust backend has no identity, so that
    nothing is kept."""

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.root, self.tokenizer = root, tokenizer

    @cached_property
    def _identity(self) -> str | None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        state = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # change with every call
            state.pop(name, None)
        template = getattr(self.tokenizer, "chat_template", None)
        settings = chat_settings(self.tokenizer)
        day = (settings.day or date.today()) if "strftime_now" in str(template) else None
        facts = [state, template, day, dict(settings.template_kwargs)]
        facts += [sorted(settings.stop_ids or ())]  # a note names them
        facts += [str(self.tokenizer.special_tokens_map), type(self.tokenizer).__name__]
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()

    def kept(self, content: Mapping[str, Any], make: Callable[[], TokenizedSet]) -> TokenizedSet:
        """The set that `content`, JSON values, stands for: read if it is there, else made and kept."""
        if self._identity is None:
            return make()
        packages = package_versions(("transformers", "tokenizers", "jinja2"))
        versions = {"format": _FORMAT, "qdora": __version__, **packages}
        key = json_text({**content, "tokenizer": self._identity, "versions": versions})
        file = self.root / f"{hashlib.sha256(key.encode('utf-8', 'backslashreplace')).hexdigest()[:32]}.safetensors"
        try:
            stored = _read(file)
            logger.info("%s: reading its tokens from %s.", stored.name, file)
            with suppress(OSError):
                os.utime(file)
            return stored
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
            logger.warning("data.cache: %s: is damaged (%s). It is made anew.", file, error, extra=OF_THIS_PROCESS)
        made = make()
        if made.num_tokens >= _LEAST_TOKENS:
            self._write(file, made)
        return made

    def _write(self, file: Path, made: TokenizedSet) -> None:
        """Keep a set and remove old files; a warning where the disk does not take it."""
        number = {name: index for index, name in enumerate(made.task_names)}
        record = {
            "name": made.name,
            "tasks": [*number],
            "ids": [example.id for example in made.examples],
            "counts": [made.num_truncated, made.num_dropped],
            "unused": made.unused,
            "notes": made.notes,
        }
        arrays = {
            "ids": np.concatenate([example.input_ids for example in made.examples]),
            "mask": np.concatenate([example.loss_mask for example in made.examples]),
            "lengths": np.array([len(example) for example in made.examples], dtype=np.int64),
            "tasks": np.array([number[example.task] for example in made.examples], dtype=np.int32),
            "record": np.frombuffer(json.dumps(record).encode(), dtype=np.uint8).copy(),
        }
        arrays["sums"] = np.array([_sum(arrays)], dtype=np.int64)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as aside:
                write_tensors(aside, {name: torch.from_numpy(array) for name, array in arrays.items()})
        except (OSError, ValueError, RuntimeError) as error:
            text = "data.cache: %s: the tokens of %s cannot be kept: %s."
            logger.warning(text, self.root, made.name, disk_reason(error) or error, extra=OF_THIS_PROCESS)
            return
        with suppress(OSError):  # another process may clean, too
            for other in self.root.iterdir():
                # The folder may hold other files of the user
                if _OWN.fullmatch(other.name) and time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                    other.unlink(missing_ok=True)


def _sum(arrays: Mapping[str, Any]) -> int:
    total = 0
    for name in _PARTS:
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, total)
    return total


def _read(file: Path) -> TokenizedSet:
    arrays = load_file(file)  # as a whole: a mapped file that somebody cuts would end the process
    if _sum(arrays) != int(arrays["sums"][0]):
        raise ValueError("its check sum differs")
    record = json.loads(arrays["record"].tobytes())
    cuts = np.cumsum(arrays["lengths"])[:-1]
    rows = zip(arrays["tasks"].tolist(), record["ids"], np.split(arrays["ids"], cuts), np.split(arrays["mask"], cuts),
               strict=True)  # fmt: skip
    examples = tuple(TokenizedExample(record["tasks"][task], id, ids, mask) for task, id, ids, mask in rows)
    num_truncated, num_dropped = record["counts"]
    unused, notes = tuple(record["unused"]), tuple(record["notes"])
    return TokenizedSet(record["name"], examples, num_truncated, num_dropped, unused, notes)
