"""Whole evaluations: metrics, tables, changes by task, answers in the model's words, lm-evaluation-harness."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import math
import sys
import types
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig

from qdora.data.demo import examples as demo_examples
from qdora.data.example import Example
from qdora.errors import RunFailure
from qdora.evaluate import generation, harness, spans, suite
from qdora.evaluate.generation import GenerationResult, answer_names, evaluate_generated, first_mention
from qdora.evaluate.harness import as_lm, evaluate_harness, find_harness_tasks
from qdora.evaluate.intervals import Estimate, mean_stderr, ratio_stderr
from qdora.evaluate.loglikelihood import ExampleScore, score_examples
from qdora.evaluate.suite import (
    EvaluationResult,
    TaskResult,
    average_of,
    compare_table,
    evaluate,
    spread,
    task_changes,
    tie_credit,
)
from qdora.model.tokens import train_embeddings, trained_matrices
from qdora.recipe.options import EvalOptions
from qdora.run.run import train_run
from qdora.run.verbs import evaluate_target
from qdora.train.distributed import processes_of_launch
from qdora.train.evals import evaluate_together
from tests import support
from tests.data_rows import fault_of, says

COLOURS = [" blue", " brown", " quick", " lazy"]


def questions(task: str, count: int) -> list[Example]:
    """Two to four choices, gold at index 0 or 1."""
    found = []
    for i in range(count):
        choices = tuple(COLOURS[: 2 + i % 3])
        prompt = f"Question {i}: " + "which colour? " * (i % 4) + "Answer:"
        found.append(Example(task, str(i), prompt, choices[i % 2], choices, i % 2))
    return found


def texts(task: str, count: int) -> list[Example]:
    return [Example(task, str(i), f"number {i}", " follows " + "very " * (i % 3) + "soon") for i in range(count)]


def model() -> Any:
    return support.llama(vocab_size=400, initializer_range=0.3)


SETS = {"choices": questions("choices", 12), "free": texts("free", 7), "both": texts("both", 2) + questions("both", 3)}


# Metrics


def test_means_ratios_and_ties_by_hand() -> None:
    # squared deviations 4 + 1 + 0 + 1 + 4 = 10; s^2 = 10 / 4; se = sqrt(2.5 / 5)
    assert mean_stderr([1.0, 2.0, 3.0, 4.0, 5.0]) == Estimate(3.0, pytest.approx(math.sqrt(0.5), rel=1e-15))
    assert mean_stderr([1, 1, 0, 0, 0]).stderr == pytest.approx(math.sqrt(0.4 * 0.6 / 4))
    # R = 1.5; residuals 2 - 1.5, 6 - 6, 1 - 1.5 = 0.5, 0, -0.5; s^2 = 0.5 / 2; mean tokens 2; se = 0.5 / (2 sqrt 3)
    assert ratio_stderr([2.0, 6.0, 1.0], [1, 4, 1]) == Estimate(1.5, pytest.approx(0.5 / (2 * math.sqrt(3))))
    assert ratio_stderr([2.0, 4.0, 10.0], [1, 2, 5]) == Estimate(2.0, 0.0)
    assert math.isnan(mean_stderr([2.0]).stderr)
    assert math.isnan(ratio_stderr([2.0], [1]).stderr)
    assert [tie_credit([-1.0, -1.0, -2.0], gold) for gold in range(3)] == [0.5, 0.5, 0.0]
    assert tie_credit([-1.0, -2.0], 0) == 1.0


def accuracies(loglikelihoods: list[list[float]], num_chars: list[list[int]], gold: list[int]) -> TaskResult:
    each = zip(loglikelihoods, num_chars, gold, strict=True)
    scores = [ExampleScore("0", right, np.array(ll), np.ones(len(ll), int), np.array(n), 0) for ll, n, right in each]
    return suite._task_result([suite._record("t", score) for score in scores])


def test_accuracies_by_hand() -> None:
    # example    ll            chars       best by sum   per character           best   gold
    # 0          -4, -6        2, 6        0             -2, -1                  1      0
    # 1          -3, -2, -9    3, 4, 30    1             -1, -0.5, -0.3          2      2
    # 2          -1, -5        1, 1        0             -1, -5                  0      0
    # 3          -8, -8.5      8, 17       0             -1, -0.5                1      1
    lls = [[-4.0, -6.0], [-3.0, -2.0, -9.0], [-1.0, -5.0], [-8.0, -8.5]]
    found = accuracies(lls, [[2, 6], [3, 4, 30], [1, 1], [8, 17]], [0, 2, 0, 1])
    assert (found.acc, found.acc_norm, found.num_ties, found.num_ties_norm) == (2 / 4, 3 / 4, 0, 0)
    errors = math.sqrt(0.5 * 0.5 / 3), math.sqrt(0.75 * 0.25 / 3)
    assert (found.acc_stderr, found.acc_norm_stderr) == pytest.approx(errors)
    assert found.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert found.majority == 2 / 4  # gold is 0 twice, 2 and 1 once
    tied = accuracies([[-3.0] * 4, [-2.0, -4.0]], [[1, 1, 1, 1], [1, 2]], [2, 0])
    assert (tied.acc, tied.acc_norm) == ((1 / 4 + 1) / 2, (1 / 4 + 1 / 2) / 2)
    assert (tied.num_ties, tied.num_ties_norm) == (1, 2)
    constant = accuracies([[-1.0, -1.0]] * 100, [[1, 1]] * 100, [0] * 90 + [1] * 10)  # argmax would look like 90 %
    assert (constant.acc, constant.chance, constant.majority) == (0.5, 0.5, 0.9)
    assert accuracies([[-1.0, -3.0]], [[0, 2]], [0]).acc_norm == 1.0  # an empty choice counts as one character


def result(acc: float | None, stderr: float | None, nll: float, count: int = 50, **more: Any) -> TaskResult:
    numbers: dict[str, Any] = {each.name: 0 for each in fields(TaskResult)}
    numbers |= {"acc": acc, "acc_stderr": stderr, "acc_norm": acc, "acc_norm_stderr": None, "nll_per_token": nll}
    numbers |= {"chance": acc and 0.25, "majority": acc and 0.3, "num_examples": count}
    return TaskResult(**numbers | {"num_choice_examples": count if acc is not None else 0} | more)


def test_an_average_counts_each_task_once() -> None:
    found = average_of([result(0.2, 0.03, 1.0, 10), result(0.6, 0.04, 1.0, 90), result(None, None, 4.0)])
    assert (found.acc, found.acc_stderr, found.nll_per_token) == pytest.approx((0.4, 0.05 / 2, 2.0))
    assert average_of([result(0.2, 0.03, 1.0), result(0.6, None, 1.0)]).acc_stderr is None
    for count, shown in ((9, "50.0"), (10, "50.0 ± 7.0")):  # two wrong answers do not make a standard error of 0
        few = result(0.5, 0.07, 1.0, count)
        assert list(compare_table({"base": EvaluationResult({"a": few}, few, {})}).columns[4].cells) == [shown] * 2


# Evaluations


def test_metrics_of_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tokenizer, seen = model(), support.tokenizer(), list[tuple[int, int]]()
    monkeypatch.setattr(spans, "BATCH_TOKENS", 64)
    found = evaluate(net.train(), tokenizer, SETS, progress=lambda *now: seen.append(now))
    assert net.training
    ends = [list(group)[-1] for _, group in groupby(seen, lambda now: now[1])]
    assert (ends, len(seen) > 5) == ([(12, 12), (7, 7), (5, 5)], True)
    assert list(found.tasks) == ["choices", "free", "both"]
    scores = score_examples(net.eval(), tokenizer, SETS["choices"])
    hits = [int(np.argmax(score.loglikelihoods)) == score.gold for score in scores]
    nlls = [-score.loglikelihoods[index % 2] for index, score in enumerate(scores)]
    num_tokens = sum(score.num_tokens[index % 2] for index, score in enumerate(scores))
    task, free, both = found.tasks.values()
    assert task.acc == pytest.approx(sum(hits) / 12)
    assert (task.nll, task.nll_per_token) == pytest.approx((sum(nlls) / 12, sum(nlls) / num_tokens))
    assert (free.acc, free.acc_stderr, free.chance, free.majority, free.num_choice_examples) == (None,) * 4 + (0,)
    assert (both.num_examples, both.num_choice_examples) == (5, 3)
    ids = {"choices": [*map(str, range(12))], "free": [*map(str, range(7))], "both": list("01201")}
    for name, each in found.tasks.items():  # single examples add up; those with choices come first
        records = [record for record in found.per_example if record["task"] == name]
        assert [record["id"] for record in records] == ids[name]
        assert np.mean([record["nll"] for record in records]) == pytest.approx(each.nll)
        assert sum(record["num_answer_tokens"] for record in records) == each.num_answer_tokens
        credits = [record["acc_norm"] for record in records if "acc" in record]
        assert not credits or np.mean(credits) == pytest.approx(each.acc_norm)
    average = found.average
    assert average.acc == pytest.approx((task.acc + both.acc) / 2)
    assert average.chance == pytest.approx((task.chance + both.chance) / 2)
    assert average.nll == pytest.approx(np.mean([each.nll for each in found.tasks.values()]))
    assert average.num_examples == 24
    own = {"limit": None, "block": None, "model_dtype": "float32"}
    assert found.settings == own | {"device": "cpu", "seconds": found.settings["seconds"]}
    one = evaluate(net, tokenizer, {"one": SETS["choices"][:1]})
    assert one.tasks["one"].acc_stderr is None  # one example has no standard error, and JSON no nan
    for each in (found, one):
        text = json.dumps(each.to_dict(per_example=True), allow_nan=False)
        assert EvaluationResult.from_dict(json.loads(text)) == each
    assert "per_example" not in found.to_dict()


def test_limits_and_blocks_and_what_is_refused() -> None:
    examples, net, tokenizer = questions("t", 10), model(), support.tokenizer()
    assert [example.id for example in spread(examples, 4)] == ["0", "2", "5", "7"]
    assert [spread(examples, *each) for each in ((10,), (None,), (10, 1), (None, 1))] == [examples] * 4
    blocks = [[int(example.id) for example in spread(examples, 4, block)] for block in range(6)]
    assert all(block == sorted(block) and len(set(block)) == 4 for block in blocks)
    assert not set(blocks[0]) & set(blocks[1])  # disjoint as long as there are enough
    assert sorted(index for block in blocks[:5] for index in block) == sorted([*range(10)] * 2)
    assert blocks[5] == blocks[0]  # 20 examples are two rounds
    assert blocks[0] != [0, 1, 2, 3]  # files are often ordered by origin
    found = evaluate(net, tokenizer, {"t": examples}, limit=4, block=1)
    assert [row["id"] for row in found.per_example] == [str(index) for index in blocks[1]]
    assert (found.settings["limit"], found.settings["block"], found.tasks["t"].num_examples) == (4, 1, 4)
    with pytest.raises(ValueError, match="no examples"):
        evaluate(net, tokenizer, {"void": []})
    net.model.norm.weight.data.fill_(float("nan"))
    for some in (questions("t", 3), texts("t", 3)):
        with pytest.raises(RunFailure, match=r"task 't': .* not finite in 3 of 3 examples, first in example '0'"):
            evaluate(net, tokenizer, {"t": some})


# Before and after


def document(**tasks: tuple[Any, Any]) -> dict[str, Any]:
    """An evaluation with these NLLs and credits of single examples, two answer tokens each; None: not measured."""
    records, found = [], {}
    for task, (nlls, accs) in tasks.items():
        for number, nll in enumerate(nlls):
            acc = {} if accs is None else {"acc": accs[number]}
            records.append({"task": task, "id": str(number), "nll": nll, "num_answer_tokens": 2, **acc})
        means = {"nll_per_token": float(np.mean(nlls)) / 2, "acc": None if accs is None else float(np.mean(accs))}
        found[task] = {"num_examples": len(nlls), **means}
    average: dict[str, Any] = {}
    for name in ("nll_per_token", "acc"):
        values = [each[name] for each in found.values()]
        average[name] = None if None in values else float(np.mean(values))
    return {"tasks": found, "average": average, "per_example": records}


def nlls(**tasks: Any) -> dict[str, Any]:
    return document(**{task: (values, None) for task, values in tasks.items()})


def half_width(gaps: Any) -> float:
    return float(stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / math.sqrt(len(gaps)))


def test_the_average_of_changes_counts_each_task_once() -> None:
    first = {"a": [float(n) for n in range(12)], "b": [5.0 + n % 3 for n in range(20)]}
    second = {"a": [n * 0.5 + (n % 2) for n in range(12)], "b": [4.0 + n % 4 for n in range(20)]}
    *each, average = task_changes(nlls(**first), nlls(**second), "nll_per_token")
    variance = squares = 0.0
    for found, task in zip(each, ("a", "b"), strict=True):
        gaps = (np.array(second[task]) - np.array(first[task])) / 2
        assert (found["before"], found["after"]) == (np.mean(first[task]) / 2, np.mean(second[task]) / 2)
        assert found["difference"] == pytest.approx(gaps.mean())
        half = half_width(gaps)
        assert (found["lower"], found["upper"]) == pytest.approx((gaps.mean() - half, gaps.mean() + half))
        part = gaps.var(ddof=1) / len(gaps) / 4
        variance, squares = variance + part, squares + part**2 / (len(gaps) - 1)
    half = stats.t.ppf(0.975, variance**2 / squares) * math.sqrt(variance)  # Satterthwaite's degrees of freedom
    assert (average["task"], average["num_examples"]) == ("average", 32)
    assert average["difference"] == pytest.approx((each[0]["difference"] + each[1]["difference"]) / 2)
    assert average["upper"] == pytest.approx(average["difference"] + half)


UNKNOWN: dict[str, Any] = {"task": "a", "num_examples": 12}
UNKNOWN |= dict.fromkeys(("before", "after", "difference", "lower", "upper"))


def test_changes_of_what_was_not_measured_of_few_and_of_other_examples() -> None:
    measured = nlls(a=[2.0] * 12)
    assert task_changes({}, measured, "nll_per_token") == [UNKNOWN | {"after": 1.0}]
    assert task_changes(measured, {}, "nll_per_token") == [UNKNOWN | {"before": 1.0}]
    assert task_changes(measured, measured, "acc") == task_changes({}, {}, "acc") == []
    [nine] = task_changes(nlls(a=[2.0, 4.0] + [2.0] * 7), nlls(a=[1.0] * 9), "nll_per_token")
    assert (nine["difference"], nine["lower"], nine["upper"]) == (pytest.approx(-11 / 18), None, None)
    [ten] = task_changes(nlls(a=[2.0, 4.0] + [2.0] * 8), nlls(a=[1.0] * 10), "nll_per_token")
    assert ten["lower"] is not None
    [one] = task_changes(nlls(a=[2.0]), nlls(a=[1.0]), "nll_per_token")
    assert one["difference"] is None
    [found] = task_changes(measured, nlls(a=[4.0] * 14), "nll_per_token")  # only common examples are compared
    assert (found["difference"], found["num_examples"]) == (1.0, 14)
    before, after = nlls(a=[2.0] * 20), nlls(a=[4.0 + n % 3 for n in range(10)] + [2.0] * 10)
    expected = task_changes(before, after, "nll_per_token")
    for record in before["per_example"] + after["per_example"]:
        record["id"] = str(int(record["id"]) % 10)  # ids that repeat: two shards, each numbered from 0
    assert task_changes(before, after, "nll_per_token") == expected


# Several processes


def without_times(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = result.to_dict(per_example=True)
    del found["settings"]["seconds"]
    return found


def _together(rank: int) -> None:
    net, tokenizer, passes = model(), support.tokenizer(), list[int]()

    def count(*_: Any) -> None:
        passes.append(1)

    net.register_forward_pre_hook(count)

    def evaluated() -> EvaluationResult:
        return evaluate(net, tokenizer, SETS)

    def generated() -> GenerationResult:
        return evaluate_generated(net, tokenizer, {"choices": SETS["choices"]}, max_new_tokens=5)

    spans.BATCH_TOKENS = 54  # so few that there are more batches than processes
    with processes_of_launch() as processes:
        for evaluation in (evaluated, generated):
            passes.clear()
            alone, most = without_times(evaluation()), len(passes)
            passes.clear()
            assert without_times(evaluate_together(processes, evaluation)) == alone
            shares = processes.gather(len(passes))
            assert sum(shares) == most > 3  # nothing is computed twice
            assert max(shares) < most * 2 / 3
        assert processes.gather(rank) == [0, 1, 2]  # no message of one is taken for another of the others
        assert math.isfinite(evaluate_together(processes, evaluated).average.nll)


def test_processes_share_batches_get_the_scores_of_one_and_fail_together() -> None:
    assert support.run_processes(3, _together) == [""] * 3


NAMES = ("answer1", "answer2", "answer3")


class Scripted(nn.Module):
    """Says, behind a prompt that ends in one of the keys, the text that belongs to it, and then the end of sequence."""

    def __init__(self, tokenizer: Any, says: dict[str, str]) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.tokenizer, self.says = tokenizer, says
        self.config, self.generation_config = LlamaConfig(), GenerationConfig()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def generate(self, ids: Tensor, *, max_new_tokens: int, eos_token_id: list[int], **settings: Any) -> Tensor:
        """In place of transformers' own; a row that is done gets more ends of sequence."""
        assert not settings["do_sample"]
        keys = [next(key for key in self.says if key in self.tokenizer.decode(row)) for row in ids.tolist()]
        said = [self.tokenizer(self.says[key], add_special_tokens=False)["input_ids"] for key in keys]
        new = [(row + eos_token_id[:1] * max_new_tokens)[:max_new_tokens] for row in said]
        return torch.cat([ids, torch.tensor(new)], dim=1)


