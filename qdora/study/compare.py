"""Compares the arms of a study on the seeds that they share, and says what is better, equivalent, or not decided.

An arm is one value of the axis that is compared (such as LoRA or DoRA) in one context (such as a base): its cells over
all seeds, at the learning rate that was found for it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qdora.evaluate.intervals import (
    Interval,
    SeedScores,
    Spread,
    example_interval,
    example_spread,
)
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
    num_first_seeds,
)
from qdora.study.results import (
    HIGHER_IS_BETTER,
    Results,
    combined,
)

ZONE_OF_SHARES = 0.01
"""Accuracies that differ by less than a point are equivalent, where the metric is an NLL."""

BASE_ARM = "no adapter"
"""Name of the arm of a base that the grid did not name."""

Records = Sequence[Mapping[str, Any]]
"""Cells as `Cell.record` gives them."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One value of the compared axis in one context: the labels of the axes that are neither compared nor the seed.

    rate: label of the learning rate that a search found, or "". seeds: seed -> key of a finished cell; a base has one,
    whose seed is "". num_missing: its cells without a result, of the seeds that tell the spread (`first_seeds`).
    """

    context: dict[str, str]
    name: str
    kind: Kind
    rate: str
    is_interior: bool | None
    seeds: dict[str, str]
    num_missing: int
    base_key: str | None
    dense_key: str | None


def find_arms(cells: Records, results: Results, *, as_planned: bool = False) -> list[Arm]:
    """Arms with a result, or `as_planned` all as if every cell were done; in the order of the grid, bases first."""
    compare = results.study.compare
    groups: dict[tuple[str, tuple[tuple[str, str], ...], str, str | None], list[Mapping[str, Any]]] = {}
    searched = results.study.rates is not None
    left_out = {compare.arm, SEED, *([RATE] if searched else [])}
    for cell in cells:
        if cell["kind"] in ("rate", "by_layer"):
            continue
        context = tuple((axis, text) for axis, text in cell["labels"].items() if axis not in left_out)
        name = cell["labels"].get(compare.arm, BASE_ARM)
        # Without an axis of bases, the uncompressed base has the labels of the recipe's own
        base = cell["key"] if cell["kind"] == "base" else None
        groups.setdefault((cell["kind"], context, name, base), []).append(cell)
    arms = []
    for (_, context, name, _), members in groups.items():
        seeds = {cell["labels"].get(SEED, ""): cell["key"] for cell in members}
        done = {seed: key for seed, key in seeds.items() if as_planned or results.result(key) is not None}
        if done:
            first = members[0]
            arms.append(
                Arm(
                    context=dict(context),
                    name=name,
                    kind=first["kind"],
                    rate=first["labels"].get(RATE, "") if searched else "",
                    is_interior=first["is_interior"],
                    seeds=done,
                    num_missing=sum(seed not in done for seed in first_seeds(results.study, seeds)),
                    base_key=first["base_key"],
                    dense_key=first["dense_key"],
                )
            )
    order = {"base": 0, "trained": 1, "transplant": 2, "rescaled": 3, "set_back": 4}
    return sorted(arms, key=lambda arm: order[arm.kind])


Term = tuple[float, Arm, Arm]
"""(factor, arm, reference): their difference, times the factor."""


def seed_improvements(
    terms: Sequence[Term], results: Results, measure: str, task: str | None = None
) -> dict[str, float]:
    """Seed that all arms have -> sum of the terms, positive where better; {} if a cell was not measured.

    Seeds that the study begins with come before later ones. With `task`, of that task alone.
    """
    arms = [arm for _, *pair in terms for arm in pair]
    shared = [seed for seed in arms[0].seeds if all(seed in arm.seeds for arm in arms)]
    shared.sort(key=lambda seed: int(seed) not in results.study.seeds)
    sign = 1.0 if HIGHER_IS_BETTER[measure] else -1.0

    def value(seed: str) -> float:
        found = ((results.mean(arm.seeds[seed], measure, task=task) for arm in pair) for _, *pair in terms)
        return sign * sum(factor * (own - other) for (factor, *_), (own, other) in zip(terms, found, strict=True))

    by_seed = {seed: value(seed) for seed in shared}
    return {} if any(map(math.isnan, by_seed.values())) else by_seed


def improvement_interval(by_seed: Mapping[str, float], study: Study) -> Interval:
    """Student's t interval over the seeds of `seed_improvements`."""
    return statistics.t_interval(list(by_seed.values()), num_first=num_first_seeds(study, by_seed))


