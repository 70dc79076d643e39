"""The page of a run: report.html in its directory, which needs no other file. It shows the facts of `run_facts`."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.data.mix_plan import MIX_COLUMNS, SourcePlan, mix_cells
from qdora.errors import UserError, named
from qdora.files.atomic import atomic_write_text, disk_failures, place_failures
from qdora.files.console import consoles, duration
from qdora.files.html_page import PageTable, render_page
from qdora.files.run_directory import RunDirectory, open_run, unharmed
from qdora.recipe.byte_size import size_text
from qdora.run.run_facts import Facts, run_facts
from qdora.train.figures import draw_figures

logger = logging.getLogger("qdora")

PAGE_FILE = "report.html"
_MISSING = "–"
_FIGURES = {
    "loss_per_task": "Training loss by task",
    "validation_nll": "Validation loss by task",
    "validation_accuracy": "Validation accuracy by task",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "memory": "Peak memory",
    "mean_rank": "Living components of a layer",
}
_MOST_FIGURE_BYTES = 4 * 2**20


def page_of_run(directory: Path, out: Path | None = None, *, console: Console | None = None) -> Facts:
    """Draw the figures of a run again and write its page to `out`/report.html; default: into the run directory.

    Returns:
        The facts (`run_facts`) and the path of the page.
    Raises:
        UserError: No run, a damaged recipe, or a directory that cannot be made or written.
        RunFailure: The disk cannot be written.
    """
    run = open_run(directory)
    _, results = consoles(console)
    folder = out or directory
    with place_failures(folder, "name another directory with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    draw_figures(run.metrics(), run.inside("figures"))
    try:
        with disk_failures(folder):
            facts = write_page(run, folder / PAGE_FILE)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}: a file of the run does not hold what a run writes ({named(error)}).") from error
    results.print(f"report: {folder / PAGE_FILE}", soft_wrap=True)
    return {"page": str(folder / PAGE_FILE), **facts}


def write_page(run: RunDirectory, file: Path | None = None) -> Facts:
    """Write the page from the files of the run as they are. Returns the facts; raises as `run_facts`, or OSError."""
    facts = run_facts(run)
    atomic_write_text(file or run.inside(PAGE_FILE), run_page(facts, run_figures(run)))
    return facts


def leave_page(run: RunDirectory) -> None:
    """`write_page` for a run that ends, however it ends: a failure is logged and never raises."""
    with unharmed(PAGE_FILE):
        write_page(run)


def run_figures(run: RunDirectory) -> dict[str, str]:
    """Title -> SVG of the run's figures, the usual ones first; files that are no figures are left out."""
    folder = run.path / "figures"
    others = {file.stem for file in folder.glob("*.svg")} - {*_FIGURES, "memory_plan"}  # that one is a table here
    names = [*_FIGURES, *sorted(others)]
    found = {}
    for name in names:
        with suppress(OSError, ValueError):
            file = folder / f"{name}.svg"
            if file.stat().st_size <= _MOST_FIGURE_BYTES:
                found[_FIGURES.get(name, name)] = file.read_text(encoding="utf-8")
    return found


def run_page(facts: Facts, figures: Mapping[str, str]) -> str:
    """The HTML page of these facts."""
    start = facts["settings"]["starts from"]
    before = "the base without adapter"
    if start is not None:
        before = f"the base with {start}; in results of qdora eval, the base alone"
    return render_page(
        "qdora.run",
        "run_page.html.j2",
        title=facts["name"],
        facts=facts,
        status=status_in_words(facts["status"]),
        overview=_overview(facts),
        checks=_checks(facts),
        mix=_mix_table(facts["data"]),
        training_loss=_training_loss_table(facts["training_loss"]),
        comparisons=[_comparison(each) for each in facts["evaluations"]],
        before=before,
        figures=figures,
        memory=_memory_table(facts["memory"]),
        measures="allocated on the GPU" if facts["memory"]["device"] == "cuda" else "resident memory of the process",
        time=_time_table(facts["time"]),
        layers=_layer_table(facts["layers"]),
    )


