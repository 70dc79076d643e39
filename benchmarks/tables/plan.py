"""Tables of memory plans: of large models, and against real runs."""

from __future__ import annotations

from typing import Any

from qdora.recipe.recipe_file import recipe_names
from tables.table import markdown, read

GIB, MIB = 2**30, 2**20


def plan_shapes() -> str:
    """Components of the plans of large shapes, their totals, and whether they fit."""
    document = read("plan_shapes")
    shapes = document["shapes"]
    names = list(dict.fromkeys(name for each in shapes.values() for name in each["components"]))
    rows = [[name, *(f"{each['components'].get(name, 0) / GIB:.2f}" for each in shapes.values())] for name in names]
    rows.append(["**total**", *(f"**{each['peak_bytes'] / GIB:.2f}**" for each in shapes.values())])
    rows.append([f"fits in {document['budget']}", *("yes" if each["fits"] else "no" for each in shapes.values())])
    rows.append(["seconds to plan, one core", *(f"{each['cpu_seconds']:.0f}" for each in shapes.values())])
    peaks = "; ".join(f"{name}: {each['peak_in']}" for name, each in shapes.items())
    return markdown(["GiB at the peak", *shapes], rows) + f"\nMoment of the peak: {peaks}.\n"


def plan_recipes() -> str:
    """Components of the plans of the recipes that are named for a card, and what they leave to the host."""
    plans = read("plan_recipes")["plans"]
    names = list(dict.fromkeys(name for each in plans.values() for name in each["components"]))
    rows = [[name, *(f"{each['components'].get(name, 0) / GIB:.2f}" for each in plans.values())] for name in names]
    rows.append(["**total**", *(f"**{each['peak_bytes'] / GIB:.2f}**" for each in plans.values())])
    rows.append(["total in GB", *(f"{each['peak_bytes'] / 1e9:.2f}" for each in plans.values())])
    rows.append(["fits in", *(f"{each['budget']}{'' if each['fits'] else ': no'}" for each in plans.values())])
    streamed = [f"{each['num_streamed']} of {each['num_blocks']}" for each in plans.values()]
    rows.append(["blocks in host memory", *streamed])
    rows.append(["pinned host memory, GiB", *(f"{each['host_bytes'] / GIB:.1f}" for each in plans.values())])
    rows.append(["s a step, predicted", *(f"{each['step_seconds']:.0f}" for each in plans.values())])
    rows.append(["tokens a step", *(f"{_step_tokens(each):,}" for each in plans.values())])
    rows.append(["seconds to plan, one core", *(f"{each['cpu_seconds']:.0f}" for each in plans.values())])
    return markdown(["GiB at the peak", *plans], rows)


def expert_plans() -> str:
    """What each mixture needs, and what makes it fit on each card."""
    shapes = read("expert_plans")["shapes"]
    cards = list(dict.fromkeys(card for each in shapes.values() for card in each["cards"]))
    groups = {
        "weights of the base": ("packed base", "block scales", "embeddings, head, norms"),
        "adapters, gradients, optimizer": ("adapters", "kept norms and scales", "gradients", "optimizer state"),
    }
    rows = [["trainable, millions", *(f"{each['num_trainable'] / 1e6:,.0f}" for each in shapes.values())]]
    for text, names in groups.items():
        sizes = [sum(each["components"].get(name, 0) for name in names) for each in shapes.values()]
        rows.append([f"{text}, GiB", *(f"{size / GIB:.2f}" for size in sizes)])
    rows.append(
        ["**peak, all on the card, GiB**", *(f"**{each['peak_bytes'] / GIB:.2f}**" for each in shapes.values())]
    )
    even = [f"{each['even_routing_bytes'] / GIB:.2f}" for each in shapes.values()]
    rows.append(["if tokens divide evenly among the experts", *even])
    for card in cards:
        rows.append([f"{card}: blocks in host memory", *(_streamed(each, card) for each in shapes.values())])
        found = [each["cards"][card] for each in shapes.values()]
        rows.append([f"{card}: peak, GiB", *(f"{each['peak_bytes'] / GIB:.2f}" for each in found)])
        rows.append([f"{card}: pinned host memory, GiB", *(f"{each['host_bytes'] / GIB:.1f}" for each in found)])
        rows.append([f"{card}: s a step, predicted", *(f"{each['step_seconds']:.0f}" for each in found)])
    rows.append(["seconds to plan, one core", *(f"{each['cpu_seconds']:.0f}" for each in shapes.values())])
    return markdown(["", *shapes], rows)


def _streamed(shape: dict[str, Any], card: str) -> str:
    found = shape["cards"][card]
    text = f"{found['num_streamed']} of {shape['num_blocks']}"
    return text if found["fits"] else f"{text}: does not fit"


def cards() -> str:
    """A row for each shipped recipe that is planned for a card: its peak, and how much of the card that is."""
    plans = {name: each for name, each in read("plan_recipes")["plans"].items() if name in recipe_names()}
    rows = [
        [
            f"`{name}`",
            each["model"].partition("/")[2],
            each["budget"].replace("GB", " GB"),
            f"{each['peak_bytes'] / 1e9:.1f} GB",
            f"{each['num_streamed']} of {each['num_blocks']}",
        ]
        for name, each in plans.items()
    ]
    return markdown(["recipe", "model", "card", "planned peak", "blocks in host memory"], rows)


def _step_tokens(found: dict[str, Any]) -> int:
    tokens: int = found["num_micro_batches"] * found["micro_batch"]["num_tokens"]
    return tokens


def plan_accuracy() -> str:
    """Planned and measured bytes of each run, and their ratios."""
    document = read("plan_accuracy")
    rows = [
        [
            name,
            f"{each['micro_batch']['rows']} × {each['micro_batch']['length']}",
            f"{each['planned_tensor_bytes'] / MIB:,.1f}",
            f"{each['measured_tensor_bytes'] / MIB:,.1f}",
            f"{each['tensor_ratio']:.4f}",
            f"{each['planned_rss_bytes'] / MIB:,.0f}",
            f"{each['measured_rss_bytes'] / MIB:,.0f}" if "rss_ratio" in each else "–",
            f"{each['rss_ratio']:.3f}" if "rss_ratio" in each else "–",
        ]
        for name, each in document["cases"].items()
    ]
    header = ["run", "micro-batch", "tensors planned, MiB", "counted", "ratio", "resident planned", "measured", "ratio"]
    worst, bars, counts = document["largest_error"], document["bars"], document["num_measured"]
    said = {"tensor": "tensors", "rss": "resident"}
    parts = [
        f"{text} {worst[what]:.2%} in {counts[what]} runs (limit: {bars[what]:.0%})"
        for what, text in said.items()
        if counts[what]
    ]
    note = f"\nLargest error: {'; '.join(parts)}.\n"
    return markdown(header, rows) + note
