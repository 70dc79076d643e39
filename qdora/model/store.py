"""A packed base on disk: safetensors files with the tensors of each weight, and a record that says how to read them.

    a base cache                      base.json        00000.safetensors, ...    all weights of a model
    base/ in a run with base.prune    compressed.json  model.safetensors, ...    the pruned layers only

The tensors of a packed weight are `<path>.packed`, `<path>.absmax`, ... (`PackedWeight.tensors`), its mask is
`<path>.keep_bits`, and a dense weight has its own name.

A base cache holds each source that was quantised, tensor by tensor, in a directory named for a key of the settings, the
names and shapes of the model's tensors, and the model's files (names, sizes, times, samples of their bytes). Weights
that are not quantised keep the checkpoint's dtype, so the compute dtype is not part of the key.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.adapter.frozen_linear import FrozenLinear
from qdora.errors import DiskFull, UserError
from qdora.files.atomic import DISK_FULL, atomic_directory, disk_reason, json_bytes, json_text
from qdora.files.console import OF_THIS_PROCESS, Progress
from qdora.files.sampled_digest import sampled_digest
from qdora.files.tensor_file import write_tensors
from qdora.files.work_lock import in_turn
from qdora.model.checkpoint import Stored, StoredPacked, StoredTensor, match_to_model, shard_files
from qdora.model.load import (
    Loading,
    Quantization,
    iterate_quantized,
    layers_to_quantize,
    place_all,
    place_frozen,
    settle_stored,
    tensors_of_source,
)
from qdora.model.multimodal import not_loaded
from qdora.model.source import ModelSource
from qdora.quant.packed import TENSOR_NAMES, PackedWeight, empty_packed, from_tensors
from qdora.quant.tiles import Weight
from qdora.recipe.section import one_line

log = logging.getLogger("qdora")

CACHE_RECORD_FILE = "base.json"
CACHE_FORMAT = 1
# A file's tensors are in memory until it is written; this is less than a block of a large model.
_FILE_BYTES = 256 << 20
PRUNED_RECORD_FILE = "compressed.json"
PRUNED_FORMAT = 1
_PRUNED_FILE_BYTES = 5 * 2**30

_FileName = Annotated[str, Field(pattern=r"^[0-9]{5}\.safetensors$")]
Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True)
class PrunedLayer:
    """Counts and error of a pruned and quantised layer.

    `num_zeros` counts all zeros of the result, since a weight can also be quantised to 0. `relative_error` is
    ||W' - W|| / ||W|| (Frobenius norm) of the dense weight W and the result W'. `num_packed_bytes` are the bytes of the
    result in its format (`PackedWeight.num_packed_bytes`), which stores zeros, too.
    """

    num_weights: int
    num_pruned: int
    num_zeros: int
    relative_error: float
    num_packed_bytes: int

    @property
    def sparsity(self) -> float:
        """Pruned weights / all weights."""
        return self.num_pruned / self.num_weights


class WeightForm(BaseModel):
    """Shape of a weight, its kind (None for a dense one), and its block size."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    shape: tuple[int, ...]
    kind: str | None = None
    block_size: int = 0


