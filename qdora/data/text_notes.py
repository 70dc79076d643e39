"""What the user should know of prompts and completions as the tokenizer sees them: counts of a source, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from unicodedata import east_asian_width

NO_SECOND = "no second one is added"
"""Among the notes that only tell what qdora does, and need no change."""

_SHOWN = 12
"""Characters on each side of a border that are shown."""


@dataclass
class TextNotes:
    """Counts over the texts of a source; chats are not among them.

    Attributes:
        num_texts: All of them.
        num_begun: Those that themselves begin with the tokens that the tokenizer puts before a text.
        num_ended: Those that themselves end with a stop token.
        num_glued, glued: Prompts that nothing separates from their completions; the first such border, quoted.
        num_joined, joined: Others whose last characters are in one token with the first ones of the completion.
    """

    num_texts: int = 0
    num_begun: int = 0
    num_ended: int = 0
    num_glued: int = 0
    glued: str = ""
    num_joined: int = 0
    joined: str = ""

    def add_border(self, prompt: str, completion: str, is_joined: bool) -> None:
        """Count what is between a prompt and its completion; `is_joined`: a token has text of both."""
        border = f"{prompt[-_SHOWN:]!r} + {completion[:_SHOWN]!r}"
        if _is_glued(prompt, completion):
            self.num_glued, self.glued = self.num_glued + 1, self.glued or border
        elif is_joined:
            self.num_joined, self.joined = self.num_joined + 1, self.joined or border

    def in_words(self) -> Iterator[str]:
        """A note for each count that is not 0."""
        if self.num_begun:
            yield (
                f"{self._of(self.num_begun)} begin with the beginning-of-sequence token that the tokenizer adds to a "
                f"text: {NO_SECOND}."
            )
        if self.num_ended:
            yield (
                f"{self._of(self.num_ended)} end with a stop token: {NO_SECOND}, and white space behind it is left out."
            )
        if self.num_glued:
            yield (
                f"{self._of(self.num_glued)} have no white space between prompt and completion, such as {self.glued}. "
                'Fix: if a separator is missing, set template: {prompt: "{{ prompt }}\\n", completion: '
                '"{{ completion }}"} in this source, or write it into the template that is there.'
            )
        if self.num_joined:
            yield (
                f"{self._of(self.num_joined)} have a token with the end of the prompt and the beginning of the "
                f"completion, such as {self.joined}: a model that is given the prompt alone sees other tokens. Fix: "
                'set template: {prompt: "{{ prompt | trim }}\\n", completion: "{{ completion | trim }}"} in this '
                "source, or end the prompt with a line break or a letter, and begin the completion with the space."
            )

    def _of(self, number: int) -> str:
        return f"{number:,} of {self.num_texts:,} texts"


def _is_glued(prompt: str, completion: str) -> bool:
    """Whether neither white space nor a mark such as <answer> or [/INST] is between them.

    Chinese, Japanese and Korean letters, which are wide, need none.
    """
    before, after = prompt[-1:], completion[:1]
    is_apart = before.isspace() or after.isspace() or before in (">", "]") or after in ("<", "[")
    is_wide = any(east_asian_width(each) in "WF" for each in before + after)
    return bool(prompt) and not (is_apart or is_wide)
