"""The turns and tools of a row: the forms that files have, and what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qdora.data.messages import Turn, parse_messages, parse_tools
from qdora.data.rows import RowFault


def message(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "the cat"} | keys


def test_messages_in_full() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, null], "b": null}'}}
    turns = parse_messages(
        [
            {"role": "user", "content": [{"type": "text", "text": "a ", "image": None}, "b", {"text": "c"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "weight": 0},
            {"role": "tool", "content": "12", "tool_call_id": "c1", "name": "f"},
            message(tool_calls=[{"name": "g", "arguments": None}], train=True, weight=1.0),
            message(thinking="oh", train=False, weight=None),
        ]
    )
    assert turns == (
        Turn("user", "a bc"),
        Turn(
            "assistant",
            "",
            ({"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"a": [1, None], "b": None}}},),
            reasoning="hm",
            learnt=False,
        ),
        Turn("tool", "12", labels={"tool_call_id": "c1", "name": "f"}),
        Turn("assistant", "the cat", ({"type": "function", "function": {"name": "g", "arguments": {}}},)),
        Turn("assistant", "the cat", reasoning="oh", learnt=False),
    )


def test_the_older_names_of_openai() -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    turns = parse_messages(
        [
            {"role": "developer", "content": "Be kind.", "function_call": {"name": None, "arguments": None}},  # Parquet
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "f", "content": "12"},
            message(function_call=None),
        ]
    )
    assert turns == (
        Turn("system", "Be kind."),
        Turn("assistant", "", ({"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},)),
        Turn("tool", "12", labels={"name": "f"}),
        Turn("assistant", "the cat"),
    )
    with pytest.raises(RowFault, match=r"messages\[0\].function_call\[0\].arguments: is not JSON"):
        parse_messages([message(function_call={"name": "f", "arguments": "{"})])


def test_tools_in_the_forms_that_files_have() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
    padded = json.loads(json.dumps(tool))
    padded["function"]["parameters"]["properties"]["b"] = None  # Parquet
    for given_tools in ([tool], json.dumps([tool]), [json.dumps(tool)], [tool["function"]], [padded]):
        assert parse_tools(given_tools) == (tool,)
    for nothing in (None, "", [], "[]"):
        assert parse_tools(nothing) == ()


@pytest.mark.parametrize(
    "turn, fault",
    [
        (message(content=[{"type": "image", "url": "x"}]), "messages[0].content[0]: a part of type image is not supp"),
        (message(content=3), "messages[0].content: must be text or a list of parts, got 3"),
        (message(content=None), "messages[0].content: must be text or a list of parts, got null"),
        ({"role": "assistant"}, "messages[0]: must be an object with role and content, got {role: assistant}"),
        (message(role="assitant"), "messages[0].role: must be one of system, user, assistant, tool, got 'assitant'"),
        (message(weight=0.5), "messages[0].weight: must be 0 or 1, got 0.5"),
        (message(train="no"), "messages[0].train: must be true or false, got 'no'"),
        (
            message(role="user", train=True),
            "messages[0].train: only a turn of role assistant can be learnt",
        ),
        (
            message(weight=0),
            "messages: every turn of role assistant with content has weight 0 or train false: there is noth",
        ),
        (message(reasoning_content=["x"]), "messages[0].reasoning_content: must be text, got [x]"),
        (
            message(role="user", reasoning="x"),
            "messages[0].reasoning: only a turn of role assistant has it",
        ),
        (message(tool_calls="f"), "messages[0].tool_calls: must be a list of calls, got 'f'"),
        (
            message(tool_calls=[{"x": 1}]),
            "messages[0].tool_calls[0]: must be {type: function, function: {name, arg",
        ),
        (message(tool_calls=[{"name": "f", "arguments": "{"}]), "messages[0].tool_calls[0].arguments: is not JSON ("),
        (
            message(tool_calls=[{"name": "f", "arguments": [1]}]),
            "messages[0].tool_calls[0].arguments: must be an object",
        ),
        (
            message(role="user", tool_calls=[{"name": "f"}]),
            "messages[0].tool_calls: only a turn of role assis",
        ),
        (message(content=" "), "messages: no turn of role assistant with content, so there is nothing to learn"),
    ],
)
def test_faulty_messages(turn: dict[str, Any], fault: str) -> None:
    with pytest.raises(RowFault) as error:
        parse_messages([turn])
    assert str(error.value).startswith(fault)


def test_an_empty_turn_beside_one_of_weight_0_leaves_nothing_to_learn() -> None:
    with pytest.raises(RowFault, match="every turn of role assistant with content has weight 0 or train false"):
        parse_messages([message(weight=0), message(content="")])


@pytest.mark.parametrize(
    "tools, fault",
    [
        ("[", "tools: is not JSON ("),
        ({"name": "f"}, "tools: must be a list of functions, got {name: f}"),
        ([{"type": "function"}], "tools[0]: must be {type: function, function: {name, ...}}, got {type: function}"),
    ],
)
def test_faulty_tools(tools: Any, fault: str) -> None:
    with pytest.raises(RowFault) as error:
        parse_tools(tools)
    assert str(error.value).startswith(fault)
