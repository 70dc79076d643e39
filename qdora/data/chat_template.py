"""A tokenizer's chat template: its settings in a run, rendering, and what it takes, found out with short probes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from transformers.utils.chat_template_utils import render_jinja_template

from qdora.data.example import Messages, Tools, Turn
from qdora.errors import UserError, nearest
from qdora.files.machine import user_path
from qdora.recipe.data_settings import DataConfig

RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template raises for a chat, or a row, that it does not take."""


@dataclass(frozen=True)
class ChatSettings:
    """How the chats of a run are rendered: the day that templates print (None: today), their variables, stop tokens."""

    day: date | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: frozenset[int] | None = None


def chat_settings(tokenizer: Any) -> ChatSettings:
    """What `set_chat_settings` gave."""
    settings: ChatSettings = getattr(tokenizer, "qdora_chat", None) or ChatSettings()
    return settings


def set_chat_settings(tokenizer: Any, **changed: Any) -> None:
    """Change fields of the tokenizer's `ChatSettings`. Only in this process: a saved tokenizer is as before."""
    tokenizer.qdora_chat = replace(chat_settings(tokenizer), **changed)
    tokenizer.qdora_chat_templates = {}


def set_chat_date(tokenizer: Any, day: str) -> None:
    """Render chats as on this day (YYYY-MM-DD) from now on, in templates that print the date."""
    set_chat_settings(tokenizer, day=date.fromisoformat(day))


def use_data_settings(tokenizer: Any, data: DataConfig) -> None:
    """Give the tokenizer `data.chat_template` and `data.template_kwargs`; UserError if it cannot use them."""
    if data.chat_template is not None:
        file = user_path(data.chat_template)
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
            _variables(tokenizer.chat_template)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template: {file}: cannot be read ({error}).") from None
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"data.chat_template: {file}: line {error.lineno}: {error.message}") from None
    kwargs, template = dict(data.template_kwargs), getattr(tokenizer, "chat_template", None)
    if kwargs and not template:
        raise UserError("data.template_kwargs: the tokenizer has no chat template. Fix: remove it.")
    texts = list(template.values()) if isinstance(template, dict) else [template or ""]
    faults = [
        f"data.template_kwargs: the chat template does not read {name!r}, it reads "
        f"{', '.join(options := template_options(*texts)) or 'none'}.{nearest(name, options)}"
        for name in kwargs
        if name in _RESERVED or not any(name in _variables(text) for text in texts)
    ]
    if faults:
        raise UserError(*faults)
    set_chat_settings(tokenizer, template_kwargs=kwargs)


_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"})
"""What the program or transformers gives a template."""
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def _variables(template: str) -> set[str]:
    """Names that a template reads and does not define."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    return set(jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template))))


def template_options(*templates: str) -> list[str]:
    """Variables that templates read if they are defined: those that a recipe may give."""
    tested = re.findall(r"(?<![.\w])(\w+) is (?:not )?defined", "\n".join(templates))
    return sorted(set(tested) & set().union(*map(_variables, templates)) - _RESERVED)


def require_chat_template(tokenizer: Any, name: str) -> None:
    """Raise a UserError if the tokenizer cannot render the chats of source `name`."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer_name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(
            f"{name}: holds chats, but the tokenizer ({tokenizer_name}) has no chat template. Fix: set model.tokenizer "
            "to one that has it (the instruct version of the model), or give one with data.chat_template."
        )


# transformers lets no function of ours into a template, so a macro takes the place of its own. The line end is dropped.
_CLOCK = (
    "{% macro strftime_now(format) %}{% set text = namespace(of=format) %}"
    "{% for part, value in qdora_day.items() %}{% set text.of = text.of.replace(part, value) %}{% endfor %}"
    "{{ text.of }}{% endmacro %}\n"
)
_DATE_PARTS = [*(f"%-{part}" for part in "dmyjHIMS"), *(f"%{part}" for part in "aAbBcdDeFGHIjmMpSuUVwWxXyYzZ%")]
_SHORT_ID = 9
_ANSWER, _OTHER = "Aq7probe", "\u203bprobe"
_USER = Turn("user", "Uq7probe")
_CALL = Turn("assistant", _ANSWER, ({"type": "function", "function": {"name": "f7probe", "arguments": {"a": "b"}}},))
_RESULT = Turn("tool", _USER.content)


