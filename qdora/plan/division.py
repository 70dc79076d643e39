"""What a run needs on several processes: bytes on each card, bytes over the wire, and an estimate of a step's time.

    replicate   each card holds the base; once a step the gradients of the adapters are summed over all cards
    shard       each card holds its rows; a block is gathered before each of its two passes of a micro-batch
    hybrid      shard within a machine, replicate across machines
    stream      replicate, with blocks in the memory of the card's own host (base.residency)

Cards divide the micro-batches of a step. A ring of n cards takes (n - 1) / n of what it gathers through each link once,
and what it sums twice; a machine has one link to the others. Blocks are gathered while others compute.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from qdora.adapter.row_share import divided_tensors, is_cut_by_rows
from qdora.errors import UserError
from qdora.model.build_model import keeps_scales
from qdora.model.checkpoint import tied_weights
from qdora.model.inject import linear_layers
from qdora.model.load import Quantization, block_list, chosen_layers, layers_to_quantize
from qdora.plan import plan_contents as parts
from qdora.plan.changes_to_fit import with_streaming
from qdora.plan.plan_contents import Cut, Division, Moment, Plan, seconds_text
from qdora.plan.step_time import PCIE_4, waiting_seconds
from qdora.quant.packed import empty_packed
from qdora.recipe.byte_size import size_text
from qdora.recipe.recipe_file import override
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe

Way = Literal["replicate", "shard", "hybrid", "stream"]

WITHIN: Mapping[str, float] = {"NVLink": 240e9, "PCIe 4": PCIE_4}
ACROSS: Mapping[str, float] = {"100 Gb/s": 10e9, "25 Gb/s": 2.5e9}
"""Bytes a second of a card's link in each direction within and across machines, 80 % of the stated rate: NVLink 3
(A100: 300 GB/s), PCIe 4.0, and networks (12.5 and 3.1 GB/s)."""
_AS_FAST = 1.01
"""Times over each other up to which two ways are as fast: the times are estimates."""
_BUFFERS = 3
"""Blocks that exist whole at a time: the one in use, what it was gathered into, and the next one on its way."""


def num_sharing(recipe: Recipe, num_processes: int, num_here: int) -> int:
    """How many processes divide the base of a recipe, of all and of those on one machine; 1: each holds all of it."""
    return {"shard": num_processes, "hybrid": num_here}.get(recipe.train.parallel, 1)


def divided_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe with a base that all processes divide; None if something in it keeps the base whole."""
    try:
        return override(_all_on_device(recipe), ["memory.host_embeddings=false", "train.parallel=shard"])
    except UserError:
        return None


def _all_on_device(recipe: Recipe) -> Recipe:
    return with_settings(recipe, base={"residency": "device", "streamed_blocks": None})


def division_of(model: PreTrainedModel, wanted: Quantization, dtype: torch.dtype, *, pruned: bool) -> Division | None:
    """The division of a model on the meta device, whose linear layers are not yet replaced; None without blocks."""
    found = block_list(model)
    if found is None:
        return None
    chosen, quantised = chosen_layers(model, wanted), layers_to_quantize(model, wanted)
    shared = {name for pair in tied_weights(model).items() for name in pair}
    layers = linear_layers(model)
    cuts: Counter[Cut] = Counter()
    sizes: dict[str, int] = {}
    for path in (each for each in layers if f"{each}.weight" not in shared):
        own = _cuts(
            layers[path],
            wanted if path in quantised else None,
            dtype,
            dense=parts.BASE if path in chosen else parts.DENSE,
            masked=pruned and path in chosen,
        )
        cuts.update(own)
        sizes[path] = sum(length * num_bytes * count for (_, length, num_bytes), count in own.items())
    prefixes = [f"{found[0]}.{index}." for index in range(len(found[1]))]
    blocks = [sum(size for path, size in sizes.items() if path.startswith(prefix)) for prefix in prefixes]
    tables = [module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding)]
    cuts.update((parts.DENSE, rows, columns * dtype.itemsize) for rows, columns in tables)
    table = sum(shape.numel() * dtype.itemsize for shape in tables)
    head = model.get_output_embeddings()
    head_path = next((path for path, module in layers.items() if module is head), "")
    is_tied = f"{head_path}.weight" in shared
    return Division(
        cuts=dict(cuts),
        block_bytes=max(blocks, default=0),
        blocks_bytes=sum(blocks),
        table_bytes=0 if is_tied else table,
        head_bytes=table if is_tied else sizes.get(head_path, 0),
        tied=is_tied,
    )


