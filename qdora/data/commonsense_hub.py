"""The eight commonsense tasks on the Hub: where they are, and their rows in the schema of `commonsense.py`.

All are read as Parquet files of one pinned commit, so no code from the Hub runs and the data cannot change under a run.
PIQA and Social IQA are published as loading scripts, which `datasets` 4 no longer runs; their pins are commits of the
Hub's own Parquet conversion (branch refs/convert/parquet). The pins were collected from public projects that publish
theirs, not by asking the Hub; where one is gone, `revision: main` (or refs/convert/parquet) in the recipe goes past it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdora.data.readers import read_rows, reason_of
from qdora.data.rows import Row, RowFault, Rows, shown, text_field
from qdora.errors import UserError, nearest

SchemaRow = dict[str, Any]


@dataclass(frozen=True)
class HubTask:
    """Where a task lives.

    Attributes:
        id: Data set on the Hub.
        revision: Commit.
        files: Glob of the Parquet files of a split inside the repository; {split} is the Hub's split name.
        splits: Our split -> the Hub's. Where the official test labels are secret, the official validation split is our
            test, as in published results, and there is no validation split: it is cut from the end of train.
        schema_row: A row of the Hub -> a schema row without task and, mostly, id.
    """

    id: str
    revision: str
    files: str
    splits: Mapping[str, str]
    schema_row: Callable[[Row], SchemaRow]


def hub_task_rows(task: str, split: str, revision: str | None = None) -> Rows:
    """The schema rows of a task's split; downloaded once, then read from the cache of huggingface_hub, offline too.

    Args:
        revision: Branch, tag or commit in place of the pinned one.
    Raises: UserError if the task has no such split, the Hub cannot be reached or a row is faulty.
    """
    import huggingface_hub

    place = HUB_TASKS[task]
    if split not in place.splits:
        allowed = ", ".join(place.splits)
        raise UserError(f"{task} ({place.id}): no split {split!r}, allowed: {allowed}.{nearest(split, place.splits)}")
    pattern = place.files.format(split=place.splits[split])
    commit = revision or place.revision
    where = f"{place.id}@{commit}"
    try:
        folder = huggingface_hub.snapshot_download(
            place.id, repo_type="dataset", revision=commit, allow_patterns=[pattern]
        )
    except (OSError, ValueError) as error:  # no connection, no such data set or commit, a full disk
        hint = f"; with the files on this machine, give their folder as path of task {task}"
        raise UserError(f"{where}: cannot be read from the Hub ({reason_of(error)}){hint}") from error
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise UserError(f"{where}: no file {pattern} there; the pinned revision is {place.revision}")
    rows, faults = Rows(f"{where}/{pattern}", "row"), []
    for number, row in enumerate(row for file in files for _, row in read_rows(file)):
        try:
            rows.add(number, place.schema_row(row))
        except RowFault as fault:
            faults.append(rows.fault(number, fault))
    rows.raise_faults(faults)
    return rows


def _boolq(row: Row) -> SchemaRow:
    """question, answer (bool), passage."""
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise RowFault(f"answer: must be true or false, got {shown(answer)}")
    return {
        "question": text_field(row, "question"),
        "passage": row.get("passage"),
        "choices": ["false", "true"],
        "answer": int(answer),
    }


def _piqa(row: Row) -> SchemaRow:
    """goal, sol1, sol2, label (0 or 1)."""
    return {
        "question": text_field(row, "goal"),
        "choices": [row.get("sol1"), row.get("sol2")],
        "answer": _label(row, "label", first=0, num_choices=2),
    }


def _siqa(row: Row) -> SchemaRow:
    """context, question, answerA, answerB, answerC, label ("1" to "3", in some versions with a line end)."""
    return {
        "context": text_field(row, "context"),
        "question": text_field(row, "question"),
        "choices": [row.get("answerA"), row.get("answerB"), row.get("answerC")],
        "answer": _label(row, "label", first=1, num_choices=3),
    }


def _hellaswag(row: Row) -> SchemaRow:
    """activity_label, ctx, endings, label ("0" to "3", empty in the official test split), ind."""
    endings = row.get("endings")
    if not isinstance(endings, list):
        raise RowFault(f"endings: must be a list of texts, got {shown(endings)}")
    return {
        "id": str(row.get("ind", "")),
        "context": text_field(row, "activity_label"),
        "question": without_wikihow_marks(text_field(row, "ctx")),
        "choices": [without_wikihow_marks(str(ending)) for ending in endings],
        "answer": _label(row, "label", first=0, num_choices=len(endings)),
    }


def without_wikihow_marks(text: str) -> str:
    """HellaSwag's text without [header], [title], [step], [substeps]; [title] ends the sentence before it."""
    text = re.sub(r"\s*[.:!?]?\s*\[title\]\s*", ". ", text.strip())
    return re.sub(r"\s+", " ", re.sub(r"\[(header|step|substeps)\]", " ", text)).strip()


