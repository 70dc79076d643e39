"""Runs on a pruned base: compressed once, recorded, and the same one in training, evaluation, export and resume."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdora.errors import Interrupted, UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.model.build_model import choose_compute
from qdora.model.inject import adapted_layers
from qdora.model.source import resolve
from qdora.recipe.settings import CalibrationConfig
from qdora.run import calibration, pruned_base
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.load_run import load_run
from qdora.run.train import train_run
from tests import tiny_run
from tests.run_files import assert_same_run, stop_after

PRUNE = {"method": "wanda", "pattern": "2:4", "calibration": {"sequences": 4, "length": 48}}


def recipe(root: Path, prune: dict[str, Any] = PRUNE, **changes: Any) -> Any:
    return tiny_run.recipe(root, base__prune=prune, train__steps=3, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pruned")


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    train_run(recipe(root), root / "run")
    return root / "run"


def test_the_run_records_the_sparsity_of_every_layer(run: Path) -> None:
    record = json.loads((run / "base/compressed.json").read_text())
    assert record["sparsity"] == 0.5
    assert record["settings"]["prune"]["pattern"] == "2:4"
    assert len(record["layers"]) == 14
    for name, layer in record["layers"].items():
        assert layer["sparsity"] == 0.5, name
        assert layer["kind"] == "nf4"
        assert 0.1 < layer["relative_error"] < 1
    adapter = json.loads((run / "adapter/qdora.json").read_text())
    assert adapter["base"]["quant"]["prune"]["method"] == "wanda"
    assert "Pruned 14 layers by wanda: 50.00 %" in (run / "log.txt").read_text()


def test_evaluation_and_export_take_the_base_that_was_trained_on(run: Path, tmp_path: Path) -> None:
    trained = load_run(run)
    stored = load_file(run / "base/model.safetensors")
    for path, layer in adapted_layers(trained.model).items():
        packed = layer.base.packed_weight
        assert packed is not None
        assert torch.equal(packed.packed, stored[f"{path}.packed"])
        assert not layer.base.dequantized()[~layer.base.keep_mask()].any()
    evaluated = evaluate_target(str(run), EvalOptions(split="validation"))
    at_end = json.loads((run / "eval/step-3.json").read_text())
    assert evaluated["evaluation"]["tasks"]["sums"]["nll_per_token"] == at_end["tasks"]["sums"]["nll_per_token"]
    assert export_run(run, tmp_path / "merged", ExportOptions(dtype="float32"))["verification"]["passed"]


def test_resumed_on_the_same_base(root: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train_run(recipe(root), tmp_path / "run")
    monkeypatch.undo()

    def never(*_: Any) -> None:
        raise AssertionError("compressed again")

    monkeypatch.setattr(pruned_base, "compress_base", never)
    train_run(recipe(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", run, step=3)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def start(monkeypatch: pytest.MonkeyPatch, until: str, recipe_: Any, directory: Path) -> None:
    """A start that is interrupted where it calls `until`."""
    with monkeypatch.context() as patch:
        patch.setattr(until, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_run(recipe_, directory)


def test_a_base_of_an_earlier_start_is_not_resumed_on(
    root: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither start has a result: the first has pruned its base, the second has only written its own recipe."""
    start(monkeypatch, "qdora.run.train.adapt", recipe(root, {**PRUNE, "pattern": "6:8"}), tmp_path / "run")
    start(monkeypatch, "qdora.run.pruned_base.compress_base", recipe(root), tmp_path / "run")
    assert json.loads((tmp_path / "run/base/compressed.json").read_text())["sparsity"] == 0.25
    train_run(recipe(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", run, step=3)


def test_a_base_of_the_same_recipe_is_kept_before_the_first_checkpoint(
    root: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(monkeypatch, "qdora.run.train.adapt", recipe(root), tmp_path / "run")
    monkeypatch.setattr(pruned_base, "compress_base", interrupt)
    train_run(recipe(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", run, step=3)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_other_rules_and_a_dense_base(root: Path, tmp_path: Path, method: str) -> None:
    prune: dict[str, Any] = {"method": method, "sparsity": 0.6}
    if method != "magnitude":
        text = tmp_path / "text.txt"
        text.write_text("a sum of numbers and letters. " * 60)
        prune["calibration"] = {"sequences": 3, "length": 32, "text": str(text)}
    result = train_run(recipe(root, prune, base__quant="none"), tmp_path / "run")
    assert result["num_layers"] == 14
    record = json.loads((tmp_path / "run/base/compressed.json").read_text())
    assert record["sparsity"] == pytest.approx(0.6, abs=0.001)
    for layer in adapted_layers(load_run(tmp_path / "run").model).values():
        assert not layer.base.dequantized()[~layer.base.keep_mask()].any()


def test_pieces_of_text() -> None:
    settings = CalibrationConfig(sequences=50, length=5, seed=1)
    found = calibration.pieces(list(range(10, 30)), [1], settings)
    assert found.shape == (50, 5)
    assert bool((found[:, 0] == 1).all())
    assert bool((found[:, 1:].diff(dim=1) == 1).all())
    assert found[:, 1].min() == 10
    assert found[:, 4].max() == 29
    assert torch.equal(found, calibration.pieces(list(range(10, 30)), [1], settings))
    with pytest.raises(UserError, match="got 5, but the text has only 3 tokens"):
        calibration.pieces([1, 2, 3], [1], settings)


def test_pieces_longer_than_the_context_are_refused(root: Path, tmp_path: Path) -> None:
    long = {**PRUNE, "calibration": {"sequences": 1, "length": 4096}}
    with pytest.raises(UserError, match=r"base\.prune\.calibration\.length: got 4096, must be at most 128"):
        train_run(recipe(root, long), tmp_path / "run")


def test_runs_that_share_a_base_compress_it_once(root: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    compress = pruned_base.compress_base
    monkeypatch.setattr(
        pruned_base, "compress_base", lambda *given, **more: (made.append(given[4].name), compress(*given, **more))
    )

    def shared(key: str, make: Any) -> Path:
        path = root / "shared" / key
        if not path.is_dir():
            path.mkdir(parents=True)
            make(path)
        return path

    arms = {
        "dora": recipe(root),
        "lora": recipe(root, adapter__kind="lora"),
        "denser": recipe(root, {**PRUNE, "pattern": "6:8"}),
        "other text": recipe(root, {**PRUNE, "calibration": {"sequences": 4, "length": 40}}),
    }
    for name, each in arms.items():
        train_run(each, root / name, shared_bases=shared)
    assert made == ["base"] * 3
    files = {name: root / name / "base/model.safetensors" for name in arms}
    assert files["dora"].samefile(files["lora"])
    assert not files["dora"].samefile(files["denser"])
    assert not files["dora"].samefile(files["other text"])
    alone = run / "base/model.safetensors"
    assert files["dora"].read_bytes() == alone.read_bytes()
    assert_same_run(root / "dora", run, step=3)
    load_run(root / "lora")  # it is whole by itself


def test_without_links_the_files_are_copied(root: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(pruned_base.os, "link", refuse)
    train_run(recipe(root), root / "copied", shared_bases=lambda _key, _make: run)
    copied = root / "copied/base/model.safetensors"
    assert copied.read_bytes() == (run / "base/model.safetensors").read_bytes()
    assert not copied.samefile(run / "base/model.safetensors")


def test_weights_that_changed_in_their_place_are_compressed_anew(root: Path, tmp_path: Path) -> None:
    recipe_ = recipe(root)
    folder = tmp_path / "model"
    shutil.copytree(root / "model", folder)
    compute = choose_compute("float32")
    key = pruned_base.compression_key(recipe_, resolve(str(folder)), compute, None)
    assert key == pruned_base.compression_key(recipe_, resolve(str(folder)), compute, None)
    file = folder / "model.safetensors"
    content, time = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(time + 1, time + 1))
    assert key != pruned_base.compression_key(recipe_, resolve(str(folder)), compute, None)
