"""The eight commonsense tasks: prompts as cloze questions and in LLM-Adapters' wording, and their rows on the Hub.

A schema row holds question, choices (list), answer (index of the right choice), maybe context, passage, task and id.

Cloze (`example_of_row`): the model learns and is scored on the text of the choices. Models of 0.1 to 1 B parameters
score at chance when they have to name an option ("answer2"), and well above it on the text.

LLM-Adapters (`instruction_row`): the model learns to name a choice, as in the DoRA paper (arXiv 2402.09353, sec. 5.1;
arXiv 2304.01933, appendix), in the wording and white space of commonsense_170k.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdora.data.example import Example, Row, RowFault, optional_text, text_field
from qdora.data.files import Rows, from_hub, rows_of_split
from qdora.errors import UserError
from qdora.recipe.section import shown

# Cloze questions


def example_of_row(row: Row, task: str = "") -> Example:
    """A schema row without task and id, in the wording of `task` (one of the eight; else the general one)."""
    question, value = text_field(row, "question"), row.get("choices")
    # BoolQ has true and false
    texts = (
        [str(each).lower() if isinstance(each, bool) else each for each in value]
        if isinstance(value, list)
        else []
    )
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowFault(f"choices: must be a list of two or more texts, none empty, got {shown(value)}")
    choices, gold = [text.strip() for text in texts], row.get("answer")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise RowFault(
            f"answer: must be the index of the right choice, 0 to {len(choices) - 1}, got {shown(gold)}"
        )
    if task == "boolq":
        question, choices = question.rstrip("? ") + "?", [_BOOLQ[choice.lower()] for choice in choices]
    continuations = tuple(f" {choice}" for choice in choices)
    prompt = _prompt(row, task, question, choices)
    return Example("", "", prompt, continuations[gold], choices=continuations, gold=gold)


_BOOLQ = {"false": "no", "no": "no", "true": "yes", "yes": "yes"}


def _prompt(row: Row, task: str, question: str, choices: Sequence[str]) -> str:
    context = optional_text(row, "context")
    if task == "siqa":  # the situation stands before the question
        return f"Question: {context} {question}".replace("  ", " ") + "\nAnswer:"
    if task == "hellaswag":  # context is the activity, question the beginning of a story
        return f"{context}: {question}" if context else question
    if task == "winogrande":  # the blank stays, so that both choices continue the same prompt
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
    **dict.fromkeys(("arc_e", "arc_c", "obqa"), _ANSWER),
}
"""Task -> (noun of a choice; what stands before the question, between the choices, behind them)."""


def instruction_row(row: Row, task: str) -> dict[str, str]:
    """A schema row as one with instruction, output and answer, as commonsense_170k.json has them."""
    example = example_of_row(row, task)  # checks the row
    question = text_field(row, "question")
    if task == "boolq":
        names = tuple({"no": "false", "yes": "true"}[choice.strip()] for choice in example.choices)
        text = (
            f"Please answer the following question with true or false, question: {question.rstrip('? ')}?\n\n"
        )
        name_list = "true/false"
    else:
        noun, before, between, behind = _WORDINGS[task]
        names = tuple(f"{noun}{number + 1}" for number in range(len(example.choices)))
        choices = between.join(
            f"{name.capitalize()}: {str(choice).strip()}"
            for name, choice in zip(names, row["choices"], strict=True)
        )
        context = optional_text(row, "context")
        colon = ":" if task == "hellaswag" else ""
        asked = f"{context}{colon} {question}" if context else question
        text = f"{before}{asked}\n\n{choices}{behind}"
        name_list = "/".join(names)
    answer = names[row["answer"]]
    return {
        "instruction": f"{text}Answer format: {name_list}",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def with_named_choices(example: Example, instruction: str, answer: str) -> Example:
    """An example with choices: its answer with each name of the instruction."""
    names = _answer_names(instruction)
    if answer in names and example.answer.count(answer) == 1:
        choices = tuple(example.answer.replace(answer, name) for name in names)
        return replace(example, choices=choices, gold=names.index(answer))
    return example


def _answer_names(instruction: str) -> tuple[str, ...]:
    """Of the line "Answer format: answer1/answer2/answer3"."""
    line = re.search(r"Answer format:\s*(\S+)\s*$", instruction)
    names = tuple(line.group(1).split("/")) if line else ()
    return names if len(names) > 1 else ()


def commonsense_task(instruction: str) -> str:
    """The task of a commonsense_170k instruction by its wording, or ''.

    Three answers are Social IQa (or one of a dozen ARC questions). ARC and OpenBookQA have the same wording.
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
    """Where a task lives. Where test labels are secret, the official validation split is our test, as published."""

    id: str  # data set on the Hub
    revision: str
    files: str  # glob of the Parquet files of a split
    splits: Mapping[str, str]  # ours -> the Hub's
    schema_row: Callable[[Row], dict[str, Any]]  # of a row of the Hub


