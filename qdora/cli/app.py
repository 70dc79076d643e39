"""The command line: all verbs, and how each of them runs: its flags, errors as one line and an exit code, results.

A verb imports what it needs when it runs, so that `qdora --help` is fast.
"""

from __future__ import annotations

import functools
import inspect
import io
import itertools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

import qdora
from qdora.errors import FAILURE, Interrupted, RunFailure, UserError, exit_code, named, not_one_of, not_there
from qdora.files.atomic import json_text
from qdora.files.console import END_SIGNALS, is_told_here, leave_closed_terminal, show_only
from qdora.files.machine import CONCURRENT_MANAGED_ACCESS, VIRTUAL_MEMORY_MANAGEMENT, device_attribute
from qdora.recipe.options import AtStep, EvalOptions, ExportOptions, Options, RankSettings, Sampling, WhichOrBase

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only results and errors, no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

COMPUTING = ("train", "evaluate", "export", "quantize", "generate", "rank", "study")
"""Verbs that compute on a GPU."""

NOISY = ("transformers", "httpx", "datasets", "accelerate", "bitsandbytes", "matplotlib", "fsspec", "lm_eval")


_asked = {"debug": False, "quiet": False, "json": False}
"""The options of this process, given before or after the verb."""


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make flags of the fields of `Options` parameters, add --debug, --quiet and --json; an error becomes one line."""
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    kinds = {each.name: each.annotation for each in parameters if isinstance(each.annotation, type)}
    classes = {name: kind for name, kind in kinds.items() if issubclass(kind, Options)}
    plain = [each for each in parameters if each.name not in classes]
    flags = [_flag(name, field) for options in classes.values() for name, field in options.model_fields.items()]
    shared = [_parameter("json_", False, Json), _parameter("quiet", False, Quiet), _parameter("debug", False, Debug)]

    @functools.wraps(function)
    def run(*args: Any, json_: bool, quiet: bool, debug: bool, **kwargs: Any) -> None:
        for name, is_given in {"debug": debug, "quiet": quiet, "json": json_}.items():
            _asked[name] |= is_given
        set_up_output()
        if function.__name__ in COMPUTING:
            let_segments_grow()
        try:
            for name, options in classes.items():
                given = {field: kwargs.pop(field) for field in options.model_fields}
                kwargs[name] = options(**{field: value for field, value in given.items() if value not in (None, [])})
            function(*args, **kwargs)
        except typer.Exit:
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
    return run


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """The flag of a field, whose values pydantic checks."""
    kind, default, text = _plain_type(field.annotation), field.default, field.description or ""
    if kind is not bool and default not in (None, ()) and "efault" not in text:
        text = f"{text.rstrip('.')}; default: {default}."
    flags = [f"--{name.replace('_', '-')}", *(["-t"] if name == "tasks" else [])]
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
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal shows the text of a model in escapes
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


def end_as_by_ctrl_c(environment: Mapping[str, str] = os.environ) -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that what they end is cleaned up and says what is safe.

    A process of a launch keeps the defaults: its launcher ends it after another one has failed, whose reason counts.
    """

    def end(number: int, frame: FrameType | None) -> None:
        leave_closed_terminal(number)
        signal.default_int_handler(number, frame)

    for number in END_SIGNALS if "WORLD_SIZE" not in environment else ():
        if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


def explain(error: BaseException) -> tuple[str, int]:
    text = f"{named(error)} (--debug shows the traceback)"
    if isinstance(error, UserError | Interrupted | RunFailure):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    return text, exit_code(error)


def emit(result: dict[str, Any], *, plain: str | None = None) -> None:
    """Print the result with --json, else `plain`."""
    try:
        in_ascii = not (sys.stdout.encoding or "").lower().startswith("utf")
        sys.stdout.write(json_text(result, indent=2, in_ascii=in_ascii) + "\n" if _asked["json"] else plain or "")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails
        raise typer.Exit(FAILURE) from None


Recipe = Annotated[str, typer.Argument(help="A shipped recipe (see `qdora recipes`) or a YAML file.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting.")]
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
    """Score a run, an export, an adapter or a bare model."""
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
    """Export a run or an adapter, and check the export."""
    from qdora.export.export import export_run
    from qdora.files.run_directory import failures_logged

    with failures_logged(run, "export"):
        emit(export_run(run, out, options))


@verb
def quantize(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id, a .gguf file, or builtin.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    set_: Set = None,
    quant: Annotated[str, typer.Option(help="Format of the linear layers: nf4, fp4 or int8.")] = "nf4",
    method: Annotated[
        str, typer.Option(help="round: to the nearest value, as bitsandbytes does; gptq: with compensated errors.")
    ] = "round",
    calibration: Annotated[str | None, typer.Option(help="Text file on which gptq measures the layers.")] = None,
) -> None:
    """Write a model as a bitsandbytes checkpoint, and check it."""
    from qdora.export.export import quantize_model

    base: dict[str, Any] = {"quant": quant}
    if method != "round" or calibration is not None:
        base |= {"method": method, "calibration": {"text": calibration or ""}}
    emit(quantize_model(model, out, base, set_ or []))


