"""The value tables of the low-bit formats, and how many bits their codes take."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NESTED_BLOCK_SIZE = 256
"""Block scales per nested scale. Source: QLoRA, arXiv 2305.14314, sec. 3."""
MXFP4, NVFP4, INT4_GROUPS = "mxfp4", "nvfp4", "int4-groups"
"""Kinds with scales of their own. mxfp4: powers of 2, as 8-bit exponents. nvfp4: E4M3, and one scale for the whole
weight. int4-groups, which only checkpoints hold (GPTQ, AWQ, compressed-tensors): 16 bits, and zero points."""
FIXED_BLOCK_SIZES = {MXFP4: 32, NVFP4: 16}
MXFP4_BLOCK_SIZE = FIXED_BLOCK_SIZES[MXFP4]
CODE_BITS = {"int8": 8, "nf4": 4, "fp4": 4, "int4": 4, MXFP4: 4, NVFP4: 4, INT4_GROUPS: 4}
CODE_BITS |= {"nf3": 3, "int3": 3, "nf2": 2, "int2": 2}
"""Bits of a code as it is stored."""
TIGHT = ("nf3", "int3", "nf2", "int2")
"""Kinds of fewer than 4 bits: four codes in a byte, or eight in three."""
# Codes 0 to 7 of bitsandbytes' FP4; a fourth bit in front is the sign. Code 8 is a second zero, positive as there.
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
# The same of MXFP4's codes. Source: OCP Microscaling Formats (MX) Specification 1.0, sec. 5.3.3.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES: dict[str, tuple[float, ...]] = {
    # Quantiles of N(0, 1) scaled to [-1, 1], with an exact 0: of b bits 2^(b - 1) positive values, one fewer negative.
    # Source: QLoRA, arXiv 2305.14314, sec. 3 and appendix E.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "nf3": (
        -1.0, -0.5350227084855379, -0.24693143181157526, 0.0,
        0.18333748033548752, 0.3819939543209139, 0.6229857417143423, 1.0,
    ),
    "nf2": (-1.0, 0.0, 0.4358181645831157, 1.0),
    # Quotients are formed on the host: CUDA divides by a number less exactly.
    "int4": tuple(code / 7 for code in range(-7, 8)),
    # The symmetric grids of compressed-tensors and gptqmodel: the largest magnitude is half a step beside the outer
    # values.
    "int3": tuple((code - 4) / 3.5 for code in range(8)),
    "int2": tuple((code - 2) / 1.5 for code in range(4)),
    "fp4": (*_FP4, *(0.0 - value for value in _FP4)),
    MXFP4: (*_E2M1, *(-value for value in _E2M1)),
    NVFP4: (*_E2M1, *(-value for value in _E2M1)),
    INT4_GROUPS: tuple(float(code) for code in range(16)),
}  # fmt: skip
# Cells per unit of the grid in `DecisionTable`. The closest two bounds are FP4's 0 and 0.0026.
_CELLS_PER_UNIT = 1024


def code_values(kind: str, device: torch.device | str = "cpu") -> Tensor:
    """The value of each code, indexed by the code: (2^bits,) float32 in [-1, 1] (int4: 15 values; int3: [-8/7,
    6/7]; int2: [-4/3, 2/3]; mxfp4, nvfp4: [-6, 6]; int4-groups: [0, 15])."""
    return torch.tensor(_VALUES[kind], dtype=torch.float32, device=device)


# (kind, device) -> `resident_values`. A table made under FakeTensorMode would break every later call.
_RESIDENT: dict[tuple[str, torch.device], Tensor] = {}


def resident_values(kind: str, codes: Tensor) -> Tensor:
    """The values of the two codes of a byte, (256,) int64, or of four `TIGHT` ones, (256,) or (4096,) complex128: the
    bits of so many float32, which is 4 times as fast to gather. The first code is in the highest bits.

    Made once on the device of `codes`: copying a table makes a GPU's host wait.
    """
    key = kind, codes.device
    if isinstance(codes, FakeTensor) or key not in _RESIDENT:
        bits, num, dtype = CODE_BITS[kind], *((4, torch.complex128) if kind in TIGHT else (2, torch.int64))
        with torch.inference_mode(False):
            values = code_values(kind, codes.device)
            values = torch.nn.functional.pad(values, (0, (1 << bits) - len(values)))  # codes that no weight has
            shifts = bits * torch.arange(num - 1, -1, -1, device=codes.device)
            entries = torch.arange(1 << bits * num, device=codes.device)[:, None] >> shifts
            table = values[entries & ((1 << bits) - 1)].view(dtype).view(-1)
        if isinstance(table, FakeTensor):
            return table
        _RESIDENT[key] = table
    return _RESIDENT[key]


def zero_code(kind: str) -> int:
    """The first code of the value 0."""
    return _VALUES[kind].index(0.0)


def code_bytes(kind: str, numel: int) -> int:
    """Bytes of so many codes: whole bytes, or groups of three bytes where a code has 3 bits."""
    bits = CODE_BITS[kind]
    unit = 3 if bits == 3 else 1
    return -(-numel * bits // (8 * unit)) * unit


class DecisionTable(NamedTuple):
    """Finds the nearest of up to 16 values in [-1, 1] with two look-ups and one comparison, 8 times as fast as
    torch.bucketize.

    [-1, 1] is cut into cells with at most one decision bound each. The rank of x among the ascending values is
    `rank[cell(x)]` plus 1 where x lies above `bound[cell(x)]`.
    """

    rank: Tensor  # (cells,) uint8: bounds in lower cells
    bound: Tensor  # (cells,) float32: the bound in the cell, or 2 without one
    code: Tensor  # (values,) uint8: the code of each rank


def cell(unit: Tensor) -> Tensor:
    """The grid cell of each value in [-1, 1]: int32 in [0, 2048], never decreasing with the value."""
    return unit.add(1.0).mul_(_CELLS_PER_UNIT).int()


def decision_bounds(kind: str) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring values, (values - 1,) float32, which take the lower rank, and each rank's code,
    (values,) uint8. Above 0 FP4's code is 8, its second zero."""
    values = code_values(kind)
    order = torch.argsort(values, stable=True)
    ascending = values[order]
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


@functools.cache
def decision_table(kind: str, device: torch.device) -> DecisionTable:
    """`decision_bounds` as a grid; see `DecisionTable`."""
    bounds, code = decision_bounds(kind)
    of_bound = cell(bounds)
    cells = torch.arange(2 * _CELLS_PER_UNIT + 1, dtype=torch.int32)
    rank = (of_bound[None, :] < cells[:, None]).sum(dim=1).to(torch.uint8)
    bound = torch.full(cells.shape, 2.0)
    bound[of_bound.long()] = bounds
    return DecisionTable(rank.to(device), bound.to(device), code.to(device))


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The signed 8-bit dynamic map, ascending, (256,) float32 in [-0.993, 1]: seven decades of both signs, 0 and 1. The
    decade of exponent e has the midpoints of 2^e parts of [0.1, 1], times 10^(e - 6). Source: arXiv 1511.04561, sec.
    2.1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        scaled = (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += scaled + [-value for value in scaled]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
