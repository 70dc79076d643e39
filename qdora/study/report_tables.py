"""The tables of a study's report: arms, comparisons, cells, layers, and the study's settings and counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdora.errors import UserError
from qdora.study.compare import (
    BASE_ARM,
    CONFIDENCE,
    Arm,
    Part,
    Results,
    comparisons,
    find_arms,
    part_of,
    quality,
    repair,
    verdict,
)
from qdora.study.grid import CompareConfig, Study
from qdora.study.scores import HIGHER_IS_BETTER, mean_score
from qdora.study.study_directory import StudyDirectory, read_index

Rows = list[dict[str, Any]]

_MIB = 2**20
_LABELS = {"nll_per_token": "NLL (nats per token)", "acc": "accuracy", "acc_norm": "accuracy per character"}


@dataclass(frozen=True)
class Report:
    """All that a report shows; every number of its page is in one of the tables, which are named for their data files.

    `axes` are those of a context: neither compared, tuned nor seeds.
    """

    tables: dict[str, Rows]
    verdict: list[str]
    axes: list[str]
    arm_axis: str
    metric: str
    metric_label: str


def read_report(directory: Path) -> Report:
    """All tables from the finished cells of a study's directory. UserError: no study, or no finished cell."""
    index = read_index(directory)
    study = Study.model_validate(index["study"])
    compare, cells = study.compare, index["cells"]
    store = StudyDirectory(directory, retries=study.retries)
    results = Results(store, "validation" if compare.split == "halves" else "test")
    arms = find_arms(cells, compare, results)
    if not arms:
        raise UserError(f"{directory}: no cell is finished yet. Fix: run 'qdora study' first.")
    part = part_of(compare, arms)
    trained = [arm for arm in arms if arm.is_trained]
    reference = compare.reference or (trained[0].name if trained else "")
    pairs = comparisons(arms, compare, results, reference, _measures(arms, compare, results))
    axes = [axis for axis in study.product if axis not in (compare.arm, compare.seed, *compare.choose)]
    arm_rows = [_arm_row(arm, axes, compare, results, part) for arm in arms]
    _mark_pareto(arm_rows, compare.metric)
    cell_rows = [_cell_row(cell, list(study.product), store, results) for cell in cells]
    tables = {
        "arms": arm_rows,
        "comparisons": pairs,
        "cells": cell_rows,
        "layers": [row for cell in cells for row in _layer_rows(cell, axes, results)],
        "facts": _facts(cell_rows, pairs, compare, part, reference),
    }
    label = _LABELS[compare.metric]
    return Report(
        tables=tables,
        verdict=verdict(pairs, cell_rows, axes, compare, label),
        axes=axes,
        arm_axis=compare.arm,
        metric=compare.metric,
        metric_label=label,
    )


def _measures(arms: Sequence[Arm], compare: CompareConfig, results: Results) -> list[str]:
    """The metric of the study, and the shares of generated answers if answers were generated."""
    scored = results.scores(next(iter(arms[0].seeds.values()))).values
    return [compare.metric, *(measure for measure in ("right", "unparsable") if measure in scored)]


def _arm_row(arm: Arm, axes: Sequence[str], compare: CompareConfig, results: Results, part: Part) -> dict[str, Any]:
    row: dict[str, Any] = {axis: arm.context.get(axis, "uncompressed") for axis in axes}
    row |= {compare.arm: arm.name, "is_trained": arm.is_trained}
    row |= {axis: arm.chosen.get(axis, "") for axis in compare.choose}
    row |= {"at_edge": arm.at_edge, "num_seeds": len(arm.seeds), "num_missing": arm.num_missing}
    for measure in HIGHER_IS_BETTER:
        found = quality(arm, compare, results, measure, part)
        if found is not None:
            interval, num_examples = found
            row |= {"num_examples": num_examples} if measure == compare.metric else {}
            row |= {measure: interval.value, f"{measure}_lower": interval.lower, f"{measure}_upper": interval.upper}
    size = _sizes(next(iter(arm.seeds.values())), results)
    ratio, why = repair(arm, compare, results, part)
    row |= size
    row |= {"repair": ratio.value, "repair_lower": ratio.lower, "repair_upper": ratio.upper, "repair_reason": why}
    return row