class _Rendering(NamedTuple):
    """The text of a chat, and where the template marks what the assistant writes (`{% generation %}`)."""

    text: str
    marks: tuple[tuple[int, int], ...]


class ChatTemplate:
    """One chat template of a tokenizer, with its settings. `chat_template_of` gives it."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text, self.settings = tokenizer, text, chat_settings(tokenizer)
        self._day: dict[str, Any] = {}
        self._source = text
        if self.settings.day is not None and "strftime_now" in text:
            self._day = {"qdora_day": {part: self.settings.day.strftime(part) for part in _DATE_PARTS}}
            self._source = _CLOCK + text
        self._has_marks = bool(_GENERATION.search(text))
        ids = {**tokenizer.get_added_vocab()}
        ids |= {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
        self._names = tuple(sorted((name for name in ids if name.strip()), key=len, reverse=True))
        self.mark_ids = frozenset(ids[name] for name in self._names)  # tokens that were added, special or not
        self.mark = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._first_mark = re.compile(rf"\s*(?:{self.mark.pattern})")

    def fitted(self, turns: Messages) -> Messages:
        """The turns as the template takes them: a system prompt that it refuses or drops goes into the first turn.

        Where it wants ids of nine letters for calls (Mistral), they get such ids.
        """
        ids = [str(call.get("id", "")) for turn in turns for call in turn.tool_calls]
        if any(len(id) != _SHORT_ID for id in ids) and self.takes_short_ids:
            turns = _with_short_ids(turns)
        if self.takes_system or turns[0].role != "system":
            return turns
        system, rest = turns[0].content, turns[1:]
        if rest and rest[0].role == "user":
            return (replace(rest[0], content=f"{system}\n\n{rest[0].content}"), *rest[1:])
        return (Turn("user", system), *rest)

    def render(self, turns: Sequence[Turn], tools: Tools = (), *, prompt: bool = False) -> _Rendering:
        """The text of turns that are `fitted`; `prompt` adds what the model sees before it answers.

        Raises: One of `RENDER_ERRORS` where the template does not take the chat.
        """
        return self._render(turns, tools, prompt, not self.takes_text, not self.takes_objects)

    def _render(self, turns: Sequence[Turn], tools: Tools, prompt: bool, parts: bool, texts: bool) -> _Rendering:
        """Content as a list of `parts`, arguments of calls as `texts` of JSON, where the template wants them so."""
        messages = []
        for turn in turns:
            message: dict[str, Any] = {"role": turn.role, **turn.labels}
            message["content"] = [{"type": "text", "text": turn.content}] if parts else turn.content
            if turn.reasoning:  # gpt-oss reads thinking
                message |= {"reasoning_content": turn.reasoning, "thinking": turn.reasoning}
            if turn.tool_calls:
                message["tool_calls"] = [_as_text(call) if texts else call for call in turn.tool_calls]
            messages.append(message)
        options = {**self.settings.template_kwargs, **self._day, "add_generation_prompt": prompt}
        given = [dict(tool) for tool in tools] or None
        if not self._has_marks:
            options |= {"chat_template": self._source, "tokenize": False}
            return _Rendering(str(self.tokenizer.apply_chat_template(messages, tools=given, **options)), ())
        options = {**self.tokenizer.special_tokens_map, **options, "return_assistant_tokens_mask": True}
        rendered, marks = render_jinja_template([messages], given, chat_template=self._source, **options)
        return _Rendering(rendered[0], tuple((start, end) for start, end in marks[0] if end > start))

    def _probe(self, *turns: Turn, prompt: bool = False, parts: bool | None = None, texts: bool | None = None) -> str:
        """The text of a few turns, in the forms that the template takes; "" where it does not take the turns."""
        parts = not self.takes_text if parts is None else parts
        texts = not self.takes_objects if texts is None else texts
        try:
            return self._render(turns, (), prompt, parts, texts).text
        except RENDER_ERRORS:
            return ""

    @cached_property
    def takes_text(self) -> bool:
        """Whether content may be plain text; else it must be a list of parts (templates of vision models)."""
        chat = _USER, Turn("assistant", _ANSWER)
        texts = [self._probe(*chat, parts=parts, texts=False) for parts in (False, True)]
        return [_USER.content in text and _ANSWER in text for text in texts] != [False, True]

    @cached_property
    def takes_objects(self) -> bool:
        """Whether the arguments of a call may be an object, as servers give them; else they must be JSON text."""
        return bool(self._probe(_USER, _CALL, texts=False)) or not self._probe(_USER, _CALL, texts=True)

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system prompt is printed."""
        printed = self._probe(Turn("system", "S7probe"), _USER, prompt=True)
        return "S7probe" in printed or not self._probe(_USER, prompt=True)

    @cached_property
    def takes_short_ids(self) -> bool:
        """Whether calls must have ids of nine letters."""
        turns = (_USER, _CALL, _RESULT)
        return not self._probe(*turns) and bool(self._probe(*_with_short_ids(turns)))

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds behind a turn of the user before the model answers."""
        return self._probe(_USER, prompt=True).removeprefix(self._probe(_USER))

    @cached_property
    def _ending(self) -> tuple[bool, str, str, str]:
        """How a turn of the assistant ends: (it has an end mark of its own, what stands behind that mark at the end of
        a chat only, what ends an answer without a mark of its own, what ends such a call of tools).

        Where it has none, the mark of the next turn ends this one (GLM).
        """
        answer = Turn("assistant", _ANSWER)
        chats = ((_USER, answer), (_USER, answer, _USER), (_USER, _CALL), (_USER, _CALL, _RESULT))
        alone, followed, before, after = (self._probe(*chat).rpartition(_ANSWER)[2] for chat in chats)
        if not self.mark.search(alone):
            return False, "", self._end_before(alone, followed), self._end_before(before, after)
        # Line ends apart, so that one behind the mark is not taken for a part of the trailer
        pieces = [re.split(rf"({self.mark.pattern}|\n)", text) for text in (alone, followed)]
        first, second = ([piece for piece in each if piece] for each in pieces)
        common = "".join(first[: shared_length(first, second)])
        return True, alone[len(common) :] if self.mark.search(common) else "", "", ""

    def _end_before(self, before: str, after: str) -> str:
        """The mark with which `after` goes on from `before`, or the end of sequence."""
        mark = self._first_mark.match(after, len(before)) if after.startswith(before) else None
        return mark[0] if mark else str(self.tokenizer.eos_token or "")

    def content_start(self, turns: Messages, tools: Tools, text: str) -> int:
        """Where what the data says of the last turn begins in the text of the turns."""
        last = turns[-1]
        calls = tuple({**call, "function": {**call["function"], "name": _OTHER}} for call in last.tool_calls)
        other = replace(last, content=_OTHER, reasoning=last.reasoning and _OTHER, tool_calls=calls)
        return shared_length(text, self.render((*turns[:-1], other), tools).text)

    def answer_start(self, turns: Messages, tools: Tools, text: str, prompt: str) -> tuple[int, bool]:
        """Where the last turn begins in the text of the turns; whether that is behind the generation prompt.

        `prompt` is the text that the model sees before that turn. The text of the turns begins otherwise.
        """
        first = self.content_start(turns, tools, text)
        unasked = self.render(turns[:-1], tools).text
        header = prompt.removeprefix(unasked) if prompt.startswith(unasked) else ""
        if not header:  # a prompt that only ends with the turn before; 16 characters where that has no mark
            header = prompt[max((mark.start() for mark in self.mark.finditer(prompt)), default=-16) :]
        # Not where an earlier turn begins alike: up to there, but for the header, the text is that of the prompt
        shared = shared_length(prompt, text)
        begin = text.rfind(header, max(0, shared - len(header)), first)
        if begin >= 0:
            return begin + len(header), True
        is_other_header = shared >= len(prompt) - len(header)
        return (min(shared, first) if is_other_header else first), False

    def closed(self, text: str, end: int, calls: bool) -> tuple[str, int]:
        """The text of a chat up to a turn of the assistant, and the end of the turn with its end mark.

        `end` is where the turn ends as the template marks or prints it; `calls`: the turn calls tools.
        """
        is_written, _, next_turn, tool_turn = self._ending
        if is_written and text[:end].rstrip().endswith(self._names):
            return text, end
        if mark := self._first_mark.match(text, end):
            return text, mark.end()
        if not is_written and not text[end:].strip():
            text = text[:end] + (tool_turn if calls else next_turn)
            return text, len(text)
        return text, end

    def end_in(self, text: str, part: str, end: int) -> int | None:
        """Where a turn that ends at `end` of `part`, before `closed`, ends in `text`, a longer chat; None if not so."""
        is_written, trailer, _, _ = self._ending
        if not text.startswith(part):
            part = part.removesuffix(trailer)
            if not trailer or not text.startswith(part):
                return None
            end = min(end, len(part))
        if is_written:
            return end
        mark = self._first_mark.match(text, len(part))
        return mark.end() if mark else None


def chat_template_of(tokenizer: Any, tools: Tools = ()) -> ChatTemplate:
    """The tokenizer's template for a chat with these tools (some have one of its own for chats with tools)."""
    given = tokenizer.chat_template
    if isinstance(given, dict) and "default" not in given and not (tools and "tool_use" in given):
        raise UserError(
            f"the tokenizer has chat templates named {', '.join(sorted(given))}, and none named default. "
            "Fix: give one with data.chat_template."
        )
    text = tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None)
    templates: dict[str, ChatTemplate] = tokenizer.__dict__.setdefault("qdora_chat_templates", {})
    if text not in templates:
        templates[text] = ChatTemplate(tokenizer, text)
    return templates[text]


