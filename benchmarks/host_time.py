"""Host time of one adapted layer: what Python and torch take to call it, where the arithmetic takes next to nothing.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py [--rounds 25] [--calls 200] [--out FILE] [--smoke]

A GPU waits for its host where the layers are called more slowly than it works: with few tokens a micro-batch, and in
decoding. Here the layer is 64 x 64 in NF4 with rank 16, in bf16, and sees one token, on the CPU. The contenders take
turns; a reading is the mean of so many calls. "forward" keeps the graph, as in training. qdora finds its norms and
operands prepared, as the micro-batches of a step do (`prepare_gains` is called once a step). A GPU runs other kernels,
and how many of them is in roofline.json.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from contenders import CONTENDERS, layer_on, random_base
from measure import facts, in_turns, parser_of, ratio, spread, write
from torch import nn

from qdora.train.optimizer import AdapterOptimizer

NAMES = ("frozen", "own_lora", "own_dora", "peft_lora", "peft_dora")
RATIOS = (("own_dora", "own_lora"), ("own_dora", "peft_lora"), ("own_lora", "peft_lora"), ("peft_dora", "peft_lora"))
BAR, MOST = "own_dora / peft_lora", 1.0
SIZE, RANK = 64, 16


def main() -> None:
    """Forward alone, then forward and backward."""
    parser = parser_of(__doc__, "host_time", smoke="two rounds of two calls")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--calls", type=int, default=200, help="of each contender in each round")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.calls = 2, 2
    base = random_base(SIZE, SIZE)
    layers = {name: layer_on(base, CONTENDERS[name], RANK) for name in NAMES}
    for name in ("own_lora", "own_dora"):
        AdapterOptimizer(dict(layers[name].named_parameters()))  # lets gradients of bf16 parameters stay float32
    passes = {"forward": forward, "forward and backward": forward_and_backward}
    found = {}
    for name, each in passes.items():
        turns = {layer: functools.partial(repeated, each, module, args.calls) for layer, module in layers.items()}
        taken = in_turns(turns, args.rounds, warmup=2)
        seconds = {layer: [whole / args.calls for whole in rounds] for layer, rounds in taken.items()}
        found[name] = {
            "seconds": {layer: spread(each) for layer, each in seconds.items()},
            "ratios": {f"{first} / {second}": ratio(seconds[first], seconds[second]) for first, second in RATIOS},
        }
    result = facts(f"python benchmarks/host_time.py --rounds {args.rounds} --calls {args.calls}") | {
        "size": SIZE,
        "rank": RANK,
        "num_rounds": args.rounds,
        "passes": found,
        "bar": {BAR: MOST},
        "within": {name: each["ratios"][BAR]["median"] <= MOST for name, each in found.items()},
    }
    write(args.out, result)


def repeated(call: Callable[[nn.Module], object], layer: nn.Module, number: int) -> None:
    """Call it so many times."""
    for _ in range(number):
        call(layer)


def token() -> torch.Tensor:
    """The input in the shape in which a model passes it, (1, 1, 64) bf16."""
    return torch.ones(1, 1, SIZE, dtype=torch.bfloat16, requires_grad=True)


def forward(layer: nn.Module) -> torch.Tensor:
    """One forward pass that keeps its graph."""
    found: torch.Tensor = layer(token())
    return found


def forward_and_backward(layer: nn.Module) -> None:
    """Both passes. Gradients of the adapter add up, as over the micro-batches of a step."""
    found = forward(layer)
    found.backward(found.detach())


if __name__ == "__main__":
    main()
