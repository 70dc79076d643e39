"""The cheap measures of rank beside curvature: what the trained update holds, and what the gradient asks for.

Both are spectra of matrices of a layer's shape, so a component is a singular direction and its energy the square of its
singular value: by the theorem of Eckart and Young the best rank-r matrix leaves out what is not among the first r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from qdora.analysis.allocate import LayerSpectrum
from qdora.analysis.curvature import labelled_logits
from qdora.data.batching import MicroBatch
from qdora.model.inject import adapted_layers
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.ops.loss import token_nll

GRADIENT_BYTES = 2**30
"""Gradients that exist at once, in float32."""


@torch.no_grad()
def update_spectrum(layer: AdaptedLinear) -> LayerSpectrum:
    """Squared singular values of diag(g) s B A, what the adapter adds to the layer; g = 1 for LoRA.

    The product is not formed: they are those of the small matrix between the factors' orthogonal bases.

    Raises:
        ValueError: A masked layer: what is left of B A under a mask is not of B A's rank, so its singular values are
            not those of rank components.
    """
    if layer.masked:
        raise ValueError("the update of a masked adapter; allowed: one without a mask.")
    wide = torch.float64
    b = layer.stored_B().to(wide) * layer.scaling
    if layer.magnitude is not None:
        norm = layer.row_norm().to(wide)
        b = b * (layer.magnitude.to(wide) / norm).masked_fill(norm == 0, 0.0).unsqueeze(1)
    small = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(layer.lora_A.to(wide).T, mode="r").R.T
    energies = torch.linalg.svdvals(small).square().cpu().numpy()
    return LayerSpectrum(energies, float(energies.sum()), layer.in_features + layer.out_features)


def gradient_spectra(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[MicroBatch],
    most: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LayerSpectrum]:
    """Squared singular values of dL/d(s B A) of each layer, L the mean NLL of the labelled tokens, norm held.

    Of a masked adapter it is zero where the mask is: there B A counts for nothing.
    At B = 0 this is the matrix whose first r directions are the best first step of an adapter of rank r.

    Args:
        model: With adapters, activations in float32 or float64; run in eval mode.
        layers: Paths of adapted layers.
        batches: Without packing.
        most: Most components of a layer.
        progress: Called with (done, all) layers.
    """
    adapted = adapted_layers(model)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    found: dict[str, LayerSpectrum] = {}
    try:
        for group in _groups(adapted, layers):
            for name, gradient in _gradients(model, {name: adapted[name] for name in group}, batches).items():
                found[name] = _spectrum(gradient, most)
            if progress is not None:
                progress(len(found), len(layers))
    finally:
        for module in was_training:
            module.training = True
    return found


def _groups(adapted: dict[str, AdaptedLinear], layers: Sequence[str]) -> Iterator[list[str]]:
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


def _gradients(model: nn.Module, layers: dict[str, AdaptedLinear], batches: Iterable[MicroBatch]) -> dict[str, Tensor]:
    """dL/d(s B A) of each layer, y = g * (x (W + M o s B A)^T) + bias: (out, in), float32 or wider."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])

            def backward(dy: Tensor) -> None:
                part = dy.reshape(-1, dy.shape[-1]).T @ x
                sums[name] = sums[name].add_(part) if name in sums else part

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    wanted = [layer.lora_B for layer in layers.values()]
    device = wanted[0].device
    num_tokens = 0
    try:
        for batch in batches:
            logits, targets = labelled_logits(model, batch, device)
            torch.autograd.grad(token_nll(logits, targets).sum(), wanted)
            num_tokens += len(targets)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        gain = layer.gain(sums[name].dtype)
        scale = 1.0 / max(num_tokens, 1)
        sums[name] *= scale if gain is None else gain.value.unsqueeze(1) * scale
        keep_mask = layer.base.keep_mask() if layer.masked else None
        if keep_mask is not None:
            sums[name].masked_fill_(~keep_mask, 0.0)
    return sums


def _spectrum(gradient: Tensor, most: int) -> LayerSpectrum:
    # By the Gram matrix of the short side: a tenth of the time of an SVD, and what it loses are the smallest values
    short = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    wide = short.double()
    values = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0.0)
    energies: np.ndarray[tuple[int], np.dtype[np.float64]] = values[:most].cpu().numpy()
    return LayerSpectrum(energies, float(values.sum()), sum(gradient.shape))
