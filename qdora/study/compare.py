"""Compares the arms of a study on the seeds that they share, and says what is better, equivalent, or not decided.

An arm is one value of the compared axis in one context (such as a base): its cells over all seeds, at the learning
rate that was found for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qdora.evaluate.intervals import Interval, Spread, example_interval, example_spread
from qdora.study import statistics
from qdora.study.cells import Kind, axes_of
from qdora.study.grid import (
    RATE,
    SEED,
    CompareConfig,
    PrimaryConfig,
    Study,
    as_list,
    combinations,
    first_seeds,
    has_labels,
    in_words,
    label_of,
    labels_of,
)
from qdora.study.results import HIGHER_IS_BETTER, Results, combined

ZONE_OF_SHARES = 0.01
"""Zone of accuracies where the metric is an NLL."""

BASE_ARM = "no adapter"

KINDS: tuple[Kind, ...] = ("base", "trained", "transplant", "rescaled", "set_back")
Records = Sequence[Mapping[str, Any]]
"""Of `Cell.record`."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """rate: label of the learning rate that a search found, or "". seeds: seed -> key of a finished cell; of a base "".

    num_missing: its cells without a result, of the `first_seeds`.
    """

    context: dict[str, str]
    name: str
    kind: Kind
    rate: str = ""
    is_interior: bool | None = None
    seeds: dict[str, str]
    num_missing: int = 0
    base_key: str | None = None
    dense_key: str | None = None


def find_arms(cells: Records, results: Results) -> list[Arm]:
    """Arms with a result, in the order of the grid, bases first."""
    axis, searched = results.study.compare.arm, results.study.rates is not None
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in (cell for cell in cells if cell["kind"] in KINDS):
        left_out = {axis, SEED, *([RATE] if searched else [])}
        context = tuple((name, text) for name, text in cell["labels"].items() if name not in left_out)
        # Without an axis of bases, the uncompressed base has the labels of the recipe's own
        base = cell["key"] if cell["kind"] == "base" else None
        groups.setdefault((cell["kind"], context, cell["labels"].get(axis, BASE_ARM), base), []).append(cell)
    arms = []
    for (kind, context, name, _), own in groups.items():
        first, seeds = own[0], {cell["labels"].get(SEED, ""): cell["key"] for cell in own}
        done = {seed: key for seed, key in seeds.items() if results.result(key)}
        kept = {name: first[name] for name in ("is_interior", "base_key", "dense_key")}
        kept["rate"] = first["labels"].get(RATE, "") if searched else ""
        kept["num_missing"] = sum(seed not in done for seed in first_seeds(results.study, seeds))
        if done:
            arms.append(Arm(context=dict(context), name=name, kind=kind, seeds=done, **kept))
    return sorted(arms, key=lambda arm: KINDS.index(arm.kind))


Term = tuple[float, Arm]
"""Factor of an arm in a sum; an arm is followed by its reference, with the negative factor."""


def seed_improvements(
    terms: Sequence[Term], results: Results, measure: str, task: str | None = None
) -> dict[str, float]:
    """Seed that all arms have, first ones first -> sum of the terms, positive: better; {} if one is not measured."""
    shared = [seed for seed in terms[0][1].seeds if all(seed in arm.seeds for _, arm in terms)]
    shared.sort(key=lambda seed: int(seed) not in results.study.seeds)
    sign = 1.0 if HIGHER_IS_BETTER[measure] else -1.0
    found = {
        seed: sign * sum(factor * results.mean(arm.seeds[seed], measure, task=task) for factor, arm in terms)
        for seed in shared
    }
    return {} if any(map(math.isnan, found.values())) else found


def improvement_interval(by_seed: Mapping[str, float], study: Study) -> Interval:
    """Student's t interval over the seeds of `seed_improvements`."""
    return statistics.t_interval(list(by_seed.values()), num_first=len(first_seeds(study, by_seed)))


@dataclass(frozen=True)
class NamedComparison:
    """A contrast; family "": exploratory; num_tests: of its family in the whole study; lacking: contexts that it is
    about and that are not in its terms."""

    name: str
    context: dict[str, str]
    family: str
    num_tests: int
    terms: list[Term]
    lacking: list[str]

    @property
    def arms(self) -> list[Arm]:
        return list({id(arm): arm for _, arm in self.terms}.values())

    def columns(self) -> dict[str, Any]:
        (_, arm), (_, other), *_ = self.terms
        return {"comparison": self.name, **self.context, "arm": arm.name, "reference": other.name}


