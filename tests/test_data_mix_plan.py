"""What is said beforehand about a run's data, against the run's own steps."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qdora.data.batching import Batching
from qdora.data.loader import StepLoader
from qdora.data.mix import make_mix
from qdora.data.mix_plan import large_step_warning, plan_mix
from qdora.data.tokenize import TokenizedExample, TokenizedSet


def tokenised(name, lengths):
    ones = [TokenizedExample(name, name, np.ones(k, np.int32), np.arange(k) > 0) for k in lengths]
    return TokenizedSet(name, tuple(ones), num_truncated=1, num_dropped=2)


@pytest.mark.parametrize("size", [{"batch": 6, "tokens_per_step": None}, {"batch": None, "tokens_per_step": 50}])
def test_the_plan_is_what_the_steps_take(size):
    sets = [tokenised("a", range(2, 32)), tokenised("b", [30] * 8), tokenised("c", [7] * 50)]
    mix = make_mix(sets, strategy="weights", weights=[1, 2, 1], max_epochs=[None, 3, None], seed=5)
    loader = StepLoader(sets, mix.order, **size, batching=Batching(500, 0))
    plan = plan_mix(mix, loader, 30)
    examples, tokens = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
    for _ in range(30):
        for micro in loader.next_step().micro_batches:
            for name, mask in zip(micro.example_ids, micro.attention_mask, strict=True):
                examples[name] += 1
                tokens[name] += int(mask.sum())
    assert (plan.num_steps, plan.num_draws) == (30, loader.position)
    for part, each in zip(plan.sources, sets, strict=True):
        assert (part.num_draws, part.num_tokens_seen) == (examples[part.name], tokens[part.name])
        assert part.share_seen == examples[part.name] / loader.position
        assert part.epochs == examples[part.name] / len(each)
        assert (part.num_examples, part.num_tokens) == (len(each), sum(len(one) for one in each.examples))
        assert (part.num_truncated, part.num_dropped) == (1, 2)
    assert [part.share_asked for part in plan.sources] == [0.25, 0.5, 0.25]
    assert plan.sources[1].epochs == 3.0  # used up before the end: its share went to the others
    assert plan.sources[1].share_seen < 0.4


def test_exact_epochs():
    sets = [tokenised("a", [2] * 30), tokenised("b", [3] * 10)]
    mix = make_mix(sets)
    loader = StepLoader(sets, mix.order, tokens_per_step=None, batch=10, batching=Batching(500, 0))
    a, b = plan_mix(mix, loader, 8).sources
    assert (a.num_draws, a.share_asked, a.share_seen, a.epochs, a.num_tokens_seen) == (60, 0.75, 0.75, 2.0, 120)
    assert (b.num_draws, b.epochs) == (20, 2.0)
    assert [part.num_draws for part in plan_mix(mix, loader, 0).sources] == [0, 0]


@pytest.mark.parametrize(
    "size, max_epochs, times",
    [
        ({"batch": 40, "tokens_per_step": None}, None, None),
        (
            {"batch": 100, "tokens_per_step": None},
            None,
            "100 examples, .* only 40: each step repeats the data 2.5 times",
        ),
        ({"batch": 100, "tokens_per_step": None}, [1.0, 1.0], None),  # the step ends with the data
        ({"batch": None, "tokens_per_step": 90}, None, None),
        (
            {"batch": None, "tokens_per_step": 270},
            None,
            "120 examples, .* only 40: each step repeats the data 3.0 times",
        ),
    ],
)
def test_a_step_larger_than_the_data_is_warned_of(size, max_epochs, times):
    sets = [tokenised("a", [2] * 30), tokenised("b", [3] * 10)]
    mix = make_mix(sets, max_epochs=max_epochs or [None, None])
    loader = StepLoader(sets, mix.order, **size, batching=Batching(500, 0))
    warning = large_step_warning(plan_mix(mix, loader, 1))
    if times is None:
        assert warning is None
    else:
        assert re.search(times, warning)
        assert "Fix: lower train.tokens_per_step" in warning
