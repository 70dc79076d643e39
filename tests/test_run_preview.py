"""qdora preview: its numbers are those of the data, its pieces those of the chat, and it needs no weights."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from qdora.cli import app
from qdora.recipe.recipe_file import load_recipe, resolved_yaml
from qdora.run import preview as preview_file
from qdora.run.preview import preview
from qdora.run.preview_view import show_preview
from tests import tiny_run, tiny_tokenizer
from tests.page_parser import Page

EVIL = "<script>alert('x')</script>"
CHAT = [
    {"role": "user", "content": "Is the sky blue?"},
    {"role": "assistant", "content": "yes", "train": False},
    {"role": "user", "content": "no\u200b"},
    {"role": "assistant", "content": EVIL},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights and the data of `tiny_run`, beside chats."""
    root = tmp_path_factory.mktemp("preview")
    tiny_run.write_model(root / "model")
    for weights in (root / "model").glob("*.safetensors"):
        weights.unlink()
    return root


def written(root: Path, tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A recipe with one source of these rows."""
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data__mix": [{"source": str(data)}], "data__validation_fraction": 0.0} | changes
    file = tmp_path / "recipe.yaml"
    file.write_text(resolved_yaml(tiny_run.recipe(root, **changes)))
    return file


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["preview", *map(str, arguments)])


def found(*arguments: Any) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


ROWS = [{"prompt": f"{number}:", "completion": " yes" * number} for number in range(1, 31)]


def own_ids(row: dict[str, str]) -> tuple[int, int]:
    """(tokens, tokens in the loss) of a row: an end mark follows the completion."""
    tokenizer = tiny_tokenizer.make()
    prompt, whole = (len(tokenizer(text)["input_ids"]) for text in (row["prompt"], row["prompt"] + row["completion"]))
    return whole + 1, whole + 1 - prompt


def test_the_numbers_are_those_of_the_data(root: Path, tmp_path: Path) -> None:
    [source] = found(written(root, tmp_path, ROWS), "-n", "2")["sources"]
    sizes = [own_ids(row) for row in ROWS]
    lengths = np.array([whole for whole, _ in sizes])
    assert (source["num_rows"], source["num_rows_read"], source["drawn"]) == (30, 30, "all")
    assert source["num_examples"] == 30
    assert source["num_tokens"] == lengths.sum()
    assert source["num_in_loss"] == sum(learnt for _, learnt in sizes)
    assert source["share_in_loss"] == source["num_in_loss"] / source["num_tokens"]
    named = source["lengths"]
    assert (named["shortest"], named["longest"]) == (lengths.min(), lengths.max())
    assert named["median"] == sorted(lengths)[14]
    for bar in source["bars"]:
        assert bar["num_examples"] == ((lengths >= bar["start"]) & (lengths <= bar["end"])).sum()
    assert [example["id"] for example in source["examples"]] == ["1", "2"]
    assert [example["num_tokens"] for example in source["examples"]] == lengths[:2].tolist()


@pytest.mark.parametrize("too_long", ["error", "truncate", "drop"])
def test_what_becomes_of_long_examples(root: Path, tmp_path: Path, too_long: str) -> None:
    lengths = np.array([own_ids(row)[0] for row in ROWS])
    limit = int(np.median(lengths))
    num_long = int((lengths > limit).sum())
    file = written(root, tmp_path, ROWS, data__max_length=limit, data__too_long=too_long)
    shown, document = invoke(file), invoke(file, "--json")
    [source] = json.loads(document.stdout)["sources"]
    assert source["num_too_long"] == num_long > 0
    assert source["lengths"]["longest"] == lengths.max()
    bar = {"start": limit + 1, "end": int(lengths.max()), "num_examples": num_long}
    assert source["bars"][-1] == bar
    assert source["num_examples"] == (30 if too_long == "truncate" else 30 - num_long)
    assert source["num_cut"] == (num_long if too_long == "truncate" else 0)
    assert source["num_dropped"] == (num_long if too_long == "drop" else 0)
    assert f"{num_long} longer than data.max_length" in shown.stdout
    assert f"{limit + 1} to {lengths.max()} (too long)  {num_long}" in " ".join(shown.stdout.split(" "))
    assert shown.exit_code == document.exit_code == (1 if too_long == "error" else 0)
    assert bool(source["faults"]) == (too_long == "error")


def test_nothing_left_is_refused(root: Path, tmp_path: Path) -> None:
    file = written(root, tmp_path, ROWS, data__max_length=2, data__too_long="drop")
    assert invoke(file).exit_code == 1


def test_a_chat_with_a_turn_that_is_not_learnt(root: Path, tmp_path: Path) -> None:
    file = written(root, tmp_path, [{"messages": CHAT, "id": EVIL, "more": 1}])
    [source] = found(file)["sources"]
    [example] = source["examples"]
    pieces = example["pieces"]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CHAT)
    assert "".join(piece["text"] for piece in pieces) == text
    learnt = "".join(piece["text"] for piece in pieces if piece["in_loss"])
    assert learnt.rstrip("\n") == f"{EVIL}<|im_end|>"
    assert {piece["text"] for piece in pieces if piece["is_special"]} == {"<|im_start|>", "<|im_end|>"}
    assert source["unused"] == ["more"]

    shown = invoke(file)
    assert "⟦<│" in shown.stdout
    assert "«<|im_end|>»" in shown.stdout
    assert "\u200b" not in shown.stdout
    assert "\\u200b" in shown.stdout
    assert "not used for training: more." in shown.stdout
    assert "\x1b" not in shown.stdout


def test_an_end_mark_that_does_not_stop_the_model_is_a_warning(root: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<s>{% endfor %}")
    file = written(root, tmp_path, [{"messages": CHAT}], data__chat_template=str(template))
    [source] = found(file)["sources"]
    [note] = [note for note in source["notes"] if "<s>" in note]
    assert note in " ".join(invoke(file).stdout.split())


def test_an_example_of_each_row_is_shown_and_empty_thinking_is_a_warning(root: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    # Like Qwen3: only the last answer keeps its thinking, so that a chat of two answers gives two examples
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "<think>\n{{ m.get('reasoning_content', '') }}\n</think>\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "yes", "reasoning_content": "the cat"},
    ]
    rows = [
        {"messages": turns * 2},
        {"messages": turns},
        {"messages": [turns[0], {**turns[1], "reasoning_content": ""}]},
    ]
    file = written(root, tmp_path, rows, data__chat_template=str(template))
    [source] = found(file, "-n", "2")["sources"]
    assert source["num_examples"] == 4
    assert [example["id"].partition("[")[0] for example in source["examples"]] == ["1", "2"]
    [warning] = source["checks"]
    assert "1 of 4 examples have an empty thinking block in the loss (<think></think>)" in warning
    assert warning in " ".join(invoke(file).stdout.split())


def test_a_page_of_refused_data_says_so(root: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for limit, is_refused in ((96, False), (5, True)):
        result = invoke(written(root, tmp_path, ROWS, data__max_length=limit), "--html", page)
        assert result.stdout.splitlines()[-1] == f"page: {page}"
        for text in (result.stdout, Page(page.read_text(encoding="utf-8")).text):
            assert ("A run with this data is refused." in text) == is_refused


def test_colours_on_a_terminal_stand_for_the_marks(root: Path, tmp_path: Path) -> None:
    file = written(root, tmp_path, ROWS)
    facts = preview(tiny_run.recipe(root, data__mix=[{"source": str(tmp_path / "own.jsonl")}]), str(file), 1)
    screen = StringIO()
    show_preview(facts, Console(file=screen, force_terminal=True, color_system="standard", width=80))
    assert "\x1b[4;32m yes\x1b[0m" in screen.getvalue()
    assert "⟦" not in screen.getvalue()


def test_sentences_are_wrapped_between_words_on_a_terminal_alone(root: Path, tmp_path: Path) -> None:
    file = written(root, tmp_path, [row | {"more_of_it": 1} for row in ROWS])
    facts = preview(load_recipe(file), str(file), 0)
    [piped] = [line for line in invoke(file, "-n", "0").stdout.splitlines() if "tokens of an example" in line]
    assert piped.startswith("  tokens")
    screen = StringIO()
    show_preview(facts, Console(file=screen, force_terminal=True, color_system=None, width=40))
    wrapped = screen.getvalue()
    assert max(len(line) for line in wrapped.splitlines()) <= 40
    for sentence in (piped.strip(), "! not used for training: more_of_it."):
        assert sentence in " ".join(wrapped.split())


def test_the_page_loads_nothing_and_escapes_everything(root: Path, tmp_path: Path) -> None:
    page = tmp_path / "new/page.html"
    document = found(written(root, tmp_path, [{"messages": CHAT, "id": EVIL}]), "--html", page)
    parsed = Page(page.read_text(encoding="utf-8"))
    assert not parsed.faults
    assert not parsed.loads
    assert "script" not in parsed.tags
    [source] = document["sources"]
    [tokens], [example] = parsed.tokens, source["examples"]
    assert [each[1:] for each in tokens] == [(each["in_loss"], each["is_special"]) for each in example["pieces"]]
    assert f"example {EVIL}: {example['num_in_loss']} of {example['num_tokens']} tokens in the loss" in parsed.text
    [bar] = source["bars"]
    assert parsed.table("tokens", "examples")[0][:2] == [str(bar["start"]), "1"]


def test_large_sources_are_sampled_and_streams_begin(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_file, "_MOST_ROWS", 10)
    file = written(root, tmp_path, ROWS)
    [source] = found(file)["sources"]
    assert (source["num_rows"], source["num_rows_read"], source["drawn"]) == (30, 10, "sample")
    assert "a sample of 10 of 30 rows" in invoke(file).stdout

    own = tmp_path / "own.jsonl"
    own.write_text("not json\n" + own.read_text())
    mix = [{"source": str(own), "stream": True}]
    file.write_text(resolved_yaml(tiny_run.recipe(root, data__mix=mix, data__too_long="truncate")))
    [source] = found(file)["sources"]
    assert (source["num_rows_read"], source["num_examples"], source["drawn"]) == (31, 30, "first")
    assert source["num_tokens"] == sum(own_ids(row)[0] for row in ROWS)
    assert source["lengths"]["longest"] == own_ids(ROWS[-1])[0]
    assert len(source["faults"]) == 1
    assert "(skipped)" in invoke(file).stdout


def test_long_texts_end_the_reading(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_file, "_MOST_CHARACTERS", 1)
    rows = [{"text": "a " * 600_000}] * 3
    [source] = found(written(root, tmp_path, rows, data__too_long="truncate"), "-n", "0")["sources"]
    assert (source["num_rows_read"], source["drawn"], source["examples"]) == (2, "sample", [])


def test_mistakes_are_one_line_each(root: Path, tmp_path: Path) -> None:
    unknown = invoke("quickstrt")
    assert (unknown.exit_code, len(unknown.stderr.splitlines())) == (2, 1)
    file = written(root, tmp_path, [{"prompt": 1}, {"messages": "no"}])
    faulty = invoke(file, "--json")
    assert (faulty.exit_code, faulty.stdout) == (2, "")
    assert all(line.startswith("data.mix[0]: ") for line in faulty.stderr.splitlines())


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.integers(2, 2000))
def test_every_length_is_in_one_bar(lengths: list[int], max_length: int) -> None:
    bars = preview_file._histogram(lengths, max_length)
    assert sum(bar.num_examples for bar in bars) == len(lengths)
    assert len(bars) <= 11
    for bar in bars:
        assert bar.start <= bar.end
        assert (bar.end <= max_length) != (bar.start > max_length)
        assert bar.num_examples == sum(bar.start <= length <= bar.end for length in lengths)