def _differences(terms: Sequence[Term], seeds: Sequence[str], results: Results, measure: str) -> list[SeedScores]:
    """Of each seed the sum of the terms, example by example; runs that diverged have none."""
    found = []
    for seed in seeds:
        keys = [(factor, arm.seeds[seed], other.seeds[seed]) for factor, arm, other in terms]
        if not any(results.diverged(key) for _, *pair in keys for key in pair):
            signed = [
                (sign * factor, key) for factor, *pair in keys for sign, key in zip((1.0, -1.0), pair, strict=True)
            ]
            found.append(combined([(factor, results.scores(key)[measure]) for factor, key in signed]))
    return found


@dataclass(frozen=True, kw_only=True)
class NamedComparison:
    """A contrast to be told: its name, what it says the arm is better than, and its family ("" if exploratory).

    `lacking` says which of the contexts that it is about are not in its terms.
    """

    name: str
    context: dict[str, str]
    arm: str
    reference: str
    family: str
    terms: list[Term]
    lacking: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[Arm]:
        """The arms of all terms, each once."""
        return list({id(arm): arm for _, *pair in self.terms for arm in pair}.values())


def named_comparisons(arms: Sequence[Arm], study: Study, cells: Records) -> list[NamedComparison]:
    """The primary comparisons, then every trained arm beside the reference of its context, as far as they can be made.

    Without `compare.primary` the latter are the primary ones. Of the cells only their labels are used.
    """
    compare = study.compare
    found = []
    for name, asked in (compare.primary or {}).items():
        known = [_with_seeds(arm, list(map(str, asked.seeds))) for arm in arms] if asked.seeds else arms
        terms = _terms(asked, _pairs(known, asked.reference or compare.reference))
        if terms:
            _, arm, other = terms[0]
            found.append(
                NamedComparison(
                    name=name,
                    context={},
                    arm=arm.name,
                    reference=other.name,
                    family=asked.family,
                    terms=terms,
                    lacking=_lacking(asked, terms, study, cells),
                )
            )
    return found + [
        NamedComparison(
            name=f"{arm.name} against {other.name}",
            context=arm.context,
            arm=arm.name,
            reference=other.name,
            family="" if compare.primary else "primary",
            terms=[(1.0, arm, other)],
        )
        for arm, other in _pairs(arms, compare.reference)
    ]


def _with_seeds(arm: Arm, seeds: Sequence[str]) -> Arm:
    found = {seed: arm.seeds[seed] for seed in seeds if seed in arm.seeds}
    return replace(arm, seeds=found, num_missing=len(seeds) - len(found))


def _pairs(arms: Sequence[Arm], reference: str | None) -> list[tuple[Arm, Arm]]:
    """Every trained arm beside the reference of its context."""
    return [
        (arm, other)
        for arm in arms
        for other in arms
        if arm.kind == other.kind == "trained" and other.name == reference != arm.name and arm.context == other.context
    ]


def _terms(asked: PrimaryConfig, pairs: Sequence[tuple[Arm, Arm]]) -> list[Term]:
    """Averages of the pairs that a primary comparison asks for; empty as long as one of its parts has none."""
    named = [pair for pair in pairs if asked.arm in (None, pair[0].name)]
    parts = [(1.0, asked.over)] + ([] if asked.minus is None else [(-1.0, asked.minus)])
    terms: list[Term] = []
    for sign, entry in parts:
        wanted = [pair for pair in named if has_labels(pair[0].context, entry)]
        if not wanted or len({arm.name for arm, _ in wanted}) > 1:
            return []
        terms += [(sign / len(wanted), *pair) for pair in wanted]
    return terms


Place = tuple[tuple[tuple[str, str], ...], str]
"""Context and name of the arm of a combination of labels."""


