"""Models, batches and dense matrices for tests of the curvature: plain torch autograd on merged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from qdora.data.batching import MicroBatch
from qdora.model.inject import adapted_layers, inject, replace_module
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.nn.expert_linear import FrozenExperts
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.sparsity import mask_bits
from tests import tiny_adapted, tiny_experts

LAYERS = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj")


def base(architecture: str) -> Any:
    """A model that computes in float64 throughout: transformers' eager attention and its RMSNorm go by float32."""
    model = tiny_adapted.base(architecture, dtype=torch.float64)
    if architecture != "gemma2":  # it has eager attention only
        model.set_attn_implementation("sdpa")
    widen_norms(model)
    return model.requires_grad_(False)


def widen_norms(model: Any) -> None:
    """Replace transformers' RMSNorms, in place."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            shift = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            norm = torch.nn.RMSNorm(module.weight.shape, eps=1e-6, dtype=torch.float64)
            norm.weight = torch.nn.Parameter(module.weight.detach() + shift, requires_grad=False)
            replace_module(model, name, norm)


def keep_mask(shape: torch.Size) -> Tensor:
    """A third of the weights is pruned; True = keep."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) > 1 / 3


def adapted(
    architecture: str = "llama", *, kind: Any = "dora", moved: bool = True, rank: int = 2, masked: bool = False
) -> Any:
    """A float64 model with adapters on `LAYERS`, off their start unless told otherwise; pruned there if masked."""
    model = base(architecture)
    for name in LAYERS if masked else ():
        weight = model.get_submodule(name).weight.detach()
        keep = keep_mask(weight.shape)
        replace_module(model, name, FrozenLinear(weight * keep, None, mask_bits(keep)))
    layers = inject(
        model,
        kind=kind,
        rank=rank,
        alpha=3.0,
        targets=list(LAYERS),
        dtype=torch.float64,
        masked=masked,
        generator=torch.Generator().manual_seed(1),
    )
    if moved:
        tiny_adapted.move(layers)
    return model


def batches() -> list[MicroBatch]:
    """Two micro-batches, the second with padding; prompts without labels."""
    ids = [torch.tensor([[1, 17, 300, 5, 44, 260]]), torch.tensor([[9, 120, 3, 30, 7], [8, 2, 91, 0, 0]])]
    masks = [torch.ones_like(ids[0]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])]
    made = []
    for number, (rows, mask) in enumerate(zip(ids, masks, strict=True)):
        labels = rows.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        names = [f"{number}-{row}" for row in range(len(rows))]
        made.append(MicroBatch(rows, mask, labels, torch.zeros(len(rows), dtype=torch.int64), ["task"], names))
    return made


def dense(
    architecture: str, model: Any, layers: tuple[str, ...], parts: tuple[str, ...], *, curvature: str, held: bool
) -> NDArray[np.float64]:
    """The whole matrix, from `torch.autograd.functional` and the definition; parameters end to end, layer by layer."""
    logits_of, start = merged_logits(architecture, model, layers, parts, held=held)
    found = [(logits_of(batch), targets(batch)) for batch in batches()]
    num_tokens = sum(len(labels) for _, labels in found)

    def loss(flat: Tensor) -> Tensor:
        nll = [torch.log_softmax(logits(flat), -1).gather(1, labels[:, None]) for logits, labels in found]
        return -torch.cat(nll).sum() / num_tokens

    if curvature == "hessian":
        return torch.autograd.functional.hessian(loss, start, vectorize=True).numpy()  # type: ignore[no-any-return,union-attr]
    total = torch.zeros(len(start), len(start), dtype=torch.float64)
    for logits, _ in found:
        jacobian = torch.func.jacfwd(logits)(start)  # (tokens, vocabulary, size)
        p = torch.softmax(logits(start), -1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        total += torch.einsum("tvi,tvw,twj->ij", jacobian, inner, jacobian)
    return (total / num_tokens).numpy()  # type: ignore[no-any-return]


def targets(batch: MicroBatch) -> Tensor:
    """The labelled tokens, row by row."""
    return torch.stack([label for row in batch.labels[:, 1:] for label in row if label != -100])


def merged(base: Tensor, update: Tensor, magnitude: Tensor | None, *, held: bool, masked: bool) -> Tensor:
    """m (W + D) / ||W + D||_row, with W and D zero off the mask; differentiable by D and m."""
    weight = base + update
    if masked:
        weight = weight * keep_mask(weight.shape)
    if magnitude is None:
        return weight
    norm = weight.square().sum(1).sqrt()
    return weight * (magnitude / (norm.detach() if held else norm))[:, None]


def merged_logits(
    architecture: str, model: Any, layers: tuple[str, ...], parts: tuple[str, ...], *, held: bool
) -> tuple[Callable[[MicroBatch], Callable[[Tensor], Tensor]], Tensor]:
    """For a batch the function from the flat parameters to the logits of its labelled tokens; and the present values.

    The function runs a model without adapters on weights that are merged here, entry by entry of the definition.
    """
    plain = base(architecture)
    adapters = adapted_layers(model)
    values = {
        name: {part: value.detach() for part, value in layer.named_parameters(recurse=False)}
        for name, layer in adapters.items()
    }
    start = torch.cat([values[name][part].reshape(-1) for name in layers for part in parts])

    def weights(flat: Tensor) -> dict[str, Tensor]:
        here, result = 0, {}
        for name, layer in adapters.items():
            mine = dict(values[name])
            for part in parts if name in layers else ():
                size = mine[part].numel()
                mine[part] = flat[here : here + size].view_as(mine[part])
                here += size
            update = layer.alpha / layer.rank * mine["lora_B"] @ mine["lora_A"]
            base = plain.get_submodule(name).weight.detach()
            result[f"{name}.weight"] = merged(base, update, mine.get("magnitude"), held=held, masked=layer.masked)
        return result

    def logits_of(batch: MicroBatch) -> Callable[[Tensor], Tensor]:
        wanted = batch.labels[:, 1:] != -100

        def run(flat: Tensor) -> Tensor:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            with sdpa_kernel(SDPBackend.MATH):
                logits: Tensor = functional_call(plain, weights(flat), kwargs=inputs).logits[:, :-1]
            return logits[wanted]

        return run

    return logits_of, start


# ------------------------------------------------------------------------------------------------ stacks of experts

EXPERTS = 8
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "moe_intermediate_size": 8,
    "intermediate_size": 16,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": EXPERTS,
}
STACKS = ("model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj")


