"""The headline numbers of a study once more, from the scores that it kept: a second program, which shares no code.

    python benchmarks/recompute_study.py [benchmarks/results/study]

The folder holds scores.json.xz (the study, its cells, and their scores example by example), comparisons.csv and
repair.csv. Needs numpy alone. Computed are every comparison in the study's metric (improvement, t interval over the
seeds, p-values over seeds and examples, equivalence, Holm's correction) and the damage that is left of every arm. Ends
with 1 if a number differs from the report's by more than 1e-6.
"""

from __future__ import annotations

import csv
import hashlib
import json
import lzma
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-6
DEFAULT = {"arm": "adapter", "metric": "nll_per_token", "tasks": "tokens", "split": "halves", "zone": 0.02}
LOWER_IS_BETTER = ("nll_per_token", "choice_nll")
COMPARED = ("improvement", "lower", "upper", "p_seeds", "p_examples", "p_equivalent", "p_holm", "p_equivalent_holm")
LEFT = ("left", "left_lower", "left_upper")
Numbers = dict[str, float]
Key = tuple[str, ...]


def main() -> None:
    """Recompute, compare, and print the largest difference as JSON."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "results/study"
    study = KeptStudy(json.loads(lzma.decompress((folder / "scores.json.xz").read_bytes())))
    found = {
        "comparisons.csv": (study.comparisons(), COMPARED, ("comparison", *study.axes, "arm")),
        "repair.csv": (study.left(), LEFT, (*study.axes, study.arm_axis)),
    }
    worst, number = 0.0, 0
    for name, (own, columns, keys) in found.items():
        told = dict(reported(folder / name, columns, keys, study.metric))
        if set(told) != set(own):
            raise SystemExit(f"{name}: other rows than recomputed: {sorted(set(told) ^ set(own))[:4]}")
        for key, numbers in own.items():
            for column, value in numbers.items():
                difference = distance(value, told[key][column])
                number += 1
                if difference > TOLERANCE:
                    print(
                        f"{name}: {', '.join(filter(None, key))}: {column} is {told[key][column]}, recomputed {value}"
                    )
                worst = max(worst, difference)
    print(json.dumps({"numbers": number, "largest_difference": worst, "tolerance": TOLERANCE}))
    if worst > TOLERANCE or not number:
        raise SystemExit(1)


def reported(file: Path, columns: Sequence[str], keys: Sequence[str], metric: str) -> Iterator[tuple[Key, Numbers]]:
    """(labels, numbers) of the rows of a table that have the first of these columns; of comparisons by the metric."""
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row.get(columns[0]) and row.get("measure", metric) == metric:
                numbers = {column: float(row[column] or "nan") for column in columns if column in row}
                yield tuple(row.get(key, "") for key in keys), numbers


def distance(one: float, other: float) -> float:
    """Their difference; 0 if neither is known, infinite if one is."""
    if math.isnan(one) or math.isnan(other):
        return 0.0 if math.isnan(one) and math.isnan(other) else math.inf
    return abs(one - other)


class Arm:
    """Cells of one value of the compared axis in one context, by their seeds."""

    def __init__(self, name: str, context: Mapping[str, str], is_dense: bool) -> None:
        self.name, self.context, self.is_dense = name, dict(context), is_dense
        self.cells: dict[str, Mapping[str, Any]] = {}


Term = tuple[float, Arm, Arm]


class KeptStudy:
    """What scores.json.xz holds."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.study = document["study"]
        self.compare = DEFAULT | {
            name: value for name, value in self.study.get("compare", {}).items() if value is not None
        }
        self.metric, self.arm_axis = self.compare["metric"], self.compare["arm"]
        self.weighting = self.compare["tasks"] if self.metric == "nll_per_token" else "equal"
        self.axes = [axis for axis in self.study["product"] if axis != self.arm_axis]
        self.searched = self.study.get("rates") is not None
        self.halves = self.searched and self.compare["split"] == "halves"
        self.arms = self._arms(document["cells"])
        self.reference = self.compare.get("reference") or self.arms[0].name
        self._kept: dict[int, dict[str, dict[str, tuple[float, float]]]] = {}

    def _arms(self, cells: Sequence[Mapping[str, Any]]) -> list[Arm]:
        found: dict[tuple[str, str], Arm] = {}
        for each in cells:
            cell, labels = each["cell"], each["cell"]["labels"]
            if cell["kind"] == "trained" and each["result"] is not None:
                context = {axis: labels[axis] for axis in self.axes if axis in labels}
                key = (labels[self.arm_axis], json.dumps(context))
                is_dense = cell["base_key"] == cell["dense_key"]
                arm = found.setdefault(key, Arm(labels[self.arm_axis], context, is_dense))
                arm.cells[labels["seed"]] = each
        return list(found.values())

    def examples(self, cell: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
        """Task -> example -> (value, weight) in the metric, of the examples that compare."""
        if id(cell) not in self._kept:
            scores, tasks, seen = cell["scores"], {}, {}
            for index, (task, name) in enumerate(zip(scores["task"], scores["id"], strict=True)):
                seen[task, name] = seen.get((task, name), 0) + 1
                if self.halves and hashlib.sha256(str(name).encode()).digest()[0] % 2:
                    continue  # this half found the rates
                pair = self._score(scores, index)
                if pair is not None:
                    tasks.setdefault(task, {})[f"{name}#{seen[task, name]}"] = pair
            self._kept[id(cell)] = tasks
        return self._kept[id(cell)]

    def _score(self, scores: Mapping[str, Any], index: int) -> tuple[float, float] | None:
        if self.metric == "nll_per_token":
            return scores["nll"][index], float(scores["num_answer_tokens"][index])
        if scores["loglikelihoods"][index] is None:
            return None
        if self.metric == "choice_nll":
            values = np.array(scores["loglikelihoods"][index])
            top = values.max()
            return float(top + np.log(np.exp(values - top).sum()) - values[scores["gold"][index]]), 1.0
        return float(scores[self.metric][index]), 1.0

    def value(self, cell: Mapping[str, Any]) -> float:
        """The metric of a run; the worst score if it diverged."""
        if "diverged" in cell["result"]:
            return math.log(cell["result"]["num_vocabulary"]) if self.metric == "nll_per_token" else worst(self.metric)
        tasks = [np.array(list(found.values())) for found in self.examples(cell).values()]
        if self.weighting == "tokens":
            return float(np.concatenate(tasks)[:, 0].sum() / np.concatenate(tasks)[:, 1].sum())
        return float(np.mean([each[:, 0].sum() / each[:, 1].sum() for each in tasks]))

    def comparisons(self) -> dict[Key, Numbers]:
        """(name, labels, arm) -> numbers of every comparison."""
        pairs = [
            (arm, other)
            for arm in self.arms
            for other in self.arms
            if arm.name != self.reference == other.name and arm.context == other.context
        ]
        found: dict[Key, Numbers] = {}
        primary: list[Key] = []
        asked = self.compare.get("primary") or {}
        for name, entry in asked.items():
            terms = self._terms(entry, pairs)
            if terms:
                key = (name, *("" for _ in self.axes), terms[0][1].name)
                found[key] = self._numbers(terms)
                primary.append(key)
        for arm, other in pairs:
            key = (f"{arm.name} against {other.name}", *(arm.context.get(axis, "") for axis in self.axes), arm.name)
            found[key] = self._numbers([(1.0, arm, other)])
            if not asked:
                primary.append(key)
        larger = [np.nanmax([found[key]["p_seeds"], found[key]["p_examples"]]) for key in primary]
        corrected = zip(primary, holm(larger), holm([found[key]["p_equivalent"] for key in primary]), strict=True)
        for key, p, p_equivalent in corrected:
            found[key] |= {"p_holm": p, "p_equivalent_holm": p_equivalent}
        return found

    def _terms(self, entry: Mapping[str, Any], pairs: Sequence[tuple[Arm, Arm]]) -> list[Term]:
        terms: list[Term] = []
        for sign, wanted in ((1.0, entry.get("over") or {}), (-1.0, entry.get("minus"))):
            if wanted is not None:
                own = [p for p in pairs if entry.get("arm") in (None, p[0].name) and has_labels(p[0].context, wanted)]
                if not own:
                    return []
                terms += [(sign / len(own), *pair) for pair in own]
        return terms

    def _numbers(self, terms: Sequence[Term]) -> Numbers:
        shared = [seed for seed in terms[0][1].cells if all(seed in arm.cells for _, *pair in terms for arm in pair)]
        sign = -1.0 if self.metric in LOWER_IS_BETTER else 1.0
        values = [
            sign * sum(f * (self.value(arm.cells[seed]) - self.value(other.cells[seed])) for f, arm, other in terms)
            for seed in shared
        ]
        mean, half, stderr, free = t_interval(values)
        numbers = {"improvement": mean, "lower": mean - half, "upper": mean + half}
        error, degrees = self._over_examples(terms, shared)
        zone = self.compare["zone"]
        numbers["p_seeds"] = both_tails(mean, stderr, free)
        numbers["p_examples"] = both_tails(mean, error, degrees)
        equivalent = [tail(abs(mean) - zone, each, df) for each, df in ((stderr, free), (error, degrees))]
        numbers["p_equivalent"] = float(np.nanmax(equivalent))
        return numbers

    def _over_examples(self, terms: Sequence[Term], seeds: Sequence[str]) -> tuple[float, float]:
        """Standard error over the examples alone, stratified by task, and Satterthwaite's degrees of freedom."""
        parts: dict[str, dict[str, float]] = {}
        for seed in seeds:
            cells = [(s * f, arm.cells[seed]) for f, *pair in terms for s, arm in zip((1.0, -1.0), pair, strict=True)]
            if any("diverged" in cell["result"] for _, cell in cells):
                return math.nan, math.nan
            first = self.examples(cells[0][1])
            names = {task: list(found) for task, found in first.items()}
            weights = {task: np.array([first[task][name][1] for name in own]) for task, own in names.items()}
            sums = {task: np.zeros(len(own)) for task, own in names.items()}
            for factor, cell in cells:
                for task, own in names.items():
                    sums[task] += factor * np.array([self.examples(cell)[task][name][0] for name in own])
            total = sum(each.sum() for each in weights.values())
            pooled = sum(each.sum() for each in sums.values()) / total
            for task, own in names.items():
                weight = weights[task].sum()
                by_tokens = self.weighting == "tokens"
                ratio, scale = (pooled, total) if by_tokens else (sums[task].sum() / weight, weight * len(names))
                known = parts.setdefault(task, {})
                for name, value in zip(own, (sums[task] - ratio * weights[task]) / scale / len(seeds), strict=True):
                    known[name] = known.get(name, 0.0) + float(value)
        strata = [(len(known), len(known) * np.var(list(known.values()), ddof=1)) for known in parts.values()]
        variance = sum(part for _, part in strata)
        squares = sum(part**2 / (number - 1) for number, part in strata)
        return math.sqrt(variance), variance**2 / squares if squares else math.inf

    def left(self) -> dict[Key, Numbers]:
        """(labels, arm) -> the metric less that of the same arm trained on the uncompressed base, seed by seed."""
        of_base = {axis for axis, values in self.study["product"].items() if changes_base(axis, values)}
        like = (self.study.get("rates") or {}).get("like", {}).get(self.arm_axis, {})
        found = {}
        for arm in self.arms:
            kept = {axis: label for axis, label in arm.context.items() if axis not in of_base}
            twins = [
                other
                for name in (arm.name, like.get(arm.name, arm.name))
                for other in self.arms
                if other.is_dense
                and other.name == name
                and {axis: label for axis, label in other.context.items() if axis not in of_base} == kept
            ]
            if arm.is_dense or not twins:
                continue
            shared = [seed for seed in arm.cells if seed in twins[0].cells]
            sign = 1.0 if self.metric in LOWER_IS_BETTER else -1.0
            lost = [sign * (self.value(arm.cells[seed]) - self.value(twins[0].cells[seed])) for seed in shared]
            if lost:
                mean, half, *_ = t_interval(lost)
                key = (*(arm.context.get(axis, "") for axis in self.axes), arm.name)
                found[key] = {"left": mean, "left_lower": mean - half, "left_upper": mean + half}
        return found


def worst(metric: str) -> float:
    """Of a run that diverged; not known for the NLL among choices."""
    return 0.0 if metric not in LOWER_IS_BETTER else math.nan


def changes_base(axis: str, values: Any) -> bool:
    """Whether an axis changes nothing but the base."""
    keys = [key for group in values.values() for key in group] if isinstance(values, dict) else [axis]
    return all(key.startswith("base.") for key in keys)


def has_labels(context: Mapping[str, str], wanted: Mapping[str, Any]) -> bool:
    """Whether a context has one of the wanted labels on each axis."""
    for axis, value in wanted.items():
        every = value if isinstance(value, list) else [value]
        if context.get(axis) not in [each if isinstance(each, str) else json.dumps(each) for each in every]:
            return False
    return True


def t_interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, half of its 95 % t interval, standard error, degrees of freedom; nan with a single value."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan, math.nan, math.nan
    stderr, free = float(np.std(values, ddof=1)) / math.sqrt(len(values)), float(len(values) - 1)
    return float(np.mean(values)), -solved(lambda t: student(t, free) - 0.025, -1e4, 0.0) * stderr, stderr, free


def solved(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function is 0, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def tail(value: float, stderr: float, free: float) -> float:
    """P(T <= value / stderr); without any spread 0 below 0 and else 1."""
    return float(value >= 0) if stderr == 0 else student(value / stderr, free)


def both_tails(value: float, stderr: float, free: float) -> float:
    """P(|T| >= |value| / stderr)."""
    return 1.0 if value == 0 else 2 * tail(-abs(value), stderr, free)


def student(t: float, free: float) -> float:
    """Student's distribution function, P(T <= t), by the incomplete beta function."""
    if math.isnan(t) or math.isnan(free):
        return math.nan
    tail = beta_share(free / (free + t * t), free / 2, 0.5) / 2
    return tail if t < 0 else 1 - tail


def beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function by its continued fraction (Abramowitz and Stegun, 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_share(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction = 1.0
    for step in range(400, 0, -1):
        half = step // 2
        if step % 2:
            factor = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            factor = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        fraction = 1 + factor / fraction
    return math.exp(scale) / a / fraction


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values; one that is not known counts as 1."""
    known = [1.0 if math.isnan(p) else float(p) for p in p_values]
    adjusted, largest = [0.0] * len(known), 0.0
    for rank, index in enumerate(np.argsort(known, kind="stable")):
        largest = max(largest, min(1.0, (len(known) - rank) * known[index]))
        adjusted[index] = largest
    return adjusted


if __name__ == "__main__":
    main()
