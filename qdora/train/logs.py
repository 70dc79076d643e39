"""What a run shows of its training: progress, trackers, figures, layers, expert loads, gradients of data sets."""

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

from qdora.adapter.expert_product import ExpertTokens
from qdora.adapter.layer import AdaptedLinear, evaluation_mode
from qdora.data.batches import IGNORED, MicroBatch, Step
from qdora.data.example import Example
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import TokenizedExample, tokenize_all
from qdora.errors import UserError, named
from qdora.evaluate.suite import spread
from qdora.files.atomic import atomic_write_text, masked
from qdora.files.console import duration, plain_console, shows_bars
from qdora.files.pages import svg_file
from qdora.files.run_directory import RunDirectory, flat, unharmed
from qdora.model.experts import stacks
from qdora.recipe.settings import Recipe
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.distributed import Processes
from qdora.train.passes import LossScale, step_gradient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECT = "qdora"
TRAINED_FILE = "trained.json"
EXPERT_LOAD_FILE = "expert_load.json"
Lines = Sequence[Mapping[str, Any]]
Array = NDArray[np.float64]
_SECONDS_BETWEEN_LINES = 10.0
_WINDOW = 10  # most optimizer steps at the start and at the end whose division of tokens among experts is compared
_LEAST_PROBED = 2  # examples of a task, one for each half
_PIECE = 2**24  # entries of a gradient that exist in float64

logger = logging.getLogger("qdora")


def memory_peaks() -> dict[str, int]:
    """Peak memory: allocated on the GPU, and reserved for that; without a GPU resident in this process."""
    if torch.cuda.is_available():
        reserved = int(torch.cuda.max_memory_reserved())
        return {"peak_memory_bytes": int(torch.cuda.max_memory_allocated()), "peak_reserved_bytes": reserved}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024}  # Linux counts in KiB


def peaks(processes: Processes) -> dict[str, int]:
    """The largest `memory_peaks` of all processes."""
    per_rank = processes.gather(memory_peaks())
    return {name: max(own[name] for own in per_rank) for name in per_rank[0]}


