"""`qdora eval --data`: a file of the user's own is scored as a validation split of its source is."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from qdora.data.build_data import run_examples
from qdora.data.given_data import given_source, trained_on
from qdora.errors import UserError
from qdora.files.run_directory import open_run
from qdora.recipe.data_settings import SourceConfig
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.run_page import run_facts
from qdora.run.train import train_run
from tests import tiny_run


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def products(first: int) -> list[dict[str, Any]]:
    return [{"ask": f"{first} x {other} =", "reply": f" {first * other}"} for other in range(2, 8)]


def read(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one source with columns of its own, whose validation data is held.jsonl."""
    root = tmp_path_factory.mktemp("own")
    source = {
        "source": str(write(root / "mine/products.jsonl", products(3))),
        "columns": {"prompt": "ask", "completion": "reply"},
        "validation": str(write(root / "mine/held.jsonl", products(4))),
        "name": "times",
    }
    changes: dict[str, Any] = {"data__mix": [source], "train__steps": 2, "train__checkpoint_every": ...}
    train_run(tiny_run.one_layer_recipe(root, **changes), root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two sources."""
    root = tmp_path_factory.mktemp("two")
    train_run(tiny_run.one_layer_recipe(root, train__steps=1, train__checkpoint_every=...), root / "run")
    return root / "run"


def test_a_file_is_scored_as_the_validation_data_of_the_source_and_stands_on_the_page(run: Path) -> None:
    held = run.parent / "mine/held.jsonl"
    own = read(run / "eval/step-2.json")
    document = evaluate_target(str(run), EvalOptions(data=str(held)))
    assert document["split"] is None
    assert document["evaluation"]["tasks"] == {"held": own["tasks"]["times"]}
    assert document["evaluation"]["tasks"]["held"]["num_examples"] == 4  # eval.limit of the run
    (kept,) = (run / "eval").glob("final-data-held.jsonl-*.json")
    found = read(kept)
    assert found["data"] == str(held)
    assert found["step"] == 2
    assert [each["nll"] for each in found["per_example"]] == [each["nll"] for each in own["per_example"]]
    evaluate_target(str(run), EvalOptions(data=str(held), base_only=True))
    facts = run_facts(open_run(run))
    (compared,) = (each for each in facts["evaluations"] if "data-held" in each["data"])
    assert compared["nll_per_token"][0]["num_examples"] == 4
    assert compared["data"] == kept.stem.removeprefix("final-")


def test_a_model_without_a_run_scores_it_too(run: Path) -> None:
    rows = [{"prompt": row["ask"], "completion": row["reply"]} for row in products(5)]
    file, model = write(run.parent / "mine/plain.jsonl", rows), str(run.parent / "model")
    (result,) = evaluate_target(model, EvalOptions(data=str(file)))["evaluation"]["tasks"].values()
    assert result["num_examples"] == 6
    like = evaluate_target(model, EvalOptions(data=str(run.parent / "mine/held.jsonl"), like=run))
    assert like["evaluation"]["tasks"].keys() == {"held"}  # read like the run's source
    assert like["beside"] == {}


def test_of_several_sources_tasks_names_the_one_that_it_is_read_like(of_two: Path) -> None:
    """Without it the format is that of the columns."""
    rows = [json.loads(line) for line in (of_two.parent / "data/letters.jsonl").read_text().splitlines()[:3]]
    file = write(of_two.parent / "more/test.jsonl", rows)
    found = evaluate_target(str(of_two), EvalOptions(data=str(file)))["evaluation"]["tasks"]["test"]
    assert (found["num_examples"], found["chance"]) == (3, 0.5)
    mix = [
        SourceConfig.model_validate({"source": "a.jsonl", "template": {"prompt": "", "completion": "{{ text }}"}}),
        SourceConfig.model_validate({"source": "org/b", "config": "main", "columns": {"text": "body"}}),
    ]
    assert given_source("/x/new.csv", mix).columns is None
    assert given_source("/x/new.csv", mix, "a").template == mix[0].template
    like_b = given_source("/x/new.csv", mix, "b")
    assert (like_b.columns, like_b.config, like_b.label) == ({"text": "body"}, None, "new")
    assert given_source("org/b", mix).config == "main"  # the same data set
    assert given_source("org/c", mix[:1]).template == mix[0].template  # the only source
    assert given_source("/x/new.csv", [SourceConfig(task="boolq")]).task is None


def test_a_source_of_the_same_content_gives_its_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So does any where all are read the same way; where that is not clear, a warning names what can be meant."""
    rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(5)]
    a, held = write(tmp_path / "a.jsonl", rows[:2]), write(tmp_path / "held.jsonl", rows[2:4])
    copies = [write(tmp_path / f"copies/{name}.jsonl", part) for name, part in (("x", rows[:2]), ("y", rows[2:4]))]
    new = write(tmp_path / "new.jsonl", rows[4:])
    chat = SourceConfig.model_validate({"source": str(a), "validation": str(held), "chat": True})
    other = SourceConfig.model_validate({"source": str(tmp_path / "b.jsonl"), "name": "other"})
    for place in (a, held, *copies):
        assert given_source(str(place), [chat, other]).chat
    also_chat = other.model_copy(update={"chat": True})
    assert given_source(str(new), [chat, also_chat]).chat
    assert not given_source(str(new), [other, other]).chat
    assert caplog.messages == []
    assert not given_source(str(new), [chat, other]).chat
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{new} is read by the names of its columns alone")
    assert caplog.messages[0].endswith("--tasks: a.")


