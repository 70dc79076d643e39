"""Simulated studies: how often a study says something false, and how often it finds what is there.

Every study is drawn anew: its examples, what the arms differ by on each of them, and the noise of each seed and run.
Arms, intervals, verdicts and repair come from the code of `qdora report`; tests/test_study_statistics.py counts how
many intervals hold the truth, and how many studies call a winner although no arms differ, or an equivalence although
they differ by just the zone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qdora.evaluate.intervals import Array, TaskScores
from qdora.recipe.section import with_settings
from qdora.study.compare import comparisons, damage_row, find_arms, quality, repair_row
from qdora.study.grid import Study, study_from
from qdora.study.results import Results, StudyDirectory

ZONE, ARMS, DENSE = 0.02, ("lora", "dora"), "16 bits"
COMPRESSED = [f"base {index}" for index in range(3)]
"""Each is a primary comparison."""
SEEDS, SHAPE = 6, (4, 25)  # tasks, examples
LOST, TRANSPLANTED = {DENSE: 0.0} | dict.fromkeys(COMPRESSED, 0.3), 0.8
"""Nats per token that compression costs a trained arm, by base, and a transplanted adapter."""
INTERVALS = ("difference", "primary", "score", "left", "transplant", "repaired", "repaired_share", "damage_choice")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What a simulated study is made of; standard deviations are in nats per token."""

    effect: float = 0.0  # what dora is better by, on every base
    of_seed: float = 0.02  # of the difference of the arms; half of its variance is common to all bases
    of_example: float = 0.15  # of what one arm has more than the other on an example, whatever the seed
    of_run: float = 0.1  # of what a single run adds on a single example


def shares(scenario: Scenario, number: int, *, seed: int = 0, judged_alone: bool = False) -> dict[str, float]:
    """Share of the cases in which `number` studies of a scenario said something.

    The names of `INTERVALS`: intervals that hold the truth. winner: studies with any winner. With `judged_alone`, which
    is faster: better: comparisons with this verdict; any_equivalent: studies with any equivalence.
    """
    said: dict[str, list[bool]] = {}
    with TemporaryDirectory() as folder:
        store = StudyDirectory(Path(folder))
        for index in range(number):
            draw = np.random.default_rng([seed, index])
            for what, cases in one_study(scenario, store, draw, judged_alone=judged_alone).items():
                said.setdefault(what, []).extend(cases)
    return {what: sum(cases) / len(cases) for what, cases in said.items()}


def one_study(
    scenario: Scenario, store: StudyDirectory, draw: np.random.Generator, *, judged_alone: bool
) -> dict[str, list[bool]]:
    """What one study says: whether each interval holds the truth, and whether its verdicts are false."""
    simulated = _Simulated(scenario, store, draw, with_repair=not judged_alone)
    results, arms = simulated.results, find_arms(simulated.cells, simulated.results)
    named, plain = results.study, with_settings(results.study, compare={"primary": None})
    results.study = plain.model_copy(update={"exclude": ({"base": DENSE},)})
    compressed = [arm for arm in arms if arm.context.get("base") != DENSE]
    judged = comparisons(compressed, results, ["nll_per_token"])  # each base is a primary comparison
    results.study = named
    if judged_alone:
        equivalent = any(row["verdict"].startswith("no difference") for row in judged)
        return {"better": [row["winner"] == ARMS[1] for row in judged], "any_equivalent": [equivalent]}
    held: dict[str, list[bool]] = {"winner": [any(row["winner"] for row in judged)]}

    def add(name: str, truth: float, row: Mapping[str, Any], column: str = "") -> None:
        lower, upper = (row.get(f"{column}{end}", math.nan) for end in ("lower", "upper"))
        if not math.isnan(lower):
            held.setdefault(name, []).append(lower <= truth <= upper)

    for row in comparisons(arms, results, ["nll_per_token"]):
        add("primary" if row["role"] == "primary" else "difference", scenario.effect, row)
    for arm in arms:
        if arm.kind == "trained":
            score = quality(arm, results, "nll_per_token")
            truth = simulated.levels[arm.name, arm.context["base"]]
            add("score", truth, {"lower": score.lower, "upper": score.upper})
            row, left = repair_row(arm, arms, results), LOST[arm.context["base"]]
            truths = {"left": left, "transplant": TRANSPLANTED, "repaired": TRANSPLANTED - left}
            for name, truth in (truths | {"repaired_share": 1 - left / TRANSPLANTED}).items():
                add(name, truth, row, f"{name}_")
        elif arm.kind == "base":
            add("damage_choice", LOST[COMPRESSED[0]], damage_row(arm, results), "damage_choice_")
    return held


