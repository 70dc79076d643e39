"""What a checkpoint will hold: each tensor with its published name, shape and dtype, and the function that makes it.

Only shapes are computed here. A tensor is made when the writer asks for it.
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
    """A tensor of the output and the function that makes it, in float32 or in the dtype that it is stored in."""

    spec: TensorSpec
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class CheckpointPlan:
    """Everything that a checkpoint directory holds; `model` gives the generation config and may be on "meta"."""

    model: PreTrainedModel
    config: PreTrainedConfig
    tensors: list[Planned]


@dataclass(frozen=True)
class Source:
    """A tensor of the model before it has a name in the output.

    Attributes:
        shaped: A meta tensor of its shape.
        make: Returns the tensor.
        held: The tensor itself if the model holds it dense; tied weights are recognised by it.
        dtype: In the output, if the format fixes it (packed weights, block scales). None: the dtype of the export.
    """

    shaped: Tensor
    make: Callable[[], Tensor]
    held: Tensor | None = None
    dtype: torch.dtype | None = None


WeightSources = Callable[[AdaptedLinear | FrozenLinear], Mapping[str, Source]]
"""Layer -> the tensors that stand for its weight, by their names in the layer: "weight", "weight.absmax", ..."""


def plan_export(model: PreTrainedModel, dtype: torch.dtype, weights: WeightSources | None = None) -> CheckpointPlan:
    """Plan the checkpoint of a model in memory.

    Args:
        model: With adapted layers or without.
        dtype: For all float tensors whose source does not fix one.
        weights: The tensors of an adapted or frozen layer (default: one dense `weight`).
    """
    return plan_sources(model, dict(_sources(model, weights or dense_weight_sources)), dtype)


def plan_sources(model: PreTrainedModel, sources: Mapping[str, Source], dtype: torch.dtype) -> CheckpointPlan:
    """Plan a checkpoint of tensors that need not be in the model.

    Tensors are in the order of `sources`, under the names of the model's published checkpoints. Tied weights are listed
    once if the config ties them. A head that got a weight of its own (it was quantised or adapted) is listed, and the
    config no longer ties it.

    Args:
        model: For names and config; may be on "meta".
        sources: Name in the model -> tensor.
        dtype: For all float tensors whose source does not fix one.
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
    return CheckpointPlan(model, config, planned)


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
    """One dense weight: merged, dequantised, or as the layer holds it."""
    if isinstance(layer, FrozenLinear) and isinstance(layer.stored_weight, Tensor):
        return {"weight": held(layer.stored_weight)}
    shaped = torch.empty(layer.out_features, layer.in_features, dtype=torch.float32, device="meta")
    if isinstance(layer, AdaptedLinear):
        return {"weight": Source(shaped, lambda: layer.merged_weight(layer.base.wide_dtype))}
    return {"weight": Source(shaped, lambda: layer.dequantized(layer.wide_dtype))}


def held(tensor: Tensor) -> Source:
    """The source of a tensor that is written as the model holds it."""
    return Source(tensor.to("meta"), lambda: tensor, tensor)


def _same_memory(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()


def _checkpoint_names(model: PreTrainedModel, shaped: dict[str, Tensor]) -> dict[str, str]:
    """Module name -> name in the model's published checkpoints.

    transformers renames some tensors on loading; other programs expect the published names. If the published form
    stacks or splits tensors, the module's names stay: transformers reads those, too.
    """
    by_identity = {id(tensor): name for name, tensor in shaped.items()}
    stored = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(shaped)).items()}
    if stored.keys() != by_identity.keys():
        return {name: name for name in shaped}
    return {name: stored[id(tensor)] for name, tensor in shaped.items()}


def _plain_config(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedConfig:
    """The config of a dense model in `dtype`: without quantisation, with the name of the architecture."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for part in [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        part.dtype = str(dtype).removeprefix("torch.")
    return config
