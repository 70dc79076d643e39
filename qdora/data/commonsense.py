"""The eight commonsense tasks: prompts as cloze questions and in LLM-Adapters' wording, and their rows on the Hub.

A row holds task, id, context, question, choices (list), answer (index of the right choice) and sometimes passage: in
local files as they are, and of the Hub's rows as `HUB_TASKS` makes them.

Cloze (`example_of_row`): the model learns and is scored on the text of the choices, not on a letter or a number. At 0.1
to 1 B parameters models score at chance when they have to name an option ("answer2"), and well above it on the text.

LLM-Adapters (`instruction_row`): the prompt lists the choices with their names and the model learns to say a name ("the
correct answer is answer2"), as in the DoRA paper (arXiv 2402.09353, sec. 5.1; arXiv 2304.01933, appendix). Wording and
white space are those of commonsense_170k.json, so that a model trained on that file is asked what it has learnt.
Passages are left out, since that file has none.

On the Hub all are read as Parquet files of one pinned commit, so no code from there runs and the data cannot change
under a run. PIQA and Social IQA are published as loading scripts, which `datasets` 4 no longer runs; their pins are
commits of the Hub's own Parquet conversion (branch refs/convert/parquet). The pins were collected from public projects
that publish theirs, not by asking the Hub; where one is gone, `revision: main` (or refs/convert/parquet) in the recipe
goes past it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qdora.data.example import Example
from qdora.data.files import read_rows
from qdora.data.rows import Entry, Place, Row, RowFault, Rows, joined, optional_text, row_id, text_field
from qdora.errors import HubFailure, UserError, nearest
from qdora.recipe.section import reason_of, shown

# Cloze questions


def example_of_row(row: Row, *, task: str, label: str, id: str) -> Example:
    """The example of one schema row: its prompt and, as continuations, its choices.

    `task` chooses the wording: one of the eight, any other name gets the general one. `id` is for a row without one.
    """
    question, value = text_field(row, "question"), row.get("choices")
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise RowFault(f"choices: must be a list of two or more texts, got {shown(value)}")
    choices = []
    for index, choice in enumerate(value):
        text = str(choice).lower() if isinstance(choice, bool) else choice  # JSON files write BoolQ's as true and false
        if not isinstance(text, str) or not text.strip():
            raise RowFault(f"choices[{index}]: must be text that is not empty, got {shown(choice)}")
        choices.append(text.strip())
    gold, last = row.get("answer"), len(choices) - 1
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold <= last:
        raise RowFault(f"answer: must be the index of the right choice, 0 to {last}, got {shown(gold)}")
    if task == "boolq":
        unknown = [choice for choice in choices if choice.lower() not in _BOOLQ]
        if unknown:
            raise RowFault(f"choices: must be false, true (or no, yes) for boolq, got {shown(unknown[0])}")
        question, choices = question.rstrip("? ") + "?", [_BOOLQ[choice.lower()] for choice in choices]
    continuations = tuple(f" {choice}" for choice in choices)
    prompt = _prompt(row, task, question, choices)
    return Example(label, row_id(row, id), prompt, continuations[gold], choices=continuations, gold=gold)


_BOOLQ = {"false": "no", "no": "no", "true": "yes", "yes": "yes"}


def _prompt(row: Row, task: str, question: str, choices: Sequence[str]) -> str:
    context = optional_text(row, "context")
    if task == "siqa":  # the situation stands before the question
        return f"Question: {context} {question}".replace("  ", " ") + "\nAnswer:"
    if task == "hellaswag":  # the schema's context is the activity, its question the beginning of a story
        return f"{context}: {question}" if context else question
    if task == "winogrande":  # the blank stays in the sentence, so that both choices continue one and the same prompt
        if "_" not in question:
            raise RowFault(f"question: must be a sentence with a blank '_' for winogrande, got {shown(question)}")
        return f"{question}\nQuestion: What does the blank _ stand for, {' or '.join(choices)}?\nAnswer:"
    before = "".join(f"{line}\n" for line in (optional_text(row, "passage"), context) if line)
    return f"{before}Question: {question}\nAnswer:"


# LLM-Adapters' wording

_ANSWER = "answer", "Please choose the correct answer to the question: ", " ", "\n\n"
_FILL = "Please choose the correct answer to fill in the blank to complete the given sentence: "
_WORDINGS: dict[str, tuple[str, str, str, str]] = {
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
    """A schema row as one with id, instruction, output and answer, as commonsense_170k.json has them."""
    example = example_of_row(row, task=task, label=task, id="")  # checks the row
    assert example.gold is not None
    question = text_field(row, "question")
    if task == "boolq":
        names = tuple({"no": "false", "yes": "true"}[choice.strip()] for choice in example.choices)
        text = f"Please answer the following question with true or false, question: {question.rstrip('? ')}?\n\n"
        name_list = "true/false"
    else:
        noun, before, between, behind = _WORDINGS[task]
        names = tuple(f"{noun}{number + 1}" for number in range(len(example.choices)))
        choices = between.join(
            f"{name.capitalize()}: {str(choice).strip()}" for name, choice in zip(names, row["choices"], strict=True)
        )
        context = optional_text(row, "context")  # the situation (siqa) or the activity (hellaswag)
        colon = ":" if task == "hellaswag" else ""
        asked = f"{context}{colon} {question}" if context else question
        text = f"{before}{asked}\n\n{choices}{behind}"
        name_list = "/".join(names)
    answer = names[example.gold]
    return {
        "id": row_id(row, ""),
        "instruction": f"{text}Answer format: {name_list}",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def with_named_choices(example: Example, instruction: str, answer: str) -> Example:
    """An example in this wording with its choices: where `answer` is one of the names in the instruction and stands
    once in the example's answer, the answers with the other names become the wrong choices."""
    names = _answer_names(instruction)
    if answer in names and example.answer.count(answer) == 1:
        choices = tuple(example.answer.replace(answer, name) for name in names)
        return replace(example, choices=choices, gold=names.index(answer))
    return example


