"""What the user should know of prompts and completions as the tokenizer sees them: counts of a source, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class TextNotes:
    """Counts over the texts of a source; chats are not among them.

    Attributes:
        num_texts: All of them.
        num_begun: Those that themselves begin with the tokens that the tokenizer puts before a text.
        num_ended: Those that themselves end with a stop token.
    """

    num_texts: int = 0
    num_begun: int = 0
    num_ended: int = 0

    def in_words(self) -> Iterator[str]:
        """A note for each count that is not 0."""
        if self.num_begun:
            yield (
                f"{self._of(self.num_begun)} begin with the beginning-of-sequence token that the tokenizer adds to a "
                "text: no second one is added."
            )
        if self.num_ended:
            yield (
                f"{self._of(self.num_ended)} end with a stop token: no second one is added, and white space behind it "
                "is left out."
            )

    def _of(self, number: int) -> str:
        return f"{number:,} of {self.num_texts:,} texts"
