"""Attention: the fastest implementation that computes what a model needs, and its masks without reading from a GPU.

transformers passes a soft-cap or sinks to any implementation, and some releases let one that knows neither drop them
without a word: 5.0 to 5.18 run Gemma 2 with sdpa, and its logits are off by a fifth of their range.

And two things that a model may do to its layers: change their outputs in place, and read their weights.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal

from qdora.adapter.layer import AdaptedLinear, FrozenLinear, evaluation_mode, own_class
from qdora.data.batches import Packing
from qdora.errors import UserError
from qdora.model.inject import adapted_layers
from qdora.model.source import library_reason
from qdora.quant.kernels import device_kind

log = logging.getLogger("qdora")

FLASH = "flash_attention_2"
# attn_logit_softcapping of Gemma 2; the cap of the output head (final_logit_softcapping) is another thing.
_SOFTCAP = re.compile(r"(attn|attention)\w*soft_?cap")
_SINKS = re.compile(r"(^|_)sinks?(_|$)")
# What kernels of flash attention need, torch's and those of flash-attn.
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_CAPABILITY = (8, 0)  # Ampere
_FLASH_HEAD = 256  # features of a head: the most that flash-attn takes
_SOFTCAP_SINCE = "2.6.0"  # of flash-attn


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
            return Need(f"soft-caps its scores ({key} {value:g})", ("eager", FLASH) if flash else ("eager",))
    return None


def _sinks_of(model: nn.Module) -> Need | None:
    """The trained logits that a model's attention adds to the softmax (gpt-oss), by the names of its parameters."""
    for name, _ in model.named_parameters():
        if any(map(_SINKS.search, name.split(".")[-2:])):
            return Need(f"has sinks ({name})", ("eager",))
    return None


