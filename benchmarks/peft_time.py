"""PEFT's LoRA against DoRA on PEFT's interface: PEFT's own, qdora.peft's, axolotl's algorithm; time and bytes.

    OMP_NUM_THREADS=2 python benchmarks/peft_time.py [--out benchmarks/results/peft_time.json] [--smoke]

One layer, forward and backward, and a step of a model, forward, backward, clipping and torch's fused AdamW, both in
bf16 on the same NF4 bytes, rank 16, adapters in bf16 (qdora's magnitudes are float32 always), every token labelled, the
model's own loss. "Six blocks" have SmolLM2's shapes and a small head. Contenders take turns, each round begins with
another one, a ratio to PEFT's LoRA is the median of the ratios of the same round; each case has its seconds, after
which no round begins.

Bytes are counted by `LiveBytes` on real tensors in the second call; weights, adapters and inputs are there before.
"kept": what the first call left alive (optimizer states, and what a layer keeps); "held": alive after the (first)
forward, "peak": the most, "kept" among both. The file is written after each case.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, adapt, layer_on, on_linear4bit, random_base, random_input
from gpu.shaped_model import Weights, build
from measure import facts, in_turns, parser_of, ratio, save, spread, write
from mixed_data import base_model, recipe, smoke_model
from torch import Tensor, nn

from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import recompute_activations
from qdora.plan.live_bytes import LiveBytes

RANK, ROUNDS = 16, 21
REFERENCE = "peft_lora"
NAMES = (REFERENCE, "peft_dora", "qdora_peft_lora", "qdora_peft_dora", "axolotl_dora", "axolotl_dora_uncached")
SHAPES = ((4096, 4096), (4096, 11_008), (576, 1536))
TOKENS = (512, 2048)
SMOLLM2, SIX = "SmolLM2", "six blocks"
LAYER_SECONDS = 20.0
# Name -> model, checkpointing, micro-batches, rows, tokens of a row; seconds.
STEPS = {
    f"{SMOLLM2}, checkpointing, 2 x 2 x 512": (SMOLLM2, True, 2, 2, 512, 150.0),
    f"{SMOLLM2}, 4 x 128": (SMOLLM2, False, 1, 4, 128, 60.0),
    f"{SIX}, checkpointing, 4 x 512": (SIX, True, 1, 4, 512, 40.0),
    f"{SIX}, 4 x 128": (SIX, False, 1, 4, 128, 30.0),
}
SIX_BLOCKS = {
    "vocab_size": 512,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
STEP_BARS = [{"dora": 1.0, "lora": 0.95}, {"dora": 1.03, "lora": 0.95}, {"dora": 0.92}, {"dora": 1.03}]
"""Of `STEPS`, in their order."""
Run = Callable[[Callable[[], None]], None]
"""A call of a contender, from no gradients to none. It calls its argument after the first forward pass."""


def main() -> None:
    """All cases, written after each."""
    args = parser_of(__doc__, "peft_time", smoke="tiny shapes, two rounds").parse_args()
    keep_freed_memory()
    result: dict[str, Any] = {**facts("OMP_NUM_THREADS=2 python benchmarks/peft_time.py"), "rank": RANK, "cases": {}}
    for name, runs, most_seconds in chain(layers(args.smoke), steps(args.smoke)):
        result["cases"][name] = measured(runs, 2 if args.smoke else ROUNDS, most_seconds)
        result["bars"] = [] if args.smoke else bars(result["cases"])
        save(args.out, result)
    write(args.out, result)


def layers(smoke: bool) -> Iterator[tuple[str, dict[str, Run], float]]:
    for tokens in (8,) if smoke else TOKENS:
        for shape in SHAPES[2:] if smoke else SHAPES:
            base = random_base(*shape)
            runs = {name: layer_run(name, base, tokens) for name in NAMES}
            yield f"layer {shape[0]} -> {shape[1]}, {tokens}", runs, LAYER_SECONDS


def layer_run(name: str, base: Any, num_tokens: int) -> Run:
    layer = layer_on(base, CONTENDERS[name], RANK)
    x, dy = random_input(base, num_tokens)

    def run(after_forward: Callable[[], None]) -> None:
        y = layer(x)
        after_forward()
        y.backward(dy)
        for leaf in (x, *layer.parameters()):
            leaf.grad = None

    return run


def steps(smoke: bool) -> Iterator[tuple[str, dict[str, Run], float]]:
    builtin = smoke_model() if smoke else base_model(recipe(Path(), batch=1, checkpointing=False))
    weights = Weights(torch.device("cpu"))
    models = {
        SMOLLM2: functools.partial(on_linear4bit, builtin, torch.bfloat16),
        SIX: functools.partial(build, SIX_BLOCKS | ({"num_hidden_layers": 1} if smoke else {}), weights, "peft"),
    }
    for name, (model, checkpointing, num_micro_batches, rows, length, most_seconds) in STEPS.items():
        shape = (num_micro_batches, rows, 8 if smoke else length)
        ids = torch.randint(100, shape, generator=torch.Generator().manual_seed(0))
        runs = {each: step_run(CONTENDERS[each], models[model](), checkpointing, ids) for each in NAMES}
        yield name, runs, most_seconds


def step_run(contender: Any, base: Any, checkpointing: bool, micro_batches: Tensor) -> Run:
    """`micro_batches`: (micro-batches, rows, tokens)."""
    if checkpointing:
        recompute_activations(base)
    base.is_loaded_in_4bit = True
    model = adapt(base, contender, RANK).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True)

    def run(after_forward: Callable[[], None]) -> None:
        for ids in micro_batches:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(micro_batches)
            after_forward()
            loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def measured(runs: dict[str, Run], rounds: int, most_seconds: float) -> dict[str, Any]:
    """Bytes of each contender, then seconds in turns."""
    memory = {name: bytes_of(run) for name, run in runs.items()}
    turns = {name: functools.partial(run, lambda: None) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began, number = time.monotonic(), 0
    while number < rounds and (number == 0 or time.monotonic() - began < most_seconds):
        for name, found in in_turns(turns, 1, warmup=0, start=number).items():
            seconds[name] += found
        number += 1
    return {
        "rounds": number,
        "seconds": {name: spread(found) for name, found in seconds.items()},
        "ratios": {name: ratio(found, seconds[REFERENCE]) for name, found in seconds.items()},
        "bytes": memory,
        "byte_ratios": {
            name: {what: found[what] / memory[REFERENCE][what] for what in ("held", "peak")}
            for name, found in memory.items()
        },
    }


def bytes_of(run: Run) -> dict[str, int]:
    held: list[int] = []
    with LiveBytes() as live:
        run(lambda: None)
        gc.collect()
        kept = live.live_bytes
        live.reset_peak()
        run(lambda: held.append(live.live_bytes))
        return {"kept": kept, "held": held[0], "peak": live.peak_bytes}


def bars(cases: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of the cases that are there."""
    values: list[tuple[str, float, float]] = []
    for tokens in TOKENS:
        names = [f"layer {shape[0]} -> {shape[1]}, {tokens}" for shape in SHAPES]
        if all(name in cases for name in names):
            times = sorted(cases[name]["ratios"]["qdora_peft_dora"]["median"] for name in names)
            values.append((f"layer, {tokens} tokens, DoRA: second best of three shapes", 1.0, times[1]))
    for name, limits in zip(STEPS, STEP_BARS, strict=True):
        for kind, limit in limits.items() if name in cases else ():
            values.append((f"{name}, {kind}", limit, cases[name]["ratios"][f"qdora_peft_{kind}"]["median"]))
    for name, found in cases.items():
        for kind in ("lora", "dora"):
            for what, value in found["byte_ratios"][f"qdora_peft_{kind}"].items():
                values.append((f"{name}, {kind}, bytes: {what}", 1.0, value))
    return [{"name": name, "limit": limit, "value": value, "holds": value <= limit} for name, limit, value in values]


if __name__ == "__main__":
    main()
