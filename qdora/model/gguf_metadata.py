"""The config and the tokenizer of a GGUF file, as transformers reads them from its header.

transformers turns each word of the vocabulary into arrays whenever it reads a header, which takes seconds for a config
and again for a tokenizer. The usual small files that they are saved as are kept in the user's cache directory
(qdora/gguf), and later commands read those.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from qdora.files.atomic import atomic_directory, remove_directory
from qdora.files.environment import cache_folder, package_versions
from qdora.model.gguf_file import read_header

logger = logging.getLogger("qdora")

_PACKAGES = ("transformers", "tokenizers", "gguf")


def config_of_gguf(path: Path) -> PreTrainedConfig:
    """The config. Raises what transformers raises for a header that it cannot use."""
    config: PreTrainedConfig = _kept(path, "config", AutoConfig.from_pretrained)
    return config


def tokenizer_of_gguf(path: Path) -> Any:
    """The tokenizer. Raises what transformers raises for a header that it cannot use."""
    return _kept(path, "tokenizer", AutoTokenizer.from_pretrained)


def _kept(path: Path, name: str, load: Callable[..., Any]) -> Any:
    """What `load` makes of the file, through a kept copy if the disk takes one."""
    folder = cache_folder("gguf") / _identity(path) / name
    if not folder.is_dir():
        made = load(str(path.parent), gguf_file=path.name)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_directory(folder) as aside:
                made.save_pretrained(aside)
        except OSError as error:
            logger.debug("%s: the %s of %s is not kept: %s", folder, name, path, error)
            return made
    try:
        found = load(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: is damaged (%s). It is made anew.", folder, error)
        remove_directory(folder)
        return load(str(path.parent), gguf_file=path.name)
    found.name_or_path = str(path.parent)
    return found


def _identity(path: Path) -> str:
    """Stands for the header and for the versions that read it."""
    start = min((tensor.offset for tensor in read_header(path).tensors), default=path.stat().st_size)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(start))
    digest.update(repr(package_versions(_PACKAGES)).encode())
    return digest.hexdigest()[:32]
