"""The shape of the code: imports point down, files and functions stay short, nothing happens at import.

And of the tests: they run without the machine's GPUs unless `-m gpu` asks for them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from tests import conftest

PACKAGE = Path(__file__).parent.parent / "qdora"

# A room may import itself and the rooms below it. Rooms on one line do not import each other.
ROOMS = [
    ("cli",), ("study",), ("export", "rank"), ("run",), ("plan",), ("train",), ("evaluate",), ("memory", "prune"),
    ("model", "peft"), ("data",), ("adapter",), ("quant",), ("recipe",), ("files",), ("errors",),
]  # fmt: skip
MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 130
MOST_POSITIONAL_ARGUMENTS = 7


@cache
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def nodes() -> list[tuple[Path, ast.AST]]:
    return [(file, node) for file, tree in trees().items() for node in ast.walk(tree)]


def level_of(room: str) -> int:
    """0 for the top. A room that is not in ROOMS raises StopIteration."""
    return next(level for level, rooms in enumerate(ROOMS) if room in rooms)


def imported_modules(tree: ast.AST) -> set[str]:
    """The modules of qdora, and the names in them, that a syntax tree imports anywhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("qdora.")} - {"qdora.__version__"}


def test_imports_point_down_without_cycles() -> None:
    assert len(trees()) > 40
    modules = {".".join(("qdora", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in trees()}
    offenders, graph = [], {}
    for module, file in modules.items():
        names, room = imported_modules(trees()[file]), file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & set(modules)
        for name in names:
            imported = name.split(".")[1]
            if room == "__init__" or (imported != room and level_of(imported) <= level_of(room)):
                offenders.append(f"{file.relative_to(PACKAGE)} imports {name}, which is not below it")
    assert not offenders, "\n".join(offenders)
    assert any(graph.values())
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_files_and_functions_are_short() -> None:
    lengths = {file: len(file.read_text().splitlines()) for file in trees()}
    assert not {file: length for file, length in lengths.items() if length > MOST_LINES_OF_A_FILE}
    functions = [(file, node) for file, node in nodes() if isinstance(node, ast.FunctionDef)]
    long = [(file, f) for file, f in functions if (f.end_lineno or 0) - f.lineno >= MOST_LINES_OF_A_FUNCTION]
    assert not [f"{file.relative_to(PACKAGE)}:{function.lineno} {function.name}" for file, function in long]


def test_calls_of_our_functions_have_few_positional_arguments() -> None:
    """torch fixes the arguments of an autograd function's `apply` and of an operator."""
    own = {node.name for _, node in nodes() if isinstance(node, ast.FunctionDef | ast.ClassDef)} - {"apply"}
    calls = [(file, node) for file, node in nodes() if isinstance(node, ast.Call)]
    calls = [(file, call) for file, call in calls if ast.unparse(call.func).rpartition(".")[2] in own]
    calls = [(file, call) for file, call in calls if not ast.unparse(call.func).startswith("torch.ops.")]
    assert len(calls) > 1000
    long = [(file, call) for file, call in calls if len(call.args) > MOST_POSITIONAL_ARGUMENTS]
    assert not [f"{file.relative_to(PACKAGE)}:{call.lineno}" for file, call in long]


def test_no_pickle_is_ever_read() -> None:
    for file, node in nodes():
        if isinstance(node, ast.Attribute):
            called = f"{getattr(node.value, 'id', '')}.{node.attr}"
            assert called not in ("torch.load", "torch.save", "pickle.load", "pickle.loads"), f"{file}: {called}"


def test_help_and_recipes_start_without_torch() -> None:
    code = """
import sys
sys.argv = ["qdora", "--help"]
import qdora.cli, qdora.files.run_directory, qdora.recipe.recipe_file, qdora.run.doctor
qdora.recipe.recipe_file.load_recipe("quickstart")
try:
    qdora.cli.main()
finally:
    print([name for name in ("torch", "transformers", "bitsandbytes", "datasets", "numpy") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    assert done.stdout.rstrip().endswith("[]")
    assert "train" in done.stdout


def test_what_the_scripts_import_exists() -> None:
    text = "\n".join(script.read_text() for script in (PACKAGE.parent / "scripts").iterdir())
    imports = re.findall(r"from qdora\S* import \w+", text)
    assert imports
    exec("\n".join(imports), {})


def test_only_a_selection_by_the_mark_asks_for_gpus() -> None:
    for expression in ("gpu", "gpu and not slow", "slow and gpu"):
        assert conftest.asks_for_gpu(expression)
    for expression in ("", "not gpu", "not slow and not gpu and not network", "not (gpu or network)", "slow"):
        assert not conftest.asks_for_gpu(expression)
