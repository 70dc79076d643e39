"""qdora eval: score a run, a merged directory or a bare model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.data.build_data import run_examples, task_examples
from qdora.data.example import Example
from qdora.errors import UserError, nearest
from qdora.evaluation.generation import evaluate_generated, generation_faults, generation_table
from qdora.evaluation.harness import HarnessTasks, evaluate_harness, find_harness_tasks, harness_table
from qdora.evaluation.perplexity import read_texts, text_perplexity
from qdora.evaluation.suite import EvaluationResult, compare_table, evaluate
from qdora.files.console import consoles, suite_bar
from qdora.files.run_directory import open_run
from qdora.memory.allocator import keep_freed_memory
from qdora.recipe.data_settings import COMMONSENSE_TASKS, TASKS
from qdora.recipe.recipe_file import load_recipe
from qdora.run.load_run import LoadedModel, is_run, load_target
from qdora.run.validation import stored_results

SPLITS = ("validation", "test", "train")
METHODS = ("loglikelihood", "generate")


def evaluate_target(
    target: str,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    split: str = "validation",
    data: Path | None = None,
    texts: Sequence[Path] = (),
    step: int | None = None,
    base_only: bool = False,
    like: Path | None = None,
    quant: str | None = None,
    method: str | None = None,
    harness: Sequence[str] = (),
    harness_include: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a run (its adapter on its base), a model directory, a Hub id or builtin.

    Args:
        target: What to evaluate.
        tasks: Names from the run's mix, or built-in tasks; None takes the run's mix.
        limit: Most examples of a task; None takes the run's eval.limit, or all (of the harness's tasks: all).
        split: validation, test or train.
        data: Folder of <task>/<split> files for the eight commonsense tasks; None takes the Hub.
        texts: Text files whose perplexity is measured.
        step, base_only: Of a run, see `load_run`.
        quant: Of a model that is no run: hold its linear layers in nf4, fp4 or int8; None keeps them dense.
        like: A run whose data and limit are used; its own results stand beside in the table.
        method: loglikelihood, or generate: beside it the model answers in its own words; None takes the run's.
        harness: Tasks of lm-evaluation-harness; with them, as with texts, the run's mix is left out unless asked for.
        harness_include: Folder of further tasks for it.
        console: Where progress and tables are shown; default: standard error and standard output.
    Returns:
        JSON values: the evaluation, those that stand beside it, the generated answers, the perplexity, and what
        `evaluate_harness` gives.
    """
    shown = consoles(console)
    results = shown[1]
    keep_freed_memory()
    run_path = Path(target) if is_run(target) else like
    recipe = None if run_path is None else load_recipe(open_run(run_path).recipe_file)
    if is_run(target) and like is not None:
        raise UserError(f"--like: {target} is a run and has data of its own, allowed: only for a model that is no run.")
    if step is not None and base_only:
        raise UserError("--step and --base exclude each other: the base has no steps.")
    if harness_include is not None and not harness:
        raise UserError("--harness-include: holds tasks for --harness, got none.")
    found = find_harness_tasks(harness, harness_include) if harness else None
    others_only = not tasks and (bool(texts) or found is not None)
    has_run = run_path is not None
    _check_data_options(
        target,
        tasks=tasks,
        limit=limit,
        split=split,
        data=data,
        texts=texts,
        method=method,
        has_run=has_run,
        has_harness=bool(harness),
    )
    method = method or ("loglikelihood" if recipe is None else recipe.eval.method)
    known = {} if recipe is None or others_only else run_examples(recipe, split)
    by_name = method == "generate"
    chosen = {} if others_only else _chosen(known, tasks, split, data, by_name)
    faults = generation_faults(chosen) if by_name else ()
    if faults:
        raise UserError(*faults)
    own_limit = limit if limit is not None or recipe is None else recipe.eval.limit
    loaded = load_target(target, step=step, base_only=base_only, quant=quant, verb="eval")
    document: dict[str, Any] = {"target": target, "label": loaded.label, "split": split}
    if chosen:
        beside = stored_results(open_run(like)) if like is not None and split == "validation" else {}
        document |= _scored(loaded, chosen, beside, limit=own_limit, split=split, shown=shown)
    if chosen and by_name:
        document["generation"] = _generated(loaded, chosen, limit=own_limit, split=split, shown=shown)
    if texts:
        scored = text_perplexity(loaded.model, loaded.tokenizer, read_texts(texts))
        document["perplexity"] = asdict(scored)
        results.print(f"perplexity {scored.perplexity:.3f} over {scored.num_tokens:,} tokens", highlight=False)
    if found is not None:
        document["harness"] = _harness(loaded, found, limit, results)
    return document


