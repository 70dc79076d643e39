"""The price of DoRA where it is highest: steps of one micro-batch, each of which pays for the norms alone.

    python benchmarks/one_micro_batch.py [--rounds 15] [--out FILE] [--smoke]

SmolLM2-135M in NF4, rank 16 on all linear layers, bf16, no checkpointing, every token labelled: forward, backward,
clipping and update. qdora's adapters train in its own loop, PEFT's as their users train them (step_time.py). The floors
are forward and backward of the frozen NF4 model and of the 16-bit one, with the gradient of their input embeddings and
without adapters. All take turns on the same tokens; a ratio is the median of the ratios of the same round.

Of qdora's own steps it also times the parts that DoRA has and LoRA has not, or has less of: norms and operands before
the first micro-batch, and the gradient of the magnitudes. What is left of the difference is in no single part.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from contenders import CONTENDERS
from measure import alternating, facts, parser_of, ratio, spread, write
from mixed_data import base_model, random_step, recipe, smoke_model
from step_time import RANK, model_of, trainer

from qdora.data.loader import Step
from qdora.memory.allocator import keep_freed_memory
from qdora.ops import adapted_product
from qdora.train import passes

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
# The functions that a part of qdora's step runs in; none calls another.
PARTS = {"norms and operands": (passes, "prepare_gains"), "gradient of m": (adapted_product, "column_dot")}


class StepTime(NamedTuple):
    """Seconds of a step, and those of them that each of `PARTS` took."""

    whole: float
    parts: dict[str, float]


def main() -> None:
    """All contenders in turns."""
    parser = parser_of(__doc__, "one_micro_batch", smoke="a random model and two rounds")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rows, length, rounds = (2, 8, 2) if args.smoke else (4, 128, args.rounds)
    keep_freed_memory()
    steps = {name: step_of(name, smoke=args.smoke) for name in NAMES}
    step = random_step([[length] * rows], torch.Generator().manual_seed(0))
    turns = {name: functools.partial(timed, each, step) for name, each in steps.items()}
    times = alternating(turns, rounds, warmup=2)
    seconds = {name: [each.whole for each in found] for name, found in times.items()}
    parts = {
        part: {name: [each.parts[part] for each in times[name]] for name in ("own_dora", "own_lora")} for part in PARTS
    }
    ratios = {f"{first} / {second}": ratio(seconds[first], seconds[second]) for first, second in RATIOS}
    result = facts(f"python benchmarks/one_micro_batch.py --rounds {rounds}") | {
        "rank": RANK,
        "rows": rows,
        "length": length,
        "seconds": seconds,
        "tokens_per_second": {
            name: spread([rows * length / taken for taken in each]) for name, each in seconds.items()
        },
        "ratios": ratios,
        "parts": parts,
        "of_own_lora": of_own_lora(seconds, parts),
        "bars": BARS,
        "passes": {name: ratios[name]["median"] <= bar for name, bar in BARS.items()},
    }
    write(args.out, result)


def timed(make_step: Callable[[Step], object], step: Step) -> StepTime:
    """Make a step and watch its clock."""
    spent = dict.fromkeys(PARTS, 0.0)

    def watched(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*given)
            finally:
                spent[part] += time.perf_counter() - began

        return call

    with ExitStack() as stack:
        for part, (module, name) in PARTS.items():
            stack.enter_context(mock.patch.object(module, name, watched(part, getattr(module, name))))
        began = time.perf_counter()
        make_step(step)
        return StepTime(time.perf_counter() - began, spent)


def of_own_lora(
    seconds: dict[str, list[float]], parts: dict[str, dict[str, list[float]]]
) -> dict[str, dict[str, float]]:
    """What each part adds to own QDoRA over own QLoRA, and what none of them explains: shares of own QLoRA's step."""
    whole = seconds["own_lora"]
    added = {
        part: [dora - lora for dora, lora in zip(each["own_dora"], each["own_lora"], strict=True)]
        for part, each in parts.items()
    }
    differences = [dora - lora for dora, lora in zip(seconds["own_dora"], whole, strict=True)]
    added["the rest"] = [
        difference - sum(known) for difference, *known in zip(differences, *added.values(), strict=True)
    ]
    return {part: spread([more / step for more, step in zip(each, whole, strict=True)]) for part, each in added.items()}


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
