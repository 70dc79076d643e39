"""Check an export: reload it as another user would, and compare it with the model that was trained.

transformers loads a merged model, with bitsandbytes the 4-bit forms, and PEFT the adapter of nf4-lora.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate.utils import get_max_memory
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from qdora.adapter.experts import AdaptedExperts
from qdora.adapter.layer import AdaptedLinear
from qdora.errors import UserError, first_few
from qdora.export.compare import NARROW, ROUNDING, Comparison, ComparisonText, compare_logits, verdict
from qdora.export.write import has_own_code
from qdora.files.machine import available_memory_bytes
from qdora.memory.oom import free_memory, is_out_of_memory
from qdora.model.adapter_file import WEIGHTS_FILE, read_adapter, stored_factors
from qdora.model.checkpoint import Stored, gather_packed, open_safetensors, rename_to_model, to_stacks
from qdora.model.inject import adapted_layers
from qdora.model.load import load_config, skeleton, tensors_of_source
from qdora.model.multimodal import auto_class
from qdora.model.source import ADAPTER_DIRECTORY, ModelSource
from qdora.model.tokens import embedding_paths, is_tied, trained_matrices
from qdora.quant.packed import PackedWeight, dequantize

logger = logging.getLogger("qdora")

_WORKSPACE = 1.3
"""Memory of the reloaded model with its activations and logits, over the bytes of its weights."""
_ROWS = 64
"""Rows of each merged weight that are computed again in float64."""
_NO_ROOM = "The export does not fit in memory beside the running model: their logits are not compared."
_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")

Loaded = tuple[Any, list[str]]
"""A reloaded model, and what did not find its place in it."""


# --- the three forms


def verify_merged(model: PreTrainedModel, directory: Path, text: ComparisonText) -> dict[str, Any]:
    """Reload a merged checkpoint with transformers and compare it with the running model, in float32.

    Passed means: every tensor found its place, the tokenizer gives the same ids, rows of every merged weight equal the
    float64 formula within one rounding, and the logits stay within the tolerance. Without room for two models part of
    the reloaded one is on the host or the disk; without room for the logits there are none. Returns JSON values: the
    result of `verdict`, and the check of the weights.
    """
    with tempfile.TemporaryDirectory(prefix="qdora-verify-") as scratch:
        device, options = next(model.parameters()).device, dict[str, Any]()
        fits = not directory.is_dir() or fits_in_float32(directory, model)
        if not fits:
            limits = {place: int(size / _WORKSPACE) for place, size in _room_beside(model).items()}
            limits = {"cpu": limits["cpu"]} if device.type == "cpu" else limits
            options = {"device_map": "auto", "max_memory": limits, "offload_folder": scratch}
        merged, faults = load_with_transformers(directory, model, **options)
        total = logits_compared(model, merged.to(device) if fits else merged, text)
        files = to_stacks(rename_to_model(open_safetensors(directory), merged), model)
        stored = stored_dtype(directory)
        weights = compare_weights(model, lambda path: _dense_weight(files, path), stored)
        faults += _faults_of_files(model, directory, files, text, weights)
        del merged
    return verdict(total, faults, stored, model.dtype) | {"num_texts": len(text.sequences), "weights": weights}


def verify_requantized(model: PreTrainedModel, directory: Path, text: ComparisonText) -> dict[str, Any]:
    """As `verify_merged`, without a tolerance or a check of weights: the form rounds to 4 bits again."""
    total, faults = _compared(load_with_bnb, model, directory, text)
    files = rename_to_model(gather_packed(open_safetensors(directory)), model)
    faults += _faults_of_files(model, directory, files, text)
    return verdict(total, faults, torch.float32, model.dtype, lossy=True) | {"num_texts": len(text.sequences)}


def verify_nf4_lora(model: PreTrainedModel, directory: Path, text: ComparisonText) -> dict[str, Any]:
    """As `verify_merged`: rows of every scaled base + s B A must equal g (W + s B A) within float32's roundings."""
    total, faults = _compared(load_with_peft, model, directory, text)
    files = rename_to_model(gather_packed(open_safetensors(directory)), model)
    factors = stored_factors(model, load_file(directory / ADAPTER_DIRECTORY / WEIGHTS_FILE))
    layers = adapted_layers(model)

    def weight(path: str) -> Tensor | None:
        item = files.get(f"{path}.weight")
        if item is None or path not in factors:
            return None
        value, (lora_A, lora_B) = item.read(), factors[path]
        base = dequantize(value, torch.float64) if isinstance(value, PackedWeight) else value.double()
        return base + layers[path].scaling * (lora_B.double() @ lora_A.double()).view_as(base)

    weights = compare_weights(model, weight, torch.float32)
    faults += _faults_of_files(model, directory, files, text, weights)
    stored = stored_dtype(directory)  # of embeddings, norms and head, which lose nothing in the model's own dtype
    exact = stored == model.dtype and not trained_matrices(model)  # trained rows are float32 and are rounded
    found = verdict(total, faults, torch.float32 if exact else stored, model.dtype)
    return found | {"num_texts": len(text.sequences), "weights": weights}


