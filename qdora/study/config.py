"""A study file: the recipe that all cells start from, what varies between them, and how they are compared.

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

An axis is either a key of a recipe with its values, or a name with labelled groups of settings that change together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from qdora.errors import UserError, nearest
from qdora.recipe_faults import fault_lines, shown
from qdora.recipe_file import read_yaml
from qdora.section import Fault, Flag, Section, Share, Text, Whole, WholeOrZero, allowed

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
cell status num_failures reason seconds num_steps num_trainable final_loss
arm reference measure improvement lower upper lower_t upper_t p_t p_examples p_seeds p_holm winner
num_seeds_better num_seeds_worse is_swept
layer kind format shape block_size num_weights num_pruned num_zeros relative_error num_packed_bytes
fact value text
"""
COLUMNS = frozenset(_COLUMNS.split())
"""Columns of the report's tables; an axis of that name would be one of them twice."""


class CompareConfig(Section):
    """Which cells are compared with which, and what it takes to call a difference."""

    arm: Text = "adapter"
    """Axis whose values are compared, in the same surroundings: the other axes but `choose` and `seed`."""
    choose: tuple[Text, ...] = ("train.lr",)
    """Axes tuned for each arm by itself: their best value is chosen on other examples than the arms are compared on."""
    seed: Text = "train.seed"
    """Axis over which a result is repeated."""
    reference: Text | None = None
    """Value of `arm` that the others are compared with. None: the first that is trained."""
    metric: Literal["nll_per_token", "acc", "acc_norm"] = "nll_per_token"
    """What is compared, averaged over tasks. nll_per_token: lower is better; accuracies, of choices only: higher."""
    split: Literal["halves", "test"] = "halves"
    """halves: half of the validation examples chooses, the rest compares. test: validation chooses, test compares."""
    alpha: Share = 0.05
    """Chance of calling any difference of the study where there is none (Holm's correction over all of them)."""
    min_seeds: Whole = 3
    """Fewer seeds than this call no winner."""
    num_resamples: Annotated[Whole, Field(ge=100)] = 10_000
    """Bootstrap samples and permutations of each comparison."""


class Study(Section):
    """A study file."""

    recipe: Text
    """Shipped recipe, or YAML file (its path starts at the folder of the study file), that every cell starts from."""
    settings: Choice = Field(default_factory=dict)
    """Changes to it in every cell: recipe key -> value."""
    product: Annotated[dict[Text, Axis], Field(min_length=1)]
    """Axes; every combination of their values is a cell."""
    include: tuple[Choice, ...] = ()
    """Further cells: axis -> value or list of values; over the axes that are not named, all their values."""
    exclude: tuple[Choice, ...] = ()
    """Cells left out: those that have these values (or one of a list) on these axes."""
    compare: CompareConfig = CompareConfig()
    """Which cells are compared with which."""
    bases: Flag = True
    """Also evaluate the base of every trained cell and the uncompressed one, once each, to measure repair by."""
    retries: WholeOrZero = 1
    """Times that a failed cell is tried again."""

    def faults(self) -> Iterator[Fault]:
        axes = list(self.product)
        for name in sorted(COLUMNS.intersection(axes)):
            yield f"product.{name}", f"is a column of the report, got {name!r}, allowed: another name for the axis."
        for field in ("include", "exclude"):
            for index, entry in enumerate(getattr(self, field)):
                yield from self._entry_faults(f"{field}[{index}]", entry, may_be_new=field == "include")
        compare = self.compare
        named = {"compare.arm": [compare.arm], "compare.seed": [compare.seed], "compare.choose": [*compare.choose]}
        for key, names in named.items():
            given = key.partition(".")[2] in compare.model_fields_set
            for name in names:
                if name not in axes and (given or key == "compare.arm"):
                    what = f"no axis of the product, got {name!r}, allowed: {', '.join(axes)}.{nearest(name, axes)}"
                    yield key, what
        roles = [name for name in (compare.arm, compare.seed, *compare.choose) if name in axes]
        for name in sorted({name for name in roles if roles.count(name) > 1}):
            yield "compare", f"one axis cannot be two of arm, choose and seed, got {name!r}, allowed: different axes."
        if compare.arm in axes and compare.reference is not None:
            labels = [label for label, _ in choices(self.product[compare.arm], compare.arm)]
            if compare.reference not in labels:
                close = nearest(compare.reference, labels)
                what = f"no value of {compare.arm}, got {compare.reference!r}, allowed: {', '.join(labels)}.{close}"
                yield "compare.reference", what

    def _entry_faults(self, where: str, entry: Choice, *, may_be_new: bool) -> Iterator[Fault]:
        if not entry:
            yield where, "names no axis, got {}, allowed: axis: value."
        for name, value in entry.items():
            axis = self.product.get(name)
            if axis is None:
                yield f"{where}.{name}", f"no axis, allowed: {', '.join(self.product)}.{nearest(name, self.product)}"
                continue
            labels = [label for label, _ in choices(axis, name)]
            wrong = [text for text in map(label_of, as_list(value)) if text not in labels]
            if wrong and (isinstance(axis, dict) or not may_be_new):
                got = f"got {shown(wrong[0])}, allowed: {', '.join(labels)}.{nearest(wrong[0], labels)}"
                yield f"{where}.{name}", f"no value of that axis, {got}"


def load_study(path: Path) -> Study:
    """Read and check a study file; its `recipe` becomes absolute where it is a file.

    Raises:
        UserError: All faults, one line each.
    """
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{where}: cannot be read ({reason}), allowed: a YAML file of a study.") from None
    data = read_yaml(text, where)
    recipe = data.get("recipe")
    if isinstance(recipe, str) and (path.parent / recipe).is_file():
        data["recipe"] = str((path.parent / recipe).resolve())
    return study_from(data, where)


def study_from(data: Mapping[str, Any], where: str = "study") -> Study:
    """Check plain data and make it a study.

    Raises:
        UserError: All faults, one line each: `<where>: <path.to.key>: what is wrong, got ..., allowed: ...`.
    """
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        lines = [line for _, line in fault_lines(error, Study)]
    raise UserError(*(f"{where}: {line}" for line in dict.fromkeys(lines)))


def choices(axis: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """(label, settings) of every value of an axis."""
    if isinstance(axis, dict):
        return list(axis.items())
    return [(label_of(value), {name: value}) for value in axis]


def as_list(value: Any) -> list[Any]:
    """A value of an entry, or its list of values."""
    return list(value) if isinstance(value, list | tuple) else [value]


def label_of(value: Any) -> str:
    """A value as the report shows it; 1e-4, 1.0e-4 and 0.0001 are one label."""
    if isinstance(value, str):
        try:
            return value if value.isidentifier() else f"{float(value):.12g}"  # nan and inf are names
        except ValueError:
            return value
    return f"{value:.12g}" if isinstance(value, float) else json.dumps(value)