def _cuts(
    module: nn.Module, wanted: Quantization | None, dtype: torch.dtype, *, dense: str, masked: bool
) -> Counter[Cut]:
    """The tensors of a layer as `ShardedBase` cuts them; without `wanted` one tensor of the component `dense`."""
    rows, columns = map(int, module.weight.shape)  # type: ignore[arg-type]
    form: Any = torch.empty((rows, columns), dtype=dtype, device="meta")
    if wanted is not None:
        form = empty_packed(wanted.kind, (rows, columns), wanted.block_size, wanted.double_quant, "meta")
    bits = torch.empty(-(-rows * columns // 8), dtype=torch.uint8, device="meta") if masked else None
    components = {"weight": dense, "packed": parts.BASE, "absmax": parts.SCALES, "keep_bits": parts.MASKS}
    found: Counter[Cut] = Counter()
    for name, tensor in divided_tensors(form, bits).items():
        length = rows if is_cut_by_rows(form, masked=masked) else tensor.numel()
        found[components[name], length, tensor.nbytes // length] += 1
    return found


def of_card(plan: Plan, num_sharing: int, num_processes: int) -> Plan:
    """The plan of one of the cards of a run: with what it holds of a base that some processes divide, and its groups.

    There is a group of all processes. A process of a hybrid run is in two more (`mesh_of`): with those that it divides
    the base with, and with those of other machines.
    """
    num_groups = 0 if num_processes == 1 else 3 if 1 < num_sharing < num_processes else 1
    return replace(divided(plan, num_sharing), num_groups=num_groups)


def divided(plan: Plan, size: int) -> Plan:
    """The plan of a card whose base `size` processes divide; itself for one, or a model without a list of blocks."""
    division = plan.division
    if size == 1 or division is None:
        return plan
    whole, held, head = division.held(1), division.held(size), division.head_bytes
    blocks = _BUFFERS * division.block_bytes
    gathered = {"forward": blocks + division.tied * head, "loss": head, "backward": blocks}
    moments: list[Moment] = []
    for moment in plan.moments:
        sizes = dict(moment.by_component)
        for component, num_bytes in whole.items():
            sizes[component] = max(0, sizes.get(component, 0) - num_bytes) + held[component]
        # Embedding and head are gathered before they compute, beside what they are gathered into.
        if moment.phase == "forward" and not any(each.phase == "forward" for each in moments):
            first = head if division.tied else division.table_bytes
            moments.append(_gathering("forward", moments[-1].by_component if moments else sizes, 2 * first))
        if moment.phase == "loss":
            before = {name: size for name, size in sizes.items() if name != parts.LOSS}
            moments.append(_gathering("loss", before, division.block_bytes + 2 * head))
        moments.append(_gathering(moment.phase, sizes, gathered.get(moment.phase, 0), moment.block))
    return replace(plan, moments=moments, block_bytes=0)  # no block of a divided base can be streamed


def _gathering(phase: str, sizes: Mapping[str, int], gathered: int, block: int | None = None) -> Moment:
    """A moment with so many bytes of gathered tensors."""
    found = {**sizes, parts.GATHERED: gathered}
    return Moment(phase, block, {name: size for name, size in found.items() if size})


@dataclass(frozen=True, kw_only=True)
class ProcessPlan:
    """A way to hold the base on several cards.

    Attributes:
        num_sharing: Cards that divide the base among them.
        base_bytes: Bytes of frozen tensors that a card holds from step to step.
        wire_bytes: Bytes that a card receives from other cards in a step.
        step_seconds: Link within a machine, or "A + B" with the one between machines -> estimated seconds of a step.
        host_bytes: Pinned host memory of each card.
        num_streamed: Blocks that are streamed to each card.
    """

    way: Way
    num_sharing: int
    peak_bytes: int
    base_bytes: int
    wire_bytes: int
    fits: bool | None
    step_seconds: Mapping[str, float]
    host_bytes: int = 0
    num_streamed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class WholePlans:
    """The plans of one card that `process_plans` starts from; None where a recipe cannot be run in that way.

    Attributes:
        replicate: All blocks on the card.
        divided: As a divided base needs it, but whole.
        stream: With `num_streamed` blocks off the card.
    """

    replicate: Plan
    divided: Plan | None = None
    stream: Plan | None = None
    num_streamed: int = 0


def whole_plans(recipe: Recipe, plan_of: Callable[[Recipe], Plan]) -> WholePlans:
    """The plans of a recipe for each way to hold its base.

    Blocks are streamed as the recipe says, or else as few as make it fit into the budget.
    """
    shared = divided_recipe(recipe)
    recipe = override(recipe, ["train.parallel=replicate"])
    bare = _all_on_device(recipe)
    replicate = found = plan_of(bare)
    stream: Plan | None
    if recipe.base.residency != "device":
        changed, stream = recipe, plan_of(recipe)
    else:
        if replicate.fits is False and replicate.block_bytes and keeps_scales(bare):
            bare = override(bare, ["memory.keep_scales=false"])  # as with streamed blocks
            found = plan_of(bare)
        changed, found, settings = with_streaming(bare, found, plan_of)
        stream = found if settings else None
    return WholePlans(
        replicate=replicate,
        divided=None if shared is None else plan_of(shared),
        stream=stream,
        num_streamed=0 if stream is None else changed.base.streamed_blocks or stream.num_blocks,
    )


def process_plans(plans: WholePlans, num_processes: int, num_hosts: int = 1) -> list[ProcessPlan]:
    """The ways to hold the base on so many cards, each on a machine with equally many of them."""
    found = [_process_plan(plans.replicate, "replicate", 1, num_processes, num_hosts)]
    divisible = plans.divided
    if divisible is not None and divisible.division is not None and num_processes > 1:
        found.append(_process_plan(divisible, "shard", num_processes, num_processes, num_hosts))
        if 1 < num_hosts < num_processes:
            found.append(_process_plan(divisible, "hybrid", num_processes // num_hosts, num_processes, num_hosts))
    if plans.stream is not None:
        streamed = _process_plan(plans.stream, "stream", 1, num_processes, num_hosts)
        found.append(replace(streamed, num_streamed=plans.num_streamed))
    return found


def _process_plan(plan: Plan, way: Way, size: int, num_processes: int, num_hosts: int) -> ProcessPlan:
    found = of_card(plan, size, num_processes)
    division, passes = plan.division, math.ceil(plan.num_micro_batches / num_processes)
    gradients = 2 * 4 * plan.num_trainable * (num_processes - 1) / num_processes
    blocks = ends = 0.0
    if division is not None:
        share = (size - 1) / size
        blocks, ends = share * division.blocks_bytes, share * (division.table_bytes + division.head_bytes)
    links = {name: (rate, rate) for name, rate in WITHIN.items()}
    if num_hosts > 1:
        pairs = [(inner, outer) for inner in WITHIN for outer in ACROSS]
        links = {f"{a} + {b}": (WITHIN[a], min(WITHIN[a], ACROSS[b])) for a, b in pairs}
    seconds = {}
    for name, (inner, slowest) in links.items():
        rate = inner if way == "hybrid" else slowest
        waiting = waiting_seconds(blocks / rate, plan.forward_seconds) + ends / rate
        single = (plan.step_seconds or 0.0) / plan.num_micro_batches
        seconds[name] = passes * (single + waiting) + gradients / slowest
    frozen = (parts.BASE, parts.SCALES, parts.MASKS, parts.DENSE)
    return ProcessPlan(
        way=way,
        num_sharing=size,
        peak_bytes=found.peak_bytes,
        base_bytes=sum(found.moments[-1].by_component.get(each, 0) for each in frozen),
        wire_bytes=round(passes * (2 * blocks + ends) + gradients),
        fits=found.fits,
        step_seconds=seconds,
        host_bytes=found.host_bytes,
    )


def fastest_way(found: Sequence[ProcessPlan], link: str) -> Way | None:
    """The fastest way that fits over a link; None if none fits.

    Of ways that are as fast within 1 %, it is the first: `stream`, which needs memory of the host, comes last.
    """
    able = [each for each in found if each.fits is not False]
    least = min((each.step_seconds[link] for each in able), default=0.0)
    return next((each.way for each in able if each.step_seconds[link] <= _AS_FAST * least), None)


def process_lines(found: list[ProcessPlan], num_processes: int, num_hosts: int) -> list[str]:
    """A line for each way, and which one that fits is fastest, in words."""
    where = f"{num_processes} cards" if num_hosts == 1 else f"{num_processes} cards in {num_hosts} machines"
    lines = [f"On {where}, each card (times are estimates):"]
    for each in found:
        times = ", ".join(f"{seconds_text(seconds)} over {link}" for link, seconds in each.step_seconds.items())
        verdict = "" if each.fits is None else f" ({'fits' if each.fits else 'does not fit'})"
        streamed = f", {each.num_streamed} blocks streamed" if each.num_streamed else ""
        pinned = f"; {size_text(each.host_bytes)} of pinned host memory" if each.host_bytes else ""
        lines.append(
            f"  {each.way}: {size_text(each.peak_bytes)}{verdict}, of which {size_text(each.base_bytes)} base{streamed}"
            f"{pinned}; {size_text(each.wire_bytes)} received from others in a step, which takes {times}."
        )
    best = {link: fastest_way(found, link) for link in found[0].step_seconds}
    if None in best.values():
        return [*lines, "  None of these fits."]
    lines.append(f"  Fastest that fits: {', '.join(f'{way} over {link}' for link, way in best.items())}.")
    if "stream" in best.values():
        lines.append("  stream is train.parallel=replicate with base.residency and base.streamed_blocks.")
    return lines
