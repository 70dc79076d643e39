"""The layouts of rows -> Examples: choices, prompt and completion, chat, text, LLM-Adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from qdora.data.commonsense import TEMPLATES, example_of_row
from qdora.data.example import Example
from qdora.data.messages import TURN_KEYS, parse_messages, parse_tools
from qdora.data.rows import Row, RowFault, optional_text, row_id, shown, text_field
from qdora.errors import UserError, nearest


@dataclass(frozen=True)
class Format:
    """A layout.

    Attributes:
        required: Columns that every row must have.
        example: (row, task of the row, label, id) -> Example.
        optional: Other columns that are read.
    """

    required: tuple[str, ...]
    example: Callable[[Row, str, str, str], Example]
    optional: tuple[str, ...] = ("task", "id")


def choose_format(columns: Collection[str], format: str, where: str) -> str:
    """`format`, or for auto the one that fits the columns.

    Raises: UserError if none fits.
    """
    fitting = (name for name, layout in FORMATS.items() if set(layout.required) <= set(columns))
    chosen = next(fitting, None) if format == "auto" else format
    if chosen is None:
        allowed = "; ".join(f"{name}: {', '.join(layout.required)}" for name, layout in FORMATS.items())
        known = [column for layout in FORMATS.values() for column in layout.required]
        hint = next((hint for column in columns if (hint := nearest(column, known))), "")
        raise UserError(f"{where}: columns {', '.join(columns)} fit no format, allowed: {allowed}.{hint}")
    return chosen


def example_of_format(row: Row, format: str, *, label: str, named: bool, id: str) -> Example:
    """One row as an Example.

    Args:
        label: Task name of the example. A row's own task (in commonsense170k, the one found from its wording) comes
            first unless `named`.
        named: The user chose the label.
    Raises: RowFault if a column is missing or holds the wrong thing.
    """
    layout = FORMATS[format]
    absent = [column for column in layout.required if column not in row]
    if absent:
        raise RowFault(
            f"columns {', '.join(row)}; format {format} needs {', '.join(layout.required)}. One file holds one format."
            f"{nearest(absent[0], list(row))}"
        )
    task = commonsense_task(str(row["instruction"])) if format == "commonsense170k" else optional_text(row, "task")
    return layout.example(row, task, label if named else task or label, id)


def unused_columns(row: Row, format: str) -> Iterator[str]:
    """What a row has and its format does not read: columns, keys of turns as messages.<key>; no empty values."""
    layout = FORMATS[format]
    known = (*layout.required, *layout.optional)
    yield from (str(name) for name, value in row.items() if name not in known and not _is_empty(value))
    if format == "messages" and isinstance(row["messages"], list):
        turns = [turn for turn in row["messages"] if isinstance(turn, dict)]
        names = (name for turn in turns for name, value in turn.items() if not _is_empty(value))
        yield from (f"messages.{name}" for name in names if name not in TURN_KEYS)


def _is_empty(value: Any) -> bool:
    """Whether a value is what files write where there is none: null, NaN, an empty text or list."""
    return value is None or (isinstance(value, float) and value != value) or value in ("", [], {})


def _choices(row: Row, task: str, label: str, id: str) -> Example:
    """Schema rows; a row that names one of the eight tasks gets that task's prompt."""
    return example_of_row(row, task=task or (label if label in TEMPLATES else ""), label=label, id=id)


def _completion(row: Row, task: str, label: str, id: str) -> Example:
    """Prompt and completion, joined as they stand: the space between them belongs to the completion (or the prompt)."""
    prompt, completion = row["prompt"], row["completion"]
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            hint = " (turns of a chat go into one column, messages)" if isinstance(value, list) else ""
            raise RowFault(f"{name}: must be text{hint}, got {shown(value)}")
    if not completion.strip():
        raise RowFault(f"completion: must be text that is not empty, got {shown(completion)}")
    return Example(task=label, id=row_id(row, id), prompt=prompt, answer=completion)


def _messages(row: Row, task: str, label: str, id: str) -> Example:
    """A list of turns, and the tools that the assistant may call; the assistant's turns are what is learnt."""
    messages, tools = parse_messages(row["messages"]), parse_tools(row.get("tools"))
    return Example(task=label, id=row_id(row, id), prompt="", answer="", messages=messages, tools=tools)


def _text(row: Row, task: str, label: str, id: str) -> Example:
    """Plain text; all of it is learnt."""
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise RowFault(f"text: must be text that is not empty, got {shown(row['text'])}")
    return Example(task=label, id=row_id(row, id), prompt="", answer=row["text"])


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def _commonsense170k(row: Row, task: str, label: str, id: str) -> Example:
    """LLM-Adapters (arXiv 2304.01933) and other Alpaca-type rows: instruction, output, maybe input and answer.

    The prompt is the Alpaca template as published, without the indentation of the published script. Where `answer` is
    one of the names in "Answer format: answer1/answer2/...", the other names become the wrong choices.
    """
    instruction, output = text_field(row, "instruction"), text_field(row, "output")
    given = optional_text(row, "input")
    template = _ALPACA_INPUT if given else _ALPACA
    prompt = template.format(instruction=instruction, input=given)
    names, answer = _answer_names(instruction), optional_text(row, "answer")
    if answer in names and output.count(answer) == 1:
        choices = tuple(output.replace(answer, name) for name in names)
        return Example(label, row_id(row, id), prompt, output, choices, names.index(answer))
    return Example(label, row_id(row, id), prompt, output)


def _answer_names(instruction: str) -> tuple[str, ...]:
    """The names in the line "Answer format: answer1/answer2/answer3"; empty without such a line."""
    found = re.search(r"Answer format:\s*(\S+(?:/\S+)+)\s*$", instruction)
    names = tuple(found.group(1).split("/")) if found else ()
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


FORMATS: dict[str, Format] = {
    "choices": Format(("question", "choices", "answer"), _choices, ("task", "id", "context", "passage")),
    "messages": Format(("messages",), _messages, ("tools", "task", "id")),
    "completion": Format(("prompt", "completion"), _completion),
    "commonsense170k": Format(("instruction", "output"), _commonsense170k, ("input", "answer", "id")),
    "text": Format(("text",), _text),
}
"""Format -> layout; `auto` takes the first whose required columns are there."""
