"""The eight commonsense tasks: prompts as cloze questions and in LLM-Adapters' wording.

A row holds task, id, context, question, choices (list), answer (index of the right choice) and sometimes passage. One
schema serves local files and what `commonsense_hub` reads from the Hub.

Cloze (`example_of_row`): the model learns and is scored on the text of the choices, not on a letter or a number. At 0.1
to 1 B parameters models score at chance when they have to name an option ("answer2"), and well above it on the text.

LLM-Adapters (`instruction_row`): the prompt lists the choices with their names and the model learns to say a name ("the
correct answer is answer2"), as in the DoRA paper (arXiv 2402.09353, sec. 5.1; arXiv 2304.01933, appendix). Wording and
white space are those of commonsense_170k.json, so that a model trained on that file is asked what it has learnt.
Passages are left out, since that file has none.
"""

from __future__ import annotations

from collections.abc import Callable

from qdora.data.example import Example
from qdora.data.rows import Row, RowFault, optional_text, row_id, text_field
from qdora.recipe.faults import shown


def example_of_row(row: Row, *, task: str, label: str, id: str) -> Example:
    """The example of one schema row.

    Args:
        row: question, choices and answer are required; context, passage and id may be absent, null or empty.
        task: Chooses the template: one of TEMPLATES, any other name gets the general one.
        id: Its id where the row has none.
    Raises: RowFault if a field is missing or has the wrong type, or the answer is no index of the choices.
    """
    question = text_field(row, "question")
    choices = _choices(row)
    gold = _answer_index(row, len(choices))
    prompt, continuations = TEMPLATES.get(task, _question)(row, question, choices)
    return Example(label, row_id(row, id), prompt, continuations[gold], choices=continuations, gold=gold)


def _choices(row: Row) -> tuple[str, ...]:
    value = row.get("choices")
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise RowFault(f"choices: must be a list of two or more texts, got {shown(value)}")
    # JSON files write BoolQ's choices as true and false
    texts = [str(choice).lower() if isinstance(choice, bool) else choice for choice in value]
    for index, choice in enumerate(texts):
        if not isinstance(choice, str) or not choice.strip():
            raise RowFault(f"choices[{index}]: must be text that is not empty, got {shown(choice)}")
    return tuple(str(choice).strip() for choice in texts)


def _answer_index(row: Row, num_choices: int) -> int:
    value = row.get("answer")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_choices:
        raise RowFault(f"answer: must be the index of the right choice, 0 to {num_choices - 1}, got {shown(value)}")
    return value


Template = Callable[[Row, str, tuple[str, ...]], tuple[str, tuple[str, ...]]]
"""(row, question, choices) -> (prompt, continuations)."""


def _spaced(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" " + choice for choice in choices)


def _question(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """piqa, arc_e, arc_c, obqa and any other task: passage and context, where there are any, question, choice."""
    before = "".join(f"{line}\n" for line in (optional_text(row, "passage"), optional_text(row, "context")) if line)
    return f"{before}Question: {question}\nAnswer:", _spaced(choices)


def _boolq(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """boolq: as `_question`; false and true are said as "no" and "yes", one question mark ends the question."""
    words = {"false": "no", "no": "no", "true": "yes", "yes": "yes"}
    unknown = [choice for choice in choices if choice.lower() not in words]
    if unknown:
        raise RowFault(f"choices: must be false, true (or no, yes) for boolq, got {shown(unknown[0])}")
    prompt, _ = _question(row, question.rstrip("? ") + "?", choices)
    return prompt, tuple(" " + words[choice.lower()] for choice in choices)


def _siqa(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """siqa: the situation stands before the question."""
    context = optional_text(row, "context")
    return f"Question: {context} {question}".replace("  ", " ") + "\nAnswer:", _spaced(choices)


def _hellaswag(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """hellaswag: the schema's context is the activity, its question the beginning of a story."""
    activity = optional_text(row, "context")
    return f"{activity}: {question}" if activity else question, _spaced(choices)


def _winogrande(row: Row, question: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """winogrande: the blank stays in the sentence, so that both choices continue one and the same prompt."""
    if "_" not in question:
        raise RowFault(f"question: must be a sentence with a blank '_' for winogrande, got {shown(question)}")
    listed = " or ".join(choices)
    return f"{question}\nQuestion: What does the blank _ stand for, {listed}?\nAnswer:", _spaced(choices)


TEMPLATES: dict[str, Template] = {
    "boolq": _boolq,
    "piqa": _question,
    "siqa": _siqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_e": _question,
    "arc_c": _question,
    "obqa": _question,
}
"""Built-in task -> its template."""


_ANSWER = "answer", "Please choose the correct answer to the question: ", " ", "\n\n"
_FILL = "Please choose the correct answer to fill in the blank to complete the given sentence: "
WORDINGS: dict[str, tuple[str, str, str, str]] = {
    "piqa": ("solution", "Please choose the correct solution to the question: ", "\n\n", "\n\n"),
    "siqa": _ANSWER,
    "hellaswag": ("ending", "Please choose the correct ending to complete the given sentence: ", " ", "\n\n"),
    "winogrande": ("option", _FILL, " ", " "),
    "arc_e": _ANSWER,
    "arc_c": _ANSWER,
    "obqa": _ANSWER,
}
"""Task -> (noun of a choice, which with its number from 1 is its name; what stands before the question; between the
choices; between the last choice and the list of names)."""


def instruction_row(row: Row, task: str) -> dict[str, str]:
    """A row with id, instruction, output and answer, as commonsense_170k.json has them.

    Raises: RowFault: As `example_of_row`.
    """
    example = example_of_row(row, task=task, label=task, id="")  # checks the row
    assert example.gold is not None
    question = text_field(row, "question")
    if task == "boolq":
        names = tuple({"no": "false", "yes": "true"}[choice.strip()] for choice in example.choices)
        text = f"Please answer the following question with true or false, question: {question.rstrip('? ')}?\n\n"
        listed = "true/false"
    else:
        noun, before, between, behind = WORDINGS[task]
        names = tuple(f"{noun}{number + 1}" for number in range(len(example.choices)))
        choices = between.join(
            f"{name.capitalize()}: {str(choice).strip()}" for name, choice in zip(names, row["choices"], strict=True)
        )
        context = optional_text(row, "context")  # the situation (siqa) or the activity (hellaswag)
        colon = ":" if task == "hellaswag" else ""
        asked = f"{context}{colon} {question}" if context else question
        text = f"{before}{asked}\n\n{choices}{behind}"
        listed = "/".join(names)
    answer = names[example.gold]
    return {
        "id": row_id(row, ""),
        "instruction": f"{text}Answer format: {listed}",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
