"""A frozen weight in 2 to 8 bits: the container `PackedWeight`, quantising into it and dequantising from it.

`blockwise` defines the formats. bitsandbytes' kernels dequantise where they give the same bits (`decoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qdora.quant import blockwise, codebooks, kernels
from qdora.quant.codebooks import FIXED_BLOCK_SIZES, INT4_GROUPS, MXFP4, NESTED_BLOCK_SIZE, NVFP4

BLOCK_SIZES: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

TENSOR_NAMES = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset", "zeros", "global_scale")
"""Those of `PackedWeight.tensors`, of which most kinds have the first two."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (out, in) in a low-bit format. Nothing writes into its tensors.

    Attributes:
        kind: A name in `codebooks.CODE_BITS`.
        block_size: Weights per block scale, counted along the flattened rows; `in` for int8, 32 for mxfp4.
        packed: Codes as by `blockwise.pack_codes`, (ceil(out * in / 2),) uint8 for 4 bits. int8: (out, in) int8.
        absmax: Block scales, (blocks,) float32, or (blocks,) uint8 if double quantised; int8: (out,) float32; mxfp4:
            (blocks,) uint8, 127 more than the exponent of a power of 2; nvfp4: (blocks,) uint8, the bits of a
            float8_e4m3fn; int4-groups: in 16 or 32 bits, as in its checkpoint.
        nested_absmax, nested_code, nested_offset: Of double quantised scales q, float32: scale = code[q] *
            absmax[block // 256] + offset. Blocks of 256 scales; the dynamic map, (256,); the mean of the scales, ().
        zeros: int4-groups: the code of 0 in each block, (blocks,) uint8; a weight is (code - zero) * scale.
        global_scale: nvfp4: () float32; the scale of a block is absmax / global_scale.
    """

    kind: str
    shape: tuple[int, int]
    block_size: int
    packed: Tensor
    absmax: Tensor
    nested_absmax: Any = None
    nested_code: Any = None
    nested_offset: Any = None
    zeros: Any = None
    global_scale: Any = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedWeight:
        """The same weight on `device`."""
        if torch.device(device) == self.device:
            return self
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()}
        return from_tensors(self.kind, self.shape, self.block_size, moved)

    def clone(self) -> PackedWeight:
        """A copy that shares no memory."""
        copies = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return from_tensors(self.kind, self.shape, self.block_size, copies)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their `TENSOR_NAMES`."""
        return {name: held for name in TENSOR_NAMES if (held := getattr(self, name)) is not None}


OWN_SCALES = (MXFP4, NVFP4, INT4_GROUPS)
"""Kinds whose scales are never double quantised, and whose blocks never cross rows."""

_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor


def _layout(
    kind: str, shape: tuple[int, int], block_size: int, nested: bool, of_groups: torch.dtype = torch.bfloat16
) -> _Layout:
    rows, columns = shape
    if kind == "int8":
        return {"packed": (shape, torch.int8), "absmax": ((rows,), torch.float32)}
    sizes = (FIXED_BLOCK_SIZES[kind],) if kind in FIXED_BLOCK_SIZES else BLOCK_SIZES
    if block_size not in sizes or (kind in OWN_SCALES and columns % block_size):
        raise ValueError(f"block size of {shape} in {kind} must be one of {sizes}, got {block_size}.")
    blocks = -(-rows * columns // block_size)
    scales = {MXFP4: torch.uint8, NVFP4: torch.uint8, INT4_GROUPS: of_groups}
    layout: _Layout = {
        "packed": ((codebooks.code_bytes(kind, rows * columns),), torch.uint8),
        "absmax": ((blocks,), scales.get(kind, torch.uint8 if nested else torch.float32)),
    }
    if kind == INT4_GROUPS:
        layout["zeros"] = ((blocks,), torch.uint8)
    if kind == NVFP4:
        layout["global_scale"] = ((), torch.float32)
    if nested:
        layout["nested_absmax"] = ((-(-blocks // NESTED_BLOCK_SIZE),), torch.float32)
        layout["nested_code"] = ((256,), torch.float32)
        layout["nested_offset"] = ((), torch.float32)
    return layout


def from_tensors(
    kind: str, shape: tuple[int, int], block_size: int, tensors: Mapping[str, Tensor]
) -> PackedWeight:
    """The inverse of `PackedWeight.tensors`; ValueError for another shape or dtype."""
    of_groups = tensors["absmax"].dtype if "absmax" in tensors else torch.bfloat16
    layout = _layout(kind, shape, block_size, "nested_absmax" in tensors, of_groups)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != layout:
        raise ValueError(f"{shape} in {kind} must have the tensors {layout}, got {found}.")
    return PackedWeight(kind, shape, block_size, **tensors)


def empty_packed(
    kind: str,
    shape: tuple[int, int],
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A packed weight with uninitialised tensors."""
    block_size = FIXED_BLOCK_SIZES.get(kind, block_size)
    layout = _layout(kind, shape, block_size, double_quant and kind not in ("int8", *OWN_SCALES))
    tensors = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in layout.items()}
    return from_tensors(kind, shape, shape[1] if kind == "int8" else block_size, tensors)


def quantize(
    weight: Tensor, kind: str, block_size: int = 64, double_quant: bool = True, *, name: str = "weight"
) -> PackedWeight:
    """Quantise a dense weight, (out, in) in any float dtype, on its device, with the plain-torch definition.

    The peak is about twice the result. `name` is the weight's in an error.
    """
    shape = (weight.shape[0], weight.shape[1])
    if kind in FIXED_BLOCK_SIZES:
        block_size = FIXED_BLOCK_SIZES[kind]
        _layout(kind, shape, block_size, nested=False)  # refuses rows that are no whole blocks
        return from_tensors(kind, shape, block_size, blockwise.quantize_fp4_blocks(weight, kind, name))
    if kind == "int8":
        return PackedWeight("int8", shape, shape[1], *blockwise.quantize_rows(weight, name))
    _layout(kind, shape, block_size, nested=False)  # refuses other kinds and block sizes
    plain = PackedWeight(kind, shape, block_size, *blockwise.quantize_blocks(weight, kind, block_size, name))
    return with_nested_scales(plain, double_quant)


def quantize_parts(
    parts: Iterable[Tensor], kind: str, block_size: int, double_quant: bool, *, name: str = "weight"
) -> PackedWeight:
    """`quantize` for a weight that comes in parts of whole rows and blocks: the same bits, with one part in memory."""
    done = [quantize(part, kind, block_size, double_quant=False, name=name) for part in parts]
    if len(done) == 1:
        return with_nested_scales(done[0], double_quant)
    shape = sum(part.shape[0] for part in done), done[0].shape[1]
    packed, absmax = torch.cat([part.packed for part in done]), torch.cat([part.absmax for part in done])
    return with_nested_scales(replace(done[0], shape=shape, packed=packed, absmax=absmax), double_quant)


@torch.no_grad()
def pack(codes: Tensor, absmax: Tensor, kind: str, block_size: int, double_quant: bool) -> PackedWeight:
    """A weight from its codes, (out, in) uint8, and the scales of its blocks, (blocks,) float32, which may cross rows;
    the scales are stored as `stored_scales`."""
    shape = (codes.shape[0], codes.shape[1])
    tensors = {"packed": blockwise.pack_codes(codes.reshape(-1), kind), "absmax": absmax}
    return with_nested_scales(from_tensors(kind, shape, block_size, tensors), double_quant)


def stored_scales(absmax: Tensor, double_quant: bool) -> Tensor:
    """Block scales, (blocks,) float32, as they are decoded once they are stored: with double quantisation rounded."""
    return blockwise.dequantize_scales(*blockwise.quantize_scales(absmax)) if double_quant else absmax


def with_nested_scales(plain: PackedWeight, double_quant: bool) -> PackedWeight:
    """The same weight with double quantised scales, but for int8 and `OWN_SCALES`. Only the scales are read."""
    if not double_quant or plain.kind in ("int8", *OWN_SCALES):
        return plain
    codes, absmax, code, offset = blockwise.quantize_scales(plain.absmax)
    return replace(plain, absmax=codes, nested_absmax=absmax, nested_code=code, nested_offset=offset)


def decoder(
    kind: str, device: torch.device, *, block_size: int, in_features: int, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """A kernel that gives the bits of the definition, else plain torch: Triton for `codebooks.TIGHT`, or bitsandbytes.

    bitsandbytes 0.50.2 on a CPU with AVX512 starts each row at a new block, so a row that begins inside a block decodes
    with a wrong scale, without an error. From block size 2048 on it is slow.
    """
    if kind in codebooks.TIGHT:
        is_planned = kernels.device_kind(device) != device.type
        runs, kernel = is_planned or kernels.tight_decoder(device.type) is not None, kernels.dequantize_tight
    else:
        cuts = kernels.device_kind(device) == "cpu" and (in_features % block_size or block_size >= 2048)
        runs = kind in ("nf4", "fp4") and block_size >= 32 and dtype != torch.float64 and not cuts
        runs, kernel = runs and _has_kernels(device), kernels.dequantize_4bit
    return kernel if runs else blockwise.dequantize_blocks


def _has_kernels(device: torch.device) -> bool:
    return kernels.device_kind(device) != device.type or kernels.is_available(device.type)


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight (out, in), a new tensor in any float dtype: a product in float32, then one cast."""
    if packed.kind == "int8":
        return blockwise.dequantize_rows(packed.packed, packed.absmax, dtype)
    scales = block_scales(packed)
    form = packed.kind, packed.block_size
    return decode_blocks(packed.packed, scales, *form, shape=packed.shape, dtype=dtype, zeros=packed.zeros)


def decode_blocks(
    codes: Tensor,
    scales: Tensor,
    kind: str,
    block_size: int,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    zeros: Tensor | None = None,
) -> Tensor:
    """`blockwise.dequantize_blocks` by the `decoder` for it."""
    decode = decoder(kind, codes.device, block_size=block_size, in_features=shape[1], dtype=dtype)
    more = {} if zeros is None else {"zeros": zeros}  # which no kernel knows
    return decode(codes, scales, kind, block_size, shape=shape, dtype=dtype, **more)


def block_scales(packed: PackedWeight, blocks: slice = slice(None)) -> Tensor:
    """The block scales (blocks,) float32, decoded if they are double quantised; for int8 each row's absmax.

    Double quantised, a zero block's scale can be not 0, or slightly negative. Of `blocks`, a slice without a step, only
    the groups of 256 are decoded.
    """
    if packed.kind == MXFP4 and packed.absmax.dtype == torch.uint8:
        exponents = packed.absmax[blocks].int() - 127
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    if packed.global_scale is not None:
        return torch.div(packed.absmax[blocks].view(torch.float8_e4m3fn).float(), packed.global_scale)
    if packed.nested_absmax is None:
        return packed.absmax[blocks].float()
    first, last, _ = blocks.indices(packed.absmax.numel())
    group, end = first // NESTED_BLOCK_SIZE, -(-last // NESTED_BLOCK_SIZE)
    start = group * NESTED_BLOCK_SIZE
    decode = kernels.dequantize_scales if _has_kernels(packed.device) else blockwise.dequantize_scales
    scales = (
        packed.absmax[start:last],
        packed.nested_absmax[group:end],
        packed.nested_code,
        packed.nested_offset,
    )
    return decode(*scales)[first - start :]


def packed_rows(packed: PackedWeight, rows: slice) -> PackedWeight:
    """Some rows, which begin and end at blocks, sharing the codes, with decoded block scales."""
    shape = (rows.stop - rows.start, packed.shape[1])
    if packed.kind == "int8":
        return PackedWeight("int8", shape, packed.block_size, packed.packed[rows], packed.absmax[rows])
    first, last, bits = rows.start * shape[1], rows.stop * shape[1], codebooks.CODE_BITS[packed.kind]
    blocks = slice(first // packed.block_size, last // packed.block_size)
    codes = packed.packed[first * bits // 8 : last * bits // 8]
    zeros = None if packed.zeros is None else packed.zeros[blocks]
    form = packed.kind, shape, packed.block_size, codes, block_scales(packed, blocks)
    return PackedWeight(*form, zeros=zeros)


@torch.no_grad()
def zero_packed(packed: PackedWeight, keep_mask: Tensor) -> PackedWeight:
    """A packed weight whose entries outside `keep_mask`, (out, in) bool, have the code of 0; nothing else changes."""
    if packed.kind == "int8":
        return replace(packed, packed=packed.packed.masked_fill(~keep_mask, 0))
    codes = blockwise.unpack_codes(packed.packed, packed.kind, keep_mask.numel())
    codes.masked_fill_(~keep_mask.reshape(-1), codebooks.zero_code(packed.kind))
    return replace(packed, packed=blockwise.pack_codes(codes, packed.kind))


@torch.no_grad()
def mask_bits(mask: Tensor) -> Tensor:
    """A mask as bits, row by row, the first of eight in the lowest bit: (ceil(out * in / 8),) uint8."""
    flat = torch.nn.functional.pad(mask.reshape(-1), (0, -mask.numel() % 8))
    return (flat.view(-1, 8).to(torch.uint8) * _bits(mask.device)).sum(dim=1, dtype=torch.uint8)


@torch.no_grad()
def mask_from_bits(bits: Tensor, shape: tuple[int, int], rows: slice | None = None) -> Tensor:
    """The inverse of `mask_bits`, or some of its rows: (rows, in) bool."""
    first, last = (0, shape[0]) if rows is None else (rows.start, rows.stop)
    start, stop = first * shape[1], last * shape[1]
    flat = (bits[start // 8 : -(-stop // 8), None] & _bits(bits.device)).ne(0).view(-1)
    return flat[start % 8 : start % 8 + stop - start].view(last - first, shape[1])


def _bits(device: torch.device) -> Tensor:
    # Made there: sending numbers to a GPU would make the host wait.
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)
