"""What the runs of expert_upcycling.py say: NLL of each arm and task, and differences with two kinds of intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paired import Paired, paired_difference
from scipy import stats


def summary(cells: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """NLL per answer token of base and arms by task and as their average, and differences between arms.

    Args:
        cells: The base's scores, and of each arm the rates, the chosen rate and its runs by seed.
    """
    arms = cells["arms"]
    seeds = list(next(iter(arms.values()))["runs"])
    base = [cells["base"]["scores"]] * len(seeds)
    scores = {arm: [found["runs"][seed]["test"]["scores"] for seed in seeds] for arm, found in arms.items()}
    pairs = {f"{arm} - base": (found, base) for arm, found in scores.items()}
    pairs |= {f"{one} - {two}": (scores[one], scores[two]) for one, two in itertools.combinations(scores, 2)}
    return {
        "seeds": [int(seed) for seed in seeds],
        "base": {"nll": _mean_nll(base, tasks)},
        "arms": {arm: _of_arm(found, scores[arm], tasks) for arm, found in arms.items()},
        "differences": {name: _differences(first, second, tasks) for name, (first, second) in pairs.items()},
    }


def _of_arm(found: Mapping[str, Any], scores: Sequence[Any], tasks: Sequence[str]) -> dict[str, Any]:
    runs = found["runs"]
    interval = paired_difference([_paired(task, scores) for task in tasks])
    return {
        "rates": found["rates"],
        "lr": found["lr"],
        "num_trainable": next(iter(runs.values()))["num_trainable"],
        "num_examples": [run["num_examples"] for run in runs.values()],
        "num_tokens": [run["num_tokens"] for run in runs.values()],
        "train_seconds": [round(run["seconds"], 1) for run in runs.values()],
        "losses": [run["losses"] for run in runs.values()],
        "nll": _mean_nll(scores, tasks),
        "nll_of_seeds": [_mean_nll([each], tasks)["average"] for each in scores],
        "interval": [interval.lower, interval.upper],
    }


def _mean_nll(scores: Sequence[Any], tasks: Sequence[str]) -> dict[str, float]:
    """Task, and "average" -> NLL per answer token over seeds."""
    found = {task: float(_matrix(scores, task, "nll").sum() / _matrix(scores, task, "tokens").sum()) for task in tasks}
    return found | {"average": float(np.mean([found[task] for task in tasks]))}


def _differences(first: Sequence[Any], second: Sequence[Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Task, and "average" -> first - second.

    lower, upper: 95 % t interval over seeds and examples. seeds_lower, seeds_upper: over the seeds alone, which says
    nothing of other examples.
    """
    pairs = {task: [_paired(task, first, second)] for task in tasks}
    pairs["average"] = [each for (each,) in pairs.values()]
    result = {}
    for name, parts in pairs.items():
        whole, by_seed = paired_difference(parts), _seed_differences(parts)
        half = float(stats.t.ppf(0.975, len(by_seed) - 1) * by_seed.std(ddof=1) / len(by_seed) ** 0.5)
        result[name] = {
            "value": whole.value,
            "lower": whole.lower,
            "upper": whole.upper,
            "p": whole.p,
            "seeds_lower": whole.value - half,
            "seeds_upper": whole.value + half,
        }
    return result


def _seed_differences(tasks: Sequence[Paired]) -> NDArray[np.float64]:
    """(seeds,) average over the tasks of first - second, per answer token."""
    averaged: NDArray[np.float64] = np.mean(
        [(task.first - task.second).sum(axis=1) / task.weights.sum() for task in tasks], axis=0
    )
    return averaged


def _paired(task: str, first: Sequence[Any], second: Sequence[Any] | None = None) -> Paired:
    """NLLs of two arms on the same examples; zeros stand for a second one that is not given."""
    tokens = [_matrix(scores, task, "tokens") for scores in (first, second) if scores is not None]
    assert all((each == tokens[0][0]).all() for each in tokens), f"{task}: other examples"
    nll = _matrix(first, task, "nll")
    return Paired(nll, np.zeros_like(nll) if second is None else _matrix(second, task, "nll"), tokens[0][0])


def _matrix(scores: Sequence[Any], task: str, name: str) -> NDArray[np.float64]:
    """(seeds, examples)."""
    return np.array([each[task][name] for each in scores], dtype=np.float64)
