"""The eight commonsense tasks on the Hub: their places, pinned commits, and the rows there as rows of our schema.

All are read as Parquet files of one pinned commit, so no code from the Hub runs and the data cannot change under a run.
PIQA and Social IQA are published as loading scripts, which `datasets` 4 no longer runs; their pins are commits of the
Hub's own Parquet conversion (branch refs/convert/parquet). The pins were collected from public projects that publish
theirs, not by asking the Hub; where one is gone, `revision: main` (or refs/convert/parquet) in the recipe goes past it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qdora.data.readers import read_rows
from qdora.data.rows import Entry, Row, RowFault, Rows, chosen_of_parts, text_field
from qdora.errors import HubFailure, UserError, nearest
from qdora.recipe.faults import reason_of, shown

SchemaRow = dict[str, Any]


@dataclass(frozen=True)
class HubTask:
    """Where a task lives.

    Attributes:
        id: Data set on the Hub.
        files: Glob of the Parquet files of a split inside the repository; {split} is the Hub's split name.
        splits: Our split -> the Hub's. Where the official test labels are secret, the official validation split is our
            test, as in published results, and there is no validation split: it is cut from the end of train.
        schema_row: A row of the Hub -> a schema row without task and, mostly, id.
    """

    id: str
    files: str
    splits: Mapping[str, str]
    schema_row: Callable[[Row], SchemaRow]

    @property
    def revision(self) -> str:
        """The pinned commit."""
        return _PINS[self.id]


def hub_task_rows(task: str, split: str, revision: str | None = None) -> Rows:
    """The schema rows of a task's split; downloaded once, then read from the cache of huggingface_hub, offline too.

    `revision` is a branch, tag or commit in place of the pinned one.
    Raises: UserError if the task has no such split, the Hub cannot be reached or a row is faulty.
    """
    import huggingface_hub

    place = HUB_TASKS[task]
    if split not in place.splits:
        allowed = ", ".join(place.splits)
        raise UserError(
            f"{task} ({place.id}): no split {split!r}, must be one of {allowed}.{nearest(split, place.splits)}"
        )
    pattern = place.files.format(split=place.splits[split])
    commit = revision or place.revision
    where = f"{place.id}@{commit}"
    try:
        folder = huggingface_hub.snapshot_download(
            place.id, repo_type="dataset", revision=commit, allow_patterns=[pattern]
        )
    # No connection, no such data set or commit, a full disk. What the client raises for a proxy or a connection lost
    # in the middle is no OSError.
    except Exception as error:
        hint = f"; with the files on this machine, give their folder as path of task {task}"
        raise HubFailure(f"{where}: cannot be read from the Hub ({reason_of(error)}){hint}") from error
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise UserError(f"{where}: no file {pattern} there; the pinned revision is {place.revision}")
    parts = [read_rows(file) for file in files]

    def chosen(indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
        for _, index, _, row in chosen_of_parts(parts, indices):
            yield index, _schema_entry(place, row)

    # The cache names a snapshot by its commit; a branch may be another one tomorrow.
    identity = f"{place.id}@{Path(folder).name}/{pattern}"
    return Rows(f"{where}/{pattern}", "row", sum(part.num_rows for part in parts), chosen, identity)


def _schema_entry(place: HubTask, row: Entry) -> Entry:
    try:
        return row if isinstance(row, RowFault) else place.schema_row(row)
    except RowFault as fault:
        return fault


def _boolq_row(row: Row) -> SchemaRow:
    """question, answer (bool), passage."""
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise RowFault(f"answer: must be true or false, got {shown(answer)}")
    question = text_field(row, "question")
    return {"question": question, "passage": row.get("passage"), "choices": ["false", "true"], "answer": int(answer)}


def _columns(
    row: Row, *, question: str, choices: tuple[str, ...], label: str, first: int, context: str | None = None
) -> SchemaRow:
    """A row whose choices have a column each; labels count from `first`."""
    return {
        **({} if context is None else {"context": text_field(row, context)}),
        "question": text_field(row, question),
        "choices": [row.get(name) for name in choices],
        "answer": _label(row, label, first=first, num_choices=len(choices)),
    }


def _hellaswag_row(row: Row) -> SchemaRow:
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


def _keyed(row: Row, question: str) -> SchemaRow:
    """id, the question, choices {text, label}, answerKey; ARC's labels are A.. or 1.., 3 to 5 of them."""
    asked = text_field(row, question)
    choices = row.get("choices")
    if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
        raise RowFault(f"choices: must hold the lists text and label, got {shown(choices)}")
    labels, key = list(choices["label"]), row.get("answerKey")
    if key not in labels:
        raise RowFault(f"answerKey: must be one of {', '.join(map(str, labels))}, got {shown(key)}")
    texts, answer = list(choices["text"]), labels.index(key)
    return {"id": str(row.get("id", "")), "question": asked, "choices": texts, "answer": answer}


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
_PINS = {
    "google/boolq": "35b264d03638db9f4ce671b711558bf7ff0f80d5",
    "ybisk/piqa": "142c51238b3ca2bc61e9a075913871b8b600e8e1",
    "allenai/social_i_qa": "537a2ec8ec565adc0b70b70752893e59e024df26",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
}
_piqa_row = partial(_columns, question="goal", choices=("sol1", "sol2"), label="label", first=0)
# Labels of siqa have a line end in some versions; those of winogrande are empty in the official test split.
_siqa_row = partial(
    _columns, context="context", question="question", choices=("answerA", "answerB", "answerC"), label="label", first=1
)
_winogrande_row = partial(_columns, question="sentence", choices=("option1", "option2"), label="answer", first=1)
_arc_row = partial(_keyed, question="question")
_obqa_row = partial(_keyed, question="question_stem")

HUB_TASKS: dict[str, HubTask] = {
    "boolq": HubTask("google/boolq", "data/{split}-*.parquet", _DEV_IS_TEST, _boolq_row),
    "piqa": HubTask("ybisk/piqa", "plain_text/{split}/*.parquet", _DEV_IS_TEST, _piqa_row),
    "siqa": HubTask("allenai/social_i_qa", "default/{split}/*.parquet", _DEV_IS_TEST, _siqa_row),
    "hellaswag": HubTask("Rowan/hellaswag", "data/{split}-*.parquet", _DEV_IS_TEST, _hellaswag_row),
    "winogrande": HubTask("allenai/winogrande", "winogrande_xl/{split}-*.parquet", _DEV_IS_TEST, _winogrande_row),
    "arc_e": HubTask("allenai/ai2_arc", "ARC-Easy/{split}-*.parquet", _ALL, _arc_row),
    "arc_c": HubTask("allenai/ai2_arc", "ARC-Challenge/{split}-*.parquet", _ALL, _arc_row),
    "obqa": HubTask("allenai/openbookqa", "main/{split}-*.parquet", _ALL, _obqa_row),
}
"""Built-in task -> its place on the Hub."""
