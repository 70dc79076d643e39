"""Does the fast layer train as the plain formula does, and do eight micro-batches train as one batch does?

    python benchmarks/loss_curve.py DATA --out benchmarks/results/loss_curve.json [--smoke]

DATA holds <task>/<split>.parquet. DoRA of rank 16 on all linear layers of the first blocks of SmolLM2-135M in NF4, real
steps of the eight tasks; the data are the same for all, a seed is another start of lora_A. Arms:

    fast             qdora's layer in bf16
    plain            g (x W^T + s (x A^T) B^T) by torch and autograd in bf16, W dense, the norm of W + s B A in float32
    plain, recut     the same with other micro-batches: other shapes and orders of summation, the noise of bf16
    plain, float32   the same with float32 products: what bf16 rounds (first seed)
    lora             no magnitude: how far apart curves are that are not meant to be equal (first seed)

Then gradient accumulation on the whole model with checkpointing: eight examples in one batch, and one by one.

A finished curve stands in the result file at once: stopped, the same command goes on after it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from contenders import CONTENDERS, adapt, move_parameters_
from measure import facts, parsed, parser_of, write
from mixed_data import (
    FixedSteps,
    base_model,
    fitted,
    in_one_batch,
    one_by_one,
    real_steps,
    recipe,
    smoke_model,
    smoke_steps,
)
from torch import Tensor, nn
from torch.nn.functional import linear

import qdora.nn.adapted_linear
import qdora.nn.prepared_gains
from qdora.data.loader import Step
from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, adapter_parameters, replace_module
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import TrainConfig
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.passes import batch_loss

RANK, LR = 16, 5e-4
SEEDS = (0, 1, 2)
ARMS = {"fast": SEEDS, "plain": SEEDS, "plain, recut": SEEDS, "plain, float32": SEEDS[:1], "lora": SEEDS[:1]}
PAIRS = (
    ("fast", "plain"),
    ("plain, recut", "plain"),
    ("plain, float32", "plain"),
    ("plain, float32", "fast"),
    ("lora", "plain"),
)
# Steps that stand for the end of a curve.
TAIL = 100
# How much farther than the noise of bf16 the fast path may be from the plain formula.
ALLOWED = 1.5


class PlainDora(nn.Module):
    """The formula written down, from a fresh adapted layer: dense W, norm in float32 and detached, autograd's backward.

    Args:
        layer: Gives the dequantised base, s, and the start of A, B and m.
        dtype: Of the base and the products.
    """

    def __init__(self, layer: AdaptedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        assert layer.base.bias is None
        assert layer.magnitude is not None
        self.register_buffer("weight", layer.base.dequantized(dtype))
        self.scaling = layer.scaling
        self.lora_A, self.lora_B = nn.Parameter(layer.lora_A.detach()), nn.Parameter(layer.lora_B.detach())
        self.magnitude = nn.Parameter(layer.magnitude.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        with torch.no_grad():
            product = self.lora_B.float() @ self.lora_A.float()
            norm = torch.linalg.vector_norm(self.weight.float() + self.scaling * product, dim=1)
        low = linear(linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return ((self.magnitude / norm) * (linear(x, self.weight) + self.scaling * low)).to(x.dtype)


def main() -> None:
    """All arms one after the other, in one process."""
    parser = parser_of(__doc__, "loss_curve", smoke="a random model and a few steps", data=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=3, help="of the model's 30, for the curves")
    args = parsed(parser)
    keep_freed_memory()
    head = facts(
        f"python benchmarks/loss_curve.py DATA --steps {args.steps} --batch {args.batch} --blocks {args.blocks}"
    )
    num_steps = 3 if args.smoke else args.steps
    steps = smoke_steps(num_steps) if args.smoke else real_steps(settings(args), num_steps)
    bases = {dtype: load(dtype, args) for dtype in (torch.bfloat16, torch.float32)}
    result = {
        **head,
        "num_steps": num_steps,
        "num_tokens": sum(step.num_tokens for step in steps),
        "num_label_tokens": sum(step.num_label_tokens for step in steps),
        "learning_rate": LR,
        "rank": RANK,
        "num_blocks": args.blocks,
    }
    curves = finished_curves(args.out, result)
    done = {(each["arm"], each["seed"]) for each in curves}
    for arm, seeds in ARMS.items():
        for seed in seeds:
            if (arm, seed) not in done:
                curves.append({"arm": arm, "seed": seed, "losses": curve(arm, seed, steps, bases, args.blocks)})
                write(args.out, result | {"curves": curves})
    accumulated_steps = accumulation(steps[:3], bases)
    result |= {"curves": curves, "gaps": compared(curves), "accumulation": accumulated_steps}
    write(args.out, {**result, "passes": {**verdict(result["gaps"]), **accumulation_verdict(accumulated_steps)}})


def finished_curves(out: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The curves that an unfinished result of the same settings and versions has already."""
    if not out.is_file():
        return []
    before = json.loads(out.read_text(encoding="utf-8"))
    same = all(before.get(name) == value for name, value in head.items() if name != "commit")
    return before["curves"] if same and "gaps" not in before else []


