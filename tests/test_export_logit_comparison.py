"""The verdict on an export: what the running model's own error at a position explains, and what it does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qdora.export.logit_comparison import Comparison, verdict

POSITIONS, VOCABULARY = 12, 50


def judged(
    error: float,
    noise: float,
    *,
    stored: torch.dtype = torch.float16,
    running: torch.dtype = torch.bfloat16,
    at: int = 4,
) -> dict[str, Any]:
    """An export off by 0.003 everywhere and a running model off by 0.2, but for one position and one token of it."""
    generator = torch.Generator().manual_seed(1)
    reference = 3.0 * torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64)
    exported, in_use = reference + 0.003, reference + (0.0 if running == torch.float32 else 0.2)
    exported[at, 7] = reference[at, 7] + error
    in_use[at, 7] = reference[at, 7] + noise
    total = Comparison()
    total.errors += total.exported_vs_reference.add(reference, exported)
    total.noises += total.reference_vs_running.add(in_use, reference)
    total.exported_vs_running.add(in_use, exported)
    total.spread_sum = 3.0 * POSITIONS
    return verdict(total, [], stored, running)


def test_a_position_that_bfloat16_itself_gets_wrong_does_not_refuse_an_export() -> None:
    found = judged(-2.9, -30.0)
    assert found["passed"], found["faults"]
    assert found["ill_conditioned"] == 1
    assert found["tolerance"]["max_logit_difference"] < 2.9
    assert judged(0.003, 0.2)["ill_conditioned"] == 0


@pytest.mark.parametrize(
    "error, noise, dtypes",
    [
        (-2.9, 0.2, {}),  # one wrong position in a model that is right everywhere
        (-2.9, 10.0, {}),  # bfloat16 is off by 10: float16 has 8 times as many steps, twice 1.25 is allowed
        (-2.9, 0.0, {"running": torch.float32}),  # no error of its own: nothing is explained
        (-2.9, -30.0, {"stored": torch.float32}),  # float32 rounds 65,536 times less than bfloat16
        (math.nan, 30.0, {}),
        (-2.9, math.nan, {}),
    ],
)
def test_any_other_position_does(error: float, noise: float, dtypes: dict[str, Any]) -> None:
    found = judged(error, noise, **dtypes)
    assert not found["passed"]
    assert any("by up to" in fault and fault.endswith("most at position 4") for fault in found["faults"])
    assert found["ill_conditioned"] == 0


def test_the_worst_position_is_named() -> None:
    (fault,) = judged(-2.9, 0.2, at=11)["faults"]
    assert "by up to 2.9 (allowed 1) at 1 of 12 positions, most at position 11" in fault