class PackedBase:
    """The weights in some files of a directory, by model name; each is read when it is asked for."""

    def __init__(self, directory: Path, files: Iterable[str], forms: Mapping[str, WeightForm]) -> None:
        self.directory, self.forms = directory, forms
        self._file_of: dict[str, Path] = {}
        for path in (directory / name for name in files):
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = set(file.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: is damaged: {one_line(str(error))}.") from error
            if twice := self._file_of.keys() & tensors:
                raise UserError(f"{path}: is damaged: tensor '{min(twice)}' is in another file, too.")
            self._file_of.update(dict.fromkeys(tensors, path))

    def read(self, name: str, *, mapped: bool = False) -> Weight:
        """A weight; `mapped` as views of the files, which must not be written to, instead of copies.

        A file is opened for each tensor: what was read does not stay in memory.
        """
        form, path = self.forms[name], name.removesuffix(".weight")
        tensors: dict[str, Tensor] = {}
        try:
            for key in [name] if form.kind is None else [f"{path}.{part}" for part in TENSOR_NAMES]:
                if key in self._file_of:
                    with safe_open(self._file_of[key], framework="pt") as file:
                        tensor = file.get_tensor(key)
                    tensors[key.rpartition(".")[2]] = tensor if mapped else tensor.clone()
                    del tensor
            if form.kind is not None:
                return from_tensors(form.kind, (form.shape[0], form.shape[1]), form.block_size, tensors)
            if not tensors:
                raise ValueError("the tensor is missing")
            return tensors[name.rpartition(".")[2]].view(form.shape)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, IndexError) as error:
            raise UserError(f"{self.directory}: {name}: cannot be read: {one_line(str(error))}") from error

    def stored(self, *, mapped: bool = False) -> dict[str, Stored]:
        """Model name -> weight, like those of a checkpoint; `mapped` as in `read`."""
        items: dict[str, Stored] = {}
        for name, form in self.forms.items():
            read: Any = partial(self.read, name, mapped=mapped)
            if form.kind is None:
                items[name] = StoredTensor(name, form.shape, read)
            else:
                double = f"{name.removesuffix('.weight')}.nested_absmax" in self._file_of
                items[name] = StoredPacked(name, form.shape, form.kind, form.block_size, double, read)
        return items


def read_record(file: Path, kind: type[Record]) -> Record:
    """The record of a packed base. Raises UserError, one line, if it is missing or damaged."""
    try:
        return kind.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file.parent}: holds no packed base ({file.name} is missing).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(f"{file}: is damaged: {where}: {first['msg']} (got {str(first['input'])[:40]!r}).") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {disk_reason(error)}.") from error


def write_weights(
    folder: Path, weights: Iterable[tuple[str, Weight]], file_name: str, max_file_bytes: int
) -> dict[str, Any]:
    """Write (model name, weight), made one after the other, to safetensors files; memory holds the tensors of one file.

    A file's name is `file_name` ("{:05d}.safetensors") with its number. Its tensors have at most `max_file_bytes`; a
    larger weight gets a file of its own. Returns JSON values for a record: "files" (name -> bytes) and "weights"
    (model name -> form).
    """
    files: dict[str, int] = {}
    forms: dict[str, dict[str, Any]] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        if held:
            file = file_name.format(len(files))
            files[file] = write_tensors(folder / file, held)
            held.clear()

    for name, weight in weights:
        forms[name] = {"shape": list(weight.shape)}
        if isinstance(weight, PackedWeight):
            forms[name] |= {"kind": weight.kind, "block_size": weight.block_size}
            parts = {f"{name.removesuffix('.weight')}.{part}": each for part, each in weight.tensors().items()}
        else:
            parts = {name: weight}
        if sum(tensor.nbytes for tensor in (*held.values(), *parts.values())) > max_file_bytes:
            flush()
        held.update(parts)
        del weight, parts  # before the next weight is made
    flush()
    return {"files": files, "weights": forms}


