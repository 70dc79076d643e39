"""Options and arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting.")]
Step = Annotated[int | None, typer.Option(help="Checkpoint step; default: the adapter, else the newest checkpoint.")]
Quant = Annotated[
    str | None,
    typer.Option(
        help="Quantise a bare model: nf4, fp4 or int8; default: not quantised. For an adapter: how its base was held "
        "in training, also nf4-single or fp4-single (without double quantisation) or none; default: nf4."
    ),
]
BaseModel = Annotated[
    str | None, typer.Option(help="Base of an adapter; default: the one that its adapter_config.json names.")
]
Recipe = Annotated[str, typer.Argument(help="A shipped recipe (see `qdora recipes`) or a YAML file.")]
Target = Annotated[
    str, typer.Argument(help="A run, an export, an adapter, a model directory, a Hub id, a .gguf file, or builtin.")
]
Run = Annotated[Path, typer.Argument(help="A run directory.")]
