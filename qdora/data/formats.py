"""Row -> Example: renamed columns, a template, or the layout that the columns of the first row show (`FORMATS`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qdora.data.commonsense import commonsense_task, example_of_row, instruction_row, with_named_choices
from qdora.data.example import Example, Messages, Row, RowFault, Tools, Turn, optional_text, text_field
from qdora.data.files import parse_json
from qdora.errors import UserError, first_line
from qdora.recipe.data_settings import CHAT_FORMATS, SourceConfig
from qdora.recipe.section import shown

FIRST_ROWS = 64  # in which each column that `columns` names must be found once
_CHAT_COLUMNS = ("system", "tools")  # read, too, if prompt and completion become a chat


class RowExamples:
    """Rows of a source -> Examples, in the layout of the `first` rows.

    If `named`, the task of examples is the label of the source, whatever a row says. `unused` are columns of the first
    rows that a format does not read.
    """

    def __init__(self, source: SourceConfig, first: Sequence[Row], where: str, *, named: bool) -> None:
        self.source, self.named = source, named
        self.format = "choices" if source.task else "completion" if source.template else "text"
        self.templates: dict[str, Any] = {}
        self.unused: set[str] = set()
        renamed, columns = source.columns or {}, dict.fromkeys(name for row in first for name in row)
        if missing := [own for own in renamed.values() if own not in columns and first]:
            raise UserError(
                f"{where}: columns: no column {', '.join(missing)}, there are {', '.join(columns)}."
            )
        if source.template is not None:  # it reaches nothing but the row; null gives no text
            environment = ImmutableSandboxedEnvironment(
                undefined=StrictUndefined,
                keep_trailing_newline=True,
                finalize=lambda it: "" if it is None else it,
            )
            texts = source.template.model_dump()
            self.templates = {name: environment.from_string(text) for name, text in texts.items()}
            return
        if first and not source.task:
            names = self._renamed(first[0]).keys()
            self.format = source.format if source.format != "auto" else format_of(names)
            if not self.format:
                fix = "Fix: columns: {prompt: question, completion: answer}."
                raise UserError(f"{where}: columns {', '.join(names)} fit no format. {fix}")
            if source.chat and self.format not in CHAT_FORMATS:
                raise UserError(f"{where}: chat: no chats are made of format {self.format}.")
        required, optional = FORMATS[self.format].required, FORMATS[self.format].optional
        reads = {*required, *optional, *(_CHAT_COLUMNS if source.chat else ())}
        if first and (ignored := renamed.keys() - reads):
            raise UserError(f"{where}: columns: format {self.format} reads no {', '.join(sorted(ignored))}.")
        self.unused = columns.keys() - {renamed.get(name, name) for name in reads}

    def __call__(self, row: Row, id: str) -> Example:
        """The example of a row; `id` names it where the row does not."""
        source, label, layout = self.source, self.source.label, FORMATS[self.format]
        row = self._renamed(row)
        row = _with_lists(self._rendered(row) if self.templates else row, self.format)
        if not {*layout.required} <= row.keys():
            raise RowFault(
                f"columns {', '.join(row)}; format {self.format} needs {', '.join(layout.required)}."
            )
        if self.format == "completion" and not self.templates and str(row.get("label")).lower() == "false":
            raise RowFault(
                "label: false marks an unwanted answer (KTO). Fix: remove such rows, or set template."
            )
        if not (self.named or source.task):  # a row's own task comes first
            own = self.format == "commonsense170k"
            label = (commonsense_task(str(row["instruction"])) if own else optional_text(row, "task")) or label
        if source.chat:
            made = _two_turns(row, layout.required)
        elif source.task and source.format == "commonsense170k":
            made = _commonsense170k(instruction_row(row, source.task))
        elif self.format == "choices":  # a row that names one of the eight tasks gets that task's prompt
            made = example_of_row(row, source.task or optional_text(row, "task") or label)
        else:
            made = layout.example(row)
        own_id = row.get("id")
        return replace(made, task=label, id=id if own_id in (None, "") else str(own_id))

    def _renamed(self, row: Row) -> Row:
        columns = self.source.columns
        if not columns:
            return row
        rest = {
            name: value for name, value in row.items() if name not in columns and name not in columns.values()
        }
        return rest | {name: row[own] for name, own in columns.items() if own in row}

    def _rendered(self, row: Row) -> Row:
        made = {name: row[name] for name in _CHAT_COLUMNS if name in row and self.source.chat}
        made |= {name: row[name] for name in ("id", "task") if isinstance(row.get(name), str)}
        for name, template in self.templates.items():
            try:
                made[name] = template.render(row)
            except Exception as error:  # whatever an expression in it raises
                raise RowFault(f"template.{name}: {first_line(error)}") from error
        return made


def _with_lists(row: Row, format: str) -> Row:
    for name in FORMATS[format].json:
        if isinstance(row.get(name), str):
            with suppress(ValueError):
                row = {**row, name: parse_json(row[name])}
    return row


# Turns of chats

_ROLES = {
    "developer": "system",
    "function": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
_ROLES |= {"function_call": "assistant", "observation": "tool"}  # of OpenAI, ShareGPT and LLaMA-Factory
_REASONING = ("reasoning_content", "reasoning", "thinking")


def asked_chat(row: Row) -> tuple[Messages, Tools]:
    """The turns and tools of a row of format messages or sharegpt that waits for an answer."""
    row = _with_lists(_with_lists(row, "messages"), "sharegpt")
    turns = parse_turns(row["messages"] if "messages" in row else _sharegpt_turns(row))
    if turns[-1].role == "assistant":
        raise RowFault("messages: the last turn is the assistant's")
    return turns, parse_tools(row.get("tools"))


def parse_messages(messages: Any, num_in_prompt: int = 0) -> Messages:
    """The turns of a row that teaches something; the first `num_in_prompt` are the prompt."""
    turns = tuple(
        replace(turn, in_prompt=number < num_in_prompt) for number, turn in enumerate(parse_turns(messages))
    )
    answers = [turn for turn in turns if turn.role == "assistant" and (turn.content.strip() or turn.tool_calls)]
    if not any(turn.learnt and not turn.in_prompt for turn in answers):
        raise RowFault("messages: no turn of role assistant has content and a weight")
    return turns


def parse_turns(messages: Any) -> Messages:
    return tuple(_turn(f"messages[{number}]", _without_nulls(turn)) for number, turn in enumerate(messages))


def _turn(where: str, turn: Any) -> Turn:
    # OpenAI's older field
    calls = turn.get("tool_calls") or [call for call in [turn.get("function_call")] if call]
    content: Any = turn.get("content", "" if calls else None)
    if isinstance(content, list):  # parts, joined as they stand
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    role, weight, train = (
        _ROLES.get(str(turn.get("role")), turn.get("role")),
        turn.get("weight"),
        turn.get("train"),
    )
    reasoning = next((turn[name] for name in _REASONING if turn.get(name)), "")
    is_right = {
        "role": role in ("system", "user", "assistant", "tool"),
        "content": isinstance(content, str),
        "reasoning": isinstance(reasoning, str),
        "weight": weight in (None, 0, 1),
        "train": train in (None, True, False),
    }
    if wrong := [name for name in is_right if not is_right[name]]:
        raise RowFault(f"{where}.{wrong[0]}: got {shown(turn.get(wrong[0]))}")
    return Turn(
        role=role,
        content=content,
        tool_calls=tuple(map(_tool_call, calls)),
        reasoning=reasoning,
        labels={key: str(turn[key]) for key in ("name", "tool_call_id") if turn.get(key)},
        learnt=weight in (None, 1) and train in (None, True),
    )


def _tool_call(call: Any) -> Mapping[str, Any]:
    """{type, id, function: {name, arguments}}."""
    function, id = call.get("function", call), {"id": call["id"]} if call.get("id") else {}
    arguments = dict(_parsed(function.get("arguments")) or {})
    return {"type": "function", **id, "function": {"name": function["name"], "arguments": arguments}}


def parse_tools(tools: Any) -> Tools:
    """The column `tools` of a row: functions, or their JSON."""
    found = [_without_nulls(_parsed(tool)) for tool in _parsed(tools) or []]
    made = tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in found)
    if not all("name" in tool["function"] for tool in made):
        raise RowFault(f"tools: must be a list of functions with a name, got {shown(tools)}")
    return made


def _parsed(value: Any) -> Any:
    return parse_json(value) if isinstance(value, str) and value.strip() else value


def _without_nulls(value: Any) -> Any:
    """Without keys that are null: Parquet gives each call of a column the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


