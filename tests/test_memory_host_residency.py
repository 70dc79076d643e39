"""Host memory: frozen weights copied into slots as late as they may be, and checkpoints."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from qdora.data.batches import Batching
from qdora.errors import RunFailure
from qdora.export.checkpoints import export_nf4_lora
from qdora.export.export import export_run
from qdora.memory import stream
from qdora.memory.oom import keep_freed_memory, return_freed_memory
from qdora.memory.stream import NUM_SLOTS, CudaCopies, HostResidency, Piece, Ring, interleaved, offload_activations
from qdora.model.inject import adapter_parameters, frozen_layers
from qdora.model.load import Quantization, load_model
from qdora.model.source import resolve
from qdora.model.store import BaseCache
from qdora.plan.fake_step import empty_model
from qdora.plan.plan import public_shapes, streamed_blocks
from qdora.quant.packed import empty_packed
from qdora.recipe.options import ExportOptions
from qdora.run.run import train_run
from qdora.run.verbs import evaluate_target
from qdora.train.logs import measure
from tests import support
from tests.false_gpu import FakeCuda, FakeCudart, is_mapped
from tests.support import LateCopies, assert_same_run, stream_on_cpu

ALL = "all-linear"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_source(tmp_path_factory.mktemp("source"))


def on_host(source: Path, num_streamed: int | None = None, free_bytes: Any = None, **options: Any) -> PreTrainedModel:
    given = {} if free_bytes is None else {"free_bytes": free_bytes}
    residency = HostResidency(num_streamed, copies=LateCopies, **given)
    resolved = resolve(str(source))
    options = {"quant": "nf4", "compute_dtype": torch.float32} | options
    return load_model(resolved, placer=residency, **options)


class Slots:
    """Copies that know what lies where, and who may still read it. A block's piece holds its number."""

    def __init__(self) -> None:
        self.held: list[int | None] = [None] * NUM_SLOTS
        self.reading: int | None = None
        self.started: list[int] = []

    def begin(self, source: Tensor, target: Tensor, slot: int) -> None:
        block = int(source)
        assert slot != self.reading
        assert block not in self.held
        self.held[slot] = block
        self.started.append(block)

    def wait(self, slot: int) -> None:
        assert self.reading is None
        self.reading = slot

    def release(self, slot: int) -> None:
        assert self.reading == slot
        self.reading = None


def ring_of(num_blocks: int, copies: Any) -> Ring:
    pieces = [Piece(host=torch.tensor(number)) for number in range(num_blocks)]
    return Ring(pieces, [torch.empty(0)] * NUM_SLOTS, copies)


@given(
    num_blocks=st.integers(1, 9),
    uses=st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=40),
)
def test_the_block_in_use_is_in_its_slot_whatever_the_order(num_blocks: int, uses: list[tuple[int, bool]]) -> None:
    copies = Slots()
    ring = ring_of(num_blocks, copies)
    for block, turns_back in uses:
        ring.enter(block % num_blocks, turns_back=turns_back)
        slot = block % num_blocks % NUM_SLOTS
        assert copies.held[slot] == block % num_blocks
        assert copies.reading == slot
    assert set(copies.started) <= set(range(num_blocks))


@pytest.mark.parametrize("backward", [True, False])
def test_what_comes_next_has_been_started_before_it_is_used(backward: bool) -> None:
    num_blocks = 12  # a multiple of the slots, or the first block of the next pass has to wait for the last of this one
    copies, order = Slots(), list(range(num_blocks))
    ring = ring_of(num_blocks, copies)
    ring.enter(0, turns_back=backward)
    for block in 3 * (order + order[::-1] if backward else order):
        assert block in copies.held
        ring.enter(block, turns_back=backward)
    # Around a turn the slots hold what comes next already.
    per_pass = num_blocks - NUM_SLOTS if backward else num_blocks
    assert len(copies.started) <= (6 if backward else 3) * per_pass + 2 * NUM_SLOTS


@given(num_blocks=st.integers(1, 200), share=st.floats(0, 1))
def test_interleaved_blocks_are_spread_evenly(num_blocks: int, share: float) -> None:
    count = round(share * num_blocks)
    chosen = interleaved(num_blocks, count)
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen)
    assert all(0 <= each < num_blocks for each in chosen)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    if count:
        # As much room before the first as behind the last, to a block.
        assert abs(chosen[0] - (num_blocks - 1 - chosen[-1])) <= 1 or num_blocks % count


