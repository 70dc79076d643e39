"""The worth of each rank component of a layer, in nats: the quadratic model of the loss along one component at a time.

Let F(D) be the loss with D in place of s B A (under the layer's mask; norm attached or held), at the present D

    F(D + X) ~ F + <G, X> + <X, H X> / 2,        G = dF/dD,  H the Gauss-Newton matrix of F by D.

Components are E_i = u_i v_i^T, orthonormal: the singular directions of D, of sizes sigma_i > 0 (held), then those of
the gradient across them, (1 - U U^T) G (1 - V V^T), of size 0 (new). With g_i = <G, E_i> and q_i = <E_i, H E_i>, the
loss with component i at size t is F + g_i (t - sigma_i) + q_i (t - sigma_i)^2 / 2. It is least at t* = sigma_i - g_i /
q_i, and without the component, t = 0, it is larger by

    worth_i = q_i t*^2 / 2 = (q_i sigma_i - g_i)^2 / (2 q_i).

Theorem. If H does not couple the components (<E_i, H E_j> = 0 for i != j), then among all subsets of k components, each
at its best size, the k of greatest worth have the least loss, and it lies above the least loss with all of them by the
worths of those left out. (The model is a sum over i.) Its cases:

    g_i = 0      q_i sigma_i^2 / 2       what removal costs: LeCun et al., Optimal Brain Damage, 1990
    sigma_i = 0  g_i^2 / (2 q_i)         what a new component gains: half the Newton decrement
    F = c ||W + D - T||^2 / 2            c tau_i^2 / 2, tau_i the singular values of T - W: Eckart and Young

q_i is never negative. Where it is 0, the logits do not move along E_i but for a shift, so that g_i = 0, too, and the
component is worth 0. Nothing here changes with the basis of A and B, (R^-1 A, B R).

Exact curvatures q_i take one product with H per component. Estimated ones take one backward pass per draw for all
components of all layers. With labels y_t drawn from the model's own p_t, independently for each labelled token t, and
a_t = d/dD log p_t(y_t),

    E[a_t] = 0,    E[<a_t, X>^2] = <X, J_t^T (diag p_t - p_t p_t^T) J_t X>.

So the square of a row's own slope, sum over its tokens of <a_t, X>, has the sum of its tokens' forms as its mean. One
backward pass gives one such slope for each row of the micro-batch, and a component u v^T needs no matrix:

    <dL/dD, u v^T> = sum over positions of (dy g . u) (x . v).

With the norm attached, what a weight row's own length takes is subtracted: u_r (w_r . v) dy_r (y_r - bias_r) / n_r,
where w_r is the direction of row r of W + D and n_r its norm.

A stack of experts has such components of each expert (`AdaptedLinear.approximated_parts`). One rank more is one
component more of every part, so the i-th worth of a stack is the sum of the i-th ones of its parts.

The estimate of q_i has no bias, but a new component's worth divides by it and is too large on average by the squared
relative error of q_i: 4 % for an error of 20 %. With few draws this grows without bound, so there is a least number.

Source of the identity: Martens, arXiv 1412.1193, sec. 9.2 (Fisher and Gauss-Newton agree where the loss is an NLL).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from qdora.adapter.expert_product import ExpertTokens
from qdora.adapter.experts import AdaptedExperts
from qdora.adapter.layer import AdaptedLinear, evaluation_mode
from qdora.data.batches import IGNORED, MicroBatch
from qdora.files.console import Progress
from qdora.model.inject import adapted_layers
from qdora.rank.allocate import LayerSpectrum
from qdora.rank.curvature import UPDATE, Norm, curvature_of, labelled_logits, plain_model
from qdora.train.loss import token_nll

Array = NDArray[np.float64]
Layout = ExpertTokens | tuple[int, ...]
"""How the tokens of a layer's input lie: by expert, or (rows, positions) of the micro-batch."""
GRADIENT_BYTES = 2**29  # of the gradients that exist at once, in float32; what they need takes 8 times as much


@dataclass(frozen=True)
class Directions:
    """The components E_i = u_i v_i^T of a layer: first the held ones, by size, then the new ones, by slope.

    Of a stack the numbers are (parts, components), the vectors (experts, out, components) and (experts, in,
    components); a part with fewer components than others ends in zeros.

    Attributes:
        left, right: U, (out, components), and V, (in, components), columns of length 1.
        sizes: (components,) sigma_i >= 0; 0 for a new one.
        slopes: (components,) g_i = <G, E_i>.
    """

    left: Tensor
    right: Tensor
    sizes: Array
    slopes: Array


