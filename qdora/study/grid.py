"""A study file: the recipe and axes of its cells, how learning rates are found, and what is compared.

Every combination of the axes' values runs with every seed. An axis is a key of a recipe with its values, or a name with
labelled groups of settings that change together.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError

from qdora.errors import UserError, refuse
from qdora.recipe.recipe_file import read_yaml, recipe_document
from qdora.recipe.section import (
    Fault,
    Flag,
    NotNegative,
    Positive,
    Section,
    Seed,
    Share,
    Text,
    Whole,
    WholeOrZero,
    fault_lines,
    shown,
)
from qdora.recipe.settings import Metric

Axis = (
    Annotated[dict[Text, dict[Text, Any]], Field(min_length=1)]
    | Annotated[tuple[Any, ...], Field(min_length=1)]
)
Choice = dict[Text, Any]

SEED = "seed"
"""Name of the axis of repetitions. A seed sets train.seed, data.seed and eval.block; an axis may add to train.seed."""
RATE = "train.lr"

COLUMNS = "seed stage kind role rate cell status task arm reference measure verdict layer block step sparsity"


class PrimaryConfig(Section):
    """The mean improvement of `arm` over `reference` in the contexts `over`, less that in the contexts `minus`."""

    arm: Text | None = None
    reference: Text | None = None
    over: Choice = Field(default_factory=dict)
    minus: Choice | None = None
    seeds: tuple[Seed, ...] = ()
    family: Text = "primary"


class CompareConfig(Section):
    """What is compared, and when a difference or the lack of one is called; the guide studies has a table."""

    arm: Text = "adapter"
    reference: Text | None = None
    also: tuple[Text, ...] = ()
    metric: Metric = "nll_per_token"
    tasks: Literal["tokens", "equal"] = "tokens"
    split: Literal["halves", "test"] = "halves"
    primary: Annotated[dict[Text, PrimaryConfig], Field(min_length=1)] | None = None
    alpha: Share = 0.05
    zone: Positive = 0.02
    power: Annotated[Share, Field(gt=0.5)] = 0.8
    min_seeds: Annotated[Whole, Field(ge=2)] = 3
    spread: Positive | None = None


class RatesConfig(Section):
    """The search for the learning rate of each arm, with seeds and validation examples of its own.

    Short runs try all values; those around the best one run at full length, once a seed. The rate is the minimum of the
    parabola through the best value and its neighbours, in ln(rate).
    """

    values: Annotated[tuple[Positive, ...], Field(min_length=2)]
    """Values of train.lr to try, at least 2."""
    steps: Whole | None = None
    """Length of the short runs (null: no short runs; all values run at full length)."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1000, 1001)
    """Seeds of the search, none of the study's. Short runs have the first one."""
    extend: WholeOrZero = 2
    """Times that the search goes beyond the smallest and beyond the largest value."""
    like: dict[Text, dict[Text, Text]] = Field(default_factory=dict)
    """Axis -> value -> value whose rate it takes instead of a search of its own."""
    of: dict[Text, dict[Text, Annotated[tuple[Positive, ...], Field(min_length=2)]]] = Field(
        default_factory=dict
    )
    """Axis -> value -> values of train.lr to try there in place of `values`."""

    def for_labels(self, labels: Mapping[str, str]) -> RatesConfig:
        """The search of an arm with these labels."""
        own = [values[labels[axis]] for axis, values in self.of.items() if labels.get(axis) in values]
        return self.model_copy(update={"values": own[0]}) if own else self


class StageConfig(Section):
    """A part of the cells; `steps`: kept checkpoints that by_layer measures, also of full fine-tuning ([]: the end)."""

    name: Text
    cells: Choice = Field(default_factory=dict)
    kind: Literal["train", "transplant", "rescaled", "set_back", "by_layer"] = "train"
    """transplant: evaluate the adapter that the same arm and seed trained on the uncompressed base. rescaled: evaluate
    the transplant (DoRA) with each magnitude times the row norm of its base over that of the uncompressed base.
    set_back: evaluate the trained adapter (DoRA) with the row norms of its base as magnitudes. by_layer: measure how
    far directions and magnitudes moved, which error of compression is undone, and the loss without each block."""
    steps: tuple[Whole, ...] = ()


class TimeConfig(Section):
    """Seconds of a run and of each step, for --dry-run where no run is finished; plan: as `qdora plan` estimates it."""

    start: NotNegative
    step: NotNegative | Literal["plan"]


def _seeds(value: Any) -> Any:
    return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value


