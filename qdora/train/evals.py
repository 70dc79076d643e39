"""The evaluations of a run: measured while it trains, kept in its directory, and the best step chosen by them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.data.example import Example
from qdora.evaluate.generation import GenerationResult, evaluate_generated
from qdora.evaluate.spans import batches_shared
from qdora.evaluate.suite import EvaluationResult, evaluate, spread
from qdora.files.atomic import read_json_object
from qdora.files.console import bar, errors_only
from qdora.files.run_directory import RunDirectory, checkpoint_fault
from qdora.recipe.settings import MACRO, Recipe
from qdora.train.checkpoint import state_of
from qdora.train.distributed import Processes
from qdora.train.logs import TRAINED_FILE

BEST_FILE = "best.json"
"""In adapter/ if a best step was chosen: which step, and by which metric."""

logger = logging.getLogger("qdora")
Result = TypeVar("Result")


@dataclass
class StepEvaluations:
    """Evaluates a run by its `examples` (task -> validation examples). results: before the first step, called `start`,
    and the last one, "adapter"."""

    recipe: Recipe
    directory: RunDirectory | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Mapping[str, Sequence[Example]]
    console: Console
    results: dict[str, EvaluationResult] = field(default_factory=dict)
    generated: dict[str, GenerationResult] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """The label of what is there before the first step: an adapter that changes the base already, or the base."""
        return "start" if self.recipe.adapter.start_in_words else "base"

    def measure(self, step: int, label: str = "adapter") -> dict[str, Any]:
        """Evaluate the model after `step` steps and keep the result. Returns its part of a line of metrics."""
        asked = self.recipe.eval

        def measured(evaluation: Callable[..., Any], name: str) -> Any:
            chosen = {"limit": asked.limit, "block": asked.block}
            with bar(self.console, f"evaluating {name}") as progress:
                result = evaluation(self.model, self.tokenizer, self.examples, progress=progress, **chosen)
            if self.directory is not None:
                self.directory.write_json(f"eval/{name}.json", result.to_dict(per_example=True))
            return result

        result: EvaluationResult = measured(evaluate, f"step-{step}")
        self.results[label] = result
        tasks = {task: asdict(numbers) for task, numbers in result.tasks.items()}
        seconds = {"evaluation_seconds": result.settings["seconds"]}
        if asked.method == "generate":
            answers: GenerationResult = measured(evaluate_generated, f"step-{step}-generated")
            self.generated = {f"step {step}": answers}
            seconds["generation_seconds"] = answers.settings["seconds"]
            for task, numbers in answers.to_dict()["tasks"].items():
                tasks[task]["generated"] = numbers
        return {"eval": tasks, "average": asdict(result.average), "time": seconds}


def evaluate_together(processes: Processes, evaluate: Callable[[], Result]) -> Result:
    """Run an evaluation in all processes; each gets its result. Whole models divide its batches."""
    with errors_only(not processes.is_first):
        if processes.size == 1 or processes.shards:
            return evaluate()
        with batches_shared(processes.rank, processes.size, processes.gather):
            return evaluate()


@dataclass
class BestSoFar:
    """The best value among a run's evaluations, in a tie the earlier one, and early stopping.

    Values of another `question` (metric, tasks, examples) are not comparable. `judged` is the step of the last one.
    """

    STATE = "question", "step", "value", "num_since", "judged"
    question: Mapping[str, Any]
    higher: bool
    patience: int | None
    step: int | None = None
    value: float | None = None
    num_since: int = 0
    judged: int | None = None

    def judge(self, step: int, value: float) -> bool:
        """Take the value of the evaluation after `step` steps; returns whether it is the best so far."""
        self.judged = step
        better = self.value is None or (value > self.value if self.higher else value < self.value)
        if better:
            self.step, self.value, self.num_since = step, value, 0
        else:
            self.num_since += 1
        return better

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        return self.patience is not None and self.num_since >= self.patience


def evaluated_sources(recipe: Recipe, validation: Mapping[str, Any]) -> Sequence[str]:
    """Names of the sources that are evaluated: eval.tasks; by default all with validation data."""
    return list(validation) if recipe.eval.tasks is None else recipe.eval.tasks


def best_so_far(recipe: Recipe, evaluated: Mapping[str, Sequence[Example]]) -> BestSoFar | None:
    """The choice of the best step by the recipe's eval.best_by, from these examples of each task."""
    asked = recipe.eval
    if asked.best_by is None:
        return None
    tasks = list(evaluated) if asked.best_by == MACRO else [asked.best_by]
    scored = "".join(repr(spread(evaluated[task], asked.limit, asked.block)) for task in tasks)
    digest = hashlib.sha256(scored.encode("utf-8", "backslashreplace"))
    question = {name: getattr(asked, name) for name in ("best_by", "best_metric", "limit")}
    question |= {"tasks": tasks, "examples": digest.hexdigest()[:16]}
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


