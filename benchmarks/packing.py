"""Packed rows against padded ones: losses of every example, and the time of training steps.

    OMP_NUM_THREADS=2 python benchmarks/packing.py DATA [--rounds 12] [--seconds 400] [--smoke]

DATA holds <task>/<split>.parquet. QDoRA of rank 16 on SmolLM2-135M in NF4, steps of 4,096 real tokens of the eight
commonsense tasks in equal shares, in micro-batches of at most 2,048 tokens, padding counted. Losses: in float32, each
example alone, grouped by length, and packed. Time: in bf16, whole steps of the same examples in turns: padded in the
order in which they come, grouped by length, packed, and packed into rows that are always as long as data.max_length.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from contenders import CONTENDERS, adapt
from measure import alternating, facts, parsed, parser_of, ratio, spread, write
from mixed_data import base_model, recipe, smoke_model
from step_time import own_step

from qdora.data import batching
from qdora.data.batching import Batching, MicroBatch, micro_batches
from qdora.data.build_data import read_data, tokenized_mix
from qdora.data.loader import Step
from qdora.data.tokenize import TokenizedExample
from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import find_model
from qdora.model.inject import adapter_parameters
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.packed_attention import packed_layout
from qdora.train.passes import batch_loss

RANK, LR = 16, 1e-4
STEP_TOKENS, MICRO_TOKENS, ROW_TOKENS = 4096, 2048, 512
WAYS = ("arrival", "grouped", "packed", "packed_to_max_length")
LOSS_STEPS = 2


def main() -> None:
    """Losses, then time, in one process."""
    args = arguments()
    keep_freed_memory()
    began = time.perf_counter()
    steps = smoke_examples() if args.smoke else real_examples(args.data.resolve(), LOSS_STEPS + args.rounds + 1)
    result: dict[str, Any] = facts("python benchmarks/packing.py DATA")
    result |= {"rank": RANK, "step_tokens": STEP_TOKENS, "micro_batch_tokens": MICRO_TOKENS, "max_length": ROW_TOKENS}
    result["losses"] = losses(model_of(args, torch.float32), [each for step in steps[:LOSS_STEPS] for each in step])
    result["time"] = times(model_of(args, torch.bfloat16), steps[LOSS_STEPS:], began + args.seconds)
    write(args.out, result if args.smoke else {**result, "passes": verdict(result)})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "packing", smoke="a random model and short examples", data=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=400.0, help="no round begins later, loading included")
    return parsed(parser)


def real_examples(data: Path, num_steps: int) -> list[list[TokenizedExample]]:
    """The examples of the first steps of a run, in the order in which they come."""
    settings = recipe(data, batch=1, checkpointing=False)
    _, tokenizer = find_model(settings)
    mix = tokenized_mix(settings, tokenizer, read_data(settings.data)[0])
    steps: list[list[TokenizedExample]] = [[]]
    for source, index in zip(*mix.order.draws(0, num_steps * STEP_TOKENS), strict=True):
        if sum(map(len, steps[-1])) >= STEP_TOKENS:
            if len(steps) == num_steps:
                break
            steps.append([])
        steps[-1].append(mix.sets[source].examples[index])  # type: ignore[union-attr]
    return steps


def smoke_examples() -> list[list[TokenizedExample]]:
    """Five steps of twelve examples of random tokens."""
    rng = np.random.default_rng(0)
    lengths = [rng.integers(4, 60, 12).tolist() for _ in range(LOSS_STEPS + 3)]
    return [
        [
            TokenizedExample("smoke", str(n), rng.integers(1, 128, each).astype(np.int32), np.arange(each) >= 3)
            for n, each in enumerate(step)
        ]
        for step in lengths
    ]


def model_of(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The model with QDoRA adapters, moved off their start, in training mode."""
    base = smoke_model(dtype) if args.smoke else base_model(recipe(args.data, batch=1, checkpointing=False), dtype)
    model = adapt(base, CONTENDERS["own_dora"], RANK).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model


def batches_of(way: str, examples: list[TokenizedExample]) -> list[MicroBatch]:
    """The examples as micro-batches: one of WAYS, or "alone"."""
    names = sorted({each.task for each in examples})
    padded = Batching(MICRO_TOKENS, 0)
    if way == "alone":
        return [batch for each in examples for batch in micro_batches([each], padded, names)]
    if way == "arrival":
        return [
            batch
            for group in in_arrival_order(examples)
            for batch in micro_batches(group, Batching(MICRO_TOKENS * len(group), 0), names)
        ]
    packed = None if way == "grouped" else "rows"
    with patch.object(batching, "ATTENTION_COST", math.inf if way == WAYS[3] else batching.ATTENTION_COST):
        return micro_batches(examples, Batching(MICRO_TOKENS, 0, packed, ROW_TOKENS), names)  # type: ignore[arg-type]


