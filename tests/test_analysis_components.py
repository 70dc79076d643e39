"""What rank components are worth: quadratic losses whose answer is known, and tiny models against their definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from qdora.analysis import components as component_curvature
from qdora.analysis.allocate import allocate, effective_rank
from qdora.analysis.components import (
    Components,
    CurvatureProbe,
    Directions,
    directions,
    drawn_curvatures,
    drawn_labels,
    exact_curvatures,
    held_components,
    layer_directions,
    squared_slopes,
)
from qdora.data.batching import MicroBatch
from qdora.model.inject import adapted_layers, inject
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
    found = directions(held, gradient, num_new)
    return with_curvatures(found, np.full(len(found.sizes), curvature))


def with_curvatures(found: Directions, curvatures: Any) -> Components:
    return Components(found, curvatures, curvatures * 0.0)


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
    found = directions(held, gradient, 2)
    assert with_curvatures(found, np.zeros(len(found.sizes))).worths().tolist() == [0.0] * len(found.sizes)
    still = directions(held, gradient * 0, 2)  # none has a slope
    assert with_curvatures(still, np.ones(len(still.sizes))).worths().tolist() == [0.5]


def test_held_components_are_the_singular_directions_of_the_update() -> None:
    layer = adapted_layers(tiny_adapted.adapted(dtype=torch.float64))["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        layer.lora_B[:, 2] = layer.lora_B[:, 0]  # rank 2 of 3 ...
        layer.lora_A[2] = layer.lora_A[0]
    ((left, sizes, right),) = held_components(layer)
    update = layer.alpha / layer.rank * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    assert len(sizes) == 2
    torch.testing.assert_close(left * sizes @ right.T, update)
    torch.testing.assert_close(left.T @ left, torch.eye(2, dtype=torch.float64))
    with torch.no_grad():
        layer.lora_B.zero_()
    assert len(held_components(layer)[0][1]) == 0


KINDS = [("lora", "none"), ("dora", "attached"), ("dora", "held")]
FEW_DRAWN = [("dora", "attached", True, True), ("lora", "none", False, False)]
"""The cases of the definition against which draws are compared outside of the slow tests. What is drawn, and what is
made of it, is exact in test_drawing_every_label_once_by_its_chance_is_exact and
test_micro_batches_get_labels_of_their_own."""
CASES = [(kind, norm, masked, moved) for moved in (True, False) for kind, norm in KINDS for masked in (False, True)]


@pytest.mark.parametrize(
    "kind, norm, masked, moved, draws",
    [(*case, 800 if case in FEW_DRAWN else 0) for case in CASES]
    + [pytest.param(*case, 800, marks=pytest.mark.slow) for case in CASES if case not in FEW_DRAWN],
)
def test_of_a_model_against_the_definition(kind: str, norm: Any, masked: bool, moved: bool, draws: int) -> None:
    model = tiny_curvature.adapted(kind=kind, moved=moved, masked=masked)
    name = LAYERS[0]
    layer = adapted_layers(model)[name]
    batches = tiny_curvature.batches()
    found = layer_directions(model, {name: 6}, batches, norm=norm)
    exact = exact_curvatures(model, found, batches, norm=norm)[name]
    directions_found = found[name]
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
    matrices = [torch.outer(a, b) for a, b in pairs]
    np.testing.assert_allclose(directions_found.sizes, [*sizes, *[0.0] * 6], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(
        directions_found.slopes, [float((gradient * each).sum()) for each in matrices], rtol=1e-6
    )
    np.testing.assert_allclose(directions_found.slopes[held:], slopes[:6], rtol=1e-6)
    expected = []
    p = torch.softmax(logits(update), dim=-1)
    for direction in matrices:
        _, along = torch.func.jvp(logits, (update,), (direction,))
        expected.append(float(((p * along.square()).sum(-1) - (p * along).sum(-1).square()).mean()))
    np.testing.assert_allclose(exact.curvatures, expected, rtol=1e-6)
    assert not exact.errors.any()
    assert directions_found.tail == pytest.approx(float(slopes[6:].square().sum()), rel=1e-6)
    if not draws:
        return
    drawn = drawn_curvatures(model, found, batches, norm=norm, draws=draws)[name]
    np.testing.assert_allclose(drawn.curvatures, expected, rtol=0.5)
    assert np.abs((drawn.curvatures - expected) / drawn.errors).max() < 4.5
    assert (drawn.errors < 0.15 * drawn.curvatures).all()


@pytest.mark.parametrize(
    "variant", ["llama", "masked", "qwen2", "gated", "dead rows", "head", "sequence first", "written into"]
)
@pytest.mark.parametrize("kind, norm", KINDS)
def test_drawing_every_label_once_by_its_chance_is_exact(kind: str, norm: Any, variant: str) -> None:
    """Of one labelled token: the sum over all labels of p times the squared slope is the form itself."""
    model = a_model(kind, variant)
    layers = adapted_layers(model)
    batch = tiny_curvature.batches()[0]
    batch.labels[:, :-1] = -100
    found = layer_directions(model, dict.fromkeys(layers, 3), tiny_curvature.batches(), norm=norm)
    exact = exact_curvatures(model, found, [batch], norm=norm)
    probes = {name: CurvatureProbe(layers[name], each, norm) for name, each in found.items()}
    chances = []

    def every_label(logits: Tensor) -> Tensor:
        chances.append(torch.softmax(logits, dim=-1)[0])
        return torch.arange(logits.shape[-1])[:, None]

    model.train()  # dropout is off all the same
    squares = squared_slopes(model, probes, batch, every_label, device=torch.device("cpu"))
    assert model.training
    for name in layers:
        assert len(exact[name].curvatures) == 2 + 3
        np.testing.assert_allclose((chances[0] @ squares[name]).numpy(), exact[name].curvatures, rtol=1e-8)


def a_model(kind: str, variant: str) -> Any:
    """Adapters with dropout on `LAYERS`, or on others where the architecture or the layers are the point."""
    if variant == "masked":
        return tiny_curvature.adapted(kind=kind, masked=True)
    model = tiny_curvature.base("qwen2" if variant == "qwen2" else "llama")
    if variant == "dead rows":
        for name in LAYERS:
            model.get_submodule(name).weight[3] = 0.0
    wrappers = {"sequence first": SequenceFirst, "written into": WrittenInto}
    if variant in wrappers:
        attention = model.model.layers[0].self_attn
        attention.v_proj = wrappers[variant](attention.v_proj)
    biased = ["model.layers.0.self_attn.q_proj", *LAYERS]
    targets: Any = {"qwen2": biased, "head": [*LAYERS, "lm_head"]} | {each: ["linear"] for each in wrappers}
    layers = inject(
        model,
        kind=kind,  # type: ignore[arg-type]
        rank=2,
        alpha=3.0,
        targets=targets.get(variant, list(LAYERS)),
        dtype=torch.float64,
        dropout=0.5,
        generator=torch.Generator().manual_seed(1),
    )
    tiny_adapted.move(layers)
    for layer in layers.values():
        if variant == "dead rows":
            with torch.no_grad():
                layer.lora_B[3] = 0.0
        if variant == "gated":
            layer.add_gate()
            layer.gate.data = torch.tensor([0.3, 1.7], dtype=torch.float64)  # type: ignore[union-attr]
        layer.parameters_changed()
    return model


class SequenceFirst(torch.nn.Module):
    """A layer that gets (positions, rows, features), as in some models' own code."""

    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


