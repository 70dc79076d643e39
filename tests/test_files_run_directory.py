"""The run directory: nothing finished is lost to a kill, a full disk, a torn line or a flipped bit."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from qdora.errors import RunFailure, UserError
from qdora.files import atomic, nvidia_driver
from qdora.files.atomic import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    disk_failures,
    json_text,
    place_failures,
    remove_leftovers,
)
from qdora.files.environment import VARIABLES, environment
from qdora.files.run_directory import (
    Checkpoint,
    RunDirectory,
    checkpoint_fault,
    create_run,
    only_process,
    open_run,
    resume_run,
)
from qdora.run import doctor
from qdora.run.load_run import trained_state
from tests import fake_driver, tiny_run

RECIPE = "train:\n  steps: 10\n  lr: 0.1\n  log_every: 1\ndata:\n  mix:\n  - task: boolq\n"
ENVIRONMENT = {"torch": "2", "devices": ["a"]}
TOKEN = "hf_" + "a1B2" * 8
ROOT = str(Path(__file__).parents[1])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_run(tmp_path / "run", RECIPE, ENVIRONMENT)


def save(run: RunDirectory, step: int, content: bytes = b"weights") -> Path:
    """A checkpoint of two files, one in a folder of its own."""
    with run.checkpoint_directory(step) as path:
        (path / "adapter.safetensors").write_bytes(content)
        (path / "state").mkdir()
        (path / "state" / "optimizer.json").write_text('{"step": 1}')
    return run.checkpoints / f"step-{step}"


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a directory with its content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- starting, going on, reading


def test_create_writes_the_recipe_and_the_environment(run: RunDirectory) -> None:
    assert tree(run.path) == {
        "recipe.yaml": RECIPE.encode(),
        "environment.json": b'{\n  "torch": "2",\n  "devices": [\n    "a"\n  ]\n}\n',
    }
    assert open_run(run.path).path == run.path
    assert run.newest_checkpoint() is None
    assert run.metrics() == []


def test_a_run_without_a_result_can_be_started_again_with_another_recipe(run: RunDirectory) -> None:
    run.log("adapter.targets was wrong")
    create_run(run.path, RECIPE.replace("0.1", "0.2"), ENVIRONMENT)
    assert "0.2" in run.recipe_file.read_text()
    save(run, 1)
    with pytest.raises(UserError, match=r"holds a run"):
        create_run(run.path, RECIPE, ENVIRONMENT)


@pytest.mark.parametrize("name", ["plan.json", "residency.json", "interference.json"])
def test_whatever_a_run_wrote_before_its_first_result_it_can_be_started_again(run: RunDirectory, name: str) -> None:
    (run.path / name).parent.mkdir(exist_ok=True)
    (run.path / name).write_text("{}")
    create_run(run.path, RECIPE.replace("0.1", "0.2"), ENVIRONMENT)
    assert "0.2" in run.recipe_file.read_text()
    assert not (run.path / "plan.json").exists()  # the new recipe may have no memory.budget
    run.environment_file.unlink()  # without it, recipe.yaml may be somebody's own file
    (run.path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="must be new or empty"):
        create_run(run.path, RECIPE, ENVIRONMENT)


def test_a_kill_between_the_first_two_files_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "environment.json").write_text("{}")
    create_run(path, "train: {}\n", {"python": "3"})
    assert (path / "recipe.yaml").read_text() == "train: {}\n"


def test_create_refuses_a_run_other_files_and_a_file(run: RunDirectory, tmp_path: Path) -> None:
    run.append_metrics({"step": 1})
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"run: holds a run\. Fix: resume it with --resume"):
        create_run(run.path, RECIPE, ENVIRONMENT)
    other = tmp_path / "home"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"home: must be new or empty \(got thesis\.tex in it\)"):
        create_run(other, RECIPE, ENVIRONMENT)
    for path in (other / "thesis.tex", other / "thesis.tex" / "run"):
        with pytest.raises(UserError, match=rf"{path.name}: .* Fix: choose another --run-dir"):
            create_run(path, RECIPE, ENVIRONMENT)
    (other / "thesis.tex").unlink()
    assert tree(tmp_path) == before
    (other / ".recipe.yaml.123.partial").write_text("cut off")  # of a start that was killed
    assert set(tree(create_run(other, RECIPE, ENVIRONMENT).path)) == {"recipe.yaml", "environment.json"}


def test_steps_are_not_exchanged_for_epochs(run: RunDirectory) -> None:
    epochs = RECIPE.replace("steps: 10\n", "epochs: 3.0\n")
    for before, now, fault in (
        (RECIPE, epochs, "train.epochs: the run counts steps (train.steps: 10). Fix: raise train.steps instead."),
        (epochs, RECIPE, "train.steps: the run counts epochs (train.epochs: 3). Fix: raise train.epochs instead."),
    ):
        with pytest.raises(UserError) as raised:
            resume_run(run.path, now, ENVIRONMENT, before=before)
        assert raised.value.faults == (f"{run.path}: {fault}",)


def test_resume_needs_a_run_and_the_same_training(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "somewhere").mkdir()
    with pytest.raises(UserError, match=r"nowhere: no such directory\. Did you mean 'somewhere'\? Fix: name "):
        resume_run(tmp_path / "nowhere", RECIPE, ENVIRONMENT, before=RECIPE)
    with pytest.raises(UserError, match=r"is not a run \(it has no recipe\.yaml\)\. Fix: name the --run-dir"):
        resume_run(tmp_path, RECIPE, ENVIRONMENT, before=RECIPE)
    changed = RECIPE.replace("0.1", "0.2").replace("boolq", "piqa").replace("steps: 10\n", "steps: 10\n  seed: 3\n")
    with pytest.raises(UserError) as raised:
        resume_run(run.path, changed, ENVIRONMENT, before=RECIPE)
    when = "as when the run started; to change it, start another --run-dir"
    assert raised.value.faults == (
        f"{run.path}: data.mix: must be [{{'task': 'boolq'}}], {when} (got [{{'task': 'piqa'}}]).",
        f"{run.path}: train.seed: must be None, {when} (got 3).",
    )
    assert run.recipe_file.read_text() == RECIPE
    more_lines = RECIPE.replace("log_every: 1", "log_every: 5")
    resume_run(run.path, more_lines, ENVIRONMENT, before=RECIPE)
    assert run.recipe_file.read_text() == more_lines


def test_resume_records_what_changed_about_the_machine(run: RunDirectory) -> None:
    for start in ({**ENVIRONMENT, "torch": "3"}, {**ENVIRONMENT, "torch": "3"}, ENVIRONMENT):
        resume_run(run.path, RECIPE, start, before=RECIPE)
    record = json.loads((run.path / "environment.json").read_text())
    assert record == {**ENVIRONMENT, "resumed": [{"torch": "3"}, {"torch": "2"}]}
    (run.path / "environment.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        resume_run(run.path, RECIPE, ENVIRONMENT, before=RECIPE)


def test_a_resume_clears_what_a_kill_left_in_every_folder(run: RunDirectory) -> None:
    run.append_metrics({"step": 1})
    for folder in ("", "checkpoints", "eval", "figures"):
        (run.path / folder).mkdir(exist_ok=True)
        (run.path / folder / ".step-1.json.123.partial").write_text("cut off")
    run.write_json("eval/step-1.json", {})
    resume_run(run.path, RECIPE, ENVIRONMENT, before=RECIPE)
    assert set(tree(run.path)) == {"recipe.yaml", "environment.json", "metrics.jsonl", "eval/step-1.json"}


def test_only_one_process_works_in_a_run(tmp_path: Path) -> None:
    path, told = tmp_path / "run", os.pipe()
    child = os.fork()
    if child == 0:
        with only_process(path, resume=False):
            os.write(told[1], b"x")
            signal.pause()
    os.read(told[0], 1)
    for resume in (False, True):
        with pytest.raises(UserError, match="run: another process works on it"), only_process(path, resume=resume):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.listdir(path) == [".lock"]  # the kill has left it, and nobody holds it
    with only_process(path, resume=False):
        assert create_run(path, RECIPE, ENVIRONMENT).recipe_file.is_file()
    assert sorted(os.listdir(path)) == ["environment.json", "recipe.yaml"]
    with pytest.raises(UserError, match="nowhere: no such directory"), only_process(tmp_path / "nowhere", resume=True):
        pass
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOENT])
@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_full_and_read_only_disks_give_one_line(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    """Rust code raises an error of its own, which has the system's words in it."""
    error = OSError(number, os.strerror(number)) if kind is OSError else kind(f"I/O error: {os.strerror(number)}")
    with pytest.raises(Exception) as raised, disk_failures(tmp_path / "study"):
        raise error
    if number == errno.ENOENT:
        assert raised.value is error
    else:
        reason = "Read-only file system" if number == errno.EROFS else "the disk is full"
        assert isinstance(raised.value, RunFailure)
        assert reason in str(raised.value)
        assert str(raised.value).startswith(f"{tmp_path / 'study'}: cannot be written: ")
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "eval"])
def test_a_run_with_a_link_out_of_it_is_refused_at_its_start(run: RunDirectory, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run.path / "notes").mkdir()
    (run.path / "inner").symlink_to("notes")
    with only_process(run.path, resume=True):
        pass
    (run.path / name).symlink_to(elsewhere)
    with (
        pytest.raises(UserError, match=rf"run: {name} is not inside the run directory\. Fix: put it there, not a link"),
        only_process(run.path, resume=True),
    ):
        pass