# The layouts


def _chat(row: Row, turns: Any, num_in_prompt: int = 0) -> Example:
    messages, tools = parse_messages(turns, num_in_prompt), parse_tools(row.get("tools"))
    return Example("", "", "", "", messages=messages, tools=tools)


def _sharegpt_turns(row: Row) -> list[Any]:
    system = optional_text(row, "system")
    turns: list[Any] = [{"role": "system", "content": system}] if system else []
    for turn in row["conversations"]:
        if "from" in turn:
            turn = turn | {"role": turn["from"], "content": turn["value"]}
            if turn["from"] == "function_call":  # of LLaMA-Factory: JSON of a call, or of a list of calls
                calls = _parsed(turn["value"])
                turn |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        turns.append(turn)
    return turns


def _completion(row: Row) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(row, [*prompt, *completion], len(prompt))
    if not isinstance(prompt, str):
        raise RowFault(f"prompt: must be text, got {shown(prompt)}")
    text_field(row, "completion")
    return Example("", "", prompt, completion)


def _two_turns(row: Row, columns: Sequence[str]) -> Example:
    question, answer = (text_field(row, name) for name in columns)
    system, given = optional_text(row, "system"), optional_text(row, "input") if "output" in columns else ""
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": f"{question}\n\n{given}" if given else question})
    return _chat(row, [*turns, {"role": "assistant", "content": answer}])


