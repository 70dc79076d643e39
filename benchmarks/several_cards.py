"""Steps of Llama-3.3-70B on several cards, simulated: which way to hold the base is fastest, and where it stops paying.

    python benchmarks/several_cards.py [--out benchmarks/results/several_cards.json] [--smoke]

Nothing here is measured. Bytes are those of `qdora plan`, and times are its estimates by a roofline of stated rates:
half of a card's FLOPs in bf16, 80 % of its memory's and of each link's bytes a second. A pass over the blocks takes as
long as its computing, or as gathering the blocks or copying them from the host. Machines: two and four RTX 4090
(24 GB) on PCIe 4, eight A100 (80 GB) on PCIe 4 or NVLink. A card takes four micro-batches a step.

by_machine  the ways to hold the base at 2,048 tokens a micro-batch, and the tokens from which all gathering is hidden
by_tokens   seconds of a step over those of its computing, with a divided base
by_hosts    1 to 64 machines of eight 80 GB cards: the share of a step that computes; and one step of 262,144 tokens
            divided among more and more cards, each of which takes at least one micro-batch
A figure of the same name as --out is drawn beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measure import facts, parser_of, write
from transformers import LlamaConfig, PreTrainedConfig

from qdora.files.svg_figure import svg_file
from qdora.plan.division import ACROSS, WITHIN, WholePlans, fastest_way, process_plans, whole_plans
from qdora.plan.memory_plan import fit_recipe
from qdora.plan.plan_contents import Plan
from qdora.plan.public_shapes import public_shapes
from qdora.plan.step_time import Rates
from qdora.plan.workload import assumed_workload
from qdora.recipe.byte_size import parse_size
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe

RECIPE = "llama-70b-2x24gb"
PER_CARD = 4
"""Micro-batches of a card in a step."""
TOKENS = (256, 512, 1024, 2048, 4096, 8192)
AT = 2048
HOSTS = (1, 2, 4, 8, 16, 32, 64)
FIXED_TOKENS = 262_144


@dataclass(frozen=True)
class Machine:
    """Cards of one machine: how many, the memory of each, and what each does in a second."""

    num_cards: int
    budget: str
    rates: Rates
    links: tuple[str, ...]


# NVIDIA's Ada white paper: 165.2 TFLOP/s in bf16 with float32 sums, 1,008 GB/s. A100 80 GB SXM: 312, 2,039 GB/s.
ADA = Rates("RTX 4090 (stated)", 82.6e12, 0.8 * 1008e9)
A100 = Rates("A100 80GB (stated)", 156e12, 0.8 * 2039e9)
MACHINES = {
    "2 x 24 GB": Machine(2, "24GB", ADA, ("PCIe 4",)),
    "4 x 24 GB": Machine(4, "24GB", ADA, ("PCIe 4",)),
    "8 x 80 GB": Machine(8, "80GB", A100, ("PCIe 4", "NVLink")),
}
LARGEST = "8 x 80 GB"


def main() -> None:
    """The three parts, and the figure."""
    args = parser_of(__doc__, "several_cards", smoke="a small shape").parse_args()
    config: PreTrainedConfig = public_shapes()[load_recipe(RECIPE).model.source].config()
    if args.smoke:
        small = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128, "vocab_size": 512}
        config = LlamaConfig(**small, num_hidden_layers=24)
    lengths = TOKENS[:4:3] if args.smoke else TOKENS
    plans = {
        name: {length: plans_of(config, machine, length) for length in lengths} for name, machine in MACHINES.items()
    }
    result = {
        **facts("python benchmarks/several_cards.py"),
        "simulated": True,
        "recipe": RECIPE,
        "per_card": PER_CARD,
        "tokens_at": AT,
        "rates": {name: asdict(machine.rates) for name, machine in MACHINES.items()},
        "links": {**WITHIN, **ACROSS},
        "by_machine": {name: by_machine(MACHINES[name], found) for name, found in plans.items()},
        "by_tokens": [
            {"machine": name, "link": link, "points": by_tokens(MACHINES[name], found, link)}
            for name, found in plans.items()
            for link in MACHINES[name].links
        ],
        "by_hosts": [by_hosts(plans[LARGEST][AT], num_hosts) for num_hosts in HOSTS],
        "fixed_tokens": FIXED_TOKENS,
    }
    draw(result, args.out.with_suffix(".svg"))
    write(args.out, result)


def plans_of(config: PreTrainedConfig, machine: Machine, length: int) -> WholePlans:
    """The plans of a card of the machine, with micro-batches of one sequence of `length` tokens."""
    overrides = [f"data.max_length={length}", f"train.micro_batch_tokens={length}"]
    overrides += ["base.residency=device", "base.streamed_blocks=null"]
    overrides.append(f"train.tokens_per_step={PER_CARD * machine.num_cards * length}")
    budget = parse_size(machine.budget)
    options: dict[str, Any] = {"config": config, "device_kind": "cuda", "workload": assumed_workload}
    options["num_processes"] = machine.num_cards

    def plan_of(recipe: Recipe) -> Plan:
        return fit_recipe(recipe, budget, rates=machine.rates, may_change=False, **options)[1]

    return whole_plans(load_recipe(RECIPE, overrides), plan_of)


def computing_seconds(plans: WholePlans) -> float:
    """Seconds in which a card computes its micro-batches of a step, without waiting for anything."""
    return PER_CARD * (plans.replicate.step_seconds or 0.0) / plans.replicate.num_micro_batches


def by_machine(machine: Machine, plans: Mapping[int, WholePlans]) -> dict[str, Any]:
    """The ways to hold the base, and from how many tokens on gathering is hidden over each link."""
    found = process_plans(plans[AT], machine.num_cards)
    first, last = min(plans), max(plans)
    hidden = {}
    low, high = plans[first].divided, plans[last].divided
    assert low is not None
    assert low.division is not None
    assert high is not None
    slope = (high.forward_seconds - low.forward_seconds) / (last - first)  # of the products; decoding takes the rest
    for link in machine.links:
        gather = (1 - 1 / machine.num_cards) * low.division.blocks_bytes / WITHIN[link]
        hidden[link] = max(0, math.ceil(first + (gather - low.forward_seconds) / slope))
    return {
        "num_cards": machine.num_cards,
        "budget": machine.budget,
        "computing_seconds": computing_seconds(plans[AT]),
        "ways": [each.to_dict() for each in found],
        "fastest": {link: fastest_way(found, link) for link in machine.links},
        "hidden_from_tokens": hidden,
    }


def by_tokens(machine: Machine, plans: Mapping[int, WholePlans], link: str) -> list[dict[str, Any]]:
    """A divided base: seconds of a step over those of its computing, for each length of a micro-batch."""
    points = []
    for length, each in plans.items():
        shard = next(way for way in process_plans(each, machine.num_cards) if way.way == "shard")
        ratio = shard.step_seconds[link] / computing_seconds(each)
        points.append({"tokens": length, "over_computing": ratio, "fits": shard.fits, "peak_bytes": shard.peak_bytes})
    return points


def by_hosts(plans: WholePlans, num_hosts: int) -> dict[str, Any]:
    """Machines of eight cards on NVLink: each card has four micro-batches; and a step of as many tokens for all."""
    num_cards = num_hosts * MACHINES[LARGEST].num_cards
    steps = {"grown": PER_CARD * num_cards, "fixed": FIXED_TOKENS // AT}
    found: dict[str, Any] = {"num_hosts": num_hosts, "num_cards": num_cards}
    for name, count in steps.items():
        if count < num_cards:
            continue  # a card without a micro-batch
        ways = process_plans(with_micro_batches(plans, count), num_cards, num_hosts)
        single = computing_seconds(plans) / PER_CARD
        found[name] = {
            each.way: {
                link: {"step_seconds": seconds, "computing": count / num_cards * single / seconds}
                for link, seconds in each.step_seconds.items()
                if link.startswith("NVLink")
            }
            for each in ways
        }
    return found


def with_micro_batches(plans: WholePlans, count: int) -> WholePlans:
    """The plans of a step with another number of micro-batches; the update takes milliseconds."""

    def changed(plan: Plan) -> Plan:
        single = (plan.step_seconds or 0.0) / plan.num_micro_batches
        return replace(plan, num_micro_batches=count, step_seconds=count * single)

    return WholePlans(changed(plans.replicate), None if plans.divided is None else changed(plans.divided))


NAME_HEIGHT = 0.062
"""Of a line's name, as a share of its panel."""
COLORS = {"replicate": "tab:green", "shard": "tab:red", "hybrid": "tab:blue"}


