""""""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json


@verb
def generate(
    target: Annotated[str, typer.Argument(help="A run directory, a model directory, a Hub id, or builtin.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the model is given; - reads standard input.")],
    system: Annotated[str | None, typer.Option(help="System message, where there is a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: the model goes on from the prompt.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; the finished adapter if left out.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a run, the base without the adapter.")] = False,
    quant: Annotated[str | None, typer.Option(help="Of a dense model: nf4, fp4 or int8.")] = None,
    json_: Json = False,
) -> None:
    """Stream what a run, an export or a bare model says to a prompt."""
    from qdora.run.generate import Sampling, generate_from

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    sampling = Sampling(temperature, top_p, top_k, seed, max_new_tokens)
    result = generate_from(
        target,
        sys.stdin.read() if prompt == "-" else prompt,
        sampling,
        system=system,
        raw=raw,
        step=step,
        base_only=base,
        quant=quant,
        write=None if json_ else write,
    )
    emit(result, json_)
