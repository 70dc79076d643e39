"""A study file (recipe, axes, comparison) and its cells: checked recipes, each named by its hash.

    recipe: demo
    settings: {train.steps: 200}
    product:
      base.quant: [none, nf4, nf3]
      adapter:
        lora: {adapter.kind: lora}
        dora: {adapter.kind: dora}
      train.lr: [1e-4, 3e-4]
      train.seed: [0, 1, 2]
    exclude:
      - {base.quant: nf3, train.lr: 1e-4}

Every combination of the axes' values is a cell. An axis is a key of a recipe with its values, or a name with labelled
groups of settings that change together.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from qdora.errors import UserError, nearest
from qdora.recipe.faults import fault_lines, shown
from qdora.recipe.recipe_file import apply_overrides, override, read_yaml, recipe_document, recipe_from, settings
from qdora.recipe.section import Fault, Flag, Section, Share, Text, Whole, WholeOrZero, allowed
from qdora.recipe.settings import Recipe
from qdora.study.cell_key import key_of

Axis = Annotated[
    Annotated[dict[Text, dict[Text, Any]], Field(min_length=1)] | Annotated[tuple[Any, ...], Field(min_length=1)],
    allowed("a list of values of that recipe key, or a table of label: {recipe key: value, ...}"),
]
Choice = dict[Text, Any]

_COLUMNS = """
is_trained at_edge num_seeds num_missing num_examples bits_per_weight sparsity total_mib adapter_mib
nll_per_token nll_per_token_lower nll_per_token_upper acc acc_lower acc_upper acc_norm acc_norm_lower acc_norm_upper
right right_lower right_upper unparsable unparsable_lower unparsable_upper
repair repair_lower repair_upper repair_reason pareto
cell equal_to status num_failures reason seconds num_steps num_trainable final_loss
arm reference measure improvement lower upper p_t p_examples p_seeds p_holm winner
num_seeds_better num_seeds_worse is_swept
layer kind format shape block_size num_weights num_pruned num_zeros relative_error num_packed_bytes
fact value text
"""
COLUMNS = frozenset(_COLUMNS.split())
"""Columns of the report's tables. An axis must not have one of these names."""


class CompareConfig(Section):
    """Which cells are compared, and when a winner is called."""

    arm: Text = "adapter"
    """Axis whose values are compared, separately for each combination of the other axes but `choose` and `seed`."""
    choose: tuple[Text, ...] = ("train.lr",)
    """Axes tuned for each arm separately. The best value is chosen on examples that are not used in the comparison."""
    seed: Text = "train.seed"
    """Axis of the repetitions."""
    reference: Text | None = None
    """Value of `arm` that the others are compared with (null: the first one with training)."""
    metric: Literal["nll_per_token", "acc", "acc_norm"] = "nll_per_token"
    """What is compared, averaged over tasks. nll_per_token: lower is better. acc, acc_norm: higher is better; only for
    tasks with choices."""
    split: Literal["halves", "test"] = "halves"
    """halves: one half of the validation examples is for choosing, the other for comparing. test: the validation
    examples are for choosing, the test examples for comparing."""
    alpha: Share = 0.05
    """Chance that the study calls any false winner (after Holm's correction over all comparisons)."""
    min_seeds: Whole = 3
    """Seeds needed to call a winner."""
    num_resamples: Annotated[Whole, Field(ge=100)] = 10_000
    """Permutations of examples in each comparison."""


