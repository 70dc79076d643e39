"""The evaluations of a run: measured while it trains, kept in its directory, and the best step chosen by them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.data.example import Example
from qdora.errors import UserError, first_line, nearest
from qdora.evaluate.batches import batches_shared
from qdora.evaluate.before_after import tasks_of_other_examples, worse_than_before
from qdora.evaluate.generation import GenerationResult, evaluate_generated
from qdora.evaluate.suite import EvaluationResult, evaluate, spread
from qdora.files.console import bar, errors_only
from qdora.files.run_directory import RunDirectory, checkpoint_fault
from qdora.recipe.settings import MACRO, Recipe
from qdora.train.distributed import OtherProcessFailed, Processes
from qdora.train.logs import TRAINED_FILE
from qdora.train.policies import BestSoFar

BEST_FILE = "best.json"
"""In adapter/ if a best step was chosen: which step, and by which metric."""

logger = logging.getLogger("qdora")
Result = TypeVar("Result")


class StepEvaluations:
    """Evaluates a run, in the process of `directory` (None in the others) with files in it.

    Attributes:
        examples: Task -> its validation examples; empty if nothing is evaluated.
        start: How the model before the first step is called, "base" or "start".
        results: `start`: before the first step; "adapter": the last evaluation.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: RunDirectory | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Mapping[str, Sequence[Example]],
        console: Console,
    ) -> None:
        self.model, self.tokenizer, self.examples = model, tokenizer, examples
        self._settings, self._directory, self._console = recipe.eval, directory, console
        self.start = recipe.adapter.start_label
        self.results: dict[str, EvaluationResult] = {}
        self.generated: dict[str, GenerationResult] = {}

    def measure(self, step: int, label: str = "adapter") -> dict[str, Any]:
        """Evaluate the model after `step` steps and keep the result. Returns its part of a line of metrics.

        With eval.method generate the model also answers in words. A warning names the tasks that are worse than before
        training although the average is better.
        """
        asked = self._settings
        chosen: dict[str, Any] = {"limit": asked.limit, "block": asked.block}
        with bar(self._console, f"evaluating, step {step}") as progress:
            result = evaluate(self.model, self.tokenizer, self.examples, progress=progress, **chosen)
        self.results[label] = result
        if self._directory is not None:
            self._directory.write_json(f"eval/step-{step}.json", result.to_dict(per_example=True))
        tasks = {task: asdict(numbers) for task, numbers in result.tasks.items()}
        seconds = {"evaluation_seconds": result.settings["seconds"]}
        if asked.method == "generate":
            with bar(self._console, f"answers, step {step}") as progress:
                answers = evaluate_generated(self.model, self.tokenizer, self.examples, progress=progress, **chosen)
            if self._directory is not None:
                self._directory.write_json(f"eval/step-{step}-generated.json", answers.to_dict(per_example=True))
            self.generated = {f"step {step}": answers}
            seconds["generation_seconds"] = answers.settings["seconds"]
            for task, numbers in answers.to_dict()["tasks"].items():
                tasks[task]["generated"] = {key: value for key, value in numbers.items() if key != "unparsable"}
        base = self.results.get(self.start)
        worse = [] if step == 0 or base is None else worse_than_before(base, result)
        for each in worse:
            logger.warning("Step %d: %s.", step, each.in_words())
        line = {"eval": tasks, "average": asdict(result.average), "time": seconds}
        return line | ({"worse_than_base": [asdict(each) for each in worse]} if worse else {})


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


def evaluated_sources(recipe: Recipe, validation: Mapping[str, Any]) -> Sequence[str]:
    """Names of the sources that are evaluated: eval.tasks; by default all with validation data."""
    return list(validation) if recipe.eval.tasks is None else recipe.eval.tasks


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
    numbers = result.average if asked.best_by == MACRO else result.tasks[str(asked.best_by)]
    return float(getattr(numbers, asked.best_metric))


def was_measured(run: RunDirectory, step: int) -> bool:
    """Whether the run has a line of metrics with an evaluation after `step` steps."""
    return any("eval" in line for line in run.metrics() if line["step"] == step)