_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""As published, without the indentation of its script."""


def _alpaca(row: Row) -> Example:
    instruction, output, given = (
        text_field(row, "instruction"),
        text_field(row, "output"),
        optional_text(row, "input"),
    )
    paired = ", paired with an input that provides further context" if given else ""
    section = f"### Input:\n{given}\n\n" if given else ""
    prompt = _ALPACA.format(paired=paired, instruction=instruction, input=section)
    return Example("", "", prompt, output)


def _commonsense170k(row: Row) -> Example:
    """LLM-Adapters (arXiv 2304.01933)."""
    return with_named_choices(_alpaca(row), row["instruction"].strip(), optional_text(row, "answer"))


def _text(row: Row) -> Example:
    text_field(row, "text")
    return Example("", "", "", row["text"])


@dataclass(frozen=True)
class Format:
    required: tuple[str, ...]  # columns that every row must have
    example: Callable[[Row], Example]  # without task and id
    optional: tuple[str, ...] = ("task", "id")  # other columns that are read
    json: tuple[str, ...] = ()  # lists, in CSV files their JSON


_TOOLS, _CHOICES = ("tools", "task", "id"), ("question", "choices", "answer")
# `auto` takes the first whose columns are there
FORMATS: dict[str, Format] = {
    "choices": Format(
        _CHOICES, example_of_row, ("task", "id", "context", "passage"), json=("choices", "answer")
    ),
    "messages": Format(("messages",), lambda row: _chat(row, row["messages"]), _TOOLS, json=("messages",)),
    "sharegpt": Format(
        ("conversations",),
        lambda row: _chat(row, _sharegpt_turns(row)),
        (*_TOOLS, "system"),
        json=("conversations",),
    ),
    "completion": Format(("prompt", "completion"), _completion, _TOOLS),
    "commonsense170k": Format(("instruction", "output", "answer"), _commonsense170k, ("input", "id")),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "task", "id")),
    "text": Format(("text",), _text),
}


def format_of(columns: Collection[str]) -> str:
    """The first format all of whose required columns are there; "" if there is none."""
    return next((name for name, layout in FORMATS.items() if {*layout.required} <= {*columns}), "")
