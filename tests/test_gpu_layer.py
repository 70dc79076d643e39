"""CUDA: bitsandbytes' kernels, cuBLAS into strided slices, no wait of the host, blocks and checkpoints in host memory.

Run with -m gpu. Numbers come from `reference` (float64, plain loops), from the CPU or from a resident base.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qdora.adapter.norms import refresh
from qdora.memory import stream as offload
from qdora.memory.stream import HostResidency, offload_activations
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.quant import kernels, tiles
from qdora.quant.packed import quantize
from qdora.train.optimizer import AdapterOptimizer
from tests import reference, support
from tests.adapter_numbers import expected, expected_norm, make, plain_results, results, to_numpy
from tests.test_ops_quantize import by_backends

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda", 0)


def layer_of(**options: Any) -> Any:
    return make(**{"dtype": torch.bfloat16, "quant": "nf4"} | options)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int4", "nf3", "int2"])
@pytest.mark.parametrize("shape", [(128, 256), (33, 96), (7, 101)])
def test_a_base_does_not_depend_on_where_it_was_quantised_and_the_kernels_decode_it(kind, shape):
    assert kernels.is_available("cuda")
    weight = random(*shape, seed=1) * 0.05
    weight[1] = 0.0
    here, there = quantize(weight, kind, 64, False), quantize(weight.to(DEVICE), kind, 64, False)
    for name, tensor in here.tensors().items():
        assert torch.equal(tensor, there.tensors()[name].cpu()), name
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = by_backends(here, dtype)["torch"]
        assert all(torch.equal(dense.cpu(), wanted) for dense in by_backends(there, dtype).values())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8", None])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_forward_and_every_gradient(kind, quant, small_tiles, monkeypatch):
    if small_tiles:  # products into strided slices of the output
        monkeypatch.setattr(tiles, "_GPU_TILE_BYTES", 16 << 10)
    layer = layer_of(kind=kind, quant=quant, out=200, in_=192)
    x, dy = random(37, 192, seed=4), random(37, 200, seed=5)
    wanted = expected(layer, x, dy)
    found = results(layer.to(DEVICE), x.to(DEVICE), dy.to(DEVICE))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert reference.relative_error(to_numpy(found[name]), value) < 8e-3, name


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "size", [(1, 64, 64, 1), (67, 101, 130, 8), (513, 1024, 768, 16), (2048, 4096, 4096, 16), (1000, 4096, 11008, 64)]
)
def test_errors_at_real_and_odd_sizes_are_at_most_twice_those_of_the_plain_formula(kind, size):
    tokens, in_, out, rank = size
    layer = layer_of(kind=kind, in_=in_, out=out, rank=rank).to(DEVICE)
    x, dy = random(tokens, in_, seed=4).to(DEVICE), random(tokens, out, seed=5).to(DEVICE)
    exact = plain_results(layer, x.double(), dy.double())
    found, plain = results(layer, x, dy), plain_results(layer, x, dy)
    for name, value in exact.items():
        ours, theirs = (reference.relative_error(to_numpy(each[name]), to_numpy(value)) for each in (found, plain))
        assert ours <= 2 * theirs + 2**-8, name  # of few numbers the plain ones may be near by luck


def waits_of(function: Any) -> list[str]:
    """What torch says of operations that made the host wait."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in caught if "called a synchronizing" in str(each.message)]


@pytest.mark.parametrize("options", [{"kind": "lora"}, {}, {"dropout": 0.3}, {"quant": "int8"}, {"quant": None}])
def test_a_pass_makes_the_host_wait_for_nothing(options):
    layer, x = layer_of(**options).to(DEVICE), random(8, 64).to(DEVICE).requires_grad_()
    layer(x).sum().backward()
    assert waits_of(lambda: layer(x).sum().backward()) == []


def test_norms_of_all_layers_make_it_wait_once():
    layers, x = [layer_of(rank=rank).to(DEVICE) for rank in (1, 2, 3)], random(8, 64).to(DEVICE)
    for layer in layers:
        layer(x)
        with torch.no_grad():
            layer.lora_B.mul_(1.5)
    assert len(waits_of(lambda: refresh(layers))) == 1
    assert waits_of(lambda: [layer(x) for layer in layers]) == []
    for layer in layers:
        gains = to_numpy(layer.gain(torch.bfloat16).value)
        np.testing.assert_allclose(gains * expected_norm(layer.cpu()), to_numpy(layer.magnitude), rtol=1e-3)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw", "lion"])
def test_after_a_step_the_norm_is_the_new_one(name):
    """131,072 elements a matrix: bitsandbytes pages states from 100,000 on."""
    layer = layer_of(out=1024, in_=1024, rank=128).to(DEVICE)
    optimizer = AdapterOptimizer(dict(layer.named_parameters()), name=name)
    before = layer.lora_B.detach().clone()
    for _ in range(2):
        layer(random(4, 1024).to(DEVICE)).float().square().sum().backward()
        optimizer.step(0.01)
        optimizer.zero_grad()
    assert not torch.equal(before, layer.lora_B)
    low = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    norm = (layer.base.dequantized().double() + layer.scaling * low).norm(dim=1)
    gain = layer.gain(torch.bfloat16).value.double()
    torch.testing.assert_close(gain, layer.magnitude.detach().double() / norm, rtol=1e-2, atol=1e-6)


SIZES = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128, "num_hidden_layers": 9}
LOADED: dict[str, Any] = {"quant": "nf4", "compute_dtype": torch.float32, "device": DEVICE}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return support.write_source(tmp_path_factory.mktemp("source"), **SIZES)


@pytest.fixture(scope="module")
def resident(source):
    """Gradients and logits of a base on the device."""
    return support.streamed_gradients(support.adapt_streamed(load_model(resolve(str(source)), **LOADED)))


def held_by(source: Any, **options: Any) -> tuple[int, Any]:
    """The bytes that a model takes on the device, and the model."""
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)
    model = load_model(resolve(str(source)), **LOADED | options)
    return torch.cuda.memory_allocated(DEVICE) - before, model


def assert_gradients(model: Any, wanted: Any) -> None:
    """Three times, as a buffer that is overwritten too early shows later."""
    for _ in range(3):
        support.assert_equal_tensors(support.streamed_gradients(model), wanted)
        for parameter in model.parameters():
            parameter.grad = None


def test_a_streamed_base_gives_the_same_with_less_on_the_device(source, resident):
    whole, model = held_by(source)
    block = sum(t.nbytes for n, t in model.named_buffers() if n.startswith("model.layers.0."))
    del model
    for num_streamed in (None, 4):
        held, model = held_by(source, placer=HostResidency(num_streamed))
        assert whole - held > (6 if num_streamed is None else 1) * block  # nine blocks against two
        assert_gradients(support.adapt_streamed(model), resident)


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_with_checkpoints_on_the_host(source, resident, streamed, monkeypatch):
    monkeypatch.setattr(offload, "_LEAST_BYTES", 16)
    _, model = held_by(source, placer=HostResidency() if streamed else None)
    offload_activations(support.adapt_streamed(model))
    assert_gradients(model, resident)
