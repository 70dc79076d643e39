"""What a model does otherwise for a while or for good: grouped heads without a flash kernel, masks known by the host,
and layers whose outputs it changes in place or whose weights it reads.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from qdora.adapter.layer import AdaptedLinear, FrozenLinear, evaluation_mode, own_class
from qdora.data.batches import Packing
from qdora.errors import UserError
from qdora.model.attention import FLASH_CAPABILITY, FLASH_DTYPES, attention_of
from qdora.model.inject import adapted_layers
from qdora.quant.kernels import device_kind


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


logger = logging.getLogger("qdora")

_ASKS = "use_gqa_in_sdpa"


def fast_grouped_attention() -> AbstractContextManager[None]:
    """Inside, sdpa repeats keys and values where torch's flash kernel does not run.

    That is on CUDA in float32, and on CUDA devices of a compute capability below 8.0 in any dtype; a plan for a GPU
    counts the same, for this machine's GPU if it has one, else for one of 8.0 or more. Elsewhere nothing changes.
    """
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability(None) < FLASH_CAPABILITY
    dtypes = () if is_old else FLASH_DTYPES
    return replaced(sdpa_attention, _ASKS, lambda ask: partial(_leaves_to_torch, ask, dtypes))


def _leaves_to_torch(
    ask: Callable[..., bool], dtypes: tuple[torch.dtype, ...], mask: Tensor | None, key: Tensor, *rest: Any
) -> bool:
    """Whether torch repeats the keys: where transformers says so, but on CUDA only in `dtypes`, which the flash kernel
    takes."""
    return (device_kind(key.device) != "cuda" or key.dtype in dtypes) and ask(mask, key, *rest)


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
    unpacked = (
        replaced(modeling_flash_attention_utils, _FINDS_PACKED, lambda _before: _none)
        if packing is None
        else nullcontext()
    )
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
    return replaced(sys.modules[own_class(model).__module__], _RECURRENT, lambda _before: _none)


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


_NUM_TOKENS = 4


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
