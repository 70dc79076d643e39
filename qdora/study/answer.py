"""What a study asks, of which model and data, and what it answers in at most three paragraphs, each with its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qdora.model.source import BUILTIN, BUILTIN_FILE
from qdora.recipe.data_settings import is_path
from qdora.recipe.settings import Recipe
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


def subject_of(recipes: Sequence[Recipe], study: Study) -> str:
    """Models, tasks, length of the training and seeds, in a sentence.

    Args:
        recipes: Of the trained arms, one each; what differs between them is told of all.
    """
    models = [_model_in_words(recipe.model.source) for recipe in recipes]
    tasks = [", ".join(source.label for source in recipe.data.mix) for recipe in recipes]
    steps = [_counted(recipe.train.steps, "step") if recipe.train.steps else "whole epochs" for recipe in recipes]
    sizes = [
        _counted(recipe.train.batch, "example")
        if recipe.train.batch
        else _counted(recipe.train.tokens_per_step, "token")
        for recipe in recipes
    ]
    seeds = f"seeds {', '.join(map(str, study.seeds))}" if len(study.seeds) > 1 else f"seed {study.seeds[0]}"
    if study.more_seeds is not None:
        seeds += f", and {', '.join(map(str, study.more_seeds.seeds))} where the interval is wide"
    return f"{_each(models)}, trained on {_each(tasks)}: {_each(steps)} of {_each(sizes)}; {seeds}."


def _model_in_words(source: str) -> str:
    """Without the directories of this machine."""
    if source == BUILTIN:
        return f"{BUILTIN_FILE} ({BUILTIN}; its 4-bit weights decoded)"
    return Path(source).name if is_path(source) else source


def _counted(number: int | None, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def _each(texts: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(texts))


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
    rows = [row for row in repairs if row[compare.arm] in arms]
    named = naming([row for row in rows if is_number(row.get("left"))], axes)
    left = [_left(str(arm), [row for row in rows if row[compare.arm] == arm], named, compare.zone) for arm in arms]
    moved = [each for each in rows if is_number(each.get("transplant"))]
    repaired = _repaired({str(arm): [row for row in moved if row[compare.arm] == arm] for arm in arms}, named)
    return [decided, *filter(None, [_all_left(left, named.axes[1:], compare.zone, metric_label), repaired])]


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


def _left(arm: str, rows: Sequence[Row], named: Naming, zone: float) -> str:
    """How many bases are surely as good, which are open, and the least and the most that is left; "" if unknown."""
    known = [row for row in rows if is_number(row.get("left"))]
    if not known:
        return ""
    inside = [named(row) for row in known if row["left_upper"] < zone]
    open_ = [named(row) for row in known if not row["left_upper"] < zone and not row["left_lower"] > zone]  # nan, too
    told = f"with {arm}, {len(inside)} of {len(known)}"
    if inside and len(inside) < len(known):
        told += f" ({', '.join(inside)})"
    told += " is as good" if len(inside) == 1 else " are as good"
    if open_:
        told += f" ({', '.join(open_)} not decided)"
    return f"{told} and {_span(known, named, 'left', '.3f')} is left"


def _all_left(left: Sequence[str], others: Sequence[str], zone: float, label: str) -> str:
    """What is called as good as the uncompressed base, and what that makes of each arm.

    `others`: the axes beside the base on which its rows differ.
    """
    told = "; ".join(filter(None, left))
    counted = f" (each counted once per {' and '.join(others)})" if others else ""
    return told and (
        f"A compressed base is called as good as the uncompressed one if the arm trained on it is less than {zone:g} "
        f"worse than the arm trained on the uncompressed base, in {label}, with 95 % confidence. Of the bases that "
        f"were trained on{counted}, {told}."
    )


def _repaired(moved: Mapping[str, Sequence[Row]], named: Naming) -> str:
    """What transplants of each arm lose, and the share of it that training on the compressed base takes back."""
    losses = [f"{arm} loses {_span(rows, named, 'transplant', '.3f')}" for arm, rows in moved.items() if rows]
    known = {arm: [row for row in rows if is_number(row.get("repaired_share"))] for arm, rows in moved.items()}
    shares = [f"{_span(rows, named, 'repaired_share', '.2f')} for {arm}" for arm, rows in known.items() if rows]
    if not shares:
        return ""
    return (
        f"Moved from the uncompressed base to a compressed one without further training, {'; '.join(losses)}. Training "
        f"on the compressed base takes back a share of that, where it is significant: {'; '.join(shares)}."
    )


def _span(rows: Sequence[Row], named: Naming, column: str, digits: str) -> str:
    """The least and the most of a column, with their names."""
    ordered = sorted(rows, key=lambda row: float(row[column]))
    least, most = (f"{row[column]:{digits}} ({named(row)})" for row in (ordered[0], ordered[-1]))
    return least if len(rows) == 1 else f"{least} to {most}"
