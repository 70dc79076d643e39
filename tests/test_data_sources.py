"""Data files a row at a time, folders and patterns, training and validation examples, and data sets on the Hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data import demo, files
from qdora.data.example import Example, Turn
from qdora.data.files import files_of, local_shards, read_rows, rows_of, rows_of_split
from qdora.data.sources import (
    SplitExamples,
    draw,
    has_split,
    open_shards,
    read_data,
    train_and_validation,
)
from qdora.errors import HubFailure
from qdora.recipe.data_settings import DataConfig, SourceConfig
from tests.data_rows import content, fault_of, faults_of, load_source, mixed, says, write

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20)
WORD = TEXT.filter(str.strip)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda some: bytes(pa.compress(some, codec="zstd", asbytes=True)),
}


def file_of(kind: str, texts: list[tuple[str, str]], small: int) -> tuple[bytes, list[dict[str, str]]]:
    """(bytes, rows that they stand for)."""
    rows, marked = [{"a": a, "b": b} for a, b in texts], "utf-8-sig" if small % 2 else "utf-8"
    file, out = io.StringIO(newline=""), io.BytesIO()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=small)
        return out.getvalue(), rows
    if kind == "jsonl":
        between = ["\n", "\r\n", "\n  \n\n"][small % 3]
        return between.join(json.dumps(row, ensure_ascii=False) for row in rows).encode(marked), rows
    if kind == "json":
        return json.dumps(rows, ensure_ascii=False, indent=2 if small % 3 else None).encode(marked), rows
    if kind == "txt":
        documents = ["".join(f"{line.strip()}\n" for line in (a, b) if line.strip()) for a, b in texts]
        return "\n \n\n".join(documents).encode(), [{"text": text[:-1]} for text in documents if text]
    csv.writer(file, delimiter="," if kind == "csv" else "\t").writerows([("a", "b"), *texts])
    return file.getvalue().encode(marked), rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "txt", "parquet"])
@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(st.tuples(WORD, TEXT), min_size=1, max_size=40),
    packed=st.sampled_from(list(PACKERS)),
    small=st.integers(1, 50),
    data=st.data(),
)
def test_all_rows_any_rows_and_rows_from_anywhere(
    tmp_path_factory: pytest.TempPathFactory, kind: str, texts: Any, packed: str, small: int, data: st.DataObject
) -> None:
    if kind == "txt":  # a document is what has no blank line, so its lines hold no line end of any kind
        texts = [tuple(" ".join(text.split()) for text in pair) for pair in texts]
    plain, rows = file_of(kind, texts, small)
    packed = "" if kind == "parquet" else packed
    file = tmp_path_factory.mktemp("rows") / f"rows.{kind}{packed}"
    file.write_bytes(PACKERS[packed](plain))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_RANGE_BYTES", 3 * small)
        patch.setattr(files, "_ROWS_AT_ONCE", 1 + small % 5)
        found = read_rows(file)
        places, every = zip(*found.chosen(range(found.num_rows)), strict=True)
        assert [*every] == rows
        wanted = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1))))
        assert list(found.chosen(wanted)) == [(places[index], rows[index]) for index in wanted]
        shards = local_shards(file, "train")
        assert len(set(shards.names)) == len(shards.names) == len(shards.readers)
        assert shards.num_rows == (len(rows) if kind == "parquet" else 0)
        assert [row for reader in shards.readers for _, row in reader(0)] == rows
        for reader in shards.readers:
            whole, skip = list(reader(0)), data.draw(st.integers(0, len(rows)))
            assert list(reader(skip)) == whole[skip:]


SUFFIXES = [".jsonl", ".json", ".parquet", ".csv", ".tsv", ".jsonl.gz", ".jsonl.zst", ".csv.gz", ".tsv.zst", ".json.gz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_examples_in_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    """Lists are text in CSV; quotes, line ends, tabs and U+2028 are characters."""
    texts = [(f'Line {n}:\n"what, is\t{n}"? é\u2028', f'the "{n}" cat,\nand ; the dög') for n in range(50)]
    chats = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": g}]} for a, g in texts]
    expected = [(Turn("user", a), Turn("assistant", g)) for a, g in texts]
    found = load_source(SourceConfig(source=write(tmp_path / f"a{suffix}", chats)))
    assert [each.messages for each in found] == expected
    texts.append(("long", "x" * 200_000))  # above the limit of the standard library for a cell, 131,072
    file = write(tmp_path / f"b{suffix}", [{"prompt": a, "completion": g} for a, g in texts])
    assert [(each.prompt, each.answer) for each in load_source(SourceConfig(source=file))] == texts


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.jsonl", '\ufeff{"text": "x"}\n\n{"text": "y"}\n', ["1 x", "3 y"]),
        ("a.json", '\ufeff \n[{"text": "x"}]', ["0 x"]),
        ("a.jsonl", '{"text": "x\u2028y\x85z \\ud83d\\ude00 \\\\ud800"}', ["1 x\u2028y\x85z \U0001f600 \\ud800"]),
        ("a.txt", "\n\nOne.\r\nStill.\r\n \t\r\nTwo.\n\n\n\nThree.", ["3 One.\nStill.", "6 Two.", "10 Three."]),
        ("a.csv", "\ufeff\n\r\ntext\r\nx\r\n", ["4 x"]),
        ("a.csv", 'text,id\n5" pipe,\n"a ""b""\nc",\n\né,\n', ['2 5" pipe', '3 a "b"\nc', "6 é"]),
    ],
)
def test_rows_and_their_places(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = load_source(SourceConfig(source=f"{tmp_path}/{name}"))
    assert [f"{each.id} {each.answer}" for each in found] == expected


DEEP, UTF16 = b"[" * 100_000, '\ufeff{"text": "x"}'.encode("utf-16-le")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.csv", b'text,b\n1,"x\ny"\n2\n\n3,"z"\n', "line 4: has 1 cells, the first line names 2 columns"),
        ("a.csv", b'text,b\n1,2\n3,"z\n4,5\n', "cannot be read (ValueError: line 3: unexpected end of data)"),
        ("a.csv", b'text,b\n"x" y,1\n2,3\n', "line 2: ',' expected after '\"'"),
        ("a.csv", b"\ntext,b,,text,\n1,2,,3,\n", "line 2: two columns are called 'text'"),
        ("a.csv", b"text,b\n\xff,1\n2,3\n", "cannot be read (UnicodeDecodeError: 'utf-8'"),
        ("a.json", b'[{"text": "x"},\n 3]', "row 1: must be an object {column: value}, got 3"),
        ("a.json", b'[{"text": "x"},\n{"text": "\xff"}]', "in position 26"),
        ("a.json", b'[{"a": "x\ty"}]', "Invalid control character at: line 1 column 10"),
        ("a.json", b'{"a": 1}\n{"a": 1}\n', "Extra data: line 2 column 1"),
        ("a.json", b'{"messages": [1]}', "must be a list of rows, got {messages: [1]}"),
        ("a.json", b"[]", "the data set is empty"),
        ("a.json", b'[{"text": ' + DEEP, "nested too deeply"),
        ("a.jsonl", b'[{"text": "x"}]\n{"text": "x"}\n', "line 1: must be an object {column: value}, got ["),
        ("a.txt", b"one\n\n\xfftwo\n", "cannot be read (UnicodeDecodeError: 'utf-8'"),
        ("a.csv", UTF16, "cannot be read (UnicodeDecodeError: 'utf-8'"),
        ("a.jsonl", UTF16, "line 1: not JSON ('utf-8' codec"),
        ("a.txt", b" \n", "the data set is empty"),
        ("a.txt.gz", gzip.compress(b"One.", mtime=0)[:-9], "cannot be read ("),
        ("a.txt.zst", PACKERS[".zst"](b"One.")[:-1], "cannot be read ("),
        ("a.xls", b"x", "unknown ending '.xls', allowed: .parquet, .jsonl, .json, .csv, .tsv, .txt, .md, .jsonl.gz, "),
        ("a.parquet", b"nonsense", "cannot be read (ArrowInvalid: Parquet magic bytes not found"),
    ],
)
def test_what_is_wrong_and_where(tmp_path: Path, name: str, text: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(text)
    line = fault_of(load_source, SourceConfig(source=f"{tmp_path}/{name}"))
    assert line.startswith(f"{tmp_path}/{name}: ")
    assert says(line, words)


def test_damaged_parquet(tmp_path: Path) -> None:
    file, sink = tmp_path / "a.parquet", io.BytesIO()
    table = pa.Table.from_pylist([{"text": f"row {index}"} for index in range(20)])
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, sink, write_page_checksum=True, **plain)
    whole = sink.getvalue()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")

    def fault(place: int, some: bytes, **options: Any) -> str:
        file.write_bytes(whole[:place] + some + whole[place + len(some) :])
        source = SourceConfig(source=str(file), **options)
        return fault_of(open_shards if source.stream else load_source, source)

    for place in range(whole.index(b"row 0"), footer, 7):  # every flipped bit in the values is noticed
        assert fault(place, bytes([whole[place] ^ 1])).startswith(f"{file}: cannot be read (")
    line = fault(footer, b"\x0f" * (len(whole) - 8 - footer))
    assert line.startswith(f"{file}: cannot be read (")
    assert line.isprintable()
    for options in ({}, {"stream": True}):  # a name that is no text
        assert says(
            fault(whole.index(b"text", footer), b"\xff", **options), "cannot be read (UnicodeDecodeError: 'utf-8'"
        )
    pq.write_table(table.slice(0, 0), file)
    assert says(fault_of(load_source, SourceConfig(source=str(file))), "the data set is empty")


def test_faults_of_rows_name_their_place_and_are_few(tmp_path: Path) -> None:
    faults = faults_of(load_source, SourceConfig(source=write(tmp_path / "a.jsonl", [{"text": ""}] * 1000)))
    assert (len(faults), faults[-1]) == (21, "and 980 more")
    rows = tmp_path / "rows"
    write(rows / "a.jsonl", [{"text": "x"}] * 30)
    write(rows / "b.jsonl", [{"text": "y"}, {"text": 3}])
    line = f"{rows}/b.jsonl: line 2: text: must be text that is not empty, got 3"
    assert fault_of(load_source, SourceConfig(source=str(rows))) == line
    write(rows / "b.jsonl", [{"text": "y"}])
    examples = load_source(SourceConfig(source=f"{rows}/*.jsonl"))
    assert [each.id for each in examples[-2:]] == ["a.jsonl: line 30", "b.jsonl: line 1"]
    found = rows_of_split(rows, "train")
    assert found.num_rows == 31
    write(rows / "b.jsonl", [{"text": "z"}])
    assert rows_of_split(rows, "train").identity != found.identity
    file = tmp_path / "rows.csv.gz"
    file.write_bytes(gzip.compress(b'text\n"a\nb"\nx,y\n"c"\n', mtime=0))
    data = DataConfig(mix=(SourceConfig(source=str(file), stream=True),), max_length=99)
    [stream] = mixed(data).sets
    for _ in range(3):
        stream.next()
    assert stream.position.bad_rows == (f"{file}: line 4: has 2 cells, the first line names 1 columns",)
    assert read_data(data) == ({"rows": ()}, {})
    file.write_bytes(gzip.compress(b"\n", mtime=0))
    assert says(fault_of(mixed, data), f"{file}: the data set is empty")


@pytest.mark.parametrize(
    "names, split, expected",
    [
        ("b.jsonl a.jsonl more/c.jsonl README.md .hidden.jsonl", "train", "a.jsonl b.jsonl more/c.jsonl"),
        ("train-0.csv.gz train-1.csv train/x.jsonl val.jsonl", "train", "train/x.jsonl train-0.csv.gz train-1.csv"),
        ("data/train/train-0.jsonl data/test/test-0.jsonl README.md", "train", "data/train/train-0.jsonl"),
        ("train_001.jsonl train_002.jsonl more.jsonl", "train", "more.jsonl train_001.jsonl train_002.jsonl"),
        ("a.jsonl b.csv", "train", "files of several kinds (.csv, .jsonl)"),
        ("test.jsonl more.jsonl", "train", "no file for split 'train', looked for train.*, train-* and"),
        ("a_train.jsonl b.jsonl a_test.jsonl", "train", "no file for split 'train'"),
        ("data/test.v2.jsonl a.jsonl", "train", "no file for split 'train'"),
        ("one/train-0.jsonl two/train-0.jsonl", "train", "one, ... two each hold split 'train'."),
        ("README.md", "train", "no file for split 'train'"),
        ("train.jsonl test.parquet", "tests", "looked for tests.*, "),
        ("train.jsonl train.json", "train", "train.jsonl, train.json all hold split 'train'."),
    ],
)
def test_the_files_of_folders(tmp_path: Path, names: str, split: str, expected: str) -> None:
    for name in names.split():
        write(tmp_path / name, [{"text": "x"}]) if name.endswith("jsonl") else touch(tmp_path / name)
    if expected.split()[0] in names.split():
        found = [str(file.relative_to(tmp_path)) for file in files_of(tmp_path, split)]
        assert found == expected.split()
    else:
        assert says(fault_of(files_of, tmp_path, split), f"{tmp_path}: ... {expected}")


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_the_files_of_a_pattern_and_splits(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.txt", "deep/d.jsonl", "[x].jsonl", "note.xyz"):
        touch(tmp_path / name)
    for pattern, expected in (
        ("*.jsonl", ["[x].jsonl", "a.jsonl", "b.jsonl"]),
        ("**/[a-d].jsonl", ["a.jsonl", "b.jsonl", "deep/d.jsonl"]),
        ("[x].jsonl", ["[x].jsonl"]),  # a file of this name comes before the pattern
    ):
        assert [str(file.relative_to(tmp_path)) for file in files_of(tmp_path / pattern, "train")] == expected
    assert says(fault_of(files_of, tmp_path / "*.xyz", "train"), "*.xyz: no such file.")
    for name in ("own/train.jsonl", "own/old/validation.jsonl", "clone/data/train.jsonl", "clone/data/validation.csv"):
        touch(tmp_path / name)
    assert not has_split(SourceConfig(source=f"{tmp_path}/own"), "validation")  # old files decide nothing
    assert has_split(SourceConfig(source=f"{tmp_path}/clone"), "validation")
    (tmp_path / "quiz.jsonl").write_bytes(content(".jsonl", [{"text": "x"}]))
    assert load_source(SourceConfig(source=f"{tmp_path}/quiz.jsonl")) == [Example("quiz", "1", "", "x")]
    assert fault_of(load_source, SourceConfig(source=f"{tmp_path}/no/dir")) == f"{tmp_path}/no/dir: no such file."


CHOICE = {"question": "Q?", "choices": ["a", "b"], "answer": 1}
PAIR = {"prompt": "1+1=", "completion": " 2"}


def split_up(fraction: float = 0.1, seed: int = 0, **source: Any) -> tuple[list[Any], list[Any]]:
    """The training and validation examples of one source."""
    config = SourceConfig.model_validate(source)
    data = DataConfig(mix=(config,), validation_fraction=fraction, seed=seed)
    train, validation = train_and_validation(config, data)
    return list(train or ()), list(validation or ())


def test_validation_examples_come_from_a_split_a_file_or_the_end(tmp_path: Path) -> None:
    rows, task = [PAIR] * 40, tmp_path / "task"
    write(tmp_path / "train-0.jsonl", rows[:20])
    write(tmp_path / "train-1.jsonl", rows[:20])
    held = write(tmp_path / "held.jsonl", rows[:5])
    (tmp_path / "link.jsonl").symlink_to(held)
    write(task / "train.parquet", [{"task": "obqa", "id": "7-1", "passage": None} | CHOICE] * 40)
    for number in (2, 3):
        write(task / ("dev.jsonl" if number == 2 else "dev-hard.jsonl"), [CHOICE] * number)
    pattern = f"{tmp_path}/train-*.jsonl"
    for source, sizes in (
        ({"source": pattern}, (36, 4)),
        ({"source": pattern, "limit": 10}, (10, 4)),
        ({"source": pattern, "validation": held}, (40, 5)),
        ({"source": f"{tmp_path}/train-[0].jsonl", "validation": held}, (20, 5)),
        ({"task": "obqa", "path": str(task)}, (36, 4)),
        ({"task": "obqa", "path": str(task), "validation": "dev"}, (40, 5)),
        ({"task": "obqa", "path": str(task), "validation": f"{task}/dev.jsonl"}, (40, 2)),  # that file alone
        ({"task": "demo/odd", "limit": 10}, (10, 80)),
    ):
        assert tuple(map(len, split_up(**source))) == sizes
    write(task / "validation.parquet", [CHOICE] * 3)
    train, validation = split_up(task="obqa", path=str(task), name="n")
    assert (len(train), len(validation), train[0].id, {each.task for each in train}) == (40, 3, "7-1", {"n"})
    assert split_up(task="demo/odd")[1] == demo.examples("odd", "validation")
    write(tmp_path / "validation-0.jsonl", [CHOICE | {"task": "siqa"}, CHOICE] * 10)
    train, validation = split_up(source=str(tmp_path))
    assert (len(train), [each.task for each in validation[:2]]) == (40, ["siqa", tmp_path.name])
    for source, words in (
        ({"source": held, "validation": "dev"}, "validation 'dev': held has no such split besides."),
        ({"source": pattern, "validation": "validation"}, "has no such split besides."),
        ({"source": str(tmp_path), "validation": "train"}, "validation 'train': "),
        ({"source": held, "validation": held}, "is trained on, too."),
        ({"source": f"{tmp_path}/link.jsonl", "validation": held}, "is trained on, too."),
        ({"source": f"{tmp_path}/*.jsonl", "validation": held}, "held.jsonl is trained on, too."),
        ({"task": "obqa", "path": f"{tmp_path}/tsk"}, "no such file."),
        ({"source": write(tmp_path / "one.jsonl", rows[:1])}, "one: 1 examples leave none to train on after data.val"),
        ({"source": write(tmp_path / "odd.jsonl", [{"chat": []}])}, "columns chat fit no format"),
    ):
        assert says(fault_of(split_up, **source), words)


def test_rows_are_cut_then_drawn_by_the_seed(tmp_path: Path) -> None:
    """As of a list of all rows: the last 5 % are cut off, then 20 are drawn of the rest, by numpy's generator."""
    for suffix in (".jsonl", ".parquet", ".jsonl.gz"):
        file = write(tmp_path / f"big{suffix}", [PAIR | {"id": f"n{number}"} for number in range(3000)])
        train, validation = split_up(0.05, 7, source=file, limit=20)
        drawn = np.sort(np.random.default_rng([7, 2850]).permutation(2850)[:20])
        assert [example.id for example in train] == [f"n{number}" for number in drawn]
        assert [example.id for example in validation] == [f"n{number}" for number in range(2850, 3000)]

    def letters(text: str) -> Any:
        rows = rows_of("x", [{"text": letter} for letter in text])
        return SplitExamples(rows, lambda row, id: row["text"], range(len(text)))

    file = write(tmp_path / "ten.jsonl", [PAIR] * 10)
    for fraction, sizes in ((0.2, (8, 2)), (0.01, (9, 1)), (0.0, (10, 0))):
        assert tuple(map(len, split_up(fraction, source=file))) == sizes
    examples = letters("abcdefghij")
    assert list(draw(examples, 10, 0)) == list("abcdefghij")
    assert list(draw(examples, 5, 0)) != list(draw(examples, 5, 1))
    assert (list(examples[2:4]), examples.identity) == (["c", "d"], None)


