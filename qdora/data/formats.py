"""Row -> Example: renamed columns, a template, or the layout that the columns of the first row show (`FORMATS`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import StrictUndefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qdora.data.commonsense import commonsense_task, example_of_row, instruction_row, with_named_choices
from qdora.data.example import Example, Messages, Row, RowFault, Tools, Turn, optional_text, row_id, text_field
from qdora.data.files import parse_json
from qdora.errors import UserError, first_line
from qdora.recipe.data_settings import CHAT_FORMATS, COMMONSENSE_TASKS, SourceConfig, no_chat
from qdora.recipe.faults import shown

FIRST_ROWS = 64
"""Rows in which each column that `columns` names must be found once."""
_CHAT_COLUMNS = ("system", "tools")
"""Columns that are read, too, if prompt and completion become a chat."""


class RowExamples:
    """Rows of a source -> Examples, in the layout of the `first` rows that can be read.

    `where` is the file, folder or Hub address, for error lines. If `named`, examples get the label of the source as
    their task, whatever a row says. `unused` are the columns that rows had so far and that are not read.
    """

    def __init__(self, source: SourceConfig, first: Sequence[Row], where: str, *, named: bool) -> None:
        self.source, self.named = source, named
        self.unused: set[str] = set()
        self.format = "choices" if source.task else "completion" if source.template else "text"
        self.templates: dict[str, Any] = {}
        renamed, columns = source.columns or {}, dict.fromkeys(name for row in first for name in row)
        if missing := [own for own in renamed.values() if own not in columns and first]:
            raise UserError(f"{where}: columns: no column {', '.join(missing)}, there are {', '.join(columns)}.")
        reads = {"id", "task"}
        if source.template is not None:  # it can reach nothing but the row; null is written as nothing, not as None
            environment = ImmutableSandboxedEnvironment(
                undefined=StrictUndefined, keep_trailing_newline=True, finalize=lambda it: "" if it is None else it
            )
            for name, text in (("prompt", source.template.prompt), ("completion", source.template.completion)):
                self.templates[name] = environment.from_string(text)
                reads |= meta.find_undeclared_variables(environment.parse(text))
        else:
            if first and not source.task:
                self.format = _format_of([*self._renamed(first[0])], source, where)
            reads = {*FORMATS[self.format].required, *FORMATS[self.format].optional}
        reads |= {*_CHAT_COLUMNS} if source.chat else set()
        if not self.templates and first and (ignored := renamed.keys() - reads):
            raise UserError(f"{where}: columns: format {self.format} reads no {', '.join(sorted(ignored))}.")
        self.reads = {renamed.get(name, name) for name in reads}

    def __call__(self, row: Row, id: str) -> Example:
        """The example of a row; `id` names it where the row does not. Raises RowFault."""
        source, label = self.source, self.source.label
        self.unused |= row.keys() - self.reads
        if source.task is not None:
            row = _with_lists(row, "choices")
            if source.format == "commonsense170k":
                return _commonsense170k(instruction_row(row, source.task), label, id)
            return example_of_row(row, task=source.task, label=label, id=id)
        row = self._renamed(row)
        row, layout = _with_lists(self._rendered(row) if self.templates else row, self.format), FORMATS[self.format]
        if not {*layout.required} <= row.keys():
            raise RowFault(f"columns {', '.join(row)}; format {self.format} needs {', '.join(layout.required)}.")
        if not self.named:  # a row's own task comes first
            own = self.format == "commonsense170k"
            label = (commonsense_task(str(row["instruction"])) if own else optional_text(row, "task")) or label
        return _two_turns(row, layout.required, label, id) if source.chat else layout.example(row, label, id)

    def _renamed(self, row: Row) -> Row:
        columns = self.source.columns
        if not columns:
            return row
        rest = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
        return rest | {name: row[own] for name, own in columns.items() if own in row}

    def _rendered(self, row: Row) -> Row:
        """Prompt and completion by the templates, and id, task and the columns of a chat where the row has them."""
        made = {name: row[name] for name in _CHAT_COLUMNS if name in row and self.source.chat}
        made |= {name: row[name] for name in ("id", "task") if isinstance(row.get(name), str)}
        for name, template in self.templates.items():
            try:
                made[name] = template.render(row)
            except Exception as error:  # whatever an expression in it raises
                raise RowFault(f"template.{name}: {first_line(error)}; the columns are {', '.join(row)}") from error
        return made


def _format_of(columns: Sequence[str], source: SourceConfig, where: str) -> str:
    """The format of a source, for auto the first one whose columns are there."""
    fitting = (name for name, layout in FORMATS.items() if {*layout.required} <= {*columns})
    format = source.format if source.format != "auto" else next(fitting, None)
    if format is None:
        fix = "Fix: name those to read in this source, such as columns: {prompt: question, completion: answer}."
        raise UserError(f"{where}: columns {', '.join(columns)} fit no format. {fix}")
    if source.chat and format not in CHAT_FORMATS:
        raise UserError(f"{where}: chat: {no_chat(format)}.")
    return format


def _with_lists(row: Row, format: str) -> Row:
    """The row with the lists that its file has as the text of JSON."""
    for name in FORMATS[format].json:
        if isinstance(row.get(name), str):
            with suppress(ValueError):
                row = {**row, name: parse_json(row[name])}
    return row


# Turns of chats

_ROLES = {"developer": "system", "function": "tool", "human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_ROLES |= {"function_call": "assistant", "observation": "tool"}
"""What OpenAI, ShareGPT and LLaMA-Factory call a role -> role."""
_REASONING = ("reasoning_content", "reasoning", "thinking")


def asked_chat(row: Row) -> tuple[Messages, Tools]:
    """The turns and tools of a row of format messages or sharegpt that waits for an answer. Raises RowFault."""
    is_sharegpt = "conversations" in row and "messages" not in row
    row = _with_lists(row, "sharegpt" if is_sharegpt else "messages")
    turns = parse_turns(_sharegpt_turns(row) if is_sharegpt else row.get("messages"))
    if turns[-1].role == "assistant":
        raise RowFault("messages: the last turn is the assistant's, so there is nothing to answer")
    return turns, parse_tools(row.get("tools"))


def parse_messages(messages: Any, num_in_prompt: int = 0) -> Messages:
    """The turns in the column `messages` of a row; the first `num_in_prompt` of them are the prompt.

    Raises RowFault if one is malformed, or none is the assistant's with something to learn.
    """
    turns = tuple(replace(turn, in_prompt=number < num_in_prompt) for number, turn in enumerate(parse_turns(messages)))
    answers = [turn for turn in turns if turn.role == "assistant" and (turn.content.strip() or turn.tool_calls)]
    if not any(turn.learnt and not turn.in_prompt for turn in answers):
        raise RowFault("messages: no turn of role assistant has content and a weight, so there is nothing to learn")
    return turns


def parse_turns(messages: Any) -> Messages:
    """The turns of a conversation, whether or not there is something to learn. Raises RowFault if one is malformed."""
    if not isinstance(messages, list) or not messages:
        raise RowFault(f"messages: must be a list of turns {{role, content}}, got {shown(messages)}")
    return tuple(_turn(f"messages[{number}]", turn) for number, turn in enumerate(messages))


def _turn(where: str, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise RowFault(f"{where}: must be an object with role and content, got {shown(turn)}")
    turn = _without_nulls(turn)
    calls = turn.get("tool_calls") or [call for call in [turn.get("function_call")] if call]  # OpenAI's older field
    content: Any = turn.get("content", "" if calls else None)
    if isinstance(content, list):  # parts, joined as they stand
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    role, weight, train = _ROLES.get(str(turn.get("role")), turn.get("role")), turn.get("weight"), turn.get("train")
    reasoning = next((turn[name] for name in _REASONING if turn.get(name)), "")
    for name, is_right, must in (
        ("role", role in ("system", "user", "assistant", "tool"), "be system, user, assistant or tool"),
        ("content", isinstance(content, str), "be text, or a list of parts of text"),
        ("tool_calls", isinstance(calls, list), "be a list of calls"),
        ("reasoning", isinstance(reasoning, str), "be text"),
        ("weight", weight in (None, 0, 1), "be 0 or 1"),
        ("train", train in (None, True, False), "be true or false"),
    ):
        if not is_right:
            raise RowFault(f"{where}.{name}: must {must}, got {shown(turn.get(name))}")
    return Turn(
        role=role,
        content=content,
        tool_calls=tuple(_tool_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)),
        reasoning=reasoning,
        labels={key: str(turn[key]) for key in ("name", "tool_call_id") if turn.get(key)},
        learnt=weight in (None, 1) and train in (None, True),
    )


def _tool_call(call: Any, where: str) -> Mapping[str, Any]:
    """{type, id, function: {name, arguments}}; a call may be given without the outer object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFault(f"{where}: must be {{type: function, function: {{name, arguments}}}}, got {shown(call)}")
    arguments = _parsed(function.get("arguments") or {}, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RowFault(f"{where}.arguments: must be an object or JSON of one, got {shown(arguments)}")
    id = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", **id, "function": {"name": function["name"], "arguments": arguments}}


def parse_tools(tools: Any) -> Tools:
    """The column `tools` of a row: a list of functions, or JSON of one; null is none."""
    functions = _parsed(tools, "tools") or []
    if not isinstance(functions, list):
        raise RowFault(f"tools: must be a list of functions, got {shown(tools)}")
    found = []
    for number, entry in enumerate(functions):
        tool = _without_nulls(_parsed(entry, f"tools[{number}]"))
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise RowFault(f"tools[{number}]: must be {{type: function, function: {{name, ...}}}}, got {shown(entry)}")
        found.append(tool)
    return tuple(found)


def _parsed(value: Any, where: str) -> Any:
    """A value, or what its JSON text stands for."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise RowFault(f"{where}: is not JSON ({error}), got {shown(value)}") from None


def _without_nulls(value: Any) -> Any:
    """A copy without the keys that are null: Parquet gives every call of a column the keys of all the others."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


# The layouts


def _choices(row: Row, label: str, id: str) -> Example:
    """Schema rows; a row that names one of the eight tasks gets that task's prompt."""
    task = optional_text(row, "task") or (label if label in COMMONSENSE_TASKS else "")
    return example_of_row(row, task=task, label=label, id=id)


def _chat(row: Row, label: str, id: str, turns: Any, num_in_prompt: int = 0) -> Example:
    """Turns, and the tools that the assistant may call; the assistant's turns are what is learnt."""
    messages, tools = parse_messages(turns, num_in_prompt), parse_tools(row.get("tools"))
    return Example(label, row_id(row, id), "", "", messages=messages, tools=tools)


def _sharegpt_turns(row: Row) -> Any:
    """The turns {role, content} of a row of {from, value}, and maybe a column `system`."""
    if not isinstance(row["conversations"], list):
        return row["conversations"]
    system = optional_text(row, "system")
    turns: list[Any] = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(row["conversations"]):
        if isinstance(turn, dict) and "from" in turn:
            said = turn.get("value")
            made = turn | {"role": turn["from"], "content": said}
            if turn["from"] == "function_call":  # of LLaMA-Factory: JSON of a call, or of a list of calls
                calls = _parsed(said, f"conversations[{number}].value")
                made |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
            turn = made
        turns.append(turn)
    return turns


def _completion(row: Row, label: str, id: str) -> Example:
    """Prompt and completion, joined as they stand: the space between them belongs to the completion (or the prompt).

    Both may be lists of turns instead, which make one chat, of which only the completion is learnt.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(row, label, id, [*prompt, *completion], len(prompt))
    if not isinstance(prompt, str):
        raise RowFault(f"prompt: must be text, got {shown(prompt)}")
    text_field(row, "completion")
    return Example(label, row_id(row, id), prompt, completion)


def _two_turns(row: Row, columns: Sequence[str], label: str, id: str) -> Example:
    """The chat of a prompt and its completion, or of an instruction with its input and its output."""
    question, answer = (text_field(row, name) for name in columns)
    system, given = optional_text(row, "system"), optional_text(row, "input") if "output" in columns else ""
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
    """LLM-Adapters (arXiv 2304.01933): Alpaca rows with an answer."""
    answer = optional_text(row, "answer")
    return with_named_choices(_alpaca(row, label, id), text_field(row, "instruction"), answer)


def _text(row: Row, label: str, id: str) -> Example:
    """Plain text; all of it is learnt."""
    text_field(row, "text")
    return Example(label, row_id(row, id), "", row["text"])


@dataclass(frozen=True)
class Format:
    """A layout of rows."""

    required: tuple[str, ...]  # columns that every row must have
    example: Callable[[Row, str, str], Example]  # of row, label and id
    optional: tuple[str, ...] = ("task", "id")  # other columns that are read
    json: tuple[str, ...] = ()  # columns whose text is JSON where it can be: CSV files hold lists as text


_TOOLS = ("tools", "task", "id")
FORMATS: dict[str, Format] = {
    "choices": Format(
        ("question", "choices", "answer"), _choices, ("task", "id", "context", "passage"), json=("choices", "answer")
    ),
    "messages": Format(
        ("messages",),
        lambda row, label, id: _chat(row, label, id, row["messages"]),
        _TOOLS,
        json=("messages", "tools"),
    ),
    "sharegpt": Format(
        ("conversations",),
        lambda row, label, id: _chat(row, label, id, _sharegpt_turns(row)),
        (*_TOOLS, "system"),
        json=("conversations", "tools"),
    ),
    "completion": Format(("prompt", "completion"), _completion, _TOOLS),
    "commonsense170k": Format(("instruction", "output", "answer"), _commonsense170k, ("input", "id")),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "task", "id")),
    "text": Format(("text",), _text),
}
"""Format -> layout; `auto` takes the first whose columns are there."""