def _lacking(asked: PrimaryConfig, terms: Sequence[Term], study: Study, cells: Records) -> list[str]:
    """The contexts that a primary comparison is about, by the study file, and that its terms do not have.

    A combination that runs under the labels of another one is no context of its own, and is there if that one is.
    """
    names, first, trained = [arm.name for arm in terms[0][1:]], _first_places(cells, study), _trained_places(study)
    there = {(tuple(arm.context.items()), arm.name) for _, *pair in terms for arm in pair}
    planned, found = [], []
    for context in dict.fromkeys(context for context, _ in trained):
        places = [(context, name) for name in names]
        if all(place in trained and place not in first for place in places):
            planned.append(dict(context))
        if all(first.get(place, place) in there for place in places):
            found.append(dict(context))
    lacking: list[str] = []
    for entry in [asked.over] + ([] if asked.minus is None else [asked.minus]):
        lacking += [in_words(context) for context in planned if has_labels(context, entry) and context not in found]
        for axis, value in entry.items():
            known = {context[axis] for context in planned + found if has_labels(context, entry)}
            lacking += [f"{axis}={label}" for label in map(label_of, as_list(value)) if label not in known]
    return list(dict.fromkeys(lacking))


def _place(labels: Mapping[str, str], study: Study) -> Place:
    arm = study.compare.arm
    return tuple((axis, labels[axis]) for axis in study.product if axis != arm), labels[arm]


def _trained_places(study: Study) -> list[Place]:
    """All that the study file trains, each once."""
    return list(
        dict.fromkeys(_place(labels, study) for stage, labels, _ in combinations(study) if stage.kind == "train")
    )


def count_primary(study: Study, cells: Records) -> int:
    """How many primary comparisons there are once every cell is done."""
    if study.compare.primary is not None:
        return len(study.compare.primary)
    own = set(_trained_places(study)) - _first_places(cells, study).keys()
    reference = study.compare.reference
    return sum(name != reference and (context, reference) in own for context, name in own)


def _first_places(cells: Records, study: Study) -> dict[Place, Place]:
    """Combination that has no cell of its own, since another one gives the same recipe -> that one."""
    trained = [cell for cell in cells if cell["kind"] == "trained"]
    own = {_place(cell["labels"], study) for cell in trained}
    pairs = ((_place(each, study), _place(cell["labels"], study)) for cell in trained for each in cell.get("equal", ()))
    return {other: place for other, place in pairs if other not in own}


def comparisons(
    arms: Sequence[Arm], results: Results, measures: Sequence[str], cells: Records, *, num_primary: int = 0
) -> list[dict[str, Any]]:
    """One row for each comparison and measure, judged (`_judge`). A positive improvement is better.

    The primary comparisons are those of the first of the measures, the study's metric; all others are exploratory.
    `num_primary`: of the whole study, if it may have more than there are results of and names none.
    """
    compare = results.study.compare
    rows = [
        row
        for each in named_comparisons(arms, results.study, cells)
        for measure in measures
        if (row := _row(each, results, measure, is_primary=bool(each.family) and measure == measures[0])) is not None
    ]
    for family in dict.fromkeys(row["family"] for row in rows if row["role"] == "primary"):
        number = sum(each.family == family for each in (compare.primary or {}).values()) or num_primary
        _judge([row for row in rows if (row["role"], row["family"]) == ("primary", family)], compare, number)
    for row in rows:
        del row["_spread"]
        if row["role"] != "primary":
            row |= {"winner": "", "verdict": "exploratory"}
    return rows