def hub_task_rows(task: str, split: str, revision: str | None = None) -> Rows:
    """The schema rows of a task's split, at `revision` or the pinned commit."""
    import huggingface_hub

    hub = HUB_TASKS[task]
    if split not in hub.splits:
        raise UserError(f"{task}: no split {split!r}, must be one of {', '.join(hub.splits)}.")
    pattern, commit = hub.files.format(split=hub.splits[split]), revision or hub.revision
    with from_hub(f"{hub.id}@{commit}"):
        folder = huggingface_hub.snapshot_download(
            hub.id, repo_type="dataset", revision=commit, allow_patterns=[pattern]
        )
    return rows_of_split(Path(folder) / pattern, split)


def _hellaswag_row(row: Row) -> dict[str, Any]:
    return {
        "id": str(row["ind"]),
        "context": row["activity_label"],
        "question": without_wikihow_marks(row["ctx"]),
        "choices": [without_wikihow_marks(ending) for ending in row["endings"]],
        "answer": int(row["label"]),
    }


def without_wikihow_marks(text: str) -> str:
    """HellaSwag's text; [title] ends the sentence before it."""
    text = re.sub(r"\s*[.:!?]?\s*\[title\]\s*", ". ", text.strip())
    return re.sub(r"\s+", " ", re.sub(r"\[(header|step|substeps)\]", " ", text)).strip()


def _keyed(row: Row, question: str = "question") -> dict[str, Any]:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return {
        "id": row["id"],
        "question": row[question],
        "choices": texts,
        "answer": labels.index(row["answerKey"]),
    }


_DEV_IS_TEST = {"train": "train", "test": "validation"}
_ALL = {"train": "train", "validation": "validation", "test": "test"}
_ARC = "allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453"


def _row(row: Row, question: str, columns: Sequence[str], answer: int) -> dict[str, Any]:
    """Of a row whose choices have a column each."""
    choices = [row[name] for name in columns]
    return {"context": row.get("context"), "question": row[question], "choices": choices, "answer": answer}


HUB_TASKS: dict[str, HubTask] = {
    "boolq": HubTask(
        "google/boolq",
        "35b264d03638db9f4ce671b711558bf7ff0f80d5",
        "data/{split}-*.parquet",
        _DEV_IS_TEST,
        lambda row: {**row, "choices": ["false", "true"], "answer": int(row["answer"])},
    ),
    "piqa": HubTask(
        "ybisk/piqa",
        "142c51238b3ca2bc61e9a075913871b8b600e8e1",
        "plain_text/{split}/*.parquet",
        _DEV_IS_TEST,
        lambda row: _row(row, "goal", ("sol1", "sol2"), int(row["label"])),
    ),
    "siqa": HubTask(
        "allenai/social_i_qa",
        "537a2ec8ec565adc0b70b70752893e59e024df26",
        "default/{split}/*.parquet",
        _DEV_IS_TEST,
        lambda row: _row(row, "question", ("answerA", "answerB", "answerC"), int(row["label"]) - 1),
    ),
    "hellaswag": HubTask(
        "Rowan/hellaswag",
        "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        "data/{split}-*.parquet",
        _DEV_IS_TEST,
        _hellaswag_row,
    ),
    "winogrande": HubTask(
        "allenai/winogrande",
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        "winogrande_xl/{split}-*.parquet",
        _DEV_IS_TEST,
        lambda row: _row(row, "sentence", ("option1", "option2"), int(row["answer"]) - 1),
    ),
    "arc_e": HubTask(*_ARC, "ARC-Easy/{split}-*.parquet", _ALL, _keyed),
    "arc_c": HubTask(*_ARC, "ARC-Challenge/{split}-*.parquet", _ALL, _keyed),
    "obqa": HubTask(
        "allenai/openbookqa",
        "388097ea7776314e93a529163e0fea805b8a6454",
        "main/{split}-*.parquet",
        _ALL,
        lambda row: _keyed(row, "question_stem"),
    ),
}
"""Built-in task -> its place on the Hub."""
