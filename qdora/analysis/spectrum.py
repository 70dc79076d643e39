"""Eigenvalues of a symmetric operator from its products: the largest ones, and the density of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from qdora.errors import RunFailure

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


@dataclass(frozen=True)
class Density:
    """The spectral density as a sum of points, the mean over random starts.

    Attributes:
        nodes: (points,) Ritz values.
        weights: (points,) shares of the spectrum, sum 1.
    """

    nodes: Array
    weights: Array
    size: int

    def total(self, function: Callable[[Array], Array]) -> float:
        """Estimate of the sum of function(lambda) over all eigenvalues."""
        return float(self.size * (self.weights * function(self.nodes)).sum())


def top_eigenpairs(
    product: Product, size: int, k: int, *, seed: int = 0, tolerance: float = 1e-4, max_restarts: int = 30
) -> Eigenpairs:
    """The k eigenpairs of largest magnitude of a symmetric matrix, by implicitly restarted Lanczos (ARPACK), repeated.

    In exact arithmetic Lanczos from one start sees one copy of an eigenvalue, however often it comes, and stops with
    small residuals all the same. So it is repeated across what was found, (1 - Q Q^T) M (1 - Q Q^T), from new random
    starts, until a search finds nothing larger than the k-th: a start that has no share in what is left has probability
    0. Rayleigh-Ritz over all that was found gives the pairs.

    Source: Parlett, The Symmetric Eigenvalue Problem, 1998, ch. 13.

    Args:
        product: (size,) float64 -> the matrix times it.
        seed: Seed of the start vectors. The same seed takes the same products.
        tolerance: Relative accuracy of the values; 0 is machine precision.
    Raises:
        ValueError: If k does not lie in its range.
        RunFailure: A search in which no pair converged.
    """
    if not 1 <= k < size:
        raise ValueError(f"{k} eigenvalues of a matrix of {size} rows; allowed: 1 to {size - 1}.")
    generator = np.random.default_rng(seed)
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
        values, vectors = _eigsh(across, size, wanted, start, tolerance, max_restarts)
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


def _eigsh(
    product: Product, size: int, k: int, start: Array, tolerance: float, max_restarts: int
) -> tuple[Array, Array]:
    """One search: k pairs, or at least one of them, where copies or a dense bulk keep the others from converging."""
    operator: LinearOperator[np.float64] = LinearOperator((size, size), matvec=product, dtype=np.float64)
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


def spectral_density(product: Product, size: int, *, num_steps: int, num_probes: int, seed: int = 0) -> Density:
    """Stochastic Lanczos quadrature: from each random start, the Ritz values weighted by the start's share of them.

    With full reorthogonalisation, so no Ritz value comes twice. Exact where `num_steps` reaches the number of distinct
    eigenvalues, but for the random start.

    Source: Golub & Welsch, Math. Comp. 23, 1969; Ghorbani et al., arXiv 1901.10159, sec. 2.

    Args:
        num_probes: Starts, entries +1 or -1: the mean of v^T M v is then the trace.
    """
    generator = np.random.default_rng(seed)
    nodes, weights = [], []
    for _ in range(num_probes):
        start = generator.choice([-1.0, 1.0], size=size) / np.sqrt(size)
        diagonal, off_diagonal = _lanczos(product, start, min(num_steps, size))
        tridiagonal = np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
        values, vectors = np.linalg.eigh(tridiagonal)
        nodes.append(values)
        weights.append(vectors[0] ** 2 / num_probes)
    return Density(np.concatenate(nodes), np.concatenate(weights), size)


def _lanczos(product: Product, start: Array, num_steps: int) -> tuple[Array, Array]:
    """Diagonal and off-diagonal of the tridiagonal matrix; shorter where the start's space is used up."""
    basis = [start]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    scale = 0.0
    while True:
        image = product(basis[-1])
        diagonal.append(float(basis[-1] @ image))
        scale = max(scale, float(np.linalg.norm(image)))
        if len(diagonal) == num_steps:
            break
        known = np.stack(basis)
        for _ in range(2):  # once is not enough in floating point
            image = image - known.T @ (known @ image)
        length = float(np.linalg.norm(image))
        if length <= 1e-10 * scale:
            break
        off_diagonal.append(length)
        basis.append(image / length)
    return np.array(diagonal), np.array(off_diagonal)
