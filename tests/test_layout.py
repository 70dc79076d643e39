"""The shape of the code: imports point down, files and functions stay short, nothing happens at import."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "qdora"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import itself and the rooms below it. Rooms on one line do not import each other.
ROOMS = [
    ("cli",),
    ("study", "export"),
    ("run",),
    ("plan",),
    ("train", "evaluation", "analysis"),
    ("memory",),
    ("model", "peft"),
    ("nn", "data"),
    ("ops",),
    ("recipe",),
    ("files",),
    ("errors",),
]
MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 130
MOST_POSITIONAL_ARGUMENTS = 7


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def test_imports_point_down() -> None:
    assert len(FILES) > 40
    offenders = []
    for file in FILES:
        for name in imported_modules(ast.parse(file.read_text())):
            imported = name.split(".")[1]
            if file == PACKAGE / "__init__.py":
                offenders.append(f"qdora/__init__.py imports {name}")
            elif imported != room_of(file) and level_of(imported) <= level_of(room_of(file)):
                offenders.append(f"{file.relative_to(PACKAGE)} imports {name}, which is not below it")
    assert not offenders, "\n".join(offenders)


def test_no_import_cycles() -> None:
    modules = {".".join(("qdora", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in FILES}
    graph = {}
    for module, file in modules.items():
        names = imported_modules(ast.parse(file.read_text()))
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & set(modules)
    assert any(graph.values())
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_files_and_functions_are_short() -> None:
    offenders = []
    for file in FILES:
        text = file.read_text()
        if len(text.splitlines()) > MOST_LINES_OF_A_FILE:
            offenders.append(f"{file.relative_to(PACKAGE)}: {len(text.splitlines())} lines")
        offenders += [
            f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MOST_LINES_OF_A_FUNCTION
        ]
    assert not offenders, "\n".join(offenders)


def called_name(call: ast.Call) -> str:
    """The last part of a called name. That of `partial(function, ...)` is its function's."""
    called = call.args[0] if ast.unparse(call.func).endswith("partial") else call.func
    return ast.unparse(called).rpartition(".")[2]


def test_calls_of_our_functions_have_few_positional_arguments() -> None:
    """torch fixes the arguments of an autograd function's `apply` and of an operator."""
    trees = {file: ast.parse(file.read_text()) for file in FILES}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    defined = [node for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    own = {node.name for node in defined} - {"apply"}
    every = [(file, node) for file, node in nodes if isinstance(node, ast.Call) and called_name(node) in own]
    calls = [(file, call) for file, call in every if not ast.unparse(call.func).startswith("torch.ops.")]
    assert len(calls) > 1000
    offenders = [
        f"{file.relative_to(PACKAGE)}:{call.lineno} {called_name(call)}"
        for file, call in calls
        if len(call.args) - ast.unparse(call.func).endswith("partial") > MOST_POSITIONAL_ARGUMENTS
    ]
    assert not offenders, "\n".join(offenders)


def test_no_pickle_is_ever_read() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                called = f"{getattr(node.value, 'id', '')}.{node.attr}"
                assert called not in ("torch.load", "torch.save", "pickle.load", "pickle.loads"), f"{file}: {called}"


def test_help_starts_fast_and_without_torch() -> None:
    began = time.perf_counter()
    code = """
import sys
sys.argv = ["qdora", "--help"]
import qdora.cli
try:
    qdora.cli.main()
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.rstrip().endswith("False")
    assert "train" in done.stdout
    assert time.perf_counter() - began < 20  # a busy machine; it takes 0.1 s on an idle one
