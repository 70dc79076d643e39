"""Pictures of a run, drawn from its metrics: loss per task over steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


def draw_loss_per_task(metrics: Iterable[Mapping[str, Any]], path: Path) -> Path | None:
    """Training loss (nats per answer token) of every task over steps, as SVG.

    Args:
        metrics: Lines of metrics.jsonl.
        path: Where the SVG goes.
    Returns:
        The path, or None where no step was trained.
    """
    steps = [line for line in metrics if "tasks" in line]
    if not steps:
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "qdora"  # the same run draws the same bytes
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    numbers = np.array([line["step"] for line in steps], dtype=float)
    names = sorted({name for line in steps for name in line["tasks"]})
    for name in names:
        nll = np.array([line["tasks"].get(name, {}).get("nll_sum", 0.0) for line in steps])
        tokens = np.array([line["tasks"].get(name, {}).get("num_tokens", 0) for line in steps], dtype=float)
        axes.plot(numbers, smooth(nll, tokens, half_life=max(1.0, len(steps) / 20)), label=name, linewidth=1.4)
    overall = np.array([line["loss"] * line["num_label_tokens"] for line in steps])
    tokens = np.array([line["num_label_tokens"] for line in steps], dtype=float)
    smoothed = smooth(overall, tokens, half_life=max(1.0, len(steps) / 20))
    axes.plot(numbers, smoothed, label="all", color="black", linewidth=2)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, nats per answer token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    return path
