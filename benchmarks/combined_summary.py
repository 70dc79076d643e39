"""What the cells of combined_vs_solo.py say: differences between arms over the same examples and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdora.evaluation.metrics import Paired, paired_difference

Cells = Mapping[str, dict[str, Any]]
Arms = Mapping[str, Mapping[str, dict[str, Any]]]
"""Name of an arm -> seed -> cell."""
METRICS = ("nll", "acc")


def summary(cells: Cells, tasks: Sequence[str]) -> dict[str, Any]:
    """Per kind: scores of base, combined and solo, their differences, and what remedies and left-out tasks change.

    Of a grid that is not finished the tasks count that have a solo run, and the seeds that have all of these.
    """
    kinds = dict.fromkeys(key.split(":")[0] for key in cells if not key.startswith("none"))
    return {"kinds": {kind: _of_kind(_arms(cells, kind), cells.get("none:0:base:0"), tasks) for kind in kinds}}


def _of_kind(arms: Arms, base: dict[str, Any] | None, tasks: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"cells": {name: _costs(by_seed) for name, by_seed in arms.items()}}
    combined = arms.get("combined", {})
    solo = {task: arms[f"solo {task}"] for task in tasks if f"solo {task}" in arms}
    seeds = _shared([combined, *solo.values()]) if solo else []
    if seeds:
        first = {task: [combined[seed] for seed in seeds] for task in solo}
        second = {task: [solo[task][seed] for seed in seeds] for task in solo}
        result |= {"seeds": seeds, "combined - solo": differences(first, second)}
        result["scores"] = {"combined": _means(first), "solo": _means(second)}
        if base is not None:
            result["scores"]["base"] = _means({task: [base] for task in solo})
    # Cells kept from earlier versions have such an arm, pcgrad: the combined run with projected gradients.
    for remedy in (name for name in arms if name != "combined" and " " not in name):
        seeds = _shared([combined, arms[remedy]])
        if seeds:
            found = _against(combined, arms[remedy], seeds, tasks)
            result.setdefault("combined - remedy", {})[remedy] = {"seeds": seeds, **found}
    left_out = {task: arms.get(f"without {task}", {}) for task in tasks}
    seeds = _shared([combined, *left_out.values()])
    if seeds:
        found = {task: _against(combined, without, seeds, tasks) for task, without in left_out.items()}
        result |= {"left_out_seeds": seeds, "combined - without": found}
    return result


def _against(
    first: Mapping[str, Any], second: Mapping[str, Any], seeds: Sequence[str], tasks: Sequence[str]
) -> dict[str, Any]:
    """`differences` of two arms that are scored on all tasks."""
    one, other = ({task: [arm[seed] for seed in seeds] for task in tasks} for arm in (first, second))
    return differences(one, other)


def differences(first: Mapping[str, list[Any]], second: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Metric -> task, and "average" -> first - second with its interval. NLL per answer token; accuracy as a share."""
    result: dict[str, Any] = {}
    for metric in METRICS:
        pairs = {task: _paired(task, metric, first[task], second[task]) for task in first}
        result[metric] = {task: asdict(paired_difference([pair])) for task, pair in pairs.items()}
        result[metric]["average"] = asdict(paired_difference(list(pairs.values())))
    return result


def best_rates(cells: Cells) -> dict[str, Any]:
    """Way -> learning rate -> macro NLL of the sweep over the tasks that all rates have, and the best."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for key, cell in cells.items():
        _, _, name, rate = key.split(":")
        for task, scores in cell["scores"].items():
            nll = sum(scores["nll"]) / sum(scores["tokens"])
            found.setdefault(name.partition(" ")[0], {}).setdefault(rate, {})[task] = nll
    result = {}
    for way, rates in found.items():
        tasks = sorted(set.intersection(*(set(nlls) for nlls in rates.values())))
        macro = {rate: sum(nlls[task] for task in tasks) / len(tasks) for rate, nlls in rates.items()}
        result[way] = {"tasks": tasks, "nll": macro, "best": min(macro, key=macro.__getitem__)}
    return result


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
