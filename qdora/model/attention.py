"""Attention: the fastest implementation that computes what a model needs, and its masks without reading from a GPU.

Besides: models that read the weights of their layers themselves.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.utils import is_flash_attn_2_available

from qdora.adapter.layer import AdaptedLinear, FrozenLinear, own_class
from qdora.data.batches import Packing
from qdora.errors import UserError
from qdora.quant.kernels import device_kind

FLASH = "flash_attention_2"
# attn_logit_softcapping of Gemma 2; final_logit_softcapping is of the output head.
_SOFTCAP = re.compile(r"(attn|attention)\w*soft_?cap")
_SINKS = re.compile(r"[._]sinks?(?![^._])[^.]*(\.[^.]*)?$")
# What the flash kernels need, torch's and those of flash-attn.
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_CAPABILITY = (8, 0)  # Ampere
_FLASH_HEAD = 256  # features of a head: the most that flash-attn takes


def softcap_of(config: PreTrainedConfig) -> str | None:
    """The setting of a config that caps the scores of its attention."""
    settings = config.get_text_config().to_dict().items()
    return next(
        (key for key, value in settings if _SOFTCAP.search(key) and isinstance(value, int | float) and value),
        None,
    )


def with_attention(
    build: Callable[[str | None], PreTrainedModel],
    config: PreTrainedConfig,
    asked: str,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Build a model with the attention that model.attention asks for; `build(None)` takes transformers' choice.

    auto takes eager where scores are capped or have sinks, which other kinds may drop without a word, else
    flash_attention_2 where it is installed and fits, else transformers' choice.
    """
    need, model = softcap_of(config), None
    has_flash = device.type == "cuda" and is_flash_attn_2_available() and dtype in _FLASH_DTYPES
    has_flash = has_flash and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
    if has_flash and (asked == FLASH or (asked == "auto" and need is None)):
        with suppress(ValueError):  # transformers has no flash attention for this model
            model = build(FLASH)
    if model is None or not _fits_flash(model):
        if asked == FLASH:
            raise UserError(f"model.attention: {FLASH} does not fit {name}, its dtype or this device.")
        model = build(asked if asked != "auto" else None if need is None else "eager")
    need = need or next((name for name, _ in model.named_parameters() if _SINKS.search(name)), None)
    if need is not None and attention_of(model) != "eager":
        if asked != "auto":
            raise UserError(
                f"model.attention: must be auto or eager for {name}, which has {need} (got {asked})."
            )
        model = build("eager")
    return model


def _fits_flash(model: PreTrainedModel) -> bool:
    """False where flash attention fails, or computes something else although transformers built it."""
    # GPT-Neo's own class for it leaves out the windows of its local layers; Falcon's fails with ALiBi. Without further
    # arguments the lengths of packed examples would not reach the layers.
    arguments = inspect.signature(model.forward).parameters.values()
    if not model._can_set_attn_implementation() or all(each.kind is not each.VAR_KEYWORD for each in arguments):
        return False
    sizes = (getattr(module, "head_dim", 0) for module in model.modules())
    return all(size <= _FLASH_HEAD for size in sizes if isinstance(size, int))


def text_config(model: Any) -> Any:
    """The config of the text model, of a model or a config; without one the model itself."""
    config = getattr(model, "config", model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: Any) -> int | None:
    """The most tokens that the positions of a model, or of a config's model, allow; None: no limit."""
    length = getattr(text_config(model), "max_position_embeddings", None)
    return int(length) if length and length > 0 else None


def attention_of(model: nn.Module) -> str | None:
    """transformers' name of the attention implementation, such as sdpa; None without one."""
    name: str | None = getattr(text_config(model), "_attn_implementation", None)
    return name


