"""A memory plan: live bytes of each moment of a step by component, their peak, and a roofline's time of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
import yaml
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from qdora.adapter.rows import divided_tensors, is_cut_by_rows
from qdora.memory.stream import NUM_SLOTS, Turns
from qdora.model.checkpoint import tied_weights
from qdora.model.inject import linear_layers
from qdora.model.load import Quantization, block_list, chosen_layers, layers_to_quantize, quantization_of
from qdora.quant.packed import empty_packed
from qdora.recipe.section import size_text
from qdora.recipe.settings import BaseWeightsConfig

GIB, MIB = 2**30, 2**20
DeviceKind = Literal["cuda", "cpu"]

COMPONENTS = (  # of a plan, in the order of the table
    BASE := "packed base",  # codes of the quantised linear layers, or their 16-bit weights
    SCALES := "block scales",
    MASKS := "masks",  # of a pruned base, a bit for each weight
    DENSE := "embeddings, head, norms",  # all other frozen weights
    ADAPTERS := "adapters",  # lora_A, lora_B, magnitudes, and ||W||^2 of each row
    KEPT := "kept norms and scales",  # made once a step: norms, gains, s g B, decoded block scales
    OPTIMIZER := "optimizer state",  # and the low bits of bf16 parameters
    GRADIENTS := "gradients",  # of the trainable parameters, float32
    CHECKPOINTS := "checkpoints",  # inputs of the blocks
    FORWARD := "activations",  # other tensors that the forward pass keeps
    BACKWARD := "workspace of a block",  # its backward pass, with recomputed activations
    LOSS := "logits and loss",  # one chunk of logits, and the gradient of the hidden states
    UPDATE := "workspace of the update",  # a group in float32
    CALIBRATION
    := "calibration",  # once, before the first step: a dense block, its inputs, and X^T X of its layers
    STREAMING := "streaming slots",
    GATHERED := "gathered blocks",  # whole blocks of a divided base, and what they are gathered into
    CONTEXT := "context and libraries",  # of the process before the first tensor, a constant
    NCCL := "NCCL buffers",  # a constant
    SLACK := "allocator slack",  # rounding and fragmentation, a constant share
    OTHER := "other",  # ids, masks, positions
)

# What a process holds besides its tensors. cuda: a round number, not yet measured. cpu: the rounded median of the runs
# in benchmarks/results/plan_accuracy.json, measured_rss_bytes less planned tensors.
CONTEXT_BYTES: Mapping[DeviceKind, int] = {"cuda": 600 * MIB, "cpu": 600 * MIB}
# Of a group of processes on each of its GPUs, not yet measured; github.com/NVIDIA/nccl/issues/964 has 544 to 688 MB.
NCCL_BYTES = GIB
# Share of the tensors' bytes that the allocator holds besides, for it rounds blocks up; an estimate, not yet measured.
SLACK_SHARE: Mapping[DeviceKind, float] = {"cuda": 0.02, "cpu": 0.0}


@dataclass(frozen=True)
class Moment:
    """A part of a step: loading, norms, forward, loss, backward or update, or compression before it.

    by_component: Component -> bytes alive at its own peak.
    """

    phase: str
    block: int | None
    by_component: Mapping[str, int]

    def changed(self, sizes: Mapping[str, int]) -> Moment:
        sizes = {**self.by_component, **sizes}
        return replace(self, by_component={name: size for name, size in sizes.items() if size})

    @property
    def num_bytes(self) -> int:
        return sum(self.by_component.values())

    @property
    def name(self) -> str:
        return self.phase + ("" if self.block is None else f" of block {self.block}")


@dataclass(frozen=True)
class MicroBatchShape:
    """A micro-batch of (rows, length) token ids with padding."""

    rows: int
    length: int
    num_labels: int  # labelled positions
    masked: bool  # attention gets a mask, for padded or packed rows
    packed: bool = False  # rows hold several examples
    accumulated: bool = False  # the step has earlier micro-batches, whose gradients already exist

    @property
    def num_tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Change:
    """A change that needs less memory; its peak and step time are those with all earlier changes."""

    setting: str
    peak_bytes: int
    step_seconds: float
    neutral: bool  # the trained numbers stay the same, up to rounding


@dataclass(frozen=True)
class Division:
    """The tensors of a base that processes divide."""

    # Component, length of the dimension that is cut, bytes of one of its entries -> how many tensors
    cuts: Mapping[tuple[str, int, int], int]
    block_bytes: int  # gathered for the largest block
    blocks_bytes: int  # gathered for all of them
    table_bytes: int  # of the embeddings; a tied one counts as head
    head_bytes: int
    tied: bool  # the head is held from the embedding on

    def held(self, size: int) -> dict[str, int]:
        """Component -> bytes that each of `size` processes holds: as much as the first, since torch pads the others."""
        sizes: dict[str, int] = {}
        for (component, length, num_bytes), count in self.cuts.items():
            sizes[component] = sizes.get(component, 0) + count * -(-length // size) * num_bytes
        return sizes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory and time that a run needs; a mixture of experts is planned for the worse of two routings."""

    device_kind: DeviceKind
    moments: Sequence[Moment]
    shape: MicroBatchShape
    num_micro_batches: int  # the most of a step
    recipe: Any = None  # with the neutral changes that it needs to fit
    num_groups: int = 0  # of processes that the card's process communicates in
    assumptions: Sequence[str] = ()  # one sentence for each thing that could not be known
    host_bytes: int = 0  # pinned, for streamed blocks and checkpoints
    # Packed weights of the largest block that could be streamed; 0 if none can, as on a CPU
    block_bytes: int = 0
    num_blocks: int = 0
    num_streamed: int = 0
    num_trainable: int = 0
    num_weights: int = 0
    step_seconds: float | None = None  # an estimate
    compress_seconds: float | None = None  # an estimate: once, of a base whose inputs are measured
    forward_seconds: float = 0.0  # of a micro-batch through the blocks
    rates: Mapping[str, Any] = field(default_factory=dict)
    budget_bytes: int | None = None
    changes: Sequence[Change] = ()  # until the run fits, cheapest first; each adds to the ones before
    even_routing_bytes: int | None = None  # peak of a mixture whose tokens divide evenly
    stored_shape: str | None = None  # where the shape was read, if it is one of `public_shapes`
    longest_row: int = 0  # tokens of the longest row of all shapes
    context_length: int | None = None  # tokens that the model's positions allow; None: not known, or no limit
    division: Division | None = None  # what several processes could divide; None without a list of blocks

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.num_bytes)

    @property
    def tensor_bytes(self) -> int:
        return self.peak.num_bytes

    @property
    def components(self) -> dict[str, int]:
        """Component -> bytes at the peak, constants included, in the order of `COMPONENTS`."""
        sizes = {
            **self.peak.by_component,
            CONTEXT: CONTEXT_BYTES[self.device_kind],
            NCCL: self.num_groups * NCCL_BYTES if self.device_kind == "cuda" else 0,
            SLACK: round(self.tensor_bytes * SLACK_SHARE[self.device_kind]),
        }
        return {name: sizes[name] for name in COMPONENTS if sizes.get(name)}

    @property
    def peak_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def fits(self) -> bool | None:
        return None if self.budget_bytes is None else self.peak_bytes <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        computed = (
            "moments",
            "recipe",
            "division",
            "device_kind",
            "shape",
            "changes",
            "num_groups",
            "forward_seconds",
        )
        return {
            "device": self.device_kind,
            "peak_bytes": self.peak_bytes,
            "tensor_bytes": self.tensor_bytes,
            "peak_in": self.peak.name,
            "components": self.components,
            "fits": self.fits,
            "micro_batch": {**vars(self.shape), "num_tokens": self.shape.num_tokens},
            **{name: value for name, value in vars(self).items() if name not in computed},
            "changes": [vars(change) for change in self.changes],
        }


