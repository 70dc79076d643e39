"""Token ids and label masks, checked by decoding what is learnt back to text."""

from __future__ import annotations

import json
import re
from itertools import accumulate

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qdora.data.chat_template import set_chat_settings
from qdora.data.encode_chats import _encode as encode
from qdora.data.example import Example
from qdora.data.messages import Turn
from qdora.data.sources import load_source
from qdora.data.tokenize import (
    TokenizedSet,
    encode_batch,
    encode_pairs,
    special_prefix,
    tokenize_all,
)
from qdora.errors import UserError
from qdora.recipe.data_settings import SourceConfig
from tests import tiny_tokenizer

PLAIN = tiny_tokenizer.make()
BOS = tiny_tokenizer.make(bos=True)
LINES = tiny_tokenizer.make(more=["a\n\n"] * 9)
BOTH = tiny_tokenizer.make(bos=True, adds_eos=True)
THINKS = tiny_tokenizer.make(
    chat_template=tiny_tokenizer.CHATML.replace("{{ m['content'] }}", "{{ m.reasoning_content }}{{ m.content }}")
)
CHAT = (Turn("user", "Hi"), Turn("assistant", "the cat"), Turn("user", "Why?"), Turn("assistant", "the dog"))


def example(prompt="Question: is the sky blue?\nAnswer:", answer=" yes", id="0", messages=()):
    return Example("task", id, prompt, answer, messages=messages)


def tokenize_one(one, tokenizer, **options):
    [done] = tokenize_all([one], tokenizer, name="x", **options).examples
    return done


def encode_one(tokenizer, prompt, answer):
    [pair] = encode_pairs(tokenizer, [(prompt, answer)])
    return pair


def learnt(tokenizer, done):
    return tokenizer.decode(done.input_ids[done.loss_mask])


def text(tokenizer, done):
    return tokenizer.decode(done.input_ids)


@pytest.mark.parametrize("tokenizer, front", [(PLAIN, ""), (BOS, "<s>"), (BOTH, "<s>")])
def test_the_answer_and_its_end_are_learnt(tokenizer, front):
    done = tokenize_one(example(), tokenizer, max_length=100)
    assert text(tokenizer, done) == front + "Question: is the sky blue?\nAnswer: yes<|im_end|>"
    assert learnt(tokenizer, done) == " yes<|im_end|>"
    assert (done.input_ids.dtype, done.loss_mask.dtype) == (np.int32, np.bool_)
    assert (done.task, done.id, len(done)) == ("task", "0", len(done.loss_mask))


@pytest.mark.parametrize("tokenizer", [PLAIN, BOS, BOTH])
def test_loss_on_all_learns_everything_but_the_first_token(tokenizer):
    done = tokenize_one(example(), tokenizer, max_length=100, loss_on="all")
    assert not done.loss_mask[0]
    assert done.loss_mask[1:].all()


@pytest.mark.parametrize("tokenizer", [PLAIN, BOS, BOTH])
def test_plain_text_learns_what_has_something_before_it(tokenizer):
    done = tokenize_one(example("", "The cat sat."), tokenizer, max_length=100)
    whole = "The cat sat.<|im_end|>"
    first = "" if special_prefix(tokenizer) else tokenizer.decode(done.input_ids[:1])
    assert first + learnt(tokenizer, done) == whole


def test_an_end_of_sequence_in_the_data_is_not_doubled():
    done = tokenize_one(example(answer=" yes<|im_end|>"), PLAIN, max_length=100)
    assert learnt(PLAIN, done) == " yes<|im_end|>"


def test_a_rendered_chat_as_text_has_its_marks_once():
    """Users make prompts with apply_chat_template, which writes the beginning and the end of a text."""
    stops = tiny_tokenizer.make(bos=True)
    set_chat_settings(stops, stop_ids=frozenset({stops.eos_token_id, stops.convert_tokens_to_ids("<|im_start|>")}))
    texts = [
        example("<s>Why?", " the cat<|im_end|> \n"),
        example("Why?", " the cat"),
        example("", "<s>the cat<|im_start|>"),
        example("<s>", "the cat\n"),
    ]
    found = tokenize_all(texts, stops, name="x", max_length=100)
    assert [text(stops, each) for each in found.examples] == [
        "<s>Why? the cat<|im_end|>",
        "<s>Why? the cat<|im_end|>",
        "<s>the cat<|im_start|>",
        "<s>the cat\n<|im_end|>",
    ]
    assert [learnt(stops, each) for each in found.examples] == [
        " the cat<|im_end|>",
        " the cat<|im_end|>",
        "the cat<|im_start|>",
        "the cat\n<|im_end|>",
    ]
    assert [note.partition(":")[0] for note in found.notes] == [
        "2 of 4 texts end with a stop token",
        "3 of 4 texts begin with the beginning-of-sequence token that the tokenizer adds to a text",
    ]
    assert tokenize_all([texts[1]], stops, name="x", max_length=100).notes == ()
    # evaluation encodes the same
    assert encode_pairs(stops, [("<s>Why?", " the cat")]) == encode_pairs(stops, [("Why?", " the cat")])


