"""Safetensors checkpoints, read one tensor at a time, and their names in the model.

A shard is opened again for every tensor. That costs 30 microseconds; closing it gives the mapped pages back, so that
memory holds one tensor of the file and not all that was read so far.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.errors import UserError, nearest
from qdora.files.json_file import parse_json
from qdora.quant.packed import PackedWeight, RowParts

log = logging.getLogger("qdora")
INDEX_FILE = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_MOST_FAULTS = 10


class StoredRows(NamedTuple):
    """Some consecutive rows of a stored matrix, and the function that reads them."""

    rows: int
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor of a checkpoint, not read yet; `dtype` and the bytes of an element are those of its header.

    `read` returns a tensor of this shape on the CPU. It may be a read-only view of a mapped file: copy it before it is
    written to or kept. `parts` gives a matrix in parts of whole rows, if the file has it so; `key` is the first's.
    """

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    itemsize: int = 4
    dtype: str = "F32"
    parts: tuple[StoredRows, ...] | None = None

    def read_rows(self) -> Tensor | RowParts:
        """The weight, in parts if the file has it so."""
        parts = self.parts
        if parts is None:
            return self.read()
        return RowParts((self.shape[0], self.shape[1]), lambda: (part.read() for part in parts))

    @property
    def num_bytes(self) -> int:
        """Bytes of the values in the file."""
        return torch.Size(self.shape).numel() * self.itemsize


@dataclass(frozen=True)
class StoredPacked:
    """A quantised weight of a checkpoint, not read yet; `shape` is (out, in)."""

    key: str
    shape: tuple[int, ...]
    kind: str
    block_size: int
    double_quant: bool
    read: Callable[[], PackedWeight]


Stored = StoredTensor | StoredPacked


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of the model in `directory`. model.safetensors wins over an index, as in transformers.

    An index may only name plain files in the directory, since it comes with the download and must not point elsewhere.
    Raises UserError if there are no weights, or with all faults of the index.
    """
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = directory / INDEX_FILE
    if index.is_file():
        return _indexed_files(index)
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    found = f" It has {', '.join(others[:3])}." if others else ""
    raise UserError(f"model.source: {directory} has no model.safetensors and no {INDEX_FILE}.{found}")


def _indexed_files(index: Path) -> list[Path]:
    try:
        content = parse_json(index.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{index}: is not JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map: must be a non-empty table of tensor name -> shard file.")
    faults = []
    shards: dict[str, None] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or _SHARD_NAME.fullmatch(name) is None:
            faults.append(f"{index}: weight_map['{key}']: {name!r} is not a plain .safetensors file name.")
        else:
            shards[name] = None
    present = [entry.name for entry in index.parent.iterdir()]
    faults.extend(
        f"{index}: weight_map: the shard {name} is not in the directory.{nearest(name, present)}"
        for name in shards
        if not (index.parent / name).is_file()
    )
    if faults:
        raise UserError(*shorten(faults))
    return [index.parent / name for name in shards]


def open_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """Checkpoint key -> tensor; only headers are read. Raises UserError for unreadable shards or a key in two."""
    stored: dict[str, StoredTensor] = {}
    faults = []
    for file in shard_files(directory):
        try:
            with safe_open(str(file), framework="pt", device="cpu") as shard:
                for key in shard.keys():  # noqa: SIM118  (safe_open is not iterable)
                    if key in stored:
                        faults.append(f"{file}: tensor '{key}' is in two shards.")
                    piece = shard.get_slice(key)
                    shape = tuple(int(size) for size in piece.get_shape())
                    dtype = piece.get_dtype()
                    stored[key] = StoredTensor(key, shape, partial(_read, file, key), _itemsize(dtype), dtype)
        except (SafetensorError, OSError) as error:
            faults.append(f"{file}: cannot be read: {error}. It may be cut short. Fix: download or copy it again.")
    if faults:
        raise UserError(*shorten(faults))
    return stored


def _read(file: Path, key: str) -> Tensor:
    with safe_open(str(file), framework="pt", device="cpu") as shard:
        tensor: Tensor = shard.get_tensor(key)
        return tensor


def _itemsize(dtype: str) -> int:
    """Bytes of an element of a dtype of a header, such as BF16, F8_E4M3 or BOOL."""
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else max(1, int(bits.group()) // 8)


def in_parts(
    key: str, shape: tuple[int, ...], parts: Sequence[StoredRows], *, itemsize: int, dtype: str
) -> StoredTensor:
    """A tensor that is read in parts of rows, one after the other; a vector's parts are kept together."""
    made = tuple(parts)

    def read() -> Tensor:
        return torch.cat([part.read() for part in made]).view(shape)

    return StoredTensor(key, shape, read, itemsize, dtype, parts=made if len(shape) == 2 else None)