class TrainingProgress:
    """Shows steps: a bar on a terminal, otherwise one plain line every 10 seconds and at the end."""

    def __init__(self, num_steps: int, *, start: int = 0, console: Console | None = None) -> None:
        self.console = console or plain_console(stderr=True)
        self._num_steps = num_steps
        self._seconds: deque[float] = deque(maxlen=20)
        self._last_line = float("-inf")
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=self.console, disable=not shows_bars(self.console))
        self._task = self._bar.add_task("training", total=num_steps, completed=start)

    def __enter__(self) -> TrainingProgress:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of an earlier run in this process
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step; the time left goes by the median of the last 20 steps."""
        step, (used, *reserved) = metrics["step"], [peak / 2**30 for peak in memory_peaks().values()]
        self._seconds.append(seconds := metrics["time"]["step_seconds"])
        left = sorted(self._seconds)[len(self._seconds) // 2] * (self._num_steps - step)
        held = f" (reserved {reserved[0]:.2f})" if reserved else ""
        text = (
            f"step {step}/{self._num_steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"{metrics['num_tokens'] / seconds:,.0f} tok/s  memory {used:.2f}{held} GiB  left {duration(left)}"
        )
        self._bar.update(self._task, completed=step, description=text)
        is_due = time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._num_steps
        if self._bar.disable and is_due:
            self._last_line = time.monotonic()
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
    """Start accelerate's trackers of these names, yield a function that sends them a line of metrics, close them."""
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
    """Rank, and how far a layer has moved from its base; None for LoRA.

    `magnitude_moved`, `magnitude_moved_most`: mean and maximum of |m / ||w|| - 1| over the rows w of the base that are
    not zero. `update`: ||s B A|| / ||W||, Frobenius norms, without mask.
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
    """Add what the run has seen of each streamed source to mix.json."""
    seen = {}
    for part in streams:
        here = part.position
        counts = {"num_examples": here.num_drawn, "num_truncated": here.num_truncated}
        counts |= {"num_dropped": here.num_dropped, "num_passes": here.epoch}
        if here.num_bad:
            logger.warning("%s: %d faulty rows were skipped, such as %s", part.name, here.num_bad, here.bad_rows[0])
        faulty = {"num_bad_rows": here.num_bad, "bad_rows": list(here.bad_rows), "unused": sorted(part.unused)}
        seen[part.name] = counts | faulty
    if seen:
        run.write_json("mix.json", run.read_json("mix.json") | {"seen": seen})


def smooth(values: ArrayLike, weights: ArrayLike, half_life: float) -> Array:
    """Running ratio of exponentially faded sums, sum(values) / sum(weights), (steps, ...): a mean over tokens.
    After `half_life` steps a contribution counts half."""
    import pandas as pd

    sums, counts = (pd.DataFrame(np.asarray(x, float)).ewm(halflife=half_life).mean() for x in (values, weights))
    return (sums / counts).to_numpy().reshape(np.shape(values))


def draw_figures(metrics: Lines, directory: Path) -> list[Path]:
    """Draw the lines of metrics.jsonl as SVG; returns the files. One that cannot be drawn is logged."""
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
        except Exception as error:  # the run is worth more than its pictures
            logger.warning("figures/%s.svg was not drawn: %s: %s", name, type(error).__name__, error)
    return files


def _loss_per_task(steps: Lines, figure: Figure) -> None:
    names = sorted({name for line in steps for name in line["tasks"]})
    sums = [[line["tasks"].get(name, {"nll_sum": 0.0})["nll_sum"] for name in names] for line in steps]
    tokens = [[line["tasks"].get(name, {"num_tokens": 0})["num_tokens"] for name in names] for line in steps]
    for line, row, counts in zip(steps, sums, tokens, strict=True):
        row.append(line["loss"] * line["num_label_tokens"])
        counts.append(line["num_label_tokens"])
    values = smooth(sums, tokens, max(1.0, len(steps) / 20))
    _plot(figure, "training loss, nats per answer token", steps, names, values)


def _validation(evaluations: Lines, metric: str, figure: Figure) -> None:
    names = sorted({name for line in evaluations for name in line["eval"]})
    rows = [[line["eval"].get(name, {}).get(metric) for name in names] for line in evaluations]
    rows = [[*row, line["average"].get(metric)] for row, line in zip(rows, evaluations, strict=True)]
    label = "validation NLL, nats per answer token" if metric == "nll_per_token" else "validation accuracy"
    _plot(figure, label, evaluations, names, np.array(rows, dtype=float))  # None becomes NaN


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
        "mean rank": [line["gates"]["mean_rank"] for line in steps if "gates" in line],
    }
    panels = {name: values for name, values in panels.items() if len(values) == len(steps)}
    for number, (name, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, number, ylabel=name)
        axes.plot([line["step"] for line in steps], values, gid=name)
        if name == "gradient norm":  # spikes are decades above the rest
            axes.set_yscale("log")


class ExpertLoad:
    """How the routers of a mixture divide the training steps' tokens of the first process among the experts.
    False for a model without experts."""

    def __init__(self, model: nn.Module) -> None:
        last = {path.rpartition(".")[0]: stack for path, stack in stacks(model).items()}  # one of each block
        self._now = {owner: np.zeros(stack.num_experts, np.int64) for owner, stack in last.items()}
        self._first: dict[str, list[list[int]]] = {}
        self._recent: dict[str, list[list[int]]] = {}
        self.num_steps = 0
        for owner, stack in last.items():
            stack.register_forward_pre_hook(partial(self._add, owner))

    def __bool__(self) -> bool:
        return bool(self._now)

    def _add(self, owner: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens: ExpertTokens = inputs[1]
        if module.training:  # a checkpoint's recompute counts again, which changes no share
            self._now[owner] += np.array(tokens.routed)

    def begin(self) -> None:
        """An optimizer step begins, or begins again. What was counted since the last one belongs to none."""
        for counts in self._now.values():
            counts[:] = 0

    def step(self) -> None:
        """The update of an optimizer step was made."""
        for owner, counts in self._now.items():
            first, recent = self._first.setdefault(owner, []), self._recent.get(owner, [])
            self._recent[owner] = [*recent, counts.tolist()][-_WINDOW:]
            if self.num_steps < _WINDOW:
                first.append(counts.tolist())
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"num_steps": self.num_steps, "first": self._first, "recent": self._recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.num_steps, self._first, self._recent = state["num_steps"], state["first"], state["recent"]

    def record(self) -> dict[str, Any]:
        """JSON values: of each block the share of each expert in the first and in the last `window` steps, and `moved`,
        the share of tokens that went to other experts than at the start."""
        window = min(_WINDOW, max(1, self.num_steps // 2))
        blocks = {}
        for owner in self._now:
            ends = [np.array(self._first[owner][:window]), np.array(self._recent[owner][-window:])]
            first, last = (counts.sum(axis=0) / max(1, counts.sum()) for counts in ends)
            blocks[owner] = {"first": first.tolist(), "last": last.tolist(), "moved": None}
            if self.num_steps > 1:
                blocks[owner]["moved"] = float(np.abs(last - first).sum() / 2)
        return {"num_steps": self.num_steps, "window": window, "blocks": blocks}

    def write(self, run: RunDirectory) -> None:
        """Write the record. Nothing without experts or steps."""
        if self._now and self.num_steps:
            with unharmed(EXPERT_LOAD_FILE):
                run.write_json(EXPERT_LOAD_FILE, self.record())


def interference_faults(recipe: Recipe, validation: Mapping[str, Sequence[Example]]) -> list[str]:
    """What is missing for a measurement: evaluations at its steps, two tasks with validation examples."""
    every, evaluated = recipe.interference.every, recipe.eval.every
    if every is None:
        return []
    counts = {source.label: len(validation.get(source.label, ())) for source in recipe.data.mix}
    if evaluated is None or every % evaluated:
        return [f"interference.every: must be a multiple of eval.every ({evaluated}), got {every}."]
    if min(counts.values(), default=0) < _LEAST_PROBED or len(counts) < 2:
        return [f"interference.every: needs two sources with {_LEAST_PROBED} validation examples each, got {counts}."]
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
        if len(examples[source.label]) < _LEAST_PROBED:
            raise UserError(f"interference.every: {source.label} has too few validation examples with labels.")
    return examples


def measure(
    model: nn.Module,
    halves: Mapping[str, tuple[Sequence[MicroBatch], Sequence[MicroBatch]]],
    parameters: Mapping[str, nn.Parameter],
    *,
    loss_chunk: int | None = None,
    loss_scale: LossScale | None = None,
) -> dict[str, Any]:
    """Cosines between the gradients of tasks by all adapter parameters, without dropout: JSON values.

    A task's gradient is that of its mean NLL per answer token on validation examples: memorised ones show nothing.
    """
    names, random = list(halves), random_state()
    batches = [half for name in names for half in halves[name]]
    num_tokens = [sum(int((micro.labels != IGNORED).sum()) for micro in half) for half in batches]
    num_examples = [sum(len(micro.example_ids) for micro in half) for half in batches]
    gradients = []
    model.train()
    try:
        torch.manual_seed(0)  # a model may draw random numbers of its own: the same in each measurement
        with evaluation_mode(model):
            for module in model.modules():  # blocks recompute their activations only in training mode
                module.training = bool(getattr(module, "gradient_checkpointing", False))
            for half, labels, count in zip(batches, num_tokens, num_examples, strict=True):
                step = Step([*half], labels, sum(int(micro.attention_mask.sum()) for micro in half), count)
                step_gradient(model, step, loss_chunk=loss_chunk, loss_scale=loss_scale)
                parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
                gradients.append(torch.cat([part.flatten().to("cpu", torch.bfloat16) for part in parts]))
                model.zero_grad()
    finally:
        model.zero_grad()
        set_random_state(random)
    gram = np.zeros((len(gradients), len(gradients)))
    for start in range(0, len(gradients[0]), _PIECE):
        piece = torch.stack([gradient[start : start + _PIECE] for gradient in gradients]).double()
        gram += (piece @ piece.T).numpy()
    result = agreement(gram, np.array(num_tokens, dtype=np.float64).reshape(len(names), 2))
    pairs = np.triu_indices(len(names), 1)
    cosines = result["cosines"][pairs]
    return {
        "tasks": names,
        "num_examples": dict(zip(names, np.reshape(num_examples, (-1, 2)).tolist(), strict=True)),
        "num_label_tokens": dict(zip(names, np.reshape(num_tokens, (-1, 2)).sum(axis=1).tolist(), strict=True)),
        **{name: _plain(values) for name, values in result.items()},
        "mean_cosine": _plain(cosines.mean()),
        "lowest_cosine": _plain(cosines.min()),
    }


def agreement(gram: Array, num_tokens: Array) -> dict[str, Array]:
    """Cosines from the inner products of half gradients, `gram`, (2 tasks, 2 tasks), the halves of a task together;
    `num_tokens`, (tasks, 2), are the answer tokens of each half, which weight them in the mean.

    Returns `cosines` (tasks, tasks); `own_cosines` (tasks,) between the halves of a task: near 0 its examples are too
    few; `norms` (tasks,).
    """
    num_tasks = len(num_tokens)
    weights = num_tokens / num_tokens.sum(axis=1, keepdims=True)
    mean = np.kron(np.eye(num_tasks), np.ones(2)) * weights.reshape(-1)
    products = mean @ gram @ mean.T
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = products / np.outer(norms, norms)
        halves = gram.diagonal().reshape(num_tasks, 2)
        own = gram[::2, 1::2].diagonal() / np.sqrt(halves.prod(axis=1))
    return {"cosines": cosines, "own_cosines": own, "norms": norms}


def _plain(values: Any) -> Any:
    if np.ndim(values) > 0:
        return [_plain(each) for each in values]
    return None if np.isnan(values) else float(f"{values:.6g}")
