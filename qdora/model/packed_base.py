"""A packed base on disk, opened: what it is, and its weights, read or mapped.

base.json             what it was made from, and where each weight is
00000.safetensors     `<path>.<part>` of each packed weight, other weights under their own name

The packed base on disk (model/stored_base.py): quantised once, tensor by tensor, and read from there ever after.

Its directory is named for a key, which is made of the settings, of the names and shapes of the model, and of its files:
their names, sizes, times and samples of their bytes. Weights that are not quantised are kept in the dtype of the
checkpoint, so the compute dtype is not part of the key.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.files.atomic import DISK_FULL, atomic_directory, disk_reason, json_text
from qdora.files.tensor_file import MappedFile, TensorSpec, write_safetensors
from qdora.model.load import Quantization, check_stored_packed, layers_to_quantize, stored_tensors
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import Stored, StoredPacked, StoredTensor, match_to_model, shard_files
from qdora.ops.packed import PackedWeight, empty_packed, from_tensors, quantize

RECORD_FILE = "base.json"
FORMAT = 1

_FileName = Annotated[str, Field(pattern=r"^[0-9]{5}\.safetensors$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Weight(_Strict):
    """Where a weight is; `kind` is None for one that is not quantised."""

    file: _FileName
    shape: list[int]
    kind: str | None = None
    block_size: int = 0
    double_quant: bool = False


class _Record(_Strict):
    """base.json."""

    format: Literal[1]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    source: str
    settings: dict[str, Any]
    files: dict[_FileName, int]
    weights: dict[str, _Weight]


@dataclass(frozen=True)
class Part:
    """A tensor of a weight that is mapped."""

    file: MappedFile
    name: str


class StoredBase:
    """A packed base on disk, opened; its weights are read, or mapped, when they are asked for.

    Args:
        directory: Where it is.
    Attributes:
        directory: The same.
        record: What base.json says.
    Raises:
        UserError: Nothing there, or something that is damaged, in one line.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        file = directory / RECORD_FILE
        try:
            self.record = _Record.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{directory}: holds no packed base ({RECORD_FILE} is missing).") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise UserError(f"{file}: is damaged: {where}: {first['msg']}.") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {disk_reason(error)}.") from error
        for name, size in self.record.files.items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise UserError(f"{path}: is damaged: {found:,} bytes, expected {size:,}.")
        self._files: dict[str, MappedFile] = {}
        for name in self.record.files:
            try:
                self._files[name] = MappedFile(directory / name)
            except (ValueError, OSError, KeyError, TypeError) as error:
                raise UserError(f"{directory / name}: is damaged: {one_line(error)}.") from error

    def stored(self, *, mapped: bool = False) -> dict[str, Stored]:
        """Model name -> weight, as a checkpoint's. `mapped`: what is read are views of the files, never to be written.

        Raises:
            UserError: From reading a weight that does not fit its record.
        """
        return {name: self._item(name, weight, mapped) for name, weight in self.record.weights.items()}

    def parts(self, name: str) -> list[Part]:
        """The mapped tensors of a weight, whose pages can be fetched and dropped."""
        weight = self.record.weights[name]
        file = self._files[weight.file]
        return [Part(file, each) for each in _names(name, weight, file)]

    def _item(self, name: str, weight: _Weight, mapped: bool) -> Stored:
        shape = tuple(weight.shape)

        def read() -> Any:
            try:
                file = self._files[weight.file]
                tensors = {each: file.tensor(each) for each in _names(name, weight, file)}
                if not mapped:
                    tensors = {each: tensor.clone() for each, tensor in tensors.items()}
                    for each in tensors:
                        file.drop(each)
                if weight.kind is None:
                    return tensors[name].view(shape)
                parts = {each.rpartition(".")[2]: tensor for each, tensor in tensors.items()}
                return from_tensors(weight.kind, (shape[0], shape[1]), weight.block_size, parts)
            except (KeyError, ValueError, RuntimeError, IndexError) as error:
                raise UserError(f"{self.directory}: {name}: cannot be read: {one_line(error)}") from error

        if weight.kind is None:
            return StoredTensor(name, shape, read)
        return StoredPacked(name, shape, weight.kind, weight.block_size, weight.double_quant, read)


