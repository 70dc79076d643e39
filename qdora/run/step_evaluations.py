"""The evaluations of a run while it trains: measure, keep in the run directory, choose the best step by them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from qdora.data.example import Example
from qdora.errors import UserError, first_line, nearest
from qdora.evaluation.before_after import tasks_of_other_examples, worse_than_base
from qdora.evaluation.generation import GenerationResult, evaluate_generated
from qdora.evaluation.shared_batches import batches_shared
from qdora.evaluation.suite import EvaluationResult, evaluate
from qdora.files.console import bar, errors_only
from qdora.files.run_directory import RunDirectory
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import MACRO
from qdora.run.active_run import ActiveRun
from qdora.run.trained_layers import TRAINED_FILE
from qdora.train.best import BestSoFar
from qdora.train.distributed import OtherProcessFailed, Processes

logger = logging.getLogger("qdora")
Result = TypeVar("Result")

BEST_FILE = "best.json"
"""In adapter/ if a best step was chosen: which step, and by which metric."""


class StepEvaluations:
    """Evaluates a run in all its processes; the first one writes the results.

    Args:
        active: The run.
        examples: Task -> its validation examples; empty if nothing is evaluated.

    Attributes:
        results: "base": before the first step; "adapter": the last evaluation.
    """

    def __init__(self, active: ActiveRun, examples: Mapping[str, Sequence[Example]]) -> None:
        self.active, self.examples = active, examples
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
        base = self.results.get("base")
        worse = [] if step == 0 or base is None else worse_than_base(base, result)
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

    Whole models divide its batches (`shared_batches`). With a divided base each batch needs all processes. If it raises
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


def stored_results(run: RunDirectory, step: int | None = None) -> dict[str, EvaluationResult]:
    """The evaluations that a run kept: "base" before step 1, and "adapter" after `step` (None: the step of adapter/).

    Only "adapter" if the two have different tasks or examples, since they cannot be compared.
    """
    step = adapter_step(run) if step is None else step
    found = {
        label: read_result(run.evaluation_file(number))
        for label, number in (("base", 0), ("adapter", step))
        if number is not None and run.evaluation_file(number).is_file() and (label == "base" or number > 0)
    }
    if len(found) == 2:
        sizes = [{task: result.num_examples for task, result in each.tasks.items()} for each in found.values()]
        documents = (each.to_dict(per_example=True) for each in found.values())
        if sizes[0] != sizes[1] or tasks_of_other_examples(*documents):
            del found["base"]
    return found


def read_result(file: Path) -> EvaluationResult:
    """Read an evaluation that a run wrote."""
    return EvaluationResult.from_dict(json.loads(file.read_text(encoding="utf-8")))


def best_so_far(recipe: Recipe, tasks: Sequence[str]) -> BestSoFar | None:
    """The choice of the best step by the recipe's eval.best_by; None without it."""
    asked = recipe.eval
    if asked.best_by is None:
        return None
    question = {
        "best_by": asked.best_by,
        "best_metric": asked.best_metric,
        "tasks": list(tasks) if asked.best_by == MACRO else [asked.best_by],
        "limit": asked.limit,
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


def best_in_words(state: Mapping[str, Any]) -> str:
    """'step 6, the best by macro nll_per_token (1.234)', from the state of a `BestSoFar`."""
    question = state["question"]
    return f"step {state['step']}, the best by {question['best_by']} {question['best_metric']} ({state['value']:.4g})"


def adapter_in_words(run: RunDirectory) -> str:
    """Which step adapter/ holds: 'final' for the last one."""
    record = adapter_record(run)
    if record is None:
        return "final"
    stopped = ", stopped early" if record["num_done"] < record["num_steps"] else ""
    return f"{best_in_words(record)} of {record['num_done']} steps{stopped}"


def adapter_record(run: RunDirectory) -> dict[str, Any] | None:
    """The content of adapter/best.json; None if adapter/ holds the last step.

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
    """The step that adapter/ holds: the best one, or the last before it was written."""
    record = adapter_record(run)
    if record is not None:
        return int(record["step"])
    file = run.path / TRAINED_FILE
    try:  # the run may have gone on since
        return int(json.loads(file.read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return run.last_step()


def state_step(run: RunDirectory, state: str) -> int | None:
    """The step of a state of a run: "base", "step-120", or "final" for adapter/."""
    if state == "base":
        return 0
    return adapter_step(run) if state == "final" else int(state.removeprefix("step-"))
