"""One training or evaluation item before any tokenizer has seen it: text, or the turns of a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from qdora.recipe.section import reason_of, shown

Row = Mapping[str, Any]  # column -> value
Tools = tuple[Mapping[str, Any], ...]  # {type: function, function: {name, description, parameters}}
Made = TypeVar("Made")


class RowFault(ValueError):
    """What is wrong with one row. The caller adds the file and the line."""


def made_from(row: Row | RowFault, make: Callable[..., Made], *more: str) -> Made | RowFault:
    """What `make` makes of a row, or what is wrong with the row."""
    try:
        return row if isinstance(row, RowFault) else make(row, *more)
    except RowFault as fault:
        return fault
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return RowFault(reason_of(error))


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat, as chat templates take it."""

    role: str  # system, user, assistant or tool
    content: str  # may be empty beside tool calls
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # {type, function: {name, arguments}}, `arguments` a mapping
    reasoning: str = ""  # what the assistant thought before it answered
    labels: Mapping[str, str] = field(default_factory=dict)  # what else templates print: name, tool_call_id
    learnt: bool = True  # False: by `weight` 0 or `train` false
    in_prompt: bool = False  # of a row of prompt and completion: only data.loss_on all learns it


Messages = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """Text, prompt + answer as they stand (plain text has an empty prompt), or a chat, which has `messages` instead."""

    task: str  # name under which losses and scores are counted
    id: str  # its name inside the source, for error lines
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()  # for multiple choice, every continuation of `prompt` that may be chosen
    gold: int | None = None  # choices[gold] == answer; None without choices
    messages: Messages = ()
    tools: Tools = ()  # that the assistant of a chat may call


def with_last_learnt(messages: Messages) -> Messages:
    """The turns, of which at most the last one of the assistant is learnt."""
    said = [number for number, turn in enumerate(messages) if turn.role == "assistant"]
    return tuple(replace(turn, learnt=False) if n in said[:-1] else turn for n, turn in enumerate(messages))


def text_field(row: Row, name: str) -> str:
    """A required text, stripped."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowFault(f"{name}: must be text that is not empty, got {shown(value)}")
    return value.strip()


def optional_text(row: Row, name: str) -> str:
    """A text that may be absent, null (pandas' NaN) or empty, stripped."""
    value = row.get(name)
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        raise RowFault(f"{name}: must be text or null, got {shown(value)}")
    return value.strip()
