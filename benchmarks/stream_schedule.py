"""How much of the copying a step hides: blocks streamed from host memory on a simulated device.

    python benchmarks/stream_schedule.py [--out benchmarks/results/stream_schedule.json] [--smoke]

The ring that real runs use drives a clock instead of a GPU: one channel of 25 GB/s, one computation of 156 TFLOP/s, as
stated for an A100 40 GB on PCIe 4. The model is Llama-3.3-70B's 80 blocks in NF4 with double quantisation. A block
takes 2 FLOPs a weight and token forward and 4 backward, its recomputation included; what dequantising takes is left
out, so real steps hide more. Break-even: T* = bytes per weight * FLOP/s / (2 * bandwidth) tokens, where a copy takes as
long as a forward pass. Below it no schedule is faster than the slower of copying and computing, in each of the two
passes.

Bars: every copy hidden at and above T*; below it within 5 % of the bound; 20 of 80 blocks slow a step of T* / 3 tokens
down by less than 1 % interleaved, where packed together they cost what the bound says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from measure import facts, parser_of, write

from qdora.memory.streaming import interleaved
from qdora.ops.packed import empty_packed
from qdora.plan.step_time import simulated_step

FLOPS, BANDWIDTH = 156e12, 25e9
NUM_BLOCKS = 80
# query, key and value, output; gate and up, down.
SHAPES = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28_672, 8192), (28_672, 8192), (8192, 28_672)]
SHARES_OF_BREAK_EVEN = (4.0, 2.0, 1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1)
NUM_STREAMED = (5, 10, 20, 40, 80)


def main() -> None:
    """Two sweeps: of tokens with all blocks streamed, and of the number of streamed blocks."""
    args = parser_of(__doc__, "stream_schedule", smoke="few blocks").parse_args()
    num_blocks = 8 if args.smoke else NUM_BLOCKS
    weights = sum(rows * columns for rows, columns in SHAPES)
    block_bytes = sum(empty_packed("nf4", shape, device="meta").num_bytes for shape in SHAPES)
    break_even = block_bytes / weights * FLOPS / (2 * BANDWIDTH)
    sizes = {"num_blocks": num_blocks, "weights": weights, "block_bytes": block_bytes}
    by_tokens = [step(range(num_blocks), share * break_even, sizes) for share in SHARES_OF_BREAK_EVEN]
    by_streamed = []
    for count in sorted({count * num_blocks // NUM_BLOCKS for count in NUM_STREAMED} - {0}):
        for share in (1 / 3, 1 / 6):
            spread, together = interleaved(num_blocks, count), range(num_blocks - count, num_blocks)
            arms = {
                "interleaved": step(spread, share * break_even, sizes),
                "packed": step(together, share * break_even, sizes),
            }
            by_streamed.append({"num_streamed": count, "share_of_break_even": share, **arms})
    above = [each for share, each in zip(SHARES_OF_BREAK_EVEN, by_tokens, strict=True) if share >= 1]
    below = [each for share, each in zip(SHARES_OF_BREAK_EVEN, by_tokens, strict=True) if share < 1]
    quarter = next(each for each in by_streamed if each["num_streamed"] == num_blocks // 4)
    result = {
        **facts("python benchmarks/stream_schedule.py"),
        "flops": FLOPS,
        "bytes_per_second": BANDWIDTH,
        **sizes,
        "break_even_tokens": break_even,
        "by_tokens": by_tokens,
        "by_streamed": by_streamed,
        "passes": {
            "all hidden above the break-even": all(each["hidden_share"] == 1 for each in above),
            "within 5 % of the bound below": all(abs(each["slowdown"] / each["bound"] - 1) < 0.05 for each in below),
            "interleaved costs less than 1 %": quarter["interleaved"]["slowdown"] < 1.01,
            "packed costs more": quarter["packed"]["slowdown"] > 1.05,
        },
    }
    write(args.out, result)


def step(streamed: Sequence[int], num_tokens: float, sizes: dict[str, int]) -> dict[str, Any]:
    """A step, and what it would take without copies, and with the best schedule that packs blocks so."""
    forward = 2 * sizes["weights"] * num_tokens / FLOPS
    copy = sizes["block_bytes"] / BANDWIDTH
    found = simulated_step(sizes["num_blocks"], streamed, copy, forward, 2 * forward)
    alone = 3 * forward * sizes["num_blocks"]
    late = max(copy, forward) + max(copy, 2 * forward) - 3 * forward
    return {
        "num_tokens": num_tokens,
        "seconds": found.seconds,
        "slowdown": found.seconds / alone,
        "bound": 1 + len(streamed) * late / alone,
        "hidden_share": 1 - found.waiting_seconds / found.copying_seconds if found.copying_seconds else 1.0,
    }


if __name__ == "__main__":
    main()
