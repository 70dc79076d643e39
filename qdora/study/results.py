"""What a study has so far: its directory, the scores of single examples, what runs next, and how long it takes.

    study.json  cells/<key>/  results/<key>.json  failures/<key>.json  claims/<key>.lock  shared/<stage>/<key>/  report/

Any number of processes may share it; a process locks a cell before it runs it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qdora.errors import UserError, not_there
from qdora.evaluate.intervals import SeedScores, TaskScores, Weighting, weighted_mean
from qdora.evaluate.suite import by_task
from qdora.files.atomic import atomic_write_json, lock_if_free, read_json_object
from qdora.plan.fit import plan
from qdora.recipe.recipe_file import settings
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

    def shared(self, stage: str, key: str) -> Path:
        return self.path / "shared" / stage / key

    def is_done(self, key: str) -> bool:
        return self._result(key).is_file()

    def result(self, key: str) -> dict[str, Any] | None:
        return read_json_object(self._result(key)) if self.is_done(key) else None

    def write_result(self, key: str, value: Mapping[str, Any]) -> None:
        atomic_write_json(self._result(key), value)

    def num_done(self, keys: set[str]) -> int:
        return len(keys & {file.stem for file in (self.path / "results").glob("[!.]*.json")})

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
        raise UserError(not_there(path, "a study (it has no study.json)", "name a directory that 'qdora study' made."))
    return read_json_object(path / "study.json")


HIGHER_IS_BETTER = {
    "nll_per_token": False,
    "nll_by_task": False,
    "acc": True,
    "acc_norm": True,
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
    for task, example, row in _rows(cell, files["scores"]):
        values = dict.fromkeys(("nll_per_token", "nll_by_task"), (row["nll"], row["num_answer_tokens"]))
        if "acc" in row:
            values |= {"acc": (row["acc"], 1.0), "acc_norm": (row["acc_norm"], 1.0)}
        for measure, pair in values.items():
            found.setdefault(measure, {}).setdefault(task, {})[example] = pair
    for task, example, row in _rows(cell, files["generated"]) if "generated" in files else ():
        for measure in ("right", "unparsable"):
            is_so = float(row["outcome"] == measure)
            found.setdefault(measure, {}).setdefault(task, {})[example] = (is_so, 1.0)
    scores: dict[str, dict[str, TaskScores]] = {}
    for measure, tasks in found.items():
        scores[measure] = {}
        for task, rows in tasks.items():
            # A task without examples in the half has none there in all cells of a seed
            if kept := {example: pair for example, pair in rows.items() if part in ("all", half_of(example))}:
                values, weights = np.array(list(kept.values()), dtype=np.float64).T
                scores[measure][task] = TaskScores(tuple(kept), values, weights)
        if not scores[measure]:
            raise UserError(f"{cell}: too few examples for two halves. Fix: raise eval.limit, or compare.split: test.")
    return scores


def _rows(cell: Path, file: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    path = cell / file
    if not path.resolve().is_relative_to(cell.resolve()):
        raise UserError(f"{path}: must be a file inside the run directory of its cell.")
    rows = read_json_object(path)["per_example"]
    return [(task, name, row) for task, records in by_task(rows).items() for name, row in records.items()]


def half_of(example: str) -> Literal["choose", "compare"]:
    """The half of an example, which is the same in every study; about as many examples are in each."""
    identity = example.rpartition("#")[0]
    digest = hashlib.sha256(identity.encode("utf-8", "backslashreplace")).digest()
    return "choose" if digest[0] % 2 else "compare"


def combined(terms: Sequence[tuple[float, SeedScores]]) -> SeedScores:
    """Sum of factor * scores over the terms, example by example."""
    first = terms[0][1]
    total = {task: np.zeros_like(found.values) for task, found in first.items()}
    for factor, scores in terms:
        if {task: {*found.examples} for task, found in scores.items()} != {t: {*f.examples} for t, f in first.items()}:
            raise UserError("study: not all cells of a seed were evaluated on the same examples of the same tasks.")
        for task, found in scores.items():
            by_name = dict(zip(found.examples, found.values.tolist(), strict=True))
            total[task] = total[task] + factor * np.array([by_name[example] for example in first[task].examples])
    return {task: TaskScores(found.examples, total[task], found.weights) for task, found in first.items()}


class Results:
    def __init__(self, store: StudyDirectory, study: Study) -> None:
        self.store, self.study = store, study
        self._scores: dict[tuple[str, Part], CellScores] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._means: dict[tuple[str, str, Part, str | None], float] = {}

    def result(self, key: str) -> dict[str, Any] | None:
        if key not in self._results and (found := self.store.result(key)) is not None:
            self._results[key] = found
        return self._results.get(key)

    def diverged(self, key: str) -> bool:
        return "diverged" in (self.result(key) or {})

    @property
    def part(self) -> Part:
        """The examples that arms are compared on: one half if the other half chose their rates, else all."""
        return "compare" if self.study.compare.split == "halves" and self.study.rates is not None else "all"

    def scores(self, key: str, part: Part | None = None) -> CellScores:
        part = part or self.part
        if (key, part) not in self._scores:
            files = (self.result(key) or {}).get("files")
            self._scores[key, part] = read_scores(self.store.cell(key), files, part) if files else {}
        return self._scores[key, part]

    def mean(self, key: str, measure: str, part: Part | None = None, task: str | None = None) -> float:
        """A measure of one cell, of one task or of all; the worst score if it diverged; nan if it was not measured."""
        if self.diverged(key):  # no right answer, or a uniform guess over the vocabulary for each token
            uniform = math.log((self.result(key) or {})["num_vocabulary"])
            worst = {"nll_per_token": uniform, "nll_by_task": uniform, "acc": 0.0, "acc_norm": 0.0}
            return worst.get(measure, math.nan)
        which = (key, measure, part or self.part, task)
        if which not in self._means:
            scores = self.scores(key, part).get(measure, {})
            tasks = {name: each for name, each in scores.items() if task in (None, name)}
            self._means[which] = weighted_mean(tasks, self.weighting(measure)) if tasks else math.nan
        return self._means[which]

    def loss(self, key: str) -> float | None:
        if self.result(key) is None:
            return None
        metric, split = self.study.compare.metric, self.study.compare.split
        found = self.mean(key, metric, "choose" if split == "halves" else "all")
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


@dataclass(frozen=True)
class StageTime:
    """seconds: predicted of the cells that are not done, one process; nan: unknown."""

    stage: str
    num_cells: int
    num_done: int
    seconds: float


def stage_times(cells: Sequence[Cell], results: Results) -> list[StageTime]:
    known = {cell.key: result for cell in cells if (result := results.result(cell.key)) is not None}
    predict, times = _Prediction(results.study, list(known.values())), []
    for name in dict.fromkeys(cell.stage for cell in cells):
        own = [cell for cell in cells if cell.stage == name]
        seconds = [predict(cell) for cell in own if cell.key not in known]
        times.append(StageTime(name, len(own), len(own) - len(seconds), sum(seconds)))
    return times


class _Prediction:
    """Seconds of a cell: a start and so many seconds a step, from finished cells or from the study's `time`."""

    def __init__(self, study: Study, known: Sequence[Mapping[str, Any]]) -> None:
        points = [(float(result["num_steps"]), float(result["seconds"])) for result in known if "num_steps" in result]
        self.start: float = math.nan
        self.step: float | Literal["plan"] = math.nan
        self._planned: dict[str, float] = {}
        if len({steps for steps, _ in points}) > 1:
            steps, seconds = np.transpose(points)
            self.step, self.start = map(float, np.polyfit(steps, seconds, 1))
        elif study.time is not None:
            self.start, self.step = study.time.start, study.time.step

    def __call__(self, cell: Cell) -> float:
        number = cell.recipe.train.steps or 0
        step = self._by_plan(cell.recipe) if number and self.step == "plan" else self.step
        return self.start + number * float(step) if number else self.start

    def _by_plan(self, recipe: Recipe) -> float:
        """By the plan of a recipe that takes as long: neither pruning, the code book nor the kind of adapter count."""
        base = {"prune": None, "method": "round"} | ({} if recipe.base.quant == "none" else {"quant": "nf4"})
        plain = with_settings(recipe, base=base, adapter={"kind": "lora", "mask": "ignore", "init": "kaiming"})
        whole = settings(plain)
        text = json.dumps([whole[part] for part in ("model", "base", "adapter", "memory")] + [whole["train"]["batch"]])
        if text not in self._planned:
            self._planned[text] = plan(plain).step_seconds or math.nan
        return self._planned[text]


def times_in_words(times: Sequence[StageTime]) -> list[str]:
    def hours(seconds: float) -> str:
        return "unknown" if math.isnan(seconds) else f"{seconds / 3600:.1f} h"

    lines = [f"{each.stage}: {each.num_cells} cells, {each.num_done} done, {hours(each.seconds)}" for each in times]
    total = sum(each.seconds for each in times)
    known = "The time is known once runs of two lengths are done, or with time in the study file."
    return [*lines, known if math.isnan(total) else f"In all {hours(total)} of one process."]