class Study(Section):
    """A study file."""

    recipe: Text
    """Recipe that every cell starts from: a shipped name, or a YAML file relative to the folder of the study file."""
    settings: Choice = Field(default_factory=dict)
    """Changes in every cell: recipe key -> value."""
    product: Annotated[dict[Text, Axis], Field(min_length=1)]
    """The axes. Every combination of their values is a cell."""
    include: tuple[Choice, ...] = ()
    """More cells: axis -> value or list of values. Axes that are not named take all their values."""
    exclude: tuple[Choice, ...] = ()
    """Cells to leave out: those with these values (or one of a list) on these axes."""
    compare: CompareConfig = CompareConfig()
    """Which cells are compared, and when a winner is called."""
    bases: Flag = True
    """Also evaluate the base of every cell and the uncompressed base, once each, to measure how much is repaired."""
    retries: WholeOrZero = 1
    """Times that a failed cell is tried again."""

    def faults(self) -> Iterator[Fault]:
        axes = list(self.product)
        for name in sorted(COLUMNS.intersection(axes)):
            yield f"product.{name}", f"is a column of the report, got {name!r}. Fix: use another name for the axis."
        for name, axis in self.product.items():
            labels = [label for label, _ in choices(axis, name)]
            for label in sorted({label for label in labels if labels.count(label) > 1}):
                yield f"product.{name}", f"has the value {label} twice."
        for part in ("include", "exclude"):
            for index, entry in enumerate(getattr(self, part)):
                yield from self._entry_faults(f"{part}[{index}]", entry, may_be_new=part == "include")
        compare = self.compare
        named = {"compare.arm": [compare.arm], "compare.seed": [compare.seed], "compare.choose": [*compare.choose]}
        for key, names in named.items():
            given = key.partition(".")[2] in compare.model_fields_set
            for name in names:
                if name not in axes and (given or key == "compare.arm"):
                    what = f"must be an axis of the product, got {name!r}, allowed: {', '.join(axes)}."
                    what += nearest(name, axes)
                    yield key, what
        roles = [name for name in (compare.arm, compare.seed, *compare.choose) if name in axes]
        for name in sorted({name for name in roles if roles.count(name) > 1}):
            yield "compare", f"arm, choose and seed must be different axes, got {name!r} twice."
        if compare.arm in axes and compare.reference is not None:
            labels = [label for label, _ in choices(self.product[compare.arm], compare.arm)]
            if compare.reference not in labels:
                close = nearest(compare.reference, labels)
                got = f"got {compare.reference!r}, allowed: {', '.join(labels)}.{close}"
                what = f"must be a value of the axis {compare.arm}, {got}"
                yield "compare.reference", what

    def _entry_faults(self, where: str, entry: Choice, *, may_be_new: bool) -> Iterator[Fault]:
        if not entry:
            yield where, "must name an axis and its value, got {}."
        for name, value in entry.items():
            axis = self.product.get(name)
            if axis is None:
                what = f"must be an axis, allowed: {', '.join(self.product)}.{nearest(name, self.product)}"
                yield f"{where}.{name}", what
                continue
            labels = [label for label, _ in choices(axis, name)]
            wrong = [text for text in map(label_of, as_list(value)) if text not in labels]
            if wrong and (isinstance(axis, dict) or not may_be_new):
                got = f"got {shown(wrong[0])}, allowed: {', '.join(labels)}.{nearest(wrong[0], labels)}"
                yield f"{where}.{name}", f"must be a value of that axis, {got}"


def load_study(path: Path) -> Study:
    """Read and check a study file; a `recipe` that is a file gets an absolute path. UserError lists all faults."""
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{where}: cannot be read ({reason}); must be a YAML file of a study.") from None
    data = read_yaml(text, where)
    recipe = data.get("recipe")
    if isinstance(recipe, str) and (path.parent / recipe).is_file():
        data["recipe"] = str((path.parent / recipe).resolve())
    return study_from(data, where)


def study_from(data: Mapping[str, Any], where: str = "study") -> Study:
    """Check plain data and make a study from it. UserError lists all faults: `<where>: <path.to.key>: ...`."""
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        lines = [line for _, line in fault_lines(error, Study)]
    raise UserError(*(f"{where}: {line}" for line in dict.fromkeys(lines)))


