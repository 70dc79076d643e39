"""The evaluations inside a run: measured, kept in the run directory, and the best step chosen by them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdora.data.example import Example
from qdora.errors import UserError, nearest
from qdora.evaluation.generation import evaluate_generated, generation_table
from qdora.evaluation.suite import EvaluationResult, evaluate, worse_than_base
from qdora.files.console import suite_bar
from qdora.files.run_directory import RunDirectory
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import MACRO
from qdora.run.active_run import ActiveRun
from qdora.train.best import BestSoFar

logger = logging.getLogger("qdora")

BEST_FILE = "best.json"
"""In adapter/, where it was chosen: the step that it is of, and by what."""


class RunValidation:
    """What the first process of a run evaluates on, and what has come of it so far.

    Args:
        active: The run.
        examples: Validation examples of each task that is evaluated, perhaps of none.

    Attributes:
        results: "base" before the first step, and "adapter" last.
    """

    def __init__(self, active: ActiveRun, examples: Mapping[str, Sequence[Example]]) -> None:
        self.active, self.examples = active, examples
        self.results: dict[str, EvaluationResult] = {}

    def take_back(self, label: str, step: int) -> None:
        """Take the evaluation after `step` steps from the run directory, where it is there."""
        file = self.active.directory.evaluation_file(step)
        if file.is_file():
            self.results[label] = read_result(file)

    def measure(self, step: int, label: str = "adapter") -> dict[str, Any]:
        """Evaluate the model after `step` steps and keep the result; returns its part of a line of metrics."""
        active, limit = self.active, self.active.recipe.eval.limit
        with suite_bar(active.console, f"evaluating, step {step}") as progress:
            result = evaluate(
                active.model, active.tokenizer, self.examples, limit=limit, per_example=True, progress=progress
            )
        self.results[label] = result
        file = active.directory.evaluation_file(step)
        active.directory.write_json(f"eval/{file.name}", result.to_dict(per_example=True))
        metrics = {task: asdict(numbers) for task, numbers in result.tasks.items()}
        if active.recipe.eval.method == "generate":
            for task, numbers in self._generate(step).items():
                metrics[task]["generated"] = numbers
        return {"eval": metrics, "average": asdict(result.average)} | self._against_base(step, result)

    def _against_base(self, step: int, result: EvaluationResult) -> dict[str, Any]:
        """The tasks that are worse than before training while the average is better, for the metrics; warns of them."""
        base = self.results.get("base")
        worse = [] if step == 0 or base is None else worse_than_base(base, result)
        for each in worse:
            logger.warning("Step %d: %s.", step, each.in_words())
        return {"worse_than_base": [asdict(each) for each in worse]} if worse else {}

    def _generate(self, step: int) -> dict[str, Any]:
        """Let the model answer, keep the answers beside the log-likelihoods; the counts per task."""
        active, limit = self.active, self.active.recipe.eval.limit
        with suite_bar(active.console, f"answers, step {step}") as progress:
            result = evaluate_generated(active.model, active.tokenizer, self.examples, limit=limit, progress=progress)
        active.directory.write_json(f"eval/step-{step}-generated.json", result.to_dict(per_example=True))
        active.console.print(generation_table({f"step {step}": result}))
        numbers = result.to_dict()["tasks"]
        return {
            task: {key: value for key, value in each.items() if key != "unparsable"} for task, each in numbers.items()
        }


def stored_results(run: RunDirectory, step: int | None = None) -> dict[str, EvaluationResult]:
    """What a run kept of its validation: "base" before the first step, "adapter" after `step` (None: that of adapter/).

    Where the two cover other tasks or numbers of examples, only "adapter" is given: they could not be compared.
    """
    step = adapter_step(run) if step is None else step
    found = {
        label: read_result(run.evaluation_file(number))
        for label, number in (("base", 0), ("adapter", step))
        if number is not None and run.evaluation_file(number).is_file() and (label == "base" or number > 0)
    }
    if len(found) == 2:
        sizes = [{task: result.num_examples for task, result in each.tasks.items()} for each in found.values()]
        if sizes[0] != sizes[1]:
            del found["base"]
    return found


def read_result(file: Path) -> EvaluationResult:
    """An evaluation that a run has written."""
    return EvaluationResult.from_dict(json.loads(file.read_text(encoding="utf-8")))


def best_so_far(recipe: Recipe, tasks: Sequence[str]) -> BestSoFar | None:
    """The judge that the recipe asks for, over the tasks that are evaluated; None where it asks for none."""
    asked = recipe.eval
    if asked.best_by is None:
        return None
    question = {
        "best_by": asked.best_by,
        "best_metric": asked.best_metric,
        "tasks": list(tasks) if asked.best_by == MACRO else [asked.best_by],
        "limit": asked.limit,
    }
    return BestSoFar(question, higher=asked.best_metric != "nll_per_token", patience=asked.patience)


def selection_value(recipe: Recipe, result: EvaluationResult) -> float:
    """What `best_so_far` compares, of one evaluation."""
    asked = recipe.eval
    assert asked.best_by is not None
    numbers = result.average if asked.best_by == MACRO else result.tasks[asked.best_by]
    value = getattr(numbers, asked.best_metric)
    assert value is not None, asked  # selection_faults has looked for choices
    return float(value)


def selection_faults(recipe: Recipe, evaluated: Mapping[str, Sequence[Example]], num_steps: int) -> list[str]:
    """Why no best step can be chosen, given the validation examples and the length of the run; none as a rule."""
    by, every, metric = recipe.eval.best_by, recipe.eval.every, recipe.eval.best_metric
    if by is None or every is None:
        return []
    faults = []
    known = (MACRO, *evaluated) if evaluated else ()
    if by not in known:
        allowed = ", ".join(known) or "none"
        faults.append(f"eval.best_by: {by!r} has no validation data, allowed: {allowed}.{nearest(by, known)}")
    elif metric != "nll_per_token":
        tasks = list(evaluated) if by == MACRO else [by]
        if not any(example.choices for task in tasks for example in evaluated[task]):
            faults.append(f"eval.best_metric: {metric} needs choices, {by} has none, allowed: nll_per_token.")
    if every >= num_steps:
        faults.append(
            f"eval.every: evaluated only at the end, so there is nothing to choose from by eval.best_by, got {every} "
            f"in a run of {num_steps} steps, allowed: fewer than these."
        )
    return faults


def best_in_words(state: Mapping[str, Any]) -> str:
    """'step 6, the best by macro nll_per_token (1.234)' of a judge's state."""
    question = state["question"]
    return f"step {state['step']}, the best by {question['best_by']} {question['best_metric']} ({state['value']:.4g})"


def adapter_in_words(run: RunDirectory) -> str:
    """Which step adapter/ is of: 'final' for the last one."""
    record = adapter_record(run)
    if record is None:
        return "final"
    stopped = ", stopped early" if record["num_done"] < record["num_steps"] else ""
    return f"{best_in_words(record)} of {record['num_done']} steps{stopped}"


def adapter_record(run: RunDirectory) -> dict[str, Any] | None:
    """What adapter/best.json says; None where adapter/ is of the last step.

    Raises:
        UserError: The file is damaged.
    """
    file = run.adapter / BEST_FILE
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
        return found | {"step": int(found["step"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is damaged: {type(error).__name__}.") from None


def adapter_step(run: RunDirectory) -> int | None:
    """The step that adapter/ is of: the best one, or the last."""
    record = adapter_record(run)
    return run.last_step() if record is None else int(record["step"])
