"""What a run needs on several processes: bytes on each card, bytes over the wire, and the time of a step.

    replicate   each card holds the base; once a step the gradients of the adapters are summed over all cards
    shard       each card holds its rows; a block is gathered before each of its two passes of a micro-batch
    hybrid      shard within a machine, replicate across machines
    stream      replicate, with blocks in the memory of the card's own host (base.residency)

Cards divide the micro-batches of a step. A ring of n cards takes (n - 1) / n of what it gathers through each link once,
and what it sums twice; a machine has one link to the others. A block is gathered while the one before computes
(`gather_waits`).
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

from qdora.errors import UserError
from qdora.model.build_model import keeps_scales
from qdora.model.inject import linear_layers
from qdora.model.load import Quantization, block_list, chosen_layers, layers_to_quantize
from qdora.model.stored_tensors import tied_weights
from qdora.nn.row_share import RowShare, divided_tensors
from qdora.ops.packed import empty_packed
from qdora.plan import plan_contents as parts
from qdora.plan.changes_to_fit import with_streaming
from qdora.plan.plan_contents import Cut, Division, Moment, Plan, seconds_text
from qdora.plan.step_time import PCIE_4
from qdora.recipe.byte_size import size_text
from qdora.recipe.recipe_file import override
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe

Way = Literal["replicate", "shard", "hybrid", "stream"]

LINKS: Mapping[str, float] = {"NVLink": 240e9, "PCIe 4": PCIE_4, "100 Gb/s": 10e9, "25 Gb/s": 2.5e9}
"""Bytes a second of a card's link in each direction, 80 % of the stated rate: NVLink 3 (A100: 300 GB/s), PCIe 4.0, and
networks between machines (12.5 and 3.1 GB/s)."""
_WITHIN = ("NVLink", "PCIe 4")
"""Links between the cards of a machine; the others join machines."""
_AS_FAST = 1.01
"""Times over each other up to which two ways are as fast: the times are predictions."""
_BUFFERS = 3
"""Blocks that exist whole at a time: the one in use, what it was gathered into, and the next one on its way."""


def num_sharing(recipe: Recipe, num_processes: int, num_here: int) -> int:
    """How many processes divide the base of a recipe, of all and of those on one machine; 1: each holds all of it."""
    return {"shard": num_processes, "hybrid": num_here}.get(recipe.train.parallel, 1)


def divided_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe with a base that all processes divide; None if something in it keeps the base whole."""
    try:
        return override(all_on_device(recipe), ["memory.host_embeddings=false", "train.parallel=shard"])
    except UserError:
        return None


def all_on_device(recipe: Recipe) -> Recipe:
    """The recipe with all blocks on the device."""
    return with_settings(recipe, base={"residency": "device", "streamed_blocks": None})


