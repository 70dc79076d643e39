"""How often a study says something false, and how often it finds what is there: its own code on simulated scores.

Every study is drawn anew: its examples, what the arms differ by on each of them, and the noise of each seed and run.
Arms, intervals, verdicts and repair come from the code of `qdora report`. Counted are

- intervals that hold the truth, of differences, scores, damage and repair: 93 to 97 % must;
- studies that call any winner although no arms differ, and any equivalence although all arms differ by just the zone:
  at most 5 % may (and three standard errors of the simulation);
- winners and equivalences found, by the number of seeds, and at the smallest detectable difference: 80 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from frame import bench, main, markdown, table

from qdora.evaluation.example_intervals import Array, Spread, TaskScores
from qdora.recipe.section import with_settings
from qdora.study.compare import Arm, Results, comparisons, find_arms, quality
from qdora.study.grid import Study, study_from
from qdora.study.repair import damage_row, repair_row
from qdora.study.study_directory import StudyDirectory

ZONE = 0.02
COVERAGE = (0.93, 0.97)
ARMS = ("lora", "dora")
DENSE = "16 bits"
LOST, TRANSPLANTED = 0.3, 0.8
"""Nats per token that compression costs a trained arm, and a transplanted adapter."""
INTERVALS = ("difference", "primary", "score", "left", "transplant", "repaired", "repaired_share", "damage_choice")
FALSE = ("winner", "equivalent")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What a simulated study is made of; standard deviations are in nats per token.

    Attributes:
        bases: Compressed ones; each is a primary comparison.
        effect: What dora is better by, on every base.
        of_seed: Of what a seed adds to the difference of the arms; half of its variance is common to all bases.
        of_example: Of what one arm has more than the other on an example, whatever the seed.
        of_run: Of what a single run adds on a single example.
        rotates: Whether every seed has examples of its own. Otherwise all have the same, and the truth is theirs.
        skewed: Noise of examples with heavy tails (t with 3 degrees of freedom), and 1 to about 100 tokens.
        more_seeds: Further seeds where the half-width is above the zone.
        repairs: Also simulate bases and transplants, for the intervals of damage and repair.
    """

    seeds: int = 6
    tasks: int = 4
    examples: int = 25
    bases: int = 3
    effect: float = 0.0
    of_seed: float = 0.02
    of_example: float = 0.15
    of_run: float = 0.1
    rotates: bool = True
    skewed: bool = False
    more_seeds: int = 0
    repairs: bool = False


SCENARIOS = {
    "seeds and examples": Scenario(repairs=True),
    "seeds alone": Scenario(of_example=0.0, of_run=0.01),
    "examples alone": Scenario(of_seed=0.0, of_run=0.0),
    "single runs alone": Scenario(of_seed=0.0, of_example=0.0, of_run=0.5),
    "3 seeds": Scenario(seeds=3, repairs=True),
    "4 seeds": Scenario(seeds=4),
    "10 seeds": Scenario(seeds=10),
    "1 base": Scenario(bases=1),
    "6 bases": Scenario(bases=6),
    "6 examples a task": Scenario(tasks=8, examples=6),
    "heavy tails": Scenario(skewed=True, repairs=True),
    "the same examples in all seeds": Scenario(rotates=False),
    "more seeds where intervals are wide": Scenario(of_seed=0.03, more_seeds=2),
    "3 seeds, 3 more where wide": Scenario(seeds=3, of_seed=0.02, of_example=0.0, of_run=0.01, more_seeds=3),
}
SEEDS = (3, 4, 5, 6, 8, 10)
EFFECTS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.06)


