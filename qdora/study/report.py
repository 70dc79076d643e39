"""The report of a study: one HTML page that needs no other file, Markdown, and every number as CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from qdora.errors import UserError
from qdora.evaluation.example_intervals import CONFIDENCE
from qdora.files.atomic import atomic_write_text, disk_failures
from qdora.files.console import consoles
from qdora.files.run_directory import RunDirectory
from qdora.model.inject import block_of
from qdora.recipe.recipe_file import load_recipe
from qdora.study.answer import answer_of, notes_of, question_of, subject_of
from qdora.study.cells import equal_in_words
from qdora.study.compare import (
    BASE_ARM,
    Arm,
    Results,
    comparisons,
    count_primary,
    find_arms,
    level_seeds,
    quality,
    task_rows,
)
from qdora.study.grid import RATE, SEED, Study, in_words
from qdora.study.guesses import read_guesses
from qdora.study.repair import damage_row, repair_row
from qdora.study.report_contents import Report, Row, Rows
from qdora.study.report_page import html_page, markdown_page, shown_tables
from qdora.study.scores import HIGHER_IS_BETTER
from qdora.study.study_directory import StudyDirectory, read_index

_MIB = 2**20
_CURVE_POINTS = 32
_LABELS = {
    "nll_per_token": "NLL (nats per token)",
    "acc": "accuracy",
    "acc_norm": "accuracy per character",
}


def report_run(directory: Path, out: Path | None = None, *, console: Console | None = None) -> dict[str, Any]:
    """Write the report of a study, whether or not all of its cells are finished; default `directory`/report.

    Returns the page, all files, the answer, the notes, and the comparisons. UserError: no study, or no finished cell.
    """
    _, results = consoles(console)
    report = read_report(directory)
    folder = out or directory / "report"
    with disk_failures(folder):
        files = write_report(report, folder, directory.resolve().name)
    for sentence in (*report.answer, *report.notes):
        results.print(sentence)
    results.print(f"report: {files[0]}", soft_wrap=True)
    return {
        "page": str(files[0]),
        "files": [str(file) for file in files],
        "answer": report.answer,
        "notes": report.notes,
        "comparisons": report.tables["comparisons"],
    }


def write_report(report: Report, directory: Path, title: str) -> list[Path]:
    """Write index.html, report.md, and each table as .csv; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in report.tables.items():
        if not rows:
            continue
        written.append(directory / f"{name}.csv")
        atomic_write_text(written[-1], pd.DataFrame(rows).to_csv(index=False))
    shown = shown_tables(report)
    page = html_page(report, shown, title)  # draws the figures: if that fails, no page is written
    atomic_write_text(directory / "report.md", markdown_page(report, shown, title))
    atomic_write_text(directory / "index.html", page)
    return [directory / "index.html", directory / "report.md", *written]


def read_report(directory: Path) -> Report:
    """All tables from the finished cells of a study's directory. UserError: no study, or no finished cell."""
    index = read_index(directory)
    study = Study.model_validate(index["study"])
    compare, cells = study.compare, index["cells"]
    if compare.reference is None and any(cell["kind"] == "trained" for cell in cells):
        raise UserError(f"{directory}: was made by an older qdora. Fix: run 'qdora study' there again.")
    store = StudyDirectory(directory, retries=study.retries)
    results = Results(store, study)
    arms = find_arms(cells, results)
    if not arms:
        if any(results.diverged(cell["key"]) for cell in cells):
            raise UserError(f"{directory}: every finished cell diverged. Fix: add lower values to rates.")
        raise UserError(f"{directory}: no cell is finished yet. Fix: run 'qdora study' first.")
    measures = _measures(arms, results)
    pairs = comparisons(arms, results, measures, cells, num_primary=count_primary(study, cells))
    axes = [axis for axis in study.product if axis != compare.arm]
    runs = {cell["key"]: cell["adapter_key"] for cell in cells if cell["kind"] in ("rescaled", "set_back", "by_layer")}
    arm_rows = [_arm_row(arm, axes, results, runs) for arm in arms]
    _mark_pareto(arm_rows, arms, study)
    cell_rows = [_cell_row(cell, list(study.product), store, results, runs) for cell in cells]
    trained = [arm for arm in arms if arm.kind == "trained"]
    tables = {
        "comparisons": pairs,
        "tasks": task_rows(arms, results, [name for name in measures if name != "nll_by_task"], cells),
        "repair": [row for arm in arms if (row := _repair_row(arm, arms, axes, results))],
        "arms": arm_rows,
        "rates": index["rates"],
        "cells": cell_rows,
        "curves": [row for arm in trained for row in _curve_rows(arm, axes, results)],
        "layers": [row for cell in cells for row in _layer_rows(cell, axes, results)],
        "changes": [row for cell in cells for row in _change_rows(cell, axes, results)],
        "checkpoints": [row for cell in cells for row in _checkpoint_rows(cell, axes, results)],
        "blocks": [row for cell in cells for row in _block_rows(cell, axes, results)],
        "guesses": _guess_rows(cells, results),
        "facts": _facts(cell_rows, pairs, results),
    }
    subject = _subject(trained, results)
    status = [row["status"] for row in cell_rows]
    if "open" in status:
        subject += f" {status.count('done') + status.count('diverged')} of {len(status)} cells are done so far."
    tables["facts"].append({"fact": "studied", "value": None, "text": subject})
    label = _LABELS[compare.metric]
    notes = notes_of(cell_rows, index["rates"], sum(index["num_waiting"].values()))
    return Report(
        tables=tables,
        question=question_of(pairs, tables["repair"]),
        subject=subject,
        answer=answer_of(pairs, axes, label),
        notes=[*notes, *filter(None, [equal_in_words(cells)])],
        axes=axes,
        compare=compare,
        metric_label=label,
    )


