"""An estimate of a step's time by a roofline: FLOPs, bytes of the device's memory, and bytes over a link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qdora.plan.plan_contents import DeviceKind, MicroBatchShape

BYTES_PER_DEQUANTISED = 4.6
"""Bytes moved for each dequantised weight: read packed (0.5), write and read the dense tile (2 + 2), and scales."""
PCIE_4 = 25e9
"""Bytes a second in each direction: 80 % of the 31.5 GB/s that are stated for PCIe 4.0 with 16 lanes."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: FLOPs in 16-bit products, bytes of its memory, and bytes from the host."""

    name: str
    flops: float
    bytes: float
    link: float = PCIE_4


ASSUMED: Mapping[DeviceKind, Rates] = {
    # NVIDIA's A100 40 GB data sheet: half of 312 TFLOP/s, and 80 % of 1,555 GB/s
    "cuda": Rates("A100 40GB (assumed)", 156e12, 1.2e12),
    # Two cores with AVX512-BF16 (benchmarks, layer times)
    "cpu": Rates("two CPU cores (assumed)", 1e12, 10e9),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step computes and moves.

    Attributes:
        num_linear: Weights of the linear layers inside the blocks.
        share_met: Share of them that a token meets; less than 1 in a mixture of experts. All are dequantised.
        attention_width: Query features of all blocks together: heads * head size * blocks.
        head_chunk: Labelled tokens whose logits exist at once; None: all.
        full: Whether the base itself is trained.
        streamed_bytes: Bytes that come from the host in each pass over the blocks.
        row_bytes: Bytes of a row of an embedding on the host; 0 if the embedding is on the device.
    """

    num_linear: int
    num_head: int
    num_trainable: int
    attention_width: int
    quantised: bool
    checkpointing: bool
    share_met: float = 1.0
    head_chunk: int | None = None
    full: bool = False
    streamed_bytes: int = 0
    row_bytes: int = 0

    @property
    def decoded_bytes(self) -> float:
        """Bytes that a pass over the blocks moves to have their weights dense."""
        return self.num_linear * (BYTES_PER_DEQUANTISED if self.quantised else 2.0)


def forward_seconds(work: Work, shape: MicroBatchShape, rates: Rates) -> float:
    """The forward pass of a micro-batch through the blocks, without attention."""
    products = 2.0 * shape.num_tokens * work.num_linear * work.share_met
    return products / rates.flops + work.decoded_bytes / rates.bytes


def waiting_seconds(link_seconds: float, forward: float) -> float:
    """What a micro-batch waits for blocks that take so long over a link, in each pass, beside the computing.

    The backward pass, with its recomputation, takes as long as two forward passes.
    """
    return max(0.0, link_seconds - forward) + max(0.0, link_seconds - 2 * forward)


def step_seconds(work: Work, shape: MicroBatchShape, num_micro_batches: int, rates: Rates) -> float:
    """Estimated time of an optimizer step.

    FLOPs: 2 per weight and token in each pass: forward, recomputation, gradient of the inputs (and of the weights, if
    they are trained). Causal attention: half of 4 * length per query feature and token, and 2.5 times that backward.
    Bytes: those of dequantising in each pass, and 30 per trainable parameter in the update. The two times are added,
    since tiles are dequantised between the products. The loss takes as long as its two products, or as reading the
    head's 16-bit weights for each chunk of them, whichever is longer.
    """
    passes = 2 + work.checkpointing
    weights = work.num_linear * (passes + work.full) + work.num_trainable * (passes + 1) * (not work.full)
    products = weights * work.share_met  # of the adapters, too, as if they were in proportion to their layers
    attention = shape.length * work.attention_width * (1 + work.checkpointing + 2.5)
    seconds = 2.0 * shape.num_tokens * (products + attention) / rates.flops + passes * work.decoded_bytes / rates.bytes
    num_chunks = -(-shape.num_labels // (work.head_chunk or max(shape.num_labels, 1)))
    seconds += 4.0 * work.num_head * max(shape.num_labels / rates.flops, num_chunks / rates.bytes)
    seconds += waiting_seconds(work.streamed_bytes / rates.link, forward_seconds(work, shape, rates))
    seconds += shape.num_tokens * work.row_bytes / rates.link
    return num_micro_batches * seconds + 30.0 * work.num_trainable / rates.bytes
