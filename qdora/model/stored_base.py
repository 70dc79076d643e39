"""A packed base on disk, opened: what it is, and its weights, read or mapped.

base.json             what it was made from, and where each weight is
00000.safetensors     `<path>.<part>` of each packed weight, other weights under their own name
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qdora.disk_errors import disk_reason
from qdora.errors import UserError
from qdora.model.checkpoint import Stored, StoredPacked, StoredTensor
from qdora.model.mapped_file import MappedFile
from qdora.ops.packed import from_tensors

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