def _subject(trained: Sequence[Arm], results: Results) -> str:
    """Told by the recipe of a run of each arm; "" without one that this version reads."""
    recipes, num_seeds = [], [len(arm.seeds) for arm in trained]
    for arm in trained:
        runs = (RunDirectory(results.store.cell(key)) for key in arm.seeds.values())
        file = next((run.recipe_file for run in runs if run.recipe_file.is_file()), None)
        if file is not None:
            with suppress(UserError):  # of an older version
                recipes.append(load_recipe(file))
    return subject_of(recipes, num_seeds) if recipes else ""


def _measures(arms: Sequence[Arm], results: Results) -> list[str]:
    """The metric of the study, and what else is told of its comparisons."""
    scored = {
        measure
        for arm in arms
        for key in arm.seeds.values()
        if arm.kind == "trained" and not results.diverged(key)
        for measure in results.scores(key)
    }
    more = ("nll_by_task", "acc", "acc_norm", "right", "unparsable")
    metric = results.study.compare.metric
    return [metric, *(measure for measure in more if measure in scored and measure != metric)]


def _is_dense(of: Mapping[str, Any]) -> bool:
    """Whether the base of a cell or an arm is the uncompressed one."""
    return bool(of["base_key"] == of["dense_key"])


def _labels_of(labels: Mapping[str, str], axes: Sequence[str], *, is_dense: bool = False) -> dict[str, Any]:
    """Labels on the axes; an uncompressed base has none, and no base has one on an axis that only changes training."""
    return {axis: labels.get(axis, "uncompressed" if is_dense and not labels else "") for axis in axes}


def _arm_row(arm: Arm, axes: Sequence[str], results: Results, runs: Mapping[str, str]) -> dict[str, Any]:
    """`runs`: as of `_sizes`."""
    is_dense = _is_dense(vars(arm))
    row: dict[str, Any] = _labels_of(arm.context, axes, is_dense=is_dense)
    row |= {results.study.compare.arm: arm.name, "kind": arm.kind, "is_trained": arm.kind == "trained"}
    row |= {"is_dense": is_dense, "rate": arm.rate, "rate_is_interior": arm.is_interior}
    seeds = level_seeds(arm, results.study)
    diverged = sum(results.diverged(arm.seeds[seed]) for seed in seeds)
    row |= {"num_seeds": len(seeds), "num_missing": arm.num_missing, "num_diverged": diverged}
    for measure in HIGHER_IS_BETTER:
        found = quality(arm, results, measure)
        if found is not None:
            row |= found.columns(measure)
    return row | _sizes([key for key in arm.seeds.values() if not results.diverged(key)], results, runs)


def _repair_row(arm: Arm, arms: Sequence[Arm], axes: Sequence[str], results: Results) -> dict[str, Any]:
    """Damage of a base, or what an arm repaired; empty for a transplant."""
    found = damage_row(arm, results) | repair_row(arm, arms, results)
    return _labels_of(arm.context, axes) | {results.study.compare.arm: arm.name} | found if found else {}