def in_arrival_order(examples: list[TokenizedExample]) -> list[list[TokenizedExample]]:
    """Groups filled one after the other, as long as they keep MICRO_TOKENS with their padding."""
    groups: list[list[TokenizedExample]] = [[]]
    for each in examples:
        longest = max(map(len, [*groups[-1], each]))
        if groups[-1] and longest * (len(groups[-1]) + 1) > MICRO_TOKENS:
            groups.append([])
        groups[-1].append(each)
    return groups


@torch.no_grad()
def losses(model: Any, examples: list[TokenizedExample]) -> dict[str, Any]:
    """Largest differences of the NLL of an example, in nats, from that of the example alone."""
    assert packed_layout(model)[0] == "rows"
    nll = {}
    for way in ("alone", "grouped", "packed"):
        found = []
        for batch in batches_of(way, examples):
            loss = batch_loss(model, batch.input_ids, batch.attention_mask, batch.labels, packing=batch.packing)
            found += list(zip(batch.example_ids, loss.example_nll.tolist(), strict=True))
        nll[way] = sorted(found)
    alone = [value for _, value in nll["alone"]]
    result: dict[str, Any] = {"num_examples": len(alone), "mean_nll": sum(alone) / len(alone)}
    for way in ("grouped", "packed"):
        gaps = [abs(value - one) for (_, value), one in zip(nll[way], alone, strict=True)]
        relative = max(gap / one for gap, one in zip(gaps, alone, strict=True))
        result[way] = {"max_difference": max(gaps), "max_relative_difference": relative}
    return result


def times(model: Any, steps: list[list[TokenizedExample]], deadline: float) -> dict[str, Any]:
    """Seconds of every step in every way; the first step is the warm-up."""
    optimizer = AdapterOptimizer(adapter_parameters(model))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    positions: dict[str, int] = dict.fromkeys(WAYS, 0)
    groups: dict[str, int] = dict.fromkeys(WAYS, 0)
    tokens: list[int] = []
    for number, examples in enumerate(steps):
        if time.perf_counter() > deadline:
            break
        prepared = {way: step_of(batches_of(way, examples)) for way in WAYS}
        turns = {way: functools.partial(timed, model, optimizer, step) for way, step in prepared.items()}
        readings = alternating(turns, 1, warmup=0, start=number)
        if number == 0:
            continue
        tokens.append(sum(map(len, examples)))
        for way in WAYS:
            seconds[way] += readings[way]
            positions[way] += sum(batch.input_ids.numel() for batch in prepared[way].micro_batches)
            groups[way] += len(prepared[way].micro_batches)
    return {
        "num_steps": len(tokens),
        "seconds": seconds,
        "tokens": tokens,
        "micro_batches_per_step": {way: groups[way] / len(tokens) for way in WAYS},
        "padding_share": {way: 1 - sum(tokens) / positions[way] for way in WAYS},
        "tokens_per_second": {
            way: spread([count / taken for count, taken in zip(tokens, seconds[way], strict=True)]) for way in WAYS
        },
        "ratios": {f"{way} / packed": ratio(seconds[way], seconds["packed"]) for way in WAYS if way != "packed"},
        "positions_ratios": {f"{way} / packed": positions[way] / positions["packed"] for way in WAYS[:2]},
    }


def step_of(batches: list[MicroBatch]) -> Step:
    """The micro-batches of one optimizer step."""
    labels = sum(int((batch.labels != batching.IGNORED).sum()) for batch in batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return Step(batches, labels, tokens, sum(len(batch.example_ids) for batch in batches))


def timed(model: Any, optimizer: AdapterOptimizer, step: Step) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    own_step(model, optimizer, step)
    return time.perf_counter() - began


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """Equal losses, as far as float32 goes, and less time than both ways of padding."""
    ratios = {name: each["median"] for name, each in result["time"]["ratios"].items()}
    return {
        "packed loss of every example as alone (1e-5 relative)": result["losses"]["packed"]["max_relative_difference"]
        < 1e-5,
        "faster than padding in order of arrival": ratios["arrival / packed"] > 1.0,
        "faster than grouping by length": ratios["grouped / packed"] > 1.0,
    }


if __name__ == "__main__":
    main()
