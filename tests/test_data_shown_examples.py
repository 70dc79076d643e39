"""Tokens as text: the pieces are the whole text, with the loss on the right ones, for every decoder."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from qdora.data.shown_examples import shown_example, token_pieces
from qdora.data.tokenize import TokenizedExample
from tests import tiny_tokenizer


@cache
def byte_level() -> Any:
    return tiny_tokenizer.make()


@cache
def with_byte_fallback() -> Any:
    """As Llama 2: words begin with a mark for the space, unknown characters are bytes, the first space is stripped."""
    words = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abchelowrd", "▁h"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("▁", "h")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, with_byte_fallback])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="héllo wörld 👍🏽 한국")
@example(text="�� a")
def test_the_pieces_joined_are_the_text(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, ids, [False] * len(ids))
    assert len(pieces) == len(ids)
    assert "".join(piece.text for piece in pieces) == text
    assert not any(piece.is_special for piece in pieces)


def test_special_tokens_and_the_loss() -> None:
    for tokenizer, end in ((byte_level(), "<|im_end|>"), (with_byte_fallback(), "</s>")):
        ids = tokenizer("he", add_special_tokens=False)["input_ids"]
        ids = [*ids, *tokenizer(" wé", add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(end)]
        mask = [index >= 2 for index in range(len(ids))]
        pieces = token_pieces(tokenizer, ids, mask)
        assert [piece.in_loss for piece in pieces] == mask
        assert [piece.text for piece in pieces if piece.is_special] == [end]
        assert pieces[-1].is_special
        assert "".join(piece.text for piece in pieces).endswith(f" wé{end}")


def test_a_character_of_several_tokens_is_in_the_last_of_them() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a👍b", add_special_tokens=False)["input_ids"]
    assert [piece.text for piece in token_pieces(tokenizer, ids, [True] * len(ids))] == ["a", "", "", "", "👍", "b"]


def test_a_character_that_is_cut_off_loses_no_token() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a👍", add_special_tokens=False)["input_ids"][:-1]
    pieces = token_pieces(tokenizer, ids, [True] * len(ids))
    assert len(pieces) == 4
    assert pieces[0].text == "a"
    assert "�" in pieces[-1].text


@pytest.mark.parametrize("length, left_out", [(400, 0), (1001, 601)])
def test_the_middle_of_a_long_example_is_left_out(length: int, left_out: int) -> None:
    mask = np.arange(length) >= length // 2
    found = shown_example("s", TokenizedExample("task", "id", np.full(length, 40, dtype=np.int32), mask), byte_level())
    assert (len(found["pieces"]), found["left_out"]) == (400, left_out)
    assert (found["num_tokens"], found["num_in_loss"]) == (length, length - length // 2)
    behind = found["left_out_behind"]
    assert [each["in_loss"] for each in found["pieces"]] == [False] * behind + [True] * (400 - behind)
