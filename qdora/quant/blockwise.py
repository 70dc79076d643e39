"""Blockwise 2- to 4-bit, row-wise int8 and double quantisation in plain torch: the definition of the formats.

On a CPU every code and scale equals bitsandbytes 0.50.2's, bit for bit, but for the offset of double quantisation,
whose float32 mean depends on the number of threads. Its CUDA kernels differ in details and store a zero block of NF4 as
-1 times 0, which double quantisation turns into small weights. Here a zero weight always decodes to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdora.quant import codebooks
from qdora.quant.codebooks import CODE_BITS, NESTED_BLOCK_SIZE, code_bytes
from qdora.quant.kernels import device_kind

# Weights handled at a time: multiples of every block size, so that chunks share no byte. On a CPU a chunk
# stays in the cache (8 times as large takes 2 to 4 times as long); a GPU needs few, large launches.
_CPU_CHUNK = 1 << 17
_GPU_CHUNK = 1 << 22
# Keeps the division of a zero block finite. Smaller, subnormal blocks are not scaled up to 1.
_SMALLEST_SCALE = 1e-38
# The factor of bitsandbytes: a multiplication by it and a division by 127 differ in the last bit.
_ONE_127TH = 7.874015718698502e-3


def _chunk(device: torch.device) -> int:
    return _CPU_CHUNK if device_kind(device) == "cpu" else _GPU_CHUNK


def _runs_of_rows(matrix: Tensor) -> list[slice]:
    rows = max(1, _chunk(matrix.device) // matrix.shape[1])
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]


@torch.no_grad()
def quantize_blocks(weight: Tensor, kind: str, block_size: int, name: str) -> tuple[Tensor, Tensor]:
    """Round each weight to the nearest value of a table, scaled by the largest magnitude of its block.

        absmax_b = max |w| over block b;    code_i = nearest value to w_i / absmax_b, the lower one on a tie

    Blocks run along the flattened rows; the last one may be short. Source: QLoRA, arXiv 2305.14314, sec. 3. Returns
    codes as by `pack_codes` and absmax (blocks,) float32, 0 for a zero block.
    """
    flat = weight.reshape(-1)
    numel = flat.numel()
    packed = torch.empty(code_bytes(kind, numel), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=weight.device)
    chunk = _chunk(weight.device)
    for start in range(0, numel, chunk):
        unit, scale = _scale_to_unit(flat[start : start + chunk].float(), block_size)
        # Before the look-up: NaN has no cell, and on a GPU that ends the process
        _refuse_not_finite(scale, name)
        codes, first = pack_codes(nearest_codes(unit, kind), kind), start * CODE_BITS[kind] // 8
        packed[first : first + codes.numel()] = codes
        absmax[start // block_size : start // block_size + scale.numel()] = scale
    return packed, absmax


@torch.no_grad()
def nearest_codes(unit: Tensor, kind: str) -> Tensor:
    """The code of the value that is nearest to each of `unit`, float32 within [-1, 1] in any shape: uint8. The lower
    value on a tie."""
    table, flat = codebooks.decision_table(kind, unit.device), unit.reshape(-1)
    cell = codebooks.cell(flat)
    rank = table.rank.index_select(0, cell).add_(flat > table.bound.index_select(0, cell))
    # The others ascend with their codes
    codes = table.code.index_select(0, rank.int()) if kind == "fp4" else rank
    return codes.view(unit.shape)


@torch.no_grad()
def quantize_fp4_blocks(weight: Tensor, kind: str, name: str) -> dict[str, Tensor]:
    """Round a weight (out, in) to E2M1 values times a scale of each block, both to even on a tie: nvfp4 or mxfp4.

        nvfp4: G = 448 * 6 / max |w|,   s = E4M3(G * absmax_b / 6),   w = value * s / G           blocks of 16
        mxfp4: s = 2^e, e = floor(log2(absmax_b + a quarter of its power of 2)) - 2               blocks of 32

    Sources: NVIDIA's NVFP4 as in compressed-tensors 0.19, whose codes and scales these are for a float32 weight; OCP
    Microscaling Formats (MX) Specification 1.0, sec. 6.3. Returns the tensors of `PackedWeight`.
    """
    size, parts, scales = codebooks.FIXED_BLOCK_SIZES[kind], list[Tensor](), list[Tensor]()
    largest = weight.abs().amax().float()
    _refuse_not_finite(largest, name)
    # The reciprocal is rounded, as in compressed-tensors, where torch divides a number by a tensor
    whole = largest.clamp(min=torch.finfo(torch.float32).tiny).reciprocal() * (448.0 * 6.0)
    whole = torch.where(whole.isfinite(), whole, 1.0)
    # Midpoints between the values 0 to 6. A bound belongs to the lower value: where the upper one is even, an ulp lower
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=weight.device)
    bounds[1::2] = bounds[1::2].nextafter(bounds.new_zeros(()))
    for rows in _runs_of_rows(weight):
        blocks = weight[rows].float().reshape(-1, size)
        absmax = blocks.abs().amax(dim=1)
        if kind == codebooks.NVFP4:
            scale = (whole * (absmax / 6.0)).clamp(max=448.0).to(torch.float8_e4m3fn)
            scale = torch.where(scale.float() == 0, 0.125, scale.float()).to(torch.float8_e4m3fn)
            scales.append(scale.view(torch.uint8))
            factor = scale.float() / whole
        else:
            exponent = ((absmax.view(torch.int32) + (1 << 21)) >> 23).sub_(2).clamp_(0, 254)
            scales.append(exponent.to(torch.uint8))
            factor = torch.ldexp(torch.ones_like(absmax), exponent - 127)
        unit = blocks / factor[:, None]
        codes = torch.bucketize(unit.abs(), bounds, out_int32=True).to(torch.uint8)
        parts.append(pack_codes((codes | (unit < 0).to(torch.uint8) << 3).view(-1), kind))
    found = {"packed": torch.cat(parts), "absmax": torch.cat(scales)}
    return found | ({"global_scale": whole} if kind == codebooks.NVFP4 else {})


@torch.no_grad()
def pack_codes(codes: Tensor, kind: str) -> Tensor:
    """Codes (n,) uint8 without gaps, the first in the highest bits: two or four in a byte, of 3 bits eight in three.

    The last bytes are filled up with the code of 0. Returns (`codebooks.code_bytes`(kind, n),) uint8.
    """
    bits = CODE_BITS[kind]
    group = 8 if bits == 3 else 8 // bits
    if codes.numel() % group:
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % group), value=codebooks.zero_code(kind))
    word = codes[::group].int() if bits == 3 else codes[::group]
    for index in range(1, group):
        word = (word << bits) | codes[index::group]
    if bits == 3:
        word = torch.stack([word >> 16, (word >> 8) & 255, word & 255], dim=1).to(torch.uint8).view(-1)
    return word


@torch.no_grad()
def unpack_codes(packed: Tensor, kind: str, numel: int) -> Tensor:
    """The inverse of `pack_codes`, (numel,) uint8."""
    bits = CODE_BITS[kind]
    entries = torch.stack(_entries(packed, bits), dim=1).to(torch.int16)
    shifts = bits * torch.arange(8 // bits if bits != 3 else 4, device=packed.device, dtype=torch.int16).flip(0)
    return ((entries[:, :, None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).view(-1)[:numel]


def _refuse_not_finite(scales: Tensor, name: str) -> None:
    if not scales.isfinite().all():
        from qdora.errors import NotFinite  # only for a fault: qdora.peft loads few files

        raise NotFinite(f"{name}: has weights that are not finite (NaN or infinite) and cannot be quantised.")


def _scale_to_unit(part: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    # As in bitsandbytes, whole blocks are multiplied by the reciprocal and a short last one is divided.
    whole = part.numel() // block_size * block_size
    blocks = part[:whole].view(-1, block_size)
    scale = blocks.abs().amax(dim=1)
    units = [(blocks * (1.0 / scale.clamp(min=_SMALLEST_SCALE))[:, None]).clamp_(-1, 1).view(-1)]
    if whole < part.numel():
        last = part[whole:].abs().amax(dim=0, keepdim=True).clamp(min=_SMALLEST_SCALE)
        units.append((part[whole:] / last).clamp_(-1, 1))
        scale = torch.cat([scale, last])
    return (units[0] if len(units) == 1 else torch.cat(units)), scale


@torch.no_grad()
def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Double quantisation: the block scales (blocks,) float32 minus their mean, in 8 bits.

        scale = code[q] * nested_absmax[block // 256] + offset

    Returns q (blocks,) uint8, nested_absmax (ceil(blocks / 256),) float32, code as by `codebooks.dynamic_map`, offset
    () float32. Source: QLoRA, sec. 3.
    """
    code = codebooks.dynamic_map(absmax.device)
    # float64: the order of a float32 sum, and so its last bits, depends on the threads and the device.
    offset = (absmax.sum(dtype=torch.float64) / absmax.numel()).float()
    return *quantize_8bit(absmax - offset, code, NESTED_BLOCK_SIZE), code, offset