def _check_data_options(
    target: str,
    *,
    tasks: Sequence[str] | None,
    limit: int | None,
    split: str,
    data: Path | None,
    texts: Sequence[Path],
    method: str | None,
    has_run: bool,
    has_harness: bool,
) -> None:
    """Options of `evaluate_target` that contradict each other or would do nothing; `has_run`: a run gives the data."""
    for name, given, allowed in (("--split", split, SPLITS), ("--method", method or METHODS[0], METHODS)):
        if given not in allowed:
            raise UserError(f"{name}: {given!r}, allowed: {', '.join(allowed)}.{nearest(given, allowed)}")
    if (texts or has_harness) and not tasks:
        if limit is not None and not has_harness:
            raise UserError("--limit: counts examples of tasks, got only --text.")
        if method is not None:
            got, does = "--harness" if has_harness else "--text", "answers" if method == "generate" else "scores"
            raise UserError(f"--method: {method} {does} the examples of tasks, got only {got}.")
    if data is not None and not data.is_dir():
        raise UserError(f"--data: {data} is no directory, allowed: a folder of <task>/<split> files.")
    if data is not None and not any(task in COMMONSENSE_TASKS for task in tasks or ()):
        raise UserError(
            f"--data: holds the commonsense tasks, got --tasks {list(tasks or [])}, allowed: with one of them."
        )
    for file in texts:
        if not file.is_file():
            raise UserError(f"--text: {file} is no file.")
    if not has_run and not tasks and not texts and not has_harness:
        raise UserError(
            f"eval: {target} is no run (no recipe.yaml there); say what to evaluate: --tasks, --text, --harness or "
            "--like RUN."
        )


def _scored(
    loaded: LoadedModel,
    examples: dict[str, list[Example]],
    beside: dict[str, EvaluationResult],
    *,
    limit: int | None,
    split: str,
    shown: tuple[Console, Console],
) -> dict[str, Any]:
    """Log-likelihoods: shown with what stands beside them, and kept in the run."""
    with suite_bar(shown[0], f"evaluating {loaded.label}") as progress:
        result = evaluate(loaded.model, loaded.tokenizer, examples, limit=limit, per_example=True, progress=progress)
    shown[1].print(compare_table(beside | {loaded.label: result}))
    if loaded.run is not None:
        loaded.run.write_json(f"eval/{loaded.label}-{split}.json", result.to_dict(per_example=True))
    return {
        "evaluation": result.to_dict(),
        "beside": {label: stored.to_dict() for label, stored in beside.items()},
    }


def _generated(
    loaded: LoadedModel,
    examples: dict[str, list[Example]],
    *,
    limit: int | None,
    split: str,
    shown: tuple[Console, Console],
) -> dict[str, Any]:
    """Generated answers: shown, and kept in the run beside the log-likelihoods."""
    with suite_bar(shown[0], f"answers of {loaded.label}") as progress:
        result = evaluate_generated(loaded.model, loaded.tokenizer, examples, limit=limit, progress=progress)
    shown[1].print(generation_table({loaded.label: result}))
    if loaded.run is not None:
        loaded.run.write_json(f"eval/{loaded.label}-{split}-generated.json", result.to_dict(per_example=True))
    return result.to_dict()


def _harness(loaded: LoadedModel, tasks: HarnessTasks, limit: int | None, results: Console) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness: shown, and kept in the run."""
    result = evaluate_harness(loaded.model, loaded.tokenizer, tasks, limit=limit)
    results.print(harness_table(result))
    if loaded.run is not None:
        loaded.run.write_json(f"eval/{loaded.label}-harness.json", result | {"limit": limit})
    return result


def _chosen(
    known: dict[str, list[Example]], tasks: Sequence[str] | None, split: str, data: Path | None, by_name: bool
) -> dict[str, list[Example]]:
    if tasks is None:
        return known
    built_in = list(TASKS)
    unknown = [task for task in tasks if task not in known and task not in built_in]
    if unknown:
        allowed = list(dict.fromkeys([*known, *built_in]))
        raise UserError(*(f"--tasks: {t!r}, allowed: {', '.join(allowed)}.{nearest(t, allowed)}" for t in unknown))
    return {t: known[t] if t in known else task_examples(t, split=split, data=data, by_name=by_name) for t in tasks}
