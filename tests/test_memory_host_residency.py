"""Blocks in host memory: copied into slots just in time, as late and as destructively as a real copy could be."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from qdora.errors import RunFailure, UserError
from qdora.export.export_run import export_run
from qdora.export.nf4_lora import export_nf4_lora
from qdora.export.options import ExportOptions
from qdora.files import environment
from qdora.memory import host_residency
from qdora.memory.host_residency import CudaCopies, HostResidency, Piece
from qdora.model.inject import adapter_parameters, frozen_layers
from qdora.model.load import Quantization, load_model
from qdora.model.packed_base import BaseCache
from qdora.model.source import resolve
from qdora.ops.packed import empty_packed
from qdora.plan.fake_step import empty_model
from qdora.plan.memory_plan import streamed_blocks
from qdora.plan.public_shapes import public_shapes
from qdora.run import load_base, prepare
from qdora.run.evaluate import evaluate_target
from qdora.run.interference import measure
from qdora.run.train import train_run
from tests import tiny, tiny_experts, tiny_run, tiny_streamed
from tests.fake_cuda import FakeCuda, FakeCudart, is_mapped
from tests.run_files import assert_same_run
from tests.test_train_interference import halves_of_examples


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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_streamed.write_source(tmp_path_factory.mktemp("source"))


def on_host(source: Path, num_streamed: int | None = None, **settings: Any) -> tuple[PreTrainedModel, HostResidency]:
    residency = HostResidency(num_streamed, copies=LateCopies, **settings)
    model = load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.float32, placer=residency)
    return model, residency


@pytest.mark.parametrize("kind", ["dora", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_streamed", [None, 1, 2, 3])
def test_gradients_and_logits_are_those_of_a_resident_base(source: Path, kind: str, num_streamed: int | None) -> None:
    expected = tiny_streamed.of_resident_base(source, kind)
    model, _ = on_host(source, num_streamed)
    assert sum(layer.residency is not None for layer in frozen_layers(model).values()) == 7 * (num_streamed or 5)
    tiny_streamed.assert_equal(tiny_streamed.gradients(tiny_streamed.adapt(model, kind)), expected)


@pytest.mark.parametrize(
    "num_streamed, kind",
    [
        (None, "lora"),
        (2, "dora"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(None, "dora"), (2, "lora")]),
    ],
)
@pytest.mark.parametrize(
    "targets",
    [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj"), ("down_proj",)],
)
def test_layers_without_an_adapter_read_their_own_block_in_the_backward_pass(
    source: Path, targets: tuple[str, ...], num_streamed: int | None, kind: str
) -> None:
    expected = tiny_streamed.of_resident_base(source, kind, targets)
    model, _ = on_host(source, num_streamed)
    tiny_streamed.assert_equal(tiny_streamed.gradients(tiny_streamed.adapt(model, kind, list(targets))), expected)


def test_a_whole_run_is_that_of_a_resident_base(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is evaluated and exported without a GPU: all on the device."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stream_on_cpu(patch)
        train_run(tiny_run.recipe(root, base__residency="host"), run)
    assert_same_run(run, whole)
    ours, theirs = (evaluate_target(str(each))["evaluation"]["tasks"] for each in (run, whole))
    assert ours == theirs
    for each in (run, whole):
        export_run(each, tmp_path / f"{each.name}-merged", ExportOptions(dtype="float32"))
    files = [tmp_path / f"{each.name}-merged/model.safetensors" for each in (run, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_several_steps_and_evaluations_in_between(source: Path) -> None:
    models = [tiny_streamed.adapt(tiny_streamed.resident(source)), tiny_streamed.adapt(on_host(source)[0])]
    for _ in range(2):
        resident, streamed = (tiny_streamed.gradients(model) for model in models)
        tiny_streamed.assert_equal(streamed, resident)
        for model in models:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
            with torch.inference_mode():
                model(input_ids=tiny_streamed.IDS[1])
    said = [model.generate(tiny_streamed.IDS[0], max_new_tokens=6, do_sample=False) for model in models]
    assert torch.equal(*said)


def test_tasks_gradients_are_those_of_a_resident_base(source: Path) -> None:
    reports = []
    for model in (tiny_streamed.resident(source), on_host(source)[0]):
        tiny_streamed.gradients(tiny_streamed.adapt(model))
        model.zero_grad()
        tiny.move_all_parameters_(model, scale=0.02)  # as a step does
        halves, _ = halves_of_examples()
        reports.append(measure(model, halves, adapter_parameters(model), device=tiny_streamed.CPU))
    for key in ("cosines", "norms"):
        assert reports[1][key] == reports[0][key]


def test_every_weight_is_read_from_its_slot_outside_of_a_pass_too(source: Path) -> None:
    expected = frozen_layers(tiny_streamed.resident(source))
    found = frozen_layers(on_host(source)[0])
    assert len(found) == len(expected) == 35
    for name in reversed(expected):
        assert torch.equal(found[name].dequantized(), expected[name].dequantized()), name


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_the_4_bit_export_writes_each_block_where_it_belongs(tmp_path: Path, kind: str) -> None:
    whole_blocks = tiny_streamed.write_source(tmp_path / "source", intermediate_size=128)
    models = {"expected": tiny_streamed.resident(whole_blocks), "found": on_host(whole_blocks)[0]}
    for name, model in models.items():
        export_nf4_lora(tiny_streamed.adapt(model, kind).eval(), None, tmp_path / name)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, found = (load_file(tmp_path / name / file) for name in models)
        tiny_streamed.assert_equal(found, expected)


def test_from_a_cached_base(source: Path, tmp_path: Path) -> None:
    expected = frozen_layers(tiny_streamed.resident(source))
    for _ in range(2):
        model = load_model(
            resolve(str(source)),
            quant="nf4",
            compute_dtype=torch.float32,
            reader=BaseCache(tmp_path, tiny_streamed.WANTED, tiny_streamed.CPU),
            placer=HostResidency(2, copies=LateCopies),
        )
        for name, layer in frozen_layers(model).items():
            assert torch.equal(layer.dequantized(), expected[name].dequantized()), name


def test_casting_the_model_leaves_what_comes_and_goes(source: Path) -> None:
    model, _ = on_host(source)
    before = {name: layer.dequantized() for name, layer in frozen_layers(model).items()}
    model.to(torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    for name, layer in frozen_layers(model).items():
        assert torch.equal(layer.dequantized(), before[name]), name


def test_gradients_without_checkpointing_are_refused(source: Path) -> None:
    model, _ = on_host(source)
    tiny_streamed.adapt(model)
    model.eval()
    with pytest.raises(RunFailure, match="gradients without checkpointing"):
        model(input_ids=tiny_streamed.IDS[0])
    with torch.no_grad():
        model(input_ids=tiny_streamed.IDS[0])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"base__residency": "disk"}, "base.residency"),
        ({"base__residency": "host", "base__quant": "none"}, "base.residency: must be device with quant none"),
        (
            {"base__residency": "host", "base__prune": {"method": "magnitude", "sparsity": 0.5}},
            "base.residency: must be device with a pruned base",
        ),
        ({"base__residency": "host", "memory__checkpointing": False}, "memory.checkpointing: must be true"),
        ({"base__streamed_blocks": 1}, "base.streamed_blocks: would be ignored"),
    ],
)
def test_settings_that_do_not_go_together(root: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_run.recipe(root, **changes)
    assert any(each.startswith(f"recipe: {fault}") for each in caught.value.faults), caught.value.faults


def test_too_little_host_memory_is_one_line(source: Path) -> None:
    with pytest.raises(
        UserError, match=r"base\.residency: host: 5 blocks need 0\.0 GiB .* 0\.0 GiB are free for this process"
    ) as caught:
        on_host(source, free_bytes=lambda: 1000)
    assert len(caught.value.faults) == 1


def pieces_of(*weights: tuple[int, int], num_blocks: int) -> list[Piece]:
    pieces = [Piece() for _ in range(num_blocks)]
    for piece in pieces:
        for number, shape in enumerate(weights):
            piece.add(str(number), empty_packed("nf4", shape, 64, True, "meta"))
    return pieces


def test_a_base_beyond_the_limit_of_a_container_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has 64 GiB, the container 4, of which 1 is used; three blocks of 1.06 GiB each."""
    texts = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/./memory.max": str(4 << 30)}
    texts["/sys/fs/cgroup/./memory.current"] = str(1 << 30)
    monkeypatch.setattr(environment, "_system_text", lambda path: texts.get(path, ""))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 << 30, available=60 << 30))
    pieces = pieces_of((1 << 17, 1 << 14), num_blocks=3)
    monkeypatch.setattr(host_residency, "_pieces", lambda *_: pieces)
    monkeypatch.setattr(host_residency, "iterate_quantized", lambda *_: pytest.fail("the base is read"))
    with pytest.raises(UserError, match=r"3 blocks need 3\.1 GiB .* 3\.0 GiB are free"):
        on_host(source)


