""""""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json, Tasks


@verb
def evaluate(
    target: Annotated[str, typer.Argument(help="A run directory, a model directory, a Hub id, or builtin.")],
    tasks: Tasks = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "validation",
    data: Annotated[Path | None, typer.Option(help="Folder of <task>/<split>.parquet for the built-in tasks.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file whose perplexity is measured; repeatable.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; the finished adapter if left out.")] = None,
    like: Annotated[Path | None, typer.Option(help="Use this run's data; show its results beside.")] = None,
    quant: Annotated[str | None, typer.Option(help="Of a bare model: nf4, fp4 or int8; dense if left out.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a run, evaluate the base without the adapter.")] = False,
    method: Annotated[
        str | None, typer.Option(help="loglikelihood, or generate: also let it answer. The run's if left out.")
    ] = None,
    harness: Annotated[
        list[str] | None, typer.Option(help="Task, group or pattern of lm-evaluation-harness; repeatable.")
    ] = None,
    harness_include: Annotated[
        Path | None, typer.Option(help="Folder of further harness tasks in YAML; they may run code.")
    ] = None,
    json_: Json = False,
) -> None:
    """Score a run, a merged directory or a bare model: accuracy, answer NLL, perplexity."""
    from qdora.run.evaluate import evaluate_target

    result = evaluate_target(
        target,
        tasks=tasks,
        limit=limit,
        split=split,
        data=data,
        texts=text or [],
        step=step,
        base_only=base,
        like=like,
        quant=quant,
        method=method,
        harness=harness or [],
        harness_include=harness_include,
    )
    emit(result, json_)
