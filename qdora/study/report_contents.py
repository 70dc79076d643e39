"""What a report of a study holds: its question and answer, and tables in which every number of the page is found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdora.study.grid import CompareConfig

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Report:
    """All that a report shows; `tables` are named for their data files.

    Attributes:
        question: The title of the page.
        subject: Model, tasks, length of the training and seeds, in a sentence; "" if no cell tells.
        answer: One sentence for each primary comparison.
        notes: What to know of missing, diverged and equal runs.
        axes: Those of a context: neither compared, tuned nor seeds.
    """

    tables: dict[str, Rows]
    question: str
    subject: str
    answer: list[str]
    notes: list[str]
    axes: list[str]
    compare: CompareConfig
    metric_label: str


def is_number(value: Any) -> bool:
    """Whether a value of a table is a finite number."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Naming:
    """How contexts are called: by the axes on which they differ, without what most of them have.

    The first of these axes is always told; on the others the label of more than half of the rows is left out.
    """

    axes: tuple[str, ...]
    usual: Mapping[str, str]

    def __call__(self, row: Row) -> str:
        """Such as 'nf3' or 'nf3, 512 steps'; "" without a label."""
        labels = ((axis, row.get(axis, "")) for axis in self.axes)
        return ", ".join(label for axis, label in labels if label not in ("", self.usual.get(axis)))


def naming(rows: Iterable[Row], axes: Sequence[str]) -> Naming:
    """The names of the contexts of these rows."""
    every = list(rows)
    found = {axis: Counter(row[axis] for row in every if row.get(axis, "") != "") for axis in axes}
    kept = [axis for axis in axes if len(found[axis]) > 1] or list(axes[:1])
    most = {axis: found[axis].most_common(1)[0] for axis in kept[1:]}
    return Naming(
        tuple(kept), {axis: label for axis, (label, count) in most.items() if 2 * count > found[axis].total()}
    )
