"""Time of one adapted layer: against LoRA and PEFT, of the host alone, and on PEFT's interface.

Run with two threads (OMP_NUM_THREADS=2), host_time with one. Contenders take turns, each round begins with another one,
and a ratio is the median of the ratios of the same round. All work on the same NF4 bytes in bf16.
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
from contenders import CONTENDERS, NEW_NORM, TITLES, LayerCall, adapt, layer_on, on_linear4bit, random_base
from frame import bench, main, markdown, quartiles, table, tabulated
from measure import alone, commit, in_turns, ratio, ratios, spread
from mixed_data import base_model, recipe, smoke_model
from torch import Tensor, nn

from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import recompute_activations
from qdora.plan.live_bytes import LiveBytes
from qdora.train.optimizer import AdapterOptimizer

OWN_NEW_NORM = f"own_dora{NEW_NORM}"
FAST = ("frozen", "own_lora", "own_dora", OWN_NEW_NORM, "own_lora_dropout", "own_dora_dropout")
FAST += ("peft_lora", "peft_lora_defaults", "peft_dora_addmm")
SLOW = ("peft_lora", "peft_dora", "peft_dora_defaults", "own_dora", "own_dora_dropout")
FAST_RATIOS = ("own_dora / own_lora", "own_dora / peft_lora", "own_dora_new_norm / own_lora")
FAST_RATIOS += ("own_dora_new_norm / peft_lora", "own_dora_dropout / own_dora", "own_dora_dropout / own_lora_dropout")
FAST_RATIOS += ("own_dora_dropout / peft_lora_defaults", "own_dora / peft_dora_addmm", "own_lora / peft_lora")
FAST_RATIOS += ("own_dora / frozen", "peft_lora / frozen", "peft_dora_addmm / peft_lora")
SLOW_RATIOS = ("peft_dora / peft_lora", "peft_dora / own_dora", "peft_dora_defaults / peft_lora")
SLOW_RATIOS += ("peft_dora_defaults / own_dora_dropout",)
# The more a call takes, the less its median wants.
REPEATS, FEW_REPEATS, SLOW_REPEATS = {256: 41, 1024: 21}, 11, 5


@bench(
    smoke={"shapes": ("64x96",), "tokens": (8,)},
    by=("in_features", "out_features", "rank", "tokens", "allocator"),
    keep=True,
)
def layer_time(
    shapes: tuple[str, ...] = ("2048x2048", "4096x4096", "4096x11008"),
    ranks: tuple[int, ...] = (16, 64),
    tokens: tuple[int, ...] = (256, 1024, 4096),
    *,
    smoke: bool,
) -> Iterator[dict[str, Any]]:
    """Forward and backward: QDoRA against QLoRA, qdora's against PEFT's.

    Shapes are in x out; x asks for a gradient, as it does in all layers but the first. "new norm" computes the norm in
    each call, as the first micro-batch of a step does; the others of ours find it computed. PEFT's DoRA takes several
    times as long and is measured in fewer rounds, with its rivals beside it. All have the allocator that qdora sets; at
    1,024 tokens and the first rank once more with the default one. Each case says its commit.
    """
    keep_freed_memory()
    for shape in shapes:
        for rank in ranks:
            for num_tokens in tokens:
                yield {"allocator": "tuned"} | layer_case(shape, rank, num_tokens, smoke)
        yield {"allocator": "default"} | alone(layer_case, shape, ranks[0], tokens[0] if smoke else 1024, smoke)


def layer_case(shape: str, rank: int, num_tokens: int, smoke: bool) -> dict[str, Any]:
    """Seconds and ratios of all contenders."""
    in_features, out_features = map(int, shape.split("x"))
    base = random_base(in_features, out_features)

    def timed(names: tuple[str, ...], repeats: int, warmup: int) -> dict[str, list[float]]:
        return in_turns({name: LayerCall(name, base, rank, num_tokens).step for name in names}, repeats, warmup=warmup)

    repeats = 2 if smoke else REPEATS.get(num_tokens, FEW_REPEATS)
    fast, slow = timed(FAST, repeats, 2), timed(SLOW, min(repeats, SLOW_REPEATS), 1)
    return {
        "in_features": in_features,
        "out_features": out_features,
        "rank": rank,
        "tokens": num_tokens,
        "commit": commit(),
        "repeats": repeats,
        "seconds": {name: spread(each) for name, each in (slow | fast).items()},
        "ratios": ratios(fast, FAST_RATIOS) | ratios(slow, SLOW_RATIOS),
    }


@table("layer_time")
def layer_time_table(result: Any) -> str:
    """Ratios of one layer's time; medians over rounds, and the share of what was asked that is so."""

    def label(case: Any) -> str:
        text = "{in_features} → {out_features}, r {rank}, {tokens:,}".format_map(case)
        return text if case["allocator"] == "tuned" else f"{text}, default allocator"

    names = {
        "QDoRA / QLoRA": "own_dora / own_lora",
        "norm computed": "own_dora_new_norm / own_lora",
        "dropout / none": "own_dora_dropout / own_dora",
        "QDoRA / PEFT QLoRA": "own_dora / peft_lora",
        "QDoRA / frozen": "own_dora / frozen",
        "PEFT QDoRA / its QLoRA": "peft_dora / peft_lora",
        "norm by addmm": "peft_dora_addmm / peft_lora",
        "its defaults": "peft_dora_defaults / peft_lora",
    }
    columns = {title: f"{{ratios[{name}][median]:.3f}}" for title, name in names.items()}
    asked: dict[str, tuple[str, Callable[[Any], float]]] = {
        "QDoRA at most 1.03 times QLoRA in": ("own_dora / own_lora", lambda _: 1.03),
        "QDoRA at most PEFT's QLoRA (1.03 times at 256 tokens) in": (
            "own_dora / peft_lora",
            lambda case: 1.03 if case["tokens"] < 1024 else 1.0,
        ),
        "dropout at most 1.05 times none in": ("own_dora_dropout / own_dora", lambda _: 1.05),
    }
    counts = []
    for what, (name, limit) in asked.items():
        shares = [case["ratios"][name]["median"] / limit(case) for case in result["cases"]]
        worst = result["cases"][shares.index(max(shares))]
        within = f"{sum(share <= 1 for share in shares)} of {len(shares)} cases"
        place = "{in_features}x{out_features} r{rank} {tokens} tokens".format_map(worst)
        counts.append(f"{what} {within} (worst: {worst['ratios'][name]['median']:.3f}, {place})")
    note = f"\nTargets met: {'; '.join(counts)}.\n"
    return tabulated(result["cases"], {"layer, rank, tokens": label, **columns}) + note


