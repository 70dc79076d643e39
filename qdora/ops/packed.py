"""A frozen weight in 2 to 8 bits: the container, and the functions that make and read it.

The plain-torch code of `blockwise` and `int8` is the definition. bitsandbytes' kernels are used where they are faster
and give the same bits; `choose_backend` says where, and why not elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from qdora.errors import nearest
from qdora.ops import blockwise, bnb_kernels, codebooks, int8
from qdora.ops.codebooks import NESTED_BLOCK_SIZE
from qdora.ops.planned_device import device_kind

Kind = Literal["nf4", "fp4", "int8", "int4", "nf3", "nf2"]
Backend = Literal["auto", "torch", "bnb"]
KINDS: tuple[str, ...] = get_args(Kind)
BLOCK_SIZES: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class NestedScales:
    """What decodes the 8-bit block scales of double quantisation.

    scale = code[q] * absmax[block // block_size] + offset

    Source: QLoRA, arXiv 2305.14314, sec. 3.

    Attributes:
        absmax: (ceil(blocks / 256),) float32.
        code: The values of the dynamic map, (256,) float32, ascending.
        offset: Mean of the block scales, () float32.
        block_size: Block scales per entry of `absmax`.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    block_size: int = NESTED_BLOCK_SIZE


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (out, in) in a low-bit format. Nothing writes into it after it is made.

    Attributes:
        kind: "nf4", "fp4", "int8", or a research format: "int4", "nf3", "nf2" (see `codebooks`).
        shape: (out, in) of the dense weight.
        block_size: Weights per block scale, counted along the flattened rows; `in` for int8.
        packed: (ceil(out * in / 2),) uint8, first of two weights in the high nibble. int8: (out, in) int8.
        absmax: Block scales, (blocks,) float32, or (blocks,) uint8 where `nested` decodes them; int8: (out,) float32.
        nested: Set where the block scales are double quantised.
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
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and the nested code book included."""
        return 8 * self.num_bytes / (self.shape[0] * self.shape[1])

    @property
    def num_packed_bytes(self) -> int:
        """Bytes where the codes are packed as tightly as their format allows; `num_bytes` but for simulated formats."""
        if self.kind not in codebooks.SIMULATED:
            return self.num_bytes
        codes = -(-self.shape[0] * self.shape[1] * codebooks.CODE_BITS[self.kind] // 8)
        return self.num_bytes - self.packed.numel() + codes

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedWeight:
        """The same weight on `device`; itself where it is there already. Dtypes never change."""
        if torch.device(device) == self.device:
            return self
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()}
        return from_tensors(self.kind, self.shape, self.block_size, moved)

    def clone(self) -> PackedWeight:
        """The same weight in memory of its own."""
        copies = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return from_tensors(self.kind, self.shape, self.block_size, copies)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: packed, absmax and, where nested, nested_absmax, nested_code, nested_offset."""
        named = {"packed": self.packed, "absmax": self.absmax}
        if self.nested is not None:
            named["nested_absmax"] = self.nested.absmax
            named["nested_code"] = self.nested.code
            named["nested_offset"] = self.nested.offset
        return named


def _layout(
    kind: str, shape: tuple[int, int], block_size: int, nested: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a packed weight. Raises ValueError for an unknown kind or block size."""
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise ValueError(f"cannot pack a weight of shape ({rows}, {columns}): it has no entries.")
    if kind == "int8":
        if nested:
            raise ValueError("int8 scales are not double quantised; only those of blocks are.")
        return {"packed": (shape, torch.int8), "absmax": ((rows,), torch.float32)}
    if kind not in KINDS:
        raise ValueError(f"unknown kind '{kind}'; allowed: {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}.")
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
    """The inverse of `PackedWeight.tensors`; shares memory with what is given.

    Raises:
        ValueError: If the kind or block size is unknown, or a tensor is missing, unknown or of a wrong shape or dtype;
            one line per fault.
    """
    layout = _layout(kind, shape, block_size, "nested_absmax" in tensors)
    faults = [f"unknown tensor '{name}'.{nearest(name, layout)}" for name in tensors if name not in layout]
    for name, (size, dtype) in layout.items():
        if name not in tensors:
            faults.append(f"tensor '{name}' is missing.")
        elif tensors[name].shape != size or tensors[name].dtype != dtype:
            given = tensors[name]
            faults.append(
                f"'{name}' is {tuple(given.shape)} {given.dtype}, but {shape} in {kind} needs {size} {dtype}."
            )
    if faults:
        raise ValueError("\n".join(faults))
    nested = None
    if "nested_absmax" in tensors:
        nested = NestedScales(tensors["nested_absmax"], tensors["nested_code"], tensors["nested_offset"])
    return PackedWeight(cast(Kind, kind), shape, block_size, tensors["packed"], tensors["absmax"], nested)


def empty_packed(
    kind: str,
    shape: tuple[int, int],
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A packed weight with uninitialised tensors, to be filled or, on "meta" or under FakeTensorMode, measured.

    Raises:
        ValueError: If the kind, shape or block size is not supported.
    """
    layout = _layout(kind, shape, block_size, double_quant and kind != "int8")
    tensors = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in layout.items()}
    return from_tensors(kind, shape, shape[1] if kind == "int8" else block_size, tensors)


def choose_backend(
    kind: str, device: torch.device, *, block_size: int, in_features: int, dtype: torch.dtype
) -> Literal["torch", "bnb"]:
    """Who dequantises: bitsandbytes where its kernel gives the bits of the definition, else plain torch.

    Measured with bitsandbytes 0.50.2 on a CPU with AVX512: its 4-bit kernel starts each row at a new block, so every
    row that begins inside a block decodes with a wrong scale, off by up to 88 % of the largest weight, without an
    error. It is right where a row is a whole number of blocks, which is asked for here on any CPU. From block size 2048
    on, and for odd rows, it falls back to slow code of its own.
    """
    if kind not in ("nf4", "fp4") or dtype not in (torch.float32, torch.bfloat16, torch.float16) or block_size < 32:
        return "torch"
    if device_kind(device) == "cpu" and (in_features % block_size or block_size >= 2048):
        return "torch"
    return "bnb" if _has_kernels(device) else "torch"


def _has_kernels(device: torch.device) -> bool:
    """Whether bitsandbytes runs on a device; a plan for a GPU takes it for granted there."""
    return device_kind(device) != device.type or bnb_kernels.is_available(device.type)


def _resolve(backend: str, chosen: Literal["torch", "bnb"], what: str) -> Literal["torch", "bnb"]:
    """`chosen` for "auto", else the backend asked for. Raises ValueError where bitsandbytes cannot do it."""
    if backend == "auto" or backend == chosen:
        return chosen
    if backend == "torch":
        return "torch"
    if backend != "bnb":
        raise ValueError(f"unknown backend '{backend}'; allowed: auto, torch, bnb.")
    raise ValueError(f"bitsandbytes does not {what} correctly, or is not installed; use backend='auto'.")


def quantize(
    weight: Tensor,
    kind: str,
    block_size: int = 64,
    double_quant: bool = True,
    backend: str = "auto",
    *,
    name: str = "weight",
) -> PackedWeight:
    """Quantise a dense weight on the device where it lies.

    "auto" is the plain-torch definition on every device, so that a base does not depend on where it was quantised. Its
    peak beside the weight is about twice the result (266 MiB for 512 MiB of bf16), plus a copy of a weight that is not
    contiguous.

    Args:
        weight: (out, in), any float dtype; rounded to float32 first.
        kind: One of `KINDS`.
        block_size: One of `BLOCK_SIZES`; not used by int8, which has one scale a row.
        double_quant: Store the block scales in 8 bits; not used by int8.
        backend: "auto", "torch", or "bnb" for bitsandbytes' own kernels (nf4, fp4).
        name: What the weight is called in an error.
    Raises:
        ValueError: If the weight is not a matrix of finite floats, is empty, or an argument is not allowed.
    """
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a float matrix (out, in), got {tuple(weight.shape)} {weight.dtype}.")
    shape = (weight.shape[0], weight.shape[1])
    _layout(kind, shape, block_size, double_quant and kind != "int8")
    wide = weight.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    can_bnb = backend == "bnb" and kind in ("nf4", "fp4") and not wide and bnb_kernels.is_available(weight.device.type)
    backend = _resolve(backend, "bnb" if can_bnb else "torch", f"quantise {weight.dtype} to {kind}")
    if kind == "int8":
        return PackedWeight("int8", shape, shape[1], *int8.quantize_rows(weight, name=name))
    four_bits = cast(Kind, kind)
    if backend == "bnb":
        packed, absmax = bnb_kernels.quantize_4bit(weight, kind, block_size)
    else:
        packed, absmax = blockwise.quantize_4bit(weight, kind, block_size, name=name)
    if not double_quant:
        return PackedWeight(four_bits, shape, block_size, packed, absmax)
    code = codebooks.dynamic_map(weight.device)
    quantize_scales = bnb_kernels.quantize_scales if backend == "bnb" else blockwise.quantize_scales
    codes, nested_absmax, offset = quantize_scales(absmax, code, NESTED_BLOCK_SIZE)
    return PackedWeight(four_bits, shape, block_size, packed, codes, NestedScales(nested_absmax, code, offset))


@torch.no_grad()
def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Tensor:
    """The dense weight: a product in float32, then one cast.

    Args:
        packed: Any packed weight.
        dtype: Any float dtype.
        backend: "auto" (see `choose_backend`), "torch" or "bnb". All give the same bits.
    Returns:
        (out, in) in `dtype`, a new tensor.
    Raises:
        ValueError: If bitsandbytes is asked for and cannot do it.
    """
    chosen = choose_backend(
        packed.kind, packed.device, block_size=packed.block_size, in_features=packed.shape[1], dtype=dtype
    )
    if packed.kind == "int8":
        _resolve(backend, chosen, "decode int8")
        return int8.dequantize_rows(packed.packed, packed.absmax, dtype)
    backend = _resolve(backend, chosen, f"decode {packed.shape} in blocks of {packed.block_size} to {dtype}")
    scales = block_scales(packed, backend)
    decode = bnb_kernels.dequantize_4bit if backend == "bnb" else blockwise.dequantize_4bit
    return decode(packed.packed, scales, packed.kind, packed.block_size, packed.shape, dtype)


@torch.no_grad()
def block_scales(packed: PackedWeight, backend: str = "auto") -> Tensor:
    """The block scales, decoded where they are double quantised.

    With double quantisation the scale of a block can come out slightly below 0, or not 0 for a zero block. Its zero
    weights stay zero all the same: their value is 0 whatever the scale.

    Args:
        packed: Any packed weight.
        backend: "auto", "torch" or "bnb". All give the same bits.
    Returns:
        (blocks,) float32; for int8 (out,), the absmax of each row. Shares memory with `packed` where not nested.
    """
    nested = packed.nested
    if nested is None:
        return packed.absmax
    backend = _resolve(backend, "bnb" if _has_kernels(packed.device) else "torch", "decode scales")
    decode = bnb_kernels.dequantize_scales if backend == "bnb" else blockwise.dequantize_scales
    return decode(packed.absmax, nested.absmax, nested.code, nested.offset, nested.block_size)