def question(task: str, number: int, gold: int, names: tuple[str, ...] = NAMES) -> Example:
    choices = tuple(f"the correct answer is {name}" for name in names)
    return Example(task, str(number), f"Question {number} of {task}:", choices[gold], choices, gold)


@pytest.mark.parametrize(
    "choices, names",
    [
        (["the correct answer is answer1", "the correct answer is answer2"], ("answer1", "answer2")),
        ([" no", " yes"], ("no", "yes")),
        (["It is true.", "It is false."], ("true", "false")),
        ([" 3 + 4", " 3 + 5"], ("4", "5")),
        ([" a bird", " a large bird"], ()),
        ([" May", " may"], ()),
        (["same", "same"], ()),
        (["alone"], ()),
    ],
)
def test_names_are_the_word_in_which_choices_differ(choices: list[str], names: tuple[str, ...]) -> None:
    assert answer_names(choices) == names


@pytest.mark.parametrize(
    "text, names, expected",
    [
        ("the correct answer is answer2.", NAMES, 1),
        ("Answer3, I think, or answer1", NAMES, 2),
        ("answer5", NAMES, None),
        ("answer10 ", NAMES, None),
        ("myanswer1 ", NAMES, None),
        ("", NAMES, None),
        # a name that begins another one does not win
        ("it is well-being.", ("well", "well-being"), 1),
        ("it is well-bred", ("well", "well-being"), 0),
        ("well, it is", ("well", "well-being"), 0),
        # one letter in any case, but not by casefold
        ("the correct answer is opt\u0131on2.", ("option1", "option2"), 1),
    ],
)
def test_the_first_name_counts(text: str, names: tuple[str, ...], expected: int | None) -> None:
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
    records = json.loads(json.dumps(found.to_dict(per_example=True), allow_nan=False))["per_example"]
    assert [each["outcome"][0] for each in records] == list("rwuurr")
    assert [each["task"] for each in records] == list("aaaabb")  # the keys of `tasks`
    shown = io.StringIO()
    Console(file=shown, width=120).print(generation.generation_table({"mine": found}))
    assert says(shown.getvalue(), "a ... 25.0 ... 1 / 1 / 2 ... 100.0 ... 2 / 0 / 0 ... average ... 3 / 1 / 2")
    assert "±" not in shown.getvalue()  # few examples tell no error
    few = evaluate_generated(net, tokenizer, {"a": [question("a", 2, 1)] * 7}, max_new_tokens=3, limit=6).tasks["a"]
    assert (few.num_unparsable, few.num_new_tokens) == (6, 18)


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
    of_task = {name: demo_examples(name, "validation") for name in ("facts", "next")}
    of_task["notes"] = [Example("notes", "7", "", "Some text.")]
    steps, notes = generation.generation_faults(of_task)
    assert says(steps, "choices that differ in one word, unlike example ... of task next.")
    assert says(notes, "choices that differ in one word, unlike example 7 of task notes.")