def _answer_names(instruction: str) -> tuple[str, ...]:
    """The names in the line "Answer format: answer1/answer2/answer3"; empty without such a line."""
    line = re.search(r"Answer format:\s*(\S+)\s*$", instruction)
    names = tuple(line.group(1).split("/")) if line else ()
    return names if len(names) > 1 and len(set(names)) == len(names) and all(names) else ()


def commonsense_task(instruction: str) -> str:
    """The task of a commonsense_170k instruction, found from its wording; '' where none fits.

    Three numbered answers are Social IQa (a dozen ARC questions have three, too). Four or five are ARC or OpenBookQA,
    whose wording is the same: arc_or_obqa.
    """
    names = _answer_names(instruction)
    if names == ("true", "false"):
        return "boolq"
    kind = re.sub(r"\d+$", "", names[0]) if names else ""
    if kind == "answer":
        return "siqa" if len(names) == 3 else "arc_or_obqa"
    return {"solution": "piqa", "ending": "hellaswag", "option": "winogrande"}.get(kind, "")


# The tasks on the Hub


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
    schema_row: Callable[[Row], dict[str, Any]]

    @property
    def revision(self) -> str:
        """The pinned commit."""
        return _PINS[self.id]


def hub_task_rows(task: str, split: str, revision: str | None = None) -> Rows:
    """The schema rows of a task's split; downloaded once, then read from the cache of huggingface_hub, offline too.

    `revision` is a branch, tag or commit in place of the pinned one.
    """
    import huggingface_hub

    hub = HUB_TASKS[task]
    if split not in hub.splits:
        allowed = ", ".join(hub.splits)
        raise UserError(f"{task} ({hub.id}): no split {split!r}, must be one of {allowed}.{nearest(split, hub.splits)}")
    pattern, commit = hub.files.format(split=hub.splits[split]), revision or hub.revision
    where = f"{hub.id}@{commit}"
    try:
        folder = huggingface_hub.snapshot_download(
            hub.id, repo_type="dataset", revision=commit, allow_patterns=[pattern]
        )
    # No connection, no such data set or commit, a full disk. What the client raises for a proxy or a connection lost
    # in the middle is no OSError.
    except Exception as error:
        hint = f"; with the files on this machine, give their folder as path of task {task}"
        raise HubFailure(f"{where}: cannot be read from the Hub ({reason_of(error)}){hint}") from error
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise UserError(f"{where}: no file {pattern} there; the pinned revision is {hub.revision}")
    rows = joined(f"{where}/{pattern}", [read_rows(file) for file in files])

    def chosen(indices: Sequence[int]) -> Iterator[tuple[Place, Entry]]:
        for place, row in rows.chosen(indices):
            try:
                yield place, row if isinstance(row, RowFault) else hub.schema_row(row)
            except RowFault as fault:
                yield place, fault

    # The cache names a snapshot by its commit; a branch may be another one tomorrow.
    return replace(rows, chosen=chosen, identity=f"{hub.id}@{Path(folder).name}/{pattern}")


