"""What the runs of combined_vs_solo.py say, by the rules of a study: all tasks at once, and each task by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qdora.evaluation.example_intervals import weighted_mean
from qdora.recipe.section import with_settings
from qdora.study.compare import Arm, Results, comparisons, find_arms
from qdora.study.grid import Study
from qdora.study.scores import CellScores, Part
from qdora.study.study_directory import StudyDirectory, read_index

TOGETHER, ALONE, WHOLE = "combined", "alone", "all tasks"
MEASURES = ("nll_per_token", "acc", "acc_norm")


class _Joined(Results):
    """Results in which the runs of single tasks with one seed are one cell, and in which only some tasks count.

    Args:
        together: The combined runs.
        alone: Task -> its arm; only these tasks count.
    """

    def __init__(self, store: StudyDirectory, study: Study, together: Arm, alone: dict[str, Arm]) -> None:
        super().__init__(store, study)
        self.together, self.alone = together, alone

    def _keys(self, key: str) -> list[str]:
        """The cells of which `key`, a cell or a seed, consists."""
        known = [arm.seeds[key] for arm in self.alone.values() if key in arm.seeds]
        return known or [key]

    def diverged(self, key: str) -> bool:
        return any(super(_Joined, self).diverged(each) for each in self._keys(key))

    def scores(self, key: str, part: Part | None = None) -> CellScores:
        found = [super(_Joined, self).scores(each, part) for each in self._keys(key)]
        measures = {measure for each in found for measure in each}
        return {
            measure: {
                task: scores for each in found for task, scores in each.get(measure, {}).items() if task in self.alone
            }
            for measure in measures
        }

    def _worst(self, key: str, measure: str) -> float:
        """Of runs of single tasks the diverged ones alone have the worst score."""
        keys, whole = self._keys(key), self.together.seeds.get(key)
        if keys == [key] or whole is None or super().diverged(whole):
            return super()._worst(keys[0], measure)
        tasks = {}
        for task, cell in ((task, arm.seeds[key]) for task, arm in self.alone.items()):
            is_lost = super().diverged(cell)
            found = super().scores(whole if is_lost else cell)[measure][task]
            tasks[task] = replace(found, values=super()._worst(cell, measure) * found.weights) if is_lost else found
        return weighted_mean(tasks, self.weighting(measure))


def summary(directory: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """The comparison on all tasks, which is the primary one, and those on single tasks; scores; rates; costs.

    A positive improvement says that the combined adapter is better. The scores are means over seeds.
    """
    index, store = read_index(directory), StudyDirectory(directory, makes=False)
    study = with_settings(Study.model_validate(index["study"]), compare={"reference": ALONE})
    arms = {arm.name: arm for arm in find_arms(index["cells"], Results(store, study))}
    missing = [name for name in (TOGETHER, *tasks) if name not in arms]
    if missing:
        raise SystemExit(f"no run is finished, or every learning rate diverged, for: {', '.join(missing)}")
    together, alone = arms[TOGETHER], {task: arms[task] for task in tasks}

    def compared(names: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows of the comparison on these tasks, and the mean scores of both sides."""
        parts = {task: alone[task] for task in names}
        both, joined = (together, _joined_arm(list(parts.values()))), _Joined(store, study, together, parts)
        rows = comparisons(both, joined, MEASURES, index["cells"])
        shared = [seed for seed in together.seeds if seed in both[1].seeds]
        means = {
            arm.name: {
                each: float(np.mean([joined.mean(arm.seeds[seed], each) for seed in shared])) for each in MEASURES
            }
            for arm in both
        }
        return rows, means

    whole, of_tasks = compared(tasks), {task: compared([task]) for task in tasks}
    for rows, _ in of_tasks.values():
        for row in rows:
            row |= {"role": "exploratory", "winner": "", "verdict": "exploratory"}
    return {
        "tasks": list(tasks),
        "comparisons": {WHOLE: whole[0]} | {task: rows for task, (rows, _) in of_tasks.items()},
        "scores": {WHOLE: whole[1]} | {task: means for task, (_, means) in of_tasks.items()},
        "rates": {
            name: {"rate": arms[name].rate, "is_interior": arms[name].is_interior} for name in (TOGETHER, *tasks)
        },
        "costs": {name: [_costs(store, key) for key in arms[name].seeds.values()] for name in (TOGETHER, *tasks)},
    }


def _joined_arm(arms: Sequence[Arm]) -> Arm:
    """The arms of single tasks as one, whose cell of a seed is named by the seed."""
    shared = [seed for seed in arms[0].seeds if all(seed in arm.seeds for arm in arms)]
    return Arm(
        context={},
        name=ALONE,
        kind="trained",
        rate="",
        is_interior=all(arm.is_interior for arm in arms),
        seeds={seed: seed for seed in shared},
        num_missing=sum(arm.num_missing for arm in arms),
        base_key=None,
        dense_key=None,
    )


def _costs(store: StudyDirectory, key: str) -> dict[str, Any]:
    result = store.result(key)
    assert result is not None, key
    return {name: result.get(name) for name in ("num_steps", "seconds")}
