"""The adapted linear layer: LoRA or DoRA on a frozen base, by one formula."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from qdora.nn.frozen_linear import FrozenLinear
from qdora.nn.gain_cache import GainCache, NormSettings, ProductCache, Products
from qdora.ops.adapted_map import (
    adapted_linear,
    adapted_product,
    factors_of_products,
    is_plain,
    product_dtype,
    rounded,
)
from qdora.ops.dora import (
    FactoredNorm,
    Gain,
    factored_norm,
    gain_of_sum,
    measure_cancelled_,
    merged_weight,
    row_norm,
    squared_row_norm,
)
from qdora.ops.gate import fold_gate
from qdora.ops.masked_linear import masked_linear, masked_row_norm
from qdora.ops.planned_device import is_planning
from qdora.ops.tiles import with_own_scales

Kind = Literal["lora", "dora"]
Init = Literal["kaiming", "gaussian"]


class AdaptedLinear(nn.Module):
    """y = g * (x W^T + s (drop(x) A^T) B^T) + bias, with g = m / ||W + s B A||_row for DoRA and g = 1 for LoRA.

    With `masked` the base's keep mask is laid over B A, in forward, norm and merge, so that the merged weight has every
    zero of the pruned base (`ops.masked_linear`).

    B starts at zero and m at ||W||_row of the dequantised base, so the fresh layer is exactly the base.
    Source: DoRA, arXiv 2402.09353, eq. 5; LoRA, arXiv 2106.09685, sec. 4.1.

    With a `gate` (`add_gate`) B diag(gate) stands wherever the formulas say B (`ops.gate`); it starts at 1.

    `magnitude` is float32 whatever the adapter's storage: bf16 has a spacing of 2^-8..2^-7 near 1, so an Adam step of
    1e-4 would be rounded away every time and the layer would silently train as LoRA.

    Args:
        base: Frozen layer.
        kind: "lora" or "dora".
        rank: Rows of lora_A, 1 to min(in, out).
        alpha: Adapter scale; s = alpha / rank, or alpha / sqrt(rank) with `rank_stabilized` (arXiv 2312.03732).
        dropout: On the adapter's input while training, in [0, 1).
        init: lora_A from U(-1/sqrt(in), 1/sqrt(in)) (Kaiming with a = sqrt 5) or N(0, 0.01^2).
        dtype: Storage of lora_A and lora_B.
        masked: Keep the zeros of the base, which must be a pruned one.
        generator: Source of the initial values (CPU generator; values do not depend on the device).
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
        dtype: torch.dtype = torch.bfloat16,
        masked: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if masked and base.keep_bits is None:
            raise ValueError("a masked adapter needs a base that was pruned here; this one has no mask.")
        limit = min(base.in_features, base.out_features)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"rank {rank} of a ({base.out_features}, {base.in_features}) layer; allowed: 1 to {limit}."
            )
        self.base = base
        self.kind: Kind = kind
        self.rank, self.alpha, self.rank_stabilized = rank, alpha, rank_stabilized
        self.dropout = dropout
        self.masked = masked
        self.keeps_scales = False
        device = base.stored_weight.device
        first = torch.empty(rank, base.in_features, dtype=torch.float32)
        if init == "gaussian":
            first.normal_(0.0, 0.01, generator=generator)
        else:
            bound = 1.0 / math.sqrt(base.in_features)
            first.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(first.to(device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        self.magnitude: nn.Parameter | None = None
        self.gate: nn.Parameter | None = None
        squared = None
        if kind == "dora":
            squared = squared_row_norm(base.stored_weight)
            self.magnitude = nn.Parameter(squared.sqrt())
        # Not persistent: it follows from the base.
        self.register_buffer("base_squared", squared, persistent=False)
        self._gain_cache, self._product_cache = GainCache(), ProductCache()
        self.register_load_state_dict_post_hook(_base_loaded)  # type: ignore[no-untyped-call]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.base.out_features

    @property
    def scaling(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) where rank-stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        bits = self._mask_bits
        if not self.training and bits is None and is_plain(x):
            a, scaled_b, on_rows, kept = self._products(x.dtype)
            return adapted_product(x, kept or self.base.stored_weight, self.base.bias, a, scaled_b, on_rows)
        weight = self.base.stored_weight
        factors = (self.base.bias, self.lora_A, self.gated_B(), self.scaling)
        gain = self.gain(product_dtype(x))
        dropout = self.dropout if self.training else 0.0
        if bits is not None:
            return masked_linear(x, weight, bits, *factors, magnitude=self.magnitude, gain=gain, dropout=dropout)
        return adapted_linear(x, weight, *factors, magnitude=self.magnitude, gain=gain, dropout=dropout)

    def _products(self, dtype: torch.dtype) -> Products:
        """What the products of evaluation take, made once for each state of the parameters."""
        parameters = self._factors() if self.magnitude is None else (*self._factors(), self.magnitude)
        return self._product_cache.get(parameters, NormSettings(dtype, self.scaling), lambda: self._made(dtype))

    def _made(self, dtype: torch.dtype) -> Products:
        gain = self.gain(dtype)
        value = None if gain is None else gain.value
        factors = factors_of_products(self.lora_A, self.gated_B(), value, self.scaling, dtype)
        # A weight that comes and goes has no codes to share.
        own = with_own_scales(self.base.stored_weight, value) if self.keeps_scales and not self.base.away else None
        return Products(*factors, value if own is None else None, own)

    def keep_scales(self, keep: bool = True) -> None:
        """For decoding, one token after the other: keep the base's block scales, decoded and times g, in evaluation.

        The bits stay the same. It takes 32 bits a block (half a bit a weight at blocks of 64) until the parameters
        change; a dense base, a streamed one, a masked adapter and blocks that cross rows have nothing to keep.
        """
        self.keeps_scales = keep
        self._product_cache.clear()

    def add_gate(self) -> None:
        """Give every rank component a trainable factor, float32 (float64 for float64 factors), at 1."""
        wide = torch.promote_types(self.lora_B.dtype, torch.float32)
        self.gate = nn.Parameter(torch.ones(self.rank, dtype=wide, device=self.lora_B.device))

    def gated_B(self) -> Tensor:
        """B diag(gate), (out, rank), differentiable: what B is to everything outside this layer's training."""
        return self.lora_B if self.gate is None else fold_gate(self.lora_B, self.gate)

    def stored_B(self) -> Tensor:
        """The same as a file holds it: detached, in B's dtype, which loses nothing of it."""
        return self.gated_B().detach().to(self.lora_B.dtype)

    @torch.no_grad()
    def keep_components_(self, keep: Tensor) -> None:
        """Remove rank components from A, B and gate, in the same parameter objects; the scaling stays as it is.

        The layer computes the same, to rounding, where the removed ones have a gate of 0. For use between steps: torch
        raises an error in a later backward pass if the graph of an earlier forward pass is still alive.

        Args:
            keep: (rank,) bool, True for those that stay, at least one.
        """
        assert keep.shape == (self.rank,), "one answer for each component"
        assert bool(keep.any()), "a layer keeps one component or more"
        keep = keep.to(self.lora_A.device)
        share = int(keep.sum()) / self.rank
        self.rank = int(keep.sum())
        self.alpha *= math.sqrt(share) if self.rank_stabilized else share
        self.lora_A.data = self.lora_A.data[keep]
        self.lora_B.data = self.lora_B.data[:, keep].contiguous()
        if self.gate is not None:
            self.gate.data = self.gate.data[keep]
        self.parameters_changed()

    @property
    def _mask_bits(self) -> Tensor | None:
        return self.base.keep_bits if self.masked else None

    def gain(self, dtype: torch.dtype) -> Gain | None:
        """g = m / ||W + s B A||_row with W A^T computed in `dtype`, detached; None for LoRA.

        Computed once for each state of the parameters (nn/gain_cache.py).
        """
        if self.magnitude is None:
            return None
        settings = NormSettings(dtype, self.scaling)
        return self._gain_cache.get(
            self._factors(), self.magnitude, settings, lambda: self._row_norm_of_products(dtype)
        )

    def _factors(self) -> tuple[Tensor, ...]:
        """The parameters that the row norm depends on."""
        return (self.lora_A, self.lora_B) if self.gate is None else (self.lora_A, self.lora_B, self.gate)

    def _row_norm_of_products(self, dtype: torch.dtype) -> Tensor:
        """The row norm of the numbers that the products take."""
        factors = self._factors_of_products(dtype)
        bits = self._mask_bits
        if bits is not None:
            return masked_row_norm(self.base.stored_weight, bits, *factors, dtype=dtype)
        return row_norm(self.base.stored_weight, *factors, base_squared=self.base_squared, dtype=dtype)

    def _factors_of_products(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        return rounded(self.lora_A.detach(), dtype), rounded(self.gated_B().detach(), dtype), self.scaling

    def row_norm(self) -> Tensor:
        """||W + s B A|| of each row, B A masked where it is, (out,) float32 (float64 for a float64 base)."""
        bits, wide = self._mask_bits, self.base.wide_dtype
        if bits is not None:
            weight = self.base.stored_weight
            return masked_row_norm(weight, bits, self.lora_A, self.gated_B(), self.scaling, dtype=wide)
        return row_norm(
            self.base.stored_weight,
            self.lora_A,
            self.gated_B(),
            self.scaling,
            base_squared=self.base_squared,
            dtype=wide,
        )

    def parameters_changed(self) -> None:
        """To be called after a write through `.data` outside an optimizer, which torch cannot see (see `GainCache`)."""
        self._gain_cache.clear()
        self._product_cache.clear()

    def train(self, mode: bool = True) -> AdaptedLinear:
        """As in `nn.Module`; also forgets the norm."""
        self.parameters_changed()
        super().train(mode)
        return self

    def merged_weight(self, dtype: torch.dtype = torch.float32, *, base: Tensor | None = None) -> Tensor:
        """The dense weight (out, in) that equals this layer: merged in float32, cast once. The bias is unchanged.

        Args:
            dtype: Of the result; float64 also merges in it.
            base: Merge on this weight, (out, in), in place of the layer's own; the norm is taken there, too.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self.base.dequantized(wide) if base is None else base.to(wide)
        keep = self.base.keep_mask() if self.masked else None
        return merged_weight(weight, self.lora_A, self.gated_B(), self.scaling, self.magnitude, keep).to(dtype)

    def merged_gain(self) -> Tensor | None:
        """The gain of `merged_weight`, (out,) float32 (float64 for a float64 base); None for LoRA."""
        if self.magnitude is None:
            return None
        weight = self.base.dequantized(self.base.wide_dtype)
        keep = self.base.keep_mask() if self.masked else None
        adapted = merged_weight(weight, self.lora_A, self.gated_B(), self.scaling, keep_mask=keep)
        return gain_of_sum(adapted, self.magnitude)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        magnitude, squared = self.magnitude, self.base_squared
        values = None if magnitude is None else magnitude.data
        gates = None if self.gate is None else self.gate.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.parameters_changed()
        # A cast of the model to 16 bits must not reach gates, m and ||W||^2 (see the class); a move of device must.
        if self.gate is not None and gates is not None and self.gate.dtype.itemsize < gates.dtype.itemsize:
            self.gate.data = gates.to(self.gate.device)
        if magnitude is not None and values is not None and self.magnitude is not None and squared is not None:
            if self.magnitude.dtype.itemsize < values.dtype.itemsize:
                self.magnitude.data = values.to(self.magnitude.device)
            if self.base_squared is not None and self.base_squared.dtype.itemsize < squared.dtype.itemsize:
                self.base_squared = squared.to(self.base_squared.device)
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        mask = (", masked" if self.masked else "") + (", gated" if self.gate is not None else "")
        return f"{self.kind}, rank={self.rank}, scaling={self.scaling:.6g}, dropout={self.dropout}{mask}"


def _base_loaded(layer: AdaptedLinear, _keys: object) -> None:
    """After `load_state_dict`, which may have brought another base: what follows from it is computed anew."""
    layer.parameters_changed()
    if layer.base_squared is not None:
        layer.base_squared = squared_row_norm(layer.base.stored_weight)


def prepare_decoding(layers: Iterable[AdaptedLinear]) -> bool:
    """Let the layers keep what every token would decode anew (`AdaptedLinear.keep_scales`), where there is room for it.

    Returns:
        Whether they do: not where it would take more than half of what a GPU has free.
    """
    layers = list(layers)
    blocks = [
        layer.in_features * layer.out_features // layer.base.block_size
        for layer in layers
        if layer.base.block_size and not layer.base.away
    ]
    free = _free_bytes(layers[0].lora_A.device) if layers else None
    keep = free is None or 4 * sum(blocks) <= free // 2
    for layer in layers:
        layer.keep_scales(keep)
    return keep


def _free_bytes(device: torch.device) -> int | None:
    """Of a GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def prepare_gains(layers: Iterable[AdaptedLinear]) -> int:
    """Compute the gains that the coming forward pass will ask for: a GPU's host then waits once, not once a layer.

    Whether a row's factored norm has cancelled decides what runs next, and asking a GPU costs its queue of work. Here
    one question serves all layers. Layers that have not run yet, whose parameters have not changed, that are LoRA or
    masked are left alone; what is not prepared is computed in the forward pass.

    Returns:
        How many norms were computed.
    """
    found: list[tuple[AdaptedLinear, Tensor, torch.dtype, FactoredNorm]] = []
    for layer in layers:
        dtype = layer._gain_cache.wanted(layer._factors(), layer.scaling)
        # A masked layer's norm asks nothing, so it is computed where it is needed.
        if layer.magnitude is not None and dtype is not None and not layer.masked:
            with torch.inference_mode(False), torch.autocast(layer.lora_A.device.type, enabled=False):
                factors = layer._factors_of_products(dtype)
                norm = factored_norm(layer.base.stored_weight, *factors, base_squared=layer.base_squared, dtype=dtype)
            found.append((layer, layer.magnitude, dtype, norm))
    if not found:
        return 0
    device = found[0][3].cancelled.device
    flags = [False] * len(found)
    if not is_planning():
        flags = torch.stack([norm.cancelled.any().to(device) for *_, norm in found]).tolist()
    for (layer, magnitude, dtype, norm), has_cancelled in zip(found, flags, strict=True):
        if has_cancelled:
            measure_cancelled_(norm, layer.base.stored_weight, *layer._factors_of_products(dtype), dtype=dtype)
        settings = NormSettings(dtype, layer.scaling)
        layer._gain_cache.get(layer._factors(), magnitude, settings, functools.partial(_given, norm.norm))
    return len(found)


def _given(norm: Tensor) -> Tensor:
    return norm
