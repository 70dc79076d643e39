"""The headline numbers of a study once more, from the scores that it kept: a second program, which shares no code.

    python benchmarks/recompute_study.py [benchmarks/results/study]

The folder holds scores.json.xz (the study, its cells, and their scores example by example), comparisons.csv and
repair.csv. Needs numpy alone. Computed are every comparison in the study's metric (improvement, t interval over the
seeds, p-values over seeds and examples, equivalence, Holm's correction, the smallest detectable difference, the
verdict), and of every arm the damage that is left, that of a transplant, and the share that training repaired. Ends
with 1 if a number differs from the report's by more than 1e-6, or a verdict is another one.
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
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-6
DEFAULT = {"arm": "adapter", "metric": "nll_per_token", "tasks": "tokens", "split": "halves", "zone": 0.02}
DEFAULT |= {"alpha": 0.05, "power": 0.8, "min_seeds": 3}
LOWER_IS_BETTER = ("nll_per_token", "choice_nll")
COMPARED = ("improvement", "lower", "upper", "p_seeds", "p_examples", "p_equivalent", "p_holm", "p_equivalent_holm")
COMPARED += ("smallest_detectable",)
LEFT = tuple(
    name + end for name in ("left", "transplant", "repaired", "repaired_share") for end in ("", "_lower", "_upper")
)
Numbers = dict[str, float]
Key = tuple[str, ...]


def main() -> None:
    """Recompute, compare, and print the largest difference as JSON."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "results/study"
    study = KeptStudy(json.loads(lzma.decompress((folder / "scores.json.xz").read_bytes())))
    compared = study.comparisons()
    found = {
        "comparisons.csv": (compared, COMPARED, ("comparison", *study.axes, "arm")),
        "repair.csv": (study.damage(), LEFT, (*study.axes, study.arm_axis)),
    }
    worst, number, others = 0.0, 0, 0
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
    verdicts = study.verdicts(compared)
    for key, row in rows_of(folder / "comparisons.csv", found["comparisons.csv"][2], study.metric):
        if row["role"] == "primary" and row["verdict"] != verdicts.get(key):
            print(
                f"{', '.join(filter(None, key))}: the verdict is {row['verdict']!r}, recomputed {verdicts.get(key)!r}"
            )
            others += 1
    print(
        json.dumps({"numbers": number, "largest_difference": worst, "tolerance": TOLERANCE, "other_verdicts": others})
    )
    if worst > TOLERANCE or others or not number:
        raise SystemExit(1)


def rows_of(file: Path, keys: Sequence[str], metric: str) -> Iterator[tuple[Key, dict[str, str]]]:
    """(labels, row) of a table; of comparisons those in the metric."""
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row.get("measure", metric) == metric:
                yield tuple(row.get(key, "") for key in keys), row


def reported(file: Path, columns: Sequence[str], keys: Sequence[str], metric: str) -> Iterator[tuple[Key, Numbers]]:
    """(labels, numbers) of the rows of a table that have the first of these columns; nan where a column is empty."""
    for key, row in rows_of(file, keys, metric):
        if row.get(columns[0]):
            yield key, {column: float(row.get(column) or "nan") for column in columns}


def distance(one: float, other: float) -> float:
    """Their difference; 0 if neither is known, infinite if one is."""
    if math.isnan(one) or math.isnan(other):
        return 0.0 if math.isnan(one) and math.isnan(other) else math.inf
    return abs(one - other)


