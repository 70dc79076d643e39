"""The curvature of one set of layers, computed once: eigenpairs and density, kept on disk under what they depend on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import nn

from qdora.analysis.curvature import Curvature, curvature_of
from qdora.analysis.plain import FACTORS, Norm
from qdora.analysis.spectrum import Density, Eigenpairs, spectral_density, top_eigenpairs
from qdora.atomic_files import atomic_write_bytes, atomic_write_json
from qdora.data.batching import MicroBatch
from qdora.model.inject import adapted_layers, adapter_parameters

Array = NDArray[np.float64]

MULTIPLICITY = (
    "Eigenvalues of the factors' directions, not of rank components: near B = 0 each singular value of the gradient "
    "comes about 2 x rank times. Copies are listed one by one; searches were repeated until none was above the last "
    "value listed (next_magnitude)."
)
_FORMAT = 2
"""Of what the cache holds; one of before is not read."""


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
        cache: Directory; a result is written as <key>.safetensors and <key>.json, made if needed.
        state: `fingerprint` of the model and the batches where it is known; None computes it.
    """
    key = _key(layers, settings, state or fingerprint(model, batches))
    kept = None if cache is None else _read(cache, key, settings)
    if kept is not None:
        return kept
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
    if cache is not None:
        _write(cache, key, layers, found)
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


def _key(layers: Sequence[str], settings: CurvatureSettings, state: str) -> str:
    what = json.dumps([_FORMAT, list(layers), asdict(settings), state])
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def _write(cache: Path, key: str, layers: Sequence[str], found: CurvatureSpectrum) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, NDArray[Any]] = {
        "eigenvalues": found.top.values,
        "eigenvectors": np.ascontiguousarray(found.top.vectors.T, dtype=np.float32),
        "residuals": found.top.residuals,
        "density_nodes": found.density.nodes,
        "density_weights": found.density.weights,
    }
    atomic_write_bytes(cache / f"{key}.safetensors", save(tensors))
    # Last: without it the tensors do not count
    document = {"layers": list(layers), "settings": asdict(found.settings), "size": found.size}
    document |= {"num_rounds": found.top.num_rounds, "next_magnitude": found.top.next_magnitude}
    document |= {"num_matvecs": found.num_matvecs, "seconds": found.seconds}
    atomic_write_json(cache / f"{key}.json", document)


def _read(cache: Path, key: str, settings: CurvatureSettings) -> CurvatureSpectrum | None:
    if not (cache / f"{key}.json").is_file():
        return None
    document = json.loads((cache / f"{key}.json").read_bytes())
    tensors = load_file(cache / f"{key}.safetensors")
    vectors = tensors["eigenvectors"].T.astype(np.float64)
    top = Eigenpairs(
        tensors["eigenvalues"],
        vectors,
        tensors["residuals"],
        int(document["num_rounds"]),
        float(document["next_magnitude"]),
    )
    density = Density(tensors["density_nodes"], tensors["density_weights"], int(document["size"]), settings.num_probes)
    return CurvatureSpectrum(
        settings, top, density, int(document["size"]), int(document["num_matvecs"]), float(document["seconds"])
    )
