"""The layers: a frozen linear map, packed or dense, and LoRA or DoRA on it by one formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qdora.adapter.algebra import Gain, gain, gain_of_sum, merged_weight, rounded, row_norm, squared_row_norm
from qdora.adapter.gates import fold_gate
from qdora.adapter.product import Kept, Operands, adapted_linear, frozen_linear, operands_of, product_dtype
from qdora.adapter.rows import RowShare, never_narrowed
from qdora.quant.packed import TENSOR_NAMES, PackedWeight, mask_from_bits
from qdora.quant.tiles import Weight, dense_weight, wide_dtype

Kind = Literal["lora", "dora"]
Init = Literal["kaiming", "gaussian"]


class FrozenLinear(nn.Module):
    """y = x W^T + bias, W (out, in), packed or dense, and bias (out,) frozen, held in buffers.

    `keep_bits` are `quant.packed.mask_bits` of the mask of a pruned weight. `residency.use(layer)` brings the weight
    before it is read. `share` is what this process holds of a divided weight. `replaces` names the class of the model's
    own layer.
    """

    keep_bits: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Weight, bias: Tensor | None = None, keep_bits: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.residency: Any = None
        self.share: RowShare | None = None
        self.replaces = "Linear"
        self.lead: tuple[
            int, ...
        ] = ()  # of a stack the number of its experts, first dimension of an adapter's tensors
        self.kind: str = weight.kind if isinstance(weight, PackedWeight) else "dense"
        self.block_size = weight.block_size if isinstance(weight, PackedWeight) else 0
        tensors = weight.tensors() if isinstance(weight, PackedWeight) else {"weight": weight.detach()}
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("keep_bits", keep_bits)

    def keep_mask(self, rows: slice | None = None) -> Tensor | None:
        """The mask of a pruned weight, or some of its rows, (rows, in) bool; None without one."""
        shape = (self.out_features, self.in_features)
        return None if self.keep_bits is None else mask_from_bits(self.keep_bits, shape, rows)

    @property
    def packed_form(self) -> PackedWeight | None:
        """The packed form of `stored_weight`, sharing memory, without bringing it: its tensors may have no values. None
        for a dense base."""
        if self.kind == "dense":
            return None
        tensors: dict[str, Any] = {name: self._buffers[name] for name in self._names}
        return PackedWeight(self.kind, (self.out_features, self.in_features), self.block_size, **tensors)

    @property
    def away(self) -> tuple[str, ...]:
        """Names of the buffers that only `residency` moves."""
        return () if self.residency is None else self._names

    @property
    def stored_weight(self) -> Weight:
        """The weight as stored, packed or dense, sharing memory with this layer."""
        if self.residency is not None:
            self.residency.use(self)
        packed = self.packed_form
        return self.get_buffer("weight") if packed is None else packed

    @property
    def device(self) -> torch.device:
        """Where the weight is when it is read."""
        if self.share is None:
            return self.stored_weight.device
        return self.get_buffer(self._names[0]).device

    def squared_row_norm(self) -> Tensor:
        """||w||^2 of each row, (out,). All processes that divide the weight call this together."""
        return squared_row_norm(self.stored_weight) if self.share is None else self.share.squared_row_norm()

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype of norms and merges: float32, or float64 for a float64 base."""
        weight = self._buffers.get("weight")
        return torch.float32 if weight is None else wide_dtype(weight)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (out, in) in `dtype`."""
        return dense_weight(self.stored_weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        return frozen_linear(x, self.stored_weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        away = {name: self._buffers.pop(name) for name in self.away}
        # A cast to bf16 would round every block scale.
        scales = [self._buffers.get(name) for name in TENSOR_NAMES[1:]]
        super()._apply(never_narrowed(fn, scales, may_widen=False), recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(away)
        return self


class AdaptedLinear(nn.Module):
    """y = g * (x W^T + s (drop(x) A^T) B^T) + bias, with g = m / ||W + s B A||_row for DoRA and g = 1 for LoRA.

    B starts at zero and m at ||W||_row of the dequantised base, so the fresh layer is exactly the base. With `masked`
    the base's keep mask applies to B A in forward, norm and merge. With a `gate` (`add_gate`) B diag(gate) replaces B.
    Source: DoRA, arXiv 2402.09353, eq. 5; LoRA, arXiv 2106.09685, sec. 4.1.

    `magnitude` is float32 whatever the adapter's storage: near 1 bf16 has a spacing of 2^-8, so Adam steps of 1e-4
    would be rounded away and the layer would silently train as LoRA.

    Args:
        alpha: s = alpha / rank, or alpha / sqrt(rank) with `rank_stabilized` (arXiv 2312.03732).
        init: lora_A from U(-1/sqrt(in), 1/sqrt(in)) (Kaiming with a = sqrt 5) or N(0, 0.01^2).
        dtype: Storage of lora_A and lora_B; bfloat16 only for `AdapterOptimizer`, which keeps the bits that it drops.
        generator: Of the CPU.
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
        self.base = base
        self.out_features, self.in_features = base.out_features, base.in_features
        self.rank = rank
        lead, rows = base.lead, base.out_features // math.prod(base.lead)
        self.kind: Kind = kind
        self.alpha, self.rank_stabilized = float(alpha), rank_stabilized
        self.dropout = dropout
        self.masked = masked
        # Block scales times g are decoded once for each state of the parameters: half a bit a weight at blocks of 64.
        # It saves a GPU three launches a product, and a CPU 1 to 5 % of a layer's time.
        self.keeps_scales = True
        self.dtype: torch.dtype | None = None  # of the latest products, for which `norms.refresh` computes
        # On the device, not read yet: a factored norm has cancelled. None once checked.
        self.has_cancelled: Tensor | None = None
        self.asks_at_once = False  # `norms.refresh` reads that flag at once: a norm was wrong before
        device = base.device
        first = torch.empty(*lead, rank, base.in_features, dtype=torch.float32)
        if init == "gaussian":
            first.normal_(0.0, 0.01, generator=generator)
        else:
            bound = 1.0 / math.sqrt(base.in_features)
            first.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(first.to(device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(*lead, rows, rank, dtype=dtype, device=device))
        self.magnitude: nn.Parameter | None = None
        self.gate: nn.Parameter | None = None
        squared = None
        if kind == "dora":
            squared = base.squared_row_norm().view(*lead, rows)
            self.magnitude = nn.Parameter(squared.sqrt())
        # Not persistent: it follows from the base.
        self.register_buffer("base_squared", squared, persistent=False)
        self.kept_norm: Kept[Any] = Kept()  # apart, since the norm is the same while the magnitude alone trains
        self.kept_operands: Kept[Any] = Kept()  # the operands, with the gain
        self.register_load_state_dict_post_hook(_base_loaded)  # type: ignore[no-untyped-call]

    @property
    def scaling(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) if rank-stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def parameters_per_rank(self) -> int:
        """Parameters of one rank component of lora_A and lora_B."""
        return (self.lora_A.numel() + self.lora_B.numel()) // self.rank

    @property
    def present_dropout(self) -> float:
        """The probability in the present mode: 0 in evaluation."""
        return self.dropout if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        return adapted_linear(
            x,
            self.base.stored_weight,
            self.lora_A,
            self.gated_B()
            if torch.is_grad_enabled()
            else self.lora_B,  # without a graph only the operands are read
            self.operands(product_dtype(x)),
            bias=self.base.bias,
            magnitude=self.magnitude,
            dropout=self.present_dropout,
            keep_bits=self._mask_bits,
        )

    def operands(self, dtype: torch.dtype) -> Operands:
        """What the products in `dtype` read, made once for each state of the parameters."""

        def made() -> Operands:
            self.dtype = dtype
            own = None
            if self.magnitude is not None:
                own = gain(
                    self.magnitude, self.kept_norm.get(*self.norm_state(dtype), lambda: self.row_norm(dtype))
                )
            base = self.base.stored_weight if self.may_keep_scales else None
            scaling = self.scaling / (1.0 - self.present_dropout)
            return operands_of(self.lora_A, self.gated_B(), own, scaling, dtype, kept_of=base)

        return self.kept_operands.get(*self.state(dtype), made)  # type: ignore[no-any-return]

    def gain(self, dtype: torch.dtype) -> Gain | None:
        """g = m / ||W + s B A||_row with W A^T computed in `dtype`, detached; None for LoRA."""
        return self.operands(dtype).gain

    def norm_state(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """The parameters, and all else, that the row norm depends on."""
        factors = (self.lora_A, self.lora_B) if self.gate is None else (self.lora_A, self.lora_B, self.gate)
        return factors, (dtype, self.scaling)

    def state(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """The parameters, and all else, that the operands depend on."""
        factors, settings = self.norm_state(dtype)
        parameters = factors if self.magnitude is None else (*factors, self.magnitude)
        return parameters, (*settings, self.present_dropout, self.may_keep_scales)

    @property
    def may_keep_scales(self) -> bool:
        """Whether `keeps_scales` holds, the base is here, whole, and the adapter is not masked."""
        return self.keeps_scales and not self.masked and not self.base.away and self.base.share is None

    def row_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """||W + s B A|| of each row, with the mask on B A, (out,) float32 (float64 for a float64 base), with the
        factors and W A^T in `dtype`."""
        dtype, weight = dtype or self.base.wide_dtype, self.base.stored_weight
        lora_A, lora_B = (rounded(factor.detach(), dtype) for factor in (self.lora_A, self.gated_B()))
        squared = squared_row_norm(weight) if self.base_squared is None else self.base_squared
        bits, s = self._mask_bits, self.scaling
        return row_norm(weight, lora_A, lora_B, s, base_squared=squared, dtype=dtype, keep_bits=bits)

    @property
    def _mask_bits(self) -> Tensor | None:
        return self.base.keep_bits if self.masked else None

    def parameters_changed(self) -> None:
        """Call this after a write through `.data` outside an optimizer."""
        self.kept_norm.clear()
        self.kept_operands.clear()

    def train(self, mode: bool = True) -> AdaptedLinear:
        """As in `nn.Module`; a change of the mode also forgets norm and operands."""
        if mode != self.training:  # transformers' Trainer calls model.train() for every micro-batch
            self.parameters_changed()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        wide = self.magnitude, self.gate, self.base_squared  # see the class
        super()._apply(never_narrowed(fn, wide), recurse)  # type: ignore[no-untyped-call]
        self.parameters_changed()
        return self

    def add_gate(self) -> None:
        """Give every rank component a trainable factor, float32 or wider, at 1."""
        wide = torch.promote_types(self.lora_B.dtype, torch.float32)
        self.gate = nn.Parameter(torch.ones(self.rank, dtype=wide, device=self.lora_B.device))

    def gated_B(self) -> Tensor:
        """B diag(gate), (out, rank), differentiable."""
        return self.lora_B if self.gate is None else fold_gate(self.lora_B, self.gate)

    def stored_B(self) -> Tensor:
        """B diag(gate) as a file holds it: detached and in B's dtype."""
        return self.gated_B().detach().to(self.lora_B.dtype)

    @torch.no_grad()
    def keep_components_(self, kept: Tensor) -> None:
        """Keep these rank components, (n,) int64, ascending, n >= 1; parameters and scaling stay the same."""
        fraction = len(kept) / self.rank
        self.rank = len(kept)
        self.alpha *= math.sqrt(fraction) if self.rank_stabilized else fraction
        self.lora_A.data = self.lora_A.data.index_select(-2, kept)
        self.lora_B.data = self.lora_B.data.index_select(-1, kept)
        if self.gate is not None:
            self.gate.data = self.gate.data.index_select(0, kept)
        self.parameters_changed()

    def approximated_parts(self, matrix: Tensor) -> list[Tensor]:
        """The parts of `matrix` that a layer's B A approximates, each by one of `rank`: a stack has one per expert."""
        return list(matrix.view(-1, self.lora_B.shape[-2], self.in_features))

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (out, in) that equals this layer without its bias: merged in float32 (float64 for float64),
        cast once."""
        weight = self.base.dequantized(torch.promote_types(dtype, torch.float32))
        return self._merged(weight, self.magnitude).to(dtype)

    def _merged(self, weight: Tensor, magnitude: Tensor | None) -> Tensor:
        keep = self.base.keep_mask() if self.masked else None
        return merged_weight(weight, self.lora_A, self.gated_B(), self.scaling, magnitude, keep_mask=keep)

    def merged_gain(self) -> Tensor | None:
        """The gain of `merged_weight`, (out,); None for LoRA."""
        if self.magnitude is None:
            return None
        adapted = self._merged(self.base.dequantized(self.base.wide_dtype), None)
        return gain_of_sum(adapted, self.magnitude)


def _base_loaded(layer: AdaptedLinear, _keys: object) -> None:
    layer.parameters_changed()
    if layer.base_squared is not None:
        layer.base_squared = layer.base.squared_row_norm().view_as(layer.base_squared)


def drop_scales_without_room(layers: Iterable[AdaptedLinear]) -> bool:
    """Let no layer keep decoded scales if all would take more than half of a GPU's free memory; returns whether that is
    so."""
    # Stacks of experts have none
    layers = [layer for layer in layers if layer.keeps_scales and layer.lora_B.ndim == 2]
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
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode it was in."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + bias, so that a frozen layer can take its place: an nn.Linear without a forward
    of its own (only Falcon's writes out the same)."""
    kind = own_class(module)
    return isinstance(module, nn.Linear) and (
        kind.forward is nn.Linear.forward or kind.__name__ == "FalconLinear"
    )


def own_class(module: nn.Module) -> Any:
    """The class of a module, also of a sharded one."""
    return next(each for each in type(module).__mro__ if not each.__module__.startswith("torch.distributed"))
