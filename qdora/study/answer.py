"""What a study asks, of which model and data, and what it answers in at most three paragraphs, each with its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qdora.model.source import BUILTIN, BUILTIN_FILE
from qdora.recipe.data_settings import is_path
from qdora.recipe.settings import Recipe
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


def subject_of(recipes: Sequence[Recipe], num_seeds: Sequence[int]) -> str:
    """Models, tasks, length of the training and seeds, in a sentence.

    Args:
        recipes: Of the trained arms, one each; what differs between them is told of all.
        num_seeds: Of each trained arm.
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
    least, most = min(num_seeds), max(num_seeds)
    seeds = _counted(most, "seed") if least == most else f"{least} to {most} seeds for each arm on a base"
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
    """What is left of the damage after training; what was decided; what training repaired beyond a transplant.

    Args:
        pairs, repairs: Of `question_of`.
        axes: Those of the contexts.
    """
    primary = [row for row in pairs if row["role"] == "primary"]
    decided = overall(primary, metric_label)
    if compare.primary is not None:
        results = {row["comparison"]: row for row in primary}
        told = [
            decided_in_words(results[name], metric_label)
            if name in results
            else f"{name}: not decided, without results"
            for name in compare.primary
        ]
        decided = f"{'; '.join(told)}."
    arms = list(dict.fromkeys([compare.reference, *(row["arm"] for row in primary)]))
    rows = [row for row in repairs if row[compare.arm] in arms]
    named = naming([row for row in rows if is_number(row.get("left"))], axes)
    known = {str(arm): [row for row in rows if row[compare.arm] == arm and is_number(row.get("left"))] for arm in arms}
    moved = [each for each in rows if is_number(each.get("transplant"))]
    repaired = _repaired({str(arm): [row for row in moved if row[compare.arm] == arm] for arm in arms}, named)
    left = _all_left({arm: each for arm, each in known.items() if each}, named, compare.zone, metric_label)
    return list(filter(None, [left, decided, repaired]))


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


def _all_left(known: Mapping[str, Sequence[Row]], named: Naming, zone: float, label: str) -> str:
    """On how many bases each arm is as good as on the uncompressed one, and what is left on all; "" if unknown.

    `known`: arm -> the rows that tell what is left, at least one.
    """
    if not known:
        return ""
    than = ["as on the uncompressed one ", *[""] * (len(known) - 1)]  # said once
    told = [_left(arm, rows, named, zone, each) for (arm, rows), each in zip(known.items(), than, strict=True)]
    others = named.axes[1:]
    counted = f" A base counts once per {' and '.join(others)}." if others else ""
    bases = {arm: {named(row) for row in rows} for arm, rows in known.items()}
    every = set().union(*bases.values())
    fewer = [arm for arm, own in bases.items() if own != every]
    counted += f" {', '.join(fewer)} {'was' if len(fewer) == 1 else 'were'} trained on fewer." if fewer else ""
    return (
        f"Trained on a compressed base, {'; '.join(told)}. As good means less than {zone:g} worse in "
        f"{label}, with 95 % confidence.{counted}"
    )


def _left(arm: str, rows: Sequence[Row], named: Naming, zone: float, than: str) -> str:
    """On how many bases an arm is surely as good (`than` what), which are open, the least and the most that is left."""
    inside = [named(row) for row in rows if row["left_upper"] < zone]
    open_ = [named(row) for row in rows if not row["left_upper"] < zone and not row["left_lower"] > zone]  # nan, too
    told = [", ".join(inside)] if inside and len(inside) < len(rows) else []
    told += [f"{', '.join(open_)} not decided"] if open_ else []
    said = f" ({'; '.join(told)})" if told else ""
    worse = _span(rows, named, "left", ".3f")
    return f"{arm} is as good {than}on {len(inside)} of {len(rows)} bases{said}, and worse by {worse}"


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
