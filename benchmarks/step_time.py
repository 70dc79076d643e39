"""Time and memory of the whole training step of SmolLM2-135M: QDoRA against QLoRA, qdora's against PEFT's.

    OMP_NUM_THREADS=2 python benchmarks/step_time.py DATA --out benchmarks/results/step_time.json
        [--part time|peaks|pairs] [--checkpointing on|off] [--batch 32] [--rounds 10] [--seconds 240] [--smoke]

DATA holds <task>/<split>.parquet. NF4 in blocks of 64, rank 16 on all linear layers, bf16, real steps of the eight
tasks with their real lengths. qdora trains through its own loop (micro-batches, chunked loss). PEFT stands on
bitsandbytes' Linear4bit with the same packed bytes and trains as its users do: the step's examples padded to one
batch, `model(...).loss`. `peft_lora_same_loop` is PEFT's model in qdora's loop: what of the difference is the layer's.
All have torch's fused AdamW, clipping, and the allocator that qdora sets. Time: step by step in turns on the same
examples; a call adds rounds to those that --out holds. Pairs: own QDoRA and own QLoRA alone, many rounds, at any
--batch. Peaks: the resident set while training, each in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, adapt, on_linear4bit
from measure import facts, fresh, in_turns, parsed, parser_of, peak_rss_bytes, ratio, reset_peak_rss, spread, write
from mixed_data import (
    FixedSteps,
    base_model,
    fitted,
    in_one_batch,
    real_steps,
    recipe,
    smoke_model,
    smoke_steps,
)
from rich.console import Console

from qdora.data.loader import Step
from qdora.memory.allocator import keep_freed_memory, return_freed_memory
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapter_parameters
from qdora.recipe.train_settings import TrainConfig
from qdora.train.optimizer import AdapterOptimizer

RANK, LR, CLIP = 16, 1e-4, 1.0
SAME_LOOP = "_same_loop"
NAMES = (
    "own_lora",
    "own_dora",
    "peft_lora",
    "peft_dora",
    "peft_lora_defaults",
    "peft_dora_defaults",
    "peft_lora_same_loop",
)
RATIOS = (
    ("own_dora", "own_lora"),
    *(("own_dora", name) for name in NAMES[2:]),
    ("own_lora", "peft_lora_same_loop"),
    ("peft_dora", "peft_lora"),
    ("peft_dora_defaults", "peft_lora_defaults"),
)
# Steps of a process whose peak is read.
PEAK_STEPS = 4


def main() -> None:
    """The asked parts, added to what the result file holds."""
    args = arguments()
    if args.worker:
        print(json.dumps(peak(args.worker, args)))
        return
    modes = ("off", "on") if args.checkpointing is None else (args.checkpointing,)
    # Smoke results are not added to anything.
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() and not args.smoke else {}
    result |= facts(f"python benchmarks/step_time.py DATA --batch {args.batch}")
    result |= {"rank": RANK} | ({"batch": args.batch} if args.part != "pairs" else {})
    if args.part in (None, "time"):
        keep_freed_memory()
        for mode in modes:
            add_rounds(result.setdefault("time", {}).setdefault(mode, {}), NAMES, mode, args)
    if args.part in (None, "pairs"):
        keep_freed_memory()
        for mode in modes:
            pairs = result.setdefault("pairs", {}).setdefault(mode, {})
            add_rounds(pairs.setdefault(str(args.batch), {}), NAMES[:2], mode, args)
    if args.part in (None, "peaks"):
        for mode in modes:
            given = ["--smoke"] if args.smoke else [str(args.data), "--batch", str(args.batch)]
            peaks = result.setdefault("peaks", {}).setdefault(mode, {})
            for name in NAMES[:1] if args.smoke else NAMES:
                if name not in peaks:  # stopped, the next call goes on
                    peaks[name] = fresh(__file__, *given, "--worker", name, "--checkpointing", mode)
                    write(args.out, result)
    write(args.out, result if args.smoke else {**result, "passes": verdict(result)})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "step_time", smoke="a random model and two rounds", data=True)
    parser.add_argument("--part", choices=("time", "peaks", "pairs"))
    parser.add_argument("--checkpointing", choices=("on", "off"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=240.0, help="no round begins later, loading included")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    return parsed(parser)


def steps_of(args: argparse.Namespace, num_steps: int) -> list[Step]:
    """The first steps of a run."""
    if args.smoke:
        return smoke_steps(num_steps)
    return real_steps(recipe(args.data.resolve(), batch=args.batch, checkpointing=False), num_steps)


def model_of(name: str, mode: str, *, smoke: bool) -> Any:
    """A contender's model, adapters on it, in training mode; checkpointing is "on" or "off" by `mode`."""
    base = smoke_model() if smoke else base_model(recipe(Path(), batch=1, checkpointing=False))
    contender = CONTENDERS[name.removesuffix(SAME_LOOP)]
    model = on_linear4bit(base, torch.bfloat16) if contender.engine == "peft" else base
    if mode == "on":
        recompute_activations(model)
    return adapt(model, contender, RANK).train()


