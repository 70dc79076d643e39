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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, adapt
from measure import RESULTS, facts, in_turns, ratio, spread, write
from mixed_data import FixedSteps, base_model, fitted, recipe, recompute_activations, smoke_model
from rich.console import Console
from torch._dynamo.testing import CompileCounterWithBackend

from qdora.data.batching import IGNORED, MicroBatch
from qdora.data.loader import Step
from qdora.memory.allocator import keep_freed_memory
from qdora.model.inject import adapter_parameters
from qdora.recipe.train_settings import TrainConfig
from qdora.train import compiled_blocks
from qdora.train.optimizer import AdapterOptimizer

RANK, LR = 16, 1e-4
NAMES = ("eager", "compiled")
MOST_COMPILATIONS = 2
# (rows, tokens, tokens of the last row that are padding) of each micro-batch of a step.
CASES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "4 x 128": ((4, 128, 0),),
    "mixed": ((2, 256, 0), (8, 61, 0), (1, 500, 0), (4, 117, 40)),
}
SMOKE: dict[str, tuple[tuple[int, int, int], ...]] = {"4 x 128": ((2, 8, 0),), "mixed": ((1, 12, 0), (3, 7, 2))}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "compile_time.json")
    parser.add_argument("--checkpointing", choices=("on", "off"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="a random model and two rounds: shows that it runs")
    args = parser.parse_args()
    args.rounds = 2 if args.smoke else args.rounds
    return args


def measured(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the steps of both models in turns, what compiling took, and the losses."""
    models = {name: model_of(mode, smoke=args.smoke) for name in NAMES}
    optimizers = {name: AdapterOptimizer(adapter_parameters(model), lr=LR) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in NAMES}
    steps = {case: step_of(shapes) for case, shapes in (SMOKE if args.smoke else CASES).items()}

    def train(name: str, step: Step) -> None:
        settings = TrainConfig(steps=1, batch=1, lr=LR, schedule="constant", warmup=0)
        lines = fitted(models[name], optimizers[name], FixedSteps([step]), settings, console=Console(quiet=True))
        losses[name].append(lines[0]["loss"])

    counter = CompileCounterWithBackend(compiled_blocks.BACKEND)
    with compiled_blocks.compiled_blocks(models["compiled"], counter):
        first = {name: seconds(lambda n=name: [train(n, step) for step in steps.values()]) for name in NAMES}
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
        compiled = all(block.forward.region.compiled for block in models["compiled"].model.layers)
    return {
        "num_compilations": counter.frame_count,
        "runs_compiled": bool(compiled),
        "first_steps_seconds": first,
        "steps": found,
        "losses": losses,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["eager"], losses["compiled"], strict=True)),
    }


def model_of(mode: str, *, smoke: bool) -> Any:
    """The model in training mode, with adapters."""
    base = smoke_model() if smoke else base_model(recipe(Path(), batch=1, checkpointing=mode == "on"))
    if mode == "on":
        recompute_activations(base)
    return adapt(base, CONTENDERS["own_dora"], RANK).train()


def step_of(shapes: tuple[tuple[int, int, int], ...]) -> Step:
    """A step of micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for rows, length, padding in shapes:
        ids = torch.randint(1, 128, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length - padding :] = 0
        labels = torch.where(mask == 1, ids, IGNORED)
        labels[:, 0] = IGNORED
        numbers = [str(row) for row in range(rows)]
        parts.append(MicroBatch(ids, mask, labels, torch.zeros(rows, dtype=torch.int64), ["random"], numbers))
    num_labels = sum(int((part.labels != IGNORED).sum()) for part in parts)
    num_tokens = sum(int(part.attention_mask.sum()) for part in parts)
    return Step(parts, num_labels, num_tokens, sum(rows for rows, _, _ in shapes), 0)


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