class WrittenInto(SequenceFirst):
    """A layer into whose output the model writes, as OLMo's clip_qkv does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).clamp_(-1e3, 1e3)  # type: ignore[no-any-return]


def test_of_a_layer_without_rows_the_mean_is_right() -> None:
    """Also where there are as many rows as positions, so that its input looks as if it had rows."""
    model = a_model("dora", "sequence first")
    ids = torch.tensor([[1, 17, 300, 5], [9, 120, 3, 30], [8, 2, 91, 44], [60, 7, 7, 250]])
    labels = ids.clone()
    labels[:, 0] = -100
    square = MicroBatch(ids, torch.ones_like(ids), labels, torch.zeros(4, dtype=torch.int64), ["task"], list("abcd"))
    for batches in (tiny_curvature.batches(), [square]):
        found = layer_directions(model, dict.fromkeys(adapted_layers(model), 3), batches, norm="attached")
        exact = exact_curvatures(model, found, batches, norm="attached")
        drawn = drawn_curvatures(model, found, batches, norm="attached", draws=800)
        for name in found:
            assert np.abs((drawn[name].curvatures - exact[name].curvatures) / drawn[name].errors).max() < 4.5


def test_micro_batches_get_labels_of_their_own() -> None:
    model = tiny_curvature.adapted(kind="lora")
    batch = tiny_curvature.batches()[0]
    found = layer_directions(model, dict.fromkeys(LAYERS, 3), [batch], norm="none")
    seen: list[Tensor] = []
    real = component_curvature.drawn_labels

    def keep(*args: Any, **options: Any) -> Tensor:
        seen.append(real(*args, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component_curvature, "drawn_labels", keep)
        drawn = drawn_curvatures(model, found, [batch, batch], norm="none", draws=8)
        drawn_curvatures(model, found, [batch, batch], norm="none", draws=8, seed=1)
    assert len({tuple(each.flatten().tolist()) for each in seen}) == 4
    values = [
        squared_slopes(model, probes_of(model, found), batch, lambda _, labels=each: labels, device=torch.device("cpu"))
        for each in seen[:2]
    ]
    num_tokens = 2 * int((batch.labels[:, 1:] != -100).sum())
    for name in LAYERS:
        each = ((values[0][name] + values[1][name]) / num_tokens).numpy()
        np.testing.assert_allclose(drawn[name].curvatures, each.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(drawn[name].errors, each.std(axis=0, ddof=1) / np.sqrt(8), rtol=1e-12)


def probes_of(model: Any, found: dict[str, Directions]) -> dict[str, CurvatureProbe]:
    layers = adapted_layers(model)
    return {name: CurvatureProbe(layers[name], each, "none") for name, each in found.items()}


def test_what_they_cannot_take() -> None:
    model = tiny_curvature.adapted()
    batches = tiny_curvature.batches()
    found = layer_directions(model, {LAYERS[0]: 3}, batches, norm="held")
    with pytest.raises(ValueError, match="draws must be 8 or more, got 7"):
        drawn_curvatures(model, found, batches, norm="held", draws=7)
    for call in (
        lambda norm, given: layer_directions(model, {LAYERS[0]: 3}, given, norm=norm),
        lambda norm, given: drawn_curvatures(model, found, given, norm=norm, draws=8),
    ):
        with pytest.raises(ValueError, match="norm 'none' for dora layers; allowed: attached, held"):
            call("none", batches)
        silent = tiny_curvature.batches()[0]
        silent.labels[:] = -100
        with pytest.raises(ValueError, match="no labelled token"):
            call("held", [silent])
    with pytest.raises(ValueError, match="allowed: float32 or float64"):
        layer_directions(model.bfloat16(), {LAYERS[0]: 3}, batches, norm="held")


def test_labels_are_drawn_by_their_chances() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [30.0, 0.0, 0.0, 0.0]]).repeat(50, 1)  # more than a chunk
    labels = drawn_labels(logits, 4000, torch.Generator().manual_seed(3))
    assert labels.shape == (4000, 100)
    shares = torch.stack([(labels[:, 0::2] == label).double().mean() for label in range(4)])
    torch.testing.assert_close(shares, torch.softmax(logits[0].double(), 0), atol=0.005, rtol=0.0)
    assert bool((labels[:, 1::2] == 0).all())
    pairs = (labels[:, 0] == 2) & (labels[:, 2] == 2)  # independent from token to token
    assert float(pairs.double().mean()) == pytest.approx(float(shares[2]) ** 2, abs=0.03)


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
