"""Export a trained QDoRA model in 4 bits without loss: the gain goes into the block scales, the rest is plain LoRA.

    y = g (x W^T + s (x A^T) B^T) + bias = x (g W)^T + s (x A^T) (g B)^T + bias

If no block of W crosses from one row into the next, g W has the same 4-bit codes as W, and the block scales of row i
times g_i. So the model becomes a bitsandbytes checkpoint and a LoRA adapter of the same rank, which any program that
serves QLoRA can run. Each scale and each entry of g B is rounded once, to float32.

The scales are written in float32: double quantisation would round each of them to 8 bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.experts import FrozenExperts
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.adapter.rows import RowHead
from qdora.errors import UserError
from qdora.export.checkpoint_writer import Source, WriteOptions, checkpoint_directory, dense_weight_sources, plan_export
from qdora.files.atomic import json_bytes
from qdora.files.tensor_file import write_tensors
from qdora.model.adapter_file import CONFIG_FILE, WEIGHTS_FILE, adapter_config, factor_tensors
from qdora.model.checkpoint import load_faults, quantization_config, shorten, taken_for_experts
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.multimodal import all_paths, linear_not_loaded
from qdora.model.source import ADAPTER_DIRECTORY
from qdora.quant.bnb import FOUR_BIT_KINDS, to_bnb_state
from qdora.quant.packed import PackedWeight, block_scales, with_nested_scales


@dataclass
class _Folding:
    """The gain of each layer, computed once, and the error that double quantisation would cause in its scales."""

    dtype: torch.dtype
    gains: dict[int, Tensor | None] = field(default_factory=dict)
    scale_errors: dict[int, float] = field(default_factory=dict)

    def gain(self, layer: AdaptedLinear) -> Tensor | None:
        """(out,) float32, of experts (experts, out), or None for LoRA."""
        if id(layer) not in self.gains:
            gain = layer.merged_gain()
            self.gains[id(layer)] = None if gain is None else gain.float()
        return self.gains[id(layer)]

    def weight_sources(self, layer: AdaptedLinear | FrozenLinear) -> Mapping[str, Source]:
        """The tensors of a layer's scaled base."""
        base = layer.base if isinstance(layer, AdaptedLinear) else layer
        adapted = layer if isinstance(layer, AdaptedLinear) and layer.magnitude is not None else None
        packed = base.packed_weight
        if packed is None:
            if adapted is None:
                return dense_weight_sources(base)
            shaped = torch.empty(base.out_features, base.in_features, device="meta")
            rows = partial(self._scaled_rows, base, adapted) if isinstance(base, FrozenExperts) else None
            return {"weight": Source(shaped, lambda: self._scaled(base.dequantized(torch.float32), adapted), rows=rows)}
        unnested = replace(packed, absmax=torch.empty(packed.absmax.shape, device="meta"), nested=None)
        state = to_bnb_state(unnested, self.dtype)

        # Read again when it is written: by then, the tensors of a streamed block hold another block.
        def packed_now() -> PackedWeight:
            weight = base.packed_weight
            assert weight is not None
            return weight

        def scales() -> Tensor:
            packed = packed_now()
            return block_scales(packed) if adapted is None else self._scaled_blocks(packed, adapted)

        makers: dict[str, Callable[[], Tensor]] = {
            "weight": lambda: packed_now().packed.view(state["weight"].shape),
            "weight.absmax": scales,
        }
        return {
            name: Source(tensor.to("meta"), makers.get(name, tensor.detach), dtype=tensor.dtype)
            for name, tensor in state.items()
        }

    def _scaled_rows(self, base: FrozenExperts, layer: AdaptedLinear, rows: slice) -> Tensor:
        return self._scaled(base.dequantized_rows(rows, torch.float32), layer, rows)

    def _scaled(self, weight: Tensor, layer: AdaptedLinear, rows: slice = slice(None)) -> Tensor:
        gain = self.gain(layer)
        assert gain is not None  # DoRA
        return weight * gain.reshape(-1, 1)[rows]  # not in place: a dense weight is the model's own

    def _scaled_blocks(self, packed: PackedWeight, layer: AdaptedLinear) -> Tensor:
        rows = block_scales(packed).reshape(layer.out_features, -1)
        scaled = self._scaled(rows, layer).reshape(-1)
        again = block_scales(with_nested_scales(replace(packed, absmax=scaled, nested=None)))
        self.scale_errors[id(layer)] = float((again - scaled).norm() / scaled.norm().clamp_min(1e-30))
        return scaled


