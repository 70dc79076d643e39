"""Whether an exported directory is the model that was trained: reloaded as a stranger would, and compared.

Three sets of logits on the same tokens:

    running     the adapter model as it runs, in its compute dtype
    reference   the same model, computed in float32
    merged      the directory, loaded by AutoModelForCausalLM, computed in float32

merged - reference is the error of the merge and of the export's dtype; reference - running is what the running model's
16-bit arithmetic costs. A right merge is closer to the reference than the running model itself.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qdora.errors import RunFailure, UserError
from qdora.model.checkpoint import Stored, open_safetensors, rename_to_model, shard_files
from qdora.model.inject import adapted_layers
from qdora.nn.frozen_linear import FrozenLinear

log = logging.getLogger("qdora")

# Positions compared at a time: bounds the float64 copies of the logits to 64 x vocabulary.
_POSITIONS = 64
# Memory of the reloaded model with its activations and logits, over its weights.
_WORKSPACE = 1.3
# Rows of each merged weight that are computed again in float64.
_ROWS = 64
# Relative error of one rounding to the dtype.
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# In units of the spread (standard deviation over the vocabulary) of the logits. Measured on SmolLM2-135M with all 210
# layers adapted and moved: rounding its weights costs on average 2.7 roundings in float16 and 3.3 in bfloat16, and
# float32 arithmetic in another order of summation 3e-6. The largest of 4 million differences is 8 to 13 times the mean.
_ROUNDINGS_ALLOWED = 16.0
_ARITHMETIC_ALLOWED = 3e-5
_MAX_OVER_MEAN = 40.0


@dataclass
class Difference:
    """Running totals of how far one set of logits is from another, over all positions."""

    max_logit_difference: float = 0.0
    logit_difference_sum: float = 0.0
    num_logits: int = 0
    kl_max: float = 0.0
    kl_sum: float = 0.0
    num_agreeing: int = 0
    num_positions: int = 0

    def add(self, logits: Tensor, other: Tensor) -> None:
        """Add positions; KL(logits || other) in nats, in float64 since KL is of second order in the difference.

        Args:
            logits, other: (positions, vocabulary), any float dtype.
        """
        for start in range(0, len(logits), _POSITIONS):
            first = logits[start : start + _POSITIONS].double()
            second = other[start : start + _POSITIONS].to(logits.device).double()
            gap = (first - second).abs()
            # max() would drop a NaN.
            self.max_logit_difference = _larger(self.max_logit_difference, float(gap.max()))
            self.logit_difference_sum += float(gap.sum())
            self.num_logits += gap.numel()
            log_p, log_q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0.0)
            self.kl_max = _larger(self.kl_max, float(kl.max()))
            self.kl_sum += float(kl.sum())
            self.num_agreeing += int((first.argmax(dim=-1) == second.argmax(dim=-1)).sum())
            self.num_positions += len(first)

    def to_dict(self) -> dict[str, Any]:
        """Largest and mean |difference of logits|, largest and mean KL in nats, share of equal argmax."""
        return {
            "max_logit_difference": self.max_logit_difference,
            "mean_logit_difference": self.logit_difference_sum / max(self.num_logits, 1),
            "kl_max": self.kl_max,
            "kl_mean": self.kl_sum / max(self.num_positions, 1),
            "argmax_agreement": self.num_agreeing / max(self.num_positions, 1),
        }


def _larger(first: float, second: float) -> float:
    return math.nan if math.isnan(first) or math.isnan(second) else max(first, second)


@dataclass
class _Comparison:
    merged_vs_running: Difference = field(default_factory=Difference)
    merged_vs_reference: Difference = field(default_factory=Difference)
    reference_vs_running: Difference = field(default_factory=Difference)
    spread_sum: float = 0.0


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
    float64 formula within one rounding; and merged - reference stays below the tolerance of `_tolerance`.

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
    sequences = _sequences(tokenizer, texts, input_ids, max_tokens, max_length)
    here = next(model.parameters()).device
    there = torch.device(device) if device is not None else here
    was_training = model.training
    model.eval()
    total = _Comparison()
    try:
        with tempfile.TemporaryDirectory(prefix="qdora-verify-") as scratch:
            merged, faults = _reload(merged_dir, model, there, Path(scratch))
            for ids in sequences:
                tokens = torch.tensor([ids], device=here)
                running = _logits(model, tokens)
                with float32_arithmetic(model):
                    reference = _logits(model, tokens)
                other = _logits(merged, tokens.to(there))
                total.merged_vs_running.add(running, other)
                total.merged_vs_reference.add(reference, other)
                total.reference_vs_running.add(running, reference)
                total.spread_sum += float(reference.float().std(dim=-1).sum())
            stored = _stored_dtype(merged_dir)
            weights = compare_weights(model, rename_to_model(open_safetensors(merged_dir), merged), stored)
            del merged
    finally:
        model.train(was_training)
    if not weights["max_error"] <= 1.0:
        faults.append(f"{weights['worst_layer']}: its merged weight is {weights['max_error']:.3g} roundings off")
    if tokenizer is not None:
        faults += _tokenizer_faults(tokenizer, merged_dir, texts or [tokenizer.decode(ids) for ids in sequences])
    verdict = _verdict(total, faults, stored, model.dtype)
    return verdict | {"num_texts": len(sequences), "weights": weights}


def _verdict(total: _Comparison, faults: list[str], stored: torch.dtype, running_dtype: torch.dtype) -> dict[str, Any]:
    error, noise = total.merged_vs_reference.to_dict(), total.reference_vs_running.to_dict()
    spread = total.spread_sum / max(total.reference_vs_running.num_positions, 1)
    tolerance = _tolerance(noise["mean_logit_difference"], spread, stored, running_dtype)
    faults = faults + [
        f"{name} between merged and reference is {error[name]:.3g}, allowed: at most {limit:.3g}"
        for name, limit in tolerance.items()
        if not error[name] <= limit  # not >: NaN fails
    ]
    return {
        "passed": not faults,
        "faults": faults,
        "dtype": str(stored).removeprefix("torch."),
        "running_dtype": str(running_dtype).removeprefix("torch."),
        "num_positions": total.merged_vs_reference.num_positions,
        "logit_spread": spread,
        "merged_vs_running": total.merged_vs_running.to_dict(),
        "merged_vs_reference": error,
        "reference_vs_running": noise,
        "tolerance": tolerance,
    }


def _tolerance(mean_noise: float, spread: float, stored: torch.dtype, running_dtype: torch.dtype) -> dict[str, float]:
    """How far merged may be from reference: what one rounding of each weight to the stored dtype can explain.

    The mean difference of the logits may be 16 roundings of their spread, or, in models that amplify errors more, the
    noise seen in the running model's arithmetic scaled from its dtype to the stored one; float32's own noise is added.
    The mean KL is at most of the order of the squared difference.

    Args:
        mean_noise: Mean |reference - running| of the logits.
        spread: Mean standard deviation of the logits over the vocabulary.
        stored: The export's dtype.
        running_dtype: The compute dtype of the running model.
    """
    rounding = _ROUNDING[stored]
    amplified = mean_noise * rounding / _ROUNDING.get(running_dtype, 1.0)
    mean = max(_ROUNDINGS_ALLOWED * rounding * spread, amplified) + _ARITHMETIC_ALLOWED * spread
    return {"mean_logit_difference": mean, "max_logit_difference": _MAX_OVER_MEAN * mean, "kl_mean": mean * mean}


@torch.no_grad()
def compare_weights(model: PreTrainedModel, files: Mapping[str, Stored], stored: torch.dtype) -> dict[str, Any]:
    """Compute some 64 evenly spaced rows of every adapted layer again, in float64, and compare with those in the files.

    Args:
        model: The running model.
        files: Model name -> tensor of the export.
        stored: The export's dtype.
    Returns:
        JSON values: number of layers and rows; `max_error`, the largest error in units of what one rounding to `stored`
        and the float32 merge may cost (1 or less is right); the layer it is in.
    """
    worst, worst_layer, num_rows = 0.0, "", 0
    layers = adapted_layers(model)
    for path, layer in layers.items():
        if f"{path}.weight" not in files:  # named as missing already
            continue
        step = max(1, layer.out_features // _ROWS)
        base = layer.base.dequantized(layer.base.wide_dtype)[::step].double()
        update = layer.lora_B[::step].double() @ layer.lora_A.double()
        keep = layer.base.keep_mask() if layer.masked else None
        expected = base + layer.scaling * (update if keep is None else update * keep[::step])
        if layer.magnitude is not None:
            norm = expected.square().sum(dim=1).sqrt()
            gain = torch.where(norm > 0, layer.magnitude[::step].double() / norm, 0.0)
            expected = expected * gain.unsqueeze(1)
        tensor = files[f"{path}.weight"].read()
        assert isinstance(tensor, Tensor)  # dense: a packed one would have failed to reload
        found = tensor[::step].to(expected.device).double()
        # float32 sums err by their largest term, not by their result; below the smallest normal number steps are fixed.
        scale = torch.maximum(expected.abs().amax(dim=1), base.abs().amax(dim=1)).unsqueeze(1)
        smallest = torch.finfo(stored).smallest_normal * _ROUNDING[stored]
        allowed = _ROUNDING[stored] * expected.abs() + 1e-6 * scale + smallest
        error = float(((found - expected).abs() / allowed).max())
        if _larger(error, worst) != worst and not math.isnan(worst):  # a NaN, once found, stays the worst
            worst, worst_layer = error, path
        num_rows += len(expected)
    return {"num_layers": len(layers), "num_rows": num_rows, "max_error": worst, "worst_layer": worst_layer}


@contextmanager
def float32_arithmetic(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` in float32 inside the block: every 16-bit parameter and buffer is widened, which is exact.

    Frozen layers stay as they are held: they compute in the dtype of the activations. Afterwards the very tensors from
    before are back. Costs a float32 copy of what is not packed (embeddings, head, adapters).
    """
    narrow = (torch.float16, torch.bfloat16)
    parameters: list[tuple[torch.nn.Parameter, Tensor]] = []
    buffers: list[tuple[torch.nn.Module, str, Tensor]] = []
    attention = model.config._attn_implementation
    try:
        if attention is not None and "flash" in attention:  # flash kernels have no float32
            model.set_attn_implementation("sdpa")
        for parameter in model.parameters():  # each once, shared ones too
            if parameter.dtype in narrow:
                parameters.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
        for module in model.modules():
            if isinstance(module, FrozenLinear):
                continue
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dtype in narrow:
                    buffers.append((module, name, buffer))
                    module._buffers[name] = buffer.float()
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(positions, vocabulary) of one text."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0]


