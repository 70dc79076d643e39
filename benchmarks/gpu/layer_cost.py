"""Time and memory of one layer's forward and backward pass, everyone on the same packed bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from contenders import CONTENDERS, layer_on
from measure import alternating, ratio, spread
from torch import Tensor, nn

from gpu import device as on
from gpu.part import Part
from gpu.plan import Plan, Shape, shape_name
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.ops.packed import PackedWeight, quantize

TIMED = (
    "dense",
    "frozen",
    "own_lora",
    "own_dora",
    "own_dora_new_norm",
    "own_dora_dropout",
    "peft_lora",
    "peft_dora",
    "peft_dora_addmm",
    "peft_dora_defaults",
)
"""`own_dora_new_norm` computes its norm in every call: a step of one micro-batch without checkpointing. The others of
ours find it computed, as all later micro-batches and every recompute do."""

RATIOS = (
    ("own_dora", "own_lora"),
    ("own_dora", "peft_lora"),
    ("own_dora_new_norm", "peft_lora"),
    ("own_dora_dropout", "peft_lora"),
    ("own_lora", "peft_lora"),
    ("peft_dora", "peft_lora"),
    ("own_lora", "frozen"),
    ("frozen", "dense"),
)


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

    def step(self) -> None:
        """Forward and backward, from no gradients to no gradients of an earlier call."""
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        if self.new_norm:
            assert isinstance(self.layer, AdaptedLinear)
            self.layer.parameters_changed()
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


def settings(plan: Plan) -> Iterator[tuple[int, int]]:
    """(rank, tokens): the first rank at every length, then the others, the first length first."""
    yield from ((plan.ranks[0], tokens) for tokens in plan.tokens)
    yield from ((rank, tokens) for tokens in plan.tokens for rank in plan.ranks[1:])


def time_shape(part: Part, plan: Plan, device: torch.device, index: int) -> None:
    """All contenders in turns, at one shape."""
    shape = plan.shapes[index]
    base = make_base(shape, device)
    part.put("shape", shape_name(shape))
    for rank, tokens in settings(plan):
        part.attempt(f"rank {rank}, {tokens} tokens", lambda r=rank, t=tokens: time_case(plan, base, r, t))


def time_case(plan: Plan, base: Base, rank: int, num_tokens: int) -> dict[str, Any]:
    """Medians and quartiles of each contender and the ratios of those in the same round."""
    device = base.dense.device
    on.free(device)
    steps: dict[str, Callable[[], Any]] = {}
    calls, errors = {}, {}
    for name in TIMED:
        try:
            case = make_case(name, base, rank, num_tokens)
            calls[name] = on.calls_for(device, case.step, plan.sample_seconds)
            steps[name] = case.step
        except RuntimeError as error:
            if not on.is_out_of_memory(error):
                raise
            errors[name] = "out of memory"
    samples = alternating(
        {name: lambda f=step, n=calls[name]: on.timed(device, f, n) for name, step in steps.items()}, plan.repeats
    )
    seconds = {name: [each.seconds for each in found] for name, found in samples.items()}
    host = {name: spread([each.host_seconds for each in found])["median"] for name, found in samples.items()}
    products = 4 * num_tokens * base.dense.numel()
    return {
        "seconds": {name: spread(found) for name, found in seconds.items()},
        "host_seconds": host,
        "tflops_of_the_two_large_products": {n: products / spread(s)["median"] / 1e12 for n, s in seconds.items()},
        "calls_per_sample": calls,
        "ratios": {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in RATIOS if a in seconds and b in seconds},
        **({"errors": errors} if errors else {}),
    }


def memory(part: Part, plan: Plan, device: torch.device) -> None:
    """Bytes of one pass at each shape: what is held between forward and backward, and the peak of each beside it."""
    for shape in plan.shapes:
        base = make_base(shape, device)
        for rank in plan.ranks:
            for tokens in plan.tokens[:2]:
                key = f"{shape_name(shape)}, rank {rank}, {tokens} tokens"
                part.attempt(key, lambda b=base, r=rank, t=tokens: memory_case(b, r, t))
        del base


def memory_case(base: Base, rank: int, num_tokens: int) -> dict[str, Any]:
    """Of each contender; each is alone on the card with the base while it is measured."""
    found: dict[str, Any] = {}
    for name in TIMED:
        on.free(base.dense.device)
        try:
            found[name] = _bytes_of(make_case(name, base, rank, num_tokens))
        except RuntimeError as error:
            if not on.is_out_of_memory(error):
                raise
            found[name] = {"error": "out of memory"}
    return found


def _bytes_of(case: Case) -> dict[str, int]:
    device = case.x.device
    case.step()  # workspaces of the libraries, and the norm
    case.x.grad = None
    for parameter in case.layer.parameters():
        parameter.grad = None
    if case.new_norm and isinstance(case.layer, AdaptedLinear):
        case.layer.parameters_changed()
    on.reset_peak(device)
    before = on.held_bytes(device)
    out = case.layer(case.x)
    on.synchronize(device)
    held, forward = on.held_bytes(device) - before, on.peak_bytes(device) - before
    on.reset_peak(device)
    out.backward(case.dy)
    on.synchronize(device)
    return {"held_after_forward": held, "forward_peak": forward, "backward_peak": on.peak_bytes(device) - before}
