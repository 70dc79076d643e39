"""The command line: outputs, exit codes, options; and what it says of the machine: memory, driver, doctor, consoles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import qdora
from qdora.cli import app
from qdora.cli.app import COMPUTING, let_segments_grow
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.files import machine as this_machine
from qdora.files.atomic import json_text
from qdora.files.console import show_only
from qdora.files.machine import (
    VARIABLES,
    available_memory_bytes,
    check_gpu,
    driver_version,
    machine_memory_bytes,
    unused_gpu,
)
from qdora.model.build_model import choose_compute
from qdora.recipe.recipe_file import recipe_names, resolved_yaml, yaml_text
from qdora.run import doctor
from tests import fakes, support

PACKAGE_ROOT = Path(qdora.__file__).parents[1]
TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(autouse=True)
def _consoles_as_before() -> Iterator[None]:
    yield
    show_only(progress=True, results=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipe.yaml, run/ trained from it, and grid.yaml, a study of it."""
    root = tmp_path_factory.mktemp("cli")
    (root / "recipe.yaml").write_text(resolved_yaml(support.tiny_recipe(root, train__steps=2, adapter__dropout=0.0)))
    trained = invoke("train", root / "recipe.yaml", "--run-dir", root / "run")
    assert trained.exit_code == 0, trained.stderr
    assert "loss" in trained.stderr
    assert ("loss" in trained.stdout, "slow on a CPU.\n" in trained.stderr) == (False, False)
    arms = {kind: {"adapter.kind": kind} for kind in ("lora", "dora")}
    grid = {"recipe": "recipe.yaml", "product": {"adapter": arms}, "seeds": [0], "compare": {"arm": "adapter"}}
    (root / "grid.yaml").write_text(yaml.safe_dump(grid))
    return root


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


class Unforeseen(Exception):
    """A class that the program does not know."""


def fail(error: BaseException, *_: Any, **__: Any) -> None:
    raise error


RESULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "train": (("{root}/recipe.yaml", "--run-dir", "{tmp}/run"), "run: "),
    "init": (("{root}/data/sums.jsonl", "--model", "{root}/model", "-o", "{tmp}/own.yaml"), "completion"),
    "eval": (("{root}/run", "--limit", "2"), "letters"),
    "export": (("{root}/run", "{tmp}/out"), "exported model: "),
    "quantize": (("{root}/model", "{tmp}/out", "-s", "base.skip=[lm_head,down_proj]"), "exported model: "),
    "generate": (("{root}/run", "--prompt", "1 + 1 =", "--raw", "--max-new-tokens", "2"), ""),
    "plan": (("{root}/recipe.yaml", "--device", "cpu"), "letters"),
    "preview": (("{root}/recipe.yaml", "-n", "1"), "tokens in the loss"),
    "rank": (("{root}/run", "--method", "svd", "--budget", "50%"), "layer"),
    "study": (("{root}/grid.yaml", "--dir", "{tmp}/study", "--dry-run"), "4 cells, 2 with training"),
    "validate": (("{root}/recipe.yaml",), "rank: 4"),
    "recipes": ((), "quickstart"),
    "doctor": ((), "torch"),
    "guide": ((), "memory"),
}
"""Verb -> arguments, and a text of its result."""

UNCHECKED = {"schema", "report"}
"""schema prints JSON always; report needs a finished study (tests/test_study_report.py)."""


def arguments_of(verb: str, root: Path, tmp_path: Path) -> list[str]:
    return [verb, *(each.format(root=root, tmp=tmp_path) for each in RESULTS[verb][0])]


def test_help_shows_the_whole_summary_of_every_verb():
    listed = invoke("--help").stdout.partition("Commands:")[2].split("\n")
    summaries = dict(line.split(maxsplit=1) for line in listed if line)
    assert set(summaries) == set(RESULTS) | UNCHECKED
    assert not [text for text in summaries.values() if not text.endswith(".") or text.endswith("...")]
    found = invoke("--version")
    assert (found.exit_code, found.stdout) == (0, f"qdora {qdora.__version__}\n")


@pytest.mark.parametrize("verb", RESULTS)
def test_results_go_to_standard_output(verb, root, tmp_path):
    found = invoke(*arguments_of(verb, root, tmp_path / "a"), "-q")
    assert found.exit_code == 0, found.stderr
    assert RESULTS[verb][1] in found.stdout
    if verb in ("train", "eval", "export", "quantize", "plan", "preview", "rank"):
        assert found.stderr == ""
    found = invoke("--json", *arguments_of(verb, root, tmp_path / "b"))
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)


