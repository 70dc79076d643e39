"""The command line: verbs only. Each imports what it needs when it runs, so `qdora --help` stays fast."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from qdora.atomic_files import json_text
from qdora.errors import Interrupted, RunFailure, UserError

USER_MISTAKE, FAILURE, INTERRUPT = 2, 1, 130

# The last three lines stand for bugs: they, too, end in one line, and --debug shows where.
EXPECTED = (
    UserError,
    RunFailure,
    Interrupted,
    KeyboardInterrupt,
    OSError,
    MemoryError,
    RuntimeError,
    ValueError,
    ImportError,
    LookupError,
    TypeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
)

_options = {"debug": False}

app = typer.Typer(
    name="qdora",
    help="DoRA on a frozen 4-bit base for the price of QLoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", "-d", help="Where the run is written; runs/<name> if left out.")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--tasks", "-t", help="Task of the run's mix or built-in; repeatable.")
]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turn what a verb raises into one line and an exit code; --debug lets it through."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except EXPECTED as error:
            if _options["debug"]:
                raise
            text, code = explain(error)
            # All processes of a launch read the same recipe and files: one a machine is enough to say what is wrong
            if not isinstance(error, UserError | Interrupted) or os.environ.get("LOCAL_RANK", "0") == "0":
                print(text, file=sys.stderr)
            raise typer.Exit(code) from None

    return run


def explain(error: BaseException) -> tuple[str, int]:
    """The line (or lines, one per fault) and the exit code of an error."""
    if isinstance(error, UserError):
        return str(error), USER_MISTAKE
    if isinstance(error, Interrupted):
        return str(error), INTERRUPT
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPT
    if isinstance(error, RunFailure):
        return str(error), FAILURE
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]} (qdora --debug shows where)", FAILURE


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
) -> None:
    """Options that stand before the verb."""
    _options["debug"] = debug
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    # On the handler: a run lowers the level of its logger, so that log.txt has everything.
    logging.getLogger().handlers[0].setLevel(logging.WARNING if quiet else logging.INFO)
    for noisy in ("transformers", "httpx", "datasets", "accelerate", "bitsandbytes", "matplotlib", "fsspec", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@app.command()
@verb
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see `qdora recipes`) or a YAML file.")],
    set_: Set = None,
    run_dir: RunDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    json_: Json = False,
) -> None:
    """Train an adapter: load the base in 4 bits, train on the mix, evaluate, save."""
    from qdora.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    directory = run_dir or Path("runs") / Path(recipe).stem
    from qdora.verbs.train import train_run

    result = train_run(loaded, directory, resume=resume)
    if result:  # empty in all processes of a launch but the first
        _emit(result, json_)


@app.command(name="eval")
@verb
def evaluate(
    target: Annotated[str, typer.Argument(help="A run directory, a model directory, a Hub id, or builtin.")],
    tasks: Tasks = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "validation",
    data: Annotated[Path | None, typer.Option(help="Folder of <task>/<split>.parquet for the built-in tasks.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file whose perplexity is measured; repeatable.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; the finished adapter if left out.")] = None,
    like: Annotated[Path | None, typer.Option(help="Use this run's data; show its results beside.")] = None,
    quant: Annotated[str | None, typer.Option(help="Of a bare model: nf4, fp4 or int8; dense if left out.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a run, evaluate the base without the adapter.")] = False,
    method: Annotated[
        str | None, typer.Option(help="loglikelihood, or generate: also let it answer. The run's if left out.")
    ] = None,
    harness: Annotated[
        list[str] | None, typer.Option(help="Task, group or pattern of lm-evaluation-harness; repeatable.")
    ] = None,
    harness_include: Annotated[
        Path | None, typer.Option(help="Folder of further harness tasks in YAML; they may run code.")
    ] = None,
    json_: Json = False,
) -> None:
    """Score a run, a merged directory or a bare model: accuracy, answer NLL, perplexity."""
    from qdora.verbs.evaluate import evaluate_target

    result = evaluate_target(
        target,
        tasks=tasks,
        limit=limit,
        split=split,
        data=data,
        texts=text or [],
        step=step,
        base_only=base,
        like=like,
        quant=quant,
        method=method,
        harness=harness or [],
        harness_include=harness_include,
    )
    _emit(result, json_)


@app.command()
@verb
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    format_: Annotated[
        str, typer.Option("--format", help="merged: one dense model; nf4-lora: 4-bit base and LoRA; peft: the adapter.")
    ] = "merged",
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32; float16 (merged), the run's own (nf4-lora).")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Merge on the dequantized base, which was trained, or on the original weights.")
    ] = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Quantise the merge to 4 bits again.")] = False,
    shard_size: Annotated[str | None, typer.Option(help="Of a weights file, as in 2GB; 5GiB if left out.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; the finished adapter if left out.")] = None,
    audit: Annotated[bool, typer.Option(help="Compare all forms of the model and say which one to ship.")] = True,
    push: Annotated[str | None, typer.Option(help="Upload it to this repository of the Hub, private if new.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository of --push public.")] = False,
    json_: Json = False,
) -> None:
    """Write the model in a form to deploy, reload it plainly and compare it with the running one."""
    from qdora.verbs.export import ExportOptions, export_run

    options = ExportOptions(format_, dtype, base, requantize, shard_size, step, audit, push, public)
    _emit(export_run(run, out, options), json_)


@app.command()
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
    from qdora.verbs.generate import Sampling, generate_from

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
    _emit(result, json_)


@app.command()
@verb
def rank(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    method: Annotated[str, typer.Option(help="curvature, svd (of the update) or gradient.")] = "curvature",
    budget: Annotated[
        str | None, typer.Option(help="Parameters of the factors, or a share of the run's own: 50%.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="In place of a budget: each layer keeps this share of its energy, 0 to 1.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Largest rank; twice the run's if left out.")] = None,
    curvature: Annotated[str | None, typer.Option(help="hessian (if left out) or gauss_newton.")] = None,
    norm: Annotated[str | None, typer.Option(help="Of DoRA: attached (the loss; if left out) or held.")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Only these layers: name or pattern; repeatable. Others keep their rank.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples that are looked at.")] = None,
    micro_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens at once: bounds the memory.")] = None,
    over_all: Annotated[bool, typer.Option("--over-all", help="Also the curvature of all layers together.")] = False,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; the finished adapter if left out.")] = None,
    json_: Json = False,
) -> None:
    """Choose a rank for each layer of a run, and write a recipe with these ranks into it."""
    from qdora.verbs.rank import RankSettings, rank_run

    asked = RankSettings(
        method=method,
        budget=budget,
        threshold=threshold,
        max_rank=max_rank,
        curvature=curvature,
        norm=norm,
        layers=layers or (),
        examples=examples,
        micro_batch_tokens=micro_batch_tokens,
        over_all=over_all,
    )
    _emit(rank_run(run, asked, step=step), json_)


@app.command()
@verb
def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Show what a run would see of every source, without loading the model."""
    from qdora.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    from qdora.verbs.plan import plan_run

    _emit(plan_run(loaded, recipe), json_)


