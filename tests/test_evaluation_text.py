"""Examples and texts scored, against one sequence at a time in float64; hidden states against hooks on the blocks."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdora.data.example import Example
from qdora.data.messages import Turn
from qdora.data.tokenize import tokenize_all
from qdora.errors import Diverged
from qdora.evaluate.hidden_states import hidden_state_errors
from qdora.evaluate.loglikelihood import score_examples, scoring_faults
from qdora.evaluate.perplexity import read_texts, text_perplexity
from qdora.evaluate.token_scores import strided_spans
from tests import support
from tests.data_rows import fault_of, faults_of, says
from tests.test_evaluation_spans import naive

EXAMPLES = [
    Example("t", "0", "Question: what colour is the sky?\nAnswer:", " blue", (" blue", " green", " a cow"), 0),
    Example("t", "1", "Question: which animal gives milk?\nAnswer:", " a cow", (" a dog", " a cow"), 1),
    Example("t", "2", "the quick brown fox", " jumps over the lazy dog", (" jumps", " jumps over the lazy dog"), 1),
    Example("t", "3", "Question: what is the an", "swer", ("swer", "d", "t"), 0),  # no space: tokens span the border
    Example("t", "4", "the sky is ", "blue", ("blue", "a"), 0),  # a space at the end of the prompt
]
MOO = Example("t", "chat", "", "", messages=(Turn("user", "moo?"), Turn("assistant", "a cow")))
TEXT = Example("t", "text", "", "the lazy dog")
PLAIN = support.tokenizer()


def answer_of(example: Example) -> Example:
    return replace(example, choices=(), gold=None)


def model(**changes: Any) -> Any:
    return support.llama(vocab_size=400, initializer_range=0.3, **changes)


def border(tokenizer: Any, prompt: str, choice: str) -> tuple[list[int], int]:
    """Ids of prompt + choice and the first that the prompt alone does not have, spelled out."""
    ids, alone = tokenizer(prompt + choice)["input_ids"], tokenizer(prompt.rstrip(" "))["input_ids"]
    start = 0
    while start < min(len(ids), len(alone)) and ids[start] == alone[start]:
        start += 1
    return ids, start


@pytest.mark.parametrize("bos", [False, True])
def test_choices_and_answers_equal_one_sequence_at_a_time(bos: bool) -> None:
    net, tokenizer = model(), support.tokenizer(bos=bos)
    found = score_examples(net, tokenizer, EXAMPLES, max_batch_tokens=100)
    answers = score_examples(net, tokenizer, [answer_of(example) for example in EXAMPLES])
    borders_that_merge = 0
    for example, scores, answer in zip(EXAMPLES, found, answers, strict=True):
        assert (scores.id, scores.gold, scores.num_truncated) == (example.id, example.gold, 0)
        for c, choice in enumerate(example.choices):
            ids, start = border(tokenizer, example.prompt, choice)
            assert scores.loglikelihoods[c] == pytest.approx(naive(net, ids, start), abs=2e-5)
            assert (scores.num_tokens[c], scores.num_chars[c]) == (len(ids) - start, len(choice.strip()))
            borders_that_merge += tokenizer.decode(ids[start:]) != choice
        # the tokens are those of training, without the end
        [trained] = tokenize_all([example], tokenizer, name="t", max_length=128).examples
        start = int(np.flatnonzero(trained.loss_mask)[0])
        for each in (scores, answer):
            assert each.nll == pytest.approx(-naive(net, trained.input_ids[:-1].tolist(), start), abs=2e-5)
            assert each.num_answer_tokens == trained.loss_mask.sum() - 1
    assert borders_that_merge >= 2


def test_prompts_longer_than_the_context_lose_their_left_end(caplog: pytest.LogCaptureFixture) -> None:
    net, tokenizer = model(max_position_embeddings=24), support.tokenizer(bos=True)
    prompt = "xyzzy plugh " * 5
    example = Example("t", "long", prompt, " one", (" one", " two words"), 0)
    with caplog.at_level(logging.WARNING):
        [found] = score_examples(net, tokenizer, [example])
        [answer] = score_examples(net, tokenizer, [answer_of(example)])
        pairs = [border(tokenizer, prompt, choice) for choice in example.choices]
        cut, own_cut = max(len(ids) for ids, _ in pairs) - 1 - 24, len(pairs[0][0]) - 1 - 24
        assert (found.num_truncated, answer.num_truncated) == (cut, own_cut)
        assert cut > own_cut > 0
        expected = [naive(net, ids[:1] + ids[1 + cut :], start - cut) for ids, start in pairs]
        assert found.loglikelihoods.tolist() == pytest.approx(expected, abs=2e-5)
        ids, start = pairs[0]
        assert answer.nll == pytest.approx(-naive(net, ids[:1] + ids[1 + own_cut :], start - own_cut), abs=2e-5)
        assert f"t: 1 examples exceed the model's context; up to {cut} tokens" in caplog.text
        caplog.clear()
        score_examples(net, tokenizer, [example])
        assert not caplog.records  # told once for a task
        score_examples(net, tokenizer, [replace(example, task="u")])
        assert "u: 1 examples exceed" in caplog.text


def test_long_answers_are_scored_in_windows_each_token_once() -> None:
    net, text = model(max_position_embeddings=16), "the quick brown fox jumps over the lazy dog " * 4
    [found] = score_examples(net, PLAIN, [Example("t", "text", "", text)])
    ids = PLAIN(text)["input_ids"]
    expected = naive(net, ids[:17], 1)
    for end in range(17, len(ids), 8):
        last = min(end + 8, len(ids))
        expected += naive(net, ids[last - 17 : last], 17 - (last - end))
    assert found.nll == pytest.approx(-expected, abs=5e-5)
    assert (found.num_answer_tokens, found.num_truncated) == (len(ids) - 1, 0)
    example = Example("t", "a", "z" * 30, " " + "q" * 40)  # keeps half a window of its prompt
    [found] = score_examples(net, PLAIN, [example])
    ids, start = border(PLAIN, example.prompt, example.answer)
    assert (found.num_answer_tokens, found.num_truncated) == (len(ids) - start, start - 9)


def test_chats_are_scored_on_the_assistants_turns_and_kinds_keep_their_order() -> None:
    net, encode = model(), PLAIN.encode
    turns = (Turn("user", "moo?"), Turn("assistant", "a cow"), Turn("user", "sure?"), Turn("assistant", "yes"))
    [found] = score_examples(net, PLAIN, [replace(MOO, messages=turns)])
    first = encode("<|im_start|>user\nmoo?<|im_end|>\n<|im_start|>assistant\n")
    second = encode("a cow<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n")
    said = [encode("a cow<|im_end|>\n"), encode("yes<|im_end|>\n")]
    expected = naive(net, first + said[0], len(first)) + naive(net, first + second + said[1], len(first + second))
    assert found.nll == pytest.approx(-expected, abs=2e-5)
    assert found.num_answer_tokens == len(said[0]) + len(said[1])
    examples, seen = [TEXT, MOO, EXAMPLES[0], answer_of(EXAMPLES[1]), MOO], list[Any]()
    together = score_examples(net, PLAIN, examples, progress=lambda *now: seen.append(now))
    assert seen[-1] == (5, 5)
    for score, example in zip(together, examples, strict=True):
        [alone] = score_examples(net, PLAIN, [example])
        assert score.id == example.id
        np.testing.assert_allclose(score.loglikelihoods, alone.loglikelihoods, atol=2e-5)


def test_examples_that_cannot_be_scored_are_refused_together() -> None:
    net = model(max_position_embeddings=16)
    faulty = [
        Example("t", "empty", "moo", " x", (" x", ""), 0),
        Example("t", "alone", "", "a", ("a", "b"), 0),
        Example("t", "huge", "moo", " x", (" x", " " + "q" * 60), 0),
        Example("t", "one", "", "a"),
    ]
    faults = faults_of(score_examples, net, PLAIN, faulty)
    assert [says(line, words) for line, words in zip(faults, FAULTS, strict=True)] == [True] * 4
    assert scoring_faults(PLAIN, [TEXT] * 1500 + faulty, 16) == list(faults)
    assert scoring_faults(PLAIN, [TEXT], 16) == []
    fits = Example("t", "fits", "moo", " x", (" x", " " + "q" * 14), 0)
    ids, start = border(PLAIN, "moo", fits.choices[1])  # with the last token of its prompt, and without the last of all
    assert [len(scoring_faults(PLAIN, [fits], len(ids) - start - less)) for less in (0, 1)] == [0, 1]
    assert says(fault_of(score_examples, net, support.tokenizer(chat_template=None), [MOO]), "no chat template")
    *ten, more = faults_of(score_examples, net, PLAIN, [replace(faulty[0], id=str(number)) for number in range(30)])
    assert (len(ten), more) == (10, "20 more examples that cannot be scored")


FAULTS = [
    "t: example empty: choices[1] has no token to score",
    "t: example alone: choices[0] has no token to score",
    "t: example huge: a choice does not fit the model's context of 16 tokens",
    "t: example one: the answer has no token to score",
]


# Perplexity


@given(length=st.integers(0, 60), window=st.integers(1, 20), data=st.data())
def test_every_token_is_scored_exactly_once_with_enough_context(length: int, window: int, data: Any) -> None:
    stride, start = data.draw(st.integers(1, window)), data.draw(st.integers(1, 40))
    ids, scored = list(range(100, 100 + length)), list[int]()
    for span in strided_spans(ids, window, stride, first=start):
        assert len(span.ids) - 1 <= window
        assert list(span.ids) == list(range(span.ids[0], span.ids[0] + len(span.ids)))
        scored += span.ids[span.start :]
        assert span.start >= min(span.ids[span.start] - 100, window - stride + 1)
    assert scored == ids[start:]


@pytest.mark.parametrize("window, stride", [(16, 16), (16, 5), (7, 1), (128, 64)])
def test_perplexity_equals_one_token_at_a_time(window: int, stride: int) -> None:
    net, texts = model(), ["Pack my box with five dozen liquor jugs now", "Ça va?", "x"]
    found = text_perplexity(net, PLAIN, texts, window=window, stride=stride, max_batch_tokens=64)
    expected, count = 0.0, 0
    for ids in (PLAIN(text)["input_ids"] for text in texts):
        for t in range(1, len(ids)):
            begin = 0
            if t > window:
                block = (t - 1 - window) // stride
                begin = min(1 + window + (block + 1) * stride, len(ids)) - 1 - window
            expected, count = expected - naive(net, ids[begin : t + 1], t - begin), count + 1
    assert (found.num_tokens, found.num_bytes, found.num_texts) == (count, 43 + 7 + 1, 3)
    assert found.nll_sum == pytest.approx(expected, abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(expected / count), rel=1e-5)
    assert found.nll_per_byte == pytest.approx(expected / 51, rel=1e-6)
    assert found.to_dict()["perplexity"] == found.perplexity


def test_perplexity_by_hand_and_what_is_refused(tmp_path: Path) -> None:
    net = support.llama(vocab_size=400, tie_word_embeddings=False)
    torch.nn.init.zeros_(net.lm_head.weight)  # uniform
    found = text_perplexity(net, support.tokenizer(bos=True), ["abcd"])
    assert found.perplexity == pytest.approx(400, rel=1e-6)
    # with the beginning of sequence the first token counts
    assert (found.num_tokens, found.window, found.stride) == (len(PLAIN("abcd")["input_ids"]), 128, 64)
    contents = {"good": b"na\xc3\xafve", "bom": b"\xef\xbb\xbfna\xc3\xafve", "latin": b"na\xefve", "empty": b""}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    good = tmp_path / "good.txt"
    assert read_texts([good, tmp_path / "bom.txt"]) == ["naïve", "naïve"]
    for call, words in (
        (lambda: text_perplexity(net, PLAIN, ["text"], window=129), "window: ... context, 128 tokens, got 129"),
        (lambda: text_perplexity(net, PLAIN, ["", "a"]), "no token can be scored in 2 texts with 1 bytes"),
        (lambda: read_texts([good, tmp_path / "latin.txt"]), "latin.txt: not UTF-8 text (byte 2)"),
        (lambda: read_texts([good, tmp_path / "missing.txt"]), "missing.txt: No such file"),
        (lambda: read_texts([good, tmp_path / "empty.txt"]), "empty.txt: the file is empty"),
    ):
        assert says(fault_of(call), words)
    with pytest.raises(ValueError, match="stride 0"):
        strided_spans([1, 2], 4, 0)
    for factor in (math.nan, 1e5):
        net = support.llama(vocab_size=400)
        net.lm_head.weight.data *= factor
        with pytest.raises(Diverged, match="perplexity: it is not finite"):
            text_perplexity(net, PLAIN, ["Pack my box"])


# Hidden states


def captured(net: Any, ids: list[int]) -> list[Any]:
    """Hidden states after each block but the last, and after the final norm, (positions, width) each."""
    states: list[Any] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).double().numpy().reshape(-1, 32))

    hooks = [module.register_forward_hook(keep) for module in (*net.model.layers[:-1], net.model.norm)]
    with torch.no_grad():
        net(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return states


def test_errors_of_every_block_over_all_positions_and_texts() -> None:
    net, other, texts = support.llama(), support.llama(), [[1, 5, 9, 2], [7, 3], [*range(60)] * 3]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = hidden_state_errors(net.train(), other, texts)
    assert net.training
    assert len(found) == net.config.num_hidden_layers >= 2
    errors: list[list[float]] = [[] for _ in found]
    for ids in (text[:128] for text in texts):  # what is beyond the context is left out
        for own, mine, wanted in zip(errors, captured(net.eval(), ids), captured(other, ids), strict=True):
            own += [math.sqrt(((a - b) ** 2).sum() / (b**2).sum()) for a, b in zip(mine, wanted, strict=True)]
    assert found == pytest.approx([sum(each) / len(each) for each in errors], rel=1e-5)
    assert hidden_state_errors(other, other, texts) == [0.0] * len(found)