def settings(args: argparse.Namespace) -> Recipe:
    """The recipe of the data and the base."""
    return recipe(args.data.resolve(), batch=args.batch, checkpointing=False)


def load(dtype: torch.dtype, args: argparse.Namespace) -> Any:
    """The frozen base; every arm takes a copy."""
    return smoke_model(dtype) if args.smoke else base_model(settings(args), dtype)


def curve(arm: str, seed: int, steps: list[Step], bases: dict[torch.dtype, Any], num_blocks: int) -> list[float]:
    """The loss of each step, nats per labelled token."""
    dtype = torch.float32 if arm == "plain, float32" else torch.bfloat16
    model = copy.deepcopy(bases[dtype])
    model.model.layers = model.model.layers[:num_blocks]
    adapt(model, CONTENDERS["own_lora" if arm == "lora" else "own_dora"], RANK, seed=seed)
    if arm.startswith("plain"):
        for path, layer in adapted_layers(model).items():
            replace_module(model, path, PlainDora(layer, dtype))
    if arm == "plain, recut":
        steps = [in_one_batch(step) for step in steps]
    return [line["loss"] for line in train(model, AdapterOptimizer(adapter_parameters(model)), steps)]


def train(model: Any, optimizer: AdapterOptimizer, steps: list[Step]) -> list[dict[str, Any]]:
    """qdora's loop over the given steps; its lines of metrics."""
    settings = TrainConfig(steps=len(steps), batch=1, lr=LR, schedule="linear", warmup=min(10, len(steps)))
    return fitted(model, optimizer, FixedSteps(steps), settings)