def seconds_text(seconds: float) -> str:
    """A time to two digits, or in whole seconds if that is more: 0.034 s, 1,340 s."""
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def over_budget(plan: Plan) -> str:
    """The error of a run over its budget, in one line."""
    parts = sorted(plan.components.items(), key=lambda item: -item[1])[:3]
    largest = ", ".join(f"{name} {size_text(size)}" for name, size in parts)
    budget, peak = size_text(plan.budget_bytes or 0), size_text(plan.peak_bytes)
    fault = f"memory.budget: {budget}, but the run needs about {peak} in the {plan.peak.name} ({largest})."
    settings = "; ".join(change.setting for change in plan.changes)
    enough = plan.changes and plan.changes[-1].peak_bytes <= (plan.budget_bytes or 0)
    settings += "" if enough or not settings else " (even all of these are not enough)"
    return f"{fault} Fix: {f'change, cheapest first: {settings}; or ' if settings else ''}start anyway with --force."


PCIE_4 = 25e9  # bytes a second in each direction: 80 % of the stated 31.5 GB/s


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: FLOPs in 16-bit products, bytes of its memory, and bytes from the host."""

    name: str
    flops: float
    bytes: float
    link: float = PCIE_4


ASSUMED: Mapping[DeviceKind, Rates] = {
    "cuda": Rates("A100 40GB (assumed)", 156e12, 1.2e12),  # data sheet: half of 312 TFLOP/s, 80 % of 1,555 GB/s
    "cpu": Rates("two CPU cores (assumed)", 1e12, 10e9),  # with AVX512-BF16 (benchmarks, layer times)
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step computes and moves, and its estimated time."""

    num_linear: int  # weights of the linear layers inside the blocks, which are all dequantised in each pass
    num_head: int
    num_trainable: int
    attention_width: int  # query features of all blocks together: heads * head size * blocks
    quantised: bool
    checkpointing: bool
    share_met: float = 1.0  # share of num_linear that a token meets; less than 1 in a mixture of experts
    head_chunk: int | None = None  # labelled tokens whose logits exist at once; None: all
    full: bool = False  # the base itself is trained
    streamed_bytes: int = 0  # from the host in each pass over the blocks

    def decode_seconds(self, rates: Rates) -> float:
        # A pass reads packed weights (0.5 bytes) and scales, and writes and reads dense tiles (2 + 2)
        return self.num_linear * (4.6 if self.quantised else 2.0) / rates.bytes

    def forward_seconds(self, shape: MicroBatchShape, rates: Rates) -> float:
        """Of a micro-batch through the blocks, without attention."""
        return 2.0 * shape.num_tokens * self.num_linear * self.share_met / rates.flops + self.decode_seconds(
            rates
        )

    def step_seconds(self, shape: MicroBatchShape, num_micro_batches: int, rates: Rates) -> float:
        """Estimated time of an optimizer step.

        FLOPs: 2 per weight and token in each pass: forward, recomputation, gradient of the inputs (and of the weights,
        if trained); causal attention: half of 4 * length per query feature and token, 2.5 times that backward. Bytes:
        dequantising in each pass, whose time is added, and 30 per trainable parameter in the update. Loss: its two
        products, or the head's 16-bit weights for each chunk of them, whichever takes longer.
        """
        passes = 2 + self.checkpointing
        weights = self.num_linear * (passes + self.full) + self.num_trainable * (passes + 1) * (not self.full)
        # Of the adapters, too, as if they were in proportion to their layers
        products = weights * self.share_met
        attention = shape.length * self.attention_width * (1 + self.checkpointing + 2.5)
        seconds = 2.0 * shape.num_tokens * (products + attention) / rates.flops + passes * self.decode_seconds(
            rates
        )
        num_chunks = -(-shape.num_labels // (self.head_chunk or max(shape.num_labels, 1)))
        seconds += 4.0 * self.num_head * max(shape.num_labels / rates.flops, num_chunks / rates.bytes)
        seconds += waiting_seconds(self.streamed_bytes / rates.link, self.forward_seconds(shape, rates))
        return num_micro_batches * seconds + 30.0 * self.num_trainable / rates.bytes


def waiting_seconds(link: float, forward: float) -> float:
    """What two passes wait for blocks that take `link` seconds; the backward pass computes twice as long."""
    return max(0.0, link - forward) + max(0.0, link - 2 * forward)


def of_card(plan: Plan, num_sharing: int, num_processes: int) -> Plan:
    """The plan of one of the cards of a run whose base `num_sharing` processes divide; 1: each holds all of it."""
    # Of all processes; of a hybrid run also of those that divide one base, and of those of other machines
    num_groups = 0 if num_processes == 1 else 3 if 1 < num_sharing < num_processes else 1
    plan, division = replace(plan, num_groups=num_groups), plan.division
    if num_sharing == 1 or division is None:
        return plan
    whole, held, head = division.held(1), division.held(num_sharing), division.head_bytes
    blocks = 3 * division.block_bytes  # the one in use, what it was gathered into, and the next one on its way
    gathered = {"forward": blocks + division.tied * head, "loss": head, "backward": blocks}
    once = [moment for moment in plan.moments if moment.phase == "compression"]  # by one process
    moments: list[Moment] = []
    for moment in plan.moments[len(once) :]:
        less = {name: max(0, moment.by_component.get(name, 0) - whole[name]) + held[name] for name in whole}
        moment = moment.changed(less)
        # Embedding and head are gathered before they compute, beside what they are gathered into.
        if moment.phase == "forward" and not any(each.phase == "forward" for each in moments):
            before = moments[-1] if moments else moment
            first = 2 * (head if division.tied else division.table_bytes)
            moments.append(replace(before, phase="forward", block=None).changed({GATHERED: first}))
        if moment.phase == "loss":
            moments.append(moment.changed({LOSS: 0, GATHERED: division.block_bytes + 2 * head}))
        moments.append(moment.changed({GATHERED: gathered.get(moment.phase, 0)}))
    return replace(plan, moments=[*once, *moments], block_bytes=0)  # no block of a divided base can be streamed


def division_of(
    model: PreTrainedModel, wanted: Quantization, dtype: torch.dtype, *, pruned: bool
) -> Division | None:
    """Of a model on the meta device, whose linear layers are not yet replaced; None without blocks."""
    found = block_list(model)
    if found is None:
        return None
    chosen, quantised = chosen_layers(model, wanted), layers_to_quantize(model, wanted)
    shared = {name for pair in tied_weights(model).items() for name in pair}
    layers = linear_layers(model)
    cuts: Counter[tuple[str, int, int]] = Counter()
    sizes: dict[str, int] = {}
    for path in (path for path in layers if f"{path}.weight" not in shared):
        rows, columns = map(int, layers[path].weight.shape)  # type: ignore[arg-type]
        form: Any = torch.empty((rows, columns), dtype=dtype, device="meta")
        if path in quantised:
            form = empty_packed(wanted.kind, (rows, columns), wanted.block_size, wanted.double_quant, "meta")
        masked = pruned and path in chosen
        bits = torch.empty(-(-rows * columns // 8), dtype=torch.uint8, device="meta") if masked else None
        names = {
            "weight": BASE if path in chosen else DENSE,
            "packed": BASE,
            "absmax": SCALES,
            "zeros": SCALES,
            "keep_bits": MASKS,
        }
        sizes[path] = 0
        for name, tensor in divided_tensors(form, bits).items():  # as `ShardedBase` cuts them
            length = rows if is_cut_by_rows(form, masked=masked) else tensor.numel()
            cuts[names[name], length, tensor.nbytes // length] += 1
            sizes[path] += tensor.nbytes // length * length
    prefixes = [f"{found[0]}.{index}." for index in range(len(found[1]))]
    blocks = [sum(size for path, size in sizes.items() if path.startswith(prefix)) for prefix in prefixes]
    tables = [module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding)]
    cuts.update((DENSE, rows, columns * dtype.itemsize) for rows, columns in tables)
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


# Read the input of q_proj or gate_proj, and share its X^T X and factor
_SHARING = ("k_proj", "v_proj", "up_proj")
_COLUMN_SECONDS = 2e-4  # of a sweep: 25 small kernels of 8 us


def compression(
    model: PreTrainedModel, base: BaseWeightsConfig, work: Work, rates: Rates, dtype: torch.dtype
) -> tuple[int, float]:
    """Of a base whose inputs are measured: bytes beside the embeddings, and seconds without reading the files.

    Bytes: the largest block in `dtype` and X^T X of its inputs in float32, inputs and outputs of all tokens, twice the
    largest X^T X for its factor, four float32 copies of a weight. FLOPs: two forward passes; at the rate of float32, a
    16th, 2 tokens in^2 for X^T X, 4/3 in^3 for its factor, out in^2 for the sweep.
    """
    found, measured, config = block_list(model), base.measured, model.config.get_text_config()
    if found is None or measured is None:
        return 0, 0.0
    num_tokens, blocks = measured[1].sequences * measured[1].length, Counter[str]()
    flops, num_columns, workspace = 0.0, 0, 0
    for path in chosen_layers(model, quantization_of(base)):
        if not path.startswith(f"{found[0]}."):
            continue
        layer: Any = model.get_submodule(path)
        (rows, columns), experts = layer.weight.shape, getattr(layer, "num_experts", 1)
        squares = columns**2 if base.corrects else 0
        num_products = 0 if path.endswith(_SHARING) else experts
        met = (
            num_tokens * (getattr(config, "num_experts_per_tok", 1) if experts > 1 else 1) * bool(num_products)
        )
        blocks[path.removeprefix(f"{found[0]}.").partition(".")[0]] += (
            rows * columns * dtype.itemsize + 4 * squares * num_products
        )
        flops += squares * (rows + 2 * met + 4 / 3 * columns * num_products)
        num_columns += columns * experts * bool(squares)
        workspace = max(workspace, 8 * squares + 16 * rows * columns // experts)
    hidden = 2 * num_tokens * int(config.hidden_size) * dtype.itemsize
    passes = 4.0 * num_tokens * work.num_linear * work.share_met
    seconds = (passes + 16 * flops) / rates.flops + num_columns * _COLUMN_SECONDS
    return max(blocks.values(), default=0) + hidden + workspace, seconds


@dataclass(frozen=True)
class StreamedBlocks:
    """Bytes of all packed tensors (`codes`, `scales`), of the largest block, and of pinned host memory."""

    num_streamed: int
    codes: int
    scales: int
    block_bytes: int
    host_bytes: int


def streamed_blocks(model: PreTrainedModel, wanted: Quantization, num_streamed: int | None) -> StreamedBlocks:
    """Sizes of streamed blocks (None: all) of a model on the meta device, whose layers are not yet replaced."""
    turns, codes, scales = Turns(model, num_streamed), 0, 0
    for path in layers_to_quantize(model, wanted):
        piece = turns.piece_of(path)
        if piece is not None:
            rows, columns = model.get_submodule(path).weight.shape
            packed = empty_packed(wanted.kind, (rows, columns), wanted.block_size, wanted.double_quant, "meta")
            piece.add(path, packed)
            codes += packed.packed.nbytes
            scales += packed.num_bytes - packed.packed.nbytes
    sizes = [piece.num_bytes for piece in turns.pieces.values()]
    return StreamedBlocks(len(sizes), codes, scales, max(sizes), sum(sizes))


def with_streamed(moments: Sequence[Moment], streamed: StreamedBlocks) -> list[Moment]:
    """The moments with these blocks off the device: without their bytes, but with the slots."""
    more = {BASE: -streamed.codes, SCALES: -streamed.scales, STREAMING: NUM_SLOTS * streamed.block_bytes}
    return [
        m.changed({name: m.by_component.get(name, 0) + size for name, size in more.items()}) for m in moments
    ]


def with_offloaded(moments: Sequence[Moment], num_blocks: int) -> tuple[list[Moment], int]:
    """The moments with checkpoints on the host, and the pinned memory that these take.

    On the device are at most three: that of the block in its pass, one that is being copied, and the last one.
    """
    sizes = [moment.by_component.get(CHECKPOINTS, 0) for moment in moments]
    single = max(sizes, default=0) // max(num_blocks, 1)
    here = [
        moment.changed({CHECKPOINTS: min(size, 3 * single)})
        for moment, size in zip(moments, sizes, strict=True)
    ]
    # torch rounds pinned memory up to a power of two.
    return here, (1 << max(single - 1, 0).bit_length()) * max(num_blocks - 1, 0)


@dataclass(frozen=True)
class PublicShape:
    """Keys of config.json that decide the architecture of a model, the page they are from, and the model's context."""

    values: dict[str, Any]
    source: str
    context: int | None = None  # in tokens; None: not known, and that of `config` is the default of its class

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(**self.values)


@cache
def public_shapes() -> dict[str, PublicShape]:
    """Hub id -> shape of every model in the file."""
    data = yaml.safe_load(
        resources.files("qdora.plan").joinpath("public_shapes.yaml").read_text(encoding="utf-8")
    )
    contexts = {each: length for length, names in data["contexts"].items() for each in names}
    shapes: dict[str, PublicShape] = {}
    for model in data["models"]:
        source = data["sources"].get(model["source"], model["source"])
        for name in model["names"]:
            lengths = (length for each, length in contexts.items() if fnmatchcase(name, each))
            shapes[name] = PublicShape(model["config"], source, next(lengths, None))
    return shapes
