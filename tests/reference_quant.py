"""The formats of 2 to 8 bits written as plain loops over numbers. Imports nothing of qdora, torch or bitsandbytes.

float32 where the format says float32 (every `f32`), one weight at a time, slow on purpose.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

f32 = np.float32

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [sign * magnitude / 12 for sign in (1, -1) for magnitude in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
VALUES = {"nf4": [f32(v) for v in NF4], "fp4": [f32(v) for v in FP4]}


def ascending_codes(kind):
    """Codes by value; FP4's code 0 before its second zero, code 8."""
    return sorted(range(len(VALUES[kind])), key=lambda code: (VALUES[kind][code], code))


def bounds(kind):
    """float32 midpoints between neighbouring values."""
    values = [VALUES[kind][code] for code in ascending_codes(kind)]
    return [f32((low + high) / f32(2)) for low, high in pairwise(values)]


def quantize_4bit(weights, kind, block_size):
    """(codes, absmax) of a flat list of float32 numbers: lists of int and float32."""
    order, limits = ascending_codes(kind), bounds(kind)
    codes, absmax = [], []
    for start in range(0, len(weights), block_size):
        block = [f32(w) for w in weights[start : start + block_size]]
        largest = max(abs(w) for w in block)
        divisor = max(largest, f32(1e-38))
        short = len(block) < block_size
        absmax.append(divisor if short else largest)
        for w in block:
            unit = f32(w / divisor) if short else f32(w * f32(f32(1) / divisor))
            codes.append(order[sum(bool(unit > limit) for limit in limits)])
    return codes, absmax


def dynamic_map():
    """256 values in float64: 0, 1, and per decade e = 0..6 the midpoints of 2^e parts of [0.1, 1] times 10^(e-6)."""
    values = [0.0, 1.0]
    for e in range(7):
        width = 0.9 / 2**e
        for part in range(2**e):
            midpoint = (0.1 + width * (part + 0.5)) * 10.0 ** (e - 6)
            values += [midpoint, -midpoint]
    return sorted(values)


def offset(scales):
    """The mean of float32 scales: an exact sum, divided in float64, rounded to float32."""
    return f32(math.fsum(float(scale) for scale in scales) / len(scales))


def unpack(packed, bits, numel):
    """Codes of a dense stream of bits, the highest first."""
    stream = "".join(f"{byte:08b}" for byte in packed)
    return [int(stream[bits * i : bits * (i + 1)], 2) for i in range(numel)]


def quantize_scales(scales, offset, code, block_size=256):
    """(codes, nested absmax) of float32 scales minus the float32 `offset`, on the 256 float32 values of `code`."""
    limits = [f32(f32(low + high) / f32(2)) for low, high in pairwise(code)]
    codes, nested = [], []
    for start in range(0, len(scales), block_size):
        block = [f32(f32(scale) - f32(offset)) for scale in scales[start : start + block_size]]
        largest = max(abs(value) for value in block)
        nested.append(largest)
        for value in block:
            if largest == 0:
                codes.append(0)
                continue
            unit = min(max(f32(value * f32(f32(1) / largest)), f32(-1)), f32(1))
            half = f32(f32(unit + f32(1)) * f32(0.5))
            point = int(f32(float(half) * 65535 + 0.5))  # one rounding: a fused multiply-add
            on_grid = f32(f32(f32(2 * point) / f32(65535)) - f32(1))
            codes.append(sum(bool(limit < on_grid) for limit in limits))
    return codes, nested


def dequantize_scales(codes, nested, offset, code, block_size=256):
    return [f32(f32(code[q] * nested[i // block_size]) + f32(offset)) for i, q in enumerate(codes)]


def dequantize_4bit(codes, scales, kind, block_size):
    """float32 products."""
    return [f32(VALUES[kind][code] * scales[i // block_size]) for i, code in enumerate(codes)]


def quantize_int8(rows):
    """(codes, absmax) of rows of float32 numbers; half to even."""
    codes, absmax = [], []
    for row in rows:
        largest = max(abs(f32(w)) for w in row)
        absmax.append(largest)
        factor = f32(f32(f32(1) / largest) * f32(127)) if largest > 0 else f32(0)  # rounded twice
        codes.append([int(np.rint(f32(f32(w) * factor))) for w in row])
    return codes, absmax


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m * 2.0**-9 for m in range(8)] + [(1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7) for c in range(8, 127)]


def nearest_even(value, values):
    """Index of the nearest of ascending values, the even one on a tie."""
    near = min(abs(v - value) for v in values)
    return next(i for i in sorted(range(len(values)), key=lambda i: i & 1) if abs(values[i] - value) == near)


def quantize_fp4(rows, kind):
    """(values, stored scales, global scale) of float32 rows (lists): blocks of 16 (nvfp4) or 32 (mxfp4) along a row."""
    size = {"nvfp4": 16, "mxfp4": 32}[kind]
    whole = f32(f32(1) / f32(max(abs(w) for row in rows for w in row))) * f32(448.0 * 6.0)
    dense, scales = [], []
    for row in rows:
        for start in range(0, len(row), size):
            block = [f32(w) for w in row[start : start + size]]
            largest = max(abs(w) for w in block)
            if kind == "nvfp4":
                code = nearest_even(min(float(whole * f32(largest / f32(6))), 448.0), E4M3) or 0x20  # 0.125 for 0
                factor = f32(f32(E4M3[code]) / whole)
            else:  # a mantissa of 1.75 and more goes to the next power of 2, which has 4 to 7 as 1 has 0.5 to 1.75
                mantissa, exponent = math.frexp(float(largest))
                code = max(exponent - 1 + (mantissa >= 0.875) - 2 + 127, 0) if largest else 0
                factor = f32(2.0 ** (code - 127))
            scales.append(code)
            for w in block:
                value = E2M1[nearest_even(min(abs(float(f32(w / factor))), 6.0), E2M1)]
                dense.append(f32(math.copysign(value, w)) * factor)
    return dense, scales, whole


def words(codes, order=range(8)):
    """int32 words of lists of 4-bit codes, along the last dimension: code `order[k]` of each eight in nibble k."""
    return np.array(
        [
            [sum(int(row[j + order[k]]) << 4 * k for k in range(8)) for j in range(0, len(row), 8)]
            for row in np.asarray(codes)
        ],
        dtype=np.uint32,
    ).view(np.int32)


def stored_int4(layout, codes, zeros, scales):
    """The tensors of a layer by their names in a checkpoint: codes (out, in), zeros and scales (out, groups)."""
    if layout == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {"qweight": words(codes.T, order), "qzeros": words(zeros.T, order), "scales": scales.T}
    if layout in ("gptq", "gptq_v2"):
        points = words(zeros.T).view(np.uint32).astype(np.int64)
        if layout == "gptq":  # less 1 in every nibble, as one number
            points = (points - 0x11111111) % 2**32
        groups = np.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[1])
        return {
            "qweight": words(codes.T.reshape(-1, 8, codes.shape[0]).transpose(0, 2, 1).reshape(-1, 8)).reshape(
                codes.shape[1] // 8, codes.shape[0]
            ),
            "qzeros": points.astype(np.uint32).view(np.int32),
            "scales": scales.T,
            "g_idx": groups.astype(np.int32),
        }
    found = {"weight_packed": words(codes), "weight_scale": scales, "weight_shape": np.array(codes.shape)}
    if layout == "compressed":
        found["weight_zero_point"] = words(zeros.T).T
    return found