def test_faulty_rows_of_the_first_source_that_has_some(tmp_path: Path) -> None:
    first, good = tmp_path / "a.jsonl", write(tmp_path / "c.jsonl", [PAIR])
    first.write_text('{"prompt": "x", "completion": "y"}\n{"prompt": \n[1]\n')
    second = write(tmp_path / "b.jsonl", [CHOICE, CHOICE | {"answer": 9}])
    mix = tuple(SourceConfig(source=source) for source in (good, str(first), second))
    expected = (
        f"data.mix[1]: {first}: line 2: not JSON (Expecting value: line 2 column 1 (char 12))",
        f"data.mix[1]: {first}: line 3: must be an object {{column: value}}, got [1]",
    )
    assert faults_of(mixed, DataConfig(mix=mix, validation_fraction=0.0)) == expected


def test_sources_that_are_not_named_are_not_read_for_training(tmp_path: Path) -> None:
    good, held = (write(tmp_path / f"{name}.jsonl", [PAIR] * 2) for name in "ce")
    mix = (SourceConfig(source=good), SourceConfig(source=good, name="d", validation=held))
    for names, sizes in ((None, [2, 2]), ({"d"}, [0, 2])):
        train, validation = read_data(DataConfig(mix=mix, validation_fraction=0.0), names)
        assert [len(train.get(source.label, ())) for source in mix] == sizes
        assert {name: len(examples) for name, examples in validation.items()} == {"d": 2}


