"""qdora eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.shared_options import BaseModel, Quant, Step, Target
from qdora.cli.verb import emit, verb


@verb
def evaluate(
    target: Target,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            help="A source of the run or a built-in task; repeatable. With data of your own: the source of the run "
            "that has the same format.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many examples of each task.")] = None,
    split: Annotated[
        str | None, typer.Option(help="validation (default), test or train; with --data any split of it.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Score this data: a file, folder, pattern or Hub id. With --tasks of the eight commonsense tasks: "
            "their folder of <task>/<split>.parquet."
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None, typer.Option("--text", help="Measure the perplexity of this text file; repeatable.")
    ] = None,
    step: Step = None,
    like: Annotated[
        Path | None, typer.Option(help="For a model: use the data of this run, and also show the run's results.")
    ] = None,
    base_model: BaseModel = None,
    quant: Quant = None,
    base_only: Annotated[
        bool, typer.Option("--base", help="Evaluate the base of the run without its adapter.")
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(help="loglikelihood, or generate: also score generated answers. Default: eval.method of the run."),
    ] = None,
    harness: Annotated[
        list[str] | None, typer.Option(help="Task, group or pattern of lm-evaluation-harness; repeatable.")
    ] = None,
    harness_include: Annotated[
        Path | None, typer.Option(help="Folder of further harness tasks in YAML. They may run code.")
    ] = None,
) -> None:
    """Score a run, an export, an adapter or a bare model.

    The scores are NLL and accuracy on tasks, perplexity of text files, and tasks of lm-evaluation-harness.
    """
    options = {name: value for name, value in locals().items() if name != "target" and value is not None}
    from qdora.files.run_directory import failures_logged
    from qdora.run.evaluate import EvalOptions, evaluate_target

    with failures_logged(Path(target), "eval"):
        emit(evaluate_target(target, EvalOptions(**options)))
