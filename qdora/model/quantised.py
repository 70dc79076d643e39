"""Checkpoints that other libraries quantised: what their config says, and their weights, read one at a time.

    GPTQ, AWQ, compressed-tensors in 4 bits     kept bit for bit as int4-groups, (code - zero) * scale
    nvfp4- and mxfp4-pack-quantized             kept bit for bit
    FP8                                         a source like one in 16 bits: value * scale, made dense while it is read

A quantised layer is known by the names of its tensors, not by the patterns of the config. Layouts by unpacking files of
gptqmodel 7.6, auto-round 0.15, compressed-tensors 0.19 and transformers 5.24.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from qdora.errors import UserError
from qdora.model.checkpoint import Stored, StoredPacked, StoredTensor
from qdora.quant.blockwise import pack_codes
from qdora.quant.codebooks import FIXED_BLOCK_SIZES, INT4_GROUPS, MXFP4, NVFP4
from qdora.quant.packed import BLOCK_SIZES, PackedWeight, from_tensors

_PARTS = {
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape"),
    *("weight_global_scale", "weight_g_idx", "input_scale", "input_global_scale"),
    *("activation_scale", "k_scale", "v_scale"),  # of activations and the cache of keys and values: not read
}
_FP4_FORMATS = {"nvfp4-pack-quantized": NVFP4, "mxfp4-pack-quantized": MXFP4}
# Column of each nibble of an AWQ word, the lowest first.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def form_of_config(config: PreTrainedConfig) -> dict[str, Any]:
    """`form_of_settings` of its quantization_config."""
    return form_of_settings(getattr(config, "quantization_config", None))


def form_of_settings(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """A checkpoint's form as settings of a recipe's base, from a quantization_config; FP8 counts as "none"."""
    settings = settings or {}
    method = settings.get("quant_method", "bitsandbytes" if settings else None)
    if method in (None, "fp8"):
        return {"quant": "none"}
    if method == MXFP4:
        return {"quant": MXFP4}
    if method == "bitsandbytes":
        if settings.get("load_in_8bit"):
            return {"quant": "int8"}
        return {"quant": str(settings.get("bnb_4bit_quant_type", "fp4"))}
    if method == "awq" and (layout := str(settings.get("version", "gemm")).lower()) != "gemm":
        raise UserError(f"model.source: AWQ must be in the layout gemm, got {layout}.")
    if method in ("gptq", "awq"):
        return _int4(method, settings.get("bits"), settings.get("group_size"))
    if method == "compressed-tensors":
        groups = list(settings.get("config_groups", {}).values())
        formats = {group.get("format") or settings.get("format") for group in groups} or {
            settings.get("format")
        }
        weights = dict(groups[0].get("weights") or {}) if groups else {}
        if len(formats) == 1 and (held := formats.pop()):
            if held in _FP4_FORMATS:
                return {"quant": _FP4_FORMATS[held]}
            if held in ("float-quantized", "naive-quantized") and weights.get("type") == "float":
                return {"quant": "none"}
            if held == "pack-quantized":
                return _int4(method, weights.get("num_bits"), weights.get("group_size"))
            formats = {held}
        what = ", ".join(sorted(map(str, formats)))
        raise UserError(f"model.source: the format {what} of compressed-tensors cannot be read.")
    raise UserError(f"model.source: checkpoints of {method!r} cannot be read.")


def _int4(method: str, bits: Any, size: Any) -> dict[str, Any]:
    if bits != 4 or size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise UserError(
            f"model.source: {method} must have 4 bits and groups of {sizes}, got {bits} bits and groups of {size}."
        )
    return {"quant": INT4_GROUPS, "block_size": size, "double_quant": False}


def left_dense(settings: Mapping[str, Any] | None, layers: Iterable[str]) -> set[str]:
    """Paths of the linear layers that a quantization_config leaves in 16 bits, by the patterns of its library.

    In gpt-oss only experts are quantised, which base.quant mxfp4 knows; other formats quantise its attention, too.
    """
    if not settings or settings.get("quant_method") == MXFP4:
        return set()
    keys = "modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "ignore"
    names = [str(name) for key in keys for name in settings.get(key) or ()]
    plain = [name for name in names if not name.startswith("re:")]
    # compressed-tensors and gptqmodel match the beginning of a path, which may end within a name
    expressions = [name.removeprefix("re:") for name in names if name.startswith("re:")]

    def is_left(path: str) -> bool:
        # The first of gptqmodel's rules that matches decides, and a negative one leaves the layer as it is
        rules = (rule for rule in settings.get("dynamic") or () if re.match(re.sub("^[-+]:", "", rule), path))
        is_named = any(re.match(each, path) for each in expressions) or not should_convert_module(path, plain)
        return is_named or next(rules, "").startswith("-:")

    return {path for path in layers if is_left(path)}


def join_parts(stored: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, Stored]:
    """Checkpoint key -> weight: the parts of each quantised weight become one entry, dense tensors stay."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    found: dict[str, Stored] = {}
    for key, item in stored.items():
        layer, _, part = key.rpartition(".")
        if part in _PARTS:
            layers.setdefault(layer, {})[part] = item
        else:
            found[key] = item
    for layer, parts in layers.items():
        key = f"{layer}.weight"
        if "qweight" in parts:
            found[key] = _of_words(key, parts, settings)
        elif "weight_packed" in parts:
            found[key] = _of_compressed_tensors(key, parts)
        elif isinstance(weight := found.get(key), StoredTensor):
            scale = parts.get("weight_scale") or parts["weight_scale_inv"]
            found[key] = replace(weight, read=partial(_fp8, weight, scale, _fp8_blocks(settings)))
    return found


