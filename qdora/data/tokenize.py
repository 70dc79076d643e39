"""Prompts, answers and chats -> token ids, and which of them are learnt: one rule for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray

from qdora.data.example import Example, Messages
from qdora.data.split_text import chunks, text_parts
from qdora.errors import UserError


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Token ids of each prompt + answer, encoded as one text, and where the answer starts in them.

    As in lm-evaluation-harness, spaces at the end of the prompt go to the answer first, because tokenizers join a space
    to the word behind it. The answer starts at the first token that differs from those of the prompt alone, so it has
    every character of the answer even where a token spans the border. The ids begin with the tokenizer's
    beginning-of-sequence token if it adds one by default; they have no end-of-sequence token.

    Args:
        pairs: (prompt, answer); the prompt may be empty, the answer starts with its own space.
    Returns: (ids, start) of each: ids[start:] belongs to the answer. start is 0 for an empty prompt without
        beginning-of-sequence token: nothing predicts the first token then.
    """
    prefix = special_prefix(tokenizer)
    whole = encode_batch(tokenizer, [prompt + answer for prompt, answer in pairs])
    alone = encode_batch(tokenizer, [prompt.rstrip(" ") for prompt, _ in pairs])
    both = zip(whole, alone, strict=True)
    return [(prefix + ids, len(prefix) + _shared_length(ids, prompt_ids)) for ids, prompt_ids in both]


def require_chat_template(tokenizer: Any, name: str) -> None:
    """Raise a UserError if the tokenizer cannot render the chats of source `name`."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer_name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(
            f"{name}: holds chats, but the tokenizer ({tokenizer_name}) has no chat template. Fix: set model.tokenizer "
            "to one that has it (the instruct version of the model), or give the data as prompt and completion."
        )


def set_chat_date(tokenizer: Any, day: str) -> None:
    """Render chats as on this day (YYYY-MM-DD) from now on, in templates that print the date (`strftime_now`).

    Only in this process: the files of a saved tokenizer do not change.
    """
    tokenizer.qdora_chat_date = date.fromisoformat(day)


def chat_date(tokenizer: Any) -> date | None:
    """The day that `set_chat_date` gave; None: today."""
    found: date | None = getattr(tokenizer, "qdora_chat_date", None)
    return found


# transformers lets no function of ours into a template, so a macro takes the place of its own. The line end is dropped.
_CLOCK = (
    "{% macro strftime_now(format) %}{% set text = namespace(of=format) %}"
    "{% for part, value in qdora_day.items() %}{% set text.of = text.of.replace(part, value) %}{% endfor %}"
    "{{ text.of }}{% endmacro %}\n"
)
_DATE_PARTS = [*(f"%-{part}" for part in "dmyjHIMS"), *(f"%{part}" for part in "aAbBcdDeFGHIjmMpSuUVwWxXyYzZ%")]


@lru_cache(maxsize=4)
def _parts_of(day: date) -> dict[str, str]:
    """Each part of a date's format -> its text on this day."""
    return {part: day.strftime(part) for part in _DATE_PARTS}


