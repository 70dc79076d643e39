"""Blocks compiled by torch.compile: the results of uncompiled ones, without a graph break, compiled once or twice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from qdora.errors import UserError
from qdora.model.build_model import recompute_activations
from qdora.model.grouped_attention import fast_grouped_attention
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.nn.prepared_gains import prepare_gains
from qdora.ops.planned_device import planned_on
from qdora.train import compiled_blocks
from qdora.train.optimizer import AdapterOptimizer
from tests import tiny, tiny_adapted, tiny_experts, tiny_streamed
from tests.test_memory_host_residency import on_host

# 2.11 cannot compile blocks with padding masks, which then run as they are; 2.12 was not tried.
needs_masks = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="torch 2.11 does not compile blocks with padding masks"
)

_SIZES = tiny_adapted.SIZES | {"num_hidden_layers": 3}
# A window of 16: shorter rows have no mask in any block, longer ones have one in two of the three.
_GEMMA = {
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**_SIZES, **_GEMMA),
}
# (rows, tokens, tokens of the first row that are padding): one row and several, rows as many as tokens, the window.
SHAPES = ((1, 11, 0), (4, 4, 0), (2, 9, 3), (1, 6, 0), (3, 32, 0), (1, 14, 2))


@pytest.fixture
def compilations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts them. "eager" runs the graph of torch's operations, "aot_eager" also that of its gradient."""
    counter = CompileCounterWithBackend(getattr(request, "param", "eager"))
    monkeypatch.setattr(compiled_blocks, "BACKEND", counter)
    return counter


def adapted(family: str, monkeypatch: pytest.MonkeyPatch, *, checkpointing: bool, **options: Any) -> Any:
    """A model of three blocks in training, whose gradients arrive in float32."""
    monkeypatch.setitem(tiny_adapted.CONFIGS, family, CONFIGS[family])
    model = tiny_adapted.adapted(family, quant="nf4", **{"dropout": 0.1} | options)
    model.set_attn_implementation("sdpa")
    AdapterOptimizer(adapter_parameters(model))
    if checkpointing:
        recompute_activations(model)
    return model.train()


