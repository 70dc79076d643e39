"""A model on fake tensors from its config alone: every tensor has its shape, dtype and component, and no memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qdora.model.decoder_blocks import block_list
from qdora.model.inject import replace_module
from qdora.model.load import Quantization, chosen_layers, is_wide, layers_to_quantize, skeleton, wide_names
from qdora.model.peft_config import AdapterLayout
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import tied_weights
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import PackedWeight, empty_packed
from qdora.ops.tiles import Weight
from qdora.plan.block_pattern import keep_blocks_
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.plan_contents import BASE, DENSE, MASKS, SCALES

_UNMASKED = "sdpa_without_padding"


def empty_model(config: PreTrainedConfig, source: ModelSource, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of a config with its parameters on the meta device; the config is left alone.

    Args:
        config: Of transformers.
        source: For messages, and whether code of the Hub may run.
        dtype: Of activations.
        attention: As in a recipe. flash_attention_2 needs a GPU and is planned as sdpa, which keeps the same tensors.
    Raises:
        UserError: Not a causal LM.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    planned = "sdpa" if attention == "flash_attention_2" else attention
    return skeleton(config, source, dtype, planned, torch.device("cpu"))


def fill_(
    model: PreTrainedModel, wanted: Quantization, dtype: torch.dtype, live: LiveBytes, *, pruned: bool = False
) -> None:
    """Put fake tensors in the place of the meta ones, as `load_model` puts real ones; within a FakeTensorMode.

    With `pruned` every linear layer that is not skipped has its mask, as behind `model.compress.Compression`.
    """
    layers = chosen_layers(model, wanted) if pruned else layers_to_quantize(model, wanted)
    whole = wanted.kind == "none"
    linear = {f"{name}.weight" for name, each in model.named_modules() if type(each) is nn.Linear} if whole else set()
    head: Any = model.get_output_embeddings()
    wide = wide_names(model, dtype)

    def empty(name: str, like: Tensor) -> Tensor:
        kept = torch.float32 if is_wide(name, wide) else dtype
        return torch.empty(like.shape, dtype=kept if like.is_floating_point() else like.dtype)

    for name in sorted(layers):
        module: Any = model.get_submodule(name)
        shape = tuple(module.weight.shape)
        with live.label(BASE):
            weight: Weight = (
                empty(f"{name}.weight", module.weight)
                if whole
                else empty_packed(wanted.kind, shape, wanted.block_size, wanted.double_quant)
            )
        if isinstance(weight, PackedWeight):
            live.register([tensor for part, tensor in weight.tensors().items() if part != "packed"], SCALES)
        with live.label(MASKS):
            bits = torch.empty(-(-shape[0] * shape[1] // 8), dtype=torch.uint8) if pruned else None
        with live.label(DENSE):
            bias = None if module.bias is None else empty(f"{name}.bias", module.bias)
        replace_module(model, name, FrozenLinear(weight, bias, bits))
    tied = tied_weights(model)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in tied:
            continue
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        with live.label(BASE if name in linear and module is not head else DENSE):
            made = empty(name, parameter)
        setattr(module, leaf, nn.Parameter(made, requires_grad=False))
    for target, origin in tied.items():
        module, leaf = model.get_submodule(target.rpartition(".")[0]), target.rpartition(".")[2]
        setattr(module, leaf, model.get_parameter(origin))
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not isinstance(module, FrozenLinear):
                with live.label(DENSE):
                    module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)


def shortened(
    config: PreTrainedConfig, source: ModelSource, dtype: torch.dtype, attention: str, kept: list[int] | None
) -> PreTrainedModel:
    """`empty_model` with only the blocks `kept`, or all of them."""
    model = empty_model(config, source, dtype, attention)
    found = block_list(model)
    if kept is not None and found is not None:
        keep_blocks_(model, found[0], kept)
    return model


def set_unmasked_(model: PreTrainedModel) -> None:
    """Let sdpa run without a mask, as it does where transformers sees that nothing is padded; fakes have no values.

    A sliding window shorter than the text has its mask all the same. Other implementations are left as they are.
    """
    if model.config.get_text_config()._attn_implementation == "sdpa":
        AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(_UNMASKED, _mask_of_window)
        model.set_attn_implementation(_UNMASKED)


def _mask_of_window(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    if local_size is None or kwargs["kv_length"] < local_size:
        return None
    mask: Tensor | None = sdpa_mask(*args, local_size=local_size, **kwargs)
    return mask


def ranks_of_adapter(
    layout: AdapterLayout, model: PreTrainedModel, blocks: str | None, kept: Sequence[int] | None
) -> dict[str, int]:
    """Path in a shortened model -> rank of the adapter that the layer has in the whole one, where it has one.

    Args:
        layout: Of an adapter that is there already.
        model: Shortened to the blocks `kept`, or whole.
        blocks: Path of its list of blocks.
        kept: Their numbers in the whole model, or None for all.
    """
    head = model.get_output_embeddings()
    ranks = {}
    for name, module in model.named_modules():
        original = name
        if blocks is not None and kept is not None and name.startswith(f"{blocks}."):
            index, dot, rest = name.removeprefix(f"{blocks}.").partition(".")
            original = f"{blocks}.{kept[int(index)]}{dot}{rest}"
        is_linear = isinstance(module, nn.Linear | FrozenLinear)
        if is_linear and layout.selects(original, is_linear=True, is_head=module is head):
            ranks[name] = layout.rank_of(original)
    return ranks
