"""Check an export: reload it as another user would, and compare it with the model that was trained.

transformers loads the merged model, bitsandbytes with it the 4-bit forms, PEFT the adapter of nf4-lora (without PEFT
qdora's own loader does). `logit_comparison` says what is compared and how far the logits may be off.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qdora.adapter.experts import AdaptedExperts
from qdora.adapter.layer import AdaptedLinear
from qdora.errors import UserError
from qdora.export.checkpoint_writer import has_own_code
from qdora.export.logit_comparison import ROUNDING, Comparison, ComparisonText, compare_logits, larger, verdict
from qdora.files.machine import available_memory_bytes
from qdora.memory.oom import free_memory, is_out_of_memory
from qdora.model.adapter_file import WEIGHTS_FILE, load_adapter, read_adapter, stored_factors
from qdora.model.checkpoint import Stored, gather_packed, open_safetensors, rename_to_model, to_stacks
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import load_config, load_model, skeleton, tensors_of_source
from qdora.model.multimodal import auto_class
from qdora.model.source import ADAPTER_DIRECTORY, ModelSource, resolve
from qdora.model.tokens import embedding_paths, is_tied, trained_matrices
from qdora.quant.bnb import FOUR_BIT_KINDS
from qdora.quant.packed import PackedWeight, dequantize

logger = logging.getLogger("qdora")

PEFT_LOADER = "transformers, bitsandbytes, PEFT"
OWN_LOADER = "qdora (PEFT is not installed)"
_WORKSPACE = 1.3
"""Memory of the reloaded model with its activations and logits, over the bytes of its weights."""
_NO_ROOM = "The export does not fit in memory beside the running model: their logits are not compared."
_ROWS = 64
"""Rows of each merged weight that are computed again in float64."""


def verify_merged(model: PreTrainedModel, directory: Path, text: ComparisonText) -> dict[str, Any]:
    """Reload a merged checkpoint with transformers and compare its logits with those of the running model, in float32.

    Passed means: every tensor found its place; the tokenizer gives the same ids; rows of every merged weight equal the
    float64 formula within one rounding; and the logits stay within the tolerance of `logit_comparison`. If a GPU has no
    room for the comparison, there are no logits.

    Args:
        model: The running model with its adapters; evaluated in eval mode, left as it was.
        directory: If it does not fit on the model's device in float32, part of it is placed on the host or the disk.
        text: What to compare on. Its tokenizer is compared with the one in `directory`.
    Returns: JSON values: the three differences, the check of the weights, the tolerance, `passed`, `faults` (why not).
    Raises UserError: transformers cannot load the directory.
    """
    with tempfile.TemporaryDirectory(prefix="qdora-verify-") as scratch:
        merged, faults = _reload(directory, model, Path(scratch))
        total = logits_compared(model, merged, text)
        stored = stored_dtype(directory)
        files = to_stacks(rename_to_model(open_safetensors(directory), merged), model)
        weight = partial(_dense_weight, files)
        weights = compare_weights(model, weight, stored)
        faults += embedding_faults(model, weight, stored)
        del merged
    faults += _weight_faults(weights, "merged") + tokenizer_faults(text, directory)
    return verdict(total, faults, stored, model.dtype) | {"num_texts": len(text.sequences), "weights": weights}


def verify_requantized(model: PreTrainedModel, directory: Path, text: ComparisonText) -> dict[str, Any]:
    """The differences of `verify_merged` without a tolerance: this form rounds to 4 bits, and the figures say how far.

    Passed means only: every tensor found its place, the tokenizer gives the same ids, all logits are finite. If the
    export does not fit beside the running model, there are no logits.
    """
    total, faults = _compared(load_with_bnb, model, directory, text)
    files = rename_to_model(gather_packed(open_safetensors(directory)), model)
    faults += embedding_faults(model, partial(_dense_weight, files), stored_dtype(directory))
    faults += tokenizer_faults(text, directory)
    return verdict(total, faults, torch.float32, model.dtype, lossy=True) | {"num_texts": len(text.sequences)}


def verify_nf4_lora(model: PreTrainedModel, directory: Path, text: ComparisonText) -> dict[str, Any]:
    """Reload base and adapter and compare their float32 logits with those of the running model (see `verify_merged`).

    Passed means: every tensor found its place; the tokenizer gives the same ids; rows of every scaled base + s B A
    equal the float64 formula g (W + s B A) within float32's roundings; and the logits stay within the tolerance of
    `logit_comparison` for a float32 export. `loaded_by` in the result names the loader. If the export does not fit
    beside the running model, nothing loads it (None) and there are no logits.
    """
    has_peft = importlib.util.find_spec("peft") is not None
    loaded_by, load = (PEFT_LOADER, load_with_peft) if has_peft else (OWN_LOADER, load_with_qdora)
    total, faults = _compared(load, model, directory, text)
    weights = compare_weights(model, nf4_lora_weights(directory, model), torch.float32)
    files = rename_to_model(gather_packed(open_safetensors(directory)), model)
    faults += embedding_faults(model, partial(_dense_weight, files), stored_dtype(directory))
    faults += _weight_faults(weights, "exported") + tokenizer_faults(text, directory)
    stored = stored_dtype(directory)  # of embeddings, norms and head, which lose nothing in the model's own dtype
    exact = stored == model.dtype and not trained_matrices(model)  # trained rows are float32 and are rounded
    found = verdict(total, faults, torch.float32 if exact else stored, model.dtype)
    used = None if total is None else loaded_by
    return found | {"num_texts": len(text.sequences), "weights": weights, "loaded_by": used}


def _compared(
    load: Callable[[Path, PreTrainedModel], tuple[Any, list[str]]],
    model: PreTrainedModel,
    directory: Path,
    text: ComparisonText,
) -> tuple[Comparison | None, list[str]]:
    """The logits of a 4-bit export that `load` loads, and what did not find its place.

    None, with a warning, if two models do not fit on the device; the places are then those of names and shapes.
    """
    if fits_in_float32(directory, model):
        exported, faults = load(directory, model)
        return logits_compared(model, exported, text), faults
    logger.warning(_NO_ROOM)
    return None, _layout_faults(directory, model)


def logits_compared(model: PreTrainedModel, exported: PreTrainedModel, text: ComparisonText) -> Comparison | None:
    """`compare_logits`; None, with a warning, if memory runs out, such as for the float32 copies of the model."""
    try:
        return compare_logits(model, exported, text.sequences)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    logger.warning(_NO_ROOM)
    return None


def _layout_faults(directory: Path, model: PreTrainedModel) -> list[str]:
    """How the names and shapes of a 4-bit export and its LoRA differ from those of the model; the base is not read."""
    source = ModelSource("directory", directory, directory.name, trust_remote_code=has_own_code(model))
    try:
        config = load_config(source)
        del config.quantization_config  # as `load_model` does
        bare = skeleton(config, source, torch.float32, "auto", torch.device("cpu"))
        tensors_of_source(source, bare)
        if (directory / ADAPTER_DIRECTORY).is_dir():
            read_adapter(bare, directory / ADAPTER_DIRECTORY)
    except UserError as error:
        return list(error.faults)
    return []


@torch.no_grad()
def compare_weights(
    model: PreTrainedModel, exported: Callable[[str], Tensor | None], stored: torch.dtype
) -> dict[str, Any]:
    """Compute about 64 evenly spaced rows of every adapted layer again, in float64, and compare them with the files.

    Args:
        exported: Path of a layer -> the dense weight (out, in) that the files stand for, or None if it is missing.
        stored: The export's dtype.
    Returns: JSON values: number of layers and rows; `max_error`, the largest error in units of what one rounding to
        `stored` and the float32 merge may cost (1 or less is right); `worst_layer`, the layer with that error.
    """
    worst, worst_layer, num_rows = 0.0, "", 0
    layers = adapted_layers(model)
    for path, layer in layers.items():
        tensor = exported(path)
        if tensor is None:  # a fault of reloading already
            continue
        step = max(1, layer.out_features // _ROWS)
        if isinstance(layer, AdaptedExperts):
            step |= 1  # not always the same row of an expert
        base, update = _rows_of(layer, step)
        keep = layer.base.keep_mask() if layer.masked else None
        expected = base + layer.scaling * (update if keep is None else update * keep[::step])
        if layer.magnitude is not None:
            norm = expected.square().sum(dim=1).sqrt()
            gain = torch.where(norm > 0, layer.magnitude.flatten()[::step].double() / norm, 0.0)
            expected = expected * gain.unsqueeze(1)
        found = tensor[::step].to(expected.device).double()
        # The error of a float32 sum follows its largest term, not its result; below the smallest normal number the
        # spacing of values is constant.
        scale = torch.maximum(expected.abs().amax(dim=1), base.abs().amax(dim=1)).unsqueeze(1)
        smallest = torch.finfo(stored).smallest_normal * ROUNDING[stored]
        allowed = ROUNDING[stored] * expected.abs() + 1e-6 * scale + smallest
        error = float(((found - expected).abs() / allowed).max())
        if larger(error, worst) != worst and not math.isnan(worst):  # a NaN, once found, stays the worst
            worst, worst_layer = error, path
        num_rows += len(expected)
    return {"num_layers": len(layers), "num_rows": num_rows, "max_error": worst, "worst_layer": worst_layer}


def _rows_of(layer: AdaptedLinear, step: int) -> tuple[Tensor, Tensor]:
    """Every `step`-th row of the base and of B A, in float64."""
    if not isinstance(layer, AdaptedExperts):
        base = layer.base.dequantized(layer.base.wide_dtype)[::step].double()
        return base, layer.gated_B()[::step].double() @ layer.lora_A.double()
    wide, a, b = layer.base.wide_dtype, layer.lora_A.double(), layer.gated_B().double()
    rows, updates = [], []
    for row in range(0, layer.out_features, step):
        expert, inside = divmod(row, layer.expert_features)
        rows.append(layer.base.dequantized_rows(slice(row, row + 1), wide))  # one expert at a time
        updates.append(b[expert, inside] @ a[expert])
    return torch.cat(rows).double(), torch.stack(updates)


def _dense_weight(files: Mapping[str, Stored], path: str) -> Tensor | None:
    """The weight of a module in an export, or None if it is missing."""
    tensor = files[f"{path}.weight"].read() if f"{path}.weight" in files else None
    assert not isinstance(tensor, PackedWeight)  # it would have failed to reload
    return tensor


@torch.no_grad()
def embedding_faults(
    model: PreTrainedModel, exported: Callable[[str], Tensor | None], stored: torch.dtype
) -> list[str]:
    """How trained embeddings and heads in the files differ from those of the model, rounded to `stored`.

    All trained rows are compared, and the number of rows; of a tied pair the files may hold either name.
    """
    faults = []
    for path, matrix in trained_matrices(model).items():
        found = exported(path)
        if found is None and is_tied(model):
            found = next((each for other in embedding_paths(model) if (each := exported(other)) is not None), None)
        module = model.get_submodule(path)
        size = len(module.weight if matrix.ids is None else module.base.weight)
        if found is None or len(found) != size:
            rows = "none" if found is None else f"{len(found)} rows"
            faults.append(f"{path}: its matrix of {size} rows is not in the files ({rows})")
            continue
        rows_found = found if matrix.ids is None else found[list(matrix.ids)]
        if not torch.equal(rows_found, matrix.values.detach().cpu().to(rows_found.dtype)):
            faults.append(f"{path}: its trained rows are not those of the run, rounded to {stored}")
    return faults


def _weight_faults(weights: Mapping[str, Any], what: str) -> list[str]:
    layer, error = weights["worst_layer"], weights["max_error"]
    fault = f"the {what} weight of {layer} differs from the computed one by {error:.3g} times the rounding error"
    return [] if weights["max_error"] <= 1.0 else [fault]  # NaN is a fault


def _reload(directory: Path, model: PreTrainedModel, scratch: Path) -> tuple[PreTrainedModel, list[str]]:
    """A merged checkpoint as a float32 model, and the tensors that did not find their place.

    It is wholly on the device of `model` if it fits there, else spread over device, host and disk.
    """
    device = next(model.parameters()).device
    if not directory.is_dir() or fits_in_float32(directory, model):
        merged, faults = load_with_transformers(directory, model)
        return merged.to(device), faults
    num_gib = _float32_bytes(directory) / 2**30
    logger.info("The merged model needs %.1f GiB in float32: spread over device, host and disk.", num_gib)
    limits = {
        place: int(size / _WORKSPACE)
        for place, size in _room_beside(model).items()
        if device.type != "cpu" or place == "cpu"
    }
    options = {"device_map": "auto", "max_memory": limits, "offload_folder": str(scratch)}
    return load_with_transformers(directory, model, **options)


def load_with_transformers(
    directory: Path, model: PreTrainedModel, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The directory as a float32 model with the attention of `model`, and the tensors that did not find their place."""
    attention = model.config._attn_implementation
    if attention in ("eager", "sdpa"):
        options["attn_implementation"] = attention
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # the caller shows its own
    try:
        loaded, info = auto_class(model.config).from_pretrained(
            str(directory),
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=has_own_code(model),  # the code that the run has trained with
            **options,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: transformers cannot load it: {error}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    faults = []
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(key) or ())
        if names:
            faults.append(f"{key.replace('_', ' ')} on reloading: {', '.join(names[:5])} ({len(names)} in all)")
    loaded.eval()
    return loaded, faults


