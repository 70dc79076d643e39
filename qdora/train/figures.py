"""Figures of a run, drawn from its metrics over the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qdora.files.svg_figure import svg_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("qdora")

Lines = Sequence[Mapping[str, Any]]


def smooth(values: ArrayLike, weights: ArrayLike, half_life: float) -> NDArray[np.float64]:
    """Running ratio of exponentially faded sums, sum(values) / sum(weights): a mean over tokens, not over steps.

    `values` are summed NLL and `weights` numbers of tokens, (steps,). After `half_life` steps a contribution counts
    half. Returns (steps,), NaN before the first token; a step without tokens keeps the last value.
    """
    import pandas as pd

    both = pd.DataFrame({"values": values, "weights": weights}, dtype=float).ewm(halflife=half_life).mean()
    return (both["values"] / both["weights"]).to_numpy()


def draw_figures(metrics: Lines, directory: Path) -> list[Path]:
    """Draw the lines of metrics.jsonl as SVG: loss_per_task, steps, validation_nll and validation_accuracy.

    Returns the files. One that cannot be drawn is logged and never raises. validation_* need two evaluations.
    """
    steps = [line for line in metrics if "tasks" in line]
    evaluations = [line for line in metrics if "eval" in line]
    plots: dict[str, Callable[[Figure], None]] = {}
    if steps:
        plots = {"loss_per_task": partial(_loss_per_task, steps), "steps": partial(_steps, steps)}
    for metric, name in (("nll_per_token", "validation_nll"), ("acc", "validation_accuracy")):
        if (
            steps
            and len(evaluations) > 1
            and any(line.get("average", {}).get(metric) is not None for line in evaluations)
        ):
            plots[name] = partial(_validation, evaluations, metric)
    files = {directory / f"{name}.svg": plot for name, plot in plots.items()}
    return [file for file, plot in files.items() if _drawn(file, plot)]


def _drawn(path: Path, plot: Callable[[Figure], None]) -> bool:
    try:
        with svg_file(path, 5.6, 3.6) as figure:  # inches: on a page two stand side by side
            plot(figure)
    except Exception as error:  # the run is worth more than its pictures: fonts, a full disk, a strange metric
        logger.warning("figures/%s was not drawn: %s: %s", path.name, type(error).__name__, error)
        return False
    return True


def _loss_per_task(steps: Lines, figure: Figure) -> None:
    half_life, numbers = max(1.0, len(steps) / 20), [line["step"] for line in steps]
    curves = {}
    for name in sorted({name for line in steps for name in line["tasks"]}):
        tasks = [line["tasks"].get(name, {"nll_sum": 0.0, "num_tokens": 0}) for line in steps]
        sums, tokens = ([task[key] for task in tasks] for key in ("nll_sum", "num_tokens"))
        curves[name] = smooth(sums, tokens, half_life)
    tokens = [line["num_label_tokens"] for line in steps]
    sums = [line["loss"] * line["num_label_tokens"] for line in steps]
    _plot(figure, "training loss, nats per answer token", numbers, curves, smooth(sums, tokens, half_life))


def _validation(evaluations: Lines, metric: str, figure: Figure) -> None:
    def values(scores: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        return np.array([score.get(metric) for score in scores], dtype=float)  # None becomes NaN

    names = sorted({name for line in evaluations for name in line["eval"]})
    curves = {name: values([line["eval"].get(name, {}) for line in evaluations]) for name in names}
    label = "validation NLL, nats per answer token" if metric == "nll_per_token" else "validation accuracy"
    steps, average = [line["step"] for line in evaluations], values([line["average"] for line in evaluations])
    _plot(figure, label, steps, curves, average)


def _plot(figure: Figure, label: str, steps: Sequence[int], curves: Mapping[str, ArrayLike], whole: ArrayLike) -> None:
    """A line per task, which has one colour in all figures, and one of all tasks."""
    axes, style = figure.add_subplot(xlabel="optimizer step", ylabel=label), ".-" if len(steps) < 50 else "-"
    for name, values in curves.items():
        axes.plot(steps, values, style, label=name, gid=name)
    axes.plot(steps, whole, style, color="black", linewidth=2, label="all", gid="all")
    axes.legend(fontsize="small", ncols=2)


def _steps(steps: Lines, figure: Figure) -> None:
    """A panel for each other number of a step; tokens without padding, memory up to the step."""
    panels = {
        "learning rate": [line["lr"] for line in steps],
        "gradient norm": [line["gradient_norm"] for line in steps],
        "tokens per second": [line["num_tokens"] / line["time"]["step_seconds"] for line in steps],
        "peak memory, GiB": [line["time"]["peak_memory_bytes"] / 2**30 for line in steps],
        "mean rank": [line["gates"]["mean_rank"] for line in steps if "gates" in line],
    }
    panels = {name: values for name, values in panels.items() if len(values) == len(steps)}
    for number, (name, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, number, ylabel=name)
        axes.plot([line["step"] for line in steps], values, gid=name)
        if name == "gradient norm":  # spikes are decades above the rest
            axes.set_yscale("log")