@pytest.mark.parametrize(
    "number, kind", [(errno.EACCES, UserError), (errno.EROFS, UserError), (errno.ENOSPC, RunFailure)]
)
def test_a_forbidden_place_is_a_mistake_of_the_user(number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^x: cannot be .*written"), place_failures(Path("x"), "choose another"):
        raise OSError(number, os.strerror(number))


def test_no_path_leaves_the_run(run: RunDirectory, tmp_path: Path) -> None:
    (run.path / "link").symlink_to(tmp_path)
    for parts in (("..", "x"), ("/etc/passwd",), ("eval", "..", "..", "x"), ("link", "x"), (), (".",)):
        with pytest.raises(ValueError, match="not inside the run directory"):
            run.inside(*parts)
    with pytest.raises(ValueError, match="not inside"):
        run.write_json("../x.json", {})
    assert run.inside("eval", "demo", "..", "x.json").parent.parent.name == "demo"
    run.write_json("eval/demo/facts.json", {"acc": np.float64(0.5)})
    assert (run.path / "eval/demo/facts.json").read_text() == '{\n  "acc": 0.5\n}\n'


# --- JSON


def test_json_is_strict() -> None:
    values = {"a": np.float32(0.5), "b": torch.tensor(3), "c": (1, True, None), "d": Path("x/y"), "é": np.bool_(True)}
    assert json_text(values) == '{"a": 0.5, "b": 3, "c": [1, true, null], "d": "x/y", "é": true}'
    assert json_text([float("nan"), float("inf"), -float("inf"), np.float32("nan")]) == "[null, null, null, null]"
    for value in ({1: 2}, {"a": {None: 1}}, object(), {1, 2}, b"x", np.zeros(3), torch.zeros(1)):
        with pytest.raises(TypeError, match="JSON"):
            json_text(value)


def test_half_a_surrogate_pair_is_written_as_its_escape(run: RunDirectory) -> None:
    run.append_metrics({"step": 1, "text": "a\ud800\u2028b"})
    assert run.metrics() == [{"step": 1, "text": "a\ud800\u2028b"}]


# --- metrics


def test_metrics_are_one_object_a_line(run: RunDirectory) -> None:
    run.append_metrics({"step": 1, "loss": 0.5})
    run.append_metrics({"step": 2, "loss": float("nan"), "tasks": {"a": np.int64(3)}})
    assert run.metrics_file.read_bytes() == b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null, "tasks": {"a": 3}}\n'
    for values in ({}, {"step": "1"}, {"step": True}, {"step": 1.0}):
        with pytest.raises(ValueError, match="needs an int 'step'"):
            run.append_metrics(values)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 8), st.floats() | st.text(max_size=5)), max_size=8), st.integers(-1, 9), st.data()
)
def test_truncated_metrics_are_those_up_to_the_checkpoint(
    tmp_path: Path, lines: list[tuple[int, Any]], after_step: int, data: st.DataObject
) -> None:
    run = RunDirectory(tmp_path)
    run.metrics_file.write_bytes(b"")
    expected = []
    for step, value in lines:
        before = run.metrics_file.stat().st_size
        run.append_metrics({"step": step, "value": value})
        line = run.metrics_file.read_bytes()[before:]
        if step <= after_step:
            expected.append(line)
    # a kill -9 in the middle of the next line
    torn = b'{"step": 0, "value": [1, {"a": "b\\n"}]}\n'
    content = run.metrics_file.read_bytes() + torn[: data.draw(st.integers(0, len(torn) - 2))]
    run.metrics_file.write_bytes(content)
    run.truncate_metrics(after_step)
    assert run.metrics_file.read_bytes() == b"".join(expected)
    run.append_metrics({"step": 9})
    assert run.metrics_file.read_bytes() == b"".join(expected) + b'{"step": 9}\n'


