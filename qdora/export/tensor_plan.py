"""What an exported checkpoint will hold: every tensor with its published name, shape and dtype, and how to make it.

Nothing is computed here but shapes; a tensor is made when the writer asks for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qdora.files.tensor_file import TensorSpec
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear


@dataclass(frozen=True)
class Planned:
    """A tensor of the output and how to get it, in float32 or in the dtype it is held in."""

    spec: TensorSpec
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """A tensor of the model to be exported.

    Attributes:
        shaped: A meta tensor of its shape.
        make: Returns it.
        held: The tensor itself where the model holds it dense; tied weights are recognised by it.
        dtype: Of the output where the format fixes it (packed weights, block scales), else None: the export's.
    """

    shaped: Tensor
    make: Callable[[], Tensor]
    held: Tensor | None = None
    dtype: torch.dtype | None = None


# The tensors that stand for a layer's weight, by their names in the layer: "weight", "weight.absmax", ...
WeightSources = Callable[[AdaptedLinear | FrozenLinear], Mapping[str, Source]]


def plan_export(
    model: PreTrainedModel, dtype: torch.dtype, weights: WeightSources | None = None
) -> tuple[list[Planned], PreTrainedConfig]:
    """All tensors of the output in model order under the names of the model's checkpoints, and its config.

    Tied weights are listed once where the config ties them; a head that got a weight of its own (it was quantised or
    adapted) is listed, and the config no longer ties it.

    Args:
        model: With adapted layers or without.
        dtype: Of all float tensors whose source does not fix one.
        weights: The tensors of an adapted or frozen layer; one dense `weight` if left out.
    """
    return plan_sources(model, dict(_sources(model, weights or dense_weight_sources)), dtype)


def plan_sources(
    model: PreTrainedModel, sources: Mapping[str, Source], dtype: torch.dtype
) -> tuple[list[Planned], PreTrainedConfig]:
    """As `plan_export`, for tensors that need not be in the model.

    Args:
        model: For names and config; may be on "meta".
        sources: Name in the model -> tensor, in the output's order.
        dtype: Of all float tensors whose source does not fix one.
    """
    config = _plain_config(model, dtype)
    redundant = set()
    for target, origin in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        first, second = sources.get(target), sources.get(origin)
        if first is None or second is None:
            continue
        if first.held is not None and second.held is not None and _same_memory(first.held, second.held):
            redundant.add(target)
        else:
            config.tie_word_embeddings = False
    names = _checkpoint_names(model, {name: source.shaped for name, source in sources.items() if name not in redundant})
    planned = []
    for name, stored_name in names.items():
        source = sources[name]
        kept = source.shaped.dtype if not source.shaped.is_floating_point() else source.dtype
        planned.append(Planned(TensorSpec(stored_name, kept or dtype, tuple(source.shaped.shape)), source.make))
    return planned, config


def _sources(model: nn.Module, weights: WeightSources) -> Iterator[tuple[str, Source]]:
    adapted: set[str] = set()
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        if isinstance(module, AdaptedLinear):
            adapted.add(f"{path}.base")
        elif isinstance(module, FrozenLinear):
            if path in adapted:
                continue
        else:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{dot}{name}", held(parameter.detach())
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield f"{dot}{name}", held(buffer)
            continue
        for name, source in weights(module).items():
            yield f"{dot}{name}", source
        bias = (module.base if isinstance(module, AdaptedLinear) else module).bias
        if bias is not None:
            yield f"{dot}bias", held(bias)


def dense_weight_sources(layer: AdaptedLinear | FrozenLinear) -> dict[str, Source]:
    """One dense weight: merged, dequantised, or as it is held."""
    if isinstance(layer, AdaptedLinear):
        return {"weight": Source(_meta(layer), lambda: layer.merged_weight(layer.base.wide_dtype))}
    dense = layer.stored_weight
    if isinstance(dense, Tensor):
        return {"weight": held(dense)}
    return {"weight": Source(_meta(layer), lambda: layer.dequantized(layer.wide_dtype))}


def held(tensor: Tensor) -> Source:
    """A tensor that the model holds as it is to be written."""
    return Source(tensor.to("meta"), lambda: tensor, tensor)


def _meta(layer: AdaptedLinear | FrozenLinear) -> Tensor:
    return torch.empty(layer.out_features, layer.in_features, dtype=torch.float32, device="meta")


def _same_memory(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()


def _checkpoint_names(model: PreTrainedModel, shaped: dict[str, Tensor]) -> dict[str, str]:
    """Module name -> name in the model's published checkpoints.

    transformers renames some tensors on loading; other programs expect the published names. Where the published
    form stacks or splits tensors, the module's own names stay: transformers reads those, too.
    """
    by_identity = {id(tensor): name for name, tensor in shaped.items()}
    stored = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(shaped)).items()}
    if stored.keys() != by_identity.keys():
        return {name: name for name in shaped}
    return {name: stored[id(tensor)] for name, tensor in shaped.items()}


def _plain_config(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedConfig:
    """The model's config as of a dense model in `dtype`: quantisation forgotten, architecture named."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for part in [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        part.dtype = str(dtype).removeprefix("torch.")
    return config
