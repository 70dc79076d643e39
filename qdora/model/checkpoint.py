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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from qdora.errors import UserError, nearest
from qdora.files.json_file import parse_json
from qdora.model.experts import replaced_in_4_bits
from qdora.quant.bnb import STATE_NAME, from_bnb_state
from qdora.quant.codebooks import MXFP4, MXFP4_BLOCK_SIZE
from qdora.quant.packed import PackedWeight, RowParts, from_tensors

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
    """Checkpoint key -> tensor; only headers are read."""
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
    and `model.config.tie_word_embeddings` becomes False.
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


_PART = re.compile(
    r"(?P<layer>.*)\.(?P<part>SCB|weight_format"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))"
)
_SCALES_8BIT = "SCB"
_E8M0_NAN = 255
"""The exponent of a block scale of MXFP4 that is not a number."""


def stored_kind(settings: object) -> str | None:
    """nf4, fp4, int8 or mxfp4 from config.quantization_config; None for full precision."""
    if settings is None:
        return None
    table: Mapping[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()  # type: ignore[attr-defined]
    method = table.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in table else None)
    method = str(getattr(method, "value", method))
    if method == MXFP4:
        return MXFP4
    if method != "bitsandbytes":
        raise UserError(
            f"model.source: the checkpoint must be quantised by bitsandbytes or in mxfp4, if at all (got {method!r}). "
            "Fix: name the model from which it was made."
        )
    return "int8" if table.get("load_in_8bit") else str(table.get("bnb_4bit_quant_type", "fp4"))


def quantization_config(kind: str, *, double_quant: bool, dtype: torch.dtype, dense: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` with which transformers builds 4-bit bitsandbytes layers ("nf4" or "fp4").

    bitsandbytes computes in `dtype`; `dense` holds the paths of the linear layers that are not quantised.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(dense),
    )
    return dict(settings.to_dict())


def load_faults(model: nn.Module, classes: Mapping[str, str], option: str) -> list[str]:
    """Why transformers could not load layers in 4 bits: it quantises layers of the class nn.Linear, and no others.

    In a 4-bit model it builds Llama 4's experts one by one, so their stacks count even if they are dense.

    `classes` is path -> name of the class of each quantised layer in the model's own code; `option` asks for the form.
    """
    others = dict.fromkeys(replaced_in_4_bits(model), "ExpertLinear")
    others |= {path: name for path, name in classes.items() if name != "Linear"}
    if not others:
        return []
    path, name = next(iter(others.items()))
    name = "stack of experts" if name == "ExpertLinear" else name
    return [
        f"{option}: transformers does not load {len(others)} layers of this model in 4 bits (e.g. {path}, a {name}). "
        "Fix: use --format merged."
    ]


def gather_packed(stored: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """Join the parts of every quantised weight into one entry; dense tensors pass through."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    dense: dict[str, StoredTensor] = {}
    blocks: dict[str, Stored] = {}
    for key, item in stored.items():
        name, scales = key.removesuffix("_blocks"), stored.get(key.removesuffix("_blocks") + "_scales")
        if name != key and scales is not None:
            blocks[name] = _mxfp4(item, scales)
        elif key.removesuffix("_scales") != key and f"{key.removesuffix('_scales')}_blocks" in stored:
            continue
        elif match := _PART.fullmatch(key):
            parts.setdefault(f"{match['layer']}.weight", {})[match["part"]] = item
        else:
            dense[key] = item
    if lone := parts.keys() - dense.keys():
        raise UserError(
            *(f"model.source: the checkpoint has block scales for '{key}', but not the weight." for key in sorted(lone))
        )
    return blocks | {key: _packed(item, parts[key]) if key in parts else item for key, item in dense.items()}


def _mxfp4(blocks: StoredTensor, scales: StoredTensor) -> StoredPacked:
    """A stack of experts as gpt-oss has it: uint8 codes (experts, out, in / 32, 16), scales (experts, out, in / 32)."""
    if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or blocks.shape[-1] * 2 != MXFP4_BLOCK_SIZE:
        raise UserError(
            f"model.source: '{blocks.key}' must be (experts, out, in / 32, 16) and its scales (experts, out, in / 32), "
            f"got {list(blocks.shape)} and {list(scales.shape)}."
        )
    experts, rows, groups, _ = blocks.shape
    shape = (experts * rows, groups * MXFP4_BLOCK_SIZE)

    def read() -> PackedWeight:
        codes = blocks.read()
        # The first of two weights is in the low half there, and in the high half here.
        return mxfp4_weight(scales.key, (codes << 4) | (codes >> 4), scales.read().clone(), shape)

    return StoredPacked(blocks.key, shape, MXFP4, MXFP4_BLOCK_SIZE, double_quant=False, read=read)


def mxfp4_weight(key: str, codes: Tensor, exponents: Tensor, shape: tuple[int, int]) -> PackedWeight:
    """A weight of uint8 codes, first of two weights in the high half, and uint8 exponents, each in any shape."""
    if num_nan := int((exponents == _E8M0_NAN).sum()):
        raise UserError(
            f"model.source: '{key}' has {num_nan} block scales of {_E8M0_NAN}, which mean NaN. Fix: download the "
            "checkpoint again, or name another one."
        )
    try:
        tensors = {"packed": codes.reshape(-1), "absmax": exponents.reshape(-1)}
        return from_tensors(MXFP4, shape, MXFP4_BLOCK_SIZE, tensors)
    except ValueError as error:
        raise UserError(f"model.source: '{key}': {error}") from error


def _packed(weight: StoredTensor, parts: Mapping[str, StoredTensor]) -> StoredPacked:
    def read() -> PackedWeight:
        state = {"weight": weight.read(), **{part: item.read() for part, item in parts.items()}}
        # A copy, since the mapped file may be replaced while the model is in use.
        return from_bnb_state(state, name=f"model.source: {weight.key}").clone()

    if _SCALES_8BIT in parts:
        return StoredPacked(weight.key, weight.shape, "int8", weight.shape[-1], double_quant=False, read=read)
    state_part = next((part for part in parts if part.startswith(STATE_NAME)), None)
    if state_part is None:
        raise UserError(f"model.source: '{weight.key}' is stored in 4 bits without its {STATE_NAME}* entry.")
    try:
        state = parse_json(bytes(parts[state_part].read().tolist()))
        shape, block_size = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"model.source: the quantisation state of '{weight.key}' is broken: {error!r}") from error
    kind, nested = state_part.removeprefix(STATE_NAME), "weight.nested_absmax" in parts
    return StoredPacked(weight.key, shape, kind, block_size, double_quant=nested, read=read)
