"""Quantised checkpoints, by bitsandbytes (keys: `qdora.quant.bnb_state`) or in MXFP4: their packed bytes are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from qdora.errors import UserError
from qdora.files.json_file import parse_json
from qdora.model.experts import replaced_in_4_bits
from qdora.model.stored_tensors import Stored, StoredPacked, StoredTensor
from qdora.quant.bnb_state import STATE_NAME, from_bnb_state
from qdora.quant.codebooks import MXFP4, MXFP4_BLOCK_SIZE
from qdora.quant.packed import PackedWeight, from_tensors

_PART = re.compile(
    r"(?P<layer>.*)\.(?P<part>SCB|weight_format"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))"
)
_SCALES_8BIT = "SCB"
_E8M0_NAN = 255
"""The exponent of a block scale of MXFP4 that is not a number."""


def stored_kind(settings: object) -> str | None:
    """nf4, fp4, int8 or mxfp4 from config.quantization_config; None for full precision.

    Raises UserError if the checkpoint was quantised in another way.
    """
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
    """Join the parts of every quantised weight into one entry; dense tensors pass through.

    Raises UserError for parts without a weight, or a quantisation other than nf4, fp4, int8, mxfp4.
    """
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
    lone = [
        f"model.source: the checkpoint has block scales for '{key}', but not the weight."
        for key in parts
        if key not in dense
    ]
    if lone:
        raise UserError(*lone)
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
    """A weight of uint8 codes, first of two weights in the high half, and uint8 exponents, each in any shape.

    Raises UserError, which names the tensor `key`, if an exponent is NaN or a size is wrong.
    """
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
