"""Data files a row at a time: every row of every kind of file, what is wrong with it and where, and which files."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data import file_records, readers
from qdora.data.build_data import read_data, tokenized_mix
from qdora.data.readers import local_shards, read_rows, rows_of_split
from qdora.data.rows import RowFault
from qdora.data.source_files import files_of
from qdora.data.sources import has_split, load_source, open_shards, train_and_validation
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig, SourceConfig
from tests import tiny_tokenizer

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20)
WORD = TEXT.filter(str.strip)
KINDS = ("jsonl", "json", "json indented", "csv", "tsv", "txt")


def content(kind: str, texts: list[tuple[str, str]]) -> tuple[str, bytes, list[dict[str, str]]]:
    """(ending, bytes, rows that they stand for)."""
    rows = [{"a": a, "b": b} for a, b in texts]
    if kind == "jsonl":
        return kind, "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(), rows
    if kind.startswith("json"):
        indent = 2 if kind.endswith("indented") else None
        return "json", json.dumps(rows, ensure_ascii=False, indent=indent).encode("utf-8-sig"), rows
    if kind == "txt":
        documents = ["".join(f"{line.strip()}\n" for line in (a, b) if line.strip()) for a, b in texts]
        return kind, "\n \n\n".join(documents).encode(), [{"text": text[:-1]} for text in documents if text]
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
    writer.writerows([("a", "b"), *texts])
    return kind, file.getvalue().encode("utf-8-sig"), rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@given(texts=st.lists(st.tuples(WORD, TEXT), min_size=1, max_size=40), small=st.integers(1, 50), data=st.data())
@settings(max_examples=40, deadline=None)
def test_all_rows_any_rows_and_rows_from_anywhere(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    packed: str,
    texts: list[tuple[str, str]],
    small: int,
    data: st.DataObject,
) -> None:
    if kind == "txt":  # a document is what has no blank line, so its lines hold no line end of any kind
        texts = [tuple(" ".join(text.split()) for text in pair) for pair in texts]
    ending, plain, rows = content(kind, texts)
    file = tmp_path_factory.mktemp("rows") / f"rows.{ending}{packed}"
    packers = {".gz": gzip.compress, ".zst": lambda some: pa.compress(some, codec="zstd", asbytes=True)}
    file.write_bytes(packers[packed](plain) if packed else plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_records, "_READ_BYTES", small)
        patch.setattr(readers, "_KEPT_EACH", 1 + small % 7)
        found = read_rows(file)
        assert [row for _, row in found] == rows
        wanted = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1))))
        assert [row for _, row in found.chosen(wanted)] == [rows[index] for index in wanted]
        assert [place for place, _ in found.chosen(wanted)] == [
            [place for place, _ in found][index] for index in wanted
        ]
        shards = local_shards(file, "train")
        skip = data.draw(st.integers(0, len(rows)))
        if len(shards.readers) == 1:
            assert [row for _, row in shards.readers[0](skip)] == rows[skip:]
        assert [row for reader in shards.readers for _, row in reader(0)] == rows


def faults_of(path: Path) -> list[str]:
    """Place and fault of each row."""
    try:
        rows = read_rows(path)
        return [f"{rows.unit} {place}: {row}" for place, row in rows if isinstance(row, RowFault)]
    except UserError as error:
        return [fault.removeprefix(f"{path}: ") for fault in error.faults]


@pytest.mark.parametrize(
    "name, text, faults",
    [
        ("a.csv", b'a,b\n1,"x\ny"\n2\n\n3,"z"\n', ["line 4: has 1 cells, the first line names 2 columns"]),
        ("a.csv", b'a,b\n1,2\n3,"z\n4,5\n', ["line 3: a quotation mark opens here and is never closed."]),
        ("a.csv", b'a,b\n"x" y,1\n2,3\n', ["line 2: not CSV (',' expected after '\"')"]),
        ("a.csv", b"a,b\n\xff,1\n2,3\n", ["line 2: not UTF-8 text (byte 0 of the row)"]),
        ("a.tsv", b"a\tb\n1\t2\t3\n\t\n", ["line 2: has 3 cells, the first line names 2 columns"]),
        ("a.csv", b"a,b,a\n1,2,3\n", ["line 1: names the column 'a' twice"]),
        ("a.csv", b'\n"a,b\n', ["line 2: a quotation mark opens here and is never closed."]),
        ("a.json", b'[{"a": 1},\n 3,\n{"a": "\xff"}]', ["row 1: must be an object {column: value}, got 3"]),
        ("a.json", b'[{"a": "x\ty"}]', ["row 0: not JSON (column 9: Invalid control character at)"]),
        ("a.json", b'[{"a": 1},\n]', ["line 2: not JSON (column 1: Expecting value)"]),
        ("a.json", b'\n[{"a": 1}\n  {"a": 2}]', ["line 3: not JSON (column 3: Expecting ',' delimiter)"]),
        ("a.json", b'[{"a": 1},\n {"a": [2}]', ["line 2: not JSON (column 10: Expecting ',' delimiter)"]),
        ("a.json", b'[{"a": 1}', ["line 1: not JSON (column 10: Expecting ',' delimiter)"]),
        ("a.json", b'[{"a": 1}] []', ["line 1: not JSON (column 12: Extra data)"]),
        ("a.json", b'{"a": 1,\n2}', ["line 2: not JSON (column 1: Expecting property name enclosed in double quotes)"]),
        (
            "a.json",
            b'{"messages": [1]}',
            [
                "must be a list of objects, got a single object that holds a list, {messages: [1]}. Fix: put [ ] "
                "around the object if it is a row; if its list holds the rows, keep only the list."
            ],
        ),
        ("a.json", b"3", ["must be a list of objects, or one object a line, got 3"]),
        ("a.jsonl", b'{"a": 1, "b": 2, "a": 1}\n', ["line 1: has the key 'a' twice in one object"]),
        ("a.json", b'[{"a": 1},\n{"a": [{"b": 1, "b": 2}]}]', ["row 1: has the key 'b' twice in one object"]),
        ("a.txt", b"one\n\n\xfftwo\n", ["line 3: not UTF-8 text (byte 0 of the document)"]),
    ],
)
def test_what_is_wrong_and_where(tmp_path: Path, name: str, text: bytes, faults: list[str]) -> None:
    (tmp_path / name).write_bytes(text)
    found = faults_of(tmp_path / name)
    more = {  # second faults of the same file
        b'\xff"}]': ["row 2: not UTF-8 text (byte 7 of the row)"],
    }
    assert found == faults + next((rest for end, rest in more.items() if text.endswith(end)), [])


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_utf16_text_is_one_fault_with_what_converts_it(tmp_path: Path, name: str, coding: str) -> None:
    rows = '{"text": "x"}\n{"text": "y"}\n' if "json" in name else "text\nx\ny\n"
    (tmp_path / name).write_bytes(("\ufeff" + rows).encode(coding))
    with pytest.raises(UserError) as error:
        load_source(SourceConfig(source=str(tmp_path / name)))
    [line] = error.value.faults
    assert line.endswith("must be UTF-8 text, got UTF-16. Fix: convert it, such as by iconv -f UTF-16 -t UTF-8.")
    with pytest.raises(UserError, match="must be UTF-8 text"):
        open_shards(SourceConfig(source=str(tmp_path / name), stream=True))


def test_one_object_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n "prompt": "x",\n "completion": "y"\n}\n')
    [example] = load_source(SourceConfig(source=str(tmp_path / "a.json")))
    assert (example.prompt, example.answer) == ("x", "y")


def test_bytes_of_the_byte_order_mark_are_no_mark(tmp_path: Path) -> None:
    letter = "\ufefb"  # in UTF-8 EF BB BB, the mark being EF BB BF
    (tmp_path / "a.txt").write_text(f"one\n{letter}\ntwo\n \ufeff \nthree\n", encoding="utf-8")
    documents = [row["text"] for _, row in read_rows(tmp_path / "a.txt")]
    assert documents == [f"one\n{letter}\ntwo", "three"]
    (tmp_path / "a.jsonl").write_text(f'\ufeff{{"a": 1}}\n{letter}\n', encoding="utf-8")
    assert faults_of(tmp_path / "a.jsonl") == ["line 2: not JSON (column 1: Expecting value)"]
    (tmp_path / "a.json").write_text(f'{letter}[{{"a": 1}}]', encoding="utf-8")
    assert faults_of(tmp_path / "a.json") == ["line 1: not JSON (column 1: Expecting value)"]
    (tmp_path / "a.json").write_text('\ufeff \n[{"a": 1}]', encoding="utf-8")
    assert [row for _, row in read_rows(tmp_path / "a.json")] == [{"a": 1}]


def test_a_quote_inside_a_cell_that_is_not_quoted_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n5" pipe,x\ny,z\n')
    assert [row for _, row in read_rows(tmp_path / "a.csv")] == [{"a": '5" pipe', "b": "x"}, {"a": "y", "b": "z"}]


# Folders and patterns


def touch(folder: Path, *names: str, row: str = '{"text": "x"}\n') -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(row)


def names_of(folder: Path, source: str = "", split: str = "train") -> list[str]:
    return [str(file.relative_to(folder)) for file in files_of(folder / source, split)]


def test_the_files_of_folders(tmp_path: Path) -> None:
    touch(tmp_path, "plain/b.jsonl", "plain/a.jsonl", "plain/more/c.jsonl", "plain/README.md", "plain/.hidden.jsonl")
    assert names_of(tmp_path, "plain") == ["plain/a.jsonl", "plain/b.jsonl", "plain/more/c.jsonl"]
    touch(tmp_path, "split/train-0.csv.gz", "split/train-1.csv.gz", "split/train/x.jsonl", "split/val.jsonl")
    assert names_of(tmp_path, "split") == ["split/train/x.jsonl", "split/train-0.csv.gz", "split/train-1.csv.gz"]
    assert names_of(tmp_path, "split", "val") == ["split/val.jsonl"]
    touch(tmp_path, "clone/data/train-0.parquet", "clone/data/train-1.parquet", "clone/data/test-0.parquet")
    touch(tmp_path, "clone/README.md", "clone/.cache/train.jsonl")
    assert names_of(tmp_path, "clone") == ["clone/data/train-0.parquet", "clone/data/train-1.parquet"]
    assert names_of(tmp_path, "clone", "test") == ["clone/data/test-0.parquet"]
    touch(tmp_path, "tree/data/train/train-0.jsonl", "tree/data/test/test-0.jsonl")
    assert names_of(tmp_path, "tree") == ["tree/data/train/train-0.jsonl"]
    touch(tmp_path, "parts/train_001.jsonl", "parts/train_002.jsonl", "parts/more.jsonl")
    assert names_of(tmp_path, "parts") == ["parts/more.jsonl", "parts/train_001.jsonl", "parts/train_002.jsonl"]
    touch(tmp_path, "own/train.jsonl", "own/old/validation.jsonl", "own/backup/validation.jsonl")
    assert not has_split(SourceConfig(source=str(tmp_path / "own")), "validation")  # old files decide nothing
    touch(tmp_path, "clone/data/validation-0.parquet")
    assert has_split(SourceConfig(source=str(tmp_path / "clone")), "validation")
    for names, message in (
        (["mixed/a.jsonl", "mixed/b.csv"], r"mixed: holds files of several kinds \(.csv, .jsonl\), .* mixed/\*.csv."),
        (
            ["held/test.jsonl", "held/more.jsonl"],
            r"no file for split 'train', looked for train.\*, train-\* and .*more",
        ),
        (["deep/Validation/a.jsonl", "deep/b.jsonl"], r"no file for split 'train'.*there are Validation, a, b"),
        (
            ["named/squad_train.jsonl", "named/b.jsonl", "named/squad_test.jsonl"],
            r"there are squad_test, b, squad_train. Fix: name the files .*, such as .*named/squad_train.jsonl\.$",
        ),
        (["more/my.test.jsonl"], r"there are my.test. Fix: name the files that are meant\.$"),
        (["shards/data/test.v2.jsonl", "shards/a.jsonl"], "there are test.v2, a, data"),
        (
            ["configs/one/train-0.jsonl", "configs/two/train-0.jsonl"],
            "configs: one, two each hold split 'train'. Fix: ",
        ),
        (["none/README.md"], "there is no data file at all"),
    ):
        touch(tmp_path, *names)
        with pytest.raises(UserError, match=message.replace(" mixed", f" {tmp_path}/mixed")):
            names_of(tmp_path, names[0].partition("/")[0])


def test_the_files_of_a_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "b.jsonl", "c.txt", "deep/d.jsonl", "[x].jsonl", "note.xyz")
    assert names_of(tmp_path, "*.jsonl") == ["[x].jsonl", "a.jsonl", "b.jsonl"]
    assert names_of(tmp_path, "**/[a-d].jsonl") == ["a.jsonl", "b.jsonl", "deep/d.jsonl"]
    assert names_of(tmp_path, "[x].jsonl") == ["[x].jsonl"]  # a file of this name comes before the pattern
    with pytest.raises(UserError, match=r"\*.xyz: no data file matches, allowed endings: .parquet, .jsonl, "):
        names_of(tmp_path, "*.xyz")


@pytest.mark.parametrize(
    "source, label",
    [
        ("/d/chat.jsonl", "chat"),
        ("/d/chats/*.jsonl", "chats"),
        ("/d/chats/**/*.jsonl.gz", "chats"),
        ("/d/wiki-*.csv", "wiki"),
        ("/d/[ab].csv", "d"),
        ("org/name", "name"),
    ],
)
def test_the_name_of_a_source(source: str, label: str) -> None:
    assert SourceConfig(source=source).label == label


def test_a_fault_in_one_of_several_files_names_it(tmp_path: Path) -> None:
    touch(tmp_path, "rows/a.jsonl", row='{"text": "x"}\n' * 30)
    touch(tmp_path, "rows/b.jsonl", row='{"text": "y"}\n\n{"text": 3}\n')
    with pytest.raises(UserError) as error:
        load_source(SourceConfig(source=str(tmp_path / "rows")))
    assert error.value.faults == (f"{tmp_path}/rows/b.jsonl: line 3: text: must be text that is not empty, got 3",)
    touch(tmp_path, "rows/b.jsonl", row='{"text": "y"}\n')
    examples = load_source(SourceConfig(source=f"{tmp_path}/rows/*.jsonl"))
    assert [each.id for each in examples[-2:]] == ["a.jsonl: line 30", "b.jsonl: line 1"]
    rows = rows_of_split(tmp_path / "rows", "train")
    before = rows.identity
    assert rows.num_rows == 31
    touch(tmp_path, "rows/b.jsonl", row='{"text": "z"}\n')
    assert rows_of_split(tmp_path / "rows", "train").identity != before


def test_validation_beside_folders_and_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "train-0.jsonl", "train-1.jsonl", "validation-0.jsonl", row='{"text": "x"}\n' * 20)
    for source, sizes in ((str(tmp_path), (40, 20)), (f"{tmp_path}/train-*.jsonl", (36, 4))):
        config = SourceConfig(source=source)
        found = train_and_validation(config, DataConfig(mix=(config,), validation_fraction=0.1))
        assert tuple(map(len, found)) == sizes
    pattern = SourceConfig(source=f"{tmp_path}/train-*.jsonl", validation="validation")
    with pytest.raises(UserError, match=r"validation 'validation': .* has no splits. Fix: name a file."):
        train_and_validation(pattern, DataConfig(mix=(pattern,)))


def test_a_faulty_row_of_a_streamed_csv_file_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv.gz"
    file.write_bytes(gzip.compress(b'text\n"a\nb"\nx,y\n"c"\n'))
    config = SourceConfig(source=str(file), stream=True)
    data = DataConfig(mix=(config,), max_length=99)
    [stream] = tokenized_mix(type("", (), {"data": data}), tiny_tokenizer.make(), read_data(data)[0]).sets
    found = {tiny_tokenizer.make().decode(stream.next().input_ids) for _ in range(2)}
    assert found == {"a\nb<|im_end|>", "c<|im_end|>"}
    stream.next()
    assert stream.position.bad_rows == (f"{file}: line 4: has 2 cells, the first line names 1 columns",)
    assert open_shards(config).num_rows is None


def test_a_limit_reads_few_rows_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    monkeypatch.setattr(
        file_records, "_cells", lambda *given, cells=file_records._cells: parsed.append(1) or cells(*given)
    )
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"row {number}\n" for number in range(5000)))
    config = SourceConfig(source=str(tmp_path / "a.csv"), limit=10)
    train, _ = train_and_validation(config, DataConfig(mix=(config,), validation_fraction=0.0, seed=3))
    drawn = np.sort(np.random.default_rng([3, 5000]).permutation(5000)[:10])
    assert [each.answer for each in train] == [f"row {number}" for number in drawn]
    assert len(parsed) == 10 + 64 + 1  # those, the first rows for their columns, and the header
