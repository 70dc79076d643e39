"""The run directory: nothing finished is lost to a kill, a full disk, a torn line or a flipped bit."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from qdora.errors import RunFailure, UserError
from qdora.files import atomic, run_directory
from qdora.files.atomic import atomic_write_bytes, disk_failures, json_text
from qdora.files.run_directory import (
    RunDirectory,
    checkpoint_fault,
    create_run,
    log_to,
    only_process,
    open_run,
    resume_run,
    unharmed,
)
from qdora.run.load_run import trained_state
from tests import support

RECIPE = "train:\n  steps: 10\n  lr: 0.1\n  log_every: 1\ndata:\n  mix:\n  - task: boolq\n"
ENVIRONMENT = {"torch": "2", "devices": ["a"]}
TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_run(tmp_path / "run", RECIPE, ENVIRONMENT)


def save(run: RunDirectory, step: int, content: bytes = b"weights") -> Path:
    """A checkpoint of two files, one in a folder of its own, written as a run does."""
    with disk_failures(run.path, safe=run.what_is_safe), run.checkpoint_directory(step) as path:
        (path / "adapter.safetensors").write_bytes(content)
        (path / "state").mkdir()
        (path / "state" / "optimizer.json").write_text('{"step": 1}')
    return run.checkpoints / f"step-{step}"


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a directory with its content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_is_created_in_a_place_of_its_own(run, tmp_path):
    assert tree(run.path) == {
        "recipe.yaml": RECIPE.encode(),
        "environment.json": b'{\n  "torch": "2",\n  "devices": [\n    "a"\n  ]\n}\n',
    }
    assert open_run(run.path).path == run.path
    assert (run.newest_checkpoint(), run.metrics(), run.last_step()) == (None, [], None)
    for name in ("plan.json", "log.txt"):  # before its first result a run can start again
        (run.path / name).write_text("{}")
    create_run(run.path, RECIPE.replace("0.1", "0.2"), ENVIRONMENT)
    assert "0.2" in run.recipe_file.read_text()
    assert not (run.path / "plan.json").exists()  # the new recipe may have no memory.budget
    run.append_metrics({"step": 1})
    assert run.last_step() == 1
    other = tmp_path / "home"
    other.mkdir()
    (other / "recipe.yaml").write_text("mine")  # without environment.json it may be somebody's own file
    before = tree(tmp_path)
    for path, words in (
        (run.path, r"run: holds a run\. Fix: resume it with --resume"),
        (other, r"home: must be new or empty \(got recipe\.yaml in it\)"),
        (other / "recipe.yaml" / "run", r"run: .* Fix: choose another --run-dir"),
    ):
        with pytest.raises(UserError, match=words):
            create_run(path, RECIPE, ENVIRONMENT)
    assert tree(tmp_path) == before
    (other / "recipe.yaml").rename(other / ".recipe.yaml.123.partial")  # of a start that was killed
    (other / "environment.json").write_text("{}")  # between the first two files
    assert set(tree(create_run(other, RECIPE, ENVIRONMENT).path)) == {"recipe.yaml", "environment.json"}


@pytest.mark.parametrize(
    "old, changes, keys",
    [
        (RECIPE, {"0.1": "0.2", "boolq": "piqa", "steps: 10\n": "steps: 10\n  seed: 3\n"}, ["data.mix", "train.seed"]),
        (RECIPE, {"steps: 10": "epochs: 3.0"}, ["train.epochs"]),
        (RECIPE.replace("steps: 10", "epochs: 3.0"), {"epochs: 3.0": "steps: 10"}, ["train.steps"]),
        (RECIPE, {"steps: 10": "steps: 9"}, ["train.steps"]),
        (RECIPE, {"steps: 10": "steps: 11", "log_every: 1": "log_every: 5", "lr: 0.1": "lr: 1"}, []),
    ],
)
def test_a_resume_keeps_the_training(run, old, changes, keys):
    run.recipe_file.write_text(old)
    new = reduce(lambda text, change: text.replace(*change), changes.items(), old)
    faults: tuple[str, ...] = ()
    try:
        resume_run(run.path, new, ENVIRONMENT, before=old)
    except UserError as error:
        faults = error.faults
    assert [fault.split(": ")[1] for fault in faults] == keys
    assert all(("must be 10 or more" in fault) == ("got 9" in fault) for fault in faults)
    assert run.recipe_file.read_text() == (old if keys else new)


def test_a_resume_needs_a_run_and_says_where_it_may_be(run, tmp_path):
    with pytest.raises(UserError, match=r"rnu: no such directory\. Fix: "):
        resume_run(tmp_path / "rnu", RECIPE, ENVIRONMENT, before=RECIPE)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        resume_run(tmp_path, RECIPE, ENVIRONMENT, before=RECIPE)
    moved = [RECIPE.replace("task: boolq", f"source: {path}") for path in ("/old/a.jsonl", "/new/a.jsonl")]
    with pytest.raises(
        UserError, match=r"data\.mix: .* Fix: .* or if a file was moved, write its path into .*recipe\.yaml"
    ):
        resume_run(run.path, moved[1], ENVIRONMENT, before=moved[0])
    for start in ({**ENVIRONMENT, "torch": "3"}, {**ENVIRONMENT, "torch": "3"}, ENVIRONMENT):
        resume_run(run.path, RECIPE, start, before=RECIPE)
    record = json.loads((run.path / "environment.json").read_text())
    assert record == {**ENVIRONMENT, "former": [{"torch": "2"}, {"torch": "3"}]}
    (run.path / "environment.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        resume_run(run.path, RECIPE, ENVIRONMENT, before=RECIPE)


def test_a_resume_clears_leftovers_and_restores_what_was_being_replaced(run):
    old = save(run, 7, b"old")
    os.rename(old, run.checkpoints / ".step-7.replaced")  # killed between the two renames
    (run.checkpoints / ".step-7.partial").mkdir()
    save(run, 8)
    (run.checkpoints / ".step-8.replaced").mkdir()  # killed after both
    others = [".git", ".partial-thoughts", "x.partial"]  # the user's own
    for name in others:
        (run.path / name).mkdir()
    run.write_json("eval/step-1.json", {})
    for folder in ("", "checkpoints", "eval", "figures"):
        (run.path / folder).mkdir(exist_ok=True)
        (run.path / folder / ".step-1.json.123.partial").write_text("cut off")
    resume_run(run.path, RECIPE, ENVIRONMENT, before=RECIPE)
    for folder, left in (("checkpoints", ["step-7", "step-8"]), ("eval", ["step-1.json"]), ("figures", [])):
        assert names(run.path / folder) == left
    assert (old / "adapter.safetensors").read_bytes() == b"old"
    assert (run.checkpoints / "step-8/complete.json").is_file()
    assert names(run.path) == sorted([*others, "checkpoints", "environment.json", "eval", "figures", "recipe.yaml"])


def test_only_one_process_works_in_a_run(tmp_path):
    path, told = tmp_path / "run", os.pipe()
    child = os.fork()
    if child == 0:
        with only_process(path, resume=False):
            os.write(told[1], b"x")
            signal.pause()
    os.read(told[0], 1)
    with pytest.raises(UserError, match="run: another process works on it"), only_process(path, resume=True):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(path) == [".lock"]  # the kill has left it, and nobody holds it
    with only_process(path, resume=False):
        assert create_run(path, RECIPE, ENVIRONMENT).recipe_file.is_file()
    assert names(path) == ["environment.json", "recipe.yaml"]
    with pytest.raises(UserError, match="nowhere: no such directory"), only_process(tmp_path / "nowhere", resume=True):
        pass
    assert not (tmp_path / "nowhere").exists()
    (path / "eval").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"run: eval is not inside .* Fix: put it"):
        RunDirectory(path).inside("eval")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT])
@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_gives_one_line(tmp_path, number, kind):
    """Rust code raises an error of its own, which has the system's words in it."""
    error = OSError(number, os.strerror(number)) if kind is OSError else kind(f"I/O error: {os.strerror(number)}")
    with pytest.raises(Exception) as raised, disk_failures(tmp_path / "study"):
        raise error
    if number == errno.ENOENT:
        assert raised.value is error
        return
    assert isinstance(raised.value, RunFailure)
    reason = "Read-only file system" if number == errno.EROFS else "the disk is full"
    assert str(raised.value) == f"{tmp_path / 'study'}: cannot be written: {reason}."
    place = UserError if number == errno.EROFS else RunFailure  # a forbidden place is a mistake of the user
    with pytest.raises(place, match=r"^x: cannot be .*written"), disk_failures(Path("x"), "choose another"):
        raise OSError(number, os.strerror(number))


