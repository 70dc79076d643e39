"""The audit of an export (`--audit`): KL and NLL of each form in which the model could be exported.

No form is written: each adapted layer gives its place to the layer that the form's files would hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.adapter.frozen_linear import FrozenLinear
from qdora.data.example import Example
from qdora.errors import UserError
from qdora.evaluate.intervals import mean_stderr
from qdora.evaluate.suite import EvaluationResult, evaluate
from qdora.export.logit_comparison import LogitDifference, comparison_text, float32_arithmetic, logits_of
from qdora.export.merged import OpenedMerge, check_merge
from qdora.export.nf4_lora import check_foldable
from qdora.files.console import bar
from qdora.files.markdown_table import markdown_table
from qdora.model.inject import adapted_layer, adapted_layers, frozen_layers, frozen_like, replace_module
from qdora.quant.bnb_state import FOUR_BIT_KINDS
from qdora.quant.packed import block_scales, quantize
from qdora.quant.tiles import Weight

_NUM_EXAMPLES = 32
"""Most examples of a task. Differences between forms are paired, so few examples are enough."""

Layer = AdaptedLinear | FrozenLinear
Form = Callable[[str, Layer], Layer | None]
"""Path and layer -> the layer in its place; None leaves it as it is."""


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
    """Compare every form with the running adapter, all in float32 arithmetic. One form at a time is in memory.

    Args:
        opened: The base and adapter on disk; None for a pruned base, since the source's weights are not pruned.
        examples: Held-out examples by task, for logits and NLL; may be empty.
        dtype: The dtype to which merged weights are rounded.
    Returns: JSON values; `forms` has the difference of each form's logits from the adapter's, the NLL by task, and the
        mean NLL difference per example with its standard error, or `why_not`.
    """
    sequences = comparison_text(tokenizer, examples, max_tokens=1024, max_length=256).sequences
    device = next(model.parameters()).device
    given = {task: found for task, found in examples.items() if found}
    forms: dict[str, Form | str] = {"adapter": lambda _path, _layer: None, **export_forms(model, opened, dtype)}
    found: dict[str, dict[str, Any]] = {}
    reference: list[Tensor] = []
    trained: EvaluationResult | None = None
    with float32_arithmetic(model), bar(console, "auditing") as progress:
        for number, (name, form) in enumerate(forms.items(), start=1):
            progress(number, len(forms))
            if isinstance(form, str):
                found[name] = {"why_not": form}
                continue
            with in_form(model, form):
                logits = [logits_of(model, torch.tensor([ids], device=device)) for ids in sequences]
                reference = reference or logits
                difference = LogitDifference()
                for expected, own in zip(reference, logits, strict=True):
                    difference.add(expected, own)
                if not math.isfinite(difference.kl_sum):
                    found[name] = {"why_not": f"its values are not finite in {dtype}"}
                    continue
                found[name] = {"logits": difference.to_dict()}
                if given:
                    result = evaluate(model, tokenizer, given, limit=_NUM_EXAMPLES)
                    trained = trained or result
                    pairs = zip(result.per_example, trained.per_example, strict=True)
                    gap = mean_stderr([own["nll"] - other["nll"] for own, other in pairs])
                    stderr = None if math.isnan(gap.stderr) else gap.stderr
                    found[name]["nll_per_token"] = {task: row.nll_per_token for task, row in result.tasks.items()}
                    found[name]["nll_difference"] = {"mean": gap.value, "stderr": stderr}
    num_examples = 0 if trained is None else len(trained.per_example)
    return {"num_positions": sum(map(len, sequences)), "num_examples": num_examples, "forms": found}


def export_forms(model: PreTrainedModel, opened: OpenedMerge | None, dtype: torch.dtype) -> dict[str, Form | str]:
    """The layers of each form of a LoRA or DoRA model, or why the form is not possible; arguments as in `audit`."""

    def merged(_path: str, layer: Layer) -> Layer | None:
        return _frozen(layer, layer.merged_weight(dtype)) if isinstance(layer, AdaptedLinear) else None

    def original(path: str, layer: Layer) -> Layer | None:
        weight = None if opened is None else source_weight(opened, path)
        if weight is None:
            return None
        if isinstance(layer, FrozenLinear):
            return _frozen(layer, weight.to(layer.device, dtype))
        return _frozen(layer, layer.merged_weight(dtype, base=weight.to(layer.base.device)))

    def requantized(path: str, layer: Layer) -> Layer | None:
        packed = layer.base.packed_weight if isinstance(layer, AdaptedLinear) else None
        if packed is None or isinstance(layer, FrozenLinear):
            return merged(path, layer)
        double = packed.nested is not None
        return _frozen(layer, quantize(layer.merged_weight(), packed.kind, packed.block_size, double))

    no_source = "the base is pruned, and the source's own weights are not"
    if opened is not None:
        no_source = _fault(check_merge, replace(opened.merge, base="original"))
    four_bits = any(layer.kind in FOUR_BIT_KINDS for layer in frozen_layers(model).values())
    return {
        "base": lambda _path, layer: layer.base if isinstance(layer, AdaptedLinear) else None,
        "merged": merged,
        "original": no_source or original,
        "requantized": requantized if four_bits else "the base is not in 4 bits",
        "nf4-lora": _fault(check_foldable, model, torch.float32) or _nf4_lora,
    }


def _fault(check: Callable[..., None], *arguments: Any) -> str:
    try:
        check(*arguments)
    except UserError as error:
        return error.faults[0]
    return ""


def source_weight(opened: OpenedMerge, path: str) -> Tensor | None:
    """The source's own weight of a quantised layer, (out, in) float32; None if training did not quantise it."""
    item = opened.item(f"{path}.weight") if path in opened.quantized else None
    value = None if item is None else item.read()
    return value.float() if isinstance(value, Tensor) else None


