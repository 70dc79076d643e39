"""Prompts, answers and chats -> token ids, and which of them are learnt: one rule for training and evaluation."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from numpy.typing import NDArray

from qdora.data.chat_template import chat_settings, require_chat_template, shared_length
from qdora.data.encode_chats import Encoded, encode_chats
from qdora.data.example import Example
from qdora.errors import UserError
from qdora.recipe.data_settings import LossOn, TooLong

_BATCH, _BATCH_CHARACTERS = 1024, 1 << 21
"""Texts per call of the tokenizer, and characters from which there are no more of them: enough for its threads, few
enough for memory."""
_EXCESSIVE = 1 << 18
"""Characters of a text from which it is shortened before it is encoded."""
_SHOWN = 3
"""Faulty chats that are named; the rest is counted."""
NO_SECOND = "no second one is added"
"""Among the notes that only tell what qdora does, and need no change."""


# Texts


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
    prefix = special_prefix(tokenizer)
    whole = encode_batch(tokenizer, [prompt + answer for prompt, answer in pairs])
    alone = encode_batch(tokenizer, [prompt.rstrip(" ") for prompt, _ in pairs])
    encoded = []
    for ids, prompt_ids in zip(whole, alone, strict=True):
        begun = with_prefix(ids, prefix)
        encoded.append((begun, max(len(begun) - len(ids) + shared_length(ids, prompt_ids), len(prefix))))
    return encoded


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


def chunks(ids: Sequence[int], prefix: int, max_length: int) -> Iterator[tuple[list[int], int]]:
    """(ids, start) of each chunk of plain text that is too long: ids[start:] are those that it teaches.

    All chunks together teach ids[prefix:]. Every chunk begins with ids[:prefix], a later one then with the last token
    of the chunk before it, only as context: it predicts the first token that is taught.
    """
    yield list(ids[:max_length]), prefix
    room = max_length - prefix - 1
    for begin in range(max_length, len(ids), room):
        yield [*ids[:prefix], *ids[begin - 1 : begin + room]], prefix + 1


def text_parts(text: str, size: int) -> list[str]:
    """The text in parts of at most `size` characters, cut before white space where there is some.

    Tokens seldom reach over such a border, so the parts encoded one by one are the text encoded, almost everywhere.
    """
    parts, start = [], 0
    while len(text) - start > size:
        end = start + size
        space = re.search(r"\s", text[end : end - size // 2 : -1])  # the last one, in the second half of the part
        end -= space.start() if space else 0
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


# Examples


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
    """The tokenised examples of one source, in their old order; how many were cut to `max_length`, or left out.

    `unused` are columns of the source that its format does not read, `notes` what the user should know of the texts.
    """

    name: str
    examples: tuple[TokenizedExample, ...]
    num_truncated: int = 0
    num_dropped: int = 0
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
        too_long: What happens to longer ones. "error": one error with their number. "truncate": cut the front of the
            prompt, then the end of the answer; a chat behind its last answer that fits as a whole, or within its first
            one. An example that has no token left to learn is dropped. "drop": leave them out. "split": plain text
            becomes several examples (see `chunks`); prompts with answers and chats, of which a part teaches something
            else, are an error.
    Raises: UserError if examples are too long or have no token to learn, a chat does not fit the chat template or there
        is no template, or no example is left; all faults at once.
    """
    tally = ExampleTally(name, max_length, too_long)
    done: list[TokenizedExample] = []
    faults: list[str] = []
    try:
        for batch in text_batches(examples):
            for outcomes in tally.add(batch, tokenizer, loss_on):
                done += [each for each, _ in outcomes if isinstance(each, TokenizedExample)]
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