def _names(name: str, weight: _Weight, file: MappedFile) -> list[str]:
    """Names in the file of the tensors of a weight."""
    if weight.kind is None:
        return [name]
    path = name.removesuffix(".weight")
    held = set(file.names)
    parts = ["packed", "absmax"] + ["nested_absmax", "nested_code", "nested_offset"] * weight.double_quant
    missing = [part for part in parts if f"{path}.{part}" not in held]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing in {file.path.name}")
    return [f"{path}.{part}" for part in parts]


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


log = logging.getLogger("qdora")

# Held in memory until it is written: little beside a block of a large model, and few files.
_FILE_BYTES = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10


def default_cache() -> Path:
    """Where packed bases are kept unless a recipe says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdora" / "bases"


class BaseCache:
    """A `Reader` of `load_model` that quantises a source into a directory once and reads it from there.

    Args:
        root: Directory of all packed bases; made where it is missing.
        wanted: How the linear layers are to be held, not "none".
        device: Where weights are quantised.
        mapped: Weights are left in the files and read where they are used.
        progress: Called with (tensors done, tensors in all) while a base is written.
    Attributes:
        base: The one that was read last.
    """

    def __init__(
        self,
        root: Path,
        wanted: Quantization,
        device: torch.device,
        *,
        mapped: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.root, self.wanted, self.device, self.mapped, self.progress = root, wanted, device, mapped, progress
        self.base: StoredBase | None = None

    def __call__(self, source: ModelSource, model: PreTrainedModel) -> dict[str, Stored]:
        """Model name -> weight.

        Raises:
            UserError: A source that does not fit, a full disk, the base of another model in this one's place.
        """
        key = cache_key(source, model, self.wanted)
        directory = self.root / key[:20]
        with _locked(self.root, directory.name) as refusal:
            base = self._opened(directory, key)
            if base is None and refusal is not None:
                raise _unwritable(self.root, refusal) from refusal
            if base is None:
                self._write(directory, key, source, model)
                base = StoredBase(directory)
            else:
                log.info("Reading the packed base from %s.", directory)
        self.base = base
        return match_to_model(base.stored(mapped=self.mapped), model)

    def _opened(self, directory: Path, key: str) -> StoredBase | None:
        if not directory.exists():
            return None
        try:
            base = StoredBase(directory)
        except UserError as error:
            log.warning("%s It is made anew.", error)
            return None
        if base.record.key != key:
            raise UserError(
                f"{directory}: holds the packed base of {base.record.source!r} with {base.record.settings}, not the "
                "one that belongs here. Delete the directory, or set another base.cache."
            )
        return base

    def _write(self, directory: Path, key: str, source: ModelSource, model: PreTrainedModel) -> None:
        stored = stored_tensors(source, model)
        layers = layers_to_quantize(model, self.wanted)
        packed = {name: item for name, item in stored.items() if isinstance(item, StoredPacked)}
        if packed:
            check_stored_packed(packed, None, self.wanted, layers)
        log.info("Writing the packed base to %s, for later starts.", directory)
        write_base(
            directory,
            stored,
            set() if packed else layers,
            self.wanted,
            key=key,
            source=source.name,
            device=self.device,
            progress=self.progress,
        )


def cache_key(source: ModelSource, model: PreTrainedModel, wanted: Quantization) -> str:
    """What a packed base follows from, as 64 hex digits. Only samples of the weights are read."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    content = {
        "format": FORMAT,
        "quantization": asdict(wanted),
        "model": shapes,
        "files": fingerprints(source),
    }
    return hashlib.sha256(json_text(content).encode()).hexdigest()


def fingerprints(source: ModelSource) -> list[dict[str, Any]]:
    """What tells a model's files from others, as JSON values: others mean that what was made of them is made anew."""
    files = [source.path] if source.is_gguf else [*shard_files(source.path), source.path / "config.json"]
    return [_fingerprint(file) for file in files]


