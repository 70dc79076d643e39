"""The processes of a study as jobs on a SLURM cluster, or as processes on this machine, by submitit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora.errors import UserError, not_one_of
from qdora.files.console import consoles
from qdora.recipe.recipe_file import read_yaml
from qdora.study.compare import Results
from qdora.study.runner import checked_study, notes_on
from qdora.study.study_directory import StudyDirectory
from qdora.study.upcoming import cells_now

CLUSTERS = ("slurm", "local")


def submit_study(
    file: Path, directory: Path | None, num_jobs: int, cluster: str, options: Sequence[str]
) -> dict[str, Any]:
    """Check a study and start `num_jobs` processes that run it together; `options` of submitit are key=value each."""
    if cluster not in CLUSTERS:
        raise UserError(not_one_of("--cluster", cluster, CLUSTERS))
    parameters = dict(map(_job_option, options))
    expander, directory = checked_study(file, directory)
    known = Results(StudyDirectory(directory, retries=expander.study.retries), expander.study)
    notes = notes_on(expander, known)
    for note in notes:
        consoles(None)[0].print(note)
    cells_now(expander, known)
    command = [sys.executable, "-m", "qdora.cli", "study", str(file.resolve()), "--dir", str(directory)]
    jobs = submit_jobs(command, directory, num_jobs, cluster=cluster, parameters=parameters)
    return {"directory": str(directory), "notes": notes, "jobs": [job.job_id for job in jobs]}


def submit_jobs(
    command: Sequence[str], directory: Path, num_jobs: int, *, cluster: str, parameters: Mapping[str, Any]
) -> list[Any]:
    """Start the same command several times through submitit; each process claims the next free cell of the study.

    Args:
        directory: Of the study, which all jobs must see under the same path; their output goes to slurm/ inside it.
        cluster: slurm, or local for processes on this machine.
        parameters: Of submitit: timeout_min, gpus_per_node, slurm_partition, ...
    Raises:
        UserError: submitit is missing, or does not know a parameter or the cluster.
    """
    try:
        import submitit
        from submitit.helpers import CommandFunction
    except ImportError:
        raise UserError("--jobs: submitit is not installed. Fix: pip install 'qdora[slurm]'") from None
    option = f"--cluster {cluster}"
    try:
        executor = submitit.AutoExecutor(folder=directory / "slurm" / "%j", cluster=cluster)
        option = "--job-option"
        executor.update_parameters(name="qdora-study", **parameters)
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError, ImportError) as error:  # such as no srun
        raise UserError(f"{option}: {' '.join(str(error).split())}") from None
    with executor.batch():
        return [executor.submit(CommandFunction(list(command))) for _ in range(num_jobs)]


def _job_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--job-option: must be key=value such as timeout_min=600, got {text!r}.")
    return key.strip(), read_yaml(f"value: {value}", f"--job-option {text}")["value"]