def former_best(
    best: BestSoFar, recipe: Recipe, run: RunDirectory, state: Mapping[str, Any] | None, step: int
) -> dict[str, Any]:
    """The state with which a run that goes on after `step` steps chooses its best one; for the first process."""
    if state is None or state["question"] != best.question:
        fault = "The run chose the best step in another way before, or by other examples"
    elif state["step"] is not None and (lost := checkpoint_fault(run.checkpoint_path(state["step"]))):
        fault = f"The best checkpoint, step-{state['step']}, is not whole ({lost})"
    else:
        vars(best).update(state)
        if best.judged is not None and best.judged < step and was_measured(run, step):
            # The evaluation after the last step of a run that is extended followed that step's checkpoint.
            best.judge(step, selection_value(recipe, read_result(run.evaluation_file(step))))
        return state_of(best)
    logger.warning("%s. The best step is chosen from the evaluations that follow.", fault)
    return state_of(best)


def selection_faults(recipe: Recipe, evaluated: Mapping[str, Sequence[Example]], num_steps: int) -> list[str]:
    """Why no best step can be chosen by the recipe's eval settings, from these examples in a run of this length."""
    by, every, metric = recipe.eval.best_by, recipe.eval.every, recipe.eval.best_metric
    if by is None or every is None:
        return []
    faults = []
    if not evaluated:
        faults.append(f"eval.best_by: got {by!r}, but no source has validation data.")
    elif by not in (MACRO, *evaluated):
        faults.append(f"eval.best_by: got {by!r}, must be one of {', '.join((MACRO, *evaluated))}.")
    elif metric != "nll_per_token":
        tasks = list(evaluated) if by == MACRO else [by]
        if not any(example.choices for task in tasks for example in evaluated[task]):
            faults.append(
                f"eval.best_metric: got {metric}, must be nll_per_token for {by}, whose examples have no choices."
            )
    if every >= num_steps:
        faults.append(
            f"eval.every: got {every}, must be less than the run's {num_steps} steps with eval.best_by."
        )
    return faults


def adapter_record(run: RunDirectory) -> dict[str, Any] | None:
    """The content of adapter/best.json; None if adapter/ holds the last step."""
    file = run.adapter / BEST_FILE
    return read_json_object(file) if file.is_file() else None


def adapter_step(run: RunDirectory) -> int | None:
    """The step that adapter/ holds: the best one, or the last before it was written."""
    record = adapter_record(run) or run.read_json(TRAINED_FILE)  # the run may have gone on since
    return int(record["step"]) if record else run.last_step()


def state_step(run: RunDirectory, state: str) -> int | None:
    """The step of a state of a run: "base", "step-120", or "final" for adapter/."""
    if state == "base":
        return 0
    return adapter_step(run) if state == "final" else int(state.removeprefix("step-"))


def adapter_in_words(run: RunDirectory) -> str:
    """'step 6, the best by macro nll_per_token (1.234) of 9 steps', or 'final' for the last step: what it holds."""
    record = adapter_record(run)
    if record is None:
        return "final"
    question, num_done = record["question"], record["num_done"]
    by = f"{question['best_by']} {question['best_metric']} ({record['value']:.4g})"
    stopped = ", stopped early" if num_done < record["num_steps"] else ""
    return f"step {record['step']}, the best by {by} of {num_done} steps{stopped}"


def read_result(file: Path) -> EvaluationResult:
    """Read an evaluation that a run wrote."""
    return EvaluationResult.from_dict(json.loads(file.read_text(encoding="utf-8")))
