"""Training steps of whole models through qdora's own loop: chunked loss, checkpointing, one optimizer for everyone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contenders import CONTENDERS, adapt
from measure import alternating, ratio, spread
from mixed_data import FixedSteps, fitted
from rich.console import Console

from gpu import device as on
from gpu.part import Part
from gpu.plan import Plan
from gpu.shaped_model import Weights, build
from qdora.data.batching import MicroBatch
from qdora.data.loader import Step
from qdora.errors import RunFailure
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.recipe.train_settings import TrainConfig
from qdora.train.optimizer import AdapterOptimizer

MODELS = ("own_lora", "own_dora", "peft_lora", "peft_dora")
RATIOS = (("own_dora", "own_lora"), ("own_dora", "peft_lora"), ("own_lora", "peft_lora"), ("peft_dora", "peft_lora"))
_LEAST_LAYERS = 8


def one_sequence(num_tokens: int, vocabulary: int) -> FixedSteps:
    """One step again and again: a single sequence of random tokens, all of them labelled.

    Padding would bring in another attention kernel.
    """
    ids = torch.randint(0, vocabulary, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    micro = MicroBatch(ids, torch.ones_like(ids), ids, torch.zeros(1, dtype=torch.int64), ["random"], ["0"])
    return FixedSteps([Step([micro], num_tokens - 1, num_tokens, 1)])


def make_model(
    settings: dict[str, Any],
    name: str,
    device: torch.device,
    *,
    rank: int = 16,
    weights: Weights | None = None,
    embedding_on_host: bool = False,
) -> Any:
    """A contender's model with adapters on every linear layer but the head, recomputing activations."""
    contender = CONTENDERS[name]
    weights = weights or Weights(device)
    model = build(settings, weights, contender.engine, embedding_on_host=embedding_on_host)
    recompute_activations(model)
    adapted = adapt(model, contender, rank)
    return adapted if contender.engine == "own" else adapted.base_model.model


def fitting_step(model: Any, optimizer: Any, num_tokens: int, device: torch.device) -> Callable[[int], list[float]]:
    """A function that trains for some steps and returns their losses; the optimizer is one, or a new one's name."""
    if isinstance(optimizer, str):
        optimizer = AdapterOptimizer(adapter_parameters(model), name=optimizer)  # type: ignore[arg-type]
    loader = one_sequence(num_tokens, model.config.vocab_size)

    def train(num_steps: int) -> list[float]:
        settings = TrainConfig(steps=num_steps, batch=1, lr=1e-4, schedule="constant", warmup=0)
        lines = fitted(model, optimizer, loader, settings, console=Console(quiet=True), device=device)
        return [line["loss"] for line in lines]

    return train


def in_turns(part: Part, plan: Plan, device: torch.device) -> None:
    """Time of the middle model's step, all contenders in turns in one process, on the same packed bytes."""
    weights = Weights(device)
    models = {}
    for name in MODELS:
        models[name] = make_model(plan.middle, name, device, rank=plan.ranks[0], weights=weights)
    optimizers = {name: AdapterOptimizer(adapter_parameters(model), name="adamw") for name, model in models.items()}
    part.put("weight_bytes", weights.num_bytes)
    for tokens in plan.step_tokens:
        steps = {n: fitting_step(model, optimizers[n], tokens, device) for n, model in models.items()}
        part.attempt(f"{tokens} tokens", lambda s=steps, t=tokens: _turns(s, t, plan, device))


def _turns(steps: dict[str, Any], num_tokens: int, plan: Plan, device: torch.device) -> dict[str, Any]:
    for step in steps.values():
        step(2)
    samples = timed_in_turns(steps, plan, device)
    return speeds(samples, num_tokens) | {"ratios": {f"{a} / {b}": ratio(samples[a], samples[b]) for a, b in RATIOS}}


