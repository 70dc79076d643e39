"""An example as the model sees it, for people: what each token says, whether it is in the loss, and is special."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qdora.data.tokenize import TokenizedExample

_MOST_TOKENS = 400
"""Tokens of an example that are shown; of a longer one the middle is left out."""


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token: what it adds to the text before it, whether it is a label, whether the tokenizer calls it special.

    `text` is empty for the first tokens of a character that several tokens spell out byte by byte: the last has it.
    """

    text: str
    in_loss: bool
    is_special: bool


def shown_example(source: str, example: TokenizedExample, tokenizer: Any) -> dict[str, Any]:
    """JSON values: source, task, id, numbers of tokens, pieces (`TokenPiece`), and what is left out of them.

    `left_out` tokens are missing behind the piece number `left_out_behind`; 0 if all are there.
    """
    pieces = [asdict(each) for each in token_pieces(tokenizer, example.input_ids.tolist(), example.loss_mask.tolist())]
    half, left_out = _MOST_TOKENS // 2, max(0, len(pieces) - _MOST_TOKENS)
    return {
        "source": source,
        "task": example.task,
        "id": example.id,
        "num_tokens": len(pieces),
        "num_in_loss": sum(each["in_loss"] for each in pieces),
        "pieces": [*pieces[:half], *pieces[half + left_out :]],
        "left_out": left_out,
        "left_out_behind": half,
    }


def token_pieces(tokenizer: Any, input_ids: Sequence[int], loss_mask: Sequence[bool]) -> list[TokenPiece]:
    """The piece of each token; all texts joined are the decoded text, special tokens included."""
    ids = [int(each) for each in input_ids]
    special = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)

    def decoded(start: int, end: int) -> str:
        text: str = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def is_unfinished(start: int, end: int, text: str) -> bool:
        """Whether the last character of the text of [start:end] becomes another one with the tokens that follow."""
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            return False
        # A character has at most 4 bytes in UTF-8, and so takes at most 4 tokens.
        longer = (decoded(start, more) for more in range(end + 1, min(end + 4, len(ids) + 1)))
        return any(len(each) <= len(text) or not each.startswith(text) for each in longer)

    texts: list[str] = []
    # A token is decoded behind the ones before it, since some decoders strip the space of the first. Tokens before
    # `done` have their text; those from it on are bytes of an unfinished character.
    start = done = 0
    for index in range(len(ids)):
        before, now = decoded(start, done), decoded(start, index + 1)
        if is_unfinished(start, index + 1, now):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            start, done = done, index + 1
    both = zip(ids, texts, loss_mask, strict=True)
    return [TokenPiece(text, bool(learnt), number in special) for number, text, learnt in both]