def draw(result: Mapping[str, Any], out: Path) -> None:
    """Waiting over the tokens of a micro-batch, and computing over the number of machines; names beside their lines."""
    with svg_file(out, 5.2, 8.0) as figure:
        first, second = figure.subplots(2, 1)
        draw_tokens(first, result["by_tokens"])
        draw_hosts(second, [each for each in result["by_hosts"] if each["num_hosts"] > 1])
        for axes in (first, second):
            axes.minorticks_off()
            axes.tick_params(labelsize=10)
            axes.grid(alpha=0.3)


def draw_tokens(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """A line for each machine and link."""
    ends = []
    for index, line in enumerate(lines):
        points = [(each["tokens"], 100 * (each["over_computing"] - 1), each["fits"]) for each in line["points"]]
        axes.plot([each[0] for each in points], [each[1] for each in points], color=f"C{index}", lw=1.8)
        for tokens, waiting, fits in points:
            axes.plot(tokens, waiting, "o", color=f"C{index}", mfc=f"C{index}" if fits else "white", ms=6)
        ends.append((points[-1][1], f"{line['machine']}, {line['link']}", f"C{index}"))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    values = [each["tokens"] for each in lines[0]["points"]]
    axes.set_xticks(values, [f"{each:,}" for each in values])
    axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.set_xlabel("tokens in a micro-batch (open: does not fit)", fontsize=11)
    axes.set_title("Waiting, % of computing (divided 70B base)", fontsize=11, loc="left")
    name_lines(axes, ends)


def draw_hosts(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each way and network."""
    ends = []
    hosts = [each["num_hosts"] for each in rows]
    for way, color in COLORS.items():
        for network, style in (("100 Gb/s", "-"), ("25 Gb/s", "--")):
            shares = [100 * each["grown"][way][f"NVLink + {network}"]["computing"] for each in rows]
            axes.plot(hosts, shares, style, color=color, lw=1.8)
            ends.append((shares[-1], f"{way}, {network}", color))
    axes.set_xscale("log", base=2)
    axes.set_xticks(hosts, [str(each) for each in hosts])
    axes.set_ylim(0, 104)
    axes.set_xlabel("machines of 8 x 80 GB, on paper", fontsize=11)
    axes.set_title("Share of a step that computes, %", fontsize=11, loc="left")
    name_lines(axes, ends)


def name_lines(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names on the right, each at the height where its line ends, or below where names would touch."""
    to_height = axes.transScale + axes.transLimits
    last = math.inf
    for value, name, color in sorted(ends, reverse=True):
        last = min(float(to_height.transform((axes.get_xlim()[1], value))[1]), last - NAME_HEIGHT)
        place = {"xycoords": "axes fraction", "xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (1, last), color=color, fontsize=10, **place)


if __name__ == "__main__":
    main()
