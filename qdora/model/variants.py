"""The forms in which a trained model can leave, as functions of the model in memory: what each one computes.

Each adapted layer is replaced by a plain product with the dense weight that the form stands for, rounded as the form
rounds. So forms are compared without writing any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.model.checkpoint import StoredPacked
from qdora.model.export_nf4_lora import FOUR_BIT_KINDS, check_foldable
from qdora.model.export_streamed import OpenedMerge
from qdora.model.inject import adapted_layers, frozen_layers, replace_module
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import block_scales, dequantize, quantize

Layer = AdaptedLinear | FrozenLinear
Weight = Callable[[str, Layer], Tensor | None]
"""Path and layer -> dense weight (out, in), float32; None leaves the layer as it is."""
_KEPT_BYTES = 2 * 2**30
"""Dense weights of a form are kept up to this; beyond it each is made anew at every forward pass."""


@dataclass(frozen=True)
class Variant:
    """A form and what it computes; `weight` is None where it is not possible, for the reason `why_not`."""

    name: str
    weight: Weight | None
    why_not: str = ""


class _ComputedLinear(nn.Module):
    """y = x W^T + bias with a W that is made when it is needed."""

    def __init__(self, make: Callable[[], Tensor], bias: Tensor | None, keep: bool) -> None:
        super().__init__()
        self.make, self.keep = make, keep
        self.kept: Tensor | None = None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        weight = self.make() if self.kept is None else self.kept
        if self.keep:
            self.kept = weight
        bias = self.get_buffer("bias") if self._buffers["bias"] is not None else None
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@contextmanager
def computing(model: PreTrainedModel, weight: Weight) -> Iterator[None]:
    """Inside the block `model` computes what a form computes; afterwards it is as it was."""
    layers: Mapping[str, Layer] = _outer_layers(model)
    keep = sum(layer.in_features * layer.out_features * 4 for layer in layers.values()) <= _KEPT_BYTES
    replaced: dict[str, Layer] = {}

    def maker(path: str, layer: Layer, first: Tensor) -> Callable[[], Tensor]:
        waiting = [first] if keep else []

        def make() -> Tensor:
            made = waiting.pop() if waiting else weight(path, layer)
            assert made is not None
            return made

        return make

    try:
        for path, layer in layers.items():
            first = weight(path, layer)
            if first is None:
                continue
            bias = layer.base.bias if isinstance(layer, AdaptedLinear) else layer.bias
            replace_module(model, path, _ComputedLinear(maker(path, layer, first), bias, keep))
            replaced[path] = layer
            del first
        yield
    finally:
        for path, layer in replaced.items():
            replace_module(model, path, layer)


def _outer_layers(model: nn.Module) -> dict[str, Layer]:
    adapted = adapted_layers(model)
    bases = {f"{path}.base" for path in adapted}
    return {**adapted, **{path: layer for path, layer in frozen_layers(model).items() if path not in bases}}


def variants(model: PreTrainedModel, opened: OpenedMerge | None, dtype: torch.dtype) -> list[Variant]:
    """Every form of a LoRA or DoRA model.

    Args:
        model: The running model.
        opened: Its base and adapter on disk; None for a pruned base, which the source's weights are not.
        dtype: To which the merged weights are rounded.
    """

    def merged(path: str, layer: Layer) -> Tensor | None:
        return _rounded(layer.merged_weight(), dtype) if isinstance(layer, AdaptedLinear) else None

    def original(path: str, layer: Layer) -> Tensor | None:
        weight = None if opened is None else source_weight(opened, path)
        if weight is None:
            return None
        weight = weight.to(_device(layer))
        if isinstance(layer, AdaptedLinear):
            weight = layer.merged_weight(base=weight)
        return _rounded(weight, dtype)

    def requantized(path: str, layer: Layer) -> Tensor | None:
        if not isinstance(layer, AdaptedLinear):
            return None
        packed = layer.base.packed_weight
        if packed is None:
            return _rounded(layer.merged_weight(), dtype)
        again = quantize(layer.merged_weight(), packed.kind, packed.block_size, packed.nested is not None)
        return dequantize(again, torch.float32)

    try:
        check_foldable(model, torch.float32)
        why_not = ""
    except UserError as error:
        why_not = error.faults[0]
    if opened is None:
        no_source = "the base is pruned, and the source's own weights are not"
    elif opened.merge.quant.kind == "none" or any(isinstance(item, StoredPacked) for item in opened.stored.values()):
        no_source = "the source has no other weights than those that were trained on"
    else:
        no_source = ""
    four_bits = any(layer.kind in FOUR_BIT_KINDS for layer in frozen_layers(model).values())
    return [
        Variant("base", _base),
        Variant("merged", merged),
        Variant("original", None, no_source) if no_source else Variant("original", original),
        Variant("requantized", requantized) if four_bits else Variant("requantized", None, "the base is not in 4 bits"),
        Variant("nf4-lora", None, why_not) if why_not else Variant("nf4-lora", _nf4_lora),
    ]


def source_weight(opened: OpenedMerge, path: str) -> Tensor | None:
    """The source's own weight of a quantised layer, (out, in) float32; None where it is dense or packed there."""
    if path not in opened.quantized:
        return None
    item = opened.item(f"{path}.weight")
    value = None if item is None else item.read()
    return value.float() if isinstance(value, Tensor) else None


