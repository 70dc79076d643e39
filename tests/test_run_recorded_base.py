"""A run is resumed, evaluated and exported on the base that it was trained on, or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdora.errors import UserError
from qdora.export.export_run import export_run
from qdora.recipe.recipe_file import load_recipe, override, resolved_yaml
from qdora.recipe.settings import Recipe
from qdora.run.evaluate import evaluate_target
from qdora.run.load_run import load_run
from qdora.run.open_directory import resumed_recipe
from qdora.run.train import train_run
from tests import tiny_run, tiny_tokenizer

OLD, NEW = "a" * 40, "b" * 40


def change_weights_(directory: Path) -> None:
    """Other weights in files of the same names and sizes."""
    file = directory / "model.safetensors"
    torch.manual_seed(1)
    changed = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """org/small in a cache of the Hub: two commits with other weights, main at the older one."""
    repository = tmp_path / "cache/models--org--small"
    for commit in (OLD, NEW):
        tiny_run.write_model(repository / "snapshots" / commit)
    change_weights_(repository / "snapshots" / NEW)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return repository


def hub_recipe(tmp_path: Path, **changes: object) -> Recipe:
    return tiny_run.recipe(tmp_path, model__source="org/small", train__steps=2, eval__at_start=False, **changes)


def nll(target: Path) -> float:
    return float(evaluate_target(str(target))["evaluation"]["average"]["nll_per_token"])


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_moved_branch_changes_no_run(tmp_path: Path, hub: Path, revision: str | None) -> None:
    recipe, run = hub_recipe(tmp_path, model__revision=revision), tmp_path / "run"
    train_run(recipe, run)
    assert load_recipe(run / "recipe.yaml").model.revision == OLD
    for file, place in (("adapter_config.json", ()), ("qdora.json", ("base",))):
        found = json.loads((run / "adapter" / file).read_text())
        for key in place:
            found = found[key]
        assert found["revision"] == OLD
    before = nll(run)
    (hub / "refs/main").write_text(NEW)
    assert nll(run) == before
    assert export_run(run, tmp_path / "out")["verification"]["passed"]
    given = tmp_path / "given.yaml"
    given.write_text(resolved_yaml(recipe))
    train_run(resumed_recipe(run, str(given), ["train.steps=3"]), run, resume=True)
    assert load_recipe(run / "recipe.yaml").model.revision == OLD
    shutil.rmtree(hub / "snapshots" / OLD)
    with pytest.raises(
        UserError, match=f"org/small: its revision '{OLD}' is not in the Hub's cache, and the Hub cannot"
    ):
        load_run(run)


def test_resume_with_a_recipe_without_revision(tmp_path: Path, hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a study does, whose cells have no revision."""
    recipe, run = hub_recipe(tmp_path), tmp_path / "run"
    train_run(recipe, run)
    (hub / "refs/main").write_text(NEW)
    train_run(override(recipe, ["train.steps=4"]), run, resume=True)
    assert load_recipe(run / "recipe.yaml").model.revision == OLD
    with pytest.raises(UserError, match="org/small is not the base that was trained on"):
        train_run(override(recipe, ["train.steps=4", "model.revision=main"]), run, resume=True)
    (tmp_path / "mine.yaml").write_text(resolved_yaml(override(recipe, ["train.steps=4"])))
    with caplog.at_level(logging.WARNING, "qdora"):
        resumed_recipe(run, str(tmp_path / "mine.yaml"), [])
    assert "model.revision" not in caplog.text


@pytest.fixture
def words(hub: Path) -> Path:
    """org/words beside org/small: two commits of a tokenizer with other ids, main at the older one."""
    repository = hub.with_name("models--org--words")
    for commit in (OLD, NEW):
        tokenizer = tiny_tokenizer.make()
        if commit == NEW:
            tokenizer.add_tokens(["+", "follows"])
        tokenizer.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(OLD)
    return repository


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_moved_branch_of_the_tokenizer_changes_no_run(
    tmp_path: Path, words: Path, revision: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, run = (
        hub_recipe(tmp_path, model__tokenizer="org/words", model__tokenizer_revision=revision),
        tmp_path / "run",
    )
    train_run(recipe, run)
    own = load_recipe(run / "recipe.yaml").model
    assert (own.tokenizer, own.tokenizer_revision) == ("org/words", OLD)
    before = nll(run)
    (words / "refs/main").write_text(NEW)
    assert nll(run) == before
    given = tmp_path / "given.yaml"
    given.write_text(resolved_yaml(recipe))
    with caplog.at_level(logging.WARNING, "qdora"):
        again = resumed_recipe(run, str(given), ["train.steps=3"])
    assert "model.tokenizer_revision" not in caplog.text
    train_run(again, run, resume=True)
    if revision is None:  # as a study resumes its cells
        train_run(override(recipe, ["train.steps=4"]), run, resume=True)
    assert load_recipe(run / "recipe.yaml").model.tokenizer_revision == OLD
    with pytest.raises(UserError, match="source letters differs from the data of the checkpoint"):
        train_run(override(again, [f"model.tokenizer_revision={NEW}"]), run, resume=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a run on it, which tests copy."""
    root = tmp_path_factory.mktemp("local")
    train_run(tiny_run.recipe(root, train__steps=2, eval__at_start=False), root / "run")
    return root


def moved(trained: Path, place: Path) -> Path:
    """A copy of the folder's run whose recipe names a copy of the base; times of its files differ."""
    shutil.copytree(trained / "run", place / "run")
    shutil.copytree(trained / "model", place / "base", copy_function=shutil.copyfile)
    recipe = place / "run/recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained / "model"), str(place / "base")))
    return place / "run"


def test_a_changed_base_is_refused(trained: Path, tmp_path: Path) -> None:
    run = moved(trained, tmp_path)
    before = nll(run)
    assert before == nll(trained / "run")
    recipe = load_recipe(run / "recipe.yaml", ["train.steps=3"])
    change_weights_(tmp_path / "base")
    what = r"run: \S*base is not the base that was trained on: model\.safetensors differs\. Fix: restore the base"
    with pytest.raises(UserError, match=what):
        nll(run)
    with pytest.raises(UserError, match=what):
        export_run(run, tmp_path / "out")
    with pytest.raises(UserError, match=what):
        train_run(recipe, run, resume=True)
    assert load_recipe(run / "recipe.yaml").train.steps == 2
    assert not (tmp_path / "out").exists()


def test_a_run_of_an_older_version_goes_on(tmp_path: Path, hub: Path) -> None:
    recipe, run = hub_recipe(tmp_path), tmp_path / "run"
    train_run(recipe, run)
    own = load_recipe(run / "recipe.yaml")
    (run / "recipe.yaml").write_text(resolved_yaml(own).replace(f"  revision: {OLD}\n", ""))
    assert load_recipe(run / "recipe.yaml").model.revision is None
    record = json.loads((run / "environment.json").read_text())
    del record["base"]
    (run / "environment.json").write_text(json.dumps(record))
    assert nll(run) > 0
    train_run(load_recipe(run / "recipe.yaml", ["train.steps=3"]), run, resume=True)
    assert load_recipe(run / "recipe.yaml").model.revision == OLD  # from now on it is known
    change_weights_(hub / "snapshots" / OLD)
    with pytest.raises(UserError, match="is not the base that was trained on"):
        load_run(run)
