"""Compares the arms of a study: tunes each arm, tests it against the reference, and says who wins, if anyone does.

An arm is one value of the axis that is compared (such as LoRA or DoRA) in one context (such as a base): its cells over
all seeds, with the tuned value (such as the learning rate) that scored best on other examples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qdora.study import statistics
from qdora.study.grid import CompareConfig
from qdora.study.scores import HIGHER_IS_BETTER, CellScores, mean_score, read_scores, stacked
from qdora.study.statistics import Interval
from qdora.study.study_directory import StudyDirectory

BASE_ARM = "no adapter"
"""Name of the arm of a base that the grid did not name."""

CONFIDENCE = 0.95
Part = Literal["all", "compare"]
Records = Sequence[Mapping[str, Any]]
"""Cells as `Cell.record` gives them."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One value of the compared axis in one context: the labels of the axes that are not compared, tuned or seeds.

    Attributes:
        chosen: Tuned axis -> label that was chosen.
        swept: Whether there was more than one value to choose from.
        at_edge: Whether a chosen number is the smallest or the largest that was tried.
        seeds: Seed label -> key of the cell.
        num_missing: Cells of this arm without a result.
        base_key, dense_key: Keys of the cells that evaluate its base and the uncompressed base.
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
    """Results and scores of a study's finished cells, each read once.

    `split` is the one that arms are compared on: validation (or its halves), or test.
    """

    def __init__(self, store: StudyDirectory, split: str) -> None:
        self.store, self.split = store, split
        self._scores: dict[tuple[str, str], CellScores] = {}
        self._results: dict[str, dict[str, Any] | None] = {}

    def result(self, key: str) -> dict[str, Any] | None:
        """The result of a cell; None if it is not finished."""
        if key not in self._results:
            self._results[key] = self.store.result(key)
        return self._results[key]

    def diverged(self, key: str) -> bool:
        """Whether the training of a finished cell diverged, so that it has no scores and counts as the worst."""
        return "diverged" in (self.result(key) or {})

    def scores(self, key: str, split: str | None = None) -> CellScores:
        """Scores of a finished cell (default: on the split of the comparison)."""
        split = split or self.split
        if (key, split) not in self._scores:
            result = self.result(key)
            assert result is not None, key
            self._scores[key, split] = read_scores(self.store.cell(key), result["files"], split)
        return self._scores[key, split]


def find_arms(cells: Records, compare: CompareConfig, results: Results) -> list[Arm]:
    """Arms with a score, in the order of the grid, bases first.

    The tuned value of an arm has the best average over seeds on the choosing examples, among the values with the most
    finished seeds. A value that diverged with one of its seeds is worse than all others. Of equally good values the
    first in the grid is chosen. An arm that diverged at all of these values has no score.
    """
    arms = [
        _arm(dict(context), name, members, compare, results)
        for (_, context, name), members in _grouped(cells, compare).items()
    ]
    return sorted((arm for arm in arms if arm is not None), key=lambda arm: arm.is_trained)


def _grouped(cells: Records, compare: CompareConfig) -> dict[tuple[bool, tuple[tuple[str, str], ...], str], Records]:
    """(is trained, context, name) -> the cells of an arm."""
    groups: dict[tuple[bool, tuple[tuple[str, str], ...], str], list[Mapping[str, Any]]] = {}
    tuned = (compare.arm, compare.seed, *compare.choose)
    for cell in cells:
        context = tuple((axis, label) for axis, label in cell["labels"].items() if axis not in tuned)
        name = cell["labels"].get(compare.arm, BASE_ARM)
        groups.setdefault((cell["is_trained"], context, name), []).append(cell)
    return dict(groups)