class Study(Section):
    """A study file; see the guide studies."""

    recipe: Text
    settings: dict[Text, Any] = Field(default_factory=dict)
    product: Annotated[dict[Text, Axis], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), BeforeValidator(_seeds)] = (0, 1, 2)
    """Seeds of every combination, or their number: 3 means 0, 1 and 2. A seed decides the initial values, the order of
    the data and, with eval.limit, the examples. Where stages name later seeds, these alone tell the spread (Stein)."""
    stages: tuple[StageConfig, ...] = ()
    exclude: tuple[Choice, ...] = ()
    rates: RatesConfig | None = None
    compare: CompareConfig = CompareConfig()
    bases: Flag = True
    time: TimeConfig | None = None
    retries: WholeOrZero = 1

    def faults(self) -> Iterator[Fault]:
        rates, compare, axes = (
            self.rates,
            self.compare,
            {name: labels_of(axis) for name, axis in self.product.items()},
        )
        for name in sorted(axes.keys() & {*COLUMNS.split()}):
            yield f"product.{name}", "is a column of the report. Fix: use another name for the axis."
        named = [
            seed
            for stage in self.stages
            if stage.kind == "train"
            for seed in as_list(stage.cells.get(SEED, ()))
        ]
        later = tuple(seed for seed in dict.fromkeys(named) if isinstance(seed, int) and seed not in self.seeds)
        groups = {
            "seeds": self.seeds,
            "stages[].cells.seed": later,
            "rates.seeds": rates.seeds if rates else (),
        }
        seen: dict[int, str] = {}
        for key, seeds in groups.items():
            for seed in seeds:
                if seed in seen:
                    yield key, f"must be seeds of their own, got {seed}, which is also in {seen[seed]}."
                seen[seed] = key
        asked: list[tuple[str, Any]] = [
            (f"exclude[{index}]", entry) for index, entry in enumerate(self.exclude)
        ]
        if rates is not None:
            asked += [("rates.like", {axis: [*like, *like.values()]}) for axis, like in rates.like.items()]
            asked += [("rates.of", {axis: list(values)}) for axis, values in rates.of.items()]
        asked += [(f"stages[{index}].cells", stage.cells) for index, stage in enumerate(self.stages)]
        asked += [
            ("compare", {compare.arm: compare.reference or []}),
            ("compare.also", dict.fromkeys(compare.also, ())),
        ]
        for name, each in (compare.primary or {}).items():
            where = f"compare.primary.{name}"
            asked.append((where, {compare.arm: [arm for arm in (each.arm, each.reference) if arm is not None]}))
            asked += [(f"{where}.over", each.over), (f"{where}.minus", each.minus or {})]
        for where, entry in asked:
            for name, value in entry.items():
                if name == SEED:
                    wrong, allowed = (
                        [each for each in as_list(value) if not isinstance(each, int)],
                        "whole numbers",
                    )
                elif name in axes:
                    wrong = [each for each in as_list(value) if label_of(each) not in axes[name]]
                    allowed = f"of {', '.join(axes[name])}"
                else:
                    yield where, f"{name} must be an axis, allowed: {', '.join(axes)}."
                    continue
                if wrong:
                    yield where, f"{name} must be {allowed}, got {shown(wrong[0])}."


def load_study(path: Path, text: str | None = None) -> Study:
    """Read and check a study file, or its `text`. UserError lists all faults.

    A `recipe` that is a file gets an absolute path.
    """
    data, where = recipe_document(path) if text is None else (read_yaml(text, "--vary"), "--vary")
    recipe = data.get("recipe")
    if recipe is None and "data" in data:
        raise UserError(f"{path}: is a recipe. Fix: name what is compared, such as --vary base.quant=none,nf4.")
    if isinstance(recipe, str) and (path.parent / recipe).is_file():
        data["recipe"] = str((path.parent / recipe).resolve())
    return study_from(data, where)


def study_from(data: Mapping[str, Any], where: str = "study") -> Study:
    """Check plain data and make a study from it; a fault is `<where>: <path.to.key>: ...`."""
    try:
        study = Study.model_validate(data)
        lines = list(study.faults())
    except ValidationError as error:
        lines = fault_lines(error, data)
    refuse(list(dict.fromkeys(": ".join(filter(None, (where, *line))) for line in lines)))
    return study


