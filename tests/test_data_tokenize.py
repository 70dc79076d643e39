"""Texts -> token ids and labels: every policy for long ones against plain loops; notes; tokens shown to people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example as tried
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qdora.data import cache as cache_file
from qdora.data import sources, tokenize
from qdora.data.chats import set_chat_date, set_chat_settings
from qdora.data.example import Example, Turn
from qdora.data.tokenize import TokenizedExample, TokenizedSet, encode_pairs, special_prefix
from qdora.recipe.data_settings import DataConfig
from qdora.run.preview import shown_example, token_pieces
from tests import support
from tests.data_rows import fault_of, mixed, says, tokenized, write

PLAIN, BOS = support.tokenizer(), support.tokenizer(bos=True)
BOTH = support.tokenizer(bos=True, adds_eos=True)
CHAT = (Turn("user", "Hi"), Turn("assistant", "the cat"), Turn("user", "Why?"), Turn("assistant", "the dog"))
WORDS = "the cat sat on the mat, and then the dog sat on the question "
LETTERS = "aeT hq\né.:"
PROMPT = "Question: is the sky blue?\nAnswer:"


def example(prompt: str = PROMPT, answer: str = " yes", id: str = "0", messages: Any = ()) -> Example:
    return Example("task", id, *(("", "") if messages else (prompt, answer)), messages=messages)


def tokenised(examples: Any, tokenizer: Any = PLAIN, max_length: int = 10**6, **options: Any) -> TokenizedSet:
    return tokenized(examples, tokenizer, max_length=max_length, **options)


def facts(found: TokenizedSet) -> Any:
    return [(each.id, each.input_ids.tolist(), each.loss_mask.tolist()) for each in found.examples]


def texts(tokenizer: Any, found: TokenizedSet) -> list[tuple[str, str]]:
    """(all of it, what is learnt) of each example."""
    every = [(each.input_ids, each.input_ids[each.loss_mask]) for each in found.examples]
    return [(tokenizer.decode(ids), tokenizer.decode(learnt)) for ids, learnt in every]


def by_hand(tokenizer: Any, prompt: str, answer: str, max_length: int, learns_all: bool) -> tuple[Any, bool]:
    """((ids, mask) cut to `max_length`, whether anything was cut): the front of the prompt goes first, then the end."""
    prefix = [] if tokenizer is PLAIN else [tokenizer.bos_token_id]
    both = prompt + answer, prompt.rstrip(" ")
    ids, alone = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in both)
    start = 0
    while start < min(len(ids), len(alone)) and ids[start] == alone[start]:
        start += 1
    before, behind = prefix + ids[:start], [*ids[start:], tokenizer.eos_token_id]
    front = max(len(prefix), 1)
    is_cut = len(before) + len(behind) > max_length
    while len(before) + len(behind) > max_length and len(before) > front:
        del before[len(prefix)]
    done = [*before, *behind][:max_length]
    return (done, [place > 0 and (learns_all or place >= len(before)) for place in range(len(done))]), is_cut


@settings(max_examples=120, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.text(LETTERS, max_size=12), st.text(LETTERS, min_size=1, max_size=8)), min_size=1),
    tokenizer=st.sampled_from([PLAIN, BOS, BOTH]),
    max_length=st.integers(2, 24),
    too_long=st.sampled_from(["error", "truncate", "drop"]),
    loss_on=st.sampled_from(["answer", "last", "all"]),
)
def test_pairs_cut_dropped_or_refused(pairs: Any, tokenizer: Any, max_length: int, too_long: Any, loss_on: Any) -> None:
    examples = [example(*pair, id=str(number)) for number, pair in enumerate(pairs)]
    made = [by_hand(tokenizer, *pair, max_length, loss_on == "all") for pair in pairs]
    num_cut = sum(is_cut for _, is_cut in made)
    options = {"max_length": max_length, "too_long": too_long, "loss_on": loss_on}
    kept = [(str(n), *done) for n, (done, is_cut) in enumerate(made) if not is_cut or too_long == "truncate"]
    if num_cut and (too_long == "error" or not kept):
        words = f"none of {len(pairs)} examples is left" if too_long == "drop" else f" of {len(pairs)} "
        assert says(fault_of(tokenised, examples, tokenizer, **options), words)
        return
    found = tokenised(examples, tokenizer, **options)
    assert facts(found) == kept
    counts = num_cut * (too_long == "truncate"), num_cut * (too_long == "drop")
    assert (found.num_truncated, found.num_dropped) == counts
    assert {(each.task, each.input_ids.dtype, each.loss_mask.dtype) for each in found.examples} == {
        ("task", np.dtype(np.int32), np.dtype(np.bool_))
    }
    assert found.num_tokens == sum(len(ids) for _, ids, _ in kept)
    spans = encode_pairs(tokenizer, pairs)  # as evaluation encodes them: whole, without the end
    whole = [by_hand(tokenizer, *pair, 10**6, False)[0] for pair in pairs]
    assert [(ids, max(start, 1)) for ids, start in spans] == [(ids[:-1], mask.index(True)) for ids, mask in whole]


def test_prefixes_borders_and_the_order_of_batches() -> None:
    one = support.tokenizer(bos=True, eos="<s>")  # beginning and end are one token
    prefixes = [special_prefix(each) for each in (PLAIN, BOS, BOTH, one)]
    assert prefixes == [[], [BOS.bos_token_id], [BOTH.bos_token_id], [one.bos_token_id]]
    spaced, apart, (ids, start) = encode_pairs(PLAIN, [("Answer: ", "yes"), ("Answer:", " yes"), ("the ans", "wer")])
    assert spaced == apart
    assert (ids[start:], PLAIN.decode(ids[:start])) == (PLAIN(" answer")["input_ids"], "the")  # across the border
    assert encode_pairs(BOS, []) == []
    examples = [example(answer=f" {n}", id=str(n)) for n in range(1500)]
    examples[700] = example(id="700", messages=CHAT)
    assert [each.id for each in tokenised(examples).examples] == [str(n) for n in range(1500)]


def test_a_rendered_chat_as_text_has_its_marks_once() -> None:
    """Users make prompts with apply_chat_template, which writes the beginning and the end of a text."""
    stops = support.tokenizer(bos=True)
    set_chat_settings(stops, stop_ids=frozenset({stops.eos_token_id, stops.convert_tokens_to_ids("<|im_start|>")}))
    pairs = [("<s>Why?", " the cat<|im_end|> \n"), ("Why?", " the cat"), ("", "<s>the cat<|im_start|>"), ("<s>", "a\n")]
    found = tokenised([example(*pair) for pair in pairs], stops)
    assert texts(stops, found) == [
        ("<s>Why? the cat<|im_end|>", " the cat<|im_end|>"),
        ("<s>Why? the cat<|im_end|>", " the cat<|im_end|>"),
        ("<s>the cat<|im_start|>", "the cat<|im_start|>"),
        ("<s>a\n<|im_end|>", "a\n<|im_end|>"),
    ]


def test_what_cannot_be_learnt_is_refused() -> None:
    only_a = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "<e>": 1}, [])), eos_token="<e>")
    silent = example(id="9", messages=CHAT[:1])
    for examples, tokenizer, words in (
        ([example("", "\u65e5\n"), example("a", "a", "1")], only_a, "x: example 0: no token in the loss: "),
        ([silent, example()], PLAIN, "x: example 9: no token in the loss: "),
        ([example()], support.tokenizer(eos=None), "x: the tokenizer has no end-of-sequence token"),
    ):
        assert says(fault_of(tokenised, examples, tokenizer), words)


# Long examples


@pytest.mark.parametrize("max_length", [5, 11, 20, 30])
def test_too_long_examples_are_refused(max_length: int) -> None:
    examples = [example(id="chat", messages=CHAT), *(example("the cat " * n, id=f"n{n}") for n in range(1, 9))]
    whole, kept = tokenised(examples, BOS), tokenised(examples, BOS, max_length, too_long="truncate")
    num_long, longest = sum(len(each) > max_length for each in whole.examples), max(map(len, whole.examples))
    assert num_long == kept.num_truncated + kept.num_dropped
    line = fault_of(tokenised, examples, BOS, max_length)
    assert says(line, f"x: {num_long} of 9 examples ... data.max_length ({max_length}), the longest has {longest} ")
    assert says(line, "Fix: raise it, or set data.too_long: truncate ")
    assert tokenised(examples, BOS, longest).num_examples == 9
    each_turn = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' }}<|im_end|>{% endfor %}"
    chat = example(id="chat", messages=(*CHAT, Turn("user", "So?"), Turn("assistant", "the mat")))
    line = fault_of(tokenised, [chat, example()], support.tokenizer(chat_template=each_turn), max_length=5)
    assert says(line, "x: 4 of 4 examples (chat[1], chat[3], chat[5], ... ) are longer")


@pytest.mark.parametrize("loss_on", ["answer", "last", "all"])
def test_a_truncated_chat_ends_with_its_last_answer_that_fits(loss_on: Any) -> None:
    chat = example(messages=(*CHAT, Turn("user", "Hm"), Turn("assistant", "the end")))
    [full] = tokenised([chat], loss_on=loss_on).examples
    first, ends = int(np.flatnonzero(full.loss_mask)[0]), list[int]()
    if loss_on == "answer":
        places = np.flatnonzero(np.diff(full.loss_mask.astype(int), append=0) == -1) + 1
        ends = places.tolist()
        assert (len(ends), ends[-1]) == (3, len(full))
    for limit in range(first + 1, len(full) + 1):
        [done] = tokenised([chat], max_length=limit, loss_on=loss_on, too_long="truncate").examples
        length = max((end for end in ends if end <= limit), default=limit)
        assert done.input_ids.tolist() == full.input_ids[:length].tolist()
        assert done.loss_mask.tolist() == full.loss_mask[:length].tolist()
    if loss_on != "answer":
        return
    # cut before the assistant says anything: dropped
    assert tokenised([chat, example()], max_length=first, too_long="truncate").num_dropped == 1


# Split text


@pytest.mark.parametrize("tokenizer", [PLAIN, BOS])
@given(text=st.text(min_size=1, max_size=200).filter(str.strip), max_length=st.integers(3, 30))
@settings(max_examples=60, deadline=None)
def test_every_token_of_split_text_is_taught_once(tokenizer: Any, text: str, max_length: int) -> None:
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    found = tokenised([example("", text, "a")], tokenizer, max_length, too_long="split").examples
    bos = whole[:1] if tokenizer is BOS else []
    taught = whole[:1]  # nothing predicts the first token
    for part in found:
        ids, mask = part.input_ids.tolist(), part.loss_mask.tolist()
        assert 2 <= len(ids) <= max_length
        assert ids[: len(bos)] == bos
        start = mask.index(True)
        assert mask == [False] * start + [True] * (len(ids) - start)
        if part is not found[0]:
            assert (start, ids[start - 1]) == (len(bos) + 1, taught[-1])
        taught += ids[start:]
    assert taught == whole
    assert [part.id for part in found] == (["a"] if len(found) == 1 else [f"a[{n}]" for n in range(len(found))])
    assert all(len(part) == max_length for part in found[:-1])


def test_batches_of_texts_and_what_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [example("", WORDS * 300, "a"), example("", "yes no", "b"), example("Answer:", " yes", "c")]
    expected = facts(tokenised(examples, max_length=40, too_long="split"))
    assert len(expected) > 100
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", 1000)
    assert facts(tokenised(examples, max_length=40, too_long="split")) == expected
    choice = Example("task", "c", "", " no", (" no", " o"), 0)
    examples = [example("x", " yes" * 50), example("", WORDS * 9), choice]
    fault = fault_of(tokenised, examples, max_length=20, too_long="split")
    assert says(fault, "x: 1 of 3 examples (0) are longer ... (20), the longest has 52 tokens ... (split is for")
    fault = fault_of(tokenised, [example("", WORDS)], BOS, 2, too_long="split")
    assert says(fault, "x: data.too_long: split needs data.max_length 3.")


# Tokens as text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@tried(text="héllo wörld 👍🏽 한국")
@tried(text="�� a")
def test_the_pieces_joined_are_the_text(text: str) -> None:
    ids = [*PLAIN(text, add_special_tokens=False)["input_ids"], PLAIN.eos_token_id]
    mask = [index % 3 == 2 for index in range(len(ids))]
    pieces = token_pieces(PLAIN, ids, mask)
    assert "".join(piece["text"] for piece in pieces) == text + PLAIN.eos_token
    assert [piece["in_loss"] for piece in pieces] == mask
    assert [piece["is_special"] for piece in pieces] == [False] * (len(ids) - 1) + [True]


def test_characters_of_several_tokens_and_the_middle_of_a_long_example() -> None:
    ids = PLAIN("a👍b", add_special_tokens=False)["input_ids"]
    assert [piece["text"] for piece in token_pieces(PLAIN, ids, [True] * 6)] == ["a", "", "", "", "👍", "b"]
    for length, left_out in ((400, 0), (401, 1), (1001, 601)):
        one = TokenizedExample("task", "id", np.full(length, 40, dtype=np.int32), np.arange(length) >= length // 2)
        found = shown_example(one, PLAIN)
        assert (len(found["pieces"]), found["left_out"]) == (400, left_out)
        assert (found["num_tokens"], found["num_in_loss"]) == (length, length - length // 2)
        assert [each["in_loss"] for each in found["pieces"]] == [False] * 200 + [True] * 200


# Kept tokens


def made(file: str, cache: Path, tokenizer: Any = None, **data: Any) -> TokenizedSet:
    """The tokens of a source of a recipe; `source` has more of its settings."""
    source = {"source": file} | data.pop("source", {})
    settings = DataConfig.model_validate({"mix": [source], "cache": str(cache)} | data)
    [found] = mixed(settings, tokenizer).sets
    assert isinstance(found, TokenizedSet)
    return found


def all_of(found: TokenizedSet) -> Any:
    return facts(found), found.task_names, found.name, found.num_truncated, found.num_dropped


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cache_file, "_LEAST_TOKENS", 1)
    rows = [{"prompt": f"{n}:", "completion": " yes" * (1 + n % 9), "task": f"t{n % 2}", "x": 1} for n in range(40)]
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sources that were tokenised."""
    names: list[str] = []
    tokenize_all = sources.tokenize_all

    def counting(*args: Any, **options: Any) -> TokenizedSet:
        names.append(args[2])
        return tokenize_all(*args, **options)

    monkeypatch.setattr(sources, "tokenize_all", counting)
    return names


