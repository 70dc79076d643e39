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
from qdora.cli.verb import Debug, Json, Quiet, ask, end_as_by_ctrl_c

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


def set_up(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what torch reads as it is imported, unless the user has.

    OpenMP's threads spin while they wait, which is fastest on idle cores, but 2 to 25 times slower than sleeping where
    two processes meet on the same cores. The two variables are the standard's and that of Intel's and LLVM's library.
    """
    if "WORLD_SIZE" in environment:  # torch's C++ stack traces of a lost connection hide the line that names it
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import psutil  # 20 ms, which `import qdora.cli` does not take

    is_chosen = {"OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"} & environment.keys()
    if not is_chosen and psutil.cpu_percent(interval=0.05) >= 50:
        environment.update({"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"})


def main() -> None:
    """The entry point of the `qdora` command."""
    set_up()
    end_as_by_ctrl_c()
    app()