def _fingerprint(file: Path) -> dict[str, Any]:
    """Name, size, time and samples: all of the bytes of a 70B model would take minutes to read."""
    facts = file.stat()
    digest = hashlib.sha256()
    step = max(1, facts.st_size // _SAMPLES)
    with file.open("rb") as stream:
        for start in range(0, facts.st_size, max(step, _SAMPLE_BYTES)):
            stream.seek(start)
            digest.update(stream.read(_SAMPLE_BYTES))
    return {"name": file.name, "size": facts.st_size, "time": facts.st_mtime_ns, "samples": digest.hexdigest()}


def write_base(
    directory: Path,
    stored: Mapping[str, Stored],
    layers: set[str],
    wanted: Quantization,
    *,
    key: str,
    source: str,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Quantise a checkpoint into a directory, which appears whole or not at all.

    Memory holds one tensor of the checkpoint, and the packed weights of a file of 256 MiB.

    Args:
        directory: Where to.
        stored: Model name -> weight.
        layers: Paths of the linear layers that are quantised.
        wanted: How.
        key, source: For the record.
        device: Where they are quantised.
        progress: Called after each tensor with (tensors done, tensors in all).
    Raises:
        UserError: The disk has too little room, or cannot be written to.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(directory) as partial:
            _check_room(partial, stored, layers, wanted)  # here: what a killed write had left is gone
            record = _write_files(partial, stored, layers, wanted, device, progress)
            known = {"format": FORMAT, "key": key, "source": source, "settings": asdict(wanted)}
            (partial / RECORD_FILE).write_text(json_text({**known, **record}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"base.cache: {directory}: cannot be written: {disk_reason(error)}.") from error


def _write_files(
    directory: Path,
    stored: Mapping[str, Stored],
    layers: set[str],
    wanted: Quantization,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Write the files; returns `files` and `weights` of the record."""
    files: dict[str, int] = {}
    weights: dict[str, dict[str, Any]] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        if held:
            specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()]
            specs.sort(key=lambda spec: -spec.dtype.itemsize)  # every tensor is then aligned
            file = f"{len(files):05d}.safetensors"
            files[file] = write_safetensors(directory / file, specs, (held[spec.name] for spec in specs))
            held.clear()

    for done, (name, item) in enumerate(stored.items(), start=1):
        path, _, leaf = name.rpartition(".")
        value = item.read()
        if isinstance(value, Tensor) and leaf == "weight" and path in layers:
            value = quantize(value.to(device), wanted.kind, wanted.block_size, wanted.double_quant, name=name)
        facts: dict[str, Any] = {"shape": list(item.shape)}
        if isinstance(value, PackedWeight):
            nested = value.nested is not None
            facts |= {"kind": value.kind, "block_size": value.block_size, "double_quant": nested}
            parts = {f"{path}.{part}": tensor for part, tensor in value.tensors().items()}
        else:
            parts = {name: value.clone()}  # what is read may be a view of the checkpoint's file
        if sum(map(_num_bytes, [*held.values(), *parts.values()])) > _FILE_BYTES:
            flush()
        weights[name] = {"file": f"{len(files):05d}.safetensors", **facts}
        held.update(parts)
        del value, parts
        if progress is not None:
            progress(done, len(stored))
    flush()
    return {"files": files, "weights": weights}


def _check_room(folder: Path, stored: Mapping[str, Stored], layers: set[str], wanted: Quantization) -> None:
    """Raise UserError where the disk has less room than the packed weights and the others as they are take."""
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
            f"{needed / 2**30:.1f} GiB; allowed: a directory on another disk, or null where the base is not on disk."
        )


@contextmanager
def _locked(root: Path, name: str) -> Iterator[OSError | None]:
    """One process at a time: of several that start together one writes, and the others read what it wrote.

    Yields:
        Why nothing can be written here, or None. A base that is there can be read all the same, by many at a time.
    """
    path = root / f".{name}.lock"
    descriptor: int | None = None
    refusal: OSError | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        refusal = error
        with suppress(OSError):  # a copy may lack the lock
            descriptor = os.open(path, os.O_RDONLY)
    try:
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX if refusal is None else fcntl.LOCK_SH)
        yield refusal
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _unwritable(root: Path, error: OSError) -> UserError:
    return UserError(f"base.cache: {root}: cannot be written: {disk_reason(error)}.")


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
