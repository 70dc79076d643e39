"""All verbs. A verb imports what it needs when it runs, so that `qdora --help` is fast."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

import qdora
from qdora.cli.verb import Debug, Json, Quiet, ask, emit, end_as_by_ctrl_c, verb, wants_json
from qdora.errors import FAILURE, Interrupted, UserError, not_one_of, not_there
from qdora.files.atomic import json_text
from qdora.recipe.options import EvalOptions, ExportOptions, RankSettings, Sampling

Recipe = Annotated[str, typer.Argument(help="A shipped recipe (see `qdora recipes`) or a YAML file.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting.")]
Step = Annotated[int | None, typer.Option(help="Checkpoint step; default: the adapter, else the newest checkpoint.")]
Run = Annotated[Path, typer.Argument(help="A run directory.")]
Target = Annotated[
    str, typer.Argument(help="A run, an export, an adapter, a model directory, a Hub id, a .gguf file, or builtin.")
]


@verb
def train(
    recipe: Recipe,
    set_: Set = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", "-d", help="Directory of the run; default: runs/<recipe>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if the plan exceeds memory.budget.")] = False,
) -> None:
    """Train a recipe: load the base, train, evaluate, save.

    `--resume` uses the run's own settings, changed by `-s`.
    """
    from qdora.recipe.recipe_file import load_recipe

    own = Path(recipe) / "recipe.yaml"
    if own.is_file():  # a run in place of a recipe
        if not resume:
            raise UserError(f"{recipe}: is a run. Fix: continue it with --resume, or start another one from {own}.")
        run_dir, recipe = run_dir or Path(recipe), str(own)
    directory = run_dir or Path("runs") / Path(recipe).stem
    if resume:
        from qdora.run.run import resumed_recipe

        loaded, where = resumed_recipe(directory, set_ or []), str(directory / "recipe.yaml")
    else:
        loaded, where = load_recipe(recipe, set_ or []), recipe
    from qdora.run.run import train_run

    try:
        result = train_run(loaded, directory, where=where, resume=resume, force=force)
    except Interrupted as stopped:
        if "WORLD_SIZE" in os.environ:  # only the user knows the command of the launcher
            raise
        words = ["qdora", "train", recipe, *(word for item in set_ or [] for word in ("-s", item))]
        words += ["--run-dir", str(directory), "--resume", *(["--force"] if force else [])]
        raise stopped.with_command(words) from None
    if result:  # only the first process of a launch has one
        emit(result)


@verb
def evaluate(target: Target, options: EvalOptions) -> None:
    """Score a run, an export, an adapter or a bare model.

    The scores are NLL and accuracy on tasks, perplexity of text files, and tasks of lm-evaluation-harness.
    """
    from qdora.files.run_directory import failures_logged
    from qdora.run.verbs import evaluate_target

    with failures_logged(Path(target), "eval"):
        emit(evaluate_target(target, options))


@verb
def export(
    run: Annotated[Path, typer.Argument(help="A run, or an adapter in PEFT's format of any trainer.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    options: ExportOptions,
) -> None:
    """Export a run or an adapter, and check the export.

    The export is a merged model (default), 4-bit files, a GGUF file or an adapter in PEFT's format.
    """
    from qdora.export.export_run import export_run
    from qdora.files.run_directory import failures_logged

    with failures_logged(run, "export"):
        emit(export_run(run, out, options))


@verb
def generate(
    target: Target,
    sampling: Sampling,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The user's text; - reads it from standard input.")
    ] = None,
    chats: Annotated[
        str | None,
        typer.Option(help="In place of --prompt: a data file of format messages or sharegpt; answers each row."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, for models with a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without a chat template.")] = False,
    step: Step = None,
    base: Annotated[bool, typer.Option("--base", help="Use the base of the run without its adapter.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Base of an adapter; default: the one that its adapter_config.json names.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            help="Quantise a bare model: nf4, fp4 or int8; default: not quantised. For an adapter: see `qdora export "
            "--quant`."
        ),
    ] = None,
) -> None:
    """Print the answer of a run, an export, an adapter or a bare model.

    It answers a prompt, or each conversation of a file.
    """
    from qdora.files.run_directory import failures_logged
    from qdora.run.verbs import answer_chats, generate_from, nowhere

    if (prompt is None) == (chats is None):
        given = "neither" if prompt is None else "both"
        raise UserError(f"generate: exactly one of --prompt and --chats must be given, got {given}.")
    unused = {"--system": system is not None, "--raw": raw} if chats is not None else {}
    if faults := [f"{name}: is not used with --chats. Fix: remove it." for name, given in unused.items() if given]:
        raise UserError(*faults)

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


@verb
def plan(
    recipe: Recipe,
    set_: Set = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory that the run may use, such as 40GiB; default: memory.budget.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the run, cuda or cpu; this machine need not have it.")] = (
        "cuda"
    ),
    processes: Annotated[
        int, typer.Option(help="Cards of the run, one process each; two or more need buffers of NCCL.", min=1)
    ] = 1,
    hosts: Annotated[int, typer.Option(help="Machines, which have equally many of these cards.", min=1)] = 1,
) -> None:
    """Predict the memory of a run and estimate its time.

    No weights are loaded. If the data can be read, its examples and steps are counted. The exit code is 1 if the run
    does not fit the budget; with --processes, if it fits in no way.
    """
    from qdora.recipe.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if device not in ("cuda", "cpu"):
        raise UserError(not_one_of("--device", device, ("cuda", "cpu")))
    if processes % hosts:
        raise UserError(f"--hosts: got {hosts}, must divide --processes ({processes}).")
    kind = cast(Literal["cuda", "cpu"], device)
    from qdora.plan.show import plan_run

    document = plan_run(loaded, recipe, budget=budget, device_kind=kind, num_processes=processes, num_hosts=hosts)
    emit(document)
    if all(division["fits"] is False for division in document.get("processes", [document["memory"]])):
        raise typer.Exit(FAILURE)


@verb
def preview(
    recipe: Recipe,
    set_: Set = None,
    number: Annotated[int, typer.Option("-n", min=0, help="Examples of each source to show.")] = 3,
) -> None:
    """Show what the model will see of the data, token by token.

    Tokens in the loss are marked. Only the tokenizer and the config of the model are loaded. The exit code is 1 if a
    run would refuse these examples. Rows that are held out for validation are not read.
    """
    from qdora.recipe.recipe_file import load_recipe
    from qdora.run.preview import preview as preview_of
    from qdora.run.preview import show_preview

    document = preview_of(load_recipe(recipe, set_ or []), recipe, number)
    show_preview(document)
    emit(document)
    if document["is_refused"]:
        raise typer.Exit(FAILURE)


@verb
def rank(run: Run, settings: RankSettings, step: Step = None) -> None:
    """Choose a rank for each layer of a run.

    A recipe with these ranks is written to the folder rank/ of the run.
    """
    from qdora.files.run_directory import failures_logged
    from qdora.rank.rank import rank_run

    with failures_logged(run, "rank"):
        emit(rank_run(run, settings, step=step))


@verb
def study(
    study: Annotated[Path, typer.Argument(help="A YAML file with a recipe, axes, and what to compare.")],
    directory: Annotated[
        Path | None, typer.Option("--dir", "-d", help="Directory of the study; default: runs/studies/<name>.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Run only part I of N of the cells.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells again that have used up their tries.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every cell, and print what would run and how long it takes.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Submit this many processes and end.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Where --jobs run: slurm (default) or local.")] = None,
    job_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --jobs: an option of submitit, such as timeout_min=600."),
    ] = None,
) -> None:
    """Run a grid of recipes, each cell once.

    Any number of processes can work on one study. The same command continues an interrupted study.
    """
    if jobs is not None:
        from qdora.study.run import submit_study

        if shard is not None or dry_run or retry_failed:
            raise UserError(
                "--jobs: is not used with --shard, --dry-run or --retry-failed: its processes share all cells. "
                "Fix: remove them."
            )
        emit(submit_study(study, directory, jobs, cluster or "slurm", job_option or []))
        return
    if cluster is not None or job_option:
        raise UserError("--cluster, --job-option: are used only with --jobs. Fix: add --jobs.")
    from qdora.study.run import study_run

    try:
        emit(study_run(study, directory, shard=shard, retry_failed=retry_failed, dry_run=dry_run))
    except Interrupted as stopped:  # its cell goes on where it was
        words = ["qdora", "study", str(study), *(["--dir", str(directory)] if directory is not None else [])]
        words += ["--shard", shard] if shard is not None else []
        raise stopped.with_command(words) from None


@verb
def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a run or of a study, finished or not.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the report; default: the run itself, or report/ in the study.")
    ] = None,
) -> None:
    """Write the report of a run or of a study.

    That of a run is one HTML page. That of a study also has Markdown and CSV files.
    """
    if (directory / "study.json").is_file():
        from qdora.study.report import report_run

        emit(report_run(directory, out))
    elif (directory / "recipe.yaml").is_file():
        from qdora.run.report import page_of_run

        emit(page_of_run(directory, out))
    else:
        kind = "a run (it has no recipe.yaml) or a study (no study.json)"
        raise UserError(not_there(directory, kind, "name a directory that 'qdora train' or 'qdora study' made."))


@verb
def validate(recipe: Recipe, set_: Set = None) -> None:
    """Check a recipe and print it with its defaults.

    Settings, paths, the config of a model in a directory, and the columns and first rows of data on this machine are
    checked. With `data.too_long: error` all of this data is read, and examples that are too long are reported.
    `qdora plan` reads all data.
    """
    from qdora.recipe.data_settings import is_path
    from qdora.recipe.recipe_file import load_recipe, missing_files, resolved_yaml, settings

    loaded = load_recipe(recipe, set_ or [])
    if faults := missing_files(loaded, recipe):
        raise UserError(*faults)
    if is_path(loaded.model.source) and Path(loaded.model.source).is_dir():
        from qdora.model.source import check_directory

        check_directory(Path(loaded.model.source), weights=False)
    local = [source.label for source in loaded.data.mix if source.is_local]
    if local:
        from qdora.run.prepare import check_data

        check_data(loaded, local)
    emit(settings(loaded), plain=resolved_yaml(loaded))


@verb
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe; default: list all.")] = None) -> None:
    """List the shipped recipes, or print one as a start for your own."""
    from qdora.recipe.recipe_file import recipe_names, recipe_text

    if name is not None:
        text = recipe_text(name)
        emit({"name": name, "text": text}, plain=text)
    else:
        emit_list("recipes", {name: recipe_text(name).partition("\n")[0] for name in recipe_names()})


@verb
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from qdora.recipe.recipe_file import json_schema

    document = json_schema()
    emit(document, plain=json_text(document, indent=2) + "\n")


@verb
def doctor() -> None:
    """Report what this machine has, and how to fix what is missing."""
    from qdora.run.doctor import report, report_text

    document = report()
    emit(document, plain=report_text(document))


@verb
def guide(topic: Annotated[str | None, typer.Argument(help="Print this guide; default: list all.")] = None) -> None:
    """List the guides, or print one."""
    files = sorted(resources.files("qdora").joinpath("guide").iterdir(), key=lambda file: file.name)
    texts = {file.name[:-3]: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".md")}
    if topic is None:
        emit_list("guides", {name: text.splitlines()[0] for name, text in texts.items()})
    elif topic not in texts:
        raise UserError(not_one_of("guide", topic, texts))
    elif wants_json():
        emit({"topic": topic, "text": texts[topic]})
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(texts[topic]))


def emit_list(what: str, titles: dict[str, str]) -> None:
    """Print names with their titles, which begin with the mark of a heading or a comment."""
    titles = {name: title.lstrip("# ").strip() for name, title in titles.items()}
    width = max(map(len, titles))
    emit({what: titles}, plain="".join(f"{name:<{width}}  {title}\n" for name, title in titles.items()))


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


def _print_version(is_asked: bool) -> None:
    if is_asked:
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
