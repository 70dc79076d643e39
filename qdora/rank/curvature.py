"""Second derivatives of the loss by the adapters of chosen layers: the model by its plain formula, products with the
Hessian and the Gauss-Newton matrix, and their eigenvalues.

    y = g * (x W^T + s (x A^T) B^T) + bias,        g = m / ||W + s B A||_row

In float32 and without dropout, this is differentiable any number of times. A masked adapter has M o (B A) in place of B
A, also in the norm. The part `update` is the whole matrix s B A. Which expert a token goes to is a constant, what the
router weighs it with is not.

The training layer keeps the norm constant in its backward pass (DoRA, arXiv 2402.09353, sec. 4.3), so autograd through
it gives the curvature of another function than the loss. Here the caller chooses:

    attached    n(A, B) is part of the graph: the derivatives are those of the loss.
    held        n is the number that it is now: the derivatives are those of the surrogate that training follows.

LoRA has no norm: `none`. The loss is summed NLL of fixed micro-batches over their labelled tokens:

    hessian         H v  = d/dw (dL/dw . v)
    gauss_newton    G v  = J^T (diag p - p p^T) J v / tokens, J = dz/dw for the logits z, p = softmax(z): the part of H
                    that is never negative. With this loss it is the Fisher matrix, its labels drawn from the model.

Neither matrix is formed. Pearlmutter, Neural Computation 6, 1994; Martens, arXiv 1412.1193, sec. 8.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qdora.adapter.expert_product import ExpertTokens, add_expert_bias, expert_rows, frozen_stack
from qdora.adapter.experts import AdaptedExperts
from qdora.adapter.layer import AdaptedLinear, evaluation_mode
from qdora.adapter.product import frozen_linear
from qdora.data.batches import IGNORED, MicroBatch
from qdora.errors import RunFailure
from qdora.model.inject import adapted_layers
from qdora.quant.tiles import Weight, dense_weight
from qdora.train.loss import token_nll

Array = NDArray[np.float64]
Norm = Literal["attached", "held", "none"]
Curvature = Literal["hessian", "gauss_newton"]
PARTS = ("lora_A", "lora_B", "magnitude")
FACTORS = PARTS[:2]
UPDATE = ("update",)
"""In place of the factors: s B A as one dense matrix, (out, in) or (experts * out, in), before the mask."""


@dataclass(frozen=True)
class _PlainLayer:
    """The values of an adapted layer, or of one expert of a stack, while it runs by the plain formula.

    Attributes:
        values: Part ("lora_A", ...) -> its value; the chosen ones are leaves of a graph.
        row_norm: ||W + s B A||_row of the present values; None for LoRA.
        attached: The norm is computed anew in every forward pass, as a part of the graph.
        keep_mask: M, (out, in) or (experts * out, in) bool; None without a mask.
    """

    values: dict[str, Tensor]
    row_norm: Tensor | None
    attached: bool
    keep_mask: Tensor | None

    @classmethod
    def of(cls, layer: AdaptedLinear, attached: bool, whole: bool) -> _PlainLayer:
        dtype = layer.base.wide_dtype
        parts = {"lora_A": layer.lora_A, "lora_B": layer.stored_B(), "magnitude": layer.magnitude}
        values = {name: value.detach().to(dtype, copy=True) for name, value in parts.items() if value is not None}
        if whole:
            values["update"] = (values["lora_B"] @ values["lora_A"] * layer.scaling).flatten(0, -2)
        norm = None if layer.magnitude is None else layer.row_norm()
        return cls(values, norm, attached, layer.base.keep_mask() if layer.masked else None)

    def of_expert(self, expert: int) -> _PlainLayer:
        size = self.values["lora_B"].shape[1]
        rows = slice(expert * size, (expert + 1) * size)
        values = {name: value[rows] if name in UPDATE else value[expert] for name, value in self.values.items()}
        norm = None if self.row_norm is None else self.row_norm[expert]
        return _PlainLayer(values, norm, self.attached, None if self.keep_mask is None else self.keep_mask[rows])

    def product(self, x: Tensor, update: Tensor | None, scaling: float) -> Tensor:
        return (x @ self.values["lora_A"].T) @ self.values["lora_B"].T * scaling if update is None else x @ update.T

    def dense_update(self, scaling: float) -> Tensor | None:
        """M o (s B A), (out, in) with its graph, where it has to be formed: for a mask, or by the whole matrix."""
        update = self.values.get("update")
        if update is None:
            if self.keep_mask is None:
                return None
            update = self.values["lora_B"] @ self.values["lora_A"] * scaling
        return update if self.keep_mask is None else update.masked_fill(~self.keep_mask, 0.0)

    def gain(self, weight: Weight, base_squared: Tensor | None, update: Tensor | None, scaling: float) -> Tensor | None:
        """g = m / ||W + s B A|| for each row, and 0 for a row whose present norm is 0; None for LoRA.

        Attached, from factors, summed in float64 (a derivative divides by n^3):

            ||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T
        """
        if self.row_norm is None:
            return None
        norm, wide = self.row_norm, torch.float64
        if self.attached:
            if update is not None:  # where nothing cancels after the squares
                squared = (dense_weight(weight, wide) + update.to(wide)).square().sum(dim=1)
            else:
                assert base_squared is not None
                products = frozen_linear(self.values["lora_A"], weight).T.to(wide)  # (out, rank)
                a, b = self.values["lora_A"].to(wide), self.values["lora_B"].to(wide)
                own = ((2.0 * products + b @ (a @ a.T) * scaling) * b).sum(dim=1) * scaling
                squared = base_squared.to(wide) + own
            # A sum of rounding noise is a zero row, too
            norm = squared.masked_fill(squared <= 0, 1.0).sqrt().to(self.values["lora_A"].dtype)
        dead = self.row_norm == 0
        return (self.values["magnitude"] / norm.masked_fill(dead, 1.0)).masked_fill(dead, 0.0)


@contextmanager
def plain_model(
    model: nn.Module, layers: Collection[str], *, norm: Norm, parts: Collection[str] = FACTORS
) -> Iterator[dict[str, Tensor]]:
    """Run `model`, in float32 or float64, by the plain formula inside the block, in eval mode.

    Attention runs in plain torch or SDPA's MATH kernel: others cannot be differentiated twice. `norm` is that of these
    layers, in others it is constant. Yields "<layer>.<part>" -> leaf, in model order.
    """
    adapted = adapted_layers(model)
    leaves: dict[str, Tensor] = {}
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        if attention not in (None, "eager", "sdpa"):
            model.set_attn_implementation("eager")  # type: ignore[operator]
        for name, layer in adapted.items():
            plain = _PlainLayer.of(layer, name in layers and norm == "attached", name in layers and "update" in parts)
            if name in layers:
                leaves |= {f"{name}.{part}": plain.values[part].requires_grad_(True) for part in parts}
            forward: Any = _plain_experts if isinstance(layer, AdaptedExperts) else _plain_forward
            vars(layer)["forward"] = partial(forward, layer, plain)
        with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
            yield leaves
    finally:
        for layer in adapted.values():
            vars(layer).pop("forward", None)
        if attention not in (None, "eager", "sdpa"):
            model.set_attn_implementation(attention)  # type: ignore[operator]


def _plain_forward(layer: AdaptedLinear, plain: _PlainLayer, x: Tensor) -> Tensor:
    weight, scaling = layer.base.stored_weight, layer.scaling
    update = plain.dense_update(scaling)
    out = frozen_linear(x, weight) + plain.product(x, update, scaling)
    gain = plain.gain(weight, layer.base_squared, update, scaling)
    out = out if gain is None else out * gain
    return out if layer.base.bias is None else out + layer.base.bias.to(out.dtype)


def _plain_experts(layer: AdaptedExperts, plain: _PlainLayer, x: Tensor, tokens: ExpertTokens) -> Tensor:
    added, gains, scaling = [], [], layer.scaling
    for run in tokens.reached:
        (expert,) = run.experts
        own, part = plain.of_expert(expert), x[run.tokens]
        update = own.dense_update(scaling)
        added.append(own.product(part, update, scaling))
        rows = expert_rows(layer.base.stored_weight, layer.num_experts, run)
        squared = None if layer.base_squared is None else layer.base_squared[expert]
        gain = own.gain(rows, squared, update, scaling)
        if gain is not None:
            gains.append(gain.expand(len(part), -1))
    out = frozen_stack(x, layer.base.stored_weight, tokens) + torch.cat(added)
    if gains:
        out = out * torch.cat(gains)
    return out if layer.base.bias is None else add_expert_bias(out, layer.base.bias, tokens)


Logits = Callable[[], tuple[Tensor, Tensor]]
"""Runs one micro-batch: (num_labelled, vocabulary) logits with their graph, and (num_labelled,) int64 targets."""


class CurvatureOperator:
    """The matrix as its product with a vector. The parameters lie end to end, in the order of `leaves`.

    Memory is that of one micro-batch. With a single one the graph of the gradient is kept between products.
    """

    def __init__(self, leaves: Sequence[Tensor], batches: Sequence[Logits], curvature: Curvature) -> None:
        self.num_matvecs = 0
        self.size = sum(leaf.numel() for leaf in leaves)
        self.dtype = leaves[0].dtype  # of the products: float32 or float64
        self._leaves, self._batches, self._curvature = leaves, batches, curvature
        self._kept: Any = None

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times a (size,) vector, on the vector's device and in its dtype."""
        leaves, device = self._leaves, self._leaves[0].device
        pieces = torch.split(vector.to(device=device, dtype=self.dtype), [leaf.numel() for leaf in leaves])
        parts = [part.view_as(leaf) for part, leaf in zip(pieces, leaves, strict=True)]
        total = torch.zeros(self.size, dtype=self.dtype, device=device)
        num_tokens = 0
        keep = len(self._batches) == 1
        for batch in self._batches:
            graph = self._kept or self._graph(batch)
            self._kept = graph if keep else None
            total += torch.cat([each.reshape(-1) for each in self._image(graph, parts, keep)])
            num_tokens += len(graph[0])
            del graph
        self.num_matvecs += 1
        return (total / max(num_tokens, 1)).to(device=vector.device, dtype=vector.dtype)

    def _graph(self, batch: Logits) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        logits, targets = batch()
        if self._curvature == "hessian":
            nll = token_nll(logits, targets).sum()
            return logits, nll, torch.autograd.grad(nll, self._leaves, create_graph=True, materialize_grads=True)
        # J^T u is linear in u, so its derivative by u along v is J v.
        upstream = torch.zeros_like(logits, requires_grad=True)
        back = torch.autograd.grad(logits, self._leaves, upstream, create_graph=True, materialize_grads=True)
        return logits, upstream, back

    def _image(
        self, graph: tuple[Tensor, Tensor, Sequence[Tensor]], vector: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor]:
        logits, upstream, back = graph
        if self._curvature == "hessian":
            return torch.autograd.grad(back, self._leaves, vector, retain_graph=keep, materialize_grads=True)
        (along,) = torch.autograd.grad(back, upstream, vector, retain_graph=True, materialize_grads=True)
        with torch.no_grad():
            probability = torch.softmax(logits, dim=-1)
            weighted = probability * along
            weighted -= probability * weighted.sum(dim=-1, keepdim=True)
        return torch.autograd.grad(logits, self._leaves, weighted, retain_graph=keep, materialize_grads=True)