RANK = 16
HOST_NAMES = ("frozen", "own_lora", "own_dora", "peft_lora", "peft_dora")
HOST_RATIOS = ("own_dora / own_lora", "own_dora / peft_lora", "own_lora / peft_lora", "peft_dora / peft_lora")
HOST_BAR, HOST_SIZE = {"own_dora / peft_lora": 1.0}, 64


@bench(smoke={"rounds": 2, "calls": 2})
def host_time(rounds: int = 25, calls: int = 200) -> dict[str, Any]:
    """What Python and torch take to call a layer whose arithmetic takes next to nothing: 64 x 64, one token.

    A GPU waits for its host where layers are called more slowly than it works: with few tokens a micro-batch, and in
    decoding. A reading is the mean of `calls` calls. "forward" keeps the graph, as in training. qdora finds its norms
    and operands prepared, as the micro-batches of a step do. A GPU runs other kernels.
    """
    base = random_base(HOST_SIZE, HOST_SIZE)
    layers = {name: layer_on(base, CONTENDERS[name], RANK) for name in HOST_NAMES}
    for name in ("own_lora", "own_dora"):
        AdapterOptimizer(dict(layers[name].named_parameters()))  # lets gradients of bf16 parameters stay float32

    def forward(layer: nn.Module) -> Tensor:
        made: Tensor = layer(torch.ones(1, 1, HOST_SIZE, dtype=torch.bfloat16, requires_grad=True))
        return made

    def forward_and_backward(layer: nn.Module) -> None:  # the adapter's gradients add up, as over micro-batches
        made = forward(layer)
        made.backward(made.detach())

    def repeated(call: Callable[[nn.Module], object], layer: nn.Module) -> None:
        for _ in range(calls):
            call(layer)

    passes = {}
    for name, call in {"forward": forward, "forward and backward": forward_and_backward}.items():
        taken = in_turns({each: functools.partial(repeated, call, layers[each]) for each in layers}, rounds, warmup=2)
        seconds = {each: [whole / calls for whole in found] for each, found in taken.items()}
        passes[name] = {
            "seconds": {each: spread(found) for each, found in seconds.items()},
            "ratios": ratios(seconds, HOST_RATIOS),
        }
    (bar, most), *_ = HOST_BAR.items()
    within = {name: each["ratios"][bar]["median"] <= most for name, each in passes.items()}
    sizes = {"size": HOST_SIZE, "rank": RANK, "num_rounds": rounds}
    return {**sizes, "passes": passes, "bar": HOST_BAR, "within": within}


