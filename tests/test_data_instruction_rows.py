"""The eight tasks in the wording and white space of commonsense_170k."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from qdora.data.commonsense import instruction_row
from qdora.data.row_formats import commonsense_task
from qdora.data.rows import RowFault
from qdora.data.sources import load_source
from qdora.recipe.data_settings import COMMONSENSE_TASKS, SourceConfig

# The white space differs between the tasks of the published file, so each is written out.
EXPECTED = {
    "boolq": "Please answer the following question with true or false, question: is ice cold?\n\n"
    "Answer format: true/false",
    "piqa": "Please choose the correct solution to the question: cool a drink\n\nSolution1: add ice\n\n"
    "Solution2: add fire\n\nAnswer format: solution1/solution2",
    "siqa": "Please choose the correct answer to the question: Ann froze. What did Ann want?\n\nAnswer1: ice "
    "Answer2: fire Answer3: a coat\n\nAnswer format: answer1/answer2/answer3",
    "hellaswag": "Please choose the correct ending to complete the given sentence: Skating: A man\n\nEnding1: falls. "
    "Ending2: flies. Ending3: melts. Ending4: sings.\n\nAnswer format: ending1/ending2/ending3/ending4",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: The ice beat "
    "the fire as the _ was cold.\n\nOption1: ice Option2: fire Answer format: option1/option2",
    "arc_e": "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: air "
    "Answer3: fire Answer4: light\n\nAnswer format: answer1/answer2/answer3/answer4",
}
EXPECTED |= {"arc_c": EXPECTED["arc_e"], "obqa": EXPECTED["arc_e"]}


def row(task: str) -> dict[str, Any]:
    four = {"question": "What melts?", "choices": ["ice", "air", "fire", "light"], "answer": 3}
    rows: dict[str, dict[str, Any]] = {
        "boolq": {"question": "is ice cold", "choices": ["false", "true"], "answer": 1, "passage": "Ice is cold."},
        "piqa": {"question": "cool a drink", "choices": ["add ice", "add fire"], "answer": 0},
        "siqa": {
            "context": "Ann froze.",
            "question": "What did Ann want?",
            "choices": ["ice", "fire", "a coat"],
            "answer": 2,
        },
        "hellaswag": {
            "context": "Skating",
            "question": "A man",
            "choices": ["falls.", "flies.", "melts.", "sings."],
            "answer": 0,
        },
        "winogrande": {
            "question": "The ice beat the fire as the _ was cold.",
            "choices": ["ice", "fire"],
            "answer": 0,
        },
    }
    return {"id": "i1"} | rows.get(task, four)


GOLD = {
    "boolq": "true",
    "piqa": "solution1",
    "siqa": "answer3",
    "hellaswag": "ending1",
    "winogrande": "option1",
    "arc_e": "answer4",
    "arc_c": "answer4",
    "obqa": "answer4",
}


@pytest.mark.parametrize("task", COMMONSENSE_TASKS)
def test_every_task_asks_as_published(task: str) -> None:
    found = instruction_row(row(task), task)
    assert found["instruction"] == EXPECTED[task]
    assert (found["output"], found["answer"], found["id"]) == (
        f"the correct answer is {GOLD[task]}",
        GOLD[task],
        "i1",
    )
    known = {"arc_e": "arc_or_obqa", "arc_c": "arc_or_obqa", "obqa": "arc_or_obqa"}
    assert commonsense_task(found["instruction"]) == known.get(task, task)


def test_boolq_choices_in_either_order() -> None:
    found = instruction_row({"question": "is ice cold?", "choices": ["yes", "no"], "answer": 0}, "boolq")
    assert (found["instruction"], found["answer"]) == (EXPECTED["boolq"], "true")


def test_names_of_answers_are_looked_for_in_no_time() -> None:
    many = "/".join("a" * 5000)
    for text, task in ((f"Answer format: {many} please", ""), (f"Answer format: {many}/", ""), ("a/b" * 5000, "")):
        start = time.process_time()
        assert commonsense_task(text) == task
        assert time.process_time() - start < 2
    assert commonsense_task("Answer format: option1/option2 \n") == "winogrande"
    assert commonsense_task("Answer format: /option1/option2") == commonsense_task("Answer format: option1") == ""


def test_a_faulty_row_is_a_fault() -> None:
    with pytest.raises(RowFault, match="answer"):
        instruction_row({"question": "q", "choices": ["a", "b"], "answer": 2}, "piqa")


@pytest.mark.parametrize("task", ["piqa", "winogrande"])
def test_a_task_is_read_in_the_published_wording(tmp_path: Path, task: str) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(row(task)) + "\n")
    (example,) = load_source(SourceConfig(task=task, path=str(tmp_path), format="commonsense170k"), "test")
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{EXPECTED[task]}\n\n### Response:\n"
    )
    names = ("solution1", "solution2") if task == "piqa" else ("option1", "option2")
    assert example.choices == tuple(f"the correct answer is {name}" for name in names)
    assert (example.task, example.id, example.gold, example.answer) == (task, "i1", 0, example.choices[0])
    (cloze,) = load_source(SourceConfig(task=task, path=str(tmp_path)), "test")
    assert cloze.prompt.endswith("Answer:")