def test_a_slot_is_filled_after_its_release_and_read_after_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, side = FakeCuda(monkeypatch), "stream 0"
    slots = [torch.zeros(4), torch.zeros(4)]
    copies = CudaCopies(torch.device("cpu"), slots)
    log = cuda.read()
    released = [event for stream, _, event in log if stream == "main"]
    assert log == [each for event in released for each in (("main", "records", event), (side, "uses the memory", ""))]
    copied = []
    for slot in (1, 0):
        copies.begin(torch.ones(4), slots[slot], slot)
        log = cuda.read()
        copied.append(log[-1][2])
        assert log == [(side, "waits for", released[slot]), (side, "copies", ""), (side, "records", copied[-1])]
        copies.wait(slot)
        copies.release(slot)
        assert cuda.read() == [("main", "waits for", copied[-1]), ("main", "records", released[slot])]
    assert len({*released, *copied}) == 4
    assert all(bool(slot.all()) for slot in slots)


@pytest.mark.parametrize(
    "num_streamed, kind, targets",
    [
        (None, "dora", ALL),
        (1, "dora", ALL),
        (2, "lora", ("q_proj", "v_proj")),  # layers without an adapter read their own block in the backward pass
        (3, "dora", ("gate_proj", "up_proj")),
        (None, "lora", ("down_proj",)),
    ],
    ids=str,
)
def test_gradients_are_those_of_a_resident_base(
    source: Path, num_streamed: int | None, kind: str, targets: Any
) -> None:
    expected = support.of_resident_base(source, kind, targets)
    model = on_host(source, num_streamed)
    assert sum(layer.residency is not None for layer in frozen_layers(model).values()) == 7 * (num_streamed or 5)
    given = targets if targets == ALL else list(targets)
    support.assert_equal_tensors(support.streamed_gradients(support.adapt_streamed(model, kind, given)), expected)
    model.eval()  # without checkpointing
    with pytest.raises(RunFailure, match="gradients without checkpointing"):
        model(input_ids=support.STREAMED_IDS[0])
    with torch.no_grad():
        model(input_ids=support.STREAMED_IDS[0])


@pytest.mark.parametrize(
    "name, num_streamed, targets",
    [("qwen3_moe", None, ["q_proj"]), ("qwen3_moe", 1, ALL), ("gpt_oss", None, ALL), ("gpt_oss", 1, ["q_proj"])],
    ids=str,
)
def test_stacks_of_experts_come_and_go(tmp_path: Path, name: str, num_streamed: int | None, targets: Any) -> None:
    source = support.write_mixture(tmp_path, name)
    expected = support.streamed_gradients(support.adapt_streamed(support.resident_model(source), targets=targets))
    model = on_host(source, num_streamed)
    streamed = [path for path, layer in frozen_layers(model).items() if layer.residency is not None]
    assert sum("experts" in path for path in streamed) == 2 * (num_streamed or 2)
    support.assert_equal_tensors(support.streamed_gradients(support.adapt_streamed(model, targets=targets)), expected)