def _sizes(key: str, results: Results) -> dict[str, Any]:
    result = results.result(key)
    assert result is not None, key
    size, compression = result["size"], result.get("compression") or {}
    return {
        "bits_per_weight": 8 * size["num_linear_bytes"] / max(1, size["num_linear_weights"]),
        "sparsity": float(compression.get("sparsity", 0.0)),
        "total_mib": (size["num_base_bytes"] + size["num_adapter_bytes"]) / _MIB,
        "adapter_mib": size["num_adapter_bytes"] / _MIB,
    }


def _mark_pareto(rows: Rows, metric: str) -> None:
    """Mark each arm: is no other arm as good in fewer bytes, or better in as many?"""
    sign = -1.0 if HIGHER_IS_BETTER[metric] else 1.0
    points = [(row["total_mib"], sign * row[metric]) for row in rows if metric in row]
    for row in rows:
        if metric in row:
            mib, score = row["total_mib"], sign * row[metric]
            row["pareto"] = not any(m <= mib and s <= score and (m, s) != (mib, score) for m, s in points)


def _cell_row(cell: Mapping[str, Any], axes: Sequence[str], store: StudyDirectory, results: Results) -> dict[str, Any]:
    key = cell["key"]
    attempts, result = store.failures(key), results.result(key)
    status = "done" if result is not None else "failed" if store.is_given_up(key) else "open"
    row: dict[str, Any] = {axis: cell["labels"].get(axis, "") for axis in axes}
    row |= {"cell": key, "status": status, "num_failures": len(attempts)}
    row["reason"] = attempts[-1]["reason"] if attempts else ""
    if result is None:
        return row
    scores = results.scores(key)
    found = {measure: mean_score([scores], measure, "all") for measure in HIGHER_IS_BETTER if measure in scores.values}
    kept = {name: result.get(name) for name in ("seconds", "num_steps", "num_trainable", "final_loss")}
    return row | found | kept | _sizes(key, results)


def _layer_rows(cell: Mapping[str, Any], axes: Sequence[str], results: Results) -> Rows:
    """What compression did to each layer; only bases have such rows, since adapters do not change the base."""
    result = None if cell["is_trained"] else results.result(cell["key"])
    layers = ((result or {}).get("compression") or {}).get("layers") or {}
    context = {axis: cell["labels"].get(axis, "uncompressed") for axis in axes}
    return [context | {"layer": name} | dict(values) for name, values in layers.items()]


def _facts(cells: Rows, pairs: Rows, compare: CompareConfig, part: Part, reference: str) -> Rows:
    status = [row["status"] for row in cells]
    facts: dict[str, Any] = {
        "cells": len(cells),
        "cells done": status.count("done"),
        "cells failed": status.count("failed"),
        "cells open": status.count("open"),
        "cells without result": len(cells) - status.count("done"),
        "failed attempts": sum(row["num_failures"] for row in cells),
        "confidence %": 100 * CONFIDENCE,
        "alpha": compare.alpha,
        "least seeds": compare.min_seeds,
        "resamples": compare.num_resamples,
        "hours": sum(row.get("seconds") or 0.0 for row in cells) / 3600,
        "reference": reference or BASE_ARM,
        "compared on": "the test split"
        if compare.split == "test"
        else "one half of the validation examples, tuned on the other"
        if part == "compare"
        else "the validation examples",
    }
    for measure in dict.fromkeys(row["measure"] for row in pairs):
        winners = [row["winner"] for row in pairs if row["measure"] == measure]
        facts |= {f"comparisons of {measure}": len(winners), f"without a winner in {measure}": winners.count("")}
        facts[f"with a winner in {measure}"] = len(winners) - winners.count("")
        facts |= {f"{name} wins in {measure}": winners.count(name) for name in sorted({*winners} - {""})}
    return [
        {"fact": name, "value": None, "text": value}
        if isinstance(value, str)
        else {"fact": name, "value": float(value), "text": ""}
        for name, value in facts.items()
    ]


def is_number(value: Any) -> bool:
    """Whether a value of a table is a finite number."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
