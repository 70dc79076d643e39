"""How many launches an adapted layer of a 7B model asks of a GPU, seen on the false GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qdora.adapter import expert_product
from qdora.adapter.expert_product import padded_tokens
from qdora.adapter.experts import AdaptedExperts, FrozenExperts
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.adapter.product import decoding
from qdora.quant import kernels, tiles
from qdora.quant.packed import PackedWeight, empty_packed
from qdora.train.optimizer import AdapterOptimizer
from tests import reference
from tests.adapter_numbers import arrays, make, to_numpy
from tests.false_gpu import FalseGpu, on_false_gpu

NUM_TOKENS = 8


def ones(gpu: FalseGpu, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16, device=gpu.device)


def first_values(gpu: FalseGpu, quant: str, shape: tuple[int, int]) -> PackedWeight:
    """Every weight is the first value of its format."""
    base = empty_packed(quant, shape, device=gpu.device)
    for tensor in base.tensors().values():
        tensor.fill_(1)
    return base


def layer_on(gpu: FalseGpu, in_features: int, out_features: int, quant: str = "nf4", **options: Any) -> AdaptedLinear:
    """A layer of rank 16 in bf16."""
    base = FrozenLinear(first_values(gpu, quant, (out_features, in_features)))
    layer = AdaptedLinear(base, rank=16, **{"dtype": torch.bfloat16} | options).to(gpu.device)
    AdapterOptimizer(dict(layer.named_parameters()))  # lets gradients of bf16 parameters arrive in float32
    return layer


def launches(gpu: FalseGpu, layer: AdaptedLinear) -> dict[str, list[str]]:
    """The launches of a later micro-batch of a step, by phase: the norm is known, and gradients are there."""
    x, dy = ones(gpu, NUM_TOKENS, layer.in_features), ones(gpu, NUM_TOKENS, layer.out_features)
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
CASES: list[tuple[tuple[int, int, str], dict[str, Any], tuple[int, int]]] = [
    ((256, 256, "nf4"), {}, (4, 12)),
    ((256, 704, "nf4"), {}, (4, 12)),
    ((704, 256, "nf4"), {}, (4, 12)),
    ((256, 256, "nf4"), {"kind": "lora"}, (4, 9)),
    ((256, 256, "nf4"), {"dropout": 0.05}, (6, 15)),
    ((256, 256, "nf4"), {"dtype": torch.float32}, (4, 12)),
    ((256, 256, "int8"), {}, (5, 13)),
    ((256, 256, "int2"), {}, (7, 15)),  # by plain torch: Triton takes one launch, as bitsandbytes does for nf4
]


@on_false_gpu
def test_launches_of_a_layer(gpu):
    for form, options, wanted in CASES:
        found = launches(gpu, layer_on(gpu, *form, **options))
        assert found["recompute"] == found["forward"]
        assert (len(found["forward"]), len(found["backward"])) == wanted, (form, options, found)


@on_false_gpu
def test_gradients_of_16_bit_products_are_summed_in_float32(gpu):
    """A sum of 257 equal terms needs nine bits; one that was rounded to bfloat16 on its way has eight."""
    layer = layer_on(gpu, 64, 64, "nf4", kind="lora")
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
    layer(ones(gpu, 257, 64)).backward(ones(gpu, 257, 64))
    for gradient in (layer.lora_A.grad, layer.lora_B.grad):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient.cpu(), torch.full(gradient.shape, 257.0 * 64 * layer.scaling))


@on_false_gpu
def test_experts_with_like_counts_share_launches(gpu):
    """The false GPU has no grouped product. Three runs of four experts: 3 products forward and 5 backward each."""
    rows, columns, tokens = 64, 128, padded_tokens(11 * [8] + [7])
    for kind in ("lora", "dora"):
        base = FrozenExperts(first_values(gpu, "nf4", (12 * rows, columns)), 12)
        layer = AdaptedExperts(base, rank=8, kind=kind, dtype=torch.bfloat16).to(gpu.device)
        x = ones(gpu, sum(tokens.counts), columns).requires_grad_()
        with patch.object(expert_product, "_RUN_BYTES", 4 * rows * columns * 2):
            layer(x, tokens)
            gpu.clear()
            layer(x, tokens).backward(ones(gpu, len(x), rows))
        launched = [event.operation for event in gpu.events if event.kind == "launch"]
        assert (launched.count("bmm"), launched.count("mm")) == (3 * 8, 0)
        assert gpu.lines("wait") == []


DECODING = ["mm", "gemm_4bit", "addmm_"]
BY_TILES = ["mm", "mm", "dequantize_4bit", "addmm_"]
DECODED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, DECODING),
    ({"quant": "fp4"}, DECODING),
    ({"kind": "lora"}, DECODING),
    ({"tokens": 64}, DECODING),
    ({"tokens": 65}, BY_TILES),
    ({"keeps_scales": False}, ["mm", "mm", "dequantize_blockwise", "add_", "mul_", *BY_TILES[2:]]),
    ({"tile_bytes": 256 * 256}, ["mm", "mm", *2 * BY_TILES[2:]]),
    ({"has_product": False}, BY_TILES),
    ({"grad": True}, BY_TILES),
    ({"decodes": False}, BY_TILES),
]


@on_false_gpu
def test_decoding_reads_codes_where_a_kernel_does(gpu):
    for options, wanted in DECODED:
        quant = f"{options.get('quant', 'nf4')} nested"
        form = {"kind": options.get("kind", "dora"), "out": 256, "in_": 256, "rank": 16, "bias": False}
        layer = make(quant=quant, dtype=torch.bfloat16, **form).eval()
        x = torch.randn(options.get("tokens", 1), 256, generator=torch.Generator().manual_seed(1)).bfloat16()
        expected = reference.forward(to_numpy(x), **arrays(layer))
        layer.to(gpu.device).keeps_scales = options.get("keeps_scales", True)
        there = x.to(gpu.device)
        tile_bytes = options.get("tile_bytes", tiles._GPU_TILE_BYTES)
        with (
            patch.object(tiles, "_GPU_TILE_BYTES", tile_bytes),
            patch.object(kernels, "has_product", lambda _kind, has=options.get("has_product", True): has),
            decoding() if options.get("decodes", True) else nullcontext(),
            torch.set_grad_enabled(options.get("grad", False)),
        ):
            layer(there)
            gpu.clear()
            out = layer(there).detach()
        assert [event.operation for event in gpu.events] == wanted, options
        assert reference.relative_error(to_numpy(out.cpu()), expected) < 2**-7, options


@on_false_gpu
def test_launches_of_an_update_do_not_grow_with_the_number_of_layers(gpu):
    """Of 224 layers: once 4,482 launches in 8 bits, and 448 waits within bitsandbytes. Clipping took 672."""
    waits: list[Tensor] = []
    names: list[Any] = ["paged_adamw_8bit", "adamw"]
    for name in names:
        found = []
        for num_layers in (3, 30):
            parameters = {}
            for layer in range(num_layers):
                parameters[f"{layer}.lora_A"] = nn.Parameter(ones(gpu, 8, 520))
                parameters[f"{layer}.lora_B"] = nn.Parameter(ones(gpu, 520, 8))
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
        assert found[0] == found[1] <= 24
    assert not waits
