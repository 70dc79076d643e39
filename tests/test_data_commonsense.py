"""Schema rows -> prompts, against prompts written out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from qdora.data.commonsense import TEMPLATES, example_of_row
from qdora.data.rows import RowFault

ROWS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "boolq": (
        {"question": "is ice cold?", "choices": ["false", "true"], "answer": 1, "passage": "Ice is frozen water."},
        "Ice is frozen water.\nQuestion: is ice cold?\nAnswer:",
        (" no", " yes"),
    ),
    "piqa": (
        {"question": "open a jar", "choices": ["twist the lid", " bite the lid "], "answer": 0, "context": ""},
        "Question: open a jar\nAnswer:",
        (" twist the lid", " bite the lid"),
    ),
    "siqa": (
        {"context": "Ann fell.", "question": "How does Ann feel?", "choices": ["hurt", "proud", "rich"], "answer": 0},
        "Question: Ann fell. How does Ann feel?\nAnswer:",
        (" hurt", " proud", " rich"),
    ),
    "hellaswag": (
        {"context": "Skiing", "question": "A man stands. he", "choices": ["skis.", "flies."], "answer": 0},
        "Skiing: A man stands. he",
        (" skis.", " flies."),
    ),
    "winogrande": (
        {"question": "Jo thanked Al because _ helped.", "choices": ["Jo", "Al"], "answer": 1},
        "Jo thanked Al because _ helped.\nQuestion: What does the blank _ stand for, Jo or Al?\nAnswer:",
        (" Jo", " Al"),
    ),
    "arc_e": (
        {"question": "What melts?", "choices": ["ice", "stone", "air"], "answer": 0},
        "Question: What melts?\nAnswer:",
        (" ice", " stone", " air"),
    ),
    "arc_c": (
        {"question": "What sinks?", "choices": ["cork", "wood", "oil", "lead", "gas"], "answer": 3},
        "Question: What sinks?\nAnswer:",
        (" cork", " wood", " oil", " lead", " gas"),
    ),
    "obqa": (
        {"question": "Sleet is made of", "choices": ["ice", "salt"], "answer": 0, "passage": float("nan")},
        "Question: Sleet is made of\nAnswer:",
        (" ice", " salt"),
    ),
}


def test_all_eight_tasks_are_covered():
    assert set(ROWS) == set(TEMPLATES)


@pytest.mark.parametrize("task", ROWS)
def test_prompt_and_choices(task):
    row, prompt, choices = ROWS[task]
    example = example_of_row(row, task=task, label="label", id="7")
    assert (example.prompt, example.choices, example.gold) == (prompt, choices, row["answer"])
    assert example.answer == choices[row["answer"]]
    assert (example.task, example.id) == ("label", "7")


def test_an_unknown_task_shows_passage_and_context_before_the_question():
    row = {"id": "q1", "passage": "P.", "context": "C.", "question": "Q?", "choices": ["a", "b"], "answer": 1}
    example = example_of_row(row, task="mine", label="mine", id="0")
    assert example.prompt == "P.\nC.\nQuestion: Q?\nAnswer:"
    assert example.id == "q1"


@pytest.mark.parametrize("choices", [[False, True], ["False", "True"], ["no", "yes"]])
@pytest.mark.parametrize("question", ["is ice cold", "is ice cold?", "is ice cold ? "])
def test_boolq_spellings(choices, question):
    example = example_of_row({"question": question, "choices": choices, "answer": 0}, task="boolq", label="b", id="0")
    assert (example.prompt, example.answer) == ("Question: is ice cold?\nAnswer:", " no")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": ""}, r"question: must be text that is not empty, got ''"),
        ({"question": None}, r"question: must be text that is not empty, got null"),
        ({"choices": "ab"}, r"choices: must be a list of two or more texts, got 'ab'"),
        ({"choices": ["a"]}, r"choices: must be a list of two or more texts, got \[a\]"),
        ({"choices": ["a", " "]}, r"choices\[1\]: must be text that is not empty, got ' '"),
        ({"choices": ["a", 3]}, r"choices\[1\]: must be text that is not empty, got 3"),
        ({"answer": 2}, r"answer: must be the index of the right choice, 0 to 1, got 2"),
        ({"answer": -1}, r"answer: must be .* got -1"),
        ({"answer": True}, r"answer: must be .* got true"),
        ({"answer": "a"}, r"answer: must be .* got 'a'"),
        ({"context": 3}, r"context: must be text or null, got 3"),
    ],
)
def test_faulty_rows(change, message):
    row = {"question": "Q?", "choices": ["a", "b"], "answer": 0} | change
    with pytest.raises(RowFault, match=message):
        example_of_row(row, task="obqa", label="obqa", id="0")


def test_tasks_refuse_rows_of_another_kind():
    row = {"question": "Q?", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(RowFault, match=r"choices: must be false, true .* for boolq, got 'a'"):
        example_of_row(row, task="boolq", label="boolq", id="0")
    with pytest.raises(RowFault, match="a sentence with a blank '_'"):
        example_of_row(row, task="winogrande", label="winogrande", id="0")
