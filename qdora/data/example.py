"""One training or evaluation item as text, before any tokenizer has seen it."""

from __future__ import annotations

from dataclasses import dataclass

from qdora.data.messages import Messages, Tools


@dataclass(frozen=True, slots=True)
class Example:
    """Text with a prompt and an answer, plain text, or a chat.

    prompt + answer is the text, joined as it stands: an answer brings its own leading space. Plain text has an empty
    prompt. A chat has `messages` and neither prompt nor answer; the tokenizer's chat template turns it into text.

    Attributes:
        task: Name under which losses and scores are counted.
        id: Names the example inside its source, for error lines.
        choices: For multiple choice, every continuation of `prompt` that may be chosen; else empty.
        gold: Index of the right choice, choices[gold] == answer; None without choices.
        messages: The turns of a chat; else empty.
        tools: The functions that the assistant of a chat may call.
    """

    task: str
    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    gold: int | None = None
    messages: Messages = ()
    tools: Tools = ()

    def __post_init__(self) -> None:
        # Only what our own code could break; a faulty row of the user's file is refused where it is read.
        if self.messages:
            assert self.prompt == self.answer == "", f"{self.task} {self.id}: a chat has only messages"
        else:
            assert self.answer, f"{self.task} {self.id}: no answer"
        assert (self.gold is None) == (not self.choices), f"{self.task} {self.id}: choices and gold go together"
        if self.gold is not None:
            assert 0 <= self.gold < len(self.choices), f"{self.task} {self.id}: gold {self.gold} of {self.choices}"
            assert self.choices[self.gold] == self.answer, f"{self.task} {self.id}: {self.answer!r}, {self.choices}"
