"""Tables of compressed bases: perplexities by pruning method, and the study, from its report's own data files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from frame import table

from tables.table import compared, interval, markdown, of_metric, read, report_rows, trained, with_band

Row = Mapping[str, str]


@table()
def study() -> str:
    """Per base and length the damage without training, then for each adapter what is left and what was repaired."""
    arms, pairs = report_rows("study", "arms"), report_rows("study", "comparisons")
    axes = [axis for axis in ("base", "length") if axis in arms[0]]
    repairs = report_rows("study", "repair")
    damage = {row["base"]: row for row in repairs if row["adapter"] == "no adapter"}
    reference = next(row["value"] for row in report_rows("study", "facts") if row["fact"] == "compare.reference")
    adapters = list(dict.fromkeys(row["adapter"] for row in repairs if row.get("left")))
    contexts = list(dict.fromkeys(tuple(row[axis] for axis in axes) for row in trained(arms)))
    lines = []
    for context in contexts:
        own = {row["adapter"]: row for row in trained(arms) if tuple(row[axis] for axis in axes) == context}
        of_base = {row["adapter"]: row for row in repairs if tuple(row[axis] for axis in axes) == context}
        # An arm of which all runs diverged has no sizes
        sizes = next((row for row in own.values() if row["bits_per_weight"]), None)
        bits = ["–", "–"] if sizes is None else _bits_and_zeros(sizes)
        line = [", ".join(context), *bits]
        line.append(_points(damage.get(context[0])))
        line += [_known(of_base.get(name), "left") for name in adapters]
        line.append(_known(of_base.get(reference), "repaired_share"))
        told = [pair for pair in of_metric(pairs) if tuple(pair[axis] for axis in axes) == context]
        line.append("; ".join(f"{pair['arm']} {compared(pair)}" for pair in told) or "–")
        lines.append(line)
    header = ["base", "bits", "zeros %", "accuracy lost", *(f"{name}: left" for name in adapters)]
    header += [f"share repaired by {reference}", f"against {reference}: NLL lower by"]
    done = read("study/run")
    partial = ""
    if done.get("cells_done", 0) < done.get("cells", 0):
        partial = f"So far {done['cells_done']:,} of {done['cells']:,} cells are done. "
    note = (
        f"\n{partial}NLL in nats per answer token of the test examples; 95 % t intervals over the seeds, not corrected "
        "for the number of bases. Accuracy lost: points of accuracy per character below the uncompressed base, both "
        "untrained; interval over the examples. Left: NLL minus that of the same arm trained on the uncompressed base. "
        "Share repaired: an adapter of the uncompressed base is worse on the compressed one; training there takes back "
        f"this share of the loss. `{done['command']}`; the whole report: "
        "[results/study/report.md](results/study/report.md).\n"
    )
    return markdown(header, lines) + note


@table()
def study_changes() -> str:
    """Per base and adapter what training moved, and how much of the compression error it took back."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in report_rows("study", "changes"):
        found.setdefault((row["base"], row["adapter"]), []).append(row)
    repairs = {(row["base"], row["adapter"]): row for row in report_rows("study", "repair") if row.get("magnitudes")}
    lines = []
    columns = ("direction_change", "magnitude_change", "error_undone", "error_undone_best", "error_cosine")
    for (base, adapter), rows in found.items():
        turned, changed, undone, best, cosine = (_mean(rows, column) for column in columns)
        line = [f"{base}, {adapter}", str(len({row["seed"] for row in rows})), f"{turned:.1e}", f"{changed:.2%}"]
        line += ["–", "–"] if math.isnan(undone) else [f"{undone:.2%} ({best:.0%})", f"{cosine:.4f}"]
        back = repairs.get((base, adapter))
        ends = ("magnitudes", "magnitudes_lower", "magnitudes_upper")
        line.append("–" if back is None else interval(*(float(back[end]) for end in ends), form="+.4f"))
        lines.append(line)
    header = ["base, adapter", "seeds", "rows turned", "magnitudes changed", "error taken back (best)", "cosine"]
    note = (
        "\nMeans over layers and seeds. Rows turned: 1 - cosine of the directions of a row before and after. Error "
        "taken back: by the update, of the compression error; best: by the nearest matrix of the same rank. Cosine: "
        "between the update and the negative error. Magnitudes set back: change of the NLL, 95 % t interval over the "
        "seeds; below 0 the trained magnitudes do harm.\n"
    )
    return markdown([*header, "magnitudes set back"], lines) + note


def _mean(rows: Sequence[Row], column: str) -> float:
    """Of the rows that have the column; nan without one."""
    known = [float(row[column]) for row in rows if row[column]]
    return sum(known) / len(known) if known else math.nan


def _bits_and_zeros(row: Row) -> list[str]:
    return [f"{float(row['bits_per_weight']):.2f}", f"{100 * float(row['sparsity']):.0f}"]


def _points(row: Row | None) -> str:
    """The accuracy that a base lost."""
    if row is None or not row.get("damage_choice"):
        return "–"
    return interval(*(100 * float(row[f"damage_choice{end}"]) for end in ("", "_lower", "_upper")), form=".1f")


def _known(row: Row | None, measure: str) -> str:
    return with_band(row, measure) if row is not None and row.get(measure) else "–"
