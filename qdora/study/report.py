"""The report of a study: every number as CSV, and a page of the main ones with their figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from qdora.errors import UserError
from qdora.evaluate.suite import ACCURACIES, LABELS
from qdora.files.atomic import atomic_write_text, disk_failures
from qdora.files.console import consoles
from qdora.files.pages import markdown_table, new_figure, render_page, svg_text
from qdora.model.inject import block_of
from qdora.study.compare import Arm, comparisons, damage_row, find_arms, quality, repair_row, task_rows
from qdora.study.grid import RATE, SEED, CompareConfig, Study, first_seeds
from qdora.study.results import HIGHER_IS_BETTER, Results, StudyDirectory, read_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]

# Table -> title, columns behind the axes, what they mean
_SHOWN = {
    "comparisons": (
        "Comparisons",
        "comparison measure role improvement lower upper p_holm p_equivalent_holm smallest_detectable num_seeds "
        "verdict reason",
        "A positive improvement is better. lower, upper: 95 % t interval over the seeds. p holm: of the t tests over "
        "seeds and over examples; p equivalent holm: that the arms differ by the zone or more.",
    ),
    "tasks": (
        "Tasks",
        "comparison task weight measure improvement lower upper",
        "weight: of the task in the metric.",
    ),
    "repair": (
        "Damage and repair",
        "damage_choice damage_choice_lower damage_choice_upper left left_lower left_upper transplant repaired "
        "repaired_share repaired_share_lower repaired_share_upper magnitudes magnitudes_lower magnitudes_upper",
        "damage choice: accuracy per character that the untrained base lost. left: how much worse the trained arm is "
        "than the same arm on the uncompressed base; transplant: the same of that arm's adapter on this base. "
        "repaired: gained on the transplant by training here. magnitudes: lost by setting them back.",
    ),
    "arms": (
        "Arms",
        "kind rate num_seeds num_missing num_diverged bits_per_weight sparsity total_mib nll_per_token "
        f"nll_per_token_lower nll_per_token_upper {' '.join(ACCURACIES)}",
        "Means over all seeds of an arm, which others may lack. Intervals may overlap although arms differ.",
    ),
    "rates": (
        "Learning rates",
        "rate is_interior num_runs num_diverged losses",
        "losses: inf: a run diverged.",
    ),
}


@dataclass(frozen=True)
class Report:
    """What a report shows; `axes` are those of a context."""

    tables: dict[str, Rows]
    answer: list[str]
    status: str
    axes: list[str]
    compare: CompareConfig


def report_run(directory: Path, out: Path | None = None, *, console: Console | None = None) -> dict[str, Any]:
    """Write the report of a study, finished or not, by default to `directory`/report."""
    _, results = consoles(console)
    report, folder = read_report(directory), out or directory / "report"
    with disk_failures(folder):
        files = write_report(report, folder, directory.resolve().name)
    for sentence in (*report.answer, report.status, f"report: {files[0]}"):
        results.print(sentence, soft_wrap=True)
    found = {
        "page": str(files[0]),
        "files": list(map(str, files)),
        "answer": report.answer,
        "status": report.status,
    }
    return found | {"comparisons": report.tables["comparisons"]}


def write_report(report: Report, directory: Path, title: str) -> list[Path]:
    csv = {
        f"{name}.csv": pd.DataFrame(rows).to_csv(index=False) for name, rows in report.tables.items() if rows
    }
    shown = [_shown_table(report, name) for name in _SHOWN if report.tables.get(name)]
    pairs = [row for row in report.tables["comparisons"] if row["measure"] == report.compare.metric]
    figure = svg_text(_differences(pairs, report.axes, report.compare)) if pairs else None
    page = render_page(
        "qdora.study", "page.html.j2", title=title, report=report, figure=figure, tables=shown, files=list(csv)
    )
    parts = [f"# {title}", *report.answer, report.status]
    for table in shown:
        parts += [f"## {table['title']}", table["note"]]
        parts.append(markdown_table(table["header"], table["rows"], right=table["is_number"]))
    parts.append(f"All columns and tables: {', '.join(f'[{name}]({name})' for name in csv)}.")
    texts = {"index.html": page, "report.md": "\n\n".join(filter(None, parts)) + "\n", **csv}
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        atomic_write_text(directory / name, text)
    return [directory / name for name in texts]


def _shown_table(report: Report, name: str) -> dict[str, Any]:
    (title, columns, note), rows = _SHOWN[name], report.tables[name]

    def text(value: Any) -> str:
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.4f}"
        return "" if value is None else str(value)

    names = [*report.axes, report.compare.arm, *columns.split()]
    names = [column for column in names if any(text(row.get(column)) for row in rows)]
    is_number = [any(isinstance(row.get(column), int | float) for row in rows) for column in names]
    cells = [[text(row.get(column)) or "–" for column in names] for row in rows]
    header = [column.replace("_", " ") for column in names]
    return {"title": title, "note": note, "header": header, "is_number": is_number, "rows": cells}


def read_report(directory: Path) -> Report:
    index = read_index(directory)
    study, cells = Study.model_validate(index["study"]), index["cells"]
    results = Results(StudyDirectory(directory, retries=study.retries), study)
    arms = find_arms(cells, results)
    if not arms:
        raise UserError(
            f"{directory}: no cell has scores. Fix: run 'qdora study', with lower rates if all diverged."
        )
    # The metric of the study, then the other measures of its trained arms
    keys = [key for arm in arms if arm.kind == "trained" for key in arm.seeds.values()]
    scored, metric = {measure for key in keys for measure in results.scores(key)}, study.compare.metric
    measures = [
        metric,
        *(measure for measure in HIGHER_IS_BETTER if measure in scored - {metric, "nll_per_token"}),
    ]
    pairs = comparisons(arms, results, measures)
    axes = [axis for axis in study.product if axis != study.compare.arm]
    runs = {
        cell["key"]: cell["adapter_key"]
        for cell in cells
        if cell["kind"] in ("rescaled", "set_back", "by_layer")
    }
    rows = _TableRows(results, axes, runs)
    tables = {
        "comparisons": pairs,
        "tasks": task_rows(arms, results, [name for name in measures if name != "nll_by_task"]),
        "repair": [row for arm in arms if (row := rows.repair(arm, arms))],
        "arms": [rows.arm(arm) for arm in arms],
        "rates": index["rates"],
        "cells": [rows.cell(cell) for cell in cells],
    }
    measured = [rows.measured(cell) for cell in cells]
    for name in ("changes", "checkpoints", "blocks"):
        tables[name] = [row for of_cell in measured for row in of_cell[name]]
    counts = Counter(row["status"] for row in tables["cells"])
    status = f"{len(cells)} cells: {', '.join(f'{number} {name}' for name, number in counts.items())}"
    num_waiting = sum(index["num_waiting"].values())
    status += f"; {num_waiting} more wait for a learning rate or an adapter." if num_waiting else "."
    answer = [_sentence(row, [*axes, study.compare.arm], metric) for row in pairs if row["role"] == "primary"]
    answer = answer or ["There is nothing to compare: no primary comparison has both arms with the same seeds."]
    return Report(tables=tables, answer=answer, status=status, axes=axes, compare=study.compare)


def _sentence(row: Row, axes: Sequence[str], metric: str) -> str:
    where = "".join(f"{axis} {row[axis]}, " for axis in axes if axis in row)
    size = f"improvement of {row['arm']} over {row['reference']} in {LABELS[metric]}"
    details = [f"{row['num_seeds']} seed{'' if row['num_seeds'] == 1 else 's'}"]
    if math.isfinite(row["lower"]):
        details.insert(0, f"95 % interval {row['lower']:.4f} to {row['upper']:.4f}")
    if row["winner"]:
        details.append(f"p = {row['p_holm']:.4f}, corrected for {row['num_tests']}")
    elif row["verdict"] != "not decided":
        p = row["p_equivalent_holm"]
        details.append(f"p of {row['zone']:g} or more = {p:.4f}, corrected for {row['num_tests']}")
    else:
        smallest = f"differences below {row['smallest_detectable']:.2g} could not have been seen"
        details.append(row["reason"] or smallest)
    return (
        f"{where}{row['comparison']}: {row['verdict']}, {size} {row['improvement']:.4f} ({'; '.join(details)})."
    )


@dataclass(frozen=True)
class _TableRows:
    """Rows of the tables. `runs`: cell -> the cell whose run it evaluates, which knows how its base was compressed."""

    results: Results
    axes: Sequence[str]
    runs: Mapping[str, str]

    def _context(self, labels: Mapping[str, str], *, is_dense: bool = False) -> dict[str, Any]:
        return {axis: labels.get(axis, "uncompressed" if is_dense and not labels else "") for axis in self.axes}

    def arm(self, arm: Arm) -> dict[str, Any]:
        results, is_dense = self.results, arm.base_key == arm.dense_key
        seeds = first_seeds(results.study, arm.seeds)
        row = self._context(arm.context, is_dense=is_dense)
        row |= {results.study.compare.arm: arm.name, "kind": arm.kind}
        row |= {"is_dense": is_dense, "rate": arm.rate, "rate_is_interior": arm.is_interior}
        row |= {"num_seeds": len(seeds), "num_missing": arm.num_missing}
        row["num_diverged"] = sum(results.diverged(arm.seeds[seed]) for seed in seeds)
        for measure in HIGHER_IS_BETTER:
            level = quality(arm, results, measure)
            row |= {} if level is None else level.columns(measure)
        measured = [key for key in arm.seeds.values() if not results.diverged(key)]
        return row | (self.sizes(measured[0]) if measured else {})

    def repair(self, arm: Arm, arms: Sequence[Arm]) -> dict[str, Any]:
        row = damage_row(arm, self.results) | repair_row(arm, arms, self.results)
        return self._context(arm.context) | {self.results.study.compare.arm: arm.name} | row if row else {}

    def sizes(self, key: str) -> dict[str, Any]:
        result, compressed = (self.results.result(each) for each in (key, self.runs.get(key, key)))
        size, compression = result["size"], compressed.get("compression") or {}
        return {
            "bits_per_weight": 8 * size["num_linear_bytes"] / max(1, size["num_linear_weights"]),
            "sparsity": float(compression.get("sparsity", 0.0)),
            "total_mib": (size["num_base_bytes"] + size["num_adapter_bytes"]) / 2**20,
            "adapter_mib": size["num_adapter_bytes"] / 2**20,
        }

    def cell(self, cell: Row) -> dict[str, Any]:
        key, results, store = cell["key"], self.results, self.results.store
        attempts, result = store.failures(key), results.result(key)
        row: dict[str, Any] = {
            axis: cell["labels"].get(axis, "") for axis in (*results.study.product, RATE, SEED)
        }
        row |= {"stage": cell["stage"], "kind": cell["kind"], "cell": key}
        row["status"] = "done" if result else "failed" if store.is_given_up(key) else "open"
        row |= {"num_failures": len(attempts), "reason": attempts[-1]["reason"] if attempts else ""}
        if not result:
            return row
        if results.diverged(key):
            return row | {"status": "diverged", "reason": result["diverged"], "seconds": result["seconds"]}
        levels = {measure: results.mean(key, measure, "all") for measure in HIGHER_IS_BETTER}
        row |= {measure: value for measure, value in levels.items() if not math.isnan(value)}
        row |= {name: result.get(name) for name in ("seconds", "num_steps", "num_trainable", "final_loss")}
        return row | self.sizes(key)

    def measured(self, cell: Row) -> dict[str, Rows]:
        result = self.results.result(cell["key"])
        run = {
            axis: cell["labels"].get(axis, "") for axis in (*self.axes, self.results.study.compare.arm, SEED)
        }

        def rows(own: Row, changes: Mapping[str, Row]) -> Rows:
            return [
                {**own, "layer": path, "block": block_of(path)}
                | {
                    name if name.startswith("error_") else f"{name}_change": value
                    for name, value in change.items()
                }
                for path, change in changes.items()
            ]

        return {
            "changes": rows(run, result.get("changes", {})),
            "checkpoints": [
                row
                for each in result.get("checkpoints", ())
                for row in rows(run | {"step": each["step"], "nll": each["nll"]}, each["changes"])
            ],
            "blocks": [
                run | {"block": off["block"], "block_off": off["rise"]} for off in result.get("blocks", ())
            ],
        }


def _differences(rows: Rows, axes: Sequence[str], compare: CompareConfig) -> Figure:
    figure = new_figure(9.0, 0.33 * len(rows) + 1.2)
    axis = figure.add_subplot()
    axis.set_xscale("symlog", linthresh=compare.zone, linscale=1.0)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.axvspan(-compare.zone, compare.zone, color="#777777", alpha=0.2, lw=0)
    axis.axvline(0.0, color="#777777", lw=1)
    axis.grid(alpha=0.3, axis="x")
    axis.margins(y=0.02)
    axis.invert_yaxis()
    labels = []
    for y, row in enumerate(rows):
        color, marker = ("#000000", "s") if row["role"] == "primary" else ("#0072b2", "o")
        seeds = [float(text.rpartition(": ")[2]) for text in row["seed_improvements"].split("; ")]
        axis.plot(seeds, [y + 0.3] * len(seeds), ".", ms=4, color=color, alpha=0.6)
        axis.plot([row["lower"], row["upper"]], [y, y], color=color, lw=2, alpha=0.6)
        axis.plot([row["improvement"]], [y], ls="none", color=color, marker=marker)
        labels.append(
            ", ".join([row["comparison"], *(row[name] for name in (*axes, compare.arm) if row.get(name))])
        )
    axis.set_yticks(range(len(rows)), labels, fontsize="small")
    axis.set_xlabel(f"improvement, {LABELS[compare.metric]}")
    return figure
