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
