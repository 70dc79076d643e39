"""Putting adapters on the linear layers of a model, and finding adapted and frozen layers."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from qdora.adapter.experts import AdaptedExperts, BareExperts, ExpertLinear, FrozenExperts
from qdora.adapter.layer import AdaptedLinear, FrozenLinear, Init, Kind, is_plain_linear
from qdora.adapter.rows import RowHead
from qdora.errors import UserError, refuse
from qdora.model.experts import routers
from qdora.quant.packed import mask_from_bits
from qdora.quant.tiles import Weight

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
"""Stands for the output head, under any name, in a list of layers to skip."""
EXPERTS = "experts"
"""Stands for all stacks of experts in a list of layers."""


def inject(
    model: nn.Module,
    *,
    kind: Kind = "dora",
    rank: int = 16,
    alpha: float = 32.0,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    rank_pattern: Mapping[str, int] | None = None,
    same_scaling: bool = False,
    expert_rank: int | None = None,
    init: Init = "kaiming",
    dtype: torch.dtype = torch.float32,
    masked: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, AdaptedLinear]:
    """Replace linear layers of `model` by adapted ones, in place; everything else is frozen. Returns path -> layer.

    `targets`: "all-linear" (all but the output head and routers), or names: the last part of a module's path
    ("q_proj"), "experts" for all stacks of experts, or a pattern over the whole path ("model.layers.3.*.q_proj").
    `rank_pattern`: name or pattern -> rank; the longest matching key wins. `expert_rank`: of the stacks that no pattern
    matches. `same_scaling`: layers of another rank get the alpha that gives them the scaling of `rank`.
    """
    linear = linear_layers(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if patterns == [ALL_LINEAR]:
        # GPT-NeoX calls its head embed_out.
        chosen = {
            name: module for name, module in linear.items() if module is not head and not matches(name, HEAD)
        }
        if not chosen:
            raise UserError("adapter.targets: this model has no linear layer.")
    else:
        check_matches("adapter.targets", patterns, linear)
        chosen = {name: module for name, module in linear.items() if any(matches(name, p) for p in patterns)}
    rank_pattern, ranks = rank_pattern or {}, {}
    check_matches("adapter.rank_pattern", rank_pattern, chosen, "adapted")
    for name, module in sorted(chosen.items(), key=lambda item: most_rank(item[1])):
        keys = sorted((p for p in rank_pattern if matches(name, p)), key=len)
        of_experts = expert_rank if isinstance(module, BareExperts) else None
        ranks[name] = rank_pattern[keys[-1]] if keys else of_experts or rank
        if ranks[name] > most_rank(module):
            raise UserError(
                f"adapter.rank: must be at most {most_rank(module)} for {name} (got {ranks[name]})."
            )
    if masked:
        check_masks(chosen, "adapter.mask")
    if expert_rank and not any(isinstance(each, BareExperts) for each in chosen.values()):
        raise UserError("adapter.experts: no target is an expert of this model.")
    adapted = {}
    for name, module in chosen.items():
        ratio = ranks[name] / rank if same_scaling else 1.0
        adapted[name] = adapted_layer(
            module,
            kind=kind,
            rank=ranks[name],
            alpha=alpha * (math.sqrt(ratio) if rank_stabilized else ratio),
            rank_stabilized=rank_stabilized,
            dropout=dropout,
            init=init,
            dtype=dtype,
            masked=masked,
            generator=generator,
        )
    put_layers(model, adapted)
    return adapted


def adapted_layer(module: nn.Module, **options: Any) -> AdaptedLinear:
    """The adapted layer of a linear layer or a stack of experts; `options` are those of AdaptedLinear."""
    if not isinstance(module, FrozenLinear):  # it shares the weight
        assert isinstance(module, nn.Linear | ExpertLinear)
        bias = None if module.bias is None else module.bias.detach()
        module = frozen_like(module, module.weight.detach(), bias)
    kind = AdaptedExperts if isinstance(module, FrozenExperts) else AdaptedLinear
    return kind(module, **options)


def put_layers(model: nn.Module, adapted: Mapping[str, AdaptedLinear]) -> None:
    """Put adapted layers at their paths, in the model's mode, and freeze everything else."""
    model.requires_grad_(False)
    for name, layer in adapted.items():
        layer.train(model.training)
        replace_module(model, name, layer)
    # DistributedDataParallel must not send the base, the same in every process, before each forward pass.
    kinds = FrozenLinear | AdaptedLinear
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    names = {
        f"{path}.{name}" for path, module in layers.items() for name, _ in module.named_buffers(recurse=False)
    }
    model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


