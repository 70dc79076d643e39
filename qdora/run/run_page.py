"""The page of a run: report.html in its directory, which loads no other file. It is made of the files of the run."""

from __future__ import annotations

import re
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ByteSize
from rich.console import Console

from qdora.errors import UserError, named
from qdora.files import run_directory
from qdora.files.atomic import atomic_write_text, disk_failures, masked
from qdora.files.console import consoles, duration
from qdora.files.pages import render_page
from qdora.files.run_directory import RunDirectory, is_without_chats, open_run, unharmed
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe
from qdora.run.model_card import EVALUATION_COLUMNS, evaluations, read_record, training_facts
from qdora.train.evals import adapter_record, adapter_step
from qdora.train.logs import draw_figures

PAGE_FILE = "report.html"
_FIGURES = ("loss_per_task", "validation_nll", "validation_accuracy", "steps")
_LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (.*)", re.MULTILINE)


def page_of_run(directory: Path, out: Path | None = None, *, console: Console | None = None) -> dict[str, Any]:
    """Draw the figures of a run again and write its page to `out`/report.html; default: into the run directory.

    Returns the facts (`run_facts`) and the path of the page. Raises UserError for a directory that is no run, holds
    damaged files or cannot be written.
    """
    run, folder = open_run(directory), out or directory
    draw_figures(run.metrics(), run.inside("figures"))
    try:
        with disk_failures(folder, "name another directory with --out"):
            folder.mkdir(parents=True, exist_ok=True)
            facts = write_page(run, folder / PAGE_FILE)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}: a file of the run does not hold what a run writes ({named(error)}).") from error
    consoles(console)[1].print(f"report: {folder / PAGE_FILE}", soft_wrap=True)
    return {"page": str(folder / PAGE_FILE), **facts}


def leave_page(run: RunDirectory) -> None:
    """`write_page` for a run that ends, however it ends: a failure is logged and never raises."""
    with unharmed(PAGE_FILE):
        write_page(run, run.inside(PAGE_FILE))


def write_page(run: RunDirectory, file: Path) -> dict[str, Any]:
    """Write the page of a run from its files as they are; returns its facts."""
    facts = run_facts(run)
    files = [run.path / "figures" / f"{name}.svg" for name in _FIGURES]
    figures = {each.stem.replace("_", " "): each.read_text(encoding="utf-8") for each in files if each.is_file()}
    page = render_page("qdora.run", "run_page.html.j2", columns=EVALUATION_COLUMNS, figures=figures, **facts)
    atomic_write_text(file, page)
    return facts


def run_facts(run: RunDirectory) -> dict[str, Any]:
    """What the page shows of a run, finished or not, as JSON values."""
    recipe, metrics, log = load_recipe(run.recipe_file), run.metrics(), run.log_file
    texts = _LINE.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    warning, failure = f"{run_directory.WARNING_MARK} ", f"{run_directory.FAILURE_MARK} train: "
    warnings = Counter(text.removeprefix(warning) for text in texts if text.startswith(warning))
    status, step = _status(run, recipe, metrics), max([0, *(line["step"] for line in metrics if "eval" in line)])
    found = evaluations(run, status["adapter_step"] or step)
    return {
        "title": run.path.resolve().name,
        "run": str(run.path),
        "status": status,
        "failure": texts[-1].removeprefix(failure) if texts and texts[-1].startswith(failure) else None,
        "warnings": [text if number == 1 else f"{text} ({number} times)" for text, number in warnings.items()],
        "numbers": {"base": recipe.model.source, **training_facts(run, recipe), **_measured(run, metrics)},
        "evaluations": found,
        "next": next_commands(run, recipe, status, is_evaluated=bool(found)),
        "recipe": masked(run.recipe_file.read_text(encoding="utf-8")),
    }


