"""qdora rank."""

from __future__ import annotations

from typing import Annotated

import typer

from qdora.cli.shared_options import Run, Step
from qdora.cli.verb import emit, verb


@verb
def rank(
    run: Run,
    method: Annotated[str, typer.Option(help="curvature, svd (of the update), gradient, or gates.")] = "curvature",
    budget: Annotated[
        str | None, typer.Option(help="Parameters of the factors: a number, or a share of the run's own such as 50%.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Instead of --budget: share of its worth that each layer keeps, 0 to 1.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of a layer; default: twice the largest rank of the run.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=0, help="Label samples per token (default 16; 0: exact, slow).")
    ] = None,
    eigenvalues: Annotated[
        int | None, typer.Option(min=0, help="Also compute this many eigenvalues of the curvature (slow).")
    ] = None,
    curvature: Annotated[
        str | None, typer.Option(help="Matrix of --eigenvalues: hessian (default) or gauss_newton.")
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="DoRA's norm: attached (default: differentiated) or held (a constant).")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Only these layers: name or pattern; repeatable. Others keep their rank.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples to use (default 64).")] = None,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a micro-batch; fewer need less memory.")
    ] = None,
    step: Step = None,
) -> None:
    """Choose a rank for each layer of a run.

    A recipe with these ranks is written to the folder rank/ of the run.
    """
    from qdora.files.run_directory import failures_logged
    from qdora.rank.rank import RankSettings, rank_run

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
    )
    with failures_logged(run, "rank"):
        emit(rank_run(run, asked, step=step))
