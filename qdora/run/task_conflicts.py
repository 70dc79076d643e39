"""Interference between the tasks of a run: the examples that measure it, the measurements, and their report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from qdora.data.batching import MicroBatch, micro_batches
from qdora.data.example import Example
from qdora.data.tokenize import TokenizedExample, tokenize_all
from qdora.errors import UserError
from qdora.evaluation.suite import spread
from qdora.files.run_directory import RunDirectory
from qdora.recipe.settings import Recipe
from qdora.run.active_run import ActiveRun
from qdora.train.interference import MIN_EXAMPLES, GradientProbe, measure

FILE = "interference.json"

Tokenised = dict[str, list[TokenizedExample]]


def interference_faults(recipe: Recipe, validation: Mapping[str, Sequence[Example]]) -> list[str]:
    """What is missing for a measurement: two tasks, and validation examples for each of them."""
    if recipe.interference.every is None:
        return []
    faults = []
    if len(recipe.data.mix) < 2:
        faults.append("interference.every: needs at least two sources in data.mix, got 1.")
    for source in recipe.data.mix:
        found = len(validation.get(source.label, ()))
        if found < MIN_EXAMPLES:
            examples = "example" if found == 1 else "examples"
            faults.append(
                f"interference.every: {source.label} has {found} validation {examples}, must be at least "
                f"{MIN_EXAMPLES}."
            )
    return faults


def probe_examples(recipe: Recipe, tokenizer: Any, validation: Mapping[str, Sequence[Example]]) -> Tokenised:
    """Validation examples of every task, evenly spread over its data, tokenised as in training.

    Not training examples: the question is whether learning one task helps another in general, which gradients on
    memorised examples no longer show.
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
        f"interference.every: {name} has {len(found)} validation examples with labels, must be at least {MIN_EXAMPLES}."
        for name, found in examples.items()
        if len(found) < MIN_EXAMPLES
    ]
    if faults:
        raise UserError(*faults)
    return examples


def probe_hook(
    active: ActiveRun,
    parameters: Mapping[str, nn.Parameter],
    examples: Tokenised,
    write: Callable[[dict[str, Any]], None],
) -> Callable[[int], None]:
    """A function for the loop: after a step the first process measures (all, if they divide the base), and all
    processes call `write`."""
    loader, chunk = active.loader, active.recipe.memory.loss_chunk

    def batches(examples: Sequence[TokenizedExample]) -> list[MicroBatch]:
        return micro_batches(examples, loader.batching, list(dict.fromkeys(example.task for example in examples)))

    def report() -> dict[str, Any]:
        halves = {name: (batches(found[0::2]), batches(found[1::2])) for name, found in examples.items()}
        found = measure(
            active.model,
            GradientProbe(halves),
            parameters,
            device=next(iter(parameters.values())).device,
            loss_chunk=None if chunk == "auto" else chunk,
        )
        return {"interference": found, "time": {"interference_seconds": found.pop("seconds")}}

    def probe(step: int) -> None:
        write({"step": step, **(active.processes.first_or_all(report) or {})})

    return probe


def write_interference(run: RunDirectory) -> None:
    """Write interference.json from the lines of metrics, if anything was measured."""
    lines = _measurements(run)
    if not lines:
        return
    found = [
        {"step": line["step"], **line["interference"], "seconds": line["time"]["interference_seconds"]}
        for line in lines
    ]
    run.write_json(FILE, {"measurements": found})


def _measurements(run: RunDirectory) -> list[dict[str, Any]]:
    return [line for line in run.metrics() if "interference" in line]