def choices(axis: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """(label, settings) for every value of an axis."""
    if isinstance(axis, dict):
        return list(axis.items())
    return [(label_of(value), {name: value}) for value in axis]


def as_list(value: Any) -> list[Any]:
    """A value as a list, which it may already be."""
    return list(value) if isinstance(value, list | tuple) else [value]


# YAML 1.1 reads 1e-4 as text. Other text is a name: revision "1.10" is not "1.1".
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def label_of(value: Any) -> str:
    """A value as the report shows it; 1e-4, 1.0e-4 and 0.0001 have the same label."""
    if isinstance(value, str):
        return f"{float(value):.12g}" if _EXPONENT.fullmatch(value) else value
    return f"{value:.12g}" if isinstance(value, float) else json.dumps(value)


# Fields of `eval` that the evaluation of a base depends on.
_EVALUATION = ("tasks", "limit", "method")


@dataclass(frozen=True)
class Cell:
    """One run of a study. `key` (`key_of` its recipe) names its run directory.

    A base, which is only evaluated, has no labels on axes that affect only training. `base_key` and `dense_key` are the
    cells that evaluate the same base without an adapter, and the uncompressed base. `equal` are the labels of other
    combinations of the grid that have the same key.
    """

    key: str
    labels: dict[str, str] = field(compare=False)
    recipe: Recipe
    is_trained: bool = True
    base_key: str | None = None
    dense_key: str | None = None
    equal: tuple[dict[str, str], ...] = field(default=(), compare=False)

    def record(self) -> dict[str, Any]:
        """JSON values: everything but the recipe."""
        fields = ("key", "labels", "is_trained", "base_key", "dense_key", "equal")
        return {name: getattr(self, name) for name in fields}

    def in_words(self) -> str:
        """'adapter=dora, train.lr=0.0001'; of a base that is only evaluated 'base', with its labels if it has any."""
        labels = in_words(self.labels)
        return labels if self.is_trained else f"base{': ' if labels else ''}{labels}"


def expand(study: Study) -> list[Cell]:
    """The cells of a study, bases first, each recipe once; of equal combinations the first names the cell.

    UserError: recipes that are not valid, one line each with the cell's labels; no cell; a cell without evaluation.
    """
    start, where = recipe_document(study.recipe)
    cells: dict[str, Cell] = {}
    bases: dict[str, Cell] = {}
    uncompressed: dict[str, Cell] = {}  # has labels only if the grid has this base
    faults: dict[str, list[str]] = {}
    known: dict[str, Cell] = {}
    equal: dict[str, list[dict[str, str]]] = {}
    base_of: dict[tuple[tuple[str, str], ...], str] = {}  # arm and context -> key of its one base
    for labels, changes in _combinations(study):
        named = in_words(labels)
        try:
            recipe = _recipe(start, study.settings | changes, study.compare.split)
        except UserError as error:
            for fault in error.faults:
                faults.setdefault(fault.removeprefix("recipe: "), []).append(named)
            continue
        base = _base(recipe, dense=False, known=known)
        dense = _base(recipe, dense=True, known=known)
        tuned = (study.compare.seed, *study.compare.choose)
        context = {axis: label for axis, label in labels.items() if axis not in tuned}
        if base_of.setdefault(tuple(context.items()), base.key) != base.key:
            varied = ", ".join(axis for axis in tuned if axis in labels)
            fault = f"compare: {varied} must change only training, but one of them changes the base or its evaluation."
            faults.setdefault(fault, []).append(named)
            continue
        bare = partial(Cell, is_trained=False, dense_key=dense.key)
        if recipe.adapter.kind == "none":
            if base.key not in bases or study.compare.arm not in bases[base.key].labels:
                bases[base.key] = bare(base.key, context, base.recipe, base_key=base.key)
            elif context != bases[base.key].labels and context not in equal.setdefault(base.key, []):
                equal[base.key].append(context)
        else:
            # The evaluation before the first step is that of the base, which has a cell of its own
            trained = override(recipe, ["eval.at_start=false", "eval.at_end=true"])
            cell = Cell(key_of(trained), labels, trained, base_key=base.key, dense_key=dense.key)
            if cells.setdefault(cell.key, cell) is not cell:
                equal.setdefault(cell.key, []).append(labels)
            context = {axis: label for axis, label in context.items() if axis != study.compare.arm}
            if study.bases:
                bases.setdefault(base.key, bare(base.key, context, base.recipe, base_key=base.key))
        if study.bases:
            uncompressed[dense.key] = bare(dense.key, {}, dense.recipe, base_key=dense.key)
    if faults:
        raise UserError(*(f"{where} ({_first(named)}): {fault}" for fault, named in faults.items()))
    if not cells and not bases:
        raise UserError(f"{where}: exclude leaves no cell, at least one is needed.")
    every = [*(uncompressed | bases).values(), *cells.values()]
    return [replace(cell, equal=tuple(equal.get(cell.key, ()))) for cell in every]


def in_words(labels: Mapping[str, str]) -> str:
    """'adapter=dora, train.lr=0.0001'."""
    return ", ".join(f"{axis}={label}" for axis, label in labels.items())


def equal_in_words(cells: Sequence[Mapping[str, Any]]) -> str | None:
    """Which combinations of the grid have the same recipe as another, from the cells' records; None if none has."""
    found = [(each, cell["labels"]) for cell in cells for each in cell.get("equal", ())]
    if not found:
        return None
    named = "; ".join(f"{in_words(each)} is {in_words(labels)}" for each, labels in found[:8])
    rest = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    return (
        f"{len(found)} combinations have the same recipe as another one. Such a recipe runs once, under its first "
        f"labels: {named}{rest}."
    )


def _first(cells: list[str]) -> str:
    return cells[0] + (f"; and {len(cells) - 1} more" if len(cells) > 1 else "")


def _combinations(study: Study) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """(labels, settings) of every cell, each combination of labels once."""
    axes = {name: choices(axis, name) for name, axis in study.product.items()}
    seen = set()
    for fixed in ({}, *study.include):
        values = [_values(axes[name], name, fixed) for name in axes]
        for combination in itertools.product(*values):
            labels = {name: label for name, (label, _) in zip(axes, combination, strict=True)}
            identity = tuple(labels.values())
            if identity in seen or (not fixed and any(_matches(labels, entry) for entry in study.exclude)):
                continue
            seen.add(identity)
            yield labels, {key: value for _, changes in combination for key, value in changes.items()}


def _values(axis: list[tuple[str, dict[str, Any]]], name: str, fixed: dict[str, Any]) -> list[tuple[str, Any]]:
    if name not in fixed:
        return axis
    known = dict(axis)
    return [(label_of(value), known.get(label_of(value), {name: value})) for value in as_list(fixed[name])]


def _matches(labels: dict[str, str], entry: dict[str, Any]) -> bool:
    return all(labels[name] in map(label_of, as_list(value)) for name, value in entry.items())


def _recipe(start: dict[str, Any], changes: dict[str, Any], split: str) -> Recipe:
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    recipe = recipe_from(apply_overrides(start, overrides), "recipe", overrides)
    if recipe.eval.tasks == ():
        raise UserError("eval.tasks: must name at least one task, since a study compares evaluations, got [].")
    if split == "halves" and recipe.eval.best_by is not None:
        raise UserError(
            "eval.best_by: uses all validation examples, but compare.split halves keeps half of them for the "
            f"comparison, got {recipe.eval.best_by}. Fix: remove it, or set compare.split to test."
        )
    return recipe


def _base(recipe: Recipe, *, dense: bool, known: dict[str, Cell]) -> Cell:
    """A cell that only evaluates the recipe's base, or the uncompressed base."""
    whole = settings(recipe)
    # The weight in the loss has no effect on a base that is only evaluated
    mix = [{name: value for name, value in source.items() if name != "loss_weight"} for source in whole["data"]["mix"]]
    document: dict[str, Any] = {
        "model": whole["model"],
        "base": {"quant": "none"} if dense else whole["base"],
        "adapter": {"kind": "none"},
        "data": whole["data"] | {"mix": mix},
        "train": {"steps": 0, "batch": 1},
        "eval": {name: value for name, value in whole["eval"].items() if name in _EVALUATION},
    }
    text = json.dumps(document, sort_keys=True)
    if text not in known:
        base = recipe_from(document)
        known[text] = Cell(key_of(base), {}, base, False)
    return known[text]
