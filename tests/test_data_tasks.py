"""The built-in tasks: the eight commonsense tasks as the Hub has them, in both wordings, and the demo data."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest

from qdora.data import demo
from qdora.data.commonsense import TEMPLATES, example_of_row, instruction_row
from qdora.data.commonsense_hub import HUB_TASKS, without_wikihow_marks
from qdora.data.example import Example
from qdora.data.row_formats import commonsense_task
from qdora.data.sources import has_split, load_source, open_source
from qdora.errors import HubFailure
from qdora.recipe.data_settings import COMMONSENSE_TASKS, SourceConfig
from tests.data_rows import fault_of, faults_of, says

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
FOUR = "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: air Answer3: fire "
TASKS: dict[str, tuple[dict[str, Any], str, list[str], int, str]] = {
    # task: (row of the Hub, prompt and choices as a cloze question, gold, instruction as published)
    "boolq": (
        {"question": "is ice cold", "answer": True, "passage": "Ice."},
        "Ice.\nQuestion: is ice cold?\nAnswer:",
        ["no", "yes"],
        1,
        "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false",
    ),
    "piqa": (
        {"goal": "cool a drink", "sol1": "add fire", "sol2": " add ice ", "label": 1},
        "Question: cool a drink\nAnswer:",
        ["add fire", "add ice"],
        1,
        "Please choose the correct solution to the question: cool a drink\n\nSolution1: add fire\n\n"
        "Solution2: add ice\n\nAnswer format: solution1/solution2",
    ),
    "siqa": (
        {"context": "Ann fell.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3\n"},
        "Question: Ann fell. Why?\nAnswer:",
        ["a", "b", "c"],
        2,
        "Please choose the correct answer to the question: Ann fell. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
    ),
    "hellaswag": (
        {"ind": 4, "activity_label": "Ski", "ctx": "[header] How to ski", "endings": ["a", "b [step] c"], "label": "0"},
        "Ski: How to ski",
        ["a", "b c"],
        0,
        "Please choose the correct ending to complete the given sentence: Ski: How to ski\n\nEnding1: a "
        "Ending2: b c\n\nAnswer format: ending1/ending2",
    ),
    "winogrande": (
        {"sentence": "Jo met Al, _ left.", "option1": "Jo", "option2": "Al", "answer": "2"},
        "Jo met Al, _ left.\nQuestion: What does the blank _ stand for, Jo or Al?\nAnswer:",
        ["Jo", "Al"],
        1,
        "Please choose the correct answer to fill in the blank to complete the given sentence: Jo met Al, _ left.\n\n"
        "Option1: Jo Option2: Al Answer format: option1/option2",
    ),
    "arc_e": (
        {
            "id": "M1",
            "question": "What melts?",
            "choices": {"text": ["ice", "air", "fire", "light"], "label": ["1", "2", "3", "4"]},
            "answerKey": "1",
        },
        "Question: What melts?\nAnswer:",
        ["ice", "air", "fire", "light"],
        0,
        FOUR + "Answer4: light\n\nAnswer format: answer1/answer2/answer3/answer4",
    ),
    "arc_c": (
        {"id": "M2", "question": "Q?", "choices": {"text": list("abcde"), "label": list("ABCDE")}, "answerKey": "E"},
        "Question: Q?\nAnswer:",
        list("abcde"),
        4,
        "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b Answer3: c Answer4: d "
        "Answer5: e\n\nAnswer format: answer1/answer2/answer3/answer4/answer5",
    ),
    "obqa": (
        {"id": "7", "question_stem": "Q", "choices": {"text": list("abcd"), "label": list("ABCD")}, "answerKey": "B"},
        "Question: Q\nAnswer:",
        list("abcd"),
        1,
        "Please choose the correct answer to the question: Q\n\nAnswer1: a Answer2: b Answer3: c Answer4: d\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
    ),
}
SECRET = ("boolq", "piqa", "siqa", "hellaswag", "winogrande")
"""Tasks whose official test split has no labels."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder in place of the Hub; hub(task, split, rows) writes the files of one task."""

    pins = {place.id: place.revision for place in HUB_TASKS.values()}

    def download(id: str, *, repo_type: str, revision: str, allow_patterns: list[str]) -> str:
        assert (repo_type, len(allow_patterns)) == ("dataset", 1)
        revision = pins[id] if revision == "main" else revision
        if not (tmp_path / id / revision).is_dir():
            raise FileNotFoundError(f"no {id}@{revision}\nin the cache")
        return str(tmp_path / id / revision)

    def write(task: str, split: str, rows: list[dict[str, Any]]) -> None:
        place = HUB_TASKS[task]
        name = place.files.format(split=split).replace("*", "00000-of-00001")
        path: Path = tmp_path / place.id / place.revision / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return write


