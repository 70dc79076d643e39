"""Sources larger than memory: every row once a pass, resumed exactly from any draw, faulty rows skipped and counted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data import files
from qdora.data.batches import Batching, StepLoader
from qdora.data.example import Example
from qdora.data.files import hub_shards, local_shards
from qdora.data.formats import parse_messages
from qdora.data.mix_plan import plan_mix
from qdora.data.sources import train_and_validation
from qdora.data.stream import ExampleStream
from qdora.recipe.data_settings import DataConfig, SourceConfig
from tests import support
from tests.data_rows import Rows, fault_of, mix_of, says, tokenized

CHATML, TOKENIZER = support.CHATML, support.tokenizer()
SHOWS = "{{ m.content if loop.last or m.role == 'user' }}"
EACH_TURN = support.tokenizer(chat_template="{% for m in messages %}" + SHOWS + "<|im_end|>{% endfor %}")
"""Its template prints an earlier answer otherwise, so that each turn of a chat is an example of its own."""


def turns(number: int) -> Rows:
    return [{"role": role, "content": f"{role[0]}{number}"} for _ in range(2) for role in ("user", "assistant")]


def row(number: int, length: int = 1) -> dict[str, Any]:
    return {"prompt": f"{number}:", "completion": " yes" * length}


def write(folder: Path, kind: str, rows: Rows, group: int = 3) -> Path:
    """The rows as one file of the kind; Parquet in row groups of `group` rows."""
    folder.mkdir(exist_ok=True)
    file = folder / f"train.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    else:
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


def stream(source: Any, *, tokenizer: Any = TOKENIZER, number: int = 0, window: int = 4096, **data: Any) -> Any:
    """Source `number` of a mix, which is called s: a file, or shards. `data` are settings of it and of the section."""
    shards = local_shards(source, "train") if isinstance(source, Path) else source
    own = {"source": "rows.jsonl", "stream": True, "name": "s", "shuffle_window": window}
    own |= {name: data.pop(name) for name in ("size", "columns", "template") if name in data}
    mix = [own | {"name": f"other {each}"} for each in range(number)] + [own]
    return ExampleStream(shards, DataConfig.model_validate({"mix": mix, "strategy": "equal"} | data), number, tokenizer)


def tokens(examples: Any) -> list[tuple[list[int], list[bool]]]:
    return [(each.input_ids.tolist(), each.loss_mask.tolist()) for each in examples]


def numbers_of(one: ExampleStream, count: int) -> list[int]:
    return [int(TOKENIZER.decode(one.next().input_ids).partition(":")[0]) for _ in range(count)]


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
@given(shape=SHAPE, cut=st.integers(0, 150), mode=st.sampled_from(["drop", "truncate", "split", "chats"]))
def test_every_row_once_a_pass_and_resumed_is_uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, shape: Any, cut: int, mode: Any
) -> None:
    """The examples are those of the file read whole. A text that is split, and a chat, gives several."""
    pairs = [(f"{number}:", " yes" * (1 + 9 * (number % 3 == 1))) for number in range(shape["num_rows"])]
    rows: Rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    if mode == "split":
        pairs = [("", prompt + completion) for prompt, completion in pairs]
        rows = [{"text": text} for _, text in pairs]
    examples = [Example("s", "", *pair) for pair in pairs]
    if mode == "chats":
        rows = [{"messages": turns(number)} for number in range(shape["num_rows"])]
        examples = [Example("s", "", "", "", messages=parse_messages(each["messages"])) for each in rows]
    file = write(tmp_path_factory.mktemp("stream"), shape["kind"], rows, group=7)
    limits: dict[str, Any] = {"max_length": 12, "too_long": "drop" if mode == "chats" else mode}
    options = {"window": shape["window"], "seed": shape["seed"], "tokenizer": EACH_TURN} | limits
    whole = tokenized(examples, EACH_TURN, "s", **limits).examples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_RANGE_BYTES", 90)
        patch.setattr("qdora.data.stream._TOKENIZED_AT_ONCE", shape["at_once"])
        one = stream(file, **options)
        drawn = [one.next() for _ in range(2 * len(whole) + cut)]
        for start in (0, len(whole)):
            assert sorted(tokens(drawn[start : start + len(whole)])) == sorted(tokens(whole))
        other = stream(file, **options)
        for _ in range(cut):
            other.next()
        state = json.loads(json.dumps(other.state_dict()))
        cut_short = sum(len(example) == 12 for example in drawn[:cut]) if mode == "truncate" else 0
        assert (state["num_drawn"], state["num_truncated"], state["num_bad"]) == (cut, cut_short, 0)
        resumed = stream(file, **options)
        resumed.load_state_dict(state)
        for expected in drawn[cut:]:
            found = resumed.next()
            assert (found.task, found.id, tokens([found])) == ("s", expected.id, tokens([expected]))
        assert resumed.state_dict() == one.state_dict()


def test_passes_seeds_and_sources_have_their_own_orders(tmp_path: Path) -> None:
    file = write(tmp_path, "parquet", [row(number) for number in range(60)], group=5)
    first = numbers_of(stream(file, window=10), 120)
    others = [numbers_of(stream(file, window=10, **each), 60) for each in ({"seed": 1}, {"number": 1})]
    orders = [first[:60], first[60:], *others]
    assert all(sorted(order) == list(range(60)) for order in orders)
    assert all(one != other for one, other in itertools.combinations([*orders, list(range(60))], 2))
    # shards come in another order, not only the rows inside a window
    assert max(abs(place - number) for place, number in enumerate(first[:60])) > 20


def mixed(folder: Path, *, batch: int | None = None, tokens: int | None = None, **options: Any) -> Any:
    file = write(folder, "parquet", [row(number, 1 + number % 5) for number in range(50)], group=8)
    examples = [Example("a", str(number), "q", " no" * (1 + number % 3)) for number in range(20)]
    sets = [tokenized(examples, TOKENIZER, "a"), stream(file, window=16, number=1)]
    mix = mix_of(sets, **options)
    return mix, StepLoader(mix, Batching(200, 0), tokens_per_step=tokens, batch=batch)


@pytest.mark.parametrize("size", [{"batch": 7}, {"tokens": 60}], ids=str)
def test_steps_of_a_mix_with_a_stream_resume_exactly(tmp_path: Path, size: dict[str, Any]) -> None:
    def content(step: Any) -> Any:
        return [(each.example_ids, each.input_ids.tolist(), each.labels.tolist()) for each in step.micro_batches]

    for cut in (0, 5, 11):
        (_, steps), (_, resumed) = mixed(tmp_path, **size), mixed(tmp_path, **size)
        for _ in range(cut):
            steps.next_step()
        state = json.loads(json.dumps(steps.state_dict()))
        expected = [content(steps.next_step()) for _ in range(15)]
        for loader in (resumed, steps):  # and back to a position before, as after a step that failed
            loader.load_state_dict(state)
            assert [content(loader.next_step()) for _ in range(15)] == expected


def test_shares_sizes_and_caps_with_a_stream(tmp_path: Path) -> None:
    mix, loader = mixed(tmp_path, batch=10, strategy="proportional", max_epochs=[None, 2])
    assert mix.order.shares.tolist() == pytest.approx([20 / 70, 50 / 70])  # the footer says 50
    plan = plan_mix(loader, 30)
    a, s = plan["sources"]
    assert (a["num_draws"], s["num_draws"], s["epochs"]) == (200, 100, 2.0)
    assert (s["num_tokens"], s["num_truncated"], s["num_dropped"]) == (None,) * 3
    for _ in range(30):
        loader.next_step()
    assert loader.streams[0].position.num_drawn == 100
    plan = plan_mix(mixed(tmp_path, tokens=40, strategy="equal")[1], 100)  # nobody knows how long its rows are
    assert (plan["num_draws"], {(each["num_draws"], each["epochs"]) for each in plan["sources"]}) == (
        None,
        {(None, None)},
    )
    fault = fault_of(plan_mix, mixed(tmp_path, tokens=40, strategy="equal", max_epochs=[1, 1])[1], 1)
    assert fault.startswith("train.tokens_per_step: with max_epochs for every source and a stream")


def test_unknown_sizes_are_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "a", "jsonl", [row(number) for number in range(50)])
    for options, words in (
        ({"strategy": "proportional"}, "s: data.strategy proportional needs the size"),
        ({"strategy": "temperature", "temperature": 2.0}, "s: data.strategy temperature needs the size"),
        ({"strategy": "equal", "max_epochs": [1, 1]}, "s: max_epochs needs the size of the stream"),
    ):
        with pytest.raises(ValueError, match=words):
            mix_of([stream(file), stream(file)], **options)
        mix = mix_of([stream(file, size=50)] * 2, **options)
        assert mix.order.length == (100 if "max_epochs" in options else None)
    # the footer of a Parquet file says the rows, and the first ones how many examples they make
    chats = stream(write(tmp_path, "parquet", [{"messages": turns(n)} for n in range(9)]), tokenizer=EACH_TURN)
    assert chats.num_examples == 18
    pairs = stream(write(tmp_path / "pairs", "parquet", [row(0)]))
    assert pairs.num_examples == 1
    # a single source has the whole mix, whatever its size
    mix = mix_of([stream(file)], strategy="proportional")
    assert mix.order.shares.tolist() == [1.0]
    loader = StepLoader(mix, Batching(99, 0), batch=5)
    [part] = plan_mix(loader, 20)["sources"]
    assert (part["num_examples"], part["epochs"], part["num_draws"]) == (None, None, 100)


def test_a_changed_stream_is_refused_on_resume(tmp_path: Path) -> None:
    rows = [row(number) for number in range(70)]
    first = write(tmp_path, "jsonl", rows)
    second = write(tmp_path / "other", "jsonl", [row(9), *rows[1:]])
    template = {"prompt": "{{ prompt }}", "completion": "{{ completion }}"}
    marks = [
        stream(first, **options).fingerprint()
        for options in (
            {},
            {"window": 7},
            {"seed": 1},
            {"loss_on": "all"},
            {"tokenizer": support.tokenizer(bos=True)},
            {"columns": {"prompt": "completion", "completion": "prompt"}},
            {"template": template},
            {"template": template | {"prompt": "{{ prompt }} "}},
        )
    ]
    marks.append(stream(second).fingerprint())
    assert len({json.dumps(mark) for mark in marks}) == len(marks)
    assert not stream(first).has_changed(marks[0])
    assert all(stream(first).has_changed(mark) for mark in [*marks[1:], None])
    assert stream(second).has_changed(marks[0])


def faulty_lines(numbers: Any, num_rows: int = 60) -> str:
    """Lines of rows; those of `numbers` are cut off."""
    lines = [json.dumps(row(number)) for number in range(num_rows)]
    return "".join((line[:5] if number in numbers else line) + "\n" for number, line in enumerate(lines))


@pytest.mark.parametrize(
    "lines, options, words",
    [
        (faulty_lines([3], 4), {}, "s: 1 rows are faulty, data.max_bad_rows allows 0. ... byte 117: not JSON"),
        (faulty_lines([], 1) + '{"prompt": "x"}\n', {}, "byte 39: columns prompt; format completion needs prompt, c"),
        (faulty_lines([], 1) + '{"prompt": "x", "completion": 3}\n', {}, "byte 39: completion: must be text"),
        ('{"a": 1}\n', {}, "columns a fit no format"),
        ("\n\n", {}, "gives no example"),
        (faulty_lines([], 3), {"max_length": 2, "too_long": "drop"}, "(3 examples are longer than data.max_length, 2)"),
    ],
)
def test_what_a_stream_refuses(tmp_path: Path, lines: str, options: dict[str, Any], words: str) -> None:
    (tmp_path / "train.jsonl").write_text(lines)
    one = stream(tmp_path / "train.jsonl", max_bad_rows=0, **options)
    assert says(fault_of(lambda: [one.next() for _ in range(5)]), words)


def test_faulty_rows_are_skipped_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "train.jsonl"
    bad = [3, 20, 21, 40, 44, 59]
    file.write_text(faulty_lines(bad) + '{"prompt": "x", "completion": ""}\n')
    one = stream(file, window=8)
    drawn = numbers_of(one, 2 * 54 + 1)
    assert sorted(drawn[:54]) == sorted(drawn[54:108]) == [number for number in range(60) if number not in bad]
    here = one.position
    assert here.num_bad - here.num_bad_before <= 7
    assert (here.epoch, here.num_bad_before, len(here.bad_rows)) == (2, 14, 5)
    place = len(faulty_lines([], 3))
    assert any(each.startswith(f"{file}: byte {place}: not JSON (") for each in here.bad_rows)
    assert len([line for line in caplog.messages if "skipped a faulty row" in line]) == 5
    for most in (6, 0):
        fault = fault_of(numbers_of, stream(file, window=8, max_bad_rows=most), 60)
        words = f"s: {most + 1} rows are faulty, data.max_bad_rows allows {most}. The first: {file}: byte "
        assert says(fault, f"{words} ... with --resume).")


def test_how_many_faulty_rows_are_allowed(tmp_path: Path) -> None:
    """10, or 0.1 % of the rows, known beforehand or read so far."""
    file = tmp_path / "train.jsonl"
    file.write_text(faulty_lines(range(0, 1200, 100), 2000))  # 12 of 2,000
    assert says(fault_of(numbers_of, stream(file), 2000), "s: 11 rows are faulty, data.max_bad_rows allows 10")
    one = stream(file, size=12_000)
    numbers_of(one, 1988)
    assert one.position.num_bad == 12
    file.write_text(faulty_lines(range(20, 31)))
    assert says(
        fault_of(lambda: stream(file).examples), "s: 11 rows are faulty, data.max_bad_rows allows 10. ... raise it"
    )
    file.write_text(faulty_lines(range(20, 30)))
    assert len(stream(file).examples) == 50
    file.write_text(faulty_lines(range(11), 12))
    assert says(fault_of(lambda: stream(file).examples), "s: 11 rows are faulty")


def test_a_mended_row_is_no_change(tmp_path: Path) -> None:
    """Resumed on the mended file, the other rows come in the order that they would have had."""
    file, bad = tmp_path / "train.jsonl", [2, 30, 200]
    file.write_text(faulty_lines(bad, 250))
    one = stream(file, window=16)
    before = numbers_of(one, 70)
    state, mark = json.loads(json.dumps(one.state_dict())), json.loads(json.dumps(one.fingerprint()))
    rest = numbers_of(one, 250 - len(bad) - 70)
    lines = faulty_lines([], 250).splitlines(keepends=True)
    file.write_text("".join(lines))
    two = stream(file, window=16)
    assert not two.has_changed(mark)
    two.load_state_dict(state)
    found = []
    while two.position.epoch == 0:
        found += numbers_of(two, 1)
    del found[-1]  # of the second pass
    assert not set(range(250)) - {*before, *found, *bad}
    assert [number for number in found if number not in bad] == rest
    file.write_text("".join([lines[9], *lines[1:]]))
    assert stream(file, window=16).has_changed(mark)


def test_rows_that_become_no_example_are_faulty_as_a_whole(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat"}]
    no_tools = CHATML.replace("{{ m", "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m", 1)
    rows: Rows = [{"messages": chat}] * 5 + [{"messages": [{"role": "tool", "content": "x"}, *chat], "topic": "f"}]
    one = stream(write(tmp_path, "jsonl", rows), tokenizer=support.tokenizer(chat_template=no_tools))
    for _ in range(11):
        one.next()
    assert (one.position.num_bad >= 2, one.make.unused) == (True, {"topic"})
    assert one.position.bad_rows[0].endswith(": the chat template refuses it: no tools")
    # a pair, which is not split
    file = write(tmp_path, "jsonl", [row(number, 50 if number == 3 else 1) for number in range(6)])
    one = stream(file, max_length=20, too_long="split")
    numbers_of(one, 6)
    assert says(one.position.bad_rows[0], "too long, and data.too_long: split is for plain text")
    assert one.position.num_dropped == 0


def test_streaming_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` streams local files in the Hub's place: its shards, skipped into, and its errors."""
    rows, cache = [row(number) for number in range(20)], tmp_path / "cache"
    for number in range(2):
        part = pa.Table.from_pylist(rows[10 * number : 10 * number + 10])
        pq.write_table(part, tmp_path / f"train-{number}.parquet", row_group_size=4)
    pq.write_table(pa.Table.from_pylist(rows[:5]), tmp_path / "held.parquet")
    load = datasets.load_dataset

    def local(source: str, *, split: str, revision: str, data_files: None, **options: Any) -> Any:
        assert (source, revision, data_files) == ("org/name", "abc", None)
        if split == "trian":
            raise ValueError("Bad split: trian")
        files = {"train": str(tmp_path / "train-*.parquet"), "validation": str(tmp_path / "held.parquet")}
        return load("parquet", data_files=files, split=split, cache_dir=str(cache), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    hub = SourceConfig(source="org/name", revision="abc", stream=True, validation="validation", name="v")
    found = hub_shards(hub)
    assert [each for reader in found.readers for _, each in reader(0)] == rows
    assert len(found.readers) == 2
    assert [each for _, each in found.readers[1](7)] == rows[17:]
    one, other = (stream(hub_shards(hub), window=6) for _ in range(2))
    drawn = numbers_of(one, 33)
    numbers_of(other, 9)
    one.load_state_dict(other.state_dict())
    assert (sorted(drawn[:20]), numbers_of(one, 24)) == (list(range(20)), drawn[9:])
    train, held_out = train_and_validation(hub, DataConfig(mix=(hub,), strategy="equal"))
    assert train is None
    assert held_out is not None
    assert [(each.prompt, each.task) for each in held_out] == [(f"{number}:", "v") for number in range(5)]
    assert [each.prompt for each in held_out[1:3]] == ["1:", "2:"]
    assert not list(cache.rglob("*.arrow"))  # where `datasets` does not stream, it prepares every split
    bad = hub.model_copy(update={"split": "trian"})
    assert fault_of(hub_shards, bad) == "org/name: cannot be read from the Hub (ValueError: Bad split: trian)."