def in_fork(act: Callable[[], Any]) -> int:
    """Act in a process of its own; returns its exit code, 1 after an error."""
    process = os.fork()
    if process == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def broken_off(run: RunDirectory, error: BaseException, step: int) -> None:
    """A checkpoint whose writing ends in an error."""
    with disk_failures(run.path, safe=run.what_is_safe), run.checkpoint_directory(step) as path:
        (path / "big.bin").write_bytes(b"x" * 100)
        raise error


def test_a_failed_write_leaves_the_last_whole_checkpoint(run, monkeypatch):
    kept = save(run, 1, b"old")
    before = tree(run.path)
    rust = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    text = f"{run.path}: cannot be written: the disk is full. Safe on disk: {kept}."
    for error in (rust, KeyboardInterrupt(), RuntimeError("CUDA error")):
        with pytest.raises(RunFailure if error is rust else type(error)) as raised:
            broken_off(run, error, 2)
        assert error is not rust or str(raised.value) == text
        assert tree(run.path) == before
        assert names(run.checkpoints) == ["step-1"]
    real = os.rename

    def second_fails(source: Any, target: Any) -> None:  # while step 1 is being replaced
        full_disk() if Path(source).name == ".step-1.partial" else real(source, target)

    for function, broken, step in (("fsync", full_disk, 2), ("rename", full_disk, 2), ("rename", second_fails, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, function, broken)
            with pytest.raises(RunFailure, match=r"disk is full\. Safe on disk: .*step-1"):
                save(run, step, b"new")
        assert tree(run.path) == before
        assert names(run.checkpoints) == ["step-1"]
    assert run.newest_checkpoint() == kept
    save(run, 1, b"new")
    assert (kept / "adapter.safetensors").read_bytes() == b"new"
    assert names(run.checkpoints) == ["step-1"]


def test_killed_at_any_moment_of_writing_there_is_a_whole_checkpoint(run):
    """Step 2 is written twice over; the process dies at its first, second, ... flush or rename."""

    def write_until(moment: int) -> None:
        calls = itertools.count(1)

        def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: os._exit(9) if next(calls) == moment else function(*arguments)

        atomic.os.rename, atomic.os.replace, atomic.os.fsync = map(mortal, (os.rename, os.replace, os.fsync))
        save(run, 2, b"new")

    save(run, 1)
    for old in (None, b"old"):
        if old is not None:
            save(run, 2, old)
        for moment in itertools.count(1):
            code = in_fork(lambda moment=moment: write_until(moment))
            if code == 0:
                assert moment == 1 + 3 + 5 + 2 + 1  # complete.json; three files, two folders; renames; the parent
                break
            assert code == 9
            resume_run(run.path, RECIPE, ENVIRONMENT, before=RECIPE)  # clears leftovers
            newest = run.newest_checkpoint()
            assert not [name for name in names(run.checkpoints) if name.startswith(".")]
            if old is not None:
                assert newest.name == "step-2"
                assert (newest / "adapter.safetensors").read_bytes() in (b"old", b"new")
    assert tree(run.checkpoints / "step-2")["adapter.safetensors"] == b"new"


def test_files_and_results_are_replaced_whole(run, monkeypatch):
    run.write_json("eval/a.json", {"a": 1})
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, function, full_disk)
            with pytest.raises(OSError, match="No space left"):
                atomic_write_bytes(run.path / "eval/a.json", b"new")
        assert tree(run.path / "eval") == {"a.json": b'{\n  "a": 1\n}\n'}
    for content in ("one", "two"):
        with run.result_directory("adapter") as path:
            (path / "adapter.txt").write_text(content)
            assert run.adapter.exists() is (content == "two")
    with pytest.raises(OSError, match="No space left"), run.result_directory("adapter"):
        full_disk()
    assert tree(run.adapter) == {"adapter.txt": b"two"}


