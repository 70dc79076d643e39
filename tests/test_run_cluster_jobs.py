"""`qdora train --submit`: one task of submitit for each GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.files.run_directory import open_run
from qdora.recipe.recipe_file import resolved_yaml
from qdora.run.cluster_jobs import JobSize, TrainingTask, job_size, process_variables
from qdora.run.train import train_run
from qdora.train.process_watch import LOG
from tests.test_train_distributed import assert_close_runs, exact, lines

ROOT = Path(__file__).resolve().parent.parent


def test_options_are_read() -> None:
    assert job_size("nodes=2,gpus=8") == JobSize(2, 8, "slurm", {})
    more = "slurm_exclude=a1,a2,slurm_additional_parameters={x: 1, y: 2}"
    found = job_size(f"gpus=2, cluster=local,timeout_min=30,{more}")
    rest = {"timeout_min": 30, "slurm_exclude": "a1,a2", "slurm_additional_parameters": {"x": 1, "y": 2}}
    assert found == JobSize(1, 2, "local", rest)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        job_size("timeout_min,nodes=0,gpus=two,gpus=2.5,gpus_per_node=8,cluster=slrum")
    assert caught.value.faults == (
        "--submit: must be key=value such as timeout_min=600, got 'timeout_min'.",
        "--submit: gpus is given twice.",
        "--submit: gpus_per_node: is not used, since each GPU has one process. Fix: set gpus.",
        "--submit: nodes: must be a whole number of at least 1, got 0.",
        "--submit: gpus: must be a whole number of at least 1, got 2.5.",
        "--submit: cluster: got 'slrum', must be one of slurm, local. Did you mean 'slurm'?",
    )
    with pytest.raises(UserError, match="nodes: must be 1 with cluster=local, got 2"):
        job_size("cluster=local,nodes=2")


def submitted(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["train", *(str(each) for each in arguments)])


def test_faults_of_the_recipe_are_told_with_those_of_the_job(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("adapter: {rank: 0}\n")
    found = submitted(file, "-d", tmp_path / "run", "--submit", "nodes=none")
    assert found.exit_code == 2
    assert "--submit: nodes: must be a whole number of at least 1, got 'none'." in found.stderr
    assert "adapter.rank" in found.stderr
    assert not (tmp_path / "run").exists()


SLURM = {
    "SUBMITIT_EXECUTOR": "slurm",
    "SUBMITIT_FOLDER": "/runs/a/slurm/%j",
    "SLURM_JOB_ID": "123",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


def test_variables_of_torch_come_from_those_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = process_variables()
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "MASTER_ADDR": "gpu07",
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        LOG: "/runs/a/slurm/123/123_11_log.err",
    }
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert int(process_variables()["MASTER_PORT"]) == port  # all tasks find the same
    assert 1024 < port < 65536


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM that only keeps the script of a job."""
    pytest.importorskip("submitit")
    programs = tmp_path / "bin"
    programs.mkdir()
    kept = tmp_path / "job.sh"
    texts = {"sbatch": f'cp "$1" {kept}\n[ -e {tmp_path}/refuse ] && {{ echo "error: no partition" >&2; exit 1; }}\n'}
    texts["sbatch"] += "echo Submitted batch job 123\n"
    for name, text in {"srun": "", **texts}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return kept


def test_a_job_of_slurm_has_a_task_for_each_gpu(root: Path, tmp_path: Path, sbatch: Path) -> None:
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(resolved_yaml(exact(root)))
    asked = ("--submit", "nodes=2,gpus=8,slurm_partition=a100")
    found = submitted(file, "-s", "train.steps=2", "-d", run, "--json", *asked)
    assert found.exit_code == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["job"] == "123"
    assert told["num_processes"] == 16
    assert told["logs"] == str(run / "slurm/123")
    assert told["command"].endswith(f"train {file} -s train.steps=2 --run-dir {run}")
    script = sbatch.read_text()
    for flag in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=1440", "partition=a100", "signal=USR2@90"):
        assert f"#SBATCH --{flag}\n" in script
    assert "--kill-on-bad-exit=1" in script
    cpus = "cpus_per_task=3", "slurm_cpus_per_task=3", "slurm_cpus_per_gpu=3"
    for number, (given, flags) in enumerate(zip(("", *cpus), (["task=8"], *[["task=3"]] * 2, ["gpu=3"]), strict=True)):
        with warnings.catch_warnings(action="ignore"):  # of submitit, about cpus_per_gpu
            assert (
                submitted(file, "-d", tmp_path / str(number), "--submit", f"gpus=2,{given}".strip(",")).exit_code == 0
            )
        script = sbatch.read_text()
        assert re.findall("#SBATCH --cpus-per-(.*)", script) == flags
        assert re.findall("srun .* --cpus-per-(task=.)", script) == [each for each in flags if "task" in each]
    (tmp_path / "refuse").touch()
    found = submitted(file, "-d", run, *asked)
    assert found.exit_code == 2
    assert re.search(r"--submit: SLURM refuses the job: .*no partition", found.stderr)
    found = submitted(file, "-d", run, "--submit", "gpus=8,timeout_mn=5")
    assert found.exit_code == 2
    assert found.stderr.startswith("--submit: ")
    assert "timeout_mn" in found.stderr