def _sizes(keys: Sequence[str], results: Results, runs: Mapping[str, str]) -> dict[str, Any]:
    """Bytes and sparsity of the first of these cells; empty without one.

    `runs`: cell -> the cell whose run it evaluates, and which knows how its base was compressed.
    """
    result = results.result(keys[0]) if keys else None
    if result is None:
        return {}
    compressed = results.result(runs.get(keys[0], keys[0])) or {}
    size, compression = result["size"], compressed.get("compression") or {}
    return {
        "bits_per_weight": 8 * size["num_linear_bytes"] / max(1, size["num_linear_weights"]),
        "sparsity": float(compression.get("sparsity", 0.0)),
        "total_mib": (size["num_base_bytes"] + size["num_adapter_bytes"]) / _MIB,
        "adapter_mib": size["num_adapter_bytes"] / _MIB,
    }


def _mark_pareto(rows: Rows, arms: Sequence[Arm], study: Study) -> None:
    """Mark each trained arm with the most seeds: is no other of them as good in fewer bytes, or better in as many?

    With `eval.limit` arms with other seeds have other examples, so these arms are not ranked.
    """
    metric = study.compare.metric
    sign = -1.0 if HIGHER_IS_BETTER[metric] else 1.0
    measured = [
        (set(level_seeds(arm, study)), row)
        for arm, row in zip(arms, rows, strict=True)
        if arm.kind == "trained" and metric in row and "total_mib" in row
    ]
    most = max((seeds for seeds, _ in measured), key=len, default=set())
    shown = [row for seeds, row in measured if seeds == most]
    points = [(row["total_mib"], sign * row[metric]) for row in shown]
    for row in shown:
        mib, score = row["total_mib"], sign * row[metric]
        row["pareto"] = not any(m <= mib and s <= score and (m, s) != (mib, score) for m, s in points)


def _cell_row(
    cell: Mapping[str, Any], axes: Sequence[str], store: StudyDirectory, results: Results, runs: Mapping[str, str]
) -> dict[str, Any]:
    """`runs`: as of `_sizes`."""
    key = cell["key"]
    attempts, result = store.failures(key), results.result(key)
    status = "done" if result is not None else "failed" if store.is_given_up(key) else "open"
    row: dict[str, Any] = {axis: cell["labels"].get(axis, "") for axis in (*axes, RATE, SEED)}
    row |= {"stage": cell["stage"], "kind": cell["kind"], "cell": key}
    row |= {"equal_to": "; ".join(map(in_words, cell.get("equal", ()))), "status": status}
    row |= {"num_failures": len(attempts), "reason": attempts[-1]["reason"] if attempts else ""}
    if result is None:
        return row
    if results.diverged(key):
        return row | {"status": "diverged", "reason": result["diverged"], "seconds": result["seconds"]}
    found = {measure: results.mean(key, measure, "all") for measure in HIGHER_IS_BETTER}
    kept = {name: result.get(name) for name in ("seconds", "num_steps", "num_trainable", "final_loss")}
    return row | {name: value for name, value in found.items() if value == value} | kept | _sizes([key], results, runs)


def _layer_rows(cell: Mapping[str, Any], axes: Sequence[str], results: Results) -> Rows:
    """What compression did to each layer; only bases have such rows, since adapters do not change the base."""
    result = results.result(cell["key"]) if cell["kind"] == "base" else None
    layers = ((result or {}).get("compression") or {}).get("layers") or {}
    context = _labels_of(cell["labels"], axes, is_dense=_is_dense(cell))
    return [context | {"layer": name} | dict(values) for name, values in layers.items()]


def _change_rows(cell: Mapping[str, Any], axes: Sequence[str], results: Results) -> Rows:
    """What training did to the weights of each layer, of arms that were measured layer by layer."""
    result = results.result(cell["key"]) if cell["kind"] == "by_layer" else None
    return [
        _of_run(cell, axes, results)
        | {"layer": path, "block": block_of(path)}
        | {"direction_change": change["direction"], "magnitude_change": change["magnitude"]}
        | {name: value for name, value in change.items() if name.startswith("error_")}
        for path, change in ((result or {}).get("changes") or {}).items()
    ]


def _checkpoint_rows(cell: Mapping[str, Any], axes: Sequence[str], results: Results) -> Rows:
    """What training did to each layer up to each checkpoint, and the loss there."""
    return [
        _of_run(cell, axes, results)
        | {"step": each["step"], "nll": each["nll"], "layer": path, "block": block_of(path)}
        | {f"{name}_change": value for name, value in change.items()}
        for each in (results.result(cell["key"]) or {}).get("checkpoints", ())
        for path, change in each["changes"].items()
    ]


