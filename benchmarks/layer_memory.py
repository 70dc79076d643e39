"""Bytes of one adapted layer: what it holds after forward, and what it needs for a moment in forward and backward.

    OMP_NUM_THREADS=2 python benchmarks/layer_memory.py [--out benchmarks/results/layer_memory.json] [--smoke]

Counted by `qdora.plan.live_bytes.LiveBytes` on real tensors: NF4 in blocks of 64 with double quantisation, bf16,
training mode, 1,024 tokens. Weights, adapters, the input x (whose gradient is asked for) and the gradient of the output
are there before and are not counted.

    held        alive after forward, the output among it
    saved       alive until backward if the reader of the output does not hold it; less what the layer keeps anyway
    gradients   of x, A, B and m: alive after backward
    transient   forward: peak - held; backward: peak - (held + gradients), at least 0. What neither is there before nor
                stays

A layer of ours computes what follows from its parameters in the first call after a change of them and keeps it: norm,
gain, 1 / m and s g (16 bytes per output row), s g B, and decoded block scales (4 bytes a block). `first` is that call,
`later` the next one, as in further micro-batches and in a checkpoint's recompute. PEFT does the same work in both.
Gradients of bf16 parameters of ours are float32, as in training.

Not seen, for anyone: what a kernel allocates within one operation. Seen only here: under the counter, autograd sums two
gradients of one tensor into a third; where PEFT's branches meet in x this adds up to one x (8 MiB at 4096 features).
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from contenders import CONTENDERS, layer_on, random_base, random_input
from measure import facts, parser_of, write
from torch import Tensor, nn

from qdora.ops.packed import PackedWeight
from qdora.plan.live_bytes import LiveBytes

MIB = 2**20
NAMES = (
    "own_lora",
    "own_dora",
    "own_lora_dropout",
    "own_dora_dropout",
    "peft_lora",
    "peft_dora",
    "peft_dora_addmm",
    "peft_lora_defaults",
    "peft_dora_defaults",
)
OWN = NAMES[:4]
# Of the larger shape: PEFT at the first rank only.
RANKS = (16, 64, 256, 512)
TRANSIENT_BAR, LARGE_TRANSIENT_BAR = 25 * MIB, 100 * MIB
HELD_BAR_PER_TOKEN = 64


def main() -> None:
    """Both shapes, then the bars."""
    args = parser_of(__doc__, "layer_memory", smoke="small layers").parse_args()
    torch.set_num_threads(2)
    tokens = 64 if args.smoke else 1024
    layer = (128, 192) if args.smoke else (4096, 11008)
    large = (192, 256) if args.smoke else (8192, 28672)
    result = {
        **facts("OMP_NUM_THREADS=2 python benchmarks/layer_memory.py"),
        "num_tokens": tokens,
        "layer": shape_result(layer, tokens, {16: NAMES}),
        "large_layer": shape_result(large, tokens, {rank: NAMES if rank == 16 else OWN for rank in RANKS}, args.smoke),
    }
    write(args.out, {**result, "passes": verdict(result)})


def shape_result(
    shape: tuple[int, int], num_tokens: int, names: dict[int, tuple[str, ...]], smoke: bool = False
) -> dict[str, Any]:
    """Of each rank (at most min(in, out) in a smoke run) and contender, on the same packed bytes.

    Args:
        shape: (in, out).
        names: Rank -> contenders.
    """
    in_features, out_features = shape
    base = random_base(in_features, out_features)
    ranks = {}
    for rank, contenders in names.items():
        usable = min(rank, in_features) if smoke else rank
        ranks[str(rank)] = {name: bytes_of(name, base, usable, num_tokens) for name in contenders}
    return {
        "in_features": in_features,
        "out_features": out_features,
        "packed_bytes": base.num_bytes,
        "output_bytes": num_tokens * out_features * 2,
        "ranks": ranks,
    }


def bytes_of(name: str, base: PackedWeight, rank: int, num_tokens: int) -> dict[str, dict[str, int]]:
    """`first` and `later` call of a new layer."""
    layer = layer_on(base, CONTENDERS[name], rank)
    if CONTENDERS[name].engine == "own":
        for parameter in layer.parameters():
            parameter.grad_dtype = torch.float32
    x, dy = random_input(base, num_tokens)
    return {call: bytes_of_call(layer, x, dy) for call in ("first", "later")}


def bytes_of_call(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, int]:
    """Forward and backward, from no gradients to none."""
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    gc.collect()
    with LiveBytes() as live:
        out = layer(x)
        held, forward_peak = live.live_bytes, live.peak_bytes
        live.reset_peak()
        out.backward(dy)
        backward_peak = live.peak_bytes
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        gradients = sum(grad.untyped_storage().nbytes() for grad in grads)
        del out, grads
        for leaf in leaves:
            leaf.grad = None
        kept = live.live_bytes
        # `sum` saves nothing but its input's shape.
        total = layer(x).sum()
        saved = live.live_bytes - total.element_size() - kept
        del total
    return {
        "held_bytes": held,
        "saved_bytes": saved,
        "kept_by_layer_bytes": kept,
        "gradient_bytes": gradients,
        "forward_transient_bytes": forward_peak - held,
        "backward_transient_bytes": max(backward_peak - held - gradients, 0),
    }


def transient(found: dict[str, dict[str, int]]) -> int:
    """The largest, of both calls and both passes."""
    return max(call[f"{which}_transient_bytes"] for call in found.values() for which in ("forward", "backward"))


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """Own QDoRA holds no more than one output and 64 bytes a token beyond own QLoRA, whether or not somebody else holds
    the output; its workspace is small at any rank.

    What a layer keeps from its first call on belongs to the layer, as its magnitudes do: it is not counted among
    what a token costs.
    """
    found = result["layer"]["ranks"]["16"]
    per_token = HELD_BAR_PER_TOKEN * result["num_tokens"]
    beyond = {
        what: found["own_dora"]["later"][f"{what}_bytes"] - found["own_lora"]["later"][f"{what}_bytes"]
        for what in ("held", "saved")
    }
    large = [each["own_dora"] for each in result["large_layer"]["ranks"].values()]
    return {
        "held beyond QLoRA, output held by its reader": beyond["held"] <= per_token,
        "held beyond QLoRA, output held by nobody else": beyond["saved"] <= result["layer"]["output_bytes"] + per_token,
        "transient": transient(found["own_dora"]) <= TRANSIENT_BAR,
        "transient with dropout": transient(found["own_dora_dropout"]) <= TRANSIENT_BAR,
        "transient of the large layer at any rank": all(transient(each) < LARGE_TRANSIENT_BAR for each in large),
    }


if __name__ == "__main__":
    main()
