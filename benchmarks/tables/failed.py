"""What was tried and did not help: the whole table, and a short list for README.md."""

from __future__ import annotations

from frame import table

from tables.combined import pcgrad_did_not_help
from tables.ranks import ranks_that_did_not_help
from tables.table import markdown, read

_SHORT = {
    "PCGrad": "Projecting conflicting gradients of tasks (PCGrad) does not measurably lower the average loss",
    "a rank for each layer": "None of four ways to choose a rank for each layer lowers the loss measurably",
    "blocks compiled": "Compiling the blocks (`torch.compile`) saves little on a CPU, and nothing is known of GPUs",
    "8-bit AdamW states on CPU": "8-bit optimizer states slow a CPU down; `train.optimizer: adamw` is faster there",
}
"""Beginnings of the rows that a user of a recipe may ask about -> what they mean."""


@table()
def failed() -> str:
    """A row for each idea: what was tried, what is in use instead, and the figure that decided."""
    return markdown(["tried", "in use instead", "measured"], _rows())


@table()
def failed_short() -> str:
    """A list item for each idea that a user may ask about."""
    rows = _rows()
    found = [(said, figure) for start, said in _SHORT.items() for tried, _, figure in rows if tried.startswith(start)]
    return "".join(f"- {said}. Measured: {figure}.\n" for said, figure in found)


def _rows() -> list[list[str]]:
    rows = [*read("tried")["rows"], *read("compiled_blocks")["rows"]]
    found = [[row["tried"], row["instead"], row["figure"]] for row in rows]
    return [*found, *filter(None, (pcgrad_did_not_help(), ranks_that_did_not_help()))]
