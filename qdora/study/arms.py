"""From finished cells to the arms that are compared: the tuned value of each, and which cells it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qdora.study.config import CompareConfig
from qdora.study.scores import HIGHER_IS_BETTER, CellScores, mean_score, read_scores
from qdora.study.store import StudyDirectory

BASE_ARM = "no adapter"
"""Name of the arm of a base that the grid did not name."""


@dataclass(frozen=True)
class Arm:
    """One value of the arm axis in one surrounding.

    Attributes:
        context: Axis -> label, without the arm's, the tuned and the seed's axis.
        name: Label of the arm axis.
        chosen: Tuned axis -> label that was chosen.
        swept: Whether there was anything to choose from.
        at_edge: The chosen value is the least or the largest number that was tried.
        seeds: Seed label -> key of the cell.
        num_missing: Cells of this arm without result.
        base_key, dense_key: As of its cells.
    """

    context: dict[str, str]
    name: str
    chosen: dict[str, str]
    swept: bool
    at_edge: bool
    seeds: dict[str, str]
    num_missing: int
    base_key: str | None
    dense_key: str | None
    is_trained: bool


class Results:
    """Finished cells of a study, read once.

    Args:
        store: The study's directory.
        split: Split that arms are compared on: validation (its halves), or test.
    """

    def __init__(self, store: StudyDirectory, split: str) -> None:
        self.store, self.split = store, split
        self._scores: dict[tuple[str, str], CellScores] = {}
        self._results: dict[str, dict[str, Any] | None] = {}

    def result(self, key: str) -> dict[str, Any] | None:
        """What a cell gave, or None."""
        if key not in self._results:
            self._results[key] = self.store.result(key)
        return self._results[key]

    def scores(self, key: str, split: str | None = None) -> CellScores:
        """Scores of a finished cell; on the split of the comparison if none is named."""
        split = split or self.split
        if (key, split) not in self._scores:
            result = self.result(key)
            assert result is not None, key
            self._scores[key, split] = read_scores(self.cell(key), result["files"], split)
        return self._scores[key, split]

    def cell(self, key: str) -> Path:
        """Run directory of a cell."""
        return self.store.cell(key)


def find_arms(cells: Sequence[Mapping[str, Any]], compare: CompareConfig, results: Results) -> list[Arm]:
    """Arms with at least one finished cell, in the order of the grid; bases first.

    The tuned value of an arm is the one with the best average over seeds on the choosing examples, among the values
    that have most seeds.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    tuned = (compare.arm, compare.seed, *compare.choose)
    for cell in cells:
        context = {axis: label for axis, label in cell["labels"].items() if axis not in tuned}
        name = cell["labels"].get(compare.arm, BASE_ARM)
        groups.setdefault((cell["is_trained"], tuple(context.items()), name), []).append(cell)
    arms = [_arm(dict(context), name, members, compare, results) for (_, context, name), members in groups.items()]
    return sorted((arm for arm in arms if arm is not None), key=lambda arm: arm.is_trained)


def _arm(
    context: dict[str, str], name: str, members: Sequence[Mapping[str, Any]], compare: CompareConfig, results: Results
) -> Arm | None:
    by_value: dict[tuple[str, ...], dict[str, str]] = {}
    for cell in members:
        labels = cell["labels"]
        value = tuple(labels[axis] for axis in compare.choose if axis in labels)
        by_value.setdefault(value, {})[labels.get(compare.seed, "0")] = cell["key"]
    done = {
        value: {seed: key for seed, key in seeds.items() if results.result(key) is not None}
        for value, seeds in by_value.items()
    }
    most = max(len(seeds) for seeds in done.values())
    if most == 0:
        return None
    candidates = [value for value, seeds in done.items() if len(seeds) == most]
    best = candidates[0]
    if len(candidates) > 1:
        part: Literal["choose", "all"] = "choose" if compare.split == "halves" else "all"
        means = {
            value: mean_score([results.scores(k, "validation") for k in done[value].values()], compare.metric, part)
            for value in candidates
        }
        sign = -1.0 if HIGHER_IS_BETTER[compare.metric] else 1.0
        best = min(candidates, key=lambda value: sign * (means[value] or 0.0))
    axes = [axis for axis in compare.choose if axis in members[0]["labels"]]
    return Arm(
        context=context,
        name=name,
        chosen=dict(zip(axes, best, strict=True)),
        swept=len(by_value) > 1,
        at_edge=any(_at_edge(best[index], [value[index] for value in by_value]) for index in range(len(axes))),
        seeds=done[best],
        num_missing=sum(len(seeds) for seeds in by_value.values()) - sum(len(seeds) for seeds in done.values()),
        base_key=members[0]["base_key"],
        dense_key=members[0]["dense_key"],
        is_trained=members[0]["is_trained"],
    )


def _at_edge(chosen: str, tried: Sequence[str]) -> bool:
    """Whether a number is the least or the largest of several that were tried."""
    try:
        numbers = {float(text) for text in tried}
    except ValueError:
        return False
    return len(numbers) > 1 and float(chosen) in (min(numbers), max(numbers))
