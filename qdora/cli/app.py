"""The command line: all verbs, and how each of them runs: its flags, errors as one line and an exit code, results.

A verb imports what it needs when it runs, so that `qdora --help` is fast.
"""

from __future__ import annotations

import functools
import inspect
import io
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

import qdora
from qdora.errors import FAILURE, Interrupted, RunFailure, UserError, exit_code, named, not_one_of, refuse
from qdora.files.atomic import json_value
from qdora.files.console import END_SIGNALS, is_told_here, leave_closed_terminal, show_only
from qdora.files.machine import CONCURRENT_MANAGED_ACCESS, VIRTUAL_MEMORY_MANAGEMENT, device_attribute
from qdora.files.run_directory import failures_logged, open_run
from qdora.recipe import options as options_of
from qdora.recipe.options import Changes, EvalOptions, ExportOptions, Options, RankSettings

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only results and errors, no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

COMPUTING = ("train", "eval", "export", "quantize", "generate", "rank", "study")
"""Verbs that compute on a GPU."""

SHORT = {"tasks": "-t", "set": "-s", "run_dir": "-d", "dir": "-d", "prompt": "-p", "number": "-n", "out": "-o"}

NOISY = ("transformers", "httpx", "datasets", "accelerate", "bitsandbytes", "matplotlib", "fsspec", "lm_eval")


_asked = {"debug": False, "quiet": False, "json": False}
"""The options of this process, given before or after the verb."""

