"""Prompts, answers and chats -> token ids, and which of them are learnt: one rule for training and evaluation."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdora.data.chat_template import chat_settings, require_chat_template, shared_length
from qdora.data.encode_chats import encode_chats
from qdora.data.example import Example
from qdora.data.split_text import chunks, text_parts
from qdora.data.text_notes import TextNotes
from qdora.errors import UserError
from qdora.recipe.data_settings import LossOn, TooLong


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Token ids of each prompt + answer, encoded as one text, and where the answer starts in them.

    As in lm-evaluation-harness, spaces at the end of the prompt go to the answer first, because tokenizers join a space
    to the word behind it. The answer starts at the first token that differs from those of the prompt alone, so it has
    every character of the answer even where a token spans the border. The ids begin with the tokenizer's
    beginning-of-sequence token if it adds one by default; no end-of-sequence token is added.

    Args:
        pairs: (prompt, answer); the prompt may be empty, the answer starts with its own space.
    Returns: (ids, start) of each: ids[start:] belongs to the answer. start is 0 for an empty prompt without
        beginning-of-sequence token: nothing predicts the first token then.
    """
    return [(ids, start) for ids, start, _ in _encode_pairs(tokenizer, pairs)]


_Pair = tuple[list[int], int, bool]


def _encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[_Pair]:
    """`encode_pairs`, and whether a token holds text of both the prompt, as it is given, and the answer."""
    prefix = special_prefix(tokenizer)
    whole = encode_batch(tokenizer, [prompt + answer for prompt, answer in pairs])
    alone = encode_batch(tokenizer, [prompt.rstrip(" ") for prompt, _ in pairs])
    spaced = [index for index, (prompt, _) in enumerate(pairs) if prompt.endswith(" ")]
    as_given = dict(zip(spaced, encode_batch(tokenizer, [pairs[index][0] for index in spaced]), strict=True))
    found = []
    for index, (ids, prompt_ids) in enumerate(zip(whole, alone, strict=True)):
        begun, shared = with_prefix(ids, prefix), shared_length(ids, prompt_ids)
        given = as_given.get(index)
        is_joined = shared < len(prompt_ids) if given is None else shared_length(ids, given) < len(given)
        found.append((begun, max(len(begun) - len(ids) + shared, len(prefix)), is_joined))
    return found


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


def with_prefix(ids: list[int], prefix: list[int]) -> list[int]:
    """The ids behind the tokenizer's prefix, which text made with a chat template has already."""
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, no special tokens added (those written out in the text are recognised)."""
    if not texts:
        return []
    # verbose=False: no warning that a text is longer than the model's context, we check lengths ourselves
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


_BATCH, _BATCH_CHARACTERS = 1024, 1 << 21
"""Texts per call of the tokenizer, and characters from which there are no more of them: enough for its threads, few
enough for memory."""
_EXCESSIVE = 1 << 18
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
    notes: tuple[str, ...] = ()
    """What the user should know of the chat template and of the texts."""

    def __len__(self) -> int:
        return len(self.examples)

    def first(self, number: int | None = None) -> tuple[TokenizedExample, ...]:
        """Up to so many examples (None: all) from the start, as `first` of a stream."""
        return self.examples[:number]

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
    writes must know where the answer ends. (Evaluation scores the choices without it.) An answer that ends with a stop
    token of its own ends there. A chat has the end marks of its template instead.

    Args:
        max_length: Most tokens of an example, special tokens included.
        loss_on: "answer" learns the answer's tokens (a chat: the assistant's turns), "last" of a chat only the last of
            these turns, "all" the prompt's tokens as well.
        too_long: What happens to longer ones. "error": one error with their number, and what the others would lose.
            "truncate": cut the front of the prompt, then the end of the answer; a chat behind its last answer that fits
            as a whole, or within its first one. An example that has no token left to learn is dropped. "drop": leave
            them out. "split": plain text becomes several examples (see `chunks`); prompts with answers and chats, of
            which a part teaches something else, are an error.
    Raises: UserError if examples are too long or have no token to learn, a chat does not fit the chat template or there
        is no template, or no example is left; all faults at once.
    """
    tally = ExampleTally(name, max_length, too_long)
    done: list[TokenizedExample] = []
    faults: list[str] = []
    try:
        for batch in text_batches(examples):
            found = [each for several in tally.add(batch, tokenizer, loss_on) for each, _ in several]
            done += [each for each in found if isinstance(each, TokenizedExample)]
    except UserError as error:  # faulty rows, known after the last; or no example can be encoded at all
        faults += error.faults
    faults += tally.faults()
    if not (done or faults):
        faults = [f"{name}: none of {len(examples)} examples is left. Fix: raise data.max_length ({max_length})."]
    if faults:
        raise UserError(*faults)
    return TokenizedSet(name, tuple(done), tally.num_truncated, tally.num_dropped, notes=tally.notes)


