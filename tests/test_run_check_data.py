"""qdora validate finds faulty rows and long examples where the data is on this machine, before a run starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qdora.cli import app
from qdora.errors import UserError
from qdora.recipe.recipe_file import load_recipe, resolved_yaml
from qdora.run.train import train_run
from tests import tiny_run


def written(tmp_path: Path, **changes: Any) -> Path:
    """A file with a recipe of `tiny_run`, whose data is written, too."""
    file = tmp_path / "r.yaml"
    file.write_text(resolved_yaml(tiny_run.recipe(tmp_path, **changes)))
    return file


def validate(file: Path) -> Result:
    return CliRunner().invoke(app, ["validate", str(file)])


def test_long_examples_of_all_sources_are_found_as_a_run_finds_them(tmp_path: Path) -> None:
    found = validate(written(tmp_path, data__max_length=8))
    assert found.exit_code == 2
    assert found.stdout == ""
    with pytest.raises(UserError) as error:
        train_run(tiny_run.recipe(tmp_path, data__max_length=8), tmp_path / "run")
    assert [fault.split(": ")[:2] for fault in error.value.faults] == [
        ["data.mix[0]", "sums"],
        ["data.mix[1]", "letters"],
    ]
    assert found.stderr.splitlines() == list(error.value.faults)
    assert all("data.too_long to truncate (cuts " in fault for fault in error.value.faults)
    assert validate(written(tmp_path)).exit_code == 0  # at its own length all fit


def test_sources_on_the_hub_are_left_out_and_keep_their_number(tmp_path: Path) -> None:
    _, letters = tiny_run.write_data(tmp_path / "data")
    mix = [{"source": "nobody/nothing"}, {"task": "demo/facts"}, {"source": str(letters)}]
    found = validate(written(tmp_path, data__max_length=8, data__mix=mix))
    assert [line.partition(":")[0] for line in found.stderr.splitlines()] == ["data.mix[2]"]


@pytest.mark.parametrize("too_long, code", [("truncate", 0), ("drop", 0), ("error", 2)])
def test_only_too_long_error_reads_more_than_the_first_rows(tmp_path: Path, too_long: str, code: int) -> None:
    file = written(tmp_path, data__too_long=too_long, data__validation_fraction=0.01)
    rows = [json.dumps({"prompt": "1 + 1 =", "completion": " 2"})] * 200
    (tmp_path / "data/sums.jsonl").write_text("\n".join([*rows[:100], "not json", *rows[100:]]))
    assert validate(file).exit_code == code


@pytest.mark.parametrize("verb", ["validate", "preview", "plan", "train"])
def test_a_quantised_model_that_cannot_be_read_is_refused_before_the_data_is_read(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, data__too_long="truncate")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    monkeypatch.setattr("qdora.data.build_data.tokenize_all", lambda *_, **__: pytest.fail("tokenised"))
    found = CliRunner().invoke(app, [verb, str(file), *(["-d", str(tmp_path / "run")] if verb == "train" else [])])
    assert found.exit_code == 2
    [line] = found.stderr.splitlines()[-1:]
    assert "model.source: the checkpoint must be quantised by bitsandbytes or in mxfp4, if at all (got 'awq')" in line


def not_json(lines: list[str]) -> list[str]:
    return [line + "}" if index % 4 == 0 else line for index, line in enumerate(lines)]


def other_columns(lines: list[str]) -> list[str]:
    return [line.replace("completion", "reply") for line in lines]


def other_content(lines: list[str]) -> list[str]:
    return [line.replace('": " ', '": 1, "x": "') for line in lines]


@pytest.mark.parametrize("change", [not_json, other_columns, other_content])
@pytest.mark.parametrize("too_long", ["truncate", "error"])
def test_faulty_rows_are_told_as_a_run_tells_them(
    tmp_path: Path, change: Callable[[list[str]], list[str]], too_long: str
) -> None:
    file = written(tmp_path, data__too_long=too_long, data__validation_fraction=0.2)
    sums = tmp_path / "data/sums.jsonl"
    sums.write_text("\n".join(change(sums.read_text().splitlines())))
    found = validate(file)
    with pytest.raises(UserError) as error:
        train_run(load_recipe(file), tmp_path / "run")
    assert found.exit_code == 2
    assert found.stderr.splitlines() == list(error.value.faults)


@pytest.mark.parametrize("change", [other_columns, other_content])
def test_the_first_rows_of_a_stream_are_checked_without_a_tokenizer(
    tmp_path: Path, change: Callable[[list[str]], list[str]]
) -> None:
    sums, _ = tiny_run.write_data(tmp_path / "data")
    mix = [{"source": str(sums), "stream": True}]
    changes: dict[str, Any] = {"data__mix": mix, "model__source": "nobody/nothing", "data__too_long": "truncate"}
    file = written(tmp_path, **changes)
    assert validate(file).exit_code == 0
    sums.write_text("\n".join(change(sums.read_text().splitlines())))
    found = validate(file)
    assert found.exit_code == 2
    assert found.stderr.startswith("data.mix[0]: ")
    assert str(sums) in found.stderr


def test_without_a_tokenizer_a_note_says_that_lengths_are_not_checked(tmp_path: Path) -> None:
    found = validate(written(tmp_path, data__max_length=8, model__source="nobody/nothing"))
    assert found.exit_code == 0
    assert "max_length: 8" in found.stdout
    assert (
        "lengths of the examples are not checked: there is no tokenizer: model.source: nobody/nothing:" in found.stderr
    )
