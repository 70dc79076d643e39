"""Table of the gates: budgets, the loss around removals, and what a shrunk adapter costs."""

from __future__ import annotations

from collections.abc import Mapping

from frame import table

from tables.table import MIB, interval, markdown, read

_MODES = {"l1": "L1", "hard_concrete": "hard-concrete"}


@table()
def gates() -> str:
    """A row for each run; below it the bytes and the time of a step."""
    document = read("gates")
    rows = [
        [
            f"{_MODES[mode]}, {name}",
            f"{run['reached']:,.10g} of {next(iter(run['asked'].values())):,.10g}",
            f"{abs(run['deviation']):.2%}",
            str(len(run["removals"])),
            f"{run['largest_jump']:.1e}",
        ]
        for mode, targets in document["budget"].items()
        for name, run in targets.items()
    ]
    table = markdown(["budget", "reached", "error", "removals", "largest change of the loss"], rows)
    if "cost" not in document:
        return table
    cost = document["cost"]
    held, peak = (
        f"{cost['ungated'][key] / MIB:.1f} → {cost['shrunk'][key] / MIB:.1f} MiB"
        for key in ("held_bytes", "step_peak_bytes")
    )
    times = {
        name: f"{_share(found['ratios']['shrunk / ungated'])} shrunk, {_share(found['ratios']['gated / ungated'])} "
        "with gates at full rank"
        for name, found in cost["times"].items()
    }
    start, end = document["ranks"]["cost"], cost["run"]["reached"]
    return (
        f"{table}\nFrom rank {start} to mean rank {end:g}: adapters and optimizer {held}; live bytes at the peak of a "
        f"step, without the base, {peak}. Time of a step relative to the model without gates: {times['one length']} if "
        f"all steps have one length; {times['new lengths']} if each step has a new length (a CPU compiles a bf16 "
        "kernel for each pair of rank and length).\n"
    )


def _share(found: Mapping[str, float]) -> str:
    return interval(found["median"], found["lower"], found["upper"], ".2f")
