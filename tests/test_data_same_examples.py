"""The same 50 examples in every layout and every kind of file are the same token ids and the same masks."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from qdora.data.build_data import read_data, tokenized_mix
from qdora.data.sources import open_shards
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import TokenizedSet
from qdora.recipe.data_settings import DataConfig
from tests import tiny_tokenizer

TOKENIZER = tiny_tokenizer.make()
EOS = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
ASKED = [f'Line {number}:\n"what, is\t{number}"? é\u2028' for number in range(50)]
GIVEN = [f'the "{number}" cat,\nand ; the dög' for number in range(50)]
SYSTEM = [f"Answer {number}, briefly." for number in range(50)]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)

Rows = list[dict[str, Any]]
Tokens = list[tuple[list[int], list[bool]]]
THREE = list(zip(SYSTEM, ASKED, GIVEN, strict=True))
CHAT = [[("system", s), ("user", a), ("assistant", g)] for s, a, g in THREE]
MESSAGES: Rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in CHAT]
CHATS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "messages": (MESSAGES, {}),
    "sharegpt": (
        [
            {
                "conversations": [
                    {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text}
                    for role, text in turns
                ]
            }
            for turns in CHAT
        ],
        {},
    ),
    "sharegpt with a system column": (
        [
            {"system": s, "conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": g}]}
            for s, a, g in THREE
        ],
        {},
    ),
    "prompt and completion as turns": (
        [{"prompt": row["messages"][:2], "completion": row["messages"][2:]} for row in MESSAGES],
        {},
    ),
    "renamed": ([{"dialog": row["messages"]} for row in MESSAGES], {"columns": {"messages": "dialog"}}),
    "messages as JSON": ([{"messages": json.dumps(row["messages"])} for row in MESSAGES], {}),
}
PAIRS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "completion": ([{"prompt": ALPACA.format(a.strip()), "completion": g} for _, a, g in THREE], {}),
    "alpaca": ([{"instruction": a, "input": "", "output": g} for _, a, g in THREE], {}),
    "renamed alpaca": (
        [{"question": a, "answer": g} for _, a, g in THREE],
        {"columns": {"instruction": "question", "output": "answer"}},
    ),
    "template": (
        [{"q": {"text": a}, "a": g} for _, a, g in THREE],
        {"template": {"prompt": ALPACA.format("{{ q.text | trim }}"), "completion": "{{ a }}"}},
    ),
}
CASES = [(name, *case) for cases in (CHATS, PAIRS) for name, case in cases.items()]


def encoded(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def expected(name: str) -> Tokens:
    """Written out, not by the code under test: the turns of ChatML and the Alpaca prompt, in pieces."""
    found = []
    for system, asked, given in THREE:
        if name in CHATS:
            before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n"
            start, answer, after = encoded(before + "<|im_start|>assistant\n"), [*encoded(given), EOS], encoded("\n")
        else:
            start, answer, after = encoded(ALPACA.format(asked.strip())), [*encoded(given), EOS], []
        # the template's line end behind the end mark belongs to the turn
        found.append((start + answer + after, [False] * len(start) + [True] * len(answer + after)))
    return found


def content(suffix: str, rows: Rows) -> bytes:
    """The rows as a file of this ending."""
    plain = Path(suffix).stem
    if suffix.endswith(".gz"):
        return gzip.compress(content(plain, rows))
    if suffix.endswith(".zst"):
        return bytes(pa.compress(content(plain, rows), codec="zstd", asbytes=True))
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    if suffix == ".parquet":
        file = io.BytesIO()
        pd.DataFrame(rows).to_parquet(file)
        return file.getvalue()
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter={".csv": ",", ".tsv": "\t"}[suffix])
    writer.writerow(rows[0])
    writer.writerows([each if isinstance(each, str) else json.dumps(each) for each in row.values()] for row in rows)
    return text.getvalue().encode()


def settings(source: Any, **options: Any) -> DataConfig:
    data = {"mix": [{"source": str(source)} | options], "max_length": 999, "cache": "off"}
    uncut = {} if {"stream", "validation"} & options.keys() else {"validation_fraction": 0.0}
    return DataConfig.model_validate(data | uncut)


def tokens(data: DataConfig) -> Tokens:
    recipe: Any = SimpleNamespace(data=data)
    [found] = tokenized_mix(recipe, TOKENIZER, read_data(data)[0]).sets
    assert isinstance(found, TokenizedSet)
    return [(each.input_ids.tolist(), each.loss_mask.tolist()) for each in found.examples]


@pytest.mark.parametrize("name, rows, options", CASES, ids=[case[0] for case in CASES])
def test_every_layout(tmp_path: Path, name: str, rows: Rows, options: dict[str, Any]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content(".jsonl", rows))
    assert tokens(settings(file, **options)) == expected(name)


SUFFIXES = [".jsonl", ".json", ".parquet", ".csv", ".tsv", ".jsonl.gz", ".jsonl.zst", ".csv.gz", ".tsv.zst", ".json.gz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["messages", "completion", "alpaca"])
def test_every_file(tmp_path: Path, suffix: str, name: str) -> None:
    rows = {**CHATS, **PAIRS}[name][0]
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(content(suffix, rows))
    wanted = expected(name)
    data = settings(file)
    assert tokens(data) == wanted
    streamed = settings(file, stream=True)
    stream = ExampleStream(open_shards(streamed.mix[0]), streamed, 0, TOKENIZER)
    found = [stream.next() for _ in range(50)]  # a pass, shuffled
    assert stream.position.num_bad == stream.position.epoch == 0
    assert sorted((each.input_ids.tolist(), each.loss_mask.tolist()) for each in found) == sorted(wanted)


@pytest.mark.parametrize("place", ["", "*.jsonl.gz", "**/*.jsonl.gz"])
def test_folders_and_patterns(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "chats"
    for number in range(3):
        file = folder / ("" if place != "**/*.jsonl.gz" else f"part{number}") / f"rows-{number}.jsonl.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(".jsonl.gz", MESSAGES[20 * number : 20 * number + 20]))
    (folder / "README.md").write_text("# about")
    assert tokens(settings(folder / place)) == expected("messages")


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself, on a folder in the Hub's place that declares two configurations."""
    configs = "".join(f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in ("main", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    (tmp_path / "main.jsonl").write_bytes(content(".jsonl", MESSAGES))
    (tmp_path / "other.jsonl").write_bytes(content(".jsonl", MESSAGES[:3]))
    load, cache = datasets.load_dataset, tmp_path / "cache"

    def local(source: str, **options: Any) -> Any:
        assert source == "org/name"
        return load(str(tmp_path), cache_dir=str(cache), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    hub = {"validation": str(tmp_path / "other.jsonl")}
    assert tokens(settings("org/name", config="main", **hub)) == expected("messages")
    assert tokens(settings("org/name", config="other", **hub)) == expected("messages")[:3]
    assert tokens(settings("org/name", config="main", data_files="main.jsonl", **hub)) == expected("messages")
    with pytest.raises(
        ValueError, match=r"^data.mix\[0\]: org/name: .*'main', 'other'.*Fix: name one of these as config"
    ):
        tokens(settings("org/name", **hub))
