"""Attention masks from what the host knows of a micro-batch, so that no mask is read back from a GPU.

transformers leaves out a mask where nothing is padded, and finds packed examples by their positions. It reads both from
the device in every forward pass, flash attention in every layer (the positions of a single row, packed or not), and the
host waits until the GPU has done all that it was given. But the micro-batch comes from the host. Its rows are padded on
the right, so in causal attention and in a state that runs through the row only padding sees padding: no mask is needed,
and attention keeps its fast kernel, which takes none.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from qdora.adapter.plain_linear import own_class
from qdora.data.batches import Packing
from qdora.model.grouped_attention import fast_grouped_attention
from qdora.model.replaced_function import replaced
from qdora.model.text_config import attention_of

_PACKED: ContextVar[bool] = ContextVar("packed_mask_is_known", default=False)
# In the modules of models with convolutions, linear attention or Mamba layers.
_RECURRENT = "create_recurrent_attention_mask"
# By which flash attention finds packed examples.
_FINDS_PACKED = "_is_packed_sequence"


@contextmanager
def known_masks(model: nn.Module, packing: Packing | None, device: torch.device) -> Iterator[None]:
    """Inside, `model` makes its masks for one micro-batch on a GPU without reading from it; on a CPU nothing changes.

    This holds for sdpa, which keeps a fast kernel (`fast_grouped_attention`), and flash attention; packed rows of flash
    attention must have `flash_lengths`. Where a model allows a token more than the tokens before it, its padding stays
    masked.

    Args:
        packing: Of the rows, on the device; None if each row is an example, padded on the right.
    """
    if device.type == "cpu":
        yield
        return
    attention = attention_of(model)
    is_flash = attention == "flash_attention_2"
    lacks_lengths = packing is not None and is_flash and not takes_flash_lengths(model)
    if attention not in ("sdpa", "flash_attention_2") or lacks_lengths:
        with _without_recurrent_masks(model) if packing is None else nullcontext():
            yield
        return
    make = ALL_MASK_ATTENTION_FUNCTIONS[attention]
    if packing is None:
        ours: Callable[..., Any] = partial(_without_padding, make)
    elif is_flash:
        ours = _none
    else:
        ours = partial(_within_examples, make, packing.position_ids, packing.example_index)
    ALL_MASK_ATTENTION_FUNCTIONS[attention] = ours
    before = _PACKED.set(packing is not None)
    unpacked = _answers_nothing(modeling_flash_attention_utils, _FINDS_PACKED) if packing is None else nullcontext()
    try:
        with _without_recurrent_masks(model), unpacked, fast_grouped_attention():
            yield
    finally:
        _PACKED.reset(before)
        del ALL_MASK_ATTENTION_FUNCTIONS[attention]


def packed_mask_is_known() -> bool:
    """Whether the mask of packed rows is at hand, so that an attention mask in the inputs only says: do not look."""
    return _PACKED.get()


def takes_flash_lengths(model: nn.Module) -> bool:
    """Whether the model attends by flash attention and hands the lengths of packed examples on to it."""
    forward = inspect.signature(model.forward).parameters.values()
    return attention_of(model) == "flash_attention_2" and any(each.kind is each.VAR_KEYWORD for each in forward)


def flash_lengths(position_ids: Tensor) -> tuple[Tensor, int]:
    """Where the examples of one packed row begin, with its end, (examples + 1,) int32; and the longest one's tokens.

    For `flash_inputs`. Without them each layer finds both by the positions, which the host reads from the GPU.

    Args:
        position_ids: (1, length) int64 on the CPU, counted from 0 in each example.
    """
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    borders = torch.cat([starts, torch.tensor([position_ids.shape[1]])])
    return borders.to(torch.int32), int(borders.diff().max())


def flash_inputs(starts: Tensor, longest: int) -> dict[str, Any]:
    """The inputs by which transformers hands `flash_lengths` on to each layer; `starts` on the model's device."""
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def _without_recurrent_masks(model: nn.Module) -> AbstractContextManager[None]:
    return _answers_nothing(sys.modules[own_class(model).__module__], _RECURRENT)


def _answers_nothing(module: ModuleType, name: str) -> AbstractContextManager[None]:
    """Inside, a function of a module, if there is one, returns None."""
    return replaced(module, name, lambda _before: _none)


def _none(*_args: Any, **_kwargs: Any) -> None:
    return None


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
