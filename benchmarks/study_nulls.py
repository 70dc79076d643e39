"""How often a study finds something where there is nothing: its own comparison code on simulated scores.

    python benchmarks/study_nulls.py [--studies 2000]

Two arms, three tuned learning rates, several seeds; the arms have the same expected score. Every study is drawn anew:
its examples, the part of the score that each arm has on each example, and the noise of each seed. Counted are intervals
of differences that exclude 0, studies that call any winner, and intervals of repair ratios that miss the truth. Each
must happen in at most 6 % of the cases. Intervals of single scores are counted, too: with few examples whose difficulty
is skewed, a t interval misses such a mean more often. Nothing is concluded from them.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from measure import RESULTS, facts, write

from qdora.study.compare import Results, comparisons, find_arms, part_of, quality, repair
from qdora.study.grid import CompareConfig
from qdora.study.scores import CellScores
from qdora.study.study_directory import StudyDirectory

ALLOWED = 0.06
ARMS, RATES = ("lora", "dora"), ("0.0001", "0.0002", "0.0004")
BASE, LOST, GAINED = 2.0, 0.8, 0.6
"""NLL per token of the uncompressed base, what compression adds to it, and what every arm takes away again."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What a simulated study is made of; standard deviations are in nats per token.

    Attributes:
        contexts: Comparisons of a study, which Holm's correction counts together.
        of_seed: Of what a seed adds to all scores of its run.
        of_example: Of what an arm has more or less than the other on an example, whatever the seed.
        of_run: Of what a single run adds on a single example.
        worse: How much worse the outer two rates are; 0: all rates are equal, and noise chooses.
        skewed: Noise with heavy tails (t with 3 degrees of freedom), numbers of tokens from 1 to about 100.
    """

    seeds: int = 3
    tasks: int = 4
    examples: int = 24
    contexts: int = 1
    metric: str = "nll_per_token"
    of_seed: float = 0.05
    of_example: float = 0.25
    of_run: float = 0.1
    worse: float = 1.0
    skewed: bool = False


SCENARIOS = {
    "seeds and examples": Scenario(),
    "seeds alone": Scenario(of_example=0.0, of_run=0.01),
    "examples alone": Scenario(of_seed=0.0, of_run=0.0),
    "single runs alone": Scenario(of_seed=0.0, of_example=0.0, of_run=0.5),
    "6 examples to compare": Scenario(tasks=1, examples=12),
    "8 tasks of 6 examples": Scenario(tasks=8, examples=6),
    "400 examples": Scenario(examples=100, of_seed=0.02),
    "4 seeds": Scenario(seeds=4),
    "6 seeds": Scenario(seeds=6),
    "heavy tails": Scenario(skewed=True),
    "equal rates": Scenario(worse=0.0),
    "equal rates, seeds alone": Scenario(worse=0.0, of_example=0.0, of_run=0.01),
    "4 comparisons": Scenario(contexts=4),
    "accuracy": Scenario(metric="acc"),
}
BOUNDED = ("difference", "winner", "repair")


def main() -> None:
    """All scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="of each scenario")
    parser.add_argument("--out", type=Path, default=RESULTS / "study_nulls.json")
    parser.add_argument("--smoke", action="store_true", help="a few studies: shows that it runs")
    args = parser.parse_args()
    number = 4 if args.smoke else args.studies
    head = facts(f"python benchmarks/study_nulls.py --studies {number}")
    found = {name: asdict(each) | {"shares": shares(each, number)} for name, each in SCENARIOS.items()}
    largest = {
        what: max(share for each in found.values() if (share := each["shares"][what]) is not None)
        for what in (*BOUNDED, "score")
    }
    passes = {what: largest[what] <= ALLOWED for what in BOUNDED}
    write(args.out, head | {"studies": number, "scenarios": found, "largest": largest, "passes": passes})


def shares(scenario: Scenario, number: int, *, seed: int = 0) -> dict[str, float | None]:
    """Share of the cases in which `number` studies of a scenario said something false.

    difference: intervals that exclude 0; winner: studies with any winner; repair, score: intervals that miss the repair
    ratio or the score of an arm, None if there are none.
    """
    said: dict[str, list[bool]] = {what: [] for what in (*BOUNDED, "score")}
    with TemporaryDirectory() as folder:
        for index in range(number):
            draw = np.random.default_rng([seed, index])
            for what, cases in one_study(scenario, StudyDirectory(Path(folder)), draw).items():
                said[what] += cases
    return {what: sum(cases) / len(cases) if cases else None for what, cases in said.items()}