def _sequences(
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | None,
    input_ids: Sequence[Sequence[int]] | None,
    max_tokens: int,
    max_length: int,
) -> list[list[int]]:
    if (texts is None) == (input_ids is None):
        raise UserError("verify: give exactly one of texts and input_ids.")
    if texts is not None:
        if tokenizer is None:
            raise UserError("verify: texts need a tokenizer; give one, or give input_ids.")
        input_ids = [tokenizer(text)["input_ids"] for text in texts]
    sequences: list[list[int]] = []
    left = max_tokens
    for ids in input_ids or ():
        taken = list(ids)[: min(max_length, left)]
        if taken:
            sequences.append(taken)
            left -= len(taken)
    if not sequences:
        raise UserError("verify: there is no token to compare on.")
    return sequences


def _reload(
    merged_dir: Path, model: PreTrainedModel, device: torch.device, scratch: Path
) -> tuple[PreTrainedModel, list[str]]:
    """The directory as a float32 model, and what did not find its place."""
    options: dict[str, Any] = {}
    if merged_dir.is_dir():
        options = _placement(merged_dir, device, scratch)
    attention = model.config._attn_implementation
    if attention in ("eager", "sdpa"):
        options["attn_implementation"] = attention
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # the caller shows its own
    try:
        merged, info = AutoModelForCausalLM.from_pretrained(
            str(merged_dir), dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{merged_dir}: transformers cannot load it: {error}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    faults = []
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(key) or ())
        if names:
            faults.append(f"{key.replace('_', ' ')} on reloading: {', '.join(names[:5])} ({len(names)} in all)")
    merged.eval()
    return merged if "device_map" in options else merged.to(device), faults


