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
from torch import Tensor

from qdora import __version__
from qdora.data.chat_template import chat_settings
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.files.atomic import atomic_file, disk_reason, json_text
from qdora.files.console import OF_THIS_PROCESS
from qdora.files.environment import package_versions
from qdora.files.tensor_file import write_tensors

_FORMAT = 5
_LEAST_TOKENS = 2**18
"""Sources with fewer tokens are not kept: they are tokenised in a second."""
_UNUSED_SECONDS = 30 * 24 * 3600.0
"""Files that no start has used for so long are removed."""
_OWN = re.compile(r"\.?[0-9a-f]{32}\.safetensors(\.[0-9a-f]+\.partial)?")
"""Names of the cache's files, and of those that a kill left behind."""
_PACKAGES = ("transformers", "tokenizers", "jinja2")
_PARTS = ("ids", "mask", "lengths", "tasks", "record")

logger = logging.getLogger("qdora")


class TokenCache:
    """The tokenised sources in a directory, for one tokenizer.

    Args:
        root: The directory; it is made if it is missing.
        tokenizer: Without a Rust backend it has no identity, and nothing is kept.
    """

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.root, self.tokenizer = root, tokenizer

    @cached_property
    def _identity(self) -> str | None:
        return _tokenizer_identity(self.tokenizer)

    def kept(self, content: Mapping[str, Any], make: Callable[[], TokenizedSet]) -> TokenizedSet:
        """The set that `content`, JSON values, stands for: read if it is there, else made and kept.

        The arrays are those of a file, read as a whole, since a mapped file that somebody cuts would end the process.
        """
        if self._identity is None:
            return make()
        versions = {"format": _FORMAT, "qdora": __version__, **package_versions(_PACKAGES)}
        key = json_text({**content, "tokenizer": self._identity, "versions": versions})
        file = self.root / f"{hashlib.sha256(key.encode('utf-8', 'backslashreplace')).hexdigest()[:32]}.safetensors"
        found = _read(file)
        if found is not None:
            logger.info("%s: reading its tokens from %s.", found.name, file)
            with suppress(OSError):
                os.utime(file)
            return found
        made = make()
        if made.num_tokens >= _LEAST_TOKENS:
            self._write(file, made)
        return made

    def _write(self, file: Path, made: TokenizedSet) -> None:
        """Keep a set and remove old files; a warning where the disk does not take it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as aside:
                write_tensors(aside, _tensors(made))
        except (OSError, ValueError, RuntimeError) as error:
            reason = disk_reason(error) or str(error)
            logger.warning(
                "data.cache: %s: the tokens of %s cannot be kept: %s.",
                self.root,
                made.name,
                reason,
                extra=OF_THIS_PROCESS,
            )
            return
        with suppress(OSError):  # another process may clean, too
            for other in self.root.iterdir():
                # The folder may hold other files of the user
                if _OWN.fullmatch(other.name) and time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                    other.unlink(missing_ok=True)


def _tokenizer_identity(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    for name in ("truncation", "padding"):  # change with every call
        state.pop(name, None)
    template = getattr(tokenizer, "chat_template", None)
    settings = chat_settings(tokenizer)
    day = (settings.day or date.today()) if "strftime_now" in str(template) else None
    stops = sorted(settings.stop_ids or ())  # a note names them
    facts = [
        state,
        template,
        day,
        dict(settings.template_kwargs),
        stops,
        str(tokenizer.special_tokens_map),
        type(tokenizer).__name__,
    ]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _tensors(made: TokenizedSet) -> dict[str, Tensor]:
    examples, tasks = made.examples, made.task_names
    number = {name: index for index, name in enumerate(tasks)}
    record = {
        "name": made.name,
        "tasks": tasks,
        "ids": [example.id for example in examples],
        "counts": [made.num_truncated, made.num_dropped],
        "unused": list(made.unused),
        "notes": list(made.notes),
    }
    arrays = {
        "ids": np.concatenate([example.input_ids for example in examples]),
        "mask": np.concatenate([example.loss_mask for example in examples]),
        "lengths": np.array([len(example) for example in examples], dtype=np.int64),
        "tasks": np.array([number[example.task] for example in examples], dtype=np.int32),
        "record": np.frombuffer(json.dumps(record).encode(), dtype=np.uint8).copy(),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return tensors | {"sums": torch.tensor([_sum(arrays)], dtype=torch.int64)}


def _sum(arrays: Mapping[str, Any]) -> int:
    total = 0
    for name in _PARTS:
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, total)
    return total


def _read(file: Path) -> TokenizedSet | None:
    """The set in a file; None where it is missing or, with a warning, damaged."""
    try:
        arrays = load_file(file)
        if _sum(arrays) != int(arrays["sums"][0]):
            raise ValueError("its check sum differs")
        record = json.loads(arrays["record"].tobytes())
        ends = np.cumsum(arrays["lengths"]).tolist()
        starts, tasks = [0, *ends], record["tasks"]
        examples = tuple(
            TokenizedExample(tasks[task], id, arrays["ids"][start:end], arrays["mask"][start:end])
            for task, id, start, end in zip(arrays["tasks"].tolist(), record["ids"], starts, ends, strict=False)
        )
        num_truncated, num_dropped = record["counts"]
        named = {name: tuple(record[name]) for name in ("unused", "notes")}
        return TokenizedSet(record["name"], examples, num_truncated, num_dropped, **named)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        logger.warning("data.cache: %s: is damaged (%s). It is made anew.", file, error, extra=OF_THIS_PROCESS)
        return None
