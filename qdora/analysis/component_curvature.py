"""q_i = <E_i, H E_i> along the components of layers: H the Gauss-Newton matrix of the loss by D (components.py).

Exact, it takes one product with H a component. Drawn, it takes one backward pass a draw for all components of all
layers. With labels y_t drawn from the model's own p_t, independently for each labelled token t, and
a_t = d/dD log p_t(y_t),

    E[a_t] = 0,    E[<a_t, X>^2] = <X, J_t^T (diag p_t - p_t p_t^T) J_t X>,

the first because probabilities sum to 1, the second because that is what the matrix of the logits is: the covariance
of the drawn label. So the square of a row's own slope, sum over its tokens of <a_t, X>, has the sum of its tokens'
forms as its mean: the mixed terms have mean 0. One backward pass gives one such slope for each row of the micro-batch
and each X, and a component of rank 1, u v^T, needs no matrix:

    <dL/dD, u v^T> = sum over positions of (dy g . u) (x . v).

With the norm attached, what a weight row's own length takes is subtracted: u_r (w_r . v) dy_r (y_r - bias_r) / n_r,
where w_r is the direction of row r of W + D and n_r its norm.

The estimate of q_i has no bias. The worth of a new component, which divides by it, is a little too large on average: by
its squared relative error, 4 % where that is 20 %. With few draws that grows without bound, and a component whose q_i
came out small by chance looks best: hence the least number of draws.

Source of the identity: Martens, arXiv 1412.1193, sec. 9.2 (Fisher and Gauss-Newton agree where the loss is an NLL).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdora.analysis.components import Directions
from qdora.analysis.curvature import check_batches, curvature_of, labelled_logits
from qdora.analysis.plain import UPDATE, Norm, check_layers
from qdora.analysis.tensor_cache import made_once
from qdora.analysis.update_gradient import evaluating, row_directions, watch_output
from qdora.data.batching import IGNORED, MicroBatch
from qdora.model.inject import adapted_layers
from qdora.nn.adapted_linear import AdaptedLinear

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]
LEAST_DRAWS = 8
_CHUNK = 64
"""Tokens whose probabilities are summed up at once in float64."""


@dataclass(frozen=True)
class Curvatures:
    """Of the components of a layer.

    Attributes:
        values: (components,) q_i >= 0.
        errors: (components,) standard errors, from the spread over the draws; 0 where they are exact. Where a value
            came out too small, its error did, too.
    """

    values: Array
    errors: Array


def exact_curvatures(
    model: nn.Module,
    directions: Mapping[str, Directions],
    batches: Sequence[MicroBatch],
    *,
    norm: Norm,
    cache: Path | None = None,
    state: str = "",
    progress: Progress | None = None,
) -> dict[str, Curvatures]:
    """By one product with H a component; kept layer by layer.

    Args:
        model, batches, norm: As of `curvature_of`.
        directions: Path of a layer -> its components.
        cache: Directory; what is there is not computed again.
        state: `fingerprint` of the model and the batches; needed with a cache.
        progress: Called with (done, all) layers.
    """
    found: dict[str, Curvatures] = {}
    for name, each in directions.items():
        key = ["exact curvatures", name, norm, len(each.sizes), state]
        values = made_once(cache, key, functools.partial(_exact, model, name, each, batches, norm))["values"]
        found[name] = Curvatures(values.numpy(), np.zeros(len(values)))
        if progress is not None:
            progress(len(found), len(directions))
    return found


def drawn_curvatures(
    model: nn.Module,
    directions: Mapping[str, Directions],
    batches: Sequence[MicroBatch],
    *,
    norm: Norm,
    draws: int,
    seed: int = 0,
    cache: Path | None = None,
    state: str = "",
    progress: Progress | None = None,
) -> dict[str, Curvatures]:
    """By `draws` backward passes over each micro-batch, for all layers at once; kept micro-batch by micro-batch.

    Args:
        model, directions, batches, norm, cache, state: As of `exact_curvatures`; the model runs as in
            `update_gradients`.
        draws: Labels for each labelled token, `LEAST_DRAWS` or more. The relative error falls with sqrt(draws x rows).
        seed: Of the labels.
        progress: Called with (done, all) micro-batches.
    Raises:
        ValueError: Too few draws, and as `curvature_of`.
    """
    if draws < LEAST_DRAWS:
        raise ValueError(f"{draws} draws; allowed: {LEAST_DRAWS} or more.")
    check_batches(batches)
    check_layers(model, list(directions), norm=norm)
    adapted = adapted_layers(model)
    device = next(iter(directions.values())).left.device

    @functools.cache
    def probes() -> dict[str, Probe]:
        return {name: Probe(adapted[name], each, norm) for name, each in directions.items()}

    def squares(number: int, batch: MicroBatch) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed * len(batches) + number)
        return squared_slopes(
            model, probes(), batch, lambda logits: drawn_labels(logits, draws, generator), device=device
        )

    num_tokens = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches)
    shapes = [[name, len(each.sizes)] for name, each in directions.items()]
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        key = ["drawn curvatures", shapes, norm, draws, seed, number, len(batches), state]
        for name, each in made_once(cache, key, functools.partial(squares, number, batch)).items():
            sums[name] = sums[name] + each if name in sums else each
        if progress is not None:
            progress(number + 1, len(batches))
    found = {}
    for name in directions:
        values: Array = (sums[name] / num_tokens).numpy()
        found[name] = Curvatures(values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(draws))
    return found


class Probe:
    """Reads the slopes along the components of one layer off a backward pass."""

    def __init__(self, layer: AdaptedLinear, directions: Directions, norm: Norm) -> None:
        dtype = layer.base.wide_dtype
        left, right = directions.left.to(dtype), directions.right.to(dtype)
        gain = layer.gain(dtype)
        self.layer = layer
        self._left = left if gain is None else left * gain.value.unsqueeze(1)
        self._right = right
        self._keep = layer.base.keep_mask() if layer.masked else None
        self._own_length: Tensor | None = None
        if norm == "attached":
            unit, length = row_directions(layer, dtype)
            if self._keep is not None:
                unit = unit.masked_fill(~self._keep, 0.0)
            self._own_length = left * (unit @ right) / length.masked_fill(length == 0, 1.0).unsqueeze(1)

    def see(
        self, x: Tensor, output: Tensor, rows: tuple[int, ...], take: Callable[[Tensor], None]
    ) -> Callable[[Tensor], None]:
        """What to call with dL/dy; it calls `take` with the slopes of each row, (rows, components).

        Args:
            x, output: (..., in), (..., out).
            rows: (rows, positions) of the micro-batch. Of a tensor that is laid out in another way, or may be because
                both are the same number, all tokens count as one row: the mean stays right, the spread is larger.
            take: May be called in any number of backward passes.
        """
        positions = _rows(x, rows)
        # A number for each component in place of all of x, but the dense gradient of a masked layer needs x itself.
        inner = positions @ self._right if self._keep is None else positions
        without_bias = None
        if self._own_length is not None:
            bias = self.layer.base.bias
            without_bias = _rows(output if bias is None else output - bias, rows)

        def backward(dy: Tensor) -> None:
            upstream = _rows(dy, rows)
            if self._keep is None:
                slopes = ((upstream @ self._left) * inner).sum(dim=1)
            else:
                slopes = torch.stack([self._masked(*pair) for pair in zip(upstream, inner, strict=True)])
            if without_bias is not None and self._own_length is not None:
                slopes = slopes - (upstream * without_bias).sum(dim=1) @ self._own_length
            take(slopes)

        return backward

    def _masked(self, dy: Tensor, x: Tensor) -> Tensor:
        gradient = (dy.T @ x).masked_fill_(~self._keep, 0.0)  # type: ignore[operator]
        return ((gradient @ self._right) * self._left).sum(dim=0)


def squared_slopes(
    model: nn.Module,
    probes: Mapping[str, Probe],
    batch: MicroBatch,
    labels: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
) -> dict[str, Tensor]:
    """For each set of labels, the squared slope of their NLL along each component, summed over the rows.

    Args:
        model: With adapters; run in eval mode.
        probes: Path of a layer -> its probe.
        batch: Without packing.
        labels: From the logits, (labelled, vocabulary), to the sets of labels, (sets, labelled) int64.
        device: Of the model.
    Returns:
        Path -> (sets, components) float64 on the CPU.
    """
    slopes: dict[str, Tensor] = {}

    def take(name: str, value: Tensor) -> None:
        slopes[name] = slopes[name] + value if name in slopes else value

    rows = tuple(batch.input_ids.shape)

    def see(name: str, x: Tensor, output: Tensor) -> Callable[[Tensor], None]:
        return probes[name].see(x, output, rows, functools.partial(take, name))

    hooks = [watch_output(probe.layer, functools.partial(see, name)) for name, probe in probes.items()]
    found: dict[str, list[Tensor]] = {name: [] for name in probes}
    try:
        with evaluating(model):
            logits, _ = labelled_logits(model, batch, device)
            drawn = labels(logits.detach())
            probabilities = torch.softmax(logits.detach(), dim=-1)
            wanted = [probe.layer.lora_B for probe in probes.values()]
            for number, each in enumerate(drawn):
                slopes.clear()
                upstream = probabilities.clone()
                upstream[torch.arange(len(each), device=device), each.to(device)] -= 1.0
                torch.autograd.grad(logits, wanted, upstream, retain_graph=number + 1 < len(drawn))
                for name in probes:
                    found[name].append(slopes[name].double().square().sum(dim=0).cpu())
    finally:
        for each_hook in hooks:
            each_hook.remove()
    return {name: torch.stack(each) for name, each in found.items()}


def drawn_labels(logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(draws, tokens) int64 on the logits' device, each from its token's softmax.

    The chance comes from a CPU generator, so that the labels are the same on every device, to rounding.

    Args:
        logits: (tokens, vocabulary).
    """
    chance = torch.rand(len(logits), draws, dtype=torch.float64, generator=generator)
    parts = []
    for some, chances in zip(torch.split(logits, _CHUNK), torch.split(chance, _CHUNK), strict=True):
        below = torch.softmax(some.double(), dim=-1).cumsum(dim=-1)
        found = torch.searchsorted(below, chances.to(logits.device) * below[:, -1:], right=True)
        parts.append(found.clamp_max(logits.shape[-1] - 1))
    return torch.cat(parts).T


def _rows(tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
    """(rows, positions, features) where it surely has the micro-batch's layout, else (1, tokens, features)."""
    known = tensor.shape[:-1] == rows and rows[0] != rows[1]
    return tensor if known else tensor.reshape(1, -1, tensor.shape[-1])


def _exact(
    model: nn.Module, name: str, directions: Directions, batches: Sequence[MicroBatch], norm: Norm
) -> dict[str, Tensor]:
    values = []
    with curvature_of(model, [name], batches, curvature="gauss_newton", norm=norm, parts=UPDATE) as operator:
        for u, v in zip(directions.left.T, directions.right.T, strict=True):
            flat = torch.outer(u, v).reshape(-1).to(operator.dtype)
            values.append(max(float(flat.double() @ operator.product(flat).double()), 0.0))
    return {"values": torch.tensor(values, dtype=torch.float64)}
