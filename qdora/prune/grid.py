"""The grid on which GPTQ rounds a weight: the values of a format times block scales, which stand before the sweep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qdora.quant.blockwise import nearest_codes
from qdora.quant.codebooks import code_values

CLIP_FACTORS = tuple(sign * (1 - step / 20) for step in range(13) for sign in (1, -1))
"""Of a block's largest magnitude: 1 to 0.4, and the same below 0, which turn an uneven grid over (int2's reaches from
-4/3 to 2/3). A scale below 0 is decoded as any other."""
_CHUNK = 1 << 20  # weights whose clipped scales are chosen at a time; a multiple of every block size
_SMALLEST_SCALE = 1e-38


@dataclass(frozen=True)
class Grid:
    """What the codes of some rows of a weight stand for: `values` of `kind` times `scales`, (blocks,) float32, of the
    whole weight, in which the first of these rows begins at the flat index `first`."""

    kind: str
    block_size: int
    scales: Tensor
    values: Tensor
    first: int = 0

    def scales_of(self, rows: int, width: int, columns: Tensor) -> Tensor:
        """The scale of each weight in some columns, (columns, rows)."""
        row_starts = torch.arange(self.first, self.first + rows * width, width, device=columns.device)
        return self.scales[(row_starts + columns[:, None]) // self.block_size]


def nearest(weights: Tensor, scales: Tensor, kind: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """The code of the grid point nearest to each weight, uint8, and the point, float32; `scales` are broadcast."""
    inverse = torch.where(scales.abs() < _SMALLEST_SCALE, 0.0, scales.reciprocal())
    codes = nearest_codes((weights * inverse).clamp_(-1, 1).float(), kind)
    return codes, values[codes.int()] * scales


@torch.no_grad()
def fitted_scales(weight: Tensor, importance: Tensor, kind: str, block_size: int, *, clip: bool) -> Tensor:
    """The largest magnitude of each block, (blocks,) float32, with `clip` times the one of `CLIP_FACTORS` at which
    rounding costs least.

        sum over the block of h_j (w_ij - rounded(w_ij))^2        h_j = ||x_j||^2, H's diagonal

    `weight` (rows, in) float32. `importance` (parts, in) holds h of each of the parts that divide the rows, such as
    experts.
    """
    flat, width = weight.reshape(-1), weight.shape[1]
    values, per_part = code_values(kind, weight.device), weight.numel() // len(importance)
    found = []
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        blocks = pad(part, (0, -part.numel() % block_size)).view(-1, block_size)
        absmax = blocks.abs().amax(dim=1)
        if clip:
            index = torch.arange(start, start + part.numel(), device=part.device)
            costs = pad(importance[index // per_part, index % width], (0, blocks.numel() - part.numel()))
            errors = []
            for factor in CLIP_FACTORS:
                _, point = nearest(blocks, absmax[:, None] * factor, kind, values)
                errors.append((costs.view(blocks.shape) * (blocks - point).square_()).sum(dim=1))
            # The first of equal ones
            absmax *= absmax.new_tensor(CLIP_FACTORS)[torch.stack(errors).argmin(dim=0)]
        found.append(absmax)
    return torch.cat(found)
