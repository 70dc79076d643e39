"""qdora report: what a study shows, as a page, Markdown and data files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.study.page import write_report
from qdora.study.tables import read_report
from qdora.verbs.show import default_console


def report_run(directory: Path, out: Path | None = None, *, console: Console | None = None) -> dict[str, Any]:
    """Write the report of a study, finished or not.

    Args:
        directory: Of the study.
        out: Where the files go; report/ inside it by default.
        console: Where the verdict is shown; standard error by default.
    Returns:
        JSON values: the page, the verdict, and the comparisons.
    Raises:
        UserError: No study there, or none of its cells is finished.
    """
    console = console or default_console()
    report = read_report(directory)
    files = write_report(report, out or directory / "report", directory.resolve().name)
    for sentence in report.verdict:
        console.print(sentence, markup=False, highlight=False)
    console.print(f"report: {files[0]}", markup=False, highlight=False, soft_wrap=True)
    return {
        "page": str(files[0]),
        "files": [str(file) for file in files],
        "verdict": report.verdict,
        "comparisons": report.tables["comparisons"],
    }
