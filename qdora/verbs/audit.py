"""The audit of an export: what every form of the trained model costs, side by side, and which one to ship."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.data.example import Example
from qdora.evaluation.suite import EvaluationResult, evaluate
from qdora.model.export_streamed import OpenedMerge
from qdora.model.logit_comparison import Difference, float32_arithmetic, logits_of, token_sequences
from qdora.model.variants import Variant, computing, layer_errors, variants
from qdora.verbs.show import bar

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
_EXAMPLES = 32
"""Of a task. Differences between forms are paired, so that few examples tell them apart."""
_WORST_LAYERS = 5
_SAME_KL = 1e-4
"""Mean KL in nats below which a form counts as the same model; fp16 rounding of a merge is 1e-7 to 1e-6."""


@torch.no_grad()
def audit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenedMerge | None,
    *,
    texts: Sequence[str],
    examples: Mapping[str, Sequence[Example]],
    dtype: torch.dtype,
    limit: int = _EXAMPLES,
    console: Console,
) -> dict[str, Any]:
    """Compare every form with the running adapter, all in float32 arithmetic.

    Args:
        model: The running model with its adapter.
        tokenizer: Its tokenizer.
        opened: Its base and adapter on disk; None for a pruned base: the source's own weights are another model's.
        texts: Held-out text for the logits.
        examples: Held-out examples by task for the NLL; may be empty.
        dtype: To which merged weights are rounded.
        limit: Most examples of a task.
        console: For progress.
    Returns:
        JSON values: `forms` (differences of logits from the adapter, NLL by task, mean NLL difference per example with
        its standard error), `layers` (quantisation error over update, worst first), `verdict`.
    """
    sequences = token_sequences(tokenizer, texts, None, max_tokens=1024, max_length=256)
    device = next(model.parameters()).device
    tokens = [torch.tensor([ids], device=device) for ids in sequences]
    forms: dict[str, dict[str, Any]] = {}
    results: dict[str, EvaluationResult] = {}
    given = {task: found for task, found in examples.items() if found}

    def score(name: str) -> None:
        if given:
            results[name] = evaluate(model, tokenizer, given, limit=limit, per_example=True)

    found = [Variant(ADAPTER, None), *variants(model, opened, dtype)]
    with float32_arithmetic(model), bar(console, "auditing") as progress:
        reference = [logits_of(model, ids) for ids in tokens]
        for number, form in enumerate(found):
            if form.name == ADAPTER:
                forms[ADAPTER] = {}
                score(ADAPTER)
            elif form.weight is None:
                forms[form.name] = {"why_not": form.why_not}
            else:
                with computing(model, form.weight):
                    difference = Difference()
                    for ids, expected in zip(tokens, reference, strict=True):
                        difference.add(expected, logits_of(model, ids))
                    forms[form.name] = {"logits": difference.to_dict()}
                    if math.isfinite(difference.kl_sum):
                        score(form.name)
                    else:
                        forms[form.name] = {"why_not": f"its values are not finite in {dtype}"}
            progress(number + 1, len(found))
    for name, result in results.items():
        forms[name]["nll_per_token"] = {task: row.nll_per_token for task, row in result.tasks.items()}
        forms[name]["nll_difference"] = _paired(result, results[ADAPTER])
    layers = [
        {"path": e.path, "quantization_error": e.quantization_error, "update": e.update, "ratio": e.ratio}
        for e in ([] if opened is None else layer_errors(model, opened))
    ]
    ordered = {name: forms[name] for name in DESCRIPTIONS}
    return {
        "num_positions": sum(len(ids) for ids in sequences),
        "num_examples": len(results[ADAPTER].per_example) if given else 0,
        "forms": ordered,
        "layers": layers,
        "verdict": verdict(ordered, layers),
    }


def _paired(result: EvaluationResult, reference: EvaluationResult) -> dict[str, float | None]:
    """Mean difference of the NLL of an answer, nats, and its standard error over examples."""
    gaps = [
        first["nll"] - second["nll"] for first, second in zip(result.per_example, reference.per_example, strict=True)
    ]
    mean = math.fsum(gaps) / len(gaps)
    if len(gaps) < 2:
        return {"mean": mean, "stderr": None}
    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    return {"mean": mean, "stderr": math.sqrt(variance / len(gaps))}


def verdict(forms: Mapping[str, Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> str:
    """Which form to ship, and why, in words."""
    same = [name for name in ("merged", "nf4-lora") if _is_same(forms[name])]
    parts = []
    if same:
        kl = max(forms[name]["logits"]["kl_mean"] for name in same)
        named = " or ".join(f"`{_COMMANDS[name]}` ({'4' if name == 'nf4-lora' else '16'} bits)" for name in same)
        they = "both are" if len(same) == 2 else "it is"
        parts.append(f"Ship {named}: {they} the model that was trained (mean KL at most {kl:.1g} nats).")
    else:
        parts.append("No form is the model that was trained within 1e-4 nats of KL: look at the table before shipping.")
    parts += [_cost(name, forms[name]) for name in ("original", "requantized") if "logits" in forms[name]]
    parts += [
        f"`{_COMMANDS[name]}` is not possible: {forms[name]['why_not']}."
        for name in ("nf4-lora", "original")
        if forms[name].get("why_not")
    ]
    if layers:
        above = sum(layer["ratio"] > 1 for layer in layers)
        parts.append(
            f"In {above} of {len(layers)} layers the rounding of the base is larger than what was learnt on it"
            + (": there a merge on other weights than those trained on is a different model." if above else ".")
        )
    return " ".join(part.replace("..", ".") for part in parts)


def _is_same(form: Mapping[str, Any]) -> bool:
    return "logits" in form and form["logits"]["kl_mean"] <= _SAME_KL


def _cost(name: str, form: Mapping[str, Any]) -> str:
    logits = form["logits"]
    text = (
        f"`{_COMMANDS[name]}` is another model: mean KL {logits['kl_mean']:.2g} nats, same next token "
        f"{logits['argmax_agreement']:.1%}"
    )
    gap = form.get("nll_difference")
    if gap is None or gap["stderr"] is None:
        return text + "."
    mean, twice = gap["mean"], 2 * gap["stderr"]
    if abs(mean) <= twice:
        return text + f"; its answers are not told apart ({mean:+.3f} +- {twice:.3f} nats each)."
    return text + f"; its answers are {'worse' if mean > 0 else 'better'} by {abs(mean):.3f} +- {twice:.3f} nats each."


def audit_page(name: str, found: Mapping[str, Any]) -> str:
    """The audit as a page in Markdown."""
    tasks = list(found["forms"][ADAPTER].get("nll_per_token", {}))
    columns = ["form", "largest logit difference", "mean", "mean KL (nats)", "same argmax"]
    columns += [f"NLL per token, {task}" for task in tasks]
    basis = f"{found['num_positions']:,} tokens of held-out text and {found['num_examples']:,} examples"
    lines = [f"# Audit of {name}", "", found["verdict"], "", f"On {basis}, in float32 arithmetic.", ""]
    lines += ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for form, row in found["forms"].items():
        logits = row.get("logits")
        cells = [DESCRIPTIONS[form]]
        if logits is None:
            cells += ["0", "0", "0", "100.00 %"] if form == ADAPTER else ["not possible", "", "", ""]
        else:
            cells += [f"{logits[key]:.3g}" for key in ("max_logit_difference", "mean_logit_difference", "kl_mean")]
            cells.append(f"{100 * logits['argmax_agreement']:.2f} %")
        cells += [f"{row['nll_per_token'][task]:.4f}" if "nll_per_token" in row else "" for task in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    if found["layers"]:
        lines += ["", "Layers in which the rounding of the base is largest against what was learnt:", ""]
        lines += ["| layer | quantisation error | update | ratio |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {e['path']} | {e['quantization_error']:.3%} | {e['update']:.3%} | {e['ratio']:.2f} |"
            for e in found["layers"][:_WORST_LAYERS]
        ]
    return "\n".join(lines) + "\n"
