"""A frozen weight in 2 to 8 bits: the container `PackedWeight`, quantising into it and dequantising from it.

The plain-torch code of `blockwise` defines the formats. bitsandbytes' kernels dequantise if they are faster
and give the same bits (`choose_backend`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from qdora.quant import blockwise, bnb_kernels, codebooks
from qdora.quant.codebooks import MXFP4, MXFP4_BLOCK_SIZE, NESTED_BLOCK_SIZE
from qdora.quant.planned_device import device_kind

Kind = Literal["nf4", "fp4", "int8", "int4", "nf3", "nf2", "mxfp4"]
KINDS: tuple[str, ...] = get_args(Kind)
BLOCK_SIZES: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

TENSOR_NAMES = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")
"""Those of `PackedWeight.tensors`; the last three if its scales are double quantised."""


@dataclass(frozen=True)
class NestedScales:
    """Decodes the 8-bit block scales q of double quantisation: scale = code[q] * absmax[block // 256] + offset.

    Source: QLoRA, arXiv 2305.14314, sec. 3.
    """

    absmax: Tensor  # (ceil(blocks / 256),) float32
    code: Tensor  # the values of the dynamic map, (256,) float32, ascending
    offset: Tensor  # mean of the block scales, () float32


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (out, in) in a low-bit format. Nothing writes into its tensors.

    Attributes:
        kind: "nf4", "fp4", "int8", "mxfp4", or a research format: "int4", "nf3", "nf2" (see `codebooks`).
        block_size: Weights per block scale, counted along the flattened rows; `in` for int8, 32 for mxfp4.
        packed: (ceil(out * in / 2),) uint8, first of two weights in the high nibble. int8: (out, in) int8.
        absmax: Block scales, (blocks,) float32, or (blocks,) uint8 if double quantised; int8: (out,) float32; mxfp4:
            (blocks,) uint8, 127 more than the exponent of a power of 2.
    """

    kind: Kind
    shape: tuple[int, int]
    block_size: int
    packed: Tensor
    absmax: Tensor
    nested: NestedScales | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def num_packed_bytes(self) -> int:
        """Bytes with the codes packed as tightly as the format allows: less than `num_bytes` for simulated formats."""
        if self.kind not in codebooks.SIMULATED:
            return self.num_bytes
        codes = -(-self.shape[0] * self.shape[1] * codebooks.CODE_BITS[self.kind] // 8)
        return self.num_bytes - self.packed.numel() + codes

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedWeight:
        """The same weight on `device`; itself if it is there already. Dtypes never change."""
        if torch.device(device) == self.device:
            return self
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()}
        return from_tensors(self.kind, self.shape, self.block_size, moved)

    def clone(self) -> PackedWeight:
        """A copy that shares no memory."""
        copies = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return from_tensors(self.kind, self.shape, self.block_size, copies)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: packed, absmax and, if nested, nested_absmax, nested_code, nested_offset."""
        named = {"packed": self.packed, "absmax": self.absmax}
        if self.nested is not None:
            named["nested_absmax"] = self.nested.absmax
            named["nested_code"] = self.nested.code
            named["nested_offset"] = self.nested.offset
        return named


def _hint(name: str, allowed: Iterable[str]) -> str:
    from qdora.errors import nearest  # only for a fault: qdora.peft loads few files

    return nearest(name, allowed)


def _layout(
    kind: str, shape: tuple[int, int], block_size: int, nested: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a packed weight. Raises ValueError for an unknown kind or block size."""
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise ValueError(f"a packed weight must have entries, got shape ({rows}, {columns}).")
    if kind == "int8":
        if nested:
            raise ValueError("int8 must not be double quantised: it has a scale per row, not per block.")
        return {"packed": (shape, torch.int8), "absmax": ((rows,), torch.float32)}
    if kind == MXFP4:
        blocks = rows * columns // MXFP4_BLOCK_SIZE
        if columns % MXFP4_BLOCK_SIZE or block_size != MXFP4_BLOCK_SIZE or nested:
            raise ValueError(f"mxfp4 has blocks of 32 in a row and a scale for each, got {shape} and {block_size}.")
        return {"packed": ((rows * columns // 2,), torch.uint8), "absmax": ((blocks,), torch.uint8)}
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got '{kind}'.{_hint(kind, KINDS)}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}.")
    blocks = -(-rows * columns // block_size)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": (((rows * columns + 1) // 2,), torch.uint8),
        "absmax": ((blocks,), torch.uint8 if nested else torch.float32),
    }
    if nested:
        layout["nested_absmax"] = ((-(-blocks // NESTED_BLOCK_SIZE),), torch.float32)
        layout["nested_code"] = ((256,), torch.float32)
        layout["nested_offset"] = ((), torch.float32)
    return layout


def from_tensors(kind: str, shape: tuple[int, int], block_size: int, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """The inverse of `PackedWeight.tensors`; shares their memory.

    Raises ValueError: If the kind or block size is unknown, or a tensor is missing, unknown or of a wrong shape or
        dtype; one line per fault.
    """
    layout = _layout(kind, shape, block_size, "nested_absmax" in tensors)
    faults = [f"unknown tensor '{name}'.{_hint(name, layout)}" for name in tensors if name not in layout]
    for name, (size, dtype) in layout.items():
        if name not in tensors:
            faults.append(f"tensor '{name}' is missing.")
        elif tensors[name].shape != size or tensors[name].dtype != dtype:
            given = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
            faults.append(f"'{name}' of {shape} in {kind} must be {size} {dtype}, got {given}.")
    if faults:
        raise ValueError("\n".join(faults))
    nested = None
    if "nested_absmax" in tensors:
        nested = NestedScales(tensors["nested_absmax"], tensors["nested_code"], tensors["nested_offset"])
    return PackedWeight(cast(Kind, kind), shape, block_size, tensors["packed"], tensors["absmax"], nested=nested)


def empty_packed(
    kind: str,
    shape: tuple[int, int],
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A packed weight with uninitialised tensors, to fill, or to measure on "meta" or under FakeTensorMode.

    Raises ValueError: If the kind, shape or block size is not supported.
    """
    block_size = MXFP4_BLOCK_SIZE if kind == MXFP4 else block_size
    layout = _layout(kind, shape, block_size, double_quant and kind not in ("int8", MXFP4))
    tensors = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in layout.items()}
    return from_tensors(kind, shape, shape[1] if kind == "int8" else block_size, tensors)


def choose_backend(
    kind: str, device: torch.device, *, block_size: int, in_features: int, dtype: torch.dtype
) -> Literal["torch", "bnb"]:
    """Which code dequantises: bitsandbytes if its kernel gives the bits of the definition, else plain torch.

    Measured with bitsandbytes 0.50.2 on a CPU with AVX512: its 4-bit kernel starts each row at a new block. A row that
    begins inside a block decodes with a wrong scale, off by up to 88 % of the largest weight, without an error. So on
    any CPU a row must be a whole number of blocks here. From block size 2048 on, and for odd rows, the kernel falls
    back to slow code of its own. On a CPU with AVX2 alone the zeros of fp4 may have the other sign.
    """
    if kind not in ("nf4", "fp4") or dtype not in (torch.float32, torch.bfloat16, torch.float16) or block_size < 32:
        return "torch"
    if device_kind(device) == "cpu" and (in_features % block_size or block_size >= 2048):
        return "torch"
    return "bnb" if _has_kernels(device) else "torch"


def _has_kernels(device: torch.device) -> bool:
    """Whether bitsandbytes runs on a device; a plan for a GPU assumes that it does."""
    return device_kind(device) != device.type or bnb_kernels.is_available(device.type)


@dataclass(frozen=True)
class RowParts:
    """A dense weight, (out, in), that is read in parts of whole rows, so that it is never in memory as a whole."""

    shape: tuple[int, int]
    parts: Callable[[], Iterator[Tensor]]  # (rows, in) each, in order; all have one dtype and device

    def to(self, device: torch.device | str) -> RowParts:
        """The same weight with its parts on `device`."""
        return RowParts(self.shape, lambda: (part.to(device) for part in self.parts()))

    def whole(self) -> Tensor:
        """The weight as one tensor."""
        return torch.cat(list(self.parts()))


def quantize(
    weight: Tensor | RowParts, kind: str, block_size: int = 64, double_quant: bool = True, *, name: str = "weight"
) -> PackedWeight:
    """Quantise a dense weight on its device, with the plain-torch definition.

    A base does not depend on the device that quantised it. The peak beside the weight is about twice the result (266
    MiB for 512 MiB of bf16), plus a copy of a weight that is not contiguous.

    Args:
        weight: (out, in), any float dtype; rounded to float32 first. Parts give the bits of the whole, and each is
            quantised when it is read, unless its rows are no whole blocks.
        block_size: One of `BLOCK_SIZES`; not used by int8, which has one scale a row.
        double_quant: Store the block scales in 8 bits; not used by int8.
        name: The weight's name in an error.
    Raises ValueError: If the weight is not a matrix of finite floats, is empty, or an argument is not allowed.
    """
    if isinstance(weight, RowParts):
        joined = _quantize_parts(weight, kind, block_size, name)
        return joined if kind == "int8" or not double_quant else with_nested_scales(joined)
    if kind == MXFP4:
        raise ValueError(f"{name}: mxfp4 is only read from checkpoints that hold it.")
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"{name} must be a float matrix (out, in), got {tuple(weight.shape)} {weight.dtype}.")
    shape = (weight.shape[0], weight.shape[1])
    _layout(kind, shape, block_size, double_quant and kind != "int8")
    if kind == "int8":
        return PackedWeight("int8", shape, shape[1], *blockwise.quantize_rows(weight, name=name))
    four_bits = cast(Kind, kind)
    packed, absmax = blockwise.quantize_4bit(weight, kind, block_size, name=name)
    plain = PackedWeight(four_bits, shape, block_size, packed, absmax)
    return with_nested_scales(plain) if double_quant else plain


def _quantize_parts(weight: RowParts, kind: str, block_size: int, name: str) -> PackedWeight:
    """Quantise each part when it is read, into memory for all, without double quantisation."""
    # The whole weight at once if a block lies in two parts.
    whole_blocks = kind == "int8" or weight.shape[1] % block_size == 0
    joined, done = None, [0, 0]
    for part in weight.parts() if whole_blocks else [weight.whole()]:
        found = quantize(part, kind, block_size, double_quant=False, name=name)
        if joined is None:
            joined = empty_packed(kind, weight.shape, block_size, double_quant=False, device=part.device)
        for index, (into, values) in enumerate(((joined.packed, found.packed), (joined.absmax, found.absmax))):
            into[done[index] : done[index] + len(values)] = values
            done[index] += len(values)
    assert joined is not None, "a weight has rows"
    return joined


def with_nested_scales(plain: PackedWeight) -> PackedWeight:
    """The same weight with double quantised scales; of `plain` only the block scales are read."""
    code = codebooks.dynamic_map(plain.absmax.device)
    codes, nested_absmax, offset = blockwise.quantize_scales(plain.absmax, code)
    nested = NestedScales(nested_absmax, code, offset)
    return PackedWeight(plain.kind, plain.shape, plain.block_size, plain.packed, codes, nested=nested)


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight (out, in), a new tensor in any float dtype: a product in float32, then one cast."""
    if packed.kind == "int8":
        return blockwise.dequantize_rows(packed.packed, packed.absmax, dtype)
    scales = block_scales(packed)
    return decode_4bit(packed.packed, scales, packed.kind, packed.block_size, shape=packed.shape, dtype=dtype)


def decode_4bit(
    codes: Tensor, scales: Tensor, kind: str, block_size: int, *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`blockwise.dequantize_4bit` by the backend that `choose_backend` names."""
    backend = choose_backend(kind, codes.device, block_size=block_size, in_features=shape[1], dtype=dtype)
    decode = bnb_kernels.dequantize_4bit if backend == "bnb" else blockwise.dequantize_4bit
    return decode(codes, scales, kind, block_size, shape=shape, dtype=dtype)


def block_scales(packed: PackedWeight, blocks: slice = slice(None)) -> Tensor:
    """The block scales (blocks,) float32, decoded if they are double quantised; for int8 (out,), each row's absmax.

    With double quantisation the scale of a block can come out slightly below 0, or not 0 for a zero block. Its zero
    weights stay zero all the same: their value is 0 whatever the scale. Shares memory with `packed` unless nested.

    `blocks` are those wanted (default: all), without a step; only their groups of 256 are decoded.
    """
    nested = packed.nested
    if packed.kind == MXFP4 and packed.absmax.dtype == torch.uint8:
        exponents = packed.absmax[blocks].int() - 127
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    if nested is None:
        return packed.absmax[blocks]
    first, last, _ = blocks.indices(packed.absmax.numel())
    group, end = first // NESTED_BLOCK_SIZE, -(-last // NESTED_BLOCK_SIZE)
    start = group * NESTED_BLOCK_SIZE
    decode = bnb_kernels.dequantize_scales if _has_kernels(packed.device) else blockwise.dequantize_scales
    codes = packed.absmax[start:last]
    decoded = decode(codes, nested.absmax[group:end], nested.code, nested.offset)
    return decoded[first - start :]


def packed_rows(packed: PackedWeight, rows: slice) -> PackedWeight:
    """Some rows as a weight of their own, which shares the codes and has decoded block scales.

    The rows begin and end at blocks: any rows, if `in` is a multiple of the block size.
    """
    shape = (rows.stop - rows.start, packed.shape[1])
    if packed.kind == "int8":
        return PackedWeight("int8", shape, packed.block_size, packed.packed[rows], packed.absmax[rows])
    first, last = rows.start * shape[1], rows.stop * shape[1]
    assert first % packed.block_size == 0, "rows begin at a block"
    assert last % packed.block_size == 0, "rows end at a block"
    scales = block_scales(packed, slice(first // packed.block_size, last // packed.block_size))
    return PackedWeight(packed.kind, shape, packed.block_size, packed.packed[first // 2 : last // 2], scales)


@torch.no_grad()
def zero_packed(packed: PackedWeight, keep_mask: Tensor) -> PackedWeight:
    """A packed weight whose entries outside `keep_mask`, (out, in) bool, have the code of 0; nothing else changes."""
    tensors = packed.tensors()
    codes = packed.packed
    if packed.kind == "int8":
        tensors["packed"] = codes.masked_fill(~keep_mask, 0)
    else:
        zero = int((codebooks.code_values(packed.kind) == 0).nonzero()[0])
        keep = torch.nn.functional.pad(keep_mask.reshape(-1), (0, keep_mask.numel() % 2), value=True)
        high = torch.where(keep[0::2], codes & 0xF0, zero << 4)
        tensors["packed"] = high | torch.where(keep[1::2], codes & 0x0F, zero)
    return from_tensors(packed.kind, packed.shape, packed.block_size, tensors)
