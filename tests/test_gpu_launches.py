"""How many launches an adapted layer of a 7B model asks of a GPU, seen on the false GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.expert_linear import AdaptedExperts, FrozenExperts
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops import bnb_kernels, expert_product, tiles
from qdora.ops.expert_tokens import padded_tokens
from qdora.ops.frozen_product import decoding
from qdora.ops.packed import empty_packed, quantize
from qdora.ops.tiles import spans
from qdora.train.optimizer import AdapterOptimizer
from tests import reference, tiny
from tests.false_gpu import FalseGpu, on_false_gpu
from tests.test_ops_adapted_product import arrays, to_numpy

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


# Of one tile, as the layers of a 7B model. (forward, backward): the backward pass adds the gradients of A, B and m to
# earlier ones.
CASES: dict[str, tuple[tuple[str, int, int, dict[str, Any]], tuple[int, int]]] = {
    "square": (("nf4", 256, 256, {}), (4, 12)),
    "wide": (("nf4", 256, 704, {}), (4, 12)),
    "tall": (("nf4", 704, 256, {}), (4, 12)),
    "lora": (("nf4", 256, 256, {"kind": "lora"}), (4, 9)),
    "dropout": (("nf4", 256, 256, {"dropout": 0.05}), (6, 15)),
    "float32": (("nf4", 256, 256, {"dtype": torch.float32}), (4, 12)),
    "int8": (("int8", 256, 256, {}), (5, 13)),
}


@pytest.mark.parametrize("case", CASES)
@on_false_gpu
def test_launches_of_a_layer(gpu: FalseGpu, case: str) -> None:
    (quant, in_features, out_features, options), expected = CASES[case]
    found = launches(gpu, layer_on(gpu, in_features, out_features, quant, **options))
    assert found["recompute"] == found["forward"]
    assert (len(found["forward"]), len(found["backward"])) == expected, found


@pytest.mark.parametrize(("in_features", "out_features"), [(4096, 4096), (4096, 11008), (11008, 4096)])
def test_layers_of_a_7b_model_are_one_tile(in_features: int, out_features: int) -> None:
    assert len(spans(out_features, in_features, 2, "cuda")) == 1
    assert len(spans(in_features, out_features, 2, "cuda", 64)) == 1


@on_false_gpu
def test_what_follows_from_the_parameters_is_made_once_a_step(gpu: FalseGpu) -> None:
    """The first micro-batch after an update makes norm, gain, s g B and scales; others and the evaluation read them."""
    layer = layer_on(gpu, 256, 256)
    optimizer = AdapterOptimizer(dict(layer.named_parameters()), name="adamw")
    once = launches(gpu, layer)
    gpu.clear()
    optimizer.step(1e-3)
    updated = gpu.count("launch")
    x = torch.ones(NUM_TOKENS, 256, dtype=torch.bfloat16, device=gpu.device)
    with gpu.phase("first"):
        layer(x)
    assert updated > 0
    assert gpu.count("launch", "first") > 2 * len(once["forward"])
    with gpu.phase("later"):
        layer(x)
    assert gpu.count("launch", "later") == len(once["forward"])


@on_false_gpu
def test_gradients_of_16_bit_products_are_summed_in_float32(gpu: FalseGpu) -> None:
    """A sum of 257 equal terms needs nine bits; one that was rounded to bfloat16 on its way has eight."""
    layer = layer_on(gpu, 64, 64, "nf4", kind="lora")
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
    x = torch.full((257, 64), 1.0, dtype=torch.bfloat16, device=gpu.device)
    layer(x).backward(torch.ones(257, 64, dtype=torch.bfloat16, device=gpu.device))
    for gradient in (layer.lora_A.grad, layer.lora_B.grad):
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient.cpu(), torch.full(gradient.shape, 257.0 * 64 * layer.scaling))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@on_false_gpu
def test_experts_with_like_counts_share_launches(gpu: FalseGpu, kind: Any) -> None:
    """The false GPU has no grouped product. Three runs of four experts: 3 products forward and 5 backward each."""
    rows, columns, counts = 64, 128, 11 * [8] + [7]

    packed = empty_packed("nf4", (12 * rows, columns), device=gpu.device)
    for tensor in packed.tensors().values():
        tensor.fill_(1)
    layer = AdaptedExperts(FrozenExperts(packed, 12), rank=8, kind=kind, dtype=torch.bfloat16).to(gpu.device)
    with patch.object(expert_product, "_RUN_BYTES", 4 * rows * columns * 2):
        tokens = padded_tokens(counts)
        x = torch.ones(sum(tokens.counts), columns, dtype=torch.bfloat16, device=gpu.device).requires_grad_()
        dy = torch.ones(len(x), rows, dtype=torch.bfloat16, device=gpu.device)
        layer(x, tokens)
        gpu.clear()
        layer(x, tokens).backward(dy)
    launched = [event.operation for event in gpu.events if event.kind == "launch"]
    assert (launched.count("bmm"), launched.count("mm")) == (3 * 8, 0)
    assert gpu.lines("wait") == []


DECODING = ["mm", "gemm_4bit", "addmm_"]
BY_TILES = ["mm", "mm", "dequantize_4bit", "addmm_"]
SLOW = ("fp4", "lora", "64 tokens", "op is missing", "two tiles")
DECODED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nf4": ({}, DECODING),
    "fp4": ({"quant": "fp4"}, DECODING),
    "lora": ({"kind": "lora"}, DECODING),
    "64 tokens": ({"tokens": 64}, DECODING),
    "65 tokens": ({"tokens": 65}, BY_TILES),
    "no kept scales": ({"keeps_scales": False}, ["mm", "mm", "dequantize_blockwise", "add_", "mul_", *BY_TILES[2:]]),
    "two tiles": ({"tile_bytes": 256 * 256}, ["mm", "mm", *2 * BY_TILES[2:]]),
    "op is missing": ({"has_product": False}, BY_TILES),
    "trained": ({"grad": True}, BY_TILES),
    "scored": ({"decodes": False}, BY_TILES),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in DECODED],
)
@on_false_gpu
def test_decoding_reads_codes_where_a_kernel_does(gpu: FalseGpu, case: str) -> None:
    options, expected = DECODED[case]
    quant, kind = options.get("quant", "nf4"), options.get("kind", "dora")
    generator = torch.Generator().manual_seed(0)
    packed = quantize(torch.randn(256, 256, generator=generator) * 0.1, quant)
    layer = AdaptedLinear(FrozenLinear(packed), rank=16, kind=kind, dtype=torch.bfloat16).eval()
    tiny.move_all_parameters_(layer)
    x = torch.randn(options.get("tokens", 1), 256, generator=generator).bfloat16()
    wanted = reference.forward(to_numpy(x), **arrays(layer))
    layer.to(gpu.device).keeps_scales = options.get("keeps_scales", True)
    there = x.to(gpu.device)
    patched = [
        patch.object(tiles, "_GPU_TILE_BYTES", options.get("tile_bytes", tiles._GPU_TILE_BYTES)),
        patch.object(bnb_kernels, "has_product", lambda _kind: options.get("has_product", True)),
    ]
    writing = decoding() if options.get("decodes", True) else nullcontext()
    with patched[0], patched[1], writing, torch.set_grad_enabled(options.get("grad", False)):
        layer(there)
        gpu.clear()
        out = layer(there).detach()
    assert [event.operation for event in gpu.events] == expected
    assert reference.relative_error(to_numpy(out.cpu()), wanted) < 2**-7


@pytest.mark.parametrize(("quant", "in_features"), [("nf3", 256), ("nf2", 256), ("int4", 256), ("nf4", 96)])
@on_false_gpu
def test_tables_of_codes_stay_on_the_gpu(gpu: FalseGpu, quant: str, in_features: int) -> None:
    """Those of research formats, and of NF4 where blocks of 64 cross rows and plain torch decodes."""
    layer = layer_on(gpu, in_features, 64, quant)
    x = torch.ones(NUM_TOKENS, in_features, dtype=torch.bfloat16, device=gpu.device)
    for _ in range(2):
        gpu.clear()
        layer(x.clone().requires_grad_()).sum().backward()
    assert gpu.lines("copy") == []
    assert gpu.lines("wait") == []


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
