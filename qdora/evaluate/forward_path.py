"""How a causal language model is called for scoring: its mode, its cache, and the input of its head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qdora.adapter.layer import evaluation_mode
from qdora.model.attention import fast_grouped_attention


def shares_prefix(model: nn.Module) -> bool:
    """Whether the cache of a prefix can be copied, row by row, to several continuations: with full attention only.

    A sliding window forgets positions.
    """
    return _caches_only(model, DynamicLayer)


def pads_left(model: nn.Module) -> bool:
    """Whether padding before a row changes nothing: with attention only, since a recurrent state knows no padding."""
    return _caches_only(model, DynamicLayer, DynamicSlidingWindowLayer)


def _caches_only(model: nn.Module, *kinds: type) -> bool:
    """Whether the model's cache has only layers of these kinds, and takes positions, which padding would shift."""
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(model, "_is_stateful", False):
        return False
    return {type(layer) for layer in DynamicCache(config=model.config).layers} <= set(kinds)


def cache_keyword(model: nn.Module) -> str:
    """`cache` in new releases of transformers, `past_key_values` in older ones."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and fast kernels of attention.

    no_grad rather than inference_mode: a layer may keep what it computes here (rotary tables, the norm of an adapted
    row), and a tensor made under inference_mode must not enter a later backward pass.
    """
    with evaluation_mode(model), torch.no_grad(), fast_grouped_attention():
        yield


@contextmanager
def head_input(model: Any, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the output head gets what `choose` takes from the hidden states (rows, positions, features), contiguous.

    What the model does to its logits (scaling, soft-cap) is unchanged. transformers' own `logits_to_keep` gives the
    head a slice, for which torch takes a batched product that reads the weight once a row: a whole evaluation took 2.5
    to 26 times as long on a CPU.
    """

    def take(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (choose(args[0]).contiguous(), *args[1:])

    with model.get_output_embeddings().register_forward_pre_hook(take):
        yield