def test_truncation_keeps_a_whole_last_line_and_drops_garbage(run: RunDirectory) -> None:
    run.truncate_metrics(5)
    assert not run.metrics_file.exists()
    run.metrics_file.write_bytes(b'{"step": 1}\n\x00\x00\x00\n[1]\n{"a": 1}\n{"step": 3}\n\xff\n{"step": 2}')
    assert run.metrics() == [{"step": 1}, {"step": 3}, {"step": 2}]
    run.truncate_metrics(2)
    assert run.metrics_file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    stamp = run.metrics_file.stat().st_mtime_ns
    run.truncate_metrics(2)
    assert run.metrics_file.stat().st_mtime_ns == stamp  # nothing to do, nothing written


def test_a_full_disk_leaves_no_half_line(run: RunDirectory) -> None:
    code = """
import resource, sys
from pathlib import Path
from qdora.files.run_directory import RunDirectory
from qdora.errors import RunFailure
run = RunDirectory(Path(sys.argv[1]))
run.append_metrics({"step": 1, "text": "x" * 500})
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the system cuts the second line in the middle
try:
    run.append_metrics({"step": 2, "text": "y" * 20000})
except RunFailure as error:
    print(error)
"""
    done = child(code, run.path)
    assert done.stdout == f"{run.path}: metrics.jsonl could not be written: the disk is full.\n"
    assert run.metrics_file.read_bytes() == b'{"step": 1, "text": "' + b"x" * 500 + b'"}\n'


