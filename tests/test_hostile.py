"""Damaged recipes, data files and stored files: each gives one clear line and the right exit code, or the right result.

Never a traceback, never another result without a word. What a format without check sums cannot show is `silent`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qdora.cli.app import explain
from qdora.data.sources import read_data
from qdora.errors import FAILURE, USER_MISTAKE
from qdora.files.atomic import json_text
from qdora.files.run_directory import write_complete
from qdora.model.adapter_file import load_adapter
from qdora.model.load import Quantization, load_model
from qdora.model.source import resolve
from qdora.model.store import BaseCache
from qdora.recipe import recipe_file
from qdora.recipe.recipe_file import load_recipe, recipe_from, resolved_yaml
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from tests import support

QUIET = Console(quiet=True)
SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]
draws = st.sampled_from


def result_of(call: Callable[[], Any], *codes: int) -> Any:
    """What the call returns; None if it is refused with clear lines and one of these exit codes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:
        text, code = explain(error)
        lines = text.split("\n")
        assert code in codes, text
        assert not [words for words in ("--debug shows", "Traceback") if words in text], text
        assert all(line.strip() and len(line) <= 2000 and line.isprintable() for line in lines), text
        assert len(lines) <= 12
        return None


def checked(number: int, inputs: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Call `check` on so many inputs."""
    settings(max_examples=number, deadline=None, derandomize=True, database=None)(given(inputs)(check))()


def places(document: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """(parent, key, dotted path) of every value below the top."""
    is_list = isinstance(document, list)
    for key, child in enumerate(document) if is_list else document.items():
        dotted = f"{path}[{key}]" if is_list else f"{path}.{key}".lstrip(".")
        yield document, key, dotted
        if isinstance(child, dict | list):
            yield from places(child, dotted)


@st.composite
def damaged_bytes(draw: Any, content: bytes) -> bytes:
    """A flipped bit, a missing end, foreign bytes, another encoding or another file."""
    place, bit = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 7))
    foreign = draw(draws([b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"\xe2\x80\xa8", b"\0" * 64]))
    flipped = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
    others = [b"", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 999, content.decode("latin-1").encode("utf-16")]
    spliced = content[:place] + foreign + content[place:]
    return bytes(draw(draws([flipped, flipped, content[:place], spliced, content + content, draw(draws(others))])))


# As YAML source, so that tags and odd spellings reach the parser
VALUES = [
    "null", "true", "no", "''", "[]", "{}", "[[]]", "[null]", "{a: {b: [1]}}", "-1", "0", "-0.0", "1e-320", "1e999",
    "9223372036854775808", "9" * 5000, ".nan", "-.inf", "0x7f", "017", "1_000", "12:30:45", "2024-13-45", "١٢٣", "½",
    '"a\\0b"', '"\\ud800"', '"\\u202e gnp.exe"', '"\\u200b"', '"\\x1b[31mred"', "é" * 3000, "/" * 5000, "/dev/null",
    "../../etc/passwd", "~nobody_at_all/x", ".", "/", "!x 3", "!!int abc", "!!binary '*'", "!!set {a, b}", "!!null 5",
    "!!timestamp x", "!!python/object/apply:os.system [touch escaped]", "https://example.org/x.jsonl", "*nowhere",
    "<<: 3", "&a [*a]", "{&k a: *k}", "? [a, b]", "%x", "`x", "[" * 900 + "]" * 900, "{a: " * 3000 + "}" * 3000,
]  # fmt: skip
NAMES = [None, "", " rank", "RANK", "ranks", "é", 1, 1.5, True, "__class__", "../x", "a" * 5000, "<<", "\ud800"]


def dumped(document: Any, value: str = "") -> bytes:
    text = yaml.safe_dump(document, sort_keys=False, width=10**6).replace("HOLE", value)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def recipes(draw: Any, texts: list[str]) -> tuple[str, bytes, list[str], bool]:
    """A recipe, its changed bytes, overrides, and whether its meaning is unchanged."""
    text = draw(draws(texts))
    document, content = yaml.safe_load(text), text.encode()
    parent, key, dotted = draw(draws(list(places(document))))
    value, way = draw(draws(VALUES)), draw(draws(["value", "value", "override", "name", "bytes", "same"]))
    if way == "same":
        section = draw(draws([name for name, values in document.items() if isinstance(values, dict)]))
        merged = f"{section}:\n  <<: {json.dumps(document.pop(section))}\n".encode()
        whole = yaml.safe_load(text)
        spellings = [dumped(document) + merged, dumped(dict(reversed(whole.items()))), b"\xef\xbb\xbf" + content]
        spellings += [text.replace("\n", "\r\n").encode(), f"\n# é\n{text}\n   \n".encode(), json.dumps(whole).encode()]
        return text, draw(draws(spellings)), [], True
    if way == "bytes":
        return text, draw(damaged_bytes(content)), [], False
    if way == "override":
        forms = [f"{dotted}={value}", f"{dotted}[999999]={value}", f"{dotted}.x={value}", dotted, f"={value}"]
        return text, content, [draw(draws([*forms, f"..{dotted}={value}", f"{value}={value}"]))], False
    if way == "name" and isinstance(parent, dict):
        parent[draw(draws(NAMES))] = parent.pop(key)
        return text, repr(document).encode("utf-8", "surrogatepass"), [], False
    parent[key] = "HOLE"
    return text, dumped(document, value), [], False


@pytest.mark.parametrize("number", [40, pytest.param(1000, marks=SLOW)])
def test_a_changed_recipe_is_refused_or_what_it_says(root: Path, tmp_path: Path, number: int) -> None:
    own = resolved_yaml(support.tiny_recipe(root))
    texts = [own, own, *map(recipe_file.recipe_text, recipe_file.recipe_names())]
    file, other = tmp_path / "recipe.yaml", tmp_path / "other.yaml"

    def read(where: Path, overrides: list[str]) -> Any:
        return json.loads(json_text(recipe_file.settings(load_recipe(where, overrides))))

    def check(case: tuple[str, bytes, list[str], bool]) -> None:
        text, content, overrides, is_same = case
        file.write_bytes(content)
        found = result_of(lambda: read(file, overrides), USER_MISTAKE)
        assert not Path("escaped").exists()
        if is_same:
            other.write_text(text)
            assert found == read(other, [])
        elif found is not None:
            other.write_text(resolved_yaml(load_recipe(file, overrides)))
            assert read(other, []) == found, "the resolved recipe is another one"

    checked(number, recipes(texts), check)


def row(layout: str, index: int) -> dict[str, Any]:
    mark = f"row-{index:03d}-end"
    turns = [{"role": "user", "content": f"Say {mark}"}, {"role": "assistant", "content": f"It is {mark}."}]
    return {
        "completion": {"prompt": f"Say {mark}:", "completion": f" {mark} is said"},
        "choices": {"question": f"Which is {mark}?", "choices": [f"a {mark}", f"b {mark}"], "answer": index % 2},
        "messages": {"messages": turns},
        "text": {"text": f"A document, {mark}, and its second sentence."},
    }[layout]


def written(ending: str, rows: list[Any]) -> bytes:
    if ending == ".parquet":
        sink = BytesIO()  # with check sums of its pages, as data sets of the Hub
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2, write_page_checksum=True)
        return sink.getvalue()
    if ending == ".txt":
        return "\n\n".join(each["text"] for each in rows).encode() + b"\n"
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in rows]
    return b"[" + b", ".join(lines) + b"]" if ending == ".json" else b"\n".join(lines) + b"\n"


NO_TEXT = [None, 5, True, [], {}, "", "   \n", ["a"], {"a": "b"}, float("nan"), 10**30, [{"role": "robot"}], [[]]]
ODD = ["a\0b", "\u2028", "\u202e", "\U0001f600" * 40, "\x1b[0m", "\x85\x0b", "<|im_end|>", "{{ 7 * 7 }}", "\ud800"]
NO_JSON = [b"{", b"not json", b"{'a': 1}", b'{"a": 1,}', b"NaN", b"[" * 5000, b'{"a": "\\u12"}', b'{"a": "\t"}', b"//"]


@st.composite
def data_files(draw: Any) -> tuple[str, str, bytes, list[Any] | None, bool]:
    """(layout, ending, content, the rows if it is read, whether it must be read); None: a format without check sums."""
    ending = draw(draws([".jsonl", ".jsonl", ".json", ".parquet", ".txt"]))
    layout = "text" if ending == ".txt" else draw(draws(["completion", "choices", "messages", "text"]))
    rows: list[Any] = [row(layout, index) for index in range(draw(draws([3, 12])))]
    columns = [name for name in rows[0] if name != "prompt"]  # a prompt may be empty
    index, column, content = draw(st.integers(0, len(rows) - 1)), draw(draws(columns)), written(ending, rows)
    way = draw(draws(["bytes", "value", "gone", "odd", "line", "same"]))
    if way == "same" and ending != ".parquet":
        spellings = [content + b"\n \n\r\n", b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n")]
        return layout, ending, draw(draws(spellings)), rows, True
    if way == "bytes" or ending in (".txt", ".parquet"):
        changed, footer = draw(damaged_bytes(content)), len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        has_sums = ending == ".parquet" and changed[footer:] == content[footer:]
        return layout, ending, changed, rows if has_sums else None, False
    odd, kept = draw(draws(ODD)), {name: value for name, value in rows[index].items() if name != column}
    rows[index] = {
        "value": kept | {column: draw(draws(NO_TEXT))},
        "gone": kept,
        "odd": json.loads(json.dumps(rows[index]).replace("-end", "-end " + json.dumps(odd)[1:-1])),
        "line": draw(draws(NO_JSON)),
    }[way]
    may_be_read = way == "odd" and odd != "\ud800"  # half a surrogate pair is no text
    return layout, ending, written(ending, rows), rows if may_be_read else [], False


@pytest.mark.parametrize("number", [60, pytest.param(600, marks=SLOW)])
def test_a_changed_data_file_is_refused_or_gives_the_rows_that_it_has(tmp_path: Path, number: int) -> None:
    def examples(file: Path, layout: str) -> list[str]:
        mix = [{"source": str(file), "format": layout, "name": "rows"}]
        data = {"mix": mix, "max_length": 4096, "too_long": "truncate", "validation_fraction": 0.0}
        recipe = recipe_from({"model": {"source": str(tmp_path)}, "data": data, "train": {"steps": 1, "batch": 1}})
        (part,) = read_data(recipe.data)[0].values()
        return [repr((each.prompt, each.answer, each.choices, each.gold, each.messages)) for each in part]

    def check(case: tuple[str, str, bytes, list[Any] | None, bool]) -> None:
        layout, ending, content, rows, must_be_read = case
        plain, file = tmp_path / "plain.jsonl", tmp_path / f"data{ending}"
        file.write_bytes(content)
        found = result_of(lambda: examples(file, layout), USER_MISTAKE)
        if rows:
            plain.write_bytes(written(".jsonl", rows))
        if rows is not None:
            expected = examples(plain, layout) if rows else None
            assert found == expected or (found is None and not must_be_read)

    checked(number, data_files(), check)


JSON_VALUES = [
    None, True, 0, -1, 2**31, 2**63, 10**30, 1.5, float("nan"), "", "x", "../x.json", "a\0b", "\ud800", "x" * 10**5,
    [], {}, [[]], [None], {"a": 1}, [1] * 1000, "F64", "F16", "I64", "F8_E4M3", [0], [-1], [10**12], [2**63, 2], ["4"],
    [2**32, 2**32], [0, 0], [-8, 8], [8, 0], [2**63, 2**63 + 8], [1, 5],
]  # fmt: skip


@st.composite
def damaged(draw: Any, file: Path) -> tuple[bytes, bool]:
    """Damage to a stored file; whether a format without check sums cannot show it."""
    content, is_json = file.read_bytes(), file.suffix == ".json"
    start = 0 if is_json else 8 + int.from_bytes(content[:8], "little")
    if draw(draws([True, False, False])):
        changed = draw(damaged_bytes(content))
        return changed, not is_json and changed[:start] == content[:start]
    document = json.loads(content if is_json else content[8:start])
    parent, key, _ = draw(draws(list(places(document))))
    if isinstance(parent, dict) and draw(draws([True, False, False])):
        parent[draw(draws(["../secret", "", "\0", f"{key}\u200b", "a" * 10**5, f"{key}.x"]))] = parent.pop(key)
    else:
        parent[key] = draw(draws(JSON_VALUES))
    text = json.dumps(document).encode("utf-8", "surrogatepass")
    return text if is_json else len(text).to_bytes(8, "little") + text + content[start:], False


def read(kind: str, root: Path, folder: Path) -> Any:
    """Hashes of the tensors that a stored thing gives, as a run reads it."""
    if kind == "checkpoint":  # of a stopped run, which goes on from it
        train_run(support.tiny_recipe(root, train__keep_checkpoints=9), folder, resume=True, console=QUIET)
        return hashlib.sha1((folder / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    nf4 = Quantization("nf4", 64, True, ("lm_head",))
    reader = {"reader": BaseCache(folder, nf4, torch.device("cpu"))} if kind == "cache" else {}
    source = resolve(str(folder if kind == "model" else root / "model"))
    settings_of_load = {"quant": "nf4", "compute_dtype": torch.float32, **reader}
    model: Any = load_run(folder).model if kind == "run" else load_model(source, **settings_of_load)
    if kind == "adapter":
        load_adapter(model, folder)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    flat = {name: each.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for name, each in tensors}
    return {name: hashlib.sha1(each.tobytes()).hexdigest() for name, each in flat.items()}


@pytest.fixture(scope="module")
def stored(root: Path, whole: Path) -> Path:
    """A finished run, its adapter, its model, the model packed, and a run that stopped after step 4."""
    folder = root / "stored"
    for kind, made in {"run": whole, "adapter": whole / "adapter", "model": root / "model"}.items():
        shutil.copytree(made, folder / kind)
    read("cache", root, folder / "cache")
    train_run(support.tiny_recipe(root, train__keep_checkpoints=9), folder / "checkpoint", console=QUIET)
    for name in ("adapter", "checkpoints/step-6"):
        shutil.rmtree(folder / "checkpoint" / name)
    return folder


KINDS = {
    "checkpoint": "checkpoints/step-4/**/*",
    "run": "adapter/*",
    "adapter": "*",
    "model": "model.*",
    "cache": "*/*",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [4, pytest.param(60, marks=SLOW)])
def test_a_damaged_file_is_refused_or_gives_the_same_tensors(
    kind: str, root: Path, stored: Path, tmp_path: Path, number: int
) -> None:
    files = [file for file in sorted((stored / kind).glob(KINDS[kind])) if file.suffix in (".json", ".safetensors")]
    shutil.copytree(stored / kind, tmp_path / "whole")
    expected, copied = read(kind, root, tmp_path / "whole"), tmp_path / "copied"
    codes = (USER_MISTAKE, FAILURE) if kind == "checkpoint" else (USER_MISTAKE,)

    def check(case: tuple[Path, tuple[bytes, bool], bool]) -> None:
        file, (content, is_silent), has_new_sums = case
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(stored / kind, copied)
        (copied / file.relative_to(stored / kind)).write_bytes(content)
        if kind == "checkpoint":
            is_silent = has_new_sums and file.name != "complete.json"  # else the checkpoint before is taken
            if is_silent:
                (copied / "checkpoints/step-4/complete.json").unlink()
                write_complete(copied / "checkpoints/step-4", 4)
        found = result_of(lambda: read(kind, root, copied), *codes)
        assert found is None or is_silent or found == expected

    pairs = draws(files).flatmap(lambda file: st.tuples(st.just(file), damaged(file), st.booleans()))
    checked(number, pairs, check)