def restore_best(best: BestSoFar, state: Mapping[str, Any] | None, run: RunDirectory, processes: Processes) -> None:
    """Go on choosing the best step, unless it was chosen in another way before, or its checkpoint is gone."""

    def fault() -> str | None:
        if state is None:
            return "The run chose no best step before"
        if state["question"] != best.question:
            return "The run chose the best step in another way before, or by other examples"
        lost = None if state["step"] is None else checkpoint_fault(run.checkpoint_path(state["step"]))
        return None if lost is None else f"The best checkpoint, step-{state['step']}, is not whole ({lost})"

    text = processes.from_first(fault)
    if state is not None and text is None:
        best.load_state_dict(state)
    else:
        logger.warning("%s. The best step is chosen from the evaluations that follow.", text)


def judge_former_end(best: BestSoFar, recipe: Recipe, run: RunDirectory, processes: Processes, step: int) -> None:
    """Judge the evaluation after the last step of a run that is extended: it followed that step's checkpoint."""
    file = run.evaluation_file(step)

    def value() -> float | None:
        is_whole = file.is_file() and was_measured(run, step)
        return selection_value(recipe, read_result(file)) if is_whole else None

    if best.judged is not None and best.judged < step and (found := processes.from_first(value)) is not None:
        best.judge(step, found)


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
        names = ", ".join(known)
        faults.append(f"eval.best_by: {by!r} has no validation data, must be one of {names}.{nearest(by, known)}")
    elif metric != "nll_per_token":
        tasks = list(evaluated) if by == MACRO else [by]
        if not any(example.choices for task in tasks for example in evaluated[task]):
            need = f"must be nll_per_token for {by}, whose examples have no choices"
            faults.append(f"eval.best_metric: got {metric}, {need}.")
    if every >= num_steps:
        faults.append(
            f"eval.every: got {every}, must be less than the run's {num_steps} steps with eval.best_by: an evaluation "
            "at the end alone leaves nothing to choose from."
        )
    return faults


def adapter_record(run: RunDirectory) -> dict[str, Any] | None:
    """The content of adapter/best.json; None if adapter/ holds the last step. UserError if it is damaged."""
    file = run.adapter / BEST_FILE
    try:
        record: dict[str, Any] = json.loads(file.read_bytes())
        return record | {"step": int(record["step"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is damaged: {type(error).__name__}.") from None


def adapter_step(run: RunDirectory) -> int | None:
    """The step that adapter/ holds: the best one, or the last before it was written."""
    if record := adapter_record(run):
        return int(record["step"])
    try:  # the run may have gone on since
        return int(json.loads((run.path / TRAINED_FILE).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return run.last_step()


def state_step(run: RunDirectory, state: str) -> int | None:
    """The step of a state of a run: "base", "step-120", or "final" for adapter/."""
    if state == "base":
        return 0
    return adapter_step(run) if state == "final" else int(state.removeprefix("step-"))


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


def stored_results(run: RunDirectory, start: str) -> dict[str, EvaluationResult]:
    """The evaluations that a run kept: before step 1, called `start` (`adapter.start_label`), and of "adapter".

    Only "adapter" if the two have different tasks or examples, since they cannot be compared.
    """
    files = {start: run.evaluation_file(0), "adapter": run.evaluation_file(adapter_step(run) or 0)}
    results = {label: read_result(file) for label, file in files.items() if file.is_file()}
    if not adapter_step(run):
        results.pop("adapter", None)
    if len(results) == 2:
        sizes = [{task: numbers.num_examples for task, numbers in each.tasks.items()} for each in results.values()]
        documents = (each.to_dict(per_example=True) for each in results.values())
        if sizes[0] != sizes[1] or tasks_of_other_examples(*documents):
            del results[start]
    return results


def read_result(file: Path) -> EvaluationResult:
    """Read an evaluation that a run wrote."""
    return EvaluationResult.from_dict(json.loads(file.read_text(encoding="utf-8")))