def choices(axis: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """(label, settings) of each value."""
    if isinstance(axis, dict):
        return list(axis.items())
    return [(label_of(value), {name: value}) for value in axis]


def labels_of(axis: Any) -> list[str]:
    return [label for label, _ in choices(axis, "")]


def combinations(study: Study) -> Iterator[tuple[StageConfig, dict[str, str], tuple[int, ...]]]:
    """(stage, labels, seeds): the combinations of labels of every stage, with the seeds that no earlier stage gave."""
    seen: dict[tuple[str, ...], set[int]] = {}
    axes = {name: labels_of(axis) for name, axis in study.product.items()}
    for stage in study.stages or (StageConfig(name="main"),):
        chosen = {axis: value for axis, value in stage.cells.items() if axis != SEED}
        for combination in itertools.product(*axes.values()):
            labels = dict(zip(axes, combination, strict=True))
            known = seen.setdefault((stage.kind, *combination), set())
            seeds = tuple(seed for seed in as_list(stage.cells.get(SEED, study.seeds)) if seed not in known)
            excluded = any(has_labels(labels, entry) for entry in study.exclude)
            if seeds and has_labels(labels, chosen) and not excluded:
                known.update(seeds)
                yield stage, labels, seeds


def first_seeds(study: Study, seeds: Iterable[str]) -> list[str]:
    """Those of these seeds that tell the spread: the ones that are in the study's `seeds`, or all if none is."""
    every = list(seeds)
    return [seed for seed in every if seed and int(seed) in study.seeds] or every


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


# YAML 1.1 reads 1e-4 as text. Other text is a name: revision "1.10" is not "1.1".
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def label_of(value: Any) -> str:
    """A value as the report shows it; 1e-4, 1.0e-4 and 0.0001 have the same label."""
    if isinstance(value, str):
        return f"{float(value):.12g}" if _EXPONENT.fullmatch(value) else value
    return f"{value:.12g}" if isinstance(value, float) else json.dumps(value)


def has_labels(labels: Mapping[str, str], entry: Mapping[str, Any]) -> bool:
    """Whether labels have one of an entry's values on each of its axes."""
    return all(labels.get(name) in [label_of(each) for each in as_list(value)] for name, value in entry.items())


def in_words(labels: Mapping[str, str]) -> str:
    """'adapter=dora, train.lr=0.0001'."""
    return ", ".join(f"{axis}={label}" for axis, label in labels.items())


Length = Literal["short", "full"]


class RateRun(NamedTuple):
    length: Length
    rate: float
    seed: int


Loss = Callable[[RateRun], float | None]
"""Validation loss of a run: inf if it diverged, None if it has no result yet."""


@dataclass(frozen=True)
class Search:
    """How far a search is: all runs that it has asked for, and what it found.

    rate: None before the end, or if every value diverged. is_interior: the best value has a worse one on both sides.
    losses: (length, rate) -> mean over the seeds; inf if a run diverged.
    """

    runs: list[RateRun]
    is_done: bool
    rate: float | None
    is_interior: bool
    losses: Mapping[tuple[Length, float], float]


def search(config: RatesConfig, loss: Loss) -> Search:
    """What the search has found, and which runs it needs next: the same whenever the same results are there.

    Values have an index: 0 is the smallest that was given; those below and above continue the steps at the ends.
    """
    values, runs = sorted(config.values), dict[RateRun, float | None]()
    losses = dict[tuple[Length, float], float]()
    ladder = range(-config.extend, len(values) + config.extend)

    def rate(index: int) -> float:
        end, step = (0, values[1] / values[0]) if index < 0 else (len(values) - 1, values[-1] / values[-2])
        return (
            values[index] if 0 <= index < len(values) else float(f"{values[end] * step ** (index - end):.3g}")
        )

    def bracketed(length: Length, known: set[int]) -> int | None:
        """The best of `known` and of what is added until it has a neighbour on both sides, or the ladder ends.

        None if runs have no result yet, or if all diverged.
        """
        while True:
            for index in sorted(known):
                own = [
                    RateRun(length, rate(index), seed)
                    for seed in config.seeds[: 1 if length == "short" else None]
                ]
                for run in own:
                    if run not in runs:  # asked once: another process may end it meanwhile
                        runs[run] = loss(run)
                ended = [value for run in own if (value := runs[run]) is not None]
                if len(ended) == len(own):
                    losses[length, rate(index)] = float(np.mean(ended))
            if None in runs.values():
                return None
            finite = [index for index in sorted(known) if math.isfinite(losses[length, rate(index)])]
            best = min(finite, key=lambda index: losses[length, rate(index)], default=None)
            wanted = {min(known) - 1} if best is None else {best - 1, best + 1}
            if not (added := (wanted - known).intersection(ladder)):
                return best
            known = known | added

    best, asked = None, set(range(len(values)))
    if config.steps is not None:
        best = bracketed("short", asked)
        asked = set() if best is None else {best - 1, best, best + 1}.intersection(ladder)
    best = bracketed("full", asked) if asked else None
    if best is None:
        return Search(list(runs), None not in runs.values(), None, False, losses)
    rates = [rate(index) for index in (best - 1, best, best + 1)]
    neighbours = [losses.get(("full", each), math.nan) for each in rates]
    found = float(f"{minimum(rates, neighbours):.3g}")
    return Search(list(runs), True, found, not any(map(math.isnan, neighbours)), losses)


def minimum(rates: list[float], losses: list[float]) -> float:
    """Where the parabola through three losses over ln(rate) is lowest; the middle rate if a loss is not finite.

    The middle one is the lowest of the three, so the minimum lies within half of the way to the neighbours.
    """
    if not all(map(math.isfinite, losses)):
        return rates[1]
    curvature, slope, _ = np.polyfit(np.log(rates) - math.log(rates[1]), losses, 2)
    return rates[1] if curvature <= 0 else rates[1] * math.exp(-slope / (2 * curvature))
