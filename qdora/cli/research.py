"""Verbs that compare and measure: rank, study, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.options import Json
from qdora.command import emit, verb
from qdora.errors import UserError


@verb
def rank(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    method: Annotated[str, typer.Option(help="curvature, svd (of the update), gradient, or gates.")] = "curvature",
    budget: Annotated[
        str | None, typer.Option(help="Parameters of the factors, or a share of the run's own: 50%.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="In place of a budget: each layer keeps this share of its energy, 0 to 1.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Largest rank; twice the run's if left out.")] = None,
    draws: Annotated[
        int | None, typer.Option(min=0, help="Of labels, to estimate curvature: 16 if left out; 0: exact, slow.")
    ] = None,
    eigenvalues: Annotated[int | None, typer.Option(min=0, help="Of the curvature, beside the ranks: slow.")] = None,
    curvature: Annotated[
        str | None, typer.Option(help="Whose eigenvalues: hessian (if left out) or gauss_newton.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="Of DoRA: attached (the loss; if left out) or held.")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Only these layers: name or pattern; repeatable. Others keep their rank.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Training examples that are looked at: 64 if left out.")
    ] = None,
    micro_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens at once: bounds the memory.")] = None,
    over_all: Annotated[bool, typer.Option("--over-all", help="Also the curvature of all layers together.")] = False,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; the finished adapter if left out.")] = None,
    json_: Json = False,
) -> None:
    """Choose a rank for each layer of a run, and write a recipe with these ranks into it."""
    from qdora.verbs.rank import rank_run
    from qdora.verbs.rank_settings import RankSettings

    asked = RankSettings(
        method=method,
        budget=budget,
        threshold=threshold,
        max_rank=max_rank,
        draws=draws,
        eigenvalues=eigenvalues,
        curvature=curvature,
        norm=norm,
        layers=layers or (),
        examples=examples,
        micro_batch_tokens=micro_batch_tokens,
        over_all=over_all,
    )
    emit(rank_run(run, asked, step=step), json_)


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
    from qdora.verbs.study import study_run, submit_study

    if jobs is not None:
        if shard is not None or dry_run or retry_failed:
            raise UserError("--jobs: starts processes that share all cells, allowed: without --shard and --dry-run.")
        emit(submit_study(study, directory, jobs, cluster or "slurm", job_option or []), json_)
        return
    if cluster is not None or job_option:
        raise UserError("--cluster, --job-option: belong to --jobs, allowed: with it.")
    emit(study_run(study, directory, shard=shard, retry_failed=retry_failed, dry_run=dry_run), json_)


@verb
def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a study, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Where the files go; report/ inside it if left out.")] = None,
    json_: Json = False,
) -> None:
    """Write what a study shows: one HTML page, Markdown, CSV and Parquet."""
    from qdora.verbs.report import report_run

    emit(report_run(directory, out), json_)
