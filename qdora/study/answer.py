"""The question that a study asks, and what it answers in at most three sentences, each with its number."""

from __future__ import annotations

from collections.abc import Sequence

from qdora.study.grid import CompareConfig
from qdora.study.report_contents import Naming, Row, is_number, naming
from qdora.study.verdict import interval_in_words, not_seen, overall


def question_of(pairs: Sequence[Row], repairs: Sequence[Row]) -> str:
    """The title of the report.

    Args:
        pairs: Rows of the comparisons, the primary ones first.
        repairs: Rows of damage and repair.
    """
    asked = [row for row in pairs if row["role"] == "primary"] or list(pairs)
    if not asked:
        return "How good is each arm?"
    arms, reference = list(dict.fromkeys(row["arm"] for row in asked)), asked[0]["reference"]
    if any(is_number(row.get("left")) for row in repairs):
        others = f"before {', '.join(arms)}" if len(arms) < 4 else "before each other arm"
        return f"How far can the base be compressed before {reference}, and {others}, stops repairing it?"
    return f"Is {' or '.join(arms)} better than {reference}?"


def answer_of(
    pairs: Sequence[Row], repairs: Sequence[Row], axes: Sequence[str], compare: CompareConfig, metric_label: str
) -> list[str]:
    """What was decided; what is left of the damage after training; what training repaired beyond a transplant.

    Args:
        pairs, repairs: Of `question_of`.
        axes: Those of the contexts.
    """
    primary = [row for row in pairs if row["role"] == "primary"]
    decided = overall(primary, metric_label)
    if compare.primary is not None:
        known = {row["comparison"]: row for row in primary}
        told = [
            decided_in_words(known[name], metric_label) if name in known else f"{name}: not decided, without results"
            for name in compare.primary
        ]
        decided = f"{'; '.join(told)}."
    rows = [row for row in repairs if row[compare.arm] == compare.reference]
    named = naming([row for row in rows if is_number(row.get("left"))], axes)
    return [decided, *filter(None, [_left(rows, named, compare, metric_label), _repaired(rows, named, compare.arm)])]


def decided_in_words(row: Row, metric_label: str) -> str:
    """A primary comparison as a part of a sentence."""
    arm, reference, gain = row["arm"], row["reference"], row["improvement"]
    size = f"with a mean improvement of {arm} in {metric_label} of {gain:.4f}"
    size += "".join(f" (95 % {text})" for text in interval_in_words(row))
    if row["winner"]:
        other = reference if row["winner"] == arm else arm
        less = f", by less than {row['zone']:g}" if "less than" in row["verdict"] else ""
        return f"{row['comparison']}: {row['winner']} is better than {other}{less}, {size}"
    if row["verdict"] != "not decided":
        return f"{row['comparison']}: {row['verdict']}, {size}"
    why = f"since {row['reason'].replace('; ', ' and ')}" if row["reason"] else f"and {not_seen([row])}"
    return f"{row['comparison']}: not decided, {size}, {why}"


def _left(rows: Sequence[Row], named: Naming, compare: CompareConfig, label: str) -> str:
    """From the least to the most damage that is left, and where it is surely within the zone or beyond it."""
    known = sorted((row for row in rows if is_number(row.get("left"))), key=lambda row: float(row["left"]))
    if not known:
        return ""
    zone = compare.zone
    name = known[0][compare.arm]
    inside = [named(row) for row in known if row["left_upper"] < zone]
    beyond = [named(row) for row in known if row["left_lower"] > zone]
    ends = [f"{row['left']:.3f} ({named(row)})" for row in (known[0], known[-1])]
    span = ends[0] if len(known) == 1 else f"{ends[0]} to {ends[1]}"
    below, above = (
        "all of these bases" if len(names) == len(known) else ", ".join(names) or "none of these bases"
        for names in (inside, beyond)
    )
    sure = f"The 95 % interval is below {zone:g} on {below} and above it on {above}."
    return f"After training, {name} is worse than on the uncompressed base by {span} in {label}. {sure}"


def _repaired(rows: Sequence[Row], named: Naming, arm_axis: str) -> str:
    """Shares of the transplant's damage."""
    known = [row for row in rows if is_number(row.get("repaired_share"))]
    known.sort(key=lambda row: float(row["repaired_share"]))
    if not known:
        return ""
    ends = [f"{row['repaired_share']:.2f} ({named(row)})" for row in (known[0], known[-1])]
    span = ends[0] if len(known) == 1 else f"{ends[0]} to {ends[1]}"
    return (
        f"Training {known[0][arm_axis]} on the compressed base makes good a share of {span} of the damage of an "
        "adapter that was trained on the uncompressed base."
    )
