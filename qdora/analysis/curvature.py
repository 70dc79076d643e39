"""The Hessian and the Gauss-Newton matrix of the loss by the adapters of chosen layers: products and eigenpairs.

The loss is that of training: summed NLL of fixed micro-batches over their labelled tokens. Neither matrix is formed.

    hessian         H v  = d/dw (dL/dw . v)
    gauss_newton    G v  = J^T (diag p - p p^T) J v / tokens, J = dz/dw for the logits z, p = softmax(z): the part of H
                    that is never negative. With this loss it is the Fisher matrix, its labels drawn from the model.

Pearlmutter, Neural Computation 6, 1994; Martens, arXiv 1412.1193, sec. 8. The norm is attached or held
(differentiable.py); the two matrices differ by far more than rounding, also at B = 0.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

from qdora.analysis.differentiable import FACTORS, Norm, plain_model
from qdora.analysis.tensor_cache import made_once
from qdora.data.batching import IGNORED, MicroBatch
from qdora.errors import RunFailure
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.ops.loss import token_nll

Array = NDArray[np.float64]
Product = Callable[[Array], Array]


@dataclass(frozen=True)
class Eigenpairs:
    """The eigenvalues of largest magnitude; a multiple eigenvalue is listed as often as it comes.

    Attributes:
        values: (k,), by falling magnitude; both signs.
        vectors: (size, k), columns of length 1.
        residuals: (k,) ||M v - lambda v||: each value is at most that far from an eigenvalue. A small residual does not
            say that none is missing; `next_magnitude` does.
        num_rounds: Searches from a new start, each orthogonal to all that was found before.
        next_magnitude: The largest of the last search, orthogonal to all others: not above the k-th of `values`.
    """

    values: Array
    vectors: Array
    residuals: Array
    num_rounds: int
    next_magnitude: float


def top_eigenpairs(
    product: Product, size: int, k: int, *, tolerance: float = 1e-3, max_restarts: int = 30
) -> Eigenpairs:
    """The k eigenpairs of largest magnitude of a symmetric matrix, by implicitly restarted Lanczos (ARPACK), repeated.

    In exact arithmetic Lanczos from one start sees one copy of an eigenvalue, however often it comes, and stops with
    small residuals all the same. So it is repeated across what was found, (1 - Q Q^T) M (1 - Q Q^T), from new random
    starts, until a search finds nothing larger than the k-th: a start that has no share in what is left has probability
    0. Rayleigh-Ritz over all that was found gives the pairs.

    Source: Parlett, The Symmetric Eigenvalue Problem, 1998, ch. 13.

    Args:
        product: (size,) float64 -> the matrix times it.
        tolerance: Relative accuracy of the values; 0 is machine precision.
    Raises:
        ValueError: If k does not lie in its range.
        RunFailure: A search in which no pair converged.
    """
    if not 1 <= k < size:
        raise ValueError(f"{k} eigenvalues of a matrix of {size} rows; allowed: 1 to {size - 1}.")
    generator = np.random.default_rng(0)
    found = np.zeros((size, 0))
    magnitudes = np.zeros(0)
    num_rounds, wanted, next_magnitude = 0, k, 0.0

    def across(vector: Array) -> Array:
        vector = _across(found, vector)
        return _across(found, product(vector))

    while found.shape[1] < size - 1:
        start = _across(found, generator.standard_normal(size))
        if num_rounds and np.linalg.norm(across(start)) <= 1e-12 * magnitudes[0] * np.linalg.norm(start):
            next_magnitude = 0.0
            break
        wanted = min(wanted, size - 1 - found.shape[1])
        values, vectors = _eigsh(across, wanted, start, tolerance, max_restarts)
        num_rounds += 1
        next_magnitude = float(np.abs(values).max())
        nothing_larger = len(magnitudes) >= k and next_magnitude <= magnitudes[k - 1] * (1.0 + max(tolerance, 1e-12))
        complete = nothing_larger and len(values) == wanted
        found = np.linalg.qr(np.concatenate([found, vectors], axis=1))[0]
        magnitudes = np.sort(np.concatenate([magnitudes, np.abs(values)]))[::-1]
        if complete:
            break
        wanted = max(1, k // 4)
    images = np.stack([product(column) for column in found.T], axis=1)
    small = found.T @ images
    values, rotation = np.linalg.eigh((small + small.T) / 2)
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    values, rotation = values[order], rotation[:, order]
    vectors = found @ rotation
    residuals = np.linalg.norm(images @ rotation - vectors * values, axis=0)
    return Eigenpairs(values, vectors, residuals, num_rounds, next_magnitude)


def _eigsh(product: Product, k: int, start: Array, tolerance: float, max_restarts: int) -> tuple[Array, Array]:
    """One search: k pairs, or at least one of them, where copies or a dense bulk keep the others from converging."""
    shape = (len(start), len(start))
    operator: LinearOperator[np.float64] = LinearOperator(shape, matvec=product, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, k=k, which="LM", v0=start, tol=tolerance, maxiter=max_restarts)
    except ArpackNoConvergence as error:
        if not len(error.eigenvalues):
            raise RunFailure(
                f"eigsh: none of {k} eigenvalues converged in {max_restarts} restarts; "
                "ask for fewer of them, or for a larger tolerance."
            ) from None
        return np.real(error.eigenvalues), np.real(error.eigenvectors)  # of a symmetric matrix they are real
    return values, vectors


def _across(found: Array, vector: Array) -> Array:
    """The part of a vector that is orthogonal to the columns of `found`."""
    for _ in range(2):  # once is not enough in floating point
        vector = vector - found @ (found.T @ vector)
    return vector


Curvature = Literal["hessian", "gauss_newton"]
CURVATURES: tuple[Curvature, ...] = ("hessian", "gauss_newton")

Logits = Callable[[], tuple[Tensor, Tensor]]
"""Runs one micro-batch: (num_labelled, vocabulary) logits with their graph, and (num_labelled,) int64 targets."""


class CurvatureOperator:
    """The matrix as its product with a vector. The parameters lie end to end, in the order of `leaves`.

    Memory is that of one micro-batch at a time. With a single micro-batch the graph of the gradient is kept between
    products: the peak is the same, and two of four passes are saved.

    Args:
        leaves: Name -> parameter that the logits depend on, float32 or float64.
    """

    def __init__(self, leaves: Mapping[str, Tensor], batches: Sequence[Logits], curvature: Curvature) -> None:
        self.leaves = dict(leaves)
        self.curvature: Curvature = curvature
        self.num_matvecs = 0
        """Number of products so far."""
        self._batches = tuple(batches)
        self._kept: Any = None

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return sum(leaf.numel() for leaf in self.leaves.values())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products."""
        return next(iter(self.leaves.values())).dtype

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times a (size,) vector, on the vector's device and in its dtype; computed in `dtype`."""
        if vector.shape != (self.size,):
            raise ValueError(f"a vector of shape {tuple(vector.shape)}; allowed: ({self.size},).")
        device = next(iter(self.leaves.values())).device
        wide = vector.to(device=device, dtype=self.dtype)
        pieces = torch.split(wide, [leaf.numel() for leaf in self.leaves.values()])
        parts = [part.view_as(leaf) for part, leaf in zip(pieces, self.leaves.values(), strict=True)]
        total = torch.zeros(self.size, dtype=self.dtype, device=device)
        num_tokens = 0
        keep = len(self._batches) == 1
        for batch in self._batches:
            graph = self._kept or self._graph(batch)
            self._kept = graph if keep else None
            total += torch.cat([each.reshape(-1) for each in self._image(graph, parts, keep)])
            num_tokens += len(graph[0])
            del graph
        self.num_matvecs += 1
        return (total / max(num_tokens, 1)).to(device=vector.device, dtype=vector.dtype)

    def _graph(self, batch: Logits) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Logits, the vector that stands for the gradient by them, and the gradient by the leaves with its graph."""
        logits, targets = batch()
        leaves = list(self.leaves.values())
        if self.curvature == "hessian":
            nll = token_nll(logits, targets).sum()
            return logits, nll, torch.autograd.grad(nll, leaves, create_graph=True, materialize_grads=True)
        # J^T u is linear in u, so its derivative by u along v is J v.
        upstream = torch.zeros_like(logits, requires_grad=True)
        back = torch.autograd.grad(logits, leaves, upstream, create_graph=True, materialize_grads=True)
        return logits, upstream, back

    def _image(
        self, graph: tuple[Tensor, Tensor, Sequence[Tensor]], vector: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor]:
        """The matrix of one micro-batch, from its `_graph`, times a vector in the shapes of the leaves."""
        leaves = list(self.leaves.values())
        logits, upstream, back = graph
        if self.curvature == "hessian":
            return torch.autograd.grad(back, leaves, list(vector), retain_graph=keep, materialize_grads=True)
        (along,) = torch.autograd.grad(back, upstream, list(vector), retain_graph=True, materialize_grads=True)
        with torch.no_grad():
            probability = torch.softmax(logits, dim=-1)
            weighted = probability * along
            weighted -= probability * weighted.sum(dim=-1, keepdim=True)
        return torch.autograd.grad(logits, leaves, weighted, retain_graph=keep, materialize_grads=True)


@contextmanager
def curvature_of(
    model: nn.Module,
    layers: Collection[str],
    batches: Sequence[MicroBatch],
    *,
    curvature: Curvature,
    norm: Norm,
    parts: Collection[str] = FACTORS,
) -> Iterator[CurvatureOperator]:
    """The curvature of a model's loss by the adapters of some layers; inside the block the model runs plainly.

    Args:
        model: A causal LM with adapters, in float32 or float64.
        layers, norm, parts: As in `plain_model`.
        batches: Without packing; at least one labelled token.
    Raises: ValueError: As `plain_model`; a packed batch; no labelled token.
    """
    check_batches(batches)
    with plain_model(model, layers, norm=norm, parts=parts) as leaves:
        device = next(iter(leaves.values())).device
        runs = [partial(labelled_logits, model, batch, device) for batch in batches]
        yield CurvatureOperator(leaves, runs, curvature)


def check_batches(batches: Sequence[MicroBatch]) -> None:
    """Raises ValueError for a packed micro-batch, and where no token has a label."""
    if any(batch.packing is not None for batch in batches):
        raise ValueError("packed micro-batches; allowed: one example a row.")
    if not any(bool((batch.labels[:, 1:] != IGNORED).any()) for batch in batches):
        raise ValueError("no labelled token; allowed: micro-batches with at least one.")


def labelled_logits(model: nn.Module, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The model's own logits at the labelled positions alone, and their targets.

    Returns: (num_labelled, vocabulary) with their graph, float32 or wider; (num_labelled,) int64.
    """
    wanted = batch.labels[:, 1:] != IGNORED
    rows, columns = (index.to(device) for index in wanted.nonzero(as_tuple=True))
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, columns].unsqueeze(0), *args[1:])

    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    with head.register_forward_pre_hook(select):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1]), batch.labels[:, 1:][wanted].to(device)


