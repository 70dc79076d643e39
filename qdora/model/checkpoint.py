"""Safetensors checkpoints, read one tensor at a time, as the tensors of the model: other names, other pieces.

A shard is opened again for every tensor, which costs 30 microseconds: closing it gives the mapped pages back.

transformers converts pieces (experts one by one) by operations on whole tensors. Here these operations run without
values first, which gives names and shapes, and again when a tensor is read.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from qdora.errors import NotFinite, UserError, named, refuse
from qdora.files.atomic import read_json_object
from qdora.model.experts import is_transposed, library_names, stacks
from qdora.quant.bnb import STATE_NAME, from_bnb_state
from qdora.quant.codebooks import MXFP4, MXFP4_BLOCK_SIZE
from qdora.quant.packed import PackedWeight, from_tensors

log = logging.getLogger("qdora")
INDEX_FILE = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_PART = re.compile(
    r"(?P<layer>.*)\.(?P<part>SCB|weight_format"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))"
)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Errors of a library that reads a model's files are UserErrors: a file may hold anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be used: {named(error)[:300]}") from error


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor of a checkpoint, not read yet; `dtype` is that of its header.

    `read` returns a tensor on the CPU, perhaps a view of a mapped file: copy it before it is written to or kept. Of a
    stack with `num_experts` above 1 it also reads one, by its index. `keep_bits` reads the pruning mask of a weight.
    """

    key: str
    shape: tuple[int, ...]
    read: Callable[..., Tensor]
    dtype: str = "F32"
    keep_bits: Callable[[], Tensor] | None = None
    num_experts: int = 1


@dataclass(frozen=True)
class StoredPacked:
    """A quantised weight of a checkpoint, not read yet; `shape` is (out, in). `scale_dtype`: of int4-groups."""

    key: str
    shape: tuple[int, ...]
    kind: str
    block_size: int
    double_quant: bool
    read: Callable[[], PackedWeight]
    keep_bits: Callable[[], Tensor] | None = None
    scale_dtype: torch.dtype | None = None


Stored = StoredTensor | StoredPacked


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of the model in `directory`. model.safetensors wins over an index, as in transformers.

    An index comes with the download: it may name plain files in the directory alone.
    """
    single, index = directory / "model.safetensors", directory / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"model.source: {directory} has no model.safetensors and no {INDEX_FILE}.")
    with reading(str(index)):
        names = dict.fromkeys(read_json_object(index)["weight_map"].values())
        faults = [
            f"{index}: weight_map: {name!r} is not a .safetensors file in the directory."
            for name in names
            if not _SHARD_NAME.fullmatch(str(name)) or not (directory / name).is_file()
        ]
    refuse(faults)
    return [directory / name for name in names]


def open_safetensors(directory: Path, files: Iterable[Path] | None = None) -> dict[str, StoredTensor]:
    """Checkpoint key -> tensor; only headers are read. `files` default to `shard_files`."""
    stored = {}
    for file in shard_files(directory) if files is None else files:
        with reading(str(file)), safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (safe_open is not iterable)
                piece = shard.get_slice(key)
                shape = tuple(map(int, piece.get_shape()))
                stored[key] = StoredTensor(key, shape, partial(_read, file, key), piece.get_dtype())
    return stored


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(key)
        return tensor


def match_to_model(stored: Mapping[str, Stored], model: PreTrainedModel) -> dict[str, Stored]:
    """The stored tensors that the model needs, in the model's order; `stored` has model names.

    If a tied weight is stored twice, equal copies count as one. If they differ the model is untied, as in transformers.
    """
    redundant = set()
    for target, origin in tied_weights(model).items():
        first, second = stored.get(target), stored.get(origin)
        if (
            isinstance(first, StoredTensor)
            and isinstance(second, StoredTensor)
            and torch.equal(first.read(), second.read())
        ):
            redundant.add(target)
        elif first is not None and second is not None:
            log.warning("%s and %s differ in the checkpoint, so they are not tied.", target, origin)
            model.all_tied_weights_keys.pop(target)
            model.config.tie_word_embeddings = False
    expected, tied = model.state_dict(), tied_weights(model)
    may_lack = model._keys_to_ignore_on_load_missing or ()
    # Old checkpoints hold the rotary frequencies of every layer, which are computed from the config now.
    may_hold = (
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq$",
        r"(^|\.)position_ids$",
    )
    held, faults = {tied.get(name, name) for name in stored}, []
    for name, tensor in expected.items():
        if tied.get(name, name) not in held and (tensor.is_meta or not _matches_any(name, may_lack)):
            faults.append(f"model.source: the checkpoint has no tensor '{name}'.")
    for name, item in stored.items():
        where = f"model.source: the checkpoint's tensor '{item.key}'"
        if name not in expected:
            if not _matches_any(name, may_hold):
                faults.append(f"{where} has no place in the model.")
        elif item.shape != tuple(expected[name].shape):
            faults.append(f"{where} has shape {list(item.shape)}, must have {list(expected[name].shape)}.")
        elif (
            isinstance(item, StoredTensor) and expected[name].is_floating_point() and item.dtype[0] not in "FB"
        ):
            faults.append(f"{where} has dtype {item.dtype}, must be of floating point.")
    refuse(faults)
    return {name: stored[name] for name in expected if name in stored and name not in redundant}


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Name of each tied parameter -> name of the parameter that it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def load_faults(classes: Iterable[str], option: str, fix: str = "use --format merged") -> list[str]:
    """Why transformers could not load layers in 4 bits: it quantises layers of the class nn.Linear, and no others.

    `classes`: of each quantised layer in the model's code.
    """
    others = [name for name in classes if name != "Linear"]
    if not others:
        return []
    return [
        f"{option}: transformers does not load {len(others)} layers in 4 bits (such as {others[0]}). Fix: {fix}."
    ]


def gather_packed(stored: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """Join the parts of every quantised weight into one entry; dense tensors pass through."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    dense = {}
    blocks: dict[str, Stored] = {}
    for key, item in stored.items():
        name, _, part = key.rpartition("_")
        if part == "blocks" and f"{name}_scales" in stored:
            blocks[name] = _mxfp4(item, stored[f"{name}_scales"])
        elif part == "scales" and f"{name}_blocks" in stored:
            continue
        elif match := _PART.fullmatch(key):
            parts.setdefault(f"{match['layer']}.weight", {})[match["part"]] = item
        else:
            dense[key] = item
    return blocks | {key: _packed(item, parts[key]) if key in parts else item for key, item in dense.items()}