@table("host_time")
def host_time_table(result: Any) -> str:
    """Microseconds that the host takes to call a layer, and own QDoRA's time relative to each contender."""
    passes = result["passes"]
    rows = []
    for layer in passes["forward"]["seconds"]:
        shares = [each["ratios"].get(f"own_dora / {layer}") for each in passes.values()]
        times = [f"{1e6 * each['seconds'][layer]['median']:.0f}" for each in passes.values()]
        rows.append([TITLES[layer], *times, *(quartiles(each) if each else "–" for each in shares)])
    verdicts = ", ".join(f"{name} {'met' if within else 'missed'}" for name, within in result["within"].items())
    note = (
        f"\n{result['size']} x {result['size']}, rank {result['rank']}, one token, {result['num_threads']} "
        f"thread, {result['num_rounds']} rounds. Target: qdora DoRA at most {result['bar']['own_dora / peft_lora']:g} "
        f"times PEFT LoRA: {verdicts}.\n"
    )
    header = ["", *(f"{name}, µs" for name in passes), *(f"{name}, qdora DoRA / this one" for name in passes)]
    return markdown(header, rows) + note


PEFT_ROUNDS, REFERENCE = 21, "peft_lora"
PEFT_NAMES = (REFERENCE, "peft_dora", "qdora_peft_lora", "qdora_peft_dora", "axolotl_dora", "axolotl_dora_uncached")
PEFT_SHAPES, PEFT_TOKENS, LAYER_SECONDS = ((4096, 4096), (4096, 11_008), (576, 1536)), (512, 2048), 20.0
# Name -> checkpointing, micro-batches, rows, tokens of a row; seconds.
STEPS = {
    "SmolLM2, checkpointing, 2 x 2 x 512": (True, 2, 2, 512, 150.0),
    "SmolLM2, 4 x 128": (False, 1, 4, 128, 60.0),
}
Run = Callable[[Callable[[], None]], None]
"""A call of a contender, from no gradients to none. It calls its argument after the first forward pass."""