def test_a_text_without_tokens_is_one_that_cannot_be_learnt():
    only_a = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "<end>": 1}, [])), eos_token="<end>"
    )
    for completion in ("\u65e5", "\u65e5\n"):
        with pytest.raises(UserError, match=r"1 example \(0\) has no token in the loss: the tokenizer makes"):
            tokenize_all([example("", completion), example("a", "a", id="1")], only_a, name="x", max_length=100)


def test_a_missing_separator_is_told_once_with_its_number():
    glued = [("Capital of France?", "Paris"), ("the ans", "wer")]
    apart = [
        ("Why?", " the cat"),
        ("Why?", "\nthe cat"),
        ("", "the cat"),
        ("a[/INST]", "b"),
        ("a", "<b>"),
        ("\uff1f", "b"),
    ]
    examples = [example(*pair) for pair in (*apart, *glued)]
    [note] = tokenize_all(examples, PLAIN, name="x", max_length=100).notes
    assert note == (
        "2 of 8 texts have no white space between prompt and completion, such as 'l of France?' + 'Paris'. Fix: if a "
        'separator is missing, set template: {prompt: "{{ prompt }}\\n", completion: "{{ completion }}"} in this '
        "source, or write it into the template that is there."
    )
    choices = Example("task", "0", "Why?", "the", choices=("the", "a"), gold=0)  # made by a template of ours
    assert not tokenize_all([choices, example()], PLAIN, name="x", max_length=100).notes


def test_a_border_inside_a_token_is_told_once_with_its_number():
    """A server that is given the prompt alone splits it otherwise."""
    assert len(LINES("\n\n")["input_ids"]) == 1
    pairs = [("Why?\n", "\n the cat"), ("Why? ", "the cat"), ("Why?\n", "the cat"), ("Why?", "\n\n the cat")]
    [note] = tokenize_all([example(*pair) for pair in pairs], LINES, name="x", max_length=100).notes
    assert note.startswith(
        "2 of 4 texts have a token with the end of the prompt and the beginning of the completion, such as 'Why?\\n' + "
        "'\\n the cat': a model that is given the prompt alone sees other tokens. Fix: set template: "
    )


