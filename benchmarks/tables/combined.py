"""Table of one combined adapter against one for each data set."""

from __future__ import annotations

from typing import Any

from tables.table import markdown, read

KINDS = {"lora": "QLoRA", "dora": "QDoRA"}


def combined_vs_solo() -> str:
    """NLL of base, solo and combined adapters, and the differences with their intervals."""
    document = read("combined_vs_solo")
    found = {kind: each for kind, each in document["kinds"].items() if "combined - solo" in each}
    header = ["task"]
    for kind in found:
        name = KINDS[kind]
        header += [f"{name} base", "solo", "combined", "combined − solo", "accuracy %"]
    tasks = list(next(iter(found.values()))["combined - solo"]["nll"])
    rows = []
    for task in tasks:
        row = [task]
        for each in found.values():
            row += [f"{each['scores'][arm][task]['nll']:.3f}" for arm in ("base", "solo", "combined")]
            row += [_interval(each["combined - solo"]["nll"][task], 1.0, 3)]
            row += [_interval(each["combined - solo"]["acc"][task], 100.0, 1)]
        rows.append(row)
    return markdown(header, rows) + f"\n{' '.join(_said(kind, each) for kind, each in found.items())}\n"


def remedy_that_did_not_help() -> list[str]:
    """A row of the table of what was tried: PCGrad, lower NLL being better; nothing where the figures say otherwise."""
    found = {
        KINDS[kind]: each["combined - remedy"]["pcgrad"]["nll"]["average"]
        for kind, each in read("combined_vs_solo")["kinds"].items()
        if "pcgrad" in each.get("combined - remedy", {})
    }
    if not found or any(each["lower"] > 0 for each in found.values()):
        return []
    swapped = {kind: {"value": -e["value"], "lower": -e["upper"], "upper": -e["lower"]} for kind, e in found.items()}
    figures = ", ".join(f"{kind} {_interval(each, 1.0, 3)}" for kind, each in swapped.items())
    return [
        "PCGrad on the adapter's gradients",
        "the plain mix of tasks",
        f"change of the average NLL: {figures} nats a token",
    ]


def _interval(each: dict[str, Any], scale: float, digits: int) -> str:
    value, lower, upper = (scale * each[name] for name in ("value", "lower", "upper"))
    return f"{value:+.{digits}f} ({lower:+.{digits}f} to {upper:+.{digits}f})"


def _said(kind: str, each: dict[str, Any]) -> str:
    """What the intervals allow to say, in a sentence."""
    differences = {task: found for task, found in each["combined - solo"]["nll"].items() if task != "average"}
    better = [task for task, found in differences.items() if found["upper"] < 0]
    worse = [task for task, found in differences.items() if found["lower"] > 0]
    average = each["combined - solo"]["nll"]["average"]
    verdict = "does not differ significantly from the solo ones"
    if average["upper"] < 0:
        verdict = "is better than the solo ones"
    elif average["lower"] > 0:
        verdict = "is worse than the solo ones"
    costs = each["cells"]["combined"]
    text = (
        f"{KINDS[kind]}, seeds {', '.join(each['seeds'])}: on the average over tasks, the combined adapter {verdict} "
        f"({_interval(average, 1.0, 3)} nats per answer token); better on {', '.join(better) or 'no task'}, worse on "
        f"{', '.join(worse) or 'no task'}. {costs['num_steps'][0]} steps, {costs['num_examples'][0]} examples, "
        f"{costs['num_tokens'][0]:,} tokens in the combined run of the first seed, and as many in its solo runs "
        "together."
    )
    for remedy, found in each.get("combined - remedy", {}).items():
        text += f" NLL of the combined run without minus with {remedy}: {_interval(found['nll']['average'], 1.0, 3)}."
    return text
