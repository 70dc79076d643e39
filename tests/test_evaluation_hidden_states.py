"""Errors of hidden states against hooks on the blocks and plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from qdora.evaluation.hidden_states import hidden_state_errors
from tests import tiny

TEXTS = [[1, 5, 9, 2], [7, 3]]


def captured(model: Any) -> list[list[np.ndarray[Any, Any]]]:
    """Of each text the hidden states after the first block, and after the final norm."""
    found: list[list[np.ndarray[Any, Any]]] = []
    for ids in TEXTS:
        states: list[np.ndarray[Any, Any]] = []

        def keep(_: Any, __: Any, output: Any, states: Any = states) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states.append(hidden.detach().double().numpy())

        hooks = [module.register_forward_hook(keep) for module in (*model.model.layers[:-1], model.model.norm)]
        model(input_ids=torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        found.append(states)
    return found


def test_errors_of_every_block_over_all_positions_and_texts() -> None:
    model, reference = tiny.llama(), tiny.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.train()
    found = hidden_state_errors(model, reference, TEXTS)
    assert model.training
    ours, theirs = captured(model.eval()), captured(reference.eval())
    assert len(found) == len(ours[0]) == model.config.num_hidden_layers >= 2
    for block, error in enumerate(found):
        pairs = [
            (one, other)
            for a, b in zip(ours, theirs, strict=True)
            for one, other in zip(a[block].reshape(-1, 32), b[block].reshape(-1, 32), strict=True)
        ]
        assert len(pairs) == sum(map(len, TEXTS))
        each = [math.sqrt(((one - other) ** 2).sum() / (other**2).sum()) for one, other in pairs]
        assert error == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert hidden_state_errors(reference, reference, TEXTS) == [0.0] * len(found)