def test_a_warning_that_the_log_cannot_take_reaches_the_console(run, monkeypatch, caplog):
    monkeypatch.setattr(run_directory, "_append", full_disk)
    with log_to(run), unharmed("report.html", ". Fix: make room"):
        full_disk()
    assert re.fullmatch(r"report.html was not written: .*No space left on device. Fix: make room", caplog.messages[-1])


def test_json_is_strict():
    values = {"a": np.float32(0.5), "b": torch.tensor(3), "c": (1, True, None), "d": Path("x/y"), "é": np.bool_(True)}
    assert json_text(values) == '{"a": 0.5, "b": 3, "c": [1, true, null], "d": "x/y", "é": true}'
    assert json_text([float("nan"), float("inf"), np.float32("nan"), np.float64("nan")]) == "[null, null, null, null]"
    for value in (np.zeros(3), torch.zeros(3), object()):
        with pytest.raises((ValueError, RuntimeError, AttributeError)):
            json_text(value)


def test_metrics_and_the_log_are_whole_lines(run):
    run.append_metrics({"step": 2, "loss": float("nan"), "tasks": {"a": np.int64(3)}})
    assert run.metrics_file.read_bytes() == b'{"step": 2, "loss": null, "tasks": {"a": 3}}\n'
    run.append_metrics({"step": 3, "text": "a\ud800\u2028b"})  # half a surrogate pair is written as its escape
    assert run.metrics()[1] == {"step": 3, "text": "a\ud800\u2028b"}
    run.log(f"first\nsecond {TOKEN}")
    run.log("third")
    first, third = run.log_file.read_text().splitlines()
    assert (first[:2], first[19:]) == ("20", "Z first second hf_***")
    assert third.endswith("Z third")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 8), st.floats() | st.text(max_size=5), st.booleans()), max_size=8),
    st.integers(-1, 9),
    st.booleans(),
    st.data(),
)
def test_truncated_metrics_are_those_up_to_the_checkpoint(tmp_path, lines, after_step, again, data):
    """Without the evaluation that is made again, and the line that a kill -9 has cut off."""
    run = RunDirectory(tmp_path)
    run.metrics_file.write_bytes(b"")
    expected = []
    for step, value, is_evaluation in lines:
        before = run.metrics_file.stat().st_size
        run.append_metrics({"step": step, "eval" if is_evaluation else "value": value})
        if step <= after_step and not (again and is_evaluation and step == after_step):
            expected.append(run.metrics_file.read_bytes()[before:])
    torn = b'{"step": 0, "value": [1, {"a": "b\\n"}]}\n'
    content = run.metrics_file.read_bytes() + torn[: data.draw(st.integers(0, len(torn) - 2))]
    run.metrics_file.write_bytes(content)
    run.truncate_metrics(after_step, evaluates_again=again)
    assert run.metrics_file.read_bytes() == b"".join(expected)
    run.append_metrics({"step": 9})
    assert run.metrics_file.read_bytes() == b"".join(expected) + b'{"step": 9}\n'


