"""What a study runs next: its cells as far as the results that are there tell them."""

from __future__ import annotations

from collections.abc import Mapping

from qdora.study.cells import Cell, Cells, Expander
from qdora.study.compare import Results, find_arms, wide_pairs
from qdora.study.grid import stage_with_more_seeds
from qdora.study.study_directory import StudyDirectory


class Upcoming:
    """The cells of a study in a directory, made anew whenever results have come. Raises as `Expander`."""

    def __init__(self, expander: Expander, store: StudyDirectory) -> None:
        self.study, self.expander, self.store = expander.study, expander, store
        self.results = Results(store, expander.study)

    def now(self) -> Cells:
        """The cells that are known now. The index of the directory has them, too."""
        found = self.expander.now(self._loss, self._has_adapter)
        if self.study.more_seeds is not None:
            stage, axis = stage_with_more_seeds(self.study), self.study.compare.arm
            records = [cell.record() for cell in found.cells]
            arms = find_arms([record for record in records if record["stage"] == stage], self.results)
            wide = [arm for pair in wide_pairs(arms, self.results, self.study.more_seeds) for arm in pair]

            def is_wide(labels: Mapping[str, str]) -> bool:
                return any(arm.name == labels[axis] and arm.context.items() <= labels.items() for arm in wide)

            found = self.expander.now(self._loss, self._has_adapter, is_wide)
        self.store.write_index(self.study, found)
        return found

    def _loss(self, cell: Cell) -> float | None:
        return self.results.loss(cell.key)

    def _has_adapter(self, cell: Cell) -> bool | None:
        return None if self.results.result(cell.key) is None else not self.results.diverged(cell.key)
