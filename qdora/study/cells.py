"""The cells of a study: checked recipes, each named by its hash. Rates and adapters that cells need come from others.

A cell that needs the rate of a search, or the adapter of another cell, is added once that is there, so the cells are
made anew whenever results have come.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from qdora.data.files import files_of
from qdora.errors import UserError
from qdora.files.atomic import sampled_digest
from qdora.files.machine import user_path
from qdora.files.run_directory import WITHOUT_EFFECT, flat, is_below
from qdora.recipe.data_settings import is_path, names_files
from qdora.recipe.recipe_file import override, recipe_document, recipe_from, settings, with_overrides
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.study.grid import (
    RATE,
    SEED,
    RateRun,
    Search,
    StageConfig,
    Study,
    choices,
    combinations,
    in_words,
    label_of,
    search,
)

_WHOLE_BYTES = 2**30
_LATER = {"model.tokenizer_revision": None, "base.method": "round"}
_LATER_OF_SOURCES = {"chat": False}
"""Settings, and those of a source, that are younger than the committed cells; at this value they are not in a key."""
_GONE = {"train.compile": False, "train.router_aux_loss": 0.0}
_GONE_OF_ADAPTERS = {"adapter.experts.share": "none"}
"""Settings that have left, but stay in every key, and in that of LoRA and DoRA."""


def key_of(recipe: Recipe) -> str:
    """16 hex digits of a hash of the settings that decide the result, and of the content of the recipe's data files.

    Files of the model count by their path only.
    """
    recipe = with_settings(recipe, base={"quant": "nf4"}) if recipe.base.quant == "auto" else recipe
    found = {key: value for key, value in flat(settings(recipe)).items() if not is_below(key, WITHOUT_EFFECT)}
    decisive = _without(found, _LATER) | _GONE | (_GONE_OF_ADAPTERS if "adapter.rank" in found else {})
    decisive["data.mix"] = [_without(source, _LATER_OF_SOURCES) for source in decisive["data.mix"]]
    contents = {str(path): list(map(_content, files)) for path, files in sorted(_files(recipe).items())}
    text = json.dumps([decisive, contents], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _without(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if later.get(name, ...) != value}


def _files(recipe: Recipe) -> dict[Path, list[Path]]:
    """Paths of examples, calibration text, a chat template or the adapter to start from -> the files in them."""
    start, measured = recipe.adapter.resume_from, recipe.base.measured
    found: dict[Path, list[Path]] = {}
    if start is not None:
        folder = user_path(start)
        found[folder] = sorted(folder.glob("adapter_*")) if folder.is_dir() else _of_splits(folder, ())
    calibration = None if measured is None or measured[1].text == "mix" else measured[1].text
    for path in (user_path(name) for name in (calibration, recipe.data.chat_template) if name is not None):
        found[path] = _of_splits(path, ())
    for source in recipe.data.mix:
        splits, validation = {"train", "validation", "test", source.split}, source.validation
        if validation is not None and not names_files(validation):
            splits.add(validation)
            validation = None
        dataset = source.source if source.source is None or is_path(source.source) else None
        for path in (user_path(name) for name in (source.path, dataset, validation) if name is not None):
            found[path] = sorted({*found.get(path, ()), *_of_splits(path, splits)})
    return found


def _of_splits(path: Path, splits: Iterable[str]) -> list[Path]:
    """A file itself; the files of a folder's splits, or of a pattern. Missing ones are reported elsewhere."""
    found: set[Path] = {path} if path.is_file() else set()
    for split in splits:
        with suppress(UserError):
            found.update(files_of(path, split))
    return sorted(found)


def _content(file: Path) -> list[Any]:
    stat = file.stat()
    return [file.name, stat.st_size, _digest(file, stat.st_size, stat.st_mtime_ns)]


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, modified: int) -> str:
    if size > _WHOLE_BYTES:
        return sampled_digest(file)[1]
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


Kind = Literal["base", "rate", "trained", "transplant", "rescaled", "set_back", "by_layer"]
Labels = dict[str, str]

# Fields of `eval` that the evaluation of a base depends on.
_EVALUATION = ("tasks", "limit", "method")
BASES, SHORT_RATES, RATES = "bases", "rates, short runs", "rates"
"""Names of the stages before those of the study file."""


@dataclass(frozen=True)
class Cell:
    """One run of a study. `key` names its run directory.

    kind: base: only evaluated. rate: a run of the search for a learning rate. trained: compared. The others evaluate
    the adapter of the cell `adapter_key`. base_key, dense_key: cells that evaluate the same base without an adapter,
    and the uncompressed base.
    """

    key: str
    labels: Labels = field(compare=False)
    recipe: Recipe
    kind: Kind = "trained"
    stage: str = "main"
    base_key: str | None = None
    dense_key: str | None = None
    adapter_key: str | None = None
    is_interior: bool | None = None
    steps: tuple[int, ...] = ()

    @property
    def is_trained(self) -> bool:
        return self.kind in ("rate", "trained")

    def record(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("recipe", "steps")}


