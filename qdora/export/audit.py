"""The audit of an export (`--audit`): compare every form in which the model could be exported, and recommend one.

No form is written: each adapted layer becomes a plain product with the form's dense weight, rounded as the form rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.data.example import Example
from qdora.errors import UserError
from qdora.evaluation.metrics import mean_stderr
from qdora.evaluation.suite import EvaluationResult, evaluate
from qdora.export.logit_comparison import LogitDifference, comparison_text, float32_arithmetic, logits_of
from qdora.export.merged import OpenedMerge
from qdora.export.nf4_lora import check_foldable
from qdora.files.console import bar
from qdora.files.markdown_table import markdown_table
from qdora.model.inject import adapted_layers, frozen_layers, replace_module
from qdora.model.stored_tensors import StoredPacked
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.expert_linear import FrozenExperts
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.bnb_state import FOUR_BIT_KINDS
from qdora.ops.expert_product import frozen_stack
from qdora.ops.expert_tokens import ExpertTokens
from qdora.ops.packed import block_scales, dequantize, quantize

ADAPTER = "adapter"
DESCRIPTIONS = {
    "base": "quantised base, no adapter",
    ADAPTER: "adapter on the quantised base: what was trained",
    "merged": "merged on the dequantised base",
    "original": "merged on the source's own weights",
    "requantized": "merged, then quantised to 4 bits again",
    "nf4-lora": "4 bits with the gain in the block scales, and LoRA",
}
_COMMANDS = {
    "merged": "--format merged",
    "original": "--format merged --base original",
    "requantized": "--format merged --requantize",
    "nf4-lora": "--format nf4-lora",
}
_NUM_EXAMPLES = 32
"""Most examples of a task. Differences between forms are paired, so few examples are enough."""
_WORST_LAYERS = 5
_SAME_KL = 1e-4
"""Mean KL in nats below which a form counts as the same model; fp16 rounding of a merge costs 1e-7 to 1e-6."""
_KEPT_BYTES = 2 * 2**30
"""Dense weights of a form are kept up to this; above it each is made again at every forward pass."""

Layer = AdaptedLinear | FrozenLinear
FormWeight = Callable[[str, Layer], Tensor | None]
"""Path and layer -> dense weight (out, in), float32; None leaves the layer as it is."""


@torch.no_grad()
def audit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenedMerge | None,
    *,
    examples: Mapping[str, Sequence[Example]],
    dtype: torch.dtype,
    console: Console,
) -> dict[str, Any]:
    """Compare every form with the running adapter, all in float32 arithmetic.

    Args:
        opened: The base and adapter on disk; None for a pruned base, since the source's weights are not pruned.
        examples: Held-out examples by task, for logits and NLL; may be empty.
        dtype: The dtype to which merged weights are rounded.
    Returns: JSON values: `forms` (differences of logits from the adapter, NLL by task, mean NLL difference per example
        with its standard error), `layers` (quantisation error over update, worst first), `verdict`.
    """
    sequences = comparison_text(tokenizer, examples, max_tokens=1024, max_length=256).sequences
    device = next(model.parameters()).device
    tokens = [torch.tensor([ids], device=device) for ids in sequences]
    forms: dict[str, dict[str, Any]] = {ADAPTER: {}}
    results: dict[str, EvaluationResult] = {}
    given = {task: found for task, found in examples.items() if found}

    def score(name: str) -> None:
        if given:
            results[name] = evaluate(model, tokenizer, given, limit=_NUM_EXAMPLES)

    found = export_forms(model, opened, dtype)
    with float32_arithmetic(model), bar(console, "auditing") as progress:
        reference = [logits_of(model, ids) for ids in tokens]
        score(ADAPTER)
        for number, (name, form) in enumerate(found.items(), start=1):
            progress(number, len(found) + 1)
            if isinstance(form, str):
                forms[name] = {"why_not": form}
                continue
            with computing(model, form):
                difference = LogitDifference()
                for ids, expected in zip(tokens, reference, strict=True):
                    difference.add(expected, logits_of(model, ids))
                if math.isfinite(difference.kl_sum):
                    forms[name] = {"logits": difference.to_dict()}
                    score(name)
                else:
                    forms[name] = {"why_not": f"its values are not finite in {dtype}"}
        progress(len(found) + 1, len(found) + 1)
    for name, result in results.items():
        forms[name]["nll_per_token"] = {task: row.nll_per_token for task, row in result.tasks.items()}
        forms[name]["nll_difference"] = _paired(result, results[ADAPTER])
    layers = [] if opened is None else layer_errors(model, opened)
    ordered = {name: forms[name] for name in DESCRIPTIONS}
    return {
        "num_positions": sum(len(ids) for ids in sequences),
        "num_examples": len(results[ADAPTER].per_example) if given else 0,
        "forms": ordered,
        "layers": layers,
        "verdict": recommendation(ordered, layers),
    }


def _paired(result: EvaluationResult, reference: EvaluationResult) -> dict[str, float | None]:
    """Mean difference of the NLL of an answer, in nats, and its standard error over examples."""
    gaps = [own["nll"] - other["nll"] for own, other in zip(result.per_example, reference.per_example, strict=True)]
    gap = mean_stderr(gaps)
    return {"mean": gap.value, "stderr": None if math.isnan(gap.stderr) else gap.stderr}


def export_forms(model: PreTrainedModel, opened: OpenedMerge | None, dtype: torch.dtype) -> dict[str, FormWeight | str]:
    """What each form of a LoRA or DoRA model computes, or why the form is not possible; arguments as in `audit`."""

    def merged(path: str, layer: Layer) -> Tensor | None:
        return _rounded(layer.merged_weight(), dtype) if isinstance(layer, AdaptedLinear) else None

    def original(path: str, layer: Layer) -> Tensor | None:
        weight = None if opened is None else source_weight(opened, path)
        if weight is None:
            return None
        base = layer.base if isinstance(layer, AdaptedLinear) else layer
        weight = weight.to(base.stored_weight.device)
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

    if opened is None:
        no_source = "the base is pruned, and the source's own weights are not"
    elif opened.merge.source.is_gguf:
        no_source = "the base is a GGUF file, not the 16-bit model"
    elif opened.merge.quant.kind == "none" or any(isinstance(item, StoredPacked) for item in opened.stored.values()):
        no_source = "the source has no other weights than those of training"
    else:
        no_source = ""
    try:
        check_foldable(model, torch.float32)
        not_foldable = ""
    except UserError as error:
        not_foldable = error.faults[0]
    four_bits = any(layer.kind in FOUR_BIT_KINDS for layer in frozen_layers(model).values())
    return {
        "base": _base,
        "merged": merged,
        "original": no_source or original,
        "requantized": requantized if four_bits else "the base is not in 4 bits",
        "nf4-lora": not_foldable or _nf4_lora,
    }


def source_weight(opened: OpenedMerge, path: str) -> Tensor | None:
    """The source's own weight of a quantised layer, (out, in) float32; None if training did not quantise it."""
    if path not in opened.quantized:
        return None
    item = opened.item(f"{path}.weight")
    value = None if item is None else item.read()
    return value.float() if isinstance(value, Tensor) else None


