"""Several tasks in one evaluation: metrics of each, their averages, a table, and the change since before training.

As in lm-evaluation-harness `acc` takes the choice of the largest summed log-likelihood, `acc_norm` the largest per
character. Unlike there the right choice counts 1/k when it is one of k tied ones.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from rich.table import Column, Table
from torch import nn

from qdora.data.example import Example
from qdora.errors import Diverged
from qdora.evaluate.intervals import Estimate, TaskScores, example_interval, mean_stderr, ratio_stderr
from qdora.evaluate.loglikelihood import ExampleScore, score_examples
from qdora.files.console import Progress

ACCURACIES: dict[str, Callable[[ExampleScore], ArrayLike]] = {
    "acc": lambda score: score.loglikelihoods,
    # An empty choice counts as one character
    "acc_norm": lambda score: score.loglikelihoods / np.maximum(score.num_chars, 1),
}
"""Metric of examples with choices -> the numbers of which the right choice needs the largest."""
LABELS = {"nll_per_token": "NLL (nats per token)", "acc": "accuracy", "acc_norm": "accuracy per character"}
CHANGES = ("nll_per_token", "acc")
"""Metrics whose changes a run shows."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Metrics of one task, or their average. Accuracies lie in 0..1 and are None without choices."""

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
    nll: float  # mean over examples of the right answer's summed NLL, nats
    nll_stderr: float | None
    nll_per_token: float  # summed NLL / answer tokens, nats
    nll_per_token_stderr: float | None
    num_answer_tokens: int
    num_truncated: int  # examples whose prompt was cut at the left to fit the model's context


Metrics = TypeVar("Metrics")


@dataclass(frozen=True)
class Result(Generic[Metrics]):
    tasks: dict[str, Metrics]
    average: Metrics  # every task that has a metric counts once; counts are sums
    settings: dict[str, Any]  # options and conditions, such as limit, block, model_dtype, device, seconds
    per_example: list[dict[str, Any]] = field(default_factory=list)  # in task order

    def to_dict(self, *, per_example: bool = False) -> dict[str, Any]:
        tasks = {task: dict(vars(metrics)) for task, metrics in self.tasks.items()}
        document = {"tasks": tasks, "average": dict(vars(self.average)), "settings": dict(self.settings)}
        return document | ({"per_example": self.per_example} if per_example else {})

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> EvaluationResult:
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
    progress: Progress | None = None,
) -> EvaluationResult:
    """Score every task's examples: choices by log-likelihood, others by the NLL of their answer; `spread` chooses them.

    Raises Diverged if a log-likelihood is not finite.
    """
    started = time.perf_counter()
    tasks: dict[str, TaskResult] = {}
    records: list[dict[str, Any]] = []
    for task, all_examples in examples_by_task.items():
        examples = sorted(spread(all_examples, limit, block), key=lambda example: not example.choices)
        scores = score_examples(model, tokenizer, examples, progress)
        broken = [score.id for score in scores if not np.isfinite(score.loglikelihoods).all()]
        if broken:
            where = f"{len(broken)} of {len(scores)} examples, first in example '{broken[0]}'"
            raise Diverged(f"eval: task '{task}': the model's log-likelihood is not finite in {where}.")
        own = [_record(task, score) for score in scores]
        tasks[task] = _task_result(own)
        records += own
    settings = {"limit": limit, "block": block} | conditions(model, started)
    return EvaluationResult(tasks, average_of(list(tasks.values())), settings, records)


def conditions(model: nn.Module, started: float) -> dict[str, Any]:
    """Dtype and device of the model, and the seconds since `started` (of time.perf_counter)."""
    parameter, seconds = next(model.parameters()), round(time.perf_counter() - started, 3)
    dtype = str(parameter.dtype).removeprefix("torch.")
    return {"model_dtype": dtype, "device": str(parameter.device), "seconds": seconds}