def test_a_refusal_of_the_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeCudart(most=1 << 20).put_in(monkeypatch)

    def reported_again(*_: Any, **__: Any) -> None:
        driver.log.append("a kernel")
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", reported_again)
    with pytest.raises(UserError, match=r"the system refuses them \(out of memory \(2\)\)\. Fix: lower"):
        host_residency._pin(pieces_of((2048, 2048), num_blocks=1), torch.device("cuda"), 1 << 40, 0)
    assert driver.log == ["a kernel"]


def test_memory_is_locked_as_long_as_a_view_of_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeCudart().put_in(monkeypatch)
    pieces = pieces_of((64, 64), (64, 128), num_blocks=2)
    size = sum(piece.num_bytes for piece in pieces)
    host_residency._pin(pieces, torch.device("cuda"), size, 0)
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


# Width, inner width, width of the queries, of keys and values, number of blocks
SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 14336, 4096, 1024, 32),
    "meta-llama/Llama-2-13b-hf": (5120, 13824, 5120, 5120, 40),
    "mistralai/Mistral-Small-24B-Instruct-2501": (5120, 32768, 4096, 1024, 40),
    "Qwen/Qwen2.5-32B-Instruct": (5120, 27648, 5120, 1024, 64),
    "meta-llama/Llama-3.3-70B-Instruct": (8192, 28672, 8192, 1024, 80),
}


