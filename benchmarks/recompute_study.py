"""The numbers of a study once more, from the scores that it kept: a second program, which shares no code.

    python benchmarks/recompute_study.py [benchmarks/results/study]

The folder holds scores.json.xz (the study, its cells, and their scores example by example), comparisons.csv, tasks.csv
and repair.csv. Needs numpy alone. Computed are every comparison in every measure and by task, damage and repair of each
arm and base, and of results/study every number that README.md and benchmarks/README.md say. Ends with 1 if one differs
from the report's by more than 1e-6 or from a page's by more than it was rounded, or if a verdict is another one, but
for "not decided" for a reason that the report gives.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import lzma
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-6
DEFAULT = {"arm": "adapter", "metric": "nll_per_token", "tasks": "tokens", "split": "halves", "zone": 0.02}
DEFAULT |= {"alpha": 0.05, "power": 0.8, "min_seeds": 3}
NLL, MEASURES = "nll_per_token", ("nll_per_token", "nll_by_task", "acc", "acc_norm")
ZONE_OF_SHARES = 0.01
THREE = ("improvement", "lower", "upper")
COMPARED = (*THREE, "p_seeds", "p_examples", "p_equivalent", "p_holm", "p_equivalent_holm", "smallest_detectable")
OF_TASK, ENDS = ("weight", *THREE), ("", "_lower", "_upper")
NAMES_OF_REPAIR = ("left", "transplant", "repaired", "repaired_share", "magnitudes", "damage_choice")
REPAIRED = tuple(name + end for name in NAMES_OF_REPAIR for end in ENDS)
Numbers = dict[str, float]
Key = tuple[str, ...]
Cell = Mapping[str, Any]


class Tally:
    """Numbers that were compared: how many, the largest difference, and how many differ by more than they may."""

    def __init__(self) -> None:
        self.number, self.worst, self.faults = 0, 0.0, 0

    def add(self, where: str, told: float, own: float, allowed: float = TOLERANCE) -> None:
        """Compare a number that is told with the one that was recomputed; neither may be known."""
        if math.isnan(own) or math.isnan(told):
            difference = 0.0 if math.isnan(own) and math.isnan(told) else math.inf
        else:
            difference = abs(own - told)
        self.number += 1
        if allowed == TOLERANCE:  # others were rounded
            self.worst = max(self.worst, difference)
        if difference > allowed:
            self.fault(f"{where} is {told}, recomputed {own}")

    def fault(self, text: str) -> None:
        self.faults += 1
        print(text)

    def table(self, file: Path, own: Mapping[Key, Numbers], columns: Key, keys: Key, measure: str = "") -> None:
        """Compare the columns of a data file that were recomputed; its rows with any of them must be the same."""
        told = {key: row for key, row in rows_of(file, keys, measure) if any(row.get(column) for column in columns)}
        if set(told) != set(own):
            raise SystemExit(f"{file.name}: other rows than recomputed: {sorted(set(told) ^ set(own))[:4]}")
        for key, numbers in own.items():
            for column, value in numbers.items():
                where = f"{file.name}: {', '.join(filter(None, key))}: {column}"
                self.add(where, float(told[key].get(column) or "nan"), value)


def main() -> None:
    """Recompute, compare, and print the largest difference as JSON."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results/study"
    document = json.loads(lzma.decompress((folder / "scores.json.xz").read_bytes()))
    study, tally = KeptStudy(document), Tally()
    tally.table(folder / "repair.csv", study.damage(), REPAIRED, (*study.axes, study.arm_axis))
    keys, file = ("comparison", *study.axes, "arm"), folder / "comparisons.csv"
    told = {row["measure"] for _, row in rows_of(file, ())}
    for measure in [study.metric, *(each for each in MEASURES if each in told and each != study.metric)]:
        other = study if measure == study.metric else KeptStudy(document, measure)
        compared = other.comparisons()
        tally.table(file, compared, COMPARED, keys, measure)
        if (folder / "tasks.csv").is_file() and measure != "nll_by_task":
            tally.table(folder / "tasks.csv", other.tasks(), OF_TASK, (*keys, "task"), measure)
        verdicts = other.verdicts(compared) if other.is_metric else {}
        for key, row in rows_of(file, keys, measure):
            # Contexts without results are not looked for
            is_careful = row["verdict"] == "not decided" and row["reason"]
            if row["role"] == "primary" and row["verdict"] != verdicts.get(key) and not is_careful:
                who = ", ".join(filter(None, key))
                tally.fault(f"{who}: the verdict is {row['verdict']!r}, recomputed {verdicts.get(key)!r}")
    if folder.resolve() == HERE / "results/study":
        Pages(document, tally).check()
    print(json.dumps({"numbers": tally.number, "largest_difference": tally.worst, "faults": tally.faults}))
    if tally.faults or not tally.number:
        raise SystemExit(1)


def rows_of(file: Path, keys: Sequence[str], measure: str = "") -> Iterator[tuple[Key, dict[str, str]]]:
    """(labels, row) of a table, of one measure if it has several. A report has no file for a table without rows."""
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                if not measure or row["measure"] == measure:
                    yield tuple(row.get(key, "") for key in keys), row