def planned_arms(study: Study) -> list[Arm]:
    """The arms that the study file trains; their seeds have no cells yet."""
    seeds_of: dict[tuple[str, ...], dict[str, str]] = {}
    for stage, labels, seeds in combinations(study):
        if stage.kind == "train":
            seeds_of.setdefault(tuple(labels.values()), {}).update(dict.fromkeys(map(str, seeds), ""))
    arms = []
    for texts, own in seeds_of.items():
        context = dict(zip(study.product, texts, strict=True))
        arms.append(Arm(name=context.pop(study.compare.arm), context=context, kind="trained", seeds=own))
    return arms


def named_comparisons(arms: Sequence[Arm], study: Study) -> list[NamedComparison]:
    """The primary comparisons, then every trained arm beside the reference of its context.

    Then, with `compare.also`, beside the same arm at the first value of these axes. Without `compare.primary` all these
    are the primary ones.
    """
    compare, planned, found = study.compare, planned_arms(study), []
    primary = compare.primary or {}
    for name, asked in primary.items():
        known = [_with_seeds(arm, list(map(str, asked.seeds))) for arm in arms] if asked.seeds else arms
        terms, at_end = (
            _terms(asked, _pairs(each, asked.reference or compare.reference)) for each in (known, planned)
        )
        if terms:
            number = sum(each.family == asked.family for each in primary.values())
            found.append(NamedComparison(name, {}, asked.family, number, terms, _lacking(asked, terms, at_end)))
    family, number = ("", 0) if primary else ("primary", len(_all_pairs(planned, study)))
    for arm, other in _all_pairs(arms, study):
        name = f"{arm.name} against {other.name}"
        found.append(NamedComparison(name, arm.context, family, number, [(1.0, arm), (-1.0, other)], []))
    return found


def _all_pairs(arms: Sequence[Arm], study: Study) -> list[tuple[Arm, Arm]]:
    compare = study.compare
    pairs = _pairs(arms, compare.reference)
    for axis in compare.also:
        turned = []
        for arm in (arm for arm in arms if axis in arm.context):
            context = {name: label for name, label in arm.context.items() if name != axis} | {
                compare.arm: arm.name
            }
            turned.append(replace(arm, name=arm.context[axis], context=context))
        pairs += _pairs(turned, labels_of(study.product[axis])[0])
    return pairs


def _with_seeds(arm: Arm, seeds: Sequence[str]) -> Arm:
    found = {seed: arm.seeds[seed] for seed in seeds if seed in arm.seeds}
    return replace(arm, seeds=found, num_missing=len(seeds) - len(found))


def _pairs(arms: Sequence[Arm], reference: str | None) -> list[tuple[Arm, Arm]]:
    trained = [arm for arm in arms if arm.kind == "trained"]
    return [
        (arm, other)
        for arm, other in itertools.product(trained, trained)
        if other.name == reference != arm.name and arm.context == other.context
    ]


def _terms(asked: PrimaryConfig, pairs: Sequence[tuple[Arm, Arm]]) -> list[Term]:
    """Averages of the pairs that a primary comparison asks for; empty as long as one of its parts has none."""
    terms: list[Term] = []
    for sign, entry in ((1.0, asked.over), *([] if asked.minus is None else [(-1.0, asked.minus)])):
        named = [
            pair for pair in pairs if asked.arm in (None, pair[0].name) and has_labels(pair[0].context, entry)
        ]
        if len({arm.name for arm, _ in named}) != 1:
            return []
        for arm, other in named:
            terms += [(sign / len(named), arm), (-sign / len(named), other)]
    return terms


def _lacking(asked: PrimaryConfig, terms: Sequence[Term], at_end: Sequence[Term]) -> list[str]:
    """The contexts that a primary comparison is about, by the study file, and that its terms do not have."""
    there = [arm.context for _, arm in terms]
    wanted = [arm.context for _, arm in at_end]
    for axis, value in itertools.chain(asked.over.items(), (asked.minus or {}).items()):
        wanted += [{axis: label_of(each)} for each in as_list(value)]
    lacking = [each for each in wanted if not any(each.items() <= context.items() for context in there)]
    return list(dict.fromkeys(map(in_words, lacking)))


