"""The middle model's step with compiled blocks against the same step without: time, memory, compilations, losses."""

from __future__ import annotations

import time
from typing import Any

import torch
from measure import ratio
from torch._dynamo.testing import CompileCounterWithBackend

from gpu import device as on
from gpu.model_step import fitting_step, make_model, speeds, timed_in_turns
from gpu.part import Part
from gpu.plan import Plan
from gpu.shaped_model import Weights
from qdora.model.inject import adapter_parameters
from qdora.train import compiled_blocks
from qdora.train.optimizer import AdapterOptimizer

NAMES = ("eager", "compiled")
_MOST_COMPILATIONS = 2
# bf16 rounds at 0.4 %; fused kernels round less often.
_MOST_DIFFERENCE = 0.01


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Both on the same packed bytes, in turns. On a CPU the graph runs without generated code, which takes minutes."""
    weights = Weights(device)
    models = {name: make_model(plan.middle, "own_dora", device, rank=plan.ranks[0], weights=weights) for name in NAMES}
    optimizers = {name: AdapterOptimizer(adapter_parameters(model), name="adamw") for name, model in models.items()}
    counter = CompileCounterWithBackend("eager" if device.type == "cpu" else compiled_blocks.BACKEND)
    part.put("weight_bytes", weights.num_bytes)
    with compiled_blocks.compiled_blocks(models["compiled"], counter):
        for tokens in plan.step_tokens:
            steps = {name: fitting_step(model, optimizers[name], tokens, device) for name, model in models.items()}
            part.attempt(f"{tokens} tokens", lambda s=steps, t=tokens: _compared(s, t, plan, device))
        runs = not any(block.forward.region.has_failed for block in models["compiled"].model.layers)
    found = {"num_compilations": counter.frame_count, "runs_compiled": runs}
    part.put("compilations", found | {"ok": found["runs_compiled"] and counter.frame_count <= _MOST_COMPILATIONS})


def _compared(steps: dict[str, Any], num_tokens: int, plan: Plan, device: torch.device) -> dict[str, Any]:
    losses, first, peaks = {}, {}, {}
    for name, step in steps.items():
        began = time.perf_counter()
        losses[name] = step(1)
        first[name] = time.perf_counter() - began
        on.reset_peak(device)
        losses[name] += step(1)
        peaks[name] = on.peak_bytes(device)
    samples = timed_in_turns(steps, plan, device)
    difference = max(abs(a - b) / a for a, b in zip(losses["eager"], losses["compiled"], strict=True))
    return {
        "first_step_seconds": first,
        "peak_allocated_bytes": peaks,
        **speeds(samples, num_tokens),
        "compiled / eager": ratio(samples["compiled"], samples["eager"]),
        "losses": losses,
        "same_losses": {"relative_difference": difference, "ok": difference <= _MOST_DIFFERENCE},
    }