def compared(curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Distances of curves: arms of one seed, and seeds of one arm."""
    losses = {(each["arm"], each["seed"]): each["losses"] for each in curves}
    found = {
        f"{first} – {second}": [gap(losses[first, seed], losses[second, seed]) for seed in ARMS[first]]
        for first, second in PAIRS
    }
    for arm in ("fast", "plain"):
        seeds = itertools.combinations(SEEDS, 2)
        found[f"seeds of {arm}"] = [gap(losses[arm, one], losses[arm, other]) for one, other in seeds]
    return found


def gap(losses: list[float], others: list[float]) -> dict[str, float]:
    """Distance of two curves step by step, and their signed difference at the end, nats."""
    differences = [a - b for a, b in zip(losses, others, strict=True)]
    tail = differences[-TAIL:]
    return {
        "mean_nats": sum(map(abs, differences)) / len(differences),
        "largest_nats": max(map(abs, differences)),
        "tail_nats": sum(tail) / len(tail),
    }


def mean(gaps: list[dict[str, float]], name: str = "mean_nats") -> float:
    """Over pairs, of absolute values."""
    return sum(abs(each[name]) for each in gaps) / len(gaps)


def verdict(gaps: dict[str, list[dict[str, float]]]) -> dict[str, bool]:
    """Fast against plain: no farther than bf16's noise (`ALLOWED`), nor than seeds are from each other; and no farther
    from float32 than plain is."""
    found = mean(gaps["fast – plain"])
    return {
        "within_bf16_noise": found <= ALLOWED * mean(gaps["plain, recut – plain"]),
        "within_seeds": found <= mean(gaps["seeds of plain"]),
        "as_near_to_float32": mean(gaps["plain, float32 – fast"]) <= ALLOWED * mean(gaps["plain, float32 – plain"]),
    }


@dataclass(frozen=True)
class Accumulated:
    """What one cut of the steps gave.

    Attributes:
        num_micro_batches: Of each step.
        gradient, update: Of the first step, all parameters in one vector, float32; the update of the full values.
        losses: Of all steps, nats per labelled token.
        norms: Row norms computed, per layer and optimizer step.
    """

    num_micro_batches: list[int]
    gradient: Tensor
    update: Tensor
    losses: list[float]
    norms: float


def accumulation(steps: list[Step], bases: dict[torch.dtype, Any]) -> dict[str, Any]:
    """Eight examples in one batch against one by one, in both dtypes; what bf16 rounds as the yardstick."""
    found = {
        (dtype, cut): accumulated(copy.deepcopy(base), [cut(step) for step in steps])
        for dtype, base in bases.items()
        for cut in (in_one_batch, one_by_one)
    }
    exact = found[torch.float32, in_one_batch]
    result: dict[str, Any] = {}
    for dtype in bases:
        whole, single = found[dtype, in_one_batch], found[dtype, one_by_one]
        result[str(dtype).removeprefix("torch.")] = {
            "num_micro_batches": [whole.num_micro_batches, single.num_micro_batches],
            "norms_per_layer_and_step": [whole.norms, single.norms],
            "losses": [whole.losses, single.losses],
            "largest_loss_difference_nats": max(map(abs, map(float.__sub__, whole.losses, single.losses))),
            "gradient_difference": relative(single.gradient, whole.gradient),
            "update_difference": relative(single.update, whole.update),
            "gradient_to_float32": relative(whole.gradient, exact.gradient),
            "update_to_float32": relative(whole.update, exact.update),
        }
    return result


def accumulated(model: Any, steps: list[Step]) -> Accumulated:
    """The whole model with checkpointing, trained on the steps from parameters that are off their start."""
    recompute_activations(model)
    adapt(model, CONTENDERS["own_dora"], RANK)
    move_parameters_(model)
    model.train()
    optimizer = AdapterOptimizer(adapter_parameters(model))
    for part in steps[0].micro_batches:
        loss = batch_loss(model, part.input_ids, part.attention_mask, part.labels)
        (loss.nll_sum / steps[0].num_label_tokens).backward()
    gradient = flat([parameter.grad for parameter in optimizer.parameters.values()])
    optimizer.zero_grad()
    before = flat([optimizer.master(key) for key in optimizer.parameters])
    with counted_norms() as calls:
        lines = train(model, optimizer, steps[:1])
        update = flat([optimizer.master(key) for key in optimizer.parameters]) - before
        lines += train(model, optimizer, steps[1:])
    return Accumulated(
        num_micro_batches=[len(step.micro_batches) for step in steps],
        gradient=gradient,
        update=update,
        losses=[line["loss"] for line in lines],
        norms=len(calls) / len(adapted_layers(model)) / len(steps),
    )


@contextmanager
def counted_norms() -> Iterator[list[int]]:
    """While active, an entry is added for each row norm that a layer computes, by itself or ahead of its forward."""
    calls: list[int] = []

    def alone(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return row_norm(*arguments, **options)

    def together(weights: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        calls.extend([1] * len(weights))
        return factored_norms(weights, *arguments, **options)

    row_norm, factored_norms = qdora.nn.adapted_linear.row_norm, qdora.nn.prepared_gains.factored_norms
    with (
        mock.patch.object(qdora.nn.adapted_linear, "row_norm", alone),
        mock.patch.object(qdora.nn.prepared_gains, "factored_norms", together),
    ):
        yield calls


def flat(tensors: list[Tensor]) -> Tensor:
    """All entries in one float32 vector."""
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())


def accumulation_verdict(found: dict[str, Any]) -> dict[str, bool]:
    """At most one norm per layer and step; float32 equal but for rounding, bf16 no farther than that from float32."""
    narrow, wide = found["bfloat16"], found["float32"]
    counts = [*narrow["norms_per_layer_and_step"], *wide["norms_per_layer_and_step"]]
    return {
        # The first step may find the norms that were computed when the adapters were put on.
        "one_norm_per_step": min(counts) > 0 and max(counts) <= 1,
        "accumulation_float32": wide["gradient_difference"] <= 1e-4 and wide["largest_loss_difference_nats"] <= 1e-4,
        "accumulation_bfloat16": narrow["gradient_difference"] <= ALLOWED * narrow["gradient_to_float32"]
        and narrow["update_difference"] <= ALLOWED * narrow["update_to_float32"],
    }


if __name__ == "__main__":
    main()
