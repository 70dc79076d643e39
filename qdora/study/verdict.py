"""What the comparisons say, in words made from their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdora.study.config import CompareConfig

_OF_SHARES = "share of answers"


def verdict(
    pairs: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    compare: CompareConfig,
    label: str,
) -> list[str]:
    """One sentence over all comparisons of each measure, the study's own first, and one for each comparison.

    Args:
        pairs: Rows of `compare.comparisons`.
        cells: Rows of the table of cells.
        axes: What is named of each comparison beside the arms.
        label: Of the metric.
    """
    sentences = [_overall([row for row in pairs if row["measure"] == compare.metric], label, compare.alpha)]
    for measure in dict.fromkeys(row["measure"] for row in pairs if row["measure"] != compare.metric):
        part = [row for row in pairs if row["measure"] == measure]
        sentences.append(_overall(part, f"{_OF_SHARES} that are {measure}", compare.alpha))
    lacking = [row for row in cells if row["status"] != "done"]
    if lacking:
        failed = sum(row["status"] == "failed" for row in lacking)
        sentences.append(
            f"{len(lacking)} of {len(cells)} cells have no result, {failed} of them because they failed; "
            "no winner is called from arms that lack cells."
        )
    return sentences + [_sentence(row, axes, compare, label) for row in pairs]


def _overall(pairs: Sequence[Mapping[str, Any]], label: str, alpha: float) -> str:
    if not pairs:
        return "There is nothing to compare: no surrounding has two trained arms with results of the same seeds."
    won = [row for row in pairs if row["winner"]]
    if not won:
        unclear = sum(row["p_holm"] >= alpha for row in pairs)
        return (
            f"No winner is called in any of {len(pairs)} comparisons ({label}); in {unclear} of them the data show no "
            "difference after Holm's correction."
        )
    by_name: dict[str, int] = {}
    for row in won:
        by_name[row["winner"]] = by_name.get(row["winner"], 0) + 1
    counts = ", ".join(f"{name} in {count}" for name, count in sorted(by_name.items()))
    rest = len(pairs) - len(won)
    tail = f" In the other {rest} they show no winner." if rest else ""
    return f"Of {len(pairs)} comparisons the data show a winner in {len(won)}: {counts} ({label}).{tail}"


def _sentence(row: Mapping[str, Any], axes: Sequence[str], compare: CompareConfig, label: str) -> str:
    where = ", ".join(f"{axis} {row[axis]}" for axis in axes if axis in row)
    what = label if row["measure"] == compare.metric else f"{_OF_SHARES} that are {row['measure']}"
    numbers = f"improvement {row['improvement']:.4f} in {what}, interval {row['lower']:.4f} to {row['upper']:.4f}"
    head = f"{where}: " if where else ""
    if row["winner"]:
        loser = row["reference"] if row["winner"] == row["arm"] else row["arm"]
        by = f"p = {row['p_holm']:.4f} after Holm's correction, {row['num_seeds']} seeds"
        return f"{head}{row['winner']} beats {loser} ({row['arm']} over {row['reference']}: {numbers}, {by})."
    return f"{head}no winner between {row['arm']} and {row['reference']} ({numbers}): {row['reason']}."
