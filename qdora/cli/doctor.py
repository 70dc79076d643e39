"""qdora doctor."""

from __future__ import annotations

from qdora.cli.verb import emit, verb


@verb
def doctor() -> None:
    """Report what this machine has, and how to fix what is missing."""
    from qdora.run.doctor import report, report_text

    found = report()
    emit(found, plain=report_text(found))
