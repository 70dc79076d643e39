"""Examples -> token ids with a mask of the tokens that are learnt, one rule for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qdora.data.encode import encode_chats, encode_pairs, require_chat_template, special_prefix
from qdora.data.example import Example
from qdora.errors import UserError

LossOn = Literal["answer", "all"]
TooLong = Literal["error", "truncate", "drop"]
_BATCH = 1024
"""Texts per call of the tokenizer: enough for its threads, few enough for memory."""
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
    """The tokenised examples of one source, in their old order.

    Attributes:
        num_truncated: Examples that were cut to `max_length`.
        num_dropped: Examples that were left out because they are longer.
    """

    name: str
    examples: tuple[TokenizedExample, ...]
    num_truncated: int = 0
    num_dropped: int = 0

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
            "drop": leave them out.
    Raises: UserError if examples are too long or have no token to learn, a chat does not fit the chat template or there
        is no template, or no example is left; all faults at once.
    """
    tally = ExampleTally(name, max_length, too_long)
    done: list[TokenizedExample] = []
    for start in range(0, len(examples), _BATCH):
        sorted_ = tally.add(examples[start : start + _BATCH], tokenizer, loss_on)
        done += [tokenized for tokenized, _ in sorted_ if tokenized is not None]
    tally.check(len(examples))
    if not done:
        raise UserError(f"{name}: none of {len(examples)} examples is left. Fix: raise data.max_length ({max_length}).")
    return TokenizedSet(name, tuple(done), tally.num_truncated, tally.num_dropped)


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

    def add(
        self, examples: Sequence[Example], tokenizer: Any, loss_on: LossOn
    ) -> list[tuple[TokenizedExample | None, bool]]:
        """(tokenised or None, whether it was too long) of each; None: dropped or faulty."""
        encoded = _encode(examples, tokenizer, self.name, loss_on)
        return [self._sort(*pair) for pair in zip(examples, encoded, strict=True)]

    def _sort(self, example: Example, encoded: _Encoded | str) -> tuple[TokenizedExample | None, bool]:
        if isinstance(encoded, str):
            self.chat_faults.append(f"{self.name}: example {example.id}: {encoded}")
            return None, False
        cut = len(encoded.ids) > self.max_length
        if cut:
            self.longest = max(self.longest, len(encoded.ids))
            if self.too_long == "error":
                self.too_long_ids.append(example.id)
            self.num_dropped += self.too_long == "drop"
            if self.too_long != "truncate":
                return None, True
            encoded = _cut(encoded, self.max_length)
        mask = np.array(encoded.mask, dtype=np.bool_)
        mask[0] = False  # nothing predicts the first token
        if not mask.any():
            if cut:
                self.num_dropped += 1
            else:
                self.unlearnable_ids.append(example.id)
            return None, cut
        self.num_truncated += cut
        return TokenizedExample(example.task, example.id, np.array(encoded.ids, dtype=np.int32), mask), cut

    def check(self, num_examples: int) -> None:
        """Raise everything that was wrong."""
        faults = self.chat_faults[:_SHOWN]
        if len(self.chat_faults) > _SHOWN:
            faults.append(f"{self.name}: {len(self.chat_faults) - _SHOWN} more chats that do not fit the template")
        if self.too_long_ids:
            faults.append(
                f"{self.name}: {_named(self.too_long_ids)} of {num_examples} longer than data.max_length "
                f"({self.max_length}), the longest has {self.longest} tokens. Fix: raise data.max_length, or set "
                "data.too_long to truncate (cuts the front of the prompt) or drop."
            )
        if self.unlearnable_ids:
            faults.append(
                f"{self.name}: {_named(self.unlearnable_ids)} without a token to learn. Fix: remove or mend them."
            )
        if faults:
            raise UserError(*faults)


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
        pairs = encode_pairs(tokenizer, [(examples[index].prompt, examples[index].answer) for index in texts])
        for index, (ids, start) in zip(texts, pairs, strict=True):
            ids = ids if ids[-1:] == [eos] else [*ids, eos]
            learnt = 0 if loss_on == "all" else start
            encoded[index] = _Encoded(ids, [position >= learnt for position in range(len(ids))], prefix, start)
    return [encoded[index] for index in range(len(examples))]


def _cut(encoded: _Encoded, max_length: int) -> _Encoded:
    """At most `max_length` tokens: the front of the prompt goes first, then the end of the answer.

    One token stays before the answer, so that all of it is predicted from something.
    """
    ids, mask, prefix, start = encoded.ids, encoded.mask, encoded.prefix, encoded.start
    num_cut = min(len(ids) - max_length, max(0, start - max(prefix, 1)))
    ids = (ids[:prefix] + ids[prefix + num_cut :])[:max_length]
    mask = (mask[:prefix] + mask[prefix + num_cut :])[:max_length]
    return _Encoded(ids, mask, prefix, start - num_cut)


def _named(ids: Sequence[str]) -> str:
    """3 examples (a, b, c); of more than three only the first."""
    what = "example" if len(ids) == 1 else "examples"
    return f"{len(ids)} {what} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