def _mxfp4(blocks: StoredTensor, scales: StoredTensor) -> StoredPacked:
    """A stack of experts as gpt-oss has it: uint8 codes (experts, out, in / 32, 16), scales (experts, out, in / 32)."""
    experts, rows, groups, _ = blocks.shape
    shape = (experts * rows, groups * MXFP4_BLOCK_SIZE)

    def read() -> PackedWeight:
        codes, exponents = blocks.read(), scales.read().clone()
        if (exponents == 255).any():
            raise NotFinite(f"model.source: the checkpoint's tensor '{scales.key}' has NaN.")
        # The first of two weights is in the low half there, and in the high half here.
        tensors = {"packed": ((codes << 4) | (codes >> 4)).reshape(-1), "absmax": exponents.reshape(-1)}
        return from_tensors(MXFP4, shape, MXFP4_BLOCK_SIZE, tensors)

    return StoredPacked(blocks.key, shape, MXFP4, MXFP4_BLOCK_SIZE, double_quant=False, read=read)


def _packed(weight: StoredTensor, parts: Mapping[str, StoredTensor]) -> StoredPacked:
    def read() -> PackedWeight:
        state = {"weight": weight.read(), **{part: item.read() for part, item in parts.items()}}
        # A copy, since the mapped file may be replaced while the model is in use.
        return from_bnb_state(state, name=f"model.source: {weight.key}").clone()

    if "SCB" in parts:
        return StoredPacked(weight.key, weight.shape, "int8", weight.shape[-1], double_quant=False, read=read)
    with reading(f"model.source: {weight.key}"):
        (name,) = (part for part in parts if part.startswith(STATE_NAME))
        state = json.loads(bytes(parts[name].read().tolist()))
        shape, block_size = tuple(map(int, state["shape"])), int(state["blocksize"])
    nested = "weight.nested_absmax" in parts
    return StoredPacked(
        weight.key, shape, name.removeprefix(STATE_NAME), block_size, double_quant=nested, read=read
    )