def _winogrande(row: Row) -> SchemaRow:
    """sentence (with _), option1, option2, answer ("1" or "2", empty in the official test split)."""
    return {
        "question": text_field(row, "sentence"),
        "choices": [row.get("option1"), row.get("option2")],
        "answer": _label(row, "answer", first=1, num_choices=2),
    }


def _arc(row: Row) -> SchemaRow:
    """id, question, choices {text, label}, answerKey; labels are A.. or 1.., 3 to 5 of them."""
    return {"question": text_field(row, "question"), **_keyed_choices(row)}


def _obqa(row: Row) -> SchemaRow:
    """id, question_stem, choices {text, label}, answerKey."""
    return {"question": text_field(row, "question_stem"), **_keyed_choices(row)}


def _keyed_choices(row: Row) -> SchemaRow:
    choices = row.get("choices")
    if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
        raise RowFault(f"choices: must hold the lists text and label, got {shown(choices)}")
    labels, key = list(choices["label"]), row.get("answerKey")
    if key not in labels:
        raise RowFault(f"answerKey: must be one of {', '.join(map(str, labels))}, got {shown(key)}")
    return {"id": str(row.get("id", "")), "choices": list(choices["text"]), "answer": labels.index(key)}


def _label(row: Row, name: str, *, first: int, num_choices: int) -> int:
    """A label that counts from `first`, as number or text -> an index from 0."""
    value = row.get(name)
    text = str(value).strip()
    if not text.isascii() or not text.isdigit() or not first <= int(text) < first + num_choices:
        last = first + num_choices - 1
        raise RowFault(f"{name}: must be {first} to {last} (a split without labels cannot be used), got {shown(value)}")
    return int(text) - first


_DEV_IS_TEST = {"train": "train", "test": "validation"}
_ALL = {"train": "train", "validation": "validation", "test": "test"}
_ARC = "210d026faf9955653af8916fad021475a3f00453"

HUB_TASKS: dict[str, HubTask] = {
    "boolq": HubTask(
        "google/boolq",
        "35b264d03638db9f4ce671b711558bf7ff0f80d5",
        "data/{split}-*.parquet",
        _DEV_IS_TEST,
        _boolq,
    ),
    "piqa": HubTask(
        "ybisk/piqa",
        "142c51238b3ca2bc61e9a075913871b8b600e8e1",
        "plain_text/{split}/*.parquet",
        _DEV_IS_TEST,
        _piqa,
    ),
    "siqa": HubTask(
        "allenai/social_i_qa",
        "537a2ec8ec565adc0b70b70752893e59e024df26",
        "default/{split}/*.parquet",
        _DEV_IS_TEST,
        _siqa,
    ),
    "hellaswag": HubTask(
        "Rowan/hellaswag",
        "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        "data/{split}-*.parquet",
        _DEV_IS_TEST,
        _hellaswag,
    ),
    "winogrande": HubTask(
        "allenai/winogrande",
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        "winogrande_xl/{split}-*.parquet",
        _DEV_IS_TEST,
        _winogrande,
    ),
    "arc_e": HubTask("allenai/ai2_arc", _ARC, "ARC-Easy/{split}-*.parquet", _ALL, _arc),
    "arc_c": HubTask("allenai/ai2_arc", _ARC, "ARC-Challenge/{split}-*.parquet", _ALL, _arc),
    "obqa": HubTask(
        "allenai/openbookqa",
        "388097ea7776314e93a529163e0fea805b8a6454",
        "main/{split}-*.parquet",
        _ALL,
        _obqa,
    ),
}
"""Built-in task -> its place on the Hub."""