def test_with_loss_on_last_the_last_turn_alone_is_scored(tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "draft"), ("user", "Why?"), ("assistant", "yes"), ("user", "Bye")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    files = [write(tmp_path / f"{name}.jsonl", [chat] * 2) for name in ("chat", "held")]
    config = SourceConfig(source=files[0], validation=files[1])
    for loss_on, expected in (("last", [False, True]), ("answer", [True, True])):
        _, validation = read_data(DataConfig(mix=(config,), loss_on=loss_on))
        held, _ = validation["chat"]
        assert [turn.learnt for turn in held.messages if turn.role == "assistant"] == expected


def test_unused_columns_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {"pairs": [PAIR | dict.fromkeys(("category", "system"), "x")] * 3, "all": [PAIR]}
    files = [write(tmp_path / f"{name}.jsonl", some) for name, some in rows.items()]
    with caplog.at_level("INFO", "qdora"):
        mixed(DataConfig(mix=tuple(SourceConfig(source=file) for file in files), validation_fraction=0.0))
    assert caplog.messages == ["pairs: not used for training: category, system."]


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load(source: str, **options: Any) -> Any:
        assert source == "openai/gsm8k"
        asked.append(options)
        table = datasets.Dataset.from_list([{"prompt": options["split"], "completion": " 2"}] * 3)
        return table.to_iterable_dataset() if options.get("streaming") else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub, files = {"source": "openai/gsm8k", "revision": "abc"}, {"train": ["a-*.jsonl", "b.jsonl"], "test": "c.jsonl"}
    [first, *_] = load_source(SourceConfig.model_validate(hub | {"config": "main"}))
    assert (first.task, first.prompt, first.answer) == ("gsm8k", "train", " 2")
    load_source(SourceConfig.model_validate(hub | {"data_files": files, "validation": "test"}), "test")
    load_source(SourceConfig.model_validate(hub | {"data_files": "a.jsonl", "split": "train[:9]"}))
    parts = {"config": "main", "data_files": ("a.jsonl", "b.jsonl"), "stream": True}
    shards = open_shards(SourceConfig.model_validate(hub | parts))
    assert [each for each in asked if each.pop("revision") == "abc"] == [
        {"split": "train", "name": "main", "data_files": None},
        {"split": "test", "name": None, "data_files": files},
        {"split": "train[:9]", "name": None, "data_files": {"train": "a.jsonl"}},
        {"split": "train", "name": "main", "data_files": {"train": ["a.jsonl", "b.jsonl"]}, "streaming": True},
    ]
    assert shards.num_rows == 0
    assert says(shards.names[0], "openai/gsm8k@abc main ... train 0 of 1")
    train, held_out = split_up(**hub, split="train[:90%]", validation="train[90%:95%]+test[:5]")
    assert {each.prompt for each in train} == {"train[:90%]"}
    assert {each.prompt for each in held_out} == {"train[90%:95%]+test[:5]"}


def test_what_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/chat").mkdir(parents=True)
    not_found = datasets.exceptions.DatasetNotFoundError
    cases: list[tuple[Exception, str]] = [
        (not_found("'data/chta' is a gated dataset on the Hub."), "is a gated dataset on the Hub.)"),
        (ConnectionError("no\nnetwork"), "from the Hub (ConnectionError: no network)."),
        (Exception("connection reset"), "cannot be read from the Hub ("),  # as httpx does: no OSError
    ]
    for error, words in cases:
        monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
        assert says(fault_of(load_source, SourceConfig(source="data/chta")), f"data/chta: ... {words}")
        with pytest.raises(HubFailure):
            read_data(DataConfig(mix=(SourceConfig(source="data/chta"),)))
    (tmp_path / "data/chta").mkdir()
    assert says(fault_of(load_source, SourceConfig(source="data/chta")), "write ./data/chta")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([]))
    assert says(fault_of(load_source, SourceConfig(source="data/chta")), "the data set is empty")