def task(directory: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> TrainingTask:
    for name, value in {**SLURM, "SLURM_PROCID": str(rank)}.items():
        monkeypatch.setenv(name, value)
    return TrainingTask([sys.executable, "-c", *arguments], directory)


@pytest.mark.parametrize("rank, code, ends", [(0, 130, 130), (1, 130, None), (1, 1, 1), (1, 0, None), (1, -9, 137)])
def test_a_task_ends_as_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: int, code: int, ends: Any
) -> None:
    pytest.importorskip("submitit")
    how = f"os.kill(os.getpid(), {-code})" if code < 0 else f"os._exit({code})"
    run = task(tmp_path, f"import os; print(os.environ['RANK']); {how}", monkeypatch=monkeypatch, rank=rank)
    if ends is None:
        run()
        return
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == ends
    how = "signal SIGKILL" if code < 0 else f"exit code {code}"
    assert f"process {rank} of 16 ended with {how}.\n" in capfd.readouterr().err


def test_a_task_resumes_a_run_that_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    code = f"import sys; open({str(tmp_path / 'said')!r}, 'w').write(' '.join(sys.argv[1:]))"
    run = task(tmp_path / "run", code, "train", monkeypatch=monkeypatch)
    run()
    assert (tmp_path / "said").read_text() == "train"
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    run.checkpoint().function()
    assert (tmp_path / "said").read_text() == "train --resume"


@pytest.fixture
def local(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Submits two processes on this machine; the jobs are ended afterwards."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    made: list[Any] = []
    real = submitit.AutoExecutor.submit

    def submit(executor: Any, *arguments: Any) -> Any:
        made.append(real(executor, *arguments))
        return made[-1]

    monkeypatch.setattr(submitit.AutoExecutor, "submit", submit)

    def start(**changes: Any) -> tuple[Any, Path]:
        file = tmp_path / "recipe.yaml"
        file.write_text(resolved_yaml(exact(root, **changes)))
        found = submitted(file, "-d", tmp_path / "run", "--submit", "gpus=2,cluster=local,timeout_min=10")
        assert found.exit_code == 0, found.stderr
        assert found.stdout.startswith(f"job {made[-1].job_id}: 2 processes\nrun: {tmp_path / 'run'}\n")
        return made[-1], tmp_path / "run"

    yield start
    for job in made:
        job.cancel()
        job._process.wait(30)


@pytest.mark.slow
def test_two_tasks_on_this_machine_train_a_run(local: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    train_run(exact(root), tmp_path / "one")
    job, run = local()
    assert job.results() == [None, None]
    assert_close_runs(tmp_path / "one", run)


@pytest.mark.slow
def test_a_job_that_is_preempted_saves_and_resumes(local: Callable[..., Any]) -> None:
    job, run = local(train__steps=60, train__checkpoint_every=...)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    for pid in processes(b"submitit.core._submit", run):  # as SLURM sends it to all tasks
        os.kill(pid, signal.SIGUSR2)
    wait_for(lambda: open_run(run).newest_checkpoint() is not None)
    newest = open_run(run).newest_checkpoint()
    assert newest is not None
    assert 0 < newest.step < 60
    job._process.wait(240)
    assert f"Continuing from {newest.path}" in (run / "log.txt").read_text()
    assert [line["step"] for line in lines(run)] == list(range(1, 61))


@pytest.mark.slow
def test_a_task_that_is_killed_is_named_with_its_log(local: Callable[..., Any]) -> None:
    job, run = local(train__steps=5000)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    (second,) = [pid for pid in processes(b"qdora.cli", run) if rank_of(pid) == "1"]
    began = time.monotonic()
    os.kill(second, signal.SIGKILL)
    job._process.wait(60)
    assert time.monotonic() - began < 60
    log = run / "slurm" / job.job_id / f"{job.job_id}_1_log.err"
    assert log.read_text().splitlines()[-1] == "process 1 of 2 ended with signal SIGKILL."
    told = f"process 0: stopped, because process 1 \\(on \\S+, its log: {log}\\) has ended without a message"
    assert re.search(told, (log.parent / f"{job.job_id}_0_log.err").read_text())
    assert re.search(told, (run / "log.txt").read_text())


def rank_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(each for each in variables if each.startswith(b"RANK=")).decode().removeprefix("RANK=")


def wait_for(is_there: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not is_there():
        assert time.monotonic() - began < 200
        time.sleep(0.1)


def processes(module: bytes, run: Path) -> list[int]:
    """Processes of a module that name this run, or a folder in it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if module in words and any(word.startswith(os.fsencode(run)) for word in words):
            found.append(int(place.name))
    return found
