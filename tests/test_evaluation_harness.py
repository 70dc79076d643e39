"""Tasks of lm-evaluation-harness on our models: by the harness where it is installed, and the logic with a stand-in."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qdora.errors import UserError
from qdora.evaluation import harness as module
from qdora.evaluation.harness import HarnessTasks, as_lm, evaluate_harness, find_harness_tasks, harness_table
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.model.trained_embeddings import train_embeddings, trained_matrices
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.train import train_run
from tests import tiny_adapted, tiny_run, tiny_tokenizer

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, the model and data beside it."""
    root = tmp_path_factory.mktemp("harness")
    recipe = tiny_run.recipe(root, train__lr=0.02, eval__at_start=False, eval__at_end=False, eval__limit=...)
    train_run(recipe, root / "run")
    return root / "run"


RESULT = {
    "results": {
        "sums": {"name": "sums", "alias": "sums", "acc,none": 0.25, "acc_stderr,none": "N/A", "sample_len": 4},
        "math": {"alias": "math", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1},
        "both": {"alias": "both", "acc,none": 0.375, "acc_stderr,none": 0.2},
    },
    "n-shot": {"sums": 0, "math": 5},
    "n-samples": {"sums": {"original": 9, "effective": 4}, "math": {"original": 7, "effective": 7}},
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of lm_eval: its task manager knows three names, its evaluation gives RESULT."""
    seen: dict[str, Any] = {}

    class TaskManager:
        def __init__(self, include_path: str | None = None) -> None:
            self.task_index = dict.fromkeys([*(["sums"] if include_path else []), "math", "both"])

        def match_tasks(self, names: list[str]) -> list[str]:
            return [known for known in self.task_index for name in names if known == name]

    def language_model(**options: Any) -> dict[str, Any]:
        options["pretrained"].tie_weights()
        return options

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        seen["options"] = options
        return RESULT

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__version__": "9.9"},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": language_model},
    }
    for name, content in parts.items():
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
    return seen


def test_without_the_harness_the_message_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--harness: .*not installed\. Fix: pip install 'qdora\[lm-eval\]'"):
        evaluate_target(str(run), EvalOptions(harness=["piqa"]))
    with pytest.raises(UserError, match=r"pip install 'qdora\[lm-eval\]'"):
        as_lm(tiny_adapted.base(), tiny_tokenizer.make())


def test_tasks_are_looked_up_in_the_folder_too(stand_in: dict[str, Any], tmp_path: Path) -> None:
    assert find_harness_tasks(["sums", "math", "sums"], tmp_path).names == ("sums", "math")
    assert find_harness_tasks(["math"]).names == ("math",)
    with pytest.raises(UserError) as caught:
        find_harness_tasks(["mahts", "sums"])
    must = "--harness: must be a task, group or tag of lm-evaluation-harness or of --harness-include, got"
    assert [fault.partition(".")[0] for fault in caught.value.faults] == [f"{must} 'mahts'", f"{must} 'sums'"]
    assert caught.value.faults[0].endswith("Did you mean 'math'?")
    with pytest.raises(UserError, match=r"--harness-include: .*nowhere must be a folder of task files"):
        find_harness_tasks(["sums"], tmp_path / "nowhere")


def test_numbers_of_the_harness_become_plain_ones(stand_in: dict[str, Any]) -> None:
    model, tokenizer = tiny_adapted.base(), tiny_tokenizer.make()
    tasks = HarnessTasks(("sums", "both"), manager="the manager")
    result = evaluate_harness(model, tokenizer, tasks, limit=4)
    assert result == {
        "lm_eval": "9.9",
        "tasks": {
            "sums": {"metrics": {"acc": 0.25, "acc_stderr": None}, "num_examples": 4, "num_fewshot": 0},
            "math": {
                "metrics": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1},
                "num_examples": 7,
                "num_fewshot": 5,
            },
            "both": {"metrics": {"acc": 0.375, "acc_stderr": 0.2}, "num_examples": None, "num_fewshot": None},
        },
    }
    options = stand_in["options"]
    assert options["model"] == {"pretrained": model, "tokenizer": tokenizer, "backend": "causal", "batch_size": 8}
    assert (options["tasks"], options["task_manager"], options["limit"]) == (["sums", "both"], "the manager", 4)
    rows = [list(column.cells) for column in harness_table(result).columns]
    assert list(zip(*rows, strict=True)) == [
        ("sums", "acc", "4", "0.2500"),
        ("sums", "acc_stderr", "4", "–"),
        ("math", "exact_match,strict", "7", "0.5000"),
        ("math", "exact_match_stderr,strict", "7", "0.1000"),
        ("both", "acc", "–", "0.3750"),
        ("both", "acc_stderr", "–", "0.2000"),
    ]


def test_a_tied_pair_with_trained_rows_stays_as_it_is(stand_in: dict[str, Any]) -> None:
    """transformers' own `tie_weights`, which the harness calls, looks for the embedding's parameter."""
    model = tiny_adapted.base()
    train_embeddings(model, ("embed_tokens", "lm_head"), (3, 5))
    with torch.no_grad():
        next(iter(trained_matrices(model).values())).values.mul_(2)
    before = tiny_adapted.logits(model)
    assert as_lm(model, tiny_tokenizer.make())["pretrained"] is model
    assert torch.equal(tiny_adapted.logits(model), before)
    assert "tie_weights" not in vars(model)


def test_a_run_keeps_what_the_harness_found(run: Path, stand_in: dict[str, Any], tmp_path: Path) -> None:
    document = evaluate_target(str(run), EvalOptions(harness=["sums"], harness_include=tmp_path, limit=4))
    assert "evaluation" not in document
    kept = json.loads((run / "eval/final-harness-sums-limit-4.json").read_text())
    assert kept == document["harness"] | {"limit": 4, "step": 6}
    bare = evaluate_target(str(run.parent / "model"), EvalOptions(harness=["math"]))
    assert bare["harness"]["tasks"]["math"]["metrics"]["exact_match,strict"] == 0.5
    both = evaluate_target(str(run), EvalOptions(harness=["math"], tasks=["sums"], limit=1))
    assert "evaluation" in both
    names = ["final-harness-math-limit-1.json", "final-harness-sums-limit-4.json"]
    assert sorted(file.name for file in (run / "eval").glob("final-harness*")) == names, "one replaced the other"
    with pytest.raises(UserError, match="--harness-include: is used only with --harness"):
        evaluate_target(str(run), EvalOptions(harness_include=tmp_path))
    with pytest.raises(UserError, match=r"--method: .*got only --harness"):
        evaluate_target(str(run), EvalOptions(harness=["math"], method="generate"))


def write_task(folder: Path, data: Path) -> None:
    """The letters of tiny_run as a task of the harness."""
    task = {
        "task": "own_letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    folder.mkdir()
    (folder / "letters.yaml").write_text(yaml.safe_dump(task))


@installed
def test_log_likelihoods_are_those_of_the_adapted_model() -> None:
    from lm_eval.api.instance import Instance

    model, tokenizer = tiny_adapted.adapted("llama", quant="nf4"), tiny_tokenizer.make()
    pairs = [("the quick", " brown fox"), ("a dog", " runs"), ("one", " two three four")]
    lm = as_lm(model, tokenizer, batch_size=2)
    requests = [Instance("loglikelihood", {}, arguments=pair, idx=0) for pair in pairs]
    found = lm.loglikelihood(requests)
    for (context, answer), (total, _) in zip(pairs, found, strict=True):
        before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + answer))
        assert ids[: len(before)] == before
        logits = tiny_adapted.logits(model, torch.tensor([ids])).double()
        expected = sum(float(logits[place - 1].log_softmax(-1)[ids[place]]) for place in range(len(before), len(ids)))
        assert total == pytest.approx(expected, rel=1e-4)


@installed
def test_a_local_task_runs_offline_on_a_run_its_merged_model_and_the_base(run: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", run.parent / "data/letters.jsonl")
    options: dict[str, Any] = {"harness": ["own_letters"], "harness_include": tmp_path / "tasks"}
    adapted = evaluate_target(str(run), EvalOptions(**options, tasks=["letters"], split="train"))
    task = adapted["harness"]["tasks"]["own_letters"]
    assert (task["num_examples"], task["num_fewshot"]) == (23, 0)
    assert json.loads((run / "eval/final-harness-own_letters.json").read_text())["tasks"]["own_letters"] == task
    export_run(run, tmp_path / "merged", ExportOptions(dtype="float32"))
    merged = evaluate_target(str(tmp_path / "merged"), EvalOptions(**options))["harness"]["tasks"]["own_letters"]
    assert merged["metrics"]["acc"] == pytest.approx(task["metrics"]["acc"], abs=1.5 / 23)  # a near tie may turn
    assert set(task["metrics"]) == {"acc", "acc_stderr"}
    with pytest.raises(UserError, match=r"--harness: must be a task, .*got 'own_leters'.*Did you mean 'own_letters'"):
        evaluate_target(str(run), EvalOptions(harness=["own_leters"], harness_include=tmp_path / "tasks"))