def _row(each: NamedComparison, results: Results, measure: str, *, is_primary: bool) -> dict[str, Any] | None:
    by_seed = seed_improvements(each.terms, results, measure)
    if not by_seed:
        return None
    study, compare, num_first = results.study, results.study.compare, num_first_seeds(results.study, by_seed)
    interval = improvement_interval(by_seed, study)
    differences = _differences(each.terms, list(by_seed), results, measure)
    of_seeds = statistics.seed_spread(list(by_seed.values()), num_first)
    of_examples = Spread(math.nan, math.nan)
    zone = compare.zone if measure[:3] == compare.metric[:3] else ZONE_OF_SHARES
    # The worst score is no measurement: two runs that diverged are not known to be equivalent. Nor is one seed enough.
    equivalent = [math.nan]
    reasons = _against_a_verdict(each, len(by_seed), compare)
    if len(differences) == len(by_seed):
        of_examples = example_spread(differences, results.weighting(measure))
        if math.isnan(of_examples.stderr):
            reasons.append("a task has a single example, which tells no spread")
        if len(by_seed) > 1:
            equivalent = [spread.p_equivalent(interval.value, zone) for spread in (of_seeds, of_examples)]
    examples = {(task, each) for tasks in differences for task, found in tasks.items() for each in found.examples}
    return {
        "comparison": each.name,
        **each.context,
        "arm": each.arm,
        "reference": each.reference,
        "measure": measure,
        "role": "primary" if is_primary else "exploratory",
        "family": each.family,
        "improvement": interval.value,
        "lower": interval.lower,
        "upper": interval.upper,
        "half_width": interval.half_width,
        **_planned(compare, len(by_seed), num_first, is_primary=is_primary),
        "p_seeds": of_seeds.p(interval.value),
        "p_examples": of_examples.p(interval.value),
        # The larger one counts: of seeds, and of examples with the seeds as they are
        "p_equivalent": max(equivalent, key=_or_least),
        "smallest_detectable": of_seeds.detectable(compare.alpha, compare.power),
        "zone": zone,
        "num_seeds": len(by_seed),
        "num_examples": len(examples),
        "num_missing": sum(arm.num_missing for arm in each.arms),
        "num_diverged": sum(results.diverged(arm.seeds[seed]) for arm in each.arms for seed in by_seed),
        "seed_improvements": "; ".join(f"{seed}: {value:.9g}" for seed, value in by_seed.items()),
        "reason": "; ".join(reasons),
        "_spread": of_seeds,
    }


def task_rows(arms: Sequence[Arm], results: Results, measures: Sequence[str], cells: Records) -> list[dict[str, Any]]:
    """The primary comparisons on each task: rows as of `comparisons`, without tests.

    `weight` is the task's share of the weights in the study's metric, a mean over the seeds.
    """
    rows = []
    for each in named_comparisons(arms, results.study, cells):
        seeds = seed_improvements(each.terms, results, measures[0]) if each.family else {}
        weights: dict[str, float] = {}
        for scores in (results.scores(each.terms[0][1].seeds[seed]).get(measures[0], {}) for seed in seeds):
            whole = sum(float(found.weights.sum()) for found in scores.values())
            for task, found in scores.items():
                weights[task] = weights.get(task, 0.0) + float(found.weights.sum()) / whole / len(seeds)
        for task, measure in itertools.product(weights, measures):
            by_seed = seed_improvements(each.terms, results, measure, task)
            if by_seed:
                row: dict[str, Any] = {"comparison": each.name, **each.context, "arm": each.arm}
                row |= {"reference": each.reference, "task": task, "weight": weights[task], "measure": measure}
                interval = improvement_interval(by_seed, results.study)
                rows.append(row | {"improvement": interval.value, "lower": interval.lower, "upper": interval.upper})
    return rows


def _planned(compare: CompareConfig, num_seeds: int, num_first: int, *, is_primary: bool) -> dict[str, float]:
    """Half of the interval that a primary comparison would have with the spread of the study file; {} without one."""
    if not is_primary or compare.spread is None or num_first < 2:
        return {}
    of_mean = Spread(compare.spread / math.sqrt(num_seeds), num_first - 1)
    return {"half_width_planned": of_mean.half_width}


def _or_least(p: float) -> float:
    """A p-value to compare; one that is not known says nothing."""
    return -1.0 if math.isnan(p) else p


def _against_a_verdict(each: NamedComparison, num_seeds: int, compare: CompareConfig) -> list[str]:
    """Why nothing is called, whatever the scores; empty if something may be."""
    reasons = []
    missing = sum(arm.num_missing for arm in each.arms)
    if missing:
        reasons.append(f"{missing} cell{'s have' if missing > 1 else ' has'} no result")
    if each.lacking:
        reasons.append(f"an arm has no result for {' and for '.join(each.lacking)}")
    if any(arm.is_interior is None for arm in each.arms):
        reasons.append("the learning rates were not searched")
    at_edge = sorted({_named(arm) for arm in each.arms if arm.is_interior is False})
    if at_edge:
        reasons.append(f"the best learning rate of {', '.join(at_edge)} is the smallest or largest that was tried")
    if num_seeds < compare.min_seeds:
        number = f"are {num_seeds} seeds" if num_seeds > 1 else "is 1 seed"
        reasons.append(f"there {number}, but at least {compare.min_seeds} are needed")
    return reasons


