"""Choices that a run makes where torch has a GPU, with torch's answers faked: this machine needs none."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qdora.adapter import adapted_linear
from qdora.files.environment import environment
from qdora.memory.failed_allocation import free_memory
from qdora.memory.host_residency import HostResidency
from qdora.model import build_model, load
from qdora.quant import bnb_kernels
from qdora.run import base as load_base
from qdora.run import prepare
from qdora.train import optimizer
from qdora.train.checkpoint import random_state, set_random_state
from tests import support

CUDA = torch.device("cuda")
CARD = SimpleNamespace(name="A100", major=8, minor=0, total_memory=40 << 30, uuid="GPU-1")


@pytest.fixture
def calls(monkeypatch):
    """A card in the place of torch's; what was asked of it to do."""
    made: list[str] = []
    answers = {"device_count": 1, "get_device_properties": CARD, "current_device": 0, "mem_get_info": (5, 9)}
    answers |= {"is_available": True, "get_rng_state": torch.tensor([7], dtype=torch.uint8)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: made.append(f"set_rng_state {int(state)}"))
    return made


def test_a_run_computes_on_the_gpu_and_its_checkpoints_have_its_generator(calls, caplog, monkeypatch):
    for is_native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=is_native: answer)
        assert build_model.choose_compute("auto") == build_model.Compute(CUDA, dtype)
    assert environment()["devices"] == [{"name": "A100", "capability": "8.0", "memory_bytes": 40 << 30}]
    assert adapted_linear._free_bytes(CUDA) == 5
    assert adapted_linear._free_bytes(torch.device("cpu")) is None
    states = random_state()
    assert int(states["cuda"]) == 7
    set_random_state(states)
    assert calls == ["set_rng_state 7"]
    caplog.set_level(logging.INFO)
    optimizer.AdapterOptimizer({"x": torch.nn.Parameter(torch.zeros(4, 4))}, name="paged_adamw_8bit")
    assert "cannot page" in caplog.text


def test_freed_memory_leaves_the_allocator(calls, tmp_path, monkeypatch):
    free_memory()
    monkeypatch.setattr(load, "tie_and_move_buffers", lambda model, device: None)  # a CPU holds none for a GPU
    source: Any = SimpleNamespace(path=tmp_path, name="tiny", is_gguf=False)
    load._finish(support.llama(), source, CUDA)
    assert calls == ["empty_cache", "empty_cache"]


@pytest.mark.parametrize("compiled", [True, False])
def test_kernels_of_bitsandbytes_need_a_library_for_cuda(monkeypatch, compiled):
    monkeypatch.setattr("bitsandbytes.cextension.lib", SimpleNamespace(compiled_with_cuda=compiled))
    assert bnb_kernels.is_available.__wrapped__("cuda") is compiled


def test_a_base_goes_where_the_recipe_says(tmp_path, monkeypatch):
    placers: list[Any] = []
    offloaded: list[Any] = []
    monkeypatch.setattr(load_base, "load_model", lambda *_, placer, **__: placers.append(placer) or torch.nn.Module())
    monkeypatch.setattr(load_base, "recompute_activations", lambda model: None)
    monkeypatch.setattr(load_base, "ActivationOffload", offloaded.append)
    options: dict[str, Any] = {"base__residency": "host", "base__streamed_blocks": 1, "memory__host_embeddings": True}
    recipe = support.tiny_recipe(tmp_path, **options, memory__offload_activations=True, memory__checkpointing=True)
    compute = build_model.Compute(CUDA, torch.bfloat16)
    assert prepare._machine_faults(recipe, compute) == []
    load_base.load_base(recipe, support.config_source(), compute)
    (placer,) = placers
    assert isinstance(placer, HostResidency)
    assert placer.num_streamed == 1
    assert len(offloaded) == 1