@bench(smoke={"studies": 4})
def study_nulls(*, studies: int = 1000) -> dict[str, Any]:
    """All scenarios, without a difference and with one as large as the zone, then the power."""
    scenarios, power, promised = {}, [], []
    for name, each in SCENARIOS.items():
        found = shares(each, studies)
        found["equivalent"] = shares(replace(each, effect=ZONE), studies, seed=1, judged_alone=True)["any_equivalent"]
        scenarios[name] = asdict(each) | {"shares": found}
        print(name, found, flush=True)
    for seeds in SEEDS:
        for effect in EFFECTS:
            found = shares(Scenario(seeds=seeds, effect=effect), studies // 4, seed=2, judged_alone=True)
            judged = {"better": found["better"], "equivalent": found["equivalent"]}
            power.append({"seeds": seeds, "effect": effect} | judged)
        of_seed = 0.02  # how often a difference of the size that is promised to be detected is found
        effect = Spread(of_seed / math.sqrt(seeds), seeds - 1).detectable(0.05, 0.8)
        alone = Scenario(seeds=seeds, bases=1, effect=effect, of_seed=of_seed, of_example=0.0, of_run=1e-4)
        better = shares(alone, studies, seed=3, judged_alone=True)["better"]
        promised.append({"seeds": seeds, "effect": effect, "found": better})
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    found = {name: [each["shares"].get(name) for each in scenarios.values()] for name in (*INTERVALS, *FALSE)}
    covered = [share for name in INTERVALS for share in found[name] if share is not None]
    passes = {
        "coverage": COVERAGE[0] <= min(covered) and max(covered) <= COVERAGE[1],
        **{name: max(found[name]) <= allowed for name in FALSE},
        "promised power": all(abs(each["found"] - 0.8) < 0.03 for each in promised),
    }
    simulated = {"studies": studies, "zone": ZONE, "scenarios": scenarios, "power": power, "promised": promised}
    return simulated | {"coverage": [min(covered), max(covered)], "allowed": allowed, "passes": passes}


def shares(scenario: Scenario, number: int, *, seed: int = 0, judged_alone: bool = False) -> dict[str, float]:
    """Share of the cases in which `number` studies of a scenario said something.

    The names of `INTERVALS`: intervals that hold the truth. winner: studies with any winner. With `judged_alone`, which
    is faster: better, equivalent: comparisons with these verdicts; any_equivalent: studies with any equivalence.
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
    simulated = _Simulated(scenario, store, draw, with_repair=scenario.repairs and not judged_alone)
    results, arms = simulated.results, simulated.arms()
    judged = _each_base_primary(simulated, arms)
    if judged_alone:
        equivalent = [row["verdict"].startswith("no difference") for row in judged]
        better = [row["winner"] == ARMS[1] for row in judged]
        return {"better": better, "equivalent": equivalent, "any_equivalent": [any(equivalent)]}
    rows = comparisons(arms, results, ["nll_per_token"], simulated.cells)
    single = [row for row in rows if row["role"] == "exploratory"]
    found = {
        "difference": [row["lower"] <= scenario.effect <= row["upper"] for row in single],
        "primary": [row["lower"] <= scenario.effect <= row["upper"] for row in rows if row["role"] == "primary"],
        "winner": [any(row["winner"] for row in judged)],
    }
    return found | _held(simulated, arms)


def _each_base_primary(simulated: _Simulated, arms: list[Arm]) -> list[dict[str, Any]]:
    """The comparisons of a study that names none, so that each compressed base is a primary one."""
    study = simulated.results.study
    simulated.results.study = with_settings(study, compare={"primary": None})
    compressed = [arm for arm in arms if arm.context.get("base") != DENSE]
    rows = comparisons(compressed, simulated.results, ["nll_per_token"], simulated.cells)
    simulated.results.study = study
    return rows


def _held(simulated: _Simulated, arms: list[Arm]) -> dict[str, list[bool]]:
    """Whether the intervals of scores, damage and repair hold the truth."""
    held: dict[str, list[bool]] = {}

    def add(name: str, truth: float, row: Mapping[str, Any]) -> None:
        if f"{name}_lower" in row and not math.isnan(row[f"{name}_lower"]):
            held.setdefault(name, []).append(row[f"{name}_lower"] <= truth <= row[f"{name}_upper"])

    results = simulated.results
    for arm in arms:
        if arm.kind == "trained":
            score = quality(arm, results, "nll_per_token")
            assert score is not None
            truth = simulated.levels[arm.name, arm.context["base"]]
            add("score", truth, {"score_lower": score.lower, "score_upper": score.upper})
            row = repair_row(arm, arms, results)
            left = lost_on(arm.context["base"])
            add("left", left, row)
            add("transplant", TRANSPLANTED, row)
            add("repaired", TRANSPLANTED - left, row)
            add("repaired_share", (TRANSPLANTED - left) / TRANSPLANTED, row)
        elif arm.kind == "base":
            add("damage_choice", LOST, damage_row(arm, results))
    return held


def lost_on(base: str) -> float:
    """Nats per token that compression costs on a base."""
    return 0.0 if base == DENSE else LOST


@lru_cache(maxsize=256)
def _names(task: int, block: int, number: int) -> tuple[str, ...]:
    return tuple(f"{task}-{block * number + index}#1" for index in range(number))


@lru_cache(maxsize=8)
def _study(bases: int, seeds: int) -> Study:
    """A study file of the scenario; only what the comparison reads matters."""
    names = {DENSE: {"base.quant": "none"}} | {f"base {index}": {"base.quant": "nf4"} for index in range(bases)}
    document: dict[str, Any] = {
        "recipe": "quickstart",
        "product": {"base": names, "adapter": {arm: {"adapter.kind": arm} for arm in ARMS}},
        "seeds": list(range(seeds)),
        "rates": {"values": [1e-4, 2e-4, 4e-4]},
        "compare": {
            "split": "test",
            "reference": ARMS[0],
            "zone": ZONE,
            "primary": {"over the compressed bases": {"over": {"base": [name for name in names if name != DENSE]}}},
        },
    }
    return study_from(document)


class _Simulated:
    """The cells of one study; their scores are put into `results`.

    Attributes:
        levels: (arm, base) -> NLL per token.
    """

    def __init__(
        self, scenario: Scenario, store: StudyDirectory, draw: np.random.Generator, *, with_repair: bool
    ) -> None:
        self.scenario, self.draw, self.with_repair = scenario, draw, with_repair
        self.results = Results(store, _study(scenario.bases, scenario.seeds))
        self.shape = (scenario.tasks, scenario.examples)
        self.cells: list[dict[str, Any]] = []
        self.bases = [DENSE, *(f"base {index}" for index in range(scenario.bases))]
        self.levels: dict[tuple[str, str], float] = {}
        number = scenario.seeds + scenario.more_seeds
        self.fixed = None if scenario.rotates else self._examples()
        of_arms = {base: self._of_arm() for base in self.bases}
        for base in self.bases:
            for arm in ARMS:
                self.levels[arm, base] = 1.0 + lost_on(base) - (scenario.effect if arm == "dora" else 0.0)
        for seed in range(number):
            self._add_seed(seed, of_arms)
        if with_repair:
            self._add_bases()

    def arms(self) -> list[Arm]:
        """Of the cells that the study runs: those of further seeds only where intervals are wide."""
        if not self.scenario.more_seeds:
            return find_arms(self.cells, self.results)
        cells = [cell for cell in self.cells if int(cell["labels"].get("seed", "0")) < self.scenario.seeds]
        rows = comparisons(find_arms(cells, self.results), self.results, ["nll_per_token"], cells)
        wide = [row["base"] for row in rows if row["role"] == "exploratory" and row["half_width"] > ZONE]
        more = [cell for cell in self.cells if cell not in cells and cell["labels"]["base"] in wide]
        return find_arms([*cells, *more], self.results)

    def _noise(self, scale: float) -> Array:
        if self.scenario.skewed:
            return scale * self.draw.standard_t(3, size=self.shape) / math.sqrt(3)
        return scale * self.draw.normal(size=self.shape)

    def _examples(self) -> tuple[Array, Array]:
        """(answer tokens, difficulty) of examples, the same for all arms."""
        if self.scenario.skewed:
            tokens = np.minimum(100.0, np.ceil(self.draw.lognormal(1.0, 1.0, self.shape)))
        else:
            tokens = self.draw.integers(1, 6, self.shape).astype(float)
        return tokens, 0.3 * (self.draw.exponential(size=self.shape) - 1.0)

    def _of_arm(self) -> Array | None:
        """What dora has more than lora on the fixed examples, whose mean is 0: the truth is that of these examples."""
        if self.fixed is None:
            return None
        tokens, hard = self.fixed
        hard -= (hard * tokens).sum() / tokens.sum()
        values = self._noise(self.scenario.of_example)
        return values - (values * tokens).sum() / tokens.sum()

    def _add_seed(self, seed: int, of_arms: Mapping[str, Array | None]) -> None:
        scenario, draw = self.scenario, self.draw
        tokens, hard = self.fixed or self._examples()
        common, shared = 0.05 * float(draw.normal()), float(draw.normal())
        block = seed if scenario.rotates else 0
        for base in self.bases:
            fixed = of_arms[base]
            of_arm = self._noise(scenario.of_example) if fixed is None else fixed
            of_seed = scenario.of_seed * (shared + float(draw.normal())) / math.sqrt(2)
            for arm in ARMS:
                own = of_arm + of_seed if arm == "dora" else 0.0
                per_token = self.levels[arm, base] + common + hard + own + self._noise(scenario.of_run)
                self._add("trained", base, arm, seed, block, per_token, tokens)
                if self.with_repair and base != DENSE:
                    level = self.levels[arm, DENSE] + TRANSPLANTED + scenario.of_seed * float(draw.normal())
                    moved = level + common + hard + self._noise(scenario.of_run)
                    self._add("transplant", base, arm, seed, block, moved, tokens)

    def _add_bases(self) -> None:
        """Right choices of the bases without training."""
        hard = 0.3 * (self.draw.exponential(size=self.shape) - 1.0)
        for base in self.bases:
            values = 1.0 + hard - lost_on(base) + self._noise(0.2)
            self._add("base", base, None, None, 0, values, np.ones(self.shape), measure="acc_norm")

    def _add(
        self,
        kind: str,
        base: str,
        arm: str | None,
        seed: int | None,
        block: int,
        per_token: Array,
        tokens: Array,
        measure: str = "nll_per_token",
    ) -> None:
        labels = {"base": base} | ({} if arm is None else {"adapter": arm, "seed": str(seed), "train.lr": "0.0002"})
        key = " ".join((kind, *labels.values()))
        scores = {
            str(task): TaskScores(_names(task, block, len(row)), row * counts, counts)
            for task, (row, counts) in enumerate(zip(per_token, tokens, strict=True))
        }
        self.results._results[key] = {"files": {}}
        self.results._scores[key, "all"] = {measure: scores}
        names = {"base_key": f"base {base}", "dense_key": f"base {DENSE}", "is_interior": True}
        self.cells.append({"key": key, "labels": labels, "kind": kind, **names})


@table("study_nulls")
def study_nulls_table(result: Any) -> str:
    """How many intervals hold the truth, what is called falsely, and what is found by the number of seeds."""
    names = {"difference": "difference", "primary": "mean of bases", "score": "score"}
    names |= {"left": "left", "repaired": "repaired", "repaired_share": "share", "damage_choice": "damage"}
    rows = []
    for name, each in result["scenarios"].items():
        found = each["shares"]
        number = f"{each['seeds']}, {each['bases']}, {each['tasks']} × {each['examples']}"
        covered = [f"{found[what]:.1%}" if what in found else "–" for what in names]
        rows.append([name, number, *covered, *(f"{found[what]:.1%}" for what in FALSE)])
    header = ["simulated study", "seeds, bases, tasks × examples", *names.values(), "a winner", "an equivalence"]
    note = (
        f"\n{result['studies']:,} studies per row. From the third column: intervals that contain the true value "
        "(nominal: 95 %). Last two columns: studies without a difference that report a winner, and studies whose arms "
        f"differ by exactly {result['zone']:g} (the zone) that report equivalence (nominal: at most 5 %). "
        f"`{result['command']}`\n"
    )
    better = {(each["seeds"], each["effect"]): each for each in result["power"]}
    effects = sorted({effect for _, effect in better if effect})
    power = []
    for each in result["promised"]:
        own = [f"{better[each['seeds'], effect]['better']:.0%}" for effect in effects]
        own.append(f"{better[each['seeds'], 0.0]['equivalent']:.0%}")
        power.append([str(each["seeds"]), *own, f"{each['effect']:.3f}: {each['found']:.0%}"])
    columns = ["seeds", *(f"better by {effect:g}" for effect in effects), "equivalent at 0"]
    more = markdown([*columns, "predicted detectable with 80 %: found"], power)
    return markdown(header, rows) + note + "\n" + more


if __name__ == "__main__":
    main()