def fits_in_float32(directory: Path, model: PreTrainedModel) -> bool:
    """Whether a checkpoint, its floats in float32, fits beside the running model with its activations and logits."""
    return _float32_bytes(directory) * _WORKSPACE <= _room_beside(model).get(_place_of(model), 0)


def _room_beside(model: PreTrainedModel) -> dict[int | str, int]:
    """Free bytes of each device, less the float32 copies that `float32_arithmetic` makes on that of `model`."""
    free_memory()
    room: dict[int | str, int] = get_max_memory()
    room["cpu"] = min(room["cpu"], available_memory_bytes())  # accelerate knows no limit of a container
    place, device = _place_of(model), next(model.parameters()).device
    narrow = (torch.float16, torch.bfloat16)
    copied = sum(each.numel() for each in model.parameters() if each.dtype in narrow and each.device == device)
    return room | {place: max(0, room.get(place, 0) - copied * torch.float32.itemsize)}


def _place_of(model: PreTrainedModel) -> int | str:
    """The device of `model` as accelerate names it."""
    device = next(model.parameters()).device
    return "cpu" if device.type == "cpu" else device.index or 0


def _float32_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's tensors, its floats in float32."""
    num_bytes = 0
    for each in open_safetensors(directory).values():
        is_float = each.dtype.startswith(("F", "BF"))
        num_bytes += torch.Size(each.shape).numel() * torch.float32.itemsize if is_float else each.num_bytes
    return num_bytes


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype that the config.json of an export names."""
    dtype: torch.dtype = getattr(torch, json.loads((directory / "config.json").read_text(encoding="utf-8"))["dtype"])
    return dtype


def load_with_peft(directory: Path, model: PreTrainedModel) -> tuple[Any, list[str]]:
    """Base and adapter on the device of `model`, computing in float32, and what did not find its place."""
    peft = importlib.import_module("peft")
    base, faults = load_with_bnb(directory, model)
    exported = peft.PeftModel.from_pretrained(base, str(directory / ADAPTER_DIRECTORY))
    stored = load_file(directory / ADAPTER_DIRECTORY / WEIGHTS_FILE)
    held = peft.get_peft_model_state_dict(exported)
    if held.keys() != stored.keys():
        differing = sorted(held.keys() ^ stored.keys())
        faults.append(f"PEFT has other tensors than the adapter file: {', '.join(differing[:5])} ({len(differing)})")
    return exported.eval(), faults


def load_with_bnb(directory: Path, model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """A bitsandbytes checkpoint on the device of `model`, computing in float32, and what did not find its place."""
    base, faults = load_with_transformers(directory, model, device_map={"": next(model.parameters()).device})
    for parameter in base.parameters():
        # Beside quantised weights transformers keeps the file's dtype, whatever dtype is asked for.
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            layer: Any = module
            # The checkpoint names the dtype of deployment; the comparison is of float32 with float32.
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
            # Else bitsandbytes repacks the weight for a bf16 kernel at the first forward, on some CPUs.
            layer.support_avx512bf16_for_cpu = False
    return base, faults


def load_with_qdora(directory: Path, model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """Base and adapter by qdora's own loader, in float32; it raises for what finds no place."""
    first = next(layer for layer in frozen_layers(model).values() if layer.kind in FOUR_BIT_KINDS)
    attention = model.config._attn_implementation
    exported = load_model(
        replace(resolve(str(directory)), trust_remote_code=has_own_code(model)),
        quant=first.kind,
        block_size=first.block_size,
        double_quant=False,
        device=next(model.parameters()).device,
        compute_dtype=torch.float32,
        attention=attention if attention in ("eager", "sdpa") else "auto",
    )
    load_adapter(exported, directory / ADAPTER_DIRECTORY)
    return exported.eval(), []