def test_shared_options_before_and_after_the_verb(root, tmp_path, monkeypatch):
    arguments = arguments_of("eval", root, tmp_path)
    before = invoke("--json", *arguments)
    assert json.loads(before.stdout).keys() == json.loads(invoke(*arguments, "--json").stdout).keys()
    assert before.stderr != ""
    assert invoke("--quiet", *arguments).stderr == ""
    monkeypatch.setattr("qdora.run.verbs.load_target", partial(fail, Unforeseen("here")))
    for command in (["--debug", *arguments], [*arguments, "--debug"]):
        assert isinstance(invoke(*command).exception, Unforeseen)


def test_guides_and_recipes_are_printed_as_they_stand():
    listed = json.loads(invoke("guide", "--json").stdout)["guides"]
    assert {"own-data", "memory", "exports"} <= set(listed)
    for topic, title in listed.items():
        assert title in invoke("guide", topic).stdout
    wrong = invoke("guide", "memroy")
    assert (wrong.exit_code, "must be one of " in wrong.stderr) == (2, True)
    for name in recipe_names():
        assert yaml.safe_load(invoke("recipes", name).stdout)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a.b: got 1, must be 2.", "c: unknown key."), 2, "a.b: got 1, must be 2.\nc: unknown key.\n"),
        # What damaged files bring into a message must not break the line, or the terminal.
        (UserError("f: name \x1b[2J\n\0\ud800 is new"), 2, "f: name  [2J    is new\n"),
        (UserError("f: " + "x" * 10**6), 2, f"f: {'x' * 1997}\n"),
        (RunFailure("disk full."), 1, "disk full.\n"),
        (Interrupted(3, Path("ck")), 130, "stopped after step 3"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Unforeseen("first\nsecond"), 1, "Unforeseen: first (--debug shows the traceback)\n"),
        (zlib.error("cut"), 1, "error: cut (--debug shows the traceback)\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_failure_is_one_line(error, code, text, root, monkeypatch):
    log = root / "run/log.txt"
    before = log.read_text()
    monkeypatch.setattr("qdora.run.verbs.load_target", partial(fail, error))
    found = invoke("--quiet", "eval", root / "run")
    assert found.exit_code == code
    assert found.stderr.startswith(text)
    assert "Traceback" not in found.stderr
    logged = log.read_text().removeprefix(before)
    if code in (2, 130):  # a mistake or an interrupt is no failure
        assert logged == ""
    else:
        assert all(words in logged for words in ("Traceback", type(error).__name__, "in fail", "Z FAILURE eval: "))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("frobnicate", "frobnicate"), ("train no-such-recipe", "no-such-recipe: "),
        ("init no.csv -o {tmp}/a.yaml", "no.csv: no such file"),
        ("init README.md -o README.md", "--out: README.md exists"),
        ("generate runs/paper -p ?", "generate: runs/paper: "), ("generate a", "needs --prompt or --chats"),
        ("generate a --prompt a --chats b.jsonl", "--chats: is not used with --prompt"),
        ("generate a --chats b.jsonl --raw --system x", "--raw: --system: --prompt Fix: remove"),
        ("study tiny", "tiny: is a recipe. --vary"), ("study tiny --seeds 2", "--seeds --vary Fix: remove"),
        ("study tiny --vary base.quant", "base.quant: must"),
        ("study tiny --vary base.qunt=nf4 --dir {tmp}", "--vary (base.qunt=nf4): base.qunt: unknown 'quant'?"),
        ("study tiny --vary base.quant=none,nf5 --dir {tmp}", "--vary (base.quant=nf5): base.quant: 'none', 'nf5'."),
        ("study tiny --vary data.mix[9].limit=3", "-s data.mix[9].limit=3: the recipe has nothing"),
        ("study benchmarks/results/study/grid.yaml --vary base.quant=nf4", "--vary: is a study file Fix: remove"),
    ],
)  # fmt: skip
def test_mistakes_exit_with_2(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = invoke(*(each.format(tmp=tmp_path / "run") for each in arguments.split()))
    assert found.exit_code == 2
    assert all(word in found.stderr for word in words.split()), found.stderr
    assert not (tmp_path / "run").exists()


def python(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in ("PYTORCH_ALLOC_CONF", "RANK")}
    own |= {"PYTHONPATH": str(PACKAGE_ROOT)} | variables
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=own)


