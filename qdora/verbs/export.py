"""qdora export: a run's model in a form that can be deployed, checked against the running model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from qdora.atomic_files import atomic_write_json
from qdora.data.example import Example
from qdora.errors import RunFailure, UserError, nearest
from qdora.model.export import export_merged
from qdora.model.export_directory import DTYPES
from qdora.model.export_nf4_lora import export_nf4_lora
from qdora.model.verify import verify_merged
from qdora.model.verify_nf4_lora import verify_nf4_lora
from qdora.train.allocator import keep_freed_memory
from qdora.verbs.assemble import run_examples, write_adapter
from qdora.verbs.card import run_card
from qdora.verbs.show import bar, default_console
from qdora.verbs.trained import TrainedRun, load_run

logger = logging.getLogger("qdora")

Format = Literal["merged", "peft", "nf4-lora"]
FORMATS: tuple[Format, ...] = get_args(Format)
_NUM_TEXTS = 24
"""Held-out texts on which the merged model is compared: about 2,000 tokens, enough for a maximum to mean something."""


def export_run(
    run: Path,
    out: Path,
    *,
    format_: str = "merged",
    dtype: str | None = None,
    step: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a run's model to `out` and check it.

    Args:
        run: Run directory.
        out: New or empty directory.
        format_: "merged" (one dense model for plain transformers), "nf4-lora" (a 4-bit base with the gain in its block
            scales, and plain LoRA) or "peft" (the adapter as it was trained).
        dtype: Of the weights that are not quantised: float16, bfloat16 or float32. None: float16 for "merged", the
            run's own for "nf4-lora".
        step: Checkpoint; None takes the finished adapter.
        console: Where progress and the check are shown; standard error by default.
    Returns:
        What stands in `out`/export.json.
    Raises:
        UserError: Wrong arguments, or a run that the format cannot hold.
        RunFailure: The reloaded model differs from the running one; `out` is kept for inspection and named.
    """
    console = console or default_console()
    keep_freed_memory()
    if format_ not in FORMATS:
        raise UserError(f"--format: {format_!r}, allowed: {', '.join(FORMATS)}.{nearest(format_, FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r}, allowed: {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    if dtype is not None and format_ == "peft":
        raise UserError("--dtype: has no effect on --format peft, whose tensors are written as they were trained.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty, allowed: a new or empty directory.")
    trained = load_run(run, step=step)
    if format_ == "peft":
        return _export_adapter(trained, out)
    # Before anything is written, so that data which cannot be read is known of.
    texts = held_out_texts(trained)
    form: Literal["merged", "nf4-lora"] = "merged" if format_ == "merged" else "nf4-lora"
    export = _export_merged if form == "merged" else _export_nf4_lora
    result, check = export(trained, out, dtype, texts, console)
    document = {"format": form, "run": str(run), "state": trained.state, **result, "verification": check}
    atomic_write_json(out / "export.json", document)
    card = run_card(trained.run, trained.recipe, trained.state, check, form=form)
    (out / "README.md").write_text(card, encoding="utf-8")
    console.print(_verdict(check), markup=False, highlight=False, soft_wrap=True)
    if not check["passed"]:
        raise RunFailure(
            f"{out}: the exported model is not the one that was trained: {'; '.join(check['faults'])}.",
            safe=[run, out],
        )
    console.print(f"exported model: {out}", markup=False, highlight=False, soft_wrap=True)
    return document


_Written = tuple[dict[str, Any], dict[str, Any]]
"""What was written, and its verification."""


def _export_merged(trained: TrainedRun, out: Path, dtype: str | None, texts: list[str], console: Console) -> _Written:
    card = run_card(trained.run, trained.recipe, trained.state, form="merged")
    with bar(console, "merging") as progress:
        result = export_merged(
            trained.model,
            trained.tokenizer,
            out,
            dtype=DTYPES[dtype or "float16"],
            progress=progress,
            extra_files={"README.md": card},
        )
    console.print("comparing the merged model with the running one", highlight=False)
    return result.to_dict(), verify_merged(trained.model, out, trained.tokenizer, texts=texts)


def _export_nf4_lora(trained: TrainedRun, out: Path, dtype: str | None, texts: list[str], console: Console) -> _Written:
    card = run_card(trained.run, trained.recipe, trained.state, form="nf4-lora")
    with bar(console, "folding") as progress:
        result = export_nf4_lora(
            trained.model,
            trained.tokenizer,
            out,
            dtype=None if dtype is None else DTYPES[dtype],
            progress=progress,
            extra_files={"README.md": card},
        )
    lost = result.scale_error_if_double_quantised
    if lost:
        console.print(
            f"block scales kept in float32; double quantisation would change them by {lost['mean']:.2%} "
            f"(at most {lost['max']:.2%})",
            markup=False,
            highlight=False,
        )
    console.print("comparing the exported model with the running one", highlight=False)
    return result.to_dict(), verify_nf4_lora(trained.model, out, trained.tokenizer, texts=texts)


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


def _export_adapter(trained: TrainedRun, out: Path) -> dict[str, Any]:
    recipe = trained.recipe
    if recipe.adapter.kind not in ("lora", "dora"):
        raise UserError(f"--format peft: the run has no adapter (adapter.kind {recipe.adapter.kind}).")
    write_adapter(trained.model, recipe, out)
    return {"format": "peft", "run": str(trained.run.path), "state": trained.state, "directory": str(out)}


def _verdict(check: dict[str, Any]) -> str:
    """The check in words: the export against the adapter in float32, and how far bf16 arithmetic alone is from that."""
    exact, running = check["exported_vs_reference"], check["exported_vs_running"]
    word = "passed" if check["passed"] else "FAILED"
    return (
        f"{word} on {check['num_positions']:,} tokens: exported against the adapter in float32, largest logit "
        f"difference {exact['max_logit_difference']:.3g}, mean KL {exact['kl_mean']:.2g} nats, same next token "
        f"{exact['argmax_agreement']:.2%}; against the adapter as it runs ({check['running_dtype']}), "
        f"{running['max_logit_difference']:.3g}, {running['kl_mean']:.2g}, {running['argmax_agreement']:.2%}"
    )
