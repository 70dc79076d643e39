"""Packed weights in the layout of bitsandbytes' checkpoints, as transformers writes them to safetensors.

nf4, fp4:   weight (ceil(out * in / 2), 1) uint8, or the same bytes under another dtype
            weight.absmax, weight.quant_map, and nested: weight.nested_absmax, weight.nested_quant_map
            weight.quant_state.bitsandbytes__nf4 (or __fp4): JSON as uint8, with the shape and the block size
int8:       weight (out, in) int8, SCB (out,) float32, and often weight_format () or (1,) uint8, 0 for rows
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qdora.errors import UserError
from qdora.quant import codebooks
from qdora.quant.codebooks import NESTED_BLOCK_SIZE
from qdora.quant.packed import PackedWeight, from_tensors

FOUR_BIT_KINDS = ("nf4", "fp4")
"""Kinds that bitsandbytes stores in 4 bits."""
BNB_KINDS = (*FOUR_BIT_KINDS, "int8")
STATE_NAME = "weight.quant_state.bitsandbytes__"


def from_bnb_state(state: Mapping[str, Tensor], *, name: str = "weight") -> PackedWeight:
    """Read a weight that bitsandbytes quantised, sharing its memory. `state` has the layer's tensors without its prefix
    ("weight", "weight.absmax", ..., "SCB"); `name` is the layer's in an error."""
    try:
        weight = state["weight"]
        if "SCB" in state:
            layout = state.get("weight_format")
            if layout is not None and layout.any():
                raise ValueError(f"weight_format must be 0, by rows, got {layout.tolist()}, which is tiled.")
            rows, columns = weight.shape
            tensors = {"packed": weight, "absmax": state["SCB"].float().view(-1)}
            return from_tensors("int8", (rows, columns), columns, tensors)
        (key,) = (key for key in state if key.startswith(STATE_NAME))
        kind, stored = key.removeprefix(STATE_NAME), json.loads(bytes(state[key].cpu().tolist()))
        table = state["weight.quant_map"].float()
        if not torch.allclose(table, codebooks.code_values(kind, table.device), rtol=0, atol=1e-4):
            raise ValueError(f"weight.quant_map is not the code book of {kind}.")
        rows, columns = stored["shape"]
        codes = weight.contiguous().reshape(-1).view(torch.uint8)
        tensors = {"packed": codes, "absmax": state["weight.absmax"]}
        if "weight.nested_absmax" in state:
            tensors["nested_absmax"] = state["weight.nested_absmax"]
            tensors["nested_code"] = state["weight.nested_quant_map"]
            # Stored as decimal digits of a float32, so this is exact.
            tensors["nested_offset"] = torch.tensor(
                stored["nested_offset"], dtype=torch.float32, device=weight.device
            )
        if "global_scale" in stored:
            tensors["global_scale"] = torch.tensor(stored["global_scale"], dtype=torch.float32)
        return from_tensors(kind, (rows, columns), stored["blocksize"], tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{name}: not a weight that bitsandbytes stored: {error!r}") from error


def to_bnb_state(packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The inverse of `from_bnb_state`, also for kinds that bitsandbytes lacks. `dtype` is the one that it dequantises
    to."""
    if packed.kind == "int8":
        layout = torch.zeros((), dtype=torch.uint8, device=packed.device)
        return {"weight": packed.packed, "SCB": packed.absmax, "weight_format": layout}
    stored: dict[str, Any] = {
        "quant_type": packed.kind,
        "blocksize": packed.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    if packed.kind in codebooks.TIGHT:
        stored["bits"] = codebooks.CODE_BITS[packed.kind]
    state = {
        "weight": packed.packed.view(-1, 1),
        "weight.absmax": packed.absmax,
        "weight.quant_map": codebooks.code_values(packed.kind, packed.device),
    }
    if packed.nested_absmax is not None:
        state["weight.nested_absmax"] = packed.nested_absmax
        state["weight.nested_quant_map"] = packed.nested_code
        stored["nested_blocksize"] = NESTED_BLOCK_SIZE
        stored["nested_dtype"] = "float32"
        stored["nested_offset"] = packed.nested_offset.item()
    if packed.global_scale is not None:
        stored["global_scale"] = packed.global_scale.item()
    state[f"{STATE_NAME}{packed.kind}"] = torch.tensor(list(json.dumps(stored).encode()), dtype=torch.uint8)
    return state