@torch.no_grad()
def quantize_8bit(values: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Blockwise 8-bit codes of float32 values (n,), by the values `code`, (256,) float32, ascending, within [-1, 1].

    A value divided by the absmax of its block is rounded to a 16-bit grid, and the grid point to the nearest value of
    `code`, as by bitsandbytes' CPU kernel. Returns codes (n,) uint8 and absmax (ceil(n / block_size),) float32.
    """
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    # In a zero block this is NaN; its codes are set below.
    unit = (blocks * (1.0 / absmax)[:, None]).clamp_(-1, 1)
    point = ((unit + 1.0) * 0.5 * 65535 + 0.5).floor_()
    codes = torch.bucketize(point * 2 / 65535 - 1, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    codes.masked_fill_((absmax == 0)[:, None], 0)
    return codes.view(-1)[: values.numel()].clone(), absmax


@torch.no_grad()
def dequantize_scales(codes: Tensor, absmax: Tensor, code: Tensor, offset: Tensor) -> Tensor:
    """The block scales that `quantize_scales` stored, (blocks,) float32."""
    return scale_blocks_(code.index_select(0, codes.int()), absmax, NESTED_BLOCK_SIZE).add_(offset)


@torch.no_grad()
def dequantize_blocks(
    packed: Tensor,
    absmax: Tensor,
    kind: str,
    block_size: int,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    zeros: Tensor | None = None,
) -> Tensor:
    """The weight value[code] * absmax, (out, in) in any float dtype: a float32 product, then one cast.

    With `zeros`, (blocks,) uint8, it is (value[code] - zero) * absmax, of whole blocks.
    """
    numel = shape[0] * shape[1]
    values, bits = codebooks.resident_values(kind, packed), CODE_BITS[kind]
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    chunk = _chunk(packed.device)
    for start in range(0, numel, chunk):
        stop = min(start + chunk, numel)
        entries = _entries(packed[start * bits // 8 : code_bytes(kind, stop)], bits)
        found = torch.empty(len(entries[0]), len(entries), dtype=values.dtype, device=packed.device)
        for index, some in enumerate(entries):
            torch.index_select(values, 0, some, out=found[:, index])
        dense = found.view(-1).view(torch.float32)
        blocks = slice(start // block_size, -(-stop // block_size))
        if zeros is not None:
            dense.view(-1, block_size).sub_(zeros[blocks, None])
        out[start:stop] = scale_blocks_(dense[: stop - start], absmax[blocks], block_size)
    return out.view(shape)


def _entries(packed: Tensor, bits: int) -> list[Tensor]:
    # Of `codebooks.resident_values`: each byte, or the first and the last 12 bits of every three. Not yet put in turn,
    # which would take as long as the look-up.
    if bits != 3:
        return [packed.int()]
    first, second, third = (each.int() for each in packed.view(-1, 3).unbind(1))
    return [torch.add(second >> 4, first, alpha=16), torch.add(third, second & 15, alpha=256)]


def scale_blocks_(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Multiply each run of `block_size` float32 values (n,) by its scale; the last run may be short."""
    whole = values.numel() // block_size
    values[: whole * block_size].view(-1, block_size).mul_(absmax[:whole, None])
    if whole * block_size < values.numel():
        values[whole * block_size :].mul_(absmax[whole])
    return values


@torch.no_grad()
def quantize_rows(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Round each row of a weight (out, in) to 255 levels between minus and plus its largest magnitude.

        packed = round(w * 127 / absmax_row), half to even;    w = packed * absmax_row / 127

    Codes are (out, in) int8, absmax (out,) float32: LLM.int8() without outliers (arXiv 2208.07339, sec. 2.1).
    """
    packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows in _runs_of_rows(weight):
        part = weight[rows].float()
        scale = part.abs().amax(dim=1)
        absmax[rows] = scale
        # 127 / scale overflows below 4e-37: such a row counts as zero. The rounded reciprocal, as in bitsandbytes.
        factor = (scale.reciprocal() * 127.0).nan_to_num_(posinf=0.0)
        packed[rows] = torch.round(part * factor[:, None]).to(torch.int8)
    _refuse_not_finite(absmax, name)
    return packed, absmax


@torch.no_grad()
def dequantize_rows(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """packed * absmax / 127, (out, in): float32 products, then one cast. A GPU makes 16 bits in one pass, off by an ulp
    of float32."""
    if dtype == torch.float32:
        return (packed * absmax[:, None]).mul_(_ONE_127TH)
    out = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    if device_kind(packed.device) != "cpu" and dtype.itemsize == 2:
        return torch.mul(packed, (absmax * _ONE_127TH)[:, None], out=out)
    for rows in _runs_of_rows(packed):
        out[rows] = (packed[rows] * absmax[rows, None]).mul_(_ONE_127TH)
    return out
