"""How many kernels the experts of a mixture launch, counted on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qdora.nn.expert_linear import Stack, is_one_by_one, needs_padding
from qdora.ops.expert_product import experts_together
from qdora.ops.expert_tokens import ExpertTokens, padded_tokens
from qdora.ops.planned_device import planned_counts


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts operations that write values: no views and no allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        made = func(*args, **(kwargs or {}))
        allocates = func._schema.name.startswith(("aten::empty", "aten::new_empty"))
        self.count += isinstance(made, Tensor) and not is_view and not allocates
        return made


def launches_of(
    stacks: Sequence[Stack], num_tokens: int, top_k: int, dtype: torch.dtype, *, checkpointing: bool
) -> int:
    """Launches of the products of stacks of fake tensors in a later micro-batch of a step, forward and backward.

    Call it within a FakeTensorMode and `planned_on` with even routing. Runs of experts are alike: two are counted.
    """
    total = 0
    for stack in stacks:
        counts = planned_counts(num_tokens, top_k, stack.num_experts)
        together = experts_together(stack.expert_features, stack.in_features, dtype.itemsize, torch.device("cpu"))
        together = 1 if is_one_by_one(stack) else together
        one, two = (
            _launches(stack, counts[: number * together], dtype, checkpointing=checkpointing) for number in (1, 2)
        )
        num_runs = -(-sum(count > 0 for count in counts) // together)
        total += one + (num_runs - 1) * (two - one)
    return total


def _launches(stack: Stack, counts: list[int], dtype: torch.dtype, *, checkpointing: bool) -> int:
    """Those of the first experts."""
    counts = counts + [0] * (stack.num_experts - len(counts))
    tokens = padded_tokens(counts) if needs_padding(stack, torch.empty(0, dtype=dtype)) else ExpertTokens(counts)
    x = torch.empty(sum(tokens.counts), stack.in_features, dtype=dtype, requires_grad=True)
    tokens.on(x.device)
    stack.zero_grad()
    stack(x, tokens)  # computes the norms, which the micro-batches of a step share
    with Launches() as forward:
        out = stack(x, tokens)
    with Launches() as backward:
        out.backward(torch.empty_like(out))
    return int((1 + checkpointing) * forward.count + backward.count)
