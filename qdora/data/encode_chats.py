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
from qdora.data.example import Example, Messages, Tools, Turn, with_last_learnt
from qdora.errors import UserError
from qdora.recipe.data_settings import LossOn

MAY_NOT_STOP = "the model may not stop"
"""Among the notes where the end of a turn does not stop the model."""
_REMOVE = "Fix: give a template that prints it with data.chat_template, or remove it from the data."


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of an example, and True where they are learnt: what the assistant writes, or the answer.

    Attributes:
        prefix, start: ids[prefix:start] is a prompt, whose front may be cut; empty in a chat.
        turn: Index of the only turn of a chat that is learnt, where the chat is one of several texts.
    """

    ids: list[int]
    mask: list[bool]
    prefix: int = 0
    start: int = 0
    turn: int | None = None


class _Text(NamedTuple):
    """A text, (start, end) of what is learnt in it, and the ends of the texts that the model sees before it answers."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    prompts: tuple[int, ...] = ()


class _Part(NamedTuple):
    """The chat up to one turn of the assistant. `rendered` is its text before an end mark was added."""

    text: _Text
    rendered: str
    turn: int


class _Tokens(NamedTuple):
    """Ids of a text, and the characters of each: from `starts` to `ends`, without gaps."""

    ids: list[int]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


def encode_chats(
    tokenizer: Any, chats: Sequence[Example], *, loss_on: LossOn = "answer", notes: set[str] | None = None
) -> list[list[Encoded] | str]:
    """Render and encode each chat, as one text or as one for each turn that is learnt.

    The mask is True on the assistant's turns with their end marks: what the template marks with `{% generation %}`,
    else what it adds to the generation prompt. Where a template marks the end of a turn by the beginning of the next
    one, that mark counts. What stands behind the last learnt turn is left out.

    Args:
        loss_on: "answer": all turns of the assistant that are `learnt`; "last": only its last turn; "all": every token.
        notes: Gets what the user should know of the template.
    Returns: For each chat one or several `Encoded`, none where nothing is learnt; or what is wrong with it.
    """
    notes = set() if notes is None else notes
    results: list[list[Encoded] | str] = []
    wholes: list[tuple[int, ChatTemplate, _Text]] = []
    parts: list[tuple[int, ChatTemplate, _Text, int | None]] = []
    for number, chat in enumerate(chats):
        template = chat_template_of(tokenizer, chat.tools)
        results.append([])
        whole, own = None, list[_Part]()
        try:
            whole, own = _texts_of(template, chat, loss_on, notes)
        except UserError as error:
            results[number] = str(error)
        except RENDER_ERRORS as error:
            results[number] = f"the chat template refuses it: {error}"
        wholes += [] if whole is None else [(number, template, whole)]
        parts += [(number, template, part.text, part.turn if len(own) > 1 else None) for part in own]
    for (number, template, text), tokens in zip(wholes, _encode(tokenizer, [each[2] for each in wholes]), strict=True):
        if _is_clean(template, text, tokens):
            results[number] = [_masked(template, text, tokens, notes)]
    parts = [each for each in parts if not results[each[0]]]
    for (number, template, text, turn), tokens in zip(
        parts, _encode(tokenizer, [each[2] for each in parts]), strict=True
    ):
        for border in text.prompts:
            tokens = _seam(template, tokens, text.text, border) or tokens
        encoded = results[number]
        assert isinstance(encoded, list)
        encoded.append(_masked(template, text, tokens, notes, turn))
    return results


def _texts_of(
    template: ChatTemplate, chat: Example, loss_on: LossOn, notes: set[str]
) -> tuple[_Text | None, list[_Part]]:
    """A chat as one text, where one shows every turn as the model sees it, and as a text for each turn."""
    tools, turns = chat.tools, template.fitted(with_last_learnt(chat.messages) if loss_on == "last" else chat.messages)
    if chat.messages[0].role == "system" and not template.takes_system:
        notes.add("the chat template takes no system prompt: it is put before the first turn of the user.")
    if loss_on == "all":
        out = next((index for index, turn in enumerate(chat.messages) if not turn.learnt), None)
        if out is not None:
            raise UserError(
                f"messages[{out}]: weight and train are not used with data.loss_on all. Fix: set it to answer."
            )
        text = template.render(turns, tools).text
        if turns[-1].role == "assistant":
            text, _ = template.closed(text, len(text), bool(turns[-1].tool_calls))
        return _Text(text, ((0, len(text)),)), []
    parts = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and turn.learnt and not turn.in_prompt:
            part = _part(template, turns, tools, index, notes)
            if _says(template, part, turn, notes):
                parts.append(part)
    if not parts:
        return None, []
    shown = parts[-1].rendered
    # Not of the assistant: many templates drop its earlier thoughts by design
    before = [turn for turn in turns[: parts[-1].turn] if turn.role != "assistant"]
    lost = {f"turns of role {turn.role}" for turn in before if _lacks(shown, turn.content)}
    functions = (tool["function"] for tool in tools)  # a call has the name, too
    lost |= {"tools" for each in functions if _lacks(shown, str(each.get("description") or each["name"]))}
    notes.update(f"the chat template does not print {what}. {_REMOVE}" for what in lost)
    moved = len(chat.messages) - len(turns)
    return _whole(template, parts), [part._replace(turn=part.turn + moved) for part in parts]


def _part(template: ChatTemplate, turns: Messages, tools: Tools, index: int, notes: set[str]) -> _Part:
    """The chat up to a turn of the assistant, which is learnt."""
    text, marks = template.render(turns[: index + 1], tools)
    if index:
        before = template.render(turns[:index], tools, prompt=True)
        marks = marks[len(before.marks) :]
        start, is_prompt = shared_length(before.text, text), text.startswith(before.text)
        if not is_prompt and not text.startswith(template.render(turns[:index], tools).text):
            # With the answer the template shows the turns before it otherwise than it did when the model answered.
            begin, is_prompt = template.answer_start(turns[: index + 1], tools, text, before.text)
            if is_prompt:
                start = len(before.text)
                text = before.text + text[begin:]
                marks = tuple((first + start - begin, last + start - begin) for first, last in marks)
            else:
                start = begin
        elif not is_prompt:
            # The "<think>" of the prompt may share its first letters with an answer such as "<b>".
            start = min(start, template.content_start(turns[: index + 1], tools, text))
    else:  # no template takes a chat without turns
        begin = text.find(template.generation_prompt)
        is_prompt = begin >= 0
        start = begin + len(template.generation_prompt) if is_prompt else template.content_start(turns[:1], tools, text)
    if not is_prompt:
        options = ", ".join(template_options(template.text))
        notes.add(
            f"before an answer the chat template writes {template.generation_prompt!r}, but answers in the training "
            "data do not begin so. A server will give the model another prompt than it was trained with. Fix: give the "
            "turns reasoning_content where it prints that, "
            f"{f'set data.template_kwargs (it reads {options}), ' if options else ''}or set data.chat_template to a "
            "template without this difference."
        )
    spans = list(marks) or [(start, len(text))]
    closed, end = template.closed(text, spans[-1][1], bool(turns[index].tool_calls))
    spans[-1] = (spans[-1][0], end)
    return _Part(_Text(closed, tuple(spans), (start,) if is_prompt else ()), text, index)


def _says(template: ChatTemplate, part: _Part, turn: Turn, notes: set[str]) -> bool:
    """Whether a part learns anything of what its turn says. Notes what the template leaves out of the turn."""
    said = "".join(part.text.text[start:end] for start, end in part.text.spans)
    if any(not _has(said, piece) for piece in re.split("</?think>", turn.content)):
        what = "text beside calls of tools" if turn.tool_calls else "the content of an answer"
        if "</think>" in turn.content:
            what = "reasoning that is in the content, before </think>"
        notes.add(f"the chat template leaves out or changes {what}: the model does not learn it as it is. {_REMOVE}")
    lost = ["reasoning_content"] if _lacks(said, turn.reasoning) else []
    lost += ["tool_calls"] if any(_lacks(said, str(call["function"]["name"])) for call in turn.tool_calls) else []
    notes.update(f"the chat template does not print {what}. {_REMOVE}" for what in lost)
    content = turn.content.strip()
    if template.mark.sub("", said).strip() or (content and _has(said, content)):
        return True
    return not content and not turn.tool_calls and not turn.reasoning


def _has(text: str, piece: str) -> bool:
    """Whether the words of a piece are in a text one after the other, whatever the white space between them."""
    return " ".join(piece.split()) in " ".join(text.split())


def _lacks(text: str, piece: str) -> bool:
    """Whether the longest word of a piece is not in a text: it may be quoted there, or cut into lines."""
    return max(re.findall(r"\w+", piece), key=len, default="") not in text


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
    return _Text(last.text, (*spans, *last.spans), prompts) if spans else None


