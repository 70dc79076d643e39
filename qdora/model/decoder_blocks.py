""""""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Path and list of the decoder blocks, the units of checkpointing; None where a model has none such.

    The longest list of `GradientCheckpointingLayer`s is taken.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(each, GradientCheckpointingLayer) for each in module)
    ]
    return max(found, key=lambda each: len(each[1]), default=None)
