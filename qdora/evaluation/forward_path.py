"""How a causal language model is called for scoring: its keywords, mode, and the input of its head."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qdora.model.grouped_attention import fast_grouped_attention
from qdora.nn.evaluation_mode import evaluation_mode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForwardPath:
    """How a model can be called, decided once per evaluation by `choose_path`."""

    shared_prefix: bool
    """Prefixes run once and their cache is reused; otherwise every span runs whole."""
    reason: str
    """The reason, in a few words, for the log and for the result's settings."""
    cache_keyword: str = ""
    """`cache` in new releases of transformers, `past_key_values` in older ones; '' where the model has no cache that
    left-padded rows can share (which needs attention only, windows included, and explicit positions)."""
    keeps_logits: bool = False
    """The model's forward takes `logits_to_keep`."""


_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def tell_once(model: nn.Module, level: int, text: str) -> None:
    """Log a line about a model, unless an earlier evaluation of it has logged the same one."""
    told = _told.setdefault(model, set())
    if text not in told:
        told.add(text)
        logger.log(level, "%s", text)


def choose_path(model: nn.Module) -> ForwardPath:
    """`find_path`, with a line in the log if evaluation is slower than on other models."""
    path = find_path(model)
    if not path.shared_prefix:
        text = f"Every choice is scored with its whole prompt, not after a shared prefix: {path.reason}."
        tell_once(model, logging.INFO, text)
    return path


def find_path(model: nn.Module) -> ForwardPath:
    """Whether the model's prefix cache can be reused, by what its signature and its cache type say.

    The cache is copied row by row, so only plain full-attention caches qualify: a sliding window forgets positions, and
    a recurrent state knows no padding. Models that take no explicit positions would miscount behind padding.
    """
    parameters = inspect.signature(model.forward).parameters
    keeps_logits = "logits_to_keep" in parameters
    keyword = next((name for name in ("cache", "past_key_values") if name in parameters), "")
    config = getattr(model, "config", None)
    if not keyword or "position_ids" not in parameters:
        return ForwardPath(False, "the model takes no cache or no position_ids", "", keeps_logits)
    if config is None:
        return ForwardPath(False, "the model has no config", "", keeps_logits)
    if getattr(model, "_is_stateful", False):
        return ForwardPath(False, "the model keeps a recurrent state", "", keeps_logits)
    layer_types = {type(layer) for layer in DynamicCache(config=config).layers}
    if layer_types <= {DynamicLayer}:
        return ForwardPath(True, "full-attention cache", keyword, keeps_logits)
    names = ", ".join(sorted(kind.__name__ for kind in layer_types - {DynamicLayer}))
    padded = layer_types <= {DynamicLayer, DynamicSlidingWindowLayer}
    return ForwardPath(False, f"cache of {names}", keyword if padded else "", keeps_logits)


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, fast kernels of attention, and an output head that reads its weight once.

    transformers slices the hidden state to the positions whose logits are wanted (`logits_to_keep`). For a slice that
    is not contiguous torch takes a batched product, which reads the head's weight once a row: 20 to 275 times slower.
    A hook gives the head a contiguous copy instead. What the model does to the logits (scaling, soft-cap) is unchanged.

    no_grad rather than inference_mode: a layer may keep what it computes here (rotary tables, the norm of an adapted
    row), and a tensor made under inference_mode must not enter a later backward pass.
    """
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    hook = head.register_forward_pre_hook(contiguous_input) if isinstance(head, nn.Module) else nullcontext()
    with hook, evaluation_mode(model), torch.no_grad(), fast_grouped_attention():
        yield


def contiguous_input(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The head's input with the strides of a new tensor. `contiguous` alone keeps other strides for a single row."""
    if not args:
        return None
    hidden: Tensor = args[0]
    return (hidden.reshape(-1, hidden.shape[-1]).contiguous().view(hidden.shape), *args[1:])