@dataclass
class Arm:
    """Cells of one value of the compared axis in one context, by their seeds; `num_missing` first seeds have none."""

    name: str
    context: dict[str, str]
    is_interior: bool
    is_dense: bool
    cells: dict[str, Cell] = field(default_factory=dict)
    planned: list[str] = field(default_factory=list)
    num_missing: int = 0

    def with_seeds(self, seeds: Sequence[str]) -> Arm:
        """The arm with these seeds alone."""
        cells = {seed: self.cells[seed] for seed in seeds if seed in self.cells}
        return replace(self, cells=cells, num_missing=len(seeds) - len(cells))


Term = tuple[float, Arm, Arm]


class KeptStudy:
    """What scores.json.xz holds, in one measure."""

    def __init__(self, document: Mapping[str, Any], measure: str = "") -> None:
        self.document, self.study = document, document["study"]
        given = {name: value for name, value in self.study.get("compare", {}).items() if value is not None}
        self.compare = DEFAULT | given
        self.is_metric = measure in ("", self.compare["metric"])
        self.metric, self.arm_axis = measure or self.compare["metric"], self.compare["arm"]
        self.reference = self.compare["reference"]
        self.sign = -1.0 if self.metric.startswith("nll") else 1.0  # of what is better
        is_same = self.metric[:3] == self.compare["metric"][:3]  # an NLL, or an accuracy
        self.zone = self.compare["zone"] if is_same else ZONE_OF_SHARES
        self.by_tokens = self.metric == NLL and self.compare["tasks"] == "tokens"
        self.axes = tuple(axis for axis in self.study["product"] if axis != self.arm_axis)
        self.halves = self.study.get("rates") is not None and self.compare["split"] == "halves"
        self.first = set(map(str, self.study.get("seeds", (0, 1, 2))))
        self.of_kind = {kind: self._arms(kind) for kind in ("trained", "transplant", "set_back")}
        self.arms = self.of_kind["trained"]
        self.primary: dict[Key, list[Term]] = {}
        self.tests: dict[Key, int] = {}
        self._kept: dict[int, dict[str, dict[str, tuple[float, float]]]] = {}
        self._values: dict[tuple[int, str], float] = {}

    def _arms(self, kind: str) -> list[Arm]:
        found: dict[tuple[str, str], Arm] = {}
        for each in self.document["cells"]:
            cell, labels = each["cell"], each["cell"]["labels"]
            if cell["kind"] == kind:
                context = {axis: labels[axis] for axis in self.axes if axis in labels}
                is_dense = cell["base_key"] == cell["dense_key"]
                arm = Arm(labels[self.arm_axis], context, cell["is_interior"], is_dense)
                arm = found.setdefault((json.dumps(context), arm.name), arm)
                arm.planned.append(labels["seed"])
                if each["result"] is not None:
                    arm.cells[labels["seed"]] = each
        for arm in found.values():
            arm.num_missing = sum(seed not in arm.cells for seed in self.first_of(arm.planned))
        return [arm for arm in found.values() if arm.cells]

    def of_same(self, kind: str, arm: Arm) -> list[Arm]:
        """The arm of another kind of cells, or none."""
        return [each for each in self.of_kind[kind] if (each.name, each.context) == (arm.name, arm.context)]

    def key(self, arm: Arm) -> Key:
        """The labels of its context."""
        return tuple(arm.context.get(axis, "") for axis in self.axes)

    def first_of(self, seeds: Iterable[str]) -> list[str]:
        """Those of these seeds that are not later ones: they alone tell the spread (Stein, 1945)."""
        every = list(seeds)
        return [seed for seed in every if seed in self.first] or every

    def in_order(self, seeds: Iterable[str]) -> list[str]:
        """Later seeds last."""
        return sorted(seeds, key=lambda seed: seed not in self.first)

    def examples(self, cell: Cell) -> dict[str, dict[str, tuple[float, float]]]:
        """Task -> example -> (value, weight) in the metric, of the examples that compare."""
        if id(cell) not in self._kept:
            scores, tasks, seen = cell["scores"] or {"task": [], "id": []}, {}, {}  # none if it diverged
            for index, (task, name) in enumerate(zip(scores["task"], scores["id"], strict=True)):
                seen[task, name] = seen.get((task, name), 0) + 1
                if self.halves and hashlib.sha256(str(name).encode()).digest()[0] % 2:
                    continue  # this half found the rates
                if self.sign < 0:
                    pair = scores["nll"][index], float(scores["num_answer_tokens"][index])
                elif scores["loglikelihoods"][index] is None:
                    continue
                else:
                    pair = float(scores[self.metric][index]), 1.0
                tasks.setdefault(task, {})[f"{name}#{seen[task, name]}"] = pair
            self._kept[id(cell)] = tasks
        return self._kept[id(cell)]

    def value(self, cell: Cell, only: str = "") -> float:
        """The metric of a run, of all tasks or one; the worst score if it diverged."""
        if "diverged" in cell["result"]:
            return math.log(cell["result"]["num_vocabulary"]) if self.sign < 0 else 0.0
        if (id(cell), only) not in self._values:
            tasks = [np.array(list(each.values())) for name, each in self.examples(cell).items() if only in ("", name)]
            sums = np.array([each.sum(axis=0) for each in tasks])
            sums = sums.sum(axis=0, keepdims=True) if self.by_tokens else sums
            self._values[id(cell), only] = float(np.mean(sums[:, 0] / sums[:, 1]))
        return self._values[id(cell), only]

    def comparisons(self) -> dict[Key, Numbers]:
        """(name, labels, arm) -> numbers of every comparison."""
        asked = self.compare.get("primary") or {}
        contrasts: dict[Key, list[Term]] = {}
        families: dict[Key, str] = {}
        for name, entry in asked.items():
            arms = [arm.with_seeds(list(map(str, entry["seeds"]))) if entry.get("seeds") else arm for arm in self.arms]
            terms = terms_of(entry, pairs_of(arms, entry.get("reference") or self.reference))
            if terms and shared_seeds(terms):
                key = (name, *("" for _ in self.axes), terms[0][1].name)
                contrasts[key] = self.primary[key] = terms
                families[key] = entry.get("family") or "primary"
        for arm, other in pairs_of(self.arms, self.reference):
            key = (f"{arm.name} against {other.name}", *self.key(arm), arm.name)
            if shared_seeds([(1.0, arm, other)]):
                contrasts[key] = [(1.0, arm, other)]
                self.primary |= {} if asked else {key: contrasts[key]}
        self.tests = dict.fromkeys(contrasts, 1)
        named = [each.get("family") or "primary" for each in asked.values()]
        for key in self.primary if self.is_metric else ():
            self.tests[key] = named.count(families[key]) if asked else len(self.primary)
        found = {key: self._numbers(terms, self.compare["alpha"] / self.tests[key]) for key, terms in contrasts.items()}
        for family in set(families.values()) or {""} if self.is_metric else ():
            keys = [key for key in self.primary if families.get(key, "") == family]
            number = self.tests[keys[0]] if keys else 1
            larger = [float(np.nanmax([found[key]["p_seeds"], found[key]["p_examples"]])) for key in keys]
            equivalent = [found[key]["p_equivalent"] for key in keys]
            for key, p, p_equivalent in zip(keys, holm(larger, number), holm(equivalent, number), strict=True):
                found[key] |= {"p_holm": p, "p_equivalent_holm": p_equivalent}
        return found

    def tasks(self) -> dict[Key, Numbers]:
        """(name, labels, arm, task) -> numbers of a primary comparison on one task, after `comparisons`."""
        found, of_metric = {}, self if self.is_metric else KeptStudy(self.document)
        for key, terms in self.primary.items():
            seeds = self.in_order(shared_seeds(terms))
            weights: dict[str, float] = {}
            for seed in seeds:
                examples = of_metric.examples(terms[0][1].cells[seed])
                sums = {task: sum(weight for _, weight in each.values()) for task, each in examples.items()}
                for task, each in sums.items():
                    weights[task] = weights.get(task, 0.0) + each / sum(sums.values()) / len(seeds)
            cells = [arm.cells[seed] for _, *pair in terms for arm in pair for seed in seeds]
            scored = [self.examples(cell) for cell in cells if "diverged" not in cell["result"]]
            for task in (name for name in weights if all(name in each for each in scored)):
                improvements = self._improvements(terms, seeds, task)
                numbers = dict(zip(THREE, three(improvements, len(self.first_of(seeds))), strict=True))
                found[*key, task] = numbers | {"weight": weights[task]}
        return found

    def _improvements(self, terms: Sequence[Term], seeds: Sequence[str], task: str = "") -> list[float]:
        signed = [(self.sign * factor, arm) for factor, arm in signed_arms(terms)]
        return [sum(factor * self.value(arm.cells[seed], task) for factor, arm in signed) for seed in seeds]

    def verdicts(self, found: Mapping[Key, Numbers]) -> dict[Key, str]:
        """What each primary comparison may say, by the numbers of `comparisons`."""
        said, zone = {}, f"{self.zone:g}"
        for key, terms in self.primary.items():
            may_be = all(arm.is_interior and not arm.num_missing for _, *pair in terms for arm in pair)
            may_be = may_be and len(shared_seeds(terms)) >= self.compare["min_seeds"]
            # Without a diverged run, a task of a single example
            may_be = may_be and (has_diverged(terms) or not math.isnan(found[key]["p_examples"]))
            better, equivalent = (may_be and found[key][p] < self.compare["alpha"] for p in COMPARED[6:8])
            winner = terms[0][1 if found[key]["improvement"] > 0 else 2].name
            said[key] = f"no difference above {zone}" if equivalent else "not decided"
            if better:
                said[key] = f"{winner} is better" + (f", by less than {zone}" if equivalent else "")
        return said

    def _numbers(self, terms: Sequence[Term], alpha: float) -> Numbers:
        seeds = self.in_order(shared_seeds(terms))
        mean, half, stderr, free = t_interval(self._improvements(terms, seeds), len(self.first_of(seeds)))
        error, degrees, is_lost = math.nan, math.nan, has_diverged(terms)
        if not is_lost:
            signed = [[(factor, arm.cells[seed]) for factor, arm in signed_arms(terms)] for seed in seeds]
            error, degrees = self.spread_over_examples(signed)
        equivalent = [tail(abs(mean) - self.zone, each, df) for each, df in ((stderr, free), (error, degrees))]
        return {
            "improvement": mean,
            "lower": mean - half,
            "upper": mean + half,
            "p_seeds": both_tails(mean, stderr, free),
            "p_examples": both_tails(mean, error, degrees),
            # A run that diverged has no measured score, and one seed no spread: nothing is known to be equivalent
            "p_equivalent": math.nan if is_lost or len(seeds) < 2 else float(np.nanmax(equivalent)),
            "smallest_detectable": stderr * detectable(free, alpha, self.compare["power"]) if stderr else 0.0,
        }

    def spread_over_examples(self, of_seeds: Sequence[Sequence[tuple[float, Cell]]]) -> tuple[float, float]:
        """Standard error over the examples alone, stratified by task, and Satterthwaite's degrees of freedom.

        Of each seed: (factor, cell) of the cells whose sum is told.
        """
        parts: dict[str, dict[str, float]] = {}
        for cells in of_seeds:
            first = self.examples(cells[0][1])
            weights = {task: np.array([weight for _, weight in each.values()]) for task, each in first.items()}
            sums = {
                task: sum(
                    factor * np.array([self.examples(cell)[task][name][0] for name in each]) for factor, cell in cells
                )
                for task, each in first.items()
            }
            total = sum(each.sum() for each in weights.values())
            pooled = sum(each.sum() for each in sums.values()) / total
            for task, each in first.items():
                weight = weights[task].sum()
                ratio, scale = (pooled, total) if self.by_tokens else (sums[task].sum() / weight, weight * len(first))
                values = (sums[task] - ratio * weights[task]) / scale / len(of_seeds)
                known = parts.setdefault(task, {})
                for name, value in zip(each, values, strict=True):
                    known[name] = known.get(name, 0.0) + float(value)
        strata = [(len(known), len(known) * np.var(list(known.values()), ddof=1)) for known in parts.values()]
        variance = sum(part for _, part in strata)
        squares = sum(part**2 / (number - 1) for number, part in strata)
        return math.sqrt(variance), variance**2 / squares if squares else math.inf

    def damage(self) -> dict[Key, Numbers]:
        """(labels, arm) -> the columns of repair.csv: of trained arms, and of bases that are only evaluated."""
        found = {}
        for arm in self.arms:
            backs = self.of_same("set_back", arm)
            numbers = self._ends("magnitudes", self._losses(backs[0], arm)) if backs else {}
            numbers = (numbers if not math.isnan(numbers.get("magnitudes", math.nan)) else {}) | self._left(arm)
            if numbers:
                found[*self.key(arm), arm.name] = numbers
        right = KeptStudy(self.document, "acc_norm")
        bases = [each for each in self.document["cells"] if each["cell"]["kind"] == "base" and each["scores"]]
        scored = {each["cell"]["key"]: each for each in bases}
        for each in bases:
            labels, dense = each["cell"]["labels"], scored.get(each["cell"]["dense_key"])
            if dense is None or dense is each or not right.examples(each):
                continue
            error, free = right.spread_over_examples([[(1.0, dense), (-1.0, each)]])
            mean, half = right.value(dense) - right.value(each), quantile(free) * error
            key = (*(labels.get(axis, "") for axis in self.axes), labels.get(self.arm_axis, "no adapter"))
            found[key] = named_ends("damage_choice", (mean, mean - half, mean + half))
        return found

    def _left(self, arm: Arm) -> Numbers:
        """What is left, and what was repaired, seed by seed; nan where it is not known.

        Left: the metric less that of the same arm trained on the uncompressed base. The transplant is that arm on the
        compressed base.
        """
        of_base = set()  # the axes that change nothing but the base
        for axis, values in self.study["product"].items():
            keys = itertools.chain(*values.values()) if isinstance(values, dict) else [axis]
            of_base |= {axis} if all(key.startswith("base.") for key in keys) else set()

        def kept(context: Mapping[str, str]) -> dict[str, str]:
            return {axis: label for axis, label in context.items() if axis not in of_base}

        like = (self.study.get("rates") or {}).get("like", {}).get(self.arm_axis, {})
        twins = [each for each in self.arms if each.is_dense and kept(each.context) == kept(arm.context)]
        twins = [each for name in (arm.name, like.get(arm.name)) for each in twins if each.name == name]
        if arm.is_dense or not twins or has_diverged([(1.0, twins[0], arm)], only_first=True):
            return {}
        losses = {"left": self._losses(arm, twins[0]), "transplant": {}, "repaired": {}}
        if not losses["left"]:
            return {}
        for moved in self.of_same("transplant", arm)[:1]:
            damages, repairs = self._losses(moved, twins[0]), self._losses(moved, arm)
            losses |= {"transplant": damages, "repaired": repairs} if damages and repairs else {}
        numbers: Numbers = {}
        for name, each in losses.items():
            numbers |= self._ends(name, each)
        damages, repairs = losses["transplant"], losses["repaired"]
        shared = [seed for seed in damages if seed in repairs and numbers["transplant_lower"] > 0]
        pairs = [[each[seed] for seed in shared] for each in (repairs, damages)]
        return numbers | share(*pairs, len(self.first_of(shared)))

    def _losses(self, arm: Arm, other: Arm) -> dict[str, float]:
        """Seed -> how much worse one arm is than another; later seeds come last."""
        shared = self.in_order(seed for seed in arm.cells if seed in other.cells)
        return {seed: self.sign * (self.value(other.cells[seed]) - self.value(arm.cells[seed])) for seed in shared}

    def _ends(self, name: str, losses: Mapping[str, float]) -> Numbers:
        """Mean and t interval as columns; nan without values."""
        values = list(losses.values())
        return named_ends(name, three(values, len(self.first_of(losses))) if values else [math.nan] * 3)