def export_nf4_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    published_as: str | None = None,
    **options: Unpack[WriteOptions],
) -> dict[str, Any]:
    """Write a bitsandbytes checkpoint of the scaled base, and the LoRA that belongs on it under `adapter/`.

    The adapter is in PEFT's format with use_dora off: lora_A as it is stored, lora_B = g B in float32.

    Args:
        model: LoRA or DoRA on an nf4 or fp4 base. Not changed.
        tokenizer, out_dir, options: See `checkpoint_directory`.
        dtype: For what is not quantised (embeddings, norms, head), and for the products of bitsandbytes. None: the
            model's own, which rounds nothing.
        published_as: Hub id that `out_dir` will have, for the adapter's file. None: the file names no base, since a
            path would be wrong as soon as the directory is moved.
    Returns: What was written, for export.json. `scale_error_if_double_quantised` is ||change of the scales|| /
        ||scales|| if the scales were stored in 8 bits, over the layers with a gain: mean, maximum, and its layer.
    Raises UserError, RunFailure: See `check_foldable` and `checkpoint_directory`.
    """
    start = time.perf_counter()
    dtype = dtype or model.dtype
    check_foldable(model, dtype)
    layers = adapted_layers(model)
    folding = _Folding(dtype)
    plan = plan_export(model, dtype, folding.weight_sources)
    first = next(layer for layer in frozen_layers(model).values() if layer.kind in FOUR_BIT_KINDS)
    plan.config.quantization_config = quantization_config(
        first.kind, double_quant=False, dtype=dtype, dense=_dense_layers(model)
    )
    with checkpoint_directory(plan, tokenizer, out_dir, **options) as (directory, written):
        num_adapter_bytes = _write_lora(directory / ADAPTER_DIRECTORY, model, folding, published_as)
    lost = {
        path: folding.scale_errors[id(layer)] for path, layer in layers.items() if id(layer) in folding.scale_errors
    }
    worst = max(lost, key=lost.__getitem__, default="")
    return {
        "directory": str(out_dir),
        "adapter": ADAPTER_DIRECTORY,
        "kind": first.kind,
        "block_size": first.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "files": written["files"],
        "num_tensors": written["num_tensors"],
        "num_folded_layers": sum(gain is not None for gain in folding.gains.values()),
        "num_adapted_layers": len(layers),
        "num_bytes": written["num_bytes"],
        "num_adapter_bytes": num_adapter_bytes,
        "scale_error_if_double_quantised": (
            {"mean": sum(lost.values()) / len(lost), "max": lost[worst], "layer": worst} if lost else {}
        ),
        "seconds": time.perf_counter() - start,
    }


def check_foldable(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise UserError with all reasons why the gain cannot go into block scales without loss, each with a fix."""
    layers = adapted_layers(model)
    if not layers:
        raise UserError("--format nf4-lora: the run has no LoRA or DoRA adapter. Fix: use --format merged.")
    if any(layer.masked for layer in layers.values()):
        raise UserError("--format nf4-lora: plain LoRA cannot mask B A (adapter.mask: keep). Fix: use --format merged.")
    frozen = frozen_layers(model)
    kinds = {layer.kind for layer in frozen.values()} - {"dense"}
    if not kinds & set(FOUR_BIT_KINDS):
        held = ", ".join(sorted(kinds)) or "full precision"
        why = "; its products round the activations to 8 bits, too" if held == "int8" else ""
        raise UserError(
            f"--format nf4-lora: the base must be in nf4 or fp4 (got {held}{why}). Fix: use --format merged."
        )
    faults = []
    for path, layer in frozen.items():
        if layer.kind in FOUR_BIT_KINDS and layer.in_features % layer.block_size:
            faults.append(
                f"--format nf4-lora: {path.removesuffix('.base')}: in_features {layer.in_features} is no multiple of "
                f"the block size {layer.block_size}, so some blocks cross from one row into the next: no gain of a "
                "row can scale them, and bitsandbytes cannot compute them on a CPU. Fix: use --format merged."
            )
    for path, adapted in layers.items():
        if adapted.magnitude is not None and adapted.base.kind == "dense" and dtype != torch.float32:
            faults.append(
                f"--format nf4-lora: {path} is a DoRA layer on a dense weight, and rounding g W to "
                f"{str(dtype).removeprefix('torch.')} loses digits. Fix: use --dtype float32 or --format merged."
            )
    classes = {path.removesuffix(".base"): each.replaces for path, each in frozen.items() if each.kind != "dense"}
    faults += load_faults(model, classes, "--format nf4-lora")
    faults += _peft_faults(model, layers)
    if faults:
        raise UserError(*shorten(faults))


def _peft_faults(model: PreTrainedModel, layers: Mapping[str, AdaptedLinear]) -> list[str]:
    """Why PEFT could not read the adapter: it takes some layers outside of the experts for experts, unless they are
    named by their weights, and allows that only for weights that are not quantised."""
    packed = [path for path in sorted(taken_for_experts(model, layers)) if layers[path].base.kind != "dense"]
    if not packed:
        return []
    return [
        f"--format nf4-lora: PEFT takes {len(packed)} layers of this model for experts (e.g. {packed[0]}). Fix: use "
        "--format merged."
    ]


def _dense_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers that stay dense."""
    packed = {path.removesuffix(".base") for path, layer in frozen_layers(model).items() if layer.kind != "dense"}
    heads = [path for path, each in model.named_modules() if isinstance(each, RowHead)]
    inside = tuple(f"{path}." for path in [*adapted_layers(model), *heads])
    kinds = nn.Linear | FrozenLinear | AdaptedLinear | RowHead
    linear = [path for path, each in model.named_modules() if isinstance(each, kinds)]
    dense = [path for path in linear if path not in packed and not path.startswith(inside)]
    return dense + linear_not_loaded(model)


def _write_lora(directory: Path, model: nn.Module, folding: _Folding, base: str | None) -> int:
    """Write the adapter with the gain in lora_B; returns the bytes of its tensors."""
    layers = adapted_layers(model)
    config = adapter_config(
        layers,
        all_paths(model),
        base_name_or_path=base,
        revision=None,
        as_parameters=taken_for_experts(model, layers),
    )
    config["use_dora"] = False

    def scaled_B(layer: AdaptedLinear) -> Tensor:
        gain = folding.gain(layer)
        return layer.stored_B() if gain is None else layer.stored_B().float() * gain.unsqueeze(-1)

    tensors = factor_tensors(model, scaled_B)
    directory.mkdir()
    write_tensors(directory / WEIGHTS_FILE, dict(sorted(tensors.items())))
    (directory / CONFIG_FILE).write_bytes(json_bytes(config, indent=2))
    return sum(tensor.nbytes for tensor in tensors.values())