def _of_run(cell: Mapping[str, Any], axes: Sequence[str], results: Results) -> dict[str, Any]:
    return {axis: cell["labels"].get(axis, "") for axis in (*axes, results.study.compare.arm, SEED)}


def _block_rows(cell: Mapping[str, Any], axes: Sequence[str], results: Results) -> Rows:
    """What compression of all layers did to the hidden states, and what the adapter of each block contributes."""
    result = results.result(cell["key"]) or {}
    if cell["kind"] == "base":
        context = _labels_of(cell["labels"], axes, is_dense=_is_dense(cell))
        errors = enumerate(result.get("hidden_errors", ()))
        return [context | {"block": block, "relative_error": error} for block, error in errors]
    return [
        _of_run(cell, axes, results) | {"block": each["block"], "block_off": each["rise"]}
        for each in result.get("blocks", ())
    ]


def _curve_rows(arm: Arm, axes: Sequence[str], results: Results) -> Iterator[dict[str, Any]]:
    """Training loss of an arm, averaged over its `level_seeds` and in at most `_CURVE_POINTS` parts of equal length."""
    keys = [arm.seeds[seed] for seed in level_seeds(arm, results.study)]
    runs = [RunDirectory(results.store.cell(key)) for key in keys if not results.diverged(key)]
    losses: dict[int, list[float]] = {}
    for run in runs:
        for line in run.metrics() if run.metrics_file.is_file() else ():
            if line.get("loss") is not None:
                losses.setdefault(line["step"], []).append(line["loss"])
    steps = sorted(losses)
    length = -(-len(steps) // _CURVE_POINTS)
    for start in range(0, len(steps), max(1, length)):
        part = steps[start : start + length]
        mean = sum(sum(losses[step]) / len(losses[step]) for step in part) / len(part)
        context = _labels_of(arm.context, axes) | {results.study.compare.arm: arm.name}
        yield context | {"step": part[-1], "training_loss": mean, "num_seeds": len(runs)}


def _guess_rows(cells: Sequence[Row], results: Results) -> Rows:
    """Of models that know nothing, on the examples of the uncompressed base."""
    dense = next((cell["dense_key"] for cell in cells if cell["kind"] == "base"), None)
    if dense is None or results.result(dense) is None:
        return []
    found = read_guesses(results.store.shared("guesses", dense))
    chance = results.mean(dense, "chance", "all")
    choice = [] if math.isnan(chance) else [{"guess": "choice", "acc": chance}]
    return [{"guess": name, "nll": value} for name, value in found.items()] + choice


def _facts(cells: Rows, pairs: Rows, results: Results) -> Rows:
    compare = results.study.compare
    status = [row["status"] for row in cells]
    facts: dict[str, Any] = {
        "cells": len(cells),
        "trainings": sum(row["kind"] in ("rate", "trained") for row in cells),
        "cells done": status.count("done"),
        "cells diverged": status.count("diverged"),
        "trainings diverged in the comparison": sum(
            (row["kind"], row["status"]) == ("trained", "diverged") for row in cells
        ),
        "cells failed": status.count("failed"),
        "cells open": status.count("open"),
        "cells without result": len(cells) - status.count("done") - status.count("diverged"),
        "failed attempts": sum(row["num_failures"] for row in cells),
        "confidence %": 100 * CONFIDENCE,
        "alpha": compare.alpha,
        "zone": compare.zone,
        "power %": 100 * compare.power,
        "least seeds": compare.min_seeds,
        "hours": sum(row.get("seconds") or 0.0 for row in cells) / 3600,
        "reference": compare.reference or BASE_ARM,
        "weights of tasks": f"{compare.tasks} in NLL per token",
        "compared on": "the test split"
        if compare.split == "test"
        else "one half of the validation examples; the other half chose the rates"
        if results.part == "compare"
        else "the validation examples",
    }
    primary = [row for row in pairs if row["role"] == "primary"]
    winners = [row["winner"] for row in primary]
    facts |= {"primary comparisons": len(primary), "not decided": sum(r["verdict"] == "not decided" for r in primary)}
    facts |= {"equivalent": sum(r["verdict"].startswith("no difference") for r in primary)}
    facts |= {f"{name} is better": winners.count(name) for name in sorted({*winners} - {""})}
    return [
        {"fact": name, "value": None, "text": value}
        if isinstance(value, str)
        else {"fact": name, "value": float(value), "text": ""}
        for name, value in facts.items()
    ]
