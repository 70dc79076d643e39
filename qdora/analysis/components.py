"""What each rank component of a layer is worth, in nats: the quadratic model of the loss along one component at a time.

Let F(D) be the loss with D in place of s B A (under the layer's mask; norm attached or held), at the present D

    F(D + X) ~ F + <G, X> + <X, H X> / 2,        G = dF/dD,  H the Gauss-Newton matrix of F by D.

Components are E_i = u_i v_i^T, orthonormal: the singular directions of D, of sizes sigma_i > 0 (held), then those of
the gradient across them, (1 - U U^T) G (1 - V V^T), of size 0 (new): the changes of D that no change of the held ones'
own A and B makes to first order, so that they take more rank. With g_i = <G, E_i> and q_i = <E_i, H E_i>, the loss with
component i at size t is F + g_i (t - sigma_i) + q_i (t - sigma_i)^2 / 2. It is least at t* = sigma_i - g_i / q_i, and
without the component, t = 0, it is larger by

    worth_i = q_i t*^2 / 2 = (q_i sigma_i - g_i)^2 / (2 q_i).

Theorem. If H does not couple the components (<E_i, H E_j> = 0 for i != j), then among all subsets of k components, each
at its best size, the k of greatest worth have the least loss, and it lies above the least loss with all of them by the
worths of those left out. (The model is a sum over i.) Its cases:

    g_i = 0      q_i sigma_i^2 / 2       what removal costs: LeCun et al., Optimal Brain Damage, 1990
    sigma_i = 0  g_i^2 / (2 q_i)         what a new component gains: half the Newton decrement
    F = c ||W + D - T||^2 / 2            c tau_i^2 / 2, tau_i the singular values of T - W that the components share:
                                         what Eckart and Young say that a rank leaves out, each once, also at B = 0

Why not the eigenvalues of the Hessian by (A, B): its eigenvectors are directions of all components' factors together.
At B = 0 it is s [[0, G^T], [G, 0]] on each of the r components, plus a block of B alone, so without that block each
singular value of G comes 2 r times, r of them negative: 2 r eigenvalues say one thing about one component. And why the
Gauss-Newton matrix by D: with it q_i is never negative, and q_i = 0 means that the logits do not move along E_i but for
a shift of all of them, so that g_i = 0, too, and the component is worth 0. Nothing here changes with the basis of A and
B, (R^-1 A, B R). How q_i is had: component_curvature.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdora.analysis.allocate import LayerSpectrum
from qdora.analysis.plain import Norm
from qdora.analysis.tensor_cache import keep_tensors, kept_tensors
from qdora.analysis.update_gradient import update_gradients
from qdora.data.batching import MicroBatch
from qdora.model.inject import adapted_layers
from qdora.nn.adapted_linear import AdaptedLinear

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """The components E_i = u_i v_i^T of a layer: first the held ones, by size, then the new ones, by slope.

    Attributes:
        left: U, (out, components), columns of length 1.
        right: V, (in, components), the same.
        sizes: (components,) sigma_i >= 0; 0 for a new one.
        slopes: (components,) g_i = <G, E_i>.
        tail: Squared Frobenius norm of the gradient across held and new components.
    """

    left: Tensor
    right: Tensor
    sizes: Array
    slopes: Array
    tail: float


@dataclass(frozen=True)
class Components:
    """What is known of the components of a layer.

    Attributes:
        sizes, slopes, tail: As of `Directions`.
        curvatures: (components,) q_i = <E_i, H E_i> >= 0.
        errors: (components,) standard errors of the curvatures; 0 where they are exact.
    """

    sizes: Array
    slopes: Array
    curvatures: Array
    errors: Array
    tail: float

    def worths(self) -> Array:
        """(components,) in nats of mean NLL; 0 where the curvature is within rounding of 0."""
        flat = self.curvatures <= 1e-7 * self.curvatures.max(initial=0.0)
        safe = np.where(flat, 1.0, self.curvatures)
        worths: Array = np.where(flat, 0.0, (safe * self.sizes - self.slopes) ** 2 / (2.0 * safe))
        return worths

    def spectrum(self, most: int, cost: int) -> LayerSpectrum:
        """The worths, the greatest first, at most `most`; in the total, the tail at the mean rate of the new ones."""
        worths = self.worths()
        new = self.sizes == 0.0
        slope = float((self.slopes[new] ** 2).sum())
        rest = self.tail * float(worths[new].sum()) / slope if slope > 0 else 0.0
        return LayerSpectrum(np.sort(worths)[::-1][:most].copy(), float(worths.sum()) + rest, cost)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "sizes": self.sizes.tolist(),
            "slopes": self.slopes.tolist(),
            "curvatures": self.curvatures.tolist(),
            "curvature_errors": self.errors.tolist(),
            "worths": self.worths().tolist(),
            "tail": self.tail,
        }


def layer_directions(
    model: nn.Module,
    num_new: Mapping[str, int],
    batches: Sequence[MicroBatch],
    *,
    norm: Norm,
    cache: Path | None = None,
    state: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Directions]:
    """The components of layers, from one gradient; from the cache where it has them.

    Args:
        model, batches, norm: As of `update_gradients`.
        num_new: Path of a layer -> how many new components, as of `directions`.
        cache: Directory; a layer's components are written there once they are known.
        state: `fingerprint` of the model and the batches; needed with a cache.
        progress: Called with (done, all) layers that the cache has not.
    """
    adapted = adapted_layers(model)
    keys = {name: ["directions", name, norm, number, state] for name, number in num_new.items()}
    found = {name: kept for name, key in keys.items() if (kept := kept_tensors(cache, key)) is not None}

    def use(name: str, gradient: Tensor) -> dict[str, Tensor]:
        made = directions(held_components(adapted[name]), gradient, num_new[name])
        numbers = {"sizes": made.sizes, "slopes": made.slopes, "tail": np.array([made.tail])}
        tensors = {"left": made.left, "right": made.right}
        tensors |= {each: torch.from_numpy(values) for each, values in numbers.items()}
        keep_tensors(cache, keys[name], tensors)
        return tensors

    missing = [name for name in num_new if name not in found]
    if missing:
        found |= update_gradients(model, missing, batches, use, norm=norm, progress=progress)
    return {name: _from_tensors(found[name], adapted[name].lora_A.device) for name in num_new}


def directions(held: tuple[Tensor, Tensor, Tensor], gradient: Tensor, num_new: int) -> Directions:
    """The held components and the `num_new` steepest ones across them, U and V in the gradient's dtype.

    Args:
        held: U (out, r), sizes (r,) > 0, V (in, r), the singular value decomposition of D; r may be 0.
        gradient: G = dF/dD, (out, in).
        num_new: At most min(out, in) - r are there; those without slope are left out.
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
        max(float(across.square().sum() - new_slopes.square().sum()), 0.0),
    )