def named_ends(name: str, numbers: Sequence[float]) -> Numbers:
    return dict(zip((name + end for end in ENDS), numbers, strict=True))


def pairs_of(arms: Sequence[Arm], reference: str) -> list[tuple[Arm, Arm]]:
    """Every arm beside the reference of its context."""
    pairs = itertools.product(arms, arms)
    return [(a, b) for a, b in pairs if a.name != reference == b.name and a.context == b.context]


def terms_of(entry: Mapping[str, Any], pairs: Sequence[tuple[Arm, Arm]]) -> list[Term]:
    """(factor, arm, reference) of what a primary comparison averages and subtracts; none if a part has no pair."""
    terms: list[Term] = []
    parts = [(1.0, entry.get("over") or {})] + ([] if entry.get("minus") is None else [(-1.0, entry["minus"])])
    for sign, wanted in parts:
        own = [p for p in pairs if entry.get("arm") in (None, p[0].name) and has_labels(p[0].context, wanted)]
        if not own:
            return []
        terms += [(sign / len(own), *pair) for pair in own]
    return terms


def signed_arms(terms: Sequence[Term]) -> list[tuple[float, Arm]]:
    """(factor, arm) of both arms of all terms."""
    return [(sign * factor, arm) for factor, *pair in terms for sign, arm in zip((1.0, -1.0), pair, strict=True)]


