"""Frozen weights in host memory: blocks copied into slots as late as a real copy could be, and the input embedding."""

from __future__ import annotations

import itertools
import mmap
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qdora.adapter.host_embedding import HostEmbedding
from qdora.data.batching import Batching
from qdora.errors import RunFailure, UserError
from qdora.export.export_run import export_run
from qdora.export.logit_comparison import float32_arithmetic
from qdora.export.nf4_lora import export_nf4_lora
from qdora.export.options import ExportOptions
from qdora.memory import host_residency
from qdora.memory.host_residency import CudaCopies, HostResidency, Piece, check_host_embedding, keep_embedding_on_host
from qdora.memory.streaming import NUM_SLOTS, Ring, interleaved
from qdora.model.inject import adapter_parameters, frozen_layers
from qdora.model.load import Quantization, load_model
from qdora.model.packed_base import BaseCache
from qdora.model.source import resolve
from qdora.plan.fake_step import empty_model
from qdora.plan.memory_plan import plan, streamed_blocks
from qdora.plan.plan_contents import DENSE, Plan
from qdora.plan.public_shapes import public_shapes
from qdora.plan.step_time import ASSUMED
from qdora.quant.packed import empty_packed
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.run import base as load_base
from qdora.run.evaluate import evaluate_target
from qdora.run.run import train_run
from qdora.train.interference import measure
from tests import support
from tests.false_gpu import FakeCuda, FakeCudart, is_mapped
from tests.support import CHECKPOINT_SIZES, LateCopies, assert_same_run, stream_on_cpu

ALL = "all-linear"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_source(tmp_path_factory.mktemp("source"))


def on_host(source: Path, num_streamed: int | None = None, reader: Any = None, **settings: Any) -> PreTrainedModel:
    residency = HostResidency(num_streamed, copies=LateCopies, **settings)
    options: dict[str, Any] = {} if reader is None else {"reader": reader}
    resolved = resolve(str(source))
    return load_model(resolved, quant="nf4", compute_dtype=torch.float32, placer=residency, **options)


class Slots:
    """An engine that knows what lies where, and who may still read it."""

    def __init__(self) -> None:
        self.held: list[int | None] = [None] * NUM_SLOTS
        self.reading: int | None = None
        self.started: list[int] = []

    def start(self, block: int, slot: int, previous: int | None) -> None:
        assert slot != self.reading
        assert self.held[slot] == previous
        assert block not in self.held
        self.held[slot] = block
        self.started.append(block)

    def wait(self, slot: int) -> None:
        assert self.reading is None
        self.reading = slot

    def release(self, slot: int) -> None:
        assert self.reading == slot
        self.reading = None


@given(
    num_blocks=st.integers(1, 9),
    uses=st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=40),
)
def test_the_block_in_use_is_in_its_slot_whatever_the_order(num_blocks: int, uses: list[tuple[int, bool]]) -> None:
    engine = Slots()
    ring = Ring(num_blocks, engine)
    for block, turns_back in uses:
        ring.use(block % num_blocks, turns_back=turns_back)
        slot = ring.slot_of(block % num_blocks)
        assert engine.held[slot] == block % num_blocks
        assert engine.reading == slot
    assert set(engine.started) <= set(range(num_blocks))


@pytest.mark.parametrize("backward", [True, False])
def test_what_comes_next_has_been_started_before_it_is_used(backward: bool) -> None:
    num_blocks = 12  # a multiple of the slots, or the first block of the next pass has to wait for the last of this one
    engine, order = Slots(), list(range(num_blocks))
    ring = Ring(num_blocks, engine)
    ring.use(0, turns_back=backward)
    for block in 3 * (order + order[::-1] if backward else order):
        assert block in engine.held
        ring.use(block, turns_back=backward)
    # Around a turn the slots hold what comes next already.
    per_pass = num_blocks - NUM_SLOTS if backward else num_blocks
    assert len(engine.started) <= (6 if backward else 3) * per_pass + 2 * NUM_SLOTS


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
    with pytest.raises(ValueError, match=f"must be 0 to {num_blocks}, got {num_blocks + 1}"):
        interleaved(num_blocks, num_blocks + 1)