def test_truncation_keeps_a_whole_last_line_and_drops_garbage(run):
    run.truncate_metrics(5)
    assert not run.metrics_file.exists()
    run.metrics_file.write_bytes(b'{"step": 1}\n\x00\x00\x00\n[1]\n{"a": 1}\n{"step": 3}\n\xff\n{"step": 2}')
    assert run.metrics() == [{"step": 1}, {"step": 3}, {"step": 2}]
    evaluations = [f"step-{name}.json" for name in ("2", "3", "3-generated", "3-validation-limit-2")]
    for name in evaluations:
        run.write_json(f"eval/{name}", {})
    run.truncate_metrics(2)
    assert names(run.path / "eval") == [evaluations[0], evaluations[3]]  # the run's own after step 2 are gone
    assert run.metrics_file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_checkpoint_appears_whole(run):
    with run.checkpoint_directory(3) as path:
        (path / "a.bin").write_bytes(b"123456789")
        assert not (run.checkpoints / "step-3").exists()
        assert path.parent == run.checkpoints
    assert names(run.checkpoints) == ["step-3"]
    written = json.loads((run.checkpoints / "step-3" / "complete.json").read_text())
    # cbf43926: the check value of CRC-32 for these nine digits
    assert written == {"step": 3, "files": {"a.bin": {"bytes": 9, "crc32": "cbf43926"}}}
    assert run.newest_checkpoint() == run.checkpoints / "step-3"


