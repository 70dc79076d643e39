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

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from qdora.adapter.expert_product import ExpertTokens, add_expert_bias, expert_rows
from qdora.adapter.experts import AdaptedExperts
from qdora.adapter.layer import AdaptedLinear, evaluation_mode
from qdora.adapter.product import frozen_linear
from qdora.data.batches import IGNORED, MicroBatch
from qdora.errors import RunFailure
from qdora.model.inject import adapted_layers
from qdora.quant.tiles import Weight, dense_weight
from qdora.train.loss import tapped, token_nll

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
        scaling: s.
        row_norm: ||W + s B A||_row of the present values; None for LoRA.
        attached: The norm is computed anew in every forward pass, as a part of the graph.
        keep_mask: M, (out, in) or (experts * out, in) bool; None without a mask.
    """

    values: dict[str, Tensor]
    scaling: float
    row_norm: Tensor | None
    attached: bool
    keep_mask: Tensor | None

    def of_expert(self, expert: int) -> _PlainLayer:
        size = self.values["lora_B"].shape[1]
        rows = slice(expert * size, (expert + 1) * size)
        values = {name: value[rows] if name in UPDATE else value[expert] for name, value in self.values.items()}
        norm = None if self.row_norm is None else self.row_norm[expert]
        return replace(
            self,
            values=values,
            row_norm=norm,
            keep_mask=None if self.keep_mask is None else self.keep_mask[rows],
        )

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """g * (x W^T + s (x A^T) B^T), (tokens, in) -> (tokens, out); g is 0 for a row whose present norm is 0."""
        out, norm, update = frozen_linear(x, weight), self.row_norm, self.values.get("update")
        a, b = self.values["lora_A"], self.values["lora_B"]
        if update is None and (self.attached or self.keep_mask is not None):
            update = b @ a * self.scaling
        if update is None:
            out = out + (x @ a.T) @ b.T * self.scaling
        else:
            if self.keep_mask is not None:
                update = update.masked_fill(~self.keep_mask, 0.0)
            out = out + x @ update.T
            if self.attached:  # float64: a derivative divides by n^3
                squared = (dense_weight(weight, torch.float64) + update.double()).square().sum(dim=1)
                norm = squared.masked_fill(squared == 0, 1.0).sqrt().to(x.dtype)
        if norm is None or self.row_norm is None:
            return out
        dead = self.row_norm == 0
        return out * (self.values["magnitude"] / norm.masked_fill(dead, 1.0)).masked_fill(dead, 0.0)


@contextmanager
def plain_model(
    model: PreTrainedModel, layers: Collection[str], *, norm: Norm, parts: Collection[str] = FACTORS
) -> Iterator[dict[str, Tensor]]:
    """Run `model`, in float32 or float64, by the plain formula inside the block, in eval mode.

    Attention runs in plain torch or SDPA's MATH kernel: others cannot be differentiated twice. `norm` is that of these
    layers, in others it is constant. Yields "<layer>.<part>" -> leaf, in model order.
    """
    adapted = adapted_layers(model)
    leaves: dict[str, Tensor] = {}
    attention = model.config._attn_implementation
    try:
        if attention not in (None, "eager", "sdpa"):
            model.set_attn_implementation("eager")
        for name, layer in adapted.items():
            dtype, chosen = layer.base.wide_dtype, name in layers
            factors = {"lora_A": layer.lora_A, "lora_B": layer.stored_B(), "magnitude": layer.magnitude}
            values = {
                part: value.detach().to(dtype, copy=True)
                for part, value in factors.items()
                if value is not None
            }
            if chosen:
                if "update" in parts:
                    values["update"] = (values["lora_B"] @ values["lora_A"] * layer.scaling).flatten(0, -2)
                leaves |= {f"{name}.{part}": values[part].requires_grad_(True) for part in parts}
            row_norm = None if layer.magnitude is None else layer.row_norm()
            keep = layer.base.keep_mask() if layer.masked else None
            plain = _PlainLayer(values, layer.scaling, row_norm, chosen and norm == "attached", keep)
            forward: Any = _plain_experts if isinstance(layer, AdaptedExperts) else _plain_forward
            vars(layer)["forward"] = partial(forward, layer, plain)
        with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
            yield leaves
    finally:
        for layer in adapted.values():
            vars(layer).pop("forward", None)
        if attention not in (None, "eager", "sdpa"):
            model.set_attn_implementation(attention)


def _plain_forward(layer: AdaptedLinear, plain: _PlainLayer, x: Tensor) -> Tensor:
    out = plain.forward(x, layer.base.stored_weight)
    return out if layer.base.bias is None else out + layer.base.bias.to(out.dtype)


def _plain_experts(layer: AdaptedExperts, plain: _PlainLayer, x: Tensor, tokens: ExpertTokens) -> Tensor:
    outputs = []
    for run in tokens.reached:
        weight = expert_rows(layer.base.stored_weight, layer.num_experts, run)
        outputs.append(plain.of_expert(run.experts[0]).forward(x[run.tokens], weight))
    out = torch.cat(outputs)
    return out if layer.base.bias is None else add_expert_bias(out, layer.base.bias, tokens)


class CurvatureOperator:
    """The matrix as its product with a vector. The parameters lie end to end, in the order of `leaves`.

    Memory is that of one micro-batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        leaves: Sequence[Tensor],
        batches: Sequence[MicroBatch],
        curvature: Curvature,
    ) -> None:
        self.size = sum(leaf.numel() for leaf in leaves)
        self._model, self._leaves, self._batches, self._curvature = model, leaves, batches, curvature

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times a (size,) vector, on the vector's device and in its dtype."""
        leaves = self._leaves
        pieces = torch.split(vector.to(leaves[0]), [leaf.numel() for leaf in leaves])
        parts = [part.view_as(leaf) for part, leaf in zip(pieces, leaves, strict=True)]
        total, num_tokens = torch.zeros_like(vector), 0
        for batch in self._batches:
            logits, targets = labelled_logits(self._model, batch)
            total += torch.cat([each.flatten() for each in self._image(logits, targets, parts)]).to(vector)
            num_tokens += len(targets)
        return total / num_tokens

    def _image(self, logits: Tensor, targets: Tensor, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        grad, leaves = partial(torch.autograd.grad, materialize_grads=True), self._leaves
        if self._curvature == "hessian":
            return grad(grad(token_nll(logits, targets).sum(), leaves, create_graph=True), leaves, vector)
        # J^T u is linear in u, so its derivative by u along v is J v.
        upstream = torch.zeros_like(logits, requires_grad=True)
        (along,) = grad(grad(logits, leaves, upstream, create_graph=True), upstream, vector, retain_graph=True)
        probability = torch.softmax(logits.detach(), dim=-1)
        weighted = probability * along
        return grad(logits, leaves, weighted - probability * weighted.sum(dim=-1, keepdim=True))


@contextmanager
def curvature_of(
    model: PreTrainedModel,
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
        yield CurvatureOperator(model, list(leaves.values()), batches, curvature)


def labelled_logits(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """The logits at the labelled positions, (num_labelled, vocabulary) with their graph, and their targets,
    (num_labelled,)."""
    device, wanted = model.device, batch.labels[:, 1:] != IGNORED
    rows, columns = (index.to(device) for index in wanted.nonzero(as_tuple=True))
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    with tapped(model.get_output_embeddings(), rows, columns, whole=True):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1]), batch.labels[:, 1:][wanted].to(device)


def top_eigenpairs(
    product: Callable[[Tensor], Tensor], size: int, k: int, *, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """The k eigenpairs of largest magnitude of a symmetric matrix, from its products in float64.

    Block Lanczos with k starts, kept orthogonal: from one start it sees one copy of an eigenvalue, however often it
    comes (Parlett, The Symmetric Eigenvalue Problem, 1998, ch. 13). It ends when no residual is above `tolerance` times
    the largest value. Returns values, (k,), falling in magnitude, vectors (size, k), and residuals ||M v - lambda v||.
    """
    k = min(k, size)
    basis = images = torch.empty(size, 0, dtype=torch.float64)
    block = torch.randn(size, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    while True:
        held = basis.shape[1]
        new = torch.linalg.qr(torch.cat([basis, block], dim=1)).Q[:, held:]
        basis = torch.cat([basis, new], dim=1)
        images = torch.cat([images, torch.stack([product(each) for each in new.T.contiguous()], dim=1)], dim=1)
        small = basis.T @ images
        values, rotation = torch.linalg.eigh((small + small.T) / 2)
        order = values.abs().argsort(descending=True, stable=True)[:k]
        values, rotation = values[order], rotation[:, order]
        vectors = basis @ rotation
        residuals = (images @ rotation - vectors * values).norm(dim=0)
        if basis.shape[1] == size or residuals.max() <= max(tolerance, 1e-12) * values[0].abs():
            return values, vectors, residuals
        if basis.shape[1] >= 100 * k:
            raise RunFailure(f"--eigenvalues: not all of {k} converged. Fix: ask for fewer.")
        block = images[:, held:][:, : size - basis.shape[1]]


def layer_spectrum(
    model: PreTrainedModel,
    layer: str,
    batches: Sequence[MicroBatch],
    num: int,
    *,
    curvature: Curvature,
    norm: Norm,
) -> dict[str, Any]:
    """The largest eigenvalues of the curvature by the factors of a layer, as JSON values.

    They belong to directions of all factors at once, not to rank components: at B = 0 each singular value of the
    gradient by the weight gives 2 x rank of them, half of them negative.
    """
    with curvature_of(model, [layer], batches, curvature=curvature, norm=norm) as operator:
        values, _, residuals = top_eigenpairs(operator.product, operator.size, num)
    return {
        "curvature": curvature,
        "norm": norm,
        "size": operator.size,
        "eigenvalues": values.tolist(),
        "residuals": residuals.tolist(),
    }
