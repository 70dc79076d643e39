"""The Hessian and the Gauss-Newton matrix of the loss by the adapters of chosen layers: products and eigenpairs.

The loss is that of training: summed NLL of fixed micro-batches over their labelled tokens. Neither matrix is formed.

    hessian         H v  = d/dw (dL/dw . v)
    gauss_newton    G v  = J^T (diag p - p p^T) J v / tokens, J = dz/dw for the logits z, p = softmax(z): the part of H
                    that is never negative. With this loss it is the Fisher matrix, its labels drawn from the model.

Pearlmutter, Neural Computation 6, 1994; Martens, arXiv 1412.1193, sec. 8. The norm is attached or held
(differentiable.py); the two matrices differ by far more than rounding, also at B = 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

from qdora.data.batches import IGNORED, MicroBatch
from qdora.errors import RunFailure
from qdora.rank.differentiable import FACTORS, Norm, plain_model
from qdora.train.loss import token_nll

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Eigenpairs:
    """The eigenvalues of largest magnitude, falling, of both signs; a multiple one is listed as often as it comes.

    Attributes:
        values, vectors: (k,), and (size, k), columns of length 1.
        residuals: (k,) ||M v - lambda v||: each value is at most that far from an eigenvalue.
        num_rounds, next_magnitude: Searches, and the largest of the last one: not above the k-th of `values`.
    """

    values: Array
    vectors: Array
    residuals: Array
    num_rounds: int
    next_magnitude: float


def top_eigenpairs(product: Callable[[Array], Array], size: int, k: int, *, tolerance: float = 1e-3) -> Eigenpairs:
    """The k eigenpairs of largest magnitude (at most size - 1) of a symmetric matrix, from its products.

    From one start, Lanczos sees one copy of an eigenvalue, however often it comes, and the residuals are small all the
    same (Parlett, The Symmetric Eigenvalue Problem, 1998, ch. 13). Near B = 0 each value of the Hessian comes about
    2 x rank times. So `eigsh` is repeated across what was found, (1 - Q Q^T) M (1 - Q Q^T), until nothing is larger
    than the k-th, and Rayleigh-Ritz over all gives the pairs.

    Args:
        product: (size,) float64 -> the matrix times it.
        tolerance: Relative accuracy of the values; 0 is machine precision.
    Raises RunFailure: No eigenvalue converged.
    """
    generator, k = np.random.default_rng(0), min(k, size - 1)
    found, magnitudes, num_rounds, largest = np.zeros((size, 0)), np.zeros(0), 0, 0.0

    def across(vector: Array) -> Array:
        for _ in range(2):  # once is not enough in floating point
            vector = vector - found @ (found.T @ vector)
        return vector

    def projected(vector: Array) -> Array:
        return across(product(across(vector)))

    matrix: LinearOperator[np.float64] = LinearOperator((size, size), matvec=projected, dtype=np.float64)
    while found.shape[1] < size - 1:
        start = across(generator.standard_normal(size))
        if num_rounds and np.linalg.norm(projected(start)) <= 1e-12 * magnitudes[0] * np.linalg.norm(start):
            largest = 0.0
            break
        wanted = min(max(1, k // 4) if num_rounds else k, size - 1 - found.shape[1])
        try:
            values, vectors = eigsh(matrix, k=wanted, which="LM", v0=start, tol=tolerance, maxiter=30)
        except ArpackNoConvergence as error:  # copies or a dense bulk keep some of them from converging
            values, vectors = np.real(error.eigenvalues), np.real(error.eigenvectors)
            if not len(values):
                raise RunFailure(f"--eigenvalues: none of {k} converged. Fix: ask for fewer.") from None
        num_rounds, largest = num_rounds + 1, float(np.abs(values).max())
        is_last = len(magnitudes) >= k and largest <= magnitudes[k - 1] * (1.0 + max(tolerance, 1e-12))
        is_last = is_last and len(values) == wanted
        found = np.linalg.qr(np.concatenate([found, vectors], axis=1))[0]
        magnitudes = np.sort(np.concatenate([magnitudes, np.abs(values)]))[::-1]
        if is_last:
            break
    images = np.stack([product(column) for column in found.T], axis=1)
    small = found.T @ images
    values, rotation = np.linalg.eigh((small + small.T) / 2)
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    values, rotation = values[order], rotation[:, order]
    vectors = found @ rotation
    residuals = np.linalg.norm(images @ rotation - vectors * values, axis=0)
    return Eigenpairs(values, vectors, residuals, num_rounds, largest)


Curvature = Literal["hessian", "gauss_newton"]

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


def layer_spectrum(
    model: nn.Module, layer: str, batches: Sequence[MicroBatch], num: int, *, curvature: Curvature, norm: Norm
) -> dict[str, Any]:
    """The largest eigenvalues of the curvature by the factors of a layer, as JSON values.

    They belong to directions of all factors at once, not to rank components, whose worth is in components.py: at B = 0,
    apart from the block of B alone, each singular value s sigma of the gradient by the weight gives 2 x rank of them,
    half of them negative.
    """
    began = time.perf_counter()
    with curvature_of(model, [layer], batches, curvature=curvature, norm=norm) as operator:

        def product(vector: Array) -> Array:
            image: Array = operator.product(torch.from_numpy(vector)).numpy()
            return image

        top = top_eigenpairs(product, operator.size, num)
    return {
        "curvature": curvature,
        "norm": norm,
        "size": operator.size,
        "eigenvalues": top.values.tolist(),
        "residuals": top.residuals.tolist(),
        "num_rounds": top.num_rounds,
        "next_magnitude": top.next_magnitude,
        "num_matvecs": operator.num_matvecs,
        "seconds": time.perf_counter() - began,
    }