def stored_rows(item: StoredTensor, rows: slice) -> Tensor:
    """Some rows of a stored matrix; of one in parts only the parts that have them are read."""
    if item.parts is None:
        return item.read()[rows]
    found, first = [], 0
    for part in item.parts:
        start, stop = max(rows.start, first), min(rows.stop, first + part.rows)
        if start < stop:
            found.append(part.read()[start - first : stop - first])
        first += part.rows
    return torch.cat(found)


def match_to_model(stored: Mapping[str, Stored], model: PreTrainedModel) -> dict[str, Stored]:
    """The stored tensors that the model needs, in the model's order; `stored` has model names.

    If a tied weight is stored twice, equal copies count as one. If they differ the model is untied, as in transformers,
    and `model.config.tie_word_embeddings` becomes False. Raises UserError with all tensors that are missing or
    unexpected or have a wrong shape.
    """
    expected: dict[str, Tensor] = model.state_dict()
    redundant, tied = _settle_tied_weights(stored, model), tied_weights(model)
    may_lack = tuple(model._keys_to_ignore_on_load_missing or ())
    # Old checkpoints hold the rotary frequencies of every layer, which are computed from the config now.
    may_hold = (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
    faults = []
    for name, tensor in expected.items():
        if name in stored:
            continue
        partners = {tied.get(name), *(target for target, origin in tied.items() if origin in (name, tied.get(name)))}
        if not partners & stored.keys() and (tensor.is_meta or not _matches_any(name, may_lack)):
            faults.append(f"model.source: the checkpoint has no tensor '{name}'.{nearest(name, stored)}")
    for name, item in stored.items():
        if name not in expected:
            if not _matches_any(name, may_hold):
                faults.append(f"model.source: the checkpoint's tensor '{item.key}' has no place in the model.")
        elif item.shape != tuple(expected[name].shape):
            faults.append(
                f"model.source: tensor '{item.key}' has shape {list(item.shape)}, "
                f"config.json asks for {list(expected[name].shape)}."
            )
        elif (
            isinstance(item, StoredTensor)
            and expected[name].is_floating_point()
            and not item.dtype.startswith(("F", "BF"))
        ):
            faults.append(f"model.source: tensor '{item.key}' has dtype {item.dtype}, must be of floating point.")
    if faults:
        raise UserError(*shorten(faults))
    return {name: stored[name] for name in expected if name in stored and name not in redundant}


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Name of each tied parameter -> name of the parameter that it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def shorten(faults: object) -> list[str]:
    """The first faults and the number of the others; a wrong config has one for every tensor."""
    lines = [str(fault) for fault in faults]  # type: ignore[attr-defined]
    more = len(lines) - _MOST_FAULTS
    return lines if more <= 0 else [*lines[:_MOST_FAULTS], f"... and {more} more like these."]


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _settle_tied_weights(stored: Mapping[str, Stored], model: PreTrainedModel) -> set[str]:
    """Names of stored copies that need not be read; unties weights whose copies differ."""
    redundant = set()
    for target, origin in tied_weights(model).items():
        if target not in stored or origin not in stored:
            continue
        items = [item for item in (stored[target], stored[origin]) if isinstance(item, StoredTensor)]
        if len(items) == 2 and items[0].shape == items[1].shape and torch.equal(items[0].read(), items[1].read()):
            redundant.add(target)
            continue
        log.warning(
            "%s and %s differ in the checkpoint although config.json ties them, so they are not tied.", target, origin
        )
        model.all_tied_weights_keys.pop(target)
        model.config.tie_word_embeddings = False
    return redundant