def num_characters_of(example: Example) -> int:
    """Characters of the texts that are encoded of an example."""
    turns = sum(len(turn.content) + len(turn.reasoning) for turn in example.messages)
    return len(example.prompt) + len(example.answer) + turns


def text_batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples in lists that the tokenizer takes at once: bounded in number and in characters."""
    batch, num_characters = list[Example](), 0
    for example in examples:
        batch.append(example)
        num_characters += num_characters_of(example)
        if len(batch) == _BATCH or num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


Outcome = tuple[TokenizedExample | str | None, bool]
"""(tokenised, or what is wrong with it, or None where it is dropped; whether it was too long)."""


@dataclass
class ExampleTally:
    """Counts what happens to the examples of a source, in the order in which they are added.

    A chat whose template rewrites earlier turns is an example for each turn of the assistant, and counts as such.
    `lengths` are the tokens of each before anything is cut or split; a chat that the template refuses has none. With
    too_long "error" also the tokens of those that are too long are counted, those that truncate would cut, and the
    examples of which it would leave no token to learn.
    """

    name: str
    max_length: int
    too_long: TooLong
    _: KW_ONLY
    num_truncated: int = 0
    num_dropped: int = 0
    lengths: array[int] = field(default_factory=lambda: array("I"))
    num_tokens_too_long: int = 0
    num_tokens_cut: int = 0
    longest: int = 0
    any_shortened: bool = False
    """Whether `_without_excess` shortened a text, so that `longest` and the numbers of tokens are too small."""
    too_long_ids: list[str] = field(default_factory=list)
    cut_whole_ids: list[str] = field(default_factory=list)
    unlearnable_ids: list[str] = field(default_factory=list)
    chat_faults: list[str] = field(default_factory=list)
    has_chats: bool = False
    chat_notes: set[str] = field(default_factory=set)
    text_notes: TextNotes = field(default_factory=TextNotes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the chat template and of the texts."""
        return tuple(sorted({*self.chat_notes, *self.text_notes.in_words()}))

    def add(self, examples: Sequence[Example], tokenizer: Any, loss_on: LossOn) -> list[list[Outcome]]:
        """What became of each; a list of one but for some chats and for text that is split."""
        given = examples
        examples = [
            example if self._splits(example) else _without_excess(example, self.max_length, tokenizer)
            for example in given
        ]
        self.any_shortened |= any(one is not other for one, other in zip(given, examples, strict=True))
        encoded = self._encode(examples, tokenizer, loss_on)
        found: list[list[Outcome]] = []
        for example, parts in zip(examples, encoded, strict=True):
            if isinstance(parts, str):
                self.chat_faults.append(f"{self.name}: example {example.id}: {parts}")
                found.append([(parts, False)])
            elif self._splits(example):
                found.append(self._split(example, *parts))
            else:
                found.append([self._sort(example, part) for part in parts] or [self._unlearnable(example.id, False)])
        return found

    @property
    def _at_least(self) -> str:
        return "at least " if self.any_shortened else ""

    def _encode(self, examples: Sequence[Example], tokenizer: Any, loss_on: LossOn) -> list[list[_Encoded] | str]:
        """Each example encoded, a chat as one or several; or what is wrong with the chat."""
        encoded: dict[int, list[_Encoded] | str] = {}
        chats = [index for index, example in enumerate(examples) if example.messages]
        texts = [index for index, example in enumerate(examples) if not example.messages]
        if chats:
            self.has_chats = True
            require_chat_template(tokenizer, self.name)
            notes, turns = self.chat_notes, [examples[index] for index in chats]
            for index, chat in zip(chats, encode_chats(tokenizer, turns, loss_on=loss_on, notes=notes), strict=True):
                encoded[index] = (
                    chat if isinstance(chat, str) else [_Encoded(each.ids, each.mask, 0, 0, each.turn) for each in chat]
                )
        if texts:
            if tokenizer.eos_token_id is None:
                raise UserError(
                    f"{self.name}: the tokenizer has no end-of-sequence token to end an answer with. Fix: set "
                    "eos_token in its tokenizer_config.json, or choose another model.tokenizer."
                )
            found = _encode_texts(tokenizer, [examples[index] for index in texts], loss_on, self.text_notes)
            encoded |= {index: [each] for index, each in zip(texts, found, strict=True)}
        return [encoded[index] for index in range(len(examples))]

    def _splits(self, example: Example) -> bool:
        """Whether the example becomes several where it is too long: plain text does."""
        return self.too_long == "split" and not (example.prompt or example.messages or example.choices)

    def _split(self, example: Example, encoded: _Encoded) -> list[Outcome]:
        if len(encoded.ids) <= self.max_length:
            return [self._sort(example, encoded)]
        least = encoded.prefix + 2
        if self.max_length < least:
            raise UserError(f"{self.name}: data.too_long: split needs data.max_length {least}, got {self.max_length}.")
        self.lengths.append(len(encoded.ids))
        found: list[Outcome] = []
        for number, (ids, start) in enumerate(chunks(encoded.ids, encoded.prefix, self.max_length)):
            mask = np.arange(len(ids)) >= max(start, 1)  # nothing predicts the first token
            part = TokenizedExample(example.task, f"{example.id}[{number}]", np.array(ids, dtype=np.int32), mask)
            found.append((part, False))
        return found

    def _unlearnable(self, id: str, cut: bool) -> Outcome:
        self.unlearnable_ids.append(id)
        return "no token in the loss", cut

    def _sort(self, example: Example, encoded: _Encoded) -> Outcome:
        id = example.id if encoded.turn is None else f"{example.id}[{encoded.turn}]"
        cut = len(encoded.ids) > self.max_length
        self.lengths.append(len(encoded.ids))
        if cut:
            self.longest = max(self.longest, len(encoded.ids))
            if self.too_long in ("error", "split"):
                self.too_long_ids.append(id)
                left = _cut(encoded, self.max_length)
                num_left = len(left.ids) if any(left.mask[1:]) else 0
                self.num_tokens_too_long += len(encoded.ids)
                self.num_tokens_cut += len(encoded.ids) - num_left
                self.cut_whole_ids += [] if num_left else [id]
            self.num_dropped += self.too_long == "drop"
            if self.too_long == "split":
                return (
                    f"{self._at_least}{len(encoded.ids)} tokens, and data.too_long: split is for plain text alone",
                    True,
                )
            if self.too_long != "truncate":
                return None, True
            encoded = _cut(encoded, self.max_length)
        mask = np.array(encoded.mask, dtype=np.bool_)
        mask[0] = False  # nothing predicts the first token
        if not mask.any():
            if cut:
                self.num_dropped += 1
                return None, cut
            return self._unlearnable(id, cut)
        self.num_truncated += cut
        return TokenizedExample(example.task, id, np.array(encoded.ids, dtype=np.int32), mask), cut

    def faults(self) -> list[str]:
        """Everything that was wrong."""
        faults, num_examples, num_tokens = self.chat_faults[:_SHOWN], len(self.lengths), sum(self.lengths)
        if len(self.chat_faults) > _SHOWN:
            num_more = len(self.chat_faults) - _SHOWN
            chats = "chat that does" if num_more == 1 else "chats that do"
            faults.append(f"{self.name}: {num_more} more {chats} not fit the template")
        if self.too_long_ids:
            whole = f", the whole of {_named(self.cut_whole_ids)}" if self.cut_whole_ids else ""
            cut, lost = _percent(self.num_tokens_cut, num_tokens), _percent(self.num_tokens_too_long, num_tokens)
            cut, lost = (f"{cut} of the tokens: ", f", {lost} of the tokens") if not self.any_shortened else ("", "")
            are = "is" if len(self.too_long_ids) == 1 else "are"
            truncate = f"truncate (cuts {cut}the front of a prompt, the last turns of a chat{whole}) or "
            faults.append(
                f"{self.name}: {_named(self.too_long_ids)} of {num_examples} {are} longer than data.max_length "
                f"({self.max_length}), the longest has {self._at_least}{self.longest} tokens. Fix: raise "
                "data.max_length, or set data.too_long to "
                f"{'' if self.cut_whole_ids == self.too_long_ids else truncate}drop (loses "
                f"{_percent(len(self.too_long_ids), num_examples)} of the examples{lost})"
                + (", since split is for plain text alone." if self.too_long == "split" else ".")
            )
        if self.unlearnable_ids:
            have, rows = ("has", "this row") if len(self.unlearnable_ids) == 1 else ("have", "these rows")
            why = "the tokenizer makes no token of the answer, or the text is one token long"
            if self.has_chats:
                why = "the answer is missing, empty or not learnt (weight, train), or the chat template leaves it out"
            faults.append(
                f"{self.name}: {_named(self.unlearnable_ids)} {have} no token in the loss: {why}. Fix: remove {rows}."
            )
        return faults


