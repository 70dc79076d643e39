"""The warm-up of a learning rate."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from qdora.recipe.train_settings import TrainConfig
from qdora.train.schedule import Schedule


@pytest.mark.parametrize("num_steps", [1, 7, 25, 50, 100, 300, 1000])
def test_a_share_of_the_steps_is_that_which_the_recipe_has(num_steps: int) -> None:
    """The smallest whole number of steps that is the share or more, also where the floating product is above it."""
    above = 0
    for percent in range(1, 100):
        exact = math.ceil(Fraction(percent, 100) * num_steps)
        above += math.ceil(percent / 100 * num_steps) > exact
        schedule = Schedule(TrainConfig(steps=num_steps, batch=1, lr=1.0, warmup=percent / 100), num_steps)
        first = next(step for step in range(num_steps) if schedule.rate(step) == 1.0)
        assert first + 1 == exact, percent
    assert above > 0 or num_steps not in (25, 50, 100)