def shared_seeds(terms: Sequence[Term]) -> list[str]:
    """The seeds that all arms have."""
    return [seed for seed in terms[0][1].cells if all(seed in arm.cells for _, *pair in terms for arm in pair)]


def has_diverged(terms: Sequence[Term], *, only_first: bool = False) -> bool:
    """Whether a run of the shared seeds did, of any arm or of the first."""
    arms = [terms[0][1]] if only_first else [arm for _, *pair in terms for arm in pair]
    return any("diverged" in arm.cells[seed]["result"] for arm in arms for seed in shared_seeds(terms))


def share(repairs: Sequence[float], damages: Sequence[float], num_first: int) -> Numbers:
    """Ratio of the means with Fieller's interval: every r for which the t interval of repair - r damage holds 0."""
    value, low, high = math.nan, math.nan, math.nan
    if repairs:
        value = float(np.mean(repairs) / np.mean(damages))
        at = []  # a quadratic in the ratio, above 0 where the interval leaves 0 out
        for ratio in (-1.0, 0.0, 1.0):
            mean, half, *_ = t_interval(list(np.array(repairs) - ratio * np.array(damages)), num_first)
            at.append(mean**2 - half**2)
        square, slope = (at[2] + at[0]) / 2 - at[1], (at[2] - at[0]) / 2
        inside = slope**2 - 4 * square * at[1]
        if square > 0 and inside >= 0:
            low, high = ((-slope + sign * math.sqrt(inside)) / 2 / square for sign in (-1.0, 1.0))
    return named_ends("repaired_share", (value, low, high))