def _fp8_blocks(settings: Mapping[str, Any]) -> tuple[int, int]:
    groups = settings.get("config_groups") or {"": {"weights": {}}}
    of_groups = (next(iter(groups.values())).get("weights") or {}).get("block_structure")
    rows, columns = settings.get("weight_block_size") or of_groups or (128, 128)
    return int(rows), int(columns)


def _fp8(weight: StoredTensor, scale: StoredTensor, blocks: tuple[int, int]) -> Tensor:
    """value * scale, float32; a scale of the tensor, () or (1,), of each row, (out, 1), or of each block."""
    values, scales = weight.read().float(), scale.read().float()
    if scales.numel() == 1:
        return values.mul_(scales.view(()))
    for dim, (length, size) in enumerate(zip(values.shape, blocks, strict=True)):
        if scales.shape[dim] not in (1, length):
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, length)
    return values.mul_(scales)


def _of_words(key: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> StoredPacked:
    """GPTQ: qweight (in / 8, out) along the inputs; AWQ: (in, out / 8) along the outputs. Both: qzeros (groups, out /
    8), scales (groups, out)."""
    is_awq = settings.get("quant_method") == "awq"
    groups, rows = parts["scales"].shape
    first, second = parts["qweight"].shape
    columns = first if is_awq else 8 * first
    size = columns // groups
    if columns % groups or (8 * second if is_awq else second) != rows:
        raise UserError(
            f"model.source: {key}: qweight {first} x {second} does not fit {groups} groups of scales."
        )
    if "g_idx" in parts and not torch.equal(parts["g_idx"].read().long(), torch.arange(columns) // size):
        raise UserError(
            f"model.source: {key}: its columns have an order of their own (desc_act), which is not read."
        )

    def read() -> PackedWeight:
        words, zeros = parts["qweight"].read(), parts["qzeros"].read()
        if is_awq:
            packed = pack_codes(_awq_codes(words).T.reshape(-1), INT4_GROUPS)
            codes = _awq_codes(zeros)
        else:
            packed = _swapped(_bytes(words.T)).reshape(-1)
            if settings.get("checkpoint_format") != "gptq_v2":  # v1 has zeros less 1, in whole words
                zeros = zeros + 0x11111111  # int32 wraps
            codes = _nibbles(zeros)
        scales = parts["scales"].read().T.reshape(-1)
        tensors = {"packed": packed, "absmax": scales, "zeros": codes.T.reshape(-1)}
        return from_tensors(INT4_GROUPS, (rows, columns), size, tensors)

    return _stored(key, (rows, columns), INT4_GROUPS, size, read, parts["scales"])


def _of_compressed_tensors(key: str, parts: Mapping[str, StoredTensor]) -> StoredPacked:
    """weight_packed (out, in / 8) int32, or (out, in / 2) uint8; weight_scale (out, groups); weight_zero_point int32,
    (out / 8, groups), packed along the outputs."""
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    is_int, (rows, groups) = packed.dtype == "I32", scale.shape
    kind = INT4_GROUPS if is_int else NVFP4 if "weight_global_scale" in parts else MXFP4
    columns = packed.shape[1] * (8 if is_int else 2)
    size = FIXED_BLOCK_SIZES.get(kind, columns // groups)
    if columns != groups * size or "weight_g_idx" in parts:
        what = "groups that do not divide its rows" if columns != groups * size else "an order of its columns"
        raise UserError(f"model.source: {key}: has {what}, which is not read.")

    def read() -> PackedWeight:
        tensors = {"packed": _swapped(_bytes(packed.read())).reshape(-1)}
        scales = scale.read().reshape(-1)
        if kind == INT4_GROUPS:
            zeros = torch.full_like(scales, 8, dtype=torch.uint8)
            if (points := parts.get("weight_zero_point")) is not None:
                zeros = _nibbles(points.read().T)[:, :rows].T.reshape(-1)
            tensors |= {"absmax": scales.clone(), "zeros": zeros}
        else:
            tensors["absmax"] = scales.view(torch.uint8).clone()
        if kind == NVFP4:
            tensors["global_scale"] = parts["weight_global_scale"].read().float().reshape(()).clone()
        return from_tensors(kind, (rows, columns), size, tensors)

    return _stored(key, (rows, columns), kind, size, read, scale)


def _stored(
    key: str,
    shape: tuple[int, int],
    kind: str,
    size: int,
    read: Callable[[], PackedWeight],
    scale: StoredTensor,
) -> StoredPacked:
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}.get(scale.dtype)
    return StoredPacked(key, shape, kind, size, double_quant=False, read=read, scale_dtype=dtype)


def _bytes(words: Tensor) -> Tensor:
    """The bytes of the last dimension, the lowest of a word first."""
    return words.contiguous().view(torch.uint8)


def _swapped(codes: Tensor) -> Tensor:
    """Bytes with their halves exchanged: in files the first of two weights is in the low one."""
    return (codes << 4) | (codes >> 4)


def _nibbles(words: Tensor) -> Tensor:
    """(..., n) int32 -> (..., 8 n) uint8, the lowest four bits of a word first."""
    codes = _bytes(words)
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def _awq_codes(words: Tensor) -> Tensor:
    order = torch.argsort(torch.tensor(_AWQ_COLUMNS))
    codes = _nibbles(words)
    return codes.view(*codes.shape[:-1], -1, 8)[..., order].flatten(-2)
