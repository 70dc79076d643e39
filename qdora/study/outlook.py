"""What a study will take and what it can find, told before it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qdora.evaluation.example_intervals import Spread
from qdora.plan.memory_plan import plan
from qdora.recipe.recipe_file import settings
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.study.cells import Cell, Cells, Expander
from qdora.study.compare import (
    NamedComparison,
    Results,
    find_arms,
    named_comparisons,
    num_of_family,
    seed_improvements,
)
from qdora.study.grid import Study, in_words, num_first_seeds
from qdora.study.rates import Search
from qdora.study.scores import HIGHER_IS_BETTER


@dataclass(frozen=True)
class StageTime:
    """Cells of a stage, those that are done, and the predicted seconds of the others; nan if nothing tells them."""

    stage: str
    num_cells: int
    num_done: int
    seconds: float


def planned_cells(expander: Expander, results: Results | None) -> Cells:
    """All cells of a study, as if every search found its rate where the runs so far, or else its values, suggest."""

    def loss(cell: Cell) -> float:
        known = None if results is None else results.loss(cell.key)
        rates = expander.study.rates
        assert rates is not None
        values = sorted(rates.for_labels(cell.labels).values)
        middle = values[len(values) // 2]
        # Worse than anything known, and best in the middle
        return 1e6 + abs(math.log(cell.recipe.train.lr / middle)) if known is None else known

    return expander.now(loss, lambda _: True)


def stage_times(cells: Sequence[Cell], results: Results) -> list[StageTime]:
    """Every stage in its order. Times are those of one process."""
    known = [(cell, result) for cell in cells if (result := results.result(cell.key)) is not None]
    predict = _Prediction(results.study, known)
    done = {cell.key for cell, _ in known}
    return [
        StageTime(
            stage=name,
            num_cells=sum(cell.stage == name for cell in cells),
            num_done=sum(cell.stage == name and cell.key in done for cell in cells),
            seconds=sum(predict(cell) for cell in cells if cell.stage == name and cell.key not in done),
        )
        for name in dict.fromkeys(cell.stage for cell in cells)
    ]


class _Prediction:
    """Seconds of a cell: a start and so many seconds a step, from finished cells or from the study's `time`."""

    def __init__(self, study: Study, known: Sequence[tuple[Cell, Mapping[str, Any]]]) -> None:
        points = [
            (float(result["num_steps"]), float(result["seconds"])) for cell, result in known if "num_steps" in result
        ]
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
        if not number:
            return self.start
        return self.start + number * (self._by_plan(cell.recipe) if self.step == "plan" else self.step)

    def _by_plan(self, recipe: Recipe) -> float:
        """By the plan of a recipe that takes as long: neither pruning, the code book nor the kind of adapter count."""
        base = {"prune": None} if recipe.base.quant == "none" else {"prune": None, "quant": "nf4"}
        plain = with_settings(recipe, base=base, adapter={"kind": "lora", "mask": "ignore", "init": "kaiming"})
        whole = settings(plain)
        text = json.dumps([whole[part] for part in ("model", "base", "adapter", "memory")] + [whole["train"]["batch"]])
        if text not in self._planned:
            self._planned[text] = plan(plain).step_seconds or math.nan
        return self._planned[text]


@dataclass(frozen=True)
class Outlook:
    """What a primary comparison can find: the half-width of its interval, and its smallest detectable difference.

    `source` says where the spread between seeds comes from; the numbers are nan where nothing tells it.
    """

    comparison: str
    num_seeds: int
    spread: float
    source: str
    half_width: float
    smallest_detectable: float


