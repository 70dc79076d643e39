"""Time of training steps of SmolLM2-135M, against LoRA and PEFT. Run with two threads (OMP_NUM_THREADS=2).

qdora trains in its own loop. PEFT stands on bitsandbytes' Linear4bit with the same packed bytes and trains as its users
do: the step's examples padded to one batch, `model(...).loss`. All have torch's fused AdamW, clipping, and the
allocator that qdora sets.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, TITLES, adapt, on_linear4bit
from frame import bench, cell, main, markdown, quartiles, table
from measure import alone, in_turns, peak_rss_bytes, ratios, reset_peak_rss, spread
from mixed_data import FixedStep, base_model, first_steps, fitted, in_one_batch, random_step, torch_trainer

from qdora.data.batches import Step
from qdora.memory.oom import keep_freed_memory, return_freed_memory
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapter_parameters
from qdora.recipe.settings import TrainConfig
from qdora.train.optimizer import AdapterOptimizer

RANK = 16
SAME_LOOP = "_same_loop"
NAMES = ("own_lora", "own_dora", "peft_lora", "peft_dora", "peft_lora_defaults", "peft_dora_defaults")
NAMES += (f"peft_lora{SAME_LOOP}",)
RATIOS = tuple(f"own_dora / {name}" for name in NAMES if name != "own_dora")


@bench(smoke={"rounds": 2})
def step_time(data: Path | None, batch: int = 32, rounds: int = 5, *, smoke: bool) -> dict[str, Any]:
    """QDoRA against QLoRA, qdora's against PEFT's, with checkpointing off and on.

    `peft_lora_same_loop` is PEFT's model in qdora's loop. Time: all contenders. Pairs: own QDoRA and own QLoRA alone,
    in four times as many rounds. Peaks: the resident set while training, each in a process of its own.
    """
    result: dict[str, Any] = {"rank": RANK, "batch": batch, "time": {}, "pairs": {}, "peaks": {}}
    for mode in ("off", "on"):
        result["time"][mode] = _rounds(NAMES, mode, data, batch, rounds)
        result["pairs"][mode] = {str(batch): _rounds(NAMES[:2], mode, data, batch, 4 * rounds)}
        names = NAMES[:1] if smoke else NAMES
        result["peaks"][mode] = {name: alone(step_peak, name, mode, data, batch) for name in names}
    return result


def trainer(name: str, mode: str, *, smoke: bool, quant: str = "nf4") -> Callable[[Step], object]:
    """What makes one optimizer step of a contender; checkpointing is "on" or "off" by `mode`."""
    model = base_model(smoke=smoke, quant=quant)
    contender = CONTENDERS[name.removesuffix(SAME_LOOP)]
    if contender.engine == "peft":
        model = on_linear4bit(model, torch.bfloat16)
    if mode == "on":
        recompute_activations(model)
    model = adapt(model, contender, RANK).train()
    if contender.engine == "own" or name.endswith(SAME_LOOP):
        optimizer = AdapterOptimizer(adapter_parameters(model))
        settings = TrainConfig(steps=1, batch=1, lr=1e-4, schedule="constant", warmup=0, clip=1.0)
        return lambda step: fitted(model, optimizer, FixedStep(step), settings, quiet=True)
    train = torch_trainer(model)
    return lambda step: train([in_one_batch(step)])


def _rounds(names: tuple[str, ...], mode: str, data: Path | None, batch: int, rounds: int) -> dict[str, Any]:
    keep_freed_memory()
    steps = first_steps(data, batch, rounds + 1)  # the first warms up
    trainers = {name: trainer(name, mode, smoke=data is None) for name in names}
    turns = {name: lambda make=make, left=iter(steps): make(next(left)) for name, make in trainers.items()}
    seconds = in_turns(turns, rounds)
    tokens = [step.num_tokens for step in steps[1:]]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": _speeds(tokens, seconds),
        "ratios": ratios(seconds, RATIOS),
    }


def _speeds(tokens: list[int], seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: spread([n / s for n, s in zip(tokens, each, strict=True)]) for name, each in seconds.items()}


def step_peak(name: str, mode: str, data: str | None, batch: int) -> dict[str, int]:
    """In a process of its own: the most resident bytes of a contender while it trains."""
    steps = first_steps(data, batch, 4)
    make_step = trainer(name, mode, smoke=data is None)
    gc.collect()
    return_freed_memory()
    keep_freed_memory()
    reset_peak_rss()  # loading may peak higher than training: PEFT's model is made from ours
    for step in steps:
        make_step(step)
    return {"peak_bytes": peak_rss_bytes()}


def _speed_and_share(found: Any, name: str) -> list[str]:
    """Tokens a second, and the time of own QDoRA relative to a contender."""
    times = found["ratios"].get(f"own_dora / {name}")
    return [f"{found['tokens_per_second'][name]['median']:.0f}", quartiles(times) if times else "1"]


_STEP_COLUMNS = ("tokens/s", "time of qdora DoRA / of this one")


@table("step_time")
def step_time_table(result: Any) -> str:
    modes, peaks = result["time"], result.get("peaks", {})
    header = ["", *(f"{what}, checkpointing {mode}" for mode in modes for what in _STEP_COLUMNS)]
    header += [f"peak GiB, checkpointing {mode}" for mode in peaks]
    names, rows = next(iter(modes.values()))["tokens_per_second"], []
    for name in ("own_dora", *(name for name in names if name != "own_dora")):
        row = [TITLES[name], *(text for found in modes.values() for text in _speed_and_share(found, name))]
        row += [cell("{peak_bytes:.2fGiB}", found[name]) if name in found else "–" for found in peaks.values()]
        rows.append(row)
    pairs = "; ".join(
        f"checkpointing {mode}, {batch} examples ({sum(found['tokens']) / len(found['tokens']):,.0f} tokens) a step: "
        f"{quartiles(found['ratios']['own_dora / own_lora'])} in {len(found['tokens'])} rounds"
        for mode, batches in result["pairs"].items()
        for batch, found in batches.items()
    )
    rounds = ", ".join(f"{len(found['tokens'])} rounds with checkpointing {mode}" for mode, found in modes.items())
    alone = f"Time of qdora DoRA / qdora LoRA, without the others: {pairs}."
    return markdown(header, rows) + f"\n{result['batch']} examples a step; {rounds}. {alone}\n"


MICRO_NAMES = ("own_dora", "own_lora", "peft_lora", "peft_dora", "frozen", "dense")
MICRO_RATIOS = (*(f"own_dora / {name}" for name in MICRO_NAMES[1:]), "peft_dora / peft_lora")
TARGETS = {"own_lora": 1.05, "peft_lora": 1.0}


@bench(smoke={"rounds": 2, "rows": 2, "length": 8})
def one_micro_batch(rounds: int = 15, rows: int = 4, length: int = 128, *, smoke: bool) -> dict[str, Any]:
    """The price of DoRA where it is highest: steps of one micro-batch, each of which pays for the norms alone.

    The floors are forward and backward of the frozen NF4 model and of the 16-bit one, with the gradient of their input
    embeddings and without adapters.
    """
    keep_freed_memory()
    step = random_step([[length] * rows], torch.Generator().manual_seed(0))
    turns = {name: functools.partial(_micro_step(name, smoke), step) for name in MICRO_NAMES}
    seconds = in_turns(turns, rounds, warmup=2)
    return {
        "rank": RANK,
        "rows": rows,
        "length": length,
        "seconds": seconds,
        "tokens_per_second": _speeds([rows * length] * rounds, seconds),
        "ratios": ratios(seconds, MICRO_RATIOS),
    }


def _micro_step(name: str, smoke: bool) -> Callable[[Step], object]:
    if CONTENDERS[name].kind is not None:
        return trainer(name, "off", smoke=smoke)
    quant = "none" if CONTENDERS[name].engine == "dense" else "nf4"
    model = base_model(smoke=smoke, quant=quant)
    model.train()

    def floor_step(step: Step) -> None:
        (batch,) = step.micro_batches
        embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=batch.labels, use_cache=False).loss.backward()

    return floor_step


@table("one_micro_batch")
def one_micro_batch_table(result: Any) -> str:
    rows = [[TITLES[name], *_speed_and_share(result, name)] for name in result["tokens_per_second"]]
    targets = [
        f"at most {most:g} times that of {TITLES[name]} "
        f"({'met' if result['ratios'][f'own_dora / {name}']['median'] <= most else 'missed'})"
        for name, most in TARGETS.items()
    ]
    note = (
        f"\n{result['rows']} rows of {result['length']} tokens, {result['num_threads']} threads, "
        f"{len(result['seconds']['own_dora'])} rounds. PEFT DoRA / PEFT LoRA: "
        f"{quartiles(result['ratios']['peft_dora / peft_lora'])}. Targets for the time of qdora DoRA: "
        f"{', '.join(targets)}.\n"
    )
    return markdown(["", *_STEP_COLUMNS], rows) + note


if __name__ == "__main__":
    main()
