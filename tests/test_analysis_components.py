"""What rank components are worth: quadratic losses whose answer is known, and tiny models against their definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from qdora.analysis import components as module
from qdora.analysis.allocate import allocate, effective_rank
from qdora.analysis.components import Components, components, held_components, layer_components
from qdora.model.inject import adapted_layers
from tests import tiny_adapted, tiny_curvature
from tests.tiny_curvature import LAYERS


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    values = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(values).Q


def of_quadratic(missing: Tensor, sizes: Tensor, curvature: float, num_new: int) -> Components:
    """F = c ||D - X||^2 / 2: X has the singular values `missing`, and D `sizes` on the first of its directions."""
    left, right = orthonormal(24, len(missing), 0), orthonormal(17, len(missing), 1)
    held = (left[:, : len(sizes)], sizes, right[:, : len(sizes)])
    gradient = curvature * (held[0] * sizes @ held[2].T - left * missing @ right.T)
    return components(held, gradient, lambda x: curvature * float(x.square().sum()), num_new)


@pytest.mark.parametrize("sizes", [[], [1.0, 2.5, 0.3], [9.0]], ids=["b=0", "three", "far-off"])
def test_of_a_quadratic_loss_they_are_what_a_rank_leaves_out(sizes: list[float]) -> None:
    """Eckart-Young: each tau once, c tau^2 / 2, wherever D stands and whatever its rank."""
    missing = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5], dtype=torch.float64)
    held = torch.tensor(sizes, dtype=torch.float64)
    found = of_quadratic(missing, held, 4.0, 8)
    assert len(found.worths()) == 5
    spectrum = found.spectrum(10, 41)
    np.testing.assert_allclose(spectrum.energies, 2.0 * missing.square(), rtol=1e-10)
    assert spectrum.total == pytest.approx(2.0 * float(missing.square().sum()), rel=1e-10)
    assert effective_rank(spectrum, 0.9) == 3  # 9 + 4 + 2.25 of 16.5


def test_they_allocate_what_leaves_the_least_loss() -> None:
    """Two layers, one budget: by the largest eigenvalues, 2 r copies each, the steeper layer would get all."""
    first = torch.tensor([5.0, 0.2, 0.1], dtype=torch.float64)
    second = torch.tensor([2.0, 1.8, 1.6], dtype=torch.float64)
    start = torch.zeros(0, dtype=torch.float64)
    spectra = {
        "steep": of_quadratic(first, start, 1.0, 3).spectrum(3, 41),
        "broad": of_quadratic(second, start, 1.0, 3).spectrum(3, 41),
    }
    assert allocate(spectra, 4 * 41) == {"steep": 1, "broad": 3}


def test_what_was_not_looked_at_is_in_the_total() -> None:
    missing = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    spectrum = of_quadratic(missing, torch.zeros(0, dtype=torch.float64), 1.0, 1).spectrum(3, 41)
    assert spectrum.total == pytest.approx(3.5, rel=1e-10)
    assert effective_rank(spectrum, 0.9) is None


def test_a_component_that_moves_nothing_is_worth_nothing() -> None:
    gradient = torch.zeros(4, 3, dtype=torch.float64)
    gradient[0, 0] = 1.0
    held = (orthonormal(4, 1, 0), torch.ones(1, dtype=torch.float64), orthonormal(3, 1, 1))
    flat = components(held, gradient, lambda x: 0.0, 2)
    assert flat.worths().tolist() == [0.0] * len(flat.sizes)
    assert components(held, gradient * 0, lambda x: 1.0, 2).worths().tolist() == [0.5]  # none has a slope


def test_held_components_are_the_singular_directions_of_the_update() -> None:
    layer = adapted_layers(tiny_adapted.adapted(dtype=torch.float64))["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        layer.lora_B[:, 2] = layer.lora_B[:, 0]  # rank 2 of 3 ...
        layer.lora_A[2] = layer.lora_A[0]
    left, sizes, right = held_components(layer)
    update = layer.alpha / layer.rank * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    assert len(sizes) == 2
    torch.testing.assert_close(left * sizes @ right.T, update)
    torch.testing.assert_close(left.T @ left, torch.eye(2, dtype=torch.float64))
    with torch.no_grad():
        layer.lora_B.zero_()
    assert len(held_components(layer)[1]) == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind, norm", [("lora", "none"), ("dora", "attached"), ("dora", "held")])
@pytest.mark.parametrize("moved", [True, False])
def test_of_a_model_against_the_definition(kind: str, norm: Any, masked: bool, moved: bool) -> None:
    model = tiny_curvature.adapted(kind=kind, moved=moved, masked=masked)
    name = LAYERS[0]
    layer = adapted_layers(model)[name]
    batches = tiny_curvature.batches()
    found = layer_components(model, name, batches, norm=norm, num_new=6)
    logits, labels = by_update(model, norm == "held")
    update = layer.alpha / layer.rank * layer.lora_B.detach() @ layer.lora_A.detach()
    here = update.clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(logits(here), labels)
    (gradient,) = torch.autograd.grad(loss, here)
    left, sizes, right_t = torch.linalg.svd(update)
    held = int((sizes > 1e-12).sum())
    assert held == (2 if moved else 0)
    left, sizes, right = left[:, :held], sizes[:held], right_t[:held].T
    across = (torch.eye(len(left)) - left @ left.T).double() @ gradient
    across = across @ (torch.eye(len(right)) - right @ right.T).double()
    u, slopes, vh = torch.linalg.svd(across)
    pairs = [*zip(left.T, right.T, strict=True), *zip(u.T[:6], vh[:6], strict=True)]
    directions = [torch.outer(a, b) for a, b in pairs]
    np.testing.assert_allclose(found.sizes, [*sizes, *[0.0] * 6], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.slopes, [float((gradient * each).sum()) for each in directions], rtol=1e-6)
    np.testing.assert_allclose(found.slopes[held:], slopes[:6], rtol=1e-6)
    expected = []
    p = torch.softmax(logits(update), dim=-1)
    for direction in directions:
        _, along = torch.func.jvp(logits, (update,), (direction,))
        expected.append(float(((p * along.square()).sum(-1) - (p * along).sum(-1).square()).mean()))
    np.testing.assert_allclose(found.curvatures, expected, rtol=1e-6)
    assert found.tail == pytest.approx(float(slopes[6:].square().sum()), rel=1e-6)
    assert found.num_matvecs == held + 6


def by_update(model: Any, held: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The labelled logits of all batches as a function of s B A of the first layer, and the labels."""
    plain = tiny_curvature.base("llama")
    layers = adapted_layers(model)

    def logits(update: Tensor) -> Tensor:
        weights = {}
        for name, layer in layers.items():
            own = layer.alpha / layer.rank * layer.lora_B.detach() @ layer.lora_A.detach()
            magnitude = None if layer.magnitude is None else layer.magnitude.detach()
            base = plain.get_submodule(name).weight.detach()
            weights[f"{name}.weight"] = tiny_curvature.merged(
                base, update if name == LAYERS[0] else own, magnitude, held=held, masked=layer.masked
            )
        rows = []
        for batch in tiny_curvature.batches():
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            with sdpa_kernel(SDPBackend.MATH):
                out = functional_call(plain, weights, kwargs=inputs).logits[:, :-1]
            rows.append(out[batch.labels[:, 1:] != -100])
        return torch.cat(rows)

    return logits, torch.cat([tiny_curvature.targets(batch) for batch in tiny_curvature.batches()])


def test_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_curvature.adapted()
    given: dict[str, Any] = {"norm": "held", "num_new": 3, "cache": tmp_path / "cache", "state": "now"}
    first = layer_components(model, LAYERS[0], tiny_curvature.batches(), **given)
    monkeypatch.setattr(module, "components", None)
    again = layer_components(model, LAYERS[0], tiny_curvature.batches(), **given)
    assert again.to_dict() == first.to_dict()
    with pytest.raises(TypeError):
        layer_components(model, LAYERS[0], tiny_curvature.batches(), **(given | {"state": "later"}))
