"""The layers of a stack of experts: dense, frozen, and adapted by LoRA or DoRA.

A stack is one projection of all experts of a block. Each layer takes (tokens, in), sorted by expert, and how the tokens
divide (`ExpertTokens`), and gives (tokens, out) (`model.experts` sorts the tokens and puts the outputs together).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qdora.adapter.algebra import (
    Gain,
    factored_norms,
    gain,
    gain_of_sum,
    measure_cancelled_,
    merged_weight,
    rounded,
    row_norm,
)
from qdora.adapter.dropout import draw_seed
from qdora.adapter.expert_product import (
    AdaptedStack,
    ExpertTokens,
    StackCall,
    add_expert_bias,
    expert_bits,
    expert_rows,
    experts_together,
    frozen_stack,
    has_kernel,
)
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.adapter.product import product_dtype
from qdora.errors import UserError
from qdora.quant.kernels import is_planning
from qdora.quant.packed import PackedWeight, dequantize, packed_rows
from qdora.quant.tiles import Weight


class ExpertLinear(nn.Module):
    """y = x W_e^T + bias_e with a dense, trainable W, (experts * out, in), and bias, (experts, out) or None."""

    def __init__(self, weight: nn.Parameter, num_experts: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.out_features, self.in_features = weight.shape
        self.expert_features = self.out_features // num_experts
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor, tokens: ExpertTokens) -> Tensor:
        """(tokens, in), sorted by expert -> (tokens, out)."""
        weights = self.weight.view(self.num_experts, self.expert_features, self.in_features).unbind(0)
        parts = torch.split(x, [tokens.counts[expert] for expert in tokens.experts])
        pairs = zip(parts, tokens.experts, strict=True)
        out = torch.cat([nn.functional.linear(part, weights[expert]) for part, expert in pairs])
        return out if self.bias is None else add_expert_bias(out, self.bias, tokens)


class FrozenExperts(FrozenLinear):
    """y = x W_e^T + bias_e, W packed or dense, and bias, (experts, out), frozen: a layer of experts * out rows."""

    def __init__(
        self, weight: Weight, num_experts: int, bias: Tensor | None = None, keep_bits: Tensor | None = None
    ) -> None:
        super().__init__(weight, bias, keep_bits)
        self.lead = (num_experts,)
        self.num_experts, self.expert_features = num_experts, self.out_features // num_experts
        if isinstance(weight, PackedWeight) and self.expert_features * self.in_features % weight.block_size:
            shape = self.expert_features, self.in_features
            raise UserError(
                f"base.block_size: {weight.block_size} does not divide the weights of an expert, {shape}."
            )

    def dequantized_rows(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows of the dense weight; only their experts are dequantised."""
        weight, size = self.stored_weight, self.expert_features
        if isinstance(weight, Tensor):
            return weight[rows].to(dtype)
        first, last = rows.start // size * size, -(-rows.stop // size) * size
        dense = dequantize(packed_rows(weight, slice(first, last)), dtype)
        return dense[rows.start - first : rows.stop - first]

    def forward(self, x: Tensor, tokens: ExpertTokens) -> Tensor:  # type: ignore[override]
        """(tokens, in), sorted by expert -> (tokens, out)."""
        return frozen_stack(x, self.stored_weight, tokens, self.bias)


BareExperts = ExpertLinear | FrozenExperts
"""A stack of experts without an adapter."""