def test_the_newest_checkpoint_is_by_number(run, tmp_path):
    recipe = support.tiny_recipe(tmp_path)
    with pytest.raises(UserError, match=r"^--step: got 3, must be one of \[\] in .*/run\.$"):
        trained_state(run, recipe, 3)
    saved = [save(run, step) for step in (9, 10, 100)]
    for name in ("step-200", ".step-300.partial", "step-x", "step-4000.old"):
        (run.checkpoints / name).mkdir()
    assert run.newest_checkpoint() == saved[-1]
    assert run.checkpoint_steps() == [9, 10, 100, 200]
    with pytest.raises(UserError, match=r"--step: got 3, must be one of \[9, 10, 100, 200\] in "):
        trained_state(run, recipe, 3)


@pytest.mark.parametrize(
    "file, content, fault",
    [
        ("complete.json", None, "complete.json: No such file or directory"),
        ("complete.json", b'{"step": 2, "fi', "complete.json is damaged"),
        ("complete.json", b"[]", "complete.json is damaged"),
        ("complete.json", b'{"files": {"a": 3}}', "a: No such file or directory"),
        ("complete.json", b'{"files": {"../../x": {"bytes": 0, "crc32": "00000000"}}}', "../../x is outside"),
        ("adapter.safetensors", b"weight", "has 6 bytes, not 7"),
        ("adapter.safetensors", b"weighus", "adapter.safetensors has changed"),
        ("state/optimizer.json", None, "optimizer.json: No such file or directory"),
    ],
)
def test_a_damaged_checkpoint_is_skipped(run, file, content, fault, caplog):
    first, damaged = save(run, 1), save(run, 2)
    (run.path / "x").touch()
    (damaged / file).unlink() if content is None else (damaged / file).write_bytes(content)
    found = checkpoint_fault(damaged)
    assert fault in found
    assert run.newest_checkpoint() == first
    assert f"Skipped a damaged checkpoint: step-2: {found}. Using {run.checkpoints}" in caplog.text
    # with the older one gone as well, going on from nothing is refused
    (first / "complete.json").unlink()
    with pytest.raises(RunFailure, match=r"damaged \(step-2: .*; step-1: complete.json: No such file"):
        run.newest_checkpoint()


def test_prune_keeps_the_newest_whole_ones_and_what_they_need(run):
    for step in (1, 2, 3, 10, 20):
        save(run, step)
    needs = {"step-20": 2, "step-10": 1, "step-2": 3}
    (run.checkpoints / "step-30").mkdir()  # not whole
    (run.checkpoints / "notes").mkdir()  # not ours
    assert run.prune_checkpoints(1, lambda path: needs.get(path.name)) == 4
    for keep, left in ((5, ["step-2", "step-20"]), (2, ["step-2", "step-20"]), (1, ["step-20"])):
        run.prune_checkpoints(keep)
        assert names(run.checkpoints) == ["notes", *left]
    (run.checkpoints / "step-20" / "complete.json").unlink()
    run.prune_checkpoints(1)  # nothing whole: nothing is thrown away
    assert names(run.checkpoints) == ["notes", "step-20"]
