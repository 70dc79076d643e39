"""Rows as the Hub has them -> schema rows; the Hub itself is a folder here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pandas as pd
import pytest

from qdora.data.commonsense import TEMPLATES
from qdora.data.commonsense_hub import HUB_TASKS, without_wikihow_marks
from qdora.data.sources import has_split, load_source, open_source, train_and_validation
from qdora.errors import HubFailure, UserError
from qdora.recipe.data_settings import DataConfig, SourceConfig

HUB_ROWS: dict[str, tuple[dict[str, Any], str, tuple[str, ...], int]] = {
    # task: (row of the Hub, prompt, choices, gold)
    "boolq": (
        {"question": "is ice cold", "answer": True, "passage": "Ice."},
        "Ice.\nQuestion: is ice cold?\nAnswer:",
        (" no", " yes"),
        1,
    ),
    "piqa": (
        {"goal": "open a jar", "sol1": "bite", "sol2": "twist", "label": 1},
        "Question: open a jar\nAnswer:",
        (" bite", " twist"),
        1,
    ),
    "siqa": (
        {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3\n"},
        "Question: C. Q?\nAnswer:",
        (" a", " b", " c"),
        2,
    ),
    "hellaswag": (
        {"ind": 4, "activity_label": "Ski", "ctx": "[header] How to ski", "endings": ["a", "b [step] c"], "label": "0"},
        "Ski: How to ski",
        (" a", " b c"),
        0,
    ),
    "winogrande": (
        {"sentence": "Jo met Al, _ left.", "option1": "Jo", "option2": "Al", "answer": "2"},
        "Jo met Al, _ left.\nQuestion: What does the blank _ stand for, Jo or Al?\nAnswer:",
        (" Jo", " Al"),
        1,
    ),
    "arc_e": (
        {
            "id": "M1",
            "question": "Q?",
            "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
        "Question: Q?\nAnswer:",
        (" a", " b", " c"),
        2,
    ),
    "arc_c": (
        {"id": "M2", "question": "Q?", "choices": {"text": list("abcde"), "label": list("ABCDE")}, "answerKey": "E"},
        "Question: Q?\nAnswer:",
        (" a", " b", " c", " d", " e"),
        4,
    ),
    "obqa": (
        {"id": "7", "question_stem": "Q", "choices": {"text": list("abcd"), "label": list("ABCD")}, "answerKey": "B"},
        "Question: Q\nAnswer:",
        (" a", " b", " c", " d"),
        1,
    ),
}


class ReadError(Exception):
    """As that of httpx, which the client of the Hub lets through: no OSError."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder in place of the Hub; hub(task, split, rows) writes the files of one task."""

    def download(id: str, *, repo_type: str, revision: str, allow_patterns: list[str]) -> str:
        assert repo_type == "dataset"
        folder = tmp_path / id / revision
        if not folder.is_dir():
            raise FileNotFoundError(f"no {id}@{revision}\nin the cache")
        assert len(allow_patterns) == 1
        return str(folder)

    def write(task: str, split: str, rows: list[dict[str, Any]]) -> None:
        place = HUB_TASKS[task]
        name = place.files.format(split=split).replace("*", "00000-of-00001")
        path: Path = tmp_path / place.id / place.revision / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return write


def test_all_eight_tasks_have_a_pinned_place():
    assert set(HUB_TASKS) == set(TEMPLATES) == set(HUB_ROWS)
    for place in HUB_TASKS.values():
        assert len(place.revision) == 40
        assert int(place.revision, 16) > 0


@pytest.mark.parametrize("task", HUB_ROWS)
def test_a_row_of_the_hub(task, hub):
    row, prompt, choices, gold = HUB_ROWS[task]
    hub(task, "train", [row, row])
    examples = load_source(SourceConfig(task=task))
    assert len(examples) == 2
    assert (examples[1].prompt, examples[1].choices, examples[1].gold) == (prompt, choices, gold)
    assert examples[1].task == task


@pytest.mark.parametrize("task", HUB_ROWS)
def test_our_test_split_has_labels(task, hub):
    """Where the official test split has none, the official validation split is read."""
    secret = task in ("boolq", "piqa", "siqa", "hellaswag", "winogrande")
    hub(task, "validation" if secret else "test", [HUB_ROWS[task][0]])
    assert len(load_source(SourceConfig(task=task), "test")) == 1
    assert has_split(SourceConfig(task=task), "validation") == (not secret)


def test_rows_without_labels_are_named(hub):
    row = HUB_ROWS["piqa"][0]
    hub("piqa", "train", [row, row | {"label": -1}, row | {"sol2": None}])
    with pytest.raises(UserError) as error:
        load_source(SourceConfig(task="piqa"))
    first, second = error.value.faults  # of the Hub's layout and of the schema, in one answer
    assert first.endswith("row 1: label: must be 0 to 1 (a split without labels cannot be used), got -1")
    assert second.endswith("row 2: choices[1]: must be text that is not empty, got null")


