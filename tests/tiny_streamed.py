"""A small Llama of several blocks, with adapters that are off their start."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from qdora.memory.host_residency import HostResidency
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, adapter_parameters, inject
from qdora.model.load import Quantization, load_model
from qdora.model.source import resolve
from qdora.nn.prepared_gains import prepare_gains
from qdora.run import load_base, prepare
from tests import tiny
from tests.checkpoints import SMALL, checkpoint

NUM_BLOCKS = 5
CPU = torch.device("cpu")
WANTED = Quantization("nf4", 64, True, ("lm_head",))
IDS = torch.randint(0, 97, (3, 2, 12), generator=torch.Generator().manual_seed(5))
"""Three micro-batches of two rows."""


class LateCopies:
    """Destroys a slot when its copy may begin, and copies only when it is waited for."""

    def __init__(self, device: torch.device, slots: Sequence[Tensor]) -> None:
        self.num_copies = 0
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._in_use = [False] * len(slots)
        for slot in slots:
            slot.fill_(0xAA)

    def begin(self, source: Tensor, target: Tensor, slot: int) -> None:
        assert not self._in_use[slot]
        target.fill_(0xAA)
        self._pending[slot] = (source, target)

    def wait(self, slot: int) -> None:
        self._in_use[slot] = True
        if slot in self._pending:
            source, target = self._pending.pop(slot)
            target.copy_(source)
            self.num_copies += 1

    def release(self, slot: int) -> None:
        self._in_use[slot] = False


def stream_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run with base.residency host compute on a CPU, with late copies."""
    monkeypatch.setattr(prepare, "_machine_faults", lambda *_: [])
    monkeypatch.setattr(load_base, "HostResidency", partial(HostResidency, copies=LateCopies))


def write_source(directory: Path, **sizes: Any) -> Path:
    """A checkpoint of `NUM_BLOCKS` blocks with a head of its own."""
    settings = SMALL | {"num_hidden_layers": NUM_BLOCKS, "tie_word_embeddings": False} | sizes
    return checkpoint(directory, LlamaConfig(**settings), shard="1GB")


def resident(source: Path) -> PreTrainedModel:
    """All in memory."""
    return load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.float32)


def adapt(model: PreTrainedModel, kind: Any = "dora", targets: Any = "all-linear") -> PreTrainedModel:
    """Put adapters on, move them off their start, and let blocks be computed again in the backward pass."""
    generator = torch.Generator().manual_seed(1)
    inject(model, kind=kind, rank=4, targets=targets, dropout=0.1, dtype=torch.float32, generator=generator)
    tiny.move_all_parameters_(model, scale=0.02)
    recompute_activations(model)
    return model


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of a step of three micro-batches, and under "logits" what the model says in evaluation."""
    torch.manual_seed(3)
    model.train()
    prepare_gains(layer for layer in adapted_layers(model).values() if layer.base.residency is None)
    for ids in IDS.to(model.device):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS[0].to(model.device)).logits
    assert all(gradient is not None for gradient in found.values())
    return {**found, "logits": logits}  # type: ignore[dict-item]


@cache
def of_resident_base(source: Path, kind: str, targets: tuple[str, ...] | str = "all-linear") -> dict[str, Tensor]:
    """`gradients` of a base in memory, which is to be found with streamed blocks; not to be changed."""
    return gradients(adapt(resident(source), kind, targets if isinstance(targets, str) else list(targets)))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert len(found) > 1
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
