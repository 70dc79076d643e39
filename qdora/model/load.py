"""Putting read tensors into a model, in the dtype and at the place that it keeps them.

Loading a frozen base: skeleton without weights, then tensor by tensor read, quantise, place.

Host memory holds the model as it will be used, and one tensor of the checkpoint beside it; a GPU likewise.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_flash_attn_2_available

from qdora.errors import UserError, nearest
from qdora.model.bnb_checkpoint import gather_packed, stored_kind
from qdora.model.gguf_file import check_gguf, open_gguf, settle_head
from qdora.model.inject import HEAD, matches, replace_module
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import (
    Stored,
    StoredPacked,
    iterate_tensors,
    match_to_model,
    open_safetensors,
    rename_to_model,
    shorten,
    tied_weights,
)
from qdora.nn.frozen_linear import FrozenLinear
from qdora.nn.host_embedding import HostEmbedding
from qdora.ops.codebooks import CODE_BITS, SIMULATED
from qdora.ops.packed import BLOCK_SIZES, KINDS, PackedWeight, quantize
from qdora.ops.tiles import Weight


def place_frozen(model: nn.Module, layer: str, weight: Weight, keep_bits: Tensor | None = None) -> FrozenLinear:
    """Put a frozen layer in the place of a linear one, whose bias it takes over, read or not."""
    bias = model.get_submodule(layer).bias
    frozen = FrozenLinear(weight, bias if isinstance(bias, Tensor) else None, keep_bits)
    replace_module(model, layer, frozen)
    return frozen


def place_dense(module: nn.Module, leaf: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    old = getattr(module, leaf)
    if isinstance(module, HostEmbedding):
        device = torch.device("cpu")
    elif leaf in module._buffers and not isinstance(module, FrozenLinear):
        dtype = old.dtype
    elif not value.is_floating_point():
        dtype = value.dtype
    # copy: the value may be a view of the file.
    placed = value.to(device=device, dtype=dtype, copy=True)
    setattr(module, leaf, nn.Parameter(placed, requires_grad=False) if leaf in module._parameters else placed)


def settle(model: PreTrainedModel, device: torch.device) -> None:
    """Tie what is tied, and move the buffers; to be called again when more is read."""
    for target, origin in tied_weights(model).items():
        _tie(model, target, origin)
    for module in model.modules():
        away = module.away if isinstance(module, FrozenLinear | HostEmbedding) else ()
        for name, buffer in module._buffers.items():
            if name not in away and buffer is not None and not buffer.is_meta and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def _tie(model: PreTrainedModel, target: str, origin: str) -> None:
    """Make two names one parameter, whichever of them was stored."""
    first, second = (model.get_submodule(name.rpartition(".")[0]) for name in (target, origin))
    target_leaf, origin_leaf = target.rpartition(".")[2], origin.rpartition(".")[2]
    if getattr(second, origin_leaf).is_meta:
        setattr(second, origin_leaf, getattr(first, target_leaf))
    else:
        setattr(first, target_leaf, getattr(second, origin_leaf))


def wide_names(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Parts of parameter names that the model wants in float32 when the rest is in `dtype`, as transformers does it."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return sorted(names)


def is_wide(name: str, wide: Sequence[str]) -> bool:
    """Whether a parameter is one of `wide_names`."""
    return any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in wide)


log = logging.getLogger("qdora")

QUANT_KINDS = (*KINDS, "none")
ATTENTION_KINDS = ("auto", "sdpa", "eager", "flash_attention_2")
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEFAULT_SKIP = (HEAD,)


@dataclass(frozen=True)
class Quantization:
    """How the linear layers are to be held: `kind` is one of `QUANT_KINDS`, none for dense in the compute dtype."""

    kind: str
    block_size: int
    double_quant: bool
    skip: tuple[str, ...]


class Placer(Protocol):
    """Reads the stored tensors of a model and puts them in; `place_all`, unless the base is compressed otherwise."""

    def __call__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, Stored],
        layers: set[str],
        wanted: Quantization,
        device: torch.device,
        compute_dtype: torch.dtype,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Args as of `place_all`; `layers` are all linear layers that are not skipped, also of a dense base."""