@pytest.mark.parametrize(("rank", "expected"), [("0", "found\nodd\nhere\n"), ("1", "here\n")])
def test_the_first_process_of_a_launch_tells_what_all_find_once(rank, expected):
    code = "import logging; from qdora.cli.app import set_up_output; set_up_output(); "
    code += "from huggingface_hub import snapshot_download; "
    code += "logging.getLogger('huggingface_hub.utils').warning('Retrying in 1s'); log = logging.getLogger('qdora'); "
    code += "log.info('found'); log.warning('odd'); log.warning('here', extra={'of_this_process': True}); "
    code += "import warnings; warnings.warn('CUDA initialization: the driver is too old')"
    assert python("-c", code, RANK=rank).stderr == f"Retrying in 1s\n{expected}"


def test_text_on_an_output_that_is_not_utf_8(root, tmp_path):
    run = shutil.copytree(root / "run", tmp_path / "Läufe 😀")
    for command in (["eval", str(run), "--limit", "2", "--json"], ["report", str(run)]):
        found = CliRunner(charset="ascii").invoke(app, command)
        assert (found.exit_code, found.stdout_bytes.isascii()) == (0, True), found.output
        assert "--json" not in command or json.loads(found.stdout_bytes)["target"] == str(run)


GROWS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    "given, driver, added",
    [
        ({}, {102: 1, 89: 1}, GROWS), ({}, {102: 0, 89: 1}, {}),
        ({}, {102: 1, 89: 0}, {}),  # WSL2, a Jetson
        ({"PYTORCH_ALLOC_CONF": ""}, {102: 1, 89: 1}, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a"}, {102: 1, 89: 1}, {}),
    ],
)  # fmt: skip
def test_the_allocator_extends_segments(given, driver, added, monkeypatch):
    fakes.install_driver(monkeypatch, driver and [driver])
    variables = dict(given)
    let_segments_grow(variables)
    assert variables == given | added


WATCHED = """
import os, sys
from tests import fakes
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch", os.environ.get("PYTORCH_ALLOC_CONF"))
            sys.exit()
sys.meta_path.insert(0, Watch())
fakes.install_driver(None, [{102: 1, 89: 1}], called=lambda: print("driver"))
from qdora.cli import main
main()
"""
"""Prints when the driver is asked, and the allocator's settings as torch is imported, where it ends."""


@pytest.mark.parametrize(
    "arguments, wanted",
    [("generate nowhere -p a", ["driver", "driver", "torch expandable_segments:True"]), ("validate tiny", [])],
)
def test_the_allocator_is_set_before_torch_is_imported_and_only_to_compute(arguments, wanted):
    lines = python("-c", WATCHED, *arguments.split()).stdout.splitlines()
    assert [line for line in lines if line.startswith(("driver", "torch "))] == wanted


GIB = 2**30
V2 = "/sys/fs/cgroup"
NO_LIMIT = {"memory.max": "max\n", "memory.current": f"{9 * GIB}\n"}
FOUR = {"memory.max": f"{4 * GIB}\n", "memory.current": f"{3 * GIB}\n"}
STAT = f"anon {GIB}\nfile {2 * GIB}\nshmem {GIB}\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\n"

# /proc/self/cgroup, the files of each folder, and GiB in all and free; the machine has 64, of which 48 are free.
CASES = {
    "no limit": ("0::/user.slice\n", {f"{V2}/user.slice": NO_LIMIT, V2: {}}, (64, 48)),
    "pages of files": ("0::/\n", {V2: FOUR | {"memory.stat": STAT}}, (4, 1.75)),
    "a parent": ("0::/pod/box\n", {f"{V2}/pod/box": NO_LIMIT, f"{V2}/pod": FOUR}, (4, 1)),
    "a path of the host": ("0::/docker/0a1b\n", {V2: FOUR}, (4, 1)),
    "full": ("0::/\n", {V2: FOUR | {"memory.current": f"{5 * GIB}\n"}}, (4, 0)),
    "larger than the machine": ("0::/\n", {V2: {"memory.max": f"{99 * GIB}", "memory.current": "0"}}, (64, 48)),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_container_leaves_of_the_machine(case, monkeypatch):
    groups, folders, (total, free) = CASES[case]
    texts = {f"{folder}/{name}": text for folder, files in folders.items() for name, text in files.items()}
    texts["/proc/self/cgroup"] = groups
    monkeypatch.setattr(this_machine, "_system_text", lambda path: texts.get(path.replace("/./", "/"), ""))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=48 * GIB))
    assert (machine_memory_bytes(), available_memory_bytes()) == (total * GIB, free * GIB)