def child(code: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}, check=False)


def test_log_lines_have_a_time_and_no_token(run: RunDirectory) -> None:
    run.log(f"first\nsecond {TOKEN}")
    run.log("third")
    first, third = run.log_file.read_text().splitlines()
    assert first[20:] == " first second hf_***"
    assert first[:2] == "20"
    assert first[19] == "Z"
    assert third.endswith("Z third")


# --- checkpoints


def test_a_checkpoint_appears_whole(run: RunDirectory) -> None:
    with run.checkpoint_directory(3) as path:
        (path / "a.bin").write_bytes(b"123456789")
        assert not (run.checkpoints / "step-3").exists()
        assert path.parent == run.checkpoints
    assert os.listdir(run.checkpoints) == ["step-3"]
    written = json.loads((run.checkpoints / "step-3" / "complete.json").read_text())
    # cbf43926: the check value of CRC-32 for these nine digits
    assert written == {"step": 3, "files": {"a.bin": {"bytes": 9, "crc32": "cbf43926"}}}
    assert run.newest_checkpoint() == Checkpoint(3, run.checkpoints / "step-3")


def test_only_checkpoints_count_as_steps_that_can_be_named(run: RunDirectory, tmp_path: Path) -> None:
    assert run.checkpoint_steps() == []
    with pytest.raises(UserError, match=r"^--step: got 3, but .*/run has no checkpoint\. Fix: remove --step\.$"):
        trained_state(run, tiny_run.recipe(tmp_path), 3)
    for step in (100, 20):
        save(run, step)
    (run.checkpoints / "step-100.bak").mkdir()
    (run.checkpoints / "step-7").write_text("a file")
    assert run.checkpoint_steps() == [20, 100]
    with pytest.raises(UserError, match=r"--step: got 3, must be one of 20, 100 in "):
        trained_state(run, tiny_run.recipe(tmp_path), 3)


