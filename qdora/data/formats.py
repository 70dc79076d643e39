"""What makes an Example of each row: renamed columns, a template, or the layout of the first row.

The layouts (`FORMATS`): choices, chat, ShareGPT, prompt and completion, LLM-Adapters, Alpaca, text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qdora.data.chat_template import RENDER_ERRORS
from qdora.data.commonsense import commonsense_task, example_of_row, instruction_row, with_named_choices
from qdora.data.example import (
    ROLES,
    TURN_KEYS,
    Example,
    Messages,
    Tools,
    parse_messages,
    parse_tools,
    parse_turns,
    parsed,
)
from qdora.data.rows import (
    Row,
    RowFault,
    check_encodable,
    is_empty,
    optional_text,
    parse_row_json,
    row_id,
    text_field,
)
from qdora.errors import UserError, first_line, nearest
from qdora.recipe.data_settings import CHAT_FORMATS, COMMONSENSE_TASKS, SourceConfig, no_chat
from qdora.recipe.section import shown

FIRST_ROWS = 64
"""Rows in which each column that `columns` names must be found once."""
_CHAT_COLUMNS = ("system", "tools")
"""Columns that are read, too, if prompt and completion become a chat."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns for which <image>, <video> and <audio> stand in texts."""
_NO_NAME = "(a column without a name)"
"""Stands for the column of row numbers that pandas writes into CSV files."""


class RowExamples:
    """Rows of a source -> Examples.

    Args:
        first: The first rows that can be read; with none, any layout will do.
        where: File, folder or Hub address, for error lines.
        named: Examples get the label of the source as their task, whatever a row says.

    Attributes:
        unused: Columns that rows had so far and that are not read.
    """

    def __init__(self, source: SourceConfig, first: Sequence[Row], where: str, *, named: bool) -> None:
        self.source, self.named = source, named
        self.unused: set[str] = set()
        self.format = "choices" if source.task else "completion" if source.template else "text"
        self.templates: dict[str, Any] = {}
        self.columns: set[str] = set()  # that the templates read
        if source.template is not None:  # it can reach nothing but the row; null is written as nothing, not as None
            environment = ImmutableSandboxedEnvironment(
                undefined=StrictUndefined, keep_trailing_newline=True, finalize=lambda it: "" if it is None else it
            )
            for name, text in (("prompt", source.template.prompt), ("completion", source.template.completion)):
                self.templates[name] = environment.from_string(text)
                self.columns |= meta.find_undeclared_variables(environment.parse(text))
        if first and source.task is None:
            self._check_columns(first, where)

    def _check_columns(self, first: Sequence[Row], where: str) -> None:
        source, renamed = self.source, self.source.columns or {}
        there = list(dict.fromkeys(str(name) for row in first for name in row))
        faults = [
            f"{where}: columns: no column {own!r}, there are {', '.join(there)}.{nearest(own, there)}"
            for own in renamed.values()
            if own not in there
        ]
        if not faults and not self.templates:
            self.format = choose_format(list(self._renamed(first[0])), source.format, where)
            layout = FORMATS[self.format]
            reads = (*layout.required, *layout.optional, *(_CHAT_COLUMNS if source.chat else ()))
            for name in renamed:
                if name not in reads:
                    hint = nearest(name, reads)
                    if (self.format, name) == ("messages", "system"):
                        hint = " Fix: set format: sharegpt, and conversations in place of messages in columns."
                    what = f"format {self.format} reads no {name!r}, it reads {', '.join(dict.fromkeys(reads))}."
                    faults.append(f"{where}: columns: {what}{hint}")
            if not faults and source.chat and self.format not in CHAT_FORMATS:
                why = no_chat(self.format)
                faults = [f"{where}: chat: {why}. Fix: remove chat, or set columns or format."]
        if faults:
            raise UserError(*faults)

    def __call__(self, row: Row, id: str) -> Example:
        """The example of a row; `id` names it where the row does not. Raises RowFault."""
        source, label = self.source, self.source.label
        if source.task is not None:
            row = _with_lists(row, "choices")
            self.unused.update(_unused_columns(row, "choices", False))
            if source.format == "commonsense170k":
                return _commonsense170k(instruction_row(row, source.task), label, id)
            return example_of_row(row, task=source.task, label=label, id=id)
        named = self._renamed(row)
        made = _with_lists(self._rendered(named) if self.templates else named, self.format)
        example = self._of_format(made, id)
        check_no_media(row, (example.prompt, example.answer, *(turn.content for turn in example.messages)))
        columns = source.columns or {}
        self.unused.update(name for name in columns if name in row and name not in columns.values())
        if self.templates:
            read = {*self.columns, *(_CHAT_COLUMNS if source.chat else ()), "id", "task"}
            self.unused.update(name for name, value in named.items() if name not in read and not is_empty(value))
        else:
            self.unused.update(_unused_columns(named, self.format, source.chat))
        return example

    def _renamed(self, row: Row) -> Row:
        columns = self.source.columns
        if not columns:
            return row
        gone = {*columns, *columns.values()}
        kept = {name: value for name, value in row.items() if name not in gone}
        return kept | {name: row[own] for name, own in columns.items() if own in row}

    def _rendered(self, row: Row) -> dict[str, Any]:
        """Prompt and completion by the templates, and id, task and the columns of a chat where the row has them."""
        made = {name: row[name] for name in _CHAT_COLUMNS if name in row and self.source.chat}
        made |= {name: row[name] for name in ("id", "task") if isinstance(row.get(name), str)}
        for name, template in self.templates.items():
            try:
                made[name] = template.render(row)
                check_encodable(made[name])
            except RENDER_ERRORS as error:
                raise RowFault(f"template.{name}: {first_line(error)}; the columns are {', '.join(row)}") from error
        return made

    def _of_format(self, row: Row, id: str) -> Example:
        layout, label = FORMATS[self.format], self.source.label
        absent = [column for column in layout.required if column not in row]
        if absent:
            needs = f"format {self.format} needs {', '.join(layout.required)}. One file holds one format."
            raise RowFault(f"columns {', '.join(row)}; {needs}{nearest(absent[0], list(row))}")
        if self.format == "completion" and str(row.get("label")).lower() == "false":
            raise RowFault(
                "label: false marks an unwanted answer in data for KTO, and every answer is learnt. Fix: remove such "
                'rows; if label has another meaning here, set template: {prompt: "{{ prompt }}", '
                'completion: "{{ completion }}"} in this source.'
            )
        if not self.named:  # a row's own task comes first
            own = self.format == "commonsense170k"
            label = (commonsense_task(str(row["instruction"])) if own else optional_text(row, "task")) or label
        return _two_turns(row, self.format, label, id) if self.source.chat else layout.example(row, label, id)


