"""Blocks and checkpoints in host memory on CUDA: the gradients of a resident base, with less of it on the device.

Run with -m gpu.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdora.memory import activation_offload
from qdora.memory.activation_offload import ActivationOffload, Away, CudaHost
from qdora.memory.host_residency import HostResidency, keep_embedding_on_host
from qdora.model.load import Placer, load_model
from qdora.model.source import resolve
from tests import tiny_streamed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda", 0)
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128, "num_hidden_layers": 9}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_streamed.write_source(tmp_path_factory.mktemp("source"), **SIZES)


def loaded(source: Path, placer: Placer | None) -> PreTrainedModel:
    model = load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.float32, device=DEVICE, placer=placer)
    return tiny_streamed.adapt(model)


@pytest.mark.parametrize("num_streamed", [None, 4])
def test_gradients_and_logits_are_those_of_a_resident_base(source: Path, num_streamed: int | None) -> None:
    expected = tiny_streamed.gradients(loaded(source, None))
    model = loaded(source, HostResidency(num_streamed))
    for _ in range(3):
        tiny_streamed.assert_equal(tiny_streamed.gradients(model), expected)
        for parameter in model.parameters():
            parameter.grad = None


def test_an_embedding_on_the_host(source: Path) -> None:
    expected = tiny_streamed.gradients(loaded(source, None))
    settings = {"quant": "nf4", "compute_dtype": torch.float32, "device": DEVICE}
    held = []
    for before_reading in (None, keep_embedding_on_host):
        gc.collect()
        before = torch.cuda.memory_allocated(DEVICE)
        model = load_model(resolve(str(source)), before_reading=before_reading, **settings)
        held.append(torch.cuda.memory_allocated(DEVICE) - before)
    table = model.get_input_embeddings().weight
    assert table.device.type == "cpu"
    assert held[0] - held[1] >= table.nbytes // 2
    tiny_streamed.assert_equal(tiny_streamed.gradients(tiny_streamed.adapt(model)), expected)


def test_the_device_holds_the_slots_alone(source: Path) -> None:
    held = []
    for placer in (None, HostResidency()):
        gc.collect()
        before = torch.cuda.memory_allocated(DEVICE)
        model = loaded(source, placer)
        held.append(torch.cuda.memory_allocated(DEVICE) - before)
        block = sum(t.nbytes for n, t in model.named_buffers() if n.startswith("model.layers.0.") and "base" in n)
        del model
    # Nine blocks against two.
    assert held[0] - held[1] > 6 * block


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_with_checkpoints_on_the_host(source: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are computed late and come back late: who does not wait for them reads NaN, or what was there before."""
    expected = tiny_streamed.gradients(loaded(source, None))
    monkeypatch.setattr(activation_offload, "_LEAST_BYTES", 16)
    model = loaded(source, HostResidency() if streamed else None)
    host, num_sent = CudaHost(DEVICE), 0

    def send(tensor: Tensor) -> Away:
        nonlocal num_sent
        num_sent += 1
        late = torch.full_like(tensor, float("nan"))
        torch.cuda._sleep(10_000_000)
        away = host(late.copy_(tensor))
        with torch.cuda.stream(host.stream):
            torch.cuda._sleep(10_000_000)
        return away

    ActivationOffload(model, send)
    for _ in range(3):
        tiny_streamed.assert_equal(tiny_streamed.gradients(model), expected)
        for parameter in model.parameters():
            parameter.grad = None
    assert num_sent == 3 * 3 * (SIZES["num_hidden_layers"] - 1)
