"""The input embedding in the host's memory: the same numbers, on the device that computes, and never moved there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from qdora.errors import UserError
from qdora.export.logit_comparison import float32_arithmetic
from qdora.memory.host_residency import HostResidency, check_host_embedding, keep_embedding_on_host
from qdora.model.inject import inject
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.nn.host_embedding import HostEmbedding
from qdora.plan.memory_plan import plan
from qdora.plan.plan_contents import DENSE, Plan
from qdora.plan.step_time import ASSUMED
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.run import load_base
from qdora.run.train import train_run
from tests import tiny, tiny_run, tiny_streamed
from tests.checkpoints import SMALL
from tests.test_memory_host_residency import LateCopies

CONFIG = LlamaConfig(**SMALL | {"tie_word_embeddings": False, "vocab_size": 4096, "num_hidden_layers": 1})


def host(source: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(resolve(str(source)), quant="nf4", compute_dtype=dtype, before_reading=keep_embedding_on_host)


def test_logits_and_gradients_are_those_of_an_embedding_on_the_device(tmp_path: Path) -> None:
    source = tiny_streamed.write_source(tmp_path)
    models = [tiny_streamed.adapt(make(source)) for make in (tiny_streamed.resident, host)]
    assert isinstance(models[1].get_input_embeddings(), HostEmbedding)
    expected, found = (tiny_streamed.gradients(model) for model in models)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_float32_arithmetic_widens_it_and_gives_it_back(tmp_path: Path) -> None:
    source = tiny_streamed.write_source(tmp_path)
    model = host(source, torch.bfloat16)
    other = load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.bfloat16)
    table = model.get_input_embeddings().weight
    assert table.dtype == torch.bfloat16
    with torch.no_grad(), float32_arithmetic(model), float32_arithmetic(other):
        found, expected = (each(input_ids=tiny_streamed.IDS[0]).logits for each in (model, other))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert model.get_input_embeddings().weight is table


def test_rows_go_to_the_device_and_the_table_stays() -> None:
    table = torch.randn(7, 4, dtype=torch.bfloat16)
    embedding = HostEmbedding(table, torch.device("cpu"))
    model = torch.nn.Sequential(embedding, torch.nn.Linear(4, 2))
    model.to("meta")  # any device that is not the CPU
    assert embedding.weight is table
    assert embedding.device.type == "meta"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert embedding(torch.tensor([[1, 2, 3]])).device.type == "meta"
    assert embedding(torch.tensor([[1, 2, 3]])).shape == (1, 3, 4)
    embedding.to(torch.float32)
    assert torch.equal(embedding.weight, table.float())


def test_token_ids_go_where_the_rows_go(tmp_path: Path) -> None:
    model = host(tiny_streamed.write_source(tmp_path))
    assert next(model.parameters()).device == torch.device("cpu")
    model.get_input_embeddings().to("meta")
    assert next(model.parameters()).device == model.device == torch.device("meta")


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_model_is_the_one_it_computes_in(
    tmp_path: Path, dtype: torch.dtype, adapter: torch.dtype
) -> None:
    model = host(tiny_streamed.write_source(tmp_path), dtype)
    inject(model, rank=4, dtype=adapter)
    assert model.dtype == dtype
    assert model(input_ids=tiny_streamed.IDS[0]).logits.dtype == dtype
    assert model.to(torch.float32).dtype == model.get_input_embeddings().weight.dtype == torch.float32


def test_its_state_is_that_of_an_embedding() -> None:
    table = torch.randn(7, 4)
    embedding = HostEmbedding(table.clone(), torch.device("cpu"))
    assert embedding.state_dict().keys() == {"weight"}
    embedding.load_state_dict({"weight": table + 1})
    assert torch.equal(embedding.weight, table + 1)
    with pytest.raises(RuntimeError, match="Missing key"):
        embedding.load_state_dict({})


@pytest.mark.parametrize(("device", "wanted"), [("cuda", True), ("cpu", False)])
def test_a_run_on_a_gpu_loads_it_there(monkeypatch: pytest.MonkeyPatch, device: str, wanted: bool) -> None:
    asked: list[object] = []

    def load(*_args: object, before_reading: object, **_options: object) -> Any:
        asked.append(before_reading)
        return torch.nn.Module()

    monkeypatch.setattr(load_base, "load_model", load)
    recipe = a_recipe(host_embeddings=True, checkpointing=False)
    compute = load_base.Compute(torch.device(device), torch.bfloat16)
    load_base.load_base(recipe, tiny.source(), compute)
    assert asked == [keep_embedding_on_host if wanted else None]


def test_blocks_on_the_host_leave_room_for_it(tmp_path: Path) -> None:
    source = resolve(str(tiny_streamed.write_source(tmp_path)))
    settings: dict[str, Any] = {"quant": "nf4", "before_reading": keep_embedding_on_host}
    with pytest.raises(UserError, match=r"beside the 0\.0 GiB of the embedding\. Fix: lower base\.streamed_blocks"):
        load_model(source, placer=HostResidency(free_bytes=lambda: 0, copies=LateCopies), **settings)


def test_data_parallel_wrappers_do_not_send_it(tmp_path: Path) -> None:
    model = host(tiny_streamed.write_source(tmp_path))
    inject(model, rank=4)
    assert "model.embed_tokens.weight" in model._ddp_params_and_buffers_to_ignore


def test_a_shared_or_computing_embedding_is_refused() -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        tied = LlamaForCausalLM(LlamaConfig(**SMALL | {"tie_word_embeddings": True}))
        sizes = SMALL | {"tie_word_embeddings": False, "head_dim": 16}
        scaled = Gemma3ForCausalLM(Gemma3TextConfig(**sizes))
    with pytest.raises(
        UserError,
        match=r"memory\.host_embeddings: must be false, since the embedding of llama is its output head .* got true",
    ):
        check_host_embedding(tied)
    with pytest.raises(UserError, match=r"gemma3_text does more than look up rows \(Gemma3TextScaledWordEmbedding\)"):
        check_host_embedding(scaled)


def a_recipe(adapter: dict[str, Any] | None = None, base: dict[str, Any] | None = None, **memory: object) -> Recipe:
    return recipe_from(
        {
            "model": {"source": "somewhere/model", "dtype": "bfloat16"},
            "adapter": adapter or {"targets": ["q_proj"]},
            "base": base or {},
            "data": {"mix": [{"task": "demo/facts"}], "max_length": 64},
            "train": {"steps": 3, "batch": 2},
            "memory": memory,
        }
    )


def test_a_plan_has_it_on_the_host() -> None:
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


def test_a_plan_proposes_it_on_a_gpu_alone() -> None:
    def settings(found: Plan) -> str:
        return " ".join(change.setting for change in found.changes)

    assert "memory.host_embeddings=true" in settings(plan(a_recipe(), 1, config=CONFIG))
    assert "host_embeddings" not in settings(plan(a_recipe(), 1, config=CONFIG, device_kind="cpu"))
    tied = LlamaConfig(**SMALL | {"tie_word_embeddings": True, "vocab_size": 4096, "num_hidden_layers": 1})
    assert "host_embeddings" not in settings(plan(a_recipe(), 1, config=tied))
    with pytest.raises(UserError, match="output head as well"):
        plan(a_recipe(host_embeddings=True), config=tied)


def test_a_run_without_a_gpu_and_one_that_trains_the_embedding_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    recipe = tiny_run.recipe(root, memory__host_embeddings=True)
    with pytest.raises(UserError, match=r"memory\.host_embeddings: .*must be false on a machine without a GPU"):
        train_run(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=r"memory\.host_embeddings: must be false with adapter.kind full"):
        a_recipe(adapter={"kind": "full"}, base={"quant": "none"}, host_embeddings=True)