def _base(path: str, layer: Layer) -> Tensor | None:
    return layer.base.dequantized(torch.float32) if isinstance(layer, AdaptedLinear) else None


def _nf4_lora(path: str, layer: Layer) -> Tensor | None:
    """The base with g in its block scales, plus s (g B) A; scales and g B are rounded to float32 as in the files."""
    if not isinstance(layer, AdaptedLinear):
        return None
    packed = layer.base.packed_weight
    gain = layer.merged_gain()
    lora_b = layer.stored_B().float()
    if packed is None:
        base = layer.base.dequantized(torch.float32)
        base = base if gain is None else base * gain.reshape(-1, 1)
    else:
        scales = block_scales(packed)
        if gain is not None:
            scales = (scales.reshape(layer.out_features, -1) * gain.unsqueeze(1)).reshape(-1)
        base = dequantize(replace(packed, absmax=scales, nested=None), torch.float32)
    factor = lora_b if gain is None else lora_b * gain.unsqueeze(-1)
    return torch.add(base, (factor @ layer.lora_A.detach().float()).view_as(base), alpha=layer.scaling)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).float()


@contextmanager
def computing(model: PreTrainedModel, weight: FormWeight) -> Iterator[None]:
    """Inside the block `model` computes what a form computes; afterwards it is as it was."""
    layers: dict[str, Layer] = {**adapted_layers(model)}
    layers |= {path: layer for path, layer in frozen_layers(model).items() if path.removesuffix(".base") not in layers}
    keep = sum(layer.in_features * layer.out_features * 4 for layer in layers.values()) <= _KEPT_BYTES
    replaced: dict[str, Layer] = {}
    try:
        for path, layer in layers.items():
            first = weight(path, layer)
            if first is None:
                continue
            base = layer.base if isinstance(layer, AdaptedLinear) else layer
            make = partial(weight, path, layer)
            kept = first if keep else None
            computed = (
                _ComputedExperts(base, make, kept)
                if isinstance(base, FrozenExperts)
                else _ComputedLinear(base, make, kept)
            )
            replace_module(model, path, computed)
            replaced[path] = layer
            del first, kept
        yield
    finally:
        for path, layer in replaced.items():
            replace_module(model, path, layer)


