"""Chats -> token ids, and which of them the assistant writes: each turn as the model sees it when it answers.

The text before a turn is the chat up to it with the generation prompt; the turn is what the template adds to that, with
its end mark. A template that rewrites earlier turns (many drop their reasoning) gives a text for each turn, else one
text holds all. Short probes tell what a template takes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import numpy as np
from numpy.typing import NDArray
from transformers.utils.chat_template_utils import render_jinja_template

from qdora.data.example import Example, Messages, Tools, Turn, with_last_learnt
from qdora.errors import UserError
from qdora.files.machine import user_path
from qdora.recipe.data_settings import DataConfig, LossOn

# For a chat that the template does not take. No MemoryError or OSError
_PYTHON = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
RENDER_ERRORS = (jinja2.TemplateError, *_PYTHON)


# Settings of a run


@dataclass(frozen=True)
class ChatSettings:
    day: date | None = None  # that templates print; None: today
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: frozenset[int] | None = None


def chat_settings(tokenizer: Any) -> ChatSettings:
    settings: ChatSettings = getattr(tokenizer, "qdora_chat", None) or ChatSettings()
    return settings


def set_chat_settings(tokenizer: Any, **changed: Any) -> None:
    """Change fields of the tokenizer's `ChatSettings`, in this process only."""
    tokenizer.qdora_chat = replace(chat_settings(tokenizer), **changed)
    tokenizer.qdora_chat_templates = {}


def set_chat_date(tokenizer: Any, day: str) -> None:
    """Render chats as on this day (YYYY-MM-DD)."""
    set_chat_settings(tokenizer, day=date.fromisoformat(day))


def use_data_settings(tokenizer: Any, data: DataConfig) -> None:
    """Give the tokenizer `data.chat_template` and `data.template_kwargs`."""
    if data.chat_template is not None:
        file = user_path(data.chat_template)
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
            _variables(tokenizer.chat_template)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template: {file}: {error}") from None
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"data.chat_template: {file}: line {error.lineno}: {error.message}") from None
    template = tokenizer.chat_template or ""
    texts = template.values() if isinstance(template, dict) else [template]
    names = sorted(set().union(*map(_variables, texts)) - _RESERVED)
    unread = [name for name in data.template_kwargs if name not in names]
    if unread:  # jinja ignores them
        raise UserError(f"data.template_kwargs: the chat template reads {names}, got {unread}.")
    set_chat_settings(tokenizer, template_kwargs=dict(data.template_kwargs))