class Arm:
    """Cells of one value of the compared axis in one context, by their seeds; `num_missing` first seeds have none."""

    def __init__(self, name: str, context: Mapping[str, str], cell: Mapping[str, Any]) -> None:
        self.name, self.context, self.is_interior = name, dict(context), cell["is_interior"]
        self.is_dense = cell["base_key"] == cell["dense_key"]
        self.cells: dict[str, Mapping[str, Any]] = {}
        self.planned: list[str] = []
        self.num_missing = 0


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
        self.first = set(map(str, self.study.get("seeds", (0, 1, 2))))
        self.arms = self._arms(document["cells"], "trained")
        self.transplants = self._arms(document["cells"], "transplant")
        self.reference = self.compare["reference"]
        self.primary: dict[Key, list[Term]] = {}
        self.lacking: dict[Key, bool] = {}
        self.shared = self._shared([each["cell"] for each in document["cells"] if each["cell"]["kind"] == "trained"])
        self._kept: dict[int, dict[str, dict[str, tuple[float, float]]]] = {}

    def _place(self, labels: Mapping[str, str]) -> tuple[str, str]:
        return json.dumps({axis: labels[axis] for axis in self.axes}), labels[self.arm_axis]

    def _shared(self, cells: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[str, str]]:
        """(context, arm) without a cell of its own -> the one whose cell it shares, since its recipe is the same."""
        own = {self._place(cell["labels"]) for cell in cells}
        pairs = [(self._place(other), self._place(cell["labels"])) for cell in cells for other in cell.get("equal", ())]
        return {other: place for other, place in pairs if other not in own}

    def _arms(self, cells: Sequence[Mapping[str, Any]], kind: str) -> list[Arm]:
        found: dict[tuple[str, str], Arm] = {}
        for each in cells:
            cell, labels = each["cell"], each["cell"]["labels"]
            if cell["kind"] == kind:
                context = {axis: labels[axis] for axis in self.axes if axis in labels}
                key = (labels[self.arm_axis], json.dumps(context))
                arm = found.setdefault(key, Arm(labels[self.arm_axis], context, cell))
                arm.planned.append(labels["seed"])
                if each["result"] is not None:
                    arm.cells[labels["seed"]] = each
        for arm in found.values():
            arm.num_missing = sum(seed not in arm.cells for seed in self.first_of(arm.planned))
        return [arm for arm in found.values() if arm.cells]

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
        asked = self.compare.get("primary") or {}
        contrasts: dict[Key, list[Term]] = {}
        for name, entry in asked.items():
            terms = self._terms(entry, pairs)
            if terms and shared_seeds(terms):
                key = (name, *("" for _ in self.axes), terms[0][1].name)
                contrasts[key] = self.primary[key] = terms
                self.lacking[key] = self._lacks_any(entry, terms)
        for arm, other in pairs:
            key = (f"{arm.name} against {other.name}", *(arm.context.get(axis, "") for axis in self.axes), arm.name)
            if shared_seeds([(1.0, arm, other)]):
                contrasts[key] = [(1.0, arm, other)]
                self.primary |= {} if asked else {key: contrasts[key]}
        alpha, number = self.compare["alpha"], max(len(self.primary), len(asked) or self._num_pairs())
        found = {
            key: self._numbers(terms, alpha / number if key in self.primary else alpha)
            for key, terms in contrasts.items()
        }
        own = [found[key] for key in self.primary]
        larger = [np.nanmax([each["p_seeds"], each["p_examples"]]) for each in own]
        equivalent = [each["p_equivalent"] for each in own]
        for each, p, p_equivalent in zip(own, holm(larger, number), holm(equivalent, number), strict=True):
            each |= {"p_holm": p, "p_equivalent_holm": p_equivalent}
        return found

    def verdicts(self, found: Mapping[Key, Numbers]) -> dict[Key, str]:
        """What each primary comparison may say, by the numbers of `comparisons`."""
        said = {}
        zone = f"{self.compare['zone']:g}"
        for key, terms in self.primary.items():
            arms = [arm for _, *pair in terms for arm in pair]
            may_be = all(arm.is_interior and not arm.num_missing for arm in arms) and not self.lacking.get(key)
            may_be = may_be and len(shared_seeds(terms)) >= self.compare["min_seeds"]
            # Without a diverged run, a task of a single example
            may_be = may_be and (self._has_diverged(terms) or not math.isnan(found[key]["p_examples"]))
            better, equivalent = (may_be and found[key][p] < self.compare["alpha"] for p in COMPARED[6:8])
            winner = terms[0][1].name if found[key]["improvement"] > 0 else self.reference
            said[key] = f"no difference above {zone}" if equivalent else "not decided"
            if better:
                said[key] = f"{winner} is better" + (f", by less than {zone}" if equivalent else "")
        return said

    def _terms(self, entry: Mapping[str, Any], pairs: Sequence[tuple[Arm, Arm]]) -> list[Term]:
        terms: list[Term] = []
        for sign, wanted in parts_of(entry):
            own = [p for p in pairs if entry.get("arm") in (None, p[0].name) and has_labels(p[0].context, wanted)]
            if not own:
                return []
            terms += [(sign / len(own), *pair) for pair in own]
        return terms

    def _lacks_any(self, entry: Mapping[str, Any], terms: Sequence[Term]) -> bool:
        """Whether the study asks for a context, in which it trains both arms, or for a label that no term has.

        A combination without a cell of its own is not trained: it has the recipe of another one, whose cell it shares.
        """
        trained = self._trained()
        both = {terms[0][1].name, terms[0][2].name}
        compared = [arm.context for _, arm, _ in terms]
        there = {(json.dumps(arm.context), arm.name) for _, *pair in terms for arm in pair}
        of_equal = {context for context, _ in self.shared}
        compared += [
            json.loads(each)
            for each in of_equal
            if all(self.shared.get((each, name), (each, name)) in there for name in both)
        ]
        for _, wanted in parts_of(entry):
            contexts = [json.loads(text) for text, names in trained.items() if names >= both]
            if any(has_labels(context, wanted) and context not in compared for context in contexts):
                return True
            for axis, value in wanted.items():
                every = value if isinstance(value, list) else [value]
                if set(map(text_of, every)) - {context[axis] for context in compared if has_labels(context, wanted)}:
                    return True
        return False

    def _num_pairs(self) -> int:
        """How many arms the study trains beside the reference of their context."""
        return sum(len(names) - 1 for names in self._trained().values() if self.reference in names)

    def _trained(self) -> dict[str, set[str]]:
        """Context -> the arms that the study trains in it, but for those that share the cell of another place."""
        trained: dict[str, set[str]] = {}
        product = {axis: list(map(text_of, values)) for axis, values in self.study["product"].items()}
        for stage in self.study.get("stages") or [{}]:
            for combination in itertools.product(*product.values()):
                labels = dict(zip(product, combination, strict=True))
                wanted = {axis: value for axis, value in stage.get("cells", {}).items() if axis != "seed"}
                is_left_out = any(has_labels(labels, each) for each in self.study.get("exclude", ()))
                if stage.get("kind", "train") == "train" and has_labels(labels, wanted) and not is_left_out:
                    context, name = self._place(labels)
                    if (context, name) not in self.shared:
                        trained.setdefault(context, set()).add(name)
        return trained

    def _numbers(self, terms: Sequence[Term], alpha: float) -> Numbers:
        shared = sorted(shared_seeds(terms), key=lambda seed: seed not in self.first)
        sign = -1.0 if self.metric in LOWER_IS_BETTER else 1.0
        values = [
            sign * sum(f * (self.value(arm.cells[seed]) - self.value(other.cells[seed])) for f, arm, other in terms)
            for seed in shared
        ]
        mean, half, stderr, free = t_interval(values, self.num_first(shared))
        numbers = {"improvement": mean, "lower": mean - half, "upper": mean + half}
        error, degrees = self._over_examples(terms, shared)
        zone = self.compare["zone"]
        numbers["p_seeds"] = both_tails(mean, stderr, free)
        numbers["p_examples"] = both_tails(mean, error, degrees)
        equivalent = [tail(abs(mean) - zone, each, df) for each, df in ((stderr, free), (error, degrees))]
        # A run that diverged has no measured score, and one seed no spread: nothing is known to be equivalent
        numbers["p_equivalent"] = (
            math.nan if self._has_diverged(terms) or len(shared) < 2 else float(np.nanmax(equivalent))
        )
        numbers["smallest_detectable"] = stderr * detectable(free, alpha, self.compare["power"]) if stderr else 0.0
        return numbers

    def _has_diverged(self, terms: Sequence[Term]) -> bool:
        seeds = shared_seeds(terms)
        return any("diverged" in arm.cells[seed]["result"] for _, *pair in terms for arm in pair for seed in seeds)

    def num_first(self, seeds: Iterable[str]) -> int:
        """How many of these seeds are not later ones: they alone tell the spread (Stein, 1945)."""
        return len(self.first_of(seeds))

    def first_of(self, seeds: Iterable[str]) -> list[str]:
        every = list(seeds)
        return [seed for seed in every if seed in self.first] or every

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

    def damage(self) -> dict[Key, Numbers]:
        """(labels, arm) -> what is left, and what was repaired, seed by seed (`LEFT`); nan where it is not known.

        Left: the metric less that of the same arm trained on the uncompressed base. The transplant is that arm on the
        compressed base.
        """
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
            if arm.is_dense or not twins or any("diverged" in each["result"] for each in shared_cells(twins[0], arm)):
                continue
            lost = self._losses(arm, twins[0])
            if lost:
                key = (*(arm.context.get(axis, "") for axis in self.axes), arm.name)
                moved = [each for each in self.transplants if (each.name, each.context) == (arm.name, arm.context)]
                damages, repairs = {}, {}
                if moved:
                    damages, repairs = self._losses(moved[0], twins[0]), self._losses(moved[0], arm)
                if not damages or not repairs:
                    damages = repairs = {}
                numbers: Numbers = {}
                for name, losses in (("left", lost), ("transplant", damages), ("repaired", repairs)):
                    numbers |= ends(name, list(losses.values()), self.num_first(losses))
                shared = [seed for seed in damages if seed in repairs and numbers["transplant_lower"] > 0]
                pairs = [[losses[each] for each in shared] for losses in (repairs, damages)]
                found[key] = numbers | share(*pairs, self.num_first(shared))
        return found

    def _losses(self, arm: Arm, other: Arm) -> dict[str, float]:
        """Seed -> how much worse one arm is than another; later seeds come last."""
        sign = 1.0 if self.metric in LOWER_IS_BETTER else -1.0
        shared = sorted((seed for seed in arm.cells if seed in other.cells), key=lambda seed: seed not in self.first)
        return {seed: sign * (self.value(arm.cells[seed]) - self.value(other.cells[seed])) for seed in shared}