def _status(run: RunDirectory, recipe: Recipe, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`state`: finished, stopped early, unfinished or not trained; the steps done, planned and kept; all as `text`."""
    kept, num_steps = run.checkpoint_steps(), read_record(run, "mix.json").get("num_steps")
    done = [line["step"] for line in metrics if "out_of_memory" not in line]  # that step was tried, not done
    num_done, newest = max([0, *done, *kept]), max(kept, default=None)
    best = adapter_record(run)
    held = adapter_step(run) if run.adapter.is_dir() else None
    written = held if best is None else best["num_done"]  # the run may have gone on since
    which = "" if best is None else ", the best one"
    which = "" if held in (None, num_done) else f" adapter/ holds step {held}{which}."
    far = f"{num_done} steps" if num_steps is None else f"{num_done} of {num_steps} steps"
    if recipe.adapter.kind == "none":
        state, text = "not trained", "Nothing is trained in this run: adapter.kind is none."
    elif best is not None and num_done <= best["num_done"] < best["num_steps"]:
        state, text = "stopped early", f"Stopped early: {far}.{which}"
    elif written is not None and num_steps is not None and written >= num_steps:
        state, text = "finished", f"Finished: {far}.{which}"
    else:
        safe = "no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"
        state, text = "unfinished", f"Not finished: {far}, {safe}.{which}"
    numbers = {"num_done": num_done, "num_steps": num_steps, "adapter_step": held, "newest_checkpoint": newest}
    return {"state": state, "text": text, **numbers}


def _measured(run: RunDirectory, metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Label -> loss, speed, time and memory of the logged steps, and the machine."""
    machine, plan = read_record(run, "environment.json"), read_record(run, run_directory.PLAN_FILE)
    gpus = [each["name"] for each in machine.get("devices", [])]
    found = {"machine": ", ".join(gpus) or machine.get("cpu", "")}
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return found
    tenth, losses = max(1, len(steps) // 10), []
    for part in (steps[:tenth], steps[-tenth:]):
        num_tokens = sum(line["num_label_tokens"] for line in part)
        losses.append(sum(line["loss"] * line["num_label_tokens"] for line in part) / max(num_tokens, 1))
    seconds = [line["time"]["step_seconds"] for line in steps]
    speed = statistics.median(line["num_tokens"] / line["time"]["step_seconds"] for line in steps)
    sizes = {"peak memory": max(line["time"]["peak_memory_bytes"] for line in steps)}
    sizes["planned peak"] = plan.get("tensor_bytes" if gpus else "peak_bytes")  # a GPU's allocator counts tensors
    return found | {
        "training loss": "{:.4f} to {:.4f} nats a token (first and last tenth of the steps)".format(*losses),
        "speed": f"{speed:,.0f} tokens/s, {statistics.median(seconds):.3g} s a step (medians)",
        "time of the steps": duration(statistics.mean(seconds) * steps[-1]["step"]),
        **{label: ByteSize(size).human_readable() for label, size in sizes.items() if size is not None},
    }


def next_commands(
    run: RunDirectory, recipe: Recipe, status: Mapping[str, Any], *, is_evaluated: bool
) -> list[dict[str, str]]:
    """`command` and `why` of what can be done with the run now."""
    path, state, epochs = shlex.quote(str(run.path)), status["state"], recipe.train.epochs
    resumed = f"qdora train {shlex.quote(str(run.recipe_file))} --run-dir {path} --resume"
    raw = " --raw" if is_without_chats(run.path) else ""
    found = {}
    if state == "unfinished":
        found[resumed] = "Continue from the newest checkpoint" if status["newest_checkpoint"] else "Start again"
    elif not is_evaluated:
        found[f"qdora eval {path} --base"] = "Evaluate the base, to compare with"
    if state in ("finished", "stopped early"):
        found[f"qdora eval {path}"] = "Evaluate the adapter"
        found[f"qdora generate {path}{raw} --prompt '...'"] = "Let it answer"
        found[f"qdora export {path} {shlex.quote(f'{run.path}-merged')}"] = "Write the merged model and check it"
    if state == "stopped early":
        found[f"{resumed} -s eval.patience=null"] = "Train on, without stopping early"
    elif state == "finished":
        length = f"steps={2 * status['num_steps']}" if epochs is None else f"epochs={2 * epochs:g}"
        found[f"{resumed} -s train.{length}"] = "Train on, to twice the length"
    return [{"command": command, "why": why} for command, why in found.items()]
