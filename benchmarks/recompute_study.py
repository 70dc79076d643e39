"""The numbers of a study once more, from the scores that it kept: a second program, which shares no code.

    python benchmarks/recompute_study.py [benchmarks/results/study]

The folder holds scores.json.xz (the study, its cells, and their scores example by example), comparisons.csv, tasks.csv
and repair.csv. Needs numpy alone. Computed are every comparison in every measure, and by task (improvement, t interval
over the seeds, p-values over seeds and examples, equivalence, Holm's correction, the smallest detectable difference,
the verdict), and of every arm and base the damage, what is left of it, that of a transplant, the share that training
repaired, and what magnitudes contribute. Of results/study also every number that README.md and benchmarks/README.md
say of it. Ends with 1 if a number differs from the report's by more than 1e-6, or from a page's by more than it was
rounded, or if a verdict is another one.
"""

from __future__ import annotations

import copy
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

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-6
DEFAULT = {"arm": "adapter", "metric": "nll_per_token", "tasks": "tokens", "split": "halves", "zone": 0.02}
DEFAULT |= {"alpha": 0.05, "power": 0.8, "min_seeds": 3}
MEASURES = ("nll_per_token", "nll_by_task", "acc", "acc_norm")
ZONE_OF_SHARES = 0.01
COMPARED = ("improvement", "lower", "upper", "p_seeds", "p_examples", "p_equivalent", "p_holm", "p_equivalent_holm")
COMPARED += ("smallest_detectable",)
NAMES_OF_REPAIR = ("left", "transplant", "repaired", "repaired_share", "magnitudes", "damage_choice")
REPAIRED = tuple(name + end for name in NAMES_OF_REPAIR for end in ("", "_lower", "_upper"))
OF_TASK = ("weight", "improvement", "lower", "upper")
Numbers = dict[str, float]
Key = tuple[str, ...]


class Tally:
    """Numbers that were compared: how many, the largest difference, and how many differ by more than they may."""

    def __init__(self) -> None:
        self.number, self.worst, self.faults = 0, 0.0, 0

    def add(self, where: str, told: float, own: float, allowed: float = TOLERANCE) -> None:
        """Compare a number that is told with the one that was recomputed."""
        difference = distance(own, told)
        self.number += 1
        if allowed == TOLERANCE:  # others were rounded
            self.worst = max(self.worst, difference)
        if difference > allowed:
            self.fault(f"{where} is {told}, recomputed {own}")

    def fault(self, text: str) -> None:
        self.faults += 1
        print(text)


