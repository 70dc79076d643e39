"""The price of DoRA where it is highest: steps of one micro-batch, each of which pays for the norms alone.

    python benchmarks/one_micro_batch.py [--rows 4] [--length 128] [--rounds 15] [--out FILE] [--smoke]

SmolLM2-135M in NF4, rank 16 on all linear layers, bf16, no checkpointing, every token labelled: forward, backward,
clipping and update. qdora's adapters train in its own loop, PEFT's as their users train them (step_time.py). The floors
are forward and backward of the frozen NF4 model and of the 16-bit one, with the gradient of their input embeddings and
without adapters. All take turns on the same tokens; a ratio is the median of the ratios of the same round.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS
from measure import RESULTS, facts, in_turns, ratio, spread, write
from mixed_data import base_model, random_step, recipe, smoke_model
from step_time import RANK, model_of, trainer

from qdora.data.loader import Step
from qdora.memory.allocator import keep_freed_memory

NAMES = ("own_dora", "own_lora", "peft_lora", "peft_dora", "frozen", "dense")
RATIOS = (
    ("own_dora", "own_lora"),
    ("own_dora", "peft_lora"),
    ("peft_dora", "peft_lora"),
    ("own_dora", "peft_dora"),
    ("own_dora", "frozen"),
    ("own_dora", "dense"),
)
BARS = {"own_dora / own_lora": 1.05, "own_dora / peft_lora": 1.0}


def main() -> None:
    """All contenders in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "one_micro_batch.json")
    parser.add_argument("--smoke", action="store_true", help="a random model and two rounds: shows that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.length, args.rounds = 2, 8, 2
    keep_freed_memory()
    steps = {name: step_of(name, smoke=args.smoke) for name in NAMES}
    step = random_step([[args.length] * args.rows], torch.Generator().manual_seed(0))
    turns = {name: functools.partial(each, step) for name, each in steps.items()}
    seconds = in_turns(turns, args.rounds, warmup=2)
    ratios = {f"{first} / {second}": ratio(seconds[first], seconds[second]) for first, second in RATIOS}
    result = facts(f"python benchmarks/one_micro_batch.py --rounds {args.rounds}") | {
        "rank": RANK,
        "rows": args.rows,
        "length": args.length,
        "seconds": seconds,
        "tokens_per_second": {
            name: spread([args.rows * args.length / taken for taken in each]) for name, each in seconds.items()
        },
        "ratios": ratios,
        "bars": BARS,
        "passes": {name: ratios[name]["median"] <= bar for name, bar in BARS.items()},
    }
    write(args.out, result)


def step_of(name: str, *, smoke: bool) -> Callable[[Step], object]:
    """What makes one step of a contender, its model in training mode."""
    contender = CONTENDERS[name]
    if contender.kind is not None:
        return trainer(name, model_of(name, "off", smoke=smoke))
    quant = "none" if contender.engine == "dense" else "nf4"
    model = smoke_model() if smoke else base_model(recipe(Path(), batch=1, checkpointing=False, quant=quant))
    return functools.partial(floor_step, model.train())


def floor_step(model: Any, step: Step) -> None:
    """Forward and backward of a model without adapters, down to the embeddings of its tokens."""
    (batch,) = step.micro_batches
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=batch.labels, use_cache=False).loss.backward()


if __name__ == "__main__":
    main()
