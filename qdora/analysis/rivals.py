"""The cheap measures of rank beside curvature: what the trained update holds, and what the gradient asks for.

Both are spectra of matrices of a layer's shape, so a component is a singular direction and its energy the square of its
singular value: by the theorem of Eckart and Young the best rank-r matrix leaves out what is not among the first r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from qdora.analysis.allocate import LayerSpectrum
from qdora.analysis.plain import Norm
from qdora.analysis.update_gradient import update_gradients
from qdora.data.batching import MicroBatch
from qdora.nn.adapted_linear import AdaptedLinear


@torch.no_grad()
def update_spectrum(layer: AdaptedLinear) -> LayerSpectrum:
    """Squared singular values of diag(g) s B A, what the adapter adds to the layer; g = 1 for LoRA.

    The product is not formed: they are those of the small matrix between the factors' orthogonal bases.

    Raises:
        ValueError: A masked layer: what is left of B A under a mask is not of B A's rank, so its singular values are
            not those of rank components.
    """
    if layer.masked:
        raise ValueError("the update of a masked adapter; allowed: one without a mask.")
    wide = torch.float64
    b = layer.stored_B().to(wide) * layer.scaling
    if layer.magnitude is not None:
        norm = layer.row_norm().to(wide)
        b = b * (layer.magnitude.to(wide) / norm).masked_fill(norm == 0, 0.0).unsqueeze(1)
    small = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(layer.lora_A.to(wide).T, mode="r").R.T
    energies = torch.linalg.svdvals(small).square().cpu().numpy()
    return LayerSpectrum(energies, float(energies.sum()), layer.in_features + layer.out_features)


def gradient_spectra(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[MicroBatch],
    most: int,
    *,
    norm: Norm,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LayerSpectrum]:
    """Squared singular values of dL/d(s B A) of each layer: see `update_gradients`.

    At B = 0 this is the matrix whose first r directions are the best first step of an adapter of rank r.

    Args:
        model, layers, batches, norm, progress: As of `update_gradients`.
        most: Most components of a layer.
    """
    return update_gradients(
        model, layers, batches, lambda _, gradient: _spectrum(gradient, most), norm=norm, progress=progress
    )


def _spectrum(gradient: Tensor, most: int) -> LayerSpectrum:
    # By the Gram matrix of the short side: a tenth of the time of an SVD, and what it loses are the smallest values
    short = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    wide = short.double()
    values = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0.0)
    energies: np.ndarray[tuple[int], np.dtype[np.float64]] = values[:most].cpu().numpy()
    return LayerSpectrum(energies, float(values.sum()), sum(gradient.shape))
