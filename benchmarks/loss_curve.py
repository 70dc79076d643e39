"""Does the fast layer train as the plain formula does?

DATA holds <task>/<split>.parquet. DoRA of rank 16 on all linear layers of the first blocks of SmolLM2-135M in NF4, real
steps of the eight tasks; the data are the same for all, a seed is another start of lora_A. Arms:

    fast             qdora's layer in bf16
    plain            g (x W^T + s (x A^T) B^T) by torch and autograd in bf16, W dense, the norm of W + s B A in float32
    plain, recut     the same with other micro-batches: other shapes and orders of summation, the noise of bf16
    plain, float32   the same with float32 products: what bf16 rounds (first seed)
    lora             no magnitude: how far apart curves are that are not meant to be equal (first seed)

A finished curve stands in the result file at once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, adapt
from frame import bench, main, table, tabulated
from mixed_data import FixedSteps, base_model, fitted, in_one_batch, real_steps, recipe, smoke_model, smoke_steps
from torch import Tensor, nn
from torch.nn.functional import linear

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.data.loader import Step
from qdora.memory.allocator import keep_freed_memory
from qdora.model.inject import adapted_layers, adapter_parameters, replace_module
from qdora.recipe.train_settings import TrainConfig
from qdora.train.optimizer import AdapterOptimizer

RANK, LR, SEEDS = 16, 5e-4, (0, 1, 2)
ARMS = {"fast": SEEDS, "plain": SEEDS, "plain, recut": SEEDS, "plain, float32": SEEDS[:1], "lora": SEEDS[:1]}
PAIRS = {
    "fast – plain": "fast, plain formula",
    "plain, recut – plain": "plain, plain with other micro-batches",
    "seeds of plain": "plain, another seed",
    "seeds of fast": "fast, another seed",
    "plain, float32 – plain": "plain in float32, plain",
    "plain, float32 – fast": "plain in float32, fast",
    "lora – plain": "LoRA, plain",
}
"""Pairs of arms, and what the table calls them."""
TAIL, ALLOWED = 100, 1.5
"""Steps that stand for the end of a curve; how much farther than the noise of bf16 the fast path may be from plain."""


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


@bench(smoke={"steps": 3}, rows="curves")
def loss_curve(data: Path | None, *, steps: int = 300, batch: int = 8, blocks: int = 3) -> Iterator[dict[str, Any]]:
    """A curve for each arm and seed; `blocks` are those of the model's 30 that are trained."""
    keep_freed_memory()
    settings = recipe(data.resolve(), batch=batch, checkpointing=False) if data else None
    real = real_steps(settings, steps) if settings else smoke_steps(steps)
    dtypes = (torch.bfloat16, torch.float32)
    bases = {dtype: base_model(settings, dtype) if settings else smoke_model(dtype) for dtype in dtypes}
    losses = {}
    for arm, seed in ((arm, seed) for arm, seeds in ARMS.items() for seed in seeds):
        losses[arm, seed] = curve(arm, seed, real, bases, blocks)
        yield {"arm": arm, "seed": seed, "losses": losses[arm, seed]}
    gaps = {}
    for pair in PAIRS:
        first, _, second = pair.rpartition(" – ")
        both = [((first, seed), (second, seed)) for seed in ARMS.get(first, ())]
        if pair.startswith("seeds of "):
            arm = pair.removeprefix("seeds of ")
            both = [((arm, one), (arm, other)) for one, other in itertools.combinations(SEEDS, 2)]
        gaps[pair] = [gap(losses[one], losses[other]) for one, other in both]
    return {  # type: ignore[return-value]  # a generator's last word is added to the result
        "num_steps": steps,
        "num_tokens": sum(step.num_tokens for step in real),
        "learning_rate": LR,
        "rank": RANK,
        "num_blocks": blocks,
        "gaps": gaps,
        "passes": {
            "within_bf16_noise": mean(gaps["fast – plain"]) <= ALLOWED * mean(gaps["plain, recut – plain"]),
            "within_seeds": mean(gaps["fast – plain"]) <= mean(gaps["seeds of plain"]),
            "as_near_to_float32": mean(gaps["plain, float32 – fast"]) <= ALLOWED * mean(gaps["plain, float32 – plain"]),
        },
    }


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
    train = TrainConfig(steps=len(steps), batch=1, lr=LR, schedule="linear", warmup=min(10, len(steps)))
    lines = fitted(model, AdapterOptimizer(adapter_parameters(model)), FixedSteps(steps), train)
    return [line["loss"] for line in lines]


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


@table("loss_curve")
def loss_curve_table(result: Any) -> str:
    """Distances of loss curves."""
    columns = {
        "curves": lambda row: PAIRS[row[0]],
        "pairs": lambda row: str(len(row[1])),
        "mean gap, nats": lambda row: f"{mean(row[1]):.4f}",
        "largest gap": lambda row: f"{max(each['largest_nats'] for each in row[1]):.4f}",
        f"gap of the last {TAIL} steps' means": lambda row: f"{mean(row[1], 'tail_nats'):.4f}",
    }
    table = tabulated([(pair, result["gaps"][pair]) for pair in PAIRS], columns)
    return f"{table}\n{result['num_steps']} steps, {result['num_blocks']} blocks.\n"


if __name__ == "__main__":
    main()