def _by_value(members: Records, compare: CompareConfig) -> dict[tuple[str, ...], dict[str, str]]:
    """Value of the tuned axes -> seed -> key of the cell."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for cell in members:
        labels = cell["labels"]
        value = tuple(labels[axis] for axis in compare.choose if axis in labels)
        found.setdefault(value, {})[labels.get(compare.seed, "0")] = cell["key"]
    return found


def _arm(context: dict[str, str], name: str, members: Records, compare: CompareConfig, results: Results) -> Arm | None:
    by_value = _by_value(members, compare)
    done = {
        value: {seed: key for seed, key in seeds.items() if results.result(key) is not None}
        for value, seeds in by_value.items()
    }
    most = max(len(seeds) for seeds in done.values())
    whole = {value: seeds for value, seeds in done.items() if len(seeds) == most}
    sound = [value for value, seeds in whole.items() if not any(map(results.diverged, seeds.values()))]
    if most == 0 or not sound:
        return None
    best = _best(sound, done, compare, results)
    axes = [axis for axis in compare.choose if axis in members[0]["labels"]]
    return Arm(
        context=context,
        name=name,
        chosen=dict(zip(axes, best, strict=True)),
        swept=len(by_value) > 1,
        at_edge=_is_at_edge(best, list(by_value)),
        seeds=done[best],
        num_missing=sum(len(seeds) for seeds in by_value.values()) - sum(len(seeds) for seeds in done.values()),
        base_key=members[0]["base_key"],
        dense_key=members[0]["dense_key"],
        is_trained=members[0]["is_trained"],
    )


def _best(
    values: Sequence[tuple[str, ...]],
    cells: Mapping[tuple[str, ...], Mapping[str, str]],
    compare: CompareConfig,
    results: Results,
) -> tuple[str, ...]:
    """The tuned value with the best mean on the choosing examples; the first of equal ones."""
    if len(values) == 1:
        return values[0]
    part: Literal["choose", "all"] = "choose" if compare.split == "halves" else "all"
    sign = -1.0 if HIGHER_IS_BETTER[compare.metric] else 1.0

    def loss(value: tuple[str, ...]) -> float:
        scores = [results.scores(key, "validation") for key in cells[value].values()]
        return sign * (mean_score(scores, compare.metric, part) or 0.0)

    return min(values, key=loss)


def _is_at_edge(chosen: tuple[str, ...], tried: Sequence[tuple[str, ...]]) -> bool:
    """Whether a number of the chosen value is the smallest or the largest of several that were tried on its axis."""
    for index, text in enumerate(chosen):
        try:
            numbers = {float(value[index]) for value in tried}
        except ValueError:
            continue
        if len(numbers) > 1 and float(text) in (min(numbers), max(numbers)):
            return True
    return False


def cannot_win(cells: Records, compare: CompareConfig) -> list[str]:
    """Why no comparison of these cells can have a winner, whatever they score; empty if one can."""
    groups = {
        (context, name): _by_value(members, compare)
        for (is_trained, context, name), members in _grouped(cells, compare).items()
        if is_trained
    }
    reference = compare.reference or next((name for _, name in groups), "")
    pairs = [(key, (key[0], reference)) for key in groups if key[1] != reference and (key[0], reference) in groups]
    if not pairs:
        return [f"no two values of {compare.arm} are trained under the same conditions"]
    found = [_pair_cannot_win([groups[key] for key in pair], [key[1] for key in pair], compare) for pair in pairs]
    if all(found):
        return list(dict.fromkeys(fault for faults in found for fault in faults))
    least = len(pairs) / (compare.num_resamples + 1)
    if least >= compare.alpha:
        return [
            f"compare.num_resamples: {compare.num_resamples} permutations give no p-value below {least:.3g} after the "
            f"correction for {len(pairs)} comparisons, but compare.alpha is {compare.alpha:g}"
        ]
    return []


def _pair_cannot_win(
    values: Sequence[Mapping[tuple[str, ...], Mapping[str, str]]], names: Sequence[str], compare: CompareConfig
) -> list[str]:
    """Why neither of two arms can win; `values` are `_by_value` of each."""
    faults = []
    choosable: list[list[set[str]]] = []  # of each arm: seeds of every tuned value that may be chosen and may win
    for name, by_value in zip(names, values, strict=True):
        most = max(map(len, by_value.values()))
        whole = [value for value, seeds in by_value.items() if len(seeds) == most]
        inner = [value for value in whole if not _is_at_edge(value, list(by_value))]
        if len(by_value) == 1:
            faults.append(
                f"{name} has one value of {', '.join(compare.choose) or 'compare.choose'}, so it is not tuned"
            )
        elif not inner:
            faults.append(
                f"every value of {', '.join(compare.choose)} that {name} can be tuned to is the smallest or largest "
                "that is tried; at least 3 are needed"
            )
        choosable.append([set(by_value[value]) for value in inner or whole])
    num_seeds = max(len(one & other) for one in choosable[0] for other in choosable[1])
    if num_seeds < compare.min_seeds:
        faults.append(
            f"{' and '.join(names)} have only {num_seeds} of {compare.min_seeds} (compare.min_seeds) seeds in common"
        )
    return faults


def part_of(compare: CompareConfig, arms: Sequence[Arm]) -> Part:
    """The examples that arms are compared on: one half if the other half chose something, else all."""
    return "compare" if compare.split == "halves" and any(arm.swept for arm in arms) else "all"


def comparisons(
    arms: Sequence[Arm], compare: CompareConfig, results: Results, reference: str, measures: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each measure and each trained arm next to the reference of its context, with Holm's correction.

    A positive improvement is better, whatever the measure. `winner` is empty if there is none; `reason` says why.
    """
    part = part_of(compare, arms)
    rows: list[dict[str, Any]] = []
    pairs = [
        (arm, other)
        for arm in arms
        for other in arms
        if arm.is_trained and other.is_trained and other.name == reference != arm.name and arm.context == other.context
    ]
    for arm, other in pairs:
        for measure in measures:
            row = _row((arm, other), compare, results, measure, part)
            if row is not None:
                rows.append(row)
    # The larger p-value counts: of examples with the seeds as they are, and of examples and seeds
    larger = [row["p_examples"] if math.isnan(row["p_t"]) else max(row["p_examples"], row["p_t"]) for row in rows]
    for row, adjusted in zip(rows, statistics.holm(larger), strict=True):
        row["p_holm"] = adjusted
        reasons = _against_a_winner(row, compare)
        row["reason"] = "; ".join(reasons)
        better = row["arm"] if row["improvement"] > 0 else row["reference"]
        row["winner"] = "" if reasons else better
    return rows


