"""Choices that a run makes where torch has a GPU, with torch's answers faked: this machine needs none."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qdora.files.environment import environment
from qdora.memory.failed_allocation import free_memory
from qdora.memory.host_residency import HostResidency
from qdora.model import build_model, load
from qdora.nn import adapted_linear
from qdora.ops import bnb_kernels
from qdora.run import load_base, prepare
from qdora.train import optimizer
from qdora.train.checkpoint import random_state, set_random_state
from tests import tiny, tiny_run

CUDA = torch.device("cuda")
CARD = SimpleNamespace(name="A100", major=8, minor=0, total_memory=40 << 30, uuid="GPU-1")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A card in the place of torch's; what was asked of it to do."""
    made: list[str] = []
    answers = {"device_count": 1, "get_device_properties": CARD, "current_device": 0, "mem_get_info": (5, 9)}
    answers |= {"is_available": True, "get_rng_state": torch.tensor([7], dtype=torch.uint8)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: made.append(f"set_rng_state {int(state)}"))
    return made


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_run_computes_on_the_gpu(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, is_native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_native)
    assert build_model.choose_compute("auto") == build_model.Compute(CUDA, dtype)


def test_the_card_is_recorded_and_named(calls: list[str]) -> None:
    assert environment()["devices"] == [{"name": "A100", "capability": "8.0", "memory_bytes": 40 << 30}]
    assert adapted_linear._free_bytes(CUDA) == 5
    assert adapted_linear._free_bytes(torch.device("cpu")) is None


def test_freed_memory_leaves_the_allocator(calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory()
    monkeypatch.setattr(load, "tie_and_move_buffers", lambda model, device: None)  # a CPU holds none for a GPU
    load._finish(tiny.llama(), SimpleNamespace(path=tmp_path, name="tiny", is_gguf=False), CUDA)  # type: ignore[arg-type]
    assert calls == ["empty_cache", "empty_cache"]


def test_a_checkpoint_has_the_generator_of_the_gpu(calls: list[str]) -> None:
    states = random_state()
    assert int(states["cuda"]) == 7
    set_random_state(states)
    assert calls == ["set_rng_state 7"]


def test_states_that_the_driver_cannot_page_are_said(calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    optimizer.AdapterOptimizer({"x": torch.nn.Parameter(torch.zeros(4, 4))}, name="paged_adamw_8bit")
    assert "the driver cannot page" in caplog.text


@pytest.mark.parametrize("compiled", [True, False])
def test_kernels_of_bitsandbytes_need_a_library_for_cuda(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    monkeypatch.setattr("bitsandbytes.cextension.lib", SimpleNamespace(compiled_with_cuda=compiled))
    assert bnb_kernels.is_available.__wrapped__("cuda") is compiled


def test_what_a_gpu_allows(tmp_path: Path) -> None:
    compute = build_model.Compute(CUDA, torch.bfloat16)
    settings: dict[str, Any] = {"memory__offload_activations": True, "memory__host_embeddings": True}
    recipe = tiny_run.recipe(tmp_path, base__residency="host", memory__checkpointing=True, **settings)
    assert prepare._machine_faults(recipe, compute) == []


def test_a_base_goes_where_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placers, offloaded = [], []
    monkeypatch.setattr(load_base, "load_model", lambda *_, placer, **__: placers.append(placer) or torch.nn.Module())
    monkeypatch.setattr(load_base, "recompute_activations", lambda model: None)
    monkeypatch.setattr(load_base, "ActivationOffload", offloaded.append)
    settings: dict[str, Any] = {"base__residency": "host", "base__streamed_blocks": 1}
    recipe = tiny_run.recipe(tmp_path, **settings, memory__offload_activations=True, memory__checkpointing=True)
    load_base.load_base(recipe, tiny.source(), build_model.Compute(CUDA, torch.bfloat16))
    (placer,) = placers
    assert isinstance(placer, HostResidency)
    assert placer.num_streamed == 1
    assert len(offloaded) == 1
