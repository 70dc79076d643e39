"""Tables of memory plans: of the shipped recipes, and against real runs."""

from __future__ import annotations

from typing import Any

from frame import table

from qdora.recipe.byte_size import parse_size, size_text
from qdora.recipe.recipe_file import recipe_names
from tables.table import GIB, MIB, gib, markdown, read


@table()
def plan_recipes() -> str:
    """Components of the plans of the recipes that are named for a card, and what they leave to the host."""
    plans = read("plan_recipes")["plans"]
    names = list(dict.fromkeys(name for each in plans.values() for name in each["components"]))
    rows = [[name, *(gib(each["components"].get(name, 0)) for each in plans.values())] for name in names]
    rows.append(["**total**", *(f"**{gib(each['peak_bytes'])}**" for each in plans.values())])
    rows.append(["fits in", *(f"{_card(each)}{'' if each['fits'] else ': no'}" for each in plans.values())])
    rows.append(["base", *("sharded" if _is_divided(each) else "whole" for each in plans.values())])
    streamed = [f"{each['num_streamed']} of {each['num_blocks']}" for each in plans.values()]
    rows.append(["blocks in host memory", *streamed])
    rows.append(["pinned host memory, GiB", *(f"{each['host_bytes'] / GIB:.1f}" for each in plans.values())])
    rows.append(["s a step, estimated", *(f"{_step_seconds(each):.0f}" for each in plans.values())])
    rows.append(["tokens a step", *(f"{_step_tokens(each):,}" for each in plans.values())])
    rows.append(["seconds to plan, one core", *(f"{each['cpu_seconds']:.0f}" for each in plans.values())])
    return markdown(["GiB at the peak", *plans], rows)


@table()
def several_cards() -> str:
    """The ways to hold the base of each machine, with the time of a step over each of its links."""
    document = read("several_cards")
    rows = []
    for name, machine in document["by_machine"].items():
        for link, best in machine["fastest"].items():
            for way in machine["ways"]:
                seconds = f"{way['step_seconds'][link]:.1f}"
                over = way["step_seconds"][link] / machine["computing_seconds"] - 1
                rows.append(
                    [
                        f"{name}, {link}",
                        way["way"],
                        f"{way['peak_bytes'] / GIB:.1f}{'' if way['fits'] else ': no'}",
                        f"{way['host_bytes'] / GIB:.1f}",
                        f"**{seconds}**" if way["way"] == best else seconds,
                        f"{over:.1%}",
                    ]
                )
    header = ["machine", "way", "GiB a card", "pinned host GiB a card", "s a step", "waiting"]
    hidden = "; ".join(
        f"{name} on {link}: {f'{tokens:,}' if tokens else 'any'}"
        for name, machine in document["by_machine"].items()
        for link, tokens in machine["hidden_from_tokens"].items()
    )
    note = (
        f"\nA step has {document['per_card']} micro-batches of {document['tokens_at']:,} tokens a card. Bold: the "
        "fastest that fits. Least tokens of a micro-batch whose forward pass hides the gathering of all "
        f"blocks: {hidden}.\n"
    )
    return markdown(header, rows) + note


@table()
def machines() -> str:
    """The share of a step that computes on 1 to 64 machines, and a step of a fixed number of tokens."""
    document = read("several_cards")
    last = document["by_hosts"][-1]["grown"]
    columns = [(way, link) for way, links in last.items() for link in links]
    header = ["machines", *(f"{way}, {link.partition(' + ')[2]}" for way, link in columns)]
    fixed = f"s for {document['fixed_tokens']:,} tokens: "
    names = [("replicate", "NVLink + 100 Gb/s"), ("hybrid", "NVLink + 100 Gb/s")]
    header += [f"{fixed}{way}, {link.partition(' + ')[2]}" for way, link in names]
    rows = []
    for each in document["by_hosts"]:
        if each["num_hosts"] == 1:
            continue
        row = [str(each["num_hosts"])]
        row += [f"{each['grown'][way][link]['computing']:.1%}" for way, link in columns]
        steps = each.get("fixed", {})
        row += [f"{steps[way][link]['step_seconds']:.1f}" if steps else "–" for way, link in names]
        rows.append(row)
    return markdown(header, rows)


@table()
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
        rows.append([f"{text}, GiB", *(gib(size) for size in sizes)])
    rows.append(["**peak, all on the card, GiB**", *(f"**{gib(each['peak_bytes'])}**" for each in shapes.values())])
    even = [gib(each["even_routing_bytes"]) for each in shapes.values()]
    rows.append(["if tokens divide evenly among the experts", *even])
    for card in cards:
        rows.append([f"{card}: blocks in host memory", *(_streamed(each, card) for each in shapes.values())])
        found = [each["cards"][card] for each in shapes.values()]
        rows.append([f"{card}: peak, GiB", *(gib(each["peak_bytes"]) for each in found)])
        rows.append([f"{card}: pinned host memory, GiB", *(f"{each['host_bytes'] / GIB:.1f}" for each in found)])
        rows.append([f"{card}: s a step, estimated", *(f"{each['step_seconds']:.0f}" for each in found)])
    rows.append(["seconds to plan, one core", *(f"{each['cpu_seconds']:.0f}" for each in shapes.values())])
    return markdown(["", *shapes], rows)


def _streamed(shape: dict[str, Any], card: str) -> str:
    found = shape["cards"][card]
    text = f"{found['num_streamed']} of {shape['num_blocks']}"
    return text if found["fits"] else f"{text}: does not fit"


@table()
def cards() -> str:
    """A row for each shipped recipe that is planned for a card: its peak, and how much of the card that is."""
    plans = {name: each for name, each in read("plan_recipes")["plans"].items() if name in recipe_names()}
    rows = [
        [
            f"`{name}`",
            each["model"].partition("/")[2],
            _card(each),
            size_text(each["peak_bytes"]),
            f"{each['num_streamed']} of {each['num_blocks']}",
        ]
        for name, each in plans.items()
    ]
    return markdown(["recipe", "model", "card", "planned peak", "blocks in host memory"], rows)


def _card(found: dict[str, Any]) -> str:
    """40 GB (37.25 GiB), or 8 × 80 GB (74.51 GiB)."""
    count, budget = found["num_cards"], str(found["budget"])
    card = f"{budget.replace('GB', ' GB')} ({size_text(parse_size(budget))})"
    return f"{count} × {card}" if count > 1 else card


def _is_divided(found: dict[str, Any]) -> bool:
    return bool(found["num_cards"] > 1 and found["parallel"] == "shard")


def _step_seconds(found: dict[str, Any]) -> float:
    """On all cards, over PCIe 4 if they are several."""
    used = "shard" if _is_divided(found) else "stream"
    times = [way["step_seconds"]["PCIe 4"] for way in found["ways"] if way["way"] == used]
    return float(times[0] if times else found["step_seconds"])


def _step_tokens(found: dict[str, Any]) -> int:
    tokens: int = found["num_micro_batches"] * found["micro_batch"]["num_tokens"]
    return tokens


@table()
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
