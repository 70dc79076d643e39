"""Sources larger than memory: every row once a pass, resumed exactly from any draw, clear words for what is wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data import hub_datasets, readers
from qdora.data.batching import Batching
from qdora.data.example import Example
from qdora.data.hub_datasets import hub_shards
from qdora.data.loader import StepLoader
from qdora.data.mix import make_mix
from qdora.data.mix_plan import plan_mix
from qdora.data.readers import local_shards
from qdora.data.sources import train_and_validation
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import tokenize_all
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig, SourceConfig
from tests import tiny_tokenizer

TOKENIZER = tiny_tokenizer.make()


def row(number, length=1):
    return {"prompt": f"{number}:", "completion": " yes" * length}


def write(folder: Path, kind: str, rows, group: int = 3) -> Path:
    """The rows as one file of the kind; Parquet in row groups of `group` rows."""
    file = folder / f"train.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    else:
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


def stream_of(shards, *, tokenizer=TOKENIZER, number=0, window=4096, size=None, **options):
    """Source `number` of a mix, which is called s."""
    names = [f"other {each}" for each in range(number)] + ["s"]
    mix = [
        SourceConfig(source="rows.jsonl", stream=True, name=name, shuffle_window=window, size=size) for name in names
    ]
    return ExampleStream(shards, DataConfig(mix=mix, **{"strategy": "equal"} | options), number, tokenizer)


def stream(source: Path, **options):
    return stream_of(local_shards(source, "train"), **options)


def number_of(example) -> int:
    return int(TOKENIZER.decode(example.input_ids).partition(":")[0])


@pytest.fixture
def small(monkeypatch):
    """Pieces so small that some rows of a test have several of them."""
    monkeypatch.setattr(readers, "_RANGE_BYTES", 100)
    monkeypatch.setattr(readers, "_ROWS_AT_ONCE", 4)


def test_a_stream_knows_whether_it_has_chats(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]
    for name, rows, expected in (("a", [{"messages": turns}], True), ("b", [row(0)], False)):
        (tmp_path / name).mkdir()
        assert stream(write(tmp_path / name, "jsonl", rows)).has_chats == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 40])
def test_the_shards_of_a_file_are_its_rows_from_any_row_on(tmp_path, small, kind, num_rows):
    rows = [row(number, 1 + number * 7 % 12) for number in range(num_rows)]
    found = local_shards(write(tmp_path, kind, rows, group=9), "train")
    assert [each for reader in found.readers for _, each in reader(0)] == rows
    assert found.num_rows == (num_rows if kind == "parquet" else None)
    assert len(set(found.names)) == len(found.names) == len(found.readers)
    if num_rows == 40:
        assert len(found.readers) > 4
    for reader in found.readers:
        whole = list(reader(0))
        for skip in range(len(whole) + 2):
            assert list(reader(skip)) == whole[skip:]


def test_lines_of_any_form_belong_to_one_range(tmp_path, monkeypatch):
    """Blank lines, a byte order mark, \\r\\n, no end of the last line, and ranges that end anywhere."""
    rows = [{"text": "x" * (number % 5)} for number in range(12)]
    lines = [json.dumps(each) for each in rows]
    text = "\n".join([lines[0], "", "  ", *lines[1:6]]) + "\r\n" + "\r\n".join(lines[6:])
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    for size in (*range(1, 60), 1000):
        monkeypatch.setattr(readers, "_RANGE_BYTES", size)
        assert [each for reader in local_shards(file, "train").readers for _, each in reader(0)] == rows


def test_the_files_of_a_split(tmp_path):
    for name in ("train-00001-of-00002", "train-00000-of-00002", "validation", "trainer"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/more.jsonl").write_text('{"text": "more"}\n')
    found = local_shards(tmp_path, "train")
    texts = [each["text"] for reader in found.readers for _, each in reader(0)]
    assert texts == ["more", "train-00000-of-00002", "train-00001-of-00002"]
    with pytest.raises(UserError, match=r"no file for split 'trian', looked for .*there are .*Did you mean 'train'\?"):
        local_shards(tmp_path, "trian")
    for name, message in (
        ("notes.xls", "notes.xls: unknown ending '.xls', allowed: .parquet, .jsonl"),
        ("bad.parquet", "not a Parquet file"),
    ):
        (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match=message):
            local_shards(tmp_path / name, "train")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="the data set is empty"):
        local_shards(tmp_path / "empty.jsonl", "train")


SHAPE = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["jsonl", "parquet"]),
        "num_rows": st.integers(1, 60),
        "window": st.integers(1, 40),
        "seed": st.integers(0, 2**63 - 1),
        "at_once": st.integers(1, 20),
    }
)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPE, cut=st.integers(0, 150), too_long=st.sampled_from(["drop", "truncate"]))
def test_every_row_once_a_pass_and_resumed_is_uninterrupted(tmp_path_factory, shape, cut, too_long):
    folder = tmp_path_factory.mktemp("stream")
    lengths = [1 + 9 * (number % 3 == 1) for number in range(shape["num_rows"])]
    rows = [row(number, length) for number, length in enumerate(lengths)]
    file = write(folder, shape["kind"], rows, group=7)
    options = {"window": shape["window"], "seed": shape["seed"], "too_long": too_long, "max_length": 12}
    kept = [number for number, length in enumerate(lengths) if too_long == "truncate" or length == 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_RANGE_BYTES", 90)
        patch.setattr("qdora.data.stream._TOKENIZED_AT_ONCE", shape["at_once"])
        one = stream(file, **options)
        drawn = [one.next() for _ in range(2 * len(kept) + cut)]
        if too_long == "drop":  # the prompt, which names the row, is whole
            numbers = [number_of(example) for example in drawn]
            assert sorted(numbers[: len(kept)]) == sorted(numbers[len(kept) : 2 * len(kept)]) == kept
        other = stream(file, **options)
        for _ in range(cut):
            other.next()
        state = json.loads(json.dumps(other.state_dict()))
        assert state["num_drawn"] == cut
        assert state["num_truncated"] == sum(len(example) == 12 for example in drawn[:cut])
        resumed = stream(file, **options)
        resumed.load_state_dict(state)
        for expected in drawn[cut:]:
            found = resumed.next()
            assert found.id == expected.id
            assert (found.input_ids == expected.input_ids).all()
            assert (found.loss_mask == expected.loss_mask).all()
        assert resumed.state_dict() == one.state_dict()


def test_examples_are_those_of_the_file_read_whole(tmp_path):
    rows = [row(number, 1 + number % 9) for number in range(30)]
    file = write(tmp_path, "parquet", rows)
    one = stream(file, max_length=10)
    examples = [Example("s", "", each["prompt"], each["completion"]) for each in rows]
    whole = tokenize_all(examples, TOKENIZER, name="s", max_length=10, too_long="truncate")
    expected = sorted((each.input_ids.tolist(), each.loss_mask.tolist()) for each in whole.examples)
    drawn = [one.next() for _ in range(30)]
    assert sorted((each.input_ids.tolist(), each.loss_mask.tolist()) for each in drawn) == expected
    assert {each.task for each in drawn} == {"s"}
    assert one.position.num_truncated == whole.num_truncated > 0


def test_passes_seeds_and_sources_have_their_own_orders(tmp_path):
    file = write(tmp_path, "parquet", [row(number) for number in range(60)], group=5)

    def numbers(count=60, **options):
        one = stream(file, window=10, **options)
        return [number_of(one.next()) for _ in range(count)]

    first = numbers(120)
    orders = [first[:60], first[60:], numbers(seed=1), numbers(number=1)]
    assert all(sorted(order) == list(range(60)) for order in orders)
    assert all(one != other for one, other in itertools.combinations([*orders, list(range(60))], 2))
    assert numbers() == first[:60]
    # shards come in another order, not only the rows inside a window
    assert max(abs(place - number) for place, number in enumerate(first[:60])) > 20


def test_what_a_stream_refuses(tmp_path):
    def drawn(lines, count=5, **options):
        (tmp_path / "train.jsonl").write_text(lines)
        one = stream(tmp_path / "train.jsonl", max_bad_rows=0, **options)
        return [one.next() for _ in range(count)]

    good = json.dumps(row(1)) + "\n"
    for lines, message in (
        (
            good * 3 + "{\n",
            rf"s: 1 faulty row, data.max_bad_rows allows 0. .*byte {3 * len(good)}: not JSON",
        ),
        (good + "[1]\n", r"byte \d+: must be an object {column: value}, got \[1\]"),
        (good + '{"prompt": "x"}\n', r"byte \d+: columns prompt; format completion needs prompt, completion"),
        (good + '{"prompt": "x", "completion": 3}\n', r"byte \d+: completion: must be text, got 3"),
        ('{"a": 1}\n', "columns a fit no format"),
        ("\n\n", "gives no example"),
    ):
        with pytest.raises(UserError, match=message):
            drawn(lines)
    with pytest.raises(UserError, match=r"gives no example \(3 examples are longer than data.max_length, 2\)"):
        drawn(good * 3, max_length=2, too_long="drop")


def mixed(tmp_path, *, batch=None, tokens=None, **options):
    file = write(tmp_path, "parquet", [row(number, 1 + number % 5) for number in range(50)], group=8)
    examples = [Example("a", str(number), "q", " no" * (1 + number % 3)) for number in range(20)]
    sets = [tokenize_all(examples, TOKENIZER, name="a", max_length=64), stream(file, window=16, number=1)]
    mix = make_mix(sets, **options)
    loader = StepLoader(sets, mix.order, tokens_per_step=tokens, batch=batch, batching=Batching(200, 0))
    return mix, loader


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, 12), size=st.sampled_from([{"batch": 7}, {"tokens": 60}]), strategy=st.booleans())
def test_steps_of_a_mix_with_a_stream_resume_exactly(tmp_path_factory, cut, size, strategy):
    folder = tmp_path_factory.mktemp("mixed")
    options = size | {"strategy": "equal" if strategy else "proportional"}
    _, steps = mixed(folder, **options)
    for _ in range(cut):
        steps.next_step()
    state = json.loads(json.dumps(steps.state_dict()))
    expected = [steps.next_step() for _ in range(15)]
    _, resumed = mixed(folder, **options)
    resumed.load_state_dict(state)
    for one in expected:
        other = resumed.next_step()
        assert one.num_examples == other.num_examples
        for mine, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
            assert mine.example_ids == theirs.example_ids
            assert (mine.input_ids == theirs.input_ids).all()
            assert (mine.labels == theirs.labels).all()
    assert resumed.position == steps.position
    # back to a position before, as after a step that failed
    steps.load_state_dict(state)
    assert steps.next_step().micro_batches[0].example_ids == expected[0].micro_batches[0].example_ids


def test_shares_sizes_and_caps_with_a_stream(tmp_path):
    mix, loader = mixed(tmp_path, batch=10, strategy="proportional", max_epochs=[None, 2])
    assert mix.order.shares.tolist() == pytest.approx([20 / 70, 50 / 70])  # the footer says 50
    plan = plan_mix(mix, loader, 30)
    a, s = plan.sources
    assert (a.num_draws, s.num_draws, s.epochs, plan.is_exact) == (200, 100, 2.0, True)
    assert (s.num_tokens, s.num_truncated, s.num_dropped, s.num_tokens_seen) == (None,) * 4
    for _ in range(30):
        loader.next_step()
    assert loader.streams[0].position.num_drawn == 100
    mix, loader = mixed(tmp_path, tokens=40, strategy="equal")
    plan = plan_mix(mix, loader, 100)
    assert not plan.is_exact
    for _ in range(100):
        loader.next_step()
    assert plan.num_draws == pytest.approx(loader.position, rel=0.15)
    with pytest.raises(UserError, match=r"^train.tokens_per_step: with max_epochs for every source and a stream"):
        plan_mix(*mixed(tmp_path, tokens=40, strategy="equal", max_epochs=[1, 1]), 1)


def test_unknown_sizes_are_asked_for(tmp_path):
    file = write(tmp_path, "jsonl", [row(number) for number in range(50)])
    for options, message in (
        ({"strategy": "proportional"}, "s: data.strategy proportional needs the size of every source"),
        ({"strategy": "temperature", "temperature": 2.0}, "s: data.strategy temperature needs the size"),
        ({"strategy": "equal", "max_epochs": [1]}, "s: max_epochs needs the size of the stream"),
    ):
        given = {name: value * 2 if name == "max_epochs" else value for name, value in options.items()}
        with pytest.raises(UserError, match=message):
            make_mix([stream(file), stream(file)], **given)
        mix = make_mix([stream(file, size=50)] * 2, **given)
        assert mix.order.length == (100 if "max_epochs" in options else None)
    # a single source has the whole mix, whatever its size
    assert make_mix([stream(file)], strategy="proportional").order.shares.tolist() == [1.0]
    mix = make_mix([stream(file)], strategy="equal")
    loader = StepLoader(mix.sets, mix.order, tokens_per_step=None, batch=5, batching=Batching(99, 0))
    assert plan_mix(mix, loader, 20).sources[0].num_examples is None
    assert plan_mix(mix, loader, 20).sources[0].epochs is None


def test_a_changed_stream_is_refused_on_resume(tmp_path):
    (tmp_path / "other").mkdir()
    rows = [row(number) for number in range(70)]
    first = write(tmp_path, "jsonl", rows)
    second = write(tmp_path / "other", "jsonl", [row(9), *rows[1:]])
    marks = [
        stream(first).fingerprint(),
        stream(first, window=7).fingerprint(),
        stream(first, seed=1).fingerprint(),
        stream(first, loss_on="all").fingerprint(),
        stream(second).fingerprint(),
        stream(first, tokenizer=tiny_tokenizer.make(bos=True)).fingerprint(),
    ]
    assert len({json.dumps(mark) for mark in marks}) == len(marks)
    assert stream(first).fingerprint() == marks[0]
    assert stream(first).change_since(marks[0]) is None
    assert all(stream(first).change_since(mark) for mark in marks[1:])
    assert stream(second).change_since(marks[0]) == "its first rows"
    size = first.stat().st_size
    write(tmp_path, "jsonl", [*rows, *(row(number) for number in range(40_000))])
    assert stream(first).change_since(marks[0]) == f"its length, by +{first.stat().st_size - size:,} bytes"


def test_streaming_from_the_hub(tmp_path, monkeypatch):
    """`datasets` streams local files in the Hub's place: its shards, skipped into, and its errors."""
    rows = [row(number) for number in range(20)]
    for number in range(2):
        part = rows[10 * number : 10 * number + 10]
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"train-{number}.parquet", row_group_size=4)
    load = datasets.load_dataset

    def local(source, *, split, revision, streaming):
        assert (source, revision, streaming) == ("org/name", "abc", True)
        if split != "train":
            raise ValueError("Bad split: trian")
        return load("parquet", data_files={"train": str(tmp_path / "train-*.parquet")}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    hub = SourceConfig(source="org/name", revision="abc", stream=True)
    found = hub_shards(hub)
    assert [each for reader in found.readers for _, each in reader(0)] == rows
    assert len(found.readers) == 2
    assert [each for _, each in found.readers[1](7)] == rows[17:]
    one = stream_of(found, window=6)
    drawn = [number_of(one.next()) for _ in range(33)]
    assert sorted(drawn[:20]) == list(range(20))
    other = stream_of(hub_shards(hub), window=6)
    for _ in range(9):
        other.next()
    one.load_state_dict(other.state_dict())
    assert [number_of(one.next()) for _ in range(24)] == drawn[9:]
    monkeypatch.chdir(tmp_path)
    reason = r"^org/name: cannot be read from the Hub \(ValueError: Bad split: trian\)\."
    with pytest.raises(UserError, match=reason + "$"):
        hub_shards(hub.model_copy(update={"split": "trian"}))
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(UserError, match=reason + " Fix: for the folder on this machine write ./org/name$"):
        hub_shards(hub.model_copy(update={"split": "trian"}))


def test_validation_rows_of_a_stream_are_read_without_its_training_split(tmp_path, monkeypatch):
    """`datasets` prepares every split of a data set where it does not stream."""
    cache, rows = tmp_path / "cache", [row(number) for number in range(5)]
    for split, some in {"train": [row(9)] * 7, "validation": rows}.items():
        pq.write_table(pa.Table.from_pylist(some), tmp_path / f"{split}.parquet")
    load = datasets.load_dataset

    def local(source, *, revision, **options):
        files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "validation")}
        return load("parquet", data_files=files, cache_dir=str(cache), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    hub = SourceConfig(source="org/name", stream=True, validation="validation", name="v")
    train, held_out = train_and_validation(hub, DataConfig(mix=[hub], strategy="equal"))
    assert train is None
    assert [(each.prompt, each.task) for each in held_out] == [(f"{number}:", "v") for number in range(5)]
    assert [each.prompt for each in held_out[1:3]] == ["1:", "2:"]
    assert not list(cache.rglob("*.arrow"))


def test_observed_shares_of_a_stream(tmp_path):
    _, loader = mixed(tmp_path, batch=100, strategy="weights", weights=[1, 4])
    counts = np.zeros(2)
    for _ in range(100):
        for micro in loader.next_step().micro_batches:
            counts += np.bincount(micro.task_ids, minlength=2)
    np.testing.assert_allclose(counts / 10_000, [0.2, 0.8], rtol=0.01)


# Faulty rows


def numbers_of(one, count):
    return [number_of(one.next()) for _ in range(count)]


def faulty_lines(numbers, num_rows=60):
    """Lines of rows; those of `numbers` are cut off."""
    lines = [json.dumps(row(number)) for number in range(num_rows)]
    return "".join((line[:5] if number in numbers else line) + "\n" for number, line in enumerate(lines))


def test_faulty_rows_are_skipped_counted_and_named(tmp_path, caplog):
    file = tmp_path / "train.jsonl"
    bad = [3, 20, 21, 40, 44, 59]
    file.write_text(faulty_lines(bad) + '{"prompt": "x", "completion": ""}\n')
    one = stream(file, window=8)
    drawn = [number_of(one.next()) for _ in range(2 * 54 + 1)]
    assert sorted(drawn[:54]) == sorted(drawn[54:108]) == [number for number in range(60) if number not in bad]
    here = one.position
    assert here.num_bad - here.num_bad_before <= 7
    assert (here.epoch, here.num_bad_before, len(here.bad_rows)) == (2, 14, 5)
    place = len(faulty_lines([], 3))
    assert any(each.startswith(f"{file}: byte {place}: not JSON (") for each in here.bad_rows)
    assert len([line for line in caplog.messages if "skipped a faulty row" in line]) == 5
    for most in (6, 0):
        two = stream(file, window=8, max_bad_rows=most)
        with pytest.raises(UserError) as error:
            numbers_of(two, 60)
        [fault] = error.value.faults
        assert fault.startswith(f"s: {most + 1} faulty row")
        assert f"data.max_bad_rows allows {most}. The first: {file}: byte " in fault
        assert fault.endswith("then resume with --resume.")


def test_how_many_faulty_rows_are_allowed(tmp_path):
    """10, or 0.1 % of the rows, known beforehand or read so far; at the start all that is known fails at once."""
    file = tmp_path / "train.jsonl"
    file.write_text(faulty_lines(range(0, 1200, 100), 2000))  # 12 of 2,000
    with pytest.raises(UserError, match=r"s: 11 faulty rows, data.max_bad_rows allows 10"):
        numbers_of(stream(file), 2000)
    one = stream(file, size=12_000)
    numbers_of(one, 1988)
    assert one.position.num_bad == 12
    file.write_text(faulty_lines(range(20, 31)))
    with pytest.raises(
        UserError, match=r"s: 11 faulty rows, data.max_bad_rows allows 10. .*in place, or raise it by -s data"
    ):
        stream(file).first()
    file.write_text(faulty_lines(range(60)))
    with pytest.raises(UserError, match="byte 0: not JSON"):
        stream(file).first()


@pytest.mark.parametrize("bad", [[2, 30], [30], [200]])
@pytest.mark.parametrize("taken_out", [False, True])
def test_a_mended_row_is_no_change(tmp_path, bad, taken_out):
    """Resumed on the mended file, the other rows come in the order that they would have had."""
    file = tmp_path / "train.jsonl"
    file.write_text(faulty_lines(bad, 250))
    one = stream(file, window=16)
    before = numbers_of(one, 70)
    state, mark = json.loads(json.dumps(one.state_dict())), json.loads(json.dumps(one.fingerprint()))
    rest = numbers_of(one, 250 - len(bad) - 70)
    lines = faulty_lines([], 250).splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines) if not (taken_out and number in bad)]
    file.write_text("".join(kept))
    two = stream(file, window=16)
    assert two.change_since(mark) is None
    two.load_state_dict(state)
    found = []
    while two.position.epoch == 0:
        found.append(number_of(two.next()))
    del found[-1]  # of the second pass
    lost = set(range(250)) - {*before, *found, *bad}
    assert len(lost) <= (16 if taken_out else 0)  # rows move by one, so a window is another one
    if not taken_out:
        assert [number for number in found if number not in bad] == rest
    file.write_text("".join([lines[9], *kept[1:]]))
    assert stream(file, window=16).change_since(mark) == "its first rows"