def _boolq_row(row: Row) -> dict[str, Any]:
    """question, answer (bool), passage."""
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise RowFault(f"answer: must be true or false, got {shown(answer)}")
    question = text_field(row, "question")
    return {"question": question, "passage": row.get("passage"), "choices": ["false", "true"], "answer": int(answer)}


def _columns(row: Row, question: str, choices: Sequence[str], label: str, first: int, **more: str) -> dict[str, Any]:
    """A row whose choices have a column each; labels count from `first`."""
    texts = {name: text_field(row, own) for name, own in {**more, "question": question}.items()}
    answer = _label(row, label, first=first, num_choices=len(choices))
    return {**texts, "choices": [row.get(name) for name in choices], "answer": answer}


def _hellaswag_row(row: Row) -> dict[str, Any]:
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


def _keyed(row: Row, question: str) -> dict[str, Any]:
    """id, the question, choices {text, label}, answerKey; ARC's labels are A.. or 1.., 3 to 5 of them."""
    asked, choices = text_field(row, question), row.get("choices")
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
_piqa = partial(_columns, question="goal", choices=("sol1", "sol2"), label="label", first=0)
# Labels of siqa have a line end in some versions; those of winogrande are empty in the official test split.
_answers = ("answerA", "answerB", "answerC")
_siqa = partial(_columns, context="context", question="question", choices=_answers, label="label", first=1)
_winogrande = partial(_columns, question="sentence", choices=("option1", "option2"), label="answer", first=1)
_arc, _obqa = partial(_keyed, question="question"), partial(_keyed, question="question_stem")

HUB_TASKS: dict[str, HubTask] = {
    "boolq": HubTask("google/boolq", "data/{split}-*.parquet", _DEV_IS_TEST, _boolq_row),
    "piqa": HubTask("ybisk/piqa", "plain_text/{split}/*.parquet", _DEV_IS_TEST, _piqa),
    "siqa": HubTask("allenai/social_i_qa", "default/{split}/*.parquet", _DEV_IS_TEST, _siqa),
    "hellaswag": HubTask("Rowan/hellaswag", "data/{split}-*.parquet", _DEV_IS_TEST, _hellaswag_row),
    "winogrande": HubTask("allenai/winogrande", "winogrande_xl/{split}-*.parquet", _DEV_IS_TEST, _winogrande),
    "arc_e": HubTask("allenai/ai2_arc", "ARC-Easy/{split}-*.parquet", _ALL, _arc),
    "arc_c": HubTask("allenai/ai2_arc", "ARC-Challenge/{split}-*.parquet", _ALL, _arc),
    "obqa": HubTask("allenai/openbookqa", "main/{split}-*.parquet", _ALL, _obqa),
}
"""Built-in task -> its place on the Hub."""