def _convert(
    name: str, items: Mapping[str, tuple[str, StoredTensor]], converter: WeightConverter, model: PreTrainedModel
) -> dict[str, StoredTensor]:
    """The model's tensors that a conversion makes from `items`: key -> pattern of the converter, and the tensor.

    `name` is their name after transformers' renaming.
    """

    keys = sorted(items, key=dot_natural_key)
    of_patterns = [[key for key in keys if items[key][0] == each] for each in converter.source_patterns]
    experts = [*zip(*of_patterns, strict=False)]  # if each has a tensor for every pattern

    def converted(value: Callable[[StoredTensor], Tensor], *expert: int) -> dict[str, Tensor]:
        run = copy.deepcopy(converter)
        for key in experts[expert[0]] if expert else keys:
            pattern, item = items[key]
            run.add_tensor(name, key, pattern, value(item))
        made = run.convert(name, model=model, config=model.config).items()
        return {target: value[0] if isinstance(value, list) else value for target, value in made}

    _, first = next(iter(items.values()))

    def read(target: str, *expert: int) -> Tensor:
        return converted(lambda item: item.read(), *expert)[target]

    empty = converted(lambda item: torch.empty(item.shape, device="meta"))
    return {
        to: StoredTensor(
            first.key,
            tuple(each.shape),
            partial(read, to),
            first.dtype,
            num_experts=len(each) if len(each) == len(experts) else 1,
        )
        for to, each in empty.items()
    }


def rename_to_model(stored: Mapping[str, Stored], model: PreTrainedModel) -> dict[str, Stored]:
    """Model name -> tensor, by transformers' renames and conversions for this model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    # Only its names are asked for.
    expected = model.state_dict() | dict.fromkeys(library_names(model).values(), torch.empty(0, device="meta"))
    renamed: dict[str, Stored] = {}
    groups: dict[str, dict[str, tuple[str, Any]]] = {}
    for key, item in stored.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if pattern is None:
            renamed[name] = replace(item, key=key)
        else:
            groups.setdefault(name, {})[key] = (pattern, item)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for name, items in groups.items():
        key, (pattern, _) = next(iter(items.items()))
        try:
            renamed |= _convert(name, items, by_pattern[pattern], model)
        except Exception as error:  # operations on tensors that do not fit fail in many ways
            what = f"tensors are missing or do not fit ({key} -> {name})"
            raise UserError(f"model.source: {model.config.model_type}: {what}.") from error
    return to_stacks(renamed, model)


def to_stacks(stored: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Tensors under their names in qdora's model: the weight of a stack is a matrix, (experts * out, in)."""
    ours = {theirs: name for name, theirs in library_names(model).items()}
    placed = {}
    for name, item in stored.items():
        if name in ours and isinstance(item, StoredTensor) and len(item.shape) == 3:
            item = _as_matrix(item, transposed=is_transposed(model, name))
        placed[ours.get(name, name)] = item
    return placed


def _as_matrix(item: StoredTensor, *, transposed: bool) -> StoredTensor:
    """A stored stack, (experts, out, in) or transposed, as (experts * out, in)."""
    experts, rows, columns = item.shape
    shape = (experts * columns, rows) if transposed else (experts * rows, columns)

    def read(*expert: int) -> Tensor:
        stack = item.read(*expert)
        return (stack.mT if transposed else stack).reshape(-1, shape[1])

    return replace(item, shape=shape, read=read)


def published_form(model: PreTrainedModel, path: str, weight: Tensor) -> dict[str, Tensor]:
    """Key in published checkpoints -> tensor, by transformers' reverse conversion of the weight of a stack, (experts *
    out, in)."""
    stack = weight.view(stacks(model)[path].num_experts, -1, weight.shape[1])
    return dict(revert_weight_conversion(model, {path: stack.mT if is_transposed(model, path) else stack}))


# transformers' names of the ways in which published experts become stacks -> names that PEFT 0.21 takes for experts.
_PEFT_EXPERTS = {"mixtral": ("w1", "w2", "w3"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}


def taken_for_experts(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """The linear layers that PEFT takes for experts: their names end as those of single experts do.

    PEFT reads `gate_proj` in `target_modules`, even at the end of a whole path, as the stack of all `gate_proj`, and
    drops a shared expert or a first dense layer.
    """
    experts = stacks(model)
    if not experts or not isinstance(model, PreTrainedModel):
        return set()
    patterns: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    names = _PEFT_EXPERTS.get(patterns.get(model.config.model_type, ""), ())
    return {path for path in paths if path.rpartition(".")[2] in names and path not in experts}