MULTIPLICITY = (
    "Eigenvalues of the factors' directions, not of rank components: near B = 0 each singular value of the gradient "
    "comes about 2 x rank times. Copies are listed one by one; searches were repeated until none was above the last "
    "value listed (next_magnitude)."
)


@dataclass(frozen=True)
class CurvatureSettings:
    """What is computed for each set of layers."""

    curvature: Curvature
    norm: Norm
    num_eigenvalues: int = 20


@dataclass(frozen=True, kw_only=True)
class CurvatureSpectrum:
    """Eigenvalues of the curvature by a set of layers, and their cost.

    Eigenvectors are directions of all factors at once, not rank components: at B = 0, apart from the block of B alone,
    each singular value s sigma of the gradient by the weight gives 2 x rank eigenvalues, half of them negative. The
    worth of components is in components.py.

    Attributes:
        size: Rows of the matrix.
        values, residuals, num_rounds, next_magnitude: As in `Eigenpairs`, whose vectors are not kept: they would be as
            many times the adapter as there are values.
        num_matvecs, seconds: Cost of the computation, also where the result comes from the cache.
    """

    settings: CurvatureSettings
    size: int
    values: Array
    residuals: Array
    num_rounds: int
    next_magnitude: float
    num_matvecs: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "curvature": self.settings.curvature,
            "norm": self.settings.norm,
            "size": self.size,
            "eigenvalues": self.values.tolist(),
            "residuals": self.residuals.tolist(),
            "num_rounds": self.num_rounds,
            "next_magnitude": self.next_magnitude,
            "multiplicity": MULTIPLICITY,
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
    state: str,
) -> CurvatureSpectrum:
    """Eigenvalues of the curvature by the adapters of `layers`, computed or from the cache.

    `state` is the `fingerprint` of the model and the batches.
    """
    key = ["curvature", list(layers), asdict(settings), state]
    tensors = made_once(cache, key, lambda: _spectrum_tensors(model, layers, batches, settings))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    size, num_rounds, next_magnitude, num_matvecs, seconds = (float(arrays[name][0]) for name in _COUNTS)
    return CurvatureSpectrum(
        settings=settings,
        size=int(size),
        values=arrays["eigenvalues"],
        residuals=arrays["residuals"],
        num_rounds=int(num_rounds),
        next_magnitude=next_magnitude,
        num_matvecs=int(num_matvecs),
        seconds=seconds,
    )


