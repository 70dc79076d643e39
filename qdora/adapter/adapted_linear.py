"""The adapted linear layer: LoRA or DoRA on a frozen base, by one formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from qdora.adapter.adapted_product import Operands, adapted_linear, adapted_product, operands_of
from qdora.adapter.dora import (
    Gain,
    gain,
    gain_of_sum,
    masked_row_norm,
    merged_weight,
    row_norm,
    squared_row_norm,
)
from qdora.adapter.frozen_linear import FrozenLinear
from qdora.adapter.frozen_product import product_dtype, without_graph_or_autocast
from qdora.adapter.gate import fold_gate
from qdora.adapter.low_rank_factors import rounded
from qdora.adapter.parameter_cache import ParameterCache
from qdora.adapter.wide_tensors import never_narrowed

Kind = Literal["lora", "dora"]
Init = Literal["kaiming", "gaussian"]


class AdaptedLinear(nn.Module):
    """y = g * (x W^T + s (drop(x) A^T) B^T) + bias, with g = m / ||W + s B A||_row for DoRA and g = 1 for LoRA.

    B starts at zero and m at ||W||_row of the dequantised base, so the fresh layer is exactly the base. With `masked`
    the base's keep mask applies to B A, in forward, norm and merge, so that the merged weight has every zero of the
    pruned base (`masked_update`). With a `gate` (`add_gate`) B diag(gate) replaces B in all formulas (`gate`); it
    starts at 1. Source: DoRA, arXiv 2402.09353, eq. 5; LoRA, arXiv 2106.09685, sec. 4.1.

    `magnitude` is float32 whatever the adapter's storage: bf16 has a spacing of 2^-8..2^-7 near 1, so an Adam step of
    1e-4 would be rounded away every time and the layer would silently train as LoRA.

    Args:
        rank: Rows of lora_A, 1 to min(in, out).
        alpha: Adapter scale; s = alpha / rank, or alpha / sqrt(rank) with `rank_stabilized` (arXiv 2312.03732).
        dropout: On the adapter's input while training, in [0, 1).
        init: lora_A from U(-1/sqrt(in), 1/sqrt(in)) (Kaiming with a = sqrt 5) or N(0, 0.01^2).
        dtype: Storage of lora_A and lora_B. bfloat16 only for `AdapterOptimizer`, which keeps the bits that it drops:
            other optimizers lose small updates of bf16 factors to rounding.
        masked: Keep the zeros of the base, which must be a pruned one.
        generator: Source of the initial values (CPU generator; values do not depend on the device).
    Attributes:
        keeps_scales: The base's block scales, decoded and times g, are made once for each state of the parameters, not
            for every product; the bits stay the same. They take 32 bits a block: half a bit a weight at blocks of 64.
            It saves a GPU three launches a product, and a CPU 1 to 5 % of a layer's time. A dense base, a streamed one,
            one divided among processes, a masked adapter and blocks that cross rows have nothing to keep.
        keeps_copy: Training keeps a copy of the output for the gradient of the magnitude, because the model writes into
            the output (`model.patches`).
        has_cancelled: Whether a row of the present norm has cancelled and is wrong: a bool on the device, which nobody
            has read yet (`norms_checked_later`); None if the norm is right.
    """

    base_squared: Tensor | None

    def __init__(
        self,
        base: FrozenLinear,
        *,
        kind: Kind = "dora",
        rank: int = 16,
        alpha: float = 32.0,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        init: Init = "kaiming",
        dtype: torch.dtype = torch.float32,
        masked: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if masked and base.keep_bits is None:
            raise ValueError("a masked adapter needs a base that was pruned here, got one without a mask.")
        self.base = base
        self.out_features, self.in_features = base.out_features, base.in_features
        self.rank = rank
        shape_a, shape_b, shape_m = self._shapes()
        limit = min(shape_b[-2], shape_a[-1])
        if not 1 <= rank <= limit:
            shape = (base.out_features, base.in_features)
            raise ValueError(f"the rank of a {shape} layer must be 1 to {limit}, got {rank}.")
        self.kind: Kind = kind
        self.alpha, self.rank_stabilized = float(alpha), rank_stabilized
        self.dropout = dropout
        self.masked = masked
        self.keeps_scales = True
        self.keeps_copy = False
        self.has_cancelled: Tensor | None = None
        self._is_asked = False
        device = base.device
        first = torch.empty(shape_a, dtype=torch.float32)
        if init == "gaussian":
            first.normal_(0.0, 0.01, generator=generator)
        else:
            bound = 1.0 / math.sqrt(base.in_features)
            first.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(first.to(device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(shape_b, dtype=dtype, device=device))
        self.magnitude: nn.Parameter | None = None
        self.gate: nn.Parameter | None = None
        squared = None
        if kind == "dora":
            squared = base.squared_row_norm().view(shape_m)
            self.magnitude = nn.Parameter(squared.sqrt())
        # Not persistent: it follows from the base.
        self.register_buffer("base_squared", squared, persistent=False)
        self._cache = ParameterCache()
        self._dtype: torch.dtype | None = None  # of the latest products
        self.register_load_state_dict_post_hook(_base_loaded)  # type: ignore[no-untyped-call]

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes of lora_A, lora_B and the magnitude."""
        return (self.rank, self.in_features), (self.out_features, self.rank), (self.out_features,)

    @property
    def scaling(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) if rank-stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def parameters_per_rank(self) -> int:
        """Parameters of one rank component of lora_A and lora_B."""
        return (self.lora_A.numel() + self.lora_B.numel()) // self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        dtype = product_dtype(x)
        operands = self.operands(dtype)
        if operands is not None and not self.training and without_graph_or_autocast(x):
            return adapted_product(x, self.base.stored_weight, self.base.bias, operands)
        return adapted_linear(
            x,
            self.base.stored_weight,
            self.lora_A,
            self.gated_B(),
            self.scaling,
            bias=self.base.bias,
            magnitude=self.magnitude,
            gain=self.gain(dtype) if operands is None else operands.gain,
            dropout=self.present_dropout,
            keep_bits=self._mask_bits,
            keeps_copy=self.keeps_copy,
            operands=operands,
        )

    def operands(self, dtype: torch.dtype) -> Operands | None:
        """What the products in `dtype` read, made once for each state of the parameters; None for a masked adapter."""
        if self.masked:
            return None

        def made() -> Operands:
            self._dtype = dtype
            base = self.base.stored_weight if self.may_keep_scales else None
            scaling = self.scaling / (1.0 - self.present_dropout)
            return operands_of(self.lora_A, self.gated_B(), self.gain(dtype), scaling, dtype, kept_of=base)

        return self._cache.get("operands", self._own_parameters(), self._operands_settings(dtype), made)

    def knows_norm(self, dtype: torch.dtype) -> bool:
        """Whether the norm of the present parameters is kept."""
        return self._cache.knows("row_norm", self._factors(), (dtype, self.scaling))

    def keep_norm(self, dtype: torch.dtype, norm: Tensor) -> None:
        """Keep the norm of the present parameters, computed elsewhere (`shared_norms`)."""
        self._cache.put("row_norm", self._factors(), (dtype, self.scaling), norm)

    def keep_prepared(self, dtype: torch.dtype, norm: Tensor, operands: Operands) -> None:
        """Keep the norm and the `operands` of the present parameters, computed elsewhere (`prepared_gains`)."""
        self.keep_norm(dtype, norm)
        self._cache.put("gain", self._own_parameters(), (dtype, self.scaling), operands.gain)
        self._cache.put("operands", self._own_parameters(), self._operands_settings(dtype), operands)

    def _operands_settings(self, dtype: torch.dtype) -> tuple[object, ...]:
        return dtype, self.scaling, self.present_dropout, self.may_keep_scales

    @property
    def may_keep_scales(self) -> bool:
        """Whether `keeps_scales` holds and the base is here, whole."""
        return self.keeps_scales and not self.base.away and self.base.share is None

    @property
    def present_dropout(self) -> float:
        """The probability in the present mode: 0 in evaluation."""
        return self.dropout if self.training else 0.0

    def add_gate(self) -> None:
        """Give every rank component a trainable factor, float32 (float64 for float64 factors), at 1."""
        wide = torch.promote_types(self.lora_B.dtype, torch.float32)
        self.gate = nn.Parameter(torch.ones(self.rank, dtype=wide, device=self.lora_B.device))

    def gated_B(self) -> Tensor:
        """B diag(gate), (out, rank), differentiable: the B of everything outside this layer's training."""
        return self.lora_B if self.gate is None else fold_gate(self.lora_B, self.gate)

    def stored_B(self) -> Tensor:
        """B diag(gate) as a file holds it: detached and in B's dtype, which loses nothing."""
        return self.gated_B().detach().to(self.lora_B.dtype)

    @torch.no_grad()
    def keep_components_(self, kept: Tensor) -> None:
        """Keep these rank components, one or more: (n,) int64, ascending, on the layer's device.

        The parameters and the scaling stay the same. Removing components with a gate of 0 changes the layer's output by
        rounding only. For use between steps: torch raises an error in a later backward pass if the graph of an earlier
        forward pass is still alive.
        """
        assert 0 < len(kept) <= self.rank, "a layer keeps one component or more"
        share = len(kept) / self.rank
        self.rank = len(kept)
        self.alpha *= math.sqrt(share) if self.rank_stabilized else share
        self.lora_A.data = self.lora_A.data.index_select(-2, kept)
        self.lora_B.data = self.lora_B.data.index_select(-1, kept)
        if self.gate is not None:
            self.gate.data = self.gate.data.index_select(0, kept)
        self.parameters_changed()

    def approximated_parts(self, matrix: Tensor) -> list[Tensor]:
        """The matrices that B A of this layer approximates, each by one of `rank`, for a B A that shall be `matrix`."""
        return [matrix]

    def factor_pairs(self, lora_B: Tensor, lora_A: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Factors (rows, rank), (rank, columns) of each of `approximated_parts`, from tensors in the shapes of lora_B
        and lora_A."""
        return [(lora_B, lora_A)]

    @torch.no_grad()
    def set_factors_(self, factors: list[tuple[Tensor, Tensor]]) -> None:
        """Set lora_B and lora_A from the factors of each of `approximated_parts`."""
        ((lora_B, lora_A),) = factors
        self.lora_B.copy_(lora_B)
        self.lora_A.copy_(lora_A)

    @property
    def _mask_bits(self) -> Tensor | None:
        return self.base.keep_bits if self.masked else None

    def gain(self, dtype: torch.dtype) -> Gain | None:
        """g = m / ||W + s B A||_row with W A^T computed in `dtype`, detached; None for LoRA.

        Computed once for each state of the parameters, the norm once for each state of A, B and gate.
        """
        magnitude = self.magnitude
        if magnitude is None:
            return None
        settings = (dtype, self.scaling)

        def made() -> Gain:
            self._dtype = dtype
            norm = self._cache.get(
                "row_norm", self._factors(), settings, lambda: self._norm(*self._rounded_factors(dtype), dtype)
            )
            return gain(magnitude, norm)

        return self._cache.get("gain", self._own_parameters(), settings, made)

    def _own_parameters(self) -> tuple[Tensor, ...]:
        """The parameters that the gain and the operands depend on."""
        return self._factors() if self.magnitude is None else (*self._factors(), self.magnitude)

    def _factors(self) -> tuple[Tensor, ...]:
        """The parameters that the row norm depends on."""
        return (self.lora_A, self.lora_B) if self.gate is None else (self.lora_A, self.lora_B, self.gate)

    def _rounded_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and gated B as the products take them."""
        return rounded(self.lora_A.detach(), dtype), rounded(self.gated_B().detach(), dtype)

    def row_norm(self) -> Tensor:
        """||W + s B A|| of each row, with the mask on B A, (out,) float32 (float64 for a float64 base)."""
        return self._norm(self.lora_A, self.gated_B(), self.base.wide_dtype)

    def _norm(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> Tensor:
        weight, bits = self.base.stored_weight, self._mask_bits
        if bits is not None:
            return masked_row_norm(weight, bits, lora_A, lora_B, self.scaling, dtype=dtype)
        squared = squared_row_norm(weight) if self.base_squared is None else self.base_squared
        return row_norm(weight, lora_A, lora_B, self.scaling, base_squared=squared, dtype=dtype)

    def parameters_changed(self) -> None:
        """Call this after a write through `.data` outside an optimizer, which torch cannot see (`ParameterCache`)."""
        self._cache.clear()

    def train(self, mode: bool = True) -> AdaptedLinear:
        """As in `nn.Module`; a change of the mode also forgets cached values."""
        if mode != self.training:  # transformers' Trainer calls model.train() for every micro-batch
            self.parameters_changed()
        super().train(mode)
        return self

    def merged_weight(self, dtype: torch.dtype = torch.float32, *, base: Tensor | None = None) -> Tensor:
        """The dense weight (out, in) that equals this layer: merged in float32, cast once. The bias is not part of it.

        float64 also merges in float64. `base`, (out, in), takes the place of the layer's own weight, in the norm as
        well.
        """
        wide = torch.promote_types(dtype, torch.float32)
        weight = self.base.dequantized(wide) if base is None else base.to(wide)
        keep = self.base.keep_mask() if self.masked else None
        merged = merged_weight(weight, self.lora_A, self.gated_B(), self.scaling, self.magnitude, keep_mask=keep)
        return merged.to(dtype)

    def merged_gain(self) -> Tensor | None:
        """The gain of `merged_weight`, (out,) float32 (float64 for a float64 base); None for LoRA."""
        if self.magnitude is None:
            return None
        weight = self.base.dequantized(self.base.wide_dtype)
        keep = self.base.keep_mask() if self.masked else None
        adapted = merged_weight(weight, self.lora_A, self.gated_B(), self.scaling, keep_mask=keep)
        return gain_of_sum(adapted, self.magnitude)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        with never_narrowed(self, ("magnitude", "gate", "base_squared")):  # see the class
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.parameters_changed()
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        mask = (", masked" if self.masked else "") + (", gated" if self.gate is not None else "")
        return f"{self.kind}, rank={self.rank}, scaling={self.scaling:.6g}, dropout={self.dropout}{mask}"


def _base_loaded(layer: AdaptedLinear, _keys: object) -> None:
    """After `load_state_dict`, which may have loaded another base: compute anew what follows from it."""
    layer.parameters_changed()
    if layer.base_squared is not None:
        layer.base_squared = layer.base.squared_row_norm().view_as(layer.base_squared)


def drop_scales_without_room(layers: Iterable[AdaptedLinear]) -> bool:
    """Let no layer keep its decoded scales (`AdaptedLinear.keeps_scales`) if together they would take more than half of
    a GPU's free memory. Returns whether that is so."""
    layers = [layer for layer in layers if layer.keeps_scales and layer.lora_B.ndim == 2]  # stacks of experts have none
    blocks = [
        layer.in_features * layer.out_features // layer.base.block_size
        for layer in layers
        if layer.base.block_size and not layer.base.away
    ]
    free = _free_bytes(layers[0].lora_A.device) if layers else None
    if free is None or 4 * sum(blocks) <= free // 2:
        return False
    for layer in layers:
        layer.keeps_scales = False
    return True


def _free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None for another device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