@pytest.mark.parametrize("name", SHAPES)
def test_pinned_memory_is_as_large_as_the_packed_base(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own pinned memory, in powers of two, is up to 1.9 times as large. No page of it is touched here."""
    driver = FakeCudart().put_in(monkeypatch)
    monkeypatch.setattr(mmap, "MAP_PRIVATE", mmap.MAP_PRIVATE | 0x4000)  # MAP_NORESERVE: more than the machine has
    width, inner, queries, keys, num_blocks = SHAPES[name]
    weights = [(queries, width), (keys, width), (keys, width), (width, queries)]
    weights += [(inner, width), (inner, width), (width, inner)]
    pieces = pieces_of(*weights, num_blocks=num_blocks)
    host_residency._pin(pieces, torch.device("cuda"), 1 << 40, 0)
    # Half a byte a weight, a byte for 64 of them, and a float32 for 256 of those
    num_weights = num_blocks * sum(rows * columns for rows, columns in weights)
    packed = num_weights // 2 + num_weights // 64 + num_weights // 64 // 64
    assert packed <= sum(driver.locked.values()) <= 1.01 * packed
    model = empty_model(public_shapes()[name].config(), tiny.source(), torch.bfloat16, "sdpa")
    planned = streamed_blocks(model, Quantization("nf4", 64, True, ("lm_head",)), None)
    assert planned.host_bytes == sum(driver.locked.values())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("num_streamed", [None, 1])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
def test_stacks_of_experts_come_and_go(tmp_path: Path, name: str, num_streamed: int | None, targets: Any) -> None:
    source = tiny_experts.write(tmp_path, name)
    expected = tiny_streamed.gradients(tiny_streamed.adapt(tiny_streamed.resident(source), targets=targets))
    model, _ = on_host(source, num_streamed)
    streamed = [path for path, layer in frozen_layers(model).items() if layer.residency is not None]
    assert sum("experts" in path for path in streamed) == 2 * (num_streamed or 2)
    tiny_streamed.assert_equal(tiny_streamed.gradients(tiny_streamed.adapt(model, targets=targets)), expected)


def test_a_slot_is_filled_after_its_release_and_read_after_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = FakeCuda(monkeypatch), torch.device("cpu")
    slots = [torch.zeros(4), torch.zeros(4)]
    copies, side = CudaCopies(cpu, slots), "stream 0"
    log = cuda.read()
    released = [event for stream, _, event in log if stream == "main"]
    assert len(set(released)) == 2
    for_a_slot = [[("main", "records", event), (side, "uses the memory", "")] for event in released]
    assert log == for_a_slot[0] + for_a_slot[1]
    copied = []
    for slot in (1, 0):
        copies.begin(torch.ones(4), slots[slot], slot)
        log = cuda.read()
        copied.append(log[-1][2])
        assert log == [
            (side, "waits for", released[slot]),
            (side, "copies", ""),
            (side, "records", copied[-1]),
        ]
        copies.wait(slot)
        assert cuda.read() == [("main", "waits for", copied[-1])]
        copies.release(slot)
        assert cuda.read() == [("main", "records", released[slot])]
    assert len({*released, *copied}) == 4
    assert all(bool(slot.all()) for slot in slots)
