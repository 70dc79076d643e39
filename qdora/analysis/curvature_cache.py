"""The curvature of one set of layers, computed once: eigenpairs and density, kept on disk under what they depend on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdora.analysis.curvature import Curvature, curvature_of
from qdora.analysis.plain import FACTORS, Norm
from qdora.analysis.spectrum import Density, Eigenpairs, spectral_density, top_eigenpairs
from qdora.analysis.tensor_cache import keep_tensors, kept_tensors
from qdora.data.batching import MicroBatch
from qdora.model.inject import adapted_layers, adapter_parameters

Array = NDArray[np.float64]

MULTIPLICITY = (
    "Eigenvalues of the factors' directions, not of rank components: near B = 0 each singular value of the gradient "
    "comes about 2 x rank times. Copies are listed one by one; searches were repeated until none was above the last "
    "value listed (next_magnitude)."
)


@dataclass(frozen=True)
class CurvatureSettings:
    """What is computed of each set of layers.

    Attributes:
        curvature, norm, parts: Which matrix; see `curvature_of`.
        num_eigenvalues: Of largest magnitude; at most the matrix has, less one.
        tolerance: Relative, of the eigenvalues.
        lanczos_steps, num_probes: Of the density.
        seed: Of the start vectors.
    """

    curvature: Curvature
    norm: Norm
    parts: tuple[str, ...] = FACTORS
    num_eigenvalues: int = 20
    tolerance: float = 1e-3
    lanczos_steps: int = 20
    num_probes: int = 2
    seed: int = 0


@dataclass(frozen=True)
class CurvatureSpectrum:
    """Eigenpairs and density of a set of layers, and what they cost.

    Eigenvectors are directions of all factors at once, not rank components: at B = 0, but for the block of B alone,
    each singular value s sigma of the gradient by the weight is 2 x rank eigenvalues, half of them negative. What a
    component is worth: components.py.

    Attributes:
        size: Rows of the matrix.
        num_matvecs, seconds: Spent when it was computed, also where it came from the cache.
    """

    settings: CurvatureSettings
    top: Eigenpairs
    density: Density
    size: int
    num_matvecs: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the vectors."""
        return {
            "curvature": self.settings.curvature,
            "norm": self.settings.norm,
            "parts": list(self.settings.parts),
            "size": self.size,
            "eigenvalues": self.top.values.tolist(),
            "residuals": self.top.residuals.tolist(),
            "num_rounds": self.top.num_rounds,
            "next_magnitude": self.top.next_magnitude,
            "multiplicity": MULTIPLICITY,
            "trace": self.density.total(lambda values: values),
            "absolute_trace": self.density.total(np.abs),
            "num_matvecs": self.num_matvecs,
            "seconds": self.seconds,
        }


def curvature_spectrum(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[MicroBatch],
    settings: CurvatureSettings,
    *,
    cache: Path | None = None,
    state: str | None = None,
) -> CurvatureSpectrum:
    """Eigenpairs and density of the curvature by the adapters of `layers`, from the cache where it has them.

    Args:
        model, layers, batches: As of `curvature_of`.
        settings: What is computed.
        cache: Directory, made if needed; a result is written there.
        state: `fingerprint` of the model and the batches where it is known; None computes it.
    """
    key = ["curvature", list(layers), asdict(settings), state or fingerprint(model, batches)]
    kept = kept_tensors(cache, key)
    if kept is not None:
        return _from_tensors(kept, settings)
    began = time.perf_counter()
    with curvature_of(
        model, layers, batches, curvature=settings.curvature, norm=settings.norm, parts=settings.parts
    ) as operator:

        def product(vector: Array) -> Array:
            image: Array = operator.product(torch.from_numpy(np.ascontiguousarray(vector))).numpy()
            return image

        size = operator.size
        k = min(settings.num_eigenvalues, size - 1)
        top = top_eigenpairs(product, size, k, seed=settings.seed, tolerance=settings.tolerance)
        density = spectral_density(
            product, size, num_steps=settings.lanczos_steps, num_probes=settings.num_probes, seed=settings.seed
        )
        spent = operator.num_matvecs
    found = CurvatureSpectrum(settings, top, density, size, spent, time.perf_counter() - began)
    keep_tensors(cache, key, _to_tensors(found))
    return found


def fingerprint(model: nn.Module, batches: Iterable[MicroBatch]) -> str:
    """A hash of the adapters and of the batches: another one means another curvature. Of one base, which is not read:
    a cache belongs to one run."""
    digest = hashlib.sha256()
    for name, layer in adapted_layers(model).items():
        digest.update(f"{name} {layer.scaling!r}".encode())
    for name, parameter in adapter_parameters(model).items():
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    for batch in batches:
        for tensor in (batch.input_ids, batch.attention_mask, batch.labels):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


_COUNTS = ("size", "num_rounds", "next_magnitude", "num_matvecs", "seconds")


def _to_tensors(found: CurvatureSpectrum) -> dict[str, Tensor]:
    counts = (found.size, found.top.num_rounds, found.top.next_magnitude, found.num_matvecs, found.seconds)
    return {
        "eigenvalues": torch.from_numpy(found.top.values),
        "eigenvectors": torch.from_numpy(found.top.vectors.T.astype(np.float32)),
        "residuals": torch.from_numpy(found.top.residuals),
        "density_nodes": torch.from_numpy(found.density.nodes),
        "density_weights": torch.from_numpy(found.density.weights),
        **{name: torch.tensor([value], dtype=torch.float64) for name, value in zip(_COUNTS, counts, strict=True)},
    }


def _from_tensors(tensors: Mapping[str, Tensor], settings: CurvatureSettings) -> CurvatureSpectrum:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    size, num_rounds, next_magnitude, num_matvecs, seconds = (float(arrays[name][0]) for name in _COUNTS)
    vectors = arrays["eigenvectors"].T.astype(np.float64)
    top = Eigenpairs(arrays["eigenvalues"], vectors, arrays["residuals"], int(num_rounds), next_magnitude)
    density = Density(arrays["density_nodes"], arrays["density_weights"], int(size), settings.num_probes)
    return CurvatureSpectrum(settings, top, density, int(size), int(num_matvecs), seconds)
