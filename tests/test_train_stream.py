"""A run on a mix with a stream: resumed equals uninterrupted; what is shown says what is not known."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from qdora.errors import Interrupted, UserError
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
    with pytest.raises(UserError, match="resume: the tokenised data changed since the checkpoint"):
        train_run(same, tmp_path / "run", resume=True)


def test_a_plan_with_a_stream(tmp_path: Path) -> None:
    shown = io.StringIO()
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