def test_a_split_of_a_folder_is_scored(of_two: Path, tmp_path: Path) -> None:
    write(tmp_path / "own/test.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}])
    document = evaluate_target(str(of_two), EvalOptions(data=str(tmp_path / "own"), split="test"))
    assert document["split"] == "test"
    assert document["evaluation"]["tasks"]["own"]["num_examples"] == 1
    assert list((of_two / "eval").glob("final-test-data-own-*.json"))
    with pytest.raises(UserError, match=r"own: no file for split 'validation'.*there are test"):
        evaluate_target(str(of_two), EvalOptions(data=str(tmp_path / "own")))


def test_a_pattern_below_a_folder_whose_name_has_marks_of_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a[1]/held.jsonl", products(4))
    monkeypatch.chdir(tmp_path / "a[1]")
    found = evaluate_target(str(run), EvalOptions(data="h*.jsonl", limit=2))["evaluation"]["tasks"]
    assert [each["num_examples"] for each in found.values()] == [2]


def test_a_file_of_the_content_of_a_training_file_is_told(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = write(tmp_path / "copy.jsonl", products(3))
    with caplog.at_level(logging.WARNING, "qdora"):
        evaluate_target(str(run), EvalOptions(data=str(copy), base_only=True))
        evaluate_target(str(run), EvalOptions(data=str(run.parent / "mine/held.jsonl")))
        assert caplog.messages == []
        evaluate_target(str(run), EvalOptions(data=str(copy)))
    assert caplog.messages == [
        f"The run was trained on {copy} (source times). The scores say nothing of new data.",
    ]
    hub = SourceConfig.model_validate({"source": "org/b", "config": "main", "validation": "test"})
    assert trained_on(hub, "train", [hub]) == ["b"]
    assert trained_on(hub, "test", [hub]) == []


def test_what_does_not_fit_is_refused_with_what_can_be_done(of_two: Path, tmp_path: Path) -> None:
    file = str(write(tmp_path / "test.jsonl", [{"body": "a", "title": "b"}]))
    (tmp_path / "tasks/piqa").mkdir(parents=True)
    for options, message in (
        ({"data": str(tmp_path / "tset.jsonl")}, "tset.jsonl: no such file. Did you mean 'test.jsonl'"),
        ({"data": file}, "fit no format"),
        ({"data": file, "split": "test"}, "--split: .*test.jsonl has no splits"),
        ({"data": file, "tasks": ["sums", "letters"]}, "--tasks: with --data names one source.*sums.*letters"),
        ({"data": file, "tasks": ["sum"]}, "--tasks: got 'sum', with --data .*: sums, letters. Did you mean 'sums'"),
        ({"data": file, "tasks": ["piqa"]}, "--data: must be a folder of <task>/<split> files with --tasks piqa"),
        ({"data": str(tmp_path / "tasks")}, "--data: .*a folder for each task. Fix: add --tasks with one of piqa"),
        ({"split": "test"}, "--split: sums has no test split, .* Fix: name a file with --data"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_target(str(of_two), EvalOptions(**options))  # type: ignore[arg-type]


def test_a_run_without_validation_data_says_so(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data__validation_fraction": 0, "eval__limit": ..., "train__checkpoint_every": ...}
    train_run(tiny_run.one_layer_recipe(tmp_path, train__steps=1, **changes), tmp_path / "run")
    with pytest.raises(UserError, match=r"--split: the run has no validation examples. Fix: .* --data"):
        evaluate_target(str(tmp_path / "run"))


def test_a_split_that_a_data_set_on_the_hub_may_have_is_named_in_the_fix(tmp_path: Path) -> None:
    mix = [{"source": "org/b", "validation": "dev"}]
    recipe = tiny_run.one_layer_recipe(tmp_path, data__mix=mix, data__validation_fraction=...)
    with pytest.raises(UserError, match=r"--split: b has no test split, .* --data org/b --split test"):
        run_examples(recipe, "test")
