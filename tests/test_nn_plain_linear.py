"""Which subclasses of nn.Linear are linear layers: those that compute x W^T + bias."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from qdora.nn.plain_linear import is_plain_linear


class Tagged(nn.Linear):
    """The constructor wants an argument of its own; the code is that of nn.Linear."""

    def __init__(self, in_: int, out: int, tag: str) -> None:
        super().__init__(in_, out)
        self.tag = tag


class Scaled(nn.Linear):
    """Computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Stateful(nn.Linear):
    """Has a state that changes what it computes."""

    def __init__(self, in_: int, out: int) -> None:
        super().__init__(in_, out)
        self.factor = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return self.factor * super().forward(input)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), FalconLinear(4, 3), Tagged(4, 3, "x")], ids=lambda x: type(x).__name__
)
def test_a_subclass_that_computes_the_linear_map_is_one(layer: nn.Module) -> None:
    state = torch.get_rng_state()
    assert is_plain_linear(layer)
    assert torch.equal(torch.get_rng_state(), state), "the trial draws from no global generator"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scaled(4, 3),
        lambda: Stateful(4, 3),
        lambda: bnb.nn.Linear4bit(64, 64),
        lambda: bnb.nn.Linear8bitLt(64, 64),
        lambda: PhimoeTopKRouter.__new__(PhimoeTopKRouter),
        lambda: nn.Embedding(4, 3),
    ],
    ids=["scaled", "stateful", "4bit", "8bit", "router", "embedding"],
)
def test_any_other_module_is_not(make: Any) -> None:
    assert not is_plain_linear(make())


def test_a_class_that_a_plan_meets_first_is_judged_by_values() -> None:
    """The tensors of a plan are fake, and a trial with them would have no result."""

    class Plain(nn.Linear):
        pass

    layer = Plain(4, 4)
    with FakeTensorMode():
        assert is_plain_linear(layer)
