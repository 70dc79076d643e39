"""Answers in the model's own words: their names, what is read from them, and how they are counted."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig

from qdora.data.demo import examples as demo_examples
from qdora.data.example import Example
from qdora.errors import UserError
from qdora.evaluation.generation import (
    answer_names,
    evaluate_generated,
    first_mention,
    generation_faults,
    generation_table,
)
from tests import tiny, tiny_tokenizer

NAMES = ("answer1", "answer2", "answer3")


class Scripted(nn.Module):
    """Says, behind a prompt that ends in one of the keys, the text that belongs to it, and then the end of sequence.

    `generate` is a loop in place of transformers' own.
    """

    def __init__(self, tokenizer: Any, says: dict[str, str]) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.tokenizer, self.says = tokenizer, says
        self.num_calls = 0
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
            self.num_calls += 1
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


def test_names_are_the_word_in_which_choices_differ() -> None:
    assert answer_names(["the correct answer is answer1", "the correct answer is answer2"]) == ("answer1", "answer2")
    assert answer_names([" no", " yes"]) == ("no", "yes")
    assert answer_names(["It is true.", "It is false."]) == ("true", "false")
    assert answer_names(["it is red today", "it is blue today"]) == ("red", "blue")
    assert answer_names([" a bird", " a large bird"]) == ()
    assert answer_names([" May", " may"]) == ()
    assert answer_names([" 3 + 4", " 3 + 5"]) == ("4", "5")
    assert answer_names([" +", " -"]) == ()
    assert answer_names(["same", "same"]) == ()
    assert answer_names([]) == ()
    assert answer_names(["alone"]) == ()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the correct answer is answer2", (1, True)),  # "answer2" may still become "answer21"
        ("the correct answer is answer2.", (1, False)),
        ("Answer3, I think, or answer1", (2, False)),
        ("not answer1 but answer2", (0, False)),  # the first, as published
        ("answer5", (None, True)),
        ("answer10 ", (None, True)),
        ("myanswer1 ", (None, True)),
        ("", (None, True)),
    ],
)
def test_the_first_name_counts(text: str, expected: tuple[int | None, bool]) -> None:
    assert first_mention(text, NAMES) == expected


@pytest.mark.parametrize("letter", ["\u0131", "\u0130"])  # one letter in any case, but not by casefold
def test_an_i_without_or_with_a_dot_is_an_i(letter: str) -> None:
    assert first_mention(f"the correct answer is opt{letter}on2.", ("option1", "option2")) == (1, False)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("it is well-being.", (1, False)),
        ("it is well-", (0, True)),
        ("it is well-b", (0, True)),
        ("it is well-bred", (0, False)),
        ("well, it is", (0, False)),
        ("Well", (0, True)),
    ],
)
def test_a_name_that_begins_another_one_does_not_win(text: str, expected: tuple[int | None, bool]) -> None:
    assert first_mention(text, ("well", "well-being")) == expected


def test_right_wrong_and_unparsable_are_counted_apart() -> None:
    tokenizer = tiny_tokenizer.make()
    says = {
        "Question 0 of a:": "the correct answer is answer2",
        "Question 1 of a:": " answer1! The correct answer is answer3",
        "Question 2 of a:": "the correct answer is blue",
        "Question 3 of a:": "",
        "Question 0 of b:": "TRUE",
        "Question 1 of b:": "It is untrue, so false",
    }
    sets = {
        "a": [question("a", number, gold) for number, gold in enumerate([1, 2, 0, 0])],
        "b": [replace(question("b", n, gold, ("true", "false")), task="of the row") for n, gold in enumerate([0, 1])],
    }
    net = Scripted(tokenizer, says)
    found = evaluate_generated(net, tokenizer, sets, max_new_tokens=64)
    first, second = found.tasks["a"], found.tasks["b"]
    assert (first.num_examples, first.num_right, first.num_wrong, first.num_unparsable) == (4, 1, 1, 2)
    assert first.acc == 0.25
    assert first.acc_stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 3))  # unparsable ones count as not right
    assert first.chance == pytest.approx(1 / 3)
    assert first.unparsable == [
        {"id": "2", "output": "the correct answer is blue"},
        {"id": "3", "output": ""},
    ]
    assert (second.num_right, second.num_wrong, second.num_unparsable, second.acc) == (2, 0, 0, 1.0)
    average = found.average
    assert (average.num_examples, average.num_right, average.num_wrong, average.num_unparsable) == (6, 3, 1, 2)
    assert average.acc == pytest.approx((0.25 + 1.0) / 2)
    assert average.acc_stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 3) / 2)
    assert average.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    document = json.loads(json.dumps(found.to_dict(per_example=True), allow_nan=False))
    assert [each["outcome"] for each in document["per_example"]] == [
        "right",
        "wrong",
        "unparsable",
        "unparsable",
        "right",
        "right",
    ]
    assert [each["task"] for each in document["per_example"]] == ["a"] * 4 + ["b"] * 2  # the keys of `tasks`
    # an answer that is decided is not spun out
    assert document["per_example"][1]["output"] == " answer1!"
    assert "per_example" not in found.to_dict()


def test_the_table_shows_all_three_counts() -> None:
    tokenizer = tiny_tokenizer.make()
    net = Scripted(tokenizer, {"Question 0 of a:": "answer2", "Question 1 of a:": "?"})
    found = evaluate_generated(net, tokenizer, {"a": [question("a", 0, 1), question("a", 1, 1)]}, max_new_tokens=16)
    shown = io.StringIO()
    Console(file=shown, width=120).print(generation_table({"mine": found}))
    assert "1 / 0 / 1" in shown.getvalue()
    assert "50.0" in shown.getvalue()
    assert "±" not in shown.getvalue()  # two examples tell no error


def test_an_answer_stops_after_so_many_tokens() -> None:
    tokenizer = tiny_tokenizer.make()
    net = Scripted(tokenizer, {"Question 0 of a:": "the correct answer is answer2"})
    found = evaluate_generated(net, tokenizer, {"a": [question("a", 0, 1)]}, max_new_tokens=3)
    assert found.tasks["a"].num_unparsable == 1
    assert found.tasks["a"].num_new_tokens == 3
    assert net.num_calls == 3


def test_a_prompt_too_long_for_the_context_loses_its_left() -> None:
    tokenizer = tiny_tokenizer.make(bos=True)
    net = tiny.llama(vocab_size=400, max_position_embeddings=40, initializer_range=0.3)
    fed: list[list[int]] = []
    net.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"][0].tolist()), with_kwargs=True)
    long = Example("a", "0", "w " * 60 + "Answer:", " yes", (" yes", " no"), 0)
    found = evaluate_generated(net, tokenizer, {"a": [long]}, max_new_tokens=32)
    # 40 positions: beginning of sequence, 8 tokens of the prompt, 31 of the answer (the last is never fed)
    assert len(fed[0]) == 9
    assert fed[0] == [tokenizer.bos_token_id, *tokenizer(long.prompt, add_special_tokens=False)["input_ids"][-8:]]
    assert found.tasks["a"].num_truncated == 1
    with pytest.raises(UserError, match=r"a context longer than the .* tokens of the answer, got a model with 40"):
        evaluate_generated(net, tokenizer, {"a": [long]}, max_new_tokens=40)


def test_what_cannot_be_generated_is_known_without_a_model() -> None:
    facts = demo_examples("facts", "validation")
    steps = demo_examples("next", "validation")
    text = [Example("notes", "7", "", "Some text.")]
    assert generation_faults({"facts": facts}) == []
    faults = generation_faults({"facts": facts, "next": steps, "notes": text})
    assert len(faults) == 2
    needed = "eval.method: generate needs choices that differ in one word, got task "
    assert faults[0].startswith(f"{needed}'next', whose example ")
    assert faults[1].startswith(f"{needed}'notes', whose example 7 has no choices. Fix: ")