def trainer(name: str, model: Any) -> Callable[[Step], object]:
    """What makes one optimizer step of a contender."""
    if CONTENDERS[name.removesuffix(SAME_LOOP)].engine == "own" or name.endswith(SAME_LOOP):
        return functools.partial(own_step, model, AdapterOptimizer(adapter_parameters(model)))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.0, fused=True)
    return functools.partial(peer_step, model, optimizer, trainable)


def own_step(model: Any, optimizer: AdapterOptimizer, step: Step) -> float:
    """A run of one step of `qdora train`. Returns its loss."""
    settings = TrainConfig(steps=1, batch=1, lr=LR, schedule="constant", warmup=0, clip=CLIP)
    lines = fitted(model, optimizer, FixedSteps([step]), settings, console=Console(quiet=True))
    return float(lines[0]["loss"])


def peer_step(model: Any, optimizer: torch.optim.Optimizer, trainable: list[Any], step: Step) -> None:
    """A step of transformers' trainer: the padded batch, the model's own loss, clipping, AdamW."""
    (batch,) = in_one_batch(step).micro_batches
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    model(**inputs, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, CLIP)
    optimizer.step()
    optimizer.zero_grad()


def add_rounds(found: dict[str, Any], names: tuple[str, ...], mode: str, args: argparse.Namespace) -> None:
    """Rounds of the named contenders on steps that follow those already measured."""
    began = time.perf_counter()
    seconds = found.setdefault("seconds", {name: [] for name in names})
    tokens, padded = found.setdefault("tokens", []), found.setdefault("padded_tokens", [])
    num_done, rounds = len(tokens), 2 if args.smoke else args.rounds
    steps = steps_of(args, num_done + rounds)[num_done:]
    trainers = {name: trainer(name, model_of(name, mode, smoke=args.smoke)) for name in names}
    for number, step in enumerate(steps):
        if time.perf_counter() - began > args.seconds:
            break
        turns = {name: functools.partial(each, step) for name, each in trainers.items()}
        for name, each in in_turns(turns, 1, warmup=int(number == 0), start=num_done + number).items():
            seconds[name] += each
        tokens.append(step.num_tokens)
        padded.append(in_one_batch(step).micro_batches[0].input_ids.numel())
    found["tokens_per_second"] = {
        name: spread([count / taken for count, taken in zip(tokens, seconds[name], strict=True)]) for name in names
    }
    found["ratios"] = {
        f"{first} / {second}": ratio(seconds[first], seconds[second])
        for first, second in RATIOS
        if first in names and second in names
    }


def peak(name: str, args: argparse.Namespace) -> dict[str, int]:
    """Resident bytes of a contender: after loading, and at most while it trains."""
    steps = steps_of(args, PEAK_STEPS)
    make_step = trainer(name, model_of(name, args.checkpointing, smoke=args.smoke))
    gc.collect()
    return_freed_memory()
    keep_freed_memory()
    loaded = reset_peak_rss()  # loading may peak higher than training: PEFT's model is made from ours
    for step in steps:
        make_step(step)
    return {"loaded_bytes": loaded, "peak_bytes": peak_rss_bytes(), "added_bytes": peak_rss_bytes() - loaded}


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """Own QDoRA within 5 % of own QLoRA, and ahead of PEFT's QLoRA, in time and in memory."""
    passes = {}
    for mode, found in result.get("time", {}).items():
        medians = {name: each["median"] for name, each in found["ratios"].items()}
        passes[f"faster than PEFT QLoRA, checkpointing {mode}"] = medians["own_dora / peft_lora"] < 1.0
    for mode, batches in result.get("pairs", {}).items():
        for batch, found in batches.items():
            median = found["ratios"]["own_dora / own_lora"]["median"]
            passes[f"time as QLoRA, checkpointing {mode}, {batch} examples a step"] = median <= 1.05
    for mode, found in result.get("peaks", {}).items():
        own, lora, peer = (found[name]["peak_bytes"] for name in ("own_dora", "own_lora", "peft_lora"))
        passes[f"memory as QLoRA, checkpointing {mode}"] = own <= 1.05 * lora
        passes[f"less memory than PEFT QLoRA, checkpointing {mode}"] = own < peer
    return passes


if __name__ == "__main__":
    main()
