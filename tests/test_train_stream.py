"""A run on a mix with a stream: resumed equals uninterrupted; what is shown says what is not known."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from qdora.data import stream
from qdora.data.loader import StepLoader
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.plan.plan_view import plan_run
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.train import train_run
from tests import tiny_run
from tests.run_files import stop_after


def recipe(root: Path, **changes: Any) -> Any:
    """sums is streamed, in windows of 5 rows; letters is not."""
    sums, letters = tiny_run.write_data(root / "data")
    mix = [{"source": str(sums), "stream": True, "shuffle_window": 5}, {"source": str(letters)}]
    return tiny_run.recipe(root, data__mix=mix, data__strategy="equal", data__too_long="drop", **changes)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run(recipe(tmp_path), tmp_path / "whole")
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_run(recipe(tmp_path), tmp_path / "run")
    monkeypatch.undo()
    train_run(recipe(tmp_path), tmp_path / "run", resume=True)
    one, two = (load_file(run / "adapter/adapter_model.safetensors") for run in (tmp_path / "whole", tmp_path / "run"))
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)
    states = [
        json.loads((tmp_path / run / "checkpoints/step-6/state.json").read_text())["loader"] for run in ("whole", "run")
    ]
    assert states[0] == states[1]
    assert states[0]["streams"]["sums"]["num_drawn"] == 12
    log = (tmp_path / "whole/log.txt").read_text()
    assert "sums: examples unknown, tokens unknown, asked 50.0%, seen 50.0%, tokens seen unknown, passes unknown" in log
    assert "sums: 12 examples seen, 0 cut, 0 dropped, 0 complete passes." in log
    assert sorted(json.loads((tmp_path / "whole/eval/step-6.json").read_text())["tasks"]) == ["letters"]
    with pytest.raises(UserError, match=r"--split: a stream \(sums\) has only the splits validation, test"):
        evaluate_target(str(tmp_path / "whole"), EvalOptions(split="train"))
    same = recipe(tmp_path)
    (tmp_path / "data/sums.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    with pytest.raises(UserError, match=r"^--resume: source sums differs from the data of the checkpoint \(its"):
        train_run(same, tmp_path / "run", resume=True)


def test_a_plan_with_a_stream(tmp_path: Path) -> None:
    shown = io.StringIO()
    tiny_run.write_model(tmp_path / "model", num_hidden_layers=1)
    plan = plan_run(recipe(tmp_path), "r.yaml", console=Console(file=shown, width=130))
    assert plan["mix"]["sources"][0]["num_examples"] is None
    assert "unknown" in shown.getvalue()
    by_tokens = recipe(tmp_path, train__batch=..., train__tokens_per_step=200)
    plan_run(by_tokens, "r.yaml", console=Console(file=shown, width=130))
    assert "6 steps, about " in shown.getvalue()
    with pytest.raises(UserError, match=r"^sums: data.strategy proportional needs the size of every source"):
        plan_run(recipe(tmp_path).model_copy(update={"data": proportional(tmp_path)}), "r.yaml")


def proportional(root: Path) -> Any:
    return recipe(root).data.model_copy(update={"strategy": "proportional"})


def spoil(file: Path, line: int) -> str:
    """Cut a line of a file; returns the file's old text."""
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    file.write_text("".join([*lines[:line], lines[line][:9] + "\n", *lines[line + 1 :]]))
    return text


def test_a_faulty_row_ends_a_run_with_its_work_saved_and_once_mended_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both runs take each row once, in one order: mending the row gives the undisturbed result."""
    monkeypatch.setattr(stream, "_SAMPLE", 8)  # the faulty row is not among those that are read beforehand
    file, letters = tiny_run.write_data(tmp_path / "data")
    mix = [{"source": str(file), "stream": True, "shuffle_window": 5, "weight": 1.0}]
    mix.append({"source": str(letters), "weight": 1e-6})
    changes = {"data__mix": mix, "data__strategy": "weights", "data__too_long": "drop"}
    asked = tiny_run.recipe(tmp_path, **changes, data__max_bad_rows=0)
    train_run(asked, tmp_path / "whole")
    good = spoil(file, 20)
    with pytest.raises(
        RunFailure, match=r"^step 6: sums: 1 faulty row, .* Safe on disk: .*checkpoints/step-5"
    ) as error:
        train_run(asked, tmp_path / "run")
    place = sum(len(line) + 1 for line in good.split("\n")[:20])
    assert f"sums.jsonl: byte {place}: not JSON" in str(error.value)
    assert "data.max_bad_rows" in (tmp_path / "run/log.txt").read_text()
    with pytest.raises(RunFailure, match=r"^step 6: sums: 1 faulty row"):  # not mended yet: nothing is lost
        train_run(asked, tmp_path / "run", resume=True)
    more = asked.model_copy(update={"data": asked.data.model_copy(update={"max_bad_rows": 3})})
    skipping = train_run(more, tmp_path / "run", resume=True)
    assert skipping["num_steps"] == 6
    seen = json.loads((tmp_path / "run/mix.json").read_text())["seen"]["sums"]
    assert (seen["num_bad_rows"], seen["num_examples"]) == (1, 24)
    assert seen["bad_rows"][0].startswith(f"{file}: byte {place}: not JSON")
    assert "sums: 1 faulty rows were skipped" in (tmp_path / "run/log.txt").read_text()
    with pytest.raises(RunFailure, match=r"^step 6"):
        train_run(asked, tmp_path / "mended")
    file.write_text(good)
    train_run(asked, tmp_path / "mended", resume=True)
    one, two = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("whole", "mended"))
    assert all((one[name] == two[name]).all() for name in one)


def test_whatever_reading_raises_the_work_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run(recipe(tmp_path), tmp_path / "whole")
    next_step = StepLoader.next_step

    def fails(self: StepLoader) -> Any:
        step = next_step(self)  # the streams have moved on
        if self.position > 12:
            raise KeyError("gone")
        return step

    monkeypatch.setattr(StepLoader, "next_step", fails)
    with pytest.raises(
        RunFailure, match=r"^step 4: KeyError\('gone'\)\. Fix: resume with --resume .* Safe on disk: .*step-3"
    ):
        train_run(recipe(tmp_path), tmp_path / "run")
    monkeypatch.undo()
    train_run(recipe(tmp_path), tmp_path / "run", resume=True)
    one, two = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("whole", "run"))
    assert all((one[name] == two[name]).all() for name in one)


def test_the_defaults_run_one_streamed_file_of_json_lines(tmp_path: Path) -> None:
    mix = [{"source": str(tiny_run.write_data(tmp_path / "data")[0]), "stream": True}]
    asked = tiny_run.recipe(tmp_path, data__mix=mix, train__steps=1)
    assert (asked.data.strategy, asked.data.too_long) == ("proportional", "truncate")
    assert train_run(asked, tmp_path / "run")["num_steps"] == 1
    assert "too_long: truncate" in (tmp_path / "run/recipe.yaml").read_text()