def _frozen(layer: Layer, weight: Weight) -> FrozenLinear:
    """A frozen layer of this weight in the place of `layer`."""
    base = layer.base if isinstance(layer, AdaptedLinear) else layer
    return frozen_like(base, weight, base.bias)


@torch.no_grad()
def _nf4_lora(_path: str, layer: Layer) -> Layer | None:
    """The base with g in its block scales, and LoRA with g B; scales and g B are rounded to float32 as in the files."""
    if not isinstance(layer, AdaptedLinear):
        return None
    packed, gain = layer.base.packed_weight, layer.merged_gain()
    gain = torch.ones(layer.out_features, device=layer.base.device) if gain is None else gain
    if packed is None:
        base = _frozen(layer, layer.base.dequantized(torch.float32) * gain.reshape(-1, 1))
    else:
        scales = block_scales(packed).reshape(layer.out_features, -1) * gain.reshape(-1, 1)
        base = _frozen(layer, replace(packed.clone(), absmax=scales.reshape(-1), nested=None))
    lora = adapted_layer(base, kind="lora", rank=layer.rank, alpha=layer.alpha, rank_stabilized=layer.rank_stabilized)
    lora.lora_A.copy_(layer.lora_A)  # one that experts share is copied to each
    lora.lora_B.copy_(layer.stored_B().float() * gain.reshape(*lora.lora_B.shape[:-1], 1))
    return lora


@contextmanager
def in_form(model: PreTrainedModel, form: Form) -> Iterator[None]:
    """Inside the block `model` has the layers of a form; afterwards it is as it was."""
    layers: dict[str, Layer] = {**adapted_layers(model)}
    layers |= {path: layer for path, layer in frozen_layers(model).items() if path.removesuffix(".base") not in layers}
    replaced: dict[str, Layer] = {}
    try:
        for path, layer in layers.items():
            made = form(path, layer)
            if made is not None:
                replace_module(model, path, made.eval())
                replaced[path] = layer
        yield
    finally:
        for path, layer in replaced.items():
            replace_module(model, path, layer)


def audit_table(found: Mapping[str, Any]) -> str:
    """The result of `audit` in Markdown."""
    tasks = list(found["forms"]["adapter"].get("nll_per_token", {}))
    columns = ["form", "largest logit difference", "mean KL (nats)", "same next token"]
    columns += [f"NLL per token, {task}" for task in tasks]
    rows = []
    for name, form in found["forms"].items():
        row = [f"{name}: {form['why_not']}" if "why_not" in form else name]
        if "logits" in form:
            largest, kl, same = (form["logits"][key] for key in ("max_logit_difference", "kl_mean", "argmax_agreement"))
            row += [f"{largest:.3g}", f"{kl:.3g}", f"{same:.2%}"]
            row += [f"{form['nll_per_token'][task]:.4f}" for task in tasks]
        rows.append(row + [""] * (len(columns) - len(row)))
    return markdown_table(columns, rows)
