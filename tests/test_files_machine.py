"""What is said of the machine: memory in a container, the driver, the environment, doctor; consoles."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.table import Table

from qdora.errors import UserError
from qdora.files import environment, nvidia_driver
from qdora.files.atomic import json_text
from qdora.files.console import bar, consoles
from qdora.files.environment import VARIABLES, available_memory_bytes, machine_memory_bytes
from qdora.files.nvidia_driver import check_gpu, device_attribute, driver_version, unused_gpu
from qdora.model.build_model import choose_compute
from qdora.run import doctor
from tests import fakes

GIB = 2**30
TOKEN = "hf_" + "a1B2" * 8
V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
NO_LIMIT = {"memory.max": "max\n", "memory.current": f"{9 * GIB}\n"}
FOUR = {"memory.max": f"{4 * GIB}\n", "memory.current": f"{3 * GIB}\n"}
NO_LIMIT_V1 = {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": f"{9 * GIB}\n"}
FOUR_V1 = {"memory.limit_in_bytes": f"{4 * GIB}\n", "memory.usage_in_bytes": f"{3 * GIB}\n"}
STAT = f"anon {GIB}\nfile {2 * GIB}\nshmem {GIB}\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\n"
STAT_V1 = f"cache 5\ninactive_file 7\nactive_file 7\ntotal_inactive_file {GIB // 2}\ntotal_active_file {GIB // 4}\n"

# /proc/self/cgroup, the files of each folder, and GiB in all and free; the machine has 64, of which 48 are free.
CASES = {
    "no limit": ("0::/user.slice\n", {f"{V2}/user.slice": NO_LIMIT, V2: {}}, (64, 48)),
    "pages of files": ("0::/\n", {V2: FOUR | {"memory.stat": STAT}}, (4, 1.75)),
    "a parent": ("0::/pod/box\n", {f"{V2}/pod/box": NO_LIMIT, f"{V2}/pod": FOUR}, (4, 1)),
    "a path of the host": ("0::/docker/0a1b\n", {V2: FOUR}, (4, 1)),
    "full": ("0::/\n", {V2: FOUR | {"memory.current": f"{5 * GIB}\n"}}, (4, 0)),
    "larger than the machine": ("0::/\n", {V2: {"memory.max": f"{99 * GIB}", "memory.current": "0"}}, (64, 48)),
    "v1": ("5:cpu:/x\n4:memory:/docker/0a1b\n", {V1: FOUR_V1 | {"memory.stat": STAT_V1}}, (4, 1.75)),
    "v1 and v2": ("4:memory:/a\n0::/\n", {f"{V1}/a": FOUR_V1, V1: NO_LIMIT_V1}, (4, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_container_leaves_of_the_machine(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, folders, (total, free) = CASES[case]
    texts = {f"{folder}/{name}": text for folder, files in folders.items() for name, text in files.items()}
    texts["/proc/self/cgroup"] = groups
    monkeypatch.setattr(environment, "_system_text", lambda path: texts.get(path.replace("/./", "/"), ""))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=48 * GIB))
    assert (machine_memory_bytes(), available_memory_bytes()) == (total * GIB, free * GIB)


def test_the_environment_names_no_person_no_host_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", TOKEN)  # pasted into the wrong variable
    monkeypatch.setattr("platform.node", lambda: "host-of-mine")
    found = environment.environment()
    # A wheel's own version has no "+cu132", torch.__version__ has
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert set(found["variables"]) <= set(VARIABLES)
    assert found["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert not [text for text in (TOKEN, "host-of-mine", str(Path.home()) + "/") if text in json_text(found)]


# --- NVIDIA's driver; the verbs that refuse are in test_cli.py


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root directory of a machine with a GPU, driver 535 and a torch for CUDA 13 that sees nothing."""
    root = fakes.driver_files(tmp_path, "535.104.05")
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


def without_nodes(root: Path) -> None:
    (root / "dev/nvidia0").rename(root / "dev/nvidiactl")
    (root / "proc/driver/nvidia/version").unlink()


