"""How much of a compression error an update takes back, against plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qdora.analysis.error_undone import error_undone
from tests import reference


def matrices(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merged, base and dense weight, of which the update takes back a part of the error."""
    torch.manual_seed(0)
    dense, error = torch.randn(rows, columns), 0.1 * torch.randn(rows, columns)
    return dense + 0.7 * error + 0.02 * torch.randn(rows, columns), dense + error, dense


@pytest.mark.parametrize("rows, columns, rank", [(13, 7, 3), (5, 11, 1), (4, 4, 9)])
def test_against_loops(rows: int, columns: int, rank: int) -> None:
    merged, base, dense = matrices(rows, columns)
    found = error_undone(merged - base, base - dense, rank)
    expected = reference.error_undone(*(each.double().numpy() for each in (merged, base, dense)), rank)
    assert found is not None
    assert (found.undone, found.undone_best, found.cosine) == pytest.approx(expected, rel=1e-4)


def test_the_best_matrix_of_the_rank_reaches_what_is_told_of_it() -> None:
    _, base, dense = matrices(9, 12)
    error = base - dense
    left, values, right = np.linalg.svd(error.double().numpy())
    best = torch.tensor(-(left[:, :3] * values[:3]) @ right[:3])
    found = error_undone(best, error.double(), 3)
    assert found is not None
    assert found.undone == pytest.approx(found.undone_best, rel=1e-6)
    assert found.cosine == pytest.approx(math.sqrt(found.undone_best), rel=1e-6)
    whole = error_undone(-error, error, 9)
    assert whole is not None
    assert (whole.undone, whole.undone_best, whole.cosine) == pytest.approx((1.0, 1.0, 1.0), rel=1e-5)


def test_no_error_and_no_update() -> None:
    _, base, dense = matrices(3, 5)
    assert error_undone(base, torch.zeros(3, 5), 2) is None
    still = error_undone(torch.zeros(3, 5), base - dense, 2)
    assert still is not None
    assert (still.undone, still.cosine) == (0.0, 0.0)


def test_each_expert_of_a_stack_has_the_rank() -> None:
    merged, base, dense = (torch.stack([each, -2 * each, 3 * each]) for each in matrices(4, 6))
    found = error_undone(merged - base, base - dense, 2)
    assert found is not None
    best = sum(
        float(np.sort(np.linalg.eigvalsh(error @ error.T))[-2:].sum()) for error in (base - dense).double().numpy()
    )
    assert found.undone_best == pytest.approx(best / float((base - dense).double().square().sum()), rel=1e-4)
