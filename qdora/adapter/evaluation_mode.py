"""Evaluation mode for a while: dropout off, and every module back in its own mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block. Afterwards, also after an error, each module is in the mode it was in.

    `model.train(was_training)` would not do: it puts every module into the mode of the outermost one.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
