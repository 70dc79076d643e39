"""The base cache: a source is quantised once, tensor by tensor, into a packed base on disk and read from there later.

A base has a directory of its own, named for a key of the settings, the names and shapes of the model's tensors, and the
model's files (their names, sizes, times and samples of their bytes). Weights that are not quantised keep the dtype of
the checkpoint, so the compute dtype is not part of the key.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.files.atomic import DISK_FULL, atomic_directory, disk_reason, json_text
from qdora.model.load import Progress, Quantization, check_stored_packed, layers_to_quantize, stored_tensors
from qdora.model.packed_base import PackedBase, WeightForm, read_record, write_weights
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import Stored, StoredPacked, match_to_model, shard_files
from qdora.ops.packed import empty_packed, quantize
from qdora.ops.tiles import Weight

log = logging.getLogger("qdora")

RECORD_FILE = "base.json"
FORMAT = 1
# A file's tensors are in memory until it is written; this is less than a block of a large model.
_FILE_BYTES = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10

_FileName = Annotated[str, Field(pattern=r"^[0-9]{5}\.safetensors$")]


class CacheRecord(BaseModel):
    """The content of base.json: what the base was made from, its files with their bytes, and its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    source: str
    settings: dict[str, Any]
    files: dict[_FileName, int]
    weights: dict[str, WeightForm]


def default_cache() -> Path:
    """Where packed bases are kept unless a recipe says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdora" / "bases"


@dataclass
class BaseCache:
    """A `Reader` of `load_model` that quantises a source into a directory once and reads it from there later.

    `root` holds all packed bases; it is made if it is missing. `wanted` says how to hold the linear layers (not
    "none"), `device` where they are quantised. `mapped` leaves the weights in the files, to be read where they are
    used. `base` is the base that was read last.
    """

    root: Path
    wanted: Quantization
    device: torch.device
    mapped: bool = False
    progress: Progress | None = None
    base: PackedBase | None = None

    def __call__(self, source: ModelSource, model: PreTrainedModel) -> dict[str, Stored]:
        """Model name -> weight.

        Raises UserError if the source does not fit, the disk is full, or the directory holds the base of another model.
        """
        key = cache_key(source, model, self.wanted)
        directory = self.root / key[:20]
        with _locked(self.root, directory.name) as refusal:
            base = _open_if_whole(directory, key)
            if base is None and refusal is not None:
                raise UserError(f"base.cache: {self.root}: cannot be written: {disk_reason(refusal)}.") from refusal
            if base is None:
                self._write(directory, key, source, model)
                _, base = open_cached_base(directory)
            else:
                log.info("Reading the packed base from %s.", directory)
        self.base = base
        return match_to_model(base.stored(mapped=self.mapped), model)

    def _write(self, directory: Path, key: str, source: ModelSource, model: PreTrainedModel) -> None:
        stored = stored_tensors(source, model)
        layers = layers_to_quantize(model, self.wanted)
        packed = {name: item for name, item in stored.items() if isinstance(item, StoredPacked)}
        if packed:
            check_stored_packed(packed, None, self.wanted, layers)
            layers = set()
        log.info("Writing the packed base to %s, for later starts.", directory)
        made_from = {"key": key, "source": source.name}
        write_base(directory, stored, layers, self.wanted, made_from, device=self.device, progress=self.progress)


def open_cached_base(directory: Path) -> tuple[CacheRecord, PackedBase]:
    """Open a directory of `write_base`. Raises UserError, one line, if there is no base or it is damaged."""
    record = read_record(directory / RECORD_FILE, CacheRecord)
    for name, size in record.files.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise UserError(f"{path}: is damaged: {found:,} bytes, expected {size:,}.")
    return record, PackedBase(directory, record.files, record.weights)


def _open_if_whole(directory: Path, key: str) -> PackedBase | None:
    if not directory.exists():
        return None
    try:
        record, base = open_cached_base(directory)
    except UserError as error:
        log.warning("%s The base is quantised again.", error)
        return None
    if record.key != key:
        raise UserError(
            f"{directory}: holds the packed base of {record.source!r} with {record.settings}, not the one that belongs "
            "here. Fix: delete the directory, or set another base.cache."
        )
    return base


def cache_key(source: ModelSource, model: PreTrainedModel, wanted: Quantization) -> str:
    """Hash of everything that determines a packed base, 64 hex digits. Only samples of the weights are read."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    content = {"format": FORMAT, "quantization": asdict(wanted), "model": shapes, "files": fingerprints(source)}
    return hashlib.sha256(json_text(content).encode()).hexdigest()