def one_study(scenario: Scenario, store: StudyDirectory, draw: np.random.Generator) -> dict[str, list[bool]]:
    """What one study says falsely."""
    compare = CompareConfig.model_validate(
        {"metric": scenario.metric, "reference": ARMS[0], "num_resamples": 999, "seed": "train.seed"}
    )
    results = Results(store, "validation")
    cells: list[dict[str, Any]] = []
    for context in range(scenario.contexts):
        cells += _cells(scenario, f"base {context}", results, draw)
    arms = find_arms(cells, compare, results)
    rows = comparisons(arms, compare, results, ARMS[0], [compare.metric])
    assert len(rows) == scenario.contexts
    said: dict[str, list[bool]] = {
        "difference": [row["lower"] > 0 or row["upper"] < 0 for row in rows],
        "winner": [any(row["winner"] for row in rows)],
        "score": [],
        "repair": [],
    }
    if scenario.metric != "nll_per_token":  # the true share of right answers has no closed form
        return said
    part = part_of(compare, arms)
    for arm in arms:
        if not arm.is_trained:
            continue
        truth = BASE + LOST - GAINED + (0.0 if arm.chosen["train.lr"] == RATES[1] else scenario.worse)
        found = quality(arm, results, compare.metric, part)
        assert found is not None
        said["score"].append(not found[0].lower <= truth <= found[0].upper)
        ratio, reason = repair(arm, compare, results, part)
        if not reason:
            said["repair"].append(not ratio.lower <= (BASE + LOST - truth) / LOST <= ratio.upper)
    return said


def _cells(scenario: Scenario, context: str, results: Results, draw: np.random.Generator) -> list[dict[str, Any]]:
    """The cells of one context; their scores are put into `results`."""
    shape = (scenario.tasks, scenario.examples)
    tokens = _tokens(scenario, draw, shape)
    hard = draw.exponential(size=shape) - 1.0  # the same for all: how hard each example is

    def noise(scale: float) -> Any:
        values = draw.standard_t(3, size=shape) / np.sqrt(3) if scenario.skewed else draw.normal(size=shape)
        return scale * values

    def add(key: str, per_token: Any, labels: dict[str, str], *, is_trained: bool) -> dict[str, Any]:
        names = {"base_key": f"{context} nf4", "dense_key": f"{context} dense"}
        results._results[key] = {"files": {}}
        results._scores[key, "validation"] = _scores(per_token, tokens)
        return {"key": key, "labels": {"base": context, **labels}, "is_trained": is_trained, **names}

    cells = [
        add(f"{context} dense", BASE + hard + noise(0.05), {"base": "dense"}, is_trained=False),
        add(f"{context} nf4", BASE + LOST + hard + noise(0.05), {}, is_trained=False),
    ]
    for arm in ARMS:
        of_arm = noise(scenario.of_example)
        for rate, seed in itertools.product(RATES, range(scenario.seeds)):
            level = BASE + LOST - GAINED + (0.0 if rate == RATES[1] else scenario.worse)
            level += scenario.of_seed * float(draw.normal())
            labels = {"adapter": arm, "train.lr": rate, "train.seed": str(seed)}
            per_token = level + hard + of_arm + noise(scenario.of_run)
            cells.append(add(" ".join((context, *labels.values())), per_token, labels, is_trained=True))
    return cells


def _tokens(scenario: Scenario, draw: np.random.Generator, shape: tuple[int, int]) -> Any:
    if scenario.skewed:
        return np.ceil(draw.lognormal(1.0, 1.0, shape))
    return draw.integers(1, 6, shape).astype(float)


def _scores(per_token: Any, tokens: Any) -> CellScores:
    """Scores as a cell has them; an answer is right if it is easy enough."""
    values: dict[str, Any] = {"nll_per_token": {}, "acc": {}}
    weights: dict[str, Any] = {"nll_per_token": {}, "acc": {}}
    for task, (row, counts) in enumerate(zip(per_token, tokens, strict=True)):
        names = [f"{index}#1" for index in range(len(row))]
        values["nll_per_token"][str(task)] = dict(zip(names, (row * counts).tolist(), strict=True))
        weights["nll_per_token"][str(task)] = dict(zip(names, counts.tolist(), strict=True))
        values["acc"][str(task)] = dict(zip(names, (row < BASE).astype(float).tolist(), strict=True))
        weights["acc"][str(task)] = dict.fromkeys(names, 1.0)
    return CellScores(values, weights)


if __name__ == "__main__":
    main()
