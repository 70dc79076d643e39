"""Runs that add tokens and train embeddings: data, training, resuming, exports and plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from qdora.errors import Interrupted, UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.model.build_model import choose_compute, find_model, token_ids
from qdora.model.trained_embeddings import extend_vocabulary, trained_matrices
from qdora.plan import plan_contents as parts
from qdora.plan.memory_plan import plan
from qdora.recipe.settings import Recipe
from qdora.run.generate import Sampling, generate_from
from qdora.run.load_base import load_base
from qdora.run.load_run import load_run
from qdora.run.train import train_run
from tests import tiny_adapted, tiny_run, tiny_tokenizer
from tests.run_files import assert_same_run, stop_after
from tests.test_plan_memory import a_config, a_recipe
from tests.test_recipe_settings import faults, minimal

TOKENS = ["<sum>", "<end>"]
NEW = {"model__add_tokens": TOKENS, "adapter__also_train": ["embed_tokens", "lm_head"]}
WHOLE = NEW | {"adapter__also_train_rows": "all"}


def recipe(root: Path, **changes: Any) -> Recipe:
    """The tiny recipe on sums whose text has the new tokens."""
    found = tiny_run.recipe(root, **changes)
    sums = root / "marked.jsonl"
    rows = [{"prompt": f"<sum>{a} + {b} =", "completion": f" {a + b}<end>"} for a in range(6) for b in range(5)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = found.data.mix[0].model_copy(update={"source": str(sums)})
    return found.model_copy(update={"data": found.data.model_copy(update={"mix": (source,)})})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model whose rows are whole blocks of 64."""
    root = tmp_path_factory.mktemp("tokens")
    torch.manual_seed(0)
    sizes = tiny_adapted.SIZES | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 400}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(root / "model")
    tiny_tokenizer.make().save_pretrained(root / "model")
    return root


@pytest.fixture(scope="module")
def rows_run(place: Path) -> Path:
    train_run(recipe(place, **NEW), place / "rows")
    return place / "rows"


@pytest.fixture(scope="module")
def whole_run(place: Path) -> Path:
    train_run(recipe(place, **WHOLE), place / "whole")
    return place / "whole"


def base_matrix(place: Path, run_recipe: Recipe) -> torch.Tensor:
    """The embedding of the base, with the start of the new rows."""
    source, tokenizer = find_model(run_recipe)
    model = load_base(run_recipe, source, choose_compute("float32"))
    extend_vocabulary(model, token_ids(run_recipe, tokenizer))
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.detach()


