"""Answers in the model's own words, and tasks of lm-evaluation-harness: what is read from both and how it counts."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig

from qdora.data.demo import examples as demo_examples
from qdora.data.example import Example
from qdora.evaluate import generation, harness
from qdora.evaluate.generation import answer_names, evaluate_generated, first_mention
from qdora.evaluate.harness import HarnessTasks, as_lm, evaluate_harness, find_harness_tasks
from qdora.model.trained_embeddings import train_embeddings, trained_matrices
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.run import train_run
from tests import support
from tests.data_rows import fault_of, faults_of, says
from tests.test_evaluation_spans import naive

NAMES = ("answer1", "answer2", "answer3")


class Scripted(nn.Module):
    """Says, behind a prompt that ends in one of the keys, the text that belongs to it, and then the end of sequence.

    `generate` is a loop in place of transformers' own.
    """

    def __init__(self, tokenizer: Any, says: dict[str, str]) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.tokenizer, self.says = tokenizer, says
        self.config, self.generation_config = LlamaConfig(), GenerationConfig()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def generate(self, ids: Tensor, *, attention_mask: Tensor, stopping_criteria: Any, **settings: Any) -> Tensor:
        assert not settings["do_sample"]
        done = torch.zeros(len(ids), dtype=torch.bool)
        while not done.all():
            rows = [row[-int(own) :] for row, own in zip(ids.tolist(), attention_mask.sum(dim=1), strict=True)]
            ids = torch.cat([ids, torch.tensor([[self.after(row)] for row in rows])], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
            done = done | stopping_criteria(ids, None)
        return ids

    def after(self, ids: list[int]) -> int:
        """The next token; of a row that is done, the end of sequence."""
        text = self.tokenizer.decode(ids)
        key = next(key for key in self.says if key in text)
        said = text.rpartition(key)[2]
        if not self.says[key].startswith(said):
            return int(self.tokenizer.eos_token_id)
        rest = self.tokenizer(self.says[key][len(said) :], add_special_tokens=False)["input_ids"]
        return int(rest[0] if rest else self.tokenizer.eos_token_id)


def question(task: str, number: int, gold: int, names: tuple[str, ...] = NAMES) -> Example:
    choices = tuple(f"the correct answer is {name}" for name in names)
    return Example(task, str(number), f"Question {number} of {task}:", choices[gold], choices, gold)


@pytest.mark.parametrize(
    "choices, names",
    [
        (["the correct answer is answer1", "the correct answer is answer2"], ("answer1", "answer2")),
        ([" no", " yes"], ("no", "yes")),
        (["It is true.", "It is false."], ("true", "false")),
        (["it is red today", "it is blue today"], ("red", "blue")),
        ([" 3 + 4", " 3 + 5"], ("4", "5")),
        ([" a bird", " a large bird"], ()),
        ([" May", " may"], ()),
        ([" +", " -"], ()),
        (["same", "same"], ()),
        (["alone"], ()),
        ([], ()),
    ],
)
def test_names_are_the_word_in_which_choices_differ(choices: list[str], names: tuple[str, ...]) -> None:
    assert answer_names(choices) == names


@pytest.mark.parametrize(
    "text, names, expected",
    [
        ("the correct answer is answer2", NAMES, (1, True)),  # "answer2" may still become "answer21"
        ("the correct answer is answer2.", NAMES, (1, False)),
        ("Answer3, I think, or answer1", NAMES, (2, False)),
        ("not answer1 but answer2", NAMES, (0, False)),  # the first, as published
        ("answer5", NAMES, (None, True)),
        ("answer10 ", NAMES, (None, True)),
        ("myanswer1 ", NAMES, (None, True)),
        ("", NAMES, (None, True)),
        # a name that begins another one does not win
        ("it is well-being.", ("well", "well-being"), (1, False)),
        ("it is well-", ("well", "well-being"), (0, True)),
        ("it is well-b", ("well", "well-being"), (0, True)),
        ("it is well-bred", ("well", "well-being"), (0, False)),
        ("well, it is", ("well", "well-being"), (0, False)),
        ("Well", ("well", "well-being"), (0, True)),
        # one letter in any case, but not by casefold
        ("the correct answer is opt\u0131on2.", ("option1", "option2"), (1, False)),
        ("the correct answer is opt\u0130on2.", ("option1", "option2"), (1, False)),
    ],
)
def test_the_first_name_counts(text: str, names: tuple[str, ...], expected: tuple[int | None, bool]) -> None:
    assert first_mention(text, names) == expected


def test_right_wrong_and_unparsable_are_counted_apart() -> None:
    tokenizer = support.tokenizer()
    answers = {
        "Question 0 of a:": "the correct answer is answer2",
        "Question 1 of a:": " answer1! The correct answer is answer3",
        "Question 2 of a:": "the correct answer is blue",
        "Question 3 of a:": "",
        "Question 0 of b:": "TRUE",
        "Question 1 of b:": "It is untrue, so false",
    }
    b = [replace(question("b", number, number, ("true", "false")), task="of the row") for number in range(2)]
    sets = {"a": [question("a", number, gold) for number, gold in enumerate([1, 2, 0, 0])], "b": b}
    net = Scripted(tokenizer, answers)
    found = evaluate_generated(net, tokenizer, sets, max_new_tokens=64)
    first, average, error = found.tasks["a"], found.average, math.sqrt(0.25 * 0.75 / 3)
    counts = [(each.num_right, each.num_wrong, each.num_unparsable) for each in (*found.tasks.values(), average)]
    assert (counts, average.num_examples) == ([(1, 1, 2), (2, 0, 0), (3, 1, 2)], 6)
    assert (first.acc, first.acc_stderr, first.chance) == pytest.approx((0.25, error, 1 / 3))  # unparsable: not right
    expected = (1.25 / 2, error / 2, (1 / 3 + 1 / 2) / 2)
    assert (average.acc, average.acc_stderr, average.chance) == pytest.approx(expected)
    assert first.unparsable == [{"id": "2", "output": "the correct answer is blue"}, {"id": "3", "output": ""}]
    records = json.loads(json.dumps(found.to_dict(per_example=True), allow_nan=False))["per_example"]
    assert [each["outcome"][0] for each in records] == list("rwuurr")
    assert [each["task"] for each in records] == list("aaaabb")  # the keys of `tasks`
    assert records[1]["output"] == " answer1!"  # an answer that is decided is not spun out
    shown = io.StringIO()
    Console(file=shown, width=120).print(generation.generation_table({"mine": found}))
    assert says(shown.getvalue(), "a ... 25.0 ... 1 / 1 / 2 ... 100.0 ... 2 / 0 / 0 ... average ... 3 / 1 / 2")
    assert "±" not in shown.getvalue()  # few examples tell no error
    few = evaluate_generated(net, tokenizer, {"a": [question("a", 2, 1)] * 7}, max_new_tokens=3, limit=6).tasks["a"]
    assert (few.num_unparsable, few.num_new_tokens, len(few.unparsable)) == (6, 18, 5)


def test_a_prompt_too_long_for_the_context_loses_its_left() -> None:
    tokenizer = support.tokenizer(bos=True)
    net = support.llama(vocab_size=400, max_position_embeddings=40, initializer_range=0.3)
    fed: list[list[int]] = []
    net.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"][0].tolist()), with_kwargs=True)
    sets = {"a": [Example("a", "0", "w " * 60 + "Answer:", " yes", (" yes", " no"), 0)]}
    found = evaluate_generated(net, tokenizer, sets, max_new_tokens=32)
    # 40 positions: beginning of sequence, 8 tokens of the prompt, 31 of the answer (the last is never fed)
    own = tokenizer(sets["a"][0].prompt, add_special_tokens=False)["input_ids"]
    assert fed[0] == [tokenizer.bos_token_id, *own[-8:]]
    assert found.tasks["a"].num_truncated == 1
    line = fault_of(evaluate_generated, net, tokenizer, sets, max_new_tokens=40)
    assert says(line, "a context longer than the 40 tokens of the answer, got a model with 40")
    of_task = {name: demo_examples(name, "validation") for name in ("facts", "next")}
    of_task["notes"] = [Example("notes", "7", "", "Some text.")]
    steps, notes = generation.generation_faults(of_task)
    assert says(steps, "choices that differ in one word, got task 'next', whose example ... has choices such as")
    assert says(notes, "choices that differ in one word, got task 'notes', whose example 7 has no choices")


# lm-evaluation-harness

RESULT = {
    "results": {
        "sums": {"name": "sums", "alias": "sums", "acc,none": 0.25, "acc_stderr,none": "N/A", "sample_len": 4},
        "math": {"alias": "math", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1},
        "both": {"alias": "both", "acc,none": 0.375, "acc_stderr,none": 0.2},
    },
    "n-shot": {"sums": 0, "math": 5},
    "n-samples": {"sums": {"original": 9, "effective": 4}, "math": {"original": 7, "effective": 7}},
}


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    """A trained run, the model and data beside it."""
    recipe = support.tiny_recipe(root, train__lr=0.02, eval__at_start=False, eval__at_end=False, eval__limit=...)
    train_run(recipe, root / "run")
    return root / "run"


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
        seen.update(options)
        return RESULT

    parts: dict[str, dict[str, Any]] = {
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


def test_tasks_are_looked_up_and_numbers_become_plain(stand_in: Any, tmp_path: Path, monkeypatch: Any) -> None:
    assert find_harness_tasks(["sums", "math", "sums"], tmp_path).names == ("sums", "math")
    assert find_harness_tasks(["math"]).names == ("math",)
    first, second = faults_of(find_harness_tasks, ["mahts", "sums"])
    assert says(first, "--harness: must be a task, group or tag ... got 'mahts'. Did you mean 'math'?")
    assert says(second, "got 'sums'.")
    assert says(fault_of(find_harness_tasks, ["sums"], tmp_path / "no"), "--harness-include: ... no must be a folder")
    net, tokenizer = support.base_model(), support.tokenizer()
    found = evaluate_harness(net, tokenizer, HarnessTasks(("sums", "both"), manager="the manager"), limit=4)
    strict = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1}
    assert found == {
        "lm_eval": "9.9",
        "tasks": {
            "sums": {"metrics": {"acc": 0.25, "acc_stderr": None}, "num_examples": 4, "num_fewshot": 0},
            "math": {"metrics": strict, "num_examples": 7, "num_fewshot": 5},
            "both": {"metrics": {"acc": 0.375, "acc_stderr": 0.2}, "num_examples": None, "num_fewshot": None},
        },
    }
    model = {"pretrained": net, "tokenizer": tokenizer, "backend": "causal", "batch_size": 8}
    asked = {"tasks": ["sums", "both"], "task_manager": "the manager", "limit": 4, "log_samples": False}
    assert stand_in == asked | {"model": model}
    assert list(zip(*(column.cells for column in harness.harness_table(found).columns), strict=True)) == [
        ("sums", "acc", "4", "0.2500"),
        ("sums", "acc_stderr", "4", "–"),
        ("math", "exact_match,strict", "7", "0.5000"),
        ("math", "exact_match_stderr,strict", "7", "0.1000"),
        ("both", "acc", "–", "0.3750"),
        ("both", "acc_stderr", "–", "0.2000"),
    ]
    # transformers' own `tie_weights`, which the harness calls, would look for the parameter of a trained embedding
    train_embeddings(net, ("embed_tokens", "lm_head"), (3, 5))
    next(iter(trained_matrices(net).values())).values.data *= 2
    before = support.logits_of(net)
    assert as_lm(net, tokenizer)["pretrained"] is net
    assert torch.equal(support.logits_of(net), before)
    assert "tie_weights" not in vars(net)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    for call in (lambda: find_harness_tasks(["math"]), lambda: as_lm(net, tokenizer)):
        assert says(fault_of(call), "--harness: ... not installed. Fix: pip install 'qdora[lm-eval]'")


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
    for options, words in (
        (EvalOptions(harness_include=tmp_path), "--harness-include: is used only with --harness"),
        (EvalOptions(harness=["math"], method="generate"), "--method: ... got only --harness"),
    ):
        assert says(fault_of(evaluate_target, str(run), options), words)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_itself_scores_an_adapted_model_as_one_sequence_at_a_time() -> None:
    from lm_eval.api.instance import Instance

    net, tokenizer = support.adapted_model("llama", quant="nf4"), support.tokenizer()
    pairs = [("the quick", " brown fox"), ("a dog", " runs"), ("one", " two three four")]
    requests = [Instance("loglikelihood", {}, arguments=pair, idx=0) for pair in pairs]
    totals = as_lm(net, tokenizer, batch_size=2).loglikelihood(requests)
    for (context, answer), (total, _) in zip(pairs, totals, strict=True):
        before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + answer))
        assert total == pytest.approx(naive(net, ids, len(before)), rel=1e-4)