app = typer.Typer(
    name="qdora",
    help="Fine-tune a language model with DoRA or LoRA on a frozen 4-bit base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command, whose flags are the fields of `Options` parameters and --debug, --quiet and --json.

    An error becomes one line, and a failure goes into the log of the run that the verb is about.
    """
    name = function.__name__.rstrip("_")
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    kinds = [each for each in parameters if isinstance(each.annotation, type)]
    classes = {each.name: each.annotation for each in kinds if issubclass(each.annotation, Options)}
    plain = [each for each in parameters if each.name not in classes]
    flags = [_flag(name, field) for options in classes.values() for name, field in options.model_fields.items()]
    shared = [
        _parameter("json_", False, Json),
        _parameter("quiet", False, Quiet),
        _parameter("debug", False, Debug),
    ]

    @functools.wraps(function)
    def run(*args: Any, json_: bool, quiet: bool, debug: bool, **kwargs: Any) -> None:
        for option, is_given in {"debug": debug, "quiet": quiet, "json": json_}.items():
            _asked[option] |= is_given
        set_up_output()
        if name in COMPUTING:
            let_segments_grow()
        place = Path(kwargs.get("run") or kwargs.get("target") or os.devnull)
        try:
            for parameter, options in classes.items():
                given = {field: kwargs.pop(field) for field in options.model_fields}
                kwargs[parameter] = options(
                    **{key: value for key, value in given.items() if value not in (None, [])}
                )
            with failures_logged(place, name):
                function(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):  # `| head` has read enough
            raise
        except (Exception, KeyboardInterrupt) as error:  # any error becomes one line
            if _asked["debug"]:
                raise
            text, code = explain(error)
            # All processes of a launch find the same mistake, so one per machine reports it.
            if not isinstance(error, UserError | Interrupted) or os.environ.get("LOCAL_RANK", "0") == "0":
                print(text, file=sys.stderr)
            raise typer.Exit(code) from None

    signature = inspect.Signature([*plain, *flags, *shared])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    return app.command(name)(run)


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """The flag of a field, whose values pydantic checks."""
    kind, default, text = _plain_type(field.annotation), field.default, field.description or ""
    if kind is not bool and default not in (None, ()) and "efault" not in text:
        text = f"{text.rstrip('.')}; default: {default}."
    flags = [options_of.flag(name), *([SHORT[name]] if name in SHORT else [])]
    kind, default = (bool, default) if kind is bool else (kind | None, None)
    return _parameter(name, default, Annotated[kind, typer.Option(*flags, help=" ".join(text.split()))])


def _plain_type(annotation: Any) -> Any:
    """`Annotated[int, ...] | None` -> int, `Literal["a"]` -> str, `tuple[str, ...]` -> list[str]."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return str
    if origin is tuple:
        return list[_plain_type(inner[0])]  # type: ignore[misc]
    return annotation if origin is None else _plain_type(inner[0])


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's CUDA allocator extend its segments: micro-batches of many lengths cut fixed ones into pieces.

    WSL2 and Jetsons say that they map memory and fail at it (github.com/pytorch/pytorch/issues/192330,
    github.com/ggml-org/llama.cpp/issues/4680). Neither has concurrent managed access.
    """
    needed = VIRTUAL_MEMORY_MANAGEMENT, CONCURRENT_MANAGED_ACCESS
    given = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys()
    if not given and all(map(device_attribute, needed)):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def set_up_output() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An ASCII terminal shows the text of a model in escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    is_first = os.environ.get("RANK", "0") == "0"  # all processes of a launch do the same things
    # The level is set on the handler: a run lowers that of its logger, so that log.txt gets everything.
    handler = logging.getLogger().handlers[0]
    handler.setLevel(logging.INFO if is_first and not _asked["quiet"] else logging.WARNING)
    handler.addFilter(functools.partial(is_told_here, is_first=is_first))
    warnings.filterwarnings("ignore", "CUDA initialization")  # `check_gpu` says why, or the GPU is hidden
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    show_only(progress=not _asked["quiet"], results=not _asked["json"])


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that what they end is cleaned up and says what is safe.

    A process of a launch keeps the defaults: its launcher ends it after another one has failed, whose reason counts.
    """

    def end(number: int, frame: FrameType | None) -> None:
        leave_closed_terminal(number)
        signal.default_int_handler(number, frame)

    for number in END_SIGNALS if "WORLD_SIZE" not in os.environ else ():
        if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


def explain(error: BaseException) -> tuple[str, int]:
    text = f"{named(error)} (--debug shows the traceback)"
    if isinstance(error, UserError | Interrupted | RunFailure):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    return text, exit_code(error)


def emit(result: dict[str, Any], *, plain: str = "") -> None:
    """Print the result with --json, else `plain`."""
    sys.stdout.write(json.dumps(json_value(result), indent=2) + "\n" if _asked["json"] else plain)
    sys.stdout.flush()


Recipe = Annotated[str, typer.Argument(help="A shipped recipe (see `qdora recipes`) or a YAML file.")]
Target = Annotated[
    str,
    typer.Argument(help="A run, an export, an adapter, a model directory, a Hub id, a .gguf file, or builtin."),
]
Out = Annotated[Path, typer.Argument(help="Directory to create.")]


@verb
def train(recipe: Recipe, options: options_of.TrainOptions) -> None:
    """Train a recipe: load the base, train, evaluate, save.

    `--resume` uses the run's own settings, changed by `-s`.
    """
    from qdora.recipe.recipe_file import load_recipe

    own = Path(recipe) / "recipe.yaml"
    if own.is_file() and not options.resume:  # a run in place of a recipe
        raise UserError(f"{recipe}: is a run. Fix: continue it with --resume, or start another one from {own}.")
    directory = options.run_dir or (own.parent if own.is_file() else Path("runs") / Path(recipe).stem)
    if options.resume:
        recipe = str(open_run(directory).recipe_file)
        logging.getLogger("qdora").info(
            "%s continues with its own recipe.yaml, which only -s changes.", directory
        )
    loaded = load_recipe(recipe, options.set)
    from qdora.run.run import train_run

    result = train_run(loaded, directory, where=recipe, resume=options.resume, force=options.force)
    if result:  # only the first process of a launch has one
        emit(result)


@verb
def init(
    files: Annotated[
        list[Path], typer.Argument(help="Files: .jsonl, .json, .csv, .tsv, .parquet, .txt or .md.")
    ],
    options: options_of.InitOptions,
) -> None:
    """Write a recipe for your own files, with a comment on each choice."""
    from qdora.run.init import init_recipe

    emit(init_recipe(files, options))


@verb
def eval_(target: Target, options: EvalOptions) -> None:
    """Score a run, an export, an adapter or a bare model."""
    from qdora.run.verbs import evaluate_target

    emit(evaluate_target(target, options))


@verb
def export(
    run: Annotated[Path, typer.Argument(help="A run, or an adapter in PEFT's format of any trainer.")],
    out: Out,
    options: ExportOptions,
) -> None:
    """Export a run or an adapter, and check the export."""
    from qdora.export.export import export_run

    emit(export_run(run, out, options))


@verb
def quantize(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id, a .gguf file, or builtin.")],
    out: Out,
    options: options_of.QuantizeOptions,
) -> None:
    """Write a model as a bitsandbytes checkpoint, and check it."""
    from qdora.export.export import quantize_model

    base: dict[str, Any] = {"quant": options.quant}
    if options.has("method") or options.has("calibration"):
        base |= {"method": options.method, "calibration": {"text": options.calibration or ""}}
    emit(quantize_model(model, out, base, options.set))


@verb
def generate(target: Target, options: options_of.GenerateOptions, sampling: options_of.Sampling) -> None:
    """Print the answer of a run, an export, an adapter or a model."""
    from qdora.run.verbs import generate_from

    def write(text: str) -> None:
        if not _asked["json"]:
            sys.stdout.write(text)
            sys.stdout.flush()

    emit(generate_from(target, options, sampling, write=write))


@verb
def plan(recipe: Recipe, options: options_of.PlanOptions) -> None:
    """Predict the memory of a run and estimate its time.

    The exit code is 1 if the run does not fit the budget; with --processes, if it fits in no way.
    """
    from qdora.recipe.recipe_file import load_recipe

    loaded = load_recipe(recipe, options.set)
    from qdora.plan.show import plan_run

    document = plan_run(
        loaded,
        recipe,
        budget=options.budget,
        device_kind=options.device,
        num_processes=options.processes,
        num_hosts=options.hosts,
    )
    emit(document)
    if all(division["fits"] is False for division in document.get("processes", [document["memory"]])):
        raise typer.Exit(FAILURE)


@verb
def preview(recipe: Recipe, options: options_of.PreviewOptions) -> None:
    """Show what the model will see of the data, token by token.

    Tokens in the loss are marked. The exit code is 1 if a run would refuse these examples.
    """
    from qdora.recipe.recipe_file import load_recipe
    from qdora.run.preview import preview

    document = preview(load_recipe(recipe, options.set), recipe, options.number)
    emit(document)
    if document["is_refused"]:
        raise typer.Exit(FAILURE)


@verb
def rank(run: Annotated[Path, typer.Argument(help="A run directory.")], settings: RankSettings) -> None:
    """Choose a rank for each layer of a run."""
    from qdora.rank.rank import rank_run

    emit(rank_run(run, settings, step=settings.step))


@verb
def study(
    study: Annotated[
        Path, typer.Argument(help="A study file; with --vary a recipe, which is a file or a shipped one.")
    ],
    options: options_of.StudyOptions,
) -> None:
    """Run a grid of recipes, each cell once; --vary makes the grid.

    Any number of processes can work on one study. The same command continues an interrupted study.
    """
    from qdora.study.run import study_run, submit_study
    from qdora.study.vary import varied

    file, place, text = study, options.dir, None
    if options.vary:
        text = varied(str(study), options.vary, options.set, options.seeds, options.rates)
        place = options.dir or Path("runs") / "studies" / study.stem
        file = place / "grid.yaml"
    if options.jobs is not None:
        emit(submit_study(file, place, options.jobs, options.cluster, options.job_option, text))
    else:
        emit(study_run(file, place, text=text, retry_failed=options.retry_failed, dry_run=options.dry_run))


@verb
def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a run or of a study, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the report; default: the run itself, or report/ in the study."),
    ] = None,
) -> None:
    """Write the report of a run or of a study."""
    if (directory / "study.json").is_file():
        from qdora.study.report import report_run

        emit(report_run(directory, out))
    else:
        from qdora.run.report import page_of_run

        emit(page_of_run(directory, out))


