"""Jobs on a SLURM cluster, or of processes on this machine, by submitit; and `qdora train --submit`, which is one job.

Such a job has one task for each GPU. A task starts `qdora train` with the variables that torchrun would set, taken from
those of SLURM, and ends as it ends. Before the job's time is over, or when it is preempted, submitit calls the first
task's `checkpoint`: the run is asked to stop, all processes save and end, and the job is queued again and resumes.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdora.errors import UserError, not_one_of
from qdora.files.run_directory import JOBS, RunDirectory
from qdora.recipe.recipe_file import load_recipe, missing_files, read_yaml
from qdora.run.open_directory import resumed_recipe
from qdora.train.process_watch import LOG

CLUSTERS = ("slurm", "local")
_ONE_DAY = 24 * 60
_INTERRUPTED = 130
# SLURM's default is one, on which loading, tokenising and the launch of kernels wait for each other.
_CPUS_PER_TASK = 8
_NAMES_OF_CPUS = ("cpus_per_task", "slurm_cpus_per_task", "slurm_cpus_per_gpu")


def job_executor(folder: Path, cluster: str, parameters: Mapping[str, Any], *, options: tuple[str, str, str]) -> Any:
    """submitit's executor, whose jobs have their files in `folder`.

    Args:
        folder: With %j for the number of a job. All machines of the cluster must see it under the same path.
        cluster: slurm, or local for processes on this machine.
        parameters: Of submitit: timeout_min, gpus_per_node, slurm_partition, ...
        options: What messages name: the option that asks for jobs, that of the cluster, that of the parameters.
    Raises:
        UserError: submitit is missing, or does not know a parameter or the cluster.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(f"{options[0]}: submitit is not installed. Fix: pip install 'qdora[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except (RuntimeError, ValueError, ImportError) as error:  # such as no srun on this machine
        raise UserError(f"{options[1]}: {' '.join(str(error).split())}") from None
    try:
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{options[2]}: {' '.join(str(error).split())}") from None
    return executor


def job_option(text: str, where: str) -> tuple[str, Any]:
    """Name and value of a `key=value`, whose value is YAML. Raises UserError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{where}: must be key=value such as timeout_min=600, got {text!r}.")
    return key.strip(), read_yaml(f"value: {value}", f"{where} {text}")["value"]


@dataclass(frozen=True)
class JobSize:
    """What `--submit` asks for: `gpus` processes on each of `nodes` machines, and parameters of submitit."""

    nodes: int
    gpus: int
    cluster: str
    parameters: dict[str, Any]


def job_size(text: str) -> JobSize:
    """Read `nodes=2,gpus=8,timeout_min=600`. A comma that no `key=` follows is part of a value.

    Raises UserError: With all faults.
    """
    found: dict[str, Any] = {"nodes": 1, "gpus": 1, "cluster": "slurm"}
    faults: list[str] = []
    given: set[str] = set()
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        try:
            key, value = job_option(part, "--submit")
        except UserError as error:
            faults += error.faults
            continue
        if key in given:
            faults.append(f"--submit: {key} is given twice.")
        if key in ("tasks_per_node", "gpus_per_node"):
            faults.append(f"--submit: {key}: is not used, since each GPU has one process. Fix: set gpus.")
        given.add(key)
        found[key] = value
    for key in ("nodes", "gpus"):
        if type(found[key]) is not int or found[key] < 1:
            faults.append(f"--submit: {key}: must be a whole number of at least 1, got {found[key]!r}.")
    nodes, gpus, cluster = (found.pop(key) for key in ("nodes", "gpus", "cluster"))
    if cluster not in CLUSTERS:
        faults.append(not_one_of("--submit: cluster", cluster, CLUSTERS))
    elif cluster == "local" and nodes != 1:
        faults.append(f"--submit: nodes: must be 1 with cluster=local, got {nodes!r}.")
    if faults:
        raise UserError(*faults)
    return JobSize(nodes, gpus, cluster, found)


def submit_training(
    recipe: str, overrides: Sequence[str], directory: Path, size: str, *, resume: bool, force: bool
) -> dict[str, Any]:
    """Check the recipe and the job, and submit it. The other arguments are those of `qdora train`.

    Returns:
        JSON values: the run directory, the number of the job, its logs, and the command of each process.
    Raises:
        UserError: With the faults of the job and of the recipe; or SLURM refuses the job.
    """
    directory = directory.absolute()
    faults: list[str] = []
    job = None
    try:
        job = job_size(size)
        with tempfile.TemporaryDirectory() as place:  # nothing is left of a job that is refused
            _executor(Path(place), job)
    except UserError as error:
        faults += error.faults
    try:
        loaded = resumed_recipe(directory, recipe, overrides) if resume else load_recipe(recipe, overrides)
        faults += missing_files(loaded, recipe)
        if not resume and RunDirectory(directory).has_begun:
            faults.append(f"{directory}: holds a run. Fix: resume it with --resume, or choose another --run-dir.")
    except UserError as error:
        faults += error.faults
    if faults or job is None:
        raise UserError(*faults)
    named = str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe
    words = ["train", named, *(word for item in overrides for word in ("-s", item)), "--run-dir", str(directory)]
    task = TrainingTask([sys.executable, "-m", "qdora.cli", *words, *(["--force"] if force else [])], directory)
    submitted = _submitted(_executor(directory / JOBS / "%j", job), task)
    return {
        "run": str(directory),
        "job": submitted.job_id,
        "num_processes": job.nodes * job.gpus,
        "logs": str(submitted.paths.folder),
        "command": shlex.join(task.command),
    }


def _executor(folder: Path, job: JobSize) -> Any:
    parameters = {"name": "qdora-train", "timeout_min": _ONE_DAY, **job.parameters}
    if not any(name in parameters for name in _NAMES_OF_CPUS):
        parameters["cpus_per_task"] = _CPUS_PER_TASK
    parameters |= {"nodes": job.nodes, "tasks_per_node": job.gpus, "gpus_per_node": job.gpus}
    # SLURM ends the other tasks when one has failed, in case that one of them does not notice.
    arguments = ["--kill-on-bad-exit=1"]
    cpus = parameters.get("slurm_cpus_per_task", parameters.get("cpus_per_task"))
    if cpus is not None:
        arguments.append(f"--cpus-per-task={cpus}")  # since SLURM 22.05 srun does not take it from the job
    more = job.parameters.get("slurm_srun_args", [])
    parameters["slurm_srun_args"] = [*arguments, *([more] if isinstance(more, str) else more)]
    named = "--submit", f"--submit: cluster={job.cluster}", "--submit"
    return job_executor(folder, job.cluster, parameters, options=named)


def _submitted(executor: Any, task: TrainingTask) -> Any:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        return executor.submit(task)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"--submit: SLURM refuses the job: {' '.join(str(error).split())}") from None


@dataclass
class TrainingTask:
    """One process of a job, which trains: submitit calls it in each of the job's tasks.

    Attributes:
        command: `qdora train` without --resume, which is added where the run has begun.
        directory: The run.
    """

    command: list[str]
    directory: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def __call__(self) -> None:
        """Train, and exit as `qdora train` does."""
        resume = ["--resume"] if RunDirectory(self.directory).has_begun else []
        variables = process_variables()
        self._process = subprocess.Popen([*self.command, *resume], env=os.environ | variables)
        code = self._wait(self._process)
        # A process that was asked to stop must not end the job while the first one queues it again.
        if code != 0 and not (code == _INTERRUPTED and variables["RANK"] != "0"):
            how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            print(f"process {variables['RANK']} of {variables['WORLD_SIZE']} ended with {how}.", file=sys.stderr)
            sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> Any:
        """What submitit runs after the job is queued again: the same, which resumes. The run has saved itself."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._wait(self._process)
        return DelayedSubmission(TrainingTask(self.command, self.directory))

    @staticmethod
    def _wait(process: subprocess.Popen[bytes]) -> int:
        # By a thread: submitit calls `checkpoint` from a signal's handler, and a second wait in the same thread hangs.
        waiting = threading.Thread(target=process.wait)
        waiting.start()
        waiting.join()
        return process.returncode


def process_variables() -> dict[str, str]:
    """The variables of torchrun for this task of a job, from those of SLURM; and where its output goes."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    environment, job = TorchDistributedEnvironment(), JobEnvironment()
    return {
        "MASTER_ADDR": environment.master_addr if job.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(environment.master_port),
        "RANK": str(environment.rank),
        "WORLD_SIZE": str(environment.world_size),
        "LOCAL_RANK": str(environment.local_rank),
        "LOCAL_WORLD_SIZE": str(environment.local_world_size),
        LOG: str(job.paths.stderr),
    }
