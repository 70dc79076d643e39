"""Packed weights in the layout of bitsandbytes' checkpoints, as transformers writes them to safetensors.

nf4, fp4:   weight (ceil(out * in / 2), 1) uint8, or the same bytes under another dtype
            weight.absmax, weight.quant_map, and nested: weight.nested_absmax, weight.nested_quant_map
            weight.quant_state.bitsandbytes__nf4 (or __fp4): JSON as uint8, with the shape and the block size
int8:       weight (out, in) int8, SCB (out,) float32, and often weight_format () or (1,) uint8, 0 for rows
"""

from __future__ import annotations
from collections.abc import Mapping
from qdora.errors import UserError
from qdora.files.json_file import parse_json
from qdora.quant import codebooks
from qdora.quant.codebooks import NESTED_BLOCK_SIZE
from qdora.quant.packed import PackedWeight
from qdora.quant.packed import from_tensors
from torch import Tensor
from typing import Any
import json
import torch

FOUR_BIT_KINDS = ("nf4", "fp4")
"""Kinds that bitsandbytes stores in 4 bits."""
STATE_NAME = "weight.quant_state.bitsandbytes__"
_TABLE_TOLERANCE = 1e-4


def from_bnb_state(state: Mapping[str, Tensor], *, name: str = "weight") -> PackedWeight:
    """Read a weight that bitsandbytes quantised. Nothing is quantised again, and large tensors share memory.

    Args:
        state: The layer's tensors, named without the layer's prefix ("weight", "weight.absmax", ..., "SCB"). Others,
            such as "bias", are ignored.
        name: The layer's name in an error.
    Raises UserError: If a tensor is missing or does not fit the others, or the code book is not the kind's.
    """
    if "weight" not in state:
        raise UserError(f"{name}: the tensor 'weight' is missing; there are {sorted(state)}.")
    if "SCB" in state:
        return _from_int8(state, name)
    keys = [key for key in state if key.startswith(STATE_NAME)]
    if len(keys) != 1:
        raise UserError(f"{name}: needs one tensor '{STATE_NAME}nf4' or '{STATE_NAME}fp4', got {len(keys)}: {keys}.")
    kind = keys[0].removeprefix(STATE_NAME)
    try:
        stored = json.loads(bytes(state[keys[0]].cpu().tolist()))
    except ValueError as error:
        raise UserError(f"{name}: the quantisation state is not JSON: {error}.") from error
    if not isinstance(stored, dict):
        raise UserError(f"{name}: the quantisation state must be a JSON object, got a {type(stored).__name__}.")
    faults = _faults(kind, stored, state)
    if faults:
        raise UserError(*(f"{name}: {fault}" for fault in faults))
    rows, columns = (int(size) for size in stored["shape"])
    weight = state["weight"].contiguous()
    tensors = {"packed": weight.reshape(-1).view(torch.uint8), "absmax": state["weight.absmax"]}
    if "weight.nested_absmax" in state:
        tensors["nested_absmax"] = state["weight.nested_absmax"]
        tensors["nested_code"] = state["weight.nested_quant_map"]
        # Stored as decimal digits of a float32, so this is exact.
        tensors["nested_offset"] = torch.tensor(stored["nested_offset"], dtype=torch.float32, device=weight.device)
    return _packed(kind, (rows, columns), int(stored["blocksize"]), tensors, name=name)


def _packed(
    kind: str, shape: tuple[int, int], block_size: int, tensors: Mapping[str, Tensor], *, name: str
) -> PackedWeight:
    try:
        return from_tensors(kind, shape, block_size, tensors)
    except ValueError as error:
        raise UserError(*(f"{name}: {fault}" for fault in str(error).splitlines())) from error


def _faults(kind: str, stored: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[str]:
    """The faults of a 4-bit state, one line each."""
    if kind not in codebooks.CODE_BITS:
        return [f"the kind must be one of {', '.join(codebooks.CODE_BITS)}, got '{kind}'."]
    faults = [f"'{key}' is missing." for key in ("weight.absmax", "weight.quant_map") if key not in state]
    faults += [f"the quantisation state has no '{key}'." for key in ("shape", "blocksize") if key not in stored]
    if stored.get("quant_type", kind) != kind:
        faults.append(f"the quantisation state says '{stored['quant_type']}', its name says '{kind}'.")
    shape = stored.get("shape")
    if shape is not None and len(shape) != 2:
        faults.append(f"the weight must have shape (out, in), got {shape}.")
    table = state.get("weight.quant_map")
    if table is not None:
        expected = codebooks.code_values(kind, table.device)
        if table.shape != expected.shape or bool(((table.float() - expected).abs() > _TABLE_TOLERANCE).any()):
            faults.append(f"'weight.quant_map' is not the code book of {kind}.")
    if "weight.nested_absmax" in state:
        if "weight.nested_quant_map" not in state:
            faults.append("'weight.nested_quant_map' is missing.")
        if "nested_offset" not in stored:
            faults.append("the quantisation state has no 'nested_offset'.")
        if stored.get("nested_blocksize") != NESTED_BLOCK_SIZE:
            found = stored.get("nested_blocksize")
            faults.append(f"the nested block size must be {NESTED_BLOCK_SIZE}, got {found}.")
    return faults


def _from_int8(state: Mapping[str, Tensor], name: str) -> PackedWeight:
    weight, scales = state["weight"], state["SCB"].float().reshape(-1)
    layout = state.get("weight_format")
    if layout is not None and bool((layout != 0).any()):
        raise UserError(
            f"{name}: the int8 weight must be stored by rows (weight_format 0), got {layout.tolist()}, which is tiled."
        )
    if weight.ndim != 2:
        raise UserError(f"{name}: the int8 weight must have shape (out, in), got {tuple(weight.shape)}.")
    shape = (weight.shape[0], weight.shape[1])
    return _packed("int8", shape, shape[1], {"packed": weight, "absmax": scales}, name=name)


def to_bnb_state(packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The inverse of `from_bnb_state`, to be stored under the layer's prefix; large tensors share memory.

    `dtype` is the one that bitsandbytes dequantises to by default. Kinds that it does not have (int4, nf3, nf2) are
    written alike, for bases that qdora keeps for itself.
    """
    if packed.kind == "int8":
        return {
            "weight": packed.packed,
            "SCB": packed.absmax,
            "weight_format": torch.zeros((), dtype=torch.uint8, device=packed.device),
        }
    stored: dict[str, Any] = {
        "quant_type": packed.kind,
        "blocksize": packed.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    state = {
        "weight": packed.packed.view(-1, 1),
        "weight.absmax": packed.absmax,
        "weight.quant_map": codebooks.code_values(packed.kind, packed.device),
    }
    if packed.nested is not None:
        state["weight.nested_absmax"] = packed.nested.absmax
        state["weight.nested_quant_map"] = packed.nested.code
        stored["nested_blocksize"] = NESTED_BLOCK_SIZE
        stored["nested_dtype"] = "float32"
        stored["nested_offset"] = packed.nested.offset.item()
    state[f"{STATE_NAME}{packed.kind}"] = torch.tensor(list(json.dumps(stored).encode()), dtype=torch.uint8)
    return state
