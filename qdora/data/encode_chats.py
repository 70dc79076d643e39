"""Chats -> token ids, and which of them the assistant writes: each turn as the model sees it when it answers.

The text before a turn is the chat up to it with the generation prompt; the turn is what the template adds to that, with
its end mark. One text holds all turns of a chat where it shows each of them so. A template that rewrites earlier turns
(many drop their reasoning) gives a text for each turn instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qdora.data.chat_template import RENDER_ERRORS, ChatTemplate, chat_template_of, shared_length, template_options
from qdora.data.example import Example, Messages, Turn, with_last_learnt
from qdora.recipe.data_settings import LossOn

MAY_NOT_STOP = "the model may not stop"
"""Among the notes where the end of a turn does not stop the model."""
_REMOVE = "Fix: give a template that prints it with data.chat_template, or remove it from the data."
_SHORT = 200
"""Characters of an end of a prompt whose tokens are kept: a generation prompt, the same in all chats."""


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Tokens of a chat, or of the chat up to one turn.

    Attributes:
        ids: Token ids; beginning and end marks come from the template alone.
        mask: True where the assistant writes the token.
        turn: Index of the one turn that is learnt; None where the chat is one text.
    """

    ids: list[int]
    mask: list[bool]
    turn: int | None = None


class _Text(NamedTuple):
    """A text to encode.

    Attributes:
        spans: (start, end) of what is learnt in it.
        prompts: Ends of the texts that the model sees before it answers.
        last: Where the last turn that is learnt begins.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    last: int


class _Part(NamedTuple):
    """The chat up to one turn of the assistant. `rendered` is its text before an end mark was added."""

    text: _Text
    rendered: str
    turn: int


class _Chat(NamedTuple):
    """A chat as one text where that shows every turn as the model sees it, and as a text for each turn."""

    template: ChatTemplate
    whole: _Text | None
    parts: list[_Part]


class _Tokens(NamedTuple):
    """Ids of a text, and the characters of each: from `starts` to `ends`, without gaps."""

    ids: list[int]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


def encode_chats(
    tokenizer: Any, chats: Sequence[Example], *, loss_on: LossOn = "answer", notes: set[str] | None = None
) -> list[list[EncodedChat] | str]:
    """Render and encode each chat, as one text or as one for each turn that is learnt.

    The mask is True on the assistant's turns with their end marks: what the template marks with `{% generation %}`,
    else what it adds to the generation prompt. Where a template marks the end of a turn by the beginning of the next
    one, that mark counts. What stands behind the last learnt turn is left out.

    Args:
        tokenizer: With a chat template.
        loss_on: "answer": all turns of the assistant that are `learnt`; "last": only its last turn; "all": every token.
        notes: Gets what the user should know of the template.
    Returns: For each chat one or several `EncodedChat`, none where nothing is learnt; or what is wrong with it.
    """
    notes = set() if notes is None else notes
    planned = [_plan(tokenizer, chat, loss_on, notes) for chat in chats]
    results: list[list[EncodedChat] | str] = [chat if isinstance(chat, str) else [] for chat in planned]
    wholes = [
        (number, chat.template, chat.whole)
        for number, chat in enumerate(planned)
        if isinstance(chat, _Chat) and chat.whole is not None
    ]
    for (number, template, whole), tokens in zip(wholes, _encode(tokenizer, [each[2] for each in wholes]), strict=True):
        if _is_clean(template, whole, tokens):
            results[number] = [_masked(template, whole, tokens, notes)]
    left = [
        (number, chat.template, part.text, part.turn if len(chat.parts) > 1 else None)
        for number, chat in enumerate(planned)
        if isinstance(chat, _Chat) and not results[number]
        for part in chat.parts
    ]
    for (number, template, text, turn), tokens in zip(
        left, _encode(tokenizer, [each[2] for each in left]), strict=True
    ):
        for border in text.prompts:
            tokens = _seam(template, tokens, text.text, border) or tokens
        found = results[number]
        assert isinstance(found, list)
        found.append(_masked(template, text, tokens, notes, turn))
    return results


def _plan(tokenizer: Any, chat: Example, loss_on: LossOn, notes: set[str]) -> _Chat | str:
    """The texts of a chat, or what is wrong with it."""
    template = chat_template_of(tokenizer, chat.tools)
    turns = template.fitted(with_last_learnt(chat.messages) if loss_on == "last" else chat.messages)
    if chat.messages[0].role == "system" and not template.takes_system:
        notes.add("the chat template takes no system prompt: it is put before the first turn of the user.")
    is_learnt = [turn.role == "assistant" and turn.learnt and not turn.in_prompt for turn in turns]
    learnt = [index for index, learns in enumerate(is_learnt) if learns]
    out = next((index for index, turn in enumerate(chat.messages) if not turn.learnt), None)
    if loss_on == "all" and out is not None:
        return f"messages[{out}]: weight and train are not used with data.loss_on all. Fix: set it to answer."
    _note_lost(template, chat, notes)
    try:
        if loss_on == "all":
            return _Chat(template, _everything(template, chat, turns), [])
        made = (_part(template, chat, turns, index, notes) for index in learnt)
        parts = [part for part in made if _says(template, part, turns[part.turn], notes)]
    except RENDER_ERRORS as error:
        return f"the chat template refuses it: {error}"
    moved = len(chat.messages) - len(turns)
    return _Chat(
        template, _whole(template, parts) if parts else None, [part._replace(turn=part.turn + moved) for part in parts]
    )


def _everything(template: ChatTemplate, chat: Example, turns: Messages) -> _Text:
    """The whole text, all of it learnt."""
    text = template.render(turns, chat.tools).text
    if turns[-1].role == "assistant":
        text, _ = template.closed(text, len(text), bool(turns[-1].tool_calls))
    return _Text(text, ((0, len(text)),), (), 0)


def _part(template: ChatTemplate, chat: Example, turns: Messages, index: int, notes: set[str]) -> _Part:
    """The chat up to a turn of the assistant, which is learnt."""
    text, marks = template.render(turns[: index + 1], chat.tools)
    if index:
        before = template.render(turns[:index], chat.tools, prompt=True)
        marks = marks[len(before.marks) :]
        start, is_prompt = shared_length(before.text, text), text.startswith(before.text)
        if not is_prompt and not text.startswith(template.render(turns[:index], chat.tools).text):
            # With the answer the template shows the turns before it otherwise than it did when the model answered.
            begin, is_prompt = template.answer_start(turns[: index + 1], chat.tools, text, before.text)
            if is_prompt:
                start = len(before.text)
                text = before.text + text[begin:]
                marks = tuple((first + start - begin, last + start - begin) for first, last in marks)
            else:
                start = begin
        elif not is_prompt:
            # The "<think>" of the prompt may share its first letters with an answer such as "<b>".
            start = min(start, template.content_start(turns[: index + 1], chat.tools, text))
    else:  # no template takes a chat without turns
        begin = text.find(template.generation_prompt)
        is_prompt = begin >= 0
        start = begin + len(template.generation_prompt)
        if not is_prompt:
            start = template.content_start(turns[:1], chat.tools, text)
    if not is_prompt:
        notes.add(_unlike_prompt(template))
    spans = list(marks) or [(start, len(text))]
    closed, end = template.closed(text, spans[-1][1], bool(turns[index].tool_calls))
    spans[-1] = (spans[-1][0], end)
    return _Part(_Text(closed, tuple(spans), (start,) if is_prompt else (), spans[0][0]), text, index)


def _unlike_prompt(template: ChatTemplate) -> str:
    """A note: answers do not go on from the generation prompt."""
    options = ", ".join(template_options(template.text))
    ways = [
        "give the turns reasoning_content" if "reasoning_content" not in template.unprinted else "",
        f"set data.template_kwargs (it reads {options})" if options else "",
        "set data.chat_template to a template without this difference",
    ]
    return (
        f"before an answer the chat template writes {template.generation_prompt!r}, but answers in the training data "
        "do not begin so. A server will give the model another prompt than it was trained with. Fix: "
        f"{', or '.join(way for way in ways if way)}."
    )


def _note_lost(template: ChatTemplate, chat: Example, notes: set[str]) -> None:
    """Note what the chat has and the template does not print."""
    roles = [turn.role for turn in chat.messages]
    num_leading = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    has = {
        "reasoning_content": any(turn.reasoning for turn in chat.messages),
        "tool_calls": any(turn.tool_calls for turn in chat.messages),
        "turns of role tool": any(turn.role == "tool" for turn in chat.messages),
        "tools": bool(chat.tools),
        "the tool_calls of a turn but the first": "tool_calls" not in template.unprinted
        and any(len(turn.tool_calls) > 1 for turn in chat.messages),
        "a second system turn": num_leading > 1,
        "system turns after other turns": "system" in roles[num_leading:],
    }
    notes.update(
        f"the chat template does not print {what}. {_REMOVE}"
        for what, is_there in has.items()
        if is_there and what in template.unprinted
    )


def _says(template: ChatTemplate, part: _Part, turn: Turn, notes: set[str]) -> bool:
    """Whether a part learns anything of what its turn says. Notes content that the template leaves out."""
    said = "".join(part.text.text[start:end] for start, end in part.text.spans)
    if any(not _has(said, piece) for piece in re.split("</?think>", turn.content)):
        what = "text beside calls of tools" if turn.tool_calls else "the content of an answer"
        if "</think>" in turn.content:
            what = "reasoning that is in the content, before </think>"
        notes.add(f"the chat template leaves out or changes {what}: the model does not learn it as it is. {_REMOVE}")
    content = turn.content.strip()
    if template.without_added_tokens(said).strip() or (content and _has(said, content)):
        return True
    return not content and not turn.tool_calls and not turn.reasoning


def _has(text: str, piece: str) -> bool:
    """Whether the words of a piece are in a text one after the other, whatever the white space between them."""
    return " ".join(piece.split()) in " ".join(text.split())


def _whole(template: ChatTemplate, parts: list[_Part]) -> _Text | None:
    """The text of the last part with the spans of all; None where it shows an earlier turn otherwise, or has no other.

    It is not made for a single turn, whose text is that of the only part.
    """
    last = parts[-1].text
    spans: list[tuple[int, int]] = []
    for part in parts[:-1]:
        end = template.end_in(last.text, part.rendered, part.text.spans[-1][1])
        if end is None:
            return None
        cut = [(start, stop) for start, stop in part.text.spans if start < end]
        spans += [*cut[:-1], (cut[-1][0], end)]
    prompts = tuple(border for part in parts for border in part.text.prompts)
    return _Text(last.text, (*spans, *last.spans), prompts, last.last) if spans else None


def _encode(tokenizer: Any, texts: Sequence[_Text]) -> list[_Tokens]:
    """Tokens of each text, no special tokens added; those written out in the text are recognised."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if not tokenizer.is_fast:
        return [_divided(text, lambda part: tokenizer(part, **options)["input_ids"]) for text in texts]
    found = tokenizer([each.text for each in texts], return_offsets_mapping=True, **options)
    return [_tokens(*pair) for pair in zip(found["input_ids"], found["offset_mapping"], strict=True)]


