"""Attention masks from what the host knows of a micro-batch, so that no mask is read back from a GPU.

transformers leaves out a mask where nothing is padded, and finds packed examples by their positions. It reads both from
the device in every forward pass, and the host waits until the GPU has done all that it was given. But the micro-batch
comes from the host. Its rows are padded on the right, so in causal attention only padding sees padding: no mask is
needed, and attention keeps its fast kernel, which takes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from qdora.data.batching import Packing
from qdora.train.sent_tensors import send

_PACKED: ContextVar[bool] = ContextVar("packed_mask_is_known", default=False)


@contextmanager
def known_masks(model: nn.Module, packing: Packing | None, device: torch.device) -> Iterator[None]:
    """Inside, `model` makes its masks for one micro-batch on a GPU without reading from it; on a CPU nothing changes.

    Without packing this holds for sdpa and flash attention, with packing for sdpa. Where a model allows a token more
    than the tokens before it, its padding stays masked.
    """
    config: Any = getattr(model, "config", None)
    attention = None if config is None else config.get_text_config()._attn_implementation
    known = ("sdpa", "flash_attention_2") if packing is None else ("sdpa",)
    if device.type == "cpu" or attention not in known:
        yield
        return
    make = ALL_MASK_ATTENTION_FUNCTIONS[attention]
    if packing is None:
        ours = partial(_without_padding, make)
    else:
        ours = partial(_within_examples, make, *send((packing.position_ids, packing.example_index), device))
    ALL_MASK_ATTENTION_FUNCTIONS[attention] = ours
    before = _PACKED.set(packing is not None)
    try:
        yield
    finally:
        _PACKED.reset(before)
        del ALL_MASK_ATTENTION_FUNCTIONS[attention]


def packed_mask_is_known() -> bool:
    """Whether the mask of packed rows is at hand, so that an attention mask in the inputs only says: do not look."""
    return _PACKED.get()


def _without_padding(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("allow_is_causal_skip"):  # False where a model adds to the causal mask
        kwargs["attention_mask"] = None
    return make(*args, **kwargs)


def _within_examples(
    make: Callable[..., Any],
    position_ids: Tensor,
    example_index: Tensor,
    *args: Any,
    mask_function: Callable[..., Any] = causal_mask_function,
    **kwargs: Any,
) -> Any:
    """A mask by positions in the example, as windows count them, among the tokens of one example (or of padding)."""

    def within(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = mask_function(batch, head, position_ids[batch, query], position_ids[batch, key])
        return seen & (example_index[batch, query] == example_index[batch, key])

    options = {"mask_function": within, "attention_mask": None, "allow_is_causal_skip": False}
    return make(*args, **kwargs | options)