def has_labels(context: Mapping[str, str], wanted: Mapping[str, Any]) -> bool:
    """Whether a context has one of the wanted labels on each axis."""
    every = {axis: value if isinstance(value, list) else [value] for axis, value in wanted.items()}
    return all(context.get(axis) in map(text_of, values) for axis, values in every.items())


def text_of(value: Any) -> str:
    """The label of a value of an axis; 1e-4, which YAML reads as text, is a number."""
    if isinstance(value, str):
        return f"{float(value):.12g}" if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value) else value
    return f"{value:.12g}" if isinstance(value, float) else json.dumps(value)


def t_interval(values: Sequence[float], num_first: int) -> tuple[float, float, float, float]:
    """Mean, half of its 95 % t interval, standard error, degrees of freedom; nan with a single first value."""
    if num_first < 2:
        return float(np.mean(values)), math.nan, math.nan, math.nan
    stderr, free = float(np.std(values[:num_first], ddof=1)) / math.sqrt(len(values)), float(num_first - 1)
    return float(np.mean(values)), quantile(free) * stderr, stderr, free


def three(values: Sequence[float], num_first: int = 3) -> list[float]:
    """Mean and the ends of its t interval."""
    mean, half, *_ = t_interval(values, num_first)
    return [mean, mean - half, mean + half]


def quantile(free: float, level: float = 0.05) -> float:
    """The value that |T| exceeds with a probability of `level`."""
    return -solved(lambda t: student(t, free) - level / 2, -1e4, 0.0)


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
    return 1.0 if value == 0 and not math.isnan(stderr) else 2 * tail(-abs(value), stderr, free)