def spread(examples: Sequence[Example], limit: int | None, block: int | None = None) -> list[Example]:
    """At most `limit` examples, in their order: at even distances, since files are often ordered by origin.

    Block k: the k-th `limit` examples of a fixed random order, which starts again at its end.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    if block is None:
        return [examples[index * len(examples) // limit] for index in range(limit)]
    shuffled = sorted(range(len(examples)), key=lambda index: hashlib.sha256(str(index).encode()).digest())
    places = (shuffled[place % len(examples)] for place in range(block * limit, (block + 1) * limit))
    return [examples[index] for index in sorted(places)]


FEWEST = 10  # examples whose standard error is shown: of two right answers it is 0
Cell = Callable[[Any], str]  # of one task's result


def compare_table(results: Mapping[str, EvaluationResult]) -> Table:
    """A row per task and, per label, columns of accuracy in % ± standard error and answer NLL in nats per token."""
    shared: dict[str, Cell] = {
        "n": lambda result: str(result.num_examples),
        "chance": lambda result: percent(result.chance),
        "majority": lambda result: percent(result.majority),
    }
    own: dict[str, Cell] = {
        "acc %": lambda result: percent(result.acc, result.acc_stderr, result.num_choice_examples),
        "NLL/token": lambda result: f"{result.nll_per_token:.3f}",
    }
    return results_table("evaluation", results, shared, own)


def results_table(
    title: str, results: Mapping[str, Any], shared: Mapping[str, Cell], own: Mapping[str, Cell]
) -> Table:
    """A row per task and one of averages; where results differ in a `shared` column, it has all their values."""
    names = [*shared, *(f"{label} {name}" for label in results for name in own)]
    columns = [Column("task"), *(Column(name, justify="right") for name in names)]
    table = Table(*columns, title=title, title_justify="left")
    for task in (*dict.fromkeys(task for result in results.values() for task in result.tasks), None):
        found = [result.average if task is None else result.tasks.get(task) for result in results.values()]
        both = (
            "/".join(dict.fromkeys(cell(each) for each in found if each is not None))
            for cell in shared.values()
        )
        cells = ("–" if each is None else cell(each) for each in found for cell in own.values())
        if task is None:
            table.add_section()
        table.add_row(task or "average", *both, *cells, style="bold" if task is None else None)
    return table


def percent(share: float | None, stderr: float | None = None, number: int = FEWEST) -> str:
    """`12.3`, or `12.3 ± 0.4` over enough examples."""
    error = "" if stderr is None or number < FEWEST else f" ± {100 * stderr:.1f}"
    return "–" if share is None else f"{100 * share:.1f}{error}"


def tie_credit(scores: ArrayLike, gold: int) -> float:
    """1/k if `gold` is among the k largest scores."""
    array = np.asarray(scores, dtype=np.float64)
    best = np.flatnonzero(array == array.max())
    return 1.0 / best.size if gold in best else 0.0


def _record(task: str, score: ExampleScore) -> dict[str, Any]:
    record: dict[str, Any] = {"task": task, "id": score.id}
    if score.gold is not None:
        record["gold"] = score.gold
        record |= {
            name: getattr(score, name).tolist() for name in ("loglikelihoods", "num_tokens", "num_chars")
        }
        record |= {name: tie_credit(of(score), score.gold) for name, of in ACCURACIES.items()}
    counts = {"num_answer_tokens": score.num_answer_tokens, "num_truncated": score.num_truncated}
    return {**record, "nll": score.nll, **counts}


def _task_result(records: Sequence[Mapping[str, Any]]) -> TaskResult:
    of_choices = [record for record in records if "acc" in record]
    accuracies = dict[str, Any]()
    for name in ACCURACIES:
        credits = [record[name] for record in of_choices]
        accuracies |= estimated(name, mean_stderr(credits) if credits else None)
    nlls, num_tokens = ([record[name] for record in records] for name in ("nll", "num_answer_tokens"))
    num_gold = Counter(record["gold"] for record in of_choices)
    chances = [1.0 / len(record["loglikelihoods"]) for record in of_choices]
    return TaskResult(
        **accuracies,
        chance=float(np.mean(chances)) if of_choices else None,
        majority=max(num_gold.values()) / len(of_choices) if of_choices else None,
        num_ties=sum(0 < record["acc"] < 1 for record in of_choices),
        num_ties_norm=sum(0 < record["acc_norm"] < 1 for record in of_choices),
        **estimated("nll", mean_stderr(nlls)),
        **estimated("nll_per_token", ratio_stderr(nlls, num_tokens)),
        num_examples=len(records),
        num_choice_examples=len(of_choices),
        num_answer_tokens=sum(num_tokens),
        num_truncated=sum(record["num_truncated"] > 0 for record in records),
    )


def average_of(results: Sequence[Metrics]) -> Metrics:
    """Mean over the tasks that have a metric, with the error sqrt(sum of stderr^2) / tasks. Counts are summed."""
    kind: Any = type(results[0])
    values: dict[str, Any] = {}
    for name in (each.name for each in fields(kind)):
        metric = name.removesuffix("_stderr")
        numbers = [getattr(result, name) for result in results if getattr(result, metric) is not None]
        if name.startswith("num_"):
            values[name] = sum(numbers)
        elif not numbers or None in numbers:
            values[name] = None
        elif name == metric:
            values[name] = float(np.mean(numbers))
        else:  # tasks are independent
            values[name] = math.sqrt(sum(error**2 for error in numbers)) / len(numbers)
    made: Metrics = kind(**values)
    return made


def estimated(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """The two fields of a result; JSON has no nan."""
    if estimate is None:
        return {name: None, f"{name}_stderr": None}
    return {name: estimate.value, f"{name}_stderr": None if math.isnan(estimate.stderr) else estimate.stderr}


# Before and after training


def task_changes(before: Mapping[str, Any], after: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """The change of each task that has the metric, and of their average, from `Result.to_dict` or nothing.

    before, after: None: not measured. difference: over the examples that both have; None for fewer than two. lower,
    upper: ends of its 95 % interval; None for fewer than `FEWEST` examples in any task.
    """
    old, new = before.get("tasks", {}), after.get("tasks", {})
    old_records, new_records = (by_task(each.get("per_example", [])) for each in (before, after))
    rows = [(name, old.get(name, {}), new.get(name, {}), [name]) for name in dict.fromkeys([*old, *new])]
    rows = [row for row in rows if any(each.get(metric) is not None for each in row[1:3])]
    pairs = {name: _paired(old_records.get(name, {}), new_records.get(name, {}), metric) for name, *_ in rows}
    if len(rows) > 1:
        rows.append(("average", before.get("average", {}), after.get("average", {}), list(pairs)))
    changes: list[dict[str, Any]] = []
    for name, one, other, tasks in rows:
        fewest = min(len(pairs[task].examples) for task in tasks)
        interval = example_interval({task: pairs[task] for task in tasks}, "equal") if fewest > 1 else None
        ends = interval if fewest >= FEWEST else None
        changes.append(
            {
                "task": name,
                "num_examples": sum((new.get(task) or old[task])["num_examples"] for task in tasks),
                "before": one.get(metric),
                "after": other.get(metric),
                "difference": interval and interval.value,
                "lower": ends and ends.lower,
                "upper": ends and ends.upper,
            }
        )
    return changes


def by_task(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Task -> name of an example, its id with a number, as ids can repeat -> its record."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for record in records:
        identity = (record["task"], str(record["id"]))
        seen[identity] += 1
        found.setdefault(record["task"], {})[f"{record['id']}#{seen[identity]}"] = record
    return found


def _paired(old: Mapping[str, Any], new: Mapping[str, Any], metric: str) -> TaskScores:
    """new - old of the examples that both have."""
    name = metric.removesuffix("_per_token")
    pairs = {key: (old[key], new[key]) for key in old if key in new and name in old[key] and name in new[key]}
    differences = np.array([after[name] - before[name] for before, after in pairs.values()], dtype=np.float64)
    weights = [1.0 if name in ACCURACIES else float(after["num_answer_tokens"]) for _, after in pairs.values()]
    return TaskScores(tuple(pairs), differences, np.array(weights))
