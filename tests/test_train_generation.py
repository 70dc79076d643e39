"""eval.method generate in a run and on the command line: files, metrics, and what is refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qdora.errors import UserError
from qdora.recipe.recipe_file import recipe_from
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.train import train_run
from tests import tiny_run


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    """Evaluated by generation on the source whose choices are single letters."""
    recipe = tiny_run.recipe(root, eval__method="generate", eval__tasks=["letters"], eval__every=4)
    train_run(recipe, root / "run")
    return root / "run"


def read(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def test_a_run_keeps_generated_answers_beside_the_log_likelihoods(run: Path) -> None:
    for step in (0, 4, 6):
        scored, generated = read(run / f"eval/step-{step}.json"), read(run / f"eval/step-{step}-generated.json")
        assert list(scored["tasks"]) == list(generated["tasks"]) == ["letters"]
        counts = generated["tasks"]["letters"]
        assert counts["num_examples"] == scored["tasks"]["letters"]["num_examples"]
        assert counts["num_right"] + counts["num_wrong"] + counts["num_unparsable"] == counts["num_examples"]
        assert len(generated["per_example"]) == counts["num_examples"]
        assert generated["settings"]["max_new_tokens"] == 32
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    _, evaluated, _ = [line["eval"]["letters"] for line in lines if "eval" in line]
    counts = read(run / "eval/step-4-generated.json")["tasks"]["letters"]
    assert evaluated["generated"] == {key: value for key, value in counts.items() if key != "unparsable"}
    assert evaluated["nll_per_token"] > 0


def test_eval_takes_the_method_of_the_run_or_another(run: Path) -> None:
    own = evaluate_target(str(run), EvalOptions(tasks=["letters"]))
    assert own["generation"]["tasks"] == read(run / "eval/step-6-generated.json")["tasks"]
    assert read(run / "eval/final-validation-generated.json")["tasks"] == own["generation"]["tasks"]
    assert read(run / "eval/final-validation.json")["tasks"] == own["evaluation"]["tasks"]
    other = evaluate_target(str(run), EvalOptions(tasks=["letters"], method="loglikelihood"))
    assert "generation" not in other
    assert other["evaluation"]["tasks"] == own["evaluation"]["tasks"]


def test_sources_that_cannot_be_generated_are_refused_before_anything_is_loaded(
    root: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("qdora.run.pruned_base.load_base", load)
    monkeypatch.setattr("qdora.run.evaluate.load_target", load)
    recipe = tiny_run.recipe(root, eval__method="generate")
    with pytest.raises(UserError, match="got task 'sums', whose example 29 has no choices"):
        train_run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="got task 'sums'"):
        evaluate_target(str(run), EvalOptions(tasks=["sums"]))
    with pytest.raises(UserError, match="--method: got 'generation', must be one of loglikelihood, generate"):
        evaluate_target(str(run), EvalOptions(method="generation"))
    text = tmp_path / "a.txt"
    text.write_text("text")
    with pytest.raises(UserError, match=r"--method: .*got only --text"):
        evaluate_target(str(root / "model"), EvalOptions(texts=[text], method="generate"))


def test_a_task_is_trained_and_asked_by_name(root: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"cool {name}", "choices": [f"add {name} ice", "add fire"], "answer": index % 2}
        for index, name in enumerate("abcdefgh")
    ]
    (tmp_path / "piqa").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"piqa/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_run.recipe(root)
    task = {"task": "piqa", "path": str(tmp_path / "piqa"), "format": "commonsense170k"}
    document = {
        "model": {"source": str(root / "model"), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8.0},
        "data": {"mix": [task], "max_length": 512},
        "train": {"steps": 1, "batch": 2, "optimizer": "adamw"},
        "eval": {"method": "generate", "limit": 2, "at_start": False},
    }
    done = train_run(recipe_from(document), tmp_path / "run")
    assert done["num_steps"] == 1
    counts = read(tmp_path / "run/eval/step-1-generated.json")["tasks"]["piqa"]
    assert (counts["num_examples"], counts["chance"]) == (2, 0.5)
    document["data"]["mix"] = [{key: value for key, value in task.items() if key != "format"}]
    with pytest.raises(UserError, match="piqa', whose example 1 has choices such as 'add a ice'"):
        train_run(recipe_from(document), tmp_path / "other")
    bare = evaluate_target(
        str(root / "model"), EvalOptions(tasks=["piqa"], data=str(tmp_path), method="generate", limit=2)
    )
    assert bare["generation"]["tasks"]["piqa"]["num_examples"] == 2
    # With --data its files are read, though the run has a source of this name, without test data
    (tmp_path / "others/piqa").mkdir(parents=True)
    (tmp_path / "others/piqa/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    options = EvalOptions(tasks=["piqa"], data=str(tmp_path / "others"), split="test", method="loglikelihood")
    others = evaluate_target(str(tmp_path / "run"), options)
    assert others["evaluation"]["tasks"]["piqa"]["num_examples"] == 1