def _base(path: str, layer: Layer) -> Tensor | None:
    return layer.base.dequantized(torch.float32) if isinstance(layer, AdaptedLinear) else None


def _nf4_lora(path: str, layer: Layer) -> Tensor | None:
    """g in the block scales, and s (g B) A beside it, each rounded to float32 as in the files."""
    if not isinstance(layer, AdaptedLinear):
        return None
    packed = layer.base.packed_weight
    gain = layer.merged_gain()
    lora_b = layer.stored_B().float()
    if packed is None:
        base = layer.base.dequantized(torch.float32)
        base = base if gain is None else base * gain.unsqueeze(1)
    else:
        scales = block_scales(packed)
        if gain is not None:
            scales = (scales.reshape(layer.out_features, -1) * gain.unsqueeze(1)).reshape(-1)
        base = dequantize(replace(packed, absmax=scales, nested=None), torch.float32)
    factor = lora_b if gain is None else lora_b * gain.unsqueeze(1)
    return torch.addmm(base, factor, layer.lora_A.detach().float(), alpha=layer.scaling)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).float()


def _device(layer: Layer) -> torch.device:
    base = layer.base if isinstance(layer, AdaptedLinear) else layer
    return base.stored_weight.device


@dataclass(frozen=True)
class LayerError:
    """What quantising a layer's base changed against what was learnt on it, as Frobenius norms of the weights.

    Attributes:
        path: Of the layer.
        quantization_error: ||dequantised base - source|| / ||source||.
        update: ||merged - dequantised base|| / ||source||.
    """

    path: str
    quantization_error: float
    update: float

    @property
    def ratio(self) -> float:
        """Quantisation error over update: above 1 the rounding is larger than all that was learnt."""
        return self.quantization_error / self.update if self.update > 0 else float("inf")


@torch.no_grad()
def layer_errors(model: PreTrainedModel, opened: OpenedMerge) -> list[LayerError]:
    """Of every adapted layer whose source is at hand, the largest ratio first."""
    found = []
    for path, layer in adapted_layers(model).items():
        source = source_weight(opened, path)
        if source is None:
            continue
        base = layer.base.dequantized(torch.float32)
        source = source.to(base.device)
        size = float(source.norm())
        if size > 0:
            update = float((layer.merged_weight() - base).norm()) / size
            found.append(LayerError(path, float((base - source).norm()) / size, update))
    return sorted(found, key=lambda error: -error.ratio)
