"""The layouts of rows -> Examples: choices, chat, ShareGPT, prompt and completion, LLM-Adapters, Alpaca, text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qdora.data.commonsense import TEMPLATES, example_of_row
from qdora.data.example import Example
from qdora.data.messages import TURN_KEYS, Messages, Tools, parse_messages, parse_tools, parse_turns, parsed
from qdora.data.rows import Row, RowFault, optional_text, parse_row_json, row_id, text_field
from qdora.errors import UserError, nearest
from qdora.recipe.faults import shown

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Who speaks in a ShareGPT turn -> role."""


@dataclass(frozen=True)
class Format:
    """A layout.

    Attributes:
        required: Columns that every row must have.
        example: (row, label, id) -> Example.
        optional: Other columns that are read.
        json: Columns whose text is read as JSON where it can be: CSV files hold lists as text, some Parquet files, too.
        tell: Columns that a row must have beside the required ones for `auto` to take this layout.
    """

    required: tuple[str, ...]
    example: Callable[[Row, str, str], Example]
    optional: tuple[str, ...] = ("task", "id")
    json: tuple[str, ...] = ()
    tell: tuple[str, ...] = ()


def choose_format(columns: Collection[str], format: str, where: str) -> str:
    """`format`, or for auto the one that fits the columns.

    Raises: UserError if none fits.
    """
    fitting = (name for name, layout in FORMATS.items() if {*layout.required, *layout.tell} <= set(columns))
    chosen = next(fitting, None) if format == "auto" else format
    if chosen is None:
        allowed = "; ".join(
            f"{name}: {', '.join((*layout.required, *layout.tell))}" for name, layout in FORMATS.items()
        )
        raise UserError(f"{where}: columns {', '.join(columns)} fit no format, allowed: {allowed}.{_hint(columns)}")
    return chosen


_ASKED = ("instruction", "prompt", "question", "query", "problem", "input")
_ANSWERED = ("output", "completion", "response", "reply", "solution", "answer")
"""Names that data sets give to a question and to its answer; of several the first counts."""


def _hint(columns: Collection[str]) -> str:
    """For columns that fit no format: the known column nearest to an unknown one, or the setting that reads those of a
    question and its answer, or the only unknown one as the only column that a format lacks."""
    names = {column.lower(): column for column in columns}
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in next(iter(names))), None)):
        ending = " or the ending .tsv" if mark == "\t" else ""
        return f" The columns seem to be separated by {mark!r}. Fix: a .csv file needs commas{ending}."
    asked, answered = (next((each for each in some if each in names), "") for some in (_ASKED, _ANSWERED))
    if {"chosen", "rejected"} <= names.keys():
        chosen = names["chosen"]
        texts = _renaming(names, asked, "chosen") if asked else f"{{text: {chosen}}}"
        return (
            f" Pairs of preferences are not trained. Fix: to learn the chosen answers, set columns: {texts} in this "
            f"source, or columns: {{messages: {chosen}}} if they are lists of turns."
        )
    is_pair = bool(asked and answered)
    known = [column for layout in FORMATS.values() for column in layout.required]
    strange = [column for column in columns if column not in known and column not in ("task", "id")]
    meant = ["choices"] if is_pair else known
    if hint := next((hint for column in strange if (hint := nearest(column, meant))), ""):
        return hint
    if is_pair:
        return f" Fix: columns: {_renaming(names, asked, answered)} in this source."
    lacking = (set(layout.required) - set(columns) for layout in FORMATS.values() if len(layout.required) > 1)
    wanted = next((column for missing in lacking if len(missing) == 1 for column in missing), None)
    return f" Fix: columns: {{{wanted}: {strange[0]}}} in this source." if wanted and len(strange) == 1 else ""


def _renaming(names: Mapping[str, str], asked: str, answered: str) -> str:
    """The setting `columns` for a question and its answer. `names` are the columns by their names in small letters."""
    if asked == "instruction":
        given = next((each for each in ("input", "context") if each in names), None)
        read = {"instruction": asked, "output": answered} | ({"input": given} if given else {})
    else:
        read = {"prompt": asked, "completion": answered}
    return f"{{{', '.join(f'{name}: {names[own]}' for name, own in read.items() if name != names[own])}}}"