def uninitialised() -> None:
    raise RuntimeError("Error 802: system not yet initialized\nmore")


@pytest.mark.parametrize(
    "case, cuda, words",
    [
        ("a build without CUDA", None, (torch.__version__, "without CUDA", "another build of torch")),
        ("an old driver", "13.0", ("CUDA 13.0", "580 or newer", "535.104.05", "install a newer driver")),
        ("WSL2", "12.8", ("CUDA 12.8", "525 or newer", "515.43.04")),
        ("no permission", "12.8", ("permission", "dev/nvidia0")),
        ("a failed start", "12.8", ("Error 802: system not yet initialized",)),
    ],
)
def test_an_unused_gpu_is_refused(
    case: str, cuda: str | None, words: tuple[str, ...], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.init", uninitialised)
    if case == "WSL2":
        without_nodes(machine)
        nvidia_smi(machine, "515.43.04")
    elif case == "no permission":
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may open everything
    with pytest.raises(UserError) as error:
        choose_compute("float32")
    (line,) = error.value.faults
    assert all(word in line for word in (*words, "Fix: ", "CUDA_VISIBLE_DEVICES= ")), line
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        check_gpu()


def test_a_used_gpu_and_a_machine_without_one_are_fine(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        assert unused_gpu() is None
    without_nodes(machine)
    assert unused_gpu() is None
    nvidia_smi(machine, "NVIDIA-SMI has failed", code=9)
    assert unused_gpu() is None
    assert driver_version() is None


def test_the_driver_says_what_a_gpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install_driver(monkeypatch, [{89: 0}, {89: 1}])
    assert [device_attribute(*each) for each in ((89, 0), (89, 1), (89, 2), (102, 0))] == [0, 1, None, None]
    for devices in ([], None):
        fakes.install_driver(monkeypatch, devices)
        assert device_attribute(89) is None


# --- doctor


def test_doctor_reports_and_advises(machine: Path) -> None:
    found = doctor.report()
    text = doctor.report_text(found)
    assert found["bitsandbytes"]["cpu"] is None
    assert found["memory_bytes"] > found["available_memory_bytes"] > 0
    for words in (f"torch {torch.__version__.partition('+')[0]}", "cannot use", "13.0 in torch", "driver 535.104.05",
                  "580 or newer", "Fix: install a newer"):  # fmt: skip
        assert words in text
    assert "no problems" not in text
    gpu = {"name": "Tesla T4", "capability": "7.5", "memory_bytes": 16 << 30}
    problem = {"problem": "bitsandbytes does not work on cuda: no kernel", "advice": "pip install -U bitsandbytes"}
    ill = {**found, "devices": [gpu], "cuda": "12.8", "driver": "575.1", "problems": [problem]}
    for words in ("16.0 GiB, compute capability 7.5\n", "driver 575.1\n", "no kernel. Fix: pip install -U bitsandb"):
        assert words in doctor.report_text(ill)
    assert doctor.report_text({**ill, "problems": []}).endswith("\nno problems found\n")


@pytest.mark.parametrize(
    "code, error",
    [
        ("import sys; sys.exit(None)", None),
        ("import os; os.write(2, b'a\\nError invalid device\\n'); os._exit(1)", "Error invalid device"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)  # fmt: skip
def test_doctor_survives_broken_kernels(code: str, error: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "_IN_OWN_PROCESS", code)
    assert doctor.kernels() == {"cpu": None, "cuda": error}


def test_doctor_checks_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functional, "quantize_4bit", lambda weight, **_: (weight, None))
    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.zeros_like(packed))
    assert doctor.kernels()["cpu"] == "values are off by 1.00, expected 0.09"


# --- consoles


def test_brackets_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdora.files.console._shown", {"progress": True, "results": True})  # as without --json
    name = "qa[hard] :smile: runs/[/b]"
    for console in consoles():
        table = Table(name)
        table.add_row(name)
        console.print(table)
        console.print(f"run: {name}", soft_wrap=True)
        with bar(console, name):
            pass
    shown = capsys.readouterr()
    assert shown.out.count(name) == shown.err.count(name) == 4
