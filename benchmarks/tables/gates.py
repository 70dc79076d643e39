"""Table of the gates: budgets, the loss around removals, and what a shrunk adapter costs."""

from __future__ import annotations

from tables.table import markdown, read

_MODES = {"l1": "L1", "hard_concrete": "hard-concrete"}


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
    table = markdown(["budget", "reached", "off by", "removals", "loss changed by at most"], rows)
    if "cost" not in document:
        return table
    cost = document["cost"]
    ratios = cost["ratios"]

    def against(other: str) -> str:
        found = ratios[f"shrunk / {other}"]
        return f"{found['median']:.3f} (quartiles {found['lower']:.3f} to {found['upper']:.3f})"

    def mib(name: str, key: str) -> str:
        return f"{cost[name][key] / 2**20:.1f} MiB"

    overhead = {key: f"{ratios['gated / ungated'][key] - 1:+.1%}" for key in ("median", "lower", "upper")}
    held, peak = (f"{mib('gated', key)} → {mib('shrunk', key)}" for key in ("held_bytes", "step_peak_bytes"))
    return (
        f"{table}\nFrom rank {document['rank']} with gates to mean rank 4: adapters and optimizer {held}, live at the "
        f"peak of a step beside the base {peak}; time of a step {against('gated')} of the gated one, "
        f"{against('ungated')} of one without gates at full rank. Gates at full rank cost {overhead['median']} "
        f"(quartiles {overhead['lower']} to {overhead['upper']}).\n"
    )
