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
B, (R^-1 A, B R).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdora.analysis.allocate import LayerSpectrum
from qdora.analysis.curvature import curvature_of
from qdora.analysis.plain import UPDATE, Norm
from qdora.atomic_files import atomic_write_json
from qdora.data.batching import MicroBatch
from qdora.model.inject import adapted_layers
from qdora.nn.adapted_linear import AdaptedLinear

Array = NDArray[np.float64]
_FORMAT = 1


@dataclass(frozen=True)
class Components:
    """The components of a layer: first the held ones, by size, then the new ones, by slope.

    Attributes:
        sizes: (components,) sigma_i >= 0; 0 for a new one.
        slopes: (components,) g_i = <G, E_i>.
        curvatures: (components,) q_i = <E_i, H E_i> >= 0.
        tail: Squared Frobenius norm of the gradient across held and new components.
        num_matvecs, seconds: Spent when it was computed.
    """

    sizes: Array
    slopes: Array
    curvatures: Array
    tail: float
    num_matvecs: int = 0
    seconds: float = 0.0

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
            "worths": self.worths().tolist(),
            "tail": self.tail,
            "num_matvecs": self.num_matvecs,
            "seconds": self.seconds,
        }


def components(
    held: tuple[Tensor, Tensor, Tensor], gradient: Tensor, quadratic: Callable[[Tensor], float], num_new: int
) -> Components:
    """Size, slope and curvature of the held components and of the `num_new` steepest ones across them.

    Args:
        held: U (out, r), sizes (r,) > 0, V (in, r), the singular value decomposition of D; r may be 0.
        gradient: G = dF/dD, (out, in).
        quadratic: X (out, in) in the gradient's dtype -> <X, H X>; called once a component.
        num_new: At most min(out, in) - r are there; those without slope are left out.
    """
    left, sizes, right = (each.double() for each in held)
    wide = gradient.double()
    slopes = ((left.T @ wide) * right.T).sum(dim=1)
    across = wide - left @ (left.T @ wide)
    across = across - (across @ right) @ right.T
    new_left, new_slopes, new_right = _singular(across, min(num_new, min(wide.shape) - len(sizes)))
    pairs = [*zip(left.T, right.T, strict=True), *zip(new_left.T, new_right.T, strict=True)]
    curvatures = [max(quadratic(torch.outer(u, v).to(gradient.dtype)), 0.0) for u, v in pairs]
    tail = max(float(across.square().sum() - new_slopes.square().sum()), 0.0)
    return Components(
        np.concatenate([sizes.cpu().numpy(), np.zeros(len(new_slopes))]),
        torch.cat([slopes, new_slopes]).cpu().numpy(),
        np.array(curvatures, dtype=np.float64),
        tail,
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


def layer_components(
    model: nn.Module,
    name: str,
    batches: Sequence[MicroBatch],
    *,
    norm: Norm,
    num_new: int,
    cache: Path | None = None,
    state: str = "",
) -> Components:
    """The components of one layer, from the cache where it has them: one gradient, and one product a component.

    Args:
        model, batches, norm: As of `curvature_of`.
        name: Path of the layer.
        num_new: As of `components`.
        cache: Directory; the result is written there, made if needed.
        state: `fingerprint` of the model and the batches; needed with a cache.
    """
    key = hashlib.sha256(json.dumps(["components", _FORMAT, name, norm, num_new, state]).encode()).hexdigest()[:32]
    kept = None if cache is None else cache / f"{key}.json"
    if kept is not None and kept.is_file():
        document = json.loads(kept.read_bytes())
        sizes, slopes, curvatures = (np.array(document[each]) for each in ("sizes", "slopes", "curvatures"))
        return Components(sizes, slopes, curvatures, document["tail"], document["num_matvecs"], document["seconds"])
    began = time.perf_counter()
    layer = adapted_layers(model)[name]
    with curvature_of(model, [name], batches, curvature="gauss_newton", norm=norm, parts=UPDATE) as operator:
        shape = (layer.out_features, layer.in_features)

        def quadratic(direction: Tensor) -> float:
            flat = direction.reshape(-1)
            return float(flat.double() @ operator.product(flat).double())

        found = components(held_components(layer), operator.gradient().view(shape), quadratic, num_new)
        spent = operator.num_matvecs
    seconds = time.perf_counter() - began
    found = Components(found.sizes, found.slopes, found.curvatures, found.tail, spent, seconds)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(kept, {"layer": name, "norm": norm, **found.to_dict()})
    return found


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
