"""Do bf16-stored adapters train as float32-stored ones do, and do the magnitudes move at a small learning rate?

The same seed, start and data order for all arms of a compute dtype. In float32 compute the gap between the curves is
what storage does; in bf16 compute every difference in the last bit grows to the noise of bf16 arithmetic, and a
float32-stored arm whose micro-batches are cut otherwise shows how large that is. Two arms run at once, a thread each.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from frame import bench, main, table, tabulated
from measure import OFFLINE, ONE_THREAD, alone
from mixed_data import fitted, loader_of

from qdora.memory.oom import keep_freed_memory
from qdora.model.build_model import choose_compute, find_model, put_adapters
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.recipe.recipe_file import recipe_from
from qdora.run.base import load_base
from qdora.train.optimizer import AdapterOptimizer

TASKS = ("obqa", "arc_e", "winogrande", "siqa")
# Compute dtype, storage.
ARMS = [("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
ARMS += [("bfloat16", "float32, other micro-batches"), ("bfloat16", "plain bf16")]


class PlainBf16AdamW:
    """torch.optim.AdamW on parameters that are all bf16, with the interface of AdapterOptimizer."""

    undecayed = ()

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.inner = torch.optim.AdamW(list(parameters.values()), weight_decay=0.0)

    def step(self, lr: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()

    zero_grad = AdapterOptimizer.zero_grad
    _gradients = AdapterOptimizer._gradients
    gradient_norm = AdapterOptimizer.gradient_norm
    scale_gradients_ = AdapterOptimizer.scale_gradients_


@bench(smoke={"steps": 2, "batch": 2})
def magnitudes(data: Path | None, *, steps: int = 200, batch: int = 8) -> dict[str, Any]:
    mix = [{"task": task, "path": str(data.resolve() / task)} for task in TASKS] if data else [{"task": "demo/facts"}]

    def run(arm: tuple[str, str]) -> Any:
        return alone(run_arm, *arm, mix, steps, batch, variables=ONE_THREAD | OFFLINE)

    with ThreadPoolExecutor(2) as pool:
        arms = list(pool.map(run, ARMS))
    for arm in arms:
        reference = next(other for other in arms if (other["compute"], other["storage"]) == (arm["compute"], "float32"))
        gaps = [abs(a - b) for a, b in zip(arm["losses"], reference["losses"], strict=True)]
        known = {"mean_nats": sum(gaps) / len(gaps), "largest_nats": max(gaps)}
        arm["gap_to_float32_storage"] = None if arm is reference else known
    return {"learning_rate": 1e-4, "arms": arms}


def run_arm(compute: str, arm: str, mix: list[dict[str, str]], steps: int, batch: int) -> dict[str, Any]:
    """Train one arm; its losses and the share of entries that differ from their start."""
    keep_freed_memory()
    micro_batch = 256 if arm.endswith("micro-batches") else 2048
    train = {"steps": steps, "batch": batch, "lr": 1e-4, "schedule": "linear", "warmup": min(10, steps)}
    recipe = recipe_from(
        {
            "model": {"source": "builtin"},
            "adapter": {"kind": "dora", "rank": 16, "dtype": "float32" if arm.startswith("float32") else "bfloat16"},
            "data": {"mix": mix, "strategy": "equal", "max_length": 256, "too_long": "drop"},
            "train": train | {"micro_batch_tokens": micro_batch, "optimizer": "adamw"},
            "memory": {"checkpointing": False},
        }
    )
    torch.manual_seed(0)
    model = load_base(recipe, find_model(recipe)[0], choose_compute(compute))
    put_adapters(model, recipe)
    for layer in adapted_layers(model).values():
        layer.lora_A.data = layer.lora_A.data.bfloat16().to(layer.lora_A.dtype)  # the same start for every storage
        if arm == "plain bf16":
            layer.magnitude.data = layer.magnitude.data.bfloat16()
    parameters = adapter_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer: Any = PlainBf16AdamW(parameters) if arm == "plain bf16" else AdapterOptimizer(parameters)
    losses = [line["loss"] for line in fitted(model, optimizer, loader_of(recipe), recipe.train)]
    moved = {}
    for leaf in ("magnitude", "lora_A", "lora_B"):
        names = [name for name in start if name.endswith(leaf)]
        changed = sum(int((parameters[name] != start[name]).sum()) for name in names)
        moved[leaf] = changed / sum(start[name].numel() for name in names)
    return {"compute": compute, "storage": arm, "losses": losses, "share_moved": moved}


@table("magnitudes")
def magnitudes_table(result: Any) -> str:
    def distance(name: str) -> Any:
        return lambda arm: f"{gaps[name]:.1e}" if (gaps := arm["gap_to_float32_storage"]) else "–"

    columns = {
        "storage (compute)": "{storage} ({compute})",
        "magnitudes moved": "{share_moved[magnitude]:.2%}",
        "lora_A": "{share_moved[lora_A]:.2%}",
        "lora_B": "{share_moved[lora_B]:.2%}",
        "largest gap to float32 storage": distance("largest_nats"),
        "mean gap": distance("mean_nats"),
    }
    return tabulated(result["arms"], columns)


if __name__ == "__main__":
    main()
