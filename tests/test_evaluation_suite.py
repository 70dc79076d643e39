"""Whole evaluations, their JSON form and their tables."""

from __future__ import annotations

import json
import math
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch

from qdora.data.example import Example
from qdora.errors import RunFailure
from qdora.evaluation.loglikelihood import ExampleScore, score_examples
from qdora.evaluation.suite import (
    EvaluationResult,
    TaskResult,
    _record,
    _task_result,
    averaged,
    compare_table,
    evaluate,
    spread,
)
from tests import tiny, tiny_tokenizer

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
    return tiny.llama(vocab_size=400, initializer_range=0.3)


def test_metrics_of_every_task() -> None:
    net, tokenizer = model(), tiny_tokenizer.make()
    net.train()
    sets = {
        "choices": questions("choices", 12),
        "free": texts("free", 5),
        "both": questions("both", 3) + texts("both", 2),
    }
    found = evaluate(net, tokenizer, sets)
    assert net.training
    assert list(found.tasks) == ["choices", "free", "both"]

    scores = score_examples(net.eval(), tokenizer, sets["choices"])
    hits = [int(np.argmax(score.loglikelihoods)) == score.gold for score in scores]
    hits_norm = [int(np.argmax(score.loglikelihoods / score.num_chars)) == score.gold for score in scores]
    nlls = [-score.loglikelihoods[index % 2] for index, score in enumerate(scores)]
    task = found.tasks["choices"]
    assert task.acc == pytest.approx(sum(hits) / 12)
    assert task.acc_norm == pytest.approx(sum(hits_norm) / 12)
    assert task.acc_stderr == pytest.approx(math.sqrt(task.acc * (1 - task.acc) / 11))
    assert task.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert task.majority == 0.5
    assert task.nll == pytest.approx(sum(nlls) / 12)
    num_tokens = sum(score.num_tokens[index % 2] for index, score in enumerate(scores))
    assert task.nll_per_token == pytest.approx(sum(nlls) / num_tokens)

    answers = score_examples(net, tokenizer, sets["free"])
    free = found.tasks["free"]
    assert (free.acc, free.acc_stderr, free.chance, free.majority, free.num_choice_examples) == (None,) * 4 + (0,)
    assert free.nll == pytest.approx(-sum(float(answer.loglikelihoods[0]) for answer in answers) / 5)
    assert free.num_answer_tokens == sum(answer.num_tokens[0] for answer in answers)
    assert (found.tasks["both"].num_examples, found.tasks["both"].num_choice_examples) == (5, 3)

    average = found.average
    assert average.acc == pytest.approx((task.acc + found.tasks["both"].acc) / 2)
    assert average.nll == pytest.approx(np.mean([result.nll for result in found.tasks.values()]))
    assert average.num_examples == 22
    assert found.settings["shared_prefix"] is True
    assert found.settings["model_dtype"] == "float32"


def test_single_examples_add_up_to_the_metrics() -> None:
    sets = {"a": questions("a", 7), "b": questions("b", 4) + texts("b", 3)}
    found = evaluate(model(), tiny_tokenizer.make(), sets)
    for task, result in found.tasks.items():
        records = [record for record in found.per_example if record["task"] == task]
        assert [record["id"] for record in records] == [example.id for example in sets[task]]
        assert np.mean([record["nll"] for record in records]) == pytest.approx(result.nll)
        assert sum(record["num_answer_tokens"] for record in records) == result.num_answer_tokens
        assert np.mean([record["acc"] for record in records if "acc" in record]) == pytest.approx(result.acc)
        assert np.mean([record["acc_norm"] for record in records if "acc" in record]) == pytest.approx(result.acc_norm)


def test_json_and_back() -> None:
    found = evaluate(model(), tiny_tokenizer.make(), {"one": questions("one", 1), "two": texts("two", 2)})
    assert found.tasks["one"].acc_stderr is None  # one example has no standard error, and JSON no nan
    text = json.dumps(found.to_dict(per_example=True), allow_nan=False)
    assert EvaluationResult.from_dict(json.loads(text)) == found
    assert "per_example" not in found.to_dict()


def accuracies(loglikelihoods: list[list[float]], num_chars: list[list[int]], gold: list[int]) -> TaskResult:
    each = zip(loglikelihoods, num_chars, gold, strict=True)
    scores = [ExampleScore("0", right, np.array(ll), np.ones(len(ll), int), np.array(n), 0) for ll, n, right in each]
    return _task_result([_record("t", score) for score in scores])


def test_accuracies_by_hand() -> None:
    # example    ll            chars       best by sum   per character           best   gold
    # 0          -4, -6        2, 6        0             -2, -1                  1      0
    # 1          -3, -2, -9    3, 4, 30    1             -1, -0.5, -0.3          2      2
    # 2          -1, -5        1, 1        0             -1, -5                  0      0
    # 3          -8, -8.5      8, 17       0             -1, -0.5                1      1
    found = accuracies(
        [[-4.0, -6.0], [-3.0, -2.0, -9.0], [-1.0, -5.0], [-8.0, -8.5]],
        [[2, 6], [3, 4, 30], [1, 1], [8, 17]],
        [0, 2, 0, 1],
    )
    assert found.acc == 2 / 4
    assert found.acc_stderr == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    assert found.acc_norm == 3 / 4
    assert found.acc_norm_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert found.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert found.majority == 2 / 4  # gold is 0 twice, 2 and 1 once
    assert (found.num_ties, found.num_ties_norm) == (0, 0)


def test_ties_count_by_chance() -> None:
    found = accuracies([[-3.0] * 4, [-2.0, -4.0]], [[1, 1, 1, 1], [1, 2]], [2, 0])
    assert found.acc == (1 / 4 + 1) / 2
    assert found.acc_norm == (1 / 4 + 1 / 2) / 2
    assert (found.num_ties, found.num_ties_norm) == (1, 2)


