"""qdora generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.shared_options import BaseModel, Quant, Step, Target
from qdora.cli.verb import emit, verb, wants_json
from qdora.errors import UserError


@verb
def generate(
    target: Target,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The user's text; - reads it from standard input.")
    ] = None,
    chats: Annotated[
        str | None,
        typer.Option(help="In place of --prompt: a data file of format messages or sharegpt; answers each row."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, for models with a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without a chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many new tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens up to this total probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many of the most likely tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    step: Step = None,
    base: Annotated[bool, typer.Option("--base", help="Use the base of the run without its adapter.")] = False,
    base_model: BaseModel = None,
    quant: Quant = None,
) -> None:
    """Print the answer of a run, an export, an adapter or a bare model.

    It answers a prompt, or each conversation of a file.
    """
    from qdora.files.run_directory import failures_logged
    from qdora.run.generate import Sampling, answer_chats, generate_from, nowhere

    if (prompt is None) == (chats is None):
        given = "neither" if prompt is None else "both"
        raise UserError(f"generate: exactly one of --prompt and --chats must be given, got {given}.")
    if chats is not None:
        unused = {"--system": system is not None, "--raw": raw}
        if faults := [f"{name}: is not used with --chats. Fix: remove it." for name, given in unused.items() if given]:
            raise UserError(*faults)

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_new_tokens=max_new_tokens)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    which = {"step": step, "base_only": base, "base_model": base_model, "quant": quant}
    shown = nowhere if wants_json() else write
    with failures_logged(Path(target), "generate"):
        if chats is not None:
            result = answer_chats(target, chats, sampling, write=shown, **which)
        else:
            text = sys.stdin.read() if prompt == "-" else str(prompt)
            result = generate_from(target, text, sampling, system=system, raw=raw, write=shown, **which)
    emit(result)
