"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", "-d", help="Where the run is written; runs/<name> if left out.")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--tasks", "-t", help="Task of the run's mix or built-in; repeatable.")
]
