"""What a run shows of its training: progress, experiment trackers, figures, and what training did to each layer."""

from __future__ import annotations

import json
import logging
import os
import resource
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from qdora.adapter.layer import AdaptedLinear
from qdora.data.stream import ExampleStream
from qdora.errors import UserError, named
from qdora.files.atomic import atomic_write_text, masked
from qdora.files.console import duration, plain_console, shows_bars
from qdora.files.pages import svg_file
from qdora.files.run_directory import RunDirectory, flat
from qdora.model.inject import adapted_layers
from qdora.train.distributed import Processes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECT = "qdora"
TRAINED_FILE = "trained.json"
Lines = Sequence[Mapping[str, Any]]
_SECONDS_BETWEEN_LINES = 10.0

logger = logging.getLogger("qdora")


def peak_memory_bytes() -> int:
    """Peak memory: allocated on the GPU since this training began, or without a GPU resident in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def reserved_bytes() -> int | None:
    """As `peak_memory_bytes`, with the pieces that torch's allocator held and could not use; None without a GPU."""
    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else None


def peaks(processes: Processes) -> dict[str, int]:
    """The largest peaks of all processes: memory in use, and on GPUs what the allocator reserved for it."""
    per_rank = processes.gather({"peak_memory_bytes": peak_memory_bytes(), "peak_reserved_bytes": reserved_bytes()})
    return {name: max(each[name] for each in per_rank) for name in per_rank[0] if per_rank[0][name] is not None}


class TrainingProgress:
    """Shows steps: a bar on a terminal, otherwise one plain line every 10 seconds and at the end.

    After a resume, `start` steps are done already. The console is standard error by default: results go to stdout.
    """

    def __init__(self, num_steps: int, *, start: int = 0, console: Console | None = None) -> None:
        self.console = console or plain_console(stderr=True)
        self._num_steps, self._start = num_steps, start
        self._seconds: deque[float] = deque(maxlen=20)
        self._last_line = float("-inf")
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar: Progress | None = None
        if shows_bars(self.console):
            self._bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=self.console)

    def __enter__(self) -> TrainingProgress:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of an earlier run in this process
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._num_steps, completed=self._start)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step; the time left goes by the median of the last 20 steps."""
        step, reserved = metrics["step"], reserved_bytes()
        self._seconds.append(metrics["time"]["step_seconds"])
        left = sorted(self._seconds)[len(self._seconds) // 2] * (self._num_steps - step)
        held = "" if reserved is None else f" (reserved {reserved / 2**30:.2f})"
        text = (
            f"step {step}/{self._num_steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"{metrics['num_tokens'] / self._seconds[-1]:,.0f} tok/s  memory {peak_memory_bytes() / 2**30:.2f}{held} "
            f"GiB  left {duration(left)}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._num_steps:
            self._last_line = now
            self.console.print(text, soft_wrap=True)


def _wandb(run: Path) -> GeneralTracker:
    """A resumed run continues its run in wandb: the id is kept in its directory."""
    file, given = run / "wandb_id.txt", os.environ.get("WANDB_RUN_ID")
    if given or not file.is_file():
        atomic_write_text(file, f"{given or secrets.token_hex(8)}\n")
    id, project = file.read_text(encoding="utf-8").strip(), os.environ.get("WANDB_PROJECT")
    return WandBTracker(project or PROJECT, name=run.name, dir=str(run), id=id, resume="allow")


_MAKE: dict[str, Callable[[Path], GeneralTracker]] = {
    "tensorboard": lambda run: TensorBoardTracker("tensorboard", str(run)),
    "trackio": lambda run: TrackioTracker(PROJECT, name=run.name),
    "wandb": _wandb,
    "mlflow": lambda run: MLflowTracker(PROJECT, run_name=run.name),
}


@contextmanager
def tracking(
    names: Sequence[str], run: Path, settings: Mapping[str, Any], *, cpu: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Start accelerate's trackers of these names, yield a function that sends them a line of metrics, close them.

    `settings`, the recipe, are stored with the metrics. Raises UserError if a tracker does not start. One that fails
    later gets nothing more, with a warning: a chart is not worth a run of hours.
    """
    if names:
        PartialState(cpu=cpu)  # accelerate's trackers ask it whether this is the main process
    started: dict[str, GeneralTracker] = {}

    def tell(action: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(started.items()):
            try:
                action(tracker)
            except Exception as error:  # third-party code raises classes of its own
                del started[name]
                logger.warning("trackers: %s failed and gets no more metrics: %s", name, masked(named(error)))

    try:
        for name in names:
            try:
                tracker = _MAKE[name](run)
                tracker.start()
                tracker.store_init_configuration(flat_settings(settings))
            except Exception as error:
                raise UserError(f"trackers: {name} did not start: {masked(named(error))}") from error
            started[name] = tracker
        yield lambda line: tell(lambda tracker: tracker.log(flat_numbers(line), step=line["step"]))
    finally:
        tell(lambda tracker: tracker.finish())


def flat_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """{"step": 2, "tasks": {"boolq": {"nll_sum": 3.0}}} -> {"tasks/boolq/nll_sum": 3.0}: its numbers but the step."""
    values = flat({key: value for key, value in line.items() if key != "step"}, separator="/")
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if not isinstance(value, bool)}