def test_the_templates_that_the_notes_propose_end_the_matter(tmp_path):
    rows = [{"Question": "Capital of France?", "Reply": "Paris"}, {"Question": "Why?\n", "Reply": "\n the cat"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    def notes(**more):
        columns = {"prompt": "Question", "completion": "Reply"}
        source = SourceConfig.model_validate({"source": str(file), "columns": columns} | more)
        return tokenize_all(load_source(source), LINES, name="x", max_length=100).notes

    templates = [re.findall(r'template: (\{.*?"\})', note) for note in notes()]
    assert len(templates) == 2
    for [template] in templates:
        assert not notes(template=yaml.safe_load(template))


@pytest.mark.parametrize("tokenizer, prefix", [(PLAIN, []), (BOS, ["<s>"]), (BOTH, ["<s>"])])
def test_special_prefix(tokenizer, prefix):
    assert special_prefix(tokenizer) == tokenizer.convert_tokens_to_ids(prefix)


def test_special_prefix_where_beginning_and_end_are_one_token():
    one = tiny_tokenizer.make(bos=True, eos="<s>")
    assert special_prefix(one) == [one.bos_token_id]


def test_spaces_at_the_end_of_the_prompt_belong_to_the_answer():
    assert encode_one(PLAIN, "Answer: ", "yes") == encode_one(PLAIN, "Answer:", " yes")


def test_a_token_across_the_border_is_the_answers():
    """'ans' + 'wer' is one token here; cutting by the length of the prompt's ids would lose the answer."""
    [token] = PLAIN(" answer")["input_ids"]
    ids, start = encode_one(PLAIN, "the ans", "wer")
    assert ids[start:] == [token]
    assert PLAIN.decode(ids[:start]) == "the"


@pytest.mark.parametrize("tokenizer", [PLAIN, BOS, BOTH])
@settings(max_examples=60, deadline=None)
@given(prompt=st.text("aeT hq\né.:", max_size=12), answer=st.text("aeT hq\né.:", min_size=1, max_size=8))
def test_pairs_are_the_text_cut_before_the_answer(tokenizer, prompt, answer):
    ids, start = encode_one(tokenizer, prompt, answer)
    whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    assert ids == special_prefix(tokenizer) + whole
    # the answer's part has every byte of the answer: what stands before it is inside the prompt
    before = tokenizer.decode(ids[len(special_prefix(tokenizer)) : start])
    assert prompt.encode().startswith(before.encode().rstrip("\ufffd".encode()))
    assert start <= len(special_prefix(tokenizer)) + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert start < len(ids)


def test_many_pairs_are_the_same_as_one_by_one():
    pairs = [("Answer:", " yes"), ("", "The cat"), ("the ans", "wer"), ("Why? ", "the dog")]
    assert encode_pairs(BOS, pairs) == [encode_one(BOS, *pair) for pair in pairs]
    assert encode_pairs(BOS, []) == []


def test_no_end_of_sequence_token():
    with pytest.raises(UserError, match=r"x: the tokenizer has no end-of-sequence token"):
        tokenize_all([example()], tiny_tokenizer.make(eos=None), name="x", max_length=200)


# Length


def lengths_of(examples, tokenizer=PLAIN):
    return [len(tokenize_one(one, tokenizer, max_length=10**6)) for one in examples]


def test_too_long_examples_are_counted_then_refused():
    examples = [example("the cat " * (20 if n % 2 else 1), id=f"n{n}") for n in range(10)]
    longest, num_tokens = max(lengths_of(examples)), sum(lengths_of(examples))
    with pytest.raises(UserError) as error:
        tokenize_all(examples, PLAIN, name="mine", max_length=longest - 1)
    assert error.value.faults == (
        f"mine: 5 examples (n1, n3, n5, ...) of 10 are longer than data.max_length ({longest - 1}), the longest has "
        f"{longest} tokens. Fix: raise data.max_length, or set data.too_long to truncate (cuts "
        f"{100 * 5 / num_tokens:.3g} % of the tokens: the front of a prompt, the last turns of a chat) or drop (loses "
        f"50 % of the examples, {100 * 5 * longest / num_tokens:.3g} % of the tokens).",
    )
    assert len(tokenize_all(examples, PLAIN, name="mine", max_length=longest)) == 10


@pytest.mark.parametrize("max_length", [5, 11, 20, 30])
def test_the_shares_that_an_error_names_are_those_that_the_other_choices_lose(max_length):
    chat = example("", "", messages=CHAT, id="chat")  # its first label is the 12th token: cut shorter, none is left
    examples = [chat, *(example("the cat " * n, id=f"n{n}") for n in range(1, 9))]
    num_tokens = sum(lengths_of(examples, BOS))
    with pytest.raises(UserError) as error:
        tokenize_all(examples, BOS, name="x", max_length=max_length)
    kept = {}
    for choice in ("truncate", "drop"):
        try:
            kept[choice] = tokenize_all(examples, BOS, name="x", max_length=max_length, too_long=choice)
        except UserError:  # nothing is left
            kept[choice] = TokenizedSet("x", ())
    cut, lost = (f"{100 * (1 - each.num_tokens / num_tokens):.3g} %" for each in kept.values())
    examples_lost = f"{100 * (1 - len(kept['drop']) / len(examples)):.3g} %"
    assert f"truncate (cuts {cut} of the tokens" in str(error.value)
    assert f"drop (loses {examples_lost} of the examples, {lost} of the tokens)" in str(error.value)


def test_truncation_is_offered_only_where_it_leaves_something_to_learn():
    chats = [example("", "", messages=CHAT, id=id) for id in "ab"]
    first_learnt = int(np.flatnonzero(tokenize_one(chats[0], PLAIN, max_length=1000).loss_mask)[0])

    def told(examples, max_length):
        with pytest.raises(UserError) as error:
            tokenize_all(examples, PLAIN, name="x", max_length=max_length)
        return error.value.faults[0].partition("data.too_long to ")[2]

    assert told(chats, first_learnt) == "drop (loses 100 % of the examples, 100 % of the tokens)."
    some = told([*chats, example("the cat " * 20)], first_learnt)
    assert some.startswith("truncate (cuts ")
    assert ", the last turns of a chat, the whole of 2 examples (a, b)) or drop (" in some
    assert ", the last turns of a chat) or drop (" in told(chats, first_learnt + 1)


def test_of_a_chat_that_gives_several_examples_each_is_counted_once():
    """The template prints an earlier answer otherwise, so that each turn is an example of its own."""
    template = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }}<|im_end|>{% endfor %}"
    chat = example("", "", messages=(*CHAT, Turn("user", "So?"), Turn("assistant", "the mat")), id="chat")
    with pytest.raises(UserError) as error:
        tokenize_all([chat, example()], tiny_tokenizer.make(chat_template=template), name="x", max_length=5)
    assert error.value.faults[0].startswith("x: 4 examples (chat[1], chat[3], chat[5], ...) of 4 are longer")
    assert "drop (loses 100 % of the examples, 100 % of the tokens)" in error.value.faults[0]


