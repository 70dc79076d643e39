"""Which models can have their input embedding in the host's memory, and putting it there.

A vocabulary of 128,256 by 8,192 features takes 2.0 GiB, of which a micro-batch of 2,048 tokens reads 32 MiB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.model.checkpoint import tied_weights
from qdora.model.inject import replace_module
from qdora.nn.host_embedding import HostEmbedding

SETTING = "memory.host_embeddings"


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the embedding of `model` has to be on the device, as the end of a sentence about it; None if it has not."""
    kind = type(model.get_input_embeddings())
    shared = {name for pair in tied_weights(model).items() for name in pair}
    if f"{_path(model)}.weight" in shared:
        return "is its output head as well, which computes on the device"
    return None if kind is nn.Embedding else f"does more than look rows up ({kind.__name__})"


def check_host_embedding(model: PreTrainedModel) -> None:
    """Raises UserError where the embedding of `model` cannot stay in the host's memory."""
    why = obstacle(model)
    if why is not None:
        raise UserError(f"{SETTING}: the embedding of {model.config.model_type} {why}, got true, allowed: false.")


def keep_embedding_on_host(model: PreTrainedModel, device: torch.device) -> None:
    """Replace the input embedding of a model whose weights have not been read yet. Raises as `check_host_embedding`."""
    check_host_embedding(model)
    embedding: Any = model.get_input_embeddings()
    replace_module(model, _path(model), HostEmbedding(embedding.weight.detach(), device))


def _path(model: PreTrainedModel) -> str:
    embedding = model.get_input_embeddings()
    path: str = next(name for name, module in model.named_modules() if module is embedding)
    return path
