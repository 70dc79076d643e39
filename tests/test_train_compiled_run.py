"""Whole runs with train.compile: killed, resumed, evaluated and exported like others."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.errors import Interrupted, UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.run import prepare
from qdora.run.train import train_run
from qdora.train import compiled_blocks
from tests import tiny_run
from tests.run_files import assert_same_run, stop_after, trained
from tests.test_train_compiled_blocks import needs_masks


@needs_masks
def test_an_interrupted_and_resumed_run_is_the_uncompiled_one_bit_for_bit(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own kernels, which the graph of a block calls as the block does."""
    monkeypatch.setattr(prepare, "missing_compiler", lambda _: None)
    monkeypatch.setattr(compiled_blocks, "BACKEND", "eager")
    recipe = tiny_run.recipe(root, train__compile=True)
    with monkeypatch.context() as stopped:
        stop_after(stopped, 3)
        with pytest.raises(Interrupted):
            train_run(recipe, tmp_path / "run")
    ran: list[Any] = []
    real = compiled_blocks.CompiledBlock._run
    monkeypatch.setattr(
        compiled_blocks.CompiledBlock, "_run", lambda *given, **named: ran.append(1) or real(*given, **named)
    )
    train_run(recipe, tmp_path / "run", resume=True)
    assert len(ran) >= 2 * 3  # blocks and steps
    assert_same_run(tmp_path / "run", whole)
    assert export_run(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="float32"))["verification"]["passed"]


def test_a_machine_without_a_compiler_is_told_before_anything_is_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    missing = compiled_blocks.missing_compiler(torch.device("cpu"))
    assert missing == "a C++ compiler. Fix: install g++, or set the variable CXX"
    with pytest.raises(UserError, match=r"train\.compile: must be false without a C\+\+ compiler\. Fix: install g\+\+"):
        train_run(tiny_run.recipe(root, train__compile=True), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_gpu_without_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    missing = compiled_blocks.missing_compiler(torch.device("cuda"))
    assert missing == "Triton for its GPU. Fix: pip install triton"


def test_compiling_nothing_that_trains_is_refused(root: Path) -> None:
    bare: dict[str, Any] = {f"adapter__{name}": ... for name in ("rank", "alpha", "dropout")}
    with pytest.raises(UserError, match=r"train\.compile: must be false with adapter\.kind none"):
        tiny_run.recipe(root, **bare, adapter__kind="none", train__steps=0, train__compile=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a compiler for C++ runs
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler for CPUs needs one for C++")
def test_the_losses_of_generated_code_are_those_of_an_uncompiled_run(
    root: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """float32: generated code sums in another order, and six steps of Adam enlarge that."""
    caplog.set_level(logging.WARNING, logger="qdora")
    train_run(tiny_run.recipe(root, train__compile=True), tmp_path / "run")
    found, expected = ([line["loss"] for line in trained(run)] for run in (tmp_path / "run", whole))
    assert len(found) == 6
    assert [each for each in caplog.records if "not compiled" in each.getMessage()] == []
    assert found != expected
    assert found == pytest.approx(expected, rel=1e-4)