def _encode(tokenizer: Any, texts: Sequence[_Text]) -> list[_Tokens]:
    """Tokens of each text, no special tokens added; those written out in the text are recognised."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if not tokenizer.is_fast:
        return [_divided(text, lambda part: tokenizer(part, **options)["input_ids"]) for text in texts]
    encoded = tokenizer([each.text for each in texts], return_offsets_mapping=True, **options)
    return [_tokens(*pair) for pair in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


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
    indices = np.searchsorted(tokens.ends, inner, side="right").tolist()
    if any(tokens.starts[index] < end for index, end in zip(indices, inner, strict=True)):
        return False
    return all(_seam(template, tokens, text.text, border) is None for border in text.prompts)


def _seam(template: ChatTemplate, tokens: _Tokens, text: str, border: int) -> _Tokens | None:
    """The tokens of a text whose first `border` characters the model sees as a text of their own; None if they are so.

    A tokenizer may join the end of the prompt with the beginning of the answer ("\\n" and "\\n" to one token), which
    the model never sees. Only what follows the last mark of the prompt can differ.
    """
    index = int(np.searchsorted(tokens.ends, border, side="right"))
    marks = template.mark_ids if template.tokenizer.is_fast else ()  # else the place of a mark is not known
    mark = next((index for index in range(index - 1, -1, -1) if tokens.ids[index] in marks), 0)
    begin = int(tokens.starts[mark]) if index else 0
    shown = _plain(template, text[begin:border])
    crosses = index < len(tokens.ids) and tokens.starts[index] < border
    if not crosses and tokens.ids[mark:index] == shown.ids:
        return None
    rest = int(np.searchsorted(tokens.starts, border, side="left"))
    between = _inner_tokens(template, text[border : int(tokens.starts[rest]) if rest < len(tokens.ids) else len(text)])
    return _Tokens(
        tokens.ids[:mark] + shown.ids + between.ids + tokens.ids[rest:],
        np.concatenate([tokens.starts[:mark], shown.starts + begin, between.starts + border, tokens.starts[rest:]]),
        np.concatenate([tokens.ends[:mark], shown.ends + begin, between.ends + border, tokens.ends[rest:]]),
    )


@lru_cache(maxsize=256)
def _plain(template: ChatTemplate, text: str) -> _Tokens:
    """Tokens of a text alone. Kept, since a generation prompt is the same in all chats."""
    return _encode(template.tokenizer, [_Text(text)])[0]


def _inner_tokens(template: ChatTemplate, text: str) -> _Tokens:
    """Tokens of a text that stands inside another: some tokenizers put a space before the first word of a text."""
    if not text:
        return _tokens([], [])
    line, inner = _plain(template, "\n"), _plain(template, "\n" + text)
    num = len(line.ids)
    if inner.ids[:num] != line.ids:
        return _plain(template, text)
    return _Tokens(inner.ids[num:], inner.starts[num:] - 1, inner.ends[num:] - 1)


def _masked(template: ChatTemplate, text: _Text, tokens: _Tokens, notes: set[str], turn: int | None = None) -> Encoded:
    """Ids and mask. A token with a character of the answer is the answer's. Notes an end that stops no model."""
    mask = np.zeros(len(tokens.ids), dtype=np.bool_)
    for start, end in text.spans:
        mask |= (tokens.ends > start) & (tokens.starts < end)
    last = [tokens.ids[index] for index in np.flatnonzero(mask & (tokens.ends > text.spans[-1][0])).tolist()]
    stops = template.settings.stop_ids
    if stops is not None and stops.isdisjoint(last):
        mark = next((id for id in reversed(last) if id in template.mark_ids), None)
        if mark is None:
            notes.add(
                f"the chat template ends a turn with no token of its own: {MAY_NOT_STOP}. Fix: give a template that "
                "writes the end-of-sequence token with data.chat_template."
            )
        else:
            notes.add(
                f"a turn ends with {template.tokenizer.convert_ids_to_tokens(mark)!r} ({mark}), which is not among the "
                f"model's stop tokens ({', '.join(map(str, sorted(stops))) or 'none'}): {MAY_NOT_STOP}. Fix: add "
                f"{mark} to eos_token_id in a copy of the model's generation_config.json, or choose with "
                "model.tokenizer the tokenizer whose end of sequence it is."
            )
    return Encoded(tokens.ids, mask.tolist(), turn=turn)