@pytest.mark.parametrize("task", COMMONSENSE_TASKS)
def test_a_row_of_the_hub_in_both_wordings(task, hub):
    assert set(HUB_TASKS) == set(TEMPLATES) == set(TASKS)
    row, prompt, choices, gold, instruction = TASKS[task]
    hub(task, "train", [row, row])
    opened = open_source(SourceConfig(task=task, revision="main"))
    assert HUB_TASKS[task].revision in str(opened.identity)  # a branch that moves is other content
    _, cloze = opened
    spaced, id = tuple(" " + choice for choice in choices), str(row.get("id", row.get("ind", 1)))
    assert cloze == Example(task, id, prompt, spaced[gold], spaced, gold)
    _, named = load_source(SourceConfig(task=task, format="commonsense170k"))
    names = instruction.rpartition(": ")[2].split("/")
    answer = "true" if task == "boolq" else names[gold]
    said = tuple(f"the correct answer is {name}" for name in names)
    gold = names.index(answer)
    assert named == Example(task, id, ALPACA.format(instruction), said[gold], said, gold)
    known = dict.fromkeys(("arc_e", "arc_c", "obqa"), "arc_or_obqa")
    assert commonsense_task(instruction) == known.get(task, task)
    # where the official test split has no labels, the official validation split is read
    hub(task, "validation" if task in SECRET else "test", [row])
    assert len(load_source(SourceConfig(task=task), "test")) == 1
    assert has_split(SourceConfig(task=task), "validation") == (task not in SECRET)


def test_the_hub_refuses_what_it_does_not_have(hub, monkeypatch):
    row = TASKS["piqa"][0]
    hub("piqa", "train", [row, row | {"label": -1}, row | {"sol2": None}, row | {"label": 2}])
    first, second, third = faults_of(load_source, SourceConfig(task="piqa"))  # of the Hub's layout and of the schema
    assert first.endswith("row 1: label: must be 0 to 1 (a split without labels cannot be used), got -1")
    assert second.endswith("row 2: choices[1]: must be text that is not empty, got null")
    assert third.endswith("got 2")
    for task, change, words in (
        ("boolq", {"answer": "yes"}, "answer: must be true or false, got 'yes'"),
        ("hellaswag", {"endings": "a"}, "endings: must be a list of texts, got 'a'"),
        ("siqa", {"label": "0"}, "label: must be 1 to 3"),
        ("arc_c", {"choices": "a"}, "choices: must hold the lists text and label, got 'a'"),
        ("arc_c", {"answerKey": "F"}, "answerKey: must be one of A, B, C, D, E, got 'F'"),
    ):
        hub(task, "train", [TASKS[task][0] | change])
        assert says(fault_of(load_source, SourceConfig(task=task)), f"row 0: {words}")
    line = fault_of(load_source, SourceConfig(task="obqa"))
    assert says(line, "allenai/openbookqa@388097 ... cannot be read from the Hub ( ... FileNotFoundError ... as path")
    line = fault_of(load_source, SourceConfig(task="boolq"), "validation")
    assert says(line, "boolq (google/boolq): no split 'validation', must be one of train, test")

    def lost(*_: Any, **__: Any) -> None:
        raise Exception("connection reset")  # as httpx does: no OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lost)
    with pytest.raises(HubFailure, match="connection reset"):
        load_source(SourceConfig(task="boolq"))


@pytest.mark.parametrize("choices", [[False, True], ["False", "True"], ["no", "yes"]])
def test_boolq_spellings(choices):
    for question in ("is ice cold", "is ice cold?", "is ice cold ? "):
        row = {"question": question, "choices": choices, "answer": 0}
        example = example_of_row(row, task="boolq", label="b", id="0")
        assert (example.prompt, example.answer) == ("Question: is ice cold?\nAnswer:", " no")
        found = instruction_row(row | {"choices": choices[::-1]}, "boolq")
        assert (found["instruction"], found["answer"]) == (TASKS["boolq"][4], "true")