def example_of_format(row: Row, format: str, *, label: str, named: bool, id: str, chat: bool = False) -> Example:
    """One row as an Example.

    Args:
        label: Task name of the example. A row's own task (in commonsense170k, the one found from its wording) comes
            first unless `named`.
        named: The user chose the label.
        chat: Prompt and completion, or instruction and output, become two turns of a chat.
    Raises: RowFault if a column is missing or holds the wrong thing.
    """
    layout = FORMATS[format]
    row = with_lists(row, format)
    absent = [column for column in layout.required if column not in row]
    if absent:
        raise RowFault(
            f"columns {', '.join(row)}; format {format} needs {', '.join(layout.required)}. One file holds one format."
            f"{nearest(absent[0], list(row))}"
        )
    if format == "completion" and str(row.get("label")).lower() == "false":
        raise RowFault(_UNWANTED)
    task = commonsense_task(str(row["instruction"])) if format == "commonsense170k" else optional_text(row, "task")
    label = label if named else task or label
    return _two_turns(row, format, label, id) if chat else layout.example(row, label, id)


def with_lists(row: Row, format: str) -> Row:
    """The row with the lists that its file has as the text of JSON."""
    found = {name: _list_in(row[name]) for name in FORMATS[format].json if isinstance(row.get(name), str)}
    return {**row, **found} if found else row


def _list_in(text: str) -> Any:
    try:
        return parse_row_json(text)
    except RowFault:
        raise
    except ValueError:
        return text


def read_columns(format: str, chat: bool = False) -> tuple[str, ...]:
    """The columns that a format reads, those that it needs first."""
    layout = FORMATS[format]
    return tuple(dict.fromkeys((*layout.required, *layout.optional, *layout.tell, *(CHAT_COLUMNS if chat else ()))))


def unused_columns(row: Row, format: str, chat: bool = False) -> Iterator[str]:
    """What a row has and its format does not read: columns, keys of turns as messages.<key>; no empty values."""
    layout, columns = FORMATS[format], with_lists(row, format)
    chats = {
        column: columns[column]
        for column in _TURN_KEYS
        if column in layout.required and isinstance(columns.get(column), list)
    }
    known = {*layout.required, *layout.optional} - (set() if chats else {"tools"})
    known |= set(CHAT_COLUMNS if chat else ())
    yield from (str(name) or _NO_NAME for name, value in row.items() if name not in known and not is_empty(value))
    for column, turns in chats.items():
        for turn in turns:
            names = (name for name, value in turn.items() if not is_empty(value)) if isinstance(turn, dict) else ()
            yield from (f"{column}.{name}" for name in names if name not in _TURN_KEYS[column])


def looks_meant(column: str) -> bool:
    """Whether a column that is not read may have been meant to be: system_prompt, tools, weight, or nearly a known one.

    `column` is as `unused_columns` names it.
    """
    name = column.rpartition(".")[2].lower()
    known = {each for layout in FORMATS.values() for each in (*layout.required, *layout.optional)}
    known |= {key for keys in _TURN_KEYS.values() for key in keys} | _OFTEN_MEANT
    parts = set(re.split(r"[^a-z]+", name))
    return bool(parts & _OFTEN_MEANT or difflib.get_close_matches(name, known, n=1, cutoff=_NEARLY))


_NO_NAME = "(a column without a name)"
"""Stands for the column of row numbers that pandas writes into CSV files."""

CHAT_COLUMNS = ("system", "tools")
"""Columns that are read, too, if prompt and completion become a chat."""

_OFTEN_MEANT = {"system", "tool", "tools", "weight", "weights"}
_NEARLY = 0.8
"""Similarity of difflib from which on a column counts as a known one in another spelling."""