def test_rows_taken_out_of_a_window_that_is_nearly_used_up(tmp_path: Path) -> None:
    """The window is then shorter than the place in it: the next pass begins."""
    file, bad = tmp_path / "train.jsonl", range(0, 200, 5)
    file.write_text(faulty_lines(bad, 200))
    one = stream(file, max_bad_rows=40)
    while one.position.taken < 175:
        one.next()
    file.write_text("".join(line for n, line in enumerate(faulty_lines([], 200).splitlines(True)) if n not in bad))
    two = stream(file, max_bad_rows=40)
    assert two.change_since(one.fingerprint()) is None
    two.load_state_dict(one.state_dict())
    assert sorted(numbers_of(two, 160)) == [n for n in range(200) if n not in bad]
    assert (two.position.epoch, two.position.taken) == (1, 160)


def test_chats_that_the_template_refuses_are_faulty_rows(tmp_path):
    strict = tiny_tokenizer.make(
        chat_template="{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tool turns') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat"}]
    rows = [{"messages": turns}] * 5 + [{"messages": [{"role": "tool", "content": "x"}, *turns], "topic": "f"}]
    one = stream(write(tmp_path, "jsonl", rows), tokenizer=strict)
    for _ in range(11):
        one.next()
    assert one.position.num_bad >= 2
    assert one.position.bad_rows[0].endswith(": the chat template refuses it: no tool turns")
    assert one.unused == {"topic"}


