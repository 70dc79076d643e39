"""Are copies to and from the host's memory hidden? Models larger than the card, and checkpoints in host memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from gpu import device as on
from gpu.models import Weights, random_checkpoint
from gpu.plan import Part, Plan
from gpu.steps import make_model, make_step, peak_and_time, planned
from qdora.memory.stream import CudaCopies, HostResidency, offload_activations
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, inject
from qdora.model.load import load_model
from qdora.model.source import ModelSource


class SwitchedCopies:
    """`CudaCopies` that can be left out; on a CPU, for a dry run, plain ones."""

    def __init__(self, device: torch.device, slots: Sequence[Tensor]) -> None:
        plain = SimpleNamespace(begin=lambda source, to, _: to.copy_(source), wait=lambda _: 0, release=lambda _: 0)
        self.inner: Any = CudaCopies(device, slots) if device.type == "cuda" else plain
        self.wait, self.release = self.inner.wait, self.inner.release
        self.is_on, self.num_copies, self.sample = True, 0, (torch.empty(0), torch.empty(0))

    def begin(self, source: Tensor, target: Tensor, slot: int) -> None:
        self.num_copies, self.sample = self.num_copies + 1, (source, target)
        if self.is_on:
            self.inner.begin(source, target, slot)


def streamed(part: Part, plan: Plan, device: torch.device, size: str, limit: int, num_streamed: int) -> None:
    """A step of the "middle" or "large" model under the limit of a card, `num_streamed` blocks in host memory.

    Random weights; every block has bytes of its own.
    """
    part.put("limit_share", on.limit_memory(device, limit))
    settings, tokens = getattr(plan, size), plan.step_tokens[0]
    number = min(num_streamed, settings["num_hidden_layers"])
    made: list[SwitchedCopies] = []

    def copies(where: torch.device, slots: Sequence[Tensor]) -> SwitchedCopies:
        made.append(SwitchedCopies(where, slots))
        return made[0]

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**settings, tie_word_embeddings=False, use_cache=False).save_pretrained(folder)
        model: Any = load_model(
            ModelSource("directory", Path(folder), "random"),
            quant="nf4",
            device=device,
            compute_dtype=torch.bfloat16,
            attention="sdpa",
            reader=lambda _source, skeleton: random_checkpoint(skeleton, device),
            placer=HostResidency(number, copies=copies),
        )
    inject(model, rank=plan.ranks[0], dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for layer in adapted_layers(model).values():
        layer.keeps_scales = False  # as in each run with a streamed base
    recompute_activations(model)
    part.put("num_streamed", number)
    part.put("held_bytes", on.memory(device)["held"])
    part.attempt("planned", planned, settings, tokens, plan.ranks[0], number)
    step = make_step(model, "paged_adamw_8bit", tokens)
    part.attempt(f"{tokens} tokens", peak_and_time, step, tokens, 1, device)
    part.attempt("hidden", hidden, step, made[0], device)


def hidden(step: Callable[[int], list[float]], copies: SwitchedCopies, device: torch.device) -> dict[str, Any]:
    """Times of a step with its copies, without them (the numbers are then wrong, the work is the same), and of the
    copies alone."""
    with_copies = on.timed(device, lambda: step(1)).seconds
    before = copies.num_copies
    copies.is_on = False
    without = on.timed(device, lambda: step(1)).seconds
    copies.is_on = True
    count = copies.num_copies - before
    piece, slot = copies.sample
    alone = on.timed(device, lambda: slot.copy_(piece, non_blocking=True), 10).seconds
    return {
        "step_seconds": with_copies,
        "step_seconds_without_copies": without,
        "copies": count,
        "copy_seconds": alone,
        "bytes_per_second": len(piece) / alone,
        "hidden_share": 1 - (with_copies - without) / (count * alone) if count else 1.0,
    }


def offloaded(part: Part, plan: Plan, device: torch.device) -> None:
    """Peak, time and losses of the middle model's steps at the longest sequence, without and with the offload.

    The bytes that are allocated in the host's order say little: what counts is what the allocator has to reserve while
    the host runs ahead of the GPU.
    """
    part.put("limit_share", on.limit_memory(device, on.CARD_40GB_BYTES))
    tokens, weights = plan.step_tokens[-1], Weights(device)

    def steps(offloads: bool) -> dict[str, Any]:
        model = make_model(plan.middle, "own_dora", device, rank=plan.ranks[0], weights=weights)
        if offloads:
            offload_activations(model)
        return peak_and_time(make_step(model, "adamw", tokens), tokens, 1, device)

    part.attempt("plain", steps, False)
    part.attempt("offloaded", steps, True)
    losses = [part.entries[name].get("losses") for name in ("plain", "offloaded") if name in part.entries]
    if len(losses) == 2 and all(losses):
        worst = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
        # The backward pass of attention is not deterministic on every GPU.
        part.put("same losses", {"relative_difference": worst, "ok": worst < 1e-3})