def test_the_environment_names_no_person_no_host_and_no_secret(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", TOKEN)  # pasted into the wrong variable
    monkeypatch.setattr("platform.node", lambda: "host-of-mine")
    found = this_machine.environment()
    # A wheel's own version has no "+cu132", torch.__version__ has
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert set(found["variables"]) <= set(VARIABLES)
    assert found["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert not [text for text in (TOKEN, "host-of-mine", str(Path.home()) + "/") if text in json_text(found)]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU, driver 535 and a torch for CUDA 13 that sees nothing: the folder of its nvidia-smi."""
    nvidia_smi(tmp_path, "535.104.05")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    return tmp_path


def nvidia_smi(folder: Path, text: str, code: int = 0) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    (folder / "nvidia-smi").chmod(0o755)


def uninitialised() -> None:
    raise RuntimeError("Error 802: system not yet initialized\nmore")


def test_an_unused_gpu_is_refused(machine, monkeypatch):
    """With torch's own reason, and the versions that must fit."""
    monkeypatch.setattr("torch.cuda.init", uninitialised)
    with pytest.raises(UserError) as error:
        choose_compute("float32")
    (line,) = error.value.faults
    words = "Error 802: system not yet initialized", "535.104.05", torch.__version__
    assert all(word in line for word in (*words, "CUDA 13.0", "Fix: ", "CUDA_VISIBLE_DEVICES= ")), line
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        check_gpu()


def test_a_used_gpu_and_a_machine_without_one_are_fine(machine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        assert unused_gpu() is None
    nvidia_smi(machine, "NVIDIA-SMI has failed", code=9)
    assert (unused_gpu(), driver_version()) == (None, None)
    (machine / "nvidia-smi").unlink()
    assert unused_gpu() is None


@pytest.mark.parametrize("verb", [verb for verb in RESULTS if verb in COMPUTING])
def test_the_cpu_is_not_taken_silently(verb, root, machine, tmp_path, monkeypatch):
    arguments = arguments_of(verb, root, tmp_path)
    before = [*sorted(root.rglob("*")), *sorted(tmp_path.rglob("*"))]
    more = ("-t", "nowhere") if verb == "eval" else ()  # refused before it reads data
    found = invoke(*(each for each in (*arguments, *more) if each != "--dry-run"))
    assert (found.exit_code, found.stderr.count("\n"), found.stdout) == (2, 1, "")
    assert all(words in found.stderr for words in ("cannot use the NVIDIA GPU", "535.104.05", "CUDA_VISIBLE_DEVICES= "))
    assert [*sorted(root.rglob("*")), *sorted(tmp_path.rglob("*"))] == before
    if verb == "eval":  # the user can choose the CPU
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            assert invoke(*arguments).exit_code == 0
    monkeypatch.setenv("LOCAL_RANK", "1")  # of all processes of a machine one says it; a dry run needs no GPU
    found = invoke(*arguments)
    assert found.exit_code == 0 if verb == "study" else (found.exit_code, found.stderr) == (2, "")


def test_doctor_reports_and_advises(machine):
    found = doctor.report()
    text = " ".join(yaml_text(found).split())
    assert found["bitsandbytes"]["cpu"] is None
    assert found["memory_bytes"] > found["available_memory_bytes"] > 0
    for words in (f"torch: {torch.__version__.partition('+')[0]}", "cannot use", "cuda: '13.0'", "driver: 535.104.05",
                  "Fix: install a driver"):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    "code, error",
    [
        ("import sys; sys.exit(None)", None),
        ("import os; os.write(2, b'a\\nError invalid device\\n'); os._exit(1)", "Error invalid device"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)  # fmt: skip
def test_doctor_survives_broken_kernels(code, error, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "_IN_OWN_PROCESS", code)
    assert doctor.kernels() == {"cpu": None, "cuda": error}


def test_doctor_checks_the_results(monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functional, "quantize_4bit", lambda weight, **_: (weight, None))
    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.zeros_like(packed))
    assert doctor.kernels()["cpu"] == "values are off by 1.00, expected 0.09"
