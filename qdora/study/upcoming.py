"""What a study runs next: its cells as far as the results that are there tell them."""

from __future__ import annotations

from qdora.study.cells import Cells, Expander
from qdora.study.compare import Results


def cells_now(expander: Expander, results: Results) -> Cells:
    """The cells that are known now; the index of the results' directory has them, too. Raises as `Expander`."""
    found = expander.now(lambda cell: results.loss(cell.key), lambda cell: results.has_adapter(cell.key))
    results.store.write_index(expander.study, found)
    return found
