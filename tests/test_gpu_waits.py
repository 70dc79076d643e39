"""Where the host waits for a GPU in an optimizer step of eight micro-batches, seen on the false GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from qdora.adapter import norms
from qdora.adapter.expert_product import ExpertTokens
from qdora.adapter.norms import refresh
from qdora.data.batches import Batching, Step, micro_batches
from qdora.evaluate.generation import decode_greedily
from qdora.evaluate.spans import Span, score_spans
from qdora.files.run_directory import RunDirectory
from qdora.memory import stream as offload
from qdora.memory.stream import HostResidency, offload_activations
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, adapter_parameters, inject
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import GateConfig
from qdora.train import passes
from qdora.train.gates import Gates
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.passes import step_gradient
from qdora.train.trainer import Trainer
from tests import support
from tests.adapter_numbers import make
from tests.false_gpu import Event, on_false_gpu
from tests.test_nn_adapted_linear import shares

NUM_BLOCKS, NUM_MICRO_BATCHES, NUM_STEPS = 3, 8, 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama whose rows are whole blocks."""
    sizes = {"intermediate_size": 128, "num_hidden_layers": NUM_BLOCKS}
    return support.write_source(tmp_path_factory.mktemp("source"), **sizes)


class CopiesNow:
    """Copies into `slots` in the order of all other work."""

    def __init__(self, _device: torch.device, _slots: Sequence[Tensor]) -> None:
        pass

    def begin(self, source: Tensor, target: Tensor, _slot: int) -> None:
        target.copy_(source, non_blocking=True)

    def wait(self, _slot: int) -> None:
        pass

    def release(self, _slot: int) -> None:
        pass


def one_step(packed=False):
    """A loader of always the same step: two padded rows in each micro-batch, or two rows of two packed examples."""
    examples = support.examples([11, 9] * NUM_MICRO_BATCHES * (2 if packed else 1))
    batching = Batching(48, pad_id=0, packed="rows" if packed else None, row_tokens=24)
    each, parts = len(examples) // NUM_MICRO_BATCHES, []
    for start in range(0, len(examples), each):
        parts += micro_batches(examples[start : start + each], batching, ["a", "b"])
    assert len(parts) == NUM_MICRO_BATCHES
    assert all((part.input_ids.shape[0] == 2 and not part.attention_mask.all()) or packed for part in parts)
    step = Step(parts, sum(int(each.loss_mask.sum()) for each in examples), sum(map(len, examples)), len(examples))
    return SimpleNamespace(batching=batching, step=step, next_step=lambda: step, state_dict=dict)


def model_on(device, source, *, streamed=False, offload=False, **adapters):
    """NF4, DoRA of rank 4 in bf16, blocks that are recomputed."""
    options: dict[str, Any] = {"quant": "nf4", "compute_dtype": torch.float32, "device": device}
    options["placer"] = HostResidency(None, copies=CopiesNow) if streamed else None
    model = load_model(resolve(str(source)), **options)
    generator = torch.Generator().manual_seed(0)
    inject(model, **{"kind": "dora", "rank": 4, "dtype": torch.bfloat16, "generator": generator} | adapters)
    recompute_activations(model)
    if offload:
        offload_activations(model)
    return model


def train(model, loader, device, gpu=None, gates=None):
    """The metrics of each step, and what was asked of the false GPU in it."""
    torch.manual_seed(1)
    optimizer = AdapterOptimizer(adapter_parameters(model), name="adamw")
    found: list[tuple[Any, list[Event]]] = []
    recipe = recipe_from(
        {
            "model": {"source": "builtin"},
            "data": {"mix": [{"task": "demo/facts"}]},
            "adapter": {"kind": "dora"},
            "train": {"steps": NUM_STEPS, "batch": 16, "lr": 1e-2, "warmup": 0, "clip": 0.1, "optimizer": "adamw"},
        }
    )
    trainer = Trainer(recipe, RunDirectory(Path()), model, None, loader, NUM_STEPS, optimizer=optimizer)
    if gates is not None:
        trainer.gates = Gates(adapted_layers(model), gates, NUM_STEPS, seed=0)
    if gpu is not None:
        gpu.clear()
    model.train()
    for _ in range(NUM_STEPS):
        found.append((trainer.one_step(), list(gpu.events) if gpu is not None else []))
        if gpu is not None:
            gpu.clear()
    return found


def waits(events: list[Event]) -> Counter[str]:
    return Counter(event.line for event in events if event.kind == "wait")


def files(lines: Any) -> Counter[str]:
    return Counter(line.partition(":")[0] for line in lines)


CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "streamed": {"streamed": True},
    "packed": {"packed": True},
    "dropout": {"dropout": 0.25},
    "offload": {"offload": True},
    "lora": {"kind": "lora"},
    "gates": {"gates": GateConfig(mode="hard_concrete", mean_rank=2, warmup=0, anneal=2, shrink_every=1, lr=0.1)},
}
FAST = ("padded", "streamed")
NUMBERS = "train/passes.py: read = joined.tolist()"
# Of a micro-batch, beside the one of its inputs: the inputs of two blocks out and back.
MORE_COPIES = {"offload": 4}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES])
@on_false_gpu
def test_the_host_waits_once_in_a_step(gpu, source, case):
    options = dict(CASES[case])
    offload._LEAST_BYTES = 1  # in this process, which is the test's own
    loader, gates = one_step(options.pop("packed", False)), options.pop("gates", None)
    model = model_on(gpu.device, source, **options)
    gpu.clear()
    (_, first), (found, events) = train(model, loader, gpu.device, gpu, gates)
    wanted = Counter([NUMBERS, *["train/gates.py: gradient = torch.cat(parts).cpu().double()"] * bool(gates)])
    if gates is None:  # the form of the logits is learnt, and each layer asks once for its norm
        norms = {} if case == "lora" else {"adapter/algebra.py": len(adapted_layers(model))}
        assert files((waits(first) - wanted).elements()) == {"train/loss.py": 1} | norms
    assert waits(events) == wanted
    copies = [event.line for event in events if event.kind == "copy" and not event.line.endswith("tolist()")]
    if case not in ("streamed", "gates"):
        assert len(copies) == NUM_MICRO_BATCHES * (1 + MORE_COPIES.get(case, 0))
    if gates is None:
        assert sum(line.startswith("train/passes.py") for line in copies) == NUM_MICRO_BATCHES
    if case != "dropout":  # other positions are drawn for a GPU
        for name in ("streamed", "offload"):
            options.pop(name, None)
        _, (wanted, _) = train(model_on(CPU, source, **options), loader, CPU, gates=gates)
        assert found.get("gates") == wanted.get("gates")
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-3)


@on_false_gpu
def test_masks_and_routings_make_the_host_wait_for_nothing_and_norms_of_a_divided_base_once(gpu):
    """The masked norm, forward and backward pass, each in two blocks of rows."""
    layer = make(out=2048, rank=4, masked=True, dtype=torch.float32, quant="nf4 nested").to(gpu.device)
    x = torch.randn(8, 64).to(gpu.device).requires_grad_()
    layer(x).sum().backward()  # the table of NF4 goes to a device once
    layer.parameters_changed()
    gpu.clear()
    layer(x).sum().backward()
    assert gpu.lines("wait") == []

    gpu.clear()
    ExpertTokens((7, 0, 9)).on(gpu.device)
    assert (gpu.count("copy"), gpu.count("wait")) == (1, 0)

    for removed in (False, True):  # the adapter of one layer has nearly removed a row, whose norm is then measured
        layers = [make(quant="nf4", dtype=torch.float32, seed=seed) for seed in (0, 1)]
        if removed:
            with torch.no_grad():
                layers[1].lora_A[0] = layers[1].base.dequantized()[3]
                layers[1].lora_B[3] = torch.eye(layers[1].rank)[0] * (-0.99 / layers[1].scaling)
        wanted = [layer.gain(torch.float32).value for layer in layers]
        for layer in layers:
            layer.to(gpu.device)(torch.zeros(1, 64).to(gpu.device))
            layer.parameters_changed()
            (layer.base.share,) = shares(layer.base.stored_weight, 1)
        gpu.clear()
        with patch.object(norms, "gather_runs", lambda parts, _lengths, _group: list(parts)):
            assert refresh(layers) == len(layers)
        assert files(gpu.lines("wait")) == {"adapter/norms.py": 1} | ({"adapter/algebra.py": 1} if removed else {})
        for layer, each in zip(layers, wanted, strict=True):
            torch.testing.assert_close(layer.gain(torch.float32).value.cpu(), each)


@on_false_gpu
def test_a_batch_of_short_texts_takes_tiles_and_a_single_token_the_fused_product(gpu, source):
    model = model_on(gpu.device, source).eval()
    gpu.clear()
    with gpu.phase("evaluate"):
        score_spans(model, [Span((1, 2, 3, 4), 1), Span((5, 6, 7), 1)])
    assert not any(line.startswith("transformers/") for line in gpu.lines("wait", "evaluate"))
    with gpu.phase("generate"):
        decode_greedily(model, [[1, 2, 3]], max_new_tokens=4, stop_ids=())
    assert gpu.count("wait", "generate") >= 4  # each token is read
    assert {event.phase for event in gpu.events if event.operation == "gemm_4bit"} == {"generate"}


@pytest.mark.slow
@on_false_gpu
def test_a_step_with_a_wrong_norm_is_computed_again(gpu, source):
    """A row that its adapter has nearly removed: its factored norm is rounding noise."""
    found: list[Any] = []
    for later in (True, False):
        model, step = model_on(gpu.device, source, dropout=0.25), one_step().step
        step_gradient(model, step)  # learns what the first step has to ask
        model.zero_grad()
        layer = next(iter(adapted_layers(model).values()))
        with torch.no_grad():
            layer.lora_A[0] = layer.base.dequantized()[3].to(layer.lora_A.dtype)
            layer.lora_B[3] = torch.tensor([-0.99 / layer.scaling, 0.0, 0.0, 0.0], device=gpu.device)
        torch.manual_seed(5)
        gpu.clear()
        with nullcontext() if later else patch.object(passes, "norms_checked_later", lambda _later: nullcontext()):
            numbers, _ = step_gradient(model, step)
        lines = waits(list(gpu.events))
        assert lines.pop(NUMBERS) == (2 if later else 1)
        assert all(line.startswith(("adapter/norms.py: answers", "adapter/algebra.py")) for line in lines)
        gain: Any = layer.gain(torch.float32)
        found.append((numbers, [gain.value, *(each.grad for each in adapter_parameters(model).values())]))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)