def shared_seeds(terms: Sequence[Term]) -> list[str]:
    """The seeds that all arms have."""
    return [seed for seed in terms[0][1].cells if all(seed in arm.cells for _, *pair in terms for arm in pair)]


def shared_cells(arm: Arm, other: Arm) -> list[Mapping[str, Any]]:
    """The arm's cells of the seeds that the other one has, too."""
    return [cell for seed, cell in arm.cells.items() if seed in other.cells]


def parts_of(entry: Mapping[str, Any]) -> list[tuple[float, Mapping[str, Any]]]:
    """(sign, labels) of what a primary comparison averages, and of what it subtracts."""
    return [(1.0, entry.get("over") or {})] + ([] if entry.get("minus") is None else [(-1.0, entry["minus"])])


def ends(name: str, values: Sequence[float], num_first: int) -> Numbers:
    """Mean and t interval as columns; nan without values."""
    mean, half = t_interval(values, num_first)[:2] if values else (math.nan, math.nan)
    return {name: mean, f"{name}_lower": mean - half, f"{name}_upper": mean + half}


def share(repairs: Sequence[float], damages: Sequence[float], num_first: int) -> Numbers:
    """Ratio of the means with Fieller's interval: every r for which the t interval of repair - r damage holds 0."""
    value, low, high = math.nan, math.nan, math.nan
    if repairs:
        value = float(np.mean(repairs) / np.mean(damages))

        def outside(ratio: float) -> float:
            """A quadratic in the ratio, above 0 where the interval leaves 0 out."""
            left = [one - ratio * other for one, other in zip(repairs, damages, strict=True)]
            mean, half, *_ = t_interval(left, num_first)
            return mean**2 - half**2

        at = [outside(ratio) for ratio in (-1.0, 0.0, 1.0)]
        square, slope = (at[2] + at[0]) / 2 - at[1], (at[2] - at[0]) / 2
        inside = slope**2 - 4 * square * at[1]
        if square > 0 and inside >= 0:
            low, high = ((-slope + sign * math.sqrt(inside)) / 2 / square for sign in (-1.0, 1.0))
    return {"repaired_share": value, "repaired_share_lower": low, "repaired_share_upper": high}


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
        if context.get(axis) not in map(text_of, value if isinstance(value, list) else [value]):
            return False
    return True


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
    return 1.0 if value == 0 and not math.isnan(stderr) else 2 * tail(-abs(value), stderr, free)


@lru_cache
def detectable(free: float, alpha: float, power: float) -> float:
    """The true value, in standard errors, that a two-sided t test at `alpha` finds with this power.

    The power is that of a normal test, averaged over the standard errors that the test may see (Gauss's rule).
    """
    if math.isnan(free):
        return math.nan
    critical = -solved(lambda t: student(t, free) - alpha / 2, -1e4, 0.0)
    highest = math.sqrt(1 + 90 / free)  # beyond it the density is below 1e-18
    nodes, weights = np.polynomial.legendre.leggauss(16)
    starts = np.linspace(0.0, highest, 201)[:-1, None]
    seen, width = (starts + (nodes + 1) * highest / 400).ravel(), np.tile(weights, 200) * highest / 400
    scale = math.log(2) + free / 2 * math.log(free / 2) - math.lgamma(free / 2)
    width *= np.exp(scale + (free - 1) * np.log(seen) - free * seen**2 / 2)

    def missing(ratio: float) -> float:
        limits = np.concatenate([critical * seen - ratio, critical * seen + ratio]) / math.sqrt(2)
        found = [math.erfc(limit) / 2 for limit in limits]
        return float(np.dot(np.tile(width, 2), found)) - power

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


if __name__ == "__main__":
    main()
