"""The examples of one split of a source: counted, cut and drawn from before any of them is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from qdora.data.example import Example
from qdora.data.rows import FaultList, RowFault, Rows
from qdora.errors import UserError

Make = Callable[[Any, Any], Example]
"""(place, row) -> Example; raises RowFault."""


@dataclass(frozen=True)
class SplitExamples(Sequence[Example]):
    """Some rows of a split as Examples. Every pass over them reads the rows again and keeps none.

    Attributes:
        rows, make: The rows of the split, and how one becomes an Example.
        indices: The rows that are meant, rising.
        unused: Columns that were not read, filled by a pass.
    """

    rows: Rows
    make: Make
    indices: Sequence[int]
    unused: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Example]:
        """Raises: UserError after the last example, if rows are faulty: the first few by name, and how many more."""
        faults = FaultList(self.rows.where, self.rows.unit)
        for place, row in self.rows.chosen(self.indices):
            try:
                if isinstance(row, RowFault):
                    raise row
                yield self.make(place, row)
            except RowFault as fault:
                faults.add(place, fault)
        faults.check()

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """An example, or some of them, unread."""
        if isinstance(index, slice):
            return replace(self, indices=self.indices[index])
        return next(iter(replace(self, indices=[self.indices[index]])))

    @property
    def identity(self) -> str | None:
        """Stands for the content of these rows as they are in their files; None where it is not known."""
        if self.rows.identity is None:
            return None
        meant = self.indices if isinstance(self.indices, range) else np.asarray(self.indices).tobytes()
        return f"{self.rows.identity} {meant!r}"


def split_off(examples: SplitExamples, fraction: float, *, name: str) -> tuple[SplitExamples, SplitExamples]:
    """Cut the last `fraction` of the examples off, at least one: (train, validation). No randomness.

    Raises: UserError if nothing would be left to train on; faulty rows are told in place of that.
    """
    num_validation = 0 if fraction == 0.0 else max(1, round(len(examples) * fraction))
    if num_validation >= len(examples):
        check_rows(examples)
        raise UserError(
            f"{name}: {len(examples)} examples leave none to train on after data.validation_fraction {fraction}. "
            "Fix: give more examples, name validation data, or set data.validation_fraction to 0."
        )
    border = len(examples) - num_validation
    first, last = examples.indices[:border], examples.indices[border:]
    return replace(examples, indices=first), replace(examples, indices=last)


def check_rows(*parts: SplitExamples | None) -> None:
    """Read the parts of a source and keep nothing. Raises UserError: the faulty rows, of each file in one list."""
    given = [part for part in parts if part is not None]
    if len(given) == 2 and given[0].rows is given[1].rows:
        given = [replace(given[0], indices=sorted({*given[0].indices, *given[1].indices}))]
    faults: list[str] = []
    for part in given:
        try:
            deque(part, maxlen=0)
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)


def draw(examples: SplitExamples, limit: int | None, seed: int) -> SplitExamples:
    """`limit` of the examples, drawn without replacement, in their old order; all where there are no more."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.sort(np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:limit])
    return replace(examples, indices=[examples.indices[index] for index in chosen.tolist()])
