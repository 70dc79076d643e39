"""qdora export: the merged model or the adapter of a run, checked against the running model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.atomic_files import atomic_write_json
from qdora.data.example import Example
from qdora.errors import RunFailure, UserError, nearest
from qdora.model.export import DTYPES, export_merged
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.verify import verify_merged
from qdora.train.allocator import keep_freed_memory
from qdora.verbs.assemble import run_examples, write_adapter
from qdora.verbs.card import run_card
from qdora.verbs.show import bar, default_console
from qdora.verbs.trained import TrainedRun, load_run

logger = logging.getLogger("qdora")

FORMATS = ("merged", "peft")
_NUM_TEXTS = 24
"""Held-out texts on which the merged model is compared: about 2,000 tokens, enough for a maximum to mean something."""


def export_run(
    run: Path,
    out: Path,
    *,
    format_: str = "merged",
    dtype: str = "float16",
    step: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a run's model to `out` and check it.

    Args:
        run: Run directory.
        out: New or empty directory.
        format_: "merged" (one dense model for plain transformers) or "peft" (the adapter).
        dtype: Of the merged weights: float16, bfloat16 or float32.
        step: Checkpoint; None takes the finished adapter.
        console: Where progress and the check are shown; standard error by default.
    Returns:
        What stands in `out`/export.json.
    Raises:
        UserError: Wrong arguments.
        RunFailure: The reloaded model differs from the running one; `out` is kept for inspection and named.
    """
    console = console or default_console()
    keep_freed_memory()
    if format_ not in FORMATS:
        raise UserError(f"--format: {format_!r}, allowed: {', '.join(FORMATS)}.{nearest(format_, FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r}, allowed: {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty, allowed: a new or empty directory.")
    trained = load_run(run, step=step)
    if format_ == "peft":
        return _export_adapter(trained, out)
    texts = held_out_texts(trained)
    with bar(console, "merging") as progress:
        result = export_merged(
            trained.model,
            trained.tokenizer,
            out,
            dtype=DTYPES[dtype],
            progress=progress,
            extra_files={"README.md": run_card(trained.run, trained.recipe, trained.state, merged=True)},
        )
    console.print("comparing the merged model with the running one", highlight=False)
    check = verify_merged(trained.model, out, trained.tokenizer, texts=texts)
    zeros = _zeros(trained)
    document = {
        "format": "merged",
        **zeros,
        "run": str(run),
        "state": trained.state,
        **result.to_dict(),
        "verification": check,
    }
    atomic_write_json(out / "export.json", document)
    card = run_card(trained.run, trained.recipe, trained.state, check, merged=True)
    (out / "README.md").write_text(card, encoding="utf-8")
    if zeros and zeros["zeros"]["kept"] < zeros["zeros"]["pruned"]:
        console.print(
            f"the merge is dense: {zeros['zeros']['kept']:,} of {zeros['zeros']['pruned']:,} pruned weights are still "
            "zero; adapter.mask: keep keeps them all",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_verdict(check), markup=False, highlight=False, soft_wrap=True)
    if not check["passed"]:
        raise RunFailure(
            f"{out}: the merged model is not the one that was trained: {'; '.join(check['faults'])}.", safe=[run, out]
        )
    console.print(f"merged model: {out}", markup=False, highlight=False, soft_wrap=True)
    return document


def held_out_texts(trained: TrainedRun) -> list[str]:
    """Validation examples of the run with their answers, spread over its tasks; a fixed sentence where it has none."""
    try:
        by_task = run_examples(trained.recipe, "validation")
    except UserError as error:
        logger.warning("The run's data cannot be read (%s); the check uses a fixed sentence.", error.faults[0])
        by_task = {}
    picked = [task[index] for index in range(_NUM_TEXTS) for task in by_task.values() if index < len(task)]
    texts = [text for text in (_text(example) for example in picked[:_NUM_TEXTS]) if text]
    return texts or ["The quick brown fox jumps over the lazy dog, and then it rests in the shade of an old oak tree."]


def _text(example: Example) -> str:
    if example.messages:
        return "\n".join(content for _, content in example.messages)
    return example.prompt + example.answer


def _zeros(trained: TrainedRun) -> dict[str, Any]:
    """How many weights of the base were pruned, and how many of these are still zero in the merged model."""
    pruned = kept = 0
    adapted = adapted_layers(trained.model)
    for path, frozen in frozen_layers(trained.model).items():
        keep = frozen.keep_mask()
        if keep is not None:
            owner = adapted.get(path.removesuffix(".base"))
            weight = frozen.dequantized() if owner is None else owner.merged_weight()
            pruned += int((~keep).sum())
            kept += int((weight[~keep] == 0).sum())
    if pruned == 0:
        return {}
    return {"zeros": {"pruned": pruned, "kept": kept}}


def _export_adapter(trained: TrainedRun, out: Path) -> dict[str, Any]:
    recipe = trained.recipe
    if recipe.adapter.kind not in ("lora", "dora", "magnitude"):
        raise UserError(f"--format peft: the run has no adapter (adapter.kind {recipe.adapter.kind}).")
    if any(layer.masked for layer in adapted_layers(trained.model).values()):
        raise UserError("--format peft: adapter.mask keep: PEFT cannot mask B A, allowed: --format merged.")
    write_adapter(trained.model, recipe, out)
    return {"format": "peft", "run": str(trained.run.path), "state": trained.state, "directory": str(out)}


def _verdict(check: dict[str, Any]) -> str:
    """The check in words: the merge against the adapter in float32, and how far bf16 arithmetic alone is from that."""
    exact, running = check["merged_vs_reference"], check["merged_vs_running"]
    word = "passed" if check["passed"] else "FAILED"
    return (
        f"{word} on {check['num_positions']:,} tokens: merged against the adapter in float32, largest logit difference "
        f"{exact['max_logit_difference']:.3g}, mean KL {exact['kl_mean']:.2g} nats, same next token "
        f"{exact['argmax_agreement']:.2%}; against the adapter as it runs ({check['running_dtype']}), "
        f"{running['max_logit_difference']:.3g}, {running['kl_mean']:.2g}, {running['argmax_agreement']:.2%}"
    )
