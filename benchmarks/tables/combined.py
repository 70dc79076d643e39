"""Table of one combined adapter against one for each data set."""

from __future__ import annotations

from typing import Any

from tables.table import markdown, read

_QUESTION = "the combined adapter is better or worse than the solo ones"
KINDS = {"lora": "QLoRA", "dora": "QDoRA"}
_REMEDIES = {"pcgrad": "PCGrad"}


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
    verdicts = _verdicts(document, found)
    said = " ".join(_said(kind, each, verdicts[kind]) for kind, each in found.items())
    return markdown(header, rows) + f"\n{said}\n"


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


def _verdicts(document: dict[str, Any], found: dict[str, Any]) -> dict[str, str]:
    """Kind -> the verdict on the average over tasks, by the rules of a study (`qdora guide studies`).

    Better or worse needs p below 0.05 after Holm's correction for the kinds, three seeds, and for both ways a learning
    rate that was searched on all tasks and has a worse one on both sides.
    """
    reasons = _against_a_verdict(document)
    averages = {kind: each["combined - solo"]["nll"]["average"] for kind, each in found.items()}
    ordered = sorted(averages, key=lambda kind: averages[kind]["p"])
    verdicts, largest = {}, 0.0
    for place, kind in enumerate(ordered):
        largest = max(largest, (len(ordered) - place) * averages[kind]["p"])
        own = [*reasons, *(["there are fewer than 3 seeds"] if len(found[kind]["seeds"]) < 3 else [])]
        if own:
            verdicts[kind] = f"it is not decided whether {_QUESTION}, since {'; '.join(own)}"
        elif largest < 0.05:
            better = "better" if averages[kind]["value"] < 0 else "worse"
            verdicts[kind] = f"the combined adapter is {better} than the solo ones"
        else:
            verdicts[kind] = f"it is not decided whether {_QUESTION}"
    return verdicts


def _against_a_verdict(document: dict[str, Any]) -> list[str]:
    """What is wrong with the search for the learning rates."""
    tasks = {source["task"] for source in document["recipe"]["data"]["mix"]}
    reasons = []
    for way, found in document["sweep"].items():
        tried = sorted(map(float, found["nll"]))
        if float(found["best"]) in (tried[0], tried[-1]):
            reasons.append(f"the best learning rate of the {way} runs is the smallest or largest of {len(tried)} tried")
        if set(found["tasks"]) != tasks:
            reasons.append(f"that of the {way} runs was searched on {len(found['tasks'])} of {len(tasks)} tasks")
    missing = {"combined", "solo"} - set(document["sweep"])
    return reasons + [f"the learning rate of the {way} runs was not searched" for way in sorted(missing)]


def _said(kind: str, each: dict[str, Any], verdict: str) -> str:
    """The verdict and what the runs cost, in sentences."""
    average = each["combined - solo"]["nll"]["average"]
    costs = each["cells"]["combined"]
    text = (
        f"**{KINDS[kind]}**, seeds {', '.join(each['seeds'])}: the average over tasks differs by "
        f"{_interval(average, 1.0, 3)} nats per answer token. Verdict: {verdict}. "
        f"The combined run of the first seed has {costs['num_steps'][0]} steps, {costs['num_examples'][0]} examples "
        f"and {costs['num_tokens'][0]:,} tokens, as many as the solo runs together."
    )
    for remedy, found in each.get("combined - remedy", {}).items():
        text += f" NLL of the combined run without {_REMEDIES.get(remedy, remedy)} minus that with it: "
        text += f"{_interval(found['nll']['average'], 1.0, 3)}."
    return text