def _named(arm: Arm) -> str:
    return f"{arm.name} ({in_words(arm.context)})" if arm.context else arm.name


def _judge(rows: Sequence[dict[str, Any]], compare: CompareConfig, num_primary: int) -> None:
    """Say of each primary comparison whether an arm is better, the arms are equivalent, or it is not decided.

    Better: the larger p-value is below alpha after Holm's correction. Equivalent: so is the larger one of the two
    one-sided tests that the difference is outside of the zone. Both may hold. A comparison that has no results yet is
    corrected for, too, so a later one takes no verdict back.
    """
    larger = [max(row["p_seeds"], row["p_examples"], key=_or_least) for row in rows]
    known = [1.0 if math.isnan(p) else p for p in larger]
    equivalent = [1.0 if math.isnan(row["p_equivalent"]) else row["p_equivalent"] for row in rows]
    number = max(num_primary, len(rows))
    p_holm, p_equivalent_holm = (statistics.holm(each, number) for each in (known, equivalent))
    for row, p, p_equivalent in zip(rows, p_holm, p_equivalent_holm, strict=True):
        row |= {"p_holm": p, "p_equivalent_holm": p_equivalent, "num_tests": number}
        row["smallest_detectable"] = row["_spread"].detectable(compare.alpha / number, compare.power)
        may_be = not row["reason"]
        better = row["arm"] if row["improvement"] > 0 else row["reference"]
        row["winner"] = better if may_be and p < compare.alpha else ""
        is_equivalent = may_be and p_equivalent < compare.alpha
        inside = f"no difference above {compare.zone:g}"
        if row["winner"]:
            row["verdict"] = f"{better} is better" + (f", by less than {compare.zone:g}" if is_equivalent else "")
        else:
            row["verdict"] = inside if is_equivalent else "not decided"


def level_seeds(arm: Arm, study: Study) -> list[str]:
    """The seeds over which the level of an arm is told: those of the study file, which other arms have, too.

    With `eval.limit` a seed has examples of its own, so means over different seeds cannot be compared. All seeds of an
    arm that has none of these.
    """
    common = set(map(str, study.seeds))
    return [seed for seed in arm.seeds if seed in common] or list(arm.seeds)


def quality(arm: Arm, results: Results, measure: str) -> Interval | None:
    """Mean of a measure over the arm's `level_seeds` with its t interval; of a base over its examples.

    None if not measured.
    """
    values = [results.mean(arm.seeds[seed], measure) for seed in level_seeds(arm, results.study)]
    if not values or any(map(math.isnan, values)):
        return None
    if arm.kind != "base":
        return statistics.t_interval(values)
    (key,) = arm.seeds.values()
    return example_interval(results.scores(key)[measure], results.weighting(measure))


def cannot_decide(study: Study) -> list[str]:
    """Why no comparison of a study can have a verdict, whatever it scores; empty if one can."""
    reasons = []
    if study.rates is None:
        reasons.append("the learning rates are not searched (rates)")
    num_seeds: Counter[Place] = Counter()
    for stage, labels, seeds in combinations(study):
        if stage.kind == "train":
            num_seeds[_place(labels, study)] += len(seeds)
    most = max(num_seeds.values(), default=0)
    if most < study.compare.min_seeds:
        reasons.append(f"there are only {most} of {study.compare.min_seeds} (compare.min_seeds) seeds")
    return reasons


def never_decided(cells: Records, results: Results) -> list[str]:
    """A sentence on each primary comparison that the study file itself rules out; the cells are all planned ones."""
    study, arms = results.study, find_arms(cells, results, as_planned=True)
    named = named_comparisons(arms, study, cells)
    lacking = {each.name: each.lacking for each in named if each.family}
    told = []
    for name in study.compare.primary or {}:
        if name not in lacking:
            told.append(
                f"The comparison {name!r} cannot be made: its labels must name contexts in which "
                f"{(study.compare.primary or {})[name].reference or study.compare.reference} and one other arm are "
                "trained."
            )
        elif lacking[name]:
            where = " and for ".join(lacking[name])
            told.append(f"The comparison {name!r} cannot have a verdict: an arm has no cell for {where}.")
    return told


