"""Options and arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting.")]
Step = Annotated[int | None, typer.Option(help="Checkpoint step; default: the adapter, else the newest checkpoint.")]
_TRAINED_ON = (
    "For an adapter: the form of its base in training: nf4, fp4, int8, none, or nf4-single or fp4-single, without "
    "double quantisation; default: as the files of adapter or base say, else nf4."
)
AdapterQuant = Annotated[str | None, typer.Option(help=_TRAINED_ON)]
Quant = Annotated[
    str | None,
    typer.Option(help=f"Quantise a bare model: nf4, fp4 or int8; default: not quantised. {_TRAINED_ON}"),
]
BaseModel = Annotated[
    str | None, typer.Option(help="Base of an adapter; default: the one that its adapter_config.json names.")
]
Recipe = Annotated[str, typer.Argument(help="A shipped recipe (see `qdora recipes`) or a YAML file.")]
Target = Annotated[
    str, typer.Argument(help="A run, an export, an adapter, a model directory, a Hub id, a .gguf file, or builtin.")
]
Run = Annotated[Path, typer.Argument(help="A run directory.")]