_TURN_KEYS = {
    "messages": TURN_KEYS,
    "conversations": ("from", "value", *TURN_KEYS),
    "prompt": TURN_KEYS,
    "completion": TURN_KEYS,
}
"""Column that may hold turns -> the keys of a turn that are read."""


def is_empty(value: Any) -> bool:
    """Whether a value is what files write where there is none: null, NaN, an empty text or list."""
    return value is None or (isinstance(value, float) and value != value) or value in ("", [], {})


def _choices(row: Row, label: str, id: str) -> Example:
    """Schema rows; a row that names one of the eight tasks gets that task's prompt."""
    task = optional_text(row, "task") or (label if label in TEMPLATES else "")
    return example_of_row(row, task=task, label=label, id=id)


def _completion(row: Row, label: str, id: str) -> Example:
    """Prompt and completion, joined as they stand: the space between them belongs to the completion (or the prompt).

    Both may be lists of turns instead, which make one chat.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns_of_both(row, label, id)
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            hint = " (turns only if both are lists of turns)" if isinstance(value, list) else ""
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and not is_empty(value)
            fix = _AS_TEXT if is_number else ""
            raise RowFault(f"{name}: must be text{hint}, got {shown(value)}{fix}")
    if not completion.strip():
        raise RowFault(f"completion: must be text that is not empty, got {shown(completion)}")
    return Example(task=label, id=row_id(row, id), prompt=prompt, answer=completion)


_AS_TEXT = (
    '. Fix: write it in quotes, or set template: {prompt: "{{ prompt }}", completion: " {{ completion }}"} in this '
    "source, which makes text of it."
)
_UNWANTED = (
    "label: false marks an unwanted answer in data for KTO, and every answer is learnt. Fix: remove such rows; if "
    'label has another meaning here, set template: {prompt: "{{ prompt }}", completion: "{{ completion }}"} in this '
    "source."
)


def _turns_of_both(row: Row, label: str, id: str) -> Example:
    """The chat of a prompt and a completion that are lists of turns; only the completion is learnt."""
    rest = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    turns = [*row["prompt"], *row["completion"]]
    return _messages({**rest, "messages": turns}, label, id, num_in_prompt=len(row["prompt"]))


def _two_turns(row: Row, format: str, label: str, id: str) -> Example:
    """The chat of a prompt and its completion, or of an instruction with its input and its output."""
    asked, answered = FORMATS[format].required
    for name in (asked, answered):
        if isinstance(row[name], list):
            raise RowFault(f"{name}: is a list of turns, and chat: true makes turns of text. Fix: remove chat.")
    system, given = optional_text(row, "system"), optional_text(row, "input") if format == "alpaca" else ""
    question, answer = text_field(row, asked), text_field(row, answered)
    turns = [("system", system)] if system else []
    turns += [("user", f"{question}\n\n{given}" if given else question), ("assistant", answer)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return _messages({**row, "messages": messages}, label, id)


def _messages(row: Row, label: str, id: str, *, num_in_prompt: int = 0) -> Example:
    """A list of turns, and the tools that the assistant may call; the assistant's turns are what is learnt."""
    messages, tools = parse_messages(row["messages"], num_in_prompt), parse_tools(row.get("tools"))
    return Example(task=label, id=row_id(row, id), prompt="", answer="", messages=messages, tools=tools)


def _sharegpt(row: Row, label: str, id: str) -> Example:
    """A list of {from, value}, and maybe a column `system`; the same chat as `messages`."""
    rest = {name: value for name, value in row.items() if name not in ("conversations", "system")}
    return _messages({**rest, "messages": _sharegpt_turns(row)}, label, id)


def asked_chat(row: Row) -> tuple[Messages, Tools]:
    """The turns and tools of a row of format messages or sharegpt that waits for an answer.

    Raises: RowFault if it is no such row, or its last turn is the assistant's.
    """
    format = "sharegpt" if "conversations" in row and "messages" not in row else "messages"
    row = with_lists(row, format)
    turns = parse_turns(_sharegpt_turns(row) if format == "sharegpt" else row.get("messages"))
    check_no_media(row, (turn.content for turn in turns))
    if turns[-1].role == "assistant":
        raise RowFault("messages: the last turn is the assistant's, so there is nothing to answer")
    return turns, parse_tools(row.get("tools"))