def choose_format(columns: Collection[str], format: str, where: str) -> str:
    """`format`, or for auto the one that fits the columns."""
    if format != "auto":
        return format
    needs = {name: (*layout.required, *layout.tell) for name, layout in FORMATS.items()}
    fitting = next((name for name, each in needs.items() if {*each} <= {*columns}), None)
    if fitting is None:
        allowed = "; ".join(f"{name}: {', '.join(each)}" for name, each in needs.items())
        known = [column for layout in FORMATS.values() for column in layout.required]
        fix = next((near for name in columns if name.lower() not in known and (near := nearest(name, known))), "")
        if "rejected" in columns:
            fix = " Pairs of preferences are not trained. Fix: to learn the chosen answers, set columns: {completion: "
            fix += "chosen} in this source, or columns: {messages: chosen} if they are lists of turns."
        fix = fix or " Fix: name those to read in this source, such as columns: {prompt: question, completion: answer}."
        raise UserError(f"{where}: columns {', '.join(columns)} fit no format, allowed: {allowed}.{fix}")
    return fitting


def _with_lists(row: Row, format: str) -> Row:
    """The row with the lists that its file has as the text of JSON."""
    lists = {}
    for name in FORMATS[format].json:
        if isinstance(row.get(name), str):
            try:
                lists[name] = parse_row_json(row[name])
            except RowFault:
                raise
            except ValueError:
                pass
    return {**row, **lists} if lists else row