def status_in_words(status: Mapping[str, Any]) -> str:
    """How far the run has come, and what adapter/ holds."""
    num_done, kept, of = status["num_done"], status["adapter_step"], status["num_steps"]
    far = f"{num_done:,} of {of:,} steps" if of is not None else f"{num_done:,} steps"
    if status["state"] == "not trained":
        return "Nothing is trained in this run: adapter.kind is none."
    which = ", the best one" if status["adapter_is_best"] else ""
    held = "" if kept in (None, num_done) else f" adapter/ holds step {kept:,}{which}."
    if status["state"] == "unfinished":
        checkpoint = status["newest_checkpoint"]
        safe = "no checkpoint yet" if checkpoint is None else f"the newest checkpoint is of step {checkpoint:,}"
        return f"Not finished: {far}, {safe}.{held}"
    early = "Stopped early" if status["state"] == "stopped early" else "Finished"
    return f"{early}: {far}.{held}"


def _checks(facts: Facts) -> list[str]:
    """What was checked and is well or not known yet; the warnings are at the top of the page."""
    marks = {"passed": "", "open": "Not known yet: ", "warning": "Warning: "}
    above = tuple(facts["warnings"])  # of several starts: "... (2 times)"
    return [
        marks[each["state"]] + each["text"]
        for each in facts["checks"]
        if not any(text == each["text"] or text.startswith(f"{each['text']} (") for text in above)
    ]


def _overview(facts: Facts) -> dict[str, str]:
    """Label -> value of what stands at the top; without what is not known."""
    speed, peak, seconds = facts["speed"], facts["memory"]["measured_peak"], sum(facts["time"].values())
    shown = {name: str(value) for name, value in facts["settings"].items() if value is not None}
    if speed["tokens_per_second"] is not None:
        shown["speed"] = f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['step_seconds']:.3g} s a step (medians)"
    if peak is not None:
        shown["peak memory"] = size_text(peak)
    if seconds:
        shown["time"] = duration(seconds)
    return shown


def _table(header: str, rows: Iterable[Sequence[str]]) -> PageTable:
    """A table whose first column is words; names of columns are separated by |.

    Columns without any value are left out.
    """
    names, lines = header.split("|"), list(rows)
    kept = [
        index for index in range(len(names)) if not lines or any(line[index] not in ("", _MISSING) for line in lines)
    ]
    return {
        "header": [names[index] for index in kept],
        "is_text": [index == 0 for index in kept],
        "rows": [[line[index] for index in kept] for line in lines],
    }


def _mix_table(mix: Mapping[str, Any]) -> PageTable:
    """A row per source, as `qdora train` shows it; of a stream what has been seen of it."""
    parts = [SourcePlan(**each) for each in mix.get("sources", ())]
    rows = [mix_cells(replace(part, **_seen(mix, part.name))) for part in parts]
    return _table("|".join(MIX_COLUMNS), rows)