@pytest.mark.parametrize(
    "task, change, words",
    [
        ("obqa", {"question": ""}, "question: must be text that is not empty, got ''"),
        ("obqa", {"question": None}, "question: must be text that is not empty, got null"),
        ("obqa", {"choices": "ab"}, "choices: must be a list of two or more texts, got 'ab'"),
        ("obqa", {"choices": ["a"]}, "choices: must be a list of two or more texts, got [a]"),
        ("obqa", {"choices": ["a", " "]}, "choices[1]: must be text that is not empty, got ' '"),
        ("obqa", {"choices": ["a", 3]}, "choices[1]: must be text that is not empty, got 3"),
        ("obqa", {"answer": 2}, "answer: must be the index of the right choice, 0 to 1, got 2"),
        ("obqa", {"answer": -1}, "answer: must be ... got -1"),
        ("obqa", {"answer": True}, "answer: must be ... got true"),
        ("obqa", {"answer": "a"}, "answer: must be ... got 'a'"),
        ("obqa", {"context": 3}, "context: must be text or null, got 3"),
        ("boolq", {}, "choices: must be false, true ... for boolq, got 'a'"),
        ("winogrande", {}, "a sentence with a blank '_'"),
    ],
)
def test_faulty_rows(task, change, words):
    row = {"question": "Q?", "choices": ["a", "b"], "answer": 0} | change
    for call in (lambda: example_of_row(row, task=task, label=task, id="0"), lambda: instruction_row(row, task)):
        assert says(fault_of(call), words)


def test_names_of_answers():
    many = "/".join("a" * 5000)
    assert commonsense_task("Answer format: option1/option2 \n") == "winogrande"
    wrong = ["/option1/option2", "option1", "option1/option1", "red/green", "option1/option2\n\nmore"]
    for text in (*wrong, f"{many} x", f"{many}/"):
        start = time.process_time()
        assert commonsense_task(f"Answer format: {text}") == ""
        assert time.process_time() - start < 2


def test_wikihow_marks():
    for text, expected in (
        ("[header] How to ski [title] Go up [step] Go down. [substeps] Rest.", "How to ski. Go up Go down. Rest."),
        ("[header] How to ski? [title] Go up.", "How to ski. Go up."),
        ("A man  sits. [style | cut] stays.", "A man sits. [style | cut] stays."),
    ):
        assert without_wikihow_marks(text) == expected


# The demo data

SIZES = {"train": 400, "validation": 80, "test": 160}
NUM_CHOICES = {"facts": 2, "odd": 4, "cause": 2, "howto": 2, "next": 4}
# Fixed on purpose: a changed table changes every published number on the demo data. Say so in the changelog.
DIGESTS = {
    "facts": ("eeda64fff4ded04d", "bb72c5c99eaec718", "37c0f4f6667ee85e"),
    "odd": ("9e197210a178d02d", "80a34d7511cb6513", "179f7d26f47661c1"),
    "cause": ("a37bd0bc93fdcddd", "c7c80a18b43e5d6e", "485dada4ba43cf57"),
    "howto": ("3cff6972ed8c85e0", "4275f7555b4a18ff", "f57d13050d4dd654"),
    "next": ("a17d405bb2b89565", "1d1d1d06470a8e36", "7dc6a211517ac2a9"),
}


@pytest.mark.parametrize("family", demo.FAMILIES)
def test_demo_data_is_fixed_and_well_formed(family):
    assert tuple(demo.FAMILIES) == tuple(NUM_CHOICES)
    number, found = NUM_CHOICES[family], {split: demo.examples(family, split) for split in reversed(SIZES)}
    for (split, size), digest in zip(SIZES.items(), DIGESTS[family], strict=True):
        items = found[split]
        rows = [[item.task, item.id, item.prompt, item.answer, list(item.choices), item.gold] for item in items]
        text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest
        assert len({item.id for item in items}) == len(items) == size
        assert Counter(item.gold for item in items) == dict.fromkeys(range(number), size // number)
        for item in items:
            assert (item.task, len(item.choices), len(set(item.choices))) == (f"demo/{family}", number, number)
            assert all(choice[0] == " " and choice.strip() == choice[1:] for choice in item.choices)
            assert item.prompt == item.prompt.strip()
            assert item.prompt.endswith(":")
    prompts = [item.prompt for items in found.values() for item in items]
    assert len(set(prompts)) == len(prompts)
    if family != "facts":  # no choice of a split is in another
        seen = [{choice for item in items for choice in item.choices} for items in found.values()]
        assert not any(one & other for one, other in itertools.combinations(seen, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        demo.examples(family, "test")[0].prompt = ""
    found["test"].clear()
    assert len(demo.examples(family, "test")) == 160


def test_wrong_names_of_demo_tasks_are_refused_together():
    family, split = faults_of(demo.examples, "od", "tests")
    assert says(family, "demo/od: no such task ... Did you mean 'odd'?")
    assert says(split, "no split 'tests', must be one of train, validation, test. Did you mean 'test'?")
