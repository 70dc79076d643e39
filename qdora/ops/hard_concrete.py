"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with positive probability.

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)        z = clip(s (zeta - gamma) + gamma, 0, 1)

Source: arXiv 1712.01312, sec. 3 (eq. 10 to 12) and 4 (beta = 2/3, gamma = -0.1, zeta = 1.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2.0 / 3.0, -0.1, 1.1
_SHIFT = BETA * math.log(-GAMMA / ZETA)
ALWAYS_ON = math.log((1.0 - GAMMA) / (ZETA - 1.0))
"""From this log_alpha on the deterministic gate is exactly 1."""


def gate_value(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """The gate z of a draw, or the deterministic one of evaluation (eq. 13: clip(sigmoid(log_alpha) (zeta - gamma) +
    gamma, 0, 1)).

    Args:
        log_alpha: Any shape, float.
        noise: u, uniform in (0, 1), same shape; None: no draw.
    """
    return (_concrete(log_alpha, noise) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def gate_slope(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """dz / dlog_alpha of a draw; 0 where z is clipped."""
    s = _concrete(log_alpha, noise)
    stretched = s * (ZETA - GAMMA) + GAMMA
    return torch.where((stretched > 0) & (stretched < 1), (ZETA - GAMMA) * s * (1 - s) / BETA, 0.0)


def probability_on(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta)), eq. 12."""
    return torch.sigmoid(log_alpha - _SHIFT)


def _concrete(log_alpha: Tensor, noise: Tensor | None) -> Tensor:
    return torch.sigmoid(log_alpha if noise is None else (noise.log() - (1 - noise).log() + log_alpha) / BETA)
