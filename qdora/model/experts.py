"""Mixtures of experts: the stacked parameters of transformers' expert modules as layers of qdora.

transformers keeps the experts of a block as two parameters, (experts, out, in) or transposed. Each becomes a layer of
its own here, a stack, which is quantised, pruned, streamed and adapted like any linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qdora.adapter.expert_product import ExpertTokens, padded_tokens
from qdora.adapter.experts import AdaptedExperts, ExpertLinear, Stack, needs_padding
from qdora.quant.kernels import is_planning, planned_counts

IMPLEMENTATION = "qdora"
"""Name of `routed_forward` among transformers' implementations of experts."""


def use_expert_layers_(model: PreTrainedModel) -> None:
    """Replace the stacked parameters of all expert modules by `ExpertLinear`s, in place; transposed ones are turned."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_forward)
    for owner in list(model.modules()):
        if not hasattr(owner, "is_transposed") or not hasattr(owner, "_apply_gate"):
            continue
        owner.config._experts_implementation = IMPLEMENTATION
        for name in ("gate_up_proj" if owner.has_gate else "up_proj", "down_proj"):
            weight, bias = owner._parameters.pop(name), owner._parameters.pop(f"{name}_bias", None)
            turned = (weight.detach().mT if owner.is_transposed else weight.detach()).flatten(0, 1)
            stack = ExpertLinear(nn.Parameter(turned, weight.requires_grad), len(weight), bias)
            owner.register_module(name, stack.train(owner.training))


def stacks(model: nn.Module) -> dict[str, Stack]:
    """Path -> stack of experts, in model order."""
    modules = model.named_modules()
    return {
        name: module for name, module in modules if isinstance(module, Stack) and not name.endswith(".base")
    }


def is_transposed(model: nn.Module, path: str) -> bool:
    return bool(getattr(model.get_submodule(path.rpartition(".")[0]), "is_transposed", False))


def library_names(model: nn.Module) -> dict[str, str]:
    """Name of a stack's weight, (experts * out, in), or bias here -> its name in transformers' own model."""
    names = {}
    for path, stack in stacks(model).items():
        names[f"{path}.weight"] = path
        inner = stack.base if isinstance(stack, AdaptedExperts) else stack
        if inner.bias is not None:
            names[f"{path}.bias"] = f"{path}_bias"
    return names


def routers(model: nn.Module) -> set[str]:
    """Paths of the linear layers beside experts that choose among them (an output for each) or weigh a shared one."""
    found = set()
    for path, stack in stacks(model).items():
        block = path.rpartition(".")[0].rpartition(".")[0]
        for name, module in model.get_submodule(block).named_modules():
            beside = "." not in name or name.startswith("router.")
            if beside and isinstance(module, nn.Linear) and module.out_features in (1, stack.num_experts):
                found.add(f"{block}.{name}")
    return found


class _Spread(torch.autograd.Function):
    """Rows of x, (tokens, ...), by `order`, each `times` times; -1: a row of 0. `inverse` is the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.times = times
        if len(order) <= times * len(x):
            return x.index_select(0, order // times)
        rows = x.index_select(0, (order // times).clamp_(min=0))
        return rows.masked_fill_((order < 0).unsqueeze(1), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        order, inverse = ctx.saved_tensors
        back = _Spread.apply(grads[0], inverse, order, 1)  # type: ignore[no-untyped-call, unused-ignore]
        return back if ctx.times == 1 else back.view(-1, ctx.times, back.shape[1]).sum(dim=1), None, None, None


def routed_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of an expert module whose projections are stacks; see transformers' `integrations/moe.py`.

    `hidden_states` (tokens, hidden); the experts of each token and their weights (tokens, k).
    """
    num_tokens, top_k = top_k_index.shape
    owners = top_k_index.reshape(-1)
    order = torch.argsort(owners, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    up = self.gate_up_proj if self.has_gate else self.up_proj
    if is_planning():
        counts = planned_counts(num_tokens, top_k, up.num_experts)
    else:
        # A GPU's host waits once. For bincount it would wait twice.
        counts = owners.new_zeros(up.num_experts).scatter_add_(0, owners, torch.ones_like(owners)).tolist()
    tokens = ExpertTokens(counts)
    if any(needs_padding(stack, hidden_states) for stack in (up, self.down_proj)):
        tokens = padded_tokens(counts)
        inverse += tokens.on(order.device).shifts[owners]
        places = torch.arange(len(owners), device=order.device)
        order = order.new_full((sum(tokens.counts),), -1).scatter_(0, inverse, places)
    x = _Spread.apply(hidden_states, order, inverse, top_k)  # type: ignore[no-untyped-call, unused-ignore]
    out = up(x, tokens)
    out = self._apply_gate(out) if self.has_gate else self.act_fn(out)
    out = self.down_proj(out, tokens)
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    back = _Spread.apply(out, inverse, order, 1)  # type: ignore[no-untyped-call, unused-ignore]
    weighted = back * top_k_weights.reshape(-1, 1)
    total: Tensor = weighted.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)
    return total
