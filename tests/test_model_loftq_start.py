"""Adapters that start from the error of the base: the nearest of their rank, and a gain of 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.model.inject import inject
from qdora.model.loftq import nearest_low_rank, start_from_error_
from qdora.model.pruning import Pruner
from qdora.model.source import resolve
from qdora.recipe.settings import PruneConfig
from qdora.run.train import train_run
from tests import checkpoints, tiny_experts, tiny_run


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 9))
def test_nearest_low_rank(rows, columns, rank, seed):
    rank = min(rank, rows, columns)
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    u, s, v = np.linalg.svd(matrix)
    left, right = nearest_low_rank(torch.from_numpy(matrix), rank)
    assert left.shape == (rows, rank)
    assert right.shape == (rank, columns)
    np.testing.assert_allclose((left @ right).numpy(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-7)
    np.testing.assert_allclose(left.norm(dim=0).numpy(), right.norm(dim=1).numpy(), rtol=1e-6, atol=1e-9)
    assert not nearest_low_rank(torch.zeros(rows, columns), rank)[0].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_the_start_is_nearer_to_the_source(tmp_path: Path, kind: str, masked: bool) -> None:
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS["llama-tied-biased"])
    placer = Pruner(PruneConfig(method="magnitude", pattern="2:4"))
    model = checkpoints.load(tmp_path, quant="nf2", placer=placer)
    original = checkpoints.load(tmp_path)
    layers = inject(model, kind=kind, rank=8, alpha=8.0, dtype=torch.float32, masked=masked)
    left = start_from_error_(model, resolve(str(tmp_path)))
    assert left.keys() == layers.keys()
    for path, layer in layers.items():
        weight, base = original.get_submodule(path).weight.double().numpy(), layer.base.dequantized().double().numpy()
        error = weight - base
        if masked:
            error = error * layer.base.keep_mask().numpy()
        u, s, v = np.linalg.svd(error)
        update = (u[:, :8] * s[:8]) @ v[:8]
        np.testing.assert_allclose((layer.lora_B @ layer.lora_A).detach().numpy(), update, atol=2e-5)
        if masked:
            update = update * layer.base.keep_mask().numpy()
        assert left[path] == pytest.approx(np.linalg.norm(error - update) / np.linalg.norm(error), abs=1e-4)
        assert left[path] < 1
        np.testing.assert_allclose(layer.merged_weight(torch.float64).detach().numpy(), base + update, atol=2e-5)


def test_a_tied_head_starts_from_no_error(tmp_path: Path) -> None:
    """The checkpoint holds its weight once, by the name of the embedding; the base has it dense."""
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS["llama-tied-biased"])
    model = checkpoints.load(tmp_path, quant="nf4")
    inject(model, rank=2, targets=["lm_head", "q_proj"], dtype=torch.float32)
    left = start_from_error_(model, resolve(str(tmp_path)))
    assert left["lm_head"] == 1.0  # there is no error
    assert 0 < left["model.layers.0.self_attn.q_proj"] < 1
    assert not model.lm_head.lora_B.any()


def test_a_run_starts_from_it_once(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path, base__quant="nf3", adapter__init="loftq", train__steps=2)
    train_run(recipe, tmp_path / "run")
    assert "leave" in (tmp_path / "run/log.txt").read_text()
    plain = tiny_run.recipe(tmp_path, base__quant="nf3", train__steps=2)
    train_run(plain, tmp_path / "plain")

    def at_start(name: str) -> float:
        import json

        return json.loads((tmp_path / name / "eval/step-0.json").read_text())["average"]["nll_per_token"]

    assert at_start("run") != at_start("plain")


@pytest.mark.parametrize("share", ["none", "A", "B"])
def test_each_expert_has_a_start_of_its_own(tmp_path: Path, share: str) -> None:
    """Experts that share a factor have the nearest of all together."""
    tiny_experts.write(tmp_path, "gpt_oss")
    model, original = checkpoints.load(tmp_path, quant="nf2"), checkpoints.load(tmp_path)
    layers = inject(model, rank=3, alpha=6.0, dtype=torch.float32, targets="experts", share=share)
    left = start_from_error_(model, resolve(str(tmp_path)))
    assert len(layers) == 4
    for path, layer in layers.items():
        weight, base = (
            each.double().numpy() for each in (original.get_submodule(path).weight, layer.base.dequantized())
        )
        error = (weight - base).reshape(4, -1, weight.shape[1])
        parts = {"none": list(error), "A": [np.concatenate(error, axis=0)], "B": [np.concatenate(error, axis=1)]}[share]
        squares = [np.linalg.svd(part, compute_uv=False)[3:] ** 2 for part in parts]
        assert left[path] == pytest.approx(np.sqrt(np.sum(squares)) / np.linalg.norm(error), abs=1e-4)
        update = 2.0 * (layer.lora_B @ layer.lora_A).detach().numpy()
        assert np.linalg.norm(error - update) / np.linalg.norm(error) == pytest.approx(left[path], abs=1e-4)
        np.testing.assert_allclose(
            layer.merged_weight(torch.float64).numpy(), base + update.reshape(base.shape), atol=2e-5
        )
