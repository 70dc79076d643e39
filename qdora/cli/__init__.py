"""The command line, one file a verb. A verb imports what it needs when it runs, so that `qdora --help` is fast."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Annotated

import typer

import qdora
from qdora.cli.doctor import doctor
from qdora.cli.eval import evaluate
from qdora.cli.export import export
from qdora.cli.generate import generate
from qdora.cli.guide import guide
from qdora.cli.plan import plan
from qdora.cli.preview import preview
from qdora.cli.rank import rank
from qdora.cli.recipes import recipes
from qdora.cli.report import report
from qdora.cli.schema import schema
from qdora.cli.study import study
from qdora.cli.train import train
from qdora.cli.validate import validate
from qdora.cli.verb import Debug, Json, Quiet, ask, end_as_by_ctrl_c, repeat_lost_interrupts
from qdora.files.environment import num_cpus, other_load

VERBS = {
    "train": train,
    "eval": evaluate,
    "export": export,
    "generate": generate,
    "plan": plan,
    "preview": preview,
    "rank": rank,
    "study": study,
    "report": report,
    "validate": validate,
    "recipes": recipes,
    "schema": schema,
    "doctor": doctor,
    "guide": guide,
}

app = typer.Typer(
    name="qdora",
    help="Fine-tune a language model with DoRA or LoRA on a frozen 4-bit base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _function in VERBS.items():
    app.command(_name)(_function)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qdora {qdora.__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Debug = False,
    quiet: Quiet = False,
    json_: Json = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that are also accepted before the verb."""
    ask(debug=debug, quiet=quiet, json=json_)


WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""OpenMP's threads sleep while they wait: by the standard's variable, and by that of Intel's and LLVM's library."""

BUSY = 0.5
"""Load of a core by other processes, from which on threads sleep."""


def let_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `WAITING` if other processes use this machine's cores, and the user has not chosen how threads wait.

    By default threads spin, for libgomp about a millisecond and more at each of thousands of products a step. A
    process that meets another on its cores then burns the other's time and its own, and is several times slower than
    with sleeping threads; on idle cores spinning is the faster way. torch reads the variables as it is imported, so
    this comes before. Processes that this one starts inherit the choice.
    """
    is_chosen = any(name in environment for name in (*WAITING, "GOMP_SPINCOUNT"))
    if not is_chosen and other_load() >= BUSY * num_cpus():
        environment.update(WAITING)


def hide_frames(environment: MutableMapping[str, str] = os.environ) -> None:
    """Of a process of several: without torch's C++ frames about a store whose process has ended, which says it itself.

    torch reads the variable as it is imported.
    """
    if "WORLD_SIZE" in environment:
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def main() -> None:
    """The entry point of the `qdora` command."""
    hide_frames()
    let_threads_sleep()
    repeat_lost_interrupts()
    end_as_by_ctrl_c()
    app()
