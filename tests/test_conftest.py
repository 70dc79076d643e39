"""Tests run without the machine's GPUs unless `-m gpu` asks for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

SEES = """
import os
import pytest

@pytest.mark.gpu
def test_sees():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"

def test_sees_none():
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["HIP_VISIBLE_DEVICES"]) == ("", "")
"""


@pytest.mark.parametrize(
    "expression, asks",
    [
        ("", False),
        ("not gpu", False),
        ("not slow and not gpu and not network", False),
        ("not (gpu or network)", False),
        ("slow", False),
        ("not slow", False),
        ("gpu", True),
        ("gpu and not slow", True),
        ("slow and gpu", True),
    ],
)
def test_only_a_selection_by_the_mark_asks_for_gpus(expression: str, asks: bool) -> None:
    assert conftest.asks_for_gpu(expression) == asks


@pytest.mark.slow
@pytest.mark.parametrize("expression", ["gpu", "not gpu"])
def test_workers_of_xdist_see_what_their_session_sees(tmp_path: Path, expression: str) -> None:
    shutil.copy(conftest.__file__, tmp_path / "conftest.py")
    (tmp_path / "test_it.py").write_text(SEES)
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-n", "1", "-m", expression, str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout
