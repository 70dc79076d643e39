"""What `qdora train` does about interference: the probe's examples, its report, and what the run directory says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from qdora.data.batching import MicroBatch, micro_batches
from qdora.data.example import Example
from qdora.data.loader import StepLoader
from qdora.data.tokenize import TokenizedExample, tokenize_all
from qdora.errors import UserError
from qdora.evaluation.suite import spread
from qdora.files.run_directory import RunDirectory
from qdora.recipe.settings import Recipe
from qdora.run.active_run import ActiveRun
from qdora.train.figures import draw_heat_map
from qdora.train.interference import MIN_EXAMPLES, GradientProbe, in_words, measure

FILE = "interference.json"
FIGURE = "figures/interference.svg"

Tokenised = dict[str, list[TokenizedExample]]


def interference_faults(recipe: Recipe, validation: Mapping[str, Sequence[Example]]) -> list[str]:
    """What is missing for a report: two tasks, and for each of them validation examples."""
    if recipe.interference.every is None:
        return []
    faults = []
    if len(recipe.data.mix) < 2:
        faults.append(
            "interference.every: one source has no other to disturb, allowed: two sources or more in data.mix."
        )
    for source in recipe.data.mix:
        found = len(validation.get(source.label, ()))
        if found < MIN_EXAMPLES:
            faults.append(
                f"interference.every: {source.label} has {found} validation examples, allowed: {MIN_EXAMPLES} or more."
            )
    return faults


def probe_examples(recipe: Recipe, tokenizer: Any, validation: Mapping[str, Sequence[Example]]) -> Tokenised:
    """The examples of every task, evenly spread over its validation data, as they would be trained on.

    Validation and not training examples: what is asked is whether learning one task helps another in general, and
    gradients on examples that were learnt by heart no longer say so.
    """
    data = recipe.data
    examples = {
        source.label: list(
            tokenize_all(
                spread(validation[source.label], recipe.interference.examples),
                tokenizer,
                name=source.label,
                max_length=data.max_length,
                loss_on=data.loss_on,
                too_long="truncate",
            ).examples
        )
        for source in data.mix
    }
    faults = [
        f"interference.every: {name} has {len(found)} validation examples to learn, allowed: {MIN_EXAMPLES} or more."
        for name, found in examples.items()
        if len(found) < MIN_EXAMPLES
    ]
    if faults:
        raise UserError(*faults)
    return examples


def interference_report(
    recipe: Recipe, model: nn.Module, parameters: Mapping[str, nn.Parameter], loader: StepLoader, examples: Tokenised
) -> dict[str, Any]:
    """The line of metrics of one measurement (see `qdora.train.interference.measure`), without its step."""
    chunk = recipe.memory.loss_chunk
    halves = {name: (_batches(found[0::2], loader), _batches(found[1::2], loader)) for name, found in examples.items()}
    device = next(iter(parameters.values())).device
    report = measure(
        model, GradientProbe(halves), parameters, device=device, loss_chunk=None if chunk == "auto" else chunk
    )
    return {"interference": report, "time": {"interference_seconds": report.pop("seconds")}}


def _batches(examples: Sequence[TokenizedExample], loader: StepLoader) -> list[MicroBatch]:
    return micro_batches(examples, loader.batching, list(dict.fromkeys(example.task for example in examples)))


def write_interference(run: RunDirectory) -> None:
    """interference.json and its figure, from the lines of metrics; nothing where nothing was measured."""
    lines = [line for line in run.metrics() if "interference" in line]
    if not lines:
        return
    found = [
        {"step": line["step"], **line["interference"], "seconds": line["time"]["interference_seconds"]}
        for line in lines
    ]
    run.write_json(FILE, {"measurements": found})
    draw_heat_map(found[-1], run.inside(FIGURE))


def interference_in_words(run: RunDirectory) -> str:
    """The last measurement of a run, for its card; empty where there is none."""
    lines = [line for line in run.metrics() if "interference" in line]
    return in_words(lines[-1]["interference"], lines[-1]["step"]) if lines else ""


def probe_hook(
    active: ActiveRun,
    parameters: Mapping[str, nn.Parameter],
    examples: Tokenised,
    write: Callable[[dict[str, Any]], None],
) -> Callable[[int], None]:
    """For the loop: after a step the first process measures and all call `write` (`RunWriter.write_metrics`)."""

    def report() -> dict[str, Any]:
        return interference_report(active.recipe, active.model, parameters, active.loader, examples)

    def probe(step: int) -> None:
        write({"step": step, **(active.processes.first(report) or {})})

    return probe