def test_no_connection_is_one_line(hub):
    with pytest.raises(
        UserError, match=r"^google/boolq@35b2\w+: cannot be read from the Hub .*FileNotFoundError.*path"
    ) as error:
        load_source(SourceConfig(task="boolq"))
    assert "\n" not in str(error.value)


def test_a_connection_lost_in_the_middle_is_a_failure_of_the_hub(monkeypatch):
    def download(*_, **__):
        raise ReadError("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(HubFailure, match=r"^google/boolq@35b2\w+: cannot be read from the Hub \(ReadError: connection"):
        load_source(SourceConfig(task="boolq"))


def test_a_branch_that_moved_is_other_content(monkeypatch, tmp_path):
    """`identity` decides whether kept tokens are read in place of the rows."""
    place, commits = HUB_TASKS["boolq"], ["a" * 40, "b" * 40]
    for commit in commits:
        file = tmp_path / commit / place.files.format(split="train").replace("*", "0")
        file.parent.mkdir(parents=True)
        pd.DataFrame([HUB_ROWS["boolq"][0]]).to_parquet(file)

    def identity(commit: str) -> str | None:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / commit))
        return open_source(SourceConfig(task="boolq", revision="main")).identity

    first, second = map(identity, commits)
    assert first == identity(commits[0])
    assert first != second


def test_unknown_split(hub):
    with pytest.raises(UserError, match=r"boolq \(google/boolq\): no split 'validation', must be one of train, test"):
        load_source(SourceConfig(task="boolq"), "validation")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[header] How to ski [title] Go up [step] Go down. [substeps] Rest.", "How to ski. Go up Go down. Rest."),
        ("[header] How to ski? [title] Go up.", "How to ski. Go up."),
        ("A man  sits. he", "A man sits. he"),
        ("A [style | cut] stays.", "A [style | cut] stays."),
    ],
)
def test_wikihow_marks(text, expected):
    assert without_wikihow_marks(text) == expected


def test_own_data_on_the_hub(monkeypatch):
    calls = []

    def load_dataset(source, split, revision):
        calls.append((source, split, revision))
        return datasets.Dataset.from_list([{"prompt": "1+1=", "completion": " 2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [example] = load_source(SourceConfig(source="me/sums", split="dev", revision="v1"))
    assert (example.prompt, example.answer, example.task) == ("1+1=", " 2", "sums")
    assert calls == [("me/sums", "dev", "v1")]


def test_a_part_of_a_split_of_the_hub_is_validated_on(monkeypatch):
    def load_dataset(source, split, revision):
        return datasets.Dataset.from_list([{"prompt": split, "completion": " 2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for validation in ("train[95%:]", "train[90%:95%]+test[:5]", "dev+test"):
        source = SourceConfig(source="me/sums", split="train[:90%]", validation=validation)
        train, held_out = train_and_validation(source, DataConfig(mix=(source,)))
        assert [each.prompt for each in (*train, *held_out)] == ["train[:90%]", validation]


def test_a_mistyped_folder_gets_the_nearest_name_and_a_closed_data_set_the_login(monkeypatch, tmp_path):
    (tmp_path / "data/chat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    missing = "Dataset 'data/chta' doesn't exist on the Hub or cannot be accessed."
    for text, fault in (
        (
            missing,
            "no such file or directory, and no data set of that name on the Hub. Did you mean 'chat'? If it is "
            "private, run: hf auth login",
        ),
        (
            "Dataset 'data/chta' is a gated dataset on the Hub. You must be authenticated to access it.",
            "the data set is gated. Fix: accept its terms on its page on the Hub, then run: hf auth login",
        ),
    ):

        def load_dataset(*args, text=text, **kwargs):
            raise datasets.exceptions.DatasetNotFoundError(text)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(HubFailure) as caught:
            load_source(SourceConfig(source="data/chta"))
        assert str(caught.value) == f"data/chta: {fault}"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Unknown split"),
        ConnectionError("no\nnetwork"),
        RuntimeError("scripts"),
        ReadError("reset"),
    ],
)
def test_own_data_that_the_hub_does_not_give(monkeypatch, error, tmp_path):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubFailure, match=r"^me/sums: cannot be read from the Hub") as caught:
        load_source(SourceConfig(source="me/sums"))
    assert "\n" not in str(caught.value)
    (tmp_path / "me/sums").mkdir(parents=True)
    with pytest.raises(UserError, match=r"write \./me/sums"):
        load_source(SourceConfig(source="me/sums"))
