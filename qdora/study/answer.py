"""What a study asks, of which model and data, and what it answers: a sentence for each primary comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdora.model.source import BUILTIN, BUILTIN_FILE
from qdora.recipe.data_settings import is_path
from qdora.recipe.settings import Recipe
from qdora.study.report_contents import Row, is_number


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


def answer_of(pairs: Sequence[Row], axes: Sequence[str], metric_label: str) -> list[str]:
    """A sentence for each primary comparison of `pairs`, with its context on the axes."""
    primary = [row for row in pairs if row["role"] == "primary"]
    if not primary:
        return ["There is nothing to compare: no primary comparison has results of both arms with the same seeds."]
    return [_decided(row, axes, metric_label) for row in primary]


def _decided(row: Row, axes: Sequence[str], label: str) -> str:
    where = "".join(f"{axis} {row[axis]}, " for axis in axes if axis in row)
    size = f"improvement of {row['arm']} over {row['reference']} in {label} {row['improvement']:.4f}"
    told = [_counted(row["num_seeds"], "seed")]
    if is_number(row["lower"]):
        told.insert(0, f"95 % interval {row['lower']:.4f} to {row['upper']:.4f}")
    if row["verdict"] != "not decided":
        p, what = (row["p_holm"], "") if row["winner"] else (row["p_equivalent_holm"], f" of {row['zone']:g} or more")
        told.append(f"p{what} = {p:.4f}, corrected for {row['num_tests']}")
    elif row["reason"]:
        told.append(row["reason"])
    elif is_number(row["smallest_detectable"]):
        told.append(f"differences below {row['smallest_detectable']:.2g} could not have been seen")
    return f"{where}{row['comparison']}: {row['verdict']}, {size} ({'; '.join(told)})."


def notes_of(cells: Sequence[Row], rates: Sequence[Row], num_waiting: int) -> list[str]:
    """What to know of runs that wait, diverged or have no result.

    Args:
        cells: Rows of the cells, with their status.
        rates: Rows of `Cells.search_rows`.
        num_waiting: Cells that wait for a rate or an adapter.
    """
    status = [row["status"] for row in cells]
    trainings = [row for row in cells if row["kind"] in ("rate", "trained")]
    diverged = [row for row in trainings if row["status"] == "diverged"]
    compared = sum(row["kind"] == "trained" for row in diverged)
    lost = sum(row["is_done"] and row["rate"] is None for row in rates)
    num_lacking = len(cells) - status.count("done") - status.count("diverged")
    found = {
        f"{num_waiting} more cells wait for a learning rate or an adapter.": num_waiting,
        f"{len(diverged)} of {len(trainings)} trainings diverged, {compared} of them in the comparison, where such a "
        "run counts with the worst score: a uniform guess, or no right answer.": diverged,
        f"Arms that diverged at every learning rate, and so are not compared: {lost}.": lost,
        f"{num_lacking} of {len(cells)} cells have no result; {status.count('failed')} of them failed. An arm that "
        "lacks one of its first seeds can be neither better nor equivalent.": num_lacking,
    }
    return [text for text, is_told in found.items() if is_told]