def gradients(model: Any, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Of a micro-batch, and the loss."""
    rows, length, padding = shape
    torch.manual_seed(3)
    model.zero_grad()
    ids, mask = torch.randint(0, 300, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
    mask[0, length - padding :] = 0
    loss = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return {**found, "loss": loss.detach()}  # type: ignore[dict-item]


SLOW = pytest.mark.slow


@needs_masks
@pytest.mark.parametrize(
    ("family", "checkpointing", "compilations"),
    [
        ("llama", True, "aot_eager"),
        ("gemma3", False, "eager"),
        pytest.param("llama", False, "aot_eager", marks=SLOW),
        pytest.param("gemma3", False, "aot_eager", marks=SLOW),
        pytest.param("gemma3", True, "aot_eager", marks=SLOW),
        pytest.param("qwen3", True, "aot_eager", marks=SLOW),
        pytest.param("qwen3", False, "aot_eager", marks=SLOW),
    ],
    indirect=["compilations"],
)
def test_blocks_compile_twice_at_most_without_a_break_and_give_the_bits_of_eager_ones(
    compilations: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch, family: str, checkpointing: bool
) -> None:
    eager = adapted(family, monkeypatch, checkpointing=checkpointing)
    expected = [gradients(eager, shape) for shape in SHAPES]
    model = adapted(family, monkeypatch, checkpointing=checkpointing)
    with compiled_blocks.compiled_blocks(model):
        found = [gradients(model, shape) for shape in SHAPES]
    for some, others in zip(found, expected, strict=True):
        tiny_streamed.assert_equal(some, others)
    # With a mask and without. After a graph break, which is an error, there would be fewer.
    assert compilations.frame_count == 2
    assert {value.dtype for some in found for value in some.values()} == {torch.float32}


LAYERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "some layers without an adapter": {"targets": ["q_proj", "down_proj"]},
    "float32 factors": {"factors": torch.float32},
}


@pytest.mark.parametrize("options", [pytest.param(each, id=name, marks=SLOW) for name, each in LAYERS.items()])
def test_other_layers_have_the_bits_of_eager_ones(
    compilations: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    options = dict(options)
    dtype = options.pop("factors", None)
    models = [adapted("llama", monkeypatch, checkpointing=True, **options) for _ in range(2)]
    for model in models if dtype else ():
        for layer in adapted_layers(model).values():
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
    expected = [gradients(models[0], shape) for shape in SHAPES[:2]]
    with compiled_blocks.compiled_blocks(models[1]):
        found = [gradients(models[1], shape) for shape in SHAPES[:2]]
    for some, others in zip(found, expected, strict=True):
        tiny_streamed.assert_equal(some, others)
    assert compilations.frame_count == 1


def test_gates_that_remove_components_compile_nothing_anew(
    compilations: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [adapted("llama", monkeypatch, checkpointing=False) for _ in range(2)]
    for model in models:
        for layer in adapted_layers(model).values():
            layer.add_gate()
    expected, found = [], []
    with compiled_blocks.compiled_blocks(models[1]):
        for rank, kept in ((3, [0, 1, 2]), (3, [0, 2]), (2, [1])):
            for model, results in zip(models, (expected, found), strict=True):
                for layer in list(adapted_layers(model).values())[:-1]:
                    if layer.rank == rank:
                        layer.zero_grad()
                        layer.keep_components_(torch.tensor(kept))
                results.append(gradients(model, SHAPES[0]))
    for some, others in zip(found, expected, strict=True):
        tiny_streamed.assert_equal(some, others)
    assert compilations.frame_count == 1


@needs_masks
def test_gradients_in_bf16_accumulate_in_float32(
    compilations: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second micro-batch is compiled for when the first one's gradients are there."""
    models = [adapted("llama", monkeypatch, checkpointing=True, dtype=torch.bfloat16) for _ in range(2)]
    with compiled_blocks.compiled_blocks(models[1]):
        for model in models:
            gradients(model, SHAPES[0])
            monkeypatch.setattr(model, "zero_grad", lambda: None)
        expected, found = (gradients(model, SHAPES[2]) for model in models)
    tiny_streamed.assert_equal(found, expected)
    assert found["model.layers.0.mlp.up_proj.lora_A"].dtype == torch.float32
    assert compilations.frame_count == 2
    assert [each for each in caplog.records if each.name == "qdora"] == []


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_streamed.write_source(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize(
    ("compilations", "num_streamed"),
    [("eager", None), pytest.param("aot_eager", None, marks=SLOW), pytest.param("eager", 2, marks=SLOW)],
    indirect=["compilations"],
)
def test_streamed_blocks_have_the_gradients_of_resident_ones(
    compilations: CompileCounterWithBackend, source: Path, num_streamed: int | None
) -> None:
    """Slots are filled as late and destroyed as early as they may be."""
    expected = tiny_streamed.of_resident_base(source, "dora")
    model = tiny_streamed.adapt(on_host(source, num_streamed)[0])
    with compiled_blocks.compiled_blocks(model):
        tiny_streamed.assert_equal(tiny_streamed.gradients(model), expected)
    assert compilations.frame_count == (1 if num_streamed is None else 2)  # of streamed blocks and of the others


def test_evaluation_runs_the_blocks_as_they_are_and_names_stay(
    compilations: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("llama", monkeypatch, checkpointing=False)
    names = list(model.state_dict())
    with compiled_blocks.compiled_blocks(model):
        assert list(model.state_dict()) == names
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 5, dtype=torch.int64))
        model.eval()
        model(input_ids=torch.zeros(1, 5, dtype=torch.int64)).logits.sum().backward()
    assert compilations.frame_count == 0
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_changed_parameters_change_what_a_compiled_block_computes(
    compilations: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [adapted("llama", monkeypatch, checkpointing=True, dropout=0.0) for _ in range(2)]
    with compiled_blocks.compiled_blocks(models[1]):
        before = gradients(models[1], SHAPES[0])
        for model in models:
            tiny.move_all_parameters_(model, seed=8)
            prepare_gains(adapted_layers(model).values())
        found = gradients(models[1], SHAPES[0])
    assert not torch.equal(before["loss"], found["loss"])
    tiny_streamed.assert_equal(found, gradients(models[0], SHAPES[0]))


def test_blocks_compile_where_keys_of_grouped_heads_are_repeated(
    monkeypatch: pytest.MonkeyPatch, compilations: CompileCounterWithBackend
) -> None:
    """As on a GPU, where each micro-batch puts a function of its own into transformers."""
    model = adapted("llama", monkeypatch, checkpointing=False)
    with planned_on("cuda"), compiled_blocks.compiled_blocks(model):
        for _ in range(4):
            with fast_grouped_attention():
                gradients(model, (2, 9, 0))
    assert compilations.frame_count == 1


def test_a_block_that_cannot_be_compiled_runs_as_it_is_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: Any) -> Any:
        raise ValueError("no kernel for this")

    monkeypatch.setattr(compiled_blocks, "BACKEND", refuses)
    models = [adapted("llama", monkeypatch, checkpointing=True) for _ in range(2)]
    with compiled_blocks.compiled_blocks(models[1]), caplog.at_level(logging.WARNING, logger="qdora"):
        found = gradients(models[1], SHAPES[0])
    tiny_streamed.assert_equal(found, gradients(models[0], SHAPES[0]))
    (record,) = caplog.records
    assert record.getMessage().startswith("train.compile: blocks of LlamaDecoderLayer run as they are, not compiled: ")
    assert record.getMessage().endswith("no kernel for this")


def test_blocks_whose_gradient_cannot_be_compiled_run_as_they_are_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(graph: Any, _inputs: Any) -> Any:
        raise ValueError("no kernel for this")

    backend = aot_autograd(fw_compiler=lambda graph, _inputs: graph, bw_compiler=refuses)
    monkeypatch.setattr(compiled_blocks, "BACKEND", backend)
    models = [adapted("llama", monkeypatch, checkpointing=True) for _ in range(2)]
    with compiled_blocks.compiled_blocks(models[1]), caplog.at_level(logging.WARNING, logger="qdora"):
        found = gradients(models[1], SHAPES[0])
    tiny_streamed.assert_equal(found, gradients(models[0], SHAPES[0]))
    (record,) = [each for each in caplog.records if each.name == "qdora"]
    assert record.getMessage().endswith("blocks of LlamaDecoderLayer run as they are, not compiled: no kernel for this")


@needs_masks
def test_blocks_that_ran_compiled_before_another_failed_are_recomputed_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first block has a window's mask, the second none, so it is compiled anew."""
    compiled = []

    def once(graph: Any, _inputs: Any) -> Any:
        if compiled:
            raise ValueError("no kernel for this")
        compiled.append(graph)
        return graph

    monkeypatch.setattr(compiled_blocks, "BACKEND", once)
    models = [adapted("gemma3", monkeypatch, checkpointing=True) for _ in range(2)]
    with compiled_blocks.compiled_blocks(models[1]), caplog.at_level(logging.WARNING, logger="qdora"):
        found = gradients(models[1], (3, 32, 0))
        assert compiled
    tiny_streamed.assert_equal(found, gradients(models[0], (3, 32, 0)))
    assert len([each for each in caplog.records if each.name == "qdora"]) == 1


def test_an_error_inside_a_compiled_block_is_not_taken_for_one_of_the_compiler(
    compilations: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("llama", monkeypatch, checkpointing=False)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with compiled_blocks.compiled_blocks(model):
        gradients(model, SHAPES[0])
        monkeypatch.setattr("qdora.ops.opaque_product.product", full)
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model, SHAPES[0])
        assert all(layer.opaque is None for layer in adapted_layers(model).values())
    assert compilations.frame_count == 1


def test_what_has_no_blocks_to_compile_is_refused(tmp_path: Path) -> None:
    bare = tiny_adapted.base()
    bare.model.layers = torch.nn.ModuleList()
    for model, why in (
        (bare, "llama has no list of blocks"),
        (tiny_experts.adapted(tmp_path)[0], "qwen3_moe has experts"),
    ):
        refused = pytest.raises(UserError, match=rf"train\.compile: must be false, since {why}")
        with refused, compiled_blocks.compiled_blocks(model):
            pass