class _Alone:
    """The group of a single process."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def division_of(
    model: PreTrainedModel, wanted: Quantization, dtype: torch.dtype, *, pruned: bool, forward_seconds: float = 0.0
) -> Division | None:
    """The division of a model on the meta device, whose linear layers are not yet replaced; None without blocks."""
    found = block_list(model)
    if found is None:
        return None
    chosen, quantised, tied = chosen_layers(model, wanted), layers_to_quantize(model, wanted), tied_weights(model)
    shared = {name for pair in tied.items() for name in pair}
    cuts: Counter[Cut] = Counter()
    sizes: dict[str, int] = {}
    head = model.get_output_embeddings()
    layers = linear_layers(model)
    for path, module in layers.items():
        if f"{path}.weight" in shared:
            continue
        own = _layer_cuts(
            module,
            wanted if path in quantised else None,
            dtype,
            dense=parts.BASE if path in chosen else parts.DENSE,
            masked=pruned and path in chosen,
        )
        cuts.update(own)
        sizes[path] = sum(length * num_bytes * count for (_, length, num_bytes), count in own.items())
    prefixes = [f"{found[0]}.{index}." for index in range(len(found[1]))]
    blocks = [sum(size for path, size in sizes.items() if path.startswith(prefix)) for prefix in prefixes]
    table = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            rows, columns = module.weight.shape
            cuts[parts.DENSE, rows, columns * dtype.itemsize] += 1
            table += rows * columns * dtype.itemsize
    head_path = next((path for path, module in layers.items() if module is head), None)
    is_tied = head_path is not None and f"{head_path}.weight" in shared
    head_bytes = table if is_tied else sizes.get(head_path or "", 0)
    return Division(
        cuts=dict(cuts),
        block_bytes=max(blocks, default=0),
        blocks_bytes=sum(blocks),
        table_bytes=0 if is_tied else table,
        head_bytes=head_bytes,
        tied=is_tied,
        forward_seconds=forward_seconds,
    )


def _layer_cuts(
    module: nn.Module, wanted: Quantization | None, dtype: torch.dtype, *, dense: str, masked: bool
) -> Counter[Cut]:
    """The tensors of a layer as `ShardedBase` cuts them; without `wanted` one tensor of the component `dense`."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    shape = (int(rows), int(columns))
    form: Any = torch.empty(shape, dtype=dtype, device="meta")
    if wanted is not None:
        form = empty_packed(wanted.kind, shape, wanted.block_size, wanted.double_quant, "meta")
    bits = torch.empty(-(-shape[0] * shape[1] // 8), dtype=torch.uint8, device="meta") if masked else None
    share = RowShare(form, bits, _Alone())  # type: ignore[arg-type]
    components = {"weight": dense, "packed": parts.BASE, "absmax": parts.SCALES, "keep_bits": parts.MASKS}
    found: Counter[Cut] = Counter()
    for name, tensor in divided_tensors(form, bits).items():
        cut = share.cut(tensor)
        found[components[name], len(cut), cut.nbytes // len(cut)] += 1
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
    whole, held = division.held(1), division.held(size)
    moments: list[Moment] = []
    for moment in plan.moments:
        sizes = dict(moment.by_component)
        for component, num_bytes in whole.items():
            sizes[component] = max(0, sizes.get(component, 0) - num_bytes) + held[component]
        if moment.phase == "forward" and not any(each.phase == "forward" for each in moments):
            first = division.head_bytes if division.tied else division.table_bytes
            moments.append(_gathering("forward", moments[-1].by_component if moments else sizes, 2 * first))
        if moment.phase == "loss":
            before = {name: size for name, size in sizes.items() if name != parts.LOSS}
            moments.append(_gathering("loss", before, division.block_bytes + 2 * division.head_bytes))
        moments.append(_gathering(moment.phase, sizes, _gathered(division, moment), moment.block))
    return replace(plan, moments=moments, block_bytes=0)  # no block of a divided base can be streamed


def _gathering(phase: str, sizes: Mapping[str, int], gathered: int, block: int | None = None) -> Moment:
    """A moment with so many bytes of gathered tensors, and what these are gathered into."""
    found = {**sizes, parts.GATHERED: gathered}
    return Moment(phase, block, {name: size for name, size in found.items() if size})


def _gathered(division: Division, moment: Moment) -> int:
    """Bytes of gathered tensors while a block or the head computes."""
    blocks = _BUFFERS * division.block_bytes
    if moment.phase == "loss":
        return division.head_bytes
    if moment.phase == "forward":
        return blocks + division.tied * division.head_bytes
    return blocks if moment.phase == "backward" else 0


@dataclass(frozen=True, kw_only=True)
class ProcessPlan:
    """A way to hold the base on several cards.

    Attributes:
        num_sharing: Cards that divide the base among them.
        base_bytes: Bytes of frozen tensors that a card holds from step to step.
        wire_bytes: Bytes that a card receives from other cards in a step.
        step_seconds: Link within a machine, or "A + B" with the one between machines -> seconds of a step.
        sequence_bytes: Bytes at the peak that grow with the tokens of a micro-batch.
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
    sequence_bytes: int = 0
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
    resident = all_on_device(recipe)
    replicate = plan_of(resident)
    changed, stream = recipe, None
    if recipe.base.residency != "device":
        stream = plan_of(recipe)
    else:
        bare, found = resident, replicate
        if replicate.fits is False and replicate.block_bytes and keeps_scales(resident):
            bare = override(resident, ["memory.keep_scales=false"])  # as with streamed blocks
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
    share = (size - 1) / size
    gradients = 2 * 4 * plan.num_trainable * (num_processes - 1) / num_processes
    gathered = 0.0
    if division is not None:
        gathered = share * (2 * division.blocks_bytes + division.table_bytes + division.head_bytes)
    seconds = {}
    networks = [name for name in LINKS if name not in _WITHIN] if num_hosts > 1 else [None]
    for inner in _WITHIN:
        for outer in networks:
            slowest = LINKS[inner] if outer is None else min(LINKS[inner], LINKS[outer])
            rate = LINKS[inner] if way == "hybrid" else slowest
            name = inner if outer is None else f"{inner} + {outer}"
            seconds[name] = _seconds(plan, passes, share, rate) + gradients / slowest
    return ProcessPlan(
        way=way,
        num_sharing=size,
        peak_bytes=found.peak_bytes,
        base_bytes=_base_bytes(found),
        wire_bytes=round(passes * gathered + gradients),
        fits=found.fits,
        step_seconds=seconds,
        sequence_bytes=found.sequence_bytes,
        host_bytes=found.host_bytes,
    )


def _base_bytes(plan: Plan) -> int:
    """Bytes of the frozen tensors that a card holds from step to step."""
    components = (parts.BASE, parts.SCALES, parts.MASKS, parts.DENSE)
    return sum(plan.moments[-1].by_component.get(each, 0) for each in components)


def _seconds(plan: Plan, passes: int, share: float, rate: float) -> float:
    """Seconds of a card's micro-batches, with what it waits for blocks that are gathered."""
    single = (plan.step_seconds or 0.0) / plan.num_micro_batches
    division = plan.division
    if division is None or not share:
        return passes * single
    gather = share * division.blocks_bytes / plan.num_blocks / rate
    waits = gather_waits(plan.num_blocks, gather, division.forward_seconds)
    ends = share * (division.table_bytes + division.head_bytes) / rate
    return passes * (single + waits + ends)


def gather_waits(num_blocks: int, gather_seconds: float, forward_seconds: float) -> float:
    """Seconds that a micro-batch waits for its blocks to be gathered, each while the one before computes.

    The first block of each of the two passes is waited for as a whole. A backward pass, with its recomputation, takes
    as long as two forward passes.
    """
    passes = (forward_seconds, 2 * forward_seconds)
    return sum(gather_seconds + (num_blocks - 1) * max(0.0, gather_seconds - each) for each in passes)


def fastest_way(found: Sequence[ProcessPlan], link: str) -> Way | None:
    """The fastest way that fits over a link; None if none fits.

    Of ways that are as fast within 1 %, it is the first: `stream`, which needs memory of the host, comes last.
    """
    able = [each for each in found if each.fits is not False]
    least = min((each.step_seconds[link] for each in able), default=0.0)
    return next((each.way for each in able if each.step_seconds[link] <= _AS_FAST * least), None)


def process_lines(
    found: list[ProcessPlan], num_processes: int, num_hosts: int, *, changes_help: bool = False
) -> list[str]:
    """A line for each way, and which one that fits is fastest, in words.

    Args:
        changes_help: Whether changes of the recipe, listed before, make it fit.
    """
    where = f"{num_processes} cards" if num_hosts == 1 else f"{num_processes} cards in {num_hosts} machines"
    lines = [f"On {where}, each card:"]
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
        return [*lines, f"  None of these fits{' without the changes above' if changes_help else ''}."]
    lines.append(f"  Fastest that fits: {', '.join(f'{way} over {link}' for link, way in best.items())}.")
    if "stream" in best.values():
        lines.append("  stream is train.parallel=replicate with base.residency and base.streamed_blocks.")
    return lines
