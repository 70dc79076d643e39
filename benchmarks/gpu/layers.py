"""What does a layer cost? Time of forward and backward, everyone on the same packed bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contenders import LayerCall, random_base
from layer_times import FAST, LAYER_COLUMNS, SLOW
from measure import ratios

from gpu import device as on
from gpu.plan import Part, Plan
from qdora.memory.oom import is_out_of_memory
from qdora.quant.packed import PackedWeight

TIMED = dict.fromkeys(("dense", *FAST, *SLOW))
RATIOS = (*LAYER_COLUMNS.values(), "own_lora / peft_lora", "own_lora / frozen", "frozen / dense")


def run(part: Part, plan: Plan, device: torch.device, index: int) -> None:
    """All contenders at one shape: the first rank at every length, then the others at the first length."""
    base = random_base(*plan.shapes[index], device)
    part.put("shape", "x".join(map(str, plan.shapes[index])))
    sizes = [(plan.ranks[0], tokens) for tokens in plan.tokens] + [(rank, plan.tokens[0]) for rank in plan.ranks[1:]]
    for rank, tokens in sizes:
        part.attempt(f"rank {rank}, {tokens} tokens", case, plan, base, rank, tokens)


def case(plan: Plan, base: PackedWeight, rank: int, num_tokens: int) -> dict[str, Any]:
    """Seconds of each contender that fits in turns, and the ratios of those in the same round."""
    steps: dict[str, Callable[[], None]] = {}
    too_large: list[str] = []

    def tried(name: str) -> None:
        call = LayerCall(name, base, rank, num_tokens)
        call.step()
        steps[name] = call.step

    for name in TIMED:
        on.free(base.device)
        try:
            tried(name)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            too_large.append(name)
    samples = on.in_turns(base.device, steps, plan.repeats, plan.sample_seconds)
    seconds = {name: [each.seconds for each in found] for name, found in samples.items()}
    return {"seconds": on.spreads(samples), "ratios": ratios(seconds, RATIOS), "too_large": too_large}