@lru_cache
def detectable(free: float, alpha: float, power: float) -> float:
    """The true value, in standard errors, that a two-sided t test at `alpha` finds with this power.

    The power is that of a normal test, averaged over the standard errors that the test may see (Gauss's rule).
    """
    if math.isnan(free):
        return math.nan
    critical, highest = quantile(free, alpha), math.sqrt(1 + 90 / free)  # beyond it the density is below 1e-18
    nodes, weights = np.polynomial.legendre.leggauss(16)
    starts = np.linspace(0.0, highest, 201)[:-1, None]
    seen, width = (starts + (nodes + 1) * highest / 400).ravel(), np.tile(weights, 200) * highest / 400
    scale = math.log(2) + free / 2 * math.log(free / 2) - math.lgamma(free / 2)
    width *= np.exp(scale + (free - 1) * np.log(seen) - free * seen**2 / 2)

    def missing(ratio: float) -> float:
        limits = np.concatenate([critical * seen - ratio, critical * seen + ratio]) / math.sqrt(2)
        return float(np.dot(np.tile(width, 2), [math.erfc(limit) / 2 for limit in limits])) - power

    return solved(missing, 0.0, 10 * critical + 10)


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


def holm(p_values: Sequence[float], number: int) -> list[float]:
    """Holm's adjusted p-values among `number` tests; one that is not known counts as 1."""
    known = [1.0 if math.isnan(p) else float(p) for p in p_values]
    adjusted, largest = [0.0] * len(known), 0.0
    for rank, index in enumerate(np.argsort(known, kind="stable")):
        largest = max(largest, min(1.0, (number - rank) * known[index]))
        adjusted[index] = largest
    return adjusted


# What the pages say of benchmarks/results/study

SECTION, NEXT_SECTION = "## Compressed bases: LoRA against DoRA", "## A study recomputed"
SHORT, PRUNED = "128 steps", ("Wanda 50 %", "Wanda 2:4", "nf4, Wanda 2:4")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
# Name -> base and adapter of the cells that are better, of those that are worse, and the kind of the better ones.
CONTROLS = {
    "LoRA with LoftQ's start, LoRA; nf3": ("nf3", "LoRA, LoftQ", "nf3", "LoRA"),
    **{
        f"DoRA, magnitudes trained 100 times as fast; {base}": (base, "DoRA", base, "DoRA, magnitudes 100 times")
        for base in ("nf3", "Wanda 2:4")
    },
    **{
        f"SparseGPT, Wanda; LoRA, {size}": (f"SparseGPT {size}", "LoRA", f"Wanda {size}", "LoRA")
        for size in ("50 %", "70 %", "2:4")
    },
    "DoRA, LoRA; Wanda 2:4": ("Wanda 2:4", "DoRA", "Wanda 2:4", "LoRA"),
    **{
        f"DoRA with its magnitudes set back, DoRA; {base}": (base, "DoRA", base, "DoRA", "set_back")
        for base in ("16 bits", "nf3", "Wanda 2:4")
    },
}
Rows = list[tuple[str, list[float]]]


