"""What a study runs next: its cells as far as the results that are there tell them."""

from __future__ import annotations

from collections.abc import Mapping

from qdora.study.cells import Cell, CellLoss, Cells, Expander, HasAdapter
from qdora.study.compare import Results, find_arms, wide_pairs
from qdora.study.grid import stage_with_more_seeds
from qdora.study.study_directory import StudyDirectory


class Upcoming:
    """The cells of a study in a directory, made anew whenever results have come. Raises as `Expander`."""

    def __init__(self, expander: Expander, store: StudyDirectory) -> None:
        self.expander, self.store = expander, store
        self.results = Results(store, expander.study)

    def now(self) -> Cells:
        """The cells that are known now. The index of the directory has them, too."""
        found = with_further_seeds(self.expander, self.results, self._loss, self._has_adapter)
        self.store.write_index(self.expander.study, found)
        return found

    def _loss(self, cell: Cell) -> float | None:
        return self.results.loss(cell.key)

    def _has_adapter(self, cell: Cell) -> bool | None:
        return None if self.results.result(cell.key) is None else not self.results.diverged(cell.key)


def with_further_seeds(expander: Expander, results: Results, loss: CellLoss, has_adapter: HasAdapter) -> Cells:
    """The cells of `Expander.now`, with the further seeds of arms whose finished runs leave too wide an interval."""
    found = expander.now(loss, has_adapter)
    study = results.study
    if study.more_seeds is None:
        return found
    stage, axis = stage_with_more_seeds(study), study.compare.arm
    records = [cell.record() for cell in found.cells if cell.stage == stage]
    pairs = wide_pairs(find_arms(records, results), results, study.more_seeds)
    wide = [arm for pair in pairs for arm in pair]

    def is_wide(labels: Mapping[str, str]) -> bool:
        return any(arm.name == labels[axis] and arm.context.items() <= labels.items() for arm in wide)

    return expander.now(loss, has_adapter, is_wide)