def test_new_rows_move_and_all_others_stay_bit_for_bit(place: Path, rows_run: Path) -> None:
    start, loaded = base_matrix(place, recipe(place, **NEW)), load_run(rows_run)
    ids = loaded.tokenizer.convert_tokens_to_ids(TOKENS)
    assert loaded.tokenizer("<sum>1 + 1 =")["input_ids"][0] == ids[0]
    matrix = loaded.model.get_input_embeddings().weight
    others = [row for row in range(len(start)) if row not in ids]
    assert torch.equal(matrix[others], start[others])
    assert (matrix[ids] != start[ids]).float().mean() > 0.9
    held = load_file(rows_run / "adapter/adapter_model.safetensors")
    names = [name for name in held if "embed_tokens" in name or "lm_head" in name]
    assert names == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    config = json.loads((rows_run / "adapter/adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": ids}
    card = (rows_run / "README.md").read_text()
    assert "| also trained | embed_tokens, lm_head (rows of the new tokens) |" in card
    assert "<sum>" in card
    answer = generate_from(str(rows_run), "<sum>1 + 1 =", Sampling(max_new_tokens=2), raw=True, write=lambda _: None)
    assert answer["num_new_tokens"] == 2


def test_a_token_that_the_data_does_not_have_is_a_warning(place: Path, rows_run: Path, tmp_path: Path) -> None:
    assert "the training data does not have" not in (rows_run / "log.txt").read_text()
    tokens = {"model__add_tokens": ["<sum>", "<other>"]}
    train_run(recipe(place, **NEW | tokens, train__steps=1), tmp_path / "run")
    assert "model.add_tokens: the training data does not have '<other>'" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize("changes", [NEW, WHOLE], ids=["rows", "whole"])
def test_resumed_equals_uninterrupted(
    place: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = request.getfixturevalue("rows_run" if changes is NEW else "whole_run")
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_run(recipe(place, **changes), tmp_path / "run")
    monkeypatch.undo()
    train_run(recipe(place, **changes), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("run", ["rows_run", "whole_run"])
def test_a_merge_has_the_rows_and_the_tokens(run: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(run)
    exported = export_run(directory, tmp_path / "out", ExportOptions(dtype="float32", audit=run == "rows_run"))
    assert exported["verification"]["passed"], exported["verification"]
    loaded = load_run(directory)
    ids = loaded.tokenizer("<sum>3 + 4 = 7<end>", return_tensors="pt")["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert torch.equal(tokenizer("<sum>3 + 4 = 7<end>", return_tensors="pt")["input_ids"], ids)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_merge_with_other_rows_does_not_pass(rows_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qdora.export import merged

    monkeypatch.setattr(merged, "with_rows", lambda weight, ids, rows: merged_wrongly(weight, rows))

    def merged_wrongly(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        wrong = weight.float().clone()
        wrong[-len(rows) :] = 0
        return wrong

    with pytest.raises(Exception, match="its trained rows are not those of the run"):
        export_run(rows_run, tmp_path / "out", ExportOptions(dtype="float32"))


@pytest.mark.parametrize("run", ["rows_run", "whole_run"])
def test_nf4_lora_has_the_rows(run: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(run)
    exported = export_run(directory, tmp_path / "out", ExportOptions(format_="nf4-lora"))
    assert exported["verification"]["passed"], exported["verification"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(load_run(directory).tokenizer)


def test_a_peft_export_has_the_tokenizer(rows_run: Path, tmp_path: Path) -> None:
    export_run(rows_run, tmp_path / "out", ExportOptions(format_="peft"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(TOKENS) == load_run(rows_run).tokenizer.convert_tokens_to_ids(TOKENS)


def test_an_adapter_with_rows_is_continued_only_with_the_same_rows(place: Path, rows_run: Path, tmp_path: Path) -> None:
    again = {"adapter__resume_from": str(rows_run / "adapter"), "adapter__rank": ..., "adapter__alpha": ...}
    train_run(recipe(place, **NEW, **again, train__steps=1), tmp_path / "run")
    assert trained_matrices(load_run(tmp_path / "run").model)
    said = r"adapter.also_train: must be \[embed_tokens.*\] with adapter.also_train_rows new, as in .*, got .* with all"
    with pytest.raises(UserError, match=said):
        train_run(recipe(place, **WHOLE, **again), tmp_path / "other")
    turned = {"model__add_tokens": list(reversed(TOKENS))}
    with pytest.raises(UserError, match=r"model.add_tokens: must be \[.*\] as in the adapter in .*, got \["):
        train_run(recipe(place, **NEW | turned, **again), tmp_path / "turned")


def test_full_fine_tuning_takes_new_tokens(place: Path, tmp_path: Path) -> None:
    no_adapter = {"adapter__rank": ..., "adapter__alpha": ..., "adapter__dropout": ..., "adapter__kind": "full"}
    full = recipe(place, model__add_tokens=TOKENS, base__quant="none", train__steps=2, **no_adapter)
    train_run(full, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert loaded.model.get_input_embeddings().weight.shape[0] >= len(loaded.tokenizer)
    exported = export_run(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="float32"))
    assert exported["verification"]["passed"], exported["verification"]


def test_the_base_of_a_run_has_rows_for_its_tokens(rows_run: Path) -> None:
    loaded = load_run(rows_run, base_only=True)
    assert not trained_matrices(loaded.model)
    assert loaded.model(**loaded.tokenizer("<sum>1<end>", return_tensors="pt")).logits.isfinite().all()


def test_a_plan_counts_rows_and_whole_matrices() -> None:
    config = a_config(num_hidden_layers=1, tie_word_embeddings=False)
    rows, whole = (plan(a_recipe(train__optimizer="adamw", **changes), config=config) for changes in (NEW, WHOLE))

    def more(part: str) -> int:
        """Bytes of a component in the update that whole matrices take beyond those of new rows."""
        return whole.moments[-1].by_component[part] - rows.moments[-1].by_component[part]

    num_new, num_whole, num_adapters = 2 * 2 * 64, 2 * 514 * 64, 4 * 1024 + 512
    assert (rows.num_trainable, whole.num_trainable) == (num_adapters + num_new, num_adapters + num_whole)
    assert abs(rows.moments[-1].by_component[parts.DENSE] - 2 * (num_whole + 3 * 64)) <= 2 * 4 * 16  # and rotary tables
    assert more(parts.DENSE) == 0
    assert more(parts.ADAPTERS) == -(4 * num_new + 2 * 2 * 8)  # rows are float32 beside the matrices; and their ids
    assert more(parts.GRADIENTS) == 4 * (num_whole - num_new)
    assert more(parts.OPTIMIZER) == (8 + 2) * num_whole - 8 * num_new  # two states, and the low bits of bf16


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model": {"add_tokens": ["<a>"]}}, "adapter.also_train: must hold embed_tokens with model.add_tokens"),
        (
            {"adapter": {"also_train": ["embed_tokens"]}},
            "adapter.also_train_rows: must be all without model.add_tokens",
        ),
        ({"adapter": {"also_train": ["embed_token"]}}, "Did you mean 'embed_tokens'?"),
        ({"adapter": {"also_train_rows": "all"}}, "adapter.also_train is empty"),
        (
            {"model": {"add_tokens": ["<a>"]}, "adapter": {"kind": "none"}, "train": {"steps": 0}},
            "model.add_tokens: must be empty with adapter.kind none",
        ),
        (
            {"adapter": {"also_train": ["lm_head"], "also_train_rows": "all"}, "memory": {"host_embeddings": True}},
            "memory.host_embeddings: must be false with adapter.also_train_rows all",
        ),
    ],
)
def test_faults_of_the_settings(changes: dict[str, Any], fault: str) -> None:
    document = minimal()
    found = faults({**document, **{name: {**document.get(name, {}), **value} for name, value in changes.items()}})
    assert any(fault in each for each in found), found