def with_attention(
    build: Callable[[str | None], PreTrainedModel],
    config: PreTrainedConfig,
    asked: str,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Build a model with the attention that model.attention asks for; `auto` is chosen by what the model needs. Logged.

    `build(None)` takes transformers' choice. auto takes flash_attention_2 where it is installed and the GPU has its
    kernels, else transformers' choice (sdpa where the model has it), and eager in place of either where it does not
    compute a soft-cap or sinks.
    """
    cap = softcap_of(config)
    default = None if cap is None else "eager"
    kinds: list[str | None] = [default if asked == "auto" else asked]
    if device.type == "cuda" and asked in ("auto", FLASH) and is_flash_attn_2_available():
        no_flash = _no_flash(device, dtype)
        if asked == FLASH and no_flash is not None:
            raise UserError(f"model.attention: got {FLASH}, which {no_flash}; must be auto, sdpa or eager.")
        if asked == "auto" and no_flash is None and (cap is None or FLASH in cap.computed_by):
            kinds.insert(0, FLASH)
    faults = []
    for kind in kinds:
        try:
            model = build(kind)
            fault = _unfit_for_flash(model) if kind == FLASH else None
        except Exception as error:  # a config may hold anything
            fault = f"cannot be built: {library_reason(error)}"
        if fault is None:
            break
        faults.append(fault)
    else:
        raise UserError(f"model: {name}: {faults[-1]}")
    for fault in faults:
        log.info("%s is not run with %s: it %s.", name, FLASH, fault)
    need = cap or _sinks_of(model)
    if need is not None and model.config._attn_implementation not in need.computed_by:
        if asked != "auto":
            what = f"got {asked}, but the attention of {name} {need.what}, which {asked} does not compute"
            raise UserError(f"model.attention: {what}; must be auto or {' or '.join(need.computed_by)}.")
        try:
            model = build("eager")
        except Exception as error:
            raise UserError(f"model: {name}: cannot be built: {library_reason(error)}") from error
    why = "" if need is None else f", since its attention {need.what}"
    log.log(logging.INFO if why else logging.DEBUG, "Attention of %s: %s%s.", name, attention_of(model), why)
    return model


def _unfit_for_flash(model: PreTrainedModel) -> str | None:
    """Why a model must not run with flash_attention_2, though transformers built it so; None if it may.

    GPT-Neo's own class for it leaves out the windows of its local layers. Falcon's fails with ALiBi, and in float32,
    in which exports are checked. flash-attn refuses heads of more than 256 features in the first forward pass (the
    global layers of Gemma 4).
    """
    if not model._can_set_attn_implementation():
        return "has a class of its own for each attention"
    sizes = (getattr(module, "head_dim", 0) for module in model.modules())
    widest = max((size for size in sizes if isinstance(size, int)), default=0)
    return f"has heads of {widest} features, more than the 256 of flash-attn" if widest > _FLASH_HEAD else None


def _no_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn has no kernel for a GPU and dtype, which transformers does not ask; None if it has one."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLASH_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or more, and this one has {}.{}".format(*capability)
    if dtype not in _FLASH_DTYPES:
        return f"has no kernels for {str(dtype).removeprefix('torch.')} (model.dtype)"
    return None


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


@contextmanager
def replaced(module: ModuleType, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the function of that name is `make(function)`; a module without it, of another version, is unchanged."""
    before = getattr(module, name, None)
    if before is None:
        yield
        return
    setattr(module, name, make(before))
    try:
        yield
    finally:
        setattr(module, name, before)


def fast_grouped_attention() -> AbstractContextManager[None]:
    """Inside, sdpa repeats keys and values where torch's flash kernel does not run.

    That is on CUDA in float32, and on CUDA devices of a compute capability below 8.0 in any dtype; a plan for a GPU
    counts the same, for this machine's GPU if it has one, else for one of 8.0 or more. Elsewhere nothing changes.
    """
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability(None) < _FLASH_CAPABILITY
    dtypes = () if is_old else _FLASH_DTYPES

    def leaves_to_torch(ask: Callable[..., bool], mask: Tensor | None, key: Tensor, *rest: Any) -> bool:
        return (device_kind(key.device) != "cuda" or key.dtype in dtypes) and ask(mask, key, *rest)

    return replaced(sdpa_attention, "use_gqa_in_sdpa", lambda ask: partial(leaves_to_torch, ask))


_PACKED: ContextVar[bool] = ContextVar("packed_mask_is_known", default=False)


@contextmanager
def known_masks(model: nn.Module, packing: Packing | None, device: torch.device) -> Iterator[None]:
    """Inside, `model` makes its masks for one micro-batch on a GPU without reading from it; on a CPU nothing changes.

    This holds for sdpa, which keeps a fast kernel (`fast_grouped_attention`), and flash attention; packed rows of flash
    attention must have `flash_lengths`. Where a model allows a token more than the tokens before it, its padding stays
    masked. `packing` is that of the rows, on the device; None if each row is an example, padded on the right.
    """
    if device.type == "cpu":
        yield
        return

    def no_mask(*_args: Any, **_kwargs: Any) -> None:
        return None

    with ExitStack() as stack:
        attention = attention_of(model)
        lacks_lengths = packing is not None and attention == FLASH and not takes_flash_lengths(model)
        is_known = attention in ("sdpa", FLASH) and not lacks_lengths
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
    """Whether the mask of packed rows is at hand, so that an attention mask in the inputs only says: do not look."""
    return _PACKED.get()


def takes_flash_lengths(model: nn.Module) -> bool:
    """Whether the model attends by flash attention and hands the lengths of packed examples on to it."""
    forward = inspect.signature(model.forward).parameters.values()
    return attention_of(model) == FLASH and any(each.kind is each.VAR_KEYWORD for each in forward)


def flash_lengths(position_ids: Tensor) -> tuple[Tensor, int]:
    """Where the examples of one packed row begin, with its end, (examples + 1,) int32; and the longest one's tokens.

    For `flash_inputs`. Without them each layer finds both by the positions, which the host reads from the GPU.
    `position_ids` (1, length) int64 on the CPU count from 0 in each example.
    """
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    borders = torch.cat([starts, torch.tensor([position_ids.shape[1]])])
    return borders.to(torch.int32), int(borders.diff().max())


def flash_inputs(starts: Tensor, longest: int) -> dict[str, Any]:
    """The inputs by which transformers hands `flash_lengths` on to each layer; `starts` on the model's device."""
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
    """A mask by positions in the example, as windows count them, among the tokens of one example (or of padding)."""

    def within(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = mask_function(batch, head, position_ids[batch, query], position_ids[batch, key])
        return seen & (example_index[batch, query] == example_index[batch, key])

    options = {"mask_function": within, "attention_mask": None, "allow_is_causal_skip": False}
    return make(*args, **kwargs | options)


@torch.no_grad()
def keep_inplace_outputs_(model: PreTrainedModel) -> list[str]:
    """Let the adapted layers whose outputs the model changes in place keep a copy of them while they train.

    The gradient of a magnitude is read from the output, so it would be that of the changed one. One forward pass of a
    few tokens finds the layers, by torch's count of the changes of each tensor. Layers with a bias, which is added into
    another tensor, and LoRA need no copy. Returns the paths of the layers.
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
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device=model.device), use_cache=False)
    written = list(dict.fromkeys(path for path, output, version in outputs if output._version != version))
    for path in written:
        layers[path].keeps_copy = True
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
