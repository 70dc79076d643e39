"""The eight commonsense tasks: prompts as cloze questions and in LLM-Adapters' wording, and their places on the Hub.

A row holds task, id, context, question, choices (list), answer (index of the right choice) and sometimes passage. One
schema serves local files and what `hub_task_rows` reads from the Hub.

Cloze (`example_of_row`): the model learns and is scored on the text of the choices, not on a letter or a number. At 0.1
to 1 B parameters models score at chance when they have to name an option ("answer2"), and well above it on the text.

LLM-Adapters (`instruction_row`): the prompt lists the choices with their names and the model learns to say a name ("the
correct answer is answer2"), as in the DoRA paper (arXiv 2402.09353, sec. 5.1; arXiv 2304.01933, appendix). Wording and
white space are those of commonsense_170k.json, so that a model trained on that file is asked what it has learnt.
Passages are left out, since that file has none.

On the Hub all are read as Parquet files of one pinned commit, so no code from the Hub runs and the data cannot change
under a run. PIQA and Social IQA are published as loading scripts, which `datasets` 4 no longer runs; their pins are
commits of the Hub's own Parquet conversion (branch refs/convert/parquet). The pins were collected from public projects
that publish theirs, not by asking the Hub; where one is gone, `revision: main` (or refs/convert/parquet) in the recipe
goes past it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qdora.data.example import Example
from qdora.data.readers import read_rows
from qdora.data.rows import Entry, Row, RowFault, Rows, chosen_of_parts, optional_text, row_id, text_field
from qdora.errors import HubFailure, UserError, nearest
from qdora.recipe.faults import reason_of, shown


def example_of_row(row: Row, *, task: str, label: str, id: str) -> Example:
    """The example of one schema row.

    Args:
        row: question, choices and answer are required; context, passage and id may be absent, null or empty.
        task: Chooses the template: one of TEMPLATES, any other name gets the general one.
        id: Its id where the row has none.
    Raises: RowFault if a field is missing or has the wrong type, or the answer is no index of the choices.
    """
    question = text_field(row, "question")
    choices = _choices(row)
    gold = _answer_index(row, len(choices))
    prompt, continuations = TEMPLATES.get(task, _question)(row, question, choices)
    return Example(label, row_id(row, id), prompt, continuations[gold], choices=continuations, gold=gold)


def _choices(row: Row) -> tuple[str, ...]:
    value = row.get("choices")
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise RowFault(f"choices: must be a list of two or more texts, got {shown(value)}")
    # JSON files write BoolQ's choices as true and false
    texts = [str(choice).lower() if isinstance(choice, bool) else choice for choice in value]
    for index, choice in enumerate(texts):
        if not isinstance(choice, str) or not choice.strip():
            raise RowFault(f"choices[{index}]: must be text that is not empty, got {shown(choice)}")
    return tuple(str(choice).strip() for choice in texts)


def _answer_index(row: Row, num_choices: int) -> int:
    value = row.get("answer")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_choices:
        raise RowFault(f"answer: must be the index of the right choice, 0 to {num_choices - 1}, got {shown(value)}")
    return value


Template = Callable[[Row, str, tuple[str, ...]], tuple[str, tuple[str, ...]]]
"""(row, question, choices) -> (prompt, continuations)."""


def _spaced(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" " + choice for choice in choices)


def _question(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """piqa, arc_e, arc_c, obqa and any other task: passage and context, where there are any, question, choice."""
    before = "".join(f"{line}\n" for line in (optional_text(row, "passage"), optional_text(row, "context")) if line)
    return f"{before}Question: {question}\nAnswer:", _spaced(choices)


def _boolq(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """boolq: as `_question`; false and true are said as "no" and "yes", one question mark ends the question."""
    words = {"false": "no", "no": "no", "true": "yes", "yes": "yes"}
    unknown = [choice for choice in choices if choice.lower() not in words]
    if unknown:
        raise RowFault(f"choices: must be false, true (or no, yes) for boolq, got {shown(unknown[0])}")
    prompt, _ = _question(row, question.rstrip("? ") + "?", choices)
    return prompt, tuple(" " + words[choice.lower()] for choice in choices)


def _siqa(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """siqa: the situation stands before the question."""
    context = optional_text(row, "context")
    return f"Question: {context} {question}".replace("  ", " ") + "\nAnswer:", _spaced(choices)


def _hellaswag(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """hellaswag: the schema's context is the activity, its question the beginning of a story."""
    activity = optional_text(row, "context")
    return f"{activity}: {question}" if activity else question, _spaced(choices)


def _winogrande(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """winogrande: the blank stays in the sentence, so that both choices continue one and the same prompt."""
    if "_" not in question:
        raise RowFault(f"question: must be a sentence with a blank '_' for winogrande, got {shown(question)}")
    listed = " or ".join(choices)
    return f"{question}\nQuestion: What does the blank _ stand for, {listed}?\nAnswer:", _spaced(choices)


TEMPLATES: dict[str, Template] = {
    "boolq": _boolq,
    "piqa": _question,
    "siqa": _siqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_e": _question,
    "arc_c": _question,
    "obqa": _question,
}
"""Built-in task -> its template."""


_ANSWER = "answer", "Please choose the correct answer to the question: ", " ", "\n\n"
_FILL = "Please choose the correct answer to fill in the blank to complete the given sentence: "
WORDINGS: dict[str, tuple[str, str, str, str]] = {
    "piqa": ("solution", "Please choose the correct solution to the question: ", "\n\n", "\n\n"),
    "siqa": _ANSWER,
    "hellaswag": ("ending", "Please choose the correct ending to complete the given sentence: ", " ", "\n\n"),
    "winogrande": ("option", _FILL, " ", " "),
    "arc_e": _ANSWER,
    "arc_c": _ANSWER,
    "obqa": _ANSWER,
}
"""Task -> (noun of a choice, which with its number from 1 is its name; what stands before the question; between the
choices; between the last choice and the list of names)."""


def instruction_row(row: Row, task: str) -> dict[str, str]:
    """A row with id, instruction, output and answer, as commonsense_170k.json has them.

    Raises: RowFault: As `example_of_row`.
    """
    example = example_of_row(row, task=task, label=task, id="")  # checks the row
    assert example.gold is not None
    question = text_field(row, "question")
    if task == "boolq":
        names = tuple({"no": "false", "yes": "true"}[choice.strip()] for choice in example.choices)
        text = f"Please answer the following question with true or false, question: {question.rstrip('? ')}?\n\n"
        listed = "true/false"
    else:
        noun, before, between, behind = WORDINGS[task]
        names = tuple(f"{noun}{number + 1}" for number in range(len(example.choices)))
        choices = between.join(
            f"{name.capitalize()}: {str(choice).strip()}" for name, choice in zip(names, row["choices"], strict=True)
        )
        context = optional_text(row, "context")  # the situation (siqa) or the activity (hellaswag)
        colon = ":" if task == "hellaswag" else ""
        asked = f"{context}{colon} {question}" if context else question
        text = f"{before}{asked}\n\n{choices}{behind}"
        listed = "/".join(names)
    answer = names[example.gold]
    return {
        "id": row_id(row, ""),
        "instruction": f"{text}Answer format: {listed}",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


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
