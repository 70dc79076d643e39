"""How many launches an adapted layer of a 7B model asks of a GPU, seen on the false GPU."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import empty_packed
from qdora.train.optimizer import AdapterOptimizer
from tests.false_gpu import FalseGpu, on_false_gpu

NUM_TOKENS = 8


def layer_on(gpu: FalseGpu, in_features: int, out_features: int, quant: str = "nf4", **options: Any) -> AdaptedLinear:
    """A layer of rank 16 in bf16; every weight is the first value of its format."""
    base = empty_packed(quant, (out_features, in_features), device=gpu.device)
    for tensor in base.tensors().values():
        tensor.fill_(1)
    layer = AdaptedLinear(FrozenLinear(base), rank=16, **{"dtype": torch.bfloat16} | options).to(gpu.device)
    AdapterOptimizer(dict(layer.named_parameters()))  # lets gradients of bf16 parameters arrive in float32
    return layer


def launches(gpu: FalseGpu, layer: AdaptedLinear) -> dict[str, list[str]]:
    """The launches of a later micro-batch of a step, by phase: the norm is known, and gradients are there."""
    x = torch.ones(NUM_TOKENS, layer.in_features, dtype=torch.bfloat16, device=gpu.device)
    dy = torch.ones(NUM_TOKENS, layer.out_features, dtype=torch.bfloat16, device=gpu.device)
    for _ in range(2):
        each = x.clone().requires_grad_()
        gpu.clear()
        with gpu.phase("forward"):
            out: Any = checkpoint(layer, each, use_reentrant=False)
        out.backward(dy)
    assert gpu.lines("wait") == []
    found: dict[str, list[str]] = {}
    for event in gpu.events:
        if event.kind == "launch":
            found.setdefault(event.phase, []).append(event.operation)
    return found


# (forward, backward): the backward pass adds three gradients to earlier ones, those of A, B and m.
CASES: dict[str, tuple[tuple[str, int, int, dict[str, Any]], tuple[int, int]]] = {
    "square": (("nf4", 4096, 4096, {}), (11, 21)),
    "wide": (("nf4", 4096, 11008, {}), (13, 31)),
    "lora": (("nf4", 4096, 4096, {"kind": "lora"}), (7, 14)),
    "dropout": (("nf4", 4096, 4096, {"dropout": 0.05}), (19, 32)),
    "float32": (("nf4", 4096, 4096, {"dtype": torch.float32}), (17, 27)),
    "int8": (("int8", 4096, 4096, {}), (11, 21)),
}


@pytest.mark.parametrize("case", CASES)
@on_false_gpu
def test_launches_of_a_layer(gpu: FalseGpu, case: str) -> None:
    (quant, in_features, out_features, options), expected = CASES[case]
    found = launches(gpu, layer_on(gpu, in_features, out_features, quant, **options))
    assert found["recompute"] == found["forward"]
    assert (len(found["forward"]), len(found["backward"])) == expected, found


@on_false_gpu
def test_the_code_book_of_a_research_format_is_copied_in_every_pass(gpu: FalseGpu) -> None:
    layer = layer_on(gpu, 256, 64, "nf3")
    layer(torch.ones(NUM_TOKENS, 256, dtype=torch.bfloat16, device=gpu.device))
    gpu.clear()
    layer(torch.ones(NUM_TOKENS, 256, dtype=torch.bfloat16, device=gpu.device))
    assert len(gpu.lines("wait")) == 1
    assert gpu.lines("wait")[0].startswith("ops/codebooks.py")


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw"])
@on_false_gpu
def test_launches_of_an_update_do_not_grow_with_the_number_of_layers(gpu: FalseGpu, name: Any) -> None:
    """Of 224 layers: once 4,482 launches in 8 bits, and 448 waits within bitsandbytes. Clipping took 672."""
    waits: list[Tensor] = []
    found = []
    for num_layers in (3, 30):
        parameters = {}
        for layer in range(num_layers):
            parameters[f"{layer}.lora_A"] = nn.Parameter(torch.ones(8, 520, dtype=torch.bfloat16, device=gpu.device))
            parameters[f"{layer}.lora_B"] = nn.Parameter(torch.ones(520, 8, dtype=torch.bfloat16, device=gpu.device))
            parameters[f"{layer}.magnitude"] = nn.Parameter(torch.ones(520, device=gpu.device))
        optimizer = AdapterOptimizer(parameters, name=name, weight_decay=0.1)
        for parameter in parameters.values():
            parameter.grad = torch.ones(parameter.shape, device=gpu.device)
        gpu.clear()
        with patch("bitsandbytes.optim.optimizer.sync_gpu", waits.append):
            optimizer.scale_gradients_(0.5)
            optimizer.step(1e-2)
        assert gpu.lines("wait") == []
        found.append(gpu.count("launch"))
    assert not waits
    assert found[0] == found[1] <= 24
