"""Gates on SmolLM2-135M: whether the budget is reached, whether anything jumps when components go, and what it saves.

    OMP_NUM_THREADS=2 python benchmarks/gates.py DATA --out benchmarks/results/gates.json
        [--part budget|cost] [--steps 24] [--rounds 12] [--smoke]

DATA holds <task>/<split>.parquet. NF4 in blocks of 64, QDoRA on all linear layers, real steps of the eight tasks.
Budget: a run from rank 16 for each mode and target, in float32; kept are the budget reached and the loss of a fixed
batch just before and after each removal of components. A call goes on where the file ends. Cost: an L1 run from rank 64
to mean rank 8; then the bytes that adapters and optimizer hold, the live bytes of a step at its peak, and its time, in
bf16, of three models: gated at full rank, shrunk to the ranks of that run (its gates folded into lora_B), and ungated
at full rank. Step by step in turns on the same examples: one step again and again, as with packed rows of one length,
and steps of new lengths, for which a CPU's bf16 products compile a kernel for each pair of rank and length.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from measure import facts, in_turns, parsed, parser_of, ratio, save, spread, write
from mixed_data import FixedSteps, base_model, fitted, real_steps, recipe, smoke_model, smoke_steps
from step_time import own_step

from qdora.data.loader import Step
from qdora.memory.allocator import keep_freed_memory
from qdora.model.inject import adapted_layers, adapter_parameters, inject
from qdora.plan.live_bytes import LiveBytes
from qdora.recipe.settings import GateConfig
from qdora.recipe.train_settings import TrainConfig
from qdora.train.gates import Gates
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.passes import batch_loss

SCALING, LR = 2.0, 5e-4
RANKS = {"budget": 16, "cost": 64}
# Examples of a step: few where only the course of the gates is looked at.
BATCHES = {"budget": 2, "cost": 8}
MODES = ("l1", "hard_concrete")
TARGETS: dict[str, dict[str, float]] = {
    "mean rank 4": {"mean_rank": 4.0},
    "mean rank 8": {"mean_rank": 8.0},
    "a third of the parameters": {"share": 1 / 3},
}
COST_TARGET = {"mean_rank": 8.0}


class WatchedGates(Gates):
    """Gates that note the loss before and after each removal.

    Attributes:
        jumps: (before, after), in nats a token.
    """

    def __init__(self, model: Any, settings: GateConfig, num_steps: int, step: Step) -> None:
        super().__init__(adapted_layers(model), settings, num_steps, seed=0)
        self.model, self.step = model, step
        self.jumps: list[tuple[float, float]] = []

    def remove_dead(self, optimizer: AdapterOptimizer) -> None:
        """As `Gates.remove_dead`."""
        before, held = loss_of(self.model, self.step), self.num_components
        super().remove_dead(optimizer)
        if self.num_components < held:
            self.jumps.append((before, loss_of(self.model, self.step)))

    @property
    def num_components(self) -> int:
        """Of all layers, dead or alive."""
        return sum(layer.rank for layer in self.layers.values())


def main() -> None:
    """The asked parts, added to what the result file holds."""
    args = arguments()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() and not args.smoke else {}
    result |= facts("python benchmarks/gates.py DATA")
    result |= {"ranks": RANKS, "batch": BATCHES, "steps": args.steps}
    keep_freed_memory()
    if args.part in (None, "budget"):
        found = result.setdefault("budget", {})
        for mode in MODES:
            for name, target in TARGETS.items():
                if name not in found.setdefault(mode, {}):
                    found[mode][name], _ = budget_run("budget", mode, target, args)
                    if not args.smoke:
                        save(args.out, result)
    if args.part in (None, "cost"):
        result["cost"] = cost(args)
    write(args.out, result | {"passes": verdict(result)})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "gates", smoke="a random model and few steps", data=True)
    parser.add_argument("--part", choices=("budget", "cost"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=12)
    args = parsed(parser)
    args.data = None if args.smoke else args.data.resolve()
    if args.smoke:
        args.steps, args.rounds = 8, 2
    return args


def model_of(part: str, dtype: torch.dtype, data: Path | None, ranks: Mapping[str, int] | None = None) -> Any:
    """QDoRA of the part's rank, or of the given ranks with the same scaling, in training mode."""
    base = copy.deepcopy(base_of(dtype, data))
    rank, start = RANKS[part], torch.Generator().manual_seed(0)
    if data is None:
        rank = 16
    scaled = {"alpha": SCALING * rank, "rank_pattern": ranks or {}, "same_scaling": bool(ranks)}
    inject(base, rank=rank, dtype=torch.bfloat16, generator=start, **scaled)  # type: ignore[arg-type]
    return base.train()


@functools.cache
def base_of(dtype: torch.dtype, data: Path | None) -> Any:
    """The base, loaded once; None: a random one."""
    return smoke_model(dtype) if data is None else base_model(recipe(data, batch=1, checkpointing=False), dtype)


@functools.cache
def steps_of(part: str, num_steps: int, data: Path | None) -> list[Step]:
    """The first steps of a run; None: random ones."""
    if data is None:
        return smoke_steps(num_steps)
    return real_steps(recipe(data, batch=BATCHES[part], checkpointing=False), num_steps)


