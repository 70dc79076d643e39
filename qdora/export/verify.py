"""Check an export: reload it as another user would, and compare it with the model that was trained.

transformers loads a merged model, with bitsandbytes the 4-bit forms, and PEFT the adapter of nf4-lora. Rows of every
weight are computed again in float64. Logits are compared on the same held-out text:

    running     the adapter model as it runs, in its compute dtype
    reference   the same model, computed in float32
    exported    what was reloaded, computed in float32

exported - reference is the error of the export and of its dtype; reference - running is what the running model's 16-bit
arithmetic costs. A right export is closer to the reference than the running model is.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qdora.adapter.experts import FrozenExperts
from qdora.adapter.layer import FrozenLinear, evaluation_mode
from qdora.data.example import Example
from qdora.data.sources import run_examples
from qdora.errors import UserError, first_few
from qdora.export.write import has_own_code, merged
from qdora.files.machine import available_memory_bytes
from qdora.files.tensor_file import DTYPES
from qdora.memory.oom import free_memory, is_out_of_memory
from qdora.model.adapter_file import WEIGHTS_FILE, read_adapter, stored_factors
from qdora.model.attention import softcap_of
from qdora.model.checkpoint import Stored, gather_packed, open_safetensors, rename_to_model, to_stacks
from qdora.model.inject import adapted_layers
from qdora.model.load import load_config, skeleton, tensors_of_source
from qdora.model.multimodal import auto_class
from qdora.model.source import ADAPTER_DIRECTORY, ModelSource
from qdora.model.tokens import embedding_paths, is_tied, trained_matrices
from qdora.quant.packed import PackedWeight, dequantize
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")

_POSITIONS = 64  # compared at a time: bounds the float64 copies of the logits to 64 x vocabulary
# Relative error of one rounding to the dtype.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# In units of the spread (standard deviation over the vocabulary) of the logits. Measured on SmolLM2-135M, all layers
# adapted: rounding its weights costs 2.7 roundings in float16 and 3.3 in bfloat16 on average, another order of float32
# sums 3e-6. The largest of 4 million differences is 8 to 13 times the mean.
_ROUNDINGS_ALLOWED = 16.0
_ARITHMETIC_ALLOWED = 3e-5
_MAX_OVER_MEAN = 40.0
# A rare position amplifies any rounding a hundredfold (bfloat16 arithmetic: 30 at one of 579, 0.4 in the median), so
# the largest error allowed there is in units of the running model's own error, scaled from its dtype to the stored one.
# Measured: 0.26 in the median, at most 0.78. Above 1, since each of the two errors is one draw.
_OVER_OWN_NOISE = 2.0
_NUM_TEXTS = 24  # about 2,000 tokens: enough for a maximum over positions to be meaningful
_MAX_TOKENS, _MAX_LENGTH = 2048, 512
_DIFFER = {
    "mean_logit_difference": "the logits of the export differ from those of the trained model",
    "kl_mean": "the probabilities of the export differ from those of the trained model (KL, in nats)",
}
_FALLBACK = "The quick brown fox jumps over the lazy dog, and then it rests in the shade of an old oak tree."
NARROW = (torch.float16, torch.bfloat16)
_WORKSPACE = 1.3
"""Memory of the reloaded model with its activations and logits, over the bytes of its weights."""
_ROWS = 64
"""Rows of each merged weight that are computed again in float64."""
_NO_ROOM = "The export does not fit in memory beside the running model: their logits are not compared."
_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")

Loaded = tuple[Any, list[str]]
"""A reloaded model, and what did not find its place in it."""


# --- the text


@dataclass(frozen=True)
class ComparisonText:
    """Token ids to compare logits on, and their texts if they come from a tokenizer."""

    sequences: Sequence[Sequence[int]]
    texts: Sequence[str] = ()
    tokenizer: PreTrainedTokenizerBase | None = None


Check = Callable[[ComparisonText], dict[str, Any]]
"""The check of an export that has been written."""


def comparison_text(
    tokenizer: PreTrainedTokenizerBase, examples: Mapping[str, Sequence[Example]]
) -> ComparisonText:
    """The text of 24 examples, at most 512 tokens of each and 2,048 in total."""
    texts, sequences, left = texts_of(examples), list[list[int]](), _MAX_TOKENS
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])[: min(_MAX_LENGTH, left)]
        if ids:
            sequences.append(ids)
            left -= len(ids)
    return ComparisonText(sequences, texts, tokenizer)


def texts_of(by_task: Mapping[str, Sequence[Example]]) -> list[str]:
    """The texts of 24 examples with their answers, spread over the tasks; a fixed sentence if there are none."""
    picked = [task[index] for index in range(_NUM_TEXTS) for task in by_task.values() if index < len(task)]
    texts = [
        "\n".join(turn.content for turn in example.messages)
        if example.messages
        else example.prompt + example.answer
        for example in picked[:_NUM_TEXTS]
    ]
    return [text for text in texts if text] or [_FALLBACK]


def validation_examples(recipe: Recipe) -> dict[str, list[Example]]:
    """The validation examples of a run by task; empty, with a warning, if its data cannot be read."""
    try:
        return run_examples(recipe, "validation")
    except UserError as error:
        logger.warning("The run's data cannot be read (%s); the check uses a fixed sentence.", error.faults[0])
        return {}


# --- the logits


def logit_differences(logits: Tensor, other: Tensor) -> Tensor:
    """Of each position (positions, 4) float64: largest and mean |difference|, KL(logits || other) in nats, and 1 where
    both have the same argmax. Logits are (positions, vocabulary); in float64, since KL is of second order."""
    found = []
    for some in zip(
        torch.split(logits, _POSITIONS), torch.split(other.to(logits.device), _POSITIONS), strict=True
    ):
        first, second = (each.double() for each in some)
        gap = (first - second).abs()
        log_p, log_q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0.0)
        same = first.argmax(dim=-1) == second.argmax(dim=-1)
        found.append(torch.stack([gap.amax(dim=1), gap.mean(dim=1), kl, same.double()], dim=1).cpu())
    return torch.cat(found)


def summary(differences: Tensor) -> dict[str, Any]:
    """Largest and mean |difference of logits|, largest and mean KL in nats, share of equal argmax; NaN stays."""
    (largest, _, kl_max, _), (_, mean, kl_mean, same) = (
        differences.amax(0).tolist(),
        differences.mean(0).tolist(),
    )
    differs = {"max_logit_difference": largest, "mean_logit_difference": mean}
    return differs | {"kl_max": kl_max, "kl_mean": kl_mean, "argmax_agreement": same}


def compare_logits(
    model: PreTrainedModel, exported: PreTrainedModel, sequences: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Compare all three sets of logits on every sequence of token ids; `exported` is in float32, on any devices.

    Returns the `logit_differences` of each pair by its name, and "spread", the standard deviation over the vocabulary.
    """
    # accelerate's hooks, which only a model on several devices has, move the inputs themselves.
    elsewhere = model.device if hasattr(exported, "_hf_hook") else next(exported.parameters()).device
    total = defaultdict[str, list[Tensor]](list)
    with evaluation_mode(model):
        for ids in sequences:
            tokens = torch.tensor([ids], device=model.device)
            running = logits_of(model, tokens)
            with float32_arithmetic(model):
                reference = logits_of(model, tokens)
            other = logits_of(exported, tokens.to(elsewhere))
            total["exported_vs_running"].append(logit_differences(running, other))
            total["exported_vs_reference"].append(logit_differences(reference, other))
            total["reference_vs_running"].append(logit_differences(running, reference))
            total["spread"].append(reference.double().std(dim=-1).cpu())
    return {name: torch.cat(parts) for name, parts in total.items()}


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(positions, vocabulary) of one text; `tokens` is (1, positions)."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0]


