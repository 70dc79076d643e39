"""Whole runs with data.packing on a tiny model: the losses of an unpacked run, and resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.errors import Interrupted, UserError
from qdora.run import pruned_base
from qdora.run.train import train_run
from qdora.train import packed_attention, passes
from tests import tiny_run
from tests.run_files import assert_same_run, make_gradients_nan, stop_after, timeless


def spy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the loop packs, micro-batch by micro-batch."""
    real, seen = passes.batch_loss, []

    def spying(*args: Any, **settings: Any) -> Any:
        seen.append(settings["packing"])
        return real(*args, **settings)

    monkeypatch.setattr(passes, "batch_loss", spying)
    return seen


@pytest.mark.parametrize("layout", ["rows", "single"])
def test_a_packed_run_has_the_losses_of_an_unpacked_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    plain = {"adapter__dropout": 0.0, "train__batch": 12, "eval__tasks": [], "eval__limit": ...}
    train_run(tiny_run.recipe(root, **plain), tmp_path / "plain")
    monkeypatch.setattr(packed_attention, "layout_for", lambda attention: layout)
    seen = spy(monkeypatch)
    train_run(tiny_run.recipe(root, **plain, data__packing=True), tmp_path / "packed")
    assert {packing.example_index.shape[0] > 1 for packing in seen} == {layout == "rows"}
    assert any((packing.position_ids == 0).sum(dim=1).max() > 1 for packing in seen)
    for one, other in zip(timeless(tmp_path / "plain"), timeless(tmp_path / "packed"), strict=True):
        assert one["num_tokens"] == other["num_tokens"]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["tasks"].keys() == one["tasks"].keys()
        for name, task in other["tasks"].items():
            assert task["num_tokens"] == one["tasks"][name]["num_tokens"]
            assert task["nll_sum"] == pytest.approx(one["tasks"][name]["nll_sum"], rel=1e-4)
    assert "packed examples stay apart: " in (tmp_path / "packed/log.txt").read_text()


def test_a_packed_run_that_was_stopped_goes_on_bit_for_bit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_run.recipe(root, data__packing=True, train__batch=12)  # with dropout
    train_run(recipe, tmp_path / "whole")
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_run(recipe, tmp_path / "run")
    monkeypatch.undo()
    torch.manual_seed(999)
    train_run(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_batch_that_is_kept_lists_its_examples_one_by_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gradients_nan(monkeypatch)
    with pytest.raises(RuntimeError, match="is not finite"):
        train_run(tiny_run.recipe(root, data__packing=True, train__batch=12), tmp_path)
    kept = json.loads((tmp_path / "bad-steps/step-1/batch.json").read_text())["examples"]
    assert len({(each["task"], each["id"]) for each in kept}) == 12
    for each in kept:
        labelled = [token for token, label in zip(each["input_ids"], each["labels"], strict=True) if label != -100]
        assert labelled == [label for label in each["labels"] if label != -100]
        assert labelled


def test_a_model_that_leaks_is_refused_before_the_first_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = pruned_base.load_base

    def leaking(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        real = model.forward

        def forward(input_ids: Any, position_ids: Any = None, **options: Any) -> Any:
            return real(input_ids=input_ids, **options)

        model.forward = forward
        return model

    monkeypatch.setattr(pruned_base, "load_base", leaking)
    with pytest.raises(UserError, match=r"^data\.packing: llama .* does not keep packed examples apart"):
        train_run(tiny_run.recipe(root, data__packing=True), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists() or not timeless(tmp_path)
