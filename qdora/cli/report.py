""""""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json


@verb
def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a study, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Where the files go; report/ inside it if left out.")] = None,
    json_: Json = False,
) -> None:
    """Write what a study shows: one HTML page, Markdown, CSV and Parquet."""
    from qdora.study.report import report_run

    emit(report_run(directory, out), json_)
