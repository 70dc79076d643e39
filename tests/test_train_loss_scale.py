"""Training in float16: gradients of many tokens against float64, and a loss scale that no step is lost to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qdora.data.batching import IGNORED, Batching, micro_batches
from qdora.data.loader import Step
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.model.inject import adapter_parameters, inject
from qdora.recipe.settings import AdapterConfig, BaseWeightsConfig
from qdora.run.train import train_run
from qdora.train import loss_scale
from qdora.train.loss_scale import LossScale
from qdora.train.passes import step_gradient
from tests import tiny_adapted, tiny_run
from tests.run_files import assert_same_run, make_gradients_nan, stop_after, trained
from tests.test_data_loader import tokenised

TOKENS = 32_768
"""Labelled tokens of the step; these tests hold one process's share of them."""


def model(dtype: torch.dtype, adapter: torch.dtype) -> Any:
    made = tiny_adapted.base("llama", dtype=dtype)
    layers = inject(made, rank=3, alpha=6.0, dtype=adapter, generator=torch.Generator().manual_seed(1))
    tiny_adapted.move(layers)
    return made.train()


def share() -> Step:
    examples = tokenised("long", [40, 33, 37, 28]).examples
    batches = micro_batches(examples, Batching(96, pad_id=0), ["long"])
    return Step(batches, TOKENS, 0, len(examples), {"long": TOKENS})


def expected_gradients() -> dict[str, Tensor]:
    """By torch's own loss in float64."""
    twin = model(torch.float64, torch.float64)
    for micro in share().micro_batches:
        logits = twin(input_ids=micro.input_ids, attention_mask=micro.attention_mask, use_cache=False).logits
        labels = micro.labels[:, 1:].reshape(-1)
        flat = logits[:, :-1].reshape(len(labels), -1)
        nll = functional.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum")
        (nll / TOKENS).backward()
    return {name: p.grad for name, p in adapter_parameters(twin).items() if p.grad is not None}


def worst_cosine(dtype: torch.dtype, scale: LossScale | None) -> tuple[float, float]:
    """The least cosine of a tensor's gradient to float64, and the largest error of a norm."""
    ours = model(dtype, torch.float32)
    step_gradient(ours, share(), device=torch.device("cpu"), loss_scale=scale)
    found, expected = adapter_parameters(ours), expected_gradients()
    assert len(expected) == 42
    cosines, norms = [], []
    for name, wanted in expected.items():
        gradient = found[name].grad
        assert gradient is not None
        assert gradient.dtype == torch.float32
        one, other = gradient.double().flatten(), wanted.flatten()
        cosines.append(float(functional.cosine_similarity(one, other, dim=0)))
        norms.append(abs(float(one.norm() / other.norm()) - 1))
    return min(cosines), max(norms)


def test_float16_keeps_the_gradients_of_a_step_of_many_tokens() -> None:
    cosine, norm = worst_cosine(torch.float16, LossScale())
    assert cosine > 0.9999
    assert norm < 5e-3
    plain, _ = worst_cosine(torch.float16, None)
    assert plain < 0.99, "this step does not need a loss scale"


def test_a_process_without_an_example_has_no_gradient_to_unscale() -> None:
    ours = model(torch.float16, torch.float32)
    step = dataclasses.replace(share(), micro_batches=[])
    metrics, example_nll = step_gradient(ours, step, device=torch.device("cpu"), loss_scale=LossScale())
    assert (metrics["loss"], metrics["tasks"], example_nll) == (0, {}, [])
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_the_scale_halves_and_doubles_and_survives_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_PATIENCE", 3)
    scale = LossScale()
    assert scale.halve()
    start, values = scale.value, []
    for _ in range(7):
        again = LossScale()
        again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
        scale = again
        scale.applied()
        values.append(scale.value / start)
    assert values == [1, 1, 2, 2, 2, 4, 4]
    for _ in range(40):
        last = scale.halve()
    assert not last
    assert scale.value == 2.0**-4
    for _ in range(100):
        scale.applied()
    assert scale.value == 2.0**15


def half(root: Path, dtype: str = "float16") -> Any:
    return tiny_run.recipe(root, model__dtype=dtype, eval__tasks=[], eval__limit=...)


def test_a_run_in_float16_learns_what_one_in_float32_learns(root: Path, tmp_path: Path) -> None:
    train_run(half(root), tmp_path / "half")
    train_run(half(root, "float32"), tmp_path / "whole")
    losses = [[line["loss"] for line in trained(tmp_path / run)] for run in ("half", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    norms = [[line["gradient_norm"] for line in trained(tmp_path / run)] for run in ("half", "whole")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def test_an_overflow_costs_no_step_and_the_scale_resumes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a scale that overflows, the run finds the largest that does not; all steps are those of a run from there."""
    settings = half(root)
    with monkeypatch.context() as patched:
        patched.setattr(loss_scale, "_START", 2.0**40)
        train_run(settings, tmp_path / "high")
        stop_after(patched, 3)
        with pytest.raises(Interrupted):
            train_run(settings, tmp_path / "resumed")
    train_run(settings, tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "high")
    lines = trained(tmp_path / "high")
    scales = [line["loss_scale"] for line in lines]
    assert len(lines) == 6
    assert max(scales) < 2.0**40
    with monkeypatch.context() as patched:
        patched.setattr(loss_scale, "_START", scales[0])
        train_run(settings, tmp_path / "found")
    assert trained(tmp_path / "found") == lines


def test_a_bad_batch_leaves_the_scale_as_it_was(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is NaN with any scale; it is skipped, and the next step starts with the scale of the one before."""
    settings = half(root)
    changed = settings.train.model_copy(update={"on_bad_step": "skip", "checkpoint_every": 1})
    make_gradients_nan(monkeypatch)
    with pytest.raises(RunFailure, match="step 6: gradient norm nan is not finite"):
        train_run(settings.model_copy(update={"train": changed}), tmp_path)
    state = json.loads((tmp_path / "checkpoints/step-5/state.json").read_text())
    assert state["policies"]["loss_scale"]["value"] == LossScale().value


def test_float16_weights_are_not_trained_themselves(root: Path, tmp_path: Path) -> None:
    full = {"adapter": AdapterConfig(kind="full"), "base": BaseWeightsConfig(quant="none")}
    said = r"model\.dtype: got float16, must be bfloat16 or float32 with adapter\.kind full"
    with pytest.raises(UserError, match=said):
        train_run(half(root).model_copy(update=full), tmp_path / "run")
