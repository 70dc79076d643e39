"""Whether a merged directory is the model that was trained: reloaded as a stranger would, and compared.

What is compared, and how far the logits may be off, stands in `logit_comparison`.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qdora.errors import RunFailure, UserError
from qdora.export.logit_comparison import ROUNDING, compare_logits, larger, token_sequences, verdict
from qdora.model.inject import adapted_layers
from qdora.model.stored_tensors import Stored, open_safetensors, rename_to_model, shard_files

log = logging.getLogger("qdora")

# Memory of the reloaded model with its activations and logits, over its weights.
_WORKSPACE = 1.3
# Rows of each merged weight that are computed again in float64.
_ROWS = 64


def verify_merged(
    model: PreTrainedModel,
    merged_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    texts: Sequence[str] | None = None,
    input_ids: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 2048,
    max_length: int = 512,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Reload `merged_dir` with plain transformers and compare its logits with those of the running adapter model.

    Passed means: every tensor found its place; the tokenizer gives the same ids; rows of every merged weight equal the
    float64 formula within one rounding; and the logits stay within the tolerance of `logit_comparison`.

    Args:
        model: The running model with its adapters; evaluated in eval mode, left as it was.
        merged_dir: From `export_merged`.
        tokenizer: For `texts`, and compared with the one in `merged_dir`.
        texts, input_ids: What to compare on; exactly one of the two. Held-out text says most.
        max_tokens: Tokens compared in all.
        max_length: Tokens of one text.
        device: Where the merged model runs; None is the running model's device. What does not fit there in float32 is
            placed on the host or the disk.
    Returns:
        JSON values: the three differences, the check of the weights, the tolerance, `passed`, `faults` (why not).
    Raises:
        UserError: Neither or both of texts and input_ids, nothing to compare, or a directory that transformers refuses.
    """
    sequences = token_sequences(tokenizer, texts, input_ids, max_tokens, max_length)
    there = torch.device(device) if device is not None else next(model.parameters()).device
    with tempfile.TemporaryDirectory(prefix="qdora-verify-") as scratch:
        merged, faults = _reload(merged_dir, model, there, Path(scratch))
        total = compare_logits(model, merged, sequences, there)
        stored = stored_dtype(merged_dir)
        files = rename_to_model(open_safetensors(merged_dir), merged)
        weights = compare_weights(model, lambda path: _dense(files, path), stored)
        del merged
    if not weights["max_error"] <= 1.0:
        faults.append(f"{weights['worst_layer']}: its merged weight is {weights['max_error']:.3g} roundings off")
    faults += tokenizer_faults(tokenizer, merged_dir, texts, sequences)
    return verdict(total, faults, stored, model.dtype) | {"num_texts": len(sequences), "weights": weights}