def _row(
    pair: tuple[Arm, Arm], compare: CompareConfig, results: Results, measure: str, part: Part
) -> dict[str, Any] | None:
    arm, other = pair
    shared = [seed for seed in arm.seeds if seed in other.seeds]
    if not shared:
        return None
    series = [[results.scores(each.seeds[seed]) for seed in shared] for each in pair]
    # The better one first, so that a positive difference is an improvement by the arm
    tasks = stacked(series if HIGHER_IS_BETTER[measure] else series[::-1], measure, part)
    if not tasks:
        return None
    found = statistics.difference_interval(tasks, CONFIDENCE)
    p_examples = statistics.permutation_p(
        tasks, num_resamples=compare.num_resamples, generator=np.random.default_rng(0)
    )
    by_seed = statistics.seed_differences(tasks)
    return {
        **arm.context,
        "arm": arm.name,
        "reference": other.name,
        "measure": measure,
        "improvement": found.value,
        "lower": found.lower,
        "upper": found.upper,
        "p_t": found.p,
        "p_examples": p_examples,
        "p_seeds": statistics.seed_permutation_p(tasks),
        "num_seeds": len(shared),
        "num_seeds_better": int((by_seed > 0).sum()),
        "num_seeds_worse": int((by_seed < 0).sum()),
        "num_examples": sum(len(task.weights) for task in tasks),
        "num_missing": arm.num_missing + other.num_missing,
        "is_swept": arm.swept and other.swept,
        "at_edge": ", ".join(each.name for each in pair if each.at_edge),
    }


def _against_a_winner(row: dict[str, Any], compare: CompareConfig) -> list[str]:
    """Why no winner is called; empty if one is."""
    reasons = []
    if row["num_missing"]:
        reasons.append(f"{row['num_missing']} cells have no result")
    if not row["is_swept"]:
        reasons.append("at least one of the two arms was not tuned")
    if row["at_edge"]:
        reasons.append(f"the tuned value of {row['at_edge']} is the smallest or largest that was tried")
    if row["num_seeds"] < compare.min_seeds:
        reasons.append(f"there are {row['num_seeds']} seeds, but at least {compare.min_seeds} are needed")
    if row["p_holm"] >= compare.alpha:
        reasons.append(f"p = {row['p_holm']:.4f} after Holm's correction")
    if not (row["lower"] > 0 or row["upper"] < 0):
        reasons.append("the interval over examples and seeds contains zero")
    if row["num_seeds"] not in (row["num_seeds_better"], row["num_seeds_worse"]):
        reasons.append(f"{row['arm']} is better in {row['num_seeds_better']} of {row['num_seeds']} seeds")
    return reasons


