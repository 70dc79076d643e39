"""qdora doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from qdora.cli.verb import emit, verb


@verb
def doctor(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also measure the speeds that `qdora plan` uses to predict times (1 minute)."),
    ] = False,
) -> None:
    """Report what this machine has, and how to fix what is missing."""
    from qdora.run.doctor import report, report_text

    found = report()
    text = report_text(found)
    if measure:
        from qdora.plan.step_time import measure_rates, rates_text

        found["rates"] = measure_rates()
        text += rates_text(found["rates"])
    emit(found, plain=text)
