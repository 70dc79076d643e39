"""What does a layer cost? Time and memory of forward and backward, everyone on the same packed bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contenders import NEW_NORM, LayerCall, random_base
from measure import ratios

from gpu import device as on
from gpu.plan import Part, Plan
from qdora.quant.packed import PackedWeight

TIMED = ("dense", "frozen", "own_lora", "own_dora", f"own_dora{NEW_NORM}", "own_dora_dropout")
TIMED += ("peft_lora", "peft_dora", "peft_dora_addmm", "peft_dora_defaults")
"""`own_dora_new_norm` computes its norm in every call: a step of one micro-batch without checkpointing. The others of
ours find it computed, as all later micro-batches and every recompute do."""
RATIOS = [f"{name} / peft_lora" for name in (*TIMED[2:6], "peft_dora")]
RATIOS += ["own_dora / own_lora", "own_lora / frozen", "frozen / dense"]


def run(part: Part, plan: Plan, device: torch.device, index: int) -> None:
    """All contenders at one shape: the first rank at every length, then the others at the first length."""
    base = random_base(*plan.shapes[index], device)
    part.put("shape", "x".join(map(str, plan.shapes[index])))
    sizes = [(plan.ranks[0], tokens) for tokens in plan.tokens] + [(rank, plan.tokens[0]) for rank in plan.ranks[1:]]
    for rank, tokens in sizes:
        part.attempt(f"rank {rank}, {tokens} tokens", case, plan, base, rank, tokens)


def case(plan: Plan, base: PackedWeight, rank: int, num_tokens: int) -> dict[str, Any]:
    """Bytes of each contender, then seconds in turns and the ratios of those in the same round."""
    steps: dict[str, Callable[[], Any]] = {}
    num_bytes, errors = {}, {}
    for name in TIMED:
        on.free(base.device)
        try:
            call = LayerCall(name, base, rank, num_tokens)
            num_bytes[name] = bytes_of(call, base.device)
            steps[name] = call.step
        except RuntimeError as error:
            if not on.is_out_of_memory(error):
                raise
            errors[name] = "out of memory"
    samples = on.in_turns(base.device, steps, plan.repeats, plan.sample_seconds)
    spreads = on.spreads(samples)
    seconds = {name: [each.seconds for each in found] for name, found in samples.items()}
    products = 4 * num_tokens * base.shape[0] * base.shape[1]
    return {
        "seconds": spreads,
        "bytes": num_bytes,
        "tflops_of_the_two_large_products": {n: products / each["median"] / 1e12 for n, each in spreads.items()},
        "ratios": ratios(seconds, RATIOS),
        "errors": errors,
    }


def bytes_of(call: LayerCall, device: torch.device) -> dict[str, int]:
    """Of one pass: what is held between forward and backward, and the peak of each."""
    call.step()  # workspaces of the libraries, and the norm
    call.clear()
    on.free(device)
    before = on.memory(device)["held"]
    out = call.layer(call.x)
    held, forward = on.memory(device)["held"] - before, on.memory(device)["peak"] - before
    on.free(device)
    out.backward(call.dy)
    call.clear()
    return {"held_after_forward": held, "forward_peak": forward, "backward_peak": on.memory(device)["peak"] - before}