def quality(arm: Arm, results: Results, measure: str, part: Part) -> tuple[Interval, int] | None:
    """Mean of a measure over the arm's seeds with its interval, and the number of examples; None if not measured."""
    tasks = stacked([[results.scores(key) for key in arm.seeds.values()]], measure, part)
    if not tasks:
        return None
    return statistics.mean_interval(tasks, CONFIDENCE), sum(len(task.weights) for task in tasks)


def repair(arm: Arm, compare: CompareConfig, results: Results, part: Part) -> tuple[Interval, str]:
    """Share of the loss from compression that the arm recovered; if there is none, a nan interval and the reason."""
    nothing = Interval(math.nan, math.nan, math.nan)
    if not arm.is_trained:
        return nothing, "not trained"
    if arm.base_key == arm.dense_key:
        return nothing, "the base is not compressed"
    for key, name in ((arm.base_key, "base"), (arm.dense_key, "uncompressed base")):
        if key is None or results.result(key) is None:
            return nothing, f"the {name} was not evaluated"
    assert arm.base_key is not None
    assert arm.dense_key is not None
    base, dense = [results.scores(arm.base_key)], [results.scores(arm.dense_key)]
    trained = [results.scores(key) for key in arm.seeds.values()]
    loss = statistics.difference_interval(stacked([dense, base], compare.metric, part), CONFIDENCE)
    least_loss = loss.lower if HIGHER_IS_BETTER[compare.metric] else -loss.upper
    if not least_loss > 0:  # nan, too
        return nothing, "compression caused no significant loss"
    return statistics.repaired(stacked([base, trained, dense], compare.metric, part), CONFIDENCE), ""


def verdict(
    pairs: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    compare: CompareConfig,
    label: str,
) -> list[str]:
    """One sentence about all comparisons of each measure (the study's metric first), then one for each comparison.

    `pairs` are the rows of `comparisons`, `axes` name the context of a comparison, `label` is the metric in words.
    """
    names = {row["measure"]: f"share of {row['measure']} answers" for row in pairs} | {compare.metric: label}
    measures = dict.fromkeys([compare.metric, *(row["measure"] for row in pairs)])
    sentences = [
        _overall([row for row in pairs if row["measure"] == measure], names[measure], compare.alpha)
        for measure in measures
    ]
    diverged = [row for row in cells if row["status"] == "diverged"]
    if diverged:
        sentences.append(
            f"{len(diverged)} of {len(cells)} cells diverged, which counts as the worst score of all. An arm that "
            "diverged at every tuned value is not compared."
        )
    lacking = [row for row in cells if row["status"] not in ("done", "diverged")]
    if lacking:
        failed = sum(row["status"] == "failed" for row in lacking)
        sentences.append(
            f"{len(lacking)} of {len(cells)} cells have no result; {failed} of them failed. An arm with missing cells "
            "cannot win or lose."
        )
    return sentences + [_sentence(row, axes, names[row["measure"]]) for row in pairs]


def _overall(pairs: Sequence[Mapping[str, Any]], label: str, alpha: float) -> str:
    if not pairs:
        return "There is nothing to compare: no context has two trained arms with results for the same seeds."
    won = [row for row in pairs if row["winner"]]
    if not won:
        unclear = sum(row["p_holm"] >= alpha for row in pairs)
        return (
            f"No winner in {len(pairs)} comparisons of {label}; in {unclear} of them the arms do not differ "
            "significantly after Holm's correction."
        )
    counts = ", ".join(f"{name} in {count}" for name, count in sorted(Counter(row["winner"] for row in won).items()))
    rest = len(pairs) - len(won)
    tail = f" The other {rest} have no winner." if rest else ""
    return f"{len(won)} of {len(pairs)} comparisons of {label} have a winner: {counts}.{tail}"


def _sentence(row: Mapping[str, Any], axes: Sequence[str], label: str) -> str:
    where = ", ".join(f"{axis} {row[axis]}" for axis in axes if axis in row)
    head = f"{where}: " if where else ""
    change = (
        f"improvement of {row['arm']} over {row['reference']} in {label}: {row['improvement']:.4f}, "
        f"interval {row['lower']:.4f} to {row['upper']:.4f}"
    )
    if not row["winner"]:
        return f"{head}no winner between {row['arm']} and {row['reference']} ({change}): {row['reason']}."
    loser = row["reference"] if row["winner"] == row["arm"] else row["arm"]
    by = f"p = {row['p_holm']:.4f} after Holm's correction, {row['num_seeds']} seeds"
    return f"{head}{row['winner']} beats {loser} ({change}, {by})."