@dataclass
class TextNotes:
    """Counts over prompts and completions: how many there are, begin or end with the marks that are added to a text,
    or have nothing between prompt and completion, of which `glued` quotes the first."""

    num_texts: int = 0
    num_begun: int = 0
    num_ended: int = 0
    num_glued: int = 0
    glued: str = ""

    def in_words(self) -> Iterator[str]:
        """A note for each count that is not 0."""
        if self.num_begun:
            yield (
                f"{self.num_begun:,} of {self.num_texts:,} texts begin with the beginning-of-sequence token that the "
                f"tokenizer adds to a text: {NO_SECOND}."
            )
        if self.num_ended:
            yield (
                f"{self.num_ended:,} of {self.num_texts:,} texts end with a stop token: {NO_SECOND}, and white space "
                "behind it is left out."
            )
        if self.num_glued:
            yield (
                f"{self.num_glued:,} of {self.num_texts:,} texts have no white space between prompt and completion, "
                f"such as {self.glued}. Fix: if a separator is missing, set template: {{prompt: "
                '"{{ prompt }}\\n", completion: "{{ completion }}"} in this source.'
            )


Outcome = tuple[TokenizedExample | str | None, bool]
"""(tokenised, or what is wrong with it, or None where it is dropped; whether it was too long)."""