def check_masks(chosen: Mapping[str, nn.Module], where: str) -> None:
    for name, layer in chosen.items():
        if getattr(layer, "keep_bits", None) is None:
            raise UserError(f"{where}: keep, but {name} was not pruned.")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> linear layer or stack of experts, without routers: those stay in their dtype, unquantised and frozen."""
    left_out, modules = routers(model), model.named_modules()
    return {name: module for name, module in modules if is_linear(module) and name not in left_out}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Path -> adapted layer, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear]:
    """Path -> frozen layer, in model order; the base of an adapted layer has the path `<layer>.base`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> trainable parameter, in model order, without gates, which have an optimizer of their own."""
    gates = {id(layer.gate) for layer in adapted_layers(model).values() if layer.gate is not None}
    return {
        name: each for name, each in model.named_parameters() if each.requires_grad and id(each) not in gates
    }


def keep_zeros_(weight: nn.Parameter, keep_bits: Tensor) -> None:
    """Keep the zeros of a pruned weight, (out, in), in training: they get no gradient, and `AdapterOptimizer` puts them
    back, since states of 8 bits move a parameter that has no gradient."""
    shape, held = (weight.shape[0], weight.shape[1]), cast(Any, weight)  # what follows has no types
    held.register_hook(lambda gradient: gradient * mask_from_bits(keep_bits, shape))
    held.put_zeros_back_ = lambda: weight.masked_fill_(~mask_from_bits(keep_bits, shape), 0)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def frozen_like(
    module: nn.Module, weight: Weight, bias: Tensor | None, keep_bits: Tensor | None = None
) -> FrozenLinear:
    if isinstance(module, BareExperts):
        return FrozenExperts(weight, module.num_experts, bias, keep_bits)
    return FrozenLinear(weight, bias, keep_bits)


def block_of(path: str) -> int | None:
    """Number of the block in a path: model.layers.3.self_attn.q_proj -> 3; None outside of the blocks."""
    found = re.search(r"\.(\d+)\.", path)
    return None if found is None else int(found[1])


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the last part of a module's path, the path, a matching shell pattern, or "experts" for
    a module in one of that name."""
    owner, _, last = name.rpartition(".")
    if pattern == EXPERTS and owner.rpartition(".")[2] == EXPERTS:
        return True
    return pattern in (last, name) or fnmatch.fnmatchcase(name, pattern)


def check_matches(where: str, patterns: Iterable[str], paths: Collection[str], what: str = "linear") -> None:
    """Refuse patterns of the setting `where` that match none of the `paths`, of `what` layers."""
    leaves = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
    refuse(
        [
            f"{where}: '{pattern}' matches no {what} layer; must be a path, a pattern, or {leaves}."
            for pattern in patterns
            if not any(matches(path, pattern) for path in paths)
        ]
    )


def most_rank(module: nn.Module) -> int:
    """The largest rank of an adapter on a linear layer or a stack of experts."""
    rows = getattr(module, "expert_features", None) or module.out_features
    return min(int(module.in_features), int(rows))  # type: ignore[arg-type]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, FrozenLinear | ExpertLinear) or is_plain_linear(module)


_DENSE_BYTES = 2  # 16 bits in a file, whatever this machine computes in


def model_size(model: nn.Module) -> dict[str, int]:
    """Weights of the linear layers without the output head, and bytes of these, the whole base and the adapter.

    Tied weights count once. Bytes include scales.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    while isinstance(head, RowHead | AdaptedLinear):
        head = head.base
    seen: set[tuple[Any, Any]] = set()

    def is_new(tensor: Tensor) -> bool:  # tied weights share their memory
        size, memory = len(seen), (tensor.untyped_storage()._cdata, tensor.storage_offset())
        seen.add(memory)
        return len(seen) > size

    weights = linear = other = adapter = 0
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            adapter += sum(p.nbytes for p in module.parameters(recurse=False))
        elif is_linear(module):
            assert isinstance(module, (FrozenLinear, ExpertLinear, nn.Linear))
            packed = module.packed_form if isinstance(module, FrozenLinear) else None
            count = module.out_features * module.in_features
            num_bytes = _DENSE_BYTES * count if packed is None else packed.num_bytes
            if module is not head:
                weights += count
                linear += num_bytes
            elif packed is not None or is_new(module.weight):  # type: ignore[arg-type]
                other += num_bytes
            other += 0 if module.bias is None else _DENSE_BYTES * module.bias.numel()
        else:
            kept = (b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set)
            own = [each for each in (*module._parameters.values(), *kept) if each is not None]
            other += sum(_DENSE_BYTES * each.numel() for each in own if is_new(each))
    return {
        "num_linear_weights": weights,
        "num_linear_bytes": linear,
        "num_base_bytes": linear + other,
        "num_adapter_bytes": adapter,
    }