@dataclass(frozen=True)
class Components:
    """The components of a layer, `Directions` without the vectors, and their worth.

    Attributes:
        curvatures: (components,) q_i = <E_i, H E_i> >= 0.
        curvature_errors: (components,) their standard errors, from the spread over the draws.
    """

    sizes: Array
    slopes: Array
    curvatures: Array
    curvature_errors: Array

    def worths(self) -> Array:
        """(components,) in nats of mean NLL; 0 where the curvature is within rounding of 0."""
        flat = self.curvatures <= 1e-7 * self.curvatures.max(axis=-1, initial=0.0, keepdims=True)
        safe = np.where(flat, 1.0, self.curvatures)
        worths: Array = np.where(flat, 0.0, (safe * self.sizes - self.slopes) ** 2 / (2.0 * safe))
        return worths

    def spectrum(self, most: int, cost: int) -> LayerSpectrum:
        """The greatest `most` worths."""
        worths = self.worths()
        falling = np.sort(worths, axis=-1)[..., ::-1].reshape(-1, worths.shape[-1])
        return LayerSpectrum(falling.sum(axis=0)[:most], cost)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: each.tolist() for name, each in (vars(self) | {"worths": self.worths()}).items()}


def _by_expert(tensor: Tensor, layout: Layout) -> list[tuple[int, Tensor]]:
    """(..., features) as (rows, tokens, features) for each expert that has tokens; a plain layer is expert 0.

    All tokens are one row in a stack, and where the layout may be another than the micro-batch's.
    """
    if isinstance(layout, ExpertTokens):
        return [(run.experts[0], tensor[run.tokens].unsqueeze(0)) for run in layout.reached]
    has_rows = tensor.shape[:-1] == layout and layout[0] != layout[1]
    return [(0, tensor if has_rows else tensor.reshape(1, -1, tensor.shape[-1]))]