def _placement(merged_dir: Path, device: torch.device, scratch: Path) -> dict[str, Any]:
    """How to load a model that may not fit: wholly on `device` where it does, else spread down to the disk."""
    num_bytes = sum(file.stat().st_size for file in shard_files(merged_dir))
    num_bytes = num_bytes // _stored_dtype(merged_dir).itemsize * torch.float32.itemsize
    room = get_max_memory()
    here = "cpu" if device.type == "cpu" else device.index or 0
    if num_bytes * _WORKSPACE <= room.get(here, 0):
        return {}
    log.info("The merged model needs %.1f GiB in float32: spread over device, host and disk.", num_bytes / 2**30)
    limits = {place: int(size / _WORKSPACE) for place, size in room.items() if device.type != "cpu" or place == "cpu"}
    return {"device_map": "auto", "max_memory": limits, "offload_folder": str(scratch)}


def _stored_dtype(merged_dir: Path) -> torch.dtype:
    name = json.loads((merged_dir / "config.json").read_text(encoding="utf-8")).get("dtype")
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise RunFailure(f"{merged_dir / 'config.json'}: dtype: is {name!r}, allowed: float16, bfloat16, float32.")
    return dtype


def _tokenizer_faults(tokenizer: PreTrainedTokenizerBase, merged_dir: Path, texts: Sequence[str]) -> list[str]:
    try:
        reloaded = AutoTokenizer.from_pretrained(str(merged_dir), local_files_only=True)
    except (OSError, ValueError) as error:
        return [f"the tokenizer does not reload: {error}"]
    if any(reloaded(text)["input_ids"] != tokenizer(text)["input_ids"] for text in texts):
        return ["the reloaded tokenizer gives other ids"]
    if reloaded.chat_template != tokenizer.chat_template:
        return ["the reloaded tokenizer has another chat template"]
    return []