def _compared(
    load: Callable[[Path, PreTrainedModel], Loaded], model: PreTrainedModel, directory: Path, text: ComparisonText
) -> tuple[Comparison | None, list[str]]:
    """The logits of a 4-bit export, and what did not find its place; without room only the latter, by name and shape."""
    if fits_in_float32(directory, model):
        exported, faults = load(directory, model)
        return logits_compared(model, exported, text), faults
    logger.warning(_NO_ROOM)
    source = ModelSource("directory", directory, directory.name, trust_remote_code=has_own_code(model))
    try:
        config = load_config(source)
        del config.quantization_config  # as `load_model` does
        bare = skeleton(config, source, torch.float32, "auto", torch.device("cpu"))
        tensors_of_source(source, bare)
        if (directory / ADAPTER_DIRECTORY).is_dir():
            read_adapter(bare, directory / ADAPTER_DIRECTORY)
    except UserError as error:
        return None, list(error.faults)
    return None, []


def logits_compared(model: PreTrainedModel, exported: PreTrainedModel, text: ComparisonText) -> Comparison | None:
    """`compare_logits`; None, with a warning, if memory runs out."""
    try:
        return compare_logits(model, exported, text.sequences)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    logger.warning(_NO_ROOM)
    return None


# --- the files


@torch.no_grad()
def compare_weights(
    model: PreTrainedModel, exported: Callable[[str], Tensor | None], stored: torch.dtype
) -> dict[str, Any]:
    """Compare about 64 rows of every adapted layer, computed again in float64, with the files.

    `exported` maps the path of a layer to the dense weight (out, in) in the files, None if it is missing. Returns JSON
    values; `max_error` is in units of what rounding to `stored` and the float32 merge may cost (1 or less is right).
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
        if not error <= worst and not math.isnan(worst):  # a NaN, once found, stays the worst
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
    value = files[f"{path}.weight"].read() if f"{path}.weight" in files else None
    assert not isinstance(value, PackedWeight)  # it would have failed to reload
    return value


@torch.no_grad()
def _faults_of_files(
    model: PreTrainedModel,
    directory: Path,
    files: Mapping[str, Stored],
    text: ComparisonText,
    weights: Mapping[str, Any] | None = None,
) -> list[str]:
    """What is wrong with the adapted weights, the trained rows of embeddings and heads, and the tokenizer."""
    faults = []
    if weights is not None and not weights["max_error"] <= 1.0:  # NaN is a fault
        layer, error = weights["worst_layer"], weights["max_error"]
        faults.append(f"the weight of {layer} differs from the computed one by {error:.3g} times the rounding error")
    for path, matrix in trained_matrices(model).items():
        names = [path, *(embedding_paths(model) if is_tied(model) else ())]  # of a tied pair the files have either name
        found = next((value for name in names if (value := _dense_weight(files, name)) is not None), None)
        if found is None:  # a fault of reloading already
            continue
        rows = found if matrix.ids is None else found[list(matrix.ids)]
        if not torch.equal(rows, matrix.values.detach().cpu().to(rows.dtype)):
            faults.append(f"{path}: its trained rows are not those of the run, rounded to {rows.dtype}")
    own = text.tokenizer
    if own is None:
        return faults
    code = has_own_code(own)
    reloaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=code)
    if any(reloaded(each)["input_ids"] != own(each)["input_ids"] for each in text.texts):
        faults.append("the reloaded tokenizer gives other ids")
    elif reloaded.get_added_vocab() != own.get_added_vocab():
        faults.append("the reloaded tokenizer has other added tokens")
    elif reloaded.chat_template != own.chat_template:
        faults.append("the reloaded tokenizer has another chat template")
    return faults


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype that the config.json of an export names."""
    dtype: torch.dtype = getattr(torch, json.loads((directory / "config.json").read_text(encoding="utf-8"))["dtype"])
    return dtype


