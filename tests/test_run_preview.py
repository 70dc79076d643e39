"""qdora preview: its numbers are those of the data, its pieces those of the chat, and it needs no weights."""

from __future__ import annotations

import json
import unicodedata
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
from qdora.recipe.recipe_file import resolved_yaml
from qdora.run import preview as preview_file
from qdora.run.preview import preview, show_preview, visible
from tests import tiny_run, tiny_tokenizer

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
    named = source["lengths"]
    assert (named["shortest"], named["longest"]) == (lengths.min(), lengths.max())
    assert named["median"] == sorted(lengths)[14]
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
    assert source["num_examples"] == (30 if too_long == "truncate" else 30 - num_long)
    assert source["num_cut"] == (num_long if too_long == "truncate" else 0)
    assert source["num_dropped"] == (num_long if too_long == "drop" else 0)
    assert f"{num_long} longer than data.max_length" in shown.stdout
    assert ("A run with this data is refused." in shown.stdout) == (too_long == "error")
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
    assert source["warnings"][-1] == "not used for training: more."

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
    note = next(text for text in source["warnings"] if "<s>" in text and "the model may not stop" in text)
    assert note in " ".join(invoke(file).stdout.split())


def test_an_example_of_each_row_is_shown(root: Path, tmp_path: Path) -> None:
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
    rows = [{"messages": turns * 2}, {"messages": turns}]
    file = written(root, tmp_path, rows, data__chat_template=str(template))
    [source] = found(file, "-n", "2")["sources"]
    assert source["num_examples"] == 3
    assert [example["id"].partition("[")[0] for example in source["examples"]] == ["1", "2"]


def test_colours_on_a_terminal_stand_for_the_marks(root: Path, tmp_path: Path) -> None:
    file = written(root, tmp_path, ROWS)
    facts = preview(tiny_run.recipe(root, data__mix=[{"source": str(tmp_path / "own.jsonl")}]), str(file), 1)
    screen = StringIO()
    show_preview(facts, Console(file=screen, force_terminal=True, color_system="standard", width=80))
    assert "\x1b[4;32m yes\x1b[0m" in screen.getvalue()
    assert "⟦" not in screen.getvalue()


def test_large_sources_are_sampled_and_streams_begin(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_file, "_MOST_ROWS", 10)
    file = written(root, tmp_path, ROWS)
    [source] = found(file)["sources"]
    assert (source["num_rows"], source["num_rows_read"], source["drawn"]) == (30, 10, "sample")
    assert "sample rows: 10 of 30; " in invoke(file).stdout

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


@given(st.text())
def test_no_character_of_a_visible_text_hides(text: str) -> None:
    for character in visible(text):
        assert character in " \n\t" or unicodedata.category(character)[0] not in "CZ"
    assert visible(text).count("⏎\n") >= text.count("\n")


def test_what_hides_is_escaped_and_the_rest_stays() -> None:
    assert visible("a b\n\té") == "a b⏎\n⇥\té"
    assert visible("\u202eabc\u200b\x00\ud800\U000e0001\xa0") == "\\u202eabc\\u200b\\x00\\ud800\\U000e0001\\xa0"