Reader = Callable[[ModelSource, PreTrainedModel], dict[str, Stored]]
"""Source and skeleton -> model name -> stored tensor, as `stored_tensors`."""


def load_model(
    source: ModelSource,
    *,
    quant: str,
    block_size: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] = DEFAULT_SKIP,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype = torch.bfloat16,
    attention: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    reader: Reader | None = None,
    placer: Placer | None = None,
    before_reading: Callable[[PreTrainedModel, torch.device], None] | None = None,
) -> PreTrainedModel:
    """Load a causal LM with frozen weights, every linear layer but the skipped ones quantised.

    A weight is quantised from the dtype of the file, without a rounding in between. Embeddings, norms, biases and
    skipped layers are kept in `compute_dtype` (in float32 where the model demands that). Tied weights stay tied.

    Args:
        source: From `resolve`.
        quant: One of `QUANT_KINDS`, "none" for a dense model; a checkpoint that is quantised already is taken as it is
            and must be of this kind.
        block_size, double_quant: For all but int8 and none, see `qdora.ops.packed.quantize`.
        skip: Layers left dense: last part of a module's path, whole path or shell pattern. "lm_head" means the output
            head whatever the model calls it.
        device: Where the weights go; quantised there.
        compute_dtype: Of everything that is not quantised.
        attention: "auto" takes flash_attention_2 on CUDA where it is installed, else transformers' choice.
        progress: Called after each tensor with (tensors done, tensors in all).
        reader: Finds the weights, where not in the source itself (model/base_cache.py).
        placer: How the tensors get into the model, where they are not only to be quantised (model/compress.py).
        before_reading: Called with the model and `device` when no weight has been read (memory/host_embedding.py).
    Returns:
        The model in eval mode, no parameter requiring a gradient, without `quantization_config` in its config.
    Raises:
        UserError: Settings, architecture or checkpoint that do not fit, all faults of a stage at once.
    """
    wanted = Quantization(quant, block_size, double_quant, tuple(skip))
    _check_settings(wanted, compute_dtype, attention)
    if quant in SIMULATED:
        log.info("%s is simulated: its codes of %d bits are held in 4.", quant, CODE_BITS[quant])
    config = load_config(source)
    kind = stored_kind(getattr(config, "quantization_config", None))
    if kind is not None:
        # What is loaded here is no transformers quantisation: with the entry the model would refuse to be saved.
        del config.quantization_config
    model = skeleton(config, source, compute_dtype, attention, torch.device(device))
    stored = (reader or stored_tensors)(source, model)
    layers = (layers_to_quantize if placer is None else chosen_layers)(model, wanted)
    packed = {name: item for name, item in stored.items() if isinstance(item, StoredPacked)}
    if packed or kind is not None:
        check_stored_packed(packed, kind, wanted, layers)
        layers = set()
    if before_reading is not None:
        before_reading(model, torch.device(device))
    (placer or place_all)(model, stored, layers, wanted, torch.device(device), compute_dtype, progress)
    finish(model, source, torch.device(device))
    return model


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The transformers config of a source; for a GGUF file made from its metadata."""
    try:
        if source.is_gguf:
            check_gguf(source.path)
            config = AutoConfig.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
            settle_head(source.path, config)
        else:
            config = AutoConfig.from_pretrained(str(source.path), trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.source: {source.name}: its config cannot be used: {_first_line(error)}") from error
    return config


def skeleton(
    config: PreTrainedConfig, source: ModelSource, dtype: torch.dtype, attention: str, device: torch.device
) -> PreTrainedModel:
    """The model with its parameters on the meta device; buffers are real, since no checkpoint holds all of them.

    Raises:
        UserError: Not a causal LM, or an attention it does not have.
    """
    choice = None if attention == "auto" else attention
    if attention == "auto" and device.type == "cuda" and dtype != torch.float32 and is_flash_attn_2_available():
        choice = "flash_attention_2"
    try:
        model = _empty(config, source, dtype, choice)
    except (ValueError, ImportError) as error:
        if attention != "auto" or choice is None:
            raise UserError(f"model: {source.name}: cannot be built: {_first_line(error)}") from error
        log.info("%s has no %s (%s).", source.name, choice, _first_line(error))
        model = _empty(config, source, dtype, None)
    log.info("Attention of %s: %s.", source.name, model.config._attn_implementation)
    return model


def _empty(config: PreTrainedConfig, source: ModelSource, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=source.trust_remote_code,
        )
    return model


def stored_tensors(source: ModelSource, model: PreTrainedModel) -> dict[str, Stored]:
    """Model name -> stored tensor, in the model's order; nothing is read yet. See `match_to_model` for what raises."""
    if source.is_gguf:
        return match_to_model(open_gguf(source.path, model), model)
    return match_to_model(rename_to_model(gather_packed(open_safetensors(source.path)), model), model)


