"""The layers of a stack of experts: dense, frozen, and adapted by LoRA or DoRA.

A stack is one projection of all experts of a block. Each layer takes (tokens, in), sorted by expert, and how the tokens
divide (`ExpertTokens`), and gives (tokens, out) (`model.experts` sorts the tokens and puts the outputs together).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.adapter.dora import Gain, gain, gain_of_sum
from qdora.adapter.expert_product import (
    adapted_stack,
    add_expert_bias,
    dense_rows,
    frozen_stack,
    merged_rows,
    stack_norm,
    wants_padding,
)
from qdora.adapter.expert_tokens import ExpertTokens
from qdora.adapter.frozen_linear import FrozenLinear
from qdora.adapter.frozen_product import product_dtype
from qdora.quant.tiles import Weight

Share = Literal["none", "A", "B"]
"""Which factor all experts of a stack share."""


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

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts, {self.in_features}, {self.expert_features}, bias={self.bias is not None}"


class FrozenExperts(FrozenLinear):
    """y = x W_e^T + bias_e with W, (experts * out, in), packed or dense, and bias, (experts, out), frozen.

    To everything that reads weights it is a frozen layer of experts * out rows.
    """

    def __init__(
        self, weight: Weight, num_experts: int, bias: Tensor | None = None, keep_bits: Tensor | None = None
    ) -> None:
        super().__init__(weight, bias, keep_bits)
        self.num_experts, self.expert_features = num_experts, self.out_features // num_experts

    def dequantized_rows(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows of the dense weight; only their experts are dequantised."""
        return dense_rows(self.stored_weight, self.num_experts, rows, dtype)

    def forward(self, x: Tensor, tokens: ExpertTokens | None = None) -> Tensor:
        """(tokens, in), sorted by expert -> (tokens, out)."""
        assert tokens is not None, "a stack of experts needs to know whose tokens these are"
        return frozen_stack(x, self.stored_weight, tokens, self.bias)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts, {super().extra_repr()}"


BareExperts = ExpertLinear | FrozenExperts
"""A stack of experts without an adapter."""


