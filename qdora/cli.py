"""The command line: verbs only. Each imports what it needs when it runs, so `qdora --help` stays fast."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from qdora.command import emit, set_debug, verb
from qdora.errors import UserError

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


@app.command()
@verb
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see `qdora recipes`) or a YAML file.")],
    set_: Set = None,
    run_dir: RunDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start although the plan is over memory.budget.")] = False,
    json_: Json = False,
) -> None:
    """Train an adapter: load the base in 4 bits, train on the mix, evaluate, save."""
    from qdora.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    directory = run_dir or Path("runs") / Path(recipe).stem
    from qdora.verbs.train import train_run

    result = train_run(loaded, directory, resume=resume, force=force)
    if result:  # empty in all processes of a launch but the first
        emit(result, json_)


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
    emit(result, json_)


@app.command()
@verb
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="merged (if left out): one dense model; nf4-lora: 4-bit base and LoRA; peft: the adapter; gguf: a "
            "file for llama.cpp.",
        ),
    ] = None,
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
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="What is to run it: transformers, vllm, sglang, tensorrt-llm, llama.cpp or ollama. Chooses the "
            "format, or refuses one that it does not load.",
        ),
    ] = None,
    gguf_type: Annotated[
        str | None, typer.Option(help="Of --format gguf: f32, f16 (if left out), bf16, q8_0, q4_0 or q4_k_m.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Of --format gguf: llama.cpp's folder; else QDORA_LLAMA_CPP, else PATH.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write the model in a form to deploy, reload it plainly and compare it with the running one."""
    from qdora.verbs.export import export_run
    from qdora.verbs.export_options import ExportOptions

    merge = (dtype, base, requantize, shard_size)
    options = ExportOptions(format_, *merge, step, audit, push, public, target, gguf_type, llama_cpp)
    emit(export_run(run, out, options), json_)


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
    emit(result, json_)


@app.command()
@verb
def rank(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    method: Annotated[str, typer.Option(help="curvature, svd (of the update), gradient, or gates.")] = "curvature",
    budget: Annotated[
        str | None, typer.Option(help="Parameters of the factors, or a share of the run's own: 50%.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="In place of a budget: each layer keeps this share of its energy, 0 to 1.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Largest rank; twice the run's if left out.")] = None,
    draws: Annotated[
        int | None, typer.Option(min=0, help="Of labels, to estimate curvature: 16 if left out; 0: exact, slow.")
    ] = None,
    eigenvalues: Annotated[int | None, typer.Option(min=0, help="Of the curvature, beside the ranks: slow.")] = None,
    curvature: Annotated[
        str | None, typer.Option(help="Whose eigenvalues: hessian (if left out) or gauss_newton.")
    ] = None,
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
    from qdora.verbs.rank import rank_run
    from qdora.verbs.rank_settings import RankSettings

    asked = RankSettings(
        method=method,
        budget=budget,
        threshold=threshold,
        max_rank=max_rank,
        draws=draws,
        eigenvalues=eigenvalues,
        curvature=curvature,
        norm=norm,
        layers=layers or (),
        examples=examples,
        micro_batch_tokens=micro_batch_tokens,
        over_all=over_all,
    )
    emit(rank_run(run, asked, step=step), json_)


@app.command()
@verb
def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    set_: Set = None,
    budget: Annotated[str | None, typer.Option(help="What there is, such as 40GiB; the recipe's if left out.")] = None,
    device: Annotated[str, typer.Option(help="Where the run is to be: cuda or cpu. This machine need not have it.")] = (
        "cuda"
    ),
    figure: Annotated[Path | None, typer.Option(help="Draw the plan to this SVG.")] = None,
    json_: Json = False,
) -> None:
    """Say what a run would need, by component, and see of every source, without loading the model."""
    from qdora.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device: got {device!r}, allowed: cuda, cpu.")
    from qdora.verbs.plan import plan_run

    emit(plan_run(loaded, recipe, budget=budget, device_kind=device, figure=figure), json_)  # type: ignore[arg-type]


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
        emit(submit_study(study, directory, jobs, cluster or "slurm", job_option or []), json_)
        return
    if cluster is not None or job_option:
        raise UserError("--cluster, --job-option: belong to --jobs, allowed: with it.")
    emit(study_run(study, directory, shard=shard, retry_failed=retry_failed, dry_run=dry_run), json_)


@app.command()
@verb
def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a study, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Where the files go; report/ inside it if left out.")] = None,
    json_: Json = False,
) -> None:
    """Write what a study shows: one HTML page, Markdown, CSV and Parquet."""
    from qdora.verbs.report import report_run

    emit(report_run(directory, out), json_)


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
    emit(settings(loaded), json_, plain=resolved_yaml(loaded))


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
        emit({"name": name, "text": text}, json_, plain=text)
        return
    lines = {each: _headline(recipe_text(each)) for each in recipe_names()}
    width = max(map(len, lines))
    emit({"recipes": lines}, json_, plain="".join(f"{each:<{width}}  {line}\n" for each, line in lines.items()))


@app.command()
@verb
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from qdora.recipe_file import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
@verb
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure for a minute what `qdora plan` predicts times with.")
    ] = False,
    json_: Json = False,
) -> None:
    """Say what this machine has and what is missing."""
    from qdora.doctor import report, report_text

    found = report()
    text = report_text(found)
    if measure:
        from qdora.verbs.measure_rates import measure_rates, rates_text

        found["rates"] = measure_rates()
        text += rates_text(found["rates"])
    emit(found, json_, plain=text)


def _headline(text: str) -> str:
    first = text.splitlines()[0] if text else ""
    return first.lstrip("# ").strip()


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