@dataclass(frozen=True, slots=True)
class _Encoded:
    """ids and mask of one example; ids[prefix:start] is the prompt, empty where there is none.

    `turn` is the only turn of a chat that it teaches, if it teaches one of several.
    """

    ids: list[int]
    mask: list[bool]
    prefix: int
    start: int
    turn: int | None = None


def _encode_texts(tokenizer: Any, examples: Sequence[Example], loss_on: LossOn, notes: TextNotes) -> list[_Encoded]:
    """Each text with its end-of-sequence token."""
    eos, prefix = tokenizer.eos_token_id, special_prefix(tokenizer)
    stops = {eos, *(chat_settings(tokenizer).stop_ids or ())}
    begin = "".join(tokenizer.convert_ids_to_tokens(prefix))
    found = []
    for example, (ids, start, is_joined) in zip(examples, _long_and_short(tokenizer, examples, prefix), strict=True):
        end = _own_end(tokenizer, ids, example.answer, stops)
        ids = [*ids, eos] if end is None else ids[:end]
        learnt = 0 if loss_on == "all" else start
        found.append(_Encoded(ids, [position >= learnt for position in range(len(ids))], len(prefix), start))
        notes.num_texts += 1
        notes.num_begun += bool(prefix) and (example.prompt or example.answer).startswith(begin)
        notes.num_ended += end is not None
        if not example.choices:
            notes.add_border(example.prompt, example.answer, is_joined)
    return found


