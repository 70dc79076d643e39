"""Prompts, answers and chats -> token ids, and which of them are learnt: one rule for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdora.data.chats import Encoded, chat_settings, encode_chats, require_chat_template, shared_length
from qdora.data.example import Example
from qdora.errors import UserError, first_few, shorten
from qdora.recipe.data_settings import DataConfig, LossOn

_BATCH, _BATCH_CHARACTERS = 1024, 1 << 21
"""Examples and characters for one call of the tokenizer: enough for its threads, few enough for memory."""


# Texts


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Token ids of each prompt + answer, encoded as one text, and where the answer starts in them.

    As in lm-evaluation-harness, spaces at the end of the prompt go to the answer, because tokenizers join a space to
    the word behind it. The answer starts at the first token that differs from those of the prompt alone, so it has all
    of its characters even where a token spans the border. `start` is 0 where nothing predicts the first token.
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
    """The special tokens that a tokenizer puts before every text, mostly one beginning-of-sequence token."""
    # Attributes that should say so (add_bos_token) are missing or wrong in many tokenizers
    ids = list(tokenizer("", verbose=False)["input_ids"])
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    # OPT begins every text with a token that is its beginning and its end of sequence in one
    if ids and ids[-1] == eos and (len(ids) > 1 or eos != bos):
        ids.pop()
    return ids


def with_prefix(ids: list[int], prefix: list[int]) -> list[int]:
    """The ids behind the tokenizer's prefix, which text of a chat template has already."""
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, no special tokens added; those written out in the text are recognised."""
    if not texts:
        return []
    # verbose: a warning that a text is longer than the model's context
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


# Examples


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    task: str
    id: str
    input_ids: NDArray[np.int32]  # (length,)
    loss_mask: NDArray[np.bool_]  # (length,), True where the token is predicted; the first is always False
    is_cut: bool = False  # was longer

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class TokenizedSet:
    name: str
    examples: tuple[TokenizedExample, ...]
    num_truncated: int = 0
    num_dropped: int = 0

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.examples))

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(example.task for example in self.examples))


def tokenize_all(examples: Sequence[Example], tokenizer: Any, name: str, data: DataConfig) -> TokenizedSet:
    """Tokenise the examples of a source.

    The tokenizer's end-of-sequence token follows an answer and is learnt with it, for multiple choice too, where
    evaluation scores the choices without it. An answer with a stop token of its own ends there, a chat with the end
    marks of its template.
    """
    tally = ExampleTally(name, data, tokenizer)
    done = [part for parts in tally.add(examples) for part in parts if isinstance(part, TokenizedExample)]
    if faults := tally.faults():
        raise UserError(*faults)
    if not done:
        raise UserError(
            f"{name}: none of {len(examples)} examples is left. Fix: raise data.max_length ({data.max_length})."
        )
    return TokenizedSet(name, tuple(done), tally.num_truncated, tally.num_dropped)


Outcome = TokenizedExample | str | None
"""Tokenised, or what is wrong with it, or None where it was too long and is dropped."""


_SILENT = (
    "no token in the loss: the answer is empty, not learnt (weight, train) or left out by the chat template"
)


@dataclass
class ExampleTally:
    """Tokenises the examples of a source, and counts what happens to them.

    A chat whose template rewrites earlier turns counts as an example for each turn of the assistant.
    """

    name: str
    data: DataConfig
    tokenizer: Any
    num_truncated: int = 0
    num_dropped: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens before anything is cut or split
    _too_long: list[tuple[str, int]] = field(default_factory=list)  # id, tokens
    _refused: list[str] = field(default_factory=list)

    def add(self, examples: Iterable[Example]) -> list[list[Outcome]]:
        """What became of each; a list of one but for some chats and for text that is split."""
        outcomes, batch, num_characters = list[list[Outcome]](), list[Example](), 0
        for example in examples:
            batch.append(example)
            turns = sum(len(turn.content) + len(turn.reasoning) for turn in example.messages)
            num_characters += len(example.prompt) + len(example.answer) + turns
            if len(batch) == _BATCH or num_characters >= _BATCH_CHARACTERS:
                outcomes += self._add(batch)
                batch, num_characters = [], 0
        return outcomes + self._add(batch) if batch else outcomes

    def _add(self, examples: Sequence[Example]) -> list[list[Outcome]]:
        chats = [example for example in examples if example.messages]
        texts = [example for example in examples if not example.messages]
        if chats:
            require_chat_template(self.tokenizer, self.name)
        if texts and self.tokenizer.eos_token_id is None:
            raise UserError(f"{self.name}: the tokenizer has no end-of-sequence token to end an answer with.")
        rendered = iter(encode_chats(self.tokenizer, chats, loss_on=self.data.loss_on))
        encoded = iter(_encode_texts(self.tokenizer, texts, self.data.loss_on))
        outcomes: list[list[Outcome]] = []
        for example in examples:
            parts = next(rendered) if example.messages else [next(encoded)]
            is_plain = not (example.prompt or example.messages or example.choices)
            if isinstance(parts, str):
                outcomes.append([self._refuse(example.id, parts)])
            elif self.data.too_long == "split" and is_plain and len(parts[0].ids) > self.data.max_length:
                outcomes.append(self._split(example, parts[0]))
            else:
                outcomes.append(
                    [self._sort(example, part) for part in parts] or [self._refuse(example.id, _SILENT)]
                )
        return outcomes

    def _split(self, example: Example, encoded: Encoded) -> list[Outcome]:
        """Later parts begin with the tokenizer's prefix and, as context, the last token of the part before."""
        ids, prefix = encoded.ids, encoded.prefix
        self.lengths.append(len(ids))
        room = self.data.max_length - prefix - 1
        if room < 1:
            raise UserError(f"{self.name}: data.too_long: split needs data.max_length {prefix + 2}.")
        later = [
            ids[:prefix] + ids[begin - 1 : begin + room]
            for begin in range(self.data.max_length, len(ids), room)
        ]
        outcomes: list[Outcome] = []
        for number, part in enumerate([ids[: self.data.max_length], *later]):
            first = prefix + 1 if number else max(prefix, 1)  # nothing predicts the first token
            mask = np.arange(len(part)) >= first
            name = f"{example.id}[{number}]"
            outcomes.append(TokenizedExample(example.task, name, np.array(part, dtype=np.int32), mask))
        return outcomes

    def _refuse(self, id: str, why: str) -> Outcome:
        self._refused.append(f"{self.name}: example {id}: {why}")
        return why

    def _sort(self, example: Example, encoded: Encoded) -> Outcome:
        id = example.id if encoded.turn is None else f"{example.id}[{encoded.turn}]"
        cut = len(encoded.ids) > self.data.max_length
        self.lengths.append(len(encoded.ids))
        if cut and self.data.too_long == "drop":
            self.num_dropped += 1
            return None
        if cut and self.data.too_long != "truncate":
            self._too_long.append((id, len(encoded.ids)))
            return "too long, and data.too_long: split is for plain text"
        if cut:
            encoded = _cut(encoded, self.data.max_length)
        mask = np.array(encoded.mask, dtype=np.bool_)
        mask[0] = False  # nothing predicts the first token
        if not mask.any():
            self.num_dropped += cut
            return None if cut else self._refuse(id, _SILENT)
        self.num_truncated += cut
        return TokenizedExample(example.task, id, np.array(encoded.ids, dtype=np.int32), mask, cut)

    def faults(self) -> list[str]:
        faults = shorten(self._refused, 3)
        if self._too_long:
            ids, lengths = zip(*self._too_long, strict=True)
            what = f"{len(ids)} of {len(self.lengths)} examples ({first_few(ids, 3)}) are longer than data.max_length"
            fix = "Fix: raise it, or set data.too_long: truncate or drop (split is for plain text)."
            faults.append(
                f"{self.name}: {what} ({self.data.max_length}), the longest has {max(lengths)} tokens. {fix}"
            )
        return faults


