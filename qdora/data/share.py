"""The examples of a step that one of several processes takes."""

from __future__ import annotations

from collections.abc import Sequence

from qdora.data.tokenize import TokenizedExample


def share_of(examples: Sequence[TokenizedExample], rank: int, size: int) -> list[TokenizedExample]:
    """The share of process `rank` out of `size`, in the step's order.

    Longest first, each example goes to the process with the fewest tokens so far, so that none waits long for another:
    their sums differ by at most one example. With fewer examples than processes some get none.
    """
    tokens, owner = [0] * size, [0] * len(examples)
    for index in sorted(range(len(examples)), key=lambda index: len(examples[index]), reverse=True):
        owner[index] = tokens.index(min(tokens))
        tokens[owner[index]] += len(examples[index])
    return [example for example, each in zip(examples, owner, strict=True) if each == rank]
