"""The gradient of the loss by an adapter's update s B A as one matrix, and the spectrum of the trained update.

A component is a singular direction and its energy the square of its singular value: the best rank-r matrix holds the
first r (Eckart and Young).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qdora.adapter.algebra import merged_weight
from qdora.adapter.expert_product import ExpertTokens
from qdora.adapter.experts import AdaptedExperts, merged_rows
from qdora.adapter.layer import AdaptedLinear, evaluation_mode
from qdora.data.batches import MicroBatch
from qdora.files.console import Progress
from qdora.model.inject import adapted_layers
from qdora.rank.allocate import LayerSpectrum
from qdora.rank.curvature import Norm, labelled_logits
from qdora.train.loss import token_nll

GRADIENT_BYTES = 2**30
"""Size of the gradients that exist at once, in float32."""

T = TypeVar("T")


def update_gradients(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[MicroBatch],
    use: Callable[[str, Tensor], T],
    *,
    norm: Norm,
    progress: Progress | None = None,
) -> dict[str, T]:
    """dL/d(s B A) of each layer from one pass, L the mean NLL of the labelled tokens; of a stack of experts all in one.

    Each gradient, (out, in) or (experts * out, in), float32 or wider, is given to `use` with its path, so that not all
    exist at once; returned is what `use` made of them. Under a mask it is zero where B A is masked. The model, in
    float32 or float64, runs in eval mode, otherwise as it trains. `norm` "attached" goes through the row norm of
    W + s B A, too; "held" and "none" (LoRA) do not.
    """
    adapted = adapted_layers(model)
    found: dict[str, T] = {}
    with evaluation_mode(model):
        for group in _groups(adapted, layers):
            for name, gradient in _of_group(model, {name: adapted[name] for name in group}, batches, norm).items():
                found[name] = use(name, gradient)
            if progress is not None:
                progress(len(found), len(layers))
    return found


@contextmanager
def watched_outputs(layers: Mapping[str, nn.Module], see: Callable[..., Callable[[Tensor], None]]) -> Iterator[None]:
    """Call `see(name, x, y)` in every forward pass of a layer, and what it returns with dL/dy in every backward pass.

    For a stack of experts it is `see(name, x, y, tokens)`.

    The model goes on with a copy of y, which costs its size: what it writes into its layers' outputs would carry the
    gradient past the hook.
    """

    def forward(name: str, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        passed_on = output.clone()
        passed_on.register_hook(  # type: ignore[no-untyped-call]
            see(name, args[0].detach(), output.detach(), *args[1:])
        )
        return passed_on

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(functools.partial(forward, name)))
        yield


def row_directions(layer: AdaptedLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows of W + s B A at length 1, (out, in), and their norms, (out,); a row of zeros stays one. A stack has
    (experts * out, in) and (experts * out,).

    Along its own direction a row of DoRA cannot move: its length is the magnitude's.
    """
    keep = layer.base.keep_mask() if layer.masked else None
    weight = layer.base.dequantized(layer.base.wide_dtype)
    factors = layer.lora_A.detach(), layer.stored_B(), layer.scaling
    if isinstance(layer, AdaptedExperts):
        total = merged_rows(weight, 0, *factors, keep_mask=keep).to(dtype)
    else:
        total = merged_weight(weight, *factors, keep_mask=keep).to(dtype)
    norm = torch.linalg.vector_norm(total, dim=1)
    return total / norm.masked_fill(norm == 0, 1.0).unsqueeze(1), norm


def _groups(adapted: Mapping[str, AdaptedLinear], layers: Sequence[str]) -> Iterator[list[str]]:
    """Layers whose gradients fit together into `GRADIENT_BYTES`, at least one."""
    group: list[str] = []
    held = 0
    for name in layers:
        size = 4 * adapted[name].in_features * adapted[name].out_features
        if group and held + size > GRADIENT_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _of_group(
    model: nn.Module, layers: Mapping[str, AdaptedLinear], batches: Iterable[MicroBatch], norm: Norm
) -> dict[str, Tensor]:
    """y = g * (x (W + M o s B A)^T) + bias: first the sum of dy x^T, then through g, norm and mask."""
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, _output: Tensor, tokens: ExpertTokens | None = None) -> Callable[[Tensor], None]:
        flat = x.reshape(-1, x.shape[-1])

        def backward(dy: Tensor) -> None:
            upstream = dy.reshape(-1, dy.shape[-1])
            part = upstream.T @ flat if tokens is None else _of_experts(upstream, flat, tokens)
            sums[name] = sums[name].add_(part) if name in sums else part

        return backward

    wanted = [layer.lora_B for layer in layers.values()]
    num_tokens = 0
    with watched_outputs(layers, see):
        for batch in batches:
            logits, targets = labelled_logits(model, batch, wanted[0].device)
            torch.autograd.grad(token_nll(logits, targets).sum(), wanted)
            num_tokens += len(targets)
    for name, layer in layers.items():
        total = sums[name]
        if norm == "attached":
            unit, _ = row_directions(layer, total.dtype)
            total -= (total * unit).sum(dim=1, keepdim=True) * unit
        scale = 1.0 / num_tokens
        gain = layer.gain(total.dtype)
        total *= scale if gain is None else gain.value.reshape(-1, 1) * scale
        keep_mask = layer.base.keep_mask() if layer.masked else None
        if keep_mask is not None:
            total.masked_fill_(~keep_mask, 0.0)
    return sums


def _of_experts(dy: Tensor, x: Tensor, tokens: ExpertTokens) -> Tensor:
    """dy^T x of each expert of a stack, (experts * out, in)."""
    total = dy.new_zeros(len(tokens.counts), dy.shape[1], x.shape[1])
    for run in tokens.reached:
        total[run.experts[0]] = dy[run.tokens].T @ x[run.tokens]
    return total.flatten(0, 1)


@torch.no_grad()
def update_spectrum(layer: AdaptedLinear) -> LayerSpectrum:
    """Squared singular values of diag(g) s B A, what the adapter adds to the layer; g = 1 for LoRA.

    The product is not formed: they are those of the small matrix between the factors' orthogonal bases. For a stack of
    experts a component has one of each expert, and its energy is their sum. Not for a
    masked layer: the masked B A has another rank than B A.
    """
    wide = torch.float64
    b = layer.stored_B().to(wide) * layer.scaling
    if layer.magnitude is not None:
        norm = layer.row_norm().to(wide)
        b = b * (layer.magnitude.to(wide) / norm).masked_fill(norm == 0, 0.0).unsqueeze(-1)
    energies = np.zeros(layer.rank)
    for left, right in layer.factor_pairs(b, layer.lora_A.to(wide)):
        small = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
        energies += torch.linalg.svdvals(small).square().cpu().numpy()
    return LayerSpectrum(energies, float(energies.sum()), layer.parameters_per_rank)