def flat_settings(values: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """{"train": {"lr": 1e-3, "betas": [0.9, 0.99]}} -> {"train.lr": 1e-3, "train.betas": "[0.9, 0.99]"}.

    Leaves out null, which trackers refuse, and access tokens.
    """
    return {
        key: value if isinstance(value, bool | int | float) else masked(str(value))
        for key, value in flat(values).items()
        if value is not None
    }


def keep_trained(run: RunDirectory, model: nn.Module, step: int) -> None:
    """Write trained.json: what `step` steps did to each layer."""
    layers = [{"path": path, **layer_facts(layer)} for path, layer in adapted_layers(model).items()]
    run.write_json(TRAINED_FILE, {"step": step, "layers": layers})


@torch.no_grad()
def layer_facts(layer: AdaptedLinear) -> dict[str, Any]:
    """Rank, and how far a layer has moved from its base; nothing is dequantised.

    Returns: JSON values. `magnitude_moved`, `magnitude_moved_most`: mean and maximum of |m / ||w|| - 1| over the rows w
        of the base that are not zero. `update`: ||s B A|| / ||W||, Frobenius norms, without mask. None for LoRA, which
        does not know the norms of its base.
    """
    facts: dict[str, Any] = {"rank": layer.rank, "magnitude_moved": None, "magnitude_moved_most": None, "update": None}
    squared, magnitude = layer.base_squared, layer.magnitude
    if squared is None or magnitude is None:
        return facts
    alive = squared > 0
    moved = (magnitude[alive] / squared[alive].sqrt() - 1).abs()
    first, second = layer.lora_A.float(), layer.gated_B().float()
    # ||B A||^2 = sum of (A A^T) o (B^T B)
    size = ((first @ first.mT) * (second.mT @ second)).sum().clamp(min=0).sqrt() * layer.scaling
    if moved.numel():
        facts |= {"magnitude_moved": float(moved.mean()), "magnitude_moved_most": float(moved.max())}
        facts["update"] = float(size / squared.sum().sqrt())
    return facts


def report_streams(run: RunDirectory, streams: Sequence[ExampleStream]) -> None:
    """Log what the run has seen of each streamed source, and add it to mix.json."""
    seen = {}
    for part in streams:
        here = part.position
        counts = (here.num_drawn, here.num_truncated, here.num_dropped, here.epoch)
        logger.info("%s: %s examples seen, %s cut, %s dropped, %s complete passes.", part.name, *counts)
        if here.num_bad:
            text = "%s: %d faulty rows were skipped. The first: %s"
            logger.warning(text, part.name, here.num_bad, "; ".join(here.bad_rows))
        names = ("num_examples", "num_truncated", "num_dropped", "num_passes")
        faulty = {"num_bad_rows": here.num_bad, "bad_rows": list(here.bad_rows), "unused": sorted(part.unused)}
        seen[part.name] = dict(zip(names, counts, strict=True)) | faulty
    if seen:
        run.write_json("mix.json", json.loads(run.inside("mix.json").read_bytes()) | {"seen": seen})


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
        is_known = any(line.get("average", {}).get(metric) is not None for line in evaluations)
        if steps and len(evaluations) > 1 and is_known:
            plots[name] = partial(_validation, evaluations, metric)
    files = []
    for name, plot in plots.items():
        try:
            with svg_file(directory / f"{name}.svg", 5.6, 3.6) as figure:  # inches: on a page two stand side by side
                plot(figure)
            files.append(directory / f"{name}.svg")
        except Exception as error:  # the run is worth more than its pictures: fonts, a full disk, a strange metric
            logger.warning("figures/%s.svg was not drawn: %s: %s", name, type(error).__name__, error)
    return files


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
