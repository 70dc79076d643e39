"""What a run shows of its training: progress, trackers, figures, layers, gradients of data sets."""

from __future__ import annotations

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
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from qdora.adapter.layer import AdaptedLinear, evaluation_mode
from qdora.data.batches import Batching, Step, micro_batches
from qdora.data.example import Example
from qdora.data.tokenize import TokenizedExample, tokenize_all
from qdora.errors import UserError, named
from qdora.evaluate.suite import spread
from qdora.files.atomic import atomic_write_text, masked
from qdora.files.console import duration, plain_console, shows_bars
from qdora.files.pages import svg_file
from qdora.files.run_directory import flat, unharmed
from qdora.recipe.settings import Recipe
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.distributed import Processes
from qdora.train.passes import LossScale, step_gradient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECT = "qdora"
TRAINED_FILE = "trained.json"
Lines = Sequence[Mapping[str, Any]]
Array = NDArray[np.float64]
_SECONDS_BETWEEN_LINES = 10.0
_PIECE = 2**24  # entries of a gradient that exist in float64

logger = logging.getLogger("qdora")


def peaks(processes: Processes) -> dict[str, int]:
    """Peak memory of the process that has most: allocated on the GPU, and reserved for that; without a GPU resident."""
    if torch.cuda.is_available():
        mine = {"peak_memory_bytes": int(torch.cuda.max_memory_allocated())}
        mine["peak_reserved_bytes"] = int(torch.cuda.max_memory_reserved())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mine = {"peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024}  # Linux counts in KiB
    per_rank = processes.gather(mine)
    return {name: max(own[name] for own in per_rank) for name in mine}


class TrainingProgress(Progress):
    """Shows steps: a bar on a terminal, otherwise one plain line every 10 seconds and at the end."""

    def __init__(self, num_steps: int, *, start: int = 0, console: Console | None = None) -> None:
        console = console or plain_console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        super().__init__(*columns, console=console, disable=not shows_bars(console))
        self._task = self.add_task("training", total=num_steps, completed=start)
        self._num_steps = num_steps
        self._seconds: deque[float] = deque(maxlen=20)
        self._last_line = float("-inf")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of an earlier run in this process

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step; the time left goes by the median of the last 20 steps."""
        step, seconds = metrics["step"], metrics["time"]["step_seconds"]
        self._seconds.append(seconds)
        left = sorted(self._seconds)[len(self._seconds) // 2] * (self._num_steps - step)
        used = metrics["time"]["peak_memory_bytes"] / 2**30
        text = (
            f"step {step}/{self._num_steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"{metrics['num_tokens'] / seconds:,.0f} tok/s  memory {used:.2f} GiB  left {duration(left)}"
        )
        self.update(self._task, completed=step, description=text)
        is_due = time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._num_steps
        if self.disable and is_due:
            self._last_line = time.monotonic()
            self.console.print(text, soft_wrap=True)


def _wandb(run: Path) -> GeneralTracker:
    """A resumed run continues its run in wandb: the id is kept in its directory."""
    file, project = run / "wandb_id.txt", os.environ.get("WANDB_PROJECT", PROJECT)
    if not file.is_file():
        atomic_write_text(file, os.environ.get("WANDB_RUN_ID", secrets.token_hex(8)))
    return WandBTracker(
        project, name=run.name, dir=str(run), id=file.read_text("utf-8").strip(), resume="allow"
    )


_MAKE: dict[str, Callable[[Path], GeneralTracker]] = {
    "tensorboard": lambda run: TensorBoardTracker("tensorboard", str(run)),
    "trackio": lambda run: TrackioTracker(PROJECT, name=run.name),
    "wandb": _wandb,
    "mlflow": lambda run: MLflowTracker(PROJECT, run_name=run.name),
}


@contextmanager
def tracking(
    names: Sequence[str], run: Path, settings: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Start accelerate's trackers of these names, yield a function that sends them a line of metrics, close them."""
    if names:
        # accelerate's trackers ask it whether this is the main process
        PartialState(cpu=not torch.cuda.is_available())
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
    """{"step": 2, "tasks": {"boolq": {"nll_sum": 3.0}}} -> {"tasks/boolq/nll_sum": 3.0}"""
    values = flat({key: value for key, value in line.items() if key != "step"}, separator="/")
    return {key: float(value) for key, value in values.items() if type(value) in (int, float)}


def flat_settings(values: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """{"train": {"betas": [0.9, 0.99]}} -> {"train.betas": "[0.9, 0.99]"}, without null and access tokens."""
    return {
        key: value if isinstance(value, bool | int | float) else masked(str(value))
        for key, value in flat(values).items()
        if value is not None
    }


@torch.no_grad()
def layer_facts(layer: AdaptedLinear) -> dict[str, Any]:
    """Rank, and but for LoRA how far a layer has moved from its base.

    `magnitude_moved`: mean of |m / ||w|| - 1| over the rows w of the base that are not zero. `update`: ||s B A|| over
    ||W||, Frobenius norms, without mask.
    """
    squared, magnitude = layer.base_squared, layer.magnitude
    if squared is None or magnitude is None:
        return {"rank": layer.rank}
    alive = squared > 0
    moved = (magnitude[alive] / squared[alive].sqrt() - 1).abs().mean()
    first, second = layer.lora_A.float(), layer.gated_B().float()
    # ||B A||^2 = sum of (A A^T) o (B^T B)
    size = ((first @ first.mT) * (second.mT @ second)).sum().clamp(min=0).sqrt() * layer.scaling
    return {"rank": layer.rank, "magnitude_moved": float(moved), "update": float(size / squared.sum().sqrt())}


def smooth(values: Any, weights: Any, half_life: float) -> Array:
    """Running ratio of exponentially faded sums, sum(values) / sum(weights), (steps, ...): a mean over tokens.
    After `half_life` steps a contribution counts half."""
    decay = 0.5 ** (1 / half_life)
    sums, counts = (
        np.array([*accumulate(np.asarray(x, float), lambda faded, new: decay * faded + new)])
        for x in (values, weights)
    )
    with np.errstate(invalid="ignore"):  # no token so far: NaN
        return np.asarray(sums / counts)


def draw_figures(metrics: Lines, directory: Path) -> None:
    """Draw the lines of metrics.jsonl as SVG. A figure that cannot be drawn is logged."""
    steps = [line for line in metrics if "tasks" in line]
    evaluations = [line for line in metrics if "eval" in line]
    plots: dict[str, Callable[[Figure], None]] = {}
    if steps:
        plots = {"loss_per_task": partial(_loss_per_task, steps), "steps": partial(_steps, steps)}
        for metric, name in (("nll_per_token", "validation_nll"), ("acc", "validation_accuracy")):
            if len(evaluations) > 1 and any(line["average"][metric] is not None for line in evaluations):
                plots[name] = partial(_validation, evaluations, metric)
    for name, plot in plots.items():  # inches: on a page two stand side by side
        with unharmed(f"figures/{name}.svg"), svg_file(directory / f"{name}.svg", 5.6, 3.6) as figure:
            plot(figure)


def _loss_per_task(steps: Lines, figure: Figure) -> None:
    names = sorted({name for line in steps for name in line["tasks"]})
    none, rows = {"nll_sum": 0.0, "num_tokens": 0}, []
    for line in steps:
        whole = {"nll_sum": line["loss"] * line["num_label_tokens"], "num_tokens": line["num_label_tokens"]}
        rows.append([*(line["tasks"].get(name, none) for name in names), whole])
    sums, tokens = ([[numbers[key] for numbers in row] for row in rows] for key in none)
    values = smooth(sums, tokens, max(1.0, len(steps) / 20))
    _plot(figure, "training loss, nats per answer token", steps, names, values)


def _validation(evaluations: Lines, metric: str, figure: Figure) -> None:
    names = sorted({name for line in evaluations for name in line["eval"]})
    tasks = [[*(line["eval"].get(name, {}) for name in names), line["average"]] for line in evaluations]
    # None becomes NaN
    values = np.array([[numbers.get(metric) for numbers in row] for row in tasks], dtype=float)
    label = "validation NLL, nats per answer token" if metric == "nll_per_token" else "validation accuracy"
    _plot(figure, label, evaluations, names, values)


def _plot(figure: Figure, label: str, lines: Lines, names: Sequence[str], values: Array) -> None:
    axes, style = figure.add_subplot(xlabel="optimizer step", ylabel=label), ".-" if len(lines) < 50 else "-"
    for name, curve in zip([*names, "all"], values.T, strict=True):
        whole: Any = {"color": "black", "linewidth": 2} if name == "all" else {}
        axes.plot([line["step"] for line in lines], curve, style, label=name, gid=name, **whole)
    axes.legend(fontsize="small", ncols=2)


def _steps(steps: Lines, figure: Figure) -> None:
    panels = {
        "learning rate": [line["lr"] for line in steps],
        "gradient norm": [line["gradient_norm"] for line in steps],
        "tokens per second": [line["num_tokens"] / line["time"]["step_seconds"] for line in steps],
        "peak memory, GiB": [line["time"]["peak_memory_bytes"] / 2**30 for line in steps],
    }
    if "gates" in steps[0]:
        panels["mean rank"] = [line["gates"]["mean_rank"] for line in steps]
    for number, (name, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, number, ylabel=name)
        axes.plot([line["step"] for line in steps], values, gid=name)
        if name == "gradient norm":  # spikes are decades above the rest
            axes.set_yscale("log")


def interference_faults(recipe: Recipe, validation: Mapping[str, Sequence[Example]]) -> list[str]:
    """What is missing for a measurement: evaluations at its steps, two tasks with validation examples."""
    every, evaluated = recipe.interference.every, recipe.eval.every
    if every is None:
        return []
    counts = {source.label: len(validation.get(source.label, ())) for source in recipe.data.mix}
    if evaluated is None or every % evaluated:
        return [f"interference.every: must be a multiple of eval.every ({evaluated}), got {every}."]
    if len(counts) < 2 or not all(counts.values()):
        return [f"interference.every: needs two sources, all with validation examples, got {counts}."]
    return []


def probe_examples(
    recipe: Recipe, tokenizer: Any, validation: Mapping[str, Sequence[Example]]
) -> dict[str, list[TokenizedExample]]:
    """Validation examples of every task, evenly spread over its data, tokenised as in training."""
    data = recipe.data.model_copy(update={"too_long": "truncate"})
    examples = {}
    for source in data.mix if recipe.interference.every is not None else ():
        chosen = spread(validation[source.label], recipe.interference.examples)
        examples[source.label] = list(tokenize_all(chosen, tokenizer, source.label, data).examples)
    return examples


def measure(
    model: nn.Module,
    examples: Mapping[str, Sequence[TokenizedExample]],
    batching: Batching,
    parameters: Mapping[str, nn.Parameter],
    *,
    loss_chunk: int | None = None,
    loss_scale: LossScale | None = None,
) -> dict[str, Any]:
    """Cosines between the gradients of tasks by all adapter parameters, without dropout: JSON values.

    A task's gradient is that of its mean NLL per answer token on validation examples: memorised ones show nothing.
    """
    random, gradients = random_state(), []
    model.train()
    try:
        torch.manual_seed(0)  # a model may draw random numbers of its own: the same in each measurement
        with evaluation_mode(model):
            for module in model.modules():  # blocks recompute their activations only in training mode
                module.training = bool(getattr(module, "gradient_checkpointing", False))
            for chosen in examples.values():
                num_label_tokens = sum(int(example.loss_mask.sum()) for example in chosen)
                batches = micro_batches(chosen, batching, [*{example.task for example in chosen}])
                step = Step(batches, num_label_tokens, num_tokens=0, num_examples=0)  # which are not read
                step_gradient(model, step, loss_chunk=loss_chunk, loss_scale=loss_scale)
                parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
                gradients.append(torch.cat([part.flatten().to("cpu", torch.bfloat16) for part in parts]))
                model.zero_grad()
    finally:
        model.zero_grad()
        set_random_state(random)
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for pieces in zip(*(torch.split(gradient, _PIECE) for gradient in gradients), strict=True):
        piece = torch.stack(pieces).double()
        products += piece @ piece.T
    norms = products.diagonal().sqrt()
    cosines = products / norms.outer(norms)
    pairs = cosines[torch.triu_indices(len(examples), len(examples), 1).unbind()]
    return {
        "tasks": list(examples),
        "cosines": cosines.tolist(),
        "norms": norms.tolist(),
        "mean_cosine": pairs.mean().item(),
        "lowest_cosine": pairs.min().item(),
    }
