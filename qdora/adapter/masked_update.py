"""The update of an adapter that keeps the zeros of a pruned base: s g M o (B A), and its gradients.

M is the keep mask of W, held as bits. A masked product does not factor, neither M o (B A) nor its norm, so it is formed
for a block of rows at a time, and never kept. That costs a second product of the base's size in forward and two in
backward. In return the merged weight has every zero of the base.

Gradients, for dy of the output, block by block of rows R:

    G = M o (dy_R^T drop(x))          dA = sum_R (s g B_R)^T G          dB_R = s g G A^T
    dx = drop(sum_R dy_R (s g M o B_R A))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qdora.adapter.low_rank_factors import rounded, row_factor, scaled_B
from qdora.quant.sparsity import mask_from_bits

# Rows of B A that are formed at a time: 16 MiB of float32 for 4096 columns.
_ROWS = 1024


class MaskedUpdate(NamedTuple):
    """s g M o (B A), (out, in)."""

    keep_bits: Tensor  # the mask M in the form of `quant.sparsity.mask_bits`
    lora_A: Tensor  # (rank, in)
    lora_B: Tensor  # (out, rank)
    gain: Tensor | None  # g, (out,); None for LoRA
    scaling: float

    def product(self, x: Tensor) -> Tensor:
        """x (s g M o B A)^T: (tokens, in) -> (tokens, out)."""
        out = x.new_empty(x.shape[0], self.lora_B.shape[0])
        for rows in row_blocks(self.lora_B.shape[0]):
            torch.mm(x, self._dense_rows(rows, x.dtype).T, out=out[:, rows])
        return out

    def factor_gradients(self, dy: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """dA and dB in float32 or wider, for dy (tokens, out) and the input drop(x), (tokens, in)."""
        wide = torch.promote_types(dy.dtype, torch.float32)
        a = rounded(self.lora_A, dy.dtype).to(wide)
        da = torch.zeros(self.lora_A.shape, dtype=wide, device=dy.device)
        db = torch.empty(self.lora_B.shape, dtype=wide, device=dy.device)
        for rows in row_blocks(self.lora_B.shape[0]):
            masked = (dy[:, rows].T @ dropped).to(wide).mul_(self._keep(rows))
            factor = self._row_factor(rows)
            b = rounded(self.lora_B[rows], dy.dtype).to(wide)
            da.addmm_((b * factor).T, masked)
            db[rows] = (masked @ a.T) * factor
            del masked
        return da, db

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy (s g M o B A): (tokens, out) -> (tokens, in) in dy's dtype."""
        dx = dy.new_zeros(dy.shape[0], self.lora_A.shape[1])
        for rows in row_blocks(self.lora_B.shape[0]):
            dx.addmm_(dy[:, rows], self._dense_rows(rows, dy.dtype))
        return dx

    def _dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows in `dtype`, (rows, in), from the factors as the products round them."""
        delta = scaled_B(self.lora_B[rows], self._row_factor(rows), dtype) @ rounded(self.lora_A, dtype)
        return delta.mul_(self._keep(rows))

    def _row_factor(self, rows: slice) -> float | Tensor:
        return row_factor(None if self.gain is None else self.gain[rows], self.scaling)

    def _keep(self, rows: slice) -> Tensor:
        return mask_from_bits(self.keep_bits, (self.lora_B.shape[0], self.lora_A.shape[1]), rows)


def row_blocks(stop: int, start: int = 0) -> Iterator[slice]:
    """Blocks of rows of a masked product that are formed together."""
    for first in range(start, stop, _ROWS):
        yield slice(first, min(first + _ROWS, stop))