def test_a_slot_is_filled_after_its_release_and_read_after_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = FakeCuda(monkeypatch), torch.device("cpu")
    slots = [torch.zeros(4), torch.zeros(4)]
    copies, side = CudaCopies(cpu, slots), "stream 0"
    log = cuda.read()
    released = [event for stream, _, event in log if stream == "main"]
    for_a_slot = [[("main", "records", event), (side, "uses the memory", "")] for event in released]
    assert log == for_a_slot[0] + for_a_slot[1]
    copied = []
    for slot in (1, 0):
        copies.begin(torch.ones(4), slots[slot], slot)
        log = cuda.read()
        copied.append(log[-1][2])
        assert log == [(side, "waits for", released[slot]), (side, "copies", ""), (side, "records", copied[-1])]
        copies.wait(slot)
        assert cuda.read() == [("main", "waits for", copied[-1])]
        copies.release(slot)
        assert cuda.read() == [("main", "records", released[slot])]
    assert len({*released, *copied}) == 4
    assert all(bool(slot.all()) for slot in slots)


@pytest.mark.parametrize(
    "num_streamed, kind, targets",
    [
        (None, "dora", ALL),
        (1, "dora", ALL),
        (3, "dora", ALL),
        (2, "lora", ("q_proj", "v_proj")),  # layers without an adapter read their own block in the backward pass
        (None, "lora", ("q_proj", "k_proj", "v_proj", "o_proj")),
        (2, "dora", ("gate_proj", "up_proj")),
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


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("num_streamed", [None, 1])
@pytest.mark.parametrize("targets", [ALL, ["q_proj"]], ids=str)
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
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
            with torch.inference_mode():
                model(input_ids=support.STREAMED_IDS[1])
    said = [model.generate(support.STREAMED_IDS[0], max_new_tokens=6, do_sample=False) for model in models]
    assert torch.equal(*said)
    half = support.step_of(support.examples(), Batching(40, 0)).micro_batches
    halves = {"one": (half[:1], half[1:]), "two": (half[1:], half[:2])}
    reports = [measure(model, halves, adapter_parameters(model), device=support.CPU) for model in models]
    for key in ("cosines", "norms"):
        assert reports[1][key] == reports[0][key]


def test_every_weight_is_read_from_its_slot_outside_of_a_pass_too(source: Path, tmp_path: Path) -> None:
    """Also from a cached base, and after the rest of the model was cast."""
    expected = frozen_layers(support.resident_model(source))
    cache = BaseCache(tmp_path, support.STREAMED_QUANTIZATION, support.CPU)
    models = [on_host(source), on_host(source), on_host(source, 2, cache), on_host(source, 2, cache)]
    models[1].to(torch.bfloat16)
    assert models[1].get_input_embeddings().weight.dtype == torch.bfloat16
    for model in models:
        found = frozen_layers(model)
        assert len(found) == len(expected) == 35
        for name in reversed(expected):
            assert torch.equal(found[name].dequantized(), expected[name].dequantized()), name


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_the_4_bit_export_writes_each_block_where_it_belongs(tmp_path: Path, kind: str) -> None:
    whole_blocks = support.write_source(tmp_path / "source", intermediate_size=128)
    for name, model in (("expected", support.resident_model(whole_blocks)), ("found", on_host(whole_blocks))):
        export_nf4_lora(support.adapt_streamed(model, kind).eval(), None, tmp_path / name)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, found = (load_file(tmp_path / name / file) for name in ("expected", "found"))
        support.assert_equal_tensors(found, expected)


def test_gradients_without_checkpointing_are_refused(source: Path) -> None:
    model = on_host(source)
    support.adapt_streamed(model)
    model.eval()
    with pytest.raises(RunFailure, match="gradients without checkpointing"):
        model(input_ids=support.STREAMED_IDS[0])
    with torch.no_grad():
        model(input_ids=support.STREAMED_IDS[0])


HOST = {"base__residency": "host"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"base__residency": "disk"}, "base.residency"),
        (HOST | {"base__quant": "none"}, "base.residency: must be device with quant none"),
        (
            HOST | {"base__prune": {"method": "magnitude", "sparsity": 0.5}},
            "base.residency: must be device with a pruned",
        ),
        (HOST | {"memory__checkpointing": False}, "memory.checkpointing: must be true"),
        ({"base__streamed_blocks": 1}, "base.streamed_blocks: would be ignored"),
        ({"memory__host_embeddings": True}, "memory.host_embeddings: .*must be false on a machine without a GPU"),
        (
            {f"adapter__{key}": ... for key in ("rank", "alpha", "dropout")}
            | {"adapter__kind": "full", "base__quant": "none", "memory__host_embeddings": True},
            "memory.host_embeddings: must be false with adapter.kind full",
        ),
    ],
)
def test_settings_that_do_not_go_together(root: Path, tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        train_run(support.tiny_recipe(root, **changes), tmp_path / "run")


def pieces_of(*weights: tuple[int, int], num_blocks: int) -> list[Piece]:
    pieces = [Piece() for _ in range(num_blocks)]
    for piece in pieces:
        for number, shape in enumerate(weights):
            piece.add(str(number), empty_packed("nf4", shape, 64, True, "meta"))
    return pieces


def test_too_little_host_memory_is_one_line(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read; and where the driver refuses, its answer, which CUDA repeats to the next kernel."""
    needed = r"base\.residency: host: 5 blocks need 0\.0 GiB .* 0\.0 GiB are free for this process"
    with pytest.raises(UserError, match=rf"{needed}\. Fix:"):
        on_host(source, free_bytes=lambda: 1000)
    with pytest.raises(UserError, match=rf"{needed} beside the 0\.0 GiB of the embedding\. Fix: lower"):
        load_model(
            resolve(str(source)),
            quant="nf4",
            before_reading=keep_embedding_on_host,
            placer=HostResidency(free_bytes=lambda: 0, copies=LateCopies),
        )
    driver = FakeCudart(most=1 << 20).put_in(monkeypatch)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=torch.AcceleratorError("CUDA error: out of memory")))
    with pytest.raises(UserError, match=r"the system refuses them \(out of memory \(2\)\)\. Fix: lower"):
        host_residency._pin(pieces_of((2048, 2048), num_blocks=1), torch.device("cuda"), 1 << 40, 0)
    assert driver.log == []


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
    model = empty_model(public_shapes()[name].config(), support.config_source(), torch.bfloat16, "sdpa")
    planned = streamed_blocks(model, Quantization("nf4", 64, True, ("lm_head",)), None)
    assert planned.host_bytes == sum(driver.locked.values())


def with_embedding_on_host(source: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(resolve(str(source)), quant="nf4", compute_dtype=dtype, before_reading=keep_embedding_on_host)


def test_an_embedding_on_the_host_changes_no_number(source: Path) -> None:
    models = [support.adapt_streamed(make(source)) for make in (support.resident_model, with_embedding_on_host)]
    assert isinstance(models[1].get_input_embeddings(), HostEmbedding)
    expected, found = (support.streamed_gradients(model) for model in models)
    support.assert_equal_tensors(found, expected)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert "model.embed_tokens.weight" in models[1]._ddp_params_and_buffers_to_ignore  # wrappers do not send it
    # float32 arithmetic widens it and gives it back
    model = with_embedding_on_host(source, torch.bfloat16)
    other = load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.bfloat16)
    table = model.get_input_embeddings().weight
    assert table.dtype == torch.bfloat16
    with torch.no_grad(), float32_arithmetic(model), float32_arithmetic(other):
        found, expected = (each(input_ids=support.STREAMED_IDS[0]).logits for each in (model, other))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert model.get_input_embeddings().weight is table


def test_rows_go_to_the_device_and_the_table_stays(source: Path) -> None:
    """ "meta" is any device that is not the CPU."""
    table = torch.randn(7, 4, dtype=torch.bfloat16)
    embedding = HostEmbedding(table, torch.device("cpu"))
    model = torch.nn.Sequential(embedding, torch.nn.Linear(4, 2))
    model.to("meta")
    assert embedding.weight is table
    assert {parameter.device.type for parameter in model.parameters()} == {embedding.device.type} == {"meta"}
    rows: Tensor = embedding(torch.tensor([[1, 2, 3]]))
    assert (rows.device.type, rows.shape) == ("meta", (1, 3, 4))
    embedding.to(torch.float32)
    assert torch.equal(embedding.weight, table.float())
    # Its state is that of an embedding
    assert embedding.state_dict().keys() == {"weight"}
    embedding.load_state_dict({"weight": table.float() + 1})
    assert torch.equal(embedding.weight, table.float() + 1)
    with pytest.raises(RuntimeError, match="Missing key"):
        embedding.load_state_dict({})
    # Token ids go where the rows go
    loaded = with_embedding_on_host(source)
    assert next(loaded.parameters()).device == torch.device("cpu")
    loaded.get_input_embeddings().to("meta")
    assert next(loaded.parameters()).device == loaded.device == torch.device("meta")


def a_recipe(**memory: object) -> Recipe:
    return recipe_from(
        {
            "model": {"source": "somewhere/model", "dtype": "bfloat16"},
            "adapter": {"targets": ["q_proj"]},
            "data": {"mix": [{"task": "demo/facts"}], "max_length": 64},
            "train": {"steps": 3, "batch": 2},
            "memory": memory,
        }
    )


def test_a_run_on_a_gpu_loads_it_there(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Mock(return_value=torch.nn.Module())
    monkeypatch.setattr(load_base, "load_model", load)
    for device, wanted in (("cuda", keep_embedding_on_host), ("cpu", None)):
        compute = load_base.Compute(torch.device(device), torch.bfloat16)
        load_base.load_base(a_recipe(host_embeddings=True, checkpointing=False), support.config_source(), compute)
        assert load.call_args.kwargs["before_reading"] is wanted


CONFIG = LlamaConfig(**CHECKPOINT_SIZES | {"tie_word_embeddings": False, "vocab_size": 4096, "num_hidden_layers": 1})
TIED = LlamaConfig(**CHECKPOINT_SIZES | {"tie_word_embeddings": True, "vocab_size": 4096, "num_hidden_layers": 1})


def test_a_shared_or_computing_embedding_is_refused() -> None:
    with torch.device("meta"):
        tied = LlamaForCausalLM(TIED)
        scaled = Gemma3ForCausalLM(
            Gemma3TextConfig(**CHECKPOINT_SIZES | {"tie_word_embeddings": False, "head_dim": 16})
        )
    with pytest.raises(UserError, match=r"host_embeddings: must be false, .*embedding of llama is its output head"):
        check_host_embedding(tied)
    with pytest.raises(UserError, match=r"gemma3_text does more than look up rows \(Gemma3TextScaledWordEmbedding\)"):
        check_host_embedding(scaled)
    with pytest.raises(UserError, match="output head as well"):
        plan(a_recipe(host_embeddings=True), config=TIED)


def test_a_plan_has_it_on_the_host_and_proposes_it_on_a_gpu_alone() -> None:
    there, here = (plan(a_recipe(**memory), config=CONFIG) for memory in ({"host_embeddings": True}, {}))
    table = CONFIG.vocab_size * CONFIG.hidden_size * 2
    assert (there.embedding_bytes, here.embedding_bytes) == (table, 0)
    assert here.components[DENSE] - there.components[DENSE] == table
    assert there.to_dict()["embedding_bytes"] == table
    # Rows of a micro-batch, in torch's pinned memory: a power of two, and as much for all shorter ones
    pinned = there.host_bytes // 2
    assert pinned & (pinned - 1) == here.host_bytes == 0
    assert pinned / 2 < there.shape.num_tokens * CONFIG.hidden_size * 2 <= pinned
    assert there.step_seconds is not None
    assert here.step_seconds is not None
    rows = there.shape.num_tokens * there.num_micro_batches * CONFIG.hidden_size * 2
    assert there.step_seconds - here.step_seconds == pytest.approx(rows / ASSUMED["cuda"].link, rel=1e-6)

    def settings(found: Plan) -> str:
        return " ".join(change.setting for change in found.changes)

    assert "memory.host_embeddings=true" in settings(plan(a_recipe(), 1, config=CONFIG))
    assert "host_embeddings" not in settings(plan(a_recipe(), 1, config=CONFIG, device_kind="cpu"))
    assert "host_embeddings" not in settings(plan(a_recipe(), 1, config=TIED))
