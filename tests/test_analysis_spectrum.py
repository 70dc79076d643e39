"""Eigenvalues of matrices whose spectrum is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdora.analysis.curvature import top_eigenpairs

VALUES = np.array([9.0, -7.0, 5.0, 3.0, -1.0, *np.linspace(0.001, 0.5, 55)])


def matrix() -> np.ndarray[Any, np.dtype[np.float64]]:
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((60, 60)))
    return (rotation * VALUES) @ rotation.T


def test_largest_magnitudes_of_both_signs() -> None:
    known = matrix()
    found = top_eigenpairs(lambda v: known @ v, 60, 5, tolerance=0.0)
    np.testing.assert_allclose(found.values, [9.0, -7.0, 5.0, 3.0, -1.0], rtol=1e-10)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(5), atol=1e-10)
    assert found.residuals.max() < 1e-9
    again = top_eigenpairs(lambda v: known @ v, 60, 5, tolerance=0.0)
    assert np.array_equal(again.vectors, found.vectors)


@pytest.mark.parametrize("multiplicity", [1, 4, 32])
@pytest.mark.parametrize("tolerance", [1e-3, 0.0])
def test_copies_of_an_eigenvalue_are_all_found(multiplicity: int, tolerance: float) -> None:
    """Both signs, each value several times, above a bulk: as the Hessian of adapters that have hardly been trained."""
    generator = np.random.default_rng(0)
    values = np.concatenate([np.repeat([1.0, 0.7, 0.5], multiplicity), -np.repeat([1.0, 0.7, 0.5], multiplicity)])
    values = np.concatenate([values, 0.05 * generator.standard_normal(300 - len(values))])
    rotation, _ = np.linalg.qr(generator.standard_normal((300, 300)))
    known = (rotation * values) @ rotation.T
    found = top_eigenpairs(lambda v: known @ v, 300, 20, tolerance=tolerance)
    expected = np.sort(np.abs(values))[::-1][:20]
    np.testing.assert_allclose(np.abs(found.values), expected, rtol=max(tolerance, 1e-10))
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(20), atol=1e-10)
    assert found.num_rounds > 1
    assert found.next_magnitude <= expected[-1] * (1 + 1e-3)


@pytest.mark.parametrize("rank", [1, 3, 30])
def test_a_matrix_without_more_eigenvalues_than_were_asked_for(rank: int) -> None:
    basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((40, rank)))
    known = basis @ basis.T
    found = top_eigenpairs(lambda v: known @ v, 40, 10, tolerance=1e-3)
    np.testing.assert_allclose(found.values[: min(rank, 10)], 1.0, rtol=1e-10)
    np.testing.assert_allclose(found.values[rank:], 0.0, atol=1e-10)
    assert found.next_magnitude == pytest.approx(1.0 if rank > 10 else 0.0, abs=1e-10)
