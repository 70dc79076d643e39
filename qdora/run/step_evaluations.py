"""The evaluations of a run while it trains: measure, keep in the run directory, choose the best step by them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from qdora.data.example import Example
from qdora.errors import first_line, nearest
from qdora.evaluate.batches import batches_shared
from qdora.evaluate.before_after import worse_than_before
from qdora.evaluate.generation import GenerationResult, evaluate_generated
from qdora.evaluate.suite import EvaluationResult, evaluate, spread
from qdora.files.console import bar, errors_only
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import MACRO
from qdora.run.active_run import ActiveRun
from qdora.run.adapter_step import read_result
from qdora.train.best import BestSoFar
from qdora.train.distributed import OtherProcessFailed, Processes

logger = logging.getLogger("qdora")
Result = TypeVar("Result")


class StepEvaluations:
    """Evaluates a run in all its processes; the first one writes the results.

    Args:
        active: The run.
        examples: Task -> its validation examples; empty if nothing is evaluated.

    Attributes:
        start: How the model before the first step is called, "base" or "start".
        results: `start`: before the first step; "adapter": the last evaluation.
    """

    def __init__(self, active: ActiveRun, examples: Mapping[str, Sequence[Example]]) -> None:
        self.active, self.examples = active, examples
        self.start = active.recipe.adapter.start_label
        self.results: dict[str, EvaluationResult] = {}
        self.generated: dict[str, GenerationResult] = {}

    def take_back(self, label: str, step: int) -> None:
        """Read the evaluation after `step` steps from the run directory, if it is there."""
        file = self.active.directory.evaluation_file(step)
        if file.is_file():
            self.results[label] = read_result(file)

    def measure(self, step: int, label: str = "adapter") -> dict[str, Any]:
        """Evaluate the model after `step` steps and keep the result. Returns its part of a line of metrics."""
        active, asked = self.active, self.active.recipe.eval
        with bar(active.console, f"evaluating, step {step}") as progress:
            result = evaluate(
                active.model,
                active.tokenizer,
                self.examples,
                limit=asked.limit,
                block=asked.block,
                progress=progress,
            )
        self.results[label] = result
        file = active.directory.evaluation_file(step)
        self._keep(f"eval/{file.name}", result.to_dict(per_example=True))
        metrics = {task: asdict(numbers) for task, numbers in result.tasks.items()}
        seconds = {"evaluation_seconds": result.settings["seconds"]}
        if asked.method == "generate":
            answers = self._generate(step)
            seconds["generation_seconds"] = answers.settings["seconds"]
            for task, numbers in answers.to_dict()["tasks"].items():
                metrics[task]["generated"] = {key: value for key, value in numbers.items() if key != "unparsable"}
        found = {"eval": metrics, "average": asdict(result.average), "time": seconds}
        return found | self._against_base(step, result)

    def _against_base(self, step: int, result: EvaluationResult) -> dict[str, Any]:
        """The tasks that are worse than before training although the average is better, for the metrics. Warns."""
        base = self.results.get(self.start)
        worse = [] if step == 0 or base is None else worse_than_before(base, result)
        for each in worse:
            logger.warning("Step %d: %s.", step, each.in_words())
        return {"worse_than_base": [asdict(each) for each in worse]} if worse else {}

    def _generate(self, step: int) -> GenerationResult:
        """Let the model answer and keep the answers beside the log-likelihoods."""
        active, asked = self.active, self.active.recipe.eval
        with bar(active.console, f"answers, step {step}") as progress:
            result = evaluate_generated(
                active.model,
                active.tokenizer,
                self.examples,
                limit=asked.limit,
                block=asked.block,
                progress=progress,
            )
        self._keep(f"eval/step-{step}-generated.json", result.to_dict(per_example=True))
        self.generated = {f"step {step}": result}
        return result

    def _keep(self, name: str, values: dict[str, Any]) -> None:
        """Write a file of the run, from its first process."""
        if self.active.processes.is_first:
            self.active.directory.write_json(name, values)


def evaluate_together(processes: Processes, evaluate: Callable[[], Result]) -> Result:
    """Run an evaluation in all processes; each gets its result.

    Whole models divide its batches (`batches_shared`). With a divided base each batch needs all processes. If it raises
    in one of them, the others raise OtherProcessFailed; after a KeyboardInterrupt, once its process has ended.
    """
    if processes.size == 1 or processes.shards:
        with errors_only(not processes.is_first):
            result = processes.first_or_all(evaluate)
        assert result is not None, "an evaluation has a result"
        return result
    try:
        with errors_only(not processes.is_first), batches_shared(processes.rank, processes.size, processes.exchange):
            result = evaluate()
    except (OtherProcessFailed, KeyboardInterrupt):
        raise  # perhaps within an exchange, of which the others would take one more message for a part
    except BaseException as error:
        processes.exchange(None, first_line(error))  # in place of the next one, for which the others wait
        raise
    processes.exchange(None)  # the first process writes files, which can fail
    return result


def best_so_far(recipe: Recipe, evaluated: Mapping[str, Sequence[Example]]) -> BestSoFar | None:
    """The choice of the best step by the recipe's eval.best_by, from these examples of each task; None without it."""
    asked = recipe.eval
    if asked.best_by is None:
        return None
    tasks = list(evaluated) if asked.best_by == MACRO else [asked.best_by]
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(repr(spread(evaluated[task], asked.limit, asked.block)).encode("utf-8", "backslashreplace"))
    question = {
        "best_by": asked.best_by,
        "best_metric": asked.best_metric,
        "tasks": tasks,
        "limit": asked.limit,
        "examples": digest.hexdigest()[:16],
    }
    question |= {} if asked.block is None else {"block": asked.block}
    return BestSoFar(question, higher=asked.best_metric != "nll_per_token", patience=asked.patience)


def selection_value(recipe: Recipe, result: EvaluationResult) -> float:
    """The number of one evaluation that the best step is chosen by."""
    asked = recipe.eval
    assert asked.best_by is not None
    numbers = result.average if asked.best_by == MACRO else result.tasks[asked.best_by]
    value = getattr(numbers, asked.best_metric)
    assert value is not None, asked  # selection_faults checks that there are choices
    return float(value)


def selection_faults(recipe: Recipe, evaluated: Mapping[str, Sequence[Example]], num_steps: int) -> list[str]:
    """Why no best step can be chosen by the recipe's eval settings, from these examples in a run of this length."""
    by, every, metric = recipe.eval.best_by, recipe.eval.every, recipe.eval.best_metric
    if by is None or every is None:
        return []
    faults = []
    known = (MACRO, *evaluated)
    if not evaluated:
        faults.append(f"eval.best_by: got {by}, but no source has validation data. Fix: set validation in a source.")
    elif by not in known:
        faults.append(
            f"eval.best_by: {by!r} has no validation data, must be one of {', '.join(known)}.{nearest(by, known)}"
        )
    elif metric != "nll_per_token":
        tasks = list(evaluated) if by == MACRO else [by]
        if not any(example.choices for task in tasks for example in evaluated[task]):
            faults.append(
                f"eval.best_metric: got {metric}, must be nll_per_token for {by}, whose examples have no choices."
            )
    if every >= num_steps:
        faults.append(
            f"eval.every: got {every}, must be less than the run's {num_steps} steps with eval.best_by: an evaluation "
            "at the end alone leaves nothing to choose from."
        )
    return faults