class AdaptedExperts(AdaptedLinear):
    """`AdaptedLinear` for each expert of a stack: y = g_e * (x W_e^T + s (drop(x) A_e^T) B_e^T) + bias_e.

    lora_A is (experts, rank, in), lora_B (experts, out, rank), magnitude (experts, out). With `share` "A" or "B" that
    factor is (1, ...) and serves all experts. A gate belongs to one rank component of all experts.

    The row norms of an expert are computed when tokens reach it, once for each state of the parameters.
    """

    base: FrozenExperts

    def __init__(self, base: FrozenExperts, *, share: Share = "none", **options: Any) -> None:
        self.share = share  # before the constructor, which asks for the shapes
        super().__init__(base, **options)

    @property
    def num_experts(self) -> int:
        """Experts of the stack."""
        return self.base.num_experts

    @property
    def expert_features(self) -> int:
        """Output features of one expert."""
        return self.base.expert_features

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        of_a, of_b = (1 if self.share == factor else self.num_experts for factor in ("A", "B"))
        rows = self.expert_features
        return (of_a, self.rank, self.in_features), (of_b, rows, self.rank), (self.num_experts, rows)

    def approximated_parts(self, matrix: Tensor) -> list[Tensor]:
        """As in `AdaptedLinear`, of (experts * out, in): each expert's matrix, or where the experts share a factor, one
        of all: (experts * out, in) for A, (out, experts * in) for B."""
        stacked = matrix.view(self.num_experts, self.expert_features, self.in_features)
        if self.share == "A":
            return [matrix]
        return [stacked.transpose(0, 1).flatten(1)] if self.share == "B" else list(stacked)

    def factor_pairs(self, lora_B: Tensor, lora_A: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As in `AdaptedLinear`."""
        if self.share == "A":
            return [(lora_B.flatten(0, 1), lora_A[0])]
        if self.share == "B":
            return [(lora_B[0], lora_A.transpose(0, 1).flatten(1))]
        return list(zip(lora_B, lora_A, strict=True))

    @torch.no_grad()
    def set_factors_(self, factors: list[tuple[Tensor, Tensor]]) -> None:
        """As in `AdaptedLinear`."""
        lora_B, lora_A = (torch.stack([pair[index] for pair in factors]) for index in (0, 1))
        if self.share == "B":
            lora_A = lora_A.view(self.rank, self.num_experts, self.in_features).transpose(0, 1)
        self.lora_B.copy_(lora_B.view(self.lora_B.shape))
        self.lora_A.copy_(lora_A)

    def forward(self, x: Tensor, tokens: ExpertTokens | None = None) -> Tensor:
        """(tokens, in), sorted by expert -> (tokens, out)."""
        assert tokens is not None, "a stack of experts needs to know whose tokens these are"
        return adapted_stack(
            x,
            self.base.stored_weight,
            tokens,
            self.lora_A,
            self.gated_B(),
            scaling=self.scaling,
            bias=self.base.bias,
            magnitude=self.magnitude,
            gain=self._gain_of(tokens, product_dtype(x)),
            dropout=self.present_dropout,
            keep_bits=self._mask_bits,
            keeps_copy=self.keeps_copy,
        )

    def gain(self, dtype: torch.dtype) -> Gain | None:
        """The gain of all experts, (experts, out); see `AdaptedLinear.gain`."""
        return self._gain_of(self._all, dtype)

    def operands(self, dtype: torch.dtype) -> None:
        """None: those of each run of experts are made for it."""

    @property
    def _all(self) -> ExpertTokens:
        return ExpertTokens.one_for_each(range(self.num_experts), self.num_experts)

    def _gain_of(self, tokens: ExpertTokens, dtype: torch.dtype) -> Gain | None:
        """The gain, right for the experts that have tokens: of the others no norm is computed."""
        magnitude = self.magnitude
        if magnitude is None:
            return None
        settings = (dtype, self.scaling)
        known = self._cache.get("row_norm", self._factors(), settings, lambda: _KnownNorms(torch.ones_like(magnitude)))
        missing = [expert for expert in tokens.experts if expert not in known.experts]
        if missing:
            if len(missing) < len(tokens.experts):  # else their numbers are on the device already
                tokens = ExpertTokens.one_for_each(set(missing), self.num_experts)
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(magnitude.device.type, enabled=False):
                known.add(tokens, self._norm_of(tokens, self.lora_A, self.gated_B(), dtype))
        count = len(known.experts)
        return self._cache.get(
            "gain", (*self._factors(), magnitude), (*settings, count), lambda: gain(magnitude, known.norm)
        )

    def _norm_of(self, tokens: ExpertTokens, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.base_squared is not None, "a norm belongs to a DoRA layer"
        return stack_norm(
            self.base.stored_weight,
            tokens,
            lora_A.detach(),
            lora_B.detach(),
            self.scaling,
            base_squared=self.base_squared,
            dtype=dtype,
            keep_bits=self._mask_bits,
        )

    def _norm(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> Tensor:
        return self._norm_of(self._all, lora_A, lora_B, dtype)

    def merged_weight(self, dtype: torch.dtype = torch.float32, *, base: Tensor | None = None) -> Tensor:
        """The dense stack (experts * out, in) that equals this layer; see `AdaptedLinear.merged_weight`."""
        return self.merged_rows(slice(0, self.out_features), dtype, base=base)

    def merged_rows(self, rows: slice, dtype: torch.dtype = torch.float32, *, base: Tensor | None = None) -> Tensor:
        """Some rows of `merged_weight`; only their experts are dequantised."""
        wide = torch.promote_types(dtype, torch.float32)
        weight = self.base.dequantized_rows(rows, wide) if base is None else base[rows].to(wide)
        keep = self.base.keep_mask(rows) if self.masked else None
        factors = (self.lora_A, self.gated_B(), self.scaling, self.magnitude)
        return merged_rows(weight, rows.start, *factors, keep_mask=keep).to(dtype)

    def merged_gain(self) -> Tensor | None:
        """The gain of `merged_weight`, (experts, out); None for LoRA."""
        magnitude = self.magnitude
        if magnitude is None:
            return None
        found = []
        for expert in range(self.num_experts):
            rows = slice(expert * self.expert_features, (expert + 1) * self.expert_features)
            weight = self.base.dequantized_rows(rows, self.base.wide_dtype)
            keep = self.base.keep_mask(rows) if self.masked else None
            adapted = merged_rows(weight, rows.start, self.lora_A, self.gated_B(), self.scaling, keep_mask=keep)
            found.append(gain_of_sum(adapted, magnitude[expert]))
        return torch.stack(found)


Stack = BareExperts | AdaptedExperts


def is_one_by_one(stack: Stack) -> bool:
    """Whether each expert of a stack has launches of its own on every device: a trainable or a masked one."""
    return isinstance(stack, ExpertLinear) or (isinstance(stack, AdaptedExperts) and stack.masked)


def needs_padding(stack: Stack, x: Tensor) -> bool:
    """Whether fewer launches compute a stack if experts have equally many tokens; its products are those of `x`."""
    base = stack.base if isinstance(stack, AdaptedExperts) else stack
    if not isinstance(base, FrozenExperts) or is_one_by_one(stack):
        return False
    return wants_padding(x.new_empty(0, dtype=product_dtype(x)), base.stored_weight, base.num_experts)


class _KnownNorms:
    """The row norms of the experts that tokens have reached in one state of the parameters."""

    def __init__(self, norm: Tensor) -> None:
        self.norm = norm  # (experts, out); 1 where it is not known
        self.experts: set[int] = set()

    def add(self, tokens: ExpertTokens, norm: Tensor) -> None:
        self.norm.index_copy_(0, tokens.on(self.norm.device).experts, norm.to(self.norm.dtype))
        self.experts.update(tokens.experts)
