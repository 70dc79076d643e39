"""Do bf16-stored adapters train as float32-stored ones do, and do the magnitudes move at a small learning rate?

    python benchmarks/magnitudes.py DATA --out benchmarks/results/magnitudes.json

DATA holds <task>/<split>.parquet. SmolLM2-135M in NF4, DoRA rank 16 on all linear layers, lr 1e-4, the same seed, start
and data order for all arms of a compute dtype. In float32 compute the gap between the curves is what storage does; in
bf16 compute every difference in the last bit grows to the noise of bf16 arithmetic, and a float32-stored arm whose
micro-batches are cut otherwise shows how large that is. "plain bf16" is torch's AdamW on bf16 parameters, magnitudes
included: the set-up in which they do not move. Two arms run at once, a thread each.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from loss_curve import gap
from measure import OFFLINE, ONE_THREAD, facts, fresh, parser_of, write
from mixed_data import fitted

from qdora.data.build_data import make_loader, read_data, tokenized_mix
from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import choose_compute, find_model, put_adapters
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.train_settings import TrainConfig
from qdora.run.load_base import load_base
from qdora.train.optimizer import AdapterOptimizer


class PlainBf16AdamW:
    """torch.optim.AdamW on parameters that are all bf16, with the interface of AdapterOptimizer."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.inner = torch.optim.AdamW(list(parameters.values()), weight_decay=0.0)

    def step(self, lr: float) -> None:
        """One update."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()

    zero_grad = AdapterOptimizer.zero_grad
    gradient_norm = AdapterOptimizer.gradient_norm
    scale_gradients_ = AdapterOptimizer.scale_gradients_


ARMS = (
    ("float32", "bfloat16"),
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("bfloat16", "float32, other micro-batches"),
    ("bfloat16", "plain bf16"),
)
"""Compute dtype, storage."""


def run_arm(compute: str, arm: str, data: Path, steps: int, batch: int) -> dict[str, Any]:
    """Train one arm; its losses and the share of entries that differ from their start."""
    storage = "float32" if arm.startswith("float32") else "bfloat16"
    recipe = recipe_from(
        {
            "model": {"source": "builtin"},
            "adapter": {"kind": "dora", "rank": 16, "dtype": storage},
            "data": {
                "mix": [{"task": task, "path": str(data / task)} for task in ("obqa", "arc_e", "winogrande", "siqa")],
                "strategy": "equal",
                "max_length": 256,
                "too_long": "drop",
            },
            "train": {
                "steps": steps,
                "batch": batch,
                "lr": 1e-4,
                "warmup": 10,
                "optimizer": "adamw",
                "micro_batch_tokens": 256 if arm.endswith("micro-batches") else 2048,
            },
            "memory": {"checkpointing": False},
        }
    )
    source, tokenizer = find_model(recipe)
    loader = make_loader(recipe, tokenized_mix(recipe, tokenizer, read_data(recipe.data)[0]), tokenizer)
    torch.manual_seed(0)
    model = load_base(recipe, source, choose_compute(compute))
    put_adapters(model, recipe)
    for layer in adapted_layers(model).values():
        layer.lora_A.data = layer.lora_A.data.bfloat16().to(layer.lora_A.dtype)  # the same start for every storage
    if arm == "plain bf16":
        for layer in adapted_layers(model).values():
            assert layer.magnitude is not None
            layer.magnitude.data = layer.magnitude.data.bfloat16()
    start = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    parameters = adapter_parameters(model)
    optimizer: Any = PlainBf16AdamW(parameters) if arm == "plain bf16" else AdapterOptimizer(parameters)
    settings = TrainConfig(steps=steps, batch=1, lr=1e-4, schedule="linear", warmup=min(10, steps))
    lines = fitted(model, optimizer, loader, settings)
    moved = {}
    for leaf in ("magnitude", "lora_A", "lora_B"):
        names = [name for name in start if name.endswith(leaf)]
        changed = sum(int((parameters[name] != start[name]).sum()) for name in names)
        moved[leaf] = changed / sum(start[name].numel() for name in names)
    return {"compute": compute, "storage": arm, "losses": [line["loss"] for line in lines], "share_moved": moved}


def main() -> None:
    """Run the arms, two at a time, and compare their curves."""
    parser = parser_of(__doc__, "magnitudes")
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        keep_freed_memory()
        print(json.dumps(run_arm(*ARMS[args.worker], args.data.resolve(), args.steps, args.batch)))
        return

    def start(index: int) -> Any:
        options = (*sys.argv[1:], "--worker", str(index))
        return fresh(__file__, *options, variables=ONE_THREAD | OFFLINE, errors=None)

    with ThreadPoolExecutor(2) as pool:
        arms = list(pool.map(start, range(len(ARMS))))
    for arm in arms:
        reference = next(other for other in arms if (other["compute"], other["storage"]) == (arm["compute"], "float32"))
        arm["gap_to_float32_storage"] = None if arm is reference else gap(arm["losses"], reference["losses"])
    command = f"python benchmarks/magnitudes.py DATA --steps {args.steps} --batch {args.batch}"
    write(args.out, {**facts(command), "learning_rate": 1e-4, "arms": arms})


if __name__ == "__main__":
    main()
