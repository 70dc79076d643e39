"""The input embedding in the host's memory: the same numbers, on the device that computes, and never moved there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from qdora.config import Recipe
from qdora.errors import UserError
from qdora.evaluation.forward_path import input_device
from qdora.memory.host_embedding import check_host_embedding, keep_embedding_on_host
from qdora.memory.plan import DENSE, Plan
from qdora.memory.plan_time import STATED
from qdora.model.load import load_model
from qdora.model.logit_comparison import float32_arithmetic
from qdora.model.source import resolve
from qdora.nn.host_embedding import HostEmbedding
from qdora.recipe_file import recipe_from
from qdora.verbs.plan_memory import plan
from qdora.verbs.train import train_run
from tests import tiny_run, tiny_streamed
from tests.checkpoints import SMALL

CONFIG = LlamaConfig(**SMALL | {"tie_word_embeddings": False, "vocab_size": 4096})


def host(source: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(resolve(str(source)), quant="nf4", compute_dtype=dtype, prepare=keep_embedding_on_host)


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
    model.get_input_embeddings().device = torch.device("meta")
    assert input_device(model) == torch.device("meta")
    assert model.device == torch.device("cpu")


def test_a_shared_or_computing_embedding_is_refused() -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        tied = LlamaForCausalLM(LlamaConfig(**SMALL | {"tie_word_embeddings": True}))
        sizes = SMALL | {"tie_word_embeddings": False, "head_dim": 16}
        scaled = Gemma3ForCausalLM(Gemma3TextConfig(**sizes))
    with pytest.raises(UserError, match=r"memory\.host_embeddings: the embedding of llama is its output head as well"):
        check_host_embedding(tied)
    with pytest.raises(UserError, match=r"gemma3_text does more than look rows up \(Gemma3TextScaledWordEmbedding\)"):
        check_host_embedding(scaled)


def a_recipe(adapter: dict[str, Any] | None = None, base: dict[str, Any] | None = None, **memory: object) -> Recipe:
    return recipe_from(
        {
            "model": {"source": "somewhere/model", "dtype": "bfloat16"},
            "adapter": adapter or {},
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
    assert there.step_seconds is not None
    assert here.step_seconds is not None
    rows = there.shape.num_tokens * there.num_micro_batches * CONFIG.hidden_size * 2
    assert there.step_seconds - here.step_seconds == pytest.approx(rows / STATED["cuda"].copied, rel=1e-6)


def test_a_plan_proposes_it_on_a_gpu_alone() -> None:
    def settings(found: Plan) -> str:
        return " ".join(change.setting for change in found.changes)

    assert "memory.host_embeddings=true" in settings(plan(a_recipe(), 1, config=CONFIG))
    assert "host_embeddings" not in settings(plan(a_recipe(), 1, config=CONFIG, device_kind="cpu"))
    tied = LlamaConfig(**SMALL | {"tie_word_embeddings": True, "vocab_size": 4096})
    assert "host_embeddings" not in settings(plan(a_recipe(), 1, config=tied))
    with pytest.raises(UserError, match="output head as well"):
        plan(a_recipe(host_embeddings=True), config=tied)


def test_a_run_without_a_gpu_and_one_that_trains_the_embedding_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    recipe = tiny_run.recipe(root, memory__host_embeddings=True)
    with pytest.raises(UserError, match=r"memory\.host_embeddings: is for a GPU"):
        train_run(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=r"memory\.host_embeddings: keeps the embedding frozen"):
        a_recipe(adapter={"kind": "full"}, base={"quant": "none"}, host_embeddings=True)