@app.command()
@verb
def study(
    study: Annotated[Path, typer.Argument(help="A YAML file: a recipe, axes, and what is compared.")],
    directory: Annotated[
        Path | None, typer.Option("--dir", "-d", help="Where it is written; runs/studies/<name> if left out.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only part I of N of the cells.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try cells again that were given up.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every cell, say what would run.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Start so many processes, and end.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Of --jobs: slurm (default) or local.")] = None,
    job_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of --jobs: what submitit takes, as timeout_min=600.")
    ] = None,
    json_: Json = False,
) -> None:
    """Run a grid of recipes, each cell once, by any number of processes; started again it goes on."""
    from qdora.verbs.study import study_run, submit_study

    if jobs is not None:
        if shard is not None or dry_run or retry_failed:
            raise UserError("--jobs: starts processes that share all cells, allowed: without --shard and --dry-run.")
        _emit(submit_study(study, directory, jobs, cluster or "slurm", job_option or []), json_)
        return
    if cluster is not None or job_option:
        raise UserError("--cluster, --job-option: belong to --jobs, allowed: with it.")
    _emit(study_run(study, directory, shard=shard, retry_failed=retry_failed, dry_run=dry_run), json_)


@app.command()
@verb
def validate(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Check a recipe and its files without loading anything; print it resolved."""
    from qdora.recipe_file import load_recipe, missing_files, resolved_yaml, settings

    loaded = load_recipe(recipe, set_ or [])
    faults = missing_files(loaded, recipe)
    if faults:
        raise UserError(*faults)
    _emit(settings(loaded), json_, plain=resolved_yaml(loaded))


@app.command()
@verb
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    json_: Json = False,
) -> None:
    """List the shipped recipes, or print one as a start for your own."""
    from qdora.recipe_file import recipe_names, recipe_text

    if name is not None:
        text = recipe_text(name)
        _emit({"name": name, "text": text}, json_, plain=text)
        return
    lines = {each: _headline(recipe_text(each)) for each in recipe_names()}
    width = max(map(len, lines))
    _emit({"recipes": lines}, json_, plain="".join(f"{each:<{width}}  {line}\n" for each, line in lines.items()))


@app.command()
@verb
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from qdora.recipe_file import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
@verb
def doctor(json_: Json = False) -> None:
    """Say what this machine has and what is missing."""
    from qdora.doctor import report, report_text

    found = report()
    _emit(found, json_, plain=report_text(found))


def _headline(text: str) -> str:
    first = text.splitlines()[0] if text else ""
    return first.lstrip("# ").strip()


def _emit(result: dict[str, Any], as_json: bool, *, plain: str | None = None) -> None:
    """One JSON document, or the verb's own text; a verb that shows its result while it runs gives no text."""
    if as_json:
        print(json_text(result, indent=2))
    elif plain is not None:
        sys.stdout.write(plain)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