def comparisons(arms: Sequence[Arm], results: Results, measures: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each comparison and measure, judged (`_judge`). A positive improvement is better.

    Only those of the first measure, the study's metric, are primary.
    """
    rows, families = [], dict[str, list[dict[str, Any]]]()
    for each, measure in itertools.product(named_comparisons(arms, results.study), measures):
        if by_seed := seed_improvements(each.terms, results, measure):
            is_primary = bool(each.family) and measure == measures[0]
            rows.append(_row(each, results, measure, by_seed, is_primary=is_primary))
            if is_primary:
                families.setdefault(each.family, []).append(rows[-1])
    for family in families.values():
        _judge(family, results.study.compare)
    return rows


def _row(
    each: NamedComparison, results: Results, measure: str, by_seed: Mapping[str, float], *, is_primary: bool
) -> dict[str, Any]:
    study, compare, num_seeds = results.study, results.study.compare, len(by_seed)
    interval, num_first = improvement_interval(by_seed, study), len(first_seeds(study, by_seed))
    differences = [  # of each seed the sum of the terms, example by example; runs that diverged have none
        combined([(factor, results.scores(arm.seeds[seed])[measure]) for factor, arm in each.terms])
        for seed in by_seed
        if not any(results.diverged(arm.seeds[seed]) for arm in each.arms)
    ]
    of_seeds = statistics.seed_spread(list(by_seed.values()), num_first)
    of_examples = Spread(math.nan, math.nan)
    zone = compare.zone if measure[:3] == compare.metric[:3] else ZONE_OF_SHARES
    missing = sum(arm.num_missing for arm in each.arms)
    at_edge = {
        f"{arm.name} ({in_words(arm.context)})".removesuffix(" ()")
        for arm in each.arms
        if arm.is_interior is False
    }
    against = {
        f"cells without a result: {missing}": missing,
        f"an arm has no result for {' and for '.join(each.lacking)}": each.lacking,
        "the learning rates were not searched": any(arm.is_interior is None for arm in each.arms),
        f"the best learning rate of {', '.join(sorted(at_edge))} is the smallest or largest that was tried": at_edge,
        _too_few(num_seeds, compare): num_seeds < compare.min_seeds,
    }
    reasons = [reason for reason, applies in against.items() if applies]
    # The worst score is no measurement: two runs that diverged are not known to be equivalent. Nor is one seed enough.
    p_equivalent = [math.nan]
    if len(differences) == num_seeds:
        of_examples = example_spread(differences, results.weighting(measure))
        if math.isnan(of_examples.stderr):
            reasons.append("a task has a single example, which tells no spread")
        if num_seeds > 1:
            p_equivalent = [spread.p_equivalent(interval.value, zone) for spread in (of_seeds, of_examples)]
    row = each.columns() | {
        "measure": measure,
        "role": "primary" if is_primary else "exploratory",
        "family": each.family,
        "improvement": interval.value,
        "lower": interval.lower,
        "upper": interval.upper,
        "half_width": of_seeds.half_width,
        "p_seeds": of_seeds.p(interval.value),
        "p_examples": of_examples.p(interval.value),
        # The larger one counts: of seeds, and of examples with the seeds as they are
        "p_equivalent": float(np.fmax.reduce(p_equivalent)),
        "zone": zone,
        "num_seeds": num_seeds,
        "num_missing": missing,
        "num_diverged": sum(results.diverged(arm.seeds[seed]) for arm in each.arms for seed in by_seed),
        "seed_improvements": "; ".join(f"{seed}: {value:.9g}" for seed, value in by_seed.items()),
        "reason": "; ".join(reasons),
        "winner": "",
        "verdict": "exploratory",
    }
    if is_primary:
        row["num_tests"] = each.num_tests
        if compare.spread is not None and num_first > 1:
            row["half_width_planned"] = Spread(compare.spread / math.sqrt(num_seeds), num_first - 1).half_width
    row["smallest_detectable"] = of_seeds.detectable(compare.alpha / row.get("num_tests", 1), compare.power)
    return row


def task_rows(arms: Sequence[Arm], results: Results, measures: Sequence[str]) -> list[dict[str, Any]]:
    """The primary comparisons on each task; `weight`: its share in the study's metric, a mean over the seeds."""
    rows = []
    for each in named_comparisons(arms, results.study):
        seeds = seed_improvements(each.terms, results, measures[0]) if each.family else {}
        weights: dict[str, float] = {}
        for scores in (results.scores(each.terms[0][1].seeds[seed]).get(measures[0], {}) for seed in seeds):
            sums = {task: float(found.weights.sum()) for task, found in scores.items()}
            for task, weight in sums.items():
                weights[task] = weights.get(task, 0.0) + weight / sum(sums.values()) / len(seeds)
        for task, measure in itertools.product(weights, measures):
            if by_seed := seed_improvements(each.terms, results, measure, task):
                interval = improvement_interval(by_seed, results.study)
                row = each.columns() | {"task": task, "weight": weights[task], "measure": measure}
                rows.append(
                    row | {"improvement": interval.value, "lower": interval.lower, "upper": interval.upper}
                )
    return rows


def _too_few(num_seeds: int, compare: CompareConfig) -> str:
    return f"seeds: {num_seeds}, at least {compare.min_seeds} are needed"


def against_all_verdicts(study: Study) -> str:
    """Why no comparison of a study can get a verdict, whatever its results; "" if one can."""
    planned, compare = planned_arms(study), study.compare
    found, num_seeds = named_comparisons(planned, study), max((len(arm.seeds) for arm in planned), default=0)
    reasons = {
        "no arm has a reference to be compared with": not any(each.family for each in found),
        "the learning rates are not searched": study.rates is None,
        _too_few(num_seeds, compare): num_seeds < compare.min_seeds,
    }
    return "; ".join(reason for reason, applies in reasons.items() if applies)


def _judge(rows: Sequence[dict[str, Any]], compare: CompareConfig) -> None:
    """Better: the larger p is below alpha after Holm's correction for the tests of a family. Equivalent: so is the
    larger one of the two one-sided tests that the difference is outside of the zone. Both may hold.

    Comparisons without results are corrected for, too, so a later one takes no verdict back.
    """
    better = np.fmax([row["p_seeds"] for row in rows], [row["p_examples"] for row in rows])
    every = better, np.array([row["p_equivalent"] for row in rows])
    corrected = (statistics.holm(np.nan_to_num(each, nan=1.0), rows[0]["num_tests"]) for each in every)
    for row, p, p_equivalent in zip(rows, *corrected, strict=True):
        row |= {"p_holm": p, "p_equivalent_holm": p_equivalent}
        is_equivalent = not row["reason"] and p_equivalent < compare.alpha
        row["verdict"] = f"no difference above {compare.zone:g}" if is_equivalent else "not decided"
        if not row["reason"] and p < compare.alpha:
            row["winner"] = row["arm"] if row["improvement"] > 0 else row["reference"]
            row["verdict"] = (
                f"{row['winner']} is better{f', by less than {compare.zone:g}' if is_equivalent else ''}"
            )


def quality(arm: Arm, results: Results, measure: str) -> Interval | None:
    """Mean of a measure over the `first_seeds` with its t interval; of a base over its examples; None: not measured.

    With `eval.limit` a seed has examples of its own, so means over different seeds cannot be compared.
    """
    values = [results.mean(arm.seeds[seed], measure) for seed in first_seeds(results.study, arm.seeds)]
    if not values or any(map(math.isnan, values)):
        return None
    if arm.kind != "base":
        return statistics.t_interval(values)
    (key,) = arm.seeds.values()
    return example_interval(results.scores(key)[measure], results.weighting(measure))


def repair_row(arm: Arm, arms: Sequence[Arm], results: Results) -> dict[str, float]:
    """What is left of the damage, how much a transplant has, what was repaired, and what magnitudes set back lose.

    In the metric's units, positive: worse. `repaired_share`: of the transplant's damage, if that is significant.
    """
    study, row = results.study, dict[str, float]()
    same = {other.kind: other for other in arms if (other.name, other.context) == (arm.name, arm.context)}
    twin = dense_twin(arm, arms, study)
    if arm.kind != "trained":
        return row

    def add(name: str, own: Arm | None, other: Arm | None) -> dict[str, float]:
        """How much better `own` is."""
        found = (
            seed_improvements([(1.0, own), (-1.0, other)], results, study.compare.metric)
            if own and other
            else {}
        )
        if found:
            row.update(improvement_interval(found, study).columns(name))
        return found

    add("magnitudes", arm, same.get("set_back"))
    is_measured = twin and not any(
        results.diverged(key) for seed, key in twin.seeds.items() if seed in arm.seeds
    )
    if not is_measured or arm.base_key == arm.dense_key:
        return row
    add("left", twin, arm)
    damage, repaired = (
        add("transplant", twin, same.get("transplant")),
        add("repaired", arm, same.get("transplant")),
    )
    if row.get("transplant_lower", 0.0) > 0:
        shared = [seed for seed in damage if seed in repaired]
        above, below = ([values[seed] for seed in shared] for values in (repaired, damage))
        share = statistics.ratio_interval(above, below, num_first=len(first_seeds(study, shared)))
        row |= share.columns("repaired_share")
    return row


def dense_twin(arm: Arm, arms: Sequence[Arm], study: Study) -> Arm | None:
    based = axes_of(study, "base.")

    def rest(one: Arm) -> dict[str, str]:
        return {axis: label for axis, label in one.context.items() if axis not in based}

    like = {} if study.rates is None else study.rates.like.get(study.compare.arm, {})
    dense = [each for each in arms if each.kind == "trained" and each.base_key == each.dense_key]
    of_name = {each.name: each for each in dense if rest(each) == rest(arm)}
    return of_name.get(arm.name) or of_name.get(like.get(arm.name, ""))


def damage_row(arm: Arm, results: Results) -> dict[str, float]:
    """What compression did to a base. `damage_choice`: acc_norm of the uncompressed base less that of this one."""
    if arm.kind != "base":
        return {}
    (key,) = arm.seeds.values()
    dense = arm.dense_key
    if dense in (None, key) or quality(arm, results, "acc_norm") is None or not results.result(dense):
        return {}
    lost = combined([(1.0, results.scores(dense)["acc_norm"]), (-1.0, results.scores(key)["acc_norm"])])
    return example_interval(lost, "equal").columns("damage_choice")