def _divided(text: _Text, ids_of: Callable[[str], list[int]]) -> _Tokens:
    """Tokens from a tokenizer that does not say where they stand: found for the borders in the text alone."""
    ids = list(ids_of(text.text))
    offsets: list[tuple[int, int]] = []
    borders = {len(text.text), *text.prompts, *(border for span in text.spans for border in span)} - {0}
    begin = 0
    for border in sorted(borders):
        prefix = list(ids_of(text.text[:border]))
        offsets += [(begin, border)] * (shared_length(prefix, ids) - len(offsets))
        begin = border
    return _tokens(ids, offsets)


def _tokens(ids: list[int], offsets: list[tuple[int, int]]) -> _Tokens:
    """Tokens with their characters. Some tokenizers leave the spaces before a token out: they are its own here."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    ends = np.maximum.accumulate(ends)
    before = np.concatenate([np.zeros(1, dtype=np.int64), ends])[: len(ends)]
    return _Tokens(list(ids), np.minimum(starts, before), ends)


def _is_clean(template: ChatTemplate, text: _Text, tokens: _Tokens) -> bool:
    """Whether the tokens of a whole chat are those that the model sees before each turn, and end where a turn ends."""
    inner = [end for _, end in text.spans if end < len(text.text)]
    places = np.searchsorted(tokens.ends, inner, side="right").tolist()
    if any(tokens.starts[place] < end for place, end in zip(places, inner, strict=True)):
        return False
    return all(_seam(template, tokens, text.text, border) is None for border in text.prompts)


def _seam(template: ChatTemplate, tokens: _Tokens, text: str, border: int) -> _Tokens | None:
    """The tokens of a text whose first `border` characters the model sees as a text of their own; None if they are so.

    A tokenizer may join the end of the prompt with the beginning of the answer ("\\n" and "\\n" to one token), which
    the model never sees. Only what follows the last mark of the prompt can differ.
    """
    place = int(np.searchsorted(tokens.ends, border, side="right"))
    marks = template.mark_ids if template.tokenizer.is_fast else ()  # else the place of a mark is not known
    mark = next((index for index in range(place - 1, -1, -1) if tokens.ids[index] in marks), 0)
    begin = int(tokens.starts[mark]) if place else 0
    shown = _end_of_prompt(template, text[begin:border])
    crosses = place < len(tokens.ids) and tokens.starts[place] < border
    if not crosses and tokens.ids[mark:place] == shown.ids:
        return None
    rest = int(np.searchsorted(tokens.starts, border, side="left"))
    resumed = int(tokens.starts[rest]) if rest < len(tokens.ids) else len(text)
    between = _inner_tokens(template, text[border:resumed])
    return _Tokens(
        tokens.ids[:mark] + shown.ids + between.ids + tokens.ids[rest:],
        np.concatenate([tokens.starts[:mark], shown.starts + begin, between.starts + border, tokens.starts[rest:]]),
        np.concatenate([tokens.ends[:mark], shown.ends + begin, between.ends + border, tokens.ends[rest:]]),
    )


def _end_of_prompt(template: ChatTemplate, text: str) -> _Tokens:
    return _kept_tokens(template, text) if len(text) <= _SHORT else _plain(template, text)


@lru_cache(maxsize=256)
def _kept_tokens(template: ChatTemplate, text: str) -> _Tokens:
    return _plain(template, text)


def _plain(template: ChatTemplate, text: str) -> _Tokens:
    return _encode(template.tokenizer, [_Text(text, (), (), 0)])[0]


def _inner_tokens(template: ChatTemplate, text: str) -> _Tokens:
    """Tokens of a text that stands inside another: some tokenizers put a space before the first word of a text."""
    if not text:
        return _tokens([], [])
    line, inner = _plain(template, "\n"), _plain(template, "\n" + text)
    if inner.ids[: len(line.ids)] != line.ids:
        return _plain(template, text)
    num = len(line.ids)
    return _Tokens(inner.ids[num:], inner.starts[num:] - 1, inner.ends[num:] - 1)


def _masked(
    template: ChatTemplate, text: _Text, tokens: _Tokens, notes: set[str], turn: int | None = None
) -> EncodedChat:
    """Ids and mask. A token with a character of the answer is the answer's."""
    mask = np.zeros(len(tokens.ids), dtype=np.bool_)
    for start, end in text.spans:
        mask |= (tokens.ends > start) & (tokens.starts < end)
    last = np.flatnonzero(mask & (tokens.ends > text.last)).tolist()
    _check_end(template, [tokens.ids[index] for index in last], notes)
    return EncodedChat(tokens.ids, mask.tolist(), turn)


def _check_end(template: ChatTemplate, learnt: list[int], notes: set[str]) -> None:
    """Note where no token of a turn stops the model."""
    stops = template.settings.stop_ids
    if stops is None or not stops.isdisjoint(learnt):
        return
    mark = next((id for id in reversed(learnt) if id in template.mark_ids), None)
    if mark is None:
        notes.add(
            f"the chat template ends a turn with no token of its own: {MAY_NOT_STOP}. Fix: give a template that "
            "writes the end-of-sequence token with data.chat_template."
        )
        return
    name = template.tokenizer.convert_ids_to_tokens(mark)
    notes.add(
        f"a turn ends with {name!r} ({mark}), which is not among the model's stop tokens "
        f"({', '.join(map(str, sorted(stops))) or 'none'}): {MAY_NOT_STOP}. Fix: add {mark} to eos_token_id in "
        "the generation_config.json of the model (of a Hub model: in a copy in a directory), or choose with "
        "model.tokenizer the tokenizer whose end of sequence it is."
    )
