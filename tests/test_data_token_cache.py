"""Tokenised sources on disk: read instead of made, and never in place of other data."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qdora.data import build_data, token_cache
from qdora.data.build_data import read_data, tokenized_mix
from qdora.data.chat_template import set_chat_date
from qdora.data.tokenize import TokenizedSet
from qdora.recipe.data_settings import DataConfig
from tests import tiny_tokenizer

DATED = "{{ strftime_now('%d %b %Y') }}" + tiny_tokenizer.CHATML


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_LEAST_TOKENS", 1)


def write(folder: Path, kind: str = "pairs", num_rows: int = 40) -> Path:
    file = folder / f"{kind}.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat"}]
    rows: list[dict[str, Any]] = [{"messages": turns, "topic": "f"}] * num_rows
    if kind == "pairs":
        rows = [{"prompt": f"{n}:", "completion": " yes" * (1 + n % 9), "task": f"t{n % 2}"} for n in range(num_rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def made(file: Path, cache: Path, tokenizer: Any = None, **data: Any) -> TokenizedSet:
    """The tokens of a source of a recipe; `source` has more of its settings."""
    source = {"source": str(file)} | data.pop("source", {})
    settings = DataConfig.model_validate({"mix": [source], "cache": str(cache)} | data)
    recipe: Any = SimpleNamespace(data=settings)
    [found] = tokenized_mix(recipe, tokenizer or tiny_tokenizer.make(), read_data(settings)[0]).sets
    assert isinstance(found, TokenizedSet)
    return found


def plain(file: Path, **data: Any) -> TokenizedSet:
    """The same without a cache."""
    return made(file, Path("off"), **data)


def same(one: TokenizedSet, two: TokenizedSet) -> bool:
    facts = [
        [(each.task, each.id, each.input_ids.tolist(), each.loss_mask.tolist()) for each in found.examples]
        + [found.name, found.num_truncated, found.num_dropped, found.unused]
        for found in (one, two)
    ]
    return bool(facts[0] == facts[1])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sources that were tokenised."""
    names: list[str] = []
    tokenize_all = build_data.tokenize_all

    def counting(*args: Any, **options: Any) -> TokenizedSet:
        names.append(options["name"])
        return tokenize_all(*args, **options)

    monkeypatch.setattr(build_data, "tokenize_all", counting)
    return names


@pytest.mark.parametrize("kind", ["pairs", "chats"])
def test_a_second_start_reads_the_same_tokens(tmp_path: Path, counted: list[str], kind: str) -> None:
    file, cache = write(tmp_path, kind), tmp_path / "cache"
    options: dict[str, Any] = {"max_length": 12, "too_long": "truncate"} if kind == "pairs" else {}
    first = plain(file, **options)
    assert not cache.exists()
    assert [same(first, made(file, cache, **options)) for _ in range(3)] == [True] * 3
    assert len(counted) == 2
    assert first.unused == (("topic",) if kind == "chats" else ())
    assert len(list(cache.iterdir())) == 1


def test_whatever_decides_the_tokens_makes_them_anew(tmp_path: Path, counted: list[str]) -> None:
    file, cache = write(tmp_path), tmp_path / "cache"
    ways: list[dict[str, Any]] = [
        {},
        {"max_length": 100},
        {"loss_on": "all"},
        {"too_long": "drop"},
        {"validation_fraction": 0.2},
        {"source": {"limit": 9}},
        {"source": {"limit": 9}, "seed": 1},
        {"source": {"name": "x"}},
        {"source": {"columns": {"prompt": "completion", "completion": "prompt"}}},
        {"source": {"chat": True}},
        {"source": {"template": {"prompt": "{{ prompt }}", "completion": "{{ completion }}"}}},
        {"source": {"template": {"prompt": "{{ prompt }}?", "completion": "{{ completion }}"}}},
        {
            "source": {"template": {"prompt": "", "completion": "{{ completion }}"}},
            "too_long": "split",
            "max_length": 4,
        },
        {"tokenizer": tiny_tokenizer.make(bos=True)},
    ]
    for number, way in enumerate(ways, start=1):
        first, second = made(file, cache, **way), made(file, cache, **way)
        assert same(first, second)
        assert len(counted) == number, way
    text = file.read_text()
    before = made(file, cache)
    file.write_text(text.replace("yes", "the"))
    assert not same(before, made(file, cache))
    num_made = len(counted)
    made(file, cache, seed=3)  # decides nothing without a limit
    assert len(counted) == num_made


def test_the_date_counts_only_for_templates_that_print_it(tmp_path: Path, counted: list[str]) -> None:
    file, cache = write(tmp_path, "chats"), tmp_path / "cache"
    for template, number in ((tiny_tokenizer.CHATML, 1), (DATED, 3)):
        for day in ("2024-01-31", "2024-02-01", "2024-02-01"):
            tokenizer = tiny_tokenizer.make(chat_template=template)
            set_chat_date(tokenizer, day)
            made(file, cache, tokenizer)
        assert len(counted) == number


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no tensors"])
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, counted: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file, cache = write(tmp_path), tmp_path / "cache"
    first = made(file, cache)
    [kept] = cache.iterdir()
    content = bytearray(kept.read_bytes())
    content[-100] ^= 4
    empty = (2).to_bytes(8, "little") + b"{}"
    kept.write_bytes({"cut": content[:-7], "flipped": content, "empty": b"", "no tensors": empty}[damage])
    assert same(first, made(file, cache))
    assert same(first, made(file, cache))
    assert len(counted) == 2
    assert [line for line in caplog.messages if "is damaged" in line and "made anew" in line]


def test_a_disk_that_takes_nothing_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path)
    (tmp_path / "a file").write_text("")
    assert same(made(file, tmp_path / "a file"), plain(file))
    assert "the tokens of pairs cannot be kept" in caplog.text


def test_small_sources_are_not_kept_and_old_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = write(tmp_path), tmp_path / "cache"
    made(file, cache, max_length=99)
    made(file, cache)
    old, young = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    month = 31 * 24 * 3600
    foreign = [cache / name for name in ("model-00001.safetensors", "model.safetensors.index.json", "notes.txt")]
    for path in foreign:
        path.touch()
    for path in (old, young, *foreign):
        os.utime(path, (time.time() - month, time.time() - month))
    made(file, cache)  # used again
    made(file, cache, max_length=98)
    assert (young.exists(), old.exists()) == (True, False)
    assert all(path.exists() for path in foreign)
    monkeypatch.setattr(token_cache, "_LEAST_TOKENS", 10**6)
    made(file, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _start(file: Path, cache: Path) -> None:
    token_cache._LEAST_TOKENS = 1
    for length in range(40, 60):
        made(file, cache, max_length=length)


def test_two_processes_at_once(tmp_path: Path) -> None:
    file, cache = write(tmp_path), tmp_path / "cache"
    both = [multiprocessing.get_context("fork").Process(target=_start, args=(file, cache)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(cache.iterdir())) == 20
    assert same(made(file, cache, max_length=50), plain(file, max_length=50))