def test_chats_that_give_several_examples_resume_between_them(tmp_path):
    """The template prints an earlier answer otherwise, so that each turn is an example of its own."""
    template = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }}<|im_end|>{% endfor %}"
    tokenizer = tiny_tokenizer.make(chat_template=template)
    rows = [
        {"messages": [{"role": role, "content": f"{role[0]}{n}"} for _ in range(2) for role in ("user", "assistant")]}
        for n in range(9)
    ]
    options = {"tokenizer": tokenizer, "window": 4}
    file = write(tmp_path, "parquet", rows)
    one = stream(file, **options)
    assert one.num_examples == 18
    states, drawn = [], []
    for _ in range(40):
        states.append(one.state_dict())
        drawn.append(one.next().input_ids.tolist())
    assert len({tuple(each) for each in drawn[:18]}) == 18
    assert one.position.num_drawn == 40
    assert (states[18]["epoch"], states[19]["part"]) == (0, 1)
    for place, state in enumerate(states[:-2]):
        resumed = stream(file, **options)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert [resumed.next().input_ids.tolist() for _ in range(3)] == drawn[place : place + 3]


def test_a_chat_of_several_faulty_examples_is_one_faulty_row(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }}<|im_end|>{% endfor %}"
    turns = [{"role": role, "content": "the cat"} for _ in range(3) for role in ("user", "assistant")]
    rows = [{"messages": turns}, *[{"messages": turns[:2]}] * 3]
    one = stream(
        write(tmp_path, "jsonl", rows),
        tokenizer=tiny_tokenizer.make(chat_template=template),
        max_length=8,
        too_long="split",
        max_bad_rows=1,
    )
    drawn = [one.next() for _ in range(7)]
    assert len({len(each) for each in drawn}) == 1
    assert (one.position.epoch, one.position.num_bad_before) == (2, 2)
    [fault] = one.position.bad_rows
    assert fault.startswith(f"{tmp_path}/train.jsonl: byte 0: ")


