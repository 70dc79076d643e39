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
from tests import fake_driver, tiny_run


@pytest.fixture(autouse=True)
def _consoles_as_before() -> Iterator[None]:
    yield
    show_only(progress=True, results=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipe.yaml, run/ trained from it, and grid.yaml, a study of it."""
    root = tmp_path_factory.mktemp("cli")
    (root / "recipe.yaml").write_text(resolved_yaml(tiny_run.recipe(root, train__steps=2, adapter__dropout=0.0)))
    trained = invoke("train", root / "recipe.yaml", "--run-dir", root / "run")
    assert trained.exit_code == 0, trained.stderr
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


def test_every_verb_is_here() -> None:
    assert set(RESULTS) | UNCHECKED == set(VERBS)


@pytest.mark.parametrize("verb", RESULTS)
def test_results_go_to_standard_output(verb: str, root: Path, tmp_path: Path) -> None:
    found = invoke(*arguments_of(verb, root, tmp_path))
    assert found.exit_code == 0, found.stderr
    assert RESULTS[verb][1] in found.stdout
    assert "Traceback" not in found.stdout + found.stderr


@pytest.mark.parametrize("verb", RESULTS)
def test_json_before_and_after_the_verb_is_one_document(verb: str, root: Path, tmp_path: Path) -> None:
    before = invoke("--json", *arguments_of(verb, root, tmp_path / "a"))
    after = invoke(*arguments_of(verb, root, tmp_path / "b"), "--json")
    assert (before.exit_code, after.exit_code) == (0, 0), before.stderr + after.stderr
    documents = [json.loads(each.stdout) for each in (before, after)]
    assert documents[0].keys() == documents[1].keys()
    assert documents[0]


@pytest.mark.parametrize("verb", ["train", "eval", "export", "plan", "preview", "rank"])
def test_quiet_before_and_after_the_verb_shows_results_alone(verb: str, root: Path, tmp_path: Path) -> None:
    noisy = invoke(*arguments_of(verb, root, tmp_path / "n"))
    for number, quiet in enumerate((True, False)):
        arguments = arguments_of(verb, root, tmp_path / str(number))
        found = invoke("--quiet", *arguments) if quiet else invoke(*arguments, "-q")
        assert found.exit_code == 0, found.stderr
        assert found.stderr == ""
        assert RESULTS[verb][1] in found.stdout
    assert verb in ("plan", "preview", "rank") or noisy.stderr != ""


def test_progress_of_training_is_not_on_standard_output(root: Path, tmp_path: Path) -> None:
    found = invoke("train", root / "recipe.yaml", "--run-dir", tmp_path / "run")
    assert "loss" in found.stderr
    assert "loss" not in found.stdout


def test_version() -> None:
    found = invoke("--version")
    assert (found.exit_code, found.stdout) == (0, f"qdora {qdora.__version__}\n")


def test_guides_are_listed_and_printed() -> None:
    listed = json.loads(invoke("guide", "--json").stdout)["guides"]
    assert {"own-data", "chats", "memory", "ranks", "studies", "exports", "python", "pruned-bases"} <= set(listed)
    for topic, title in listed.items():
        shown = invoke("guide", topic)
        assert shown.exit_code == 0
        assert " ".join(title.split()) in " ".join(shown.stdout.split())
    wrong = invoke("guide", "memroy")
    assert wrong.exit_code == 2
    assert "Did you mean 'memory'?" in wrong.stderr


def test_a_shipped_recipe_is_printed_as_it_stands() -> None:
    for name in recipe_names():
        assert yaml.safe_load(invoke("recipes", name).stdout)


def test_an_interrupted_study_names_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted(3, Path("cells/a/checkpoints/step-3"))

    monkeypatch.setattr("qdora.study.runner.study_run", stop)
    found = invoke("study", "my grid.yaml", "--dir", "d", "--shard", "1/2")
    assert found.exit_code == 130
    assert found.stderr.endswith("Continue with: qdora study 'my grid.yaml' --dir d --shard 1/2\n")


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
def test_a_failure_is_one_line_and_its_traceback_is_in_the_log(
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
        assert "Traceback" in logged
        assert type(error).__name__ in logged
        assert "in fail" in logged


@pytest.mark.parametrize("before", [True, False])
def test_debug_before_and_after_the_verb_lets_the_error_through(
    before: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Unforeseen("here")

    monkeypatch.setattr("qdora.run.evaluate.load_target", fail)
    found = invoke(*(["--debug", "eval", root / "run"] if before else ["eval", root / "run", "--debug"]))
    assert isinstance(found.exception, Unforeseen)


def test_a_failure_while_training_is_in_the_log(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Unforeseen("in the loop")

    monkeypatch.setattr("qdora.run.train.fit", fail)
    found = invoke("train", root / "recipe.yaml", "--run-dir", tmp_path / "run")
    assert found.exit_code == 1
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("Traceback") == 1
    assert log.endswith("Z FAILURE train: Unforeseen: in the loop\n")


def test_unknown_verbs_and_options_exit_with_2() -> None:
    assert invoke("frobnicate").exit_code == 2
    assert invoke("train", "quickstart", "--frobnicate").exit_code == 2
    assert invoke("train", "no-such-recipe").exit_code == 2


@pytest.mark.parametrize(
    "busy, given, added",
    [
        (90.0, {}, {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}),
        (10.0, {}, {}),
        (90.0, {"OMP_WAIT_POLICY": "ACTIVE"}, {}),
        (90.0, {"GOMP_SPINCOUNT": "9"}, {}),
        (10.0, {"WORLD_SIZE": "2"}, {"TORCH_CPP_LOG_LEVEL": "ERROR"}),
    ],
)
def test_threads_sleep_on_busy_cores_unless_the_user_has_chosen(
    busy: float, given: dict[str, str], added: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: busy)
    environment = dict(given)
    set_up(environment)
    assert environment == given | added


def test_a_target_that_does_not_exist_is_named_before_any_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for verb in (
        ("eval", "runs/paper", "--method", "generate", "-t", "boolq"),
        ("generate", "runs/paper", "-p", "?"),
    ):
        found = invoke(*verb)
        assert found.exit_code == 2
        (line,) = found.stderr.splitlines()
        assert line.startswith(f"{verb[0]}: runs/paper: no such run or directory, no model of that name in the Hub's")


def test_lines_of_the_hub_are_shown_once() -> None:
    code = "import logging, qdora.cli.verb as v; v._set_up_output(); from huggingface_hub import snapshot_download; "
    code += "logging.getLogger('huggingface_hub.utils').warning('Retrying in 1s')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "Retrying in 1s\n"


@pytest.mark.parametrize(("rank", "expected"), [("0", "found\nodd\nhere\n"), ("1", "here\n")])
def test_the_first_process_of_a_launch_tells_what_all_find(rank: str, expected: str) -> None:
    code = "import logging, qdora.cli.verb as v; v._set_up_output(); log = logging.getLogger('qdora'); "
    code += "log.info('found'); log.warning('odd'); log.warning('here', extra={'of_this_process': True})"
    environment = os.environ | {"RANK": rank}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == expected


def test_a_missing_data_file_is_reported_for_the_recipe(tmp_path: Path) -> None:
    found = invoke("train", "own-data", "-s", "model.source=builtin", "--run-dir", tmp_path / "run")
    assert found.exit_code == 2
    assert found.stderr.startswith("own-data: data.mix[0].source: no such file or directory")


@pytest.mark.parametrize("options", [("--json",), ()])
def test_text_on_an_output_that_is_not_utf_8(options: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    run = tmp_path / "Läufe 😀"
    shutil.copytree(root / "run", run)
    text = tmp_path / "é.txt"
    text.write_text("Grüße")
    found = CliRunner(charset="ascii").invoke(app, [*options, "eval", str(run), "--text", str(text)])
    assert found.exit_code == 0, found.output
    if options:
        assert json.loads(found.stdout_bytes.decode("ascii"))["target"] == str(run)
    found = CliRunner(charset="ascii").invoke(app, [*options, "report", str(run)])
    assert found.exit_code == 0, found.output
    assert found.stdout_bytes.isascii()


def test_a_dry_run_of_a_study_lists_its_cells(root: Path, tmp_path: Path) -> None:
    lines = invoke(*arguments_of("study", root, tmp_path)).stdout.splitlines()
    assert [line.strip() for line in lines[1:]].count("adapter=dora, seed=0") == 1
    assert [line.partition(":")[0] for line in lines[5:-1]] == ["bases", "main"]
    assert "Fix: set time" in lines[-1]


def test_a_reader_that_stops_ends_a_verb_without_a_word() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "qdora.cli", "recipes", "tiny"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ([], "exactly one of --prompt and --chats must be given, got neither"),
        (["--prompt", "a", "--chats", "b.jsonl"], "exactly one of --prompt and --chats must be given, got both"),
        (["--prompt", "", "--chats", "b.jsonl"], "exactly one of --prompt and --chats must be given, got both"),
        (["--chats", "b.jsonl", "--raw"], "--raw: is not used with --chats. Fix: remove it."),
    ],
)
def test_generate_takes_a_prompt_or_a_file(options: list[str], fault: str) -> None:
    result = invoke("generate", "nowhere", *options)
    assert result.exit_code == 2
    assert fault in result.stderr


@pytest.mark.parametrize(
    "given, driver, wanted",
    [
        ({}, {102: 1, 89: 1}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({}, {102: 1, 89: 0}, {}),  # WSL2, a Jetson
        ({}, {102: 0, 89: 1}, {}),
        ({}, None, {}),
        ({"PYTORCH_ALLOC_CONF": ""}, {102: 1, 89: 1}, {"PYTORCH_ALLOC_CONF": ""}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a"}, {102: 1, 89: 1}, {"PYTORCH_CUDA_ALLOC_CONF": "a"}),
    ],
)
def test_the_allocator_extends_its_segments_where_the_driver_maps_memory(
    given: Any, driver: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver.install(monkeypatch, None if driver is None else [driver])
    environment = dict(given)
    let_segments_grow(environment)
    assert environment == wanted


WATCHED = """
import os, sys
from tests import fake_driver
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch", os.environ.get("PYTORCH_ALLOC_CONF"))
            sys.exit()
sys.meta_path.insert(0, Watch())
fake_driver.install(None, [{102: 1, 89: 1}], called=lambda: print("driver"))
from qdora.cli import main
main()
"""
"""Prints when the driver is asked, and the allocator's settings as torch is imported, where it ends."""


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["generate", "nowhere", "-p", "a"], ["driver", "driver", "torch expandable_segments:True"]),
        (["validate", "tiny"], []),
        (["train", "--help"], []),
        (["--help"], []),
    ],
)
def test_the_allocator_is_set_before_torch_is_imported_and_only_to_compute(
    arguments: list[str], wanted: list[str]
) -> None:
    mine = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    environment = mine | {"PYTHONPATH": str(Path(qdora.__file__).parents[1])}
    command = [sys.executable, "-c", WATCHED, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith(("driver", "torch "))] == wanted


