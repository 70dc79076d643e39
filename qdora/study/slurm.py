"""Several processes on one study through submitit: jobs of SLURM, or processes of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora.errors import UserError


def submit_jobs(
    command: Sequence[str],
    directory: Path,
    num_jobs: int,
    *,
    cluster: str = "slurm",
    parameters: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Start the same command several times; the claims of the study share the cells out as they come.

    Args:
        command: Program and arguments; all jobs must see the study's directory under the same path.
        directory: Of the study; the jobs' output is in slurm/.
        num_jobs: At least 1.
        cluster: slurm, or local for processes of this machine.
        parameters: What submitit takes: timeout_min, gpus_per_node, slurm_partition, ...
    Returns:
        submitit's jobs.
    Raises:
        UserError: submitit is missing, or does not know a parameter or the cluster.
    """
    try:
        import submitit
        from submitit.helpers import CommandFunction
    except ImportError:
        raise UserError("--submit: submitit is not installed. Run: pip install 'qdora[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=directory / "slurm" / "%j", cluster=cluster)
        executor.update_parameters(name="qdora-study", **dict(parameters or {}))
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--submit: {reason}") from None
    with executor.batch():
        return [executor.submit(CommandFunction(list(command))) for _ in range(num_jobs)]
