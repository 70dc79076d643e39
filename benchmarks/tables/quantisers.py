"""Tables and the figure of `quantisers.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from frame import Column, markdown, table, tabulated

from qdora.files.pages import svg_file

BITS, NATS = (2, 3, 4, 8, 16), (3, 4, 6, 10, 20)
METHODS = {
    "round": "rounded",
    "gptq passages": "GPTQ on passages",
    "gptq tasks": "GPTQ on tasks",
    "hqq 0": "HQQ, axis 0",
    "hqq 1": "HQQ, axis 1",
    "gptqmodel passages": "gptqmodel on passages",
    "gptqmodel tasks": "gptqmodel on tasks",
}


def draw(cases: dict[str, Any], out: Path) -> None:
    """Bits against loss: a row for each model, a column for each kind of text."""
    models = list(dict.fromkeys(case["model"] for case in cases.values()))
    with svg_file(out, 9.6, 3.6 * len(models)) as figure:
        for model, axes in zip(models, figure.subplots(len(models), 2, squeeze=False), strict=True):
            for axis, text in zip(axes, ("passages", "tasks"), strict=True):
                for (method, title), mark in zip(METHODS.items(), "o^vx+<>", strict=True):
                    some = [case for case in cases.values() if (case["model"], case["method"]) == (model, method)]
                    points = [(case["bits"], case[text]["nll_per_token"]) for case in some]
                    if some:
                        axis.scatter(*zip(*points, strict=True), marker=mark, label=title)
                    for case, point in zip(some, points, strict=True):
                        axis.annotate(case["format"], point, (3, 3), textcoords="offset points", fontsize=6)
                axis.set(xlabel="bits a weight", ylabel="NLL, nats per token", title=f"{model}, {text}")
                axis.set(xscale="log", xticks=BITS, xticklabels=BITS, yscale="log", yticks=NATS, yticklabels=NATS)
                axis.minorticks_off()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)


@table("quantisers")
def quantisers_answer(result: Any) -> str:
    cases, lines = result["cases"].values(), []

    def least(model: str, kinds: tuple[str, ...], method: str) -> str:
        found = [each for each in cases if each["model"] == model and each["format"] in kinds]
        scores = [(each["passages"]["nll_per_token"], each["format"]) for each in found if each["method"] == method]
        return f"{math.exp(min(scores)[0]):.1f} ({min(scores)[1]})" if scores else "–"

    for model in dict.fromkeys(each["model"] for each in cases):
        dense = least(model, ("none",), "round")
        nf4, swept = (least(model, ("nf4",), each) for each in list(METHODS)[:2])
        parts = [f"{dense.partition(' ')[0]} in 16 bits, {nf4} rounded, {swept} by GPTQ"]
        for bits in (3, 2):
            ways = (f"{title} {least(model, (f'nf{bits}', f'int{bits}'), each)}" for each, title in METHODS.items())
            parts.append(f"at {bits} bits {', '.join(way for way in ways if not way.endswith('–'))}")
        lines.append(f"**{model}**, perplexity of held-out passages: {'; '.join(parts)}.\n")
    return "\n".join(lines)


@table("quantisers")
def quantisers_table(result: Any) -> str:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for case in result["cases"].values():
        found.setdefault((case["model"], case["format"]), {})[case["method"]] = case
    shown = [method for method in METHODS if any(method in each for each in found.values())]
    rows = []
    for (model, kind), each in found.items():
        bits = next(iter(each.values()))["bits"]
        row = [f"{model}, {'16 bits' if kind == 'none' else kind}", f"{bits:.2f}"]
        for case in map(each.get, shown):
            if case is None:
                row.append("–")
                continue
            passages, tasks = (case[text]["nll_per_token"] for text in ("passages", "tasks"))
            others = f" ({case['bits']:.1f} bits)" if abs(case["bits"] - bits) > 0.05 else ""
            row.append(f"{math.exp(passages):.2f}, {tasks:.3f}{others}")
        rows.append([*row, ", ".join(f"{case['seconds']:.0f}" for case in each.values())])
    return markdown(["model, format", "bits", *(METHODS[method] for method in shown), "seconds"], rows)


@table("quantisers_layer")
def quantisers_layer_table(result: Any) -> str:
    columns: dict[str, Column] = {
        "bits, program, settings": "{0}",
        "error": "{1[error]:.5f}",
        "codes equal": lambda item: f"{item[1]['equal_codes']:.4%}" if "equal settings" in item[0] else "–",
    }
    return tabulated(result["cases"].items(), columns)