# ------------------------------------------------------------------------------------------------ the CPU or a GPU


@pytest.mark.parametrize("limit, said", [(10**9, False), (10**4, True)])
def test_a_large_model_on_a_cpu_is_said_to_be_slow(
    limit: int, said: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdora.run.trainer.LARGE", limit)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = invoke("train", root / "recipe.yaml", "--run-dir", tmp_path / "run")
    assert ("slow on a CPU.\n" in found.stderr) is said


@pytest.fixture
def idle_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU that torch cannot use."""
    monkeypatch.setattr(nvidia_driver, "ROOT", fake_driver.files(tmp_path / "root", "535.104.05"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("idle_gpu")
@pytest.mark.parametrize("verb", RESULTS)
def test_what_computes_does_not_take_the_cpu_silently(verb: str, root: Path, tmp_path: Path) -> None:
    arguments = [each for each in arguments_of(verb, root, tmp_path) if each != "--dry-run"]
    before = sorted(root.rglob("*"))
    found = invoke(*arguments)
    if VERBS[verb].__name__ not in COMPUTING:
        assert found.exit_code == 0
        return
    assert found.exit_code == 2
    assert found.stderr.count("\n") == 1
    for words in ("CUDA 13.0", "580", "535.104.05", "CUDA_VISIBLE_DEVICES= "):
        assert words in found.stderr
    assert found.stdout == ""
    assert sorted(root.rglob("*")) == before
    assert [each.name for each in tmp_path.iterdir()] == ["root"]


@pytest.mark.usefixtures("idle_gpu")
def test_an_evaluation_is_refused_before_it_reads_data(root: Path) -> None:
    assert "torch cannot use the NVIDIA GPU" in invoke("eval", root / "run", "-t", "nowhere").stderr


@pytest.mark.usefixtures("idle_gpu")
def test_the_user_can_choose_the_cpu(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert invoke("train", root / "recipe.yaml", "--run-dir", tmp_path / "run").exit_code == 0


@pytest.mark.usefixtures("idle_gpu")
def test_a_study_can_be_checked_without_a_gpu(root: Path, tmp_path: Path) -> None:
    assert invoke(*arguments_of("study", root, tmp_path)).exit_code == 0


LAUNCHED = """
import pathlib, sys, torch, torch.utils.flop_counter, warnings
from qdora.files import nvidia_driver
def is_available():
    warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 12020).")
    return False
