"""qdora report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.verb import emit, verb


@verb
def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a study, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Directory of the report; default: report/ in the study.")] = None,
) -> None:
    """Write the report of a study: one HTML page, Markdown, CSV and Parquet."""
    from qdora.study.report import report_run

    emit(report_run(directory, out))
