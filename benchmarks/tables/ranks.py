"""Table of ranks: what choosing one for each layer gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from frame import table

from tables.table import compared, improvement, markdown, of_metric, read, report_rows, trained, with_band

_METHODS = {
    "uniform": "the same rank everywhere",
    "l1": "gates, L1",
    "hard_concrete": "gates, hard-concrete",
    "svd": "SVD of a trained update",
    "gradient": "gradient",
    "curvature": "curvature",
}


@table()
def rank_methods() -> str:
    """Each way to choose ranks at equal trainable parameters: quality, the difference from uniform, and its cost."""
    arms, pairs, cells = (report_rows("rank_methods", name) for name in ("arms", "comparisons", "cells"))
    run = read("rank_methods/run")
    costs = run["costs_in_seconds"]
    sizes: dict[str, set[int]] = {}
    for row in cells:
        if row["kind"] == "trained" and row["num_trainable"]:  # a run that diverged has none
            sizes.setdefault(row["ranks"], set()).add(int(float(row["num_trainable"])))
    against = {pair["arm"]: pair for pair in of_metric(pairs)}
    rows = []
    for row in trained(arms):
        name = row["ranks"]
        said = compared(against[name]) if name in against else "–"
        took = f"{1 + costs[name] / costs['scout']:.2f} runs" if name in costs else "0"
        size = " to ".join(f"{each:,}" for each in sorted({min(sizes[name]), max(sizes[name])}))
        rows.append([_METHODS[name], size, row["rate"], with_band(row), said, took])
    header = [
        "ranks",
        "trained",
        "learning rate chosen",
        "NLL per answer token",
        "improvement over uniform",
        "cost of choosing",
    ]
    note = (
        f"\n{_intervals(arms)} *Cost of choosing* is in units of the scout run, a run at twice the rank that the "
        f"methods read; gates choose during training. `{run['command']}`; the whole report: "
        "[results/rank_methods/report.md](results/rank_methods/report.md).\n"
    )
    return markdown(header, rows) + note


def _intervals(arms: Sequence[Mapping[str, str]]) -> str:
    """What the intervals of a report are over, and how rates were found."""
    seeds = ", ".join(sorted({row["num_seeds"] for row in trained(arms)}))
    return (
        "95 % t intervals over the seeds; learning rates chosen on validation examples, arms compared on test "
        f"examples; number of seeds: {seeds}."
    )


def ranks_that_did_not_help() -> list[str]:
    """A row of the table of what was tried, if no way measurably lowers the loss, and none can do so by the zone."""
    pairs = of_metric(report_rows("rank_methods", "comparisons"))
    ends = [(float(pair["lower"] or "nan"), float(pair["upper"] or "nan"), float(pair["zone"])) for pair in pairs]
    if not all(lower <= 0 and upper < zone for lower, upper, zone in ends):
        return []
    figures = ", ".join(f"{_METHODS[pair['arm']]} {improvement(pair, as_rise=True)}" for pair in pairs)
    figures = f"change of the NLL of SmolLM2-135M at equal parameters: {figures} nats a token"
    return ["a rank for each layer", "one rank everywhere", figures]