def test_constant_scores_give_chance_not_the_first_index() -> None:
    gold = [0] * 90 + [1] * 10  # argmax of constant scores would look like 90 %
    found = accuracies([[-1.0, -1.0]] * 100, [[1, 1]] * 100, gold)
    assert found.acc == found.chance == 0.5
    assert found.majority == 0.9


def test_empty_choice_counts_as_one_character() -> None:
    assert accuracies([[-1.0, -3.0]], [[0, 2]], [0]).acc_norm == 1.0


def test_the_average_weighs_tasks_equally() -> None:
    found = averaged([result(0.2, 0.03, 1.0, 10), result(0.6, 0.04, 1.0, 90)], "acc")
    assert found is not None
    assert found.value == pytest.approx(0.4)
    assert found.stderr == pytest.approx(0.05 / 2)
    unknown = averaged([result(0.2, 0.03, 1.0), result(0.6, None, 1.0)], "acc")
    assert unknown is not None
    assert math.isnan(unknown.stderr)
    assert averaged([], "acc") is None


def test_progress_counts_every_task_to_its_end() -> None:
    seen: list[tuple[int, int]] = []
    sets = {"a": questions("a", 6) + texts("a", 3), "b": texts("b", 4)}
    evaluate(model(), tiny_tokenizer.make(), sets, max_batch_tokens=64, progress=lambda *state: seen.append(state))
    assert [total for total, _ in groupby(of for _, of in seen)] == [9, 4]
    for total in (9, 4):
        counts = [done for done, of in seen if of == total]
        assert counts == sorted(counts)
        assert counts[-1] == total


def test_blocks_are_disjoint_as_long_as_there_are_enough_and_then_start_again() -> None:
    examples = questions("choices", 10)
    blocks = [[int(example.id) for example in spread(examples, 4, block)] for block in range(6)]
    assert all(block == sorted(block) and len(set(block)) == 4 for block in blocks)
    assert not set(blocks[0]) & set(blocks[1])
    assert set(blocks[0]) | set(blocks[1]) | set(blocks[2]) == set(range(10))
    assert blocks[5] == blocks[0]  # 20 examples are two rounds
    assert sorted(index for block in blocks[:5] for index in block) == sorted([*range(10)] * 2)
    assert blocks[0] != [0, 1, 2, 3]  # files are often ordered by origin
    assert spread(examples, 10, 1) == spread(examples, None, 1) == examples
    found = evaluate(model(), tiny_tokenizer.make(), {"choices": examples}, limit=4, block=1)
    assert [row["id"] for row in found.per_example] == [str(index) for index in blocks[1]]
    assert found.settings["block"] == 1


def test_limit_is_spread_over_the_task() -> None:
    examples = questions("t", 10)
    assert [example.id for example in spread(examples, 4)] == ["0", "2", "5", "7"]
    assert spread(examples, 10) == spread(examples, 99) == spread(examples, None) == examples
    found = evaluate(model(), tiny_tokenizer.make(), {"t": examples}, limit=4)
    assert found.tasks["t"].num_examples == 4
    assert found.settings["limit"] == 4


def test_faults() -> None:
    net, tokenizer = model(), tiny_tokenizer.make()
    with pytest.raises(ValueError, match="no examples"):
        evaluate(net, tokenizer, {"void": []})
    with torch.no_grad():
        net.model.norm.weight.fill_(float("nan"))
    for examples in (questions("t", 3), texts("t", 3)):
        with pytest.raises(RunFailure, match=r"task 't': .* not finite in 3 of 3 examples, first in example '0'"):
            evaluate(net, tokenizer, {"t": examples})


def result(acc: float | None, stderr: float | None, nll: float, count: int = 50) -> TaskResult:
    return TaskResult(
        num_examples=count,
        num_choice_examples=count if acc is not None else 0,
        acc=acc,
        acc_stderr=stderr,
        acc_norm=acc,
        acc_norm_stderr=None,
        chance=0.25 if acc is not None else None,
        majority=0.3 if acc is not None else None,
        num_ties=0,
        num_ties_norm=0,
        nll=2 * nll,
        nll_stderr=0.1,
        nll_per_token=nll,
        nll_per_token_stderr=0.05,
        num_answer_tokens=2 * count,
        num_truncated=0,
    )


def two_results() -> dict[str, EvaluationResult]:
    return {
        "base": EvaluationResult({"arc": result(0.5, 0.07, 3.0)}, result(0.5, 0.07, 3.0), {}),
        "dora": EvaluationResult(
            {"arc": result(0.625, None, 2.0, 40), "text": result(None, None, 1.23456)}, result(0.625, 0.05, 1.5, 90), {}
        ),
    }


def test_the_cells_of_the_table() -> None:
    table = compare_table(two_results())
    assert [column.header for column in table.columns] == [
        *("task", "n", "chance", "majority", "base acc %", "base NLL/token", "dora acc %", "dora NLL/token")
    ]
    assert list(zip(*(column.cells for column in table.columns), strict=True)) == [
        ("arc", "50/40", "25.0", "30.0", "50.0 ± 7.0", "3.000", "62.5", "2.000"),
        ("text", "50", "–", "–", "–", "–", "–", "1.235"),
        ("average", "50/90", "25.0", "30.0", "50.0 ± 7.0", "3.000", "62.5 ± 5.0", "1.500"),
    ]
    few = result(0.0, 0.0, 1.0, 2)  # two wrong answers do not make a standard error of 0
    assert list(compare_table({"base": EvaluationResult({"a": few}, few, {})}).columns[4].cells) == ["0.0", "0.0"]
