"""qdora plan: the mix of a run beforehand, by the same numbers as the run's own mix.json, without its model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from qdora.cli import app
from qdora.errors import UserError
from qdora.files.atomic import json_text
from qdora.plan.plan_view import plan_run
from qdora.recipe.recipe_file import resolved_yaml
from qdora.run import load_base
from qdora.run.train import train_run
from tests import tiny_run
from tests.run_files import trained


def test_plan_and_run_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_run.one_layer_recipe(tmp_path, train__steps=12, data__strategy="equal", eval__at_start=False)
    train_run(recipe, tmp_path / "run")
    monkeypatch.setattr(load_base, "load_model", None)  # nothing may call it
    shown = io.StringIO()
    found = plan_run(recipe, "r.yaml", console=Console(file=shown, width=130))
    assert json.loads(json_text(found["mix"])) == json.loads((tmp_path / "run/mix.json").read_text())
    assert [part["num_draws"] for part in found["mix"]["sources"]] == [24, 24]
    assert [part["num_examples"] for part in found["mix"]["sources"]] == [28, 22]  # without those held out
    steps = trained(tmp_path / "run")
    assert sum(line["num_tokens"] for line in steps) == sum(part["num_tokens_seen"] for part in found["mix"]["sources"])
    for text in ("12 steps, 48 examples", "sums", "letters", "50.0%", "1.09"):
        assert text in shown.getvalue()
    log = (tmp_path / "run/log.txt").read_text()
    assert "letters: examples 22, tokens " in log
    assert ", asked 50.0%, seen 50.0%, " in log


def test_a_plan_refuses_what_a_run_refuses_and_does_without_a_tokenizer(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    strange = tiny_run.one_layer_recipe(tmp_path, data__template_kwargs={"nonsense": True})
    with pytest.raises(UserError, match=r"data\.template_kwargs: the chat template does not read .*nonsense"):
        plan_run(strange, "r.yaml", console=console)
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    found = plan_run(tiny_run.one_layer_recipe(tmp_path), "r.yaml", console=console)
    assert "because there is no tokenizer: model.tokenizer: " in found["memory"]["assumptions"][0]


def test_a_run_longer_than_its_data_is_refused_beforehand(tmp_path: Path) -> None:
    recipe = tiny_run.one_layer_recipe(tmp_path, train__steps=12)
    mix = [{"source": part.source, "max_epochs": 0.5} for part in recipe.data.mix]
    short = tiny_run.one_layer_recipe(tmp_path, train__steps=12, data__mix=mix)
    with pytest.raises(UserError, match=r"^train.steps: must be at most .* max_epochs .* leaves 25 .* got 12"):
        plan_run(short, "r.yaml")
    with pytest.raises(UserError, match=r"^train.steps: must be at most .* got 12"):
        train_run(short, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    seven = tiny_run.one_layer_recipe(tmp_path, train__steps=7, data__mix=mix, eval__at_start=False)
    train_run(seven, tmp_path / "run")
    steps = trained(tmp_path / "run")
    assert [line["num_examples"] for line in steps] == [4, 4, 4, 4, 4, 4, 1]


def test_a_step_that_repeats_the_data_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """train.epochs: 1 is one step that fills itself with the same examples again and again."""
    size: dict[str, Any] = {
        "train__steps": ...,
        "train__batch": ...,
        "train__epochs": 1,
        "train__tokens_per_step": 2500,
    }
    recipe = tiny_run.one_layer_recipe(tmp_path, **size, train__checkpoint_every=..., eval__at_start=False)
    plan_run(recipe, "r.yaml", console=Console(file=io.StringIO()))
    (record,) = [each for each in caplog.records if "each step repeats the data" in each.getMessage()]
    assert record.levelname == "WARNING"
    train_run(recipe, tmp_path / "run", console=Console(file=io.StringIO()))
    assert (tmp_path / "run/log.txt").read_text().count(record.getMessage()) == 1
    (step,) = trained(tmp_path / "run")
    assert f"An optimizer step takes {step['num_examples']} examples, but the training data" in record.getMessage()
    caplog.clear()
    plan_run(tiny_run.one_layer_recipe(tmp_path), "r.yaml", console=Console(file=io.StringIO()))
    assert not [each for each in caplog.records if each.levelname == "WARNING"]


def test_faulty_rows_of_a_local_file_are_an_error_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_run.one_layer_recipe(tmp_path)
    with (tmp_path / "data/sums.jsonl").open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(UserError, match=r"^data\.mix\[0\]: .*sums\.jsonl: line \d+: not JSON"):
        plan_run(recipe, "r.yaml")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    away = tiny_run.one_layer_recipe(tmp_path, data__mix=[{"source": "nobody/nothing-here"}], train__steps=1)
    shown = io.StringIO()
    assert plan_run(away, "r.yaml", console=Console(file=shown, width=130))["mix"] is None
    assert "because the data cannot be read: data.mix[0]: nobody/nothing-here: cannot be" in shown.getvalue()


def test_plan_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(resolved_yaml(tiny_run.one_layer_recipe(tmp_path)))

    def run(*options: str) -> Result:
        return CliRunner().invoke(app, ["plan", str(file), *options])

    done = run("--json", "-s", "train.steps=3")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["mix"]["num_steps"] == 3
    done = run("-s", "data.mix[0].source=nowhere.jsonl")
    assert done.exit_code == 2
    assert "data.mix[0].source: no such file" in done.stderr
    over = run("--json", "-s", "train.steps=3", "--budget", "1MiB")
    assert over.exit_code == 1
    assert json.loads(over.stdout)["memory"]["fits"] is False