def _encode_texts(tokenizer: Any, examples: Sequence[Example], loss_on: LossOn) -> list[Encoded]:
    eos, prefix = tokenizer.eos_token_id, len(special_prefix(tokenizer))
    stops = {eos, *(chat_settings(tokenizer).stop_ids or ())}
    pairs = [(example.prompt, example.answer) for example in examples]
    encoded = []
    for (_, answer), (ids, start) in zip(pairs, encode_pairs(tokenizer, pairs), strict=True):
        end = len(ids)
        if answer[-1:].isspace():  # behind a stop token it is left out
            while end and ids[end - 1] not in stops and tokenizer.decode(ids[end - 1 : end]).isspace():
                end -= 1
        ids = ids[:end] if end > 0 and ids[end - 1] in stops else [*ids, eos]
        learnt = 0 if loss_on == "all" else start
        encoded.append(Encoded(ids, [index >= learnt for index in range(len(ids))], prefix, start))
    return encoded


def _cut(encoded: Encoded, max_length: int) -> Encoded:
    """The front of the prompt goes first, but for one token that predicts the answer, then the end of the answer.

    Of a chat only whole answers are left if one fits: a model that learns answers without their ends may not stop.
    """
    ids, mask, prefix, start = encoded.ids, encoded.mask, encoded.prefix, encoded.start
    num_cut = min(len(ids) - max_length, max(0, start - max(prefix, 1)))
    ids, mask = ids[:prefix] + ids[prefix + num_cut :], mask[:prefix] + mask[prefix + num_cut :]
    ends = (end for end in range(max_length, 1, -1) if mask[end - 1] and not any(mask[end : end + 1]))
    end = next(ends, max_length)
    return replace(encoded, ids=ids[:end], mask=mask[:end], start=start - num_cut)