@verb
def generate(
    target: Target,
    sampling: Sampling,
    which: WhichOrBase,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The user's text; - reads it from standard input.")
    ] = None,
    chats: Annotated[
        str | None, typer.Option(help="In place of --prompt: a data file of format messages or sharegpt.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, for models with a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without a chat template.")] = False,
) -> None:
    """Print the answer of a run, an export, an adapter or a model."""
    from qdora.files.run_directory import failures_logged
    from qdora.run.verbs import answer_chats, generate_from

    if (prompt is None) == (chats is None):
        raise UserError(f"generate: exactly one of --prompt, --chats; got {'neither' if prompt is None else 'both'}.")
    unused = {"--system": system is not None, "--raw": raw} if chats is not None else {}
    if faults := [f"{name}: is not used with --chats. Fix: remove it." for name, given in unused.items() if given]:
        raise UserError(*faults)

    def write(text: str) -> None:
        if not _asked["json"]:
            sys.stdout.write(text)
            sys.stdout.flush()

    loaded = which.model_dump(exclude={"base"}) | {"base_only": which.base}
    with failures_logged(Path(target), "generate"):
        if chats is not None:
            result = answer_chats(target, chats, sampling, write=write, **loaded)
        else:
            text = sys.stdin.read() if prompt == "-" else str(prompt)
            result = generate_from(target, text, sampling, system=system, raw=raw, write=write, **loaded)
    emit(result)


@verb
def plan(
    recipe: Recipe,
    set_: Set = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory that the run may use, such as 40GiB; default: memory.budget.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; this machine need not have it.")] = "cuda",
    processes: Annotated[
        int, typer.Option(help="Cards of the run, one process each; two or more need buffers of NCCL.", min=1)
    ] = 1,
    hosts: Annotated[int, typer.Option(help="Machines, which have equally many of these cards.", min=1)] = 1,
) -> None:
    """Predict the memory of a run and estimate its time.

    The exit code is 1 if the run does not fit the budget; with --processes, if it fits in no way.
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

    Tokens in the loss are marked. The exit code is 1 if a run would refuse these examples.
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
def rank(run: Run, settings: RankSettings, at: AtStep) -> None:
    """Choose a rank for each layer of a run."""
    from qdora.files.run_directory import failures_logged
    from qdora.rank.rank import rank_run

    with failures_logged(run, "rank"):
        emit(rank_run(run, settings, step=at.step))


@verb
def study(
    study: Annotated[
        Path, typer.Argument(help="A study file; with --vary a recipe, which is a file or a shipped one.")
    ],
    directory: Annotated[
        Path | None, typer.Option("--dir", "-d", help="Directory of the study; default: runs/studies/<name>.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Compare these values of a setting; the first is the reference."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="With --vary: number of seeds; default: 3.")] = None,
    rates: Annotated[str | None, typer.Option(metavar="A,B,C", help="With --vary: learning rates to search.")] = None,
    set_: Set = None,
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
    """Run a grid of recipes, each cell once; --vary makes the grid.

    Any number of processes can work on one study. The same command continues an interrupted study.
    """
    if jobs is not None and (dry_run or retry_failed):
        raise UserError("--jobs: is not used with --dry-run or --retry-failed. Fix: remove them.")
    if jobs is None and (cluster is not None or job_option):
        raise UserError("--cluster, --job-option: are used only with --jobs. Fix: add --jobs.")
    if not vary and (seeds is not None or rates is not None or set_):
        raise UserError("--seeds, --rates, -s: are used only with --vary. Fix: write them into the study file.")
    from qdora.study.run import study_run, submit_study
    from qdora.study.vary import varied

    file, place, text = study, directory, None
    if vary:
        text = varied(str(study), vary, set_ or [], seeds, rates)
        place = directory or Path("runs") / "studies" / study.stem
        file = place / "grid.yaml"
    if jobs is not None:
        emit(submit_study(file, place, jobs, cluster or "slurm", job_option or [], text))
        return
    try:
        emit(study_run(file, place, text=text, retry_failed=retry_failed, dry_run=dry_run))
    except Interrupted as stopped:  # its cell goes on where it was
        lists, single = {"--vary": vary, "-s": set_}, {"--seeds": seeds, "--rates": rates, "--dir": directory}
        pairs = [(flag, value) for flag, values in lists.items() for value in values or ()]
        pairs += [(flag, str(value)) for flag, value in single.items() if value is not None]
        raise stopped.with_command(["qdora", "study", str(study), *itertools.chain(*pairs)]) from None


@verb
def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a run or of a study, finished or not.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the report; default: the run itself, or report/ in the study.")
    ] = None,
) -> None:
    """Write the report of a run or of a study."""
    if (directory / "study.json").is_file():
        from qdora.study.report import report_run

        emit(report_run(directory, out))
    elif (directory / "recipe.yaml").is_file():
        from qdora.run.report import page_of_run

        emit(page_of_run(directory, out))
    else:
        kind = "a run (it has no recipe.yaml) or a study (no study.json)"
        raise UserError(not_there(directory, kind, "name a directory of 'qdora train' or 'qdora study'."))


@verb
def validate(recipe: Recipe, set_: Set = None) -> None:
    """Check a recipe and print it with its defaults.

    Settings, paths, the config of a model in a directory, and data on this machine are checked.
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
    elif _asked["json"]:
        emit({"topic": topic, "text": texts[topic]})
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(texts[topic]))


def emit_list(what: str, titles: dict[str, str]) -> None:
    titles = {name: title.lstrip("# ").strip() for name, title in titles.items()}
    width = max(map(len, titles))
    emit({what: titles}, plain="".join(f"{name:<{width}}  {title}\n" for name, title in titles.items()))


_all = (train, evaluate, export, quantize, generate, plan, preview, rank, study, report, validate, recipes, schema,
        doctor, guide)  # fmt: skip
VERBS = {"eval" if function is evaluate else function.__name__: function for function in _all}

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
    _asked.update(debug=debug, quiet=quiet, json=json_)


def main() -> None:
    """The entry point of the `qdora` command."""
    if "WORLD_SIZE" in os.environ:  # torch's C++ stack traces of a lost connection hide the line that names it
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    end_as_by_ctrl_c()
    app()
