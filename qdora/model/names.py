"""The tensors of a checkpoint as those of the model: other names, and other pieces (experts one by one).

transformers says how to convert pieces, by operations on whole tensors. Here these operations run once on the numbers
of the rows instead of on weights. What comes out tells which rows of which stored tensor each weight consists of, and
then the weights can be read piece by piece.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
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

from qdora.errors import UserError
from qdora.model.checkpoint import Stored, StoredRows, StoredTensor, in_parts, shorten
from qdora.model.experts import is_transposed, library_names, stacks

# A conversion that cuts a tensor into more pieces permutes its rows.
_MOST_PIECES = 8


class NotInRows(Exception):
    """A conversion does more than to put rows together."""


def _numbered(shape: Sequence[int], first: int) -> Tensor:
    """Row numbers from `first` on in the place of a weight, whose columns are one; of a vector each entry is a row."""
    rows = torch.Size(shape[:-1]).numel() if len(shape) > 1 else shape[0]
    numbers = torch.arange(first, first + rows)
    return numbers.view(*shape[:-1], 1) if len(shape) > 1 else numbers


def _pieces(numbers: Tensor, first_rows: Sequence[tuple[int, str]]) -> list[tuple[str, slice]]:
    """Key and rows of each run of consecutive numbers. `first_rows`: (first number, key) of each tensor, ascending."""
    flat = numbers.reshape(-1)
    starts = torch.tensor([first for first, _ in first_rows])
    owner = torch.bucketize(flat, starts, right=True) - 1
    jumps = (flat.diff() != 1) | (owner.diff() != 0)
    bounds = [0, *(jumps.nonzero().squeeze(1) + 1).tolist(), len(flat)]
    if len(bounds) > _MOST_PIECES * len(first_rows) + 1:
        raise NotInRows
    pieces = []
    for start, stop in pairwise(bounds):
        first, key = first_rows[int(owner[start])]
        row = int(flat[start]) - first
        pieces.append((key, slice(row, row + stop - start)))
    return pieces


def convert(
    name: str, items: Mapping[str, tuple[str, StoredTensor]], converter: WeightConverter, model: PreTrainedModel
) -> dict[str, StoredTensor]:
    """The model's tensors that a conversion makes from some of the checkpoint's, by their names in transformers' model.

    `items` is key -> pattern of the converter that it matches, and the tensor; `name` is their name after transformers'
    renaming. NotInRows if the conversion permutes columns, cuts rows, or reorders single rows.
    """
    run = copy.deepcopy(converter)
    first, first_rows = 0, []
    for key in sorted(items, key=dot_natural_key):
        pattern, item = items[key]
        numbers = _numbered(item.shape, first)
        run.add_tensor(name, key, pattern, numbers)
        first_rows.append((first, key))
        first += numbers.numel()
    try:
        found: dict[str, Any] = run.convert(name, model=model, config=model.config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Operations on columns meet columns of length 1, and fail in many ways.
        raise NotInRows from error
    stored = {key: item for key, (_, item) in items.items()}
    columns = {item.shape[-1] if len(item.shape) > 1 else 1 for item in stored.values()}
    if len(columns) != 1:
        raise NotInRows
    made = {}
    for target, numbers in found.items():
        numbers = numbers[0] if isinstance(numbers, list) else numbers
        if numbers.ndim > 1 and numbers.shape[-1] != 1:
            raise NotInRows
        is_matrix = len(next(iter(stored.values())).shape) > 1
        shape = (numbers.numel(), *columns) if is_matrix else tuple(numbers.shape)
        pieces = _pieces(numbers, first_rows)
        parts = [StoredRows(rows.stop - rows.start, partial(_read_rows, stored[key], rows)) for key, rows in pieces]
        some = stored[pieces[0][0]]
        made[target] = in_parts(some.key, shape, parts, itemsize=some.itemsize, dtype=some.dtype)
    return made


def _read_rows(item: StoredTensor, rows: slice) -> Tensor:
    value = item.read()
    return (value.flatten(0, -2) if value.ndim > 2 else value)[rows]


def rename_to_model(stored: Mapping[str, Stored], model: PreTrainedModel) -> dict[str, Stored]:
    """Model name -> tensor, by transformers' renames and conversions for this model; each weight of whole rows."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected = model.state_dict()
    # Only which names there are is asked of it.
    expected |= dict.fromkeys(library_names(model).values(), torch.empty(0, device="meta"))
    renamed: dict[str, Stored] = {}
    groups: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
    refused: dict[str, str] = {}
    for key, item in stored.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if pattern is None:
            renamed[name] = replace(item, key=key)
        elif isinstance(item, StoredTensor):
            groups.setdefault(name, {})[key] = (pattern, item)
        else:
            refused.setdefault(pattern, f"{key} -> {name}")
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    experts, absent = stacks(model), list[str]()
    for name, items in groups.items():
        key, (pattern, _) = next(iter(items.items()))
        if name in experts and "*" in pattern:
            absent += _absent_experts(items, experts[name].num_experts)
        try:
            renamed |= convert(name, items, by_pattern[pattern], model)
        except NotInRows:
            refused.setdefault(pattern, f"{key} -> {name}")
    if absent:
        raise UserError(*shorten(f"model.source: the checkpoint has no tensor '{key}'." for key in absent))
    if refused:
        raise UserError(
            *shorten(
                f"model.source: {model.config.model_type} checkpoints hold tensors that must be cut or permuted "
                f"({example}), which is not supported. Fix: name a model with one tensor for each layer."
                for example in refused.values()
            )
        )
    return to_stacks(renamed, model)


