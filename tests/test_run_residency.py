"""Runs whose blocks come and go, loaded again: on a machine of another kind, and after memory.budget auto chose it."""

from __future__ import annotations

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
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.load_run import load_run
from qdora.run.residency_choice import FILE, keep_residency, residency_here
from qdora.run.train import train_run
from tests import tiny_run

KINDS = ("device", "host", "disk")


@pytest.mark.parametrize(
    ("trained", "differentiated", "on_cpu", "on_gpu"),
    [
        ("device", False, "device", "device"),
        ("host", False, "disk", "host"),
        ("disk", False, "disk", "host"),
        ("device", True, "device", "device"),
        ("host", True, "disk", "device"),
        ("disk", True, "disk", "device"),
    ],
)
def test_what_a_machine_has(
    root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    trained: str,
    differentiated: bool,
    on_cpu: str,
    on_gpu: str,
) -> None:
    recipe = tiny_run.recipe(root, base__residency=trained)
    for device, expected in (("cpu", on_cpu), ("cuda", on_gpu)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="qdora"):
            found = residency_here(RunDirectory(tmp_path), recipe, torch.device(device), differentiated=differentiated)
        assert found.base.residency == expected
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (expected != trained)
        assert all(expected in each and trained in each for each in told)


def test_what_was_chosen_is_kept_until_another_start_chooses(root: Path, tmp_path: Path) -> None:
    run, cpu = RunDirectory(tmp_path), torch.device("cpu")
    given = tiny_run.recipe(root)
    chosen = override(given, ["base.residency=disk", "base.streamed_blocks=1", "memory.host_embeddings=true"])
    keep_residency(run, given, given)
    assert not (tmp_path / FILE).exists()
    keep_residency(run, given, chosen)
    found = residency_here(run, given, cpu)
    assert (found.base.residency, found.base.streamed_blocks) == ("disk", 1)
    assert found == chosen
    keep_residency(run, given, given)
    assert residency_here(run, given, cpu) == given
    keep_residency(run, given, chosen)
    divided = divided_recipe(chosen)
    assert divided is not None
    assert divided.train.divides_base
    keep_residency(run, chosen, divided)  # the whole base may not fit on the one device of a later command
    assert residency_here(run, chosen, cpu) == chosen
    (tmp_path / FILE).write_text('{"residency": "disk", "streamed_blocks": 2}')  # as an older version wrote it
    assert not residency_here(run, chosen, cpu).memory.host_embeddings
    (tmp_path / FILE).write_text('{"residency": "attic", "streamed_blocks": null}')
    with pytest.raises(UserError, match=r"residency\.json: is damaged: residency: Input should be"):
        residency_here(run, given, cpu)


def test_a_run_is_loaded_and_resumed_with_what_was_chosen_and_on_a_machine_without_its_gpu(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train__steps": 2, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    recipe = tiny_run.recipe(root, **changes, base__cache=str(tmp_path / "cache"))
    chosen = ["base.residency=disk", "base.streamed_blocks=1"]
    monkeypatch.setattr(prepare, "within_budget", lambda given, *_, **__: (override(given, chosen), None))
    run = tmp_path / "run"
    train_run(recipe, run)
    assert load_recipe(run / "recipe.yaml").base.residency == "device"
    model = load_run(run).model
    away = {name for name, layer in frozen_layers(model).items() if layer.residency is not None}
    assert len(away) == 7
    expected = evaluate_target(str(run), EvalOptions(limit=4))["evaluation"]["tasks"]
    (run / FILE).unlink()
    host = override(recipe, ["base.residency=host"])
    (run / "recipe.yaml").write_text(resolved_yaml(host))
    assert all(layer.residency is not None for layer in frozen_layers(load_run(run).model).values())
    assert evaluate_target(str(run), EvalOptions(limit=4))["evaluation"]["tasks"] == expected
    train_run(recipe, run, resume=True)
    assert load_recipe(run / "recipe.yaml").base.residency == "device"
    assert (run / FILE).exists()
