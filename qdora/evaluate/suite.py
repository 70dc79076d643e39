"""Several tasks in one evaluation: metrics of each, their averages, and a table."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

import numpy as np
from rich.table import Column, Table
from torch import nn

from qdora.data.example import Example
from qdora.errors import Diverged
from qdora.evaluate.forward_path import shares_prefix
from qdora.evaluate.loglikelihood import ExampleScore, score_examples
from qdora.evaluate.metrics import Estimate, mean_stderr, ratio_stderr, tie_credit
from qdora.files.console import Progress


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Metrics of one task, or their average over tasks; definitions in `qdora.evaluate.metrics`.

    Accuracies lie in 0..1 and are None without choices. A standard error is None for a single example.
    """

    num_examples: int
    num_choice_examples: int
    acc: float | None
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    chance: float | None
    majority: float | None
    num_ties: int
    num_ties_norm: int
    nll: float
    """Mean over examples of the right answer's summed NLL, nats."""
    nll_stderr: float | None
    nll_per_token: float
    """Summed NLL / answer tokens, nats."""
    nll_per_token_stderr: float | None
    num_answer_tokens: int
    num_truncated: int
    """Examples whose prompt was cut at the left to fit the model's context."""


Metrics = TypeVar("Metrics")


@dataclass(frozen=True)
class Result(Generic[Metrics]):
    """One model on several tasks."""

    tasks: dict[str, Metrics]
    average: Metrics
    """Every task counts once. Counts are sums; accuracy is averaged over the tasks with choices, NLL over all."""
    settings: dict[str, Any]
    """Options and conditions, such as limit, block, model_dtype, device, seconds."""
    per_example: list[dict[str, Any]] = field(default_factory=list)
    """Scores of single examples, in task order, for paired tests."""

    def to_dict(self, *, per_example: bool = False) -> dict[str, Any]:
        """For JSON: dicts, lists, numbers, strings and None only."""
        tasks = {task: dict(vars(metrics)) for task, metrics in self.tasks.items()}
        document = {"tasks": tasks, "average": dict(vars(self.average)), "settings": dict(self.settings)}
        return document | ({"per_example": self.per_example} if per_example else {})

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of `to_dict`, of log-likelihoods."""
        return Result(
            tasks={task: TaskResult(**metrics) for task, metrics in document["tasks"].items()},
            average=TaskResult(**document["average"]),
            settings=dict(document["settings"]),
            per_example=list(document.get("per_example", [])),
        )


EvaluationResult = Result[TaskResult]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples_by_task: Mapping[str, Sequence[Example]],
    *,
    limit: int | None = None,
    block: int | None = None,
    max_batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Score every task's examples: choices by log-likelihood, other examples by the NLL of their answer.

    Args:
        examples_by_task: Task name -> its examples, at least one task with one example each, with choices or without.
        limit, block: Most examples of a task (None: all), and which (`spread`).
        max_batch_tokens: Most tokens of one forward pass, padding included, unless one sequence is longer.
        progress: Called with examples done and examples in all, of one task after the other.
    Raises: UserError if an example cannot be scored, Diverged if the model gives a log-likelihood that is not finite.
    """
    started = time.perf_counter()
    tasks: dict[str, TaskResult] = {}
    records: list[dict[str, Any]] = []
    for task, all_examples in examples_by_task.items():
        examples = sorted(spread(all_examples, limit, block), key=lambda example: not example.choices)
        scores = score_examples(model, tokenizer, examples, max_batch_tokens=max_batch_tokens, progress=progress)
        broken = [score.id for score in scores if not np.isfinite(score.loglikelihoods).all()]
        if broken:
            raise Diverged(
                f"eval: task '{task}': the model's log-likelihood is not finite in {len(broken)} of {len(scores)} "
                f"examples, first in example '{broken[0]}'. Its weights or activations overflow or hold NaN."
            )
        own = [_record(task, score) for score in scores]
        tasks[task] = _task_result(own)
        records += own
    settings = {
        "limit": limit,
        "block": block,
        "max_batch_tokens": max_batch_tokens,
        "shared_prefix": shares_prefix(model),
        **conditions(model, started),
    }
    return EvaluationResult(tasks, _average(list(tasks.values())), settings, records)


def conditions(model: nn.Module, started: float) -> dict[str, Any]:
    """Dtype and device of the model, and the seconds since `started` (of time.perf_counter)."""
    parameter = next(model.parameters())
    return {
        "model_dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "seconds": round(time.perf_counter() - started, 3),
    }


def spread(examples: Sequence[Example], limit: int | None, block: int | None = None) -> list[Example]:
    """At most `limit` examples, in their order.

    Args:
        block: None: at even distances (files are often ordered by origin), the first one always among them. k: the k-th
            `limit` examples of a fixed random order, which starts again at its end: blocks share no example as long as
            there are enough.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    if block is None:
        return [examples[index * len(examples) // limit] for index in range(limit)]
    shuffled = sorted(range(len(examples)), key=lambda index: hashlib.sha256(str(index).encode()).digest())
    places = (shuffled[place % len(examples)] for place in range(block * limit, (block + 1) * limit))
    return [examples[index] for index in sorted(places)]


FEWEST = 10
"""Fewest examples whose standard error is shown: of two right answers it is 0."""


def compare_table(results: Mapping[str, EvaluationResult]) -> Table:
    """A row per task and, per label, columns of accuracy in % ± standard error and answer NLL in nats per token."""

    def acc(result: TaskResult) -> str:
        return percent(result.acc, None if result.num_choice_examples < FEWEST else result.acc_stderr)

    shared: dict[str, Cell] = {
        "n": lambda result: str(result.num_examples),
        "chance": lambda result: percent(result.chance),
        "majority": lambda result: percent(result.majority),
    }
    own: dict[str, Cell] = {"acc %": acc, "NLL/token": lambda result: f"{result.nll_per_token:.3f}"}
    return results_table("evaluation", results, shared, own)


Cell = Callable[[Any], str]
"""One task's result -> the text of a cell."""


