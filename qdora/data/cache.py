"""Tokenised sources on disk, so that a later start, or another process of the run, does not tokenise them again.

A safetensors file for each source and everything that decides its tokens: its rows as they are in their files, the
settings, the tokenizer and the versions of the program. Files appear whole or not at all; a damaged one is made anew.

    ids (tokens) int32   mask (tokens) bool   lengths (examples) int64   tasks (examples) int32
    record (bytes) uint8: JSON of names and counts   sum (1) int64: CRC-32 of the ids and the mask
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
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qdora import __version__
from qdora.data.chats import chat_settings
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.files.atomic import atomic_file, json_text
from qdora.files.console import OF_THIS_PROCESS
from qdora.files.environment import package_versions

_FORMAT = 6
_LEAST_TOKENS = 2**18
"""Sources with fewer tokens are not kept: they are tokenised in a second."""
_UNUSED_SECONDS = 30 * 24 * 3600.0
"""Files that no start has used for so long are removed."""
_OWN = re.compile(r"\.?[0-9a-f]{32}\.safetensors(\.[0-9a-f]+\.partial)?")
"""Names of the cache's files, and of those that a kill left behind. The folder may hold other files of the user."""

logger = logging.getLogger("qdora")


class TokenCache:
    """The tokenised sources in a directory, for one tokenizer; one without a Rust backend has no identity, so that
    nothing is kept."""

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.root, self._identity = root, None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            state = json.loads(backend.to_str())
            for name in ("truncation", "padding"):  # change with every call
                state.pop(name, None)
            template, settings = getattr(tokenizer, "chat_template", None), chat_settings(tokenizer)
            day = (settings.day or date.today()) if "strftime_now" in str(template) else None
            facts = [state, template, day, dict(settings.template_kwargs), sorted(settings.stop_ids or ())]
            facts += [str(tokenizer.special_tokens_map), type(tokenizer).__name__]
            self._identity = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()

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
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            logger.warning("data.cache: %s: is damaged (%s). It is made anew.", file, error, extra=OF_THIS_PROCESS)
        made = make()
        if made.num_tokens >= _LEAST_TOKENS:
            try:
                self._write(file, made)
            except (OSError, SafetensorError) as error:
                text = "data.cache: %s: the tokens of %s cannot be kept: %s."
                logger.warning(text, self.root, made.name, error, extra=OF_THIS_PROCESS)
        return made

    def _write(self, file: Path, made: TokenizedSet) -> None:
        """Keep a set and remove old files."""
        tasks = made.task_names
        record = {"name": made.name, "tasks": tasks, "ids": [example.id for example in made.examples]}
        record |= {"counts": [made.num_truncated, made.num_dropped], "unused": made.unused}
        arrays = {
            "ids": np.concatenate([example.input_ids for example in made.examples]),
            "mask": np.concatenate([example.loss_mask for example in made.examples]),
            "lengths": np.array([len(example) for example in made.examples], dtype=np.int64),
            "tasks": np.array([tasks.index(example.task) for example in made.examples], dtype=np.int32),
            "record": np.frombuffer(json.dumps(record).encode(), dtype=np.uint8),
        }
        self.root.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as aside:
            save_file({**arrays, "sum": _sum(arrays)}, aside)
        with suppress(OSError):  # another process may clean, too
            for other in self.root.iterdir():
                if _OWN.fullmatch(other.name) and time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                    other.unlink(missing_ok=True)


def _sum(arrays: Mapping[str, Any]) -> Any:
    return np.array([zlib.crc32(arrays["mask"], zlib.crc32(arrays["ids"]))], dtype=np.int64)


def _read(file: Path) -> TokenizedSet:
    arrays = load_file(file)  # as a whole: a mapped file that somebody cuts would end the process
    if _sum(arrays) != arrays["sum"]:
        raise ValueError("its check sum differs")
    record = json.loads(arrays["record"].tobytes())
    cuts = np.cumsum(arrays["lengths"])[:-1]
    parts = arrays["tasks"].tolist(), record["ids"], np.split(arrays["ids"], cuts), np.split(arrays["mask"], cuts)
    examples = [
        TokenizedExample(record["tasks"][task], id, ids, mask) for task, id, ids, mask in zip(*parts, strict=True)
    ]
    return TokenizedSet(record["name"], tuple(examples), *record["counts"], tuple(record["unused"]))
