"""A packed base on disk: safetensors files with the tensors of each weight, and a record that says how to read them.

Two directories have this form:

    a base cache (model/base_cache.py)    base.json        00000.safetensors, ...    all weights of a model
    base/ in a run with base.prune        compressed.json  model.safetensors, ...    the pruned layers only

The tensors of a packed weight are `<path>.packed`, `<path>.absmax`, ... (`PackedWeight.tensors`), its mask is
`<path>.keep_bits`, and a dense weight has its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from qdora.errors import UserError
from qdora.files.atomic import atomic_directory, disk_reason, json_text
from qdora.files.tensor_file import MappedFile, write_tensors
from qdora.model.load import Loading, place_all, place_frozen
from qdora.model.pruning import PrunedLayer, layer_record
from qdora.model.stored_tensors import Stored, StoredPacked, StoredTensor
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import PackedWeight, from_tensors
from qdora.ops.tiles import Weight

PRUNED_RECORD_FILE = "compressed.json"
PRUNED_FORMAT = 1
_PRUNED_FILE_BYTES = 5 * 2**30
_PARTS = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")

Record = TypeVar("Record", bound=BaseModel)


class WeightForm(BaseModel):
    """Shape of a weight, its kind (None for a dense one), and how it is packed; in a base cache also its file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shape: tuple[int, ...]
    kind: str | None = None
    block_size: int = 0
    double_quant: bool = False
    file: str = ""


class Part(NamedTuple):
    """A tensor in a file."""

    file: MappedFile
    name: str


class PackedBase:
    """The weights in some files of a directory, by model name; each is read, or mapped, when it is asked for.

    Raises UserError if a file is damaged, or a tensor is in two files.
    """

    def __init__(self, directory: Path, files: Iterable[str], forms: Mapping[str, WeightForm]) -> None:
        self.directory, self.forms = directory, forms
        self._file_of: dict[str, MappedFile] = {}
        for name in files:
            try:
                file = MappedFile(directory / name)
            except (ValueError, OSError, KeyError, TypeError) as error:
                raise UserError(f"{directory / name}: is damaged: {one_line(error)}.") from error
            twice = self._file_of.keys() & set(file.names)
            if twice:
                raise UserError(f"{directory / name}: is damaged: tensor '{min(twice)}' is in another file, too.")
            self._file_of.update(dict.fromkeys(file.names, file))

    def parts(self, name: str) -> list[Part]:
        """The tensors of a weight, those that the files have; their pages can be fetched and dropped."""
        path = name.removesuffix(".weight")
        names = [name] if self.forms[name].kind is None else [f"{path}.{part}" for part in _PARTS]
        return [Part(self._file_of[each], each) for each in names if each in self._file_of]

    def read(self, name: str, *, mapped: bool = False) -> Weight:
        """A weight; `mapped` as views of the files, which must not be written to, instead of copies.

        Raises UserError if tensors are missing, or do not fit the weight's form.
        """
        form, tensors = self.forms[name], {}
        try:
            for part in self.parts(name):
                tensor = part.file.tensor(part.name)
                tensors[part.name.rpartition(".")[2]] = tensor if mapped else tensor.clone()
                if not mapped:
                    part.file.drop(part.name)
            if form.kind is not None:
                return from_tensors(form.kind, (form.shape[0], form.shape[1]), form.block_size, tensors)
            if not tensors:
                raise ValueError("the tensor is missing")
            return tensors[name.rpartition(".")[2]].view(form.shape)
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            raise UserError(f"{self.directory}: {name}: cannot be read: {one_line(error)}") from error

    def stored(self, *, mapped: bool = False) -> dict[str, Stored]:
        """Model name -> weight, like those of a checkpoint; `mapped` as in `read`."""
        return {name: self._item(name, form, mapped) for name, form in self.forms.items()}

    def _item(self, name: str, form: WeightForm, mapped: bool) -> Stored:
        read: Any = partial(self.read, name, mapped=mapped)
        if form.kind is None:
            return StoredTensor(name, form.shape, read)
        double_quant = f"{name.removesuffix('.weight')}.nested_absmax" in self._file_of
        return StoredPacked(name, form.shape, form.kind, form.block_size, double_quant=double_quant, read=read)


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


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
    """Write weights to safetensors files; memory holds the tensors of one file.

    Args:
        folder: Where to.
        weights: (model name, weight), made one after the other.
        file_name: Format of the files' names, such as "{:05d}.safetensors".
        max_file_bytes: Upper bound of a file's tensors; a larger weight gets a file of its own.
    Returns:
        JSON values for a record: "files" (name -> bytes) and "weights" (model name -> file and form).
    """
    files: dict[str, int] = {}
    entries: dict[str, dict[str, Any]] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        if held:
            file = file_name.format(len(files))
            files[file] = write_tensors(folder / file, held)
            held.clear()

    for name, weight in weights:
        entry: dict[str, Any] = {"shape": list(weight.shape)}
        if isinstance(weight, PackedWeight):
            nested = weight.nested is not None
            entry |= {"kind": weight.kind, "block_size": weight.block_size, "double_quant": nested}
            parts = {f"{name.removesuffix('.weight')}.{part}": each for part, each in weight.tensors().items()}
        else:
            parts = {name: weight}
        if sum(tensor.nbytes for tensor in (*held.values(), *parts.values())) > max_file_bytes:
            flush()
        entries[name] = {"file": file_name.format(len(files)), **entry}
        held.update(parts)
        del weight, parts  # before the next weight is made
    flush()
    return {"files": files, "weights": entries}


