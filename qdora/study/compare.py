"""Arms side by side: effects with intervals and tests, and a winner only where the data show one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from qdora.evaluation.paired import Paired, paired_difference
from qdora.study.arms import Arm, Results
from qdora.study.config import CompareConfig
from qdora.study.scores import HIGHER_IS_BETTER, stacked
from qdora.study.statistics import (
    Interval,
    bca_interval,
    difference,
    first,
    holm,
    permutation_p,
    repaired,
    seed_differences,
    seed_permutation_p,
)

CONFIDENCE = 0.95
Part = Literal["all", "compare"]


def part_of(compare: CompareConfig, arms: Sequence[Arm]) -> Part:
    """The examples that arms are compared on: a half where the other half chose something."""
    return "compare" if compare.split == "halves" and any(arm.swept for arm in arms) else "all"


def comparisons(
    arms: Sequence[Arm], compare: CompareConfig, results: Results, reference: str, measures: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for every trained arm beside the reference in its surroundings and every measure, Holm-corrected.

    Positive improvements are better, whatever the measure. `winner` is empty where `reason` says why there is none.
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
            row = _row(arm, other, compare, results, measure, part)
            if row is not None:
                rows.append(row)
    # Of both, the chance of examples with the seeds as they are, and that of examples and seeds, the larger one counts
    larger = [row["p_examples"] if math.isnan(row["p_t"]) else max(row["p_examples"], row["p_t"]) for row in rows]
    for row, adjusted in zip(rows, holm(larger), strict=True):
        row["p_holm"] = adjusted
        reasons = _against_a_winner(row, compare)
        row["reason"] = "; ".join(reasons)
        better = row["arm"] if row["improvement"] > 0 else row["reference"]
        row["winner"] = "" if reasons else better
    return rows


def quality(
    arm: Arm, compare: CompareConfig, results: Results, measure: str, part: Part
) -> tuple[Interval, int] | None:
    """Mean of a measure over the arm's seeds with its band, and the number of examples; None where not measured."""
    tasks = stacked([[results.scores(key) for key in arm.seeds.values()]], measure, part)
    if not tasks:
        return None
    interval = bca_interval(
        tasks, first, confidence=CONFIDENCE, num_resamples=compare.num_resamples, generator=np.random.default_rng(0)
    )
    return interval, sum(len(task.weights) for task in tasks)


def repair(arm: Arm, compare: CompareConfig, results: Results, part: Part) -> tuple[Interval, str]:
    """Share of what compressing lost that the arm made good, and why there is none (then the interval is nan)."""
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
    options: dict[str, Any] = {"confidence": CONFIDENCE, "num_resamples": compare.num_resamples}
    sign = 1.0 if HIGHER_IS_BETTER[compare.metric] else -1.0
    loss = bca_interval(
        stacked([dense, base], compare.metric, part), difference, generator=np.random.default_rng(0), **options
    )
    if not (loss.excludes_zero and sign * loss.value > 0):
        return nothing, "compressing lost nothing that the data show"
    tasks = stacked([base, trained, dense], compare.metric, part)
    return bca_interval(tasks, repaired, generator=np.random.default_rng(0), **options), ""


def _row(
    arm: Arm, other: Arm, compare: CompareConfig, results: Results, measure: str, part: Part
) -> dict[str, Any] | None:
    shared = [seed for seed in arm.seeds if seed in other.seeds]
    if not shared:
        return None
    pair = [[results.scores(each.seeds[seed]) for seed in shared] for each in (arm, other)]
    higher = HIGHER_IS_BETTER[measure]
    # Improvements: the better one first, so that a positive difference is one of the arm
    tasks = stacked(pair if higher else pair[::-1], measure, part)
    if not tasks:
        return None
    options: dict[str, Any] = {"num_resamples": compare.num_resamples}
    interval = bca_interval(tasks, difference, confidence=CONFIDENCE, generator=np.random.default_rng(0), **options)
    wide = paired_difference([Paired(t.scores[0], t.scores[1], t.weights) for t in tasks], CONFIDENCE)
    by_seed = seed_differences(tasks)
    return {
        **arm.context,
        "arm": arm.name,
        "reference": other.name,
        "measure": measure,
        "improvement": interval.value,
        "lower": interval.lower,
        "upper": interval.upper,
        "lower_t": wide.lower,
        "upper_t": wide.upper,
        "p_t": wide.p,
        "p_examples": permutation_p(tasks, generator=np.random.default_rng(0), **options),
        "p_seeds": seed_permutation_p(tasks),
        "num_seeds": len(shared),
        "num_seeds_better": int((by_seed > 0).sum()),
        "num_seeds_worse": int((by_seed < 0).sum()),
        "num_examples": sum(len(task.weights) for task in tasks),
        "num_missing": arm.num_missing + other.num_missing,
        "is_swept": arm.swept and other.swept,
        "at_edge": ", ".join(each.name for each in (arm, other) if each.at_edge),
    }


def _against_a_winner(row: dict[str, Any], compare: CompareConfig) -> list[str]:
    """Why the data call no winner; empty where they do."""
    reasons = []
    if row["num_missing"]:
        reasons.append(f"{row['num_missing']} cells have no result yet")
    if not row["is_swept"]:
        reasons.append("no value was tuned for each arm by itself")
    if row["at_edge"]:
        reasons.append(f"the tuned value of {row['at_edge']} is at the end of those tried")
    if row["num_seeds"] < compare.min_seeds:
        reasons.append(f"{row['num_seeds']} of at least {compare.min_seeds} seeds")
    if row["p_holm"] >= compare.alpha:
        reasons.append(f"p = {row['p_holm']:.4f} after Holm's correction")
    intervals = [(row["lower"], row["upper"]), (row["lower_t"], row["upper_t"])]
    if not all(lower > 0 or upper < 0 for lower, upper in intervals):
        reasons.append("an interval over examples and seeds holds zero")
    if row["num_seeds"] not in (row["num_seeds_better"], row["num_seeds_worse"]):
        reasons.append(f"{row['num_seeds_better']} of {row['num_seeds']} seeds are better")
    return reasons
