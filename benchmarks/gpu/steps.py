"""What does a training step cost? Whole models in qdora's own loop, their waits and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contenders import CONTENDERS, adapt
from measure import alternating, ratios
from mixed_data import FixedStep, fitted
from torch import nn
from transformers import LlamaConfig

from gpu import device as on
from gpu.models import Weights, build, linear_shapes
from gpu.plan import Part, Plan
from qdora.data.batches import MicroBatch, Step
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapter_parameters
from qdora.plan.fit import plan as memory_plan
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import TrainConfig
from qdora.train.optimizer import AdapterOptimizer

MODELS = ("own_lora", "own_dora", "peft_lora", "peft_dora")
RATIOS = ("own_dora / own_lora", "own_dora / peft_lora", "own_lora / peft_lora", "peft_dora / peft_lora")


def make_model(
    settings: dict[str, Any], name: str, device: torch.device, *, rank: int, weights: Weights | None = None
) -> Any:
    """A contender's model with adapters on every linear layer but the head, recomputing activations."""
    contender = CONTENDERS[name]
    model = build(settings, weights or Weights(device), contender.engine)
    recompute_activations(model)
    adapted = adapt(model, contender, rank)
    return adapted if contender.engine == "own" else adapted.base_model.model


def make_step(model: Any, name: Any, num_tokens: int) -> Callable[[int], list[float]]:
    """A function that trains for some steps on one sequence of random labelled tokens and returns their losses. Padding
    would bring in another attention kernel. The name is an optimizer's."""
    optimizer = AdapterOptimizer(adapter_parameters(model), name=name)
    ids = torch.randint(0, model.config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    micro = MicroBatch(ids, torch.ones_like(ids), ids, torch.zeros(1, dtype=torch.int64), ["random"], ["0"])
    loader = FixedStep(Step([micro], num_tokens - 1, num_tokens, 1))

    def train(num_steps: int) -> list[float]:
        settings = TrainConfig(steps=num_steps, batch=1, lr=1e-4, schedule="constant", warmup=0)
        return [line["loss"] for line in fitted(model, optimizer, loader, settings, quiet=True)]

    return train


def in_turns(part: Part, plan: Plan, device: torch.device, index: int) -> None:
    """Time of the middle model's step at one length, all contenders in turns on the same packed bytes."""
    tokens, weights = plan.step_tokens[index], Weights(device)
    steps: dict[str, Callable[[int], list[float]]] = {}
    losses: dict[str, list[float]] = {}

    def made(name: str) -> list[float]:
        model = make_model(plan.middle, name, device, rank=plan.ranks[0], weights=weights)
        step = make_step(model, "adamw", tokens)
        losses[name], steps[name] = step(2), step
        return losses[name]

    for name in MODELS:  # a card may be too small for some
        part.attempt(name, made, name)
        on.free(device)
    if not steps:
        return
    part.put("held_bytes", on.memory(device)["held"])
    first = [found[0] for found in losses.values()]  # all adapters start as the base; bf16 rounds at 0.4 %
    part.put("losses", losses | {"ok": max(first) <= 1.01 * min(first)})
    readings = {name: lambda step=step: on.timed(device, lambda: step(1)).seconds for name, step in steps.items()}
    samples = alternating(readings, 3, warmup=0)
    part.put("step_seconds", samples)
    part.put("ratios", ratios(samples, RATIOS))


def on_40gb(part: Part, plan: Plan, device: torch.device, name: str, index: int) -> None:
    """20 steps of a contender's middle model under what a 40 GB card has."""
    tokens = plan.step_tokens[index]
    part.put("limit_share", on.limit_memory(device, on.CARD_40GB_BYTES))
    if name == "own_dora":
        part.attempt("planned", planned, plan.middle, tokens, plan.ranks[0])

    def steps() -> dict[str, Any]:
        model = make_model(plan.middle, name, device, rank=plan.ranks[0])
        part.put("held_bytes", on.memory(device)["held"])
        found = peak_and_time(make_step(model, "paged_adamw_8bit", tokens), tokens, 18, device)
        falls = found["losses"][-1] < found["losses"][0]
        return found | {"ok": falls or device.type == "cpu"}

    part.attempt("20 steps", steps)  # a card may be too small


def peak_and_time(step: Any, num_tokens: int, number: int, device: torch.device) -> dict[str, Any]:
    """Peak, time and losses of two steps of `make_step` and of `number` more, which are timed."""
    on.free(device)
    losses = step(2)  # the second one has the optimizer's states from the start
    seconds = on.timed(device, lambda: losses.extend(step(number))).seconds / number
    speed = {"step_seconds": seconds, "tokens_per_second": num_tokens / seconds}
    return {"bytes": on.memory(device), **speed, "losses": losses}


def planned(settings: dict[str, Any], num_tokens: int, rank: int, num_streamed: int = 0) -> dict[str, Any]:
    """What `qdora plan` says of the same step on a GPU."""
    recipe = recipe_from(
        {
            "model": {"source": "random/model", "dtype": "bfloat16"},
            "base": {"residency": "host", "streamed_blocks": num_streamed} if num_streamed else {},
            "adapter": {"rank": rank},
            "data": {"mix": [{"source": "random/data"}], "max_length": num_tokens},
            "train": {"steps": 1, "tokens_per_step": num_tokens, "micro_batch_tokens": num_tokens},
        }
    )
    found = memory_plan(recipe, config=LlamaConfig(**settings | {"tie_word_embeddings": False})).to_dict()
    return {key: found[key] for key in ("peak_bytes", "tensor_bytes", "components", "host_bytes", "step_seconds")}


def waits(part: Part, plan: Plan, device: torch.device) -> None:
    """Waits of the third step of a model of two layers through the training loop, in one micro-batch, by the line that
    waits."""

    def of_step(name: str) -> dict[str, Any]:
        small = plan.middle | {"num_hidden_layers": 2, "vocab_size": 512}
        step = make_step(make_model(small, name, device, rank=plan.ranks[0]), "adamw", plan.step_tokens[0])
        step(2)
        with on.host_waits(device) as lines:
            step(1)
        return {"waits": sum(lines.values()), "lines": dict(lines.most_common(30))}

    for name in ("own_dora", "peft_dora"):
        part.attempt(f"training step of {name}", of_step, name)


OPTIMIZERS = ("paged_adamw_8bit", "adamw", "paged_adamw_32bit", "lion", "paged_lion_8bit")


def optimizers(part: Part, plan: Plan, device: torch.device) -> None:
    """Each optimizer on bf16 adapters, and torch's own fused AdamW as the floor."""

    def parameters() -> dict[str, nn.Parameter]:
        made = {name: torch.randn(shape, device=device).mul_(0.01) for name, shape in shapes.items()}
        return {name: nn.Parameter(value if value.dim() == 1 else value.bfloat16()) for name, value in made.items()}

    shapes = {
        f"layers.{index}.{name}.{key}": shape
        for index in range(plan.middle["num_hidden_layers"])
        for name, (out, in_) in linear_shapes(plan.middle).items()
        for key, shape in (("lora_A", (plan.ranks[0], in_)), ("lora_B", (out, plan.ranks[0])), ("magnitude", (out,)))
    }
    part.put("num_elements", sum(torch.Size(shape).numel() for shape in shapes.values()))
    for name in OPTIMIZERS:
        part.attempt(name, lambda name=name: of_optimizer(name, parameters(), device))
    part.attempt("torch AdamW, fused", lambda: of_torch(list(parameters().values()), device))


def of_optimizer(name: Any, parameters: dict[str, nn.Parameter], device: torch.device) -> dict[str, Any]:
    """Seconds of a step after two that make the states, the host's waits, and the bytes that the states take but for
    paged ones: torch does not count managed memory."""
    on.free(device)
    before = on.memory(device)["held"]
    optimizer = AdapterOptimizer(parameters, name=name)
    held = on.memory(device)["held"] - before
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, device=device)
    kept = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    for _ in range(2):
        optimizer.step(1e-2)
    unmoved = [key for key, parameter in parameters.items() if torch.equal(kept[key], parameter.detach())]
    sample = on.timed(device, lambda: optimizer.step(1e-4), 3)
    with on.host_waits(device) as waits:
        optimizer.step(1e-4)
    finite = all(bool(parameter.isfinite().all()) for parameter in parameters.values())
    return {
        **sample._asdict(),
        "waits": dict(waits.most_common(10)),
        "state_bytes_of_torch": held,
        "moved": {"unmoved": unmoved[:5], "ok": finite and not unmoved},
    }


def of_torch(parameters: list[nn.Parameter], device: torch.device) -> dict[str, Any]:
    """A fused update of bf16 parameters in bf16: the least work, and updates lost to rounding."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    on.timed(device, optimizer.step, 2)
    return on.timed(device, optimizer.step, 3)._asdict()