def save_pruned_base(
    model: nn.Module, layers: Mapping[str, PrunedLayer], directory: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the pruned layers of a base; the directory appears whole or not at all and replaces an older one.

    `model` is freshly loaded, without adapters; `layers` is `Pruner.layers`; `settings` are JSON values of the recipe.
    Returns the content of compressed.json.
    """
    num_weights = sum(layer.num_weights for layer in layers.values())
    num_pruned = sum(layer.num_pruned for layer in layers.values())
    record: dict[str, Any] = {
        "format": PRUNED_FORMAT,
        "settings": dict(settings),
        "num_weights": num_weights,
        "num_pruned": num_pruned,
        "sparsity": num_pruned / num_weights,
        "layers": {},
    }

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
        (folder / PRUNED_RECORD_FILE).write_text(json_text(record, indent=2) + "\n", encoding="utf-8")
    return record


class _LayerRecord(BaseModel):
    kind: str
    shape: tuple[int, int]
    block_size: int


class _PrunedRecord(BaseModel):
    """The part of compressed.json that is read."""

    model_config = ConfigDict(strict=True)
    format: Literal[1]
    layers: dict[str, _LayerRecord]


class PrunedBase:
    """A `Placer` that takes the pruned layers from a directory of `save_pruned_base`.

    Raises UserError if there is no pruned base, or it is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.layers = read_record(directory / PRUNED_RECORD_FILE, _PrunedRecord).layers
        forms: dict[str, WeightForm] = {}
        for path, each in self.layers.items():
            kind = None if each.kind == "dense" else each.kind
            forms[f"{path}.weight"] = WeightForm(shape=each.shape, kind=kind, block_size=each.block_size)
            forms[f"{path}.keep_bits"] = WeightForm(shape=(-(-each.shape[0] * each.shape[1] // 8),))
        self.base = PackedBase(directory, sorted(file.name for file in directory.glob("*.safetensors")), forms)

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        """Put the pruned layers in as they are stored, and the other tensors as `place_all` does.

        Raises UserError for layers that the model does not have, or tensors that do not fit.
        """
        base = self.base
        missing = sorted(self.layers.keys() - load.layers)
        if missing:
            raise UserError(f"{base.directory}: {missing[0]} is not a layer that this model and recipe prune.")
        place_all(replace(load, stored={name: item for name, item in load.stored.items() if name not in base.forms}))
        for path in self.layers:
            weight, keep_bits = base.read(f"{path}.weight"), base.read(f"{path}.keep_bits")
            assert isinstance(keep_bits, Tensor)
            moved = weight.to(load.compute_dtype) if isinstance(weight, Tensor) else weight
            place_frozen(load.model, path, moved.to(load.device), keep_bits.to(load.device))