# What the program or transformers gives a template
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def _variables(template: str) -> set[str]:
    """Names that a template reads and does not define."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    return set(jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template))))


def require_chat_template(tokenizer: Any, name: str) -> None:
    """Raise a UserError if the tokenizer cannot render the chats of source `name`."""
    if not tokenizer.chat_template:
        fix = "Fix: set model.tokenizer to one of an instruct model, or data.chat_template."
        raise UserError(f"{name}: holds chats, but the tokenizer has no chat template. {fix}")


# A template


_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_SHORT_ID = 9
_ANSWER, _OTHER = "Aq7probe", "\u203bprobe"
_USER = Turn("user", "Uq7probe")
_CALL = Turn(
    "assistant", _ANSWER, ({"type": "function", "function": {"name": "f7probe", "arguments": {"a": "b"}}},)
)
_RESULT = Turn("tool", _USER.content)


class _Rendering(NamedTuple):
    text: str
    marks: tuple[tuple[int, int], ...]  # `{% generation %}` spans


class ChatTemplate:
    """One chat template of a tokenizer, with its settings; see `chat_template_of`."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.settings = tokenizer, chat_settings(tokenizer)
        day = self.settings.day
        # transformers lets no function of ours into a template
        self._source = text if day is None else _CLOCK.sub(lambda call: repr(day.strftime(call[2])), text)
        self._has_marks = bool(_GENERATION.search(text))
        special = {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
        ids = tokenizer.get_added_vocab() | special
        self._names = tuple(sorted((name for name in ids if name.strip()), key=len, reverse=True))
        self.mark_ids = frozenset(ids[name] for name in self._names)  # tokens that were added, special or not
        self.mark = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self.first_mark = re.compile(rf"\s*(?:{self.mark.pattern})")
        # Where the template wants them so, content is a list of parts (vision models), arguments of calls are JSON text
        self._parts = self._texts = False
        if not self._prints_chat():
            self._parts = True
            self._parts = self._prints_chat()
        if not self._probe(_USER, _CALL):
            self._texts = True
            self._texts = bool(self._probe(_USER, _CALL))

    def fitted(self, turns: Messages) -> Messages:
        """The turns as the template takes them.

        A system prompt that it refuses or drops goes into the first turn; calls get ids of nine letters (Mistral).
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
        """The text of `fitted` turns; `prompt` adds what the model sees before it answers. Raises `RENDER_ERRORS`."""
        messages = []
        for turn in turns:
            message: dict[str, Any] = {"role": turn.role, **turn.labels}
            message["content"] = [{"type": "text", "text": turn.content}] if self._parts else turn.content
            if turn.reasoning:  # gpt-oss reads thinking
                message |= {"reasoning_content": turn.reasoning, "thinking": turn.reasoning}
            if turn.tool_calls:
                message["tool_calls"] = [_as_text(call) if self._texts else call for call in turn.tool_calls]
            messages.append(message)
        options = {**self.tokenizer.special_tokens_map, **self.settings.template_kwargs}
        options |= {"add_generation_prompt": prompt, "return_assistant_tokens_mask": self._has_marks}
        rendered, marks = render_jinja_template(
            [messages], list(tools) or None, chat_template=self._source, **options
        )
        return _Rendering(
            rendered[0], tuple((start, end) for some in marks for start, end in some if end > start)
        )

    def _probe(self, *turns: Turn, prompt: bool = False) -> str:
        """The text of turns; "" where the template does not take them."""
        try:
            return self.render(turns, prompt=prompt).text
        except RENDER_ERRORS:
            return ""

    def _prints_chat(self) -> bool:
        text = self._probe(_USER, Turn("assistant", _ANSWER))
        return _USER.content in text and _ANSWER in text

    @cached_property
    def takes_system(self) -> bool:
        printed = self._probe(Turn("system", "S7probe"), _USER, prompt=True)
        return "S7probe" in printed or not self._probe(_USER, prompt=True)

    @cached_property
    def takes_short_ids(self) -> bool:
        turns = (_USER, _CALL, _RESULT)
        return not self._probe(*turns) and bool(self._probe(*_with_short_ids(turns)))

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds behind a turn of the user before the model answers."""
        return self._probe(_USER, prompt=True).removeprefix(self._probe(_USER))

    @cached_property
    def ending(self) -> tuple[bool, str, str, str]:
        """(The assistant's turns have an end mark; what stands behind it at the end of a chat only; else the mark of
        the next turn that ends an answer, and a call of tools (GLM)).
        """
        answer = Turn("assistant", _ANSWER)
        chats = ((_USER, answer), (_USER, answer, _USER), (_USER, _CALL), (_USER, _CALL, _RESULT))
        alone, followed, before, after = (self._probe(*chat).rpartition(_ANSWER)[2] for chat in chats)
        if not self.mark.search(alone):
            return False, "", self._end_before(alone, followed), self._end_before(before, after)
        # Line ends apart, so that one behind the mark is not taken for a part of the trailer
        pieces = [re.split(rf"({self.mark.pattern}|\n)", text) for text in (alone, followed)]
        first, second = ([piece for piece in row if piece] for row in pieces)
        common = "".join(first[: shared_length(first, second)])
        return True, alone[len(common) :] if self.mark.search(common) else "", "", ""

    def _end_before(self, before: str, after: str) -> str:
        """The mark with which `after` goes on from `before`, or the end of sequence."""
        mark = self.first_mark.match(after, len(before)) if after.startswith(before) else None
        return mark[0] if mark else str(self.tokenizer.eos_token or "")

    def content_start(self, turns: Messages, tools: Tools, text: str) -> int:
        """Where the data of the last turn begins in the text of the turns."""
        last = turns[-1]
        calls = tuple({**call, "function": {**call["function"], "name": _OTHER}} for call in last.tool_calls)
        other = replace(last, content=_OTHER, reasoning=last.reasoning and _OTHER, tool_calls=calls)
        return shared_length(text, self.render((*turns[:-1], other), tools).text)

    def answer_start(self, turns: Messages, tools: Tools, text: str, prompt: str) -> tuple[int, bool]:
        """Where the last turn begins in the text of the turns; whether that is behind the generation prompt.

        `prompt` is what the model sees before that turn; the text does not begin with it.
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

        `end` excludes the mark perhaps; `calls`: the turn calls tools.
        """
        is_written, _, next_turn, tool_turn = self.ending
        if is_written and text[:end].rstrip().endswith(self._names):
            return text, end
        if mark := self.first_mark.match(text, end):
            return text, mark.end()
        if not is_written and not text[end:].strip():
            text = text[:end] + (tool_turn if calls else next_turn)
            return text, len(text)
        return text, end


def chat_template_of(tokenizer: Any, tools: Tools = ()) -> ChatTemplate:
    """The tokenizer's template for a chat, with tools perhaps another one."""
    text = tokenizer.get_chat_template(tools=tools or None)
    templates: dict[str, ChatTemplate] = tokenizer.__dict__.setdefault("qdora_chat_templates", {})
    if text not in templates:
        templates[text] = ChatTemplate(tokenizer, text)
    return templates[text]


def prompt_text(tokenizer: Any, turns: Messages, tools: Tools = (), where: str = "--prompt") -> str:
    """The text that the model sees before it answers these turns."""
    try:
        template = chat_template_of(tokenizer, tools)
        return template.render(template.fitted(turns), tools, prompt=True).text
    except RENDER_ERRORS as error:
        raise UserError(f"{where}: the chat template refuses it: {error}") from None


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of equal items at the start of both."""
    most = min(len(first), len(second))
    return next((index for index in range(most) if first[index] != second[index]), most)


def _with_short_ids(turns: Messages) -> Messages:
    """The turns with an id of nine letters for every call and its result: by the data's id, else in order."""
    fitted: list[Turn] = []
    # Of the calls without a result: the id in the data, or a number -> the short id
    waiting: dict[Any, str] = {}
    for number, turn in enumerate(turns):
        if turn.tool_calls:
            waiting = {}
            for n, call in enumerate(turn.tool_calls):
                own, digest = call.get("id", n), hashlib.sha256(f"{number} {n}".encode()).hexdigest()
                waiting[n if own in waiting else own] = digest[:_SHORT_ID]
            calls = tuple(
                {**call, "id": id} for call, id in zip(turn.tool_calls, waiting.values(), strict=True)
            )
            turn = replace(turn, tool_calls=calls)
        elif turn.role == "tool" and waiting:
            own = turn.labels.get("tool_call_id")
            short = waiting.pop(own if own in waiting else next(iter(waiting)))
            turn = replace(turn, labels={**turn.labels, "tool_call_id": short})
        fitted.append(turn)
    return tuple(fitted)


def _as_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    return {
        **call,
        "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
    }


# Chats to tokens


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of an example, and True where they are learnt: what the assistant writes, or the answer."""

    ids: list[int]
    mask: list[bool]
    prefix: int = 0  # ids[prefix:start] is a prompt, whose front may be cut; empty in a chat
    start: int = 0
    turn: int | None = None  # index of the only turn that is learnt, where a chat is several texts


class _Text(NamedTuple):
    template: ChatTemplate
    text: str
    spans: tuple[tuple[int, int], ...]  # (start, end) of what is learnt
    prompt: int | None = None  # end of the text that the model sees before it answers
    turn: int | None = None
    # Of the turn, without what stands at the end of a chat only and without the mark of the next turn
    end: int = 0


class _Tokens(NamedTuple):
    ids: list[int]
    starts: NDArray[np.int64]  # characters, without gaps
    ends: NDArray[np.int64]


def encode_chats(
    tokenizer: Any, chats: Sequence[Example], *, loss_on: LossOn = "answer"
) -> list[list[Encoded] | str]:
    """Render and encode each chat, as one text or as one for each turn that is learnt; or what is wrong with it.

    The mask is True on the assistant's turns with their end marks: what the template marks with `{% generation %}`,
    else what it adds to the generation prompt. What stands behind the last learnt turn is left out.
    """
    made = [_texts_of(tokenizer, chat, loss_on) for chat in chats]
    tokens = iter(
        _encode(tokenizer, [text.text for texts in made if not isinstance(texts, str) for text in texts])
    )
    return [
        texts if isinstance(texts, str) else _encoded(texts, list(islice(tokens, len(texts)))) for texts in made
    ]


def _texts_of(tokenizer: Any, chat: Example, loss_on: LossOn) -> list[_Text] | str:
    """The chat up to each turn that is learnt, as the model sees it then; or what is wrong with it."""
    tools, parts = chat.tools, list[_Text]()
    try:
        template = chat_template_of(tokenizer, tools)
        turns = template.fitted(with_last_learnt(chat.messages) if loss_on == "last" else chat.messages)
        if loss_on == "all":
            if not all(turn.learnt for turn in chat.messages):
                return "weight and train of a turn are not used with data.loss_on all."
            text = template.render(turns, tools).text
            if turns[-1].role == "assistant":
                text, _ = template.closed(text, len(text), bool(turns[-1].tool_calls))
            return [_Text(template, text, ((0, len(text)),))]
        for index, turn in enumerate(turns):
            if turn.role == "assistant" and turn.learnt and not turn.in_prompt:
                part = _part(template, turns[: index + 1], tools, index + len(chat.messages) - len(turns))
                said = "".join(part.text[start:end] for start, end in part.spans)
                content = " ".join(turn.content.split())
                is_printed = template.mark.sub("", said).strip() or (
                    content and content in " ".join(said.split())
                )
                if is_printed or not (content or turn.tool_calls or turn.reasoning):
                    parts.append(part)
        return parts
    except RENDER_ERRORS as error:
        return f"the chat template refuses it: {error}"


def _part(template: ChatTemplate, turns: Messages, tools: Tools, number: int) -> _Text:
    """The chat up to a turn of the assistant, the last one, which is learnt; `number` is its index in the data."""
    text, marks = template.render(turns, tools)
    if len(turns) > 1:
        before, earlier = template.render(turns[:-1], tools, prompt=True)
        marks = marks[len(earlier) :]
        start, is_prompt = len(before), text.startswith(before)
        if not is_prompt:
            start, is_prompt = template.answer_start(turns, tools, text, before)
            if is_prompt:
                moved = len(before) - start
                text, start = before + text[start:], len(before)
                marks = tuple((first + moved, last + moved) for first, last in marks)
    else:  # no template takes a chat without turns
        start = text.find(template.generation_prompt)
        is_prompt = start >= 0
        start = (
            start + len(template.generation_prompt) if is_prompt else template.content_start(turns, tools, text)
        )
    spans = list(marks) or [(start, len(text))]
    closed, end = template.closed(text, spans[-1][1], bool(turns[-1].tool_calls))
    spans[-1] = (spans[-1][0], end)
    is_written, trailer, *_ = template.ending
    bare = len(closed.removesuffix(trailer)) if is_written else len(text)
    return _Text(template, closed, tuple(spans), start if is_prompt else None, number, min(end, bare))


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[_Tokens]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [_tokens(*pair) for pair in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def _tokens(ids: list[int], offsets: list[tuple[int, int]]) -> _Tokens:
    """Some tokenizers leave the spaces before a token out: they are its own here."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    ends = np.maximum.accumulate(ends)
    return _Tokens(list(ids), np.minimum(starts, np.append(0, ends)[: len(ends)]), ends)


def _encoded(texts: list[_Text], tokens: list[_Tokens]) -> list[Encoded]:
    """An example for each text, or for the last one alone if it begins with the tokens of the others."""
    seams = [_seam(text, own) for text, own in zip(texts, tokens, strict=True)]
    if len(texts) > 1 and not any(seams) and (whole := _whole(texts, tokens)):
        texts, tokens, seams = [whole], tokens[-1:], [None]
    made = []
    for text, own, seam in zip(texts, tokens, seams, strict=True):
        own = seam or own
        mask = np.zeros(len(own.ids), dtype=np.bool_)
        for start, end in text.spans:
            mask |= (own.ends > start) & (own.starts < end)
        made.append(Encoded(own.ids, mask.tolist(), turn=text.turn if len(texts) > 1 else None))
    return made


def _whole(texts: list[_Text], tokens: list[_Tokens]) -> _Text | None:
    """The last text with the spans of all, if it begins with the tokens of the others."""
    last, spans = texts[-1], list[tuple[int, int]]()
    for text, own in zip(texts[:-1], tokens, strict=False):
        index, end = int(np.searchsorted(own.starts, text.end)), text.end
        if not last.template.ending[0]:  # the mark of the turn that does follow
            mark = last.template.first_mark.match(last.text, end)
            end = mark.end() if mark else 0
        if not end or own.ids[:index] != tokens[-1].ids[:index]:
            return None
        spans += [*text.spans[:-1], (text.spans[-1][0], end)]
    return last._replace(spans=(*spans, *last.spans))


def _seam(text: _Text, tokens: _Tokens) -> _Tokens | None:
    """The tokens of a text whose prompt the model sees as a text of its own; None if they are so.

    A tokenizer may join the end of the prompt with the answer ("\\n" and "\\n"), but not over the last mark before it.
    """
    if (border := text.prompt) is None:
        return None
    index = int(np.searchsorted(tokens.ends, border, side="right"))
    mark = next((index for index in range(index - 1, -1, -1) if tokens.ids[index] in text.template.mark_ids), 0)
    begin = int(tokens.starts[mark]) if index else 0
    shown = _plain(text.template, text.text[begin:border])
    crosses = index < len(tokens.ids) and tokens.starts[index] < border
    if not crosses and tokens.ids[mark:index] == shown.ids:
        return None
    rest = int(np.searchsorted(tokens.starts, border, side="left"))
    end = int(tokens.starts[rest]) if rest < len(tokens.ids) else len(text.text)
    between = _inner_tokens(text.template, text.text[border:end])
    return _Tokens(
        tokens.ids[:mark] + shown.ids + between.ids + tokens.ids[rest:],
        np.concatenate(
            [tokens.starts[:mark], shown.starts + begin, between.starts + border, tokens.starts[rest:]]
        ),
        np.concatenate([tokens.ends[:mark], shown.ends + begin, between.ends + border, tokens.ends[rest:]]),
    )


@lru_cache(maxsize=256)
def _plain(template: ChatTemplate, text: str) -> _Tokens:
    """Tokens of a text alone; a generation prompt is the same in all chats."""
    return _encode(template.tokenizer, [text])[0]


def _inner_tokens(template: ChatTemplate, text: str) -> _Tokens:
    """Tokens of a text inside another: some tokenizers put a space before the first word of a text."""
    if not text:
        return _tokens([], [])
    line, inner = _plain(template, "\n"), _plain(template, "\n" + text)
    num = len(line.ids)
    if inner.ids[:num] != line.ids:
        return _plain(template, text)
    return _Tokens(inner.ids[num:], inner.starts[num:] - 1, inner.ends[num:] - 1)
