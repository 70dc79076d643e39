"""Mutated data files of every format: what the reader gives must be refused, or be the rows that were written.

Every row has a marker of its own, so that each row that the mutation did not touch can be looked for in the result. A
row that was touched must come back as it was written (`wanted`), or be refused; only where the format has no check sum
(a flipped bit inside a text, a file cut between two lines) may it differ without a word, which is counted apart. A
streamed source may also leave touched rows out, as data.max_bad_rows says.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from hostile.judge import Case, Judged
from hostile.material import Material
from qdora.data.build_data import read_data, tokenized_mix
from qdora.data.example import Example
from qdora.data.stream import ExampleStream
from qdora.recipe.recipe_file import recipe_from

PART = "data"
LAYOUTS = ("completion", "choices", "messages", "text", "commonsense170k")
TEXT_FILES = (".txt", ".md")
FORMS = [(".jsonl", False), (".jsonl", True), (".json", False), (".parquet", False), (".parquet", True)]
FORMS += [(ending, False) for ending in TEXT_FILES]
LONG_LINE = 50 << 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Damaged:
    """A mutated file.

    `touched` are the rows that may differ; `wanted` says what a touched row must be if it is read, and the others must
    be refused unless `silent`: then the format cannot show it. `same`: all must be as without the mutation. `added` is
    how many rows may be new.
    """

    what: str
    content: bytes
    touched: frozenset[int] = frozenset()
    wanted: Mapping[int, Row] = field(default_factory=dict)
    silent: bool = False
    same: bool = False
    added: int = 0


@dataclass(frozen=True)
class Made:
    """An unmutated file: its rows, and how it is read."""

    layout: str
    ending: str
    streamed: bool
    rows: list[Row]

    @property
    def content(self) -> bytes:
        """The file."""
        return _written(self.ending, self.rows)


def cases(seed: int, count: int, material: Material) -> Iterator[Case]:
    """`count` seeded cases over all formats of files and layouts of rows."""
    tokenizer = AutoTokenizer.from_pretrained(str(material.model))
    for number in range(count):
        rng = random.Random(f"{PART} {seed} {number}")
        ending, streamed = rng.choice(FORMS)
        layout = "text" if ending in TEXT_FILES else rng.choice(LAYOUTS)
        made = Made(layout, ending, streamed, [_row(layout, index) for index in range(rng.choice([3, 12, 40]))])
        damaged = rng.choice(_OPERATORS[ending])(rng, made)
        yield Case(
            part=PART,
            number=number,
            what=f"{layout}{ending}{' streamed' if streamed else ''}: {damaged.what}",
            write=partial(_write, damaged, made, material, tokenizer),
            read=partial(_read, made, material, tokenizer),
            judge=partial(_judge, damaged, made),
            may_refuse=not damaged.same,
        )


def _row(layout: str, index: int) -> Row:
    mark = f"row-{index:03d}-end"
    if layout == "completion":
        return {"prompt": f"Say {mark}:", "completion": f" {mark} is said", "n": index}
    if layout == "choices":
        return {"question": f"Which is {mark}?", "choices": [f"a {mark}", f"b {mark}"], "answer": index % 2}
    if layout == "messages":
        turns = [("user", f"Say {mark}"), ("assistant", f"It is {mark}.")]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    if layout == "text":
        return {"text": f"A document, {mark}, and its second sentence."}
    return {"instruction": f"Name {mark}.", "input": "", "output": f"The name is {mark}.", "answer": ""}


def _written(ending: str, rows: list[Row]) -> bytes:
    if ending == ".parquet":
        sink = BytesIO()
        # Two groups of rows, and check sums of the pages, which other writers (Hub data sets, polars) add, too.
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=-(-len(rows) // 2), write_page_checksum=True)
        return sink.getvalue()
    if ending == ".json":
        return json.dumps(rows).encode()
    if ending in TEXT_FILES:
        return "\n\n".join(row["text"] for row in rows).encode() + b"\n"
    return b"".join(_line(row) for row in rows)


def _line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


_LONG = b"LONG_TEXT"  # becomes 50 MB when it is written


def _write(damaged: Damaged, made: Made, material: Material, tokenizer: Any, folder: Path) -> int:
    """Write the file, and beside it what its rows must come to, read from a plain file of JSON lines."""
    path = folder / f"data{made.ending}"
    with path.open("wb") as file:
        first, mark, rest = damaged.content.partition(_LONG)
        file.write(first)
        if mark:
            for _ in range(LONG_LINE >> 20):
                file.write(b"many words " * ((1 << 20) // 11))
        file.write(rest)
    (folder / "plain").mkdir()
    wanted = [damaged.wanted.get(index, row) for index, row in enumerate(made.rows)]
    (folder / "plain" / "data.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in wanted))
    plain = replace(made, ending=".jsonl", streamed=False)
    expected = _keys(plain, made.streamed, material, tokenizer, folder / "plain")
    (folder / "expected.json").write_text(json.dumps(expected))
    return path.stat().st_size


def _read(made: Made, material: Material, tokenizer: Any, folder: Path) -> Any:
    """Read and tokenise the source as a run does; of a stream one whole pass."""
    found = _keys(made, made.streamed, material, tokenizer, folder)
    return {"found": found, "expected": json.loads((folder / "expected.json").read_text())}


def _keys(made: Made, decoded: bool, material: Material, tokenizer: Any, folder: Path) -> list[str]:
    """A hash of each example: of all that it holds, or of its tokens, `decoded`."""
    source: Row = {"source": str(folder / f"data{made.ending}"), "name": "hostile", "format": made.layout}
    data: Row = {"mix": [source], "max_length": 4096, "too_long": "truncate"}
    if made.streamed:
        source |= {"stream": True, "size": len(made.rows)}
    else:
        data["validation_fraction"] = 0.0
    train = {"steps": 1, "lr": 1e-3, "batch": 1}
    recipe = recipe_from({"model": {"source": str(material.model)}, "data": data, "train": train})
    examples, _ = read_data(recipe.data)
    (part,) = tokenized_mix(recipe, tokenizer, examples).sets
    if not isinstance(part, ExampleStream):
        tokens = {each.id: tokenizer.decode(each.input_ids) for each in part.examples} if decoded else {}
        # Too long to leave a token to learn: no example, and no other text has this key.
        return [_key(tokens.get(each.id, "dropped") if decoded else _content(each)) for each in examples[0]]
    found: list[str] = []
    while len(found) <= 10 * len(made.rows) + 100:
        example = part.next()
        if part.position.epoch > 0:
            break
        found.append(_key(tokenizer.decode(example.input_ids)))
    return found


def _content(example: Example) -> str:
    ends = [text if len(text) < 10**6 else text[:1000] + text[-1000:] for text in (example.prompt, example.answer)]
    return repr((ends, example.choices, example.gold, example.messages))


def _key(text: str) -> str:
    return hashlib.sha1(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def _judge(damaged: Damaged, made: Made, value: Any) -> Judged:
    found, expected = value["found"], value["expected"]
    if len(expected) != len(made.rows):
        raise RuntimeError(f"{damaged.what}: the plain file gives {len(expected)} of {len(made.rows)} rows")
    untouched = [expected[index] for index in range(len(expected)) if index not in damaged.touched]
    lost = Counter(untouched) - Counter(found)
    if lost:
        return "fault", f"{sum(lost.values())} rows that were not touched are lost or changed ({len(found)} found)"
    if not made.streamed and [key for key in found if key in set(untouched)] != untouched:
        return "fault", "the rows come in another order"
    more = Counter(found) - Counter(untouched)
    if sum(more.values()) > len(damaged.touched) + damaged.added:
        return "fault", f"{sum(more.values())} rows that were never written"
    wrong = more - Counter(expected[index] for index in damaged.wanted)
    missing = [index for index in damaged.touched if expected[index] not in found]
    if damaged.same or damaged.added or not (wrong or missing):
        return ("fault", "changed rows") if damaged.same and (wrong or missing) else ("right", f"{len(found)} rows")
    if damaged.silent:
        return "undetectable", f"{len(found)} rows, {len(missing)} of them lost or changed"
    if made.streamed and not wrong:
        return "right", f"left out {len(missing)} bad rows"
    return "fault", f"rows {sorted(damaged.touched)[:5]} are read as something else without a word"


def _touched_in(made: Made, content: bytes, start: int, stop: int) -> frozenset[int]:
    """The rows whose markers or lines lie in a range of bytes of a text file."""
    ends = [content.find(f"row-{index:03d}-end".encode()) for index in range(len(made.rows))]
    starts = [max(content.rfind(b"\n", 0, end), content.rfind(b"}, {", 0, end)) for end in ends]
    borders = [*starts[1:], len(content)]
    hit = {index for index, (low, high) in enumerate(zip(starts, borders, strict=True)) if low < stop and start <= high}
    return frozenset(hit)


Operator = Callable[[random.Random, Made], Damaged]


def _cut(rng: random.Random, made: Made) -> Damaged:
    """The end is missing."""
    content = made.content
    place = rng.randrange(1, len(content))
    if made.ending in (".jsonl", *TEXT_FILES):
        lines = rng.random() < 0.3
        place = content.rfind(b"\n", 0, place) + 1 if lines else place
        # A cut between two lines, or inside a plain text, leaves a whole file.
        silent = made.ending in TEXT_FILES or content[:place].endswith(b"\n") or content[place : place + 1] == b"\n"
        return Damaged(
            f"cut at byte {place}", content[:place], _touched_in(made, content, place, len(content)), silent=silent
        )
    return Damaged(f"cut at byte {place}", content[:place], frozenset(range(len(made.rows))))


def _flips(rng: random.Random, made: Made) -> Damaged:
    """Flipped bits. A Parquet file has check sums of its pages; in a text they may hit a letter."""
    content = bytearray(made.content)
    if made.ending == ".parquet":
        place = rng.randrange(4, len(content))
        content[place] ^= 1 << rng.randrange(8)
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        # The footer has no check sum: column names, statistics and the schema's metadata may change in it.
        # Elsewhere the rows are refused, or as they were written: the bit may lie in statistics, which are not read.
        return Damaged(
            f"bit flipped at byte {place}",
            bytes(content),
            frozenset(range(len(made.rows))),
            wanted=dict(enumerate(made.rows)),
            silent=place >= footer,
        )
    hit: frozenset[int] = frozenset()
    plain = bytes(content)
    for _ in range(rng.choice([1, 1, 4])):
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        hit |= _touched_in(made, plain, place - 1, place + 2)
    return Damaged("flipped bits", bytes(content), hit, silent=True, added=len(hit))


def _splice(rng: random.Random, made: Made) -> Damaged:
    """Bytes that no text has, inside a row."""
    content = made.content
    index = rng.randrange(len(made.rows))
    place = content.find(f"row-{index:03d}-end".encode()) + 4
    added = rng.choice(
        [b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"\x1a", b"\x1b[2J", b"\x7f"]
    )
    broken = content[:place] + added + content[place:]
    fine = made.ending in TEXT_FILES and max(added) < 0x80  # in JSON a control character must be escaped
    fine = fine or added == b"\x7f"
    return Damaged(f"{added!r} in row {index}", broken, frozenset([index]), silent=fine)


def _encoding(rng: random.Random, made: Made) -> Damaged:
    """The whole file in another encoding, or packed."""
    choice = rng.choice(["utf-16", "utf-32", "utf-16-be", "cp037", "gzip", "latin-1", "bom"])
    everything = frozenset(range(len(made.rows)))
    if choice == "gzip":
        return Damaged("gzip under this ending", gzip.compress(made.content, mtime=0), everything)
    if choice == "bom":
        return Damaged("a byte order mark", b"\xef\xbb\xbf" + made.content, same=True)
    if choice == "latin-1":
        index = rng.randrange(len(made.rows))
        mark = f"row-{index:03d}-end".encode()
        return Damaged(
            f"latin-1 in row {index}", made.content.replace(mark, mark + b"\xe9t\xe9", 1), frozenset([index])
        )
    return Damaged(f"written as {choice}", made.content.decode().encode(choice), everything)


def _spelling(rng: random.Random, made: Made) -> Damaged:
    """Changes that leave the meaning as it is."""
    choice = rng.randrange(4)
    if choice == 0 and made.ending != ".json":
        return Damaged("CRLF", made.content.replace(b"\n", b"\r\n"), same=True)
    if choice == 1:
        return Damaged("blank lines at the end", made.content + b"\n \n\t\n\r\n", same=True)
    if choice == 2 and made.ending == ".json":
        return Damaged("indented", json.dumps(made.rows, indent=4).encode(), same=True)
    if choice == 3 and made.ending in (".json", ".jsonl"):
        rows = [dict(sorted(row.items(), reverse=True)) for row in made.rows]
        if made.ending == ".json":
            return Damaged("columns in another order", json.dumps(rows).encode(), same=True)
        return Damaged("columns in another order", b"".join(map(_line, rows)), same=True)
    return Damaged("blank lines at the beginning", b"\n\n  \n" + made.content, same=True)


def _whole(rng: random.Random, made: Made) -> Damaged:
    """Another thing than a data file."""
    content = rng.choice([b"", b"\n\n", b"\0" * 1000, b"PAR1", b"PAR1PAR1", b"null", b"3", b"[]", b"{}",
                          b"[[]]", b"[1, 2]", b'""',
                          b"[" * 100_000, b'{"a":' * 100_000, b"{}\n{}\n", b'{"data": []}', b"\xff" * 64, b"9" * 10_000,
                          b'[{"text": NaN}]', b"\x89PNG\r\n\x1a\n",
                          b"<html><body>Not found</body></html>"])  # fmt: skip
    silent = made.ending in TEXT_FILES  # any text is a document
    return Damaged(
        f"only {content[:20]!r}", content, frozenset(range(len(made.rows))), silent=silent, added=2 if silent else 0
    )


def _long_line(rng: random.Random, made: Made) -> Damaged:
    """A row of 50 MB."""
    index = rng.randrange(len(made.rows))
    mark = f"row-{index:03d}-end".encode()
    return Damaged(f"row {index} has 50 MB", made.content.replace(mark, _LONG, 1), frozenset([index]), silent=True)


_NO_TEXT: list[Any] = [None, 5, 1.5, True, [], {}, "", "   \n", ["a"], {"a": "b"}, float("nan"), 10**30]
_NO_CHOICES: list[Any] = [None, [], ["a"], "ab", [1, 2], [None, "b"], ["a", ""], {}, [["a"], ["b"]], 3]
_NO_ANSWER: list[Any] = [None, -1, 99, "0", 0.0, True, [], 10**30, "a"]
_NO_CHAT: list[Any] = [None, [], "text", {}, [{}], [{"role": "user", "content": "a"}], [{"role": "assistant"}], 7,
                       [{"role": "robot", "content": "a"}], [{"role": "assistant", "content": None}], [None], [[]],
                       [{"role": "assistant", "content": [["a"]]}], [{"role": 3, "content": "a"}],
                       [{"role": "assistant", "content": "  "}]]  # fmt: skip
_ODD_TEXTS = ["a\0b", "\u2028\u2029", "\u202e", "e\u0301\ufeff", "\U0001f600" * 40, "\x1b[0m", "\x85\x0b\x0c",
              "<|im_end|>", "{{ 7 * 7 }}",
              "{% raw %}", "%s %n {0}", "a" * 20_000, "\ud800", "\udfff\ud800", "\uffff"]  # fmt: skip


def _text_column(layout: str) -> str:
    return {"completion": "completion", "choices": "question", "text": "text", "messages": "messages"}.get(
        layout, "output"
    )


def _field(rng: random.Random, made: Made) -> Damaged:
    """One row has something else in a column."""
    index = rng.randrange(len(made.rows))
    row = dict(made.rows[index])
    column = _text_column(made.layout)
    values = _NO_CHAT if made.layout == "messages" else _NO_TEXT
    if made.layout == "choices" and rng.random() < 0.6:
        column, values = rng.choice([("choices", _NO_CHOICES), ("answer", _NO_ANSWER)])
    row[column] = rng.choice(values)
    return _with_row(made, index, row, f"row {index}: {column} = {row[column]!r}"[:80])


def _odd_text(rng: random.Random, made: Made) -> Damaged:
    """One row has unusual text, which must come through as it is; half a surrogate pair is no text."""
    index, odd = rng.randrange(len(made.rows)), rng.choice(_ODD_TEXTS)
    row = json.loads(json.dumps(made.rows[index]).replace("-end", "-end HERE tail"))
    row = json.loads(json.dumps(row).replace("HERE", json.dumps(odd)[1:-1]))
    fine = not any(0xD800 <= ord(letter) < 0xE000 for letter in odd)
    return _with_row(made, index, row, f"row {index}: text {odd[:20]!r}", wanted={index: row} if fine else {})


def _shape(rng: random.Random, made: Made) -> Damaged:
    """One row lacks a column, has a wrong name for it, has another column more, or is no object."""
    index, column = rng.randrange(len(made.rows)), _text_column(made.layout)
    row: Any = dict(made.rows[index])
    choice = rng.randrange(5)
    if choice == 0:
        del row[column]
        return _with_row(made, index, row, f"row {index} without {column}")
    if choice == 1:
        row[f"{column}s"] = row.pop(column)
        return _with_row(made, index, row, f"row {index}: {column} misspelt")
    if choice == 2:
        row["more"] = rng.choice([None, 3, {"a": [1]}, "x", [], 10**25])
        return _with_row(made, index, row, f"row {index}: a column more", wanted={index: row})
    other = rng.choice([None, 3, "text", [], [row], True, {}])
    return _with_row(made, index, other, f"row {index} is {str(other)[:20]!r}")


def _with_row(made: Made, index: int, row: Any, what: str, wanted: Mapping[int, Row] | None = None) -> Damaged:
    rows: list[Any] = [*made.rows[:index], row, *made.rows[index + 1 :]]
    content = (
        json.dumps(rows).encode()
        if made.ending == ".json"
        else b"".join(json.dumps(each).encode() + b"\n" for each in rows)
    )
    return Damaged(what, content, frozenset([index]), wanted=wanted or {})


def _raw_line(rng: random.Random, made: Made) -> Damaged:
    """One line is no JSON, or JSON that readers stumble over."""
    index = rng.randrange(len(made.rows))
    line = rng.choice([b"{", b"}", b"[", b"not json", b"{'a': 1}", b'{"a": 1,}', b"NaN",
                       b'{"a": ' + b"9" * 5000 + b"}", b"-", b"[" * 5000,
                       b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"a": "\\u12"}', b'{"a": "\t"}',
                       b"\xef\xbb\xbf", b"\xfe\xff", b"//",
                       b'{"a": 1e999}', b"null null"])  # fmt: skip
    lines = [_line(row) for row in made.rows]
    lines[index] = line + b"\n"
    content = b"".join(lines)
    if made.ending == ".json":
        content = b"[" + b", ".join(each.strip() for each in lines) + b"]"
    blank = line == b"\xef\xbb\xbf"  # a byte order mark alone is a blank line
    return Damaged(f"row {index} is {line[:20]!r}", content, frozenset([index]), silent=blank)


def _column_types(rng: random.Random, made: Made) -> Damaged:
    """A Parquet file whose columns have another type, or nulls."""
    column = _text_column(made.layout)
    touched, what = (
        frozenset(range(len(made.rows))),
        rng.choice(["int", "null", "some null", "binary", "list", "struct", "missing"]),
    )
    rows = [dict(row) for row in made.rows]
    for index, row in enumerate(rows):
        value = {"int": index, "null": None, "binary": b"\xff\x00", "list": ["a"], "struct": {"a": "b"}}.get(what)
        if what == "some null":
            value = None if index == 0 else row[column]
        row[column] = value
        if what == "missing":
            del row[column]
    if what == "some null":
        touched = frozenset([0])
    sink = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return Damaged(f"{column} is {what}", sink.getvalue(), touched)


def _no_rows(rng: random.Random, made: Made) -> Damaged:
    """A Parquet file without rows, or without columns."""
    table = pa.Table.from_pylist(made.rows)
    sink = BytesIO()
    pq.write_table(table.slice(0, 0) if rng.random() < 0.5 else table.select([]), sink)
    return Damaged("no rows or no columns", sink.getvalue(), frozenset(range(len(made.rows))))


def _footer(rng: random.Random, made: Made) -> Damaged:
    """A Parquet file whose footer claims another length, or is random."""
    content = made.content
    length = int.from_bytes(content[-8:-4], "little")
    choice = rng.randrange(4)
    everything = frozenset(range(len(made.rows)))
    if choice == 0:
        claimed = rng.choice([0, 1, length - 1, length + 1, 2**31 - 1, 2**31, 2**32 - 1])
        return Damaged(
            f"a footer of {claimed} bytes", content[:-8] + claimed.to_bytes(4, "little") + b"PAR1", everything
        )
    start = len(content) - 8 - length
    if choice == 1:
        return Damaged("a random footer", content[:start] + rng.randbytes(length) + content[-8:], everything)
    footer = bytearray(content[start:-8])
    for _ in range(rng.choice([1, 2, 8])):
        footer[rng.randrange(length)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return Damaged("bytes of the footer", content[:start] + bytes(footer) + content[-8:], everything, silent=True)


_BYTES: list[Operator] = [_cut, _flips, _splice, _encoding, _spelling, _whole]
_ROWS: list[Operator] = [_field, _field, _odd_text, _odd_text, _shape, _raw_line]
_OPERATORS: dict[str, list[Operator]] = {
    ".jsonl": [*_BYTES, *_ROWS] * 3 + [_long_line],
    ".json": [*_BYTES, *_ROWS] * 3 + [_long_line],
    ".parquet": [_cut, _flips, _flips, _whole, _column_types, _no_rows, _footer, _footer],
    ".txt": _BYTES * 3 + [_long_line],
    ".md": _BYTES * 3 + [_long_line],
}