def outlooks(cells: Cells, results: Results) -> list[Outlook]:
    """Of every primary comparison of the planned cells."""
    compare = results.study.compare
    records = [cell.record() for cell in cells.cells]
    planned, finished = find_arms(records, results, as_planned=True), find_arms(records, results)
    primary = [each for each in named_comparisons(planned, results.study, records) if each.family]
    measured = {
        each.name + in_words(each.context): each for each in named_comparisons(finished, results.study, records)
    }
    of_rates = _spread_of_searches(cells, results)
    found = []
    for each in primary:
        num_seeds = min(len(arm.seeds) for arm in each.arms)
        spread, source = _known_spread(measured.get(each.name + in_words(each.context)), results)
        if math.isnan(spread):
            spread, source = of_rates
        if math.isnan(spread) and compare.spread is not None:
            spread, source = compare.spread, "compare.spread"
        num_first = min(num_first_seeds(results.study, arm.seeds) for arm in each.arms)
        of_mean = Spread(spread / math.sqrt(num_seeds), num_first - 1) if num_first > 1 else Spread(math.nan, math.nan)
        name = each.name + (f" ({in_words(each.context)})" if each.context else "")
        number = num_of_family(results.study, each.family) or len(primary)
        detectable = of_mean.detectable(compare.alpha / number, compare.power)
        found.append(
            Outlook(
                comparison=name,
                num_seeds=num_seeds,
                spread=spread,
                source=source,
                half_width=of_mean.half_width,
                smallest_detectable=detectable,
            )
        )
    return found


def _known_spread(comparison: NamedComparison | None, results: Results) -> tuple[float, str]:
    """Of a comparison whose first runs are finished."""
    if comparison is None:
        return math.nan, "unknown"
    by_seed = seed_improvements(comparison.terms, results, results.study.compare.metric)
    first = list(by_seed.values())[: num_first_seeds(results.study, by_seed)]
    if len(first) < 2:
        return math.nan, "unknown"
    return float(np.std(first, ddof=1)), f"{len(first)} seeds that are done"


def _spread_of_searches(cells: Cells, results: Results) -> tuple[float, str]:
    """Standard deviation between the search's seeds of arm - reference, each at its best rate, pooled over contexts."""
    compare = results.study.compare
    best = [(labels, runs) for labels, search, own in cells.searches if (runs := _best_runs(search, own, results))]
    squares, free = 0.0, 0
    for labels, runs in best:
        for other_labels, others in best:
            context, other_context = (
                {axis: text for axis, text in each.items() if axis != compare.arm} for each in (labels, other_labels)
            )
            if context == other_context and other_labels[compare.arm] == compare.reference != labels[compare.arm]:
                differences = [runs[seed] - others[seed] for seed in runs if seed in others]
                squares += float(np.var(differences)) * len(differences)
                free += len(differences) - 1
    return (math.sqrt(squares / free), "the search for rates") if free > 0 else (math.nan, "unknown")


def _best_runs(search: Search, cells: Sequence[Cell], results: Results) -> dict[int, float]:
    """Seed -> loss of the full runs at the best rate among those that are finished with all seeds; {} without one."""
    found: dict[float, dict[int, float]] = {}
    for run, cell in zip(search.runs, cells, strict=True):
        value = results.loss(cell.key)
        if run.length == "full":
            found.setdefault(run.rate, {})[run.seed] = math.inf if value is None else value
    finished = [losses for losses in found.values() if all(map(math.isfinite, losses.values()))]
    return min(finished, key=lambda losses: float(np.mean(list(losses.values()))), default={})


def spread_in_words(found: Outlook, metric: str) -> str:
    """A line of --dry-run."""
    if math.isnan(found.spread):
        return f"{found.comparison}: {found.num_seeds} seeds; the spread is unknown. Fix: set compare.spread."
    unit = "" if HIGHER_IS_BETTER[metric] else " nats"
    return (
        f"{found.comparison}: {found.num_seeds} seeds; with a spread of {found.spread:.3g} ({found.source}) the "
        f"interval is ± {found.half_width:.3g}; differences below {found.smallest_detectable:.3g}{unit} stay unseen."
    )


def times_in_words(times: Sequence[StageTime]) -> list[str]:
    """Lines of --dry-run."""
    lines = []
    for each in times:
        hours = "time unknown" if math.isnan(each.seconds) else f"{each.seconds / 3600:.1f} h"
        lines.append(f"{each.stage}: {each.num_cells} cells, {each.num_done} done, {hours}")
    total = sum(each.seconds for each in times)
    if math.isnan(total):
        return [*lines, "The time is not known before runs of two lengths are done. Fix: set time."]
    return [*lines, f"In all {total / 3600:.1f} h of one process."]
