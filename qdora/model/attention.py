"""Which implementation of attention a model gets: the fastest one that computes what the model needs.

transformers passes a soft-cap or sinks to any implementation, and some releases let one that knows neither drop them
without a word: 5.0 to 5.18 run Gemma 2 with sdpa, and its logits are off by a fifth of their range.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal

from qdora.errors import UserError
from qdora.model.source import library_reason

log = logging.getLogger("qdora")

ATTENTION_KINDS = ("auto", "sdpa", "eager", "flash_attention_2")

# attn_logit_softcapping of Gemma 2; the cap of the output head (final_logit_softcapping) is another thing.
_SOFTCAP = re.compile(r"(attn|attention)\w*soft_?cap")
_SINKS = re.compile(r"(^|_)sinks?(_|$)")
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)  # Ampere
"""What kernels of flash attention need, torch's and those of flash-attn."""
_FLASH_HEAD = 256  # features of a head: the most that flash-attn takes
_SOFTCAP_SINCE = "2.6.0"  # of flash-attn

BAD_CONFIG = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers raises for a config with values that no model has: sizes below 0 or of 10^12, text for numbers."""

Build = Callable[[str | None], PreTrainedModel]
"""Builds a model with an implementation of attention; None: transformers' choice. One of `BAD_CONFIG` if the model
does not have it."""


@dataclass(frozen=True)
class Need:
    """What a model's attention needs beyond softmax(scale * Q K^T + mask) V, and the kinds that compute it."""

    what: str
    computed_by: tuple[str, ...]


def softcap_of(config: PreTrainedConfig) -> Need | None:
    """The cap of the attention scores that the language part of a config sets."""
    for key, value in config.get_text_config().to_dict().items():
        if _SOFTCAP.search(key) and isinstance(value, int | float) and value:
            flash = is_flash_attn_2_available() and is_flash_attn_greater_or_equal(_SOFTCAP_SINCE)
            return Need(
                f"soft-caps its scores ({key} {value:g})", ("eager", "flash_attention_2") if flash else ("eager",)
            )
    return None


def sinks_of(model: nn.Module) -> Need | None:
    """The trained logits that a model's attention adds to the softmax (gpt-oss), by the names of its parameters."""
    for name, _ in model.named_parameters():
        if any(map(_SINKS.search, name.split(".")[-2:])):
            return Need(f"has sinks ({name})", ("eager",))
    return None


def with_attention(
    build: Build, config: PreTrainedConfig, asked: str, *, name: str, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Build a model with the attention that model.attention asks for; `auto` is chosen by what the model needs. Logged.

    auto takes flash_attention_2 where it is installed and the GPU has its kernels, else transformers' choice (sdpa
    where the model has it), and eager in place of either where it does not compute a soft-cap or sinks.
    """

    def attempt(choice: str | None) -> PreTrainedModel:
        try:
            return build(choice)
        except BAD_CONFIG as error:
            raise UserError(f"model: {name}: cannot be built: {library_reason(error)}") from error

    cap = softcap_of(config)
    choice = None if cap is None else "eager"
    why = "transformers' choice for it"
    flash = asked == "auto" and device.type == "cuda" and is_flash_attn_2_available() and not _no_flash(device, dtype)
    if asked != "auto":
        _check(asked, cap, name)
        reason = _no_flash(device, dtype) if asked == "flash_attention_2" and device.type == "cuda" else None
        if reason is not None:
            others = "auto or eager" if cap is not None else "auto, sdpa or eager"
            raise UserError(f"model.attention: got flash_attention_2, which {reason}; must be {others}.")
        model, why = attempt(asked), "as model.attention asks"
        unfit = unfit_for_flash(model) if asked == "flash_attention_2" else None
        if unfit is not None:
            raise UserError(f"model.attention: got flash_attention_2, but {name} {unfit}; must be auto or eager.")
    elif flash and (cap is None or "flash_attention_2" in cap.computed_by):
        try:
            model, why = build("flash_attention_2"), "which is installed"
        except BAD_CONFIG as error:
            model = attempt(choice)
            log.info("%s has no flash_attention_2 (%s).", name, library_reason(error))
        else:
            unfit = unfit_for_flash(model)
            if unfit is not None:
                model = attempt(choice)
                log.info("%s is not run with flash_attention_2: it %s.", name, unfit)
    else:
        model = attempt(choice)
    need = cap or sinks_of(model)
    if need is not None and asked != "auto":
        _check(asked, need, name)
    elif need is not None and model.config._attn_implementation not in need.computed_by:
        model = attempt("eager")
    chosen = str(model.config._attn_implementation)
    if need is not None and chosen == "eager" != asked:
        why = f"since its attention {need.what}, which sdpa does not compute"
    (log.debug if need is None else log.info)("Attention of %s: %s, %s.", name, chosen, why)
    return model


def unfit_for_flash(model: PreTrainedModel) -> str | None:
    """Why a model must not run with flash_attention_2, though transformers built it so; None if it may.

    GPT-Neo's own class for it leaves out the windows of its local layers. Falcon's fails with ALiBi, and in float32,
    in which exports are checked. flash-attn refuses heads of more than 256 features in the first forward pass (the
    global layers of Gemma 4).
    """
    if not model._can_set_attn_implementation():
        return "has a class of its own for each attention"
    widest = max(
        (size for module in model.modules() if isinstance(size := getattr(module, "head_dim", 0), int)), default=0
    )
    return f"has heads of {widest} features, more than the 256 of flash-attn" if widest > _FLASH_HEAD else None


def _no_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn has no kernel for a GPU and dtype, which transformers does not ask; None if it has one."""
    capability = torch.cuda.get_device_capability(device)
    if capability < FLASH_CAPABILITY:
        return "needs a GPU of compute capability {}.{} or more, and this one has {}.{}".format(
            *FLASH_CAPABILITY, *capability
        )
    if dtype not in FLASH_DTYPES:
        return f"has no kernels for {str(dtype).removeprefix('torch.')} (model.dtype)"
    return None


def _check(asked: str, need: Need | None, name: str) -> None:
    if need is not None and asked not in need.computed_by:
        raise UserError(
            f"model.attention: got {asked}, but the attention of {name} {need.what}, which {asked} does not compute; "
            f"must be auto or {' or '.join(need.computed_by)}."
        )


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model: the config itself if it has no such part."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions_of(config: Any) -> int | None:
    """The most tokens that the positions of a config's model allow, or None where it sets no limit."""
    length = getattr(text_config(config), "max_position_embeddings", None)
    return int(length) if length and length > 0 else None


def context_length(model: nn.Module) -> int | None:
    """`positions_of` the model's config."""
    return positions_of(getattr(model, "config", None))


def vocabulary_size(model: nn.Module) -> int:
    """Width of the logits; 65,536 where the config does not say."""
    return int(getattr(text_config(getattr(model, "config", None)), "vocab_size", 2**16))


def attention_of(model: nn.Module) -> str | None:
    """transformers' name of the attention implementation, such as sdpa; None without one."""
    name: str | None = getattr(text_config(getattr(model, "config", None)), "_attn_implementation", None)
    return name
