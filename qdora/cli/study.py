"""qdora study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.verb import emit, verb
from qdora.errors import Interrupted, UserError


@verb
def study(
    study: Annotated[Path, typer.Argument(help="A YAML file with a recipe, axes, and what to compare.")],
    directory: Annotated[
        Path | None, typer.Option("--dir", "-d", help="Directory of the study; default: runs/studies/<name>.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Run only part I of N of the cells.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells again that have used up their tries.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every cell, and print what would run and how long it takes.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Submit this many processes and end.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Where --jobs run: slurm (default) or local.")] = None,
    job_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --jobs: an option of submitit, such as timeout_min=600."),
    ] = None,
) -> None:
    """Run a grid of recipes, each cell once.

    Any number of processes can work on one study. The same command continues an interrupted study.
    """
    if jobs is not None:
        from qdora.study.cluster_jobs import submit_study

        if shard is not None or dry_run or retry_failed:
            raise UserError(
                "--jobs: is not used with --shard, --dry-run or --retry-failed: its processes share all cells. "
                "Fix: remove them."
            )
        emit(submit_study(study, directory, jobs, cluster or "slurm", job_option or []))
        return
    if cluster is not None or job_option:
        raise UserError("--cluster, --job-option: are used only with --jobs. Fix: add --jobs.")
    from qdora.study.runner import study_run

    try:
        found = study_run(study, directory, shard=shard, retry_failed=retry_failed, dry_run=dry_run)
    except Interrupted as stopped:  # its cell goes on where it was
        words = ["qdora", "study", str(study), *(["--dir", str(directory)] if directory is not None else [])]
        words += ["--shard", shard] if shard is not None else []
        raise stopped.with_command(words) from None
    emit(found)
