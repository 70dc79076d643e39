"""Which modules are linear layers: nn.Linear, and subclasses that compute the same (Falcon's FalconLinear)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear and computes x W^T + bias, so that a frozen layer can take its place.

    Of subclasses only their code is judged, by a trial. bitsandbytes' layers, routers and layers with a state of their
    own compute something else.
    """
    return isinstance(module, nn.Linear) and _computes_linear(own_class(module))


def own_class(module: nn.Module) -> Any:
    """The class of a module; that of a sharded one without the class that torch has made from it."""
    return next(each for each in type(module).__mro__ if not each.__module__.startswith("torch.distributed"))


@cache
def _computes_linear(kind: Any) -> bool:
    with _disable_current_modes():  # the fake tensors of a plan have no values
        return kind is nn.Linear or _passes_trial(kind)


def _passes_trial(kind: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((3, 5), (3,), (2, 4, 5)))
    # Its own constructor may want other arguments; a state that it would set is missing then, which is an answer, too.
    trial: Any = kind.__new__(kind)
    try:
        nn.Linear.__init__(trial, 5, 3, device="meta")
        trial.weight, trial.bias = nn.Parameter(weight), nn.Parameter(bias)
        out = trial(x)
        trial.bias = None
        without = trial(x)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    expected = x @ weight.T
    results = ((out, expected + bias), (without, expected))
    return all(isinstance(found, torch.Tensor) and torch.allclose(found, right) for found, right in results)
