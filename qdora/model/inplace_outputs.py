"""Models that do not treat linear layers as functions: they write into the outputs (OLMo's clip_qkv, Falcon's sum of
attention and MLP), or read the weights (Mamba)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.adapter.evaluation_mode import evaluation_mode
from qdora.adapter.frozen_linear import FrozenLinear
from qdora.errors import UserError
from qdora.model.inject import adapted_layers

logger = logging.getLogger("qdora")

_NUM_TOKENS = 4


@torch.no_grad()
def keep_inplace_outputs_(model: PreTrainedModel) -> list[str]:
    """Let the adapted layers whose outputs the model changes in place keep a copy of them while they train.

    The gradient of a magnitude is read from the output, so it would be that of the changed one. One forward pass of a
    few tokens finds the layers, by torch's count of the changes of each tensor. Layers with a bias, which is added into
    another tensor, and LoRA need no copy. Returns the paths of the layers.

    Raises UserError: See `weights_unread`.
    """
    layers = {
        path: layer
        for path, layer in adapted_layers(model).items()
        if layer.magnitude is not None and layer.base.bias is None
    }
    if not layers:
        return []
    outputs: list[tuple[str, Tensor, int]] = []

    def returned(path: str, _layer: AdaptedLinear, _inputs: Any, output: Tensor) -> None:
        outputs.append((path, output, output._version))

    with ExitStack() as hooks, evaluation_mode(model), weights_unread(model):
        for path, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(returned, path)))
        model(input_ids=torch.zeros(1, _NUM_TOKENS, dtype=torch.int64, device=model.device), use_cache=False)
    written = list(dict.fromkeys(path for path, output, version in outputs if output._version != version))
    for path in written:
        layers[path].keeps_copy = True
    if written:
        text = "%s writes into the outputs of %d adapted layers (e.g. %s): each keeps a copy for its magnitude."
        logger.info(text, model.config.model_type, len(written), written[0])
    return written


@contextmanager
def weights_unread(model: nn.Module) -> Iterator[None]:
    """Raise a UserError where the model reads the weight of an adapted or frozen layer itself, as Mamba does.

    Mamba 2 and others do so only while they train.
    """
    try:
        yield
    except AttributeError as error:
        path = next((path for path, each in model.named_modules() if each is error.obj), None)
        if path is None or error.name != "weight" or not isinstance(error.obj, AdaptedLinear | FrozenLinear):
            raise
        name = path.rpartition(".")[2]
        raise UserError(
            f"adapter.targets: this model reads the weight of {path} itself, which a quantised or an adapted layer "
            f"does not hold. Fix: name {name} in base.skip and leave it out of adapter.targets."
        ) from None