@cache
def _study() -> Study:
    names = {DENSE: {"base.quant": "none"}} | {name: {"base.quant": "nf4"} for name in COMPRESSED}
    primary = {"over the compressed bases": {"over": {"base": COMPRESSED}}}
    document: dict[str, Any] = {  # only what the comparison reads matters
        "recipe": "quickstart",
        "product": {"base": names, "adapter": {arm: {"adapter.kind": arm} for arm in ARMS}},
        "seeds": list(range(SEEDS)),
        "rates": {"values": [1e-4, 2e-4, 4e-4]},
        "compare": {"split": "test", "reference": ARMS[0], "zone": ZONE, "primary": primary},
    }
    return study_from(document)


class _Simulated:
    """The cells of one study; their scores are put into `results`. `levels`: (arm, base) -> NLL per token."""

    def __init__(
        self, scenario: Scenario, store: StudyDirectory, draw: np.random.Generator, *, with_repair: bool
    ) -> None:
        self.results, bases = Results(store, _study()), [DENSE, *COMPRESSED]
        self.cells: list[dict[str, Any]] = []
        gains = {"lora": 0.0, "dora": scenario.effect}
        self.levels = {(arm, base): 1.0 + LOST[base] - gains[arm] for base in bases for arm in ARMS}
        for seed in range(SEEDS):
            tokens = draw.integers(1, 6, SHAPE).astype(float)  # examples of its own, the same for all arms
            hard = 0.3 * (draw.exponential(size=SHAPE) - 1.0)
            common, shared = 0.05 * float(draw.normal()), float(draw.normal())
            for base in bases:
                of_arm = scenario.of_example * draw.normal(size=SHAPE)
                of_seed = scenario.of_seed * (shared + float(draw.normal())) / math.sqrt(2)
                for arm in ARMS:
                    own = of_arm + of_seed if arm == "dora" else 0.0
                    noise = scenario.of_run * draw.normal(size=SHAPE)
                    self._add("trained", base, arm, seed, self.levels[arm, base] + common + hard + own + noise, tokens)
                    if with_repair and base != DENSE:
                        level = self.levels[arm, DENSE] + TRANSPLANTED + scenario.of_seed * float(draw.normal())
                        moved = level + common + hard + scenario.of_run * draw.normal(size=SHAPE)
                        self._add("transplant", base, arm, seed, moved, tokens)
        hard = 0.3 * (draw.exponential(size=SHAPE) - 1.0)
        for base in bases if with_repair else ():  # right choices of the bases without training
            self._add("base", base, "", 0, 1.0 + hard - LOST[base] + 0.2 * draw.normal(size=SHAPE), np.ones(SHAPE))

    def _add(self, kind: str, base: str, arm: str, seed: int, per_token: Array, tokens: Array) -> None:
        labels = {"base": base} | ({"adapter": arm, "seed": str(seed), "train.lr": "0.0002"} if arm else {})
        key = " ".join((kind, *labels.values()))
        scores = {}
        for task, (row, counts) in enumerate(zip(per_token, tokens, strict=True)):
            names = tuple(f"{task}-{seed * len(row) + index}#1" for index in range(len(row)))
            scores[str(task)] = TaskScores(names, row * counts, counts)
        self.results._results[key] = {"files": {}}
        self.results._scores[key, "all"] = {"nll_per_token" if arm else "acc_norm": scores}
        names_of_bases = {"base_key": f"base {base}", "dense_key": f"base {DENSE}", "is_interior": True}
        self.cells.append({"key": key, "labels": labels, "kind": kind, **names_of_bases})