def results_table(title: str, results: Mapping[str, Any], shared: Mapping[str, Cell], own: Mapping[str, Cell]) -> Table:
    """A row per task and one of averages, for results with `tasks` and `average`.

    Args:
        shared: Columns that all results share; where they differ, the value of each is shown.
        own: Columns of each result.
    """
    names = [*shared, *(f"{label} {name}" for label in results for name in own)]
    columns = [Column("task"), *(Column(name, justify="right") for name in names)]
    table = Table(*columns, title=title, title_justify="left")
    for task in (*dict.fromkeys(task for result in results.values() for task in result.tasks), None):
        found = [result.average if task is None else result.tasks.get(task) for result in results.values()]
        both = ("/".join(dict.fromkeys(cell(each) for each in found if each is not None)) for cell in shared.values())
        cells = ("–" if each is None else cell(each) for each in found for cell in own.values())
        if task is None:
            table.add_section()
        table.add_row(task or "average", *both, *cells, style="bold" if task is None else None)
    return table


def percent(share: float | None, stderr: float | None = None) -> str:
    """`12.3`, or `12.3 ± 0.4`."""
    error = "" if stderr is None else f" ± {100 * stderr:.1f}"
    return "–" if share is None else f"{100 * share:.1f}{error}"


def _record(task: str, score: ExampleScore) -> dict[str, Any]:
    """JSON-able scores of one example; `acc` and `acc_norm` are the credits that the task's accuracy averages."""
    record: dict[str, Any] = {"task": task, "id": score.id}
    if score.gold is not None:
        per_char = score.loglikelihoods / np.maximum(score.num_chars, 1)  # an empty choice counts as one character
        record |= {
            "gold": score.gold,
            **{name: getattr(score, name).tolist() for name in ("loglikelihoods", "num_tokens", "num_chars")},
            "acc": tie_credit(score.loglikelihoods, score.gold),
            "acc_norm": tie_credit(per_char, score.gold),
        }
    counts = {"num_answer_tokens": score.num_answer_tokens, "num_truncated": score.num_truncated}
    return {**record, "nll": score.nll, **counts}


def _task_result(records: Sequence[Mapping[str, Any]]) -> TaskResult:
    """The metrics of a task from the records of its examples."""
    of_choices = [record for record in records if "acc" in record]
    credits = {name: [record[name] for record in of_choices] for name in ("acc", "acc_norm")}
    nlls, num_tokens = ([record[name] for record in records] for name in ("nll", "num_answer_tokens"))
    num_gold = Counter(record["gold"] for record in of_choices)
    chances = [1.0 / len(record["loglikelihoods"]) for record in of_choices]
    return TaskResult(
        **estimated("acc", mean_stderr(credits["acc"]) if of_choices else None),
        **estimated("acc_norm", mean_stderr(credits["acc_norm"]) if of_choices else None),
        chance=float(np.mean(chances)) if of_choices else None,
        majority=max(num_gold.values()) / len(of_choices) if of_choices else None,
        num_ties=sum(0 < credit < 1 for credit in credits["acc"]),
        num_ties_norm=sum(0 < credit < 1 for credit in credits["acc_norm"]),
        **estimated("nll", mean_stderr(nlls)),
        **estimated("nll_per_token", ratio_stderr(nlls, num_tokens)),
        num_examples=len(records),
        num_choice_examples=len(of_choices),
        num_answer_tokens=sum(num_tokens),
        num_truncated=sum(record["num_truncated"] > 0 for record in records),
    )


def _average(results: Sequence[TaskResult]) -> TaskResult:
    """Macro average over tasks. Counts are summed."""
    with_choices = [result for result in results if result.acc is not None]
    values: dict[str, Any] = {
        each.name: sum(getattr(result, each.name) for result in results)
        for each in fields(TaskResult)
        if each.name.startswith("num_")
    }
    for name in ("acc", "acc_norm", "nll", "nll_per_token"):
        values |= estimated(name, averaged(results if name.startswith("nll") else with_choices, name))
    for name in ("chance", "majority"):
        mean = averaged(with_choices, name)
        values[name] = mean.value if mean else None
    return TaskResult(**values)


def averaged(results: Sequence[Any], name: str) -> Estimate | None:
    """Macro average of the field `name`, each task counting once; None over no tasks.

    Its error is sqrt(sum of `name`_stderr^2) / tasks, the tasks being independent samples; nan if one is not known.
    """
    if not results:
        return None
    errors = (getattr(result, f"{name}_stderr", None) for result in results)
    variance = sum(math.nan if error is None else error**2 for error in errors)
    return Estimate(float(np.mean([getattr(result, name) for result in results])), math.sqrt(variance) / len(results))


def estimated(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """The two fields of a result; JSON has no nan, so an error of nan is None."""
    if estimate is None:
        return {name: None, f"{name}_stderr": None}
    return {name: estimate.value, f"{name}_stderr": None if math.isnan(estimate.stderr) else estimate.stderr}