@verb
def validate(recipe: Recipe, options: Changes) -> None:
    """Check a recipe and print it with its defaults.

    Settings and paths are checked; `qdora preview` also checks the data.
    """
    from qdora.recipe.recipe_file import load_recipe, missing_files, resolved_yaml, settings

    loaded = load_recipe(recipe, options.set)
    refuse(missing_files(loaded, recipe))
    emit(settings(loaded), plain=resolved_yaml(loaded))


@verb
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe; default: list all.")] = None,
) -> None:
    """List the shipped recipes, or print one as a start for your own."""
    from qdora.recipe.recipe_file import recipe_names, recipe_text

    list_or_print("recipes", {name: recipe_text(name) for name in recipe_names()}, name)


@verb
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from qdora.recipe.settings import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@verb
def doctor() -> None:
    """Report what this machine has, and how to fix what is missing."""
    from qdora.recipe.recipe_file import yaml_text
    from qdora.run.doctor import report

    document = report()
    emit(document, plain=yaml_text(document))


@verb
def guide(
    topic: Annotated[str | None, typer.Argument(help="Print this guide; default: list all.")] = None,
) -> None:
    """List the guides, or print one."""
    files = sorted(Path(qdora.__file__).with_name("guide").glob("*.md"))
    list_or_print("guides", {file.stem: file.read_text(encoding="utf-8") for file in files}, topic)


def list_or_print(kind: str, texts: dict[str, str], name: str | None) -> None:
    if name is None:
        titles = {each: text.partition("\n")[0].lstrip("# ") for each, text in texts.items()}
        width = max(map(len, titles))
        emit({kind: titles}, plain="".join(f"{each:<{width}}  {title}\n" for each, title in titles.items()))
    elif name in texts:
        emit({"name": name, "text": texts[name]}, plain=texts[name])
    else:
        raise UserError(not_one_of(kind, name, texts))


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
    _asked.update(debug=debug, quiet=quiet, json=json_)


def main() -> None:
    """The entry point of the `qdora` command."""
    if "WORLD_SIZE" in os.environ:  # torch's C++ stack traces of a lost connection hide the line that names it
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    end_as_by_ctrl_c()
    app()
