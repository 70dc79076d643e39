"""The names by which a question's choices are called ("answer2", "true"), and the first one that a text mentions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qdora.data.example import Example

_NAME = re.compile(r"[^\W_][\w'-]*")


def answer_names(choices: Sequence[str]) -> tuple[str, ...]:
    """The one word in which the choices differ, of each; empty where they differ in more, or not.

    ("the correct answer is answer1", "the correct answer is answer2") -> ("answer1", "answer2"); (" no", " yes") ->
    ("no", "yes"); a full stop behind the word is not part of it.
    """
    words = [choice.split() for choice in choices]
    while all(len(each) > 1 for each in words) and len({each[0] for each in words}) == 1:
        words = [each[1:] for each in words]
    while all(len(each) > 1 for each in words) and len({each[-1] for each in words}) == 1:
        words = [each[:-1] for each in words]
    names = tuple(each[0].rstrip(".") for each in words if len(each) == 1)
    told_apart = len({name.casefold() for name in names}) == len(choices) > 1
    return names if told_apart and all(map(_NAME.fullmatch, names)) else ()


def first_mention(text: str, names: Sequence[str]) -> tuple[int | None, bool]:
    """(index of the name that stands first in the text or None, whether more text could change that).

    As the published evaluation of LLM-Adapters does it (the first of the names anywhere), but names are whole words of
    any case, and only those of this very question: "answer5" is no answer to a question with four.
    """
    listed = "|".join(map(re.escape, names))
    found = re.search(rf"(?<!\w)(?:{listed})(?!\w)", text, re.IGNORECASE)
    if found is None:
        return None, True
    index = [name.casefold() for name in names].index(found[0].casefold())
    return index, found.end() == len(text)  # the word may go on


def generation_faults(examples_by_task: Mapping[str, Sequence[Example]]) -> list[str]:
    """Why answers to these examples cannot be generated and told apart, a line per task; known before a model is."""
    faults = []
    for task, examples in examples_by_task.items():
        wrong = next((each for each in examples if not answer_names(each.choices)), None)
        if wrong is not None:
            has = "no choices" if not wrong.choices else f"choices such as {wrong.choices[0].strip()[:40]!r}"
            faults.append(
                f"eval.method: generate asks for one word as answer, got task '{task}', whose example {wrong.id} has "
                f"{has}, allowed: choices that differ in one word. The eight commonsense tasks and files of "
                "commonsense_170k have them under data.mix[].format commonsense170k."
            )
    return faults
