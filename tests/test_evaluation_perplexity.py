"""Perplexity: every token once, against one window at a time in float64."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdora.errors import Diverged, UserError
from qdora.evaluation.perplexity import read_texts, text_perplexity
from qdora.evaluation.token_scores import strided_spans
from tests import tiny, tiny_tokenizer


def naive_nll(model: Any, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Token t >= 1 by hand: the window of its block, float64 log-softmax, one forward pass per token."""
    total, count = 0.0, 0
    for t in range(1, len(ids)):
        if t <= window:
            begin, end = 0, 1 + window
        else:
            block = (t - 1 - window) // stride
            end = 1 + window + (block + 1) * stride
            begin = min(end, len(ids)) - 1 - window
        assert begin < t < end
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids[begin:t]])).logits[0, -1].double().numpy()
        total -= row[ids[t]] - (row.max() + math.log(np.exp(row - row.max()).sum()))
        count += 1
    return total, count


@given(length=st.integers(0, 60), window=st.integers(1, 20), data=st.data())
def test_every_token_is_scored_exactly_once_with_enough_context(length: int, window: int, data: Any) -> None:
    stride = data.draw(st.integers(1, window))
    start = data.draw(st.integers(1, 40))
    ids = list(range(100, 100 + length))
    scored: list[int] = []
    for span in strided_spans(ids, window, stride, first=start):
        assert len(span.ids) - 1 <= window
        assert list(span.ids) == list(range(span.ids[0], span.ids[0] + len(span.ids)))
        scored += span.ids[span.start :]
        first = span.ids[span.start]
        assert span.start >= min(first - 100, window - stride + 1)
    assert scored == ids[start:]


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (7, 1), (128, 64)])
def test_equals_one_token_at_a_time(window: int, stride: int) -> None:
    model = tiny.llama(vocab_size=400, initializer_range=0.3)
    tokenizer = tiny_tokenizer.make()
    texts = ["Pack my box with five dozen liquor jugs now", "Ça va?", "x"]
    found = text_perplexity(model, tokenizer, texts, window=window, stride=stride, max_batch_tokens=64)
    expected, count = 0.0, 0
    for text in texts:
        nll, tokens = naive_nll(model, tokenizer(text)["input_ids"], window, stride)
        expected, count = expected + nll, count + tokens
    assert found.num_tokens == count > 10
    assert found.num_bytes == 43 + 7 + 1
    assert found.nll_sum == pytest.approx(expected, abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(expected / count), rel=1e-5)
    assert found.nll_per_byte == pytest.approx(expected / 51, rel=1e-6)
    document = found.to_dict()
    assert document["perplexity"] == found.perplexity
    assert document["num_texts"] == 3


def test_beginning_of_sequence_token_makes_the_first_token_count() -> None:
    model = tiny.llama(vocab_size=400)
    found = text_perplexity(model, tiny_tokenizer.make(bos=True), ["abcd"])
    assert found.num_tokens == len(tiny_tokenizer.make()("abcd")["input_ids"])
    assert (found.window, found.stride) == (128, 64)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model: Any = tiny.llama(vocab_size=400, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = text_perplexity(model, tiny_tokenizer.make(), ["some text of no importance"])
    assert found.perplexity == pytest.approx(400, rel=1e-6)


def test_faults() -> None:
    model = tiny.llama(vocab_size=400)
    with pytest.raises(UserError, match=r"window: .* context, 128 tokens, got 200"):
        text_perplexity(model, tiny_tokenizer.make(), ["text"], window=200)
    with pytest.raises(UserError, match="no token can be scored in 2 texts with 1 bytes"):
        text_perplexity(model, tiny_tokenizer.make(), ["", "a"])
    with pytest.raises(ValueError, match="stride 0"):
        strided_spans([1, 2], 4, 0)


@pytest.mark.parametrize("factor", [math.nan, 1e5])
def test_a_perplexity_that_is_not_finite_is_an_error(factor: float) -> None:
    model = tiny.llama(vocab_size=400)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    with pytest.raises(Diverged, match="perplexity: it is not finite"):
        text_perplexity(model, tiny_tokenizer.make(), ["Pack my box"])


def test_files(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("naïve", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "marked.txt").write_text("naïve", encoding="utf-8-sig")
    assert read_texts([tmp_path / "good.txt", tmp_path / "marked.txt"]) == ["naïve", "naïve"]
    for name, fault in (("latin", "not UTF-8 text (byte 2)"), ("missing", "No such file"), ("empty", "is empty")):
        with pytest.raises(UserError, match=re.escape(name) + ".txt: .*" + re.escape(fault)):
            read_texts([tmp_path / "good.txt", tmp_path / f"{name}.txt"])
