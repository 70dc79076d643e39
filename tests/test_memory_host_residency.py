"""Blocks in host memory: copied into slots just in time, as late and as destructively as a real copy could be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from qdora.errors import RunFailure, UserError
from qdora.export.nf4_lora import export_nf4_lora
from qdora.memory import host_residency
from qdora.memory.host_residency import CudaCopies, HostResidency, pinned_bytes
from qdora.model.inject import adapter_parameters, frozen_layers
from qdora.model.load import load_model
from qdora.model.packed_base import BaseCache
from qdora.model.source import resolve
from qdora.train.interference import measure
from tests import tiny, tiny_experts, tiny_streamed
from tests.fake_cuda import FakeCuda
from tests.test_train_interference import probe_of


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
        tiny.move_all_parameters_(model.train(), scale=0.02)  # as a step does
        probe, _ = probe_of(model)
        reports.append(measure(model, probe, adapter_parameters(model), device=tiny_streamed.CPU))
    for key in ("cosines", "norms", "groups"):
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


def test_too_little_host_memory_is_one_line(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"base\.residency: host: 5 blocks need 0\.0 GiB .* 0\.0 GiB are free for this process"
    ) as caught:
        on_host(source, free_bytes=lambda: 1000)
    assert len(caught.value.faults) == 1
    real = torch.empty

    def refused(*args: Any, **kwargs: Any) -> Tensor:
        if "pin_memory" in kwargs:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return real(*args, **kwargs)

    monkeypatch.setattr(host_residency.torch, "empty", refused)
    with pytest.raises(UserError, match=r"the system refuses them \(CUDA error: out of memory\)\. Fix: lower"):
        on_host(source, free_bytes=lambda: None)


def test_what_an_earlier_model_had_pinned_is_given_back_before_memory_is_counted(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(host_residency, "_release_pinned", lambda device: events.append(f"released on {device}"))
    on_host(source, free_bytes=lambda: events.append("counted"))
    assert events == ["released on cpu", "counted"]
    monkeypatch.undo()
    released: list[str] = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: released.append("public"), raising=False)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: released.append("private"), raising=False)
    host_residency._release_pinned(torch.device("cpu"))
    host_residency._release_pinned(torch.device("cuda"))
    monkeypatch.delattr(torch.accelerator, "empty_host_cache")
    host_residency._release_pinned(torch.device("cuda"))
    assert released == ["public", "private"]


@pytest.mark.parametrize(("asked", "taken"), [(0, 0), (1, 1), (4096, 4096), (4097, 8192), (440_000_000, 2**29)])
def test_pinned_memory_is_counted_as_torch_takes_it(asked: int, taken: int) -> None:
    assert pinned_bytes(asked) == taken


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