def plain_mixture() -> Any:
    """transformers' own mixture of experts in float64; its router's softmax alone is float32."""
    model = tiny_experts.make("qwen3_moe", torch.float64, **SIZES)
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("eager")
    widen_norms(model)
    return model.requires_grad_(False)


def mixture(directory: Path, *, kind: Any, share: Any = "none", masked: bool = False) -> Any:
    """The same with adapters of rank 2 on `STACKS`, off their start, pruned there if masked."""
    if not (directory / "config.json").exists():
        tiny_experts.make("qwen3_moe", torch.float64, **SIZES).save_pretrained(directory)
    model = load_model(resolve(str(directory)), quant="none", compute_dtype=torch.float64)
    widen_norms(model)
    for name in STACKS if masked else ():
        weight: Any = model.get_submodule(name).weight.detach()
        keep = keep_mask(weight.shape)
        replace_module(model, name, FrozenExperts(weight * keep, EXPERTS, None, mask_bits(keep)))
    layers = inject(
        model.requires_grad_(False),
        kind=kind,
        rank=2,
        alpha=3.0,
        targets=list(STACKS),
        share=share,
        dtype=torch.float64,
        masked=masked,
        generator=torch.Generator().manual_seed(1),
    )
    tiny_adapted.move(layers)
    return model.eval()


# ------------------------------------------------------------------------------------------------ by whole updates


def update_of(layer: Any, **changed: Tensor) -> Tensor:
    """s B A from the present factors or others, (out, in), or (experts * out, in) of a stack."""
    a, b = (changed.get(name, layer.get_parameter(name).detach()) for name in ("lora_A", "lora_B"))
    product = layer.alpha / layer.rank * (b @ a)  # of each expert; a factor that all share is (1, ...)
    return product.flatten(0, -2)


def logits_by_update(model: Any, *, held: bool) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """From s B A of adapted layers (default: the present ones) to the logits of the labelled tokens of all batches.

    The function runs a model without adapters on weights that are merged here.
    """
    layers = adapted_layers(model)
    plain = plain_mixture() if STACKS[0] in layers else base("llama")

    def logits(updates: Mapping[str, Tensor]) -> Tensor:
        weights = {}
        for name, layer in layers.items():
            path = name if name in STACKS else f"{name}.weight"
            weight = plain.get_parameter(path).detach()
            magnitude = None if layer.magnitude is None else layer.magnitude.detach().flatten()
            update = updates[name] if name in updates else update_of(layer)
            flat = merged(weight.flatten(0, -2), update, magnitude, held=held, masked=layer.masked)
            weights[path] = flat.view(weight.shape)
        found = []
        for batch in batches():
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            with sdpa_kernel(SDPBackend.MATH):
                out = functional_call(plain, weights, kwargs=inputs).logits[:, :-1]
            found.append(out[batch.labels[:, 1:] != -100])
        return torch.cat(found)

    return logits


def all_targets() -> Tensor:
    """The labelled tokens of all batches."""
    return torch.cat([targets(batch) for batch in batches()])