def update_gradients(
    model: PreTrainedModel, layers: Collection[str], batches: Sequence[MicroBatch], norm: Norm
) -> dict[str, Tensor]:
    """dL/d(s B A) of layers, (out, in) or (experts * out, in), L the mean NLL of labelled tokens; 0 under a mask."""
    num_tokens = 0
    with plain_model(model, layers, norm=norm, parts=UPDATE) as leaves:
        sums = {name.removesuffix(".update"): torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for batch in batches:
            logits, targets = labelled_logits(model, batch)
            nll = token_nll(logits, targets).sum()
            found = torch.autograd.grad(nll, [*leaves.values()], materialize_grads=True)
            for total, part in zip(sums.values(), found, strict=True):
                total += part
            num_tokens += len(targets)
    return {name: total / num_tokens for name, total in sums.items()}


@torch.no_grad()
def update_spectrum(layer: AdaptedLinear, most: int | None = None) -> LayerSpectrum:
    """The greatest `most` squared singular values of diag(g) s B A, what the adapter adds to the layer; g = 1 for LoRA.

    The best rank-r matrix holds the first r (Eckart and Young). In a stack of experts a component's energy is the sum
    over them. Not for a masked layer: the masked B A has another rank than B A.
    """
    energies = np.zeros(layer.rank)
    for _, sizes, _ in held_components(layer, layer.merged_gain()):
        energies[: len(sizes)] += sizes.square().cpu().numpy()
    return LayerSpectrum(energies[:most], layer.parameters_per_rank)


def layer_directions(
    model: PreTrainedModel,
    num_new: Mapping[str, int],
    batches: Sequence[MicroBatch],
    *,
    norm: Norm,
    progress: Progress | None = None,
) -> dict[str, Directions]:
    """The components of layers, from one gradient; `num_new` is path of a layer -> number of new components.

    The model is in float32 or float64. Only some layers' gradients exist at once.
    """
    adapted = adapted_layers(model)
    found: dict[str, Directions] = {}
    largest = 4 * max(adapted[name].in_features * adapted[name].out_features for name in num_new)
    together, names = max(1, GRADIENT_BYTES // largest), list(num_new)
    for start in range(0, len(names), together):
        group = names[start : start + together]
        for name, gradient in update_gradients(model, group, batches, norm).items():
            layer = adapted[name]
            pairs = zip(held_components(layer), layer.approximated_parts(gradient), strict=True)
            parts = [directions(held, part, num_new[name]) for held, part in pairs]
            found[name] = _of_stack(parts) if isinstance(layer, AdaptedExperts) else parts[0]
        if progress is not None:
            progress(len(found), len(num_new))
    return found


def _of_stack(parts: Sequence[Directions]) -> Directions:
    columns = [
        (part.left.T, part.right.T, torch.tensor(part.sizes), torch.tensor(part.slopes)) for part in parts
    ]
    left, right, sizes, slopes = (
        pad_sequence(list(each), batch_first=True) for each in zip(*columns, strict=True)
    )
    return Directions(left.mT, right.mT, sizes.numpy(), slopes.numpy())


def directions(held: tuple[Tensor, Tensor, Tensor], gradient: Tensor, num_new: int) -> Directions:
    """The held components and at most `num_new` steepest ones across them.

    `held` is U (out, r), sizes (r,) > 0, V (in, r), the singular value decomposition of D; `gradient` is G = dF/dD,
    (out, in).
    """
    left, sizes, right = (each.double() for each in held)
    wide = gradient.double()
    slopes = ((left.T @ wide) * right.T).sum(dim=1)
    across = wide - left @ (left.T @ wide)
    across = across - (across @ right) @ right.T
    new_left, new_slopes, new_right = _singular(across, min(num_new, min(wide.shape) - len(sizes)))
    return Directions(
        torch.cat([left, new_left], dim=1).to(gradient.dtype),
        torch.cat([right, new_right], dim=1).to(gradient.dtype),
        np.concatenate([sizes.cpu().numpy(), np.zeros(len(new_slopes))]),
        torch.cat([slopes, new_slopes]).cpu().numpy(),
    )


def held_components(layer: AdaptedLinear, gain: Tensor | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """U (out, r), sizes (r,), V (in, r) of s B A, or diag(gain) s B A, in float64, without forming it, for each of
    `approximated_parts`."""
    found, scaled = [], layer.stored_B().double() * layer.scaling
    scaled = scaled if gain is None else scaled * gain.unsqueeze(-1)
    parts = (factor.view(-1, *factor.shape[-2:]) for factor in (scaled, layer.lora_A.detach().double()))
    for b, a in zip(*parts, strict=True):
        left, first = torch.linalg.qr(b)
        right, second = torch.linalg.qr(a.T)
        u, sizes, vh = torch.linalg.svd(first @ second.T)
        # Of B and A, which may be far larger than their product
        scale = torch.linalg.matrix_norm(first, 2) * torch.linalg.matrix_norm(second, 2)
        kept = sizes > 1e-12 * scale
        found.append(((left @ u)[:, kept], sizes[kept], (right @ vh.T)[:, kept]))
    return found


def _singular(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (out, n), largest singular values (n,), right vectors (in, n), from the Gram matrix of the short
    side, which loses values below 1e-6 of the largest."""
    tall = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if tall else matrix
    squared, vectors = torch.linalg.eigh(short @ short.T)
    squared, vectors = squared.flip(0)[:most], vectors.flip(1)[:, :most]
    kept = squared > 1e-12 * squared.max() if len(squared) else squared > 0
    values, first = squared[kept].sqrt(), vectors[:, kept]
    second = short.T @ first / values
    return (second, values, first) if tall else (first, values, second)


def exact_curvatures(
    model: PreTrainedModel,
    directions: Mapping[str, Directions],
    batches: Sequence[MicroBatch],
    *,
    norm: Norm,
    progress: Progress | None = None,
) -> dict[str, Components]:
    """Curvatures from one product with H per component; model, batches and norm as in `curvature_of`."""
    found: dict[str, Components] = {}
    for name, each in directions.items():
        values = np.zeros(each.sizes.shape)
        with curvature_of(
            model, [name], batches, curvature="gauss_newton", norm=norm, parts=UPDATE
        ) as operator:
            for index in np.ndindex(*values.shape):
                *expert, component = index
                left, right = (vectors[tuple(expert)][:, component] for vectors in (each.left, each.right))
                matrix = each.left.new_zeros(*each.left.shape[:-1], len(right))
                matrix[tuple(expert)] = torch.outer(left, right)
                flat = matrix.flatten()
                values[index] = max(float(flat.double() @ operator.product(flat).double()), 0.0)
        found[name] = Components(each.sizes, each.slopes, values, np.zeros(values.shape))
        if progress is not None:
            progress(len(found), len(directions))
    return found


def drawn_curvatures(
    model: PreTrainedModel,
    directions: Mapping[str, Directions],
    batches: Sequence[MicroBatch],
    *,
    norm: Norm,
    draws: int,
    progress: Progress | None = None,
) -> dict[str, Components]:
    """Estimated curvatures from `draws` backward passes over each micro-batch, for all layers at once. The relative
    error falls with sqrt(draws x rows)."""
    adapted = adapted_layers(model)
    probes = {name: Probe(adapted[name], each, norm) for name, each in directions.items()}
    num_tokens = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches)
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        labels = functools.partial(drawn_labels, draws=draws, generator=torch.Generator().manual_seed(number))
        for name, each in squared_slopes(model, probes, batch, labels).items():
            sums[name] = sums[name] + each if name in sums else each
        if progress is not None:
            progress(number + 1, len(batches))
    found = {}
    for name, of_layer in directions.items():
        values: Array = (sums[name] / num_tokens).numpy()
        mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(draws)
        found[name] = Components(of_layer.sizes, of_layer.slopes, mean, error)
    return found


class Probe:
    """The directions of a layer's components with its gain and mask, which read slopes off a backward pass."""

    def __init__(self, layer: AdaptedLinear, directions: Directions, norm: Norm) -> None:
        dtype, keep = layer.base.wide_dtype, layer.base.keep_mask() if layer.masked else None
        num_experts = layer.num_experts if isinstance(layer, AdaptedExperts) else 1
        vectors = (directions.left, directions.right)
        left, right = (each.to(dtype).view(num_experts, *each.shape[-2:]) for each in vectors)
        rows, gain, bias = left.shape[:2], layer.gain(dtype), layer.base.bias
        self.layer, self.shape = layer, directions.sizes.shape
        self._left = left if gain is None else left * gain.value.view(*rows, 1)
        self._right = right
        self._bias = left.new_zeros(rows) if bias is None else bias.view(rows)
        self._keep = None if keep is None else keep.view(*rows, -1)
        self.slopes: Any = 0.0  # of the present backward pass, (rows of `_by_expert`, experts, components)
        self._own_length: Tensor | None = None  # how far the rows lengthen along each component
        if norm == "attached":
            mask = 1.0 if self._keep is None else self._keep
            update = (layer.stored_B().to(dtype) @ layer.lora_A.detach().to(dtype) * layer.scaling).view(
                *rows, -1
            )
            total = layer.base.dequantized(dtype).view(*rows, -1) + mask * update
            squared = total.square().sum(dim=2, keepdim=True)
            self._own_length = left * ((mask * total) @ right) / squared.masked_fill(squared == 0, 1.0)

    def watch(self, rows: tuple[int, ...], _layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook; `rows` are (rows, positions) of the micro-batch. Each backward pass adds to `slopes`.

        The model goes on with a copy of y: what it writes into its layers' outputs would carry the gradient past the
        hook.
        """
        passed_on, layout = output.clone(), args[1] if len(args) > 1 else rows
        add = functools.partial(self._add, args[0].detach(), output.detach(), layout)
        passed_on.register_hook(add)  # type: ignore[no-untyped-call]
        return passed_on

    def _add(self, x: Tensor, output: Tensor, layout: Layout, dy: Tensor) -> None:
        upstream, inputs, outputs = (_by_expert(each, layout) for each in (dy, x, output))
        total = dy.new_zeros(len(inputs[0][1]), len(self._left), self._left.shape[-1])
        for (expert, up), (_, given), (_, own) in zip(upstream, inputs, outputs, strict=True):
            left, right = self._left[expert], self._right[expert]
            if self._keep is None:
                total[:, expert] = ((up @ left) * (given @ right)).sum(dim=1)
            else:
                for row, (one, other) in enumerate(zip(up, given, strict=True)):
                    gradient = (one.T @ other).masked_fill_(~self._keep[expert], 0.0)
                    total[row, expert] = ((gradient @ right) * left).sum(dim=0)
            if self._own_length is not None:
                total[:, expert] -= (up * (own - self._bias[expert])).sum(dim=1) @ self._own_length[expert]
        self.slopes = self.slopes + total


def squared_slopes(
    model: PreTrainedModel, probes: Mapping[str, Probe], batch: MicroBatch, labels: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """For each set of labels, the squared slope of their NLL along each component, summed over the rows.

    `labels` makes of the logits, (labelled, vocabulary), the sets of labels, (sets, labelled) int64. Returns path ->
    (sets, [experts,] components) float64 on the CPU.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in probes}
    with ExitStack() as hooks, evaluation_mode(model):
        for probe in probes.values():
            watch = functools.partial(probe.watch, tuple(batch.input_ids.shape))
            hooks.enter_context(probe.layer.register_forward_hook(watch))
        logits, _ = labelled_logits(model, batch)
        drawn = labels(logits.detach())
        probabilities = torch.softmax(logits.detach(), dim=-1)
        wanted = [probe.layer.lora_B for probe in probes.values()]
        for number, each in enumerate(drawn):
            upstream = probabilities.clone()
            upstream[torch.arange(len(each)), each] -= 1.0
            torch.autograd.grad(logits, wanted, upstream, retain_graph=number + 1 < len(drawn))
            for name, probe in probes.items():
                found[name].append(probe.slopes.double().square().sum(dim=0).view(probe.shape).cpu())
                probe.slopes = 0.0
    return {name: torch.stack(each) for name, each in found.items()}


def drawn_labels(logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(draws, tokens) int64, each from its token's softmax, by a CPU generator."""
    chances = torch.softmax(logits, dim=-1, dtype=torch.float64).cpu()
    return torch.multinomial(chances, draws, replacement=True, generator=generator).T.to(logits.device)
