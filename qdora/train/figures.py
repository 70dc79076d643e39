"""Pictures of a run, drawn from its metrics: loss, validation NLL and accuracy per task, learning rate, gradient norm,
memory, tokens/s.

The picture of an interference report: cosines between tasks, those beyond noise in bold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdora.files.svg_figure import svg_file
from qdora.train.interference import CERTAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("qdora")

Lines = Sequence[Mapping[str, Any]]


def smooth(values: NDArray[np.float64], weights: NDArray[np.float64], half_life: float) -> NDArray[np.float64]:
    """Running ratio of exponentially faded sums, sum(values) / sum(weights): a mean over tokens, not over steps.

    Args:
        values: (steps,) summed NLL.
        weights: (steps,) number of tokens; a step without tokens keeps the last value.
        half_life: Steps after which a contribution counts half.
    Returns:
        (steps,), NaN before the first token.
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
        metrics: Lines of metrics.jsonl: of training steps, and of evaluations, of which the figures named validation_*
            are drawn; the rest is left out.
        directory: Where loss_per_task, learning_rate, gradient_norm, memory, tokens_per_second, validation_nll and
            (where there are choices) validation_accuracy go, and mean_rank of a run with gates; made if needed.
    Returns:
        The files that were drawn; none where no step was trained.
    """
    steps = [line for line in metrics if "tasks" in line]
    evaluations = [line for line in metrics if "eval" in line]
    with_choices = any(task["acc"] is not None for line in evaluations for task in line["eval"].values())
    found = {name: (plot, steps) for name, plot in _PLOTS.items()}
    found |= {name: (plot, evaluations) for name, plot in _VALIDATION_PLOTS.items() if evaluations}
    gated = [line for line in steps if "gates" in line]
    found |= {"mean_rank": (_mean_rank, gated)} if gated else {}
    if not with_choices:
        found.pop("validation_accuracy", None)
    drawn = []
    for name, (plot, lines) in found.items() if steps else ():
        path = directory / f"{name}.svg"
        try:
            _draw(lines, plot, path)
        except Exception as error:  # the run is worth more than its pictures: fonts, a full disk, a strange metric
            logger.warning("figures/%s was not drawn: %s: %s", path.name, type(error).__name__, error)
        else:
            drawn.append(path)
    return drawn


def _draw(lines: Lines, plot: Callable[[Axes, Lines, NDArray[np.float64]], None], path: Path) -> None:
    with svg_file(path, 8, 4.5) as figure:
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


def _learning_rate(axes: Axes, steps: Lines, numbers: NDArray[np.float64]) -> None:
    axes.plot(numbers, [line["lr"] for line in steps], gid="values")
    axes.set_ylabel("learning rate")


def _mean_rank(axes: Axes, steps: Lines, numbers: NDArray[np.float64]) -> None:
    axes.plot(numbers, [line["gates"]["mean_rank"] for line in steps], gid="values")
    axes.set_ylabel("living components of a layer, mean")


def _gradient_norm(axes: Axes, steps: Lines, numbers: NDArray[np.float64]) -> None:
    axes.plot(numbers, [line["gradient_norm"] for line in steps], gid="values")
    axes.set_ylabel("gradient norm before clipping")
    axes.set_yscale("symlog", linthresh=1e-3)  # spikes are decades above the rest; zero is possible


def _memory(axes: Axes, steps: Lines, numbers: NDArray[np.float64]) -> None:
    axes.plot(numbers, [line["time"]["peak_memory_bytes"] / 2**30 for line in steps], gid="values")
    axes.set_ylabel("peak memory so far, GiB")
    axes.set_ylim(bottom=0)


def _tokens_per_second(axes: Axes, steps: Lines, numbers: NDArray[np.float64]) -> None:
    axes.plot(numbers, [line["num_tokens"] / line["time"]["step_seconds"] for line in steps], gid="values")
    axes.set_ylabel("tokens per second, padding not counted")
    axes.set_ylim(bottom=0)


def _validation(axes: Axes, evaluations: Lines, metric: str) -> None:
    """A line per task and one of their average, with the value of the untrained base as a level."""
    names = list(dict.fromkeys(name for line in evaluations for name in line["eval"]))
    curves = [
        (name, [(line["step"], line["eval"].get(name, {}).get(metric)) for line in evaluations]) for name in names
    ]
    curves.append(("average", [(line["step"], line["average"][metric]) for line in evaluations]))
    for name, points in curves:
        known = [(step, value) for step, value in points if value is not None]
        if not known:
            continue
        style = {"color": "black", "linewidth": 2.0} if name == "average" else {"linewidth": 1.4}
        (line,) = axes.plot(*zip(*known, strict=True), marker=".", label=name, gid=f"values {name}", **style)
        if known[0][0] == 0:
            axes.axhline(known[0][1], color=line.get_color(), linestyle=":", linewidth=0.8)
    axes.legend(fontsize="small", ncols=2)


def _validation_nll(axes: Axes, evaluations: Lines, numbers: NDArray[np.float64]) -> None:
    _validation(axes, evaluations, "nll_per_token")
    axes.set_ylabel("validation NLL, nats per answer token (dotted: base)")


def _validation_accuracy(axes: Axes, evaluations: Lines, numbers: NDArray[np.float64]) -> None:
    _validation(axes, evaluations, "acc")
    axes.set_ylabel("validation accuracy (dotted: base)")


_VALIDATION_PLOTS: dict[str, Callable[[Axes, Lines, NDArray[np.float64]], None]] = {
    "validation_nll": _validation_nll,
    "validation_accuracy": _validation_accuracy,
}
_PLOTS: dict[str, Callable[[Axes, Lines, NDArray[np.float64]], None]] = {
    "loss_per_task": _loss_per_task,
    "learning_rate": _learning_rate,
    "gradient_norm": _gradient_norm,
    "memory": _memory,
    "tokens_per_second": _tokens_per_second,
}


def draw_heat_map(report: Mapping[str, Any], path: Path) -> bool:
    """Draw the cosines of a report as SVG; what cannot be drawn is logged and never raises.

    On the diagonal stands the cosine between the two halves of a task's own probe. Cosines are bold where they differ
    from 0 by more than twice their noise.

    Args:
        report: From `qdora.train.interference.measure`, with the `step` it was measured after.
        path: Of the file; its directory is made if needed.
    Returns:
        Whether it was drawn.
    """
    try:
        _draw_cosines(report, path)
    except Exception as error:  # as in figures.py: the run is worth more than its pictures
        logger.warning("figures/%s was not drawn: %s: %s", path.name, type(error).__name__, error)
        return False
    return True


def _draw_cosines(report: Mapping[str, Any], path: Path) -> None:
    names = report["tasks"]
    cosines = np.array(report["cosines"], dtype=float)  # None becomes nan
    noise = np.array(report["noise"], dtype=float)
    np.fill_diagonal(cosines, np.array(report["own_cosines"], dtype=float))
    side = 2.5 + 0.6 * len(names)
    with svg_file(path, side + 1, side) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for row in range(len(names)):
            for column in range(len(names)):
                value = cosines[row, column]
                certain = abs(value) > CERTAIN * noise[row, column]
                text = "" if np.isnan(value) else f"{value:.2f}"
                style: dict[str, Any] = {"fontweight": "bold"} if certain else {}
                if row == column:
                    style = {"fontstyle": "italic"}
                axes.text(column, row, text, ha="center", va="center", fontsize="small", **style)
        axes.set_title(f"cosines between the tasks' gradients, step {report['step']}", fontsize="medium")
        figure.colorbar(image, label="cosine; diagonal: between halves of a probe")