def test_a_run_is_that_of_a_resident_base(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is evaluated and exported without a GPU: all on the device."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stream_on_cpu(patch)
        train_run(support.tiny_recipe(root, base__residency="host"), run)
    assert_same_run(run, whole)
    ours, theirs = (evaluate_target(str(each))["evaluation"]["tasks"] for each in (run, whole))
    assert ours == theirs
    for each in (run, whole):
        export_run(each, tmp_path / f"{each.name}-merged", ExportOptions(dtype="float32"))
    files = [tmp_path / f"{each.name}-merged/model.safetensors" for each in (run, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_several_steps_evaluations_in_between_and_cosines_of_tasks(source: Path) -> None:
    models = [support.adapt_streamed(support.resident_model(source)), support.adapt_streamed(on_host(source))]
    for _ in range(2):
        resident, streamed = (support.streamed_gradients(model) for model in models)
        support.assert_equal_tensors(streamed, resident)
        for model in models:
            for parameter in adapter_parameters(model).values():
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
            with torch.inference_mode():
                model(input_ids=support.STREAMED_IDS[1])
    said = [model.generate(support.STREAMED_IDS[0], max_new_tokens=6, do_sample=False) for model in models]
    assert torch.equal(*said)
    examples = {"one": support.examples(), "two": support.examples()[1:]}
    reports = [measure(model, examples, Batching(40, 0), adapter_parameters(model)) for model in models]
    assert all(reports[1][key] == reports[0][key] for key in ("cosines", "norms"))


@pytest.mark.parametrize("quant", ["nf4", "nf3"])
def test_every_weight_is_read_from_its_slot_outside_of_a_pass_too(source: Path, tmp_path: Path, quant: Any) -> None:
    """Also from a cached base, and after the rest of the model was cast."""
    expected = frozen_layers(support.resident_model(source, quant))
    cache = BaseCache(tmp_path, replace(support.STREAMED_QUANTIZATION, kind=quant), support.CPU)
    models = [on_host(source, quant=quant), *(on_host(source, 2, reader=cache, quant=quant) for _ in range(2))]
    models[0].to(torch.bfloat16)
    assert models[0].get_input_embeddings().weight.dtype == torch.bfloat16
    for model in models:
        found = frozen_layers(model)
        assert len(found) == len(expected) == 35
        for name in reversed(expected):
            assert torch.equal(found[name].dequantized(), expected[name].dequantized()), name


def test_the_4_bit_export_writes_each_block_where_it_belongs(tmp_path: Path) -> None:
    whole_blocks = support.write_source(tmp_path / "source", intermediate_size=128)
    for name, model in (("expected", support.resident_model(whole_blocks)), ("found", on_host(whole_blocks))):
        export_nf4_lora(support.adapt_streamed(model).eval(), None, tmp_path / name)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, found = (load_file(tmp_path / name / file) for name in ("expected", "found"))
        support.assert_equal_tensors(found, expected)


def pieces_of(*weights: tuple[int, int], num_blocks: int) -> list[Piece]:
    pieces = [Piece() for _ in range(num_blocks)]
    for piece in pieces:
        for number, shape in enumerate(weights):
            piece.add(str(number), empty_packed("nf4", shape, 64, True, "meta"))
    return pieces


def test_too_little_host_memory_is_one_line(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read; and where the driver refuses, its answer, which CUDA repeats to the next kernel."""
    with pytest.raises(RunFailure, match=r"base\.streamed_blocks: .* are needed, and 0\.00 GiB are free"):
        on_host(source, free_bytes=lambda: 1000)
    driver = FakeCudart(most=1 << 20).put_in(monkeypatch)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=torch.AcceleratorError("CUDA error: out of memory")))
    with pytest.raises(RunFailure, match=r"which the system refuses \(out of memory \(2\)\)\.$"):
        stream._pin(pieces_of((2048, 2048), num_blocks=1), torch.device("cuda"), 1 << 40)
    assert driver.log == []


def test_memory_is_locked_as_long_as_a_view_of_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeCudart().put_in(monkeypatch)
    pieces = pieces_of((64, 64), (64, 128), num_blocks=2)
    size = sum(piece.num_bytes for piece in pieces)
    stream._pin(pieces, torch.device("cuda"), size)
    assert list(driver.locked.values()) == [size]
    (address,) = driver.locked
    view = pieces[1].tensors(pieces[1].host, "1")["packed"]
    assert address < view.data_ptr() < address + size
    view.fill_(3)
    pieces.clear()
    assert driver.log == ["locks"]
    del view
    assert driver.log == ["locks", "waits", "unlocks"]
    assert not is_mapped(address)


def test_pinned_memory_is_as_large_as_the_packed_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own pinned memory, in powers of two, is up to 1.9 times as large. No page of it is touched here."""
    driver = FakeCudart().put_in(monkeypatch)
    monkeypatch.setattr(mmap, "MAP_PRIVATE", mmap.MAP_PRIVATE | 0x4000)  # MAP_NORESERVE: more than the machine has
    weights = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    pieces = pieces_of(*weights, num_blocks=32)
    stream._pin(pieces, torch.device("cuda"), 1 << 40)
    # Half a byte a weight, a byte for 64 of them, and a float32 for 256 of those
    num_weights = 32 * sum(rows * columns for rows, columns in weights)
    packed = num_weights // 2 + num_weights // 64 + num_weights // 64 // 64
    assert packed <= sum(driver.locked.values()) <= 1.01 * packed
    config = public_shapes()["meta-llama/Llama-3.1-8B-Instruct"].config()
    model = empty_model(config, support.config_source(), torch.bfloat16, "sdpa")
    planned = streamed_blocks(model, Quantization("nf4", 64, True, ("lm_head",)), None)
    assert planned.host_bytes == sum(driver.locked.values())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_LEAST_BYTES", 16)


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_are_the_same(source: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the inputs of all blocks but the last on the host; none is sent in an evaluation."""
    expected = support.streamed_gradients(support.adapt_streamed(support.resident_model(source)))
    placer = HostResidency(copies=LateCopies) if streamed else None
    model = load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.float32, placer=placer)
    sent, to_host = list[bool](), stream._to_host

    def seen(tensor: Tensor) -> tuple[torch.device, Tensor]:
        device, held = to_host(tensor)
        sent.append(held.data_ptr() != tensor.data_ptr())
        return device, held

    monkeypatch.setattr(stream, "_to_host", seen)
    offload_activations(support.adapt_streamed(model))
    support.assert_equal_tensors(support.streamed_gradients(model), expected)
    assert sum(sent) == 3 * 4


def test_freed_memory_is_kept_and_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """In malloc.h M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1."""
    calls: list[tuple[int, ...]] = []
    options = {name: lambda *given: calls.append(given) or 1 for name in ("mallopt", "malloc_trim")}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(**options))
    keep_freed_memory()
    return_freed_memory()
    assert calls == [(-3, 1 << 30), (-1, 1 << 30), (0,)]
