"""The turns of a chat as data sets hold them -> turns as chat templates take them: parts, reasoning, tools, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qdora.data.rows import RowFault, parse_row_json
from qdora.errors import nearest
from qdora.recipe.faults import shown

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
    """One message of a chat.

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


def parse_messages(messages: Any, num_in_prompt: int = 0) -> Messages:
    """The turns in the column `messages` of a row; the first `num_in_prompt` of them are the prompt.

    Raises: RowFault if one is malformed, or none is the assistant's with something to learn.
    """
    turns = tuple(replace(turn, in_prompt=number < num_in_prompt) for number, turn in enumerate(parse_turns(messages)))
    said = [turn for turn in turns if turn.role == "assistant" and (turn.content.strip() or turn.tool_calls)]
    answers = [turn for turn in said if not turn.in_prompt]
    if not answers:
        where = "messages" if not said else "completion"
        raise RowFault(f"{where}: no turn of role assistant with content, so there is nothing to learn")
    if not any(turn.learnt for turn in answers):
        what = "every turn of role assistant with content has weight 0 or train false"
        raise RowFault(f"messages: {what}: there is nothing to learn")
    return turns


def parse_turns(messages: Any) -> Messages:
    """The turns of a conversation, whether or not there is something to learn. Raises: RowFault if one is malformed."""
    if not isinstance(messages, list) or not messages:
        raise RowFault(f"messages: must be a list of turns {{role, content}}, got {shown(messages)}")
    return tuple(_turn(f"messages[{number}]", turn) for number, turn in enumerate(messages))


def parse_tools(tools: Any) -> Tools:
    """The column `tools` of a row: a list of functions, or JSON of one; null is none.

    Raises: RowFault if it is malformed.
    """
    listed = parsed(tools, "tools")
    if listed is None or listed == "":
        return ()
    if not isinstance(listed, list):
        raise RowFault(f"tools: must be a list of functions, got {shown(tools)}")
    found = []
    for number, entry in enumerate(listed):
        tool = _without_nulls(parsed(entry, f"tools[{number}]"))
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise RowFault(f"tools[{number}]: must be {{type: function, function: {{name, ...}}}}, got {shown(entry)}")
        found.append(tool)
    return tuple(found)


def _turn(where: str, turn: Any) -> Turn:
    calls, field_of_calls = _calls(turn) if isinstance(turn, dict) else ([], "")
    if not isinstance(turn, dict) or "role" not in turn or not ("content" in turn or calls):
        raise RowFault(f"{where}: must be an object with role and content, got {shown(turn)}")
    role = _OTHER_ROLES.get(str(turn["role"]), turn["role"])
    if role not in ROLES:
        raise RowFault(
            f"{where}.role: must be one of {', '.join(ROLES)}, got {shown(role)}.{nearest(str(role), ROLES)}"
        )
    if calls and role != "assistant":
        raise RowFault(f"{where}.{field_of_calls}: only a turn of role assistant calls tools, got role {role}")
    if not isinstance(calls, list):
        raise RowFault(f"{where}.tool_calls: must be a list of calls, got {shown(calls)}")
    return Turn(
        role=role,
        content=_content(turn.get("content"), f"{where}.content", optional=bool(calls)),
        tool_calls=tuple(_tool_call(call, f"{where}.{field_of_calls}[{number}]") for number, call in enumerate(calls)),
        reasoning=_reasoning(turn, where),
        labels={key: str(turn[key]) for key in ("name", "tool_call_id") if turn.get(key)},
        learnt=_is_learnt(turn, where),
    )


def _calls(turn: Mapping[str, Any]) -> tuple[Any, str]:
    """The calls of a turn and the field that has them; `function_call`, OpenAI's older field, has one."""
    older = _without_nulls(turn.get("function_call"))
    if turn.get("tool_calls") or not older:
        return turn.get("tool_calls") or [], "tool_calls"
    return [older], "function_call"


def _content(content: Any, where: str, *, optional: bool) -> str:
    """Text, or the text of its parts, joined as they stand."""
    if content is None and optional:
        return ""
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


def _reasoning(turn: Mapping[str, Any], where: str) -> str:
    key = next((key for key in _REASONING if turn.get(key)), None)
    if key is None:
        return ""
    if not isinstance(turn[key], str):
        raise RowFault(f"{where}.{key}: must be text, got {shown(turn[key])}")
    if turn["role"] != "assistant":
        raise RowFault(f"{where}.{key}: only a turn of role assistant has it, got role {turn['role']}")
    return str(turn[key])


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


def with_last_learnt(messages: Messages) -> Messages:
    """The turns, of which at most the last one of the assistant is learnt: data.loss_on last."""
    said = [number for number, turn in enumerate(messages) if turn.role == "assistant"]
    return tuple(replace(turn, learnt=False) if n in said[:-1] else turn for n, turn in enumerate(messages))


def _is_learnt(turn: Mapping[str, Any], where: str) -> bool:
    """What `weight` and `train` say; an absent or null one says yes."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and weight not in (0, 1):
        raise RowFault(f"{where}.weight: must be 0 or 1, got {shown(weight)}")
    if train is not None and not isinstance(train, bool):
        raise RowFault(f"{where}.train: must be true or false, got {shown(train)}")
    if turn["role"] != "assistant" and (weight or train):
        key = "weight" if weight else "train"
        raise RowFault(f"{where}.{key}: only a turn of role assistant can be learnt, got role {turn['role']}")
    return weight in (None, 1) and train in (None, True)


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
