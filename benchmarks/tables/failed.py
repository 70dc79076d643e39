"""What was tried and did not help: the whole table, and a short list for README.md."""

from __future__ import annotations

from collections.abc import Iterator

from frame import markdown, read, table

from tables.ranks import ranks_that_did_not_help
from tables.table import interval

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
    return markdown(["tried", "in use instead", "measured"], list(_rows()))


@table()
def failed_short() -> str:
    """A list item for each idea that a user may ask about."""
    rows = list(_rows())
    found = [(said, figure) for start, said in _SHORT.items() for tried, _, figure in rows if tried.startswith(start)]
    return "".join(f"- {said}. Measured: {figure}.\n" for said, figure in found)


def _rows() -> Iterator[list[str]]:
    for row in (*read("tried")["rows"], *read("compiled_blocks")["rows"]):
        yield [row["tried"], row["instead"], row["figure"]]
    yield from filter(None, (_pcgrad(), ranks_that_did_not_help()))
    gaps = read("expert_upcycling")["differences"]
    ends = [gaps[f"experts - {other}"]["average"] for other in ("attention", "both")]
    figures = [interval(each["value"], each["lower"], each["upper"]) for each in ends]
    figure = f"NLL of a mixture made from SmolLM2-135M: against attention alone {figures[0]}, against both {figures[1]}"
    yield ["adapters on the experts alone", "adapters on attention, too", f"{figure} nats a token"]
    runs = {run["factor"]: run for run in read("router_loss")["runs"]}
    load = ", ".join(f"{runs[factor]['load']['last']:.3f} with {factor:g}" for factor in sorted(runs))
    figure = f"sum of squared shares of a small mixture's experts, times their number: {load}; one seed"
    yield ["the auxiliary loss of frozen routers", "none (`train.router_aux_loss`)", figure]


def _pcgrad() -> list[str]:
    """Lower NLL being better; nothing where the figures say otherwise.

    The file has the NLL of the combined run without PCGrad minus that with it.
    """
    found = {kind: each["nll"]["average"] for kind, each in read("pcgrad")["kinds"].items()}
    if any(each["lower"] > 0 for each in found.values()):
        return []
    names = {"lora": "QLoRA", "dora": "QDoRA"}
    ends = {names[kind]: interval(-each["value"], -each["upper"], -each["lower"]) for kind, each in found.items()}
    figures = ", ".join(f"{name} {figure}" for name, figure in ends.items())
    tried = "PCGrad on the adapter's gradients"
    return [tried, "the plain mix of tasks", f"change of the average NLL: {figures} nats a token"]
