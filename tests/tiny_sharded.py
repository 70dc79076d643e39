"""Tiny models whose base is divided among the processes of a test, and the steps that they take with a whole base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from qdora.data.batching import IGNORED, MicroBatch
from qdora.data.loader import Step
from qdora.memory.sharded_base import ShardedBase
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, inject
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.train import passes
from qdora.train.distributed import CAN_DIVIDE, Processes, mesh_of, processes_of_launch
from qdora.train.even_passes import even_passes
from qdora.train.passes import step_gradient
from tests import tiny, tiny_adapted, tiny_experts, tiny_run, tiny_tokenizer

CPU = torch.device("cpu")
needs_division = pytest.mark.skipif(not CAN_DIVIDE, reason="this torch cannot divide packed weights")
LENGTHS = (9, 4, 7, 12, 3)


@contextmanager
def launch() -> Iterator[Processes]:
    """Processes that divide the base."""
    with processes_of_launch() as processes:
        yield processes.dividing(base=True)


def write(directory: Path, family: str) -> Path:
    """Llama: tied, blocks of the scales cross the rows of down_proj. Qwen3: a head of its own. Both 64 wide."""
    if (directory / "config.json").exists():
        return directory
    if family == "qwen3_moe":
        return tiny_experts.write(directory, family)
    if family == "llama":
        return tiny_run.write_model(directory)
    torch.manual_seed(0)
    sizes = tiny_adapted.SIZES | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    AutoModelForCausalLM.from_config(Qwen3Config(**sizes, tie_word_embeddings=False)).save_pretrained(directory)
    tiny_tokenizer.make().save_pretrained(directory)
    return directory


def load(source: Path, processes: Processes | None = None, parallel: str = "shard", **options: Any) -> PreTrainedModel:
    """A base in float32, whole, or divided among the processes; `options` of `load_model`."""
    mesh = None if processes is None else mesh_of(processes, CPU, parallel)
    options = {"quant": "nf4", "compute_dtype": torch.float32} | options
    return load_model(resolve(str(source)), placer=None if mesh is None else ShardedBase(mesh), **options)


def adapt(model: PreTrainedModel, *, gates: bool = False, checkpointing: bool = True, **options: Any) -> None:
    """Adapters off their start, in float32."""
    settings: dict[str, Any] = {"rank": 4, "dtype": torch.float32, "generator": torch.Generator().manual_seed(1)}
    layers = inject(model, **settings | options)
    if gates:
        for layer in layers.values():
            layer.add_gate()
    tiny.move_all_parameters_(model, scale=0.02)
    if checkpointing:
        recompute_activations(model)
    model.train()


def example(number: int, length: int) -> MicroBatch:
    """One example, half of which is labelled."""
    ids = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(number))
    labels = ids.clone()
    labels[:, : length // 2] = IGNORED
    ones = torch.ones_like(ids)
    return MicroBatch(ids, ones, labels, torch.zeros(1, dtype=torch.int64), ["task"], [str(number)])


def step(rank: int = 0, size: int = 1) -> Step:
    """Five micro-batches, of which a process gets every `size`-th."""
    whole = [example(number, length) for number, length in enumerate(LENGTHS)]
    labelled = sum(int((each.labels[:, 1:] != IGNORED).sum()) for each in whole)
    return Step(whole[rank::size], labelled, sum(LENGTHS), len(whole), {"task": labelled})


def train(model: PreTrainedModel, processes: Processes, *, num_steps: int = 3) -> list[tuple[float, dict[str, Tensor]]]:
    """The loss and the gradients of each step, all over the processes; between them plain descent."""
    found = []
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for _ in range(num_steps):
        mine = even_passes(step(processes.rank, processes.size), processes)
        metrics, _ = step_gradient(model, mine, device=CPU)
        processes.sum_gradients_(list(parameters.values()))
        gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
        found.append((sum(processes.gather(metrics["loss"])), {name: each.clone() for name, each in gradients.items()}))
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameters[name].sub_(gradient, alpha=0.05)
        model.zero_grad()
    return found


def norm_counts(processes: Processes, model: PreTrainedModel, num_steps: int = 3) -> tuple[list[int], Any]:
    """How many norms each step computed from the rows of each process, and what `train` returns."""
    counts: list[int] = []
    before = passes.prepare_shared_gains
    passes.prepare_shared_gains = lambda layers: counts.append(before(layers))  # type: ignore[assignment,func-returns-value]
    try:
        found = train(model, processes, num_steps=num_steps)
    finally:
        passes.prepare_shared_gains = before
    return counts, found


def assert_same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Losses and gradients that differ by rounding alone, relative to the largest entry of each tensor."""
    for (loss, gradients), (right, others) in zip(found, expected, strict=True):
        assert abs(loss - right) <= tolerance * abs(right), (loss, right)
        assert gradients.keys() == others.keys()
        assert gradients
        for name, gradient in gradients.items():
            most = float(others[name].abs().max())
            error = float((gradient - others[name]).abs().max())
            assert error <= 3 * tolerance * most, (name, error, most)


def num_resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of this process, each memory once."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())


def num_adapter_bytes(model: nn.Module) -> int:
    """Bytes that adapters add: their parameters, and what DoRA keeps of the base."""
    layers = adapted_layers(model).values()
    tensors = [each for layer in layers for each in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
