"""qdora report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.verb import emit, verb
from qdora.errors import UserError, not_there


@verb
def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a run or of a study, finished or not.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the report; default: the run itself, or report/ in the study.")
    ] = None,
) -> None:
    """Write the report of a run or of a study.

    That of a run is one HTML page. That of a study also has Markdown and CSV files.
    """
    if (directory / "study.json").is_file():
        from qdora.study.report import report_run

        emit(report_run(directory, out))
    elif (directory / "recipe.yaml").is_file():
        from qdora.run.run_page import page_of_run

        emit(page_of_run(directory, out))
    else:
        kind = "a run (it has no recipe.yaml) or a study (no study.json)"
        raise UserError(not_there(directory, kind, "name a directory that 'qdora train' or 'qdora study' made."))