def layers_to_quantize(model: PreTrainedModel, wanted: Quantization) -> set[str]:
    """Paths of the linear layers that are to be quantised; none for a dense base. Raises as `chosen_layers`."""
    return set() if wanted.kind == "none" else chosen_layers(model, wanted)


def chosen_layers(model: PreTrainedModel, wanted: Quantization) -> set[str]:
    """Paths of all linear layers that are not skipped.

    Raises:
        UserError: A skip pattern that matches nothing, a tied head that is not skipped, GPT-2's transposed layers.
    """
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    head = next((name for name, module in linear.items() if module is model.get_output_embeddings()), None)
    transposed = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    faults = []
    if transposed:
        faults.append(
            f"base: {model.config.model_type} keeps its weights transposed (Conv1D, e.g. "
            f"{transposed[0]}), which is not supported; allowed: base.quant: none with adapter.kind: full or none, or "
            "a model with ordinary linear layers (Llama, Qwen, Gemma, Mistral, Phi, ...)."
        )
    skipped = {name for name in linear if any(matches(name, pattern) for pattern in wanted.skip)}
    if HEAD in wanted.skip and head is not None:
        skipped.add(head)
    last_parts = sorted({name.rpartition(".")[2] for name in linear})
    faults.extend(
        f"base.skip: '{pattern}' matches no linear layer, allowed: {', '.join(last_parts)}, "
        f"or a path or pattern.{nearest(pattern, last_parts)}"
        for pattern in wanted.skip
        if pattern != HEAD and not any(matches(name, pattern) for name in linear)
    )
    shared = {name for pair in tied_weights(model).items() for name in pair}
    faults.extend(
        f"base.skip: {name} shares its weight with the embedding and cannot be quantised alone. Add '{name}'."
        for name in sorted(linear.keys() - skipped)
        if f"{name}.weight" in shared
    )
    if faults:
        raise UserError(*faults)
    # What a model keeps in float32 beside float16 is too sensitive for 4 bits as well.
    wide = wide_names(model, torch.float16)
    _report_experts(model)
    return {name for name in linear.keys() - skipped if not is_wide(f"{name}.weight", wide)}