def check_no_media(row: Row, texts: Iterable[str]) -> None:
    """Raise RowFault if a row has images, videos or sounds and its texts say where they are."""
    media = [name for name in _MEDIA if not is_empty(row.get(name))]
    for text in texts if media else ():
        if name := next((name for name in media if f"<{name.removesuffix('s')}>" in text), None):
            raise RowFault(f"{name}: <{name.removesuffix('s')}> in the text stands for it, and only text is supported")


_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns for which <image>, <video> and <audio> stand in texts."""


def _sharegpt_turns(row: Row) -> list[Any]:
    """The turns {role, content} of a row of {from, value}."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise RowFault(f"conversations: must be a list of turns {{from, value}}, got {shown(turns)}")
    system = optional_text(row, "system")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    return messages + [_sharegpt_turn(number, turn) for number, turn in enumerate(turns)]


def _sharegpt_turn(number: int, turn: Any) -> Any:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        if isinstance(turn, dict) and {"role", "content"} <= turn.keys():
            return turn
        raise RowFault(f"conversations[{number}]: must be an object with from and value, got {shown(turn)}")
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        allowed = ", ".join(_SHAREGPT_ROLES)
        hint = nearest(str(speaker), _SHAREGPT_ROLES)
        raise RowFault(f"conversations[{number}].from: must be one of {allowed}, got {shown(speaker)}.{hint}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if speaker == "function_call":  # of LLaMA-Factory: JSON of a call, or of a list of calls
        calls = parsed(turn["value"], f"conversations[{number}].value")
        return {**rest, "role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {**rest, "role": _SHAREGPT_ROLES[speaker], "content": turn["value"]}


def _text(row: Row, label: str, id: str) -> Example:
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


def _alpaca(row: Row, label: str, id: str) -> Example:
    """instruction, output, maybe input, in the Alpaca template as published, without the indentation of its script."""
    instruction, output = text_field(row, "instruction"), text_field(row, "output")
    given = optional_text(row, "input")
    template = _ALPACA_INPUT if given else _ALPACA
    return Example(label, row_id(row, id), template.format(instruction=instruction, input=given), output)


def _commonsense170k(row: Row, label: str, id: str) -> Example:
    """LLM-Adapters (arXiv 2304.01933): Alpaca rows with maybe an answer.

    Where `answer` is one of the names in "Answer format: answer1/answer2/...", the others become the wrong choices.
    """
    found = _alpaca(row, label, id)
    names, answer = _answer_names(text_field(row, "instruction")), optional_text(row, "answer")
    if answer in names and found.answer.count(answer) == 1:
        choices = tuple(found.answer.replace(answer, name) for name in names)
        return replace(found, choices=choices, gold=names.index(answer))
    return found


def _answer_names(instruction: str) -> tuple[str, ...]:
    """The names in the line "Answer format: answer1/answer2/answer3"; empty without such a line."""
    found = re.search(r"Answer format:\s*(\S+)\s*$", instruction)
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
    "choices": Format(
        ("question", "choices", "answer"), _choices, ("task", "id", "context", "passage"), json=("choices", "answer")
    ),
    "messages": Format(("messages",), _messages, ("tools", "task", "id"), json=("messages", "tools")),
    "sharegpt": Format(
        ("conversations",), _sharegpt, ("tools", "task", "id", "system"), json=("conversations", "tools")
    ),
    "completion": Format(("prompt", "completion"), _completion, ("tools", "task", "id")),
    "commonsense170k": Format(("instruction", "output"), _commonsense170k, ("input", "answer", "id"), tell=("answer",)),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "task", "id")),
    "text": Format(("text",), _text),
}
"""Format -> layout; `auto` takes the first whose columns are there."""
