"""The command line: what stands on standard output and on standard error, exit codes, and the options of every verb."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import qdora
from qdora.cli import VERBS, app, set_up
from qdora.cli.verb import COMPUTING, let_segments_grow
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.files import nvidia_driver
from qdora.files.console import show_only
from qdora.recipe.recipe_file import recipe_names, resolved_yaml
from tests import fakes, support

PACKAGE_ROOT = Path(qdora.__file__).parents[1]


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
    assert "loss" not in trained.stdout
    assert "slow on a CPU.\n" not in trained.stderr
    arms = {kind: {"adapter.kind": kind} for kind in ("lora", "dora")}
    grid = {"recipe": "recipe.yaml", "product": {"adapter": arms}, "seeds": [0], "compare": {"arm": "adapter"}}
    (root / "grid.yaml").write_text(yaml.safe_dump(grid))
    return root


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


RESULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "train": (("{root}/recipe.yaml", "--run-dir", "{tmp}/run"), "run: "),
    "eval": (("{root}/run", "--limit", "2"), "letters"),
    "export": (("{root}/run", "{tmp}/out"), "exported model: "),
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


def test_help_shows_the_whole_summary_of_every_verb() -> None:
    listed = invoke("--help").stdout.partition("Commands:")[2].split("\n")
    summaries = dict(line.split(maxsplit=1) for line in listed if line)
    assert list(summaries) == list(VERBS)
    assert not [text for text in summaries.values() if not text.endswith(".") or text.endswith("...")]
    assert set(RESULTS) | UNCHECKED == set(VERBS)
    found = invoke("--version")
    assert (found.exit_code, found.stdout) == (0, f"qdora {qdora.__version__}\n")


@pytest.mark.parametrize("verb", RESULTS)
def test_results_go_to_standard_output(verb: str, root: Path, tmp_path: Path) -> None:
    found = invoke(*arguments_of(verb, root, tmp_path / "a"), "-q")
    assert found.exit_code == 0, found.stderr
    assert RESULTS[verb][1] in found.stdout
    if verb in ("train", "eval", "export", "plan", "preview", "rank"):
        assert found.stderr == ""
    found = invoke("--json", *arguments_of(verb, root, tmp_path / "b"))
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)


def test_shared_options_before_and_after_the_verb(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of("eval", root, tmp_path)
    before, after = invoke("--json", *arguments), invoke(*arguments, "--json")
    assert json.loads(before.stdout).keys() == json.loads(after.stdout).keys()
    assert before.stderr != ""
    assert invoke("--quiet", *arguments).stderr == ""

    def fail(*_: Any, **__: Any) -> None:
        raise Unforeseen("here")

    monkeypatch.setattr("qdora.run.evaluate.load_target", fail)
    for command in (["--debug", *arguments], [*arguments, "--debug"]):
        assert isinstance(invoke(*command).exception, Unforeseen)


def test_guides_and_recipes_are_printed_as_they_stand() -> None:
    listed = json.loads(invoke("guide", "--json").stdout)["guides"]
    assert {"own-data", "chats", "memory", "ranks", "studies", "exports", "python", "pruned-bases"} <= set(listed)
    for topic, title in listed.items():
        assert " ".join(title.split()) in " ".join(invoke("guide", topic).stdout.split())
    wrong = invoke("guide", "memroy")
    assert (wrong.exit_code, "'memory'?" in wrong.stderr) == (2, True)
    for name in recipe_names():
        assert yaml.safe_load(invoke("recipes", name).stdout)


class Unforeseen(Exception):
    """A class that the program does not know."""


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
def test_a_failure_is_one_line(
    error: BaseException, code: int, text: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    log = root / "run/log.txt"
    before = log.read_text()
    monkeypatch.setattr("qdora.run.evaluate.load_target", fail)
    found = invoke("--quiet", "eval", root / "run")
    assert found.exit_code == code
    assert found.stderr.startswith(text)
    assert "Traceback" not in found.stderr
    logged = log.read_text().removeprefix(before)
    if code in (2, 130):  # a mistake or an interrupt is no failure
        assert logged == ""
    else:
        assert all(words in logged for words in ("Traceback", type(error).__name__, "in fail", "Z FAILURE eval: "))


def test_failures_name_what_was_being_done(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Unforeseen("in the loop")

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted(3, Path("cells/a/checkpoints/step-3"))

    monkeypatch.setattr("qdora.train.trainer.Trainer.run", fail)
    monkeypatch.setattr("qdora.train.optimizer.LARGE", 10**4)
    found = invoke("train", root / "recipe.yaml", "--run-dir", tmp_path / "run")
    assert (found.exit_code, "slow on a CPU.\n" in found.stderr) == (1, True)
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("Traceback") == 1
    assert log.endswith("Z FAILURE train: Unforeseen: in the loop\n")
    monkeypatch.setattr("qdora.study.runner.study_run", stop)
    found = invoke("study", "my grid.yaml", "--dir", "d", "--shard", "1/2")
    assert found.exit_code == 130
    assert found.stderr.endswith("Continue with: qdora study 'my grid.yaml' --dir d --shard 1/2\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("frobnicate", "frobnicate"), ("train quickstart --frobnicate", "--frobnicate"),
        ("train no-such-recipe", "no-such-recipe: "), ("eval runs/paper --method generate -t boolq", "runs/paper"),
        ("train own-data -s model.source=builtin --run-dir {tmp}", "own-data: data.mix[0].source: no such file"),
        ("generate runs/paper -p ?", "generate: runs/paper: "), ("generate a", "exactly one of --prompt neither"),
        ("generate a --prompt a --chats b.jsonl", "exactly one of --prompt both"),
        ("generate a --chats b.jsonl --raw --system x", "--raw: --system: --chats Fix: remove"),
    ],
)  # fmt: skip
def test_mistakes_exit_with_2(arguments: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = invoke(*(each.format(tmp=tmp_path / "run") for each in arguments.split()))
    assert found.exit_code == 2
    assert all(word in found.stderr for word in words.split()), found.stderr


def python(*command: str, stdout: int = subprocess.PIPE, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in ("PYTORCH_ALLOC_CONF", "RANK")}
    environment = own | {"PYTHONPATH": str(PACKAGE_ROOT)} | variables
    command = (sys.executable, *command)
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    "busy, given, added",
    [
        (50.0, {}, {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}), (49.0, {}, {}),
        (90.0, {"OMP_WAIT_POLICY": "ACTIVE"}, {}), (90.0, {"GOMP_SPINCOUNT": "9"}, {}),
        (10.0, {"WORLD_SIZE": "2"}, {"TORCH_CPP_LOG_LEVEL": "ERROR"}),
    ],
)  # fmt: skip
def test_threads_sleep_on_busy_cores(
    busy: float, given: dict[str, str], added: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: busy)
    environment = dict(given)
    set_up(environment)
    assert environment == given | added


@pytest.mark.parametrize(("rank", "expected"), [("0", "found\nodd\nhere\n"), ("1", "here\n")])
def test_the_first_process_of_a_launch_tells_what_all_find_once(rank: str, expected: str) -> None:
    code = "import logging, qdora.cli.verb as v; v._set_up_output(); from huggingface_hub import snapshot_download; "
    code += "logging.getLogger('huggingface_hub.utils').warning('Retrying in 1s'); log = logging.getLogger('qdora'); "
    code += "log.info('found'); log.warning('odd'); log.warning('here', extra={'of_this_process': True}); "
    code += "import warnings; warnings.warn('CUDA initialization: the driver is too old')"
    assert python("-c", code, RANK=rank).stderr == f"Retrying in 1s\n{expected}"


def test_a_reader_that_stops_ends_a_verb_without_a_word() -> None:
    read, write = os.pipe()
    os.close(read)
    done = python("-m", "qdora.cli", "recipes", "tiny", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("options", [("--json",), ()])
def test_text_on_an_output_that_is_not_utf_8(options: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    run = tmp_path / "Läufe 😀"
    shutil.copytree(root / "run", run)
    text = tmp_path / "é.txt"
    text.write_text("Grüße")
    found = CliRunner(charset="ascii").invoke(app, [*options, "eval", str(run), "--text", str(text)])
    assert found.exit_code == 0, found.output
    assert found.stdout_bytes.isascii()
    assert not options or json.loads(found.stdout_bytes)["target"] == str(run)
    found = CliRunner(charset="ascii").invoke(app, [*options, "report", str(run)])
    assert (found.exit_code, found.stdout_bytes.isascii()) == (0, True), found.output


@pytest.mark.parametrize(
    "given, driver, is_set",
    [
        ({}, [{102: 1, 89: 1}], True), ({}, [{102: 0, 89: 1}], False), ({}, None, False),
        ({}, [{102: 1, 89: 0}], False),  # WSL2, a Jetson
        ({"PYTORCH_ALLOC_CONF": ""}, [{102: 1, 89: 1}], False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a"}, [{102: 1, 89: 1}], False),
    ],
)  # fmt: skip
def test_the_allocator_extends_segments(given: Any, driver: Any, is_set: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install_driver(monkeypatch, driver)
    environment = dict(given)
    let_segments_grow(environment)
    assert environment == given | ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if is_set else {})


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
def test_the_allocator_is_set_before_torch_is_imported_and_only_to_compute(arguments: str, wanted: list[str]) -> None:
    lines = python("-c", WATCHED, *arguments.split()).stdout.splitlines()
    assert [line for line in lines if line.startswith(("driver", "torch "))] == wanted


@pytest.fixture
def _idle_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU that torch cannot use."""
    monkeypatch.setattr(nvidia_driver, "ROOT", fakes.driver_files(tmp_path / "root", "535.104.05"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("_idle_gpu")
@pytest.mark.parametrize("verb", RESULTS)
def test_the_cpu_is_not_taken_silently(verb: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(verb, root, tmp_path)
    if VERBS[verb].__name__ not in COMPUTING:
        assert invoke(*arguments).exit_code == 0
        return
    before, more = sorted(root.rglob("*")), ("-t", "nowhere") if verb == "eval" else ()  # refused before it reads data
    found = invoke(*(each for each in (*arguments, *more) if each != "--dry-run"))
    assert (found.exit_code, found.stderr.count("\n"), found.stdout) == (2, 1, "")
    for words in ("cannot use the NVIDIA GPU", "CUDA 13.0", "580", "535.104.05", "CUDA_VISIBLE_DEVICES= "):
        assert words in found.stderr
    assert sorted(root.rglob("*")) == before
    assert [each.name for each in tmp_path.iterdir()] == ["root"]
    if verb == "eval":  # the user can choose the CPU
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            assert invoke(*arguments).exit_code == 0
    monkeypatch.setenv("LOCAL_RANK", "1")  # of all processes of a machine one says it
    found = invoke(*arguments)
    if verb == "study":  # a dry run needs no GPU
        assert found.exit_code == 0
    else:
        assert (found.exit_code, found.stderr) == (2, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU")
def test_the_quick_start_takes_the_cpu_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    root, out = fakes.driver_files(tmp_path / "root", "535.104.05"), tmp_path / "out"
    here = f"import pathlib, qdora.files.nvidia_driver as driver; driver.ROOT = pathlib.Path('{root}')"
    scripts = {
        "scripts/setup": "",
        ".venv/bin/python": f'exec {sys.executable} -c "{here}; $2"',
        ".venv/bin/qdora": f'mkdir -p {out} {out}-merged.tmp; echo "[${{CUDA_VISIBLE_DEVICES-no}}]" >> {tmp_path}/log',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = shutil.copy(PACKAGE_ROOT / "scripts/quickstart", tmp_path / "scripts")
    for hidden, wanted in ((None, "[]"), ("-1", "[-1]")):
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environment |= {"PYTHONPATH": str(PACKAGE_ROOT)}
        environment |= {} if hidden is None else {"CUDA_VISIBLE_DEVICES": hidden}
        done = subprocess.run([script, str(out)], env=environment, capture_output=True, text=True, check=True)
        assert done.stderr.count("on the CPU, since torch cannot use the NVIDIA GPU: ") == (hidden is None)
        calls = (tmp_path / "log").read_text().splitlines()
        assert len(calls) == 3
        assert all(call.endswith(wanted) for call in calls)
        (tmp_path / "log").unlink()