def _unused_columns(row: Row, format: str, chat: bool) -> Iterator[str]:
    """What a row has and its format does not read: columns, keys of turns as messages.<key>; no empty values."""
    layout, columns = FORMATS[format], _with_lists(row, format)
    chats = [name for name in _TURN_KEYS if name in layout.required and isinstance(columns.get(name), list)]
    known = {*layout.required, *layout.optional} - (set() if chats else {"tools"})
    known |= set(_CHAT_COLUMNS if chat else ())
    yield from (str(name) or _NO_NAME for name, value in row.items() if name not in known and not is_empty(value))
    for column in chats:
        for turn in columns[column]:
            names = (name for name, value in turn.items() if not is_empty(value)) if isinstance(turn, dict) else ()
            yield from (f"{column}.{name}" for name in names if name not in _TURN_KEYS[column])


def looks_meant(column: str) -> bool:
    """Whether an unused column may have been meant to be read: system_prompt, tools, weight, or nearly a known one.

    `column` is as `RowExamples.unused` names it.
    """
    name = column.rpartition(".")[2].lower()
    known = {each for layout in FORMATS.values() for each in (*layout.required, *layout.optional)}
    known |= {key for keys in _TURN_KEYS.values() for key in keys} | _OFTEN_MEANT
    parts = set(re.split(r"[^a-z]+", name))
    return bool(parts & _OFTEN_MEANT or difflib.get_close_matches(name, known, n=1, cutoff=0.8))


_OFTEN_MEANT = {"system", "tool", "tools", "weight", "weights"}
_TURN_KEYS = {
    "messages": TURN_KEYS,
    "conversations": ("from", "value", *TURN_KEYS),
    "prompt": TURN_KEYS,
    "completion": TURN_KEYS,
}
"""Column that may hold turns -> the keys of a turn that are read."""


def check_no_media(row: Row, texts: Iterable[str]) -> None:
    """Raise RowFault if a row has images, videos or sounds and its texts say where they are."""
    media = [name for name in _MEDIA if not is_empty(row.get(name))]
    for text in texts if media else ():
        if name := next((name for name in media if f"<{name.removesuffix('s')}>" in text), None):
            raise RowFault(f"{name}: <{name.removesuffix('s')}> in the text stands for it, and only text is supported")


def asked_chat(row: Row) -> tuple[Messages, Tools]:
    """The turns and tools of a row of format messages or sharegpt that waits for an answer. Raises RowFault."""
    format = "sharegpt" if "conversations" in row and "messages" not in row else "messages"
    row = _with_lists(row, format)
    turns = parse_turns(_sharegpt_turns(row) if format == "sharegpt" else row.get("messages"))
    check_no_media(row, (turn.content for turn in turns))
    if turns[-1].role == "assistant":
        raise RowFault("messages: the last turn is the assistant's, so there is nothing to answer")
    return turns, parse_tools(row.get("tools"))


# The layouts


def _choices(row: Row, label: str, id: str) -> Example:
    """Schema rows; a row that names one of the eight tasks gets that task's prompt."""
    task = optional_text(row, "task") or (label if label in COMMONSENSE_TASKS else "")
    return example_of_row(row, task=task, label=label, id=id)


def _chat(row: Row, label: str, id: str, turns: Any, num_in_prompt: int = 0) -> Example:
    """Turns, and the tools that the assistant may call; the assistant's turns are what is learnt."""
    messages, tools = parse_messages(turns, num_in_prompt), parse_tools(row.get("tools"))
    return Example(label, row_id(row, id), "", "", messages=messages, tools=tools)


def _messages(row: Row, label: str, id: str) -> Example:
    return _chat(row, label, id, row["messages"])


def _sharegpt(row: Row, label: str, id: str) -> Example:
    """A list of {from, value}, and maybe a column `system`; the same chat as `messages`."""
    return _chat(row, label, id, _sharegpt_turns(row))


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant"}
_SHAREGPT_ROLES |= {role: role for role in ROLES} | {"developer": "system", "observation": "tool"}
"""Who speaks in a ShareGPT turn -> role."""


