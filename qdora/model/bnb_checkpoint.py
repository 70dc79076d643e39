"""Checkpoints that bitsandbytes quantised already: their packed bytes are taken over as they are.

Keys beside `<layer>.weight`, as bitsandbytes writes them:
    4 bit: .absmax .quant_map (.nested_absmax .nested_quant_map) .quant_state.bitsandbytes__nf4 (JSON as uint8)
    int8:  <layer>.SCB (row absmax, float32), <layer>.weight_format
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdora.errors import UserError
from qdora.model.checkpoint import Stored, StoredPacked, StoredTensor
from qdora.ops.codebooks import NESTED_BLOCK_SIZE, code_values
from qdora.ops.packed import PackedWeight, from_tensors

_PART_4BIT = re.compile(
    r"(?P<weight>.*\.weight)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)"
)
_PART_8BIT = re.compile(r"(?P<layer>.*)\.(?P<part>SCB|weight_format)")
_STATE = "quant_state.bitsandbytes__"


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint says that it was quantised."""

    kind: str
    block_size: int | None
    double_quant: bool | None


def stored_quantization(settings: object) -> StoredQuantization | None:
    """What config.quantization_config says, or None for a checkpoint of full precision.

    Raises:
        UserError: Quantised by something else than bitsandbytes.
    """
    if settings is None:
        return None
    table: Mapping[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()  # type: ignore[attr-defined]
    method = table.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in table else None)
    method = str(getattr(method, "value", method))
    if method != "bitsandbytes":
        raise UserError(
            f"model.source: the checkpoint is quantised by {method!r}, allowed: bitsandbytes, or full precision. "
            "Name the model it was made from."
        )
    if table.get("load_in_8bit"):
        return StoredQuantization("int8", None, None)
    return StoredQuantization(
        str(table.get("bnb_4bit_quant_type", "fp4")), None, bool(table.get("bnb_4bit_use_double_quant", False))
    )


def gather_packed(stored: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """Join the parts of every quantised weight into one entry; dense tensors pass through.

    Raises:
        UserError: Parts without a weight, or a quantisation that is none of nf4, fp4, int8.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    dense: dict[str, StoredTensor] = {}
    for key, item in stored.items():
        if match := _PART_4BIT.fullmatch(key):
            parts.setdefault(match["weight"], {})[match["part"]] = item
        elif match := _PART_8BIT.fullmatch(key):
            parts.setdefault(f"{match['layer']}.weight", {})[match["part"]] = item
        else:
            dense[key] = item
    lone = [key for key in parts if key not in dense]
    if lone:
        raise UserError(
            *(f"model.source: the checkpoint has block scales for '{key}', but not the weight." for key in lone)
        )
    return {key: _packed(item, parts[key]) if key in parts else item for key, item in dense.items()}


def _packed(weight: StoredTensor, parts: Mapping[str, StoredTensor]) -> StoredPacked:
    if "SCB" in parts:
        return _packed_int8(weight, parts)
    state_part = next((part for part in parts if part.startswith(_STATE)), None)
    if state_part is None:
        raise UserError(f"model.source: '{weight.key}' is stored in 4 bits without its {_STATE}* entry.")
    kind = state_part.removeprefix(_STATE)
    state = json.loads(bytes(parts[state_part].read().tolist()))
    shape = tuple(int(size) for size in state["shape"])
    block_size = int(state["blocksize"])
    nested = "nested_absmax" in parts
    _check_4bit(weight.key, kind, parts, state)

    def read() -> PackedWeight:
        # Stored as (bytes, 1), and in a wider dtype where bnb_4bit_quant_storage was set for FSDP. The copies cut the
        # tie to the mapped file, which may be replaced while the model lives.
        tensors = {
            "packed": weight.read().contiguous().view(torch.uint8).reshape(-1).clone(),
            "absmax": parts["absmax"].read().clone(),
        }
        if nested:
            tensors["nested_absmax"] = parts["nested_absmax"].read().clone()
            tensors["nested_code"] = parts["nested_quant_map"].read().clone()
            tensors["nested_offset"] = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)
        return from_tensors(kind, (shape[0], shape[1]), block_size, tensors)

    return StoredPacked(weight.key, shape, kind, block_size, nested, read)


def _check_4bit(key: str, kind: str, parts: Mapping[str, StoredTensor], state: Mapping[str, Any]) -> None:
    if kind not in ("nf4", "fp4"):
        raise UserError(f"model.source: '{key}' is stored as {kind!r}, allowed: nf4, fp4, int8.")
    faults = []
    if "quant_map" in parts:
        table = parts["quant_map"].read().float()
        # The tables are kept in float32 and read from text: 1e-6 of the largest value is their last digit.
        if table.shape != (16,) or (table - code_values(kind)).abs().max() > 1e-6:
            faults.append(f"model.source: '{key}' uses a code book of its own, allowed: bitsandbytes' {kind} table.")
    if len(state["shape"]) != 2:
        faults.append(f"model.source: '{key}' is quantised with shape {state['shape']}, allowed: (out, in).")
    if "nested_absmax" in parts and int(state["nested_blocksize"]) != NESTED_BLOCK_SIZE:
        faults.append(
            f"model.source: '{key}' nests its scales in blocks of {state['nested_blocksize']}, "
            f"allowed: {NESTED_BLOCK_SIZE}."
        )
    if faults:
        raise UserError(*faults)


def _packed_int8(weight: StoredTensor, parts: Mapping[str, StoredTensor]) -> StoredPacked:
    if "weight_format" in parts and int(parts["weight_format"].read().reshape(-1)[0]) != 0:
        raise UserError(f"model.source: '{weight.key}' is stored in a tiled int8 layout, allowed: rows.")
    out, columns = weight.shape
    read_scales: Callable[[], Tensor] = parts["SCB"].read

    def read() -> PackedWeight:
        tensors = {"packed": weight.read().clone(), "absmax": read_scales().reshape(-1).to(torch.float32, copy=True)}
        return from_tensors("int8", (out, columns), columns, tensors)

    return StoredPacked(weight.key, weight.shape, "int8", columns, False, read)