@contextmanager
def replaced(module: ModuleType, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the function of that name is `make(function)`, if the module has it."""
    before = getattr(module, name, None)
    if before is not None:
        setattr(module, name, make(before))
    try:
        yield
    finally:
        if before is not None:
            setattr(module, name, before)


def fast_grouped_attention() -> AbstractContextManager[None]:
    """Inside, sdpa repeats keys and values where torch's flash kernel does not run.

    That is on CUDA in float32, and below compute capability 8.0 in any dtype. A plan takes this machine's GPU, if any.
    """
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability(None) < _FLASH_CAPABILITY
    dtypes = () if is_old else _FLASH_DTYPES

    def leaves_to_torch(ask: Callable[..., bool], mask: Tensor | None, key: Tensor, *rest: Any) -> bool:
        return (device_kind(key.device) != "cuda" or key.dtype in dtypes) and ask(mask, key, *rest)

    return replaced(sdpa_attention, "use_gqa_in_sdpa", lambda ask: partial(leaves_to_torch, ask))


_PACKED: ContextVar[bool] = ContextVar("packed_mask_is_known", default=False)


@contextmanager
def known_masks(model: nn.Module, packing: Packing | None, device: torch.device) -> Iterator[None]:
    """Inside, `model` makes the masks of one micro-batch on a GPU without reading from it; on a CPU nothing changes.

    For sdpa and flash attention; packed rows of the latter must have `flash_inputs`. `packing` is that of the rows, on
    the device; None if each row is an example, padded on the right.
    """
    if device.type == "cpu":
        yield
        return

    def no_mask(*_args: Any, **_kwargs: Any) -> None:
        return None

    with ExitStack() as stack:
        attention = attention_of(model)
        is_known = attention in ("sdpa", FLASH)
        if is_known or packing is None:
            # In the modules of models with convolutions, linear attention or Mamba layers.
            module = sys.modules[own_class(model).__module__]
            stack.enter_context(replaced(module, "create_recurrent_attention_mask", lambda _before: no_mask))
        if is_known and attention is not None:
            make = ALL_MASK_ATTENTION_FUNCTIONS[attention]
            if packing is None:
                ours: Callable[..., Any] = partial(_without_padding, make)
                # By which flash attention finds packed examples.
                utils = modeling_flash_attention_utils
                stack.enter_context(replaced(utils, "_is_packed_sequence", lambda _before: no_mask))
            elif attention == FLASH:
                ours = no_mask
            else:
                ours = partial(_within_examples, make, packing.position_ids, packing.example_index)
            ALL_MASK_ATTENTION_FUNCTIONS[attention] = ours
            stack.callback(ALL_MASK_ATTENTION_FUNCTIONS.__delitem__, attention)
            stack.callback(_PACKED.reset, _PACKED.set(packing is not None))
            stack.enter_context(fast_grouped_attention())
        yield


def packed_mask_is_known() -> bool:
    """Whether the mask of packed rows is at hand, so that the inputs' mask is not looked at."""
    return _PACKED.get()


def takes_flash_lengths(model: nn.Module) -> bool:
    """Whether the model attends by flash attention, to which it hands the lengths of packed examples on."""
    return attention_of(model) == FLASH


def flash_starts(position_ids: Tensor) -> Tensor:
    """Starts of the examples of a packed row, and its end, (examples + 1,) int32.

    `position_ids` (1, length) int64 on the CPU count from 0 in each example.
    """
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    return torch.cat([starts, torch.tensor([position_ids.shape[1]])]).to(torch.int32)


def flash_inputs(starts: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """The inputs by which transformers hands `flash_starts` and the longest example's length on to each layer.

    Without them each layer finds both by the positions, which the host reads from the GPU. `starts` are on the model's
    device, `position_ids` on the CPU.
    """
    longest = int(position_ids.max()) + 1
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


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
    """A mask by positions in the example, as windows count them, among the tokens of one example."""

    def within(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = mask_function(batch, head, position_ids[batch, query], position_ids[batch, key])
        return seen & (example_index[batch, query] == example_index[batch, key])

    options = {"mask_function": within, "attention_mask": None, "allow_is_causal_skip": False}
    return make(*args, **kwargs | options)


@contextmanager
def weights_unread(model: nn.Module) -> Iterator[None]:
    """Raise a UserError where the model reads the weight of an adapted or frozen layer itself, as Mamba does."""
    try:
        yield
    except AttributeError as error:
        path = next((path for path, each in model.named_modules() if each is error.obj), "")
        if error.name != "weight" or not isinstance(error.obj, AdaptedLinear | FrozenLinear):
            raise
        fix = f"Fix: name {path.rpartition('.')[2]} in base.skip and leave it out of adapter.targets."
        raise UserError(f"adapter.targets: this model reads the weight of {path} itself. {fix}") from None