def _sharegpt_turns(row: Row) -> list[Any]:
    """The turns {role, content} of a row of {from, value}."""
    if not isinstance(row["conversations"], list):
        given = shown(row["conversations"])
        raise RowFault(f"conversations: must be a list of turns {{from, value}}, got {given}")
    system = optional_text(row, "system")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(row["conversations"]):
        where = f"conversations[{number}]"
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
                raise RowFault(f"{where}: must be an object with from and value, got {shown(turn)}")
            messages.append(turn)
            continue
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            near = nearest(str(speaker), _SHAREGPT_ROLES)
            raise RowFault(f"{where}.from: must be one of {', '.join(_SHAREGPT_ROLES)}, got {shown(speaker)}.{near}")
        made = {name: value for name, value in turn.items() if name not in ("from", "value")}
        made |= {"role": _SHAREGPT_ROLES[speaker], "content": turn["value"]}
        if speaker == "function_call":  # of LLaMA-Factory: JSON of a call, or of a list of calls
            calls = parsed(turn["value"], f"{where}.value")
            made |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        messages.append(made)
    return messages


def _completion(row: Row, label: str, id: str) -> Example:
    """Prompt and completion, joined as they stand: the space between them belongs to the completion (or the prompt).

    Both may be lists of turns instead, which make one chat, of which only the completion is learnt.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(row, label, id, [*prompt, *completion], len(prompt))
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            hint = " (turns only if both are lists of turns)" if isinstance(value, list) else ""
            raise RowFault(f"{name}: must be text{hint}, got {shown(value)}")
    if not completion.strip():
        raise RowFault(f"completion: must be text that is not empty, got {shown(completion)}")
    return Example(label, row_id(row, id), prompt, completion)


def _two_turns(row: Row, format: str, label: str, id: str) -> Example:
    """The chat of a prompt and its completion, or of an instruction with its input and its output."""
    asked, answered = FORMATS[format].required
    for name in (asked, answered):
        if isinstance(row[name], list):
            raise RowFault(f"{name}: is a list of turns, and chat: true makes turns of text. Fix: remove chat.")
    system, given = optional_text(row, "system"), optional_text(row, "input") if format == "alpaca" else ""
    question, answer = text_field(row, asked), text_field(row, answered)
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": f"{question}\n\n{given}" if given else question})
    return _chat(row, label, id, [*turns, {"role": "assistant", "content": answer}])


_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The Alpaca template as published, without the indentation of its script."""


def _alpaca(row: Row, label: str, id: str) -> Example:
    """instruction, output, maybe input."""
    instruction, output, given = text_field(row, "instruction"), text_field(row, "output"), optional_text(row, "input")
    paired = ", paired with an input that provides further context" if given else ""
    section = f"### Input:\n{given}\n\n" if given else ""
    prompt = _ALPACA.format(paired=paired, instruction=instruction, input=section)
    return Example(label, row_id(row, id), prompt, output)


def _commonsense170k(row: Row, label: str, id: str) -> Example:
    """LLM-Adapters (arXiv 2304.01933): Alpaca rows with maybe an answer."""
    answer = optional_text(row, "answer")
    return with_named_choices(_alpaca(row, label, id), text_field(row, "instruction"), answer)


def _text(row: Row, label: str, id: str) -> Example:
    """Plain text; all of it is learnt."""
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise RowFault(f"text: must be text that is not empty, got {shown(row['text'])}")
    return Example(label, row_id(row, id), "", row["text"])


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


_TOOLS = ("tools", "task", "id")
FORMATS: dict[str, Format] = {
    "choices": Format(
        ("question", "choices", "answer"), _choices, ("task", "id", "context", "passage"), json=("choices", "answer")
    ),
    "messages": Format(("messages",), _messages, _TOOLS, json=("messages", "tools")),
    "sharegpt": Format(("conversations",), _sharegpt, (*_TOOLS, "system"), json=("conversations", "tools")),
    "completion": Format(("prompt", "completion"), _completion, _TOOLS),
    "commonsense170k": Format(("instruction", "output"), _commonsense170k, ("input", "answer", "id"), tell=("answer",)),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "task", "id")),
    "text": Format(("text",), _text),
}
"""Format -> layout; `auto` takes the first whose columns are there."""
