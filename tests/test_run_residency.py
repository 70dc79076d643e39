"""Runs whose blocks come and go, loaded again: on a machine of another kind, and after memory.budget auto chose it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from qdora.errors import UserError
from qdora.files.run_directory import RunDirectory
from qdora.model.inject import frozen_layers
from qdora.plan.division import divided_recipe
from qdora.recipe.recipe_file import load_recipe, override, resolved_yaml
from qdora.run import prepare
from qdora.run.load_run import load_run
from qdora.run.residency_choice import FILE, keep_residency, residency_here
from qdora.run.train import train_run
from tests import tiny_run
from tests.test_memory_host_residency import stream_on_cpu


@pytest.mark.parametrize(
    ("trained", "differentiated", "on_gpu"),
    [("device", False, "device"), ("host", False, "host"), ("device", True, "device"), ("host", True, "device")],
)
def test_what_a_machine_has(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, trained: str, differentiated: bool, on_gpu: str
) -> None:
    recipe = tiny_run.recipe(root, base__residency=trained)
    for device, expected in (("cpu", "device"), ("cuda", on_gpu)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="qdora"):
            found = residency_here(RunDirectory(tmp_path), recipe, torch.device(device), differentiated=differentiated)
        assert found.base.residency == expected
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (expected != trained)
        assert all(expected in each and trained in each for each in told)


def test_what_was_chosen_is_kept_until_another_start_chooses(root: Path, tmp_path: Path) -> None:
    run, gpu = RunDirectory(tmp_path), torch.device("cuda")
    given = tiny_run.recipe(root)
    chosen = override(given, ["base.residency=host", "base.streamed_blocks=1", "memory.host_embeddings=true"])
    keep_residency(run, given, given)
    assert not (tmp_path / FILE).exists()
    keep_residency(run, given, chosen)
    assert residency_here(run, given, gpu) == chosen
    keep_residency(run, given, given)
    assert residency_here(run, given, gpu) == given
    keep_residency(run, given, chosen)
    divided = divided_recipe(chosen)
    assert divided is not None
    assert divided.train.divides_base
    keep_residency(run, chosen, divided)  # the whole base may not fit on the one device of a later command
    assert residency_here(run, chosen, gpu) == chosen
    (tmp_path / FILE).write_text('{"residency": "disk", "streamed_blocks": 2}')  # as an older version wrote it
    assert residency_here(run, chosen, gpu) == given
    (tmp_path / FILE).write_text('{"residency": "attic", "streamed_blocks": null}')
    with pytest.raises(UserError, match=r"residency\.json: is damaged: residency: Input should be"):
        residency_here(run, given, gpu)


def test_a_run_is_loaded_and_resumed_with_what_was_chosen(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_run.recipe(root, train__steps=2, eval__at_start=False, eval__at_end=False, eval__limit=...)
    chosen = ["base.residency=host", "base.streamed_blocks=1"]
    stream_on_cpu(monkeypatch)
    monkeypatch.setattr(prepare, "within_budget", lambda given, *_, **__: (override(given, chosen), None))
    run = tmp_path / "run"
    train_run(recipe, run)
    assert load_recipe(run / "recipe.yaml").base.residency == "device"
    assert json.loads((run / FILE).read_text())["streamed_blocks"] == 1
    assert all(layer.residency is None for layer in frozen_layers(load_run(run).model).values())  # without a GPU
    train_run(recipe, run, resume=True)
    assert load_recipe(run / "recipe.yaml").base.residency == "device"
    assert (run / FILE).exists()


def test_a_recipe_of_an_earlier_version_with_its_base_on_disk_is_read(root: Path, tmp_path: Path) -> None:
    given = tiny_run.recipe(root, base__residency="host", base__streamed_blocks=1)
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(given).replace("residency: host", "residency: disk"))
    assert load_recipe(tmp_path / "recipe.yaml") == tiny_run.recipe(root)
