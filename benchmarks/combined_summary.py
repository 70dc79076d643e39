"""What the cells of combined_vs_solo.py say: differences between arms over the same examples and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdora.evaluation.paired import Paired, paired_difference

Cells = Mapping[str, dict[str, Any]]
METRICS = ("nll", "acc")


def summary(cells: Cells, tasks: Sequence[str]) -> dict[str, Any]:
    """Per kind: scores of base, combined and solo, their differences, and what each left-out task did to the others.

    Only seeds count that have all cells of a comparison.
    """
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(key.split(":")[0] for key in cells if not key.startswith("none")):
        arms = _arms(cells, kind)
        result: dict[str, Any] = {"cells": {name: _costs(by_seed) for name, by_seed in arms.items()}}
        solo = {task: arms.get(f"solo {task}", {}) for task in tasks}
        combined = arms.get("combined", {})
        seeds = _shared([combined, *solo.values()])
        if seeds:
            first = {task: [combined[seed] for seed in seeds] for task in tasks}
            second = {task: [solo[task][seed] for seed in seeds] for task in tasks}
            result["seeds"] = seeds
            result["combined - solo"] = differences(first, second)
            result["scores"] = {"combined": _means(first), "solo": _means(second)}
            base = cells.get("none:0:base:0")
            if base is not None:
                result["scores"]["base"] = _means({task: [base] for task in tasks})
        left_out = {task: arms.get(f"without {task}", {}) for task in tasks}
        seeds = _shared([combined, *left_out.values()])
        if seeds:
            result["left_out_seeds"] = seeds
            result["combined - without"] = {
                task: differences(
                    {each: [combined[seed] for seed in seeds] for each in tasks},
                    {each: [without[seed] for seed in seeds] for each in tasks},
                )
                for task, without in left_out.items()
            }
        found[kind] = result
    return {"kinds": found}


def differences(first: Mapping[str, list[Any]], second: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Metric -> task, and "average" -> first - second with its interval. NLL per answer token; accuracy as a share."""
    result: dict[str, Any] = {}
    for metric in METRICS:
        pairs = {task: _paired(task, metric, first[task], second[task]) for task in first}
        result[metric] = {task: asdict(paired_difference([pair])) for task, pair in pairs.items()}
        result[metric]["average"] = asdict(paired_difference(list(pairs.values())))
    return result


def best_rates(cells: Cells) -> dict[str, Any]:
    """Way -> learning rate -> macro NLL of the sweep, and the best."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for key, cell in cells.items():
        _, _, name, rate = key.split(":")
        for task, scores in cell["scores"].items():
            nll = sum(scores["nll"]) / sum(scores["tokens"])
            found.setdefault(name.partition(" ")[0], {}).setdefault(rate, {})[task] = nll
    macro = {
        way: {rate: sum(nlls.values()) / len(nlls) for rate, nlls in rates.items()} for way, rates in found.items()
    }
    return {way: {"nll": rates, "best": min(rates, key=rates.__getitem__)} for way, rates in macro.items()}


def _arms(cells: Cells, kind: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Name of an arm -> seed -> cell."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, cell in cells.items():
        of_kind, seed, name, _ = key.split(":")
        if of_kind == kind:
            found.setdefault(name, {})[seed] = cell
    return found


def _shared(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Seeds that every arm has."""
    return sorted(set(arms[0]).intersection(*arms), key=int)


def _costs(by_seed: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What the runs of an arm took, seed by seed."""
    names = ("num_steps", "num_examples", "num_tokens", "num_label_tokens", "seconds")
    return {name: [cell[name] for cell in by_seed.values()] for name in names}


def _matrix(task: str, metric: str, cells: list[Any]) -> NDArray[np.float64]:
    """(seeds, examples)."""
    return np.array([cell["scores"][task][metric] for cell in cells], dtype=np.float64)


def _paired(task: str, metric: str, first: list[Any], second: list[Any]) -> Paired:
    tokens = _matrix(task, "tokens", first)
    assert (tokens == _matrix(task, "tokens", second)).all(), f"{task}: other examples"
    weights = tokens[0] if metric == "nll" else np.ones(tokens.shape[1])
    return Paired(_matrix(task, metric, first), _matrix(task, metric, second), weights)


def _means(arms: Mapping[str, list[Any]]) -> dict[str, dict[str, float]]:
    """Task, and "average" -> nll per token and accuracy, over examples and seeds."""
    found = {}
    for task, cells in arms.items():
        tokens = _matrix(task, "tokens", cells).sum()
        found[task] = {
            "nll": float(_matrix(task, "nll", cells).sum() / tokens),
            "acc": float(_matrix(task, "acc", cells).mean()),
        }
    average = {metric: float(np.mean([found[task][metric] for task in arms])) for metric in METRICS}
    return found | {"average": average}
