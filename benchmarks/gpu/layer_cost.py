"""Time and memory of one layer's forward and backward pass, everyone on the same packed bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from contenders import CONTENDERS, layer_on
from measure import ratio
from torch import Tensor, nn

from gpu import device as on
from gpu.part import Part
from gpu.plan import Plan, Shape, shape_name
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.ops.packed import PackedWeight, quantize

TIMED = ("dense", "frozen", "own_lora", "own_dora", "own_dora_new_norm", "own_dora_dropout")
TIMED += ("peft_lora", "peft_dora", "peft_dora_addmm", "peft_dora_defaults")
"""`own_dora_new_norm` computes its norm in every call: a step of one micro-batch without checkpointing. The others of
ours find it computed, as all later micro-batches and every recompute do."""

RATIOS = [
    (name, "peft_lora") for name in ("own_lora", "own_dora", "own_dora_new_norm", "own_dora_dropout", "peft_dora")
]
RATIOS += [("own_dora", "own_lora"), ("own_lora", "frozen"), ("frozen", "dense")]


@dataclass(frozen=True)
class Base:
    """One weight, dense and packed, of which all contenders are made."""

    dense: Tensor
    packed: PackedWeight


@dataclass
class Case:
    """A layer and what it is called with."""

    layer: nn.Module
    x: Tensor
    dy: Tensor
    new_norm: bool = False

    def clear(self) -> None:
        """Drop the gradients of an earlier call and, with `new_norm`, the norm."""
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        if self.new_norm:
            assert isinstance(self.layer, AdaptedLinear)
            self.layer.parameters_changed()

    def step(self) -> None:
        """Forward and backward."""
        self.clear()
        self.layer(self.x).backward(self.dy)


def make_base(shape: Shape, device: torch.device) -> Base:
    """A random weight N(0, 0.02^2), made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape[1], shape[0], generator=generator, device=device).mul_(0.02).bfloat16()
    return Base(weight, quantize(weight, "nf4", 64, double_quant=True))


def make_case(name: str, base: Base, rank: int, num_tokens: int) -> Case:
    """The case of a contender's name."""
    contender = CONTENDERS[name.removesuffix("_new_norm")]
    layer = layer_on(base.dense if contender.engine == "dense" else base.packed, contender, rank)
    device, (out, in_) = base.dense.device, base.dense.shape
    x = torch.randn(num_tokens, in_, device=device).bfloat16().requires_grad_()
    dy = torch.randn(num_tokens, out, device=device).bfloat16()
    return Case(layer, x, dy, name.endswith("_new_norm"))


def run(part: Part, plan: Plan, device: torch.device, index: int) -> None:
    """All contenders at one shape: the first rank at every length, then the others at the first length."""
    base = make_base(plan.shapes[index], device)
    part.put("shape", shape_name(plan.shapes[index]))
    sizes = [(plan.ranks[0], tokens) for tokens in plan.tokens] + [(rank, plan.tokens[0]) for rank in plan.ranks[1:]]
    for rank, tokens in sizes:
        part.attempt(f"rank {rank}, {tokens} tokens", case, plan, base, rank, tokens)


def case(plan: Plan, base: Base, rank: int, num_tokens: int) -> dict[str, Any]:
    """Bytes of each contender, then seconds in turns and the ratios of those in the same round."""
    device = base.dense.device
    steps: dict[str, Callable[[], Any]] = {}
    num_bytes, errors = {}, {}
    for name in TIMED:
        on.free(device)
        try:
            made = make_case(name, base, rank, num_tokens)
            num_bytes[name] = bytes_of(made)
            steps[name] = made.step
        except RuntimeError as error:
            if not on.is_out_of_memory(error):
                raise
            errors[name] = "out of memory"
    samples = on.in_turns(device, steps, plan.repeats, plan.sample_seconds)
    spreads = on.spreads(samples)
    seconds = {name: [each.seconds for each in found] for name, found in samples.items()}
    products = 4 * num_tokens * base.dense.numel()
    return {
        "seconds": spreads,
        "bytes": num_bytes,
        "tflops_of_the_two_large_products": {n: products / each["median"] / 1e12 for n, each in spreads.items()},
        "ratios": {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in RATIOS if a in seconds and b in seconds},
        "errors": errors,
    }


def bytes_of(case: Case) -> dict[str, int]:
    """Of one pass: what is held between forward and backward, and the peak of each."""
    device = case.x.device
    case.step()  # workspaces of the libraries, and the norm
    case.clear()
    on.free(device)
    before = on.memory(device)["held"]
    out = case.layer(case.x)
    held, forward = on.memory(device)["held"] - before, on.memory(device)["peak"] - before
    on.free(device)
    out.backward(case.dy)
    case.clear()
    return {"held_after_forward": held, "forward_peak": forward, "backward_peak": on.memory(device)["peak"] - before}