nvidia_driver.ROOT, torch.version.cuda, torch.cuda.is_available = pathlib.Path({root!r}), "13.0", is_available
from qdora.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]])
def test_the_refusal_is_one_line_of_all_processes(launcher: list[str], root: Path, tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED.format(root=str(fake_driver.files(tmp_path / "root", "535.104.05"))))
    mine = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment = mine | {"PYTHONPATH": str(Path(qdora.__file__).parents[1])}
    command = [sys.executable, *launcher, str(script), "train", str(root / "recipe.yaml"), "-d", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    lines = done.stderr.splitlines()
    assert sum("torch cannot use the NVIDIA GPU" in line for line in lines) == 1
    assert "CUDA initialization" not in done.stderr
    assert launcher or (done.returncode, len(lines)) == (2, 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU")
def test_the_quick_start_takes_the_cpu_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    root, out = fake_driver.files(tmp_path / "root", "535.104.05"), tmp_path / "out"
    here = f"import pathlib, qdora.files.nvidia_driver as driver; driver.ROOT = pathlib.Path('{root}')"
    scripts = {
        "scripts/setup": "",
        ".venv/bin/python": f'exec {sys.executable} -c "{here}; $2"',
        ".venv/bin/qdora": f'mkdir -p {out} {out}-merged.tmp; echo "[${{CUDA_VISIBLE_DEVICES-no}}]" >> {tmp_path}/log',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = shutil.copy(Path(qdora.__file__).parents[1] / "scripts/quickstart", tmp_path / "scripts")
    for hidden, wanted in ((None, "[]"), ("-1", "[-1]")):
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environment |= {"PYTHONPATH": str(Path(qdora.__file__).parents[1])}
        environment |= {} if hidden is None else {"CUDA_VISIBLE_DEVICES": hidden}
        done = subprocess.run([script, str(out)], env=environment, capture_output=True, text=True, check=True)
        assert done.stderr.count("on the CPU, since torch cannot use the NVIDIA GPU: ") == (hidden is None)
        calls = (tmp_path / "log").read_text().splitlines()
        assert len(calls) == 3
        assert all(call.endswith(wanted) for call in calls)
        (tmp_path / "log").unlink()
