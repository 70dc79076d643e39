"""The shape of the code: imports point down, files and functions stay short, nothing happens at import."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qdora"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file may import its own layer and those below it. Files of the package's root that everyone may use stand last.
LAYERS = [
    {"cli"},
    {"verbs"},
    {"study"},
    {"train", "evaluation", "analysis"},
    {"memory"},
    {"model", "doctor"},
    {"nn", "data"},
    {"ops"},
]
COMMON = {
    "access_tokens",
    "atomic_files",
    "checkpoint_files",
    "command",
    "config",
    "data_config",
    "disk_errors",
    "environment",
    "errors",
    "gate_config",
    "prune_config",
    "recipe_faults",
    "recipe_file",
    "record",
    "section",
    "sizes",
    "train_config",
}


def layer_of(part: str) -> int:
    """0 for the top; the common files are below everything."""
    if part in COMMON:
        return len(LAYERS)
    return next(index for index, names in enumerate(LAYERS) if part in names)


def imported_parts(file: Path) -> set[str]:
    """First parts of the qdora modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "qdora" else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("qdora.")}
    return found - {"__version__"}


def test_there_are_files() -> None:
    assert len(FILES) > 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        assert not imported_parts(file)
        return
    for other in imported_parts(file):
        assert layer_of(other) > layer_of(part) or other == part or {other, part} <= COMMON, (
            f"{file.relative_to(PACKAGE)} imports qdora.{other}, which is not below it"
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{file.name}:{node.lineno} {node.name}"


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