def repair_row(arm: Arm, arms: Sequence[Arm], results: Results) -> dict[str, float]:
    """What is left of the damage, how much a transplant has, and what was repaired; only of trained arms.

    All in the metric's units, positive values worse; `repaired_share` of the transplant's damage, if that is
    significant. `magnitudes`: what is lost if the trained magnitudes are set back.
    """
    study, row = results.study, dict[str, float]()
    if arm.kind != "trained":
        return row

    def improvements(factor: float, own: Arm, other: Arm) -> dict[str, float]:
        return seed_improvements([(factor, own, other)], results, study.compare.metric)

    back = _same_arm(arm, arms, "set_back")
    if back is not None and (lost := improvements(1.0, arm, back)):
        row |= improvement_interval(lost, study).columns("magnitudes")
    twin = dense_twin(arm, arms, study)
    if twin is None or arm.base_key == arm.dense_key:
        return row
    if any(results.diverged(key) for seed, key in twin.seeds.items() if seed in arm.seeds):
        return row
    if left := improvements(-1.0, arm, twin):
        row |= improvement_interval(left, study).columns("left")
    transplant = _same_arm(arm, arms, "transplant")
    damage = improvements(-1.0, transplant, twin) if transplant is not None else {}
    repaired = improvements(1.0, arm, transplant) if transplant is not None else {}
    if damage and repaired:
        row |= improvement_interval(damage, study).columns("transplant")
        row |= improvement_interval(repaired, study).columns("repaired")
        if row["transplant_lower"] > 0:
            shared = [seed for seed in damage if seed in repaired]
            above, below = ([values[seed] for seed in shared] for values in (repaired, damage))
            share = statistics.ratio_interval(above, below, num_first=num_first_seeds(study, shared))
            row |= share.columns("repaired_share")
    return row


def _same_arm(arm: Arm, arms: Sequence[Arm], kind: Kind) -> Arm | None:
    """The arm in another kind of cells."""
    return next((each for each in arms if (each.kind, each.name, each.context) == (kind, arm.name, arm.context)), None)


def dense_twin(arm: Arm, arms: Sequence[Arm], study: Study) -> Arm | None:
    """The arm of the same name that was trained on the uncompressed base, in the same context but for the base."""
    based = axes_of(study, "base.")

    def rest(one: Arm) -> dict[str, str]:
        return {axis: label for axis, label in one.context.items() if axis not in based}

    dense = [each for each in arms if each.kind == "trained" and each.base_key == each.dense_key]
    like = {} if study.rates is None else study.rates.like.get(study.compare.arm, {})
    names = (arm.name, like.get(arm.name, arm.name))
    return next((each for name in names for each in dense if each.name == name and rest(each) == rest(arm)), None)


def damage_row(arm: Arm, results: Results) -> dict[str, Any]:
    """What compression did to a base that is only evaluated; empty for other arms.

    `damage_choice`: acc_norm of the uncompressed base, less that of this one; its interval is over examples.
    """
    if arm.kind != "base":
        return {}
    (key,) = arm.seeds.values()
    result = results.result(key) or {}
    layers = ((result.get("compression") or {}).get("layers") or {}).values()
    errors = [layer["relative_error"] for layer in layers]
    row: dict[str, Any] = {"weight_error": sum(errors) / len(errors)} if errors else {}
    row |= {name: result[name] for name in ("perplexity", "hidden_error") if name in result}
    choice = quality(arm, results, "acc_norm")
    if choice is None or arm.dense_key in (None, key) or results.result(str(arm.dense_key)) is None:
        return row
    scores = [results.scores(each)["acc_norm"] for each in (str(arm.dense_key), key)]
    lost = combined([(1.0, scores[0]), (-1.0, scores[1])])
    return row | example_interval(lost, "equal").columns("damage_choice")
