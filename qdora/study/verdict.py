"""What a study says, in sentences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def verdict(
    pairs: Sequence[Row], cells: Sequence[Row], rates: Sequence[Row], axes: Sequence[str], label: str
) -> list[str]:
    """One sentence about all primary comparisons, one about runs that are missing or diverged, one for each comparison.

    Args:
        pairs: Rows of `comparisons`.
        cells: Rows of the cells, with their status.
        rates: Rows of `Cells.search_rows`.
        axes: Those of a comparison's context.
        label: The metric in words.
    """
    primary = [row for row in pairs if row["role"] == "primary"]
    sentences = [overall(primary, label)]
    diverged = [row for row in cells if row["status"] == "diverged"]
    if diverged:
        compared = sum(row["kind"] == "trained" for row in diverged)
        number = sum(row["kind"] in ("rate", "trained") for row in cells)
        sentences.append(
            f"{len(diverged)} of {number} trainings diverged, {compared} of them "
            "in the comparison, where such a run counts with the worst score: a uniform guess, or no right answer."
        )
    lost = sum(row["is_done"] and row["rate"] is None for row in rates)
    if lost:
        arms = f"{lost} arms diverged" if lost > 1 else "1 arm diverged"
        compared_with = "they are not compared" if lost > 1 else "it is not compared"
        sentences.append(f"{arms} at every learning rate that was tried, so {compared_with}.")
    lacking = [row for row in cells if row["status"] not in ("done", "diverged")]
    if lacking:
        failed = sum(row["status"] == "failed" for row in lacking)
        sentences.append(
            f"{len(lacking)} of {len(cells)} cells have no result; {failed or 'none'} of them failed. An arm that "
            "lacks one of its first seeds can be neither better nor equivalent."
        )
    return sentences + [_sentence(row, axes, label) for row in primary]


def overall(primary: Sequence[Row], label: str) -> str:
    """How many primary comparisons are decided, and for whom."""
    if not primary:
        return "There is nothing to compare: no primary comparison has results of both arms with the same seeds."
    number = len(primary)
    better = [row for row in primary if row["winner"]]
    equivalent = [row for row in primary if not row["winner"] and row["verdict"] != "not decided"]
    open_ = [row for row in primary if row["verdict"] == "not decided"]
    if len(open_) == number:
        said = f"None of {number} primary comparisons of {label} is decided"
        if number == 1:
            said = f"The primary comparison of {label} is not decided"
        return f"{said}; {not_seen(open_)}."
    parts = []
    if better:
        counts = Counter(row["winner"] for row in better)
        parts.append(
            "; ".join(f"{name} is better in {counts[name]} of {number} primary comparisons" for name in sorted(counts))
        )
    if equivalent:
        zone = equivalent[0]["zone"]
        parts.append(f"in {len(equivalent)} of {number} primary comparisons the arms differ by less than {zone:g}")
    if open_:
        are = "are" if len(open_) > 1 else "is"
        parts.append(f"{len(open_)} of {number} {are} not decided, {not_seen(open_)}")
    return f"{label}: {'; '.join(parts)}."


def not_seen(rows: Sequence[Row]) -> str:
    """What an undecided comparison leaves open."""
    sizes = sorted(row["smallest_detectable"] for row in rows if not math.isnan(row["smallest_detectable"]))
    if not sizes:
        return "with a single seed no difference can be seen"
    between = f"{sizes[0]:.2g}" if len(sizes) == 1 else f"{sizes[0]:.2g} to {sizes[-1]:.2g}"
    return f"differences below {between} could not have been seen"


def interval_in_words(row: Row) -> list[str]:
    """'interval 0.0100 to 0.0200'; nothing without one, as with a single seed."""
    has_ends = not (math.isnan(row["lower"]) or math.isnan(row["upper"]))
    return [f"interval {row['lower']:.4f} to {row['upper']:.4f}"] if has_ends else []


def _sentence(row: Row, axes: Sequence[str], label: str) -> str:
    where = ", ".join(f"{axis} {row[axis]}" for axis in axes if axis in row)
    head = f"{where}: " if where else ""
    change = f"improvement of {row['arm']} over {row['reference']} in {label}: {row['improvement']:.4f}"
    change += "".join(f", {text}" for text in interval_in_words(row))
    change += f", {row['num_seeds']} seed{'s' if row['num_seeds'] > 1 else ''}"
    if row["verdict"] == "not decided":
        why = f": {row['reason']}" if row["reason"] else f"; {not_seen([row])}"
        return f"{head}{row['comparison']} is not decided ({change}){why}."
    p, what = (
        (row["p_holm"], "") if row["winner"] else (row["p_equivalent_holm"], f" of a difference of {row['zone']:g}")
    )
    return f"{head}{row['comparison']}: {row['verdict']} ({change}, p{what} = {p:.4f} after Holm's correction)."