def _absent_experts(keys: Iterable[str], num_experts: int) -> list[str]:
    """The keys that are missing among those of single experts: the last number in a key is that of the expert."""
    found: dict[tuple[str, str], set[int]] = {}
    for key in keys:
        match = re.fullmatch(r"(.*\.)(\d+)(\..*)", key)
        assert match is not None, "the key of a single expert has a number"
        found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    return [f"{start}{n}{end}" for (start, end), held in found.items() for n in range(num_experts) if n not in held]


def to_stacks(stored: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Tensors under their names in qdora's model: the weight of a stack is a matrix, (experts * out, in)."""
    ours = {theirs: name for name, theirs in library_names(model).items()}
    turned = {path for path in stacks(model) if is_transposed(model, path)}
    placed = {}
    for name, item in stored.items():
        is_stack = name in ours and isinstance(item, StoredTensor) and len(item.shape) == 3
        placed[ours.get(name, name)] = _as_matrix(item, transposed=name in turned) if is_stack else item
    return placed


def _as_matrix(item: StoredTensor, *, transposed: bool) -> StoredTensor:
    """A stored stack, (experts, out, in) or transposed, as (experts * out, in), read expert by expert."""
    experts, rows, columns = item.shape
    if transposed:
        rows, columns = columns, rows

    def turned() -> Tensor:
        return item.read().mT if transposed else item.read()

    def read_expert(expert: int) -> Tensor:
        return turned()[expert].contiguous()

    shape = (experts * rows, columns)
    parts = tuple(StoredRows(rows, partial(read_expert, expert)) for expert in range(experts))
    return replace(item, shape=shape, read=lambda: turned().reshape(shape), parts=parts)


@dataclass(frozen=True)
class Published:
    """A tensor of a published checkpoint: consecutive rows of a stack, of its shape, transposed if it is."""

    shape: tuple[int, ...]
    rows: slice
    transposed: bool


def published_pieces(model: PreTrainedModel, path: str) -> dict[str, Published]:
    """Key in published checkpoints -> the rows of a stack that it holds, by transformers' reverse conversion."""
    stack, transposed = stacks(model)[path], is_transposed(model, path)
    num_experts, rows, columns = stack.num_experts, stack.expert_features, stack.in_features
    if transposed:
        (key,) = revert_weight_conversion(model, {path: torch.empty(0, device="meta")})
        return {str(key): Published((num_experts, columns, rows), slice(0, num_experts * rows), True)}
    numbers = _numbered((num_experts, rows, columns), 0)
    found = {}
    for key, held in revert_weight_conversion(model, {path: numbers}).items():
        flat = held.reshape(-1)
        start = int(flat[0])
        assert torch.equal(flat, torch.arange(start, start + len(flat))), f"{key}: rows out of order"
        sizes = held.shape[:-1] if held.shape[-1] == 1 else held.shape  # older releases of transformers squeeze
        found[key] = Published((*sizes, columns), slice(start, start + len(flat)), False)
    return found


# transformers' names of the ways in which published experts become stacks, for which PEFT 0.21 changes target_modules.
_CHANGED_BY_PEFT = ("mixtral", "qwen2_moe")


def taken_for_experts(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Those of some linear layers that PEFT takes for experts: their names end as those of single experts do.

    transformers has stacks where older releases had single experts. So PEFT reads `gate_proj` in `target_modules`, even
    at the end of a whole path, as the stack of all `gate_proj`, and drops a shared expert or a first dense layer with
    no more than a warning.
    """
    experts = stacks(model)
    if not experts or not isinstance(model, PreTrainedModel):
        return set()
    patterns: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    if patterns.get(model.config.model_type) not in _CHANGED_BY_PEFT:
        return set()
    one_of_each = {path.rpartition(".")[2]: path for path in experts}
    pieces = [list(published_pieces(model, path)) for path in one_of_each.values()]
    names = {key.removesuffix(".weight").rpartition(".")[2] for keys in pieces if len(keys) > 1 for key in keys}
    return {path for path in paths if path.rpartition(".")[2] in names and path not in experts}