@dataclass(frozen=True)
class Cells:
    """num_waiting: stage -> cells that wait for others. rates: a row for each search."""

    cells: list[Cell]
    num_waiting: dict[str, int]
    rates: list[dict[str, Any]]


CellLoss = Callable[[Cell], float | None]
"""Validation loss of a cell: inf if it diverged, None if it has no result."""
_SEARCH = StageConfig(name=RATES)


@dataclass(frozen=True)
class _Combination:
    stage: StageConfig
    labels: Labels
    changes: dict[str, Any]
    seeds: tuple[int, ...]


class Expander:
    """Makes the cells of a study, again and again; recipes are checked once."""

    def __init__(self, study: Study, file: str = "study") -> None:
        self.study, self.file = study, file
        self.start, _ = recipe_document(study.recipe)
        self.axes = {name: dict(choices(axis, name)) for name, axis in study.product.items()}
        self._made: dict[str, Recipe] = {}
        self._keys: dict[int, str] = {}
        self.arms = [
            _Combination(stage, labels, self._changes(labels), seeds)
            for stage, labels, seeds in combinations(study)
        ]
        self._check()
        trained = [arm for arm in self.arms if arm.stage.kind == "train" and not self._is_bare(arm)]
        first = next((arm.labels[study.compare.arm] for arm in trained), None)
        self.study = with_settings(study, compare={"reference": study.compare.reference or first})

    def now(self, loss: CellLoss = lambda _: None) -> Cells:
        """The cells, in the order in which they run, as far as the results tell them.

        Within a stage all arms have a seed before any has the next one: a stopped study has compared all of them.
        """
        searches: dict[str, tuple[Labels, Search, list[Cell]]] = {}
        trained: dict[str, Cell] = {}
        waiting = Counter[str]()
        arms = [arm for arm in self.arms if not self._is_bare(arm)]
        stages = list(dict.fromkeys(arm.stage.name for arm in arms))
        planned = [
            (stages.index(arm.stage.name), number, arm) for arm in arms for number in range(len(arm.seeds))
        ]
        for _, number, arm in sorted(planned, key=lambda each: each[:2]):
            found = self._search(arm, searches, loss)
            if found is not None and found.is_done and found.rate is None:
                continue  # every rate diverged
            cell = self._cell(arm, arm.seeds[number], found, trained)
            of_source = loss(trained[cell.adapter_key]) if cell and cell.adapter_key else 0.0
            if cell is None or of_source is None:
                waiting[arm.stage.name] += 1
            elif of_source < math.inf:  # else there is no adapter
                trained[cell.key] = cell
        of_rates = {cell.key: cell for _, _, cells in searches.values() for cell in cells}
        rates: list[dict[str, Any]] = [
            {
                **labels,
                "rate": None if found.rate is None else label_of(found.rate),
                "is_interior": found.is_interior,
                "is_done": found.is_done,
                "num_runs": len(found.runs),
                "num_diverged": sum(map(math.isinf, found.losses.values())),
                "losses": "; ".join(
                    f"{length} {rate:g}: {loss:.4f}" for (length, rate), loss in found.losses.items()
                ),
            }
            for labels, found, _ in searches.values()
        ]
        return Cells([*self._base_cells(), *(of_rates | trained).values()], waiting, rates)

    def _changes(self, labels: Mapping[str, str]) -> dict[str, Any]:
        found = dict(self.study.settings)
        for axis, label in labels.items():
            found |= self.axes[axis][label]
        return found

    def _check(self) -> None:
        faults: dict[str, str] = {}
        for arm in self.arms:
            for text in self._faults(arm):
                faults.setdefault(text, f"{self.file} ({in_words(arm.labels)}): {text}")
        first: dict[str, Labels] = {}
        for arm in () if faults else (arm for arm in self.arms if arm.stage.kind == "train"):
            text = self._recipe(arm, self.study.seeds[0]).model_dump_json()
            if first.setdefault(text, arm.labels) != arm.labels:
                same = f"({in_words(arm.labels)}): is the same recipe as ({in_words(first[text])})"
                faults[text] = f"{self.file} {same}. Fix: exclude one of them."
        if faults:
            raise UserError(*faults.values())
        if not self.arms:
            raise UserError(f"{self.file}: exclude leaves no cell, at least one is needed.")

    def _faults(self, arm: _Combination) -> list[str]:
        rates, kind = self.study.rates, arm.stage.kind
        decided = {"data.seed": "seeds", "eval.block": "seeds"} | ({} if rates is None else {RATE: "rates"})
        if taken := [
            f"{key}: is decided by {by}. Fix: remove it." for key, by in decided.items() if key in arm.changes
        ]:
            return taken
        try:
            recipe = self._recipe(arm, arm.seeds[0])
            if rates is not None and rates.steps is not None and recipe.adapter.kind != "none":
                self._recipe(arm, arm.seeds[0], rates.for_labels(arm.labels).values[0], rates.steps)
        except UserError as error:  # a value of the study file is an override, which begins with -s
            return [re.sub("^(-s|recipe):? ", "", fault) for fault in error.faults]
        (where, asked), stage = recipe.base.measured or ("", None), arm.stage.name
        limited = any(each.limit is not None for each in recipe.data.mix)
        calibrates = asked is not None and asked.text == "mix"
        before = "transplant" if kind == "rescaled" else "train"
        is_there = any(other.stage.kind == before and other.labels == arm.labels for other in self.arms)
        rows: list[tuple[str, Any]] = [
            (f"eval.best_by: got {recipe.eval.best_by}, which uses all validation examples. Fix: compare.split test.",
             recipe.eval.best_by is not None and self.study.compare.split == "halves"),
            (f"{where}.text: mix differs by seed with data.mix[].limit. Fix: name a text file.",
             calibrates and limited),
            (f"stage {stage}: the study does not train this arm on the uncompressed base.",
             kind == "transplant" and self._twin(arm) is None),
            (f"stage {stage}: adapter.kind must be dora, got {recipe.adapter.kind}.",
             kind in ("set_back", "rescaled") and recipe.adapter.kind != "dora"),
            (f"stage {stage}: the study does not {before} this arm.",
             kind in ("set_back", "by_layer", "rescaled") and not is_there),
        ]  # fmt: skip
        return [fault for fault, applies in rows if applies]

    def _recipe(
        self, arm: _Combination, seed: int, rate: float | None = None, steps: int | None = None
    ) -> Recipe:
        changes = arm.changes | {"train.seed": seed + arm.changes.get("train.seed", 0), "data.seed": seed}
        asked = {RATE: rate, "train.steps": steps if arm.stage.kind == "train" else 0}
        changes |= {key: value for key, value in asked.items() if value is not None}
        on_test = self.study.compare.split == "test" and arm.stage is not _SEARCH
        text = json.dumps([changes, on_test], sort_keys=True)
        if text not in self._made:
            overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
            recipe = recipe_from(with_overrides(self.start, overrides), "recipe", overrides)
            if recipe.eval.tasks == ():
                raise UserError("eval.tasks: must name at least one task, since a study compares evaluations.")
            # The evaluation before the first step is that of the base, which has a cell of its own
            when = ["eval.at_start=true", "eval.at_end=false"]
            settings = when if arm.stage.kind != "train" else ["eval.at_start=false", "eval.at_end=true"]
            if recipe.eval.limit is not None and recipe.adapter.kind != "none":
                settings.append(f"eval.block={seed}")
            self._made[text] = override(recipe, [*settings, *(_on_test(recipe) if on_test else ())])
        return self._made[text]

    def _is_bare(self, arm: _Combination) -> bool:
        return self._recipe(arm, arm.seeds[0]).adapter.kind == "none"

    def _key(self, recipe: Recipe) -> str:
        if id(recipe) not in self._keys:  # recipes are kept in _made, so an id is never used again
            self._keys[id(recipe)] = key_of(recipe)
        return self._keys[id(recipe)]

    def _bases(self, arm: _Combination) -> list[Recipe]:
        """The recipes of the base of an arm and of the uncompressed one, each without an adapter."""
        whole = settings(self._recipe(arm, arm.seeds[0]))
        # Neither the weight in the loss nor the seed has an effect on a base that is only evaluated
        mix = [
            {name: value for name, value in each.items() if name != "loss_weight"}
            for each in whole["data"]["mix"]
        ]
        document: dict[str, Any] = {
            "model": whole["model"],
            "adapter": {"kind": "none"},
            "data": {name: value for name, value in whole["data"].items() if name != "seed"} | {"mix": mix},
            "train": {"steps": 0, "batch": 1},
            "eval": {name: value for name, value in whole["eval"].items() if name in _EVALUATION},
        }
        found = []
        for base in (whole["base"], {"quant": "none"}):
            text = json.dumps(document | {"base": base}, sort_keys=True)
            if text not in self._made:
                self._made[text] = recipe_from(document | {"base": base})
            found.append(self._made[text])
        return found

    def _base_cells(self) -> list[Cell]:
        bases: dict[str, Cell] = {}
        uncompressed: dict[str, Cell] = {}
        # A base has no label on axes that change nothing but the training, and on that of the arms if it is none
        arm_axis, training = self.study.compare.arm, axes_of(self.study, "train.", "adapter.")
        are_bases = arm_axis in axes_of(self.study, "base.")
        for arm in self.arms:
            (recipe, dense), bare = self._bases(arm), self._is_bare(arm)
            key, dense_key = map(self._key, (recipe, dense))
            if not (self.study.bases or bare):
                continue
            kept = {
                axis for axis in arm.labels if (bare or are_bases if axis == arm_axis else axis not in training)
            }
            labels = {axis: text for axis, text in arm.labels.items() if axis in kept}
            if key not in bases or (bare and arm_axis not in bases[key].labels):
                bases[key] = Cell(key, labels, recipe, "base", BASES, key, dense_key)
            if self.study.bases:
                uncompressed[dense_key] = Cell(dense_key, {}, dense, "base", BASES, dense_key, dense_key)
        return list((uncompressed | bases).values())

    def _search(
        self, arm: _Combination, searches: dict[str, tuple[Labels, Search, list[Cell]]], loss: CellLoss
    ) -> Search | None:
        rates = self.study.rates
        if rates is None or arm.stage.kind != "train":
            return None
        labels = self._like(arm.labels)
        name = in_words(labels)
        if name not in searches:
            asked = _Combination(_SEARCH, labels, self._changes(labels), arm.seeds)

            def cell_of(run: RateRun) -> Cell:
                steps, stage = (None, RATES) if run.length == "full" else (rates.steps, SHORT_RATES)
                recipe = self._recipe(asked, run.seed, run.rate, steps)
                own = labels | {RATE: label_of(run.rate), SEED: str(run.seed)}
                return Cell(self._key(recipe), own, recipe, "rate", stage)

            found = search(rates.for_labels(labels), lambda run: loss(cell_of(run)))
            searches[name] = (labels, found, [cell_of(run) for run in found.runs])
        return searches[name][1]

    def _like(self, labels: Labels) -> Labels:
        like = {} if self.study.rates is None else self.study.rates.like
        return {axis: like.get(axis, {}).get(label, label) for axis, label in labels.items()}

    def _twin(self, arm: _Combination) -> _Combination | None:
        based = axes_of(self.study, "base.")
        for labels in (arm.labels, self._like(arm.labels)):
            for other in self.arms:
                same = all(label == labels[axis] for axis, label in other.labels.items() if axis not in based)
                if same and other.stage.kind == "train" and not self._is_bare(other):
                    base_key, dense_key = map(self._key, self._bases(other))
                    if base_key == dense_key:
                        return other
        return None

    def _cell(
        self, arm: _Combination, seed: int, found: Search | None, trained: Mapping[str, Cell]
    ) -> Cell | None:
        if found is not None and found.rate is None:
            return None
        stage, labels, kind = arm.stage, arm.labels | {SEED: str(seed)}, arm.stage.kind
        base_key, dense_key = map(self._key, self._bases(arm))
        recipe = self._recipe(arm, seed, None if found is None else found.rate)
        if kind == "train":
            interior = None if found is None else found.is_interior
            labels |= {} if found is None else {RATE: label_of(recipe.train.lr)}
            key = self._key(recipe)
            return Cell(key, labels, recipe, "trained", stage.name, base_key, dense_key, is_interior=interior)
        source_arm = self._twin(arm) if kind == "transplant" else arm
        assert source_arm is not None, arm.labels
        before, wanted = (
            "transplant" if kind == "rescaled" else "trained",
            source_arm.labels | {SEED: str(seed)},
        )
        sources = (
            cell for cell in trained.values() if cell.kind == before and wanted.items() <= cell.labels.items()
        )
        source = next(sources, None)
        if source is None:
            return None
        what = f"{kind} at {stage.steps}" if stage.steps else kind
        key = hashlib.sha256(f"{what} of {source.key} in {self._key(recipe)}".encode()).hexdigest()[
            : len(source.key)
        ]
        return Cell(
            key,
            labels,
            recipe,
            kind,
            stage.name,
            base_key,
            dense_key,
            adapter_key=source.key,
            steps=stage.steps,
        )


def _on_test(recipe: Recipe) -> list[str]:
    tasks, mix = recipe.eval.tasks, recipe.data.mix
    evaluated = [index for index, source in enumerate(mix) if tasks is None or source.label in tasks]
    found = [f"data.mix[{index}].validation=test" for index in evaluated]
    named = all(index in evaluated or source.validation is not None for index, source in enumerate(mix))
    return [*found, "data.validation_fraction=null"] if named else found


def axes_of(study: Study, *prefixes: str) -> set[str]:
    """Axes that change nothing but settings with one of these prefixes, such as "base."."""
    return {
        name
        for name, axis in study.product.items()
        if all(key.startswith(prefixes) for _, changes in choices(axis, name) for key in changes)
    }
