"""Tokenised sources on disk: a safetensors file for each source and all that decides its tokens."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qdora import __version__
from qdora.data.chats import chat_settings
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.files.atomic import atomic_file, json_bytes
from qdora.files.console import OF_THIS_PROCESS
from qdora.files.machine import package_versions
from qdora.files.run_directory import unharmed

_LEAST_TOKENS = 2**18  # fewer are tokenised in a second

logger = logging.getLogger("qdora")


class TokenCache:
    """The tokenised sources in a directory, for one tokenizer with a Rust backend."""

    def __init__(self, root: Path, tokenizer: Any) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # change with every call
            state.pop(name, None)
        template, settings = tokenizer.chat_template, chat_settings(tokenizer)
        day = (settings.day or date.today()) if "strftime_now" in str(template) else None
        facts = [state, template, day, dict(settings.template_kwargs), sorted(settings.stop_ids or ())]
        facts += [str(tokenizer.special_tokens_map), type(tokenizer).__name__]
        versions = package_versions(("transformers", "tokenizers", "jinja2"))
        self.root, self._identity = root, {"tokenizer": facts, "qdora": __version__, **versions}

    def kept(self, content: Mapping[str, Any], make: Callable[[], TokenizedSet]) -> TokenizedSet:
        """The set of `content`, JSON values: read if it is there, else made and kept. A damaged one is made anew."""
        key = json.dumps({**content, **self._identity}, default=str)
        file = self.root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if file.exists():
            try:
                return _read(file)
            except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
                logger.warning(
                    "data.cache: %s: is damaged (%s). It is made anew.", file, error, extra=OF_THIS_PROCESS
                )
        made = make()
        if made.num_tokens >= _LEAST_TOKENS:
            with unharmed(str(file)):
                self.root.mkdir(parents=True, exist_ok=True)
                with atomic_file(file) as aside:
                    save_file(_arrays(made), aside)
        return made


def _arrays(made: TokenizedSet) -> dict[str, Any]:
    record = {name: getattr(made, name) for name in ("name", "num_truncated", "num_dropped")}
    record |= {"tasks": [each.task for each in made.examples], "ids": [each.id for each in made.examples]}
    return {
        "input_ids": np.concatenate([example.input_ids for example in made.examples]),
        "loss_mask": np.concatenate([example.loss_mask for example in made.examples]),
        "lengths": np.array([len(example) for example in made.examples], dtype=np.int64),
        "record": np.frombuffer(json_bytes(record), dtype=np.uint8),
    }


def _read(file: Path) -> TokenizedSet:
    arrays = load_file(file)  # as a whole: a mapped file that somebody cuts would end the process
    record, cuts = json.loads(arrays["record"].tobytes()), np.cumsum(arrays["lengths"])[:-1]
    tokens = (np.split(arrays[name], cuts) for name in ("input_ids", "loss_mask"))
    rows = zip(record.pop("tasks"), record.pop("ids"), *tokens, strict=True)
    return TokenizedSet(examples=tuple(TokenizedExample(*row) for row in rows), **record)
