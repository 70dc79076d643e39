"""The eight commonsense tasks in the wording of LLM-Adapters: a row of the shared schema -> a row of commonsense_170k.

The model is told the choices by name and learns to say a name ("the correct answer is answer2"), as in the DoRA paper
(arXiv 2402.09353, sec. 5.1; arXiv 2304.01933, appendix). Wording and white space are those of commonsense_170k.json, so
that a model trained on that file is asked what it has learnt; passages, which that file has not, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdora.data.tasks import Row, example_of_row, optional_text, text_field


@dataclass(frozen=True)
class _Wording:
    """How a task asks.

    Attributes:
        question: What stands before the question.
        noun: Of a choice; with its number from 1 it is the choice's name.
        between: Between the choices.
        behind: Between the last choice and the list of names.
    """

    question: str
    noun: str
    between: str = " "
    behind: str = "\n\n"


_ANSWER = _Wording("Please choose the correct answer to the question: ", "answer")
WORDINGS: dict[str, _Wording] = {
    "piqa": _Wording("Please choose the correct solution to the question: ", "solution", between="\n\n"),
    "siqa": _ANSWER,
    "hellaswag": _Wording("Please choose the correct ending to complete the given sentence: ", "ending"),
    "winogrande": _Wording(
        "Please choose the correct answer to fill in the blank to complete the given sentence: ", "option", behind=" "
    ),
    "arc_e": _ANSWER,
    "arc_c": _ANSWER,
    "obqa": _ANSWER,
}
_BOOLQ = "Please answer the following question with true or false, question: "


def instruction_row(row: Row, task: str) -> dict[str, str]:
    """A row with id, instruction, output and answer, as commonsense_170k.json has them.

    Args:
        row: As for `tasks.example_of_row`.
        task: One of the eight commonsense tasks.
    Raises:
        RowFault: As `tasks.example_of_row`.
    """
    example = example_of_row(row, task=task, label=task, id="")  # checks the row
    assert example.gold is not None
    question = text_field(row, "question")
    if task == "boolq":
        names = tuple({"no": "false", "yes": "true"}[choice.strip()] for choice in example.choices)
        text = f"{_BOOLQ}{question.rstrip('? ')}?\n\n"
        listed = "true/false"
    else:
        wording = WORDINGS[task]
        names = tuple(f"{wording.noun}{number + 1}" for number in range(len(example.choices)))
        choices = wording.between.join(
            f"{name.capitalize()}: {str(choice).strip()}" for name, choice in zip(names, row["choices"], strict=True)
        )
        text = f"{wording.question}{_asked(row, task, question)}\n\n{choices}{wording.behind}"
        listed = "/".join(names)
    answer = names[example.gold]
    own_id = row.get("id")
    return {
        "id": "" if own_id is None else str(own_id),
        "instruction": f"{text}Answer format: {listed}",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def _asked(row: Row, task: str, question: str) -> str:
    """The question behind its situation (siqa) or activity (hellaswag)."""
    context = optional_text(row, "context")
    between = ": " if task == "hellaswag" else " "
    return f"{context}{between}{question}" if context else question