class Pages:
    """The numbers of the tables of benchmarks/README.md and of README.md's row, in their order and units."""

    def __init__(self, document: Mapping[str, Any], tally: Tally) -> None:
        self.tally = tally
        self.studies = {measure: KeptStudy(document, measure) for measure in MEASURES}
        self.cells = [each for each in document["cells"] if each["result"] is not None]
        self.nll = self.studies[NLL]
        self.compared = {measure: study.comparisons() for measure, study in self.studies.items()}
        self.repair, self.keys = self.nll.damage(), list(self.nll.primary)
        self.adapters = list(dict.fromkeys(arm.name for arm in self.nll.arms))
        labels = [label for axis in self.nll.study["product"].values() for label in axis]
        labels += [key[0] for key in self.keys]
        self.labels = [*labels, "30 %", "50 %", "70 %", "2:4", "4-bit", *(f"{name}:" for name in labels)]

    def check(self) -> None:
        """Compare every number of the tables; the text around them has none."""
        page = (HERE / "README.md").read_text(encoding="utf-8")
        section = page.partition(SECTION)[2].partition(NEXT_SECTION)[0]
        for name, (rows, note) in self.tables().items():
            before, start, rest = section.partition(f"<!-- table: {name} -->\n")
            block, end, after = rest.partition("<!-- end -->")
            if not start or not end:
                raise SystemExit(f"benchmarks/README.md: the table {name} is missing")
            section = before + after
            lines = [line.strip("| ") for line in block.splitlines() if line.startswith("|")][2:]
            told = [line.split(" | ", 1) for line in lines]
            if [label for label, _ in told] != [label for label, _ in rows]:
                raise SystemExit(f"{name}: other rows than recomputed")
            for (label, text), (_, own) in zip(told, rows, strict=True):
                self.check_text(f"{name}: {label}", text, own)
            self.check_text(f"{name}: note", " ".join(each for each in block.splitlines() if each[:1] != "|"), note)
        if "<!-- table" in section:
            raise SystemExit("benchmarks/README.md: a table of the study is not recomputed")
        text = re.sub(r"```.*?```|\(http\S*|arXiv \S*", "", section, flags=re.DOTALL)
        self.check_text("benchmarks/README.md, text", text, [])
        readme = (HERE.parent / "README.md").read_text(encoding="utf-8").splitlines()
        (row,) = [line for line in readme if line.startswith("| LoRA or DoRA?")]
        self.check_text("README.md", row, self.headline())

    def check_text(self, where: str, text: str, own: Sequence[float]) -> None:
        """Compare the numbers of a text, without those in labels of the study, as far as they are rounded."""
        for label in sorted(self.labels, key=len, reverse=True):
            text = text.replace(label, " ")
        found = NUMBER.findall(text)
        if len(found) != len(own):
            self.tally.fault(f"{where} has the numbers {found}, recomputed {list(own)}")
            return
        for number, value in zip(found, own, strict=True):
            mantissa, _, exponent = number.replace(",", "").partition("e")
            rounded = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
            self.tally.add(where, float(number.replace(",", "")), value, 1.0001 * rounded)

    def tables(self) -> dict[str, tuple[Rows, list[float]]]:
        """Name of a table -> its rows, and the numbers of the note below it."""
        lower_by = {name: self.lower_by(*cells) for name, cells in CONTROLS.items()}
        return {
            "study_checkpoints": (self.checkpoints(), []),
            "study_primary": (self.primary(), self.answers()),
            "study_units": (self.units(), []),
            "study_tasks": (self.tasks(), []),
            "study_students": (self.students(), []),
            "study": (self.contexts(), [95.0]),
            "study_controls": ([(name, [len(each), *three(each)]) for name, each in lower_by.items()], []),
            "study_transplants": self.transplants(),
            "study_changes": (self.changes(), [1.0, 95.0, 0.0]),
        }

    def gain(self, measure: str, key: Key) -> list[float]:
        """Improvement and interval of a comparison: nats, or points of accuracy."""
        return self.scaled(measure, self.compared[measure][key])

    def scaled(self, measure: str, numbers: Numbers) -> list[float]:
        return [(1 if measure[:3] == "nll" else 100) * numbers[name] for name in THREE]

    def primary(self) -> Rows:
        rows = []
        for key in self.keys:
            numbers: list[float] = []
            for measure in MEASURES:
                p = self.compared[measure][key]["p_equivalent_holm" if measure == NLL else "p_equivalent"]
                numbers += [*self.gain(measure, key), p]
            rows.append((key[0], numbers))
        return rows

    def answers(self) -> list[float]:
        found, verdicts = [], self.nll.verdicts(self.compared[NLL])
        for key in self.keys:
            numbers, zone, verdict = self.compared[NLL][key], self.nll.zone, verdicts[key]
            gain, lower, upper = self.gain(NLL, key)
            found += [zone] * verdict.count(f"{zone:g}")
            found += [gain, 95.0, lower, upper, len(shared_seeds(self.nll.primary[key]))]
            if "is better" in verdict:
                found += [numbers["p_holm"], self.nll.tests[key]]
            elif verdict == "not decided":
                found.append(numbers["smallest_detectable"])
            else:
                found += [zone, numbers["p_equivalent_holm"], self.nll.tests[key]]
        return found

    def worths(self) -> list[float]:
        """Nats that a bit per weight, and a percentage point of zeros, are worth to LoRA."""
        worths = []
        for mild, strong, index, scale in (("nf4", "nf3", 0, -1), ("Wanda 30 %", "Wanda 50 %", 1, 100)):
            left, other = (self.repair[base, SHORT, "LoRA"]["left"] for base in (mild, strong))
            size, less = (bits_and_zeros(self.arm("trained", base, "LoRA")["0"])[index] for base in (mild, strong))
            worths.append((other - left) / (scale * (less - size)))
        return worths

    def units(self) -> Rows:
        gain, _, upper = self.gain(NLL, self.keys[0])
        names = ("bit per weight", "percentage point of zeros")
        pairs = zip(names, self.worths(), strict=True)
        return [(name, [worth, gain / worth, upper / worth, self.nll.zone / worth]) for name, worth in pairs]

    def tasks(self) -> Rows:
        found = {measure: self.studies[measure].tasks() for measure in (NLL, "acc", "acc_norm")}
        rows = []
        for key in found["acc"]:
            if key[:-1] == self.keys[0]:
                numbers = [number for measure in found for number in self.scaled(measure, found[measure][key])]
                rows.append((key[-1], [100 * found["acc"][key]["weight"], *numbers]))
        return rows

    def students(self) -> Rows:
        """Quoted accuracies, beside the gain over the compressed bases where the study has the task."""
        told = json.loads((HERE / "results/student_rerun.json").read_text())["accuracy"]
        lora, dora, own = told["lora"], told["dora"], self.studies["acc"].tasks()
        gains = {key[-1]: self.scaled("acc", own[key]) for key in own if key[:-1] == self.keys[0]}
        return [(task, [lora[task], dora[task], dora[task] - lora[task], *gains.get(task, [])]) for task in lora]

    def contexts(self) -> Rows:
        rows = []
        for context in dict.fromkeys((arm.context["base"], arm.context["length"]) for arm in self.nll.arms):
            own = [arm for arm in self.nll.arms if (arm.context["base"], arm.context["length"]) == context]
            bits, zeros = bits_and_zeros(next(iter(own[0].cells.values())))
            damage = self.repair.get((context[0], "", "no adapter"), {})
            numbers = [bits, 100 * zeros, *(100 * value for value in damage.values())]
            of_arms = {name: self.repair.get((*context, name), {}) for name in self.adapters}
            for name in self.adapters:
                numbers += ends(of_arms[name], "left")
            numbers += [value for value in ends(of_arms["LoRA"], "repaired_share") if not math.isnan(value)]
            for key in ((f"{name} against LoRA", *context, name) for name in self.adapters[1:]):
                numbers += self.gain(NLL, key) if key in self.compared[NLL] else []
            rows.append((", ".join(context), numbers))
        return rows

    def arm(self, kind: str, base: str, adapter: str) -> dict[str, Mapping[str, Any]]:
        """Seed -> cell, of 128 steps."""
        wanted = {"base": base, "adapter": adapter, "length": SHORT}.items()
        cells = [each for each in self.cells if each["cell"]["kind"] == kind]
        return {each["cell"]["labels"]["seed"]: each for each in cells if wanted <= each["cell"]["labels"].items()}

    def values(self, kind: str, base: str, adapter: str) -> dict[str, float]:
        """Seed -> NLL, of 128 steps."""
        return {seed: self.nll.value(cell) for seed, cell in self.arm(kind, base, adapter).items()}

    def lower_by(self, base: str, adapter: str, other: str, worse: str, kind: str = "trained") -> list[float]:
        """By how much the NLL of the first cells is lower than that of the others, of each seed that both have."""
        one, two = self.values(kind, base, adapter), self.values("trained", other, worse)
        return [two[seed] - one[seed] for seed in sorted(one.keys() & two.keys(), key=int)]

    def transplants(self) -> tuple[Rows, list[float]]:
        rows, note = [], []
        for seeds in (("0", "1", "2"), ("3", "4", "5")):
            plain, rescaled, told = [], [], f"seeds {seeds[0]} to {seeds[-1]}"
            for base in ("nf4", "nf3", *PRUNED):
                moved = {arm: self.values("transplant", base, arm) for arm in ("LoRA", "DoRA")}
                if seeds[0] not in moved["DoRA"]:
                    continue
                numbers = []
                for arm, values in moved.items():
                    home = self.values("trained", "16 bits", arm)
                    numbers += three([values[seed] - home[seed] for seed in seeds])
                more = [moved["DoRA"][seed] - moved["LoRA"][seed] for seed in seeds]
                numbers += three(more)
                plain += [more] if base in PRUNED else []
                mended = self.values("rescaled", base, "DoRA")
                if seeds[0] in mended:
                    rescaled.append([mended[seed] - moved["LoRA"][seed] for seed in seeds])
                    numbers += three(rescaled[-1])
                rows.append((f"{base}, {told}", numbers))
            means = [np.mean(each, axis=0) for each in (plain, rescaled) if each]
            rows.append((f"mean of the pruned bases, {told}", [end for each in means for end in three(each)]))
            note += [float(seeds[0]), float(seeds[-1]), float(np.sum(np.array(plain) > 0)), float(np.size(plain))]
            note += [100 * (1 - np.sum(means[1]) / np.sum(means[0]))] if rescaled else []
        return rows, note

    def checkpoints(self) -> Rows:
        """Losses at the checkpoints, and Pearson's correlations of the changes of length and direction."""
        rows = []
        for arm, paper in (("full", -0.62), ("LoRA", 0.83), ("DoRA", -0.31)):
            runs = [cell["result"].get("checkpoints", []) for cell in self.arm("by_layer", "16 bits", arm).values()]
            runs = [run for run in runs if run]
            losses = np.array([[checkpoint["nll"] for checkpoint in run] for run in runs])
            numbers = [number for at in losses.T for number in (at.mean(), at.std(ddof=1))]
            for ending, first in (("q_proj", 0), ("", 0), ("q_proj", -1)):
                found = []
                for run in runs:
                    pairs = (pair for at in run[first:] for pair in at["changes"].items())
                    points = np.array([[of["length"], of["direction"]] for path, of in pairs if path.endswith(ending)])
                    found.append(np.corrcoef(points.T)[0, 1])
                numbers += [np.mean(found), min(found), max(found)]
            rows.append((arm, [*map(float, numbers), paper]))
        return rows

    def changes(self) -> Rows:
        columns = {"direction": 1, "magnitude": 100, "error_undone": 100, "error_undone_best": 100, "error_cosine": 1}
        rows = []
        for base, adapter in itertools.product(("16 bits", "nf3", "Wanda 2:4"), ("LoRA", "DoRA")):
            results = [cell["result"] for cell in self.arm("by_layer", base, adapter).values()]
            layers = [list(each["changes"].values()) for each in results if "changes" in each]
            numbers: list[float] = [len(layers)]
            for name, scale in columns.items():
                known = [each[name] for of_seed in layers for each in of_seed if name in each]
                numbers += [scale * float(np.mean(known))] if known else []
            numbers += ends(self.repair.get((base, SHORT, adapter), {}), "magnitudes")
            rows.append((f"{base}, {adapter}", numbers))
        return rows

    def headline(self) -> list[float]:
        gain, points = (self.gain(measure, self.keys[0]) for measure in (NLL, "acc"))
        return [gain[0], 95.0, *gain[1:], self.nll.zone, *(gain[2] / worth for worth in self.worths()), *points]


def ends(numbers: Numbers, name: str) -> list[float]:
    """A column and its interval, if it is there."""
    return [numbers[name + end] for end in ENDS if name in numbers]


def bits_and_zeros(cell: Mapping[str, Any]) -> tuple[float, float]:
    """Bits per weight, and the share of zeros, of the linear layers of a cell."""
    size, compression = cell["result"]["size"], cell["result"]["compression"] or {}
    return 8 * size["num_linear_bytes"] / size["num_linear_weights"], compression.get("sparsity", 0.0)


if __name__ == "__main__":
    main()