def _seen(mix: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a run has cut and dropped of a stream, which is known at its end."""
    seen = mix.get("seen", {}).get(name, {})
    return {key: seen[key] for key in ("num_truncated", "num_dropped") if key in seen}


def _training_loss_table(losses: Sequence[Mapping[str, Any]]) -> PageTable:
    rows = [(each["task"], _number(each["first"]), _number(each["last"])) for each in losses]
    return _table("task|first tenth of the steps|last tenth", rows)


def _comparison(found: Mapping[str, Any]) -> dict[str, Any]:
    """Title and tables of one evaluation before and after."""
    step, guesses = found["step"], found["guesses"]
    changes, tables = found["nll_per_token"], []
    if changes:
        header = "task|examples|before|after|change|95 % interval"
        tables.append(("Loss, nats per answer token", _table(header, map(_loss_row, changes))))
    if found["acc"]:
        shown: dict[str, Callable[[Any], str]] = {
            "chance": _percent,
            "majority": _percent,
            "num_unparsable": lambda number: _number(number, ","),
        }
        known = [name for name in shown if any(each[name] is not None for each in guesses.values())]
        header = "|".join(("task|examples|before|after|change|95 % interval", *known)).replace("num_", "")
        rows = [
            (*_accuracy_row(each), *(shown[name](guesses.get(each["task"], {}).get(name)) for name in known))
            for each in found["acc"]
        ]
        tables.append(("Accuracy, %", _table(header, rows)))
    state = "evaluated only before training" if step == 0 else f"after step {step:,}" if step else "adapter/"
    others = ", ".join(found["other_examples"])
    note = others and (
        f"Not the same examples were evaluated before and after ({others}): eval.limit or the data changed in between. "
        "The change and its interval are over the examples that both have."
    )
    return {"title": f"{found['data']}: {state}", "tables": tables, "note": note}


def _loss_row(change: Mapping[str, Any]) -> Sequence[str]:
    ends = _interval(change, "{:+.4f}", 1.0)
    values = (_number(change["before"]), _number(change["after"]), _number(change["difference"], "+.4f"))
    return change["task"], f"{change['num_examples']:,}", *values, ends


def _accuracy_row(change: Mapping[str, Any]) -> Sequence[str]:
    values = (_percent(change["before"]), _percent(change["after"]), _percent(change["difference"], "+.1f"))
    return change["task"], f"{change['num_examples']:,}", *values, _interval(change, "{:+.1f}", 100.0)


def _interval(change: Mapping[str, Any], form: str, factor: float) -> str:
    ends = change["lower"], change["upper"]
    return _MISSING if None in ends else " to ".join(form.format(factor * end) for end in ends)


def _number(value: float | None, form: str = ".4f") -> str:
    return _MISSING if value is None else f"{value:{form}}"


def _percent(share: float | None, form: str = ".1f") -> str:
    return _MISSING if share is None else f"{100 * share:{form}}"


def _memory_table(memory: Mapping[str, Any]) -> PageTable:
    """A row per component, then the rest of the peak, which nothing measures part by part, and the peak."""
    planned, held = memory["planned"], memory["held"]
    names = list(dict.fromkeys([*held, *planned]))
    rows: list[tuple[str, ...]] = [(name, _size(planned.get(name)), _size(held.get(name))) for name in names]
    peak = memory["measured_peak"]
    if held and peak is not None:
        rest = max(0, peak - sum(held.values()))
        others = sum(size for name, size in planned.items() if name not in held) if planned else None
        rows.append(("all that is not held, together", _size(others), _size(rest)))
    if peak is not None or memory["planned_peak"] is not None:
        rows.append(("peak", _size(memory["planned_peak"]), _size(peak)))
    if memory["planned_peak"] is None:
        return _table("component|measured", [(name, measured) for name, _, measured in rows])
    return _table("component|planned|measured", rows)


def _size(num_bytes: int | None) -> str:
    return _MISSING if num_bytes is None else size_text(num_bytes)


def _time_table(seconds: Mapping[str, float]) -> PageTable:
    total = sum(seconds.values())
    rows = [(what, f"{value:,.1f}", f"{value / total:.1%}") for what, value in seconds.items()]
    return _table("work|seconds|share", rows)


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> PageTable:
    """A row per kind of layer (the last part of its path): ranks, and how far the layers have moved."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["path"].rpartition(".")[2], []).append(layer)
    rows = []
    for kind, found in kinds.items():
        ranks = sorted(layer["rank"] for layer in found)
        rank = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        moved = [_mean(found, "magnitude_moved"), _most(found, "magnitude_moved_most"), _mean(found, "update")]
        rows.append((kind, f"{len(found):,}", rank, *(_MISSING if each is None else f"{each:.2%}" for each in moved)))
    return _table("layer|number|rank|moved, mean|moved, most|update", rows)


def _mean(layers: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [layer[name] for layer in layers if layer[name] is not None]
    return sum(known) / len(known) if known else None


def _most(layers: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return max((layer[name] for layer in layers if layer[name] is not None), default=None)