def nf4_lora_weights(directory: Path, model: PreTrainedModel) -> Callable[[str], Tensor | None]:
    """Path of an adapted layer -> the dense weight that the files stand for, scaled base + s B A, in float64."""
    files: Mapping[str, Stored] = rename_to_model(gather_packed(open_safetensors(directory)), model)
    layers = adapted_layers(model)
    factors = stored_factors(model, load_file(directory / ADAPTER_DIRECTORY / WEIGHTS_FILE))

    def weight(path: str) -> Tensor | None:
        item = files.get(f"{path}.weight")
        if item is None or path not in factors:
            return None
        stored, (lora_A, lora_B) = item.read(), factors[path]
        base = dequantize(stored, torch.float64) if isinstance(stored, PackedWeight) else stored.double()
        return base + layers[path].scaling * (lora_B.double() @ lora_A.double()).view_as(base)

    return weight


def tokenizer_faults(text: ComparisonText, directory: Path) -> list[str]:
    """How the tokenizer of the directory differs from the run's on the texts."""
    if text.tokenizer is None:
        return []
    try:
        reloaded = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=has_own_code(text.tokenizer)
        )
    except (OSError, ValueError) as error:
        return [f"the tokenizer does not reload: {error}"]
    if any(reloaded(each)["input_ids"] != text.tokenizer(each)["input_ids"] for each in text.texts):
        return ["the reloaded tokenizer gives other ids"]
    if reloaded.get_added_vocab() != text.tokenizer.get_added_vocab():
        return ["the reloaded tokenizer has other added tokens"]
    if reloaded.chat_template != text.tokenizer.chat_template:
        return ["the reloaded tokenizer has another chat template"]
    return []
