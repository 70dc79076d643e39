"""The forward pass of expert modules of every kind that transformers' interface knows, against float64 and loops."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from qdora.model.experts import use_expert_layers_
from qdora.model.inject import adapted_layer, replace_module
from qdora.nn.expert_linear import ExpertLinear
from tests import reference
from tests.reference import Array
from tests.test_ops_adapted_product import to_numpy

EXPERTS, HIDDEN, INNER, TOKENS, CHOICES = 4, 6, 5, 7, 2
KINDS: dict[str, dict[str, bool]] = {
    "gate": {},
    "no gate": {"has_gate": False},
    "bias": {"has_bias": True},
    "transposed": {"is_transposed": True, "has_bias": True},
    "interleaved": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
    "norm of each expert": {"has_post_expert_norm": True},
    "no gate, transposed, bias": {"has_gate": False, "is_transposed": True, "has_bias": True},
}
# Early releases of transformers do not know all of them.
_KNOWN = inspect.signature(use_experts_implementation).parameters
KINDS = {name: flags for name, flags in KINDS.items() if flags.keys() <= {*_KNOWN}}


class Halved(nn.Module):
    """A norm that is easily computed by hand: x / (1 + |x|) / 2."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs()) / 2


def interleaved_gate(_self: Any, both: Tensor) -> Tensor:
    return both[..., ::2].tanh() * both[..., 1::2]


def make(**flags: bool) -> Any:
    """A random module in float64."""
    gated, turned = flags.get("has_gate", True), flags.get("is_transposed", False)
    first = "gate_up_proj" if gated else "up_proj"

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.act_fn = nn.SiLU()
            self.post_expert_norm = Halved()
            for name, rows, columns in ((first, INNER * (1 + gated), HIDDEN), ("down_proj", HIDDEN, INNER)):
                size = (columns, rows) if turned else (rows, columns)
                weight = torch.randn(EXPERTS, *size, dtype=torch.float64) / math.sqrt(columns)
                self.register_parameter(name, nn.Parameter(weight))
                if flags.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows).double()))

        def forward(self, *_: Any) -> Tensor:
            raise NotImplementedError

    if not flags.get("is_concatenated", True):
        Experts._apply_gate = interleaved_gate  # type: ignore[attr-defined]
    torch.manual_seed(0)
    return use_experts_implementation(**flags)(Experts)(SimpleNamespace(_experts_implementation=None))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def by_loops(weights: dict[str, Array], flags: dict[str, bool], x: Array, index: Array, share: Array) -> Array:
    """Each token through each of its experts; `weights` as (experts, out, in)."""
    out = np.zeros_like(x)
    up = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
    for token in range(len(x)):
        for choice, expert in enumerate(index[token]):
            inner = weights[up][expert] @ x[token]
            if f"{up}_bias" in weights:
                inner = inner + weights[f"{up}_bias"][expert]
            if not flags.get("has_gate", True):
                inner = silu(inner)
            elif flags.get("is_concatenated", True):
                inner = silu(inner[:INNER]) * inner[INNER:]
            else:
                inner = np.tanh(inner[0::2]) * inner[1::2]
            found = weights["down_proj"][expert] @ inner
            if "down_proj_bias" in weights:
                found = found + weights["down_proj_bias"][expert]
            if flags.get("has_post_expert_norm"):
                found = found / (1 + np.abs(found)) / 2
            out[token] += share[token, choice] * found
    return out


def routing() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts (expert 1 gets none, expert 3 one) and weights."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    index = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 3], [2, 0], [0, 2]])
    return x, index, torch.rand(TOKENS, CHOICES, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("adapted", [None, "lora", "dora"])
def test_the_output_is_that_of_loops(flags: dict[str, bool], adapted: Any) -> None:
    module = make(**flags)
    weights = {name: to_numpy(each) for name, each in module.named_parameters()}
    if flags.get("is_transposed"):
        weights |= {name: each.transpose(0, 2, 1) for name, each in weights.items() if each.ndim == 3}
    holder = nn.ModuleList([module])
    use_expert_layers_(holder)  # type: ignore[arg-type]
    x, index, share = routing()
    if adapted is not None:
        for path in [name for name, each in holder.named_modules() if isinstance(each, ExpertLinear)]:
            layer = adapted_layer(holder.get_submodule(path), kind=adapted, rank=2, alpha=3.0).double()
            with torch.no_grad():
                layer.lora_B.normal_(0, 0.5)
                if layer.magnitude is not None:
                    layer.magnitude *= 1.3
            replace_module(holder, path, layer)
            for expert in range(EXPERTS):
                weights[path.rpartition(".")[2]][expert] = reference.merged_weight(
                    weights[path.rpartition(".")[2]][expert],
                    to_numpy(layer.lora_A[expert]),
                    to_numpy(layer.lora_B[expert]),
                    layer.scaling,
                    None if layer.magnitude is None else to_numpy(layer.magnitude[expert]),
                )
    wanted = by_loops(weights, flags, to_numpy(x), index.numpy(), to_numpy(share))
    # The norms of a float32 magnitude are float32.
    assert reference.relative_error(to_numpy(module(x, index, share)), wanted) < (2e-7 if adapted == "dora" else 1e-12)


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_the_gradients_are_those_of_finite_differences(flags: dict[str, bool]) -> None:
    module = make(**flags)
    holder = nn.ModuleList([module])
    use_expert_layers_(holder)  # type: ignore[arg-type]
    x, index, share = routing()
    factors = []
    for path in [name for name, each in holder.named_modules() if isinstance(each, ExpertLinear)]:
        layer = adapted_layer(holder.get_submodule(path), kind="lora", rank=1, alpha=1.0, share="A").double()
        nn.init.normal_(layer.lora_B)
        replace_module(holder, path, layer)
        factors += [layer.lora_A, layer.lora_B]
    inputs = (x.requires_grad_(), share.requires_grad_(), *factors)
    torch.autograd.gradcheck(lambda *values: module(values[0], index, values[1]), inputs)
