"""Row-wise symmetric int8, the format of bitsandbytes' LLM.int8() without outliers.

packed = round(w * 127 / absmax_row), half to even;    w = packed * absmax_row / 127

Source: LLM.int8(), arXiv 2208.07339, sec. 2.1 (row-wise absmax quantisation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdora.ops.blockwise import raise_not_finite
from qdora.ops.planned_device import device_kind

# Weights handled at a time: the workspace is a few times 4 bytes a weight of the chunk.
_CHUNK = 1 << 20
# The factor of bitsandbytes: a multiplication by it and a division by 127 differ in the last bit.
_ONE_127TH = 7.874015718698502e-3


@torch.no_grad()
def quantize_rows(weight: Tensor, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Round each row of a weight (out, in) to 255 levels between minus and plus its largest magnitude.

    Products are in float32. `name` is the weight's in an error.

    Returns: Codes (out, in) int8 and absmax (out,) float32. A zero row has absmax 0 and codes 0.
    Raises UserError: If a weight is not finite.
    """
    packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].float()
        scale = part.abs().amax(dim=1)
        absmax[start : start + rows] = scale
        # 127 / scale overflows for a scale below 4e-37; such a row counts as zero, and inf * 0 would be NaN.
        # The rounded reciprocal times 127, as bitsandbytes forms it.
        factor = (scale.reciprocal() * 127.0).nan_to_num_(posinf=0.0)
        packed[start : start + rows] = torch.round(part * factor[:, None]).to(torch.int8)
    if not bool(absmax.isfinite().all()):
        raise_not_finite(weight.reshape(-1), name)
    return packed, absmax


@torch.no_grad()
def dequantize_rows(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight packed * absmax / 127, (out, in) in any float dtype: float32 products, then one cast.

    A GPU makes 16 bits in one pass without workspace, by absmax / 127: off from the definition by an ulp of float32
    before the cast.
    """
    if dtype == torch.float32:
        return (packed * absmax[:, None]).mul_(_ONE_127TH)
    out = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    if device_kind(packed.device) != "cpu" and dtype.itemsize == 2:
        return torch.mul(packed, (absmax * _ONE_127TH)[:, None], out=out)
    rows = max(1, _CHUNK // packed.shape[1])
    for start in range(0, packed.shape[0], rows):
        part = slice(start, start + rows)
        out[part] = (packed[part] * absmax[part, None]).mul_(_ONE_127TH)
    return out
