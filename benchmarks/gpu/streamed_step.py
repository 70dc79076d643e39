"""Training steps of models that are larger than the card: blocks in pinned host memory, copied in while others compute.

Random weights; every block has bytes of its own. The share of the copies that is hidden: the same steps are timed with
copies that are left out (the numbers are then wrong, the work is the same), and the copies alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from random_weights import random_checkpoint
from torch import Tensor
from transformers import LlamaConfig

from gpu import device as on
from gpu.model_step import fitting_step, keep_no_scales, peak_and_time
from gpu.part import Part
from gpu.plan import Plan
from qdora.memory.host_residency import Copies, CudaCopies, HostResidency
from qdora.model.build_model import recompute_activations
from qdora.model.inject import inject
from qdora.model.load import load_model
from qdora.model.source import ModelSource
from qdora.plan.memory_plan import plan as memory_plan
from qdora.recipe.recipe_file import recipe_from


class SwitchedCopies:
    """`CudaCopies` that can be left out; on a CPU, for a dry run, plain ones."""

    def __init__(self, device: torch.device, slots: Sequence[Tensor]) -> None:
        self.inner: Copies | None = CudaCopies(device, slots) if device.type == "cuda" else None
        self.is_on, self.num_copies = True, 0

    def begin(self, source: Tensor, target: Tensor, slot: int) -> None:
        """See `Copies`."""
        self.num_copies += 1
        if self.is_on and self.inner is not None:
            self.inner.begin(source, target, slot)
        elif self.is_on:
            target.copy_(source)

    def wait(self, slot: int) -> None:
        """See `Copies`."""
        if self.inner is not None:
            self.inner.wait(slot)

    def release(self, slot: int) -> None:
        """See `Copies`."""
        if self.inner is not None:
            self.inner.release(slot)


def run(part: Part, plan: Plan, device: torch.device, size: str, limit: int, num_streamed: int) -> None:
    """A model's step under the limit of a card: peak, planned peak, tokens a second, hidden share of the copies.

    Args:
        size: "middle" or "large" of the plan.
        limit: Bytes that torch may allocate.
        num_streamed: Blocks in host memory; all of them where the model has fewer.
    """
    part.put("limit_share", on.limit_memory(device, limit))
    settings = getattr(plan, size) | {"tie_word_embeddings": False}
    streamed = min(num_streamed, settings["num_hidden_layers"])
    made: list[SwitchedCopies] = []

    def copies(where: torch.device, slots: Sequence[Tensor]) -> SwitchedCopies:
        made.append(SwitchedCopies(where, slots))
        return made[0]

    residency = HostResidency(streamed, copies=copies)
    model = streamed_model(settings, residency, device)
    inject(model, rank=plan.ranks[0], dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    keep_no_scales(model)  # as each run with a streamed base
    recompute_activations(model)
    part.put("num_streamed", streamed)
    part.put("held_bytes", on.held_bytes(device))
    tokens = plan.step_tokens[0]
    part.attempt("planned", lambda: planned(settings, streamed, tokens, plan.ranks[0]))
    step = fitting_step(model, "paged_adamw_8bit", tokens, device)
    part.attempt(f"{tokens} tokens", lambda: peak_and_time(step, tokens, plan.num_steps, device))
    part.attempt("hidden", lambda: hidden(step, residency, made[0], plan.num_steps, device))


def streamed_model(settings: dict[str, Any], residency: HostResidency, device: torch.device) -> Any:
    """Loaded as a checkpoint is, a tensor at a time, from a random one."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**settings, use_cache=False).save_pretrained(folder)
        source = ModelSource("directory", Path(folder), "random")
        return load_model(
            source,
            quant="nf4",
            device=device,
            compute_dtype=torch.bfloat16,
            attention="sdpa",
            reader=lambda _source, skeleton: random_checkpoint(skeleton, device),
            placer=residency,
        )


def planned(settings: dict[str, Any], num_streamed: int, num_tokens: int, rank: int) -> dict[str, Any]:
    """What `qdora plan` says of the same step on a GPU."""
    recipe = recipe_from(
        {
            "model": {"source": "random/model", "dtype": "bfloat16"},
            "base": {"residency": "host", "streamed_blocks": num_streamed},
            "adapter": {"rank": rank},
            "data": {"mix": [{"source": "random/data"}], "max_length": num_tokens},
            "train": {"steps": 1, "tokens_per_step": num_tokens, "micro_batch_tokens": num_tokens},
        }
    )
    found = memory_plan(recipe, config=LlamaConfig(**settings)).to_dict()
    return {key: found[key] for key in ("peak_bytes", "tensor_bytes", "components", "host_bytes", "step_seconds")}


def hidden(
    step: Callable[[int], list[float]],
    residency: HostResidency,
    copies: SwitchedCopies,
    number: int,
    device: torch.device,
) -> dict[str, Any]:
    """Times of a step with and without its copies, and of the copies alone."""
    with_copies = on.timed(device, lambda: step(number)).seconds / number
    before = copies.num_copies
    copies.is_on = False
    without = on.timed(device, lambda: step(number)).seconds / number
    copies.is_on = True
    count = (copies.num_copies - before) / number
    assert residency.sample is not None
    piece, slot = residency.sample
    alone = on.timed(device, lambda: slot[: len(piece)].copy_(piece, non_blocking=True), 10).seconds
    return {
        "step_seconds": with_copies,
        "step_seconds_without_copies": without,
        "copies": count,
        "copy_seconds": alone,
        "bytes_per_second": len(piece) / alone,
        "hidden_share": 1 - (with_copies - without) / (count * alone) if count else 1.0,
    }
