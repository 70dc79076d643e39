"""A memory plan on the terminal and as a figure: a bar for each component, the budget, and what to change."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qdora.atomic_files import atomic_write_text
from qdora.memory.plan import CONTEXT, GIB, SLACK, Plan
from qdora.record import RunDirectory
from qdora.sizes import size_text

_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


def show_plan(console: Console, plan: Plan) -> None:
    """The table of components, then where the peak is, whether it fits, what was assumed, what to change."""
    table = Table(title=f"memory on {plan.device_kind} at the peak: {plan.peak.name}", title_justify="left")
    table.add_column("component")
    table.add_column("size", justify="right")
    table.add_column("of the peak", justify="left", no_wrap=True)
    largest = max(plan.components.values(), default=1)
    for name, num_bytes in plan.components.items():
        table.add_row(name, size_text(num_bytes), bar_text(num_bytes / largest))
    table.add_section()
    table.add_row("in all", size_text(plan.peak_bytes), _verdict(plan))
    console.print(table)
    for line in plan_lines(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def plan_lines(plan: Plan) -> list[str]:
    """What the table does not say, a sentence each."""
    shape = plan.shape
    lines = [
        f"Micro-batch: {shape.rows} x {shape.length} tokens{', packed' if shape.packed else ''}, {shape.num_labels:,} "
        f"labelled; {plan.num_micro_batches} a step. {plan.num_blocks} blocks, {plan.num_weights:,} weights, "
        f"{plan.num_trainable:,} trainable."
    ]
    if plan.step_seconds is not None:
        lines.append(f"About {plan.step_seconds:.2g} s a step by the rates of {plan.rates['name']}.")
    if plan.pageable_bytes:
        lines.append(
            f"Of the optimizer's states {size_text(plan.pageable_bytes)} can move to the host between updates."
        )
    if plan.host_bytes:
        lines.append(f"In pinned host memory: {size_text(plan.host_bytes)}.")
    if plan.embedding_bytes:
        lines.append(f"In the host's memory, not pinned: the embedding, {size_text(plan.embedding_bytes)}.")
    lines += [f"Assumed: {text}" for text in plan.assumptions]
    if plan.fits is False:
        lines.append("To fit, cheapest first:" if plan.changes else "Nothing that is known here makes it smaller.")
        for change in plan.changes:
            neutral = "" if change.neutral else "; changes what is trained"
            lines.append(f"  -s {change.setting}: {size_text(change.peak_bytes)}, {change.step_seconds:.2g} s{neutral}")
        if plan.changes and plan.changes[-1].peak_bytes > (plan.budget_bytes or 0):
            lines.append("  and even then it does not fit.")
    return lines


def bar_text(share: float) -> str:
    """A bar of up to 40 characters."""
    eighths = round(share * _BAR * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def _verdict(plan: Plan) -> str:
    if plan.budget_bytes is None:
        return ""
    left = plan.budget_bytes - plan.peak_bytes
    said = f"{size_text(left)} left" if left >= 0 else f"{size_text(-left)} too much"
    return f"{'fits' if plan.fits else 'does not fit'} in {size_text(plan.budget_bytes)}: {said}"


def draw_plan(plan: Plan, path: Path) -> None:
    """The same as an SVG: a row a component, stacked from left to right as they add up to the peak."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "qdora"}):  # the same plan draws the same bytes
        found = plan.components
        figure = Figure(figsize=(8, 0.6 + 0.34 * (len(found) + 1)), layout="constrained")
        axes = figure.add_subplot()
        start = 0.0
        for row, (name, num_bytes) in enumerate(found.items()):
            size = num_bytes / GIB
            axes.barh(row, size, left=start, color="0.6" if name in (CONTEXT, SLACK) else "C0")
            axes.text(start + size, row, f" {size_text(num_bytes)}", va="center", fontsize=8)
            start += size
        axes.set_yticks(range(len(found)), list(found))
        if plan.budget_bytes is not None:
            axes.axvline(plan.budget_bytes / GIB, color="C3", linestyle="--", linewidth=1)
        axes.set_xlim(0, 1.15 * max(start, (plan.budget_bytes or 0) / GIB))
        axes.invert_yaxis()
        axes.set_xlabel("GiB")
        axes.set_title(f"{size_text(plan.peak_bytes)} at the peak: {plan.peak.name}", fontsize=10)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, svg.getvalue())


def keep_plan(run: RunDirectory, plan: Plan) -> None:
    """The plan in the run directory: plan.json and figures/memory_plan.svg."""
    run.write_json("plan.json", plan.to_dict())
    draw_plan(plan, run.inside("figures") / "memory_plan.svg")


def over_budget(plan: Plan) -> str:
    """Why a run does not start, in one line."""
    parts = sorted(plan.components.items(), key=lambda each: -each[1])[:3]
    largest = ", ".join(f"{name} {size_text(size)}" for name, size in parts)
    changes = "; ".join(change.setting for change in plan.changes)
    instead = f" Change, cheapest first: {changes}." if changes else ""
    return (
        f"memory.budget: {size_text(plan.budget_bytes or 0)}, but the run is planned to need "
        f"{size_text(plan.peak_bytes)} in the {plan.peak.name} ({largest}).{instead} Or start it all the same: --force."
    )