class _ComputedLinear(nn.Module):
    """y = x W^T + bias with a W that is kept, or made at every forward pass."""

    def __init__(self, base: FrozenLinear, make: Callable[[], Tensor | None], kept: Tensor | None) -> None:
        super().__init__()
        self.make, self.kept = make, kept
        self.register_buffer("bias", base.bias)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W in `dtype`."""
        weight = self.make() if self.kept is None else self.kept
        assert weight is not None  # it was not None when the layer was replaced
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        bias = self.get_buffer("bias").to(x.dtype) if self._buffers["bias"] is not None else None
        return nn.functional.linear(x, self.weight(x.dtype), bias)


class _ComputedExperts(_ComputedLinear):
    """The same for a stack of experts."""

    def __init__(self, base: FrozenExperts, make: Callable[[], Tensor | None], kept: Tensor | None) -> None:
        super().__init__(base, make, kept)
        self.num_experts = base.num_experts

    def forward(self, x: Tensor, tokens: ExpertTokens | None = None) -> Tensor:
        """(tokens, in), sorted by expert -> (tokens, out)."""
        assert tokens is not None, "a stack of experts needs to know whose tokens these are"
        return frozen_stack(x, self.weight(x.dtype), tokens, self._buffers["bias"])


@torch.no_grad()
def layer_errors(model: PreTrainedModel, opened: OpenedMerge) -> list[dict[str, Any]]:
    """Compare what quantising each adapted layer's base changed with what was learnt on it, largest ratio first.

    Returns: For each layer whose source weight exists: `path`; `quantization_error`, ||dequantised base - source|| /
        ||source||; `update`, ||merged - dequantised base|| / ||source||; and their `ratio`. All are Frobenius norms.
    """
    found: list[dict[str, Any]] = []
    for path, layer in adapted_layers(model).items():
        source = source_weight(opened, path)
        if source is None:
            continue
        base = layer.base.dequantized(torch.float32)
        source = source.to(base.device)
        size = float(source.norm())
        if size > 0:
            update = float((layer.merged_weight() - base).norm()) / size
            error = float((base - source).norm()) / size
            ratio = error / update if update > 0 else math.inf
            found.append({"path": path, "quantization_error": error, "update": update, "ratio": ratio})
    return sorted(found, key=lambda each: -each["ratio"])


def recommendation(forms: Mapping[str, Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> str:
    """Which form to ship, and why, in words."""
    same = [name for name in ("merged", "nf4-lora") if "logits" in forms[name] and _is_same(forms[name])]
    parts = []
    if same:
        kl = max(forms[name]["logits"]["kl_mean"] for name in same)
        named = " or ".join(f"`{_COMMANDS[name]}` ({'4' if name == 'nf4-lora' else '16'} bits)" for name in same)
        they = "both are" if len(same) == 2 else "it is"
        parts.append(f"Ship {named}: {they} the model that was trained (mean KL at most {kl:.1g} nats).")
    else:
        what = "No form is the model that was trained"
        parts.append(f"{what} (mean KL at most {_SAME_KL:g} nats): look at the table before shipping.")
    parts += [_cost(name, forms[name]) for name in ("original", "requantized") if "logits" in forms[name]]
    parts += [
        f"`{_COMMANDS[name]}` is not possible: {forms[name]['why_not']}."
        for name in ("nf4-lora", "original")
        if forms[name].get("why_not")
    ]
    if layers:
        above = sum(layer["ratio"] > 1 for layer in layers)
        text = f"Quantisation changed the weights more than training did in {above} of {len(layers)} layers"
        if above and "logits" in forms["original"] and not _is_same(forms["original"]):
            text += ", so `--base original`, which takes that change away, gives a different model"
        parts.append(f"{text}.")
    return " ".join(part.replace("..", ".") for part in parts)


def _is_same(form: Mapping[str, Any]) -> bool:
    """Whether a form that was compared counts as the model that was trained."""
    return bool(form["logits"]["kl_mean"] <= _SAME_KL)


def _cost(name: str, form: Mapping[str, Any]) -> str:
    logits = form["logits"]
    kl, agreement = logits["kl_mean"], logits["argmax_agreement"]
    what = "hardly differs from the trained model" if _is_same(form) else "is another model"
    text = f"`{_COMMANDS[name]}` {what}: mean KL {kl:.2g} nats, same next token {agreement:.1%}"
    gap = form.get("nll_difference")
    if gap is None or gap["stderr"] is None:
        return text + "."
    mean, twice = gap["mean"], 2 * gap["stderr"]
    if abs(mean) <= twice:
        return text + f"; its answers do not differ significantly ({mean:+.3f} +- {twice:.3f} nats each)."
    return text + f"; its answers are {'worse' if mean > 0 else 'better'} by {abs(mean):.3f} +- {twice:.3f} nats each."


def audit_page(name: str, found: Mapping[str, Any]) -> str:
    """The audit of the exports of the run `name` as a page in Markdown."""
    tasks = list(found["forms"][ADAPTER].get("nll_per_token", {}))
    columns = ["form", "largest logit difference", "mean", "mean KL (nats)", "same argmax"]
    columns += [f"NLL per token, {task}" for task in tasks]
    basis = f"{found['num_positions']:,} tokens of held-out text and {found['num_examples']:,} examples"
    lines = [f"# Audit of {name}", "", found["verdict"], "", f"On {basis}, in float32 arithmetic.", ""]
    rows = []
    for form, row in found["forms"].items():
        logits = row.get("logits")
        cells = [DESCRIPTIONS[form]]
        if logits is None:
            cells += ["0", "0", "0", "100.00 %"] if form == ADAPTER else ["not possible", "", "", ""]
        else:
            cells += [f"{logits[key]:.3g}" for key in ("max_logit_difference", "mean_logit_difference", "kl_mean")]
            cells.append(f"{100 * logits['argmax_agreement']:.2f} %")
        cells += [f"{row['nll_per_token'][task]:.4f}" if "nll_per_token" in row else "" for task in tasks]
        rows.append(cells)
    lines.append(markdown_table(columns, rows))
    if found["layers"]:
        lines += ["", "Layers in which the rounding of the base is largest against what was learnt:", ""]
        worst = [
            (e["path"], f"{e['quantization_error']:.3%}", f"{e['update']:.3%}", f"{e['ratio']:.2f}")
            for e in found["layers"][:_WORST_LAYERS]
        ]
        lines.append(markdown_table(("layer", "quantisation error", "update", "ratio"), worst))
    return "\n".join(lines) + "\n"