@contextmanager
def curvature_of(
    model: nn.Module,
    layers: Collection[str],
    batches: Sequence[MicroBatch],
    *,
    curvature: Curvature,
    norm: Norm,
    parts: Collection[str] = FACTORS,
) -> Iterator[CurvatureOperator]:
    """The curvature of a model's loss by the adapters of some layers; inside the model runs as in `plain_model`.
    Micro-batches are without packing."""
    with plain_model(model, layers, norm=norm, parts=parts) as leaves:
        runs = [partial(labelled_logits, model, batch) for batch in batches]
        yield CurvatureOperator(list(leaves.values()), runs, curvature)


def labelled_logits(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """The logits at the labelled positions, (num_labelled, vocabulary) with their graph, and their targets,
    (num_labelled,)."""
    device, wanted = next(model.parameters()).device, batch.labels[:, 1:] != IGNORED
    rows, columns = (index.to(device) for index in wanted.nonzero(as_tuple=True))
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, columns].unsqueeze(0), *args[1:])

    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    with head.register_forward_pre_hook(select):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1]), batch.labels[:, 1:][wanted].to(device)


def top_eigenpairs(
    product: Callable[[Array], Array], size: int, k: int, *, tolerance: float = 1e-3
) -> tuple[Array, Array, Array]:
    """The k eigenpairs of largest magnitude (at most size - 1) of a symmetric matrix, from its products in float64.

    From one start, Lanczos sees one copy of an eigenvalue, however often it comes (Parlett, The Symmetric Eigenvalue
    Problem, 1998, ch. 13). So `eigsh` is repeated across what was found, (1 - Q Q^T) M (1 - Q Q^T), until nothing is
    larger than the k-th, and Rayleigh-Ritz over all gives the pairs. Returns values, (k,), falling in magnitude,
    vectors (size, k), and residuals ||M v - lambda v||, (k,).
    """
    generator, k = np.random.default_rng(0), min(k, size - 1)
    found, magnitudes = np.zeros((size, 0)), np.zeros(0)

    def across(vector: Array) -> Array:
        for _ in range(2):  # once is not enough in floating point
            vector = vector - found @ (found.T @ vector)
        return vector

    def projected(vector: Array) -> Array:
        return across(product(across(vector)))

    matrix: LinearOperator[np.float64] = LinearOperator((size, size), matvec=projected, dtype=np.float64)
    while found.shape[1] < size - 1:
        start = across(generator.standard_normal(size))
        if len(magnitudes) and np.linalg.norm(projected(start)) <= 1e-12 * magnitudes[0] * np.linalg.norm(start):
            break
        wanted = min(max(1, k // 4) if len(magnitudes) else k, size - 1 - found.shape[1])
        try:
            values, vectors = eigsh(matrix, k=wanted, which="LM", v0=start, tol=tolerance, maxiter=30)
        except ArpackNoConvergence as error:  # copies or a dense bulk keep some of them from converging
            values, vectors = np.real(error.eigenvalues), np.real(error.eigenvectors)
            if not len(values):
                raise RunFailure(f"--eigenvalues: none of {k} converged. Fix: ask for fewer.") from None
        is_last = len(magnitudes) >= k and len(values) == wanted
        is_last = is_last and np.abs(values).max() <= magnitudes[k - 1] * (1.0 + max(tolerance, 1e-12))
        found = np.linalg.qr(np.concatenate([found, vectors], axis=1))[0]
        magnitudes = np.sort(np.concatenate([magnitudes, np.abs(values)]))[::-1]
        if is_last:
            break
    images = np.stack([product(column) for column in found.T], axis=1)
    small = found.T @ images
    values, rotation = np.linalg.eigh((small + small.T) / 2)
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    values, rotation = values[order], rotation[:, order]
    vectors = found @ rotation
    return values, vectors, np.linalg.norm(images @ rotation - vectors * values, axis=0)


def layer_spectrum(
    model: nn.Module, layer: str, batches: Sequence[MicroBatch], num: int, *, curvature: Curvature, norm: Norm
) -> dict[str, Any]:
    """The largest eigenvalues of the curvature by the factors of a layer, as JSON values.

    They belong to directions of all factors at once, not to rank components: at B = 0 each singular value of the
    gradient by the weight gives 2 x rank of them, half of them negative.
    """
    began = time.perf_counter()
    with curvature_of(model, [layer], batches, curvature=curvature, norm=norm) as operator:

        def product(vector: Array) -> Array:
            image: Array = operator.product(torch.from_numpy(vector)).numpy()
            return image

        values, _, residuals = top_eigenpairs(product, operator.size, num)
    return {
        "curvature": curvature,
        "norm": norm,
        "size": operator.size,
        "eigenvalues": values.tolist(),
        "residuals": residuals.tolist(),
        "num_matvecs": operator.num_matvecs,
        "seconds": time.perf_counter() - began,
    }
