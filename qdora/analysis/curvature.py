"""Products with the Hessian and the Gauss-Newton matrix of the loss, by the adapter parameters of chosen layers.

The loss is that of training: summed NLL of fixed micro-batches over their labelled tokens. Neither matrix is formed.

    hessian         H v  = d/dw (dL/dw . v)
    gauss_newton    G v  = J^T (diag p - p p^T) J v / tokens, J = dz/dw for the logits z, p = softmax(z): the part of H
                    that is never negative. With this loss it is the Fisher matrix, its labels drawn from the model.

Pearlmutter, Neural Computation 6, 1994; Martens, arXiv 1412.1193, sec. 8. Each comes with the norm attached or held
(plain.py), and says so: at B = 0 and beyond, the two differ by far more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qdora.analysis.plain import FACTORS, Norm, plain_model
from qdora.data.batching import IGNORED, MicroBatch
from qdora.ops.loss import token_nll

Curvature = Literal["hessian", "gauss_newton"]
CURVATURES: tuple[Curvature, ...] = ("hessian", "gauss_newton")

Logits = Callable[[], tuple[Tensor, Tensor]]
"""Runs one micro-batch: (num_labelled, vocabulary) logits with their graph, and (num_labelled,) int64 targets."""


class CurvatureOperator:
    """The matrix, as what it does to a vector. The parameters lie end to end, in the order of `leaves`.

    Memory is that of one micro-batch at a time. Of a single one the graph of the gradient is kept from product to
    product, which costs no more at its peak and saves two of its four passes.

    Args:
        leaves: Name -> parameter that the logits depend on, float32 or float64.
        batches: What to run; the same in every product.
        curvature: Which matrix.
        norm: What the graph sees of the norm; a name only, for what is written down.
    """

    def __init__(self, leaves: Mapping[str, Tensor], batches: Sequence[Logits], *, curvature: Curvature, norm: Norm):
        self.leaves = dict(leaves)
        self.curvature: Curvature = curvature
        self.norm: Norm = norm
        self.num_matvecs = 0
        """Products so far."""
        self._batches = tuple(batches)
        self._num_tokens = 0
        self._kept: Any = None

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return sum(leaf.numel() for leaf in self.leaves.values())

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return next(iter(self.leaves.values())).dtype

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times a (size,) vector, on the vector's device and in its dtype; computed in `dtype`."""
        if vector.shape != (self.size,):
            raise ValueError(f"a vector of shape {tuple(vector.shape)}; allowed: ({self.size},).")
        device = next(iter(self.leaves.values())).device
        wide = vector.to(device=device, dtype=self.dtype)
        sizes = [leaf.numel() for leaf in self.leaves.values()]
        pieces = torch.split(wide, sizes)
        parts = [part.view_as(leaf) for part, leaf in zip(pieces, self.leaves.values(), strict=True)]
        one = self._hessian if self.curvature == "hessian" else self._gauss_newton
        total = torch.zeros(self.size, dtype=self.dtype, device=device)
        self._num_tokens = 0
        keep = len(self._batches) == 1
        for batch in self._batches:
            graph = self._kept
            if graph is None:
                graph = self._graph(batch)
            self._kept = graph if keep else None
            total += torch.cat([each.reshape(-1) for each in one(graph, parts, keep)])
            self._num_tokens += len(graph[0])
            del graph
        self.num_matvecs += 1
        return (total / max(self._num_tokens, 1)).to(device=vector.device, dtype=vector.dtype)

    def gradient(self) -> Tensor:
        """dL/dw at the point itself: (size,) in `dtype`, on the leaves' device."""
        leaves = list(self.leaves.values())
        total = torch.zeros(self.size, dtype=self.dtype, device=leaves[0].device)
        num_tokens = 0
        for batch in self._batches:
            logits, targets = batch()
            parts = torch.autograd.grad(token_nll(logits, targets).sum(), leaves, materialize_grads=True)
            total += torch.cat([each.reshape(-1) for each in parts])
            num_tokens += len(targets)
        return total / max(num_tokens, 1)

    def _graph(self, batch: Logits) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Logits, the vector that stands for the gradient by them, and the gradient by the leaves with its graph."""
        logits, targets = batch()
        leaves = list(self.leaves.values())
        if self.curvature == "hessian":
            nll = token_nll(logits, targets).sum()
            return logits, nll, torch.autograd.grad(nll, leaves, create_graph=True, materialize_grads=True)
        # J^T u is linear in u, so its derivative by u along v is J v.
        upstream = torch.zeros_like(logits, requires_grad=True)
        back = torch.autograd.grad(logits, leaves, upstream, create_graph=True, materialize_grads=True)
        return logits, upstream, back

    def _hessian(
        self, graph: tuple[Tensor, Tensor, Sequence[Tensor]], vector: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor]:
        gradient = graph[2]
        leaves = list(self.leaves.values())
        return torch.autograd.grad(gradient, leaves, list(vector), retain_graph=keep, materialize_grads=True)

    def _gauss_newton(
        self, graph: tuple[Tensor, Tensor, Sequence[Tensor]], vector: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor]:
        logits, upstream, back = graph
        (along,) = torch.autograd.grad(back, upstream, list(vector), retain_graph=True, materialize_grads=True)
        with torch.no_grad():
            probability = torch.softmax(logits, dim=-1)
            weighted = probability * along
            weighted -= probability * weighted.sum(dim=-1, keepdim=True)
        leaves = list(self.leaves.values())
        return torch.autograd.grad(logits, leaves, weighted, retain_graph=keep, materialize_grads=True)


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
    """The curvature of a model's loss by the adapters of some layers; inside the block the model runs plainly.

    Args:
        model: A causal LM with adapters, in float32 or float64.
        layers, norm, parts: As in `plain_model`.
        batches: Without packing; at least one labelled token.
        curvature: "hessian" or "gauss_newton".
    Raises:
        ValueError: As `plain_model`; a packed batch; no labelled token.
    """
    check_batches(batches)
    with plain_model(model, layers, norm=norm, parts=parts) as leaves:
        device = next(iter(leaves.values())).device
        runs = [_run(model, batch, device) for batch in batches]
        yield CurvatureOperator(leaves, runs, curvature=curvature, norm=norm)


def check_batches(batches: Sequence[MicroBatch]) -> None:
    """Raises ValueError for a packed micro-batch, and where no token has a label."""
    if any(batch.packing is not None for batch in batches):
        raise ValueError("packed micro-batches; allowed: one example a row.")
    if not any(bool((batch.labels[:, 1:] != IGNORED).any()) for batch in batches):
        raise ValueError("no labelled token; allowed: micro-batches with at least one.")


def labelled_logits(model: nn.Module, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The model's own logits at the labelled positions alone, and their targets.

    Returns:
        (num_labelled, vocabulary) with their graph, float32 or wider; (num_labelled,) int64.
    """
    wanted = batch.labels[:, 1:] != IGNORED
    rows, columns = (index.to(device) for index in wanted.nonzero(as_tuple=True))
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, columns].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return logits.reshape(-1, logits.shape[-1]), batch.labels[:, 1:][wanted].to(device)


def _run(model: nn.Module, batch: MicroBatch, device: torch.device) -> Logits:
    return lambda: labelled_logits(model, batch, device)
