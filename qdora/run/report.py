"""README.md, the model card of a run or an export (model_card.md.j2), and report.html, the page of a run."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from pydantic import ByteSize
from rich.console import Console

import qdora
from qdora.data.commonsense import HUB_TASKS
from qdora.errors import UserError
from qdora.evaluate.suite import CHANGES, LABELS, task_changes
from qdora.files import run_directory
from qdora.files.atomic import atomic_write_text, disk_failures, masked
from qdora.files.console import consoles, duration
from qdora.files.machine import package_versions
from qdora.files.pages import markdown_cell, markdown_table, render_page
from qdora.files.run_directory import RunDirectory, open_run
from qdora.model.adapter_file import sizes_in_words
from qdora.model.build_model import find_source
from qdora.model.gguf import read_header
from qdora.model.source import BUILTIN, BUILTIN_HUB_ID, LICENCE_FILES, ModelSource, public_name
from qdora.recipe.data_settings import SourceConfig, is_path
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe
from qdora.train.evals import adapter_in_words, adapter_record, adapter_step, state_step
from qdora.train.logs import draw_figures

PAGE_FILE = "report.html"
EVALUATION_COLUMNS = ("data", "task", "metric", "examples", "before", "after", "change", "95 % interval")
_FIGURES = ("loss_per_task", "validation_nll", "validation_accuracy", "steps")
_LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (.*)", re.MULTILINE)


# The model card


class Form(NamedTuple):
    """What a model card says of the files that it describes.

    In `text` the class of a multimodal model replaces AutoModelForCausalLM. `relation`, to the base, and `library` are
    words of the Hub. `facts`, setting -> value, are those of an exported base, in place of the training. `serve` is the
    command that serves the export, to be started in its directory; qdora export prints it, too.
    """

    text: str
    relation: str = "finetune"
    library: str = "transformers"
    facts: Mapping[str, str] = {}
    serve: str = ""


_RUN = Form(
    "This is a run directory. `adapter/` holds the trained adapter in PEFT's format, for the quantised base."
)


def run_card(
    run: RunDirectory, recipe: Recipe, state: str, check: dict[str, Any] | None = None, form: Form = _RUN
) -> str:
    """README.md of a run or of an export; `state` is that of the adapter, `check` the verification of an export."""
    source, is_adopted, mix = known_source(recipe), bool(run.adopted()), run.read_json("mix.json")
    name = BUILTIN_HUB_ID if recipe.model.source == BUILTIN else public_name(recipe.model.source)
    hub_id = name if name is not None and "/" in name else None
    data = () if is_adopted else recipe.data.mix  # nobody knows what an adopted adapter was trained on
    step, training = state_step(run, state), training_facts(run, recipe)
    if not is_adopted:
        training["state"] = adapter_in_words(run) if state == "final" else state
    if mix:
        training["steps"] = f"{mix['num_steps'] if step is None else step:,} of {mix['num_steps']:,}"
    is_multimodal = "trained part" in training
    if form.facts:
        data, training = (), dict(form.facts)
    metadata = ModelCardData(
        base_model=hub_id,
        base_model_relation=hub_id and form.relation,
        datasets=sorted({id_ for part in data if (id_ := _data_id(part)) is not None}) or None,
        library_name=form.library,
        pipeline_tag="image-text-to-text" if is_multimodal else "text-generation",
        tags=["qdora"],
        **_licence(source),
    )
    has_code = recipe.model.trust_remote_code and source is not None and any(source.path.glob("*.py"))
    scored = [] if form.facts else evaluations(run, step)
    rows = [[found["data"], *row] for found in scored for row in found["rows"]]
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("model_card.md.j2")),
        run=run,
        base=name or Path(recipe.model.source).name,
        revision=source.revision if source else recipe.model.revision,
        is_adopted=is_adopted,
        versions={"qdora": qdora.__version__, **package_versions(("torch", "transformers"))},
        form=form,
        is_multimodal=is_multimodal,
        has_own_code=has_code,
        training=markdown_table(("setting", "value"), [*training.items()]),
        data=[(markdown_cell(part.label), _data_id(part)) for part in data],
        results=markdown_table(EVALUATION_COLUMNS, rows) if rows else "",
        check=check,
        texts=[] if form is _RUN else [*licence_files(source)],
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def training_facts(run: RunDirectory, recipe: Recipe) -> dict[str, str]:
    """Setting -> value: what was trained on which base, and how; without what is not known."""
    adapter, adopted = recipe.adapter, run.adopted().get("adopted")
    sizes = f", {sizes_in_words(run.adapter, adapter.rank, adapter.alpha)}"
    rows = "rows of the new tokens" if adapter.also_train_rows == "new" else "whole"
    found = {
        "adapter": adapter.kind + (sizes if adapter.kind in ("lora", "dora") else ""),
        "starts from": adapter.start_in_words,
        "quantisation of the base": recipe.base.quant_in_words + (f" ({adopted['known']})" if adopted else ""),
        "optimizer": None if adopted else f"{recipe.train.optimizer}, learning rate {recipe.train.lr:g}",
        "also trained": f"{', '.join(adapter.also_train)} ({rows})" if adapter.also_train else None,
        "new tokens": ", ".join(f"`{token}`" for token in recipe.model.add_tokens),
        "trained part": run.read_json("environment.json").get("trained_part"),
    }
    return {setting: value for setting, value in found.items() if value}


def evaluations(run: RunDirectory, step: int | None) -> list[dict[str, Any]]:
    """Each evaluation of the state after `step` steps, with that of the base on the same data, and the changes: first
    the run's own, then those of `qdora eval`. `rows` are the cells of a table, from "task" on."""
    named = [(f"validation{end}", f"step-0{end}", f"step-{step}{end}") for end in ("", "-generated")]
    for file in sorted((run.path / "eval").glob("*.json")):
        name = re.sub(r"^(final|step-\d+)-(?!generated$)", "", file.stem)
        if name != file.stem and run.read_json(f"eval/{file.name}").get("step") == step:
            named.append((name, f"base-{name}", file.stem))
    found = []
    for data, *names in named:
        both = [run.read_json(f"eval/{name}.json") for name in names]
        # Records of lm-evaluation-harness have no examples
        known = [record if "per_example" in record else dict[str, Any]() for record in both]
        before, after = known if step else (known[0], dict[str, Any]())
        for record in (*before.get("per_example", ()), *after.get("per_example", ())):
            if "outcome" in record:  # a generated answer
                record["acc"] = float(record["outcome"] == "right")
        changes: dict[str, Any] = {metric: task_changes(before, after, metric) for metric in CHANGES}
        rows = [_cells(change, metric) for metric in CHANGES for change in changes[metric]]
        if rows:
            found.append({"data": data, "step": step if after else 0, **changes, "rows": rows})
    return found


