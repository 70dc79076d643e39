"""Plain text longer than an example -> chunks that each fit, for continued pretraining: no token is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_SPACE = re.compile(r"\s")


def chunks(ids: Sequence[int], prefix: int, max_length: int) -> Iterator[tuple[list[int], int]]:
    """(ids, start) of each chunk: ids[start:] are those that it teaches, and all chunks together teach ids[prefix:].

    Every chunk begins with ids[:prefix], a later one then with the last token of the chunk before it. That one is only
    context: it predicts the first token that is taught, which nothing would predict else.

    Args:
        prefix: Tokens that the tokenizer puts before every text.
        max_length: Most tokens of a chunk, at least prefix + 2.
    """
    assert max_length >= prefix + 2, (prefix, max_length)
    yield list(ids[:max_length]), prefix
    room = max_length - prefix - 1
    for begin in range(max_length, len(ids), room):
        yield [*ids[:prefix], *ids[begin - 1 : begin + room]], prefix + 1


def text_parts(text: str, size: int) -> list[str]:
    """The text in parts of at most `size` characters, cut before white space where there is some.

    Tokens seldom reach over such a border, so the parts encoded one by one are the text encoded, almost everywhere.
    """
    found, start = [], 0
    while len(text) - start > size:
        end = start + size
        space = _SPACE.search(text[end : end - size // 2 : -1])  # the last one, in the second half of the part
        end -= space.start() if space else 0
        found.append(text[start:end])
        start = end
    return [*found, text[start:]]