def main() -> None:
    """Recompute, compare, and print the largest difference as JSON."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results/study"
    document = json.loads(lzma.decompress((folder / "scores.json.xz").read_bytes()))
    study, tally = KeptStudy(document), Tally()
    compare_table(tally, folder / "repair.csv", study.damage(), REPAIRED, (*study.axes, study.arm_axis))
    told = {row["measure"] for _, row in rows_of(folder / "comparisons.csv", ())}
    for measure in [study.metric, *(each for each in MEASURES if each in told and each != study.metric)]:
        other = study if measure == study.metric else KeptStudy(document, measure)
        keys, compared = ("comparison", *study.axes, "arm"), other.comparisons()
        compare_table(tally, folder / "comparisons.csv", compared, COMPARED, keys, measure)
        if (folder / "tasks.csv").is_file() and measure != "nll_by_task":
            compare_table(tally, folder / "tasks.csv", other.tasks(), OF_TASK, (*keys, "task"), measure)
        verdicts = other.verdicts(compared) if other.is_metric else {}
        for key, row in rows_of(folder / "comparisons.csv", keys, measure):
            if row["role"] == "primary" and row["verdict"] != verdicts.get(key):
                who = ", ".join(filter(None, key))
                tally.fault(f"{who}: the verdict is {row['verdict']!r}, recomputed {verdicts.get(key)!r}")
    if folder.resolve() == HERE / "results/study":
        check_pages(tally, document)
    print(json.dumps({"numbers": tally.number, "largest_difference": tally.worst, "faults": tally.faults}))
    if tally.faults or not tally.number:
        raise SystemExit(1)


def compare_table(
    tally: Tally, file: Path, own: Mapping[Key, Numbers], columns: Sequence[str], keys: Sequence[str], measure: str = ""
) -> None:
    """Compare the columns of a data file that were recomputed; its rows with any of them must be the same."""
    told = {
        key: {column: float(row.get(column) or "nan") for column in columns}
        for key, row in rows_of(file, keys, measure)
        if any(row.get(column) for column in columns)
    }
    if set(told) != set(own):
        raise SystemExit(f"{file.name}: other rows than recomputed: {sorted(set(told) ^ set(own))[:4]}")
    for key, numbers in own.items():
        for column, value in numbers.items():
            tally.add(f"{file.name}: {', '.join(filter(None, key))}: {column}", told[key][column], value)


def rows_of(file: Path, keys: Sequence[str], measure: str = "") -> Iterator[tuple[Key, dict[str, str]]]:
    """(labels, row) of a table, of one measure if it has several. A report has no file for a table without rows."""
    if not file.is_file():
        return
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if not measure or row["measure"] == measure:
                yield tuple(row.get(key, "") for key in keys), row


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

    def with_seeds(self, seeds: Sequence[str]) -> Arm:
        """The arm with these seeds alone."""
        found = copy.copy(self)
        found.cells = {seed: self.cells[seed] for seed in seeds if seed in self.cells}
        found.num_missing = len(seeds) - len(found.cells)
        return found


Term = tuple[float, Arm, Arm]


class KeptStudy:
    """What scores.json.xz holds."""

    def __init__(self, document: Mapping[str, Any], measure: str = "") -> None:
        self.document, self.study = document, document["study"]
        self.compare = DEFAULT | {
            name: value for name, value in self.study.get("compare", {}).items() if value is not None
        }
        self.is_metric = measure in ("", self.compare["metric"])
        self.metric, self.arm_axis = measure or self.compare["metric"], self.compare["arm"]
        is_same = self.metric[:3] == self.compare["metric"][:3]  # an NLL, or an accuracy
        self.zone = self.compare["zone"] if is_same else ZONE_OF_SHARES
        self.weighting = self.compare["tasks"] if self.metric == "nll_per_token" else "equal"
        self.axes = [axis for axis in self.study["product"] if axis != self.arm_axis]
        self.searched = self.study.get("rates") is not None
        self.halves = self.searched and self.compare["split"] == "halves"
        self.first = set(map(str, self.study.get("seeds", (0, 1, 2))))
        self.arms = self._arms(document["cells"], "trained")
        self.transplants = self._arms(document["cells"], "transplant")
        self.set_back = self._arms(document["cells"], "set_back")
        self.reference = self.compare["reference"]
        self.primary: dict[Key, list[Term]] = {}
        self.lacking: dict[Key, bool] = {}
        self.tests: dict[Key, int] = {}
        self.shared = self._shared([each["cell"] for each in document["cells"] if each["cell"]["kind"] == "trained"])
        self._kept: dict[int, dict[str, dict[str, tuple[float, float]]]] = {}
        self._values: dict[tuple[int, str], float] = {}

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
            scores, tasks, seen = cell["scores"] or {"task": [], "id": []}, {}, {}  # none if it diverged
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
        if self.metric.startswith("nll"):
            return scores["nll"][index], float(scores["num_answer_tokens"][index])
        if scores["loglikelihoods"][index] is None:
            return None
        return float(scores[self.metric][index]), 1.0

    def value(self, cell: Mapping[str, Any], only: str = "") -> float:
        """The metric of a run, of all tasks or one; the worst score if it diverged."""
        if "diverged" in cell["result"]:
            return math.log(cell["result"]["num_vocabulary"]) if self.metric.startswith("nll") else 0.0
        which = (id(cell), only)
        if which not in self._values:
            self._values[which] = self._mean(cell, only)
        return self._values[which]

    def _mean(self, cell: Mapping[str, Any], only: str) -> float:
        tasks = [np.array(list(each.values())) for name, each in self.examples(cell).items() if only in ("", name)]
        if self.weighting == "tokens":
            return float(np.concatenate(tasks)[:, 0].sum() / np.concatenate(tasks)[:, 1].sum())
        return float(np.mean([each[:, 0].sum() / each[:, 1].sum() for each in tasks]))

    def comparisons(self) -> dict[Key, Numbers]:
        """(name, labels, arm) -> numbers of every comparison."""
        asked = self.compare.get("primary") or {}
        contrasts: dict[Key, list[Term]] = {}
        families: dict[Key, str] = {}
        for name, entry in asked.items():
            arms = [arm.with_seeds(list(map(str, entry["seeds"]))) if entry.get("seeds") else arm for arm in self.arms]
            terms = self._terms(entry, pairs_of(arms, entry.get("reference") or self.reference))
            if terms and shared_seeds(terms):
                key = (name, *("" for _ in self.axes), terms[0][1].name)
                contrasts[key] = self.primary[key] = terms
                self.lacking[key] = self._lacks_any(entry, terms)
                families[key] = entry.get("family") or "primary"
        for arm, other in pairs_of(self.arms, self.reference):
            key = (f"{arm.name} against {other.name}", *(arm.context.get(axis, "") for axis in self.axes), arm.name)
            if shared_seeds([(1.0, arm, other)]):
                contrasts[key] = [(1.0, arm, other)]
                self.primary |= {} if asked else {key: contrasts[key]}
        alpha, tests = self.compare["alpha"], dict.fromkeys(contrasts, 1)
        for key in self.primary if self.is_metric else ():
            named = [each.get("family") or "primary" for each in asked.values()]
            tests[key] = named.count(families[key]) if asked else max(len(self.primary), self._num_pairs())
        self.tests = tests
        found = {key: self._numbers(terms, alpha / tests[key]) for key, terms in contrasts.items()}
        for family in set(families.values()) or {""} if self.is_metric else ():
            keys = [key for key in self.primary if families.get(key, "") == family]
            larger = [np.nanmax([found[key]["p_seeds"], found[key]["p_examples"]]) for key in keys]
            equivalent = [found[key]["p_equivalent"] for key in keys]
            number = tests[keys[0]] if keys else 1
            for key, p, p_equivalent in zip(keys, holm(larger, number), holm(equivalent, number), strict=True):
                found[key] |= {"p_holm": p, "p_equivalent_holm": p_equivalent}
        return found

    def tasks(self) -> dict[Key, Numbers]:
        """(name, labels, arm, task) -> numbers of a primary comparison on one task, after `comparisons`."""
        found, of_metric = {}, self if self.is_metric else KeptStudy(self.document)
        for key, terms in self.primary.items():
            seeds = sorted(shared_seeds(terms), key=lambda seed: seed not in self.first)
            weights: dict[str, float] = {}
            for cell in (terms[0][1].cells[seed] for seed in seeds):
                sums = {task: sum(w for _, w in each.values()) for task, each in of_metric.examples(cell).items()}
                for task, each in sums.items():
                    weights[task] = weights.get(task, 0.0) + each / sum(sums.values()) / len(seeds)
            cells = [arm.cells[seed] for _, *pair in terms for arm in pair for seed in seeds]
            scored = [self.examples(cell) for cell in cells if "diverged" not in cell["result"]]
            for task in (name for name in weights if all(name in each for each in scored)):
                mean, half, *_ = t_interval(self._improvements(terms, seeds, task), self.num_first(seeds))
                numbers = {"improvement": mean, "lower": mean - half, "upper": mean + half}
                found[*key, task] = numbers | {"weight": weights[task]}
        return found

    def _improvements(self, terms: Sequence[Term], seeds: Sequence[str], task: str = "") -> list[float]:
        sign = -1.0 if self.metric.startswith("nll") else 1.0
        parts = [(sign * s * f, arm) for f, *pair in terms for s, arm in zip((1.0, -1.0), pair, strict=True)]
        return [sum(factor * self.value(arm.cells[seed], task) for factor, arm in parts) for seed in seeds]

    def verdicts(self, found: Mapping[Key, Numbers]) -> dict[Key, str]:
        """What each primary comparison may say, by the numbers of `comparisons`."""
        said = {}
        zone = f"{self.zone:g}"
        for key, terms in self.primary.items():
            arms = [arm for _, *pair in terms for arm in pair]
            may_be = all(arm.is_interior and not arm.num_missing for arm in arms) and not self.lacking.get(key)
            may_be = may_be and len(shared_seeds(terms)) >= self.compare["min_seeds"]
            # Without a diverged run, a task of a single example
            may_be = may_be and (self._has_diverged(terms) or not math.isnan(found[key]["p_examples"]))
            better, equivalent = (may_be and found[key][p] < self.compare["alpha"] for p in COMPARED[6:8])
            winner = terms[0][1 if found[key]["improvement"] > 0 else 2].name
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
        mean, half, stderr, free = t_interval(self._improvements(terms, shared), self.num_first(shared))
        numbers = {"improvement": mean, "lower": mean - half, "upper": mean + half}
        error, degrees = self._over_examples(terms, shared)
        numbers["p_seeds"] = both_tails(mean, stderr, free)
        numbers["p_examples"] = both_tails(mean, error, degrees)
        equivalent = [tail(abs(mean) - self.zone, each, df) for each, df in ((stderr, free), (error, degrees))]
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
        """`spread_over_examples` of a contrast; nan if a run diverged."""
        of_seeds = [
            [(s * f, arm.cells[seed]) for f, *pair in terms for s, arm in zip((1.0, -1.0), pair, strict=True)]
            for seed in seeds
        ]
        if any("diverged" in cell["result"] for cells in of_seeds for _, cell in cells):
            return math.nan, math.nan
        return self.spread_over_examples(of_seeds)

    def spread_over_examples(self, of_seeds: Sequence[Sequence[tuple[float, Any]]]) -> tuple[float, float]:
        """Standard error over the examples alone, stratified by task, and Satterthwaite's degrees of freedom.

        Of each seed: (factor, cell) of the cells whose sum is told.
        """
        parts: dict[str, dict[str, float]] = {}
        for cells in of_seeds:
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
                for name, value in zip(own, (sums[task] - ratio * weights[task]) / scale / len(of_seeds), strict=True):
                    known[name] = known.get(name, 0.0) + float(value)
        strata = [(len(known), len(known) * np.var(list(known.values()), ddof=1)) for known in parts.values()]
        variance = sum(part for _, part in strata)
        squares = sum(part**2 / (number - 1) for number, part in strata)
        return math.sqrt(variance), variance**2 / squares if squares else math.inf

    def damage(self) -> dict[Key, Numbers]:
        """(labels, arm) -> the columns of repair.csv: of trained arms, and of bases that are only evaluated."""
        found = {}
        for arm in self.arms:
            key = (*(arm.context.get(axis, "") for axis in self.axes), arm.name)
            backs = [each for each in self.set_back if (each.name, each.context) == (arm.name, arm.context)]
            lost = self._losses(backs[0], arm) if backs else {}
            numbers = ends("magnitudes", list(lost.values()), self.num_first(lost)) if lost else {}
            numbers |= self._left(arm)
            if numbers:
                found[key] = numbers
        right = KeptStudy(self.document, "acc_norm")
        bases = [each for each in self.document["cells"] if each["cell"]["kind"] == "base" and each["scores"]]
        scored = {each["cell"]["key"]: each for each in bases}
        for each in bases:
            labels, dense = each["cell"]["labels"], scored.get(each["cell"]["dense_key"])
            if dense is None or dense is each or not right.examples(each):
                continue
            signed = [(1.0, dense), (-1.0, each)]
            error, free = right.spread_over_examples([signed])
            half = -solved(lambda t, free=free: student(t, free) - 0.025, -1e4, 0.0) * error
            mean = sum(sign * right.value(cell) for sign, cell in signed)
            key = (*(labels.get(axis, "") for axis in self.axes), labels.get(self.arm_axis, "no adapter"))
            found[key] = {
                "damage_choice": mean,
                "damage_choice_lower": mean - half,
                "damage_choice_upper": mean + half,
            }
        return found

    def _left(self, arm: Arm) -> Numbers:
        """What is left, and what was repaired, seed by seed; nan where it is not known.

        Left: the metric less that of the same arm trained on the uncompressed base. The transplant is that arm on the
        compressed base.
        """
        of_base = {axis for axis, values in self.study["product"].items() if changes_base(axis, values)}
        like = (self.study.get("rates") or {}).get("like", {}).get(self.arm_axis, {})
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
            return {}
        lost = self._losses(arm, twins[0])
        if not lost:
            return {}
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
        return numbers | share(*pairs, self.num_first(shared))

    def _losses(self, arm: Arm, other: Arm) -> dict[str, float]:
        """Seed -> how much worse one arm is than another; later seeds come last."""
        sign = 1.0 if self.metric.startswith("nll") else -1.0
        shared = sorted((seed for seed in arm.cells if seed in other.cells), key=lambda seed: seed not in self.first)
        return {seed: sign * (self.value(arm.cells[seed]) - self.value(other.cells[seed])) for seed in shared}


def pairs_of(arms: Sequence[Arm], reference: str) -> list[tuple[Arm, Arm]]:
    """Every arm beside the reference of its context."""
    return [
        (arm, other)
        for arm in arms
        for other in arms
        if arm.name != reference == other.name and arm.context == other.context
    ]


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


# What the pages say of benchmarks/results/study

SECTION, NEXT_SECTION = "## Compressed bases: LoRA against DoRA", "## A study recomputed"
TITLES = {
    "nll_per_token": "NLL, nats per token",
    "nll_by_task": "NLL, each task counting once",
    "acc": "accuracy, points",
    "acc_norm": "accuracy by likelihood per character, points",
}
PRUNED = ("Wanda 50 %", "Wanda 2:4", "nf4, Wanda 2:4")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
Row = tuple[str, list[float]]


def check_pages(tally: Tally, document: Mapping[str, Any]) -> None:
    """Compare every number of the tables of benchmarks/README.md and of README.md's row; the text around has none."""
    said = Pages(document)
    page = (HERE / "README.md").read_text(encoding="utf-8")
    section = page.partition(SECTION)[2].partition(NEXT_SECTION)[0]
    for name, (rows, note) in said.tables().items():
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
            said.check(tally, f"{name}: {label}", text, own)
        said.check(tally, f"{name}: note", " ".join(each for each in block.splitlines() if each[:1] != "|"), note)
    if "<!-- table" in section:
        raise SystemExit("benchmarks/README.md: a table of the study is not recomputed")
    said.check(
        tally, "benchmarks/README.md, text", re.sub(r"```.*?```|\(http\S*|arXiv \S*", "", section, flags=re.S), []
    )
    (row,) = [
        line for line in (HERE.parent / "README.md").read_text().splitlines() if line.startswith("| LoRA or DoRA?")
    ]
    said.check(tally, "README.md", row, said.headline())