def prompt_text(tokenizer: Any, turns: Messages, tools: Tools = ()) -> str:
    """The text that the model sees before it answers these turns; UserError if the template does not take them."""
    template = chat_template_of(tokenizer, tools)
    try:
        return template.render(template.fitted(turns), tools, prompt=True).text
    except RENDER_ERRORS as error:
        raise UserError(f"the chat template refuses it: {error}") from None


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of equal characters, or items, at the start of both."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _with_short_ids(turns: Messages) -> Messages:
    """The turns with an id of nine letters for every call, and for its result.

    A result belongs to the call whose id it has in the data, or else to the first call that has no result yet.
    """
    fitted: list[Turn] = []
    waiting: list[tuple[Any, str]] = []  # calls without a result: the id in the data, the short id
    for number, turn in enumerate(turns):
        if turn.tool_calls:
            digests = [hashlib.sha256(f"{number} {n}".encode()).hexdigest() for n in range(len(turn.tool_calls))]
            waiting = [(call.get("id"), each[:_SHORT_ID]) for call, each in zip(turn.tool_calls, digests, strict=True)]
            calls = tuple({**call, "id": id} for call, (_, id) in zip(turn.tool_calls, waiting, strict=True))
            turn = replace(turn, tool_calls=calls)
        elif turn.role == "tool" and waiting:
            given, ids = turn.labels.get("tool_call_id"), [id for id, _ in waiting]
            _, short = waiting.pop(ids.index(given) if given is not None and given in ids else 0)
            turn = replace(turn, labels={**turn.labels, "tool_call_id": short})
        fitted.append(turn)
    return tuple(fitted)


def _as_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
