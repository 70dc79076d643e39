"""What the driver says of a GPU, and why torch cannot use one; the verbs that refuse are in test_cli.py."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qdora.errors import UserError
from qdora.files import nvidia_driver
from qdora.files.nvidia_driver import check_gpu, device_attribute, driver_version, unused_gpu
from qdora.model.build_model import choose_compute
from qdora.train.flat_group import can_page
from tests import fake_driver


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root directory of a machine with a GPU, driver 535 and a torch for CUDA 13 that sees nothing."""
    root = fake_driver.files(tmp_path, "535.104.05")
    monkeypatch.setattr(nvidia_driver, "ROOT", root)
    monkeypatch.setenv("PATH", str(root / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    return root


def nvidia_smi(root: Path, text: str, code: int = 0) -> None:
    (root / "bin").mkdir()
    (root / "bin/nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    (root / "bin/nvidia-smi").chmod(0o755)


def uninitialised() -> None:
    raise RuntimeError("Error 802: system not yet initialized\nmore")


def build_without_cuda(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)


def old_driver(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def older_cuda(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  515.43.04  Release Build\n"
    (root / "proc/driver/nvidia/version").write_text(text)


def wsl2(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "dev/nvidia0").unlink()
    (root / "proc/driver/nvidia/version").unlink()
    nvidia_smi(root, "576.02")


def no_permission(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may open everything


def failed_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.init", uninitialised)


@pytest.mark.parametrize(
    "case, words",
    [
        (build_without_cuda, (torch.__version__, "without CUDA", "another build of torch")),
        (old_driver, ("CUDA 13.0", "580 or newer", "535.104.05", "install a newer driver")),
        (older_cuda, ("CUDA 12.8", "525 or newer", "515.43.04")),
        (wsl2, ("CUDA 13.0", "580 or newer", "576.02")),
        (no_permission, ("permission", "dev/nvidia0")),
        (failed_start, ("Error 802: system not yet initialized",)),
    ],
)
def test_a_gpu_without_use_is_refused_with_its_cause(
    case: Any, words: tuple[str, ...], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case(machine, monkeypatch)
    with pytest.raises(UserError) as error:
        choose_compute("float32")
    for each in (*words, "Fix: ", "CUDA_VISIBLE_DEVICES= "):
        assert each in str(error.value)
    assert "\n" not in str(error.value)
    assert len(error.value.faults) == 1
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        check_gpu()


def test_a_gpu_that_torch_uses_and_a_machine_without_one_are_fine(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        assert unused_gpu() is None
    (machine / "dev/nvidia0").rename(machine / "dev/nvidiactl")
    (machine / "proc/driver/nvidia/version").unlink()
    assert unused_gpu() is None
    nvidia_smi(machine, "NVIDIA-SMI has failed", code=9)
    assert unused_gpu() is None
    assert driver_version() is None


def test_the_driver_says_what_a_gpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver.install(monkeypatch, [{89: 0}, {89: 1}])
    assert [device_attribute(89, 0), device_attribute(89, 1)] == [0, 1]
    assert device_attribute(89, 2) is None
    assert device_attribute(102, 0) is None
    fake_driver.install(monkeypatch, [])
    assert device_attribute(89) is None
    fake_driver.install(monkeypatch, None)
    assert device_attribute(89) is None


@pytest.mark.parametrize(
    "devices, where, pages",
    [
        ([{89: 1}], "cuda", True),
        ([{89: 0}], "cuda", False),
        ([{89: 0}, {89: 1}], "cuda:1", True),
        ([{89: 1}, {89: 0}], "cuda:1", False),
        (None, "cuda", True),  # a plan on a machine without a driver
        ([{89: 1}], "cpu", False),
    ],
)
def test_states_are_paged_where_the_driver_lets_the_host_write_them(
    devices: Any, where: str, pages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver.install(monkeypatch, devices)
    parameter: Any = SimpleNamespace(device=torch.device(where))
    assert can_page(parameter) is pages
