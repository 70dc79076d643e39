"""What a run needs on several processes: bytes on each card, bytes over the wire, and the time of a step.

    replicate   each card holds the base; once a step the gradients of the adapters are summed over all cards
    shard       each card holds its rows; a block is gathered before each of its two passes of a micro-batch
    hybrid      shard within a machine, replicate across machines

Cards divide the micro-batches of a step. A ring of n cards takes (n - 1) / n of what it gathers through each link once,
and what it sums twice. Gathering overlaps with the block before, as `step_time.simulated_step` has it for streaming.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from qdora.model.inject import linear_layers
from qdora.model.load import Quantization, block_list, chosen_layers, layers_to_quantize
from qdora.model.stored_tensors import tied_weights
from qdora.nn.row_share import RowShare, divided_tensors
from qdora.ops.packed import empty_packed
from qdora.plan import plan_contents as parts
from qdora.plan.plan_contents import Cut, Division, Moment, Plan
from qdora.plan.step_time import PCIE_4, simulated_step
from qdora.recipe.byte_size import size_text
from qdora.recipe.settings import Recipe

Way = Literal["replicate", "shard", "hybrid"]

LINKS: Mapping[str, float] = {"NVLink": 240e9, "PCIe 4": PCIE_4, "100 Gb/s": 10e9, "25 Gb/s": 2.5e9}
"""Bytes a second of a card's link in each direction, 80 % of the stated rate: NVLink 3 (A100: 300 GB/s), PCIe 4.0, and
networks between machines (12.5 and 3.1 GB/s)."""
_WITHIN = ("NVLink", "PCIe 4")
"""Links between the cards of a machine; the others join machines."""
_BUFFERS = 3
"""Blocks that exist whole at a time: the one in use, what it was gathered into, and the next one on its way."""


def all_on_device(recipe: Recipe) -> Recipe:
    """The recipe with all of the base on the device, as a base is that processes divide."""
    base = recipe.base.model_copy(update={"residency": "device", "streamed_blocks": None})
    memory = recipe.memory.model_copy(update={"host_embeddings": False})
    return recipe.model_copy(update={"base": base, "memory": memory})


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
        wire_bytes: Bytes that a card receives in a step.
        step_seconds: Link within a machine, or "A + B" with the one between machines -> seconds of a step.
    """

    way: Way
    num_sharing: int
    peak_bytes: int
    base_bytes: int
    wire_bytes: int
    fits: bool | None
    step_seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def process_plans(plan: Plan, resident: Plan, num_processes: int, num_hosts: int = 1) -> list[ProcessPlan]:
    """The ways to hold the base on so many cards, each on a machine with equally many of them.

    Args:
        plan: Of one card that holds the base as the recipe says.
        resident: Of one card that holds all of it, as a divided base is held.
    """
    found = [_process_plan(plan, "replicate", 1, num_processes, num_hosts)]
    if resident.division is not None and num_processes > 1:
        found.append(_process_plan(resident, "shard", num_processes, num_processes, num_hosts))
        if 1 < num_hosts < num_processes:
            found.append(_process_plan(resident, "hybrid", num_processes // num_hosts, num_processes, num_hosts))
    return found


def _process_plan(plan: Plan, way: Way, size: int, num_processes: int, num_hosts: int) -> ProcessPlan:
    found = divided(plan, size)
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
    forward = division.forward_seconds
    waits = simulated_step(plan.num_blocks, range(plan.num_blocks), gather, forward, 2 * forward).waiting_seconds
    ends = share * (division.table_bytes + division.head_bytes) / rate
    return passes * (single + waits + ends)


def process_lines(found: list[ProcessPlan], num_processes: int, num_hosts: int) -> list[str]:
    """A line for each way, and which one that fits is fastest, in words."""
    where = f"{num_processes} cards" if num_hosts == 1 else f"{num_processes} cards in {num_hosts} machines"
    lines = [f"On {where}, each card (train.parallel):"]
    for each in found:
        times = ", ".join(f"{seconds:.2g} s over {link}" for link, seconds in each.step_seconds.items())
        verdict = "" if each.fits is None else f" ({'fits' if each.fits else 'does not fit'})"
        lines.append(
            f"  {each.way}: {size_text(each.peak_bytes)}{verdict}, of which {size_text(each.base_bytes)} base; "
            f"{size_text(each.wire_bytes)} received in a step; a step takes {times}."
        )
    able = [each for each in found if each.fits is not False]
    if not able:
        return [*lines, "  None of these fits."]
    fastest = {link: min(able, key=lambda each: each.step_seconds[link]).way for link in found[0].step_seconds}
    lines.append(f"  Fastest that fits: {', '.join(f'{way} over {link}' for link, way in fastest.items())}.")
    return lines