@bench()
def peft_time(*, smoke: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """PEFT's LoRA against DoRA on PEFT's interface: PEFT's own, qdora.peft's, axolotl's algorithm; time and bytes.

    One layer, and a step of a model: forward, backward, clipping and torch's fused AdamW, rank 16, adapters in bf16
    (qdora's magnitudes are float32 always), every token labelled, the model's own loss. Each case has its seconds,
    after which no round begins.

    Bytes are counted by `LiveBytes` on real tensors in the second call; weights, adapters and inputs are there before.
    "kept": what the first call left alive (optimizer states, and what a layer keeps); "held": alive after the (first)
    forward, "peak": the most, "kept" among both.
    """
    keep_freed_memory()
    for name, runs, most_seconds in chain(_peft_layers(smoke), _peft_steps(smoke)):
        memory = {each: _bytes_of(run) for each, run in runs.items()}
        turns = {each: functools.partial(run, lambda: None) for each, run in runs.items()}
        seconds: dict[str, list[float]] = {each: [] for each in runs}
        began, number = time.monotonic(), 0
        while number < (2 if smoke else PEFT_ROUNDS) and (number == 0 or time.monotonic() - began < most_seconds):
            for each, found in in_turns(turns, 1, warmup=0, start=number).items():
                seconds[each] += found
            number += 1
        of_reference = {
            each: {what: found[what] / memory[REFERENCE][what] for what in ("held", "peak")}
            for each, found in memory.items()
        }
        yield (
            name,
            {
                "rounds": number,
                "seconds": {each: spread(found) for each, found in seconds.items()},
                "ratios": {each: ratio(found, seconds[REFERENCE]) for each, found in seconds.items()},
                "bytes": memory,
                "byte_ratios": of_reference,
            },
        )


def _peft_layers(smoke: bool) -> Iterator[tuple[str, dict[str, Run], float]]:
    for tokens in (8,) if smoke else PEFT_TOKENS:
        for shape in PEFT_SHAPES[2:] if smoke else PEFT_SHAPES:
            base = random_base(*shape)
            calls = {name: LayerCall(name, base, RANK, tokens) for name in PEFT_NAMES}
            runs: dict[str, Run] = {name: functools.partial(_layer_run, call) for name, call in calls.items()}
            yield f"layer {shape[0]} -> {shape[1]}, {tokens}", runs, LAYER_SECONDS


def _layer_run(call: LayerCall, after_forward: Callable[[], None]) -> None:
    y = call.layer(call.x)
    after_forward()
    y.backward(call.dy)
    call.clear()


def _peft_steps(smoke: bool) -> Iterator[tuple[str, dict[str, Run], float]]:
    builtin = smoke_model() if smoke else base_model(recipe(Path(), batch=1, checkpointing=False))
    for name, (checkpointing, num_micro_batches, rows, length, most_seconds) in STEPS.items():
        shape = (num_micro_batches, rows, 8 if smoke else length)
        ids = torch.randint(100, shape, generator=torch.Generator().manual_seed(0))
        models = {each: on_linear4bit(builtin, torch.bfloat16) for each in PEFT_NAMES}
        yield (
            name,
            {each: _step_run(CONTENDERS[each], models[each], checkpointing, ids) for each in models},
            most_seconds,
        )


def _step_run(contender: Any, base: Any, checkpointing: bool, micro_batches: Tensor) -> Run:
    if checkpointing:
        recompute_activations(base)
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


def _bytes_of(run: Run) -> dict[str, int]:
    held: list[int] = []
    with LiveBytes() as live:
        run(lambda: None)
        gc.collect()
        kept = live.live_bytes
        live.reset_peak()
        run(lambda: held.append(live.live_bytes))
        return {"kept": kept, "held": held[0], "peak": live.peak_bytes}


@table("peft_time")
def peft_time_table(result: Any) -> str:
    """Time and bytes of DoRA and LoRA on PEFT's interface, relative to PEFT's LoRA."""
    cases = result["cases"]
    names = [name for name in next(iter(cases.values()))["ratios"] if name != REFERENCE]
    header = ["", *(TITLES[name] for name in names)]
    times = [[case, *(quartiles(found["ratios"][name]) for name in names)] for case, found in cases.items()]
    sizes = [
        [case, *("{held:.2f}, {peak:.2f}".format_map(found["byte_ratios"][name]) for name in names)]
        for case, found in cases.items()
    ]
    between = "\nBytes held after the forward pass, and at the peak:\n\n"
    return f"{markdown(header, times)}{between}{markdown(header, sizes)}"


if __name__ == "__main__":
    main()
