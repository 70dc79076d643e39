"""What a study runs next: its cells as far as the results that are there tell them."""

from __future__ import annotations

from collections.abc import Mapping

from qdora.study.cells import CellLoss, Cells, Expander, HasAdapter
from qdora.study.compare import Results, find_arms, wide_pairs
from qdora.study.grid import stage_with_more_seeds


def cells_now(expander: Expander, results: Results) -> Cells:
    """The cells that are known now; the index of the results' directory has them, too. Raises as `Expander`."""
    found = with_further_seeds(
        expander, results, lambda cell: results.loss(cell.key), lambda cell: results.has_adapter(cell.key)
    )
    results.store.write_index(expander.study, found)
    return found


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
