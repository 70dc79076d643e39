"""Tokenised sources on disk: a Parquet file for each source and all that decides its tokens, a row for an example."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from qdora import __version__
from qdora.data.chats import chat_settings
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.files.atomic import atomic_file
from qdora.files.console import OF_THIS_PROCESS
from qdora.files.machine import package_versions
from qdora.files.run_directory import unharmed

_LEAST_TOKENS = 2**18  # fewer are tokenised in a second

logger = logging.getLogger("qdora")


class TokenCache:
    """The tokenised sources in a directory, for one tokenizer; none for one without a Rust backend."""

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.root, self._identity = root, dict[str, Any]()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            state = json.loads(backend.to_str())
            for name in ("truncation", "padding"):  # change with every call
                state.pop(name, None)
            template, settings = tokenizer.chat_template, chat_settings(tokenizer)
            day = (settings.day or date.today()) if "strftime_now" in str(template) else None
            facts = [state, template, day, dict(settings.template_kwargs), sorted(settings.stop_ids or ())]
            facts += [str(tokenizer.special_tokens_map), type(tokenizer).__name__]
            self._identity = {"tokenizer": facts, "qdora": __version__}
            self._identity |= package_versions(("transformers", "tokenizers", "jinja2"))

    def kept(self, content: Mapping[str, Any], make: Callable[[], TokenizedSet]) -> TokenizedSet:
        """The set of `content`, JSON values: read if it is there, else made and kept. A damaged one is made anew."""
        if not self._identity:
            return make()
        key = json.dumps({**content, **self._identity}, default=str)
        file = self.root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.parquet"
        if file.exists():
            try:
                rows = pd.read_parquet(file)
                examples = tuple(TokenizedExample(*row) for row in rows.itertuples(index=False))
                facts: dict[str, Any] = {str(name): value for name, value in rows.attrs.items()}
                stored = TokenizedSet(examples=examples, **facts)
                logger.info("%s: reading its tokens from %s.", stored.name, file)
                return stored
            except (OSError, ValueError, TypeError) as error:
                logger.warning("data.cache: %s: is damaged (%s). It is made anew.", file, error, extra=OF_THIS_PROCESS)
        made = make()
        if made.num_tokens >= _LEAST_TOKENS:
            rows = pd.DataFrame(list(made.examples))
            rows.attrs = {name: getattr(made, name) for name in ("name", "num_truncated", "num_dropped", "unused")}
            with unharmed(str(file)):
                self.root.mkdir(parents=True, exist_ok=True)
                with atomic_file(file) as aside:
                    rows.to_parquet(aside)
        return made
