"""Time of SmolLM2-135M's training steps with compiled blocks (`train.compile`) against uncompiled ones.

    OMP_NUM_THREADS=2 python benchmarks/compile_time.py [--rounds 10] [--checkpointing on|off] [--smoke]

NF4 in blocks of 64, DoRA of rank 16 on all linear layers, bf16, qdora's own loop on random tokens, all of them
labelled. Both models take the same steps in turns, each the first in every second round:

- "4 x 128": one micro-batch of 4 rows of 128 tokens, so that each micro-batch pays its norms;
- "mixed": four micro-batches of other lengths, one of them with padding.

The first steps, in which torch compiles, are timed apart, and the compilations are counted. The losses of both are
kept: they differ by rounding.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from measure import facts, in_turns, parser_of, ratio, spread, write
from mixed_data import random_step
from step_time import RANK, model_of, own_step
from torch._dynamo.testing import CompileCounterWithBackend

from qdora.data.loader import Step
from qdora.memory.allocator import keep_freed_memory
from qdora.model.inject import adapter_parameters
from qdora.train import compiled_blocks
from qdora.train.optimizer import AdapterOptimizer

NAMES = ("eager", "compiled")
MOST_COMPILATIONS = 2
# Tokens of the rows of each micro-batch of a step.
CASES: dict[str, tuple[tuple[int, ...], ...]] = {
    "4 x 128": ((128,) * 4,),
    "mixed": ((256,) * 2, (61,) * 8, (500,), (117, 117, 117, 77)),
}
SMOKE: dict[str, tuple[tuple[int, ...], ...]] = {"4 x 128": ((8,) * 2,), "mixed": ((12,), (7, 7, 5))}


def main() -> None:
    """All cases, with and without checkpointing."""
    args = arguments()
    keep_freed_memory()
    result: dict[str, Any] = facts(f"python benchmarks/compile_time.py --rounds {args.rounds}")
    result |= {"rank": RANK, "num_rounds": args.rounds, "cases": {}}
    for mode in ("off", "on") if args.checkpointing is None else (args.checkpointing,):
        result["cases"][mode] = measured(mode, args)
    found = result["cases"].values()
    passes = all(case["runs_compiled"] and case["num_compilations"] <= MOST_COMPILATIONS for case in found)
    write(args.out, result | {"passes": passes})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "compile_time", smoke="a random model and two rounds")
    parser.add_argument("--checkpointing", choices=("on", "off"))
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    args.rounds = 2 if args.smoke else args.rounds
    return args


def measured(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the steps of both models in turns, what compiling took, and the losses."""
    models = {name: model_of("own_dora", mode, smoke=args.smoke) for name in NAMES}
    optimizers = {name: AdapterOptimizer(adapter_parameters(model)) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in NAMES}
    cases = SMOKE if args.smoke else CASES
    steps = {case: random_step(lengths, torch.Generator().manual_seed(0)) for case, lengths in cases.items()}

    def train(name: str, *some: Step) -> None:
        losses[name] += [own_step(models[name], optimizers[name], step) for step in some]

    counter = CompileCounterWithBackend(compiled_blocks.BACKEND)
    with compiled_blocks.compiled_blocks(models["compiled"], counter):
        first = in_turns({name: functools.partial(train, name, *steps.values()) for name in NAMES}, 1, warmup=0)
        found = {}
        for case, step in steps.items():
            turns = {name: functools.partial(train, name, step) for name in NAMES}
            taken = in_turns(turns, args.rounds)
            found[case] = {
                "num_tokens": step.num_tokens,
                "seconds": taken,
                "step_seconds": {name: spread(each) for name, each in taken.items()},
                "compiled / eager": ratio(taken["compiled"], taken["eager"]),
            }
        failed = any(block.forward.region.has_failed for block in models["compiled"].model.layers)
    return {
        "num_compilations": counter.frame_count,
        "runs_compiled": not failed,
        "first_steps_seconds": {name: taken for name, (taken,) in first.items()},
        "steps": found,
        "losses": losses,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["eager"], losses["compiled"], strict=True)),
    }


if __name__ == "__main__":
    main()
