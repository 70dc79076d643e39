"""The cells that a study will have, and how long they take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qdora.plan.fit import plan
from qdora.recipe.recipe_file import settings
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.study.cells import Cell, Cells, Expander
from qdora.study.compare import Results
from qdora.study.grid import Study


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
