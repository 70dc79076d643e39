"""Choices and answers as text, against one sequence at a time in float64."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qdora.data.example import Example
from qdora.data.messages import Turn
from qdora.data.tokenize import tokenize_all
from qdora.errors import UserError
from qdora.evaluation.loglikelihood import score_examples
from tests import tiny, tiny_tokenizer

EXAMPLES = [
    Example("t", "0", "Question: what colour is the sky?\nAnswer:", " blue", (" blue", " green", " a cow"), 0),
    Example("t", "1", "Question: which animal gives milk?\nAnswer:", " a cow", (" a dog", " a cow"), 1),
    Example("t", "2", "the quick brown fox", " jumps over the lazy dog", (" jumps", " jumps over the lazy dog"), 1),
    Example("t", "3", "Question: what is the an", "swer", ("swer", "d", "t"), 0),  # no space: tokens span the border
    Example("t", "4", "the sky is ", "blue", ("blue", "a"), 0),  # a space at the end of the prompt
]


def without_choices(example: Example) -> Example:
    return replace(example, choices=(), gold=None)


def model(**changes: Any) -> Any:
    return tiny.llama(vocab_size=400, initializer_range=0.3, **changes)


def naive(net: Any, ids: Sequence[int], start: int) -> float:
    """Sum over t >= start of log p(ids[t] | ids[:t]), one sequence, float64."""
    with torch.no_grad():
        logits = net(input_ids=torch.tensor([list(ids)])).logits[0].double().numpy()
    total = 0.0
    for t in range(start, len(ids)):
        row = logits[t - 1]
        total += row[ids[t]] - (row.max() + np.log(np.exp(row - row.max()).sum()))
    return float(total)


def border(tokenizer: Any, prompt: str, choice: str) -> tuple[list[int], int]:
    """Ids of prompt + choice and the first that the prompt alone does not have, spelled out."""
    ids, alone = tokenizer(prompt + choice)["input_ids"], tokenizer(prompt.rstrip(" "))["input_ids"]
    start = 0
    while start < min(len(ids), len(alone)) and ids[start] == alone[start]:
        start += 1
    return ids, start


@pytest.mark.parametrize("bos", [False, True])
def test_choices_equal_one_sequence_at_a_time(bos: bool) -> None:
    net, tokenizer = model(), tiny_tokenizer.make(bos=bos)
    found = score_examples(net, tokenizer, EXAMPLES, max_batch_tokens=100)
    borders_that_merge = 0
    for example, scores in zip(EXAMPLES, found, strict=True):
        assert (scores.id, scores.gold, scores.num_truncated) == (example.id, example.gold, 0)
        for c, choice in enumerate(example.choices):
            ids, start = border(tokenizer, example.prompt, choice)
            assert scores.loglikelihoods[c] == pytest.approx(naive(net, ids, start), abs=2e-5)
            assert scores.num_tokens[c] == len(ids) - start
            assert scores.num_chars[c] == len(choice.strip())
            borders_that_merge += tokenizer.decode(ids[start:]) != choice
    assert borders_that_merge >= 2


@pytest.mark.parametrize("bos", [False, True])
def test_the_tokens_are_those_of_training_without_the_end(bos: bool) -> None:
    net, tokenizer = model(), tiny_tokenizer.make(bos=bos)
    scores = score_examples(net, tokenizer, EXAMPLES)
    answers = score_examples(net, tokenizer, [without_choices(example) for example in EXAMPLES])
    for example, score, answer in zip(EXAMPLES, scores, answers, strict=True):
        [trained] = tokenize_all([example], tokenizer, name="t", max_length=128).examples
        assert trained.input_ids[-1] == tokenizer.eos_token_id
        start = int(np.flatnonzero(trained.loss_mask)[0])
        expected = naive(net, trained.input_ids[:-1].tolist(), start)
        for found in (score, answer):
            assert found.nll == pytest.approx(-expected, abs=2e-5)
            assert found.num_answer_tokens == trained.loss_mask.sum() - 1


def test_prompts_longer_than_the_context_lose_their_left_end(caplog: pytest.LogCaptureFixture) -> None:
    net, tokenizer = model(max_position_embeddings=24), tiny_tokenizer.make(bos=True)
    prompt = "xyzzy plugh " * 5
    example = Example("t", "long", prompt, " one", (" one", " two words"), 0)
    with caplog.at_level(logging.WARNING):
        (found,) = score_examples(net, tokenizer, [example])
        (answer,) = score_examples(net, tokenizer, [without_choices(example)])
    pairs = [border(tokenizer, prompt, choice) for choice in example.choices]
    cut = max(len(ids) for ids, _ in pairs) - 1 - 24
    assert found.num_truncated == cut > 0
    for (ids, start), score in zip(pairs, found.loglikelihoods, strict=True):
        assert score == pytest.approx(naive(net, ids[:1] + ids[1 + cut :], start - cut), abs=2e-5)
    ids, start = pairs[0]
    own_cut = len(ids) - 1 - 24
    assert answer.num_truncated == own_cut
    assert answer.nll == pytest.approx(-naive(net, ids[:1] + ids[1 + own_cut :], start - own_cut), abs=2e-5)
    assert f"t: 1 examples exceed the model's context; up to {cut} tokens" in caplog.text
    caplog.clear()
    score_examples(net, tokenizer, [example])
    assert not caplog.records  # told once for a task
    score_examples(net, tokenizer, [replace(example, task="u")])
    assert "u: 1 examples exceed" in caplog.text


def test_long_text_is_scored_in_windows_each_token_once() -> None:
    net, tokenizer = model(max_position_embeddings=16), tiny_tokenizer.make()
    text = "the quick brown fox jumps over the lazy dog " * 4
    (found,) = score_examples(net, tokenizer, [Example("t", "text", "", text)])
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 40
    expected = naive(net, ids[:17], 1)
    for end in range(17, len(ids), 8):
        last = min(end + 8, len(ids))
        window = ids[last - 17 : last]
        expected += naive(net, window, 17 - (last - end))
    assert found.nll == pytest.approx(-expected, abs=5e-5)
    assert found.num_answer_tokens == len(ids) - 1
    assert found.num_truncated == 0


def test_a_long_answer_keeps_half_a_window_of_its_prompt() -> None:
    net, tokenizer = model(max_position_embeddings=16), tiny_tokenizer.make()
    example = Example("t", "a", "z" * 30, " " + "q" * 40)
    (found,) = score_examples(net, tokenizer, [example])
    ids, start = border(tokenizer, example.prompt, example.answer)
    assert found.num_answer_tokens == len(ids) - start
    assert found.num_truncated == start - 9


def test_a_chat_is_scored_on_the_assistants_turns() -> None:
    net, tokenizer = model(), tiny_tokenizer.make()
    messages = (
        Turn("user", "what says moo?"),
        Turn("assistant", "a cow"),
        Turn("user", "sure?"),
        Turn("assistant", "yes"),
    )
    (found,) = score_examples(net, tokenizer, [Example("t", "chat", "", "", messages=messages)])
    encode = tokenizer.encode
    first = encode("<|im_start|>user\nwhat says moo?<|im_end|>\n<|im_start|>assistant\n")
    second = encode("a cow<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n")
    turns = [encode("a cow<|im_end|>\n"), encode("yes<|im_end|>\n")]
    expected = naive(net, first + turns[0], len(first)) + naive(net, first + second + turns[1], len(first + second))
    assert found.nll == pytest.approx(-expected, abs=2e-5)
    assert found.num_answer_tokens == len(turns[0]) + len(turns[1])


def test_kinds_of_examples_keep_their_order() -> None:
    net, tokenizer = model(), tiny_tokenizer.make()
    chat = Example("t", "chat", "", "", messages=(Turn("user", "moo?"), Turn("assistant", "a cow")))
    text = Example("t", "text", "", "the lazy dog")
    examples = [text, chat, EXAMPLES[0], without_choices(EXAMPLES[1]), chat]
    together = score_examples(net, tokenizer, examples)
    assert [score.id for score in together] == ["text", "chat", "0", "1", "chat"]
    for score, example in zip(together, examples, strict=True):
        (alone,) = score_examples(net, tokenizer, [example])
        np.testing.assert_allclose(score.loglikelihoods, alone.loglikelihoods, atol=2e-5)


def test_faults_are_gathered() -> None:
    net, tokenizer = model(max_position_embeddings=16), tiny_tokenizer.make()
    faulty = [
        Example("t", "empty", "moo", " x", (" x", ""), 0),
        Example("t", "alone", "", "a", ("a", "b"), 0),
        Example("t", "huge", "moo", " x", (" x", " " + "q" * 60), 0),
    ]
    with pytest.raises(UserError) as caught:
        score_examples(net, tokenizer, faulty)
    expected = [
        "t: example empty: choices[1] has no token to score",
        "t: example alone: choices[0] has no token to score",
        "t: example huge: a choice does not fit the model's context of 16 tokens",
    ]
    assert [fault[: len(start)] for fault, start in zip(caught.value.faults, expected, strict=True)] == expected
    with pytest.raises(UserError, match="no chat template"):
        score_examples(
            net,
            tiny_tokenizer.make(chat_template=None),
            [Example("t", "c", "", "", messages=(Turn("user", "a"), Turn("assistant", "b")))],
        )
    with pytest.raises(UserError, match="example e: the answer has no token to score"):
        score_examples(net, tokenizer, [Example("t", "e", "", "a")])


def test_many_faults_are_counted() -> None:
    examples = [Example("t", str(i), "moo", " x", (" x", ""), 0) for i in range(30)]
    with pytest.raises(UserError) as caught:
        score_examples(model(), tiny_tokenizer.make(), examples)
    assert len(caught.value.faults) == 11
    assert caught.value.faults[-1] == "20 more examples that cannot be scored"
