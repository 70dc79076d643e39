"""One training or evaluation item before any tokenizer has seen it: text, or the turns of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qdora.data.rows import RowFault, parse_row_json
from qdora.errors import nearest
from qdora.recipe.section import shown

ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = {"developer": "system", "function": "tool"}
"""Role in data for OpenAI's models -> the same role."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
TURN_KEYS = ("role", "content", *_REASONING, "tool_calls", "function_call", "tool_call_id", "name", "weight", "train")
"""Keys of a turn that are read."""

Tools = tuple[Mapping[str, Any], ...]
"""The functions that the assistant may call, as {type: function, function: {name, description, parameters}}."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat, as chat templates take it.

    Attributes:
        role: One of `ROLES`.
        content: Its text; may be empty beside tool calls.
        tool_calls: {type, function: {name, arguments}} of each call, `arguments` a mapping.
        reasoning: What the assistant thought before it answered; "" for none.
        labels: What else templates print: name, tool_call_id.
        learnt: False (`weight` 0, `train` false) takes a turn of the assistant out of the loss.
        in_prompt: The turn is of the prompt of a row of prompt and completion, which only data.loss_on all learns.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    reasoning: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    learnt: bool = True
    in_prompt: bool = False


Messages = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """Text with a prompt and an answer, plain text, or a chat.

    prompt + answer is the text, joined as it stands: an answer brings its own leading space. Plain text has an empty
    prompt. A chat has `messages` and neither prompt nor answer; the tokenizer's chat template turns it into text.

    Attributes:
        task: Name under which losses and scores are counted.
        id: Names the example inside its source, for error lines.
        choices: For multiple choice, every continuation of `prompt` that may be chosen; else empty.
        gold: Index of the right choice, choices[gold] == answer; None without choices.
        messages: The turns of a chat; else empty.
        tools: The functions that the assistant of a chat may call.
    """

    task: str
    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    gold: int | None = None
    messages: Messages = ()
    tools: Tools = ()

    def __post_init__(self) -> None:
        # Only what our own code could break; a faulty row of the user's file is refused where it is read.
        assert bool(self.answer) != bool(self.messages), f"{self.task} {self.id}: an answer or messages"
        assert (self.gold is None) == (not self.choices), f"{self.task} {self.id}: choices and gold go together"
        assert self.gold is None or self.choices[self.gold] == self.answer, f"{self.task} {self.id}: {self.choices}"


def with_last_learnt(messages: Messages) -> Messages:
    """The turns, of which at most the last one of the assistant is learnt: data.loss_on last."""
    said = [number for number, turn in enumerate(messages) if turn.role == "assistant"]
    return tuple(replace(turn, learnt=False) if n in said[:-1] else turn for n, turn in enumerate(messages))


def parse_messages(messages: Any, num_in_prompt: int = 0) -> Messages:
    """The turns in the column `messages` of a row; the first `num_in_prompt` of them are the prompt.

    Raises RowFault if one is malformed, or none is the assistant's with something to learn.
    """
    turns = tuple(replace(turn, in_prompt=number < num_in_prompt) for number, turn in enumerate(parse_turns(messages)))
    said = [turn for turn in turns if turn.role == "assistant" and (turn.content.strip() or turn.tool_calls)]
    answers = [turn for turn in said if not turn.in_prompt]
    if not answers:
        where = "completion" if said else "messages"
        raise RowFault(f"{where}: no turn of role assistant with content, so there is nothing to learn")
    if not any(turn.learnt for turn in answers):
        what = "every turn of role assistant with content has weight 0 or train false"
        raise RowFault(f"messages: {what}: there is nothing to learn")
    return turns


def parse_turns(messages: Any) -> Messages:
    """The turns of a conversation, whether or not there is something to learn. Raises RowFault if one is malformed."""
    if not isinstance(messages, list) or not messages:
        raise RowFault(f"messages: must be a list of turns {{role, content}}, got {shown(messages)}")
    return tuple(_turn(f"messages[{number}]", turn) for number, turn in enumerate(messages))


def parse_tools(tools: Any) -> Tools:
    """The column `tools` of a row: a list of functions, or JSON of one; null is none."""
    functions = parsed(tools, "tools")
    if functions is None or functions == "":
        return ()
    if not isinstance(functions, list):
        raise RowFault(f"tools: must be a list of functions, got {shown(tools)}")
    parsed_tools = []
    for number, entry in enumerate(functions):
        tool = _without_nulls(parsed(entry, f"tools[{number}]"))
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise RowFault(f"tools[{number}]: must be {{type: function, function: {{name, ...}}}}, got {shown(entry)}")
        parsed_tools.append(tool)
    return tuple(parsed_tools)


def _turn(where: str, turn: Any) -> Turn:
    calls: Any = []
    calls_key = "tool_calls"
    if isinstance(turn, dict):
        calls, older = turn.get("tool_calls") or [], _without_nulls(turn.get("function_call"))
        if older and not calls:  # OpenAI's older field, of a single call
            calls, calls_key = [older], "function_call"
    if not isinstance(turn, dict) or "role" not in turn or not ("content" in turn or calls):
        raise RowFault(f"{where}: must be an object with role and content, got {shown(turn)}")
    role = _OTHER_ROLES.get(str(turn["role"]), turn["role"])
    if role not in ROLES:
        allowed = ", ".join(ROLES)
        raise RowFault(f"{where}.role: must be one of {allowed}, got {shown(role)}.{nearest(str(role), ROLES)}")
    reasoning_key = next((key for key in _REASONING if turn.get(key)), None)
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and weight not in (0, 1):
        raise RowFault(f"{where}.weight: must be 0 or 1, got {shown(weight)}")
    if train is not None and not isinstance(train, bool):
        raise RowFault(f"{where}.train: must be true or false, got {shown(train)}")
    if role != "assistant":
        for key, is_there, what in (
            (calls_key, calls, "calls tools"),
            (reasoning_key, reasoning_key, "has it"),
            ("weight", weight, "can be learnt"),
            ("train", train, "can be learnt"),
        ):
            if is_there:
                raise RowFault(f"{where}.{key}: only a turn of role assistant {what}, got role {role}")
    if not isinstance(calls, list):
        raise RowFault(f"{where}.tool_calls: must be a list of calls, got {shown(calls)}")
    reasoning = turn[reasoning_key] if reasoning_key else ""
    if not isinstance(reasoning, str):
        raise RowFault(f"{where}.{reasoning_key}: must be text, got {shown(reasoning)}")
    return Turn(
        role=role,
        content="" if turn.get("content") is None and calls else _content(turn.get("content"), f"{where}.content"),
        tool_calls=tuple(_tool_call(call, f"{where}.{calls_key}[{number}]") for number, call in enumerate(calls)),
        reasoning=reasoning,
        labels={key: str(turn[key]) for key in ("name", "tool_call_id") if turn.get(key)},
        learnt=weight in (None, 1) and train in (None, True),
    )


def _content(content: Any, where: str) -> str:
    """Text, or the text of its parts, joined as they stand."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowFault(f"{where}: must be text or a list of parts, got {shown(content)}")
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = f"of type {part['type']}" if isinstance(part, dict) and "type" in part else shown(part)
            raise RowFault(f"{where}[{number}]: a part {kind} is not supported, must be {{type: text, text}}")
        texts.append(text)
    return "".join(texts)


def _tool_call(call: Any, where: str) -> Mapping[str, Any]:
    """{type, id, function: {name, arguments}}; a call may be given without the outer object."""
    call = _without_nulls(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFault(f"{where}: must be {{type: function, function: {{name, arguments}}}}, got {shown(call)}")
    arguments = parsed(function.get("arguments") or {}, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RowFault(f"{where}.arguments: must be an object or JSON of one, got {shown(arguments)}")
    id = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", **id, "function": {"name": function["name"], "arguments": arguments}}


def parsed(value: Any, where: str) -> Any:
    """A value, or what its JSON text stands for."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_row_json(value)
    except ValueError as error:
        raise RowFault(f"{where}: is not JSON ({error}), got {shown(value)}") from None


def _without_nulls(value: Any) -> Any:
    """A copy without the keys that are null: Parquet gives every call of a column the keys of all the others."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