def save_pruned_base(
    model: nn.Module, layers: Mapping[str, PrunedLayer], directory: Path, *, key: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the pruned layers of a freshly loaded base; the directory appears whole and replaces an older one.

    `layers` is `Pruner.layers`; `key` is a hash of all that decides the pruned weights; `settings` are JSON values of
    the recipe. Returns the content of compressed.json.
    """
    num_weights = sum(layer.num_weights for layer in layers.values())
    num_pruned = sum(layer.num_pruned for layer in layers.values())
    counts = {"num_weights": num_weights, "num_pruned": num_pruned, "sparsity": num_pruned / num_weights}
    record: dict[str, Any] = {"format": PRUNED_FORMAT, "key": key, "settings": dict(settings), **counts, "layers": {}}

    def weights() -> Iterator[tuple[str, Weight]]:
        for path, report in layers.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, FrozenLinear), path
            assert layer.keep_bits is not None, path
            shape = (layer.out_features, layer.in_features)
            record["layers"][path] = layer_record(layer.kind, shape, layer.block_size, report)
            yield f"{path}.weight", layer.stored_weight
            yield f"{path}.keep_bits", layer.keep_bits

    with atomic_directory(directory) as folder:
        files = list(write_weights(folder, weights(), "model-{:05d}.safetensors", _PRUNED_FILE_BYTES)["files"])
        if len(files) == 1:
            (folder / files[0]).rename(folder / "model.safetensors")
        (folder / PRUNED_RECORD_FILE).write_bytes(json_bytes(record, indent=2))
    return record


def layer_record(kind: str, shape: tuple[int, int], block_size: int, layer: PrunedLayer) -> dict[str, Any]:
    """JSON values of a layer: kind, shape (out, in), block size, counts and error."""
    form = {"kind": kind, "shape": list(shape), "block_size": block_size, "sparsity": layer.sparsity}
    return {**form, **asdict(layer)}


class _PrunedRecord(BaseModel):
    """The part of compressed.json that is read; the kind of a layer that is not quantised is "dense"."""

    model_config = ConfigDict(strict=True)
    format: Literal[1]
    key: str
    layers: dict[str, WeightForm]


class PrunedBase:
    """A `Placer` that takes the pruned layers from a directory of `save_pruned_base`."""

    def __init__(self, directory: Path) -> None:
        record = read_record(directory / PRUNED_RECORD_FILE, _PrunedRecord)
        self.key, self.layers = record.key, record.layers
        forms: dict[str, WeightForm] = {}
        for path, layer in self.layers.items():
            kind = None if layer.kind == "dense" else layer.kind
            forms[f"{path}.weight"] = WeightForm(shape=layer.shape, kind=kind, block_size=layer.block_size)
            forms[f"{path}.keep_bits"] = WeightForm(shape=(-(-layer.shape[0] * layer.shape[1] // 8),))
        self.base = PackedBase(directory, sorted(file.name for file in directory.glob("*.safetensors")), forms)

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        """Put the pruned layers in as they are stored, and the other tensors as `place_all` does."""
        place_all(replace(load, stored=self.others(load)))
        for path in self.layers:
            weight, keep_bits = self.read(path)
            moved = weight.to(load.compute_dtype) if isinstance(weight, Tensor) else weight
            place_frozen(load.model, path, moved.to(load.device), keep_bits.to(load.device))

    def others(self, load: Loading) -> dict[str, Stored]:
        """The stored tensors that are not of a pruned layer."""
        missing = sorted(self.layers.keys() - load.layers)
        if missing:
            raise UserError(f"{self.base.directory}: {missing[0]} is not a layer that this model and recipe prune.")
        return {name: item for name, item in load.stored.items() if name not in self.base.forms}

    def read(self, path: str) -> tuple[Weight, Tensor]:
        """A pruned layer as it is stored, and its mask."""
        weight, keep_bits = self.base.read(f"{path}.weight"), self.base.read(f"{path}.keep_bits")
        assert isinstance(keep_bits, Tensor)
        return weight, keep_bits


class _CacheRecord(BaseModel):
    """The content of base.json: what the base was made from, its files with their bytes, and its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: Literal[1]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    source: str
    settings: dict[str, Any]
    files: dict[_FileName, int]
    weights: dict[str, WeightForm]


@dataclass
class BaseCache:
    """A `Reader` of `load_model` that quantises a source into a directory once and reads it from there later.

    `root` holds all packed bases. `wanted` says how to hold the linear layers (not "none"), `device` where they are
    quantised. `mapped` leaves the weights in the files, to be read where they are used. `base` is the last one read.
    """

    root: Path
    wanted: Quantization
    device: torch.device
    mapped: bool = False
    progress: Progress | None = None
    base: PackedBase | None = None

    def __call__(self, source: ModelSource, model: PreTrainedModel) -> dict[str, Stored]:
        """Model name -> weight. UserError if the directory holds the base of another model or cannot be written."""
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        decides = {"format": CACHE_FORMAT, "quantization": asdict(self.wanted), "model": shapes}
        key = hashlib.sha256(json_text({**decides, "files": fingerprints(source)}).encode()).hexdigest()
        directory = self.root / key[:20]
        with in_turn(directory) as refusal:
            base = _open_if_whole(directory, key)
            if base is None and refusal is not None:
                raise _unwritten(self.root, refusal) from refusal
            if base is not None:
                log.info("Reading the packed base from %s.", directory)
                if not_loaded(model):  # an export copies these from the source
                    tensors_of_source(source, model)
            else:
                self._write(directory, key, source, model)
                _, base = open_cached_base(directory)
        self.base = base
        return match_to_model(base.stored(mapped=self.mapped), model)

    def _write(self, directory: Path, key: str, source: ModelSource, model: PreTrainedModel) -> None:
        """Memory holds one tensor of the checkpoint and the packed weights of one file (256 MiB)."""
        stored, layers = tensors_of_source(source, model), layers_to_quantize(model, self.wanted)
        stored, layers = settle_stored(stored, None, self.wanted, layers)
        log.info("Writing the packed base to %s, for later starts.", directory)

        def weights() -> Iterator[tuple[str, Weight]]:
            quantized = iterate_quantized(stored, layers, self.wanted, self.device)
            for done, (name, value) in enumerate(quantized, start=1):
                # A dense one may be a view of the checkpoint's file.
                yield name, value.clone() if isinstance(value, Tensor) else value
                del value
                if self.progress is not None:
                    self.progress(done, len(stored))

        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_directory(directory) as partly:
                _check_room(partly, stored, layers, self.wanted)  # here: the leftover of a killed write is gone now
                written = write_weights(partly, weights(), "{:05d}.safetensors", _FILE_BYTES)
                record = {"format": CACHE_FORMAT, "key": key, "source": source.name, "settings": asdict(self.wanted)}
                (partly / CACHE_RECORD_FILE).write_bytes(json_bytes(record | written, indent=1))
        except OSError as error:
            raise _unwritten(directory, error) from error


def open_cached_base(directory: Path) -> tuple[_CacheRecord, PackedBase]:
    """Open a base of `BaseCache`. UserError, one line, if there is none or it is damaged."""
    record = read_record(directory / CACHE_RECORD_FILE, _CacheRecord)
    for name, size in record.files.items():
        path = directory / name
        num_bytes = path.stat().st_size if path.is_file() else 0
        if num_bytes != size:
            raise UserError(f"{path}: is damaged: {num_bytes:,} bytes, expected {size:,}.")
    return record, PackedBase(directory, record.files, record.weights)


def _open_if_whole(directory: Path, key: str) -> PackedBase | None:
    if not directory.exists():
        return None
    try:
        record, base = open_cached_base(directory)
    except UserError as error:
        log.warning("%s The base is quantised again.", error, extra=OF_THIS_PROCESS)
        return None
    if record.key != key:
        raise UserError(
            f"{directory}: holds the packed base of {record.source!r} with {record.settings}, not the one that belongs "
            "here. Fix: delete the directory, or set another base.cache."
        )
    return base


def fingerprints(source: ModelSource) -> list[dict[str, Any]]:
    """Name, size, time and samples of each of a model's files, as JSON values."""
    values = []
    for file in [source.path] if source.is_gguf else [*shard_files(source.path), source.path / "config.json"]:
        facts, samples = sampled_digest(file)
        values.append({"name": file.name, "size": facts.st_size, "time": facts.st_mtime_ns, "samples": samples})
    return values


def _unwritten(place: Path, error: OSError) -> UserError | DiskFull:
    """A full disk is a failure, which only the process that writes can tell; all else every process finds."""
    reason = disk_reason(error)
    text = f"base.cache: {place}: cannot be written: {reason}."
    return DiskFull(text) if reason == DISK_FULL else UserError(text)


def _check_room(folder: Path, stored: Mapping[str, Stored], layers: set[str], wanted: Quantization) -> None:
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
            f"{needed / 2**30:.1f} GiB. Fix: name a directory on another disk, or set base.cache: null."
        )