@torch.no_grad()
def compare_weights(
    model: PreTrainedModel, exported: Callable[[str], Tensor | None], stored: torch.dtype
) -> dict[str, Any]:
    """Compute some 64 evenly spaced rows of every adapted layer again, in float64, and compare with those in the files.

    Args:
        model: The running model.
        exported: Path of a layer -> the dense weight (out, in) that the files stand for, or None where it is missing.
        stored: The export's dtype.
    Returns:
        JSON values: number of layers and rows; `max_error`, the largest error in units of what one rounding to `stored`
        and the float32 merge may cost (1 or less is right); the layer it is in.
    """
    worst, worst_layer, num_rows = 0.0, "", 0
    layers = adapted_layers(model)
    for path, layer in layers.items():
        tensor = exported(path)
        if tensor is None:  # named as missing already
            continue
        step = max(1, layer.out_features // _ROWS)
        base = layer.base.dequantized(layer.base.wide_dtype)[::step].double()
        update = layer.gated_B()[::step].double() @ layer.lora_A.double()
        keep = layer.base.keep_mask() if layer.masked else None
        expected = base + layer.scaling * (update if keep is None else update * keep[::step])
        if layer.magnitude is not None:
            norm = expected.square().sum(dim=1).sqrt()
            gain = torch.where(norm > 0, layer.magnitude[::step].double() / norm, 0.0)
            expected = expected * gain.unsqueeze(1)
        found = tensor[::step].to(expected.device).double()
        # float32 sums err by their largest term, not by their result; below the smallest normal number steps are fixed.
        scale = torch.maximum(expected.abs().amax(dim=1), base.abs().amax(dim=1)).unsqueeze(1)
        smallest = torch.finfo(stored).smallest_normal * ROUNDING[stored]
        allowed = ROUNDING[stored] * expected.abs() + 1e-6 * scale + smallest
        error = float(((found - expected).abs() / allowed).max())
        if larger(error, worst) != worst and not math.isnan(worst):  # a NaN, once found, stays the worst
            worst, worst_layer = error, path
        num_rows += len(expected)
    return {"num_layers": len(layers), "num_rows": num_rows, "max_error": worst, "worst_layer": worst_layer}


def _dense(files: Mapping[str, Stored], path: str) -> Tensor | None:
    if f"{path}.weight" not in files:
        return None
    tensor = files[f"{path}.weight"].read()
    assert isinstance(tensor, Tensor)  # dense: a packed one would have failed to reload
    return tensor


def _reload(
    merged_dir: Path, model: PreTrainedModel, device: torch.device, scratch: Path
) -> tuple[PreTrainedModel, list[str]]:
    """The directory as a float32 model, and what did not find its place."""
    options: dict[str, Any] = {}
    if merged_dir.is_dir():
        options = _placement(merged_dir, device, scratch)
    merged, faults = load_plainly(merged_dir, model, **options)
    return merged if "device_map" in options else merged.to(device), faults


def load_plainly(directory: Path, model: PreTrainedModel, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The directory loaded by transformers in float32 with the attention of `model`, and what did not find its place.

    Raises:
        UserError: transformers refuses it.
    """
    attention = model.config._attn_implementation
    if attention in ("eager", "sdpa"):
        options["attn_implementation"] = attention
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # the caller shows its own
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
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


def _placement(merged_dir: Path, device: torch.device, scratch: Path) -> dict[str, Any]:
    """How to load a model that may not fit: wholly on `device` where it does, else spread down to the disk."""
    num_bytes, room = _needed(merged_dir), get_max_memory()
    if fits_in_float32(merged_dir, device):
        return {}
    log.info("The merged model needs %.1f GiB in float32: spread over device, host and disk.", num_bytes / 2**30)
    limits = {place: int(size / _WORKSPACE) for place, size in room.items() if device.type != "cpu" or place == "cpu"}
    return {"device_map": "auto", "max_memory": limits, "offload_folder": str(scratch)}


def fits_in_float32(directory: Path, device: torch.device) -> bool:
    """Whether a dense checkpoint has room on `device` in float32, with its activations and logits."""
    here = "cpu" if device.type == "cpu" else device.index or 0
    return bool(_needed(directory) * _WORKSPACE <= get_max_memory().get(here, 0))


def _needed(directory: Path) -> int:
    num_bytes = sum(file.stat().st_size for file in shard_files(directory))
    return num_bytes // stored_dtype(directory).itemsize * torch.float32.itemsize


def stored_dtype(merged_dir: Path) -> torch.dtype:
    """The dtype that config.json names. Raises RunFailure where it names none."""
    name = json.loads((merged_dir / "config.json").read_text(encoding="utf-8")).get("dtype")
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise RunFailure(f"{merged_dir / 'config.json'}: dtype: is {name!r}, allowed: float16, bfloat16, float32.")
    return dtype


def tokenizer_faults(
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    texts: Sequence[str] | None,
    sequences: Sequence[Sequence[int]],
) -> list[str]:
    """Ways in which the tokenizer of the directory differs from the run's (None: it has none) on what was compared."""
    if tokenizer is None:
        return []
    texts = texts or [tokenizer.decode(ids) for ids in sequences]
    try:
        reloaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError) as error:
        return [f"the tokenizer does not reload: {error}"]
    if any(reloaded(text)["input_ids"] != tokenizer(text)["input_ids"] for text in texts):
        return ["the reloaded tokenizer gives other ids"]
    if reloaded.chat_template != tokenizer.chat_template:
        return ["the reloaded tokenizer has another chat template"]
    return []