@contextmanager
def float32_arithmetic(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` in float32 inside the block: every 16-bit parameter and buffer is widened, which is exact.

    Frozen layers stay as they are: they compute in the dtype of the activations.
    """
    attention = model.config._attn_implementation
    tensors = list[Tensor | None](model.parameters())
    for module in model.modules():
        if not isinstance(module, FrozenLinear):
            tensors += module._buffers.values()
    narrow = [(each, each.data) for each in tensors if each is not None and each.dtype in NARROW]
    try:
        if attention is not None and "flash" in attention:  # flash kernels have no float32
            model.set_attn_implementation("sdpa" if softcap_of(model.config) is None else "eager")
        for tensor, data in narrow:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def verdict(
    total: Mapping[str, Tensor] | None,
    faults: list[str],
    stored: torch.dtype,
    running_dtype: torch.dtype,
    *,
    lossy: bool = False,
) -> dict[str, Any]:
    """Decide whether an export passes, from its logits and the `faults` found before; returns JSON values.

    The mean difference of the logits may be 16 roundings to `stored` of their spread, or the running model's own error
    scaled from its dtype to the stored one; the mean KL the squared difference. Of a `lossy` format only NaN is a
    fault. `ill_conditioned` counts positions over the tolerance that the running model's own error explains.
    """
    dtypes = {"dtype": stored, "running_dtype": running_dtype}
    result = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
    if total is None:
        return {"passed": not faults, "faults": faults, **result, "num_positions": 0}
    found = {name: summary(each) for name, each in total.items() if name != "spread"}
    error, noise = found["exported_vs_reference"], found["reference_vs_running"]
    errors, noises = total["exported_vs_reference"][:, 0], total["reference_vs_running"][:, 0]
    spread = float(total["spread"].mean())
    # A model that runs in float32 has no error of its own.
    scale = ROUNDING[stored] / ROUNDING.get(running_dtype, 1.0)
    mean = max(_ROUNDINGS_ALLOWED * ROUNDING[stored] * spread, scale * noise["mean_logit_difference"])
    mean = math.inf if lossy else mean + _ARITHMETIC_ALLOWED * spread
    tolerance = {
        "mean_logit_difference": mean,
        "max_logit_difference": _MAX_OVER_MEAN * mean,
        "kl_mean": mean * mean,
    }
    over = ~(errors <= tolerance["max_logit_difference"])  # NaN is over
    wrong = over & ~(errors <= _OVER_OWN_NOISE * scale * noises)
    faults = faults + [
        f"{what} by {error[name]:.3g} on average (allowed {tolerance[name]:.3g})"
        for name, what in _DIFFER.items()
        if not error[name] <= tolerance[name]
    ]
    if wrong.any():
        worst = int(errors.nan_to_num(math.inf).masked_fill(~wrong, -1.0).argmax())
        allowed = f"(allowed {tolerance['max_logit_difference']:.3g}), most at position {worst}"
        faults.append(f"{_DIFFER['mean_logit_difference']} by up to {errors[worst]:.3g} {allowed}")
    return {
        "passed": not faults,
        "faults": faults,
        **result,
        "num_positions": len(errors),
        "ill_conditioned": int(over.sum() - wrong.sum()),
        "logit_spread": spread,
        **found,
        "tolerance": tolerance,
    }


# --- the three forms


def verify_merged(model: PreTrainedModel, directory: Path, text: ComparisonText) -> dict[str, Any]:
    """Reload a merged checkpoint with transformers and compare it with the running model, in float32.

    Passed means: every tensor found its place, the tokenizer gives the same ids, rows of every merged weight equal the
    float64 formula within one rounding, and the logits stay within the tolerance. Without room for two models part of
    the reloaded one is on the host or the disk. Returns the result of `verdict`, and the check of the weights.
    """
    with tempfile.TemporaryDirectory(prefix="qdora-verify-") as scratch:
        options, fits = dict[str, Any](), fits_in_float32(directory, model)
        if not fits:
            limits = {place: int(size / _WORKSPACE) for place, size in _room_beside(model).items()}
            options = {"device_map": "auto", "max_memory": limits, "offload_folder": scratch}
        exported, faults = load_with_transformers(directory, model, **options)
        total = logits_compared(model, exported.to(model.device) if fits else exported, text)
        files = to_stacks(rename_to_model(open_safetensors(directory), exported), model)
        stored = stored_dtype(directory)
        weights = compare_weights(model, lambda path: _dense_weight(files, path), stored)
        faults += _faults_of_files(model, directory, files, text, weights)
    return verdict(total, faults, stored, model.dtype) | {"weights": weights}


def verify_packed(
    model: PreTrainedModel, directory: Path, text: ComparisonText, *, lossy: bool = False
) -> dict[str, Any]:
    """As `verify_merged`, of a bitsandbytes checkpoint. Where a LoRA belongs on it, rows of every scaled base + s B A
    must equal g (W + s B A) within float32's roundings. `lossy`: without a tolerance, since the form rounds again."""
    adapter, layers = directory / ADAPTER_DIRECTORY, adapted_layers(model)
    total: dict[str, Tensor] | None = None
    faults = list[str]()
    if fits_in_float32(directory, model):
        exported, faults = (load_with_peft if adapter.is_dir() else load_with_bnb)(directory, model)
        total = logits_compared(model, exported, text)
        del exported
    else:
        logger.warning(_NO_ROOM)
        source = ModelSource("directory", directory, directory.name, trust_remote_code=has_own_code(model))
        try:  # the names and shapes alone
            bare = skeleton(load_config(source), source)
            tensors_of_source(source, bare)
            if adapter.is_dir():
                read_adapter(bare, adapter)
        except UserError as error:
            faults = list(error.faults)
    files = rename_to_model(gather_packed(open_safetensors(directory)), model)
    factors = stored_factors(model, load_file(adapter / WEIGHTS_FILE)) if adapter.is_dir() else {}

    def weight(path: str) -> Tensor | None:
        item = files.get(f"{path}.weight")
        if item is None or path not in factors:
            return None
        value, (lora_A, lora_B) = item.read(), factors[path]
        base = dequantize(value, torch.float64) if isinstance(value, PackedWeight) else value.double()
        return base + layers[path].scaling * (lora_B.double() @ lora_A.double()).view_as(base)

    weights = compare_weights(model, weight, torch.float32)
    faults += _faults_of_files(model, directory, files, text, weights)
    # Of embeddings, norms and head, which lose nothing in the model's own dtype
    stored = stored_dtype(directory)
    # Trained rows are float32 and are rounded
    if lossy or (stored == model.dtype and not trained_matrices(model)):
        stored = torch.float32
    return verdict(total, faults, stored, model.dtype, lossy=lossy) | {"weights": weights}


def logits_compared(
    model: PreTrainedModel, exported: PreTrainedModel, text: ComparisonText
) -> dict[str, Tensor] | None:
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
        step = max(1, layer.out_features // _ROWS) | 1  # odd: not always the same row of an expert
        a, b = layer.lora_A.double(), layer.gated_B().double().flatten(0, -2)[::step]
        a = a.view(-1, layer.rank, layer.in_features)  # of each expert
        size = layer.out_features // len(a)
        update = torch.stack([row @ a[index * step // size] for index, row in enumerate(b)])
        if isinstance(layer.base, FrozenExperts):  # one expert at a time
            rows = (slice(row, row + 1) for row in range(0, layer.out_features, step))
            base = torch.cat([layer.base.dequantized_rows(row, layer.base.wide_dtype) for row in rows]).to(
                update
            )
        else:
            base = merged(layer.base)[::step].to(update)
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


def _dense_weight(files: Mapping[str, Stored], path: str) -> Any:
    return files[f"{path}.weight"].read() if f"{path}.weight" in files else None


@torch.no_grad()
def _faults_of_files(
    model: PreTrainedModel,
    directory: Path,
    files: Mapping[str, Stored],
    text: ComparisonText,
    weights: Mapping[str, Any],
) -> list[str]:
    """What is wrong with the adapted weights, the trained rows of embeddings and heads, and the tokenizer."""
    faults = []
    if not weights["max_error"] <= 1.0:  # NaN is a fault
        layer, error = weights["worst_layer"], weights["max_error"]
        faults.append(
            f"the weight of {layer} differs from the computed one by {error:.3g} times the rounding error"
        )
    for path, matrix in trained_matrices(model).items():
        # Of a tied pair the files have either name
        names = [path, *(embedding_paths(model) if is_tied(model) else ())]
        found = next((value for name in names if (value := _dense_weight(files, name)) is not None), None)
        if found is None:  # a fault of reloading already
            continue
        rows = found if matrix.ids is None else found[list(matrix.ids)]
        if not torch.equal(rows, matrix.values.detach().cpu().to(rows.dtype)):
            faults.append(f"{path}: its trained rows are not those of the run, rounded to {rows.dtype}")
    own = text.tokenizer
    if own is None:
        return faults
    try:
        code = has_own_code(own)
        reloaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=code)
    except (OSError, ValueError) as error:
        return [*faults, f"the tokenizer does not reload: {error}"]
    if any(reloaded(each)["input_ids"] != own(each)["input_ids"] for each in text.texts):
        faults.append("the reloaded tokenizer gives other ids")
    elif (reloaded.get_added_vocab(), reloaded.chat_template) != (own.get_added_vocab(), own.chat_template):
        faults.append("the reloaded tokenizer has other added tokens or another chat template")
    return faults


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype that the config.json of an export names."""
    dtype: torch.dtype = getattr(
        torch, json.loads((directory / "config.json").read_text(encoding="utf-8"))["dtype"]
    )
    return dtype


# --- reloading


def load_with_transformers(directory: Path, model: PreTrainedModel, **options: Any) -> Loaded:
    """The directory as a float32 model with the attention of `model`."""
    if (attention := model.config._attn_implementation) in ("eager", "sdpa"):
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
    wrong = {key.replace("_", " "): sorted(map(str, info.get(key) or ())) for key in _KEYS}
    faults = [f"{what} on reloading: {first_few(names)}" for what, names in wrong.items() if names]
    return loaded.eval(), faults


def load_with_bnb(directory: Path, model: PreTrainedModel) -> Loaded:
    """A bitsandbytes checkpoint on the device of `model`, computing in float32."""
    base, faults = load_with_transformers(directory, model, device_map={"": model.device})
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
        math.prod(each.shape) * (4 if each.dtype.startswith(("F", "BF")) else DTYPES[each.dtype].itemsize)
        for each in open_safetensors(directory).values()
    )
    return num_bytes * _WORKSPACE <= list(_room_beside(model).values())[-1]


def _room_beside(model: PreTrainedModel) -> dict[int | str, int]:
    """Free bytes of the host, and last of the device of `model` by its number, less the copies of
    `float32_arithmetic`."""
    free_memory()
    device = model.device
    copied = sum(
        4 * each.numel() for each in model.parameters() if each.dtype in NARROW and each.device == device
    )
    if device.type == "cpu":
        return {"cpu": max(0, available_memory_bytes() - copied)}
    return {
        "cpu": available_memory_bytes(),
        device.index or 0: max(0, torch.cuda.mem_get_info(device)[0] - copied),
    }