class Pages:
    """The numbers of the pages, in their order and units, from the scores."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.studies = {measure: KeptStudy(document, measure) for measure in MEASURES}
        self.cells = [each for each in document["cells"] if each["result"] is not None]
        self.nll = self.studies["nll_per_token"]
        self.compared = {measure: study.comparisons() for measure, study in self.studies.items()}
        self.repair = self.nll.damage()
        self.keys = list(self.nll.primary)
        product = self.nll.study["product"]
        self.adapters = list(dict.fromkeys(arm.name for arm in self.nll.arms))
        zeros = [f"{share} %" for share in (30, 50, 70)]
        self.labels = [label for axis in product.values() for label in axis] + [key[0] for key in self.keys]
        self.labels += [*zeros, "2:4", "4-bit", *(f"{name}:" for name in self.labels)]

    def check(self, tally: Tally, where: str, text: str, own: Sequence[float]) -> None:
        """Compare the numbers of a text, without those in labels of the study, as far as they are rounded."""
        for label in sorted(self.labels, key=len, reverse=True):
            text = text.replace(label, " ")
        found = NUMBER.findall(text)
        if len(found) != len(own):
            tally.fault(f"{where} has the numbers {found}, recomputed {list(own)}")
            return
        for number, value in zip(found, own, strict=True):
            mantissa, _, exponent = number.replace(",", "").partition("e")
            rounded = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
            tally.add(where, float(number.replace(",", "")), value, 1.0001 * rounded)

    def tables(self) -> dict[str, tuple[list[Row], list[float]]]:
        """Name of a table -> its rows, and the numbers of the note below it."""
        return {
            "study_primary": (self.primary(), self.answers()),
            "study_units": (self.units(), []),
            "study_tasks": (self.tasks(), []),
            "study": (self.contexts(), [95.0]),
            "study_controls": (self.controls(), []),
            "study_transplants": self.transplants(),
            "study_checkpoints": (self.checkpoints(), []),
            "study_changes": (self.changes(), [1.0, 95.0, 0.0]),
            "study_students": (students(), []),
        }

    def scaled(self, measure: str, numbers: Numbers) -> list[float]:
        """Improvement and interval: nats, or points of accuracy."""
        return [(1 if measure[:3] == "nll" else 100) * numbers[name] for name in ("improvement", "lower", "upper")]

    def primary(self) -> list[Row]:
        rows = []
        for key, measure in itertools.product(self.keys, MEASURES):
            numbers, zone = self.compared[measure][key], self.studies[measure].zone
            p = numbers["p_equivalent_holm" if measure == "nll_per_token" else "p_equivalent"]
            rows.append((key[0], [*self.scaled(measure, numbers), zone if measure[:3] == "nll" else 100 * zone, p]))
        return rows

    def answers(self) -> list[float]:
        found, verdicts = [], self.nll.verdicts(self.compared["nll_per_token"])
        for key in self.keys:
            numbers, zone, verdict = self.compared["nll_per_token"][key], self.nll.zone, verdicts[key]
            gain, lower, upper = self.scaled("nll_per_token", numbers)
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

        def sizes(base: str) -> tuple[float, float]:
            cell = self.arm("trained", base, "LoRA")["0"]
            return bits_and_zeros(cell)

        def left(base: str) -> float:
            return self.repair[base, "128 steps", "LoRA"]["left"]

        bits, zeros = sizes("nf4")[0] - sizes("nf3")[0], sizes("Wanda 50 %")[1] - sizes("Wanda 30 %")[1]
        return [(left("nf3") - left("nf4")) / bits, (left("Wanda 50 %") - left("Wanda 30 %")) / (100 * zeros)]

    def units(self) -> list[Row]:
        gain, _, upper = self.scaled("nll_per_token", self.compared["nll_per_token"][self.keys[0]])
        names = ("bit per weight", "percentage point of zeros")
        return [
            (name, [worth, gain / worth, upper / worth, self.nll.zone / worth])
            for name, worth in zip(names, self.worths(), strict=True)
        ]

    def tasks(self) -> list[Row]:
        key = self.keys[0]
        measures = ("nll_per_token", "acc", "acc_norm")
        found = {measure: self.studies[measure].tasks() for measure in measures}
        rows = []
        for *start, task in found["acc"]:
            if tuple(start) == key:
                numbers = [100 * found["acc"][*key, task]["weight"]]
                for measure in measures:
                    numbers += self.scaled(measure, found[measure][*key, task])
                rows.append((task, numbers))
        return rows

    def contexts(self) -> list[Row]:
        rows = []
        for context in dict.fromkeys((arm.context["base"], arm.context["length"]) for arm in self.nll.arms):
            own = [arm for arm in self.nll.arms if (arm.context["base"], arm.context["length"]) == context]
            bits, zeros = bits_and_zeros(next(iter(own[0].cells.values())))
            numbers = [bits, 100 * zeros]
            damage = self.repair.get((context[0], "", "no adapter"), {})
            numbers += [100 * value for value in damage.values()]
            of_arms = {name: self.repair.get((*context, name), {}) for name in self.adapters}
            for name in self.adapters:
                numbers += [of_arms[name][f"left{end}"] for end in ("", "_lower", "_upper") if "left" in of_arms[name]]
            share = [of_arms["LoRA"].get(f"repaired_share{end}", math.nan) for end in ("", "_lower", "_upper")]
            numbers += [value for value in share if not math.isnan(value)]
            for name in self.adapters[1:]:
                key = (f"{name} against LoRA", *context, name)
                if key in self.compared["nll_per_token"]:
                    numbers += self.scaled("nll_per_token", self.compared["nll_per_token"][key])
            rows.append((", ".join(context), numbers))
        return rows

    def arm(self, kind: str, base: str, adapter: str) -> dict[str, Mapping[str, Any]]:
        """Seed -> cell, of 128 steps."""
        wanted = {"base": base, "adapter": adapter, "length": "128 steps"}.items()
        cells = [each for each in self.cells if each["cell"]["kind"] == kind]
        return {each["cell"]["labels"]["seed"]: each for each in cells if wanted <= each["cell"]["labels"].items()}

    def lower_by(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
        """By how much the NLL of the first arm is lower than that of the other, of each seed that both have."""
        seeds = sorted(one.keys() & other.keys(), key=int)
        return [self.nll.value(other[seed]) - self.nll.value(one[seed]) for seed in seeds]

    def controls(self) -> list[Row]:
        """Better arm, worse arm."""

        def trained(base: str, adapter: str = "LoRA") -> dict[str, Mapping[str, Any]]:
            return self.arm("trained", base, adapter)

        pairs = {"LoRA with LoftQ's start, LoRA; nf3": (trained("nf3", "LoRA, LoftQ"), trained("nf3"))}
        for base in ("nf3", "Wanda 2:4"):
            name = f"DoRA, magnitudes trained 100 times as fast; {base}"
            pairs[name] = trained(base, "DoRA"), trained(base, "DoRA, magnitudes 100 times")
        for size in ("50 %", "70 %", "2:4"):
            pairs[f"SparseGPT, Wanda; LoRA, {size}"] = trained(f"SparseGPT {size}"), trained(f"Wanda {size}")
        pairs["DoRA, LoRA; Wanda 2:4"] = trained("Wanda 2:4", "DoRA"), trained("Wanda 2:4")
        for base in ("16 bits", "nf3", "Wanda 2:4"):
            name = f"DoRA with its magnitudes set back, DoRA; {base}"
            pairs[name] = self.arm("set_back", base, "DoRA"), trained(base, "DoRA")
        found = {name: self.lower_by(*pair) for name, pair in pairs.items()}
        return [(name, [len(values), *three(values, 3)]) for name, values in found.items()]

    def transplants(self) -> tuple[list[Row], list[float]]:
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
                    numbers += three([values[seed] - home[seed] for seed in seeds], 3)
                more = [moved["DoRA"][seed] - moved["LoRA"][seed] for seed in seeds]
                numbers += three(more, 3)
                plain += [more] if base in PRUNED else []
                mended = self.values("rescaled", base, "DoRA")
                if seeds[0] in mended:
                    rescaled.append([mended[seed] - moved["LoRA"][seed] for seed in seeds])
                    numbers += three(rescaled[-1], 3)
                rows.append((f"{base}, {told}", numbers))
            means = [np.mean(each, axis=0) for each in (plain, rescaled) if each]
            rows.append((f"mean of the pruned bases, {told}", [end for each in means for end in three(each, 3)]))
            note += [float(seeds[0]), float(seeds[-1]), float(np.sum(np.array(plain) > 0)), float(np.size(plain))]
            note += [100 * (1 - np.sum(means[1]) / np.sum(means[0]))] if rescaled else []
        return rows, note

    def values(self, kind: str, base: str, adapter: str) -> dict[str, float]:
        """Seed -> NLL, of 128 steps."""
        return {seed: self.nll.value(cell) for seed, cell in self.arm(kind, base, adapter).items()}

    def checkpoints(self) -> list[Row]:
        """Losses at the checkpoints, and Pearson's correlations of the changes of length and direction."""
        rows = []
        for arm, paper in (("full", -0.62), ("LoRA", 0.83), ("DoRA", -0.31)):
            runs = [cell["result"].get("checkpoints", []) for cell in self.arm("by_layer", "16 bits", arm).values()]
            runs = [run for run in runs if run]
            numbers = []
            for losses in np.array([[checkpoint["nll"] for checkpoint in run] for run in runs]).T:
                numbers += [losses.mean(), losses.std(ddof=1)]
            for ending in ("q_proj", ""):
                found = []
                for run in runs:
                    changes = [
                        each for point in run for path, each in point["changes"].items() if path.endswith(ending)
                    ]
                    points = np.array([[each["length"], each["direction"]] for each in changes])
                    found.append(np.corrcoef(points.T)[0, 1])
                numbers += [np.mean(found), min(found), max(found)]
            rows.append((arm, [*map(float, numbers), paper]))
        return rows

    def changes(self) -> list[Row]:
        rows = []
        for base, adapter in itertools.product(("16 bits", "nf3", "Wanda 2:4"), ("LoRA", "DoRA")):
            cells = self.arm("by_layer", base, adapter)
            cells = {seed: cell for seed, cell in cells.items() if "changes" in cell["result"]}
            layers = [each for cell in cells.values() for each in cell["result"]["changes"].values()]

            def mean(name: str, layers: Sequence[Mapping[str, float]] = layers) -> list[float]:
                known = [each[name] for each in layers if name in each]
                return [float(np.mean(known))] if known else []

            numbers = [len(cells), *mean("direction"), 100 * mean("magnitude")[0]]
            numbers += [100 * each for name in ("error_undone", "error_undone_best") for each in mean(name)]
            numbers += mean("error_cosine")
            back = self.repair.get((base, "128 steps", adapter), {})
            numbers += [back[f"magnitudes{end}"] for end in ("", "_lower", "_upper") if "magnitudes" in back]
            rows.append((f"{base}, {adapter}", numbers))
        return rows

    def headline(self) -> list[float]:
        gain, points = (
            self.scaled(measure, self.compared[measure][self.keys[0]]) for measure in ("nll_per_token", "acc")
        )
        bit, zero = (gain[2] / worth for worth in self.worths())
        return [gain[0], 95.0, *gain[1:], self.nll.zone, bit, zero, *points]