# --- reloading


def load_with_transformers(directory: Path, model: PreTrainedModel, **options: Any) -> Loaded:
    """The directory as a float32 model with the attention of `model`."""
    attention = model.config._attn_implementation
    if attention in ("eager", "sdpa"):
        options["attn_implementation"] = attention
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
    wrong = {key.replace("_", " "): sorted(map(str, info.get(key) or ())) for key in _KEYS}
    faults = [f"{what} on reloading: {first_few(names)}" for what, names in wrong.items() if names]
    return loaded.eval(), faults


def load_with_bnb(directory: Path, model: PreTrainedModel) -> Loaded:
    """A bitsandbytes checkpoint on the device of `model`, computing in float32."""
    base, faults = load_with_transformers(directory, model, device_map={"": next(model.parameters()).device})
    for parameter in base.parameters():
        # Beside quantised weights transformers keeps the file's dtype.
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for layer in base.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
            # Else bitsandbytes repacks the weight for a bf16 kernel at the first forward, on some CPUs.
            layer.support_avx512bf16_for_cpu = False
    return base, faults


def load_with_peft(directory: Path, model: PreTrainedModel) -> Loaded:
    """Base and adapter on the device of `model`, computing in float32."""
    base, faults = load_with_bnb(directory, model)
    exported = peft.PeftModel.from_pretrained(base, str(directory / ADAPTER_DIRECTORY))
    stored = load_file(directory / ADAPTER_DIRECTORY / WEIGHTS_FILE)
    if differing := sorted(peft.get_peft_model_state_dict(exported).keys() ^ stored.keys()):
        faults.append(f"PEFT has other tensors than the adapter file: {first_few(differing)}")
    return exported.eval(), faults


def fits_in_float32(directory: Path, model: PreTrainedModel) -> bool:
    """Whether a checkpoint, its floats in float32, fits beside the running model with its activations and logits."""
    num_bytes = sum(
        4 * math.prod(each.shape) if each.dtype.startswith(("F", "BF")) else each.num_bytes
        for each in open_safetensors(directory).values()
    )
    return num_bytes * _WORKSPACE <= _room_beside(model).get(_device_of(model), 0)


def _room_beside(model: PreTrainedModel) -> dict[int | str, int]:
    """Free bytes of each device, less the float32 copies that `float32_arithmetic` makes on that of `model`."""
    free_memory()
    room: dict[int | str, int] = get_max_memory()
    room["cpu"] = min(room["cpu"], available_memory_bytes())  # accelerate knows no limit of a container
    place, device = _device_of(model), next(model.parameters()).device
    copied = sum(each.numel() for each in model.parameters() if each.dtype in NARROW and each.device == device)
    return room | {place: max(0, room.get(place, 0) - 4 * copied)}


def _device_of(model: PreTrainedModel) -> int | str:
    """The device of `model` as accelerate names it."""
    device = next(model.parameters()).device
    return "cpu" if device.type == "cpu" else device.index or 0
