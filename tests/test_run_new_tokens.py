"""Runs that add tokens and train embeddings: data, training, resuming, exports and plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.errors import Interrupted, UserError
from qdora.export import merged
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.model.build_model import choose_compute, find_model, token_ids
from qdora.model.trained_embeddings import extend_vocabulary, trained_matrices
from qdora.plan import plan_contents as parts
from qdora.plan.memory_plan import plan
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.run.base import load_base
from qdora.run.generate import Sampling, generate_from
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from tests import support
from tests.support import assert_same_run, stop_after
from tests.test_plan_memory import a_config, a_recipe

QUIET = Console(quiet=True)
TOKENS = ["<sum>", "<end>"]
NEW = {"model__add_tokens": TOKENS, "adapter__also_train": ["embed_tokens", "lm_head"]}
WHOLE = NEW | {"adapter__also_train_rows": "all"}
TEXT = "<sum>3 + 4 = 7<end>"


def recipe(root: Path, **changes: Any) -> Recipe:
    """The tiny recipe on sums whose text has the new tokens."""
    found, sums = support.tiny_recipe(root, **changes), root / "marked.jsonl"
    rows = [{"prompt": f"<sum>{a} + {b} =", "completion": f" {a + b}<end>"} for a in range(6) for b in range(5)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = found.data.mix[0].model_copy(update={"source": str(sums)})
    return with_settings(found, data={"mix": (source,)})


@pytest.fixture(scope="module")
def place(root: Path) -> Path:
    """With a model whose rows are whole blocks of 64."""
    support.write_llama(root / "model", intermediate_size=128)
    return root


@pytest.fixture(scope="module")
def rows_run(place: Path) -> Path:
    train_run(recipe(place, **NEW), place / "rows", console=QUIET)
    return place / "rows"


@pytest.fixture(scope="module", params=["rows", "whole"])
def run(place: Path, rows_run: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == "rows":
        return rows_run
    train_run(recipe(place, **WHOLE), place / "whole", console=QUIET)
    return place / "whole"


def test_new_rows_move_and_all_others_stay_bit_for_bit(place: Path, rows_run: Path) -> None:
    asked = recipe(place, **NEW)
    source, tokenizer = find_model(asked)
    model: Any = load_base(asked, source, choose_compute("float32"))
    extend_vocabulary(model, token_ids(asked, tokenizer))
    start, loaded = model.get_input_embeddings().weight.detach(), load_run(rows_run)
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
    answer = generate_from(str(rows_run), "<sum>1 + 1 =", Sampling(max_new_tokens=2), raw=True)
    assert answer["num_new_tokens"] == 2
    bare = load_run(rows_run, base_only=True)  # the base of a run has rows for its tokens
    assert not trained_matrices(bare.model)
    assert bare.model(**bare.tokenizer(TEXT, return_tensors="pt")).logits.isfinite().all()


def test_resumed_equals_uninterrupted(place: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(place, **(NEW if run.name == "rows" else WHOLE))
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_run(asked, tmp_path / "run", console=QUIET)
    monkeypatch.undo()
    train_run(asked, tmp_path / "run", resume=True, console=QUIET)
    assert_same_run(tmp_path / "run", run)


def test_exports_have_the_rows_and_the_tokens(run: Path, tmp_path: Path) -> None:
    loaded = load_run(run)
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"merged": {"dtype": "float32", "audit": run.name == "rows"}, "nf4-lora": {}}
    options |= {"peft": {}} if run.name == "rows" else {}
    for form, own in options.items():
        exported = export_run(run, tmp_path / form, ExportOptions(format_=form, **own), console=QUIET)
        assert form == "peft" or exported["verification"]["passed"], exported["verification"]
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / form)
        assert torch.equal(tokenizer(TEXT, return_tensors="pt")["input_ids"], ids)
        assert len(tokenizer) == len(loaded.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_merge_with_other_rows_does_not_pass(rows_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merged_wrongly(weight: torch.Tensor, ids: Any, rows: torch.Tensor) -> torch.Tensor:
        wrong = weight.float().clone()
        wrong[-len(rows) :] = 0
        return wrong

    monkeypatch.setattr(merged, "with_rows", merged_wrongly)
    with pytest.raises(Exception, match="its trained rows are not those of the run"):
        export_run(rows_run, tmp_path / "out", ExportOptions(dtype="float32"), console=QUIET)


def test_an_adapter_with_rows_is_continued_only_with_the_same_rows(place: Path, rows_run: Path, tmp_path: Path) -> None:
    again = {"adapter__resume_from": str(rows_run / "adapter"), "adapter__rank": ..., "adapter__alpha": ...}
    train_run(recipe(place, **NEW, **again, train__steps=1), tmp_path / "run", console=QUIET)
    assert trained_matrices(load_run(tmp_path / "run").model)
    said = r"adapter.also_train: must be \[embed_tokens.*\] with adapter.also_train_rows new, as in .*, got .* with all"
    with pytest.raises(UserError, match=said):
        train_run(recipe(place, **WHOLE, **again), tmp_path / "other")
    turned = {"model__add_tokens": list(reversed(TOKENS))}
    with pytest.raises(UserError, match=r"model.add_tokens: must be \[.*\] as in the adapter in .*, got \["):
        train_run(recipe(place, **NEW | turned, **again), tmp_path / "turned")


def test_full_fine_tuning_takes_new_tokens_and_unseen_ones_are_a_warning(place: Path, tmp_path: Path) -> None:
    no_adapter = {"adapter__rank": ..., "adapter__alpha": ..., "adapter__dropout": ..., "adapter__kind": "full"}
    tokens = ["<sum>", "<other>"]
    full = recipe(place, model__add_tokens=tokens, base__quant="none", train__steps=2, **no_adapter)
    train_run(full, tmp_path / "run", console=QUIET)
    log = (tmp_path / "run/log.txt").read_text()
    assert "model.add_tokens: the training data does not have '<other>', so" in log
    loaded = load_run(tmp_path / "run")
    assert loaded.model.get_input_embeddings().weight.shape[0] >= len(loaded.tokenizer)
    exported = export_run(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="float32"), console=QUIET)
    assert exported["verification"]["passed"], exported["verification"]


def test_a_plan_counts_rows_and_whole_matrices() -> None:
    config = a_config(num_hidden_layers=1, tie_word_embeddings=False)
    rows, whole = (plan(a_recipe(train__optimizer="adamw", **changes), config=config) for changes in (NEW, WHOLE))
    few, all_ = (found.moments[-1].by_component for found in (rows, whole))  # in the update
    num_new, num_whole, num_adapters = 2 * 2 * 64, 2 * 514 * 64, 4 * 1024 + 512
    assert (rows.num_trainable, whole.num_trainable) == (num_adapters + num_new, num_adapters + num_whole)
    assert abs(few[parts.DENSE] - 2 * (num_whole + 3 * 64)) <= 2 * 4 * 16  # and rotary tables
    more = {part: all_.get(part, 0) - few[part] for part in few}
    assert more[parts.DENSE] == 0
    assert more[parts.ADAPTERS] == -(4 * num_new + 2 * 2 * 8)  # rows are float32 beside the matrices; and their ids
    assert more[parts.GRADIENTS] == 4 * (num_whole - num_new)
    assert more[parts.OPTIMIZER] == (8 + 2) * num_whole - 8 * num_new  # two states, and the low bits of bf16