def students() -> list[Row]:
    """Accuracies in percent with standard errors, as far as they are known, and the differences."""
    read = {name: json.loads((HERE / f"results/{name}.json").read_text()) for name in ("student_rerun", "real_data")}
    theirs = read["student_rerun"]["accuracy"]
    own = {arm["kind"]: arm["test"]["adapter"] for arm in read["real_data"]["arms"]}
    rows = []
    for task in theirs["lora"]:
        pair, ours = [theirs[kind][task] for kind in ("lora", "dora")], [own[kind][task] for kind in ("lora", "dora")]
        numbers = [*pair, pair[1] - pair[0]]
        numbers += [100 * each[name] for each in ours for name in ("acc", "acc_stderr")]
        rows.append((task, [*numbers, 100 * (ours[1]["acc"] - ours[0]["acc"]), 100 * ours[0]["chance"]]))
    return rows


def three(values: Sequence[float], num_first: int) -> list[float]:
    """Mean and the ends of its t interval."""
    mean, half, *_ = t_interval(values, num_first)
    return [mean, mean - half, mean + half]


def bits_and_zeros(cell: Mapping[str, Any]) -> tuple[float, float]:
    """Bits per weight, and the share of zeros, of the linear layers of a cell."""
    size, compression = cell["result"]["size"], cell["result"]["compression"] or {}
    return 8 * size["num_linear_bytes"] / size["num_linear_weights"], compression.get("sparsity", 0.0)


if __name__ == "__main__":
    main()