def test_drop_counts():
    examples = [example("the cat " * (20 if n % 2 else 1), id=f"n{n}") for n in range(10)]
    kept = tokenize_all(examples, PLAIN, name="mine", max_length=20, too_long="drop")
    assert [one.id for one in kept.examples] == ["n0", "n2", "n4", "n6", "n8"]
    assert (kept.num_dropped, kept.num_truncated) == (5, 0)
    with pytest.raises(UserError, match=r"mine: none of 10 examples is left. Fix: raise data.max_length \(2\)"):
        tokenize_all(examples, PLAIN, name="mine", max_length=2, too_long="drop")


@pytest.mark.parametrize("tokenizer, front", [(PLAIN, ""), (BOS, "<s>")])
def test_truncation_cuts_the_front_of_the_prompt(tokenizer, front):
    one = example("The dog. Question: is the sky blue?\nAnswer:", " the cat sat")
    full = tokenize_one(one, tokenizer, max_length=1000)
    for num_cut in range(1, len(full) - 1):
        cut = tokenize_all([one], tokenizer, name="x", max_length=len(full) - num_cut, too_long="truncate")
        [done] = cut.examples
        assert cut.num_truncated == 1
        assert len(done) == len(full) - num_cut
        shown = text(tokenizer, done)
        assert shown.startswith(front)
        rest = shown.removeprefix(front)
        num_before = np.flatnonzero(full.loss_mask)[0] - 1
        if num_cut <= num_before - len(special_prefix(tokenizer)):
            assert "The dog. Question: is the sky blue?\nAnswer: the cat sat<|im_end|>".endswith(rest)
            assert learnt(tokenizer, done) == " the cat sat<|im_end|>"
        else:  # no prompt is left (but for one token where there is no <s>): the answer loses its end
            assert " the cat sat<|im_end|>".startswith(learnt(tokenizer, done))
            assert done.loss_mask[1:].all()


@pytest.mark.parametrize("too_long", ["truncate", "drop", "error", "split"])
@pytest.mark.parametrize("place", ["prompt", "answer", "both", "text", "user", "assistant", "reasoning"])
def test_a_text_of_megabytes_is_shortened_before_it_is_encoded_to_the_same_tokens(place, too_long, monkeypatch):
    words = "the cat sat on 12 mats, and so on. " * 800
    one = {
        "prompt": example(words, " yes"),
        "answer": example("Why?", words),
        "both": example(words, words),
        "text": example("", words),
        "user": example("", "", messages=(Turn("user", words), CHAT[1])),
        "assistant": example("", "", messages=(CHAT[0], Turn("assistant", words), *CHAT[2:])),
        "reasoning": example("", "", messages=(CHAT[0], Turn("assistant", "yes", reasoning=words))),
    }[place]

    tokenizer = THINKS if place == "reasoning" else PLAIN

    def tokenized():
        try:
            return tokenize_all([one, example()], tokenizer, name="x", max_length=50, too_long=too_long)
        except UserError as error:
            return str(error).partition(", the longest has")[0]  # a lower bound of its length is enough

    whole = tokenized()
    monkeypatch.setattr("qdora.data.tokenize._EXCESSIVE", 10_000)
    given = []
    monkeypatch.setattr(
        "qdora.data.tokenize.encode_batch", lambda _, texts: given.extend(texts) or encode_batch(PLAIN, texts)
    )
    monkeypatch.setattr(
        "qdora.data.encode_chats._encode",
        lambda _, texts: given.extend(each.text for each in texts) or encode(PLAIN, texts),
    )
    short = tokenized()
    assert max(map(len, given)) < len(words)
    if isinstance(whole, str):
        assert short == whole
        return
    assert (short.num_truncated, short.num_dropped) == (whole.num_truncated, whole.num_dropped)
    for ours, theirs in zip(short.examples, whole.examples, strict=True):
        assert np.array_equal(ours.input_ids, theirs.input_ids)
        assert np.array_equal(ours.loss_mask, theirs.loss_mask)


