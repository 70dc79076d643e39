""""""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json
from qdora.errors import UserError


@verb
def study(
    study: Annotated[Path, typer.Argument(help="A YAML file: a recipe, axes, and what is compared.")],
    directory: Annotated[
        Path | None, typer.Option("--dir", "-d", help="Where it is written; runs/studies/<name> if left out.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only part I of N of the cells.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try cells again that were given up.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every cell, say what would run.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Start so many processes, and end.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Of --jobs: slurm (default) or local.")] = None,
    job_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of --jobs: what submitit takes, as timeout_min=600.")
    ] = None,
    json_: Json = False,
) -> None:
    """Run a grid of recipes, each cell once, by any number of processes; started again it goes on."""
    from qdora.study.runner import study_run, submit_study

    if jobs is not None:
        if shard is not None or dry_run or retry_failed:
            raise UserError("--jobs: starts processes that share all cells, allowed: without --shard and --dry-run.")
        emit(submit_study(study, directory, jobs, cluster or "slurm", job_option or []), json_)
        return
    if cluster is not None or job_option:
        raise UserError("--cluster, --job-option: belong to --jobs, allowed: with it.")
    emit(study_run(study, directory, shard=shard, retry_failed=retry_failed, dry_run=dry_run), json_)