@torch.no_grad()
def loss_of(model: Any, step: Step) -> float:
    """Nats per labelled token of a step."""
    total = 0.0
    for micro in step.micro_batches:
        loss = batch_loss(model, micro.input_ids, micro.attention_mask, micro.labels, packing=micro.packing)
        total += float(loss.nll_sum)
    return total / step.num_label_tokens


def budget_run(
    part: str, mode: str, target: Mapping[str, float], args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, int]]:
    """One run to a target: what was reached and what each removal did to the loss; then the rank of each layer."""
    model = model_of(part, torch.float32, args.data)
    full = sum(layer.rank * (layer.in_features + layer.out_features) for layer in adapted_layers(model).values())
    asked: dict[str, Any] = dict(target) if "share" not in target else {"parameters": int(target["share"] * full)}
    steps = steps_of("budget", args.steps + 1, args.data)
    settings = GateConfig(mode=mode, **asked, warmup=0.15, anneal=0.6, shrink_every=4)
    gates = WatchedGates(model, settings, args.steps, steps[-1])
    gates.check_budget()
    optimizer = AdapterOptimizer(adapter_parameters(model))
    train = TrainConfig(steps=args.steps, batch=1, lr=LR, schedule="constant", warmup=0.1)
    before = loss_of(model, steps[-1])
    fitted(model, optimizer, FixedSteps(steps[:-1]), train, gates=gates)
    ((kind, wanted),) = asked.items()
    reached = gates.mean_rank if kind == "mean_rank" else gates.num_parameters
    found = {
        "asked": asked,
        "reached": reached,
        "deviation": reached / wanted - 1.0,
        "num_parameters": [full, gates.num_parameters],
        "held_out_step": {"before": before, "after": loss_of(model, steps[-1])},
        "removals": gates.jumps,
        "largest_jump": max(abs(after / before - 1.0) for before, after in gates.jumps),
    }
    return found, {name: layer.rank for name, layer in adapted_layers(model).items()}


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes and time of a step at full rank with gates, shrunk, and without gates."""
    steps = steps_of("cost", args.rounds + 2, args.data)
    run, ranks = budget_run("cost", "l1", COST_TARGET, args)
    trainers, found = {}, {}
    for name, pattern in (("gated", None), ("shrunk", ranks), ("ungated", None)):
        model = model_of("cost", torch.bfloat16, args.data, pattern)
        optimizer = AdapterOptimizer(adapter_parameters(model))
        for layer in adapted_layers(model).values() if name == "gated" else ():
            layer.add_gate()
        trainers[name] = functools.partial(own_step, model, optimizer)
        found[name] = {"num_parameters": sum(p.numel() for p in optimizer.parameters.values())}
        trainers[name](steps[0])
        found[name] |= bytes_of(model, optimizer, steps[1])
    times = {"one length": timed(trainers, [steps[1]] * args.rounds), "new lengths": timed(trainers, steps[2:])}
    return {"run": run, **found, "times": times}


def timed(trainers: Mapping[str, Callable[[Step], object]], steps: list[Step]) -> dict[str, Any]:
    """Seconds of each step in turns, and their ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number, step in enumerate(steps):
        turns = {name: functools.partial(each, step) for name, each in trainers.items()}
        for name, each in in_turns(turns, 1, warmup=int(number == 0), start=number).items():
            seconds[name] += each
    return {
        "seconds": seconds,
        "median_seconds": {name: spread(each) for name, each in seconds.items()},
        "ratios": {
            f"{first} / {second}": ratio(seconds[first], seconds[second])
            for first, second in (("shrunk", "gated"), ("shrunk", "ungated"), ("gated", "ungated"))
        },
    }


def bytes_of(model: Any, optimizer: AdapterOptimizer, step: Step) -> dict[str, int]:
    """What adapters and optimizer hold between steps, and what lives at a step's peak beside the base."""
    with LiveBytes() as live:
        layers = adapted_layers(model)
        live.register([p for layer in layers.values() for p in layer.parameters(recurse=False)], "adapter")
        live.register(optimizer.state_tensors().values(), "optimizer")
        held = live.live_bytes
        own_step(model, optimizer, step)
        peak = live.peak_bytes
    return {"held_bytes": held, "step_peak_bytes": peak}


def verdict(result: Mapping[str, Any]) -> dict[str, bool]:
    """The budget within 2 %, no jump beyond float32's rounding, less memory and time."""
    runs = [run for targets in result.get("budget", {}).values() for run in targets.values()]
    runs += [result["cost"]["run"]] if "cost" in result else []
    passes = {
        "budget within 2 %": all(abs(run["deviation"]) <= 0.02 for run in runs),
        "no jump of the loss": all(run["largest_jump"] < 1e-5 for run in runs),
    }
    if "cost" in result:
        cost_ = result["cost"]
        passes["less held"] = cost_["shrunk"]["held_bytes"] < cost_["gated"]["held_bytes"]
        passes["less at the peak"] = cost_["shrunk"]["step_peak_bytes"] < cost_["gated"]["step_peak_bytes"]
        passes["faster"] = cost_["times"]["one length"]["ratios"]["shrunk / ungated"]["median"] < 1.0
    return passes


if __name__ == "__main__":
    main()