def timed_in_turns(steps: dict[str, Any], plan: Plan, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step of each, three readings in turns."""
    number = plan.num_steps

    def sampler(step: Any) -> Callable[[], float]:
        return lambda: on.timed(device, lambda: step(number)).seconds / number

    return alternating({name: sampler(step) for name, step in steps.items()}, 3, warmup=0)


def speeds(samples: dict[str, list[float]], num_tokens: int) -> dict[str, Any]:
    """Seconds of a step and tokens a second of each."""
    seconds = {name: spread(found) for name, found in samples.items()}
    return {
        "step_seconds": seconds,
        "tokens_per_second": {name: num_tokens / found["median"] for name, found in seconds.items()},
    }


def alone(part: Part, plan: Plan, device: torch.device, name: str) -> None:
    """Memory and time of one contender in a process of its own, under what a 40 GB card has."""
    part.put("limit_share", on.limit_memory(device, on.CARD_40GB_BYTES))
    weights = Weights(device)
    model = make_model(plan.middle, name, device, rank=plan.ranks[0], weights=weights)
    parameters = adapter_parameters(model)
    optimizer = AdapterOptimizer(parameters, name="adamw")
    part.put("weight_bytes", weights.num_bytes)
    part.put("num_trainable", sum(each.numel() for each in parameters.values()))
    part.put("held_bytes", on.held_bytes(device))
    for tokens in plan.step_tokens:
        step = fitting_step(model, optimizer, tokens, device)
        part.attempt(f"{tokens} tokens", lambda s=step, t=tokens: peak_and_time(s, t, plan.num_steps, device))


def peak_and_time(step: Any, num_tokens: int, number: int, device: torch.device) -> dict[str, Any]:
    """Peak, time and losses of a step that `fitting_step` has made."""
    on.reset_peak(device)
    losses = step(2)  # the second one has the optimizer's states from the start
    seconds = on.timed(device, lambda: step(number)).seconds / number
    return {
        "peak_allocated_bytes": on.peak_bytes(device),
        "peak_reserved_bytes": on.reserved_bytes(device),
        "step_seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "losses": losses,
    }


def large(part: Part, plan: Plan, device: torch.device) -> None:
    """The large model under what a 40 GB card has: as many layers as train, and the peak."""
    part.put("limit_share", on.limit_memory(device, on.CARD_40GB_BYTES))
    weights, settings = Weights(device), plan.large
    try:
        model = make_model(settings, "own_dora", device, rank=plan.ranks[0], weights=weights, embedding_on_host=True)
    except torch.OutOfMemoryError as error:
        number = error.args[-1]
        if not isinstance(number, int):  # not of a layer's weights
            raise
        part.put("loading_fails_in_layer", number)
        settings = settings | {"num_hidden_layers": max(number - 2, 1)}
        model = None
    if model is None:
        weights.forget_from(settings["num_hidden_layers"])
        on.free(device)
        model = make_model(settings, "own_dora", device, rank=plan.ranks[0], weights=weights, embedding_on_host=True)
    keep_no_scales(model)
    part.put("weight_bytes", weights.num_bytes)
    part.put("held_bytes", on.held_bytes(device))
    for optimizer in ("paged_adamw_8bit", "adamw"):
        for tokens in plan.step_tokens[:1]:
            key = f"{optimizer}, {tokens} tokens"
            part.attempt(key, lambda o=optimizer, t=tokens: _fitting_layers(part, model, weights, o, t, device))


def keep_no_scales(model: Any) -> None:
    """As a run with `memory.keep_scales: false`, which a plan proposes for a model of this size."""
    for layer in adapted_layers(model).values():
        layer.keeps_scales = False


def _fitting_layers(
    part: Part, model: Any, weights: Weights, optimizer: str, num_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Take layers off until a step fits. Layers that were taken off for an earlier case stay off."""
    failed_with = []
    while True:
        number = len(model.model.layers)
        try:
            step = fitting_step(model, optimizer, num_tokens, device)
            found = peak_and_time(step, num_tokens, 1, device)
            return {"num_layers": number, "failed_with_layers": failed_with, **found}
        except (RuntimeError, RunFailure) as error:
            if not on.is_out_of_memory(error) or number <= _LEAST_LAYERS or part.time_left() < 0:
                raise
        failed_with.append(number)
        model.model.layers = model.model.layers[: number - 2]
        weights.forget_from(number - 2)
        for parameter in model.parameters():
            parameter.grad = None
        step = None
        on.free(device)
