"""The base of a run: recorded, pruned once, or streamed; the same one in training, evaluation, export and resume."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from qdora.errors import Interrupted, UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import choose_compute
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.source import resolve
from qdora.plan.division import divided_recipe
from qdora.recipe.recipe_file import load_recipe, override, resolved_yaml
from qdora.recipe.settings import CalibrationConfig, Recipe
from qdora.run import base as calibration
from qdora.run import base as pruned_base
from qdora.run import prepare
from qdora.run.base import FILE, keep_residency, residency_here
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.load_run import load_run
from qdora.run.run import resumed_recipe, train_run
from tests import support
from tests.support import assert_same_run, stop_after
from tests.test_memory_host_residency import stream_on_cpu

QUIET = Console(quiet=True)
OLD, NEW = "a" * 40, "b" * 40


def nll(target: Path) -> float:
    return float(evaluate_target(str(target), console=QUIET)["evaluation"]["average"]["nll_per_token"])


def change_weights_(directory: Path) -> None:
    """Other weights in files of the same names and sizes."""
    file = directory / "model.safetensors"
    torch.manual_seed(1)
    changed = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})


# --- recorded


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with two commits, main at the older one: of org/small with other weights, and of org/words, a
    tokenizer, with other ids."""
    cache = tmp_path / "cache"
    for commit in (OLD, NEW):
        support.write_llama(cache / "models--org--small/snapshots" / commit)
        tokenizer = support.tokenizer()
        if commit == NEW:
            change_weights_(cache / "models--org--small/snapshots" / commit)
            tokenizer.add_tokens(["+", "follows"])
        tokenizer.save_pretrained(cache / "models--org--words/snapshots" / commit)
    move_main(cache, OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def move_main(cache: Path, commit: str) -> None:
    for repository in cache.iterdir():
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(commit)


@pytest.mark.parametrize("revision", [None, "main"])
@pytest.mark.parametrize("what", ["base", "tokenizer"])
def test_a_moved_branch(
    tmp_path: Path, hub: Path, what: str, revision: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"model__source": "org/small", "model__revision": revision}
    if what == "tokenizer":
        names = {"model__tokenizer": "org/words", "model__tokenizer_revision": revision}
    recipe, run = support.tiny_recipe(tmp_path, **names, train__steps=2, eval__at_start=False), tmp_path / "run"

    def kept() -> str | None:
        model = load_recipe(run / "recipe.yaml").model
        return model.revision if what == "base" else model.tokenizer_revision

    train_run(recipe, run, console=QUIET)
    assert kept() == OLD
    before = nll(run)
    move_main(hub, NEW)
    assert nll(run) == before
    given = tmp_path / "given.yaml"
    given.write_text(resolved_yaml(recipe))
    with caplog.at_level(logging.WARNING, "qdora"):
        again = resumed_recipe(run, str(given), ["train.steps=3"])
    assert "revision" not in caplog.text
    train_run(again, run, resume=True, console=QUIET)
    if revision is None:  # as a study resumes its cells, which have no revision
        train_run(override(recipe, ["train.steps=4"]), run, resume=True, console=QUIET)
    assert kept() == OLD
    setting, fault = "model.revision", "org/small is not the base that was trained on"
    if what == "tokenizer":
        setting, fault = "model.tokenizer_revision", "source letters differs from the data of the checkpoint"
    with pytest.raises(UserError, match=fault):
        train_run(override(again, ["train.steps=4", f"{setting}={NEW}"]), run, resume=True)
    if what == "base":
        for file, place in (("adapter_config.json", ()), ("qdora.json", ("base",))):
            found = json.loads((run / "adapter" / file).read_text())
            assert (found[place[0]] if place else found)["revision"] == OLD
        assert export_run(run, tmp_path / "out", console=QUIET)["verification"]["passed"]
        shutil.rmtree(hub / "models--org--small/snapshots" / OLD)
        with pytest.raises(UserError, match=f"org/small: its revision '{OLD}' is not in the Hub's cache"):
            load_run(run)


def test_a_run_of_an_older_version_goes_on_and_a_changed_base_is_refused(tmp_path: Path, hub: Path) -> None:
    recipe = support.tiny_recipe(tmp_path, model__source="org/small", train__steps=2, eval__at_start=False)
    run, out = tmp_path / "run", tmp_path / "out"
    train_run(recipe, run, console=QUIET)
    own = (run / "recipe.yaml").read_text()
    assert f"  revision: {OLD}\n" in own
    (run / "recipe.yaml").write_text(own.replace(f"  revision: {OLD}\n", ""))
    record = json.loads((run / "environment.json").read_text())
    del record["base"]
    (run / "environment.json").write_text(json.dumps(record))
    assert nll(run) > 0
    train_run(load_recipe(run / "recipe.yaml", ["train.steps=3"]), run, resume=True, console=QUIET)
    assert load_recipe(run / "recipe.yaml").model.revision == OLD  # from now on it is known
    snapshot = hub / "models--org--small/snapshots" / OLD
    moved = Path(shutil.copytree(snapshot, tmp_path / "base", copy_function=shutil.copyfile))  # other times, same files
    text = (run / "recipe.yaml").read_text().replace(f"  revision: {OLD}\n", "").replace("org/small", str(moved))
    (run / "recipe.yaml").write_text(text)
    assert nll(run) > 0
    longer = load_recipe(run / "recipe.yaml", ["train.steps=4"])
    change_weights_(moved)
    for call in (
        lambda: nll(run),
        lambda: export_run(run, out, console=QUIET),
        lambda: train_run(longer, run, resume=True),
    ):
        with pytest.raises(UserError, match=r"base is not the base that was trained on: model\.safetensors differs\."):
            call()
    assert load_recipe(run / "recipe.yaml").train.steps == 3
    assert not out.exists()


# --- pruned

PRUNE = {"method": "wanda", "pattern": "2:4", "calibration": {"sequences": 4, "length": 48}}


def pruned_recipe(root: Path, prune: dict[str, Any] = PRUNE, **changes: Any) -> Recipe:
    return support.tiny_recipe(root, base__prune=prune, train__steps=3, **changes)


@pytest.fixture(scope="module")
def pruned(root: Path) -> Path:
    train_run(pruned_recipe(root), root / "pruned", console=QUIET)
    return root / "pruned"


def test_evaluation_and_export_take_the_pruned_base_that_was_trained_on(pruned: Path, tmp_path: Path) -> None:
    record = json.loads((pruned / "base/compressed.json").read_text())
    assert (record["sparsity"], record["settings"]["prune"]["pattern"], len(record["layers"])) == (0.5, "2:4", 14)
    for name, layer in record["layers"].items():
        assert (layer["sparsity"], layer["kind"]) == (0.5, "nf4"), name
        assert 0.1 < layer["relative_error"] < 1
    adapter = json.loads((pruned / "adapter/qdora.json").read_text())
    assert adapter["base"]["quant"]["prune"]["method"] == "wanda"
    assert "Pruned 14 layers by wanda: 50.00 %" in (pruned / "log.txt").read_text()
    stored = load_file(pruned / "base/model.safetensors")
    for path, layer in adapted_layers(load_run(pruned).model).items():
        packed = layer.base.packed_weight
        assert packed is not None
        assert torch.equal(packed.packed, stored[f"{path}.packed"])
        assert not layer.base.dequantized()[~layer.base.keep_mask()].any()
    evaluated = evaluate_target(str(pruned), EvalOptions(split="validation"), console=QUIET)["evaluation"]
    at_end = json.loads((pruned / "eval/step-3.json").read_text())
    assert evaluated["tasks"]["sums"]["nll_per_token"] == at_end["tasks"]["sums"]["nll_per_token"]
    found = export_run(pruned, tmp_path / "merged", ExportOptions(dtype="float32"), console=QUIET)
    assert found["verification"]["passed"]


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


COMPRESS = "qdora.run.base.compress_base"


@pytest.mark.parametrize("case", ["stopped", "another recipe before", "not begun"])
def test_resumed_on_its_own_pruned_base(
    root: Path, pruned: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without another compression, unless an earlier start with another recipe has left its base."""

    def start(until: str, **prune: Any) -> None:
        """A start that is interrupted where it calls `until`."""
        with monkeypatch.context() as patch:
            patch.setattr(until, interrupt)
            with pytest.raises(KeyboardInterrupt):
                train_run(pruned_recipe(root, {**PRUNE, **prune}), tmp_path / "run", console=QUIET)

    if case == "stopped":
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(Interrupted):
                train_run(pruned_recipe(root), tmp_path / "run", console=QUIET)
    elif case == "not begun":
        start("qdora.run.run.adapt")
    else:
        start("qdora.run.run.adapt", pattern="6:8")
        start(COMPRESS)
        assert json.loads((tmp_path / "run/base/compressed.json").read_text())["sparsity"] == 0.25
    if case != "another recipe before":
        monkeypatch.setattr(COMPRESS, interrupt)
    train_run(pruned_recipe(root), tmp_path / "run", resume=True, console=QUIET)
    assert_same_run(tmp_path / "run", pruned, step=3)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_other_rules_and_a_dense_base(root: Path, tmp_path: Path, method: str) -> None:
    prune: dict[str, Any] = {"method": method, "sparsity": 0.6}
    if method != "magnitude":
        (tmp_path / "text.txt").write_text("a sum of numbers and letters. " * 60)
        prune["calibration"] = {"sequences": 3, "length": 32, "text": str(tmp_path / "text.txt")}
    result = train_run(pruned_recipe(root, prune, base__quant="none"), tmp_path / "run", console=QUIET)
    assert result["num_layers"] == 14
    record = json.loads((tmp_path / "run/base/compressed.json").read_text())
    assert record["sparsity"] == pytest.approx(0.6, abs=0.001)
    for layer in adapted_layers(load_run(tmp_path / "run").model).values():
        assert not layer.base.dequantized()[~layer.base.keep_mask()].any()


def test_calibration_takes_pieces_of_the_text(root: Path, tmp_path: Path) -> None:
    settings, ids = CalibrationConfig(sequences=50, length=5, seed=1), list(range(10, 30))
    found = calibration.pieces(ids, [1], settings)
    assert found.shape == (50, 5)
    assert bool((found[:, 0] == 1).all())
    assert bool((found[:, 1:].diff(dim=1) == 1).all())
    assert (found[:, 1].min(), found[:, 4].max()) == (10, 29)
    assert torch.equal(found, calibration.pieces(ids, [1], settings))
    assert calibration.pieces(ids[:4], [1], settings).unique().tolist() == [1, 10, 11, 12, 13]
    with pytest.raises(UserError, match="got 5, but the text has only 3 tokens"):
        calibration.pieces([1, 2, 3], [1], settings)
    long = {**PRUNE, "calibration": {"sequences": 1, "length": 129}}
    with pytest.raises(UserError, match=r"base\.prune\.calibration\.length: got 129, must be at most 128"):
        train_run(pruned_recipe(root, long), tmp_path / "run")


def test_runs_that_share_a_base_compress_it_once(root: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def shared(key: str, make: Any) -> Path:
        path = root / "shared" / key
        if not path.is_dir():
            path.mkdir(parents=True)
            made.append(key)
            make(path)
        return path

    arms = {
        "dora": pruned_recipe(root),
        "lora": pruned_recipe(root, adapter__kind="lora"),
        "denser": pruned_recipe(root, {**PRUNE, "pattern": "6:8"}),
        "other text": pruned_recipe(root, {**PRUNE, "calibration": {"sequences": 4, "length": 40}}),
    }
    for name, each in arms.items():
        train_run(each, root / name, shared_bases=shared, console=QUIET)
    assert len(made) == 3
    files = {name: root / name / "base/model.safetensors" for name in arms}
    assert [files["dora"].samefile(files[name]) for name in ("lora", "denser", "other text")] == [True, False, False]
    assert files["dora"].read_bytes() == (pruned / "base/model.safetensors").read_bytes()
    assert_same_run(root / "dora", pruned, step=3)
    load_run(root / "lora")  # it is whole by itself

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(pruned_base.os, "link", refuse)  # without links the files are copied
    train_run(pruned_recipe(root), root / "copied", shared_bases=lambda _key, _make: pruned, console=QUIET)
    copied = root / "copied/base/model.safetensors"
    assert copied.read_bytes() == files["dora"].read_bytes()
    assert not copied.samefile(pruned / "base/model.safetensors")


def test_weights_that_changed_in_their_place_are_compressed_anew(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(support.write_llama(tmp_path / "first"), tmp_path / "model"))

    def key() -> str:
        return pruned_base.compression_key(pruned_recipe(root), resolve(str(folder)), choose_compute("float32"), None)

    before = key()
    assert key() == before
    file = folder / "model.safetensors"
    content, time = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(time + 1, time + 1))
    assert key() != before


# --- streamed


@pytest.mark.parametrize("trained", ["device", "host"])
@pytest.mark.parametrize("differentiated", [False, True])
def test_residency_here(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, trained: str, differentiated: bool
) -> None:
    recipe = support.tiny_recipe(root, base__residency=trained)
    for device, expected in (("cpu", "device"), ("cuda", "device" if differentiated else trained)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="qdora"):
            found = residency_here(RunDirectory(tmp_path), recipe, torch.device(device), differentiated=differentiated)
        assert found.base.residency == expected
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (expected != trained)
        assert all(expected in each and trained in each for each in told)


def test_what_was_chosen_is_kept_until_another_start_chooses(root: Path, tmp_path: Path) -> None:
    run, gpu, given = RunDirectory(tmp_path), torch.device("cuda"), support.tiny_recipe(root)
    chosen = override(given, ["base.residency=host", "base.streamed_blocks=1", "memory.host_embeddings=true"])
    divided = divided_recipe(chosen)
    assert divided is not None
    assert divided.train.divides_base
    keep_residency(run, given, given)
    assert not (tmp_path / FILE).exists()
    # The whole of a divided base may not fit on the one device of a later command
    for first, second, expected in ((given, chosen, chosen), (given, given, given), (chosen, divided, chosen)):
        keep_residency(run, first, second)
        assert residency_here(run, first, gpu) == expected
    (tmp_path / FILE).write_text('{"residency": "disk", "streamed_blocks": 2}')  # as an older version wrote it
    assert residency_here(run, chosen, gpu) == given
    (tmp_path / FILE).write_text('{"residency": "attic", "streamed_blocks": null}')
    with pytest.raises(UserError, match=r"residency\.json: is damaged: residency: Input should be"):
        residency_here(run, given, gpu)


def test_a_run_goes_on_with_what_was_chosen(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = support.tiny_recipe(root, train__steps=2, eval__at_start=False, eval__at_end=False, eval__limit=...)
    chosen = ["base.residency=host", "base.streamed_blocks=1"]
    stream_on_cpu(monkeypatch)
    monkeypatch.setattr(prepare, "within_budget", lambda given, *_, **__: (override(given, chosen), None))
    run = tmp_path / "run"
    for resume in (False, True):
        train_run(recipe, run, resume=resume, console=QUIET)
        assert load_recipe(run / "recipe.yaml").base.residency == "device"
        assert json.loads((run / FILE).read_text())["streamed_blocks"] == 1
    assert all(layer.residency is None for layer in frozen_layers(load_run(run).model).values())  # without a GPU