def chat_text(tokenizer: Any, turns: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """The text of a chat in the tokenizer's template, on the day of `set_chat_date`, else today."""
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    day, template = chat_date(tokenizer), tokenizer.get_chat_template()
    if day is not None and "strftime_now" in template:
        options |= {"chat_template": _CLOCK + template, "qdora_day": _parts_of(day)}
    return str(tokenizer.apply_chat_template(turns, **options))


def encode_chats(
    tokenizer: Any, chats: Sequence[Messages], *, masked: bool = True
) -> list[tuple[list[int], list[bool]] | str]:
    """Render and encode each chat; (ids, mask), or what is wrong with it.

    The mask is True on each assistant turn: what the template adds from the end of the generation prompt before the
    turn to the end of the turn, its end mark included. The text up to any turn must begin the text of the whole chat. A
    template that rewrites earlier turns (some strip their reasoning) is refused, not masked by a guess.

    Args:
        tokenizer: With a chat template; beginning and end marks come from the template alone.
        masked: False takes any template; the mask is then True everywhere.
    """
    rendered = [_render(tokenizer, chat, masked) for chat in chats]
    texts = [text for parts in rendered if not isinstance(parts, str) for text in parts]
    encoded = iter(encode_batch(tokenizer, texts))
    results: list[tuple[list[int], list[bool]] | str] = []
    for parts in rendered:
        if isinstance(parts, str):
            results.append(parts)
            continue
        ids, *borders = [next(encoded) for _ in parts]
        mask = [not masked] * len(ids)
        for before, after in zip(borders[::2], borders[1::2], strict=True):
            start, end = _shared_length(ids, before), _shared_length(ids, after)
            mask[start:end] = [True] * (end - start)
        results.append((ids, mask))
    return results


def _render(tokenizer: Any, chat: Messages, masked: bool) -> list[str] | str:
    """[whole text, text before the first assistant turn, text after it, before the second, ...], or a fault."""
    turns = [{"role": role, "content": content} for role, content in chat]
    try:
        whole = chat_text(tokenizer, turns)
        parts = [whole]
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant" or not masked:
                continue
            before = chat_text(tokenizer, turns[:index], add_generation_prompt=True)
            after = chat_text(tokenizer, turns[: index + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                return (
                    f"messages[{index}]: the chat template renders this turn differently inside the whole chat, so "
                    "the assistant's tokens cannot be found. Fix: end each chat at the turn to learn, or set "
                    "data.loss_on: all."
                )
            parts += [before, after]
    except jinja2.TemplateError as error:
        return f"the chat template refuses it: {error}"
    return parts


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text by default, mostly one beginning-of-sequence token.

    Found by encoding the empty text, since the attributes that should say so (add_bos_token) are missing or wrong in
    many tokenizers. An end-of-sequence token behind the text is not part of it.
    """
    ids = list(tokenizer("", verbose=False)["input_ids"])
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    # OPT begins every text with a token that is its beginning and its end of sequence in one
    if ids and ids[-1] == eos and (len(ids) > 1 or eos != bos):
        ids.pop()
    return ids


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, no special tokens added (those written out in the text are recognised)."""
    if not texts:
        return []
    # verbose=False: no warning that a text is longer than the model's context, we check lengths ourselves
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal ids at the start of both."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    return next(position for position in range(limit) if first[position] != second[position])


LossOn = Literal["answer", "all"]
TooLong = Literal["error", "truncate", "drop", "split"]
_BATCH, _BATCH_CHARACTERS = 1024, 1 << 21
"""Texts per call of the tokenizer, and characters from which there are no more of them: enough for its threads, few
enough for memory."""
_EXCESSIVE = 1 << 20
"""Characters of a text from which it is shortened before it is encoded."""
_SHOWN = 3
"""Faulty chats that are named; the rest is counted."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """The token ids of an example, and which of them are learnt.

    Attributes:
        input_ids: (length,) int32, with the tokenizer's beginning-of-sequence token if it adds one.
        loss_mask: (length,) bool, True where the token is a label: it is predicted from those before it. The first is
            always False.
    """

    task: str
    id: str
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class TokenizedSet:
    """The tokenised examples of one source, in their old order; how many were cut to `max_length`, or left out."""

    name: str
    examples: tuple[TokenizedExample, ...]
    num_truncated: int = 0
    num_dropped: int = 0
    unused: tuple[str, ...] = ()
    """Columns of the source that its format does not read."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(map(len, self.examples))

    @property
    def task_names(self) -> list[str]:
        """Tasks of the examples, each once."""
        return list(dict.fromkeys(example.task for example in self.examples))


def tokenize_all(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    name: str,
    max_length: int,
    loss_on: LossOn = "answer",
    too_long: TooLong = "error",
) -> TokenizedSet:
    """Tokenise the examples of a source.

    The tokenizer's end-of-sequence token follows an answer and is learnt with it, for multiple choice too: a model that
    writes must know where the answer ends. (Evaluation scores the choices without it.) A chat has the end marks of its
    template instead.

    Args:
        max_length: Most tokens of an example, special tokens included.
        loss_on: "answer" learns the answer's tokens (a chat: the assistant's turns), "all" the prompt's as well.
        too_long: What happens to longer ones. "error": one error with their number. "truncate": cut the front of the
            prompt, then the end of the answer (of a chat its end), and drop an example that has no token left to learn.
            "drop": leave them out. "split": plain text becomes several examples (see `chunks`), others are an error.
    Raises: UserError if examples are too long or have no token to learn, a chat does not fit the chat template or there
        is no template, or no example is left; all faults at once.
    """
    tally = ExampleTally(name, max_length, too_long)
    done: list[TokenizedExample] = []
    faults: list[str] = []
    try:
        for batch in _batches(examples):
            found = [each for several in tally.add(batch, tokenizer, loss_on) for each, _ in several]
            done += [each for each in found if isinstance(each, TokenizedExample)]
    except UserError as error:  # faulty rows, known after the last; or no example can be encoded at all
        faults += error.faults
    faults += tally.faults(len(examples))
    if not (done or faults):
        faults = [f"{name}: none of {len(examples)} examples is left. Fix: raise data.max_length ({max_length})."]
    if faults:
        raise UserError(*faults)
    return TokenizedSet(name, tuple(done), tally.num_truncated, tally.num_dropped)


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch, num_characters = list[Example](), 0
    for example in examples:
        batch.append(example)
        num_characters += len(example.prompt) + len(example.answer)
        if len(batch) == _BATCH or num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


Sorted = tuple[TokenizedExample | str | None, bool]
"""(tokenised, or what is wrong with it, or None where it is dropped; whether it was too long)."""


@dataclass
class ExampleTally:
    """Counts what happens to the examples of a source, in the order in which they are added."""

    name: str
    max_length: int
    too_long: TooLong
    num_truncated: int = 0
    num_dropped: int = 0
    longest: int = 0
    too_long_ids: list[str] = field(default_factory=list)
    unlearnable_ids: list[str] = field(default_factory=list)
    chat_faults: list[str] = field(default_factory=list)

    def add(self, examples: Sequence[Example], tokenizer: Any, loss_on: LossOn) -> list[list[Sorted]]:
        """What became of each; a list of one but for text that is split."""
        if self.too_long != "split":
            examples = [_without_excess(example, self.max_length, tokenizer) for example in examples]
        encoded = _encode(examples, tokenizer, self.name, loss_on)
        return [self._split_or_sort(*pair) for pair in zip(examples, encoded, strict=True)]

    def _split_or_sort(self, example: Example, encoded: _Encoded | str) -> list[Sorted]:
        is_plain = not (example.prompt or example.messages or example.choices)
        is_split = self.too_long == "split" and is_plain
        if isinstance(encoded, str) or not is_split or len(encoded.ids) <= self.max_length:
            return [self._sort(example, encoded)]
        least = encoded.prefix + 2
        if self.max_length < least:
            raise UserError(f"{self.name}: data.too_long: split needs data.max_length {least}, got {self.max_length}.")
        found: list[Sorted] = []
        for number, (ids, start) in enumerate(chunks(encoded.ids, encoded.prefix, self.max_length)):
            mask = np.arange(len(ids)) >= max(start, 1)  # nothing predicts the first token
            part = TokenizedExample(example.task, f"{example.id}[{number}]", np.array(ids, dtype=np.int32), mask)
            found.append((part, False))
        return found

    def _sort(self, example: Example, encoded: _Encoded | str) -> Sorted:
        if isinstance(encoded, str):
            self.chat_faults.append(f"{self.name}: example {example.id}: {encoded}")
            return encoded, False
        cut = len(encoded.ids) > self.max_length
        if cut:
            self.longest = max(self.longest, len(encoded.ids))
            if self.too_long in ("error", "split"):
                self.too_long_ids.append(example.id)
            self.num_dropped += self.too_long == "drop"
            if self.too_long == "split":
                return f"{len(encoded.ids)} tokens, and data.too_long: split is for plain text alone", True
            if self.too_long != "truncate":
                return None, True
            encoded = _cut(encoded, self.max_length)
        mask = np.array(encoded.mask, dtype=np.bool_)
        mask[0] = False  # nothing predicts the first token
        if not mask.any():
            if cut:
                self.num_dropped += 1
                return None, cut
            self.unlearnable_ids.append(example.id)
            return "without a token to learn", cut
        self.num_truncated += cut
        return TokenizedExample(example.task, example.id, np.array(encoded.ids, dtype=np.int32), mask), cut

    def faults(self, num_examples: int) -> list[str]:
        """Everything that was wrong."""
        faults = self.chat_faults[:_SHOWN]
        if len(self.chat_faults) > _SHOWN:
            faults.append(f"{self.name}: {len(self.chat_faults) - _SHOWN} more chats that do not fit the template")
        if self.too_long_ids:
            faults.append(
                f"{self.name}: {_named(self.too_long_ids)} of {num_examples} longer than data.max_length "
                f"({self.max_length}), the longest has {self.longest} tokens. Fix: raise data.max_length, or set "
                "data.too_long to truncate (cuts the front of the prompt) or drop"
                + (", since split is for plain text alone." if self.too_long == "split" else ".")
            )
        if self.unlearnable_ids:
            faults.append(
                f"{self.name}: {_named(self.unlearnable_ids)} without a token to learn. Fix: remove or mend them."
            )
        return faults


@dataclass(frozen=True, slots=True)
class _Encoded:
    """ids and mask of one example; ids[prefix:start] is the prompt, empty where there is none."""

    ids: list[int]
    mask: list[bool]
    prefix: int
    start: int


def _encode(examples: Sequence[Example], tokenizer: Any, name: str, loss_on: LossOn) -> list[_Encoded | str]:
    """Each example encoded, or what is wrong with its chat."""
    encoded: dict[int, _Encoded | str] = {}
    chats = [index for index, example in enumerate(examples) if example.messages]
    texts = [index for index, example in enumerate(examples) if not example.messages]
    if chats:
        require_chat_template(tokenizer, name)
        found = encode_chats(tokenizer, [examples[index].messages for index in chats], masked=loss_on == "answer")
        for index, chat in zip(chats, found, strict=True):
            encoded[index] = chat if isinstance(chat, str) else _Encoded(chat[0], chat[1], 0, 0)
    if texts:
        eos = tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"{name}: the tokenizer has no end-of-sequence token to end an answer with. Fix: set one in it."
            )
        prefix = len(special_prefix(tokenizer))
        pairs = _encode_texts(tokenizer, [examples[index] for index in texts])
        for index, (ids, start) in zip(texts, pairs, strict=True):
            ids = ids if ids[-1:] == [eos] else [*ids, eos]
            learnt = 0 if loss_on == "all" else start
            encoded[index] = _Encoded(ids, [position >= learnt for position in range(len(ids))], prefix, start)
    return [encoded[index] for index in range(len(examples))]


def _encode_texts(tokenizer: Any, examples: Sequence[Example]) -> list[tuple[list[int], int]]:
    """`encode_pairs`; plain text of more than a megabyte, which is to be split, is encoded in parts."""
    is_long = [not each.prompt and len(each.answer) > _EXCESSIVE for each in examples]
    short = [(each.prompt, each.answer) for each, long in zip(examples, is_long, strict=True) if not long]
    pairs, prefix = iter(encode_pairs(tokenizer, short)), special_prefix(tokenizer)
    found = []
    for each, long in zip(examples, is_long, strict=True):
        encoded = [encode_batch(tokenizer, [part])[0] for part in text_parts(each.answer, _EXCESSIVE)] if long else []
        found.append(([*prefix, *chain.from_iterable(encoded)], len(prefix)) if long else next(pairs))
    return found


def _without_excess(example: Example, max_length: int, tokenizer: Any) -> Example:
    """The example without most of the text that `max_length` tokens cannot reach, if it has a text of a megabyte.

    Encoding takes a hundred bytes for each character, so that a text of 50 MB took gigabytes, for what is cut off or
    refused anyway. What is left is still too long: it has characters for four times as many of the longest tokens. Of a
    prompt the end is kept, of an answer and of a chat the beginning, as in `_cut`.
    """
    texts = [content for _, content in example.messages] or [example.prompt, example.answer]
    if max(map(len, texts)) < _EXCESSIVE:
        return example
    kept = max(_EXCESSIVE // 2, 4 * max_length * max(map(len, tokenizer.get_vocab())))
    messages = tuple((role, content[:kept]) for role, content in example.messages)
    choices, gold, answer = example.choices, example.gold, example.answer[:kept]
    if gold is not None:  # the others are not encoded here
        choices = (*choices[:gold], answer, *choices[gold + 1 :])
    return replace(example, prompt=example.prompt[-kept:], answer=answer, choices=choices, messages=messages)


def _cut(encoded: _Encoded, max_length: int) -> _Encoded:
    """The front of the prompt goes first, but for one token that predicts the answer, then the end of the answer."""
    ids, mask, prefix, start = encoded.ids, encoded.mask, encoded.prefix, encoded.start
    num_cut = min(len(ids) - max_length, max(0, start - max(prefix, 1)))
    ids = (ids[:prefix] + ids[prefix + num_cut :])[:max_length]
    mask = (mask[:prefix] + mask[prefix + num_cut :])[:max_length]
    return _Encoded(ids, mask, prefix, start - num_cut)


def _named(ids: Sequence[str]) -> str:
    """3 examples (a, b, c); of more than three only the first."""
    what = "example" if len(ids) == 1 else "examples"
    return f"{len(ids)} {what} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
