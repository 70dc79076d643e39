""""""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json


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
    from qdora.run.rank import RankSettings, rank_run

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