def _own_end(tokenizer: Any, ids: Sequence[int], answer: str, stops: Collection[int]) -> int | None:
    """Where the ids end that have a stop token last, apart from white space behind it; None if they have none there."""
    end = len(ids)
    if answer[-1:].isspace():
        while end and ids[end - 1] not in stops and tokenizer.decode(ids[end - 1 : end]).isspace():
            end -= 1
    return end if end and ids[end - 1] in stops else None


def _long_and_short(tokenizer: Any, examples: Sequence[Example], prefix: list[int]) -> Iterator[_Pair]:
    """`encode_pairs`; plain text of more than `_EXCESSIVE` characters, which is to be split, is encoded in parts."""
    is_long = [not each.prompt and len(each.answer) > _EXCESSIVE for each in examples]
    short = [(each.prompt, each.answer) for each, long in zip(examples, is_long, strict=True) if not long]
    pairs = iter(_encode_pairs(tokenizer, short))
    for each, long in zip(examples, is_long, strict=True):
        encoded = [encode_batch(tokenizer, [part])[0] for part in text_parts(each.answer, _EXCESSIVE)] if long else []
        yield (with_prefix([*chain.from_iterable(encoded)], prefix), len(prefix), False) if long else next(pairs)


def _without_excess(example: Example, max_length: int, tokenizer: Any) -> Example:
    """The example without most of the text that `max_length` tokens cannot reach, if it has a text of `_EXCESSIVE`
    characters; the example itself where nothing is left out.

    Encoding takes a hundred bytes for each character, so that a text of 50 MB took gigabytes, for what is cut off or
    refused anyway. What is left is still too long: it has characters for four times as many of the longest tokens. Of a
    prompt the end is kept, of an answer and of a chat the beginning, as in `_cut`.
    """
    texts = [example.prompt, example.answer]
    texts += [text for turn in example.messages for text in (turn.content, turn.reasoning)]
    if max(map(len, texts)) < _EXCESSIVE:
        return example
    kept = max(_EXCESSIVE // 2, 4 * max_length * max(map(len, tokenizer.get_vocab())))
    if max(map(len, texts)) <= kept:
        return example
    messages = tuple(
        replace(turn, content=turn.content[:kept], reasoning=turn.reasoning[:kept]) for turn in example.messages
    )
    choices, gold, answer = example.choices, example.gold, example.answer[:kept]
    if gold is not None:  # the others are not encoded here
        choices = (*choices[:gold], answer, *choices[gold + 1 :])
    return replace(example, prompt=example.prompt[-kept:], answer=answer, choices=choices, messages=messages)


def _cut(encoded: _Encoded, max_length: int) -> _Encoded:
    """The front of the prompt goes first, but for one token that predicts the answer, then the end of the answer.

    Of several answers, those of a chat, only whole ones are left if one fits: a model that learns answers without their
    ends may not stop.
    """
    ids, mask, prefix, start = encoded.ids, encoded.mask, encoded.prefix, encoded.start
    num_cut = min(len(ids) - max_length, max(0, start - max(prefix, 1)))
    ids, mask = ids[:prefix] + ids[prefix + num_cut :], mask[:prefix] + mask[prefix + num_cut :]
    ends = (end for end in range(max_length, 1, -1) if mask[end - 1] and not any(mask[end : end + 1]))
    end = next(ends, max_length)
    return _Encoded(ids[:end], mask[:end], prefix, start - num_cut, encoded.turn)


def _percent(part: int, whole: int) -> str:
    """12.3 %, with three digits however small."""
    return f"{100 * part / whole:.3g} %"


def _named(ids: Sequence[str]) -> str:
    """3 examples (a, b, c); of more than three only the first."""
    what = "example" if len(ids) == 1 else "examples"
    return f"{len(ids)} {what} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