def held_components(layer: AdaptedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), sizes (r,), V (in, r) of s B A in float64, without forming it; r is its numerical rank."""
    b = layer.stored_B().double() * layer.scaling
    left, first = torch.linalg.qr(b)
    right, second = torch.linalg.qr(layer.lora_A.detach().double().T)
    u, sizes, vh = torch.linalg.svd(first @ second.T)
    # Of B and A, which may be far larger than their product
    scale = torch.linalg.matrix_norm(first, 2) * torch.linalg.matrix_norm(second, 2)
    kept = sizes > 1e-12 * scale
    return (left @ u)[:, kept], sizes[kept], (right @ vh.T)[:, kept]


def _from_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> Directions:
    numbers = {name: tensors[name].numpy() for name in ("sizes", "slopes")}
    return Directions(
        tensors["left"].to(device), tensors["right"].to(device), **numbers, tail=float(tensors["tail"][0])
    )


def _singular(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values, (n,), and their vectors, (out, n) and (in, n), by the Gram matrix of the short side;
    values below 1e-6 of the largest, of which it knows nothing, are left out."""
    tall = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if tall else matrix
    squared, vectors = torch.linalg.eigh(short @ short.T)
    squared, vectors = squared.flip(0)[:most], vectors.flip(1)[:, :most]
    kept = squared > 1e-12 * squared.max() if len(squared) else squared > 0
    values, first = squared[kept].sqrt(), vectors[:, kept]
    second = short.T @ first / values
    return (second, values, first) if tall else (first, values, second)
