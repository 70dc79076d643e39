"""What a study asks, of which model and data, and what it answers in at most three paragraphs, each with its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora.model.source import BUILTIN, BUILTIN_HUB_ID
from qdora.study.grid import CompareConfig, Study
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


def subject_of(recipe: Mapping[str, Any], study: Study, num_steps: Sequence[int]) -> str:
    """Model, tasks, length of the training and seeds, in a sentence.

    Args:
        recipe: The document of a trained cell.
        num_steps: Lengths of the trained cells.
    """
    source = recipe["model"]["source"]
    model = BUILTIN_HUB_ID if source == BUILTIN else source
    mix = recipe["data"]["mix"]
    tasks = [str(entry.get("task") or entry.get("source") or Path(entry["path"]).name) for entry in mix]
    steps = " or ".join(f"{number:,}" for number in sorted(set(num_steps)))
    seeds = f"seeds {', '.join(map(str, study.seeds))}" if len(study.seeds) > 1 else f"seed {study.seeds[0]}"
    if study.more_seeds is not None:
        seeds += f", and {', '.join(map(str, study.more_seeds.seeds))} where the interval is wide"
    return f"{model}, trained on {', '.join(tasks)}: {steps} steps of {recipe['train']['batch']} examples; {seeds}."


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
    arms = list(dict.fromkeys([compare.reference, *(row["arm"] for row in primary)]))
    of_arm = {arm: [row for row in repairs if row[compare.arm] == arm] for arm in arms}
    left = [_left(arm, rows, axes, compare.zone) for arm, rows in of_arm.items()]
    repaired = _repaired(of_arm[compare.reference], axes, compare.arm)
    return [decided, *filter(None, [_counted(left, compare.zone, metric_label), repaired])]


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


def _left(arm: str, rows: Sequence[Row], axes: Sequence[str], zone: float) -> str:
    """Which bases an arm surely repairs, which are open, and the least and the most that is left; "" if unknown."""
    known = [row for row in rows if is_number(row.get("left"))]
    if not known:
        return ""
    named = naming(known, axes)
    inside = [named(row) for row in known if row["left_upper"] < zone]
    open_ = [named(row) for row in known if row["left_lower"] <= zone <= row["left_upper"]]
    bases = "all of these bases" if len(inside) == len(known) else ", ".join(inside) or "none of these bases"
    told = f"{arm} repairs {bases}" + (f" ({', '.join(open_)} not decided)" if open_ else "")
    return f"{told} and leaves {_span(known, named, 'left', '.3f')}"


def _counted(left: Sequence[str], zone: float, label: str) -> str:
    """What counts as repaired, and what that makes of each arm."""
    told = "; ".join(filter(None, left))
    return told and (
        f"A base counts as repaired if the arm trained on it is less than {zone:g} worse than the arm trained on the "
        f"uncompressed base, in {label}, with 95 % confidence. So {told}."
    )


def _repaired(rows: Sequence[Row], axes: Sequence[str], arm_axis: str) -> str:
    """What a transplant loses, and the share of it that training on the compressed base takes back."""
    known = [row for row in rows if is_number(row.get("repaired_share"))]
    if not known:
        return ""
    named = naming(known, axes)
    moved, share = _span(known, named, "transplant", ".3f"), _span(known, named, "repaired_share", ".2f")
    return (
        f"The {known[0][arm_axis]} that was trained on the uncompressed base loses {moved} when it is moved to a "
        f"compressed one; training on the compressed base takes back a share of {share} of that."
    )


def _span(rows: Sequence[Row], named: Naming, column: str, digits: str) -> str:
    """The least and the most of a column, with their names."""
    ordered = sorted(rows, key=lambda row: float(row[column]))
    least, most = (f"{row[column]:{digits}} ({named(row)})" for row in (ordered[0], ordered[-1]))
    return least if len(rows) == 1 else f"{least} to {most}"
