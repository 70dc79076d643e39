"""What a study has so far: its directory, the scores of single examples, what runs next, and how long it takes.

    study.json  cells/<key>/  results/<key>.json  failures/<key>.json  claims/<key>.lock  shared/<stage>/<key>/  report/

Any number of processes may share it; a process locks a cell before it runs it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qdora.errors import UserError, not_there
from qdora.evaluate.intervals import SeedScores, TaskScores, Weighting, weighted_mean
from qdora.evaluate.suite import ACCURACIES, by_task
from qdora.files.atomic import atomic_write_json, lock_if_free, read_json_object
from qdora.files.run_directory import RunDirectory
from qdora.plan.fit import plan
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.study.cells import Cell, Cells, Expander
from qdora.study.grid import Study


class StudyDirectory:
    """The files of a study; `makes` missing folders. A failed cell is given up after `retries` more attempts."""

    def __init__(self, path: Path, *, retries: int = 1, makes: bool = True) -> None:
        self.path, self.retries = path, retries
        for name in ("cells", "results", "failures", "claims", "shared") if makes else ():
            (path / name).mkdir(parents=True, exist_ok=True)

    def cell(self, key: str) -> Path:
        return self.path / "cells" / key

    def is_done(self, key: str) -> bool:
        return self._result(key).is_file()

    def result(self, key: str) -> dict[str, Any] | None:
        return read_json_object(self._result(key)) if self.is_done(key) else None

    def write_result(self, key: str, value: Mapping[str, Any]) -> None:
        atomic_write_json(self._result(key), value)

    def num_done(self, keys: set[str]) -> int:
        return sum(map(self.is_done, keys))

    def failures(self, key: str) -> list[dict[str, Any]]:
        """All failed attempts, oldest first: reason, time, traceback."""
        file = self._failures(key)
        return list(read_json_object(file)["attempts"]) if file.is_file() else []

    def add_failure(self, key: str, attempt: Mapping[str, Any]) -> None:
        stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        atomic_write_json(self._failures(key), {"attempts": [*self.failures(key), stamp | dict(attempt)]})

    def is_over(self, key: str) -> bool:
        return self.is_done(key) or self.is_given_up(key)

    def is_given_up(self, key: str) -> bool:
        return not self.is_done(key) and len(self.failures(key)) > self.retries

    def forget_failures(self, keys: Sequence[str]) -> None:
        for key in keys:
            if self.is_given_up(key):
                self._failures(key).unlink(missing_ok=True)

    def claimed(self, key: str) -> AbstractContextManager[bool]:
        """Hold a cell while the block runs; yields False if another process has it. A killed one holds nothing."""
        return lock_if_free(self.path / "claims" / f"{key}.lock")

    def is_at_work(self) -> bool:
        """Whether a process works on a cell now; one that died at it does not."""
        for file in (self.path / "claims").glob("*.lock"):
            with lock_if_free(file) as is_free:
                if not is_free:
                    return True
        return False

    def write_index(self, study: Study, cells: Cells) -> None:
        """Write study.json for the report."""
        document = {
            "study": study.model_dump(mode="json", exclude_unset=True),
            "cells": [cell.record() for cell in cells.cells],
            "num_waiting": cells.num_waiting,
            "rates": cells.rates,
        }
        atomic_write_json(self.path / "study.json", document)

    def _result(self, key: str) -> Path:
        return self.path / "results" / f"{key}.json"

    def _failures(self, key: str) -> Path:
        return self.path / "failures" / f"{key}.json"


def read_index(path: Path) -> dict[str, Any]:
    """Read study.json: study, cells (`Cell.record`), num_waiting, rates. UserError: there is none."""
    if not (path / "study.json").is_file():
        raise UserError(
            not_there(path, "a study (it has no study.json)", "name a directory that 'qdora study' made.")
        )
    return read_json_object(path / "study.json")


HIGHER_IS_BETTER = {
    "nll_per_token": False,
    "nll_by_task": False,
    **dict.fromkeys(ACCURACIES, True),
    "right": True,
    "unparsable": False,
}
"""nll_per_token: NLL of the right answer, nats per token. nll_by_task: each task counting once. acc, acc_norm:
share of questions whose right choice is the likeliest, by its likelihood and by that per character. right, unparsable:
shares of generated answers."""
Part = Literal["all", "choose", "compare"]
CellScores = Mapping[str, SeedScores]
"""Measure -> task -> scores. Only tasks with choices have accuracies."""


def read_scores(cell: Path, files: Mapping[str, str], part: Part) -> CellScores:
    """Read the scores of a cell; `files`: "scores", optionally "generated" -> file below the run directory."""
    found: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for file in files.values():
        tasks = by_task(read_json_object(RunDirectory(cell).inside(file))["per_example"])
        for task, rows in tasks.items():
            for example, row in rows.items():
                if part not in ("all", half_of(example)):
                    continue  # a task without examples in the half has none there in all cells of a seed
                scores = {name: (row[name], 1.0) for name in ACCURACIES if name in row}
                if "nll" in row:
                    nll = row["nll"], row["num_answer_tokens"]
                    scores |= {"nll_per_token": nll, "nll_by_task": nll}
                else:
                    scores |= {name: (row["outcome"] == name, 1.0) for name in ("right", "unparsable")}
                for measure, score in scores.items():
                    found.setdefault(measure, {}).setdefault(task, {})[example] = score
    if not found:
        raise UserError(
            f"{cell}: too few examples for two halves. Fix: raise eval.limit, or compare.split: test."
        )
    return {
        measure: {
            task: TaskScores(tuple(own), *np.array(list(own.values()), float).T)
            for task, own in of_tasks.items()
        }
        for measure, of_tasks in found.items()
    }


def half_of(example: str) -> Literal["choose", "compare"]:
    """The half of an example, which is the same in every study; about as many examples are in each."""
    identity = example.rpartition("#")[0]
    digest = hashlib.sha256(identity.encode("utf-8", "backslashreplace")).digest()
    return "choose" if digest[0] % 2 else "compare"


def combined(terms: Sequence[tuple[float, SeedScores]]) -> SeedScores:
    """Sum of factor * scores over the terms, example by example."""
    first = terms[0][1]
    total = {(task, example): 0.0 for task, found in first.items() for example in found.examples}
    for factor, scores in terms:
        pairs = (
            (task, zip(found.examples, found.values.tolist(), strict=True)) for task, found in scores.items()
        )
        values = {(task, example): value for task, own in pairs for example, value in own}
        if values.keys() != total.keys():
            raise UserError(
                "study: not all cells of a seed were evaluated on the same examples of the same tasks."
            )
        total = {name: value + factor * values[name] for name, value in total.items()}
    return {
        task: TaskScores(
            found.examples, np.array([total[task, name] for name in found.examples]), found.weights
        )
        for task, found in first.items()
    }


class Results:
    def __init__(self, store: StudyDirectory, study: Study) -> None:
        self.store, self.study = store, study
        self._scores: dict[tuple[str, Part], CellScores] = {}
        self._results: dict[str, dict[str, Any]] = {}

    def result(self, key: str) -> dict[str, Any]:
        """Of a finished cell; of another one empty."""
        if not self._results.get(key):
            self._results[key] = self.store.result(key) or {}
        return self._results[key]

    def diverged(self, key: str) -> bool:
        return "diverged" in self.result(key)

    @property
    def part(self) -> Part:
        """The examples that arms are compared on: one half if the other half chose their rates, else all."""
        return "compare" if self.study.compare.split == "halves" and self.study.rates is not None else "all"

    def scores(self, key: str, part: Part | None = None) -> CellScores:
        part = part or self.part
        if (key, part) not in self._scores:
            files = self.result(key).get("files")
            self._scores[key, part] = read_scores(self.store.cell(key), files, part) if files else {}
        return self._scores[key, part]

    def mean(self, key: str, measure: str, part: Part | None = None, task: str | None = None) -> float:
        """A measure of one cell, of one task or of all; the worst score if it diverged; nan if it was not measured."""
        if self.diverged(key):  # no right answer, or a uniform guess over the vocabulary for each token
            uniform = math.log(self.result(key)["num_vocabulary"])
            worst = {"nll_per_token": uniform, "nll_by_task": uniform} | dict.fromkeys(ACCURACIES, 0.0)
            return worst.get(measure, math.nan)
        scores = self.scores(key, part).get(measure, {})
        tasks = {name: each for name, each in scores.items() if task in (None, name)}
        return weighted_mean(tasks, self.weighting(measure)) if tasks else math.nan

    def loss(self, key: str) -> float | None:
        if not self.result(key):
            return None
        metric = self.study.compare.metric
        found = self.mean(key, metric, "choose" if self.part == "compare" else "all")
        if self.diverged(key) or math.isnan(found):
            return math.inf
        return -found if HIGHER_IS_BETTER[metric] else found

    def weighting(self, measure: str) -> Weighting:
        return self.study.compare.tasks if measure == "nll_per_token" else "equal"


def cells_now(expander: Expander, results: Results) -> Cells:
    """The cells that are known now, which are also written to the index."""

    found = expander.now(lambda cell: results.loss(cell.key))
    results.store.write_index(expander.study, found)
    return found


def planned_cells(expander: Expander, results: Results | None) -> Cells:
    """All cells, as if every search found its rate where the runs so far, or else its values, suggest."""

    def loss(cell: Cell) -> float:
        known, rates = None if results is None else results.loss(cell.key), expander.study.rates
        if known is not None or rates is None:
            return known or 0.0
        values = sorted(rates.for_labels(cell.labels).values)
        # Worse than anything known, and best in the middle
        return 1e6 + abs(math.log(cell.recipe.train.lr / values[len(values) // 2]))

    return expander.now(loss)


def stage_times(cells: Sequence[Cell], results: Results) -> list[dict[str, Any]]:
    """stage, num_cells, num_done, and the predicted seconds of one process for the others; nan: unknown.

    A cell takes a start and so many seconds a step, by the finished ones or by the study's `time`.
    """
    known = {cell.key: result for cell in cells if (result := results.result(cell.key))}
    points = [(result["num_steps"], result["seconds"]) for result in known.values() if "num_steps" in result]
    start, step, planned = math.nan, math.nan, dict[str, float]()
    time = results.study.time
    if len({steps for steps, _ in points}) > 1:
        steps, taken = np.transpose(points)
        step, start = map(float, np.polyfit(steps, taken, 1))
    elif time is not None:
        start, step = time.start, math.nan if time.step == "plan" else time.step

    def seconds(cell: Cell) -> float:
        number, by_plan = cell.recipe.train.steps or 0, math.isnan(step) and time is not None
        return start + number * (_planned_step(cell.recipe, planned) if by_plan else step) if number else start

    times: list[dict[str, Any]] = []
    for stage in dict.fromkeys(cell.stage for cell in cells):
        own = [cell for cell in cells if cell.stage == stage]
        left = [seconds(cell) for cell in own if cell.key not in known]
        counts = {"num_cells": len(own), "num_done": len(own) - len(left)}
        times.append({"stage": stage, **counts, "seconds": sum(left)})
    return times


def _planned_step(recipe: Recipe, known: dict[str, float]) -> float:
    """By the plan of a recipe that takes as long: neither pruning, the code book nor the kind of adapter count."""
    base = {"prune": None, "method": "round"} | ({} if recipe.base.quant == "none" else {"quant": "nf4"})
    plain = with_settings(recipe, base=base, adapter={"kind": "lora", "mask": "ignore", "init": "kaiming"})
    text = repr((plain.model, plain.base, plain.adapter, plain.memory, plain.train.batch))
    if text not in known:
        known[text] = plan(plain).step_seconds or math.nan
    return known[text]


def times_in_words(times: Sequence[Mapping[str, Any]]) -> list[str]:
    def hours(seconds: float) -> str:
        return "unknown" if math.isnan(seconds) else f"{seconds / 3600:.1f} h"

    lines = [
        f"{each['stage']}: {each['num_cells']} cells, {each['num_done']} done, {hours(each['seconds'])}"
        for each in times
    ]
    total = sum(each["seconds"] for each in times)
    known = "The time is known once runs of two lengths are done, or with time in the study file."
    return [*lines, known if math.isnan(total) else f"In all {hours(total)} of one process."]