def test_whatever_decides_the_tokens_makes_them_anew(tmp_path: Path, pairs: str, counted: list[str]) -> None:
    cache = tmp_path / "cache"
    template = {"prompt": "{{ prompt }}", "completion": "{{ completion }}"}
    ways: list[dict[str, Any]] = [
        {},
        {"max_length": 12, "too_long": "truncate"},
        {"loss_on": "all"},
        {"too_long": "drop"},
        {"validation_fraction": 0.2},
        {"source": {"limit": 9}},
        {"source": {"limit": 9}, "seed": 1},
        {"source": {"name": "x"}},
        {"source": {"columns": {"prompt": "completion", "completion": "prompt"}}},
        {"source": {"chat": True}},
        {"source": {"template": template}},
        {"source": {"template": template | {"prompt": "{{ prompt }}?"}}},
        {"source": {"template": template | {"prompt": ""}}, "too_long": "split", "max_length": 4},
        {"tokenizer": support.tokenizer(bos=True)},
    ]
    for way in ways:
        plain = made(pairs, Path("off"), **way)
        del counted[:]
        assert [all_of(made(pairs, cache, **way)) for _ in range(3)] == [all_of(plain)] * 3
        assert len(counted) == 1, way
    assert len(list(cache.iterdir())) == len(ways)
    before, text = made(pairs, cache, seed=3), Path(pairs).read_text()  # the seed decides nothing without a limit
    assert len(counted) == 1
    Path(pairs).write_text(text.replace("yes", "the"))
    assert all_of(made(pairs, cache)) != all_of(before)
    # the date counts only for templates that print it
    dated = "{{ strftime_now('%d %b %Y') }}" + support.CHATML
    for template_, number in ((support.CHATML, 1), (dated, 2)):
        del counted[:]
        for day in ("2024-01-31", "2024-02-01", "2024-02-01"):
            tokenizer = support.tokenizer(chat_template=template_)
            set_chat_date(tokenizer, day)
            made(pairs, cache, tokenizer, source={"chat": True})
        assert len(counted) == number


def test_a_damaged_file_is_made_anew(tmp_path: Path, pairs: str, counted: list[str], caplog: Any) -> None:
    first = made(pairs, tmp_path / "cache")
    [kept] = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-7], b""):
        kept.write_bytes(damaged)
        counted.clear()
        caplog.clear()
        assert [all_of(made(pairs, tmp_path / "cache")) for _ in range(2)] == [all_of(first)] * 2
        assert len(counted) == 1
        assert [says(line, "is damaged ... made anew") for line in caplog.messages if "is damaged" in line] == [True]


def test_what_is_not_kept(
    tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = made(pairs, tmp_path / "cache")
    (tmp_path / "a file").write_text("")  # a disk that takes nothing costs only time
    assert all_of(made(pairs, tmp_path / "a file")) == all_of(found)
    assert f"{tmp_path}/a file/" in caplog.text
    assert "was not written: " in caplog.text
    for least, is_kept in ((found.num_tokens, True), (found.num_tokens + 1, False)):
        monkeypatch.setattr(cache_file, "_LEAST_TOKENS", least)
        made(pairs, tmp_path / f"other {is_kept}")
        assert (tmp_path / f"other {is_kept}").exists() == is_kept
