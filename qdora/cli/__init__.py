"""The command line: verbs only. Each imports what it needs when it runs, so `qdora --help` stays fast."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from qdora.cli.doctor import doctor
from qdora.cli.eval import evaluate
from qdora.cli.export import export
from qdora.cli.failures import set_debug
from qdora.cli.generate import generate
from qdora.cli.plan import plan
from qdora.cli.rank import rank
from qdora.cli.recipes import recipes
from qdora.cli.report import report
from qdora.cli.schema import schema
from qdora.cli.study import study
from qdora.cli.train import train
from qdora.cli.validate import validate

VERBS = {
    "train": train,
    "eval": evaluate,
    "export": export,
    "generate": generate,
    "rank": rank,
    "plan": plan,
    "study": study,
    "report": report,
    "validate": validate,
    "recipes": recipes,
    "schema": schema,
    "doctor": doctor,
}

app = typer.Typer(
    name="qdora",
    help="DoRA on a frozen 4-bit base for the price of QLoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _function in VERBS.items():
    app.command(_name)(_function)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
) -> None:
    """Options that stand before the verb."""
    set_debug(debug)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    # On the handler: a run lowers the level of its logger, so that log.txt has everything.
    logging.getLogger().handlers[0].setLevel(logging.WARNING if quiet else logging.INFO)
    for noisy in ("transformers", "httpx", "datasets", "accelerate", "bitsandbytes", "matplotlib", "fsspec", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Entry point."""
    app()
