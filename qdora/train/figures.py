"""Figures of a run, drawn from its metrics over the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdora.files.svg_figure import svg_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("qdora")

Lines = Sequence[Mapping[str, Any]]
_SIZE = (5.6, 3.6)  # inches: on a page two stand side by side, and on a phone the letters can be read
_Plot = Callable[["Axes", Lines, NDArray[np.float64]], None]


def smooth(values: NDArray[np.float64], weights: NDArray[np.float64], half_life: float) -> NDArray[np.float64]:
    """Running ratio of exponentially faded sums, sum(values) / sum(weights): a mean over tokens, not over steps.

    `values` are summed NLL and `weights` numbers of tokens, (steps,). After `half_life` steps a contribution counts
    half. Returns (steps,), NaN before the first token; a step without tokens keeps the last value.
    """
    keep = 0.5 ** (1.0 / half_life)
    total = count = 0.0
    means = np.full(len(values), np.nan)
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        total, count = keep * total + value, keep * count + weight
        if count > 0:
            means[index] = total / count
    return means


def draw_figures(metrics: Lines, directory: Path) -> list[Path]:
    """Draw every figure over optimizer steps, as SVG; one that cannot be drawn is logged and never raises.

    Args:
        metrics: Lines of metrics.jsonl. Those of training steps and of evaluations are drawn; the others are left out.
        directory: Where the figures go (see `_PLOTS`); made if needed. mean_rank is drawn for a run with gates,
            validation_nll with two evaluations or more, and validation_accuracy if their tasks have choices.
    Returns:
        The files that were drawn; none where no step was trained.
    """
    steps = [line for line in metrics if "tasks" in line]
    evaluations = [line for line in metrics if "eval" in line]
    evaluations = evaluations if len(evaluations) > 1 else []  # a single one is in the page's table
    gated = [line for line in steps if "gates" in line]
    with_choices = any(task["acc"] is not None for line in evaluations for task in line["eval"].values())
    lines = dict.fromkeys(_PLOTS, steps) | {
        "validation_nll": evaluations,
        "validation_accuracy": evaluations if with_choices else [],
        "mean_rank": gated,
    }
    drawn = []
    for name, plot in _PLOTS.items() if steps else ():
        path = directory / f"{name}.svg"
        if lines[name] and _drawn(path, partial(_draw, lines[name], plot)):
            drawn.append(path)
    return drawn


def _drawn(path: Path, draw: Callable[[Path], None]) -> bool:
    """Draw a figure; returns whether that worked. A failure is logged."""
    try:
        draw(path)
    except Exception as error:  # the run is worth more than its pictures: fonts, a full disk, a strange metric
        logger.warning("figures/%s was not drawn: %s: %s", path.name, type(error).__name__, error)
        return False
    return True


def _draw(lines: Lines, plot: _Plot, path: Path) -> None:
    with svg_file(path, *_SIZE) as figure:
        axes = figure.add_subplot()
        plot(axes, lines, np.array([line["step"] for line in lines], dtype=float))
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)


def _loss_per_task(axes: Axes, steps: Lines, numbers: NDArray[np.float64]) -> None:
    half_life = max(1.0, len(steps) / 20)
    for name in sorted({name for line in steps for name in line["tasks"]}):
        nll = np.array([line["tasks"].get(name, {}).get("nll_sum", 0.0) for line in steps])
        tokens = np.array([line["tasks"].get(name, {}).get("num_tokens", 0) for line in steps], dtype=float)
        axes.plot(numbers, smooth(nll, tokens, half_life), label=name, linewidth=1.4)
    overall = np.array([line["loss"] * line["num_label_tokens"] for line in steps])
    tokens = np.array([line["num_label_tokens"] for line in steps], dtype=float)
    axes.plot(numbers, smooth(overall, tokens, half_life), label="all", color="black", linewidth=2)
    axes.set_ylabel("training loss, nats per answer token")
    axes.legend(fontsize="small", ncols=2)


def _curve(
    value: Callable[[Mapping[str, Any]], float], label: str, *, from_zero: bool = False, has_spikes: bool = False
) -> _Plot:
    """A plot of one number a step."""

    def plot(axes: Axes, steps: Lines, numbers: NDArray[np.float64]) -> None:
        axes.plot(numbers, [value(line) for line in steps], gid="values")
        axes.set_ylabel(label)
        if from_zero:
            axes.set_ylim(bottom=0)
        if has_spikes:
            _set_decades(axes)

    return plot


def _set_decades(axes: Axes) -> None:
    """A logarithmic y axis, since spikes are decades above the rest; zero is possible."""
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    axes.set_yscale("symlog", linthresh=1e-3)
    low, high = axes.get_ylim()
    between = (1, 2, 5) if high < 100 * low else (1,)  # few decades have few powers of ten
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1e-3, subs=between))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _validation(axes: Axes, evaluations: Lines, numbers: NDArray[np.float64], *, metric: str, label: str) -> None:
    """A line per task and one of their average, with the value before training as a level."""
    names = sorted({name for line in evaluations for name in line["eval"]})
    curves = [
        (name, [(line["step"], line["eval"].get(name, {}).get(metric)) for line in evaluations]) for name in names
    ]
    curves.append(("average", [(line["step"], line["average"][metric]) for line in evaluations]))
    for number, (name, points) in enumerate(curves):
        known = [(step, value) for step, value in points if value is not None]
        if not known:
            continue
        # The colours of the training loss, whose tasks have this order, too
        color, width = ("black", 2.0) if name == "average" else (f"C{number}", 1.4)
        steps, values = zip(*known, strict=True)
        (line,) = axes.plot(steps, values, color=color, linewidth=width, marker=".", label=name, gid=f"values {name}")
        if known[0][0] == 0:
            axes.axhline(known[0][1], color=line.get_color(), linestyle=":", linewidth=0.8)
    axes.set_ylabel(f"{label} (dotted: before training)")
    axes.legend(fontsize="small", ncols=2)


_PLOTS: dict[str, _Plot] = {
    "loss_per_task": _loss_per_task,
    "learning_rate": _curve(lambda line: line["lr"], "learning rate"),
    "gradient_norm": _curve(lambda line: line["gradient_norm"], "gradient norm before clipping", has_spikes=True),
    "memory": _curve(lambda line: line["time"]["peak_memory_bytes"] / 2**30, "peak memory so far, GiB", from_zero=True),
    "tokens_per_second": _curve(
        lambda line: line["num_tokens"] / line["time"]["step_seconds"],
        "tokens per second, padding not counted",
        from_zero=True,
    ),
    "validation_nll": partial(_validation, metric="nll_per_token", label="NLL, nats per answer token"),
    "validation_accuracy": partial(_validation, metric="acc", label="validation accuracy"),
    "mean_rank": _curve(lambda line: line["gates"]["mean_rank"], "living components of a layer, mean"),
}


def draw_expert_load(record: dict[str, Any], path: Path) -> bool:
    """Draw the load of each expert in the last steps, in units of an even division, and its change; returns whether it
    worked. `record` is that of `run.expert_load`."""
    return _drawn(path, partial(_draw_expert_load, record))


def _draw_expert_load(record: dict[str, Any], path: Path) -> None:
    blocks = list(record["blocks"].values())
    widest = max(len(block["last"]) for block in blocks)
    load, change = (np.full((len(blocks), widest), np.nan) for _ in range(2))
    for row, block in enumerate(blocks):
        last, first = np.array(block["last"]), np.array(block["first"])
        load[row, : len(last)] = last * len(last)
        change[row, : len(last)] = (last - first) * len(last)
    with svg_file(path, 9, 1.6 + 0.16 * len(blocks)) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        steps = record["window"]
        limit = max(float(np.nanmax(np.abs(change))), 1e-9)
        panels = (
            (load, f"load in the last {steps} steps", {"cmap": "viridis", "vmin": 0.0}),
            (change, f"change against the first {steps}", {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}),
        )
        for axis, (values, title, colors) in zip(axes, panels, strict=True):
            image = axis.imshow(values, aspect="auto", interpolation="nearest", **colors)
            axis.set(title=f"{title}\n(1 is an even division)", xlabel="expert")
            figure.colorbar(image, ax=axis)
        axes[0].set_ylabel("block with experts")