@dataclass
class ExampleTally:
    """Tokenises the examples of a source, and counts what happens to them.

    A chat whose template rewrites earlier turns is an example for each turn of the assistant, and counts as such.
    `lengths` are the tokens of each before anything is cut or split; a chat that the template refuses has none.
    """

    name: str
    max_length: int
    too_long: TooLong
    num_truncated: int = 0
    num_dropped: int = 0
    lengths: array[int] = field(default_factory=lambda: array("I"))
    has_chats: bool = False
    chat_notes: set[str] = field(default_factory=set)
    text_notes: TextNotes = field(default_factory=TextNotes)
    _too_long: list[tuple[str, int]] = field(default_factory=list)  # id, tokens
    _unlearnable_ids: list[str] = field(default_factory=list)
    _chat_faults: list[str] = field(default_factory=list)
    _at_least: str = ""  # "at least " if `_without_excess` shortened a text, whose length is not known then

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the chat template and of the texts."""
        return tuple(sorted({*self.chat_notes, *self.text_notes.in_words()}))

    def add(self, examples: Sequence[Example], tokenizer: Any, loss_on: LossOn) -> list[list[Outcome]]:
        """What became of each; a list of one but for some chats and for text that is split."""
        whole = [
            example if self._splits(example) else _without_excess(example, self.max_length, tokenizer)
            for example in examples
        ]
        if any(one is not other for one, other in zip(examples, whole, strict=True)):
            self._at_least = "at least "
        encoded: dict[int, list[Encoded] | str] = {}
        if chats := {index: example for index, example in enumerate(whole) if example.messages}:
            self.has_chats = True
            require_chat_template(tokenizer, self.name)
            rendered = encode_chats(tokenizer, [*chats.values()], loss_on=loss_on, notes=self.chat_notes)
            encoded |= dict(zip(chats, rendered, strict=True))
        if texts := {index: example for index, example in enumerate(whole) if not example.messages}:
            if tokenizer.eos_token_id is None:
                raise UserError(
                    f"{self.name}: the tokenizer has no end-of-sequence token to end an answer with. Fix: set "
                    "eos_token in its tokenizer_config.json, or choose another model.tokenizer."
                )
            done = _encode_texts(tokenizer, [*texts.values()], loss_on, self.text_notes)
            encoded |= {index: [each] for index, each in zip(texts, done, strict=True)}
        outcomes: list[list[Outcome]] = []
        for index, example in enumerate(whole):
            parts = encoded[index]
            if isinstance(parts, str):
                self._chat_faults.append(f"{self.name}: example {example.id}: {parts}")
                outcomes.append([(parts, False)])
            elif self._splits(example) and len(parts[0].ids) > self.max_length:
                outcomes.append(self._split(example, parts[0]))
            else:
                outcomes.append([self._sort(example, part) for part in parts] or [self._unlearnable(example.id, False)])
        return outcomes

    def _splits(self, example: Example) -> bool:
        """Whether the example becomes several where it is too long: plain text does."""
        return self.too_long == "split" and not (example.prompt or example.messages or example.choices)

    def _split(self, example: Example, encoded: Encoded) -> list[Outcome]:
        least = encoded.prefix + 2
        if self.max_length < least:
            raise UserError(f"{self.name}: data.too_long: split needs data.max_length {least}, got {self.max_length}.")
        self.lengths.append(len(encoded.ids))
        outcomes: list[Outcome] = []
        for number, (ids, start) in enumerate(chunks(encoded.ids, encoded.prefix, self.max_length)):
            mask = np.arange(len(ids)) >= max(start, 1)  # nothing predicts the first token
            part = TokenizedExample(example.task, f"{example.id}[{number}]", np.array(ids, dtype=np.int32), mask)
            outcomes.append((part, False))
        return outcomes

    def _unlearnable(self, id: str, cut: bool) -> Outcome:
        self._unlearnable_ids.append(id)
        return "no token in the loss", cut

    def _sort(self, example: Example, encoded: Encoded) -> Outcome:
        id = example.id if encoded.turn is None else f"{example.id}[{encoded.turn}]"
        cut = len(encoded.ids) > self.max_length
        self.lengths.append(len(encoded.ids))
        if cut:
            if self.too_long in ("error", "split"):
                self._too_long.append((id, len(encoded.ids)))
            if self.too_long == "split":
                tokens = f"{self._at_least}{len(encoded.ids)} tokens"
                return f"{tokens}, and data.too_long: split is for plain text alone", True
            if self.too_long != "truncate":
                self.num_dropped += self.too_long == "drop"
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
        faults = self._chat_faults[:_SHOWN]
        if (num_more := len(self._chat_faults) - _SHOWN) > 0:
            chats = "chat that does" if num_more == 1 else "chats that do"
            faults.append(f"{self.name}: {num_more} more {chats} not fit the template")
        if self._too_long:
            ids, lengths = zip(*self._too_long, strict=True)
            ways = "truncate (cuts the front of a prompt, the last turns of a chat) or drop"
            why = ways if self.too_long == "error" else f"{ways}, since split is for plain text alone"
            are = "is" if len(ids) == 1 else "are"
            faults.append(
                f"{self.name}: {_named(ids)} of {len(self.lengths)} {are} longer than data.max_length "
                f"({self.max_length}), the longest has {self._at_least}{max(lengths)} tokens. Fix: raise "
                f"data.max_length, or set data.too_long to {why}."
            )
        if self._unlearnable_ids:
            have, rows = ("has", "this row") if len(self._unlearnable_ids) == 1 else ("have", "these rows")
            why = "the tokenizer makes no token of the answer, or the text is one token long"
            if self.has_chats:
                why = "the answer is missing, empty or not learnt (weight, train), or the chat template leaves it out"
            faults.append(
                f"{self.name}: {_named(self._unlearnable_ids)} {have} no token in the loss: {why}. Fix: remove {rows}."
            )
        return faults


def _named(ids: Sequence[str]) -> str:
    """3 examples (a, b, c); of more than three only the first."""
    what = "example" if len(ids) == 1 else "examples"
    return f"{len(ids)} {what} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"


def _encode_texts(tokenizer: Any, examples: Sequence[Example], loss_on: LossOn, notes: TextNotes) -> list[Encoded]:
    """Each text with its end-of-sequence token.

    Plain text of more than `_EXCESSIVE` characters, which is to be split, is encoded in parts.
    """
    eos, prefix = tokenizer.eos_token_id, special_prefix(tokenizer)
    stops = {eos, *(chat_settings(tokenizer).stop_ids or ())}
    begin = "".join(tokenizer.convert_ids_to_tokens(prefix))
    is_long = [not each.prompt and len(each.answer) > _EXCESSIVE for each in examples]
    short = [(each.prompt, each.answer) for each, long in zip(examples, is_long, strict=True) if not long]
    pairs = iter(encode_pairs(tokenizer, short))
    encoded = []
    for example, long in zip(examples, is_long, strict=True):
        if long:
            parts = (encode_batch(tokenizer, [part])[0] for part in text_parts(example.answer, _EXCESSIVE))
            ids, start = with_prefix([*chain.from_iterable(parts)], prefix), len(prefix)
        else:
            ids, start = next(pairs)
        end = len(ids)
        if example.answer[-1:].isspace():  # behind a stop token it is left out
            while end and ids[end - 1] not in stops and tokenizer.decode(ids[end - 1 : end]).isspace():
                end -= 1
        has_end = end > 0 and ids[end - 1] in stops
        ids = ids[:end] if has_end else [*ids, eos]
        learnt = 0 if loss_on == "all" else start
        encoded.append(Encoded(ids, [index >= learnt for index in range(len(ids))], len(prefix), start))
        notes.num_texts += 1
        notes.num_begun += bool(prefix) and (example.prompt or example.answer).startswith(begin)
        notes.num_ended += has_end
        if not example.choices and _is_glued(example.prompt, example.answer):
            notes.num_glued += 1
            notes.glued = notes.glued or f"{example.prompt[-12:]!r} + {example.answer[:12]!r}"
    return encoded


def _is_glued(prompt: str, completion: str) -> bool:
    """Whether neither white space nor a mark such as <answer> or [/INST] is between them.

    Chinese, Japanese and Korean letters, which are wide, need none.
    """
    before, after = prompt[-1:], completion[:1]
    is_apart = before.isspace() or after.isspace() or before in (">", "]") or after in ("<", "[")
    return bool(prompt) and not is_apart and not any(east_asian_width(each) in "WF" for each in before + after)


def _without_excess(example: Example, max_length: int, tokenizer: Any) -> Example:
    """The example without most of the text that `max_length` tokens cannot reach; itself where nothing is left out.

    Encoding takes a hundred bytes for each character, so that a text of 50 MB took gigabytes, for what is cut off or
    refused anyway. What is left is still too long: it has characters for four times as many of the longest tokens. Of a
    prompt the end is kept, of an answer and of a chat the beginning, as in `_cut`.
    """
    texts = [example.prompt, example.answer]
    texts += [text for turn in example.messages for text in (turn.content, turn.reasoning)]
    if max(map(len, texts)) < _EXCESSIVE:
        return example
    most = max(_EXCESSIVE // 2, 4 * max_length * max(map(len, tokenizer.get_vocab())))
    if max(map(len, texts)) <= most:
        return example
    messages = tuple(
        replace(turn, content=turn.content[:most], reasoning=turn.reasoning[:most]) for turn in example.messages
    )
    choices, gold, answer = example.choices, example.gold, example.answer[:most]
    if gold is not None:  # the others are not encoded here
        choices = (*choices[:gold], answer, *choices[gold + 1 :])
    return replace(example, prompt=example.prompt[-most:], answer=answer, choices=choices, messages=messages)


def _cut(encoded: Encoded, max_length: int) -> Encoded:
    """The front of the prompt goes first, but for one token that predicts the answer, then the end of the answer.

    Of several answers, those of a chat, only whole ones are left if one fits: a model that learns answers without their
    ends may not stop.
    """
    ids, mask, prefix, start = encoded.ids, encoded.mask, encoded.prefix, encoded.start
    num_cut = min(len(ids) - max_length, max(0, start - max(prefix, 1)))
    ids, mask = ids[:prefix] + ids[prefix + num_cut :], mask[:prefix] + mask[prefix + num_cut :]
    ends = (end for end in range(max_length, 1, -1) if mask[end - 1] and not any(mask[end : end + 1]))
    end = next(ends, max_length)
    return replace(encoded, ids=ids[:end], mask=mask[:end], start=start - num_cut)