def test_everything_is_flushed_before_the_name_appears(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []

    def record(path: Path) -> None:
        flushed.append((str(path.relative_to(run.checkpoints)), (run.checkpoints / "step-1").exists()))

    monkeypatch.setattr(atomic, "sync", record)
    save(run, 1)
    aside = ".step-1.partial"
    inside = ["adapter.safetensors", "complete.json", "state", "state/optimizer.json"]
    assert {(f"{aside}/{name}", False) for name in inside} | {(aside, False), (".", True)} == set(flushed)
    assert flushed.index((f"{aside}/state/optimizer.json", False)) < flushed.index((f"{aside}/state", False))
    assert flushed[-1] == (".", True)


def test_newest_is_by_number_and_skips_what_is_not_a_checkpoint(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (9, 10, 100):
        save(run, step)
    for name in ("step-200", ".step-300.partial", "step-x", "step-4000.old"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "step-500").write_text("a file")
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest.step == 100
    assert "step-200: complete.json: No such file or directory" in caplog.text


def flip(path: Path) -> None:
    file = path / "adapter.safetensors"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


def outside(path: Path) -> None:
    listed = json.loads((path / "complete.json").read_text())
    (path.parent.parent / "x").write_bytes(b"")
    listed["files"]["../../x"] = {"bytes": 0, "crc32": "00000000"}
    (path / "complete.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "damage, fault",
    [
        (lambda path: (path / "complete.json").unlink(), "complete.json: No such file or directory"),
        (lambda path: (path / "complete.json").write_text('{"step": 2, "fi'), "complete.json is damaged"),
        (lambda path: (path / "complete.json").write_text("[]"), "complete.json is damaged"),
        (lambda path: (path / "complete.json").write_text("[" * 100_000), "complete.json is damaged"),
        (lambda path: (path / "complete.json").write_text('{"files": {"a": 3}}'), "a: No such file or directory"),
        (lambda path: (path / "adapter.safetensors").write_bytes(b"weight"), "has 6 bytes, not 7"),
        (lambda path: (path / "state" / "optimizer.json").unlink(), "optimizer.json: No such file or directory"),
        (flip, "adapter.safetensors has changed"),
        (outside, "../../x is outside"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_said(
    run: RunDirectory, damage: Callable[[Path], Any], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)
    damage(save(run, 2))
    found = checkpoint_fault(run.checkpoints / "step-2")
    assert found is not None
    assert fault in found
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest.step == 1
    assert f"Skipped a damaged checkpoint: step-2: {found}. Using {run.checkpoints}" in caplog.text
    # with the older one gone as well, going on from nothing is refused
    (run.checkpoints / "step-1" / "complete.json").unlink()
    with pytest.raises(
        RunFailure, match=r"all checkpoints are damaged \(step-2: .*; step-1: complete.json: No such file"
    ):
        run.newest_checkpoint()


def test_a_full_disk_removes_the_part_and_names_the_last_whole_checkpoint(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = save(run, 1)
    before = tree(run.path)

    def write(path: Path) -> None:
        (path / "big.bin").write_bytes(b"x" * 100)
        full_disk()

    def rust(_: Path) -> None:  # safetensors has an error class of its own, with the system's words
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    for action in (write, rust):
        with pytest.raises(RunFailure) as raised, run.checkpoint_directory(2) as path:
            action(path)
        assert str(raised.value) == (
            f"{run.path}: the checkpoint of step 2 could not be written: the disk is full. Safe on disk: {kept}."
        )
        assert tree(run.path) == before
        assert os.listdir(run.checkpoints) == ["step-1"]
    for function in ("fsync", "rename"):  # full only when flushed; a rename that needs a new block
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, function, full_disk)
            with (
                pytest.raises(RunFailure, match=r"disk is full\. Safe on disk: .*step-1"),
                run.checkpoint_directory(2) as path,
            ):
                (path / "a").write_text("a")
        assert tree(run.path) == before
        assert os.listdir(run.checkpoints) == ["step-1"]
    assert run.newest_checkpoint() == Checkpoint(1, kept)


def test_a_full_disk_while_replacing_keeps_the_old_checkpoint(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1, b"old")
    before = tree(run.path)
    real, calls = os.rename, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            full_disk()
        real(source, target)

    monkeypatch.setattr(atomic.os, "rename", second_fails)
    with pytest.raises(RunFailure, match="disk is full"):
        save(run, 1, b"new")
    assert tree(run.path) == before
    monkeypatch.undo()
    save(run, 1, b"new")
    assert (run.checkpoints / "step-1" / "adapter.safetensors").read_bytes() == b"new"
    assert os.listdir(run.checkpoints) == ["step-1"]


def broken_off(run: RunDirectory, error: BaseException) -> None:
    """A checkpoint whose writing ends in an error."""
    with run.checkpoint_directory(1) as path:
        (path / "a").write_text("a")
        raise error


def test_other_errors_and_interrupts_leave_nothing_and_stay_what_they_are(run: RunDirectory) -> None:
    for error in (KeyboardInterrupt(), ValueError("a bug"), RuntimeError("CUDA error")):
        with pytest.raises(type(error)):
            broken_off(run, error)
        assert os.listdir(run.checkpoints) == []
    with pytest.raises(ValueError, match="regular files only"), run.checkpoint_directory(1) as path:
        (path / "a").symlink_to("/etc/passwd")
    assert os.listdir(run.checkpoints) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from qdora.files import atomic, nvidia_driver
from qdora.files.run_directory import RunDirectory
run, calls, when = RunDirectory(Path(sys.argv[1])), [], int(sys.argv[2])
def die(function):
    def call(*arguments):
        calls.append(arguments)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
atomic.os.rename, atomic.os.replace, atomic.os.fsync = map(die, (os.rename, os.replace, os.fsync))
with run.checkpoint_directory(2) as path:
    (path / "a.bin").write_bytes(b"new")
print(len(calls))
"""


def test_killed_at_any_moment_of_writing_there_is_a_whole_checkpoint(run: RunDirectory) -> None:
    """Step 2 is written twice over; the process dies at its first, second, ... flush or rename."""
    moment = 0
    for first_time in (True, False):
        save(run, 1)
        if not first_time:
            with run.checkpoint_directory(2) as path:
                (path / "a.bin").write_bytes(b"old")
        for moment in range(1, 30):
            done = child(KILLED, run.path, str(moment))
            if done.returncode == 0:
                assert moment > 5
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            resume_run(run.path, RECIPE, ENVIRONMENT, before=RECIPE)  # clears leftovers
            newest = run.newest_checkpoint()
            assert newest is not None
            assert all(not name.startswith(".") for name in os.listdir(run.checkpoints))
            if not first_time:
                assert newest.step == 2
                assert (newest.path / "a.bin").read_bytes() in (b"old", b"new")
        if first_time:
            run.prune_checkpoints(1)
    assert tree(run.checkpoints / "step-2")["a.bin"] == b"new"


def test_an_evaluation_that_is_made_again_leaves_its_line(run: RunDirectory) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 0, "eval": {}},
        {"step": 1},
        {"step": 2},
        {"step": 2, "eval": {}},
        {"step": 3},
    ]
    for line in lines:
        run.append_metrics(line)
    run.truncate_metrics(2)
    assert run.metrics() == lines[:4]
    run.truncate_metrics(2, evaluates_again=True)
    assert run.metrics() == lines[:3]


def test_prune_keeps_what_the_newest_ones_need(run: RunDirectory) -> None:
    for step in (1, 2, 3, 10, 20):
        save(run, step)
    needs = {"step-20": 2, "step-10": 1, "step-2": 3}
    run.prune_checkpoints(1, lambda path: needs.get(path.name))
    assert sorted(os.listdir(run.checkpoints)) == ["step-2", "step-20"]


def test_prune_keeps_the_newest_whole_ones(run: RunDirectory) -> None:
    for step in (1, 2, 10, 20):
        save(run, step)
    (run.checkpoints / "step-30").mkdir()  # not whole
    (run.checkpoints / "notes").mkdir()  # not ours
    run.prune_checkpoints(2)
    assert sorted(os.listdir(run.checkpoints)) == ["notes", "step-10", "step-20"]
    run.prune_checkpoints(5)
    assert sorted(os.listdir(run.checkpoints)) == ["notes", "step-10", "step-20"]
    with pytest.raises(ValueError, match="at least 1"):
        run.prune_checkpoints(0)
    for step in (10, 20):
        (run.checkpoints / f"step-{step}" / "complete.json").unlink()
    run.prune_checkpoints(1)  # nothing whole: nothing is thrown away
    assert sorted(os.listdir(run.checkpoints)) == ["notes", "step-10", "step-20"]


def test_resume_clears_leftovers_and_restores_what_was_being_replaced(run: RunDirectory) -> None:
    old = save(run, 7, b"old")
    os.rename(old, run.checkpoints / ".step-7.replaced")  # killed between the two renames
    (run.checkpoints / ".step-7.partial").mkdir()
    (run.path / ".metrics.jsonl.99.partial").write_text("x")
    (run.path / ".git").mkdir()  # the user's own
    resume_run(run.path, RECIPE, ENVIRONMENT, before=RECIPE)
    assert os.listdir(run.checkpoints) == ["step-7"]
    assert (old / "adapter.safetensors").read_bytes() == b"old"
    assert sorted(os.listdir(run.path)) == [".git", "checkpoints", "environment.json", "recipe.yaml"]


def test_adapter_is_replaced_whole(run: RunDirectory) -> None:
    for content in ("one", "two"):
        with run.result_directory("adapter") as path:
            (path / "adapter.txt").write_text(content)
            assert run.adapter.exists() is (content == "two")
    with pytest.raises(RunFailure, match="adapter/ could not be written"), run.result_directory("adapter") as path:
        full_disk()
    assert tree(run.adapter) == {"adapter.txt": b"two"}


# --- single files


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    atomic_write_json(file, {"a": 1})
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, function, full_disk)
            with pytest.raises(OSError, match="No space left"):
                atomic_write_bytes(file, b"new")
        assert tree(tmp_path) == {"a.json": b'{\n  "a": 1\n}\n'}
    with pytest.raises(FileNotFoundError):
        atomic_write_bytes(tmp_path / "no" / "a", b"")


def test_leftovers_are_told_from_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.partial").write_text("not ours: no dot")
    (tmp_path / ".partial-thoughts").write_text("not ours: another ending")
    (tmp_path / ".a.1.partial").symlink_to(tmp_path / "x.partial")
    (tmp_path / ".b.replaced").mkdir()
    with atomic_directory(tmp_path / "b"):
        pass
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == [".partial-thoughts", "b", "x.partial"]


# --- what is said about the machine


def test_environment_names_no_person_no_host_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", TOKEN)  # pasted into the wrong variable
    monkeypatch.setattr("platform.node", lambda: "host-of-mine")
    found = environment()
    text = json_text(found)
    # A wheel's own version has no "+cu132", torch.__version__ has
    release = torch.__version__.partition("+")[0]
    assert found["packages"]["torch"].partition("+")[0] == release
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert set(found["variables"]) <= set(VARIABLES)
    assert found["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    for secret in (TOKEN, "host-of-mine", str(Path.home()) + "/"):
        assert secret not in text


def test_doctor_reports_and_advises() -> None:
    found = doctor.report()
    json_text(found)
    assert found["bitsandbytes"]["cpu"] is None
    assert found["memory_bytes"] > found["available_memory_bytes"] > 0
    assert str(Path.home()) + "/" not in json_text(found) or str(Path.home()) == "/"
    assert f"torch {torch.__version__.partition('+')[0]}" in doctor.report_text(found)

    gpu = {"name": "Tesla T4", "capability": "7.5", "memory_bytes": 16 << 30}
    problem = {"problem": "bitsandbytes does not work on cuda: no kernel", "advice": "pip install -U bitsandbytes"}
    ill = {**found, "devices": [gpu], "cuda": "12.8", "driver": "575.1", "problems": [problem]}
    for words in ("16.0 GiB, compute capability 7.5\n", "driver 575.1\n", "no kernel. Fix: pip install -U bitsandb"):
        assert words in doctor.report_text(ill)
    assert doctor.report_text({**ill, "problems": []}).endswith("\nno problems found\n")


def test_doctor_says_why_torch_cannot_use_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_driver, "ROOT", fake_driver.files(tmp_path, "535.104.05"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = doctor.report_text(doctor.report())
    for words in ("cannot use", "13.0 in torch", "driver 535.104.05", "580 or newer", "Fix: install a newer"):
        assert words in said
    assert "no problems" not in said


@pytest.mark.parametrize(
    "code, error",
    [
        ("import sys; sys.exit(None)", None),
        ("import sys; sys.exit('values are off')", "values are off"),
        (
            "import os; os.write(2, b'a\\nError invalid device at line 9\\n'); os._exit(1)",
            "Error invalid device at line 9",
        ),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)
def test_doctor_survives_kernels_that_end_the_process(
    code: str, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "_IN_OWN_PROCESS", code)
    assert doctor.kernels() == {"cpu": None, "cuda": error}


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels work")
def test_doctor_tries_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "CUDA" in str(doctor.kernels()["cuda"])  # torch's own words


@pytest.mark.parametrize(
    "broken, error",
    [
        (lambda weight, **_: (weight, None), "values are off by 1.00, expected 0.09"),
        (lambda weight, **_: (_ for _ in ()).throw(RuntimeError("no kernel\nmore")), "no kernel"),
    ],
)
def test_doctor_does_not_trust_kernels_that_return(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Any], error: str
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functional, "quantize_4bit", broken)
    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.zeros_like(packed))
    assert doctor.kernels()["cpu"] == error


@pytest.mark.parametrize("is_absolute", [True, False])
def test_messages_name_the_place_of_a_linked_adapter(tmp_path: Path, is_absolute: bool) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    run.mkdir()
    store.mkdir()
    (run / "adapter").symlink_to(store if is_absolute else "../store")
    assert RunDirectory(run).adapter == (store if is_absolute else run / "../store")
