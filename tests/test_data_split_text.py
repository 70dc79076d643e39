"""Plain text longer than max_length: every token is taught once, from the token before it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data import split_text, tokenize
from qdora.data.build_data import read_data, tokenized_mix
from qdora.data.example import Example
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import tokenize_all
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig, SourceConfig
from tests import tiny_tokenizer

TOKENIZER, WITH_BOS = tiny_tokenizer.make(), tiny_tokenizer.make(bos=True)
WORDS = "the cat sat on the mat, and then the dog sat on the question "


def text_of(task: str, answer: str) -> Example:
    return Example(task, task, "", answer)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, WITH_BOS])
@given(text=st.text(min_size=1, max_size=200).filter(str.strip), max_length=st.integers(3, 30))
@settings(max_examples=60, deadline=None)
def test_every_token_is_taught_once_after_the_one_before_it(tokenizer: Any, text: str, max_length: int) -> None:
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    found = tokenize_all([text_of("a", text)], tokenizer, name="s", max_length=max_length, too_long="split").examples
    bos = whole[:1] if tokenizer is WITH_BOS else []
    taught = whole[:1]  # nothing predicts the first token
    for part in found:
        ids, mask = part.input_ids.tolist(), part.loss_mask.tolist()
        assert 2 <= len(ids) <= max_length
        assert ids[: len(bos)] == bos
        start = mask.index(True)
        assert mask == [False] * start + [True] * (len(ids) - start)
        if part is not found[0]:
            assert start == len(bos) + 1
            assert ids[start - 1] == taught[-1]
        taught += ids[start:]
    assert taught == whole
    assert [part.id for part in found] == (["a"] if len(found) == 1 else [f"a[{n}]" for n in range(len(found))])
    assert all(len(part) == max_length for part in found[:-1])


@given(text=st.text("ab \n\u2003", max_size=300), size=st.integers(2, 50))
def test_parts_of_a_text_are_the_text(text: str, size: int) -> None:
    parts = split_text.text_parts(text, size)
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts[:-1])
    for left, right in itertools.pairwise(parts):  # cut before white space where there is some
        assert right[0].isspace() or not any(map(str.isspace, left[size - size // 2 + 1 :]))


def test_a_very_long_text_is_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = WORDS * 300
    found: dict[int, list[Any]] = {}
    for limit in (1 << 20, 1000):
        monkeypatch.setattr(tokenize, "_EXCESSIVE", limit)
        examples = [text_of("a", text), text_of("b", "yes no"), Example("c", "c", "Answer:", " yes")]
        made = tokenize_all(examples, TOKENIZER, name="s", max_length=40, too_long="split")
        found[limit] = [(each.id, each.input_ids.tolist(), each.loss_mask.tolist()) for each in made.examples]
    assert found[1000] == found[1 << 20]
    assert len(found[1000]) > 100


def test_only_plain_text_is_split() -> None:
    long = [
        Example("a", "a", "x", " yes" * 50),
        text_of("b", WORDS * 9),
        Example("c", "c", "", " no", (" no", " o"), 0),
    ]
    with pytest.raises(UserError) as error:
        tokenize_all(long, TOKENIZER, name="s", max_length=20, too_long="split")
    [fault] = error.value.faults
    assert fault.startswith("s: 1 example (a) of 3 is longer than data.max_length (20), the longest has 52 tokens.")
    assert fault.endswith("of the tokens), since split is for plain text alone.")
    with pytest.raises(UserError, match=r"s: data.too_long: split needs data.max_length 3, got 2."):
        tokenize_all([text_of("b", WORDS)], WITH_BOS, name="s", max_length=2, too_long="split")


def test_batches_are_bounded_by_characters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", 1000)
    examples = [text_of(str(number), WORDS * (1 + number % 20)) for number in range(60)]
    sizes: list[int] = []
    encode = tokenize.encode_batch
    monkeypatch.setattr(
        tokenize, "encode_batch", lambda *given: sizes.append(sum(map(len, given[1]))) or encode(*given)
    )
    few = tokenize_all(examples, TOKENIZER, name="s", max_length=9999)
    assert max(sizes) < 1000 + 20 * len(WORDS)
    monkeypatch.undo()
    many = tokenize_all(examples, TOKENIZER, name="s", max_length=9999)
    assert [each.input_ids.tolist() for each in few.examples] == [each.input_ids.tolist() for each in many.examples]


def streamed(tmp_path: Path, rows: list[dict[str, Any]], max_bad_rows: int | None = None) -> ExampleStream:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(source=str(file), stream=True, shuffle_window=8)
    data = DataConfig(mix=(source,), max_length=20, too_long="split", max_bad_rows=max_bad_rows)
    [stream] = tokenized_mix(SimpleNamespace(data=data), TOKENIZER, read_data(data)[0]).sets
    return stream


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), cut=st.integers(0, 60))
@settings(max_examples=25, deadline=None)
def test_a_stream_splits_too_and_resumes_inside_a_text(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    rows = [{"text": f"{number}: " + WORDS * length} for number, length in enumerate(lengths)]
    examples = [text_of(f"{number}", row["text"]) for number, row in enumerate(rows)]
    wanted = tokenize_all(examples, TOKENIZER, name="s", max_length=20, too_long="split").examples
    one, other = streamed(folder, rows), streamed(folder, rows)
    drawn = [one.next() for _ in range(len(wanted))]
    assert sorted(each.input_ids.tolist() for each in drawn) == sorted(each.input_ids.tolist() for each in wanted)
    assert (one.position.epoch, one.position.num_drawn) == (0, len(wanted))
    drawn += [one.next() for _ in range(80)]
    for _ in range(cut):
        other.next()
    resumed = streamed(folder, rows)
    resumed.load_state_dict(json.loads(json.dumps(other.state_dict())))
    for each in drawn[cut : cut + 20]:
        assert resumed.next().input_ids.tolist() == each.input_ids.tolist()


def test_in_a_stream_other_rows_that_are_too_long_are_faulty(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "completion": " yes" * (50 if number == 3 else 1)} for number in range(6)]
    stream = streamed(tmp_path, rows)
    for _ in range(5):
        stream.next()
    stream.next()
    [fault] = stream.position.bad_rows
    assert fault.endswith("52 tokens, and data.too_long: split is for plain text alone")
    assert stream.position.num_dropped == 0