_COUNTS = ("size", "num_rounds", "next_magnitude", "num_matvecs", "seconds")


def _spectrum_tensors(
    model: nn.Module, layers: Sequence[str], batches: Sequence[MicroBatch], settings: CurvatureSettings
) -> dict[str, Tensor]:
    """A `CurvatureSpectrum` as the cache holds it."""
    began = time.perf_counter()
    with curvature_of(model, layers, batches, curvature=settings.curvature, norm=settings.norm) as operator:

        def product(vector: Array) -> Array:
            image: Array = operator.product(torch.from_numpy(np.ascontiguousarray(vector))).numpy()
            return image

        size = operator.size
        top = top_eigenpairs(product, size, min(settings.num_eigenvalues, size - 1))
    counts = (size, top.num_rounds, top.next_magnitude, operator.num_matvecs, time.perf_counter() - began)
    return {
        "eigenvalues": torch.from_numpy(top.values),
        "residuals": torch.from_numpy(top.residuals),
        **{name: torch.tensor([value], dtype=torch.float64) for name, value in zip(_COUNTS, counts, strict=True)},
    }


def fingerprint(model: nn.Module, batches: Iterable[MicroBatch]) -> str:
    """A hash of the adapters and of the batches, on which the curvature depends.

    The base is not read: a cache belongs to one run and so to one base.
    """
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