# lm-evaluation-harness

RESULT = {
    "results": {
        "sums": {"name": "sums", "alias": "sums", "acc,none": 0.25, "acc_stderr,none": "N/A", "sample_len": 4},
        "math": {"alias": "math", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1},
    },
    "n-shot": {"math": 5},
    "n-samples": {"math": {"original": 7, "effective": 7}},
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
            self.task_index = dict.fromkeys([*(["sums"] if include_path else []), "math"])

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
    assert find_harness_tasks(["sums", "math", "sums"], tmp_path)["tasks"] == ["sums", "math"]
    assert find_harness_tasks(["math"])["tasks"] == ["math"]
    line = fault_of(find_harness_tasks, ["mahts", "sums"])
    assert says(line, "--harness: no task, group or tag mahts, sums.")
    net, tokenizer = support.base_model(), support.tokenizer()
    found = evaluate_harness(net, tokenizer, {"tasks": ["sums", "math"], "task_manager": "the manager"}, limit=4)
    strict = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1}
    assert found == {
        "lm_eval": "9.9",
        "tasks": {
            "sums": {"metrics": {"acc": 0.25, "acc_stderr": None}, "num_examples": None, "num_fewshot": None},
            "math": {"metrics": strict, "num_examples": 7, "num_fewshot": 5},
        },
    }
    model = {"pretrained": net, "tokenizer": tokenizer, "backend": "causal", "batch_size": 8}
    asked = {"tasks": ["sums", "math"], "task_manager": "the manager", "limit": 4, "log_samples": False}
    assert stand_in == asked | {"model": model}
    # transformers' own `tie_weights`, which the harness calls, would look for the parameter of a trained embedding
    train_embeddings(net, ("embed_tokens", "lm_head"), (3, 5))
    next(iter(trained_matrices(net).values())).values.data *= 2
    before = support.logits_of(net)
    assert as_lm(net, tokenizer)["pretrained"] is net
    assert torch.equal(support.logits_of(net), before)
    assert "tie_weights" not in vars(net)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert says(
        fault_of(find_harness_tasks, ["math"]), "--harness: ... not installed. Fix: pip install 'qdora[lm-eval]'"
    )


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
    assert says(fault_of(EvalOptions, harness_include=tmp_path), "--harness-include: is used only with --harness")