def _cells(change: Mapping[str, Any], metric: str) -> list[str]:
    label, factor, digits = (
        ("NLL, nats a token", 1, 4) if metric == "nll_per_token" else (f"{LABELS[metric]}, %", 100, 1)
    )

    def shown(key: str, sign: str = "") -> str:
        return "" if change[key] is None else f"{factor * change[key]:{sign}.{digits}f}"

    ends = " to ".join(filter(None, (shown("lower", "+"), shown("upper", "+"))))
    values = (shown("before"), shown("after"), shown("difference", "+"), ends)
    return [change["task"], label, f"{change['num_examples']:,}", *values]


def known_source(recipe: Recipe) -> ModelSource | None:
    try:
        return find_source(recipe, weights=False)
    except UserError:  # moved or not reachable: the card says less
        return None


def _licence(source: ModelSource | None) -> dict[str, Any]:
    if source is None:
        return {}
    stated: Mapping[str, Any] = {}
    if source.is_gguf:
        settings = read_header(source.path).settings
        stated = {key.removeprefix("general.").replace(".", "_"): value for key, value in settings.items()}
    else:
        with suppress(OSError, ValueError, yaml.YAMLError):
            stated = metadata_load(source.path / "README.md") or {}
    names = ("license", "license_name", "license_link")
    found = {name: value for name in names if isinstance(value := stated.get(name), str) and value}
    link = found.get("license_link", "://")
    if source.kind == "hub" and "://" not in link:
        found["license_link"] = f"https://huggingface.co/{source.name}/blob/{source.revision or 'main'}/{link}"
    return found if "license" in found else {}


def licence_files(source: ModelSource | None) -> dict[str, str]:
    if source is None or source.is_gguf:
        return {}
    files = sorted({file for pattern in LICENCE_FILES for file in source.path.glob(pattern) if file.is_file()})
    return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files}


def _data_id(source: SourceConfig) -> str | None:
    if source.task in HUB_TASKS:
        return HUB_TASKS[source.task].id
    return None if source.source is None or is_path(source.source) else source.source