def test_text_in_parquet_that_is_no_utf8_is_one_faulty_row(tmp_path):
    bad = pa.array([b"one", b"t\xffo", b"three"], pa.binary()).cast(pa.large_binary())
    texts = pa.LargeStringArray.from_buffers(3, bad.buffers()[1], bad.buffers()[2])
    pq.write_table(pa.table({"text": texts}), tmp_path / "train.parquet")
    one = stream(tmp_path / "train.parquet")
    assert sorted(TOKENIZER.decode(one.next().input_ids) for _ in range(2)) == ["one<|im_end|>", "three<|im_end|>"]
    one.next()
    assert "train.parquet: row 1: a value cannot be read (UnicodeDecodeError" in one.position.bad_rows[0]


def test_a_lost_connection_is_opened_again(monkeypatch, caplog):
    class Shard:
        """A file on the Hub of 6 rows, whose connection is lost before every row of `lost`, so many times."""

        num_shards, info = 1, datasets.DatasetInfo()

        def __init__(self, lost):
            self.lost, self.first = lost, 0

        def shard(self, *_):
            return self

        def skip(self, num_rows):
            other = Shard(self.lost)
            other.first = num_rows
            return other

        def __iter__(self):
            for number in range(self.first, 6):
                if self.lost.get(number):
                    self.lost[number] -= 1
                    raise KeyError("no base class in common")
                yield row(number)

    waits = []
    monkeypatch.setattr(hub_datasets.time, "sleep", waits.append)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Shard({0: 1, 2: 3, 3: 3}))
    found = hub_shards(SourceConfig(source="org/name", stream=True))
    assert [each for _, each in found.readers[0](0)] == [row(number) for number in range(6)]
    assert waits == [1.0, 1.0, 5.0, 25.0, 1.0, 5.0, 25.0]
    assert "org/name: shard 0: KeyError: 'no base class in common'. Trying again in 1 s." in caplog.messages
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Shard({2: 4}))
    found = hub_shards(SourceConfig(source="org/name", stream=True))
    with pytest.raises(UserError, match=r"^org/name: shard 0: row 2: cannot be read from the Hub \(KeyError"):
        list(found.readers[0](0))