def test_the_numbers_of_tokens_of_a_shortened_text_are_said_to_be_at_least_so_many(monkeypatch):
    long, short = example("the cat " * 3000, id="long"), example("the cat " * 100, id="short")
    num_tokens = len(tokenize_one(long, PLAIN, max_length=10**6).input_ids)
    monkeypatch.setattr("qdora.data.tokenize._EXCESSIVE", 10_000)

    def told(examples, too_long="error"):
        with pytest.raises(UserError) as error:
            tokenize_all(examples, PLAIN, name="x", max_length=20, too_long=too_long)
        return error.value.faults[0]

    of_both = re.fullmatch(
        r"x: 2 examples \(long, short\) of 2 are longer than data.max_length \(20\), the longest has at least (\d+) "
        r"tokens\. Fix: raise data.max_length, or set data.too_long to truncate \(cuts the front of a prompt, the last "
        r"turns of a chat\) or drop \(loses 100 % of the examples\)\.",
        told([long, short]),
    )
    assert of_both is not None
    assert 20 < int(of_both[1]) < num_tokens
    assert "the longest has at least " in told([long, short], "split")
    exact = f"the longest has {len(tokenize_one(short, PLAIN, max_length=10**6).input_ids)} tokens"
    assert exact in told([short])
    # so many tokens are reached by all of the text, and nothing is left out
    monkeypatch.setattr("qdora.data.tokenize._EXCESSIVE", 500)
    assert exact in told([short])


@pytest.mark.parametrize("loss_on", ["answer", "last", "all"])
def test_a_truncated_chat_ends_with_its_last_answer_that_fits(loss_on):
    chat = example("", "", messages=(*CHAT, Turn("user", "Hm"), Turn("assistant", "the end")))
    full = tokenize_one(chat, PLAIN, max_length=1000, loss_on=loss_on)
    ends = []
    if loss_on == "answer":
        assert learnt(PLAIN, full) == "the cat<|im_end|>\nthe dog<|im_end|>\nthe end<|im_end|>\n"
        lengths = (len(PLAIN(each + "<|im_end|>\n")["input_ids"]) for each in ("the cat", "the dog", "the end"))
        places = np.flatnonzero(full.loss_mask) + 1
        ends = [int(places[number - 1]) for number in accumulate(lengths)]
        assert ends[-1] == len(full)
    first = int(np.flatnonzero(full.loss_mask)[0])
    for limit in range(first + 1, len(full) + 1):
        done = tokenize_one(chat, PLAIN, max_length=limit, loss_on=loss_on, too_long="truncate")
        length = max((end for end in ends if end <= limit), default=limit)
        assert done.input_ids.tolist() == full.input_ids[:length].tolist(), limit
        assert done.loss_mask.tolist() == full.loss_mask[:length].tolist(), limit


def test_truncated_text_and_chats_lose_their_end():
    done = tokenize_one(example("", "The cat sat on the mat"), PLAIN, max_length=4, too_long="truncate")
    assert "The cat sat on the mat".startswith(text(PLAIN, done))
    chat = example("", "", messages=CHAT)
    full = tokenize_one(chat, PLAIN, max_length=1000)
    # cut before the assistant says anything: nothing to learn, so it is dropped
    cut = tokenize_all([chat, example()], PLAIN, name="x", max_length=20, too_long="truncate")
    first_learnt = int(np.flatnonzero(full.loss_mask)[0])
    dropped = tokenize_all([chat, example()], PLAIN, name="x", max_length=first_learnt, too_long="truncate")
    assert (len(cut) + cut.num_dropped, dropped.num_dropped) == (2, 1)


def test_an_example_without_a_token_to_learn():
    chat = example("", "", "9", (Turn("user", "Hi"),))
    with pytest.raises(
        UserError, match=r"x: 1 example \(9\) has no token in the loss: the answer is missing, .* Fix: remove this row"
    ):
        tokenize_all([chat, example()], PLAIN, name="x", max_length=100)


def test_order_and_sums():
    examples = [example(answer=f" {n}", id=str(n), messages=()) for n in range(1500)]
    examples[700] = example("", "", "700", CHAT)
    done = tokenize_all(examples, PLAIN, name="x", max_length=200)
    assert [one.id for one in done.examples] == [str(n) for n in range(1500)]
    assert isinstance(done, TokenizedSet)
    assert done.num_tokens == sum(one.input_ids.size for one in done.examples)