def fingerprints(source: ModelSource) -> list[dict[str, Any]]:
    """Name, size, time and samples of each of a model's files, as JSON values."""
    found = []
    for file in [source.path] if source.is_gguf else [*shard_files(source.path), source.path / "config.json"]:
        facts, digest = file.stat(), hashlib.sha256()
        with file.open("rb") as stream:
            # Samples, since reading all bytes of a 70B model would take minutes.
            for start in range(0, facts.st_size, max(facts.st_size // _SAMPLES, _SAMPLE_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
        known = {"name": file.name, "size": facts.st_size, "time": facts.st_mtime_ns}
        found.append({**known, "samples": digest.hexdigest()})
    return found


def write_base(
    directory: Path,
    stored: Mapping[str, Stored],
    layers: set[str],
    wanted: Quantization,
    made_from: Mapping[str, str],
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> None:
    """Quantise a checkpoint into a directory, which appears whole or not at all.

    Memory holds one tensor of the checkpoint and the packed weights of one file (256 MiB). `made_from` is the `key`
    and `source` for the record; the other arguments are as in `Loading`. Raises UserError if the disk has too little
    room or cannot be written to.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(directory) as partial:
            _check_room(partial, stored, layers, wanted)  # here, since the leftover of a killed write is gone now
            weights = _quantized(stored, layers, wanted, device, progress)
            written = write_weights(partial, weights, "{:05d}.safetensors", _FILE_BYTES)
            record = {"format": FORMAT, **made_from, "settings": asdict(wanted), **written}
            (partial / RECORD_FILE).write_text(json_text(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"base.cache: {directory}: cannot be written: {disk_reason(error)}.") from error


def _quantized(
    stored: Mapping[str, Stored],
    layers: set[str],
    wanted: Quantization,
    device: torch.device,
    progress: Progress | None,
) -> Iterator[tuple[str, Weight]]:
    for done, (name, item) in enumerate(stored.items(), start=1):
        value = item.read()
        if isinstance(value, Tensor) and name.endswith(".weight") and name.removesuffix(".weight") in layers:
            value = quantize(value.to(device), wanted.kind, wanted.block_size, wanted.double_quant, name=name)
        elif isinstance(value, Tensor):
            value = value.clone()  # it may be a view of the checkpoint's file
        yield name, value
        del value
        if progress is not None:
            progress(done, len(stored))


def _check_room(folder: Path, stored: Mapping[str, Stored], layers: set[str], wanted: Quantization) -> None:
    """Raise UserError if the disk has less room than the packed weights and the other tensors take."""
    needed = 0
    for name, item in stored.items():
        if name.removesuffix(".weight") in layers and name.endswith(".weight"):
            shape = (item.shape[0], item.shape[1])
            needed += empty_packed(wanted.kind, shape, wanted.block_size, wanted.double_quant, "meta").num_bytes
        else:
            needed += torch.Size(item.shape).numel() * (1 if isinstance(item, StoredPacked) else item.itemsize)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"base.cache: {folder.parent}: {DISK_FULL}: {free / 2**30:.1f} GiB are free, the packed base needs "
            f"{needed / 2**30:.1f} GiB. Fix: name a directory on another disk, or set null if the base is not on disk."
        )


@contextmanager
def _locked(root: Path, name: str) -> Iterator[OSError | None]:
    """Let one process at a time in: one of several that start together writes, and the others read what it wrote.

    Yields why nothing can be written here, or None. A base that exists can be read all the same, by many processes.
    """
    path = root / f".{name}.lock"
    descriptor, refusal = None, None
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        refusal = error
        with suppress(OSError):  # a copied cache may lack the lock
            descriptor = os.open(path, os.O_RDONLY)
    try:
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX if refusal is None else fcntl.LOCK_SH)
        yield refusal
    finally:
        if descriptor is not None:
            os.close(descriptor)