# The page


def page_of_run(directory: Path, out: Path | None = None, *, console: Console | None = None) -> dict[str, Any]:
    """Draw a run's figures again and write its page to `out` (default: the run); returns its facts and path."""
    run, folder = open_run(directory), out or directory
    draw_figures(run.metrics(), run.inside("figures"))
    with disk_failures(folder, "name another directory with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        facts = write_page(run, folder / PAGE_FILE)
    consoles(console)[1].print(f"report: {folder / PAGE_FILE}", soft_wrap=True)
    return {"page": str(folder / PAGE_FILE), **facts}


def write_page(run: RunDirectory, file: Path) -> dict[str, Any]:
    """Write the page of a run from its files as they are; returns its facts."""
    facts = run_facts(run)
    files = [run.path / "figures" / f"{name}.svg" for name in _FIGURES]
    figures = {
        each.stem.replace("_", " "): each.read_text(encoding="utf-8") for each in files if each.is_file()
    }
    page = render_page("qdora.run", "run_page.html.j2", columns=EVALUATION_COLUMNS, figures=figures, **facts)
    atomic_write_text(file, page)
    return facts


def run_facts(run: RunDirectory) -> dict[str, Any]:
    """What the page shows of a run, finished or not, as JSON values."""
    recipe, metrics, log = load_recipe(run.recipe_file), run.metrics(), run.log_file
    texts = _LINE.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    warning, failure = f"{run_directory.WARNING_MARK} ", f"{run_directory.FAILURE_MARK} train: "
    status, steps = _status(run, recipe, metrics), (line["step"] for line in metrics if "eval" in line)
    return {
        "title": run.path.resolve().name,
        "run": str(run.path),
        "status": status,
        "failure": texts[-1].removeprefix(failure) if texts and texts[-1].startswith(failure) else None,
        "warnings": list(
            dict.fromkeys(text.removeprefix(warning) for text in texts if text.startswith(warning))
        ),
        "numbers": {"base": recipe.model.source, **training_facts(run, recipe), **_measured(run, metrics)},
        "evaluations": evaluations(run, status["adapter_step"] or max(steps, default=0)),
        "recipe": masked(run.recipe_file.read_text(encoding="utf-8")),
    }


def _status(run: RunDirectory, recipe: Recipe, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kept, num_steps = run.checkpoint_steps(), run.read_json("mix.json").get("num_steps")
    done = [line["step"] for line in metrics if "out_of_memory" not in line]  # that step was tried, not done
    num_done, best = max([0, *done, *kept]), adapter_record(run)
    held = adapter_step(run) if run.adapter.is_dir() else None
    stopped = best is not None and num_done <= best["num_done"] < best["num_steps"]
    written = held if best is None else best["num_done"]  # the run may have gone on since
    if recipe.adapter.kind == "none":
        state = "not trained"
    elif stopped or (written is not None and num_steps is not None and written >= num_steps):
        state = "stopped early" if stopped else "finished"
    else:
        state = "unfinished"
    numbers = {"num_done": num_done, "num_steps": num_steps, "adapter_step": held, "is_best": best is not None}
    return {"state": state, "newest_checkpoint": max(kept, default=None), **numbers}


def _measured(run: RunDirectory, metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    machine, plan = run.read_json("environment.json"), run.read_json(run_directory.PLAN_FILE)
    gpus = [gpu["name"] for gpu in machine.get("devices", [])]
    found = {"machine": ", ".join(gpus) or machine.get("cpu", "")}
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return found
    loss, times = [line["loss"] for line in steps], [line["time"] for line in steps]
    seconds = [time["step_seconds"] for time in times]
    speed = statistics.median(line["num_tokens"] / line["time"]["step_seconds"] for line in steps)
    planned = plan.get("tensor_bytes" if gpus else "peak_bytes")  # a GPU's allocator counts tensors
    sizes = {"peak memory": max(time["peak_memory_bytes"] for time in times), "planned peak": planned}
    return found | {
        "training loss": f"{loss[0]:.4f} to {loss[-1]:.4f} nats a token (first and last step)",
        "speed": f"{speed:,.0f} tokens/s, {statistics.median(seconds):.3g} s a step (medians)",
        "time of the steps": duration(statistics.mean(seconds) * steps[-1]["step"]),
        **{label: ByteSize(size).human_readable() for label, size in sizes.items() if size is not None},
    }