class AdaptedExperts(AdaptedLinear):
    """`AdaptedLinear` for each expert of a stack: y = g_e * (x W_e^T + s (drop(x) A_e^T) B_e^T) + bias_e.

    lora_A is (experts, rank, in), lora_B (experts, out, rank), magnitude (experts, out). A gate belongs to one rank
    component of all experts. The row norms of an expert are computed when tokens reach it.
    """

    base: FrozenExperts

    @property
    def num_experts(self) -> int:
        """Experts of the stack."""
        return self.base.num_experts

    @property
    def expert_features(self) -> int:
        """Output features of one expert."""
        return self.base.expert_features

    def forward(self, x: Tensor, tokens: ExpertTokens) -> Tensor:  # type: ignore[override]
        """(tokens, in), sorted by expert -> (tokens, out)."""
        bias, dropout, x = self.base.bias, self.present_dropout, x.to(product_dtype(x)).contiguous()
        call = StackCall(
            self.base.stored_weight,
            tokens,
            self._mask_bits,
            gain=self.gain(x.dtype, tokens),
            scaling=self.scaling / (1.0 - dropout),
            dropout=dropout,
            seed=draw_seed() if dropout > 0.0 else 0,
        )
        out: Tensor = AdaptedStack.apply(x, self.lora_A, self.gated_B(), self.magnitude, call)  # type: ignore[no-untyped-call, unused-ignore]
        return out if bias is None else add_expert_bias(out, bias, tokens)

    def gain(self, dtype: torch.dtype, tokens: ExpertTokens | None = None) -> Gain | None:
        """The gain, (experts, out), right for the experts that have tokens; default: all."""
        magnitude, tokens = self.magnitude, tokens or ExpertTokens([1] * self.num_experts)
        if magnitude is None:
            return None
        factors, settings = self.norm_state(dtype)
        norm, known = self.kept_norm.get(factors, settings, lambda: (torch.ones_like(magnitude), set()))
        missing = set(tokens.experts) - known
        if missing:
            if len(missing) < len(tokens.experts):  # else their numbers are on the device already
                tokens = ExpertTokens([int(expert in missing) for expert in range(self.num_experts)])
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(magnitude.device.type, enabled=False),
            ):
                found = self.row_norm(dtype, tokens)
                norm.index_copy_(0, tokens.on(norm.device).experts, found.to(norm.dtype))
                known.update(tokens.experts)
        parameters, settings = (*factors, magnitude), (*settings, len(known))
        result: Gain = self.kept_operands.get(parameters, settings, lambda: gain(magnitude, norm))
        return result

    @torch.no_grad()
    def row_norm(self, dtype: torch.dtype | None = None, tokens: ExpertTokens | None = None) -> Tensor:
        """As in `AdaptedLinear`, (experts with tokens, out); default: of all."""
        dtype, tokens = dtype or self.base.wide_dtype, tokens or ExpertTokens([1] * self.num_experts)
        lora_A, lora_B = self.lora_A.detach(), self.gated_B().detach()
        weight, bits, scaling, every = self.base.stored_weight, self._mask_bits, self.scaling, self.num_experts
        shape = self.expert_features, self.in_features
        together = 1 if bits is not None else experts_together(*shape, dtype.itemsize, lora_A.device)
        norms: list[Tensor] = []
        cancelled: list[Tensor] = []
        for run in tokens.all_runs(together):
            squared = run.pick(self.base_squared)  # type: ignore[arg-type]
            if is_planning() and len(norms) > 1 and run.first + 2 * together < len(tokens.experts):
                # Like the run before it. The last ones are run, when the norms of the others are there.
                norms.append(squared.new_empty(squared.shape))
                continue
            a, b = (rounded(run.pick(each), dtype) for each in (lora_A, lora_B))
            part = expert_rows(weight, every, run)
            if bits is not None:
                own = expert_bits(bits, run)
                norm = row_norm(part, a[0], b[0], scaling, base_squared=squared[0], dtype=dtype, keep_bits=own)
                norms.append(norm.unsqueeze(0))
                continue
            norm, lost = factored_norms([part], a, b, scaling, base_squared=squared, dtype=dtype)
            norms.append(norm)
            cancelled.append(lost)
        whole = torch.cat(norms)
        if bits is not None or isinstance(whole, FakeTensor):
            return whole
        lost = torch.cat(cancelled)
        for run, norm, rows, has_some in zip(
            tokens.reached, whole, lost, lost.any(dim=1).tolist(), strict=True
        ):
            if has_some:
                a, b = (rounded(run.pick(each)[0], dtype) for each in (lora_A, lora_B))
                measure_cancelled_(norm, rows, expert_rows(weight, every, run), a, b, scaling, dtype=dtype)
        return whole

    def merged_rows(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows of `merged_weight`; only their experts are dequantised."""
        size, wide = self.expert_features, torch.promote_types(dtype, torch.float32)
        first, last = rows.start // size, -(-rows.stop // size)
        merged = self._merged_experts(slice(first, last), wide, self.magnitude).to(dtype)
        return merged[rows.start - first * size : rows.stop - first * size]

    def _merged_experts(self, some: slice, dtype: torch.dtype, magnitude: Tensor | None) -> Tensor:
        rows = slice(some.start * self.expert_features, some.stop * self.expert_features)
        keep = self.base.keep_mask(rows) if self.masked else None
        factors = (
            self.lora_A[some],
            self.gated_B()[some],
            self.scaling,
            None if magnitude is None else magnitude[some],
        )
        return merged_weight(self.base.dequantized_rows(rows, dtype), *factors, keep_mask=keep)

    def merged_gain(self) -> Tensor | None:
        """The gain of `merged_weight`, (experts, out); None for LoRA."""
        if self.magnitude is None:
            return None
        experts = (slice(expert, expert + 1) for expert in range(self.num_experts))
        adapted = (self._merged_experts(one, self.base.wide_dtype, None) for one in experts)
        return torch.stack([gain_of_sum(each, own) for each, own in zip(adapted, self.magnitude, strict=True)])


Stack = BareExperts | AdaptedExperts


def needs_padding(stack: Stack, x: Tensor) -> bool:
    """Whether fewer launches compute a stack of `x` if experts have equally many tokens."""
    base = stack.base if isinstance(stack, AdaptedExperts) else stack
    if not isinstance(base, FrozenExperts) or (isinstance(stack, AdaptedExperts) and stack.masked):
        return False  # each expert has launches of its own on every device
    shape, x = (base.expert_features, base.in_features), x.new_empty(0, dtype=product_dtype(x))
    return experts_together(*shape, x.itemsize, x.device) > 1 and not has_kernel(x, *shape)