def place_all(
    model: PreTrainedModel,
    stored: Mapping[str, Stored],
    layers: set[str],
    wanted: Quantization,
    device: torch.device,
    compute_dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read every stored tensor and put it into the model, those of `layers` quantised."""
    wide = wide_names(model, compute_dtype)
    for done, (name, value) in enumerate(iterate_tensors(stored), start=1):
        layer, _, leaf = name.rpartition(".")
        if isinstance(value, PackedWeight):
            place_frozen(model, layer, value.to(device))
        elif leaf == "weight" and layer in layers:
            packed = quantize(value.to(device), wanted.kind, wanted.block_size, wanted.double_quant, name=name)
            place_frozen(model, layer, packed)
            del packed
        else:
            dtype = torch.float32 if is_wide(name, wide) else compute_dtype
            place_dense(model.get_submodule(layer), leaf, value, device, dtype)
        # Dropped before the next read, or two tensors of the checkpoint would be in memory.
        del value
        if progress is not None:
            progress(done, len(stored))


def finish(model: PreTrainedModel, source: ModelSource, device: torch.device) -> None:
    """Settle and freeze; afterwards nothing may be left on the meta device."""
    settle(model, device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, f"never filled: {left[:5]}"
    if not source.is_gguf and (source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source.path))
    model.config._name_or_path = source.name
    model.eval()
    if device.type == "cuda":
        # The allocator keeps the freed 16-bit tensors; training's first allocations differ in size from them.
        torch.cuda.empty_cache()


def check_stored_packed(
    packed: Mapping[str, StoredPacked], kind: str | None, wanted: Quantization, layers: set[str]
) -> None:
    """Check that a checkpoint which is quantised already is what was asked for.

    Args:
        packed: Model name -> quantised weight.
        kind: What the checkpoint's config says.
        layers: Paths that would be quantised if the checkpoint were dense.
    Raises:
        UserError: Another kind, block size or double quantisation, or a layer that should have stayed dense.
    """
    kinds = sorted({item.kind for item in packed.values()}) or [str(kind)]
    if kinds != [wanted.kind]:
        raise UserError(
            f"base.quant: {wanted.kind!r}, but the checkpoint is quantised in {', '.join(kinds)} already and is used "
            f"as it is. Set base.quant: {kinds[0]}, or name the model in full precision."
        )
    faults: list[str] = []
    if wanted.kind != "int8":
        sizes = sorted({item.block_size for item in packed.values()} - {wanted.block_size})
        doubles = {item.double_quant for item in packed.values()} - {wanted.double_quant}
        faults.extend(f"base.block_size: {wanted.block_size}, but the checkpoint has {size}." for size in sizes)
        faults.extend(f"base.double_quant: {wanted.double_quant}, but the checkpoint has {held}." for held in doubles)
    named = {name.removesuffix(".weight") for name in packed}
    if wanted.skip != DEFAULT_SKIP:
        faults.extend(
            f"base.skip: {name} is to stay dense, but the checkpoint has it in {wanted.kind}."
            for name in sorted(named - layers)
        )
    if faults:
        raise UserError(*shorten(faults))
    dense = sorted(layers - named)
    if dense:
        log.info("%d linear layers are dense in the checkpoint and stay so, e.g. %s.", len(dense), dense[0])


def _check_settings(wanted: Quantization, compute_dtype: torch.dtype, attention: str) -> None:
    faults = []
    if wanted.kind not in QUANT_KINDS:
        faults.append(
            f"base.quant: {wanted.kind!r}, allowed: {', '.join(QUANT_KINDS)}.{nearest(wanted.kind, QUANT_KINDS)}"
        )
    if wanted.kind in CODE_BITS and wanted.block_size not in BLOCK_SIZES:
        faults.append(f"base.block_size: {wanted.block_size}, allowed: {', '.join(map(str, BLOCK_SIZES))}.")
    if attention not in ATTENTION_KINDS:
        faults.append(
            f"model.attention: {attention!r}, allowed: {', '.join(ATTENTION_KINDS)}."
            f"{nearest(attention, ATTENTION_KINDS)}"
        )
    if compute_dtype not in COMPUTE_DTYPES:
        faults.append(f"model.dtype: {compute_dtype}, allowed: bfloat16, float16, float32, float64.")
    if faults:
        raise UserError(*faults)


def _report_experts(model: PreTrainedModel) -> None:
    stacked = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 3}
    if stacked:
        share = sum(p.numel() for p in stacked.values()) / max(1, sum(p.numel() for p in model.parameters()))
        log.warning(
            "%d stacked expert weights (%.0f %% of the parameters, e.g. %s) are no linear layers and stay dense.",
            len(stacked),
            100 * share,
            next(iter(stacked)),
        )


def _first_line(error: BaseException) -> str:
    lines: list[Any] = str(error).strip().splitlines()
    return str(lines[0]) if lines else type(error).__name__
