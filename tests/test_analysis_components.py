"""What rank components are worth: quadratic losses whose answer is known, and tiny models against their definition,
with adapters on layers and on stacks of experts, by float64 autograd through transformers' own code. Ranks under a
budget, errors undone and changes of weights, against loops and against all possible choices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from qdora.data.batches import MicroBatch
from qdora.errors import UserError
from qdora.model.inject import adapted_layers, inject
from qdora.rank.allocate import LayerSpectrum, allocate
from qdora.rank.changes import error_undone, set_magnitude_back_, weight_changes
from qdora.rank.components import (
    Components,
    Directions,
    Probe,
    directions,
    drawn_curvatures,
    drawn_labels,
    exact_curvatures,
    held_components,
    layer_directions,
    squared_slopes,
)
from tests import reference, support
from tests.adapter_numbers import expected_weight
from tests.support import CURVED_LAYERS, EXPERTS, STACKS, update_of


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    values = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(values).Q


def with_curvatures(found: Directions, curvatures: Any) -> Components:
    return Components(found.sizes, found.slopes, curvatures, curvatures * 0.0)


def of_quadratic(missing: Sequence[float], sizes: Sequence[float], curvature: float, num_new: int) -> Components:
    """F = c ||D - X||^2 / 2: X has the singular values `missing`, and D `sizes` on the first of its directions."""
    left, right = orthonormal(24, len(missing), 0), orthonormal(17, len(missing), 1)
    held, taus = torch.tensor(sizes, dtype=torch.float64), torch.tensor(missing, dtype=torch.float64)
    own = (left[:, : len(sizes)], held, right[:, : len(sizes)])
    found = directions(own, curvature * (own[0] * held @ own[2].T - left * taus @ right.T), num_new)
    return with_curvatures(found, np.full(len(found.sizes), curvature))


@pytest.mark.parametrize("sizes", [[], [1.0, 2.5, 0.3], [9.0]], ids=["b=0", "three", "far-off"])
def test_of_a_quadratic_loss_they_are_what_a_rank_leaves_out(sizes):
    """Eckart-Young: each tau once, c tau^2 / 2, wherever D stands and whatever its rank."""
    missing = [3.0, 2.0, 1.5, 1.0, 0.5]
    spectrum = of_quadratic(missing, sizes, 4.0, 8).spectrum(10, 41)
    np.testing.assert_allclose(spectrum.energies, 2.0 * np.square(missing), rtol=1e-10)


def test_they_allocate_what_leaves_the_least_loss():
    """Two layers, one budget: by the largest eigenvalues, 2 r copies each, the steeper layer would get all."""
    steep, broad = ([5.0, 0.2, 0.1], [2.0, 1.8, 1.6])
    spectra = {name: of_quadratic(each, [], 1.0, 3).spectrum(3, 41) for name, each in {"a": steep, "b": broad}.items()}
    assert allocate(spectra, 4 * 41) == {"a": 1, "b": 3}


def test_a_component_that_moves_nothing_is_worth_nothing():
    gradient = torch.zeros(4, 3, dtype=torch.float64)
    gradient[0, 0] = 1.0
    held = (orthonormal(4, 1, 0), torch.ones(1, dtype=torch.float64), orthonormal(3, 1, 1))
    found = directions(held, gradient, 2)
    assert not with_curvatures(found, np.zeros(len(found.sizes))).worths().any()
    still = directions(held, gradient * 0, 2)  # none has a slope
    assert with_curvatures(still, np.ones(len(still.sizes))).worths().tolist() == [0.5]


def test_the_worth_of_a_stack_is_the_sum_over_its_parts():
    """The second part has one component, and the third is flat beside the others, but not by itself."""
    sizes = np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [1e4, 0.0, 0.0]])
    slopes = np.array([[0.0, 0.0, 0.4], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    curvatures = np.array([[2.0, 1.0, 0.1], [4.0, 0.0, 0.0], [1e-8, 0.0, 0.0]])
    vectors = torch.zeros(3, 5, 3)
    found = with_curvatures(Directions(vectors, vectors, sizes, slopes), curvatures)
    np.testing.assert_allclose(found.worths(), [[1.0, 2.0, 0.8], [18.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    spectrum = found.spectrum(2, 7)
    np.testing.assert_allclose(spectrum.energies, [20.5, 1.0])
    assert spectrum.cost == 7
    assert found.to_dict()["worths"] == found.worths().tolist()


def test_held_components_are_the_singular_directions_of_the_update():
    layer = adapted_layers(support.adapted_model(dtype=torch.float64))["model.layers.0.mlp.up_proj"]
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
# (kind, norm, masked, moved, whether it is a stack of experts)
LAYER_CASES = [(*kind, masked, True, False) for kind in KINDS for masked in (False, True)]
LAYER_CASES += [(*kind, False, False, False) for kind in KINDS]
STACK_CASES = [("dora", "attached", False, True, True), ("lora", "none", False, True, True)]
STACK_CASES += [("dora", "held", True, True, True)]
# Draws are exact in the tests of every label and of micro-batches: a few cases are enough.
DRAWN = [("dora", "attached", True, True, False), ("lora", "none", False, False, False)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("mixture")


def stacked(part: int, matrix: Tensor, is_stack: bool, rows: int) -> Tensor:
    """A matrix of one part in the layout of the layer, (experts * out, in) of a stack; zero in other parts."""
    if not is_stack:
        return matrix
    whole = torch.zeros(EXPERTS, *matrix.shape, dtype=matrix.dtype)
    whole[part] = matrix
    assert whole.shape[0] * whole.shape[1] == rows
    return whole.flatten(0, 1)


@pytest.mark.parametrize("case", [*LAYER_CASES, *STACK_CASES], ids=str)
def test_of_a_model_against_the_definition(directory, case):
    kind, norm, masked, moved, is_stack = case
    if not is_stack:
        name, num_new, tolerance = CURVED_LAYERS[0], 6, 1e-6
        model = support.float64_adapted(kind=kind, moved=moved, masked=masked)
    else:
        name, num_new, tolerance = STACKS[0], 2, 1e-4
        model = support.curved_mixture(directory, kind=kind, masked=masked)
    batches, rank = support.curved_batches(), 2 if moved else 0
    own = layer_directions(model, {name: num_new}, batches, norm=norm)
    exact = exact_curvatures(model, own, batches, norm=norm)[name]
    assert not exact.curvature_errors.any()
    logits = support.logits_by_update(model, held=norm == "held")
    update = update_of(adapted_layers(model)[name])
    here = update.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits({name: here}), support.all_targets()), here)
    p = torch.softmax(logits({}), -1)

    def form(direction: Tensor) -> float:
        """<E, H E> from the definition."""
        _, along = torch.autograd.functional.jvp(lambda value: logits({name: value}), update, direction)
        return float(((p * along.square()).sum(-1) - (p * along).sum(-1).square()).mean())

    parts = [support.parts_of_experts(each, EXPERTS) if is_stack else [each] for each in (update, gradient)]
    found, num_compared, all_forms = own[name], 0, []
    sizes_of, slopes_of, curvatures_of = map(np.atleast_2d, (found.sizes, found.slopes, exact.curvatures))
    for part, (mine, slope) in enumerate(zip(*parts, strict=True)):
        left, sizes, right = torch.linalg.svd(mine)
        assert int((sizes > 1e-12).sum()) == rank
        left, sizes, right = left[:, :rank], sizes[:rank], right[:rank].T
        across = slope - left @ (left.T @ slope)
        across = across - (across @ right) @ right.T
        u, slopes, vh = torch.linalg.svd(across)
        # Of experts without tokens there is no new component, and with one token there is one.
        some = int((slopes[:num_new] > 1e-6 * slopes[0]).sum())
        pairs = [*zip(left.T, right.T, strict=True), *zip(u.T[:some], vh[:some], strict=True)]
        matrices = [torch.outer(a, b) for a, b in pairs]
        forms, count = [form(stacked(part, each, is_stack, len(update))) for each in matrices], len(matrices)
        np.testing.assert_allclose(sizes_of[part][:count], [*sizes, *[0.0] * some], rtol=1e-9, atol=1e-15)
        assert not sizes_of[part][count:].any()
        wanted = [float((slope * each).sum()) for each in matrices]
        np.testing.assert_allclose(slopes_of[part][:count], wanted, rtol=tolerance, atol=1e-9)
        np.testing.assert_allclose(slopes_of[part][rank:count], slopes[:some], rtol=tolerance, atol=1e-9)
        np.testing.assert_allclose(curvatures_of[part][:count], forms, rtol=tolerance, atol=1e-12)
        assert not curvatures_of[part][count:].any()
        num_compared, all_forms = num_compared + count, all_forms + forms
    assert num_compared > curvatures_of.size // 2
    if case in DRAWN:
        drawn = drawn_curvatures(model, own, batches, norm=norm, draws=800)[name]
        np.testing.assert_allclose(drawn.curvatures, all_forms, rtol=0.5)
        assert np.abs((drawn.curvatures - all_forms) / drawn.curvature_errors).max() < 4.5
        assert (drawn.curvature_errors < 0.15 * drawn.curvatures).all()


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


WRAPPERS = {"sequence first": SequenceFirst, "written into": WrittenInto}
VARIANTS = ["llama", "masked", "qwen2", "gated", "dead rows", "head", *WRAPPERS]


def a_model(kind: Any, variant: str) -> Any:
    """Adapters with dropout on `LAYERS`, or on others where the architecture or the layers are the point."""
    if variant == "masked":
        return support.float64_adapted(kind=kind, masked=True)
    model = support.float64_model("qwen2" if variant == "qwen2" else "llama")
    for name in CURVED_LAYERS if variant == "dead rows" else ():
        model.get_submodule(name).weight[3] = 0.0
    if variant in WRAPPERS:
        attention = model.model.layers[0].self_attn
        attention.v_proj = WRAPPERS[variant](attention.v_proj)
    biased = ["model.layers.0.self_attn.q_proj", *CURVED_LAYERS]
    targets: Any = {"qwen2": biased, "head": [*CURVED_LAYERS, "lm_head"]} | {each: ["linear"] for each in WRAPPERS}
    options: dict[str, Any] = {"rank": 2, "alpha": 3.0, "dtype": torch.float64, "dropout": 0.5}
    generator = torch.Generator().manual_seed(1)
    layers = inject(model, kind=kind, targets=targets.get(variant, list(CURVED_LAYERS)), generator=generator, **options)
    support.move_adapters_(layers)
    for layer in layers.values():
        if variant == "dead rows":
            layer.lora_B.data[3] = 0.0
        if variant == "gated":
            layer.add_gate()
            layer.gate.data = torch.tensor([0.3, 1.7], dtype=torch.float64)  # type: ignore[union-attr]
        layer.parameters_changed()
    return model


FEW = {"none": ("llama", "qwen2", "sequence first"), "held": ("llama", "dead rows")}
EXACT = [
    pytest.param(*kind, variant, False, False, id=f"{kind}-{variant}")
    for kind in KINDS
    for variant in FEW.get(kind[1], VARIANTS)
]
EXACT += [pytest.param(kind, norm, "mixture", masked, True) for kind, norm, masked, _, _ in STACK_CASES]


@pytest.mark.parametrize("kind, norm, variant, masked, is_stack", EXACT)
def test_drawing_every_label_once_by_its_chance_is_exact(directory, kind, norm, variant, masked, is_stack):
    """Of one labelled token: the sum over all labels of p times the squared slope is the form itself."""
    num_new = 2 if is_stack else 3
    model = support.curved_mixture(directory, kind=kind, masked=masked) if is_stack else a_model(kind, variant)
    layers, batch = adapted_layers(model), support.curved_batches()[0]
    batch.labels[:, :-1] = -100
    found = layer_directions(model, dict.fromkeys(layers, num_new), support.curved_batches(), norm=norm)
    exact = exact_curvatures(model, found, [batch], norm=norm)
    probes = {name: Probe(layers[name], each, norm) for name, each in found.items()}
    chances: list[Tensor] = []

    def every_label(logits: Tensor) -> Tensor:
        chances.append(torch.softmax(logits, dim=-1)[0])
        return torch.arange(logits.shape[-1])[:, None]

    model.train()  # dropout is off all the same
    squares = squared_slopes(model, probes, batch, every_label)
    assert model.training
    for name in layers:
        mean = torch.tensordot(chances[0], squares[name], dims=1).numpy()
        assert is_stack or mean.shape == (2 + num_new,)
        assert mean.max() > 0
        rtol, atol = (1e-5, 1e-7 * mean.max()) if is_stack else (1e-8, 0.0)
        np.testing.assert_allclose(mean, exact[name].curvatures, rtol=rtol, atol=atol)


def test_of_a_layer_without_rows_the_mean_is_right():
    """As many rows as positions, so that its input looks as if it had rows."""
    model = a_model("dora", "sequence first")
    ids = torch.tensor([[1, 17, 300, 5], [9, 120, 3, 30], [8, 2, 91, 44], [60, 7, 7, 250]])
    labels = ids.clone()
    labels[:, 0] = -100
    square = MicroBatch(ids, torch.ones_like(ids), labels, torch.zeros(4, dtype=torch.int64), ["task"], list("abcd"))
    found = layer_directions(model, dict.fromkeys(adapted_layers(model), 3), [square], norm="attached")
    exact = exact_curvatures(model, found, [square], norm="attached")
    drawn = drawn_curvatures(model, found, [square], norm="attached", draws=800)
    for name in found:
        assert np.abs((drawn[name].curvatures - exact[name].curvatures) / drawn[name].curvature_errors).max() < 4.5


def test_micro_batches_get_labels_of_their_own_and_errors_are_those_of_a_mean():
    model, batch = support.float64_adapted(kind="lora"), support.curved_batches()[0]
    found = layer_directions(model, dict.fromkeys(CURVED_LAYERS, 3), [batch], norm="none")
    drawn = drawn_curvatures(model, found, [batch, batch], norm="none", draws=8)
    layers = adapted_layers(model)
    probes = {name: Probe(layers[name], each, "none") for name, each in found.items()}
    values = []
    for number in range(2):
        draw = partial(drawn_labels, draws=8, generator=torch.Generator().manual_seed(number))
        values.append(squared_slopes(model, probes, batch, draw))
    num_tokens = 2 * int((batch.labels[:, 1:] != -100).sum())
    for name in CURVED_LAYERS:
        each = ((values[0][name] + values[1][name]) / num_tokens).numpy()
        np.testing.assert_allclose(drawn[name].curvatures, each.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(drawn[name].curvature_errors, each.std(axis=0, ddof=1) / np.sqrt(8), rtol=1e-12)


def test_labels_are_drawn_by_their_chances():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [30.0, 0.0, 0.0, 0.0]]).repeat(50, 1)  # more than a chunk
    labels = drawn_labels(logits, 4000, torch.Generator().manual_seed(3))
    assert labels.shape == (4000, 100)
    shares = torch.stack([(labels[:, 0::2] == label).double().mean() for label in range(4)])
    torch.testing.assert_close(shares, torch.softmax(logits[0].double(), 0), atol=0.005, rtol=0.0)
    assert bool((labels[:, 1::2] == 0).all())
    pairs = (labels[:, 0] == 2) & (labels[:, 2] == 2)  # independent from token to token
    assert float(pairs.double().mean()) == pytest.approx(float(shares[2]) ** 2, abs=0.03)


def spectrum(energies, cost=1):
    return LayerSpectrum(np.array(energies), cost)


def energy_of(layers, ranks):
    return sum(float(layers[name].energies[:rank].sum()) for name, rank in ranks.items())


def best_by_trying(layers, budget):
    found = [-1.0]
    for ranks in itertools.product(*(range(1, len(each.energies) + 1) for each in layers.values())):
        named = dict(zip(layers, ranks, strict=True))
        if sum(rank * layers[name].cost for name, rank in named.items()) <= budget:
            found.append(energy_of(layers, named))
    return max(found)


LAYERS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.one_of(st.integers(0, 6), st.floats(0, 9)), min_size=1, max_size=5)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(LAYERS, st.integers(0, 60))
def test_no_other_ranks_hold_more_than_a_component(drawn, spare):
    layers = {
        str(place): spectrum(sorted(map(float, values), reverse=True), cost)
        for place, (cost, values) in enumerate(drawn)
    }
    budget = sum(each.cost for each in layers.values()) + spare
    ranks = allocate(layers, budget)
    assert list(ranks) == list(layers)
    assert sum(rank * layers[name].cost for name, rank in ranks.items()) <= budget
    assert all(1 <= rank <= len(layers[n].energies) for n, rank in ranks.items())
    assert all(rank == 1 or layers[name].energies[rank - 1] > 0 for name, rank in ranks.items())
    lost, further = best_by_trying(layers, budget) - energy_of(layers, ranks), [0.0]
    further += [each.energies[ranks[name]] for name, each in layers.items() if ranks[name] < len(each.energies)]
    one_cost = len({each.cost for each in layers.values()}) == 1
    assert lost == pytest.approx(0.0, abs=1e-9) or (lost <= max(further) + 1e-9 and not one_cost)


def test_a_model_of_many_layers_in_a_moment():
    generator = np.random.default_rng(0)
    costs = (8192, 5120, 8192 + 6816, 12289)
    energies = [sorted(generator.exponential(size=64) ** 4, reverse=True) for _ in range(224)]
    layers = {str(place): spectrum(each, costs[place % 4]) for place, each in enumerate(energies)}
    budget = sum(16 * each.cost for each in layers.values())
    ranks = allocate(layers, budget)
    assert budget - min(costs) < sum(rank * layers[name].cost for name, rank in ranks.items()) <= budget


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(UserError, match=r"12 parameters .* got 10\."):
        allocate({"a": spectrum([1.0], 5), "b": spectrum([1.0], 7)}, 10)


@pytest.mark.parametrize("rows, columns, rank", [(13, 7, 3), (5, 11, 1), (4, 4, 9)])
def test_the_error_that_an_update_undoes_against_loops(rows, columns, rank):
    generator = torch.Generator().manual_seed(0)
    dense, error, noise = (torch.randn(rows, columns, generator=generator) for _ in range(3))
    merged, base = dense + 0.07 * error + 0.02 * noise, dense + 0.1 * error
    found = error_undone(merged - base, base - dense, rank)
    wanted = reference.error_undone(*(each.double().numpy() for each in (merged, base, dense)), rank)
    assert tuple(found.values()) == pytest.approx(wanted, rel=1e-4)
    # Each expert of a stack has the rank.
    stacked = error_undone(torch.stack([merged - base] * 2), torch.stack([base - dense, 3 * (dense - base)]), rank)
    assert stacked["error_undone_best"] == pytest.approx(wanted[1], rel=1e-4)
    still = error_undone(error * 0, error, rank)
    assert (still["error_undone"], still["error_cosine"]) == (0.0, 0.0)
    assert error_undone(base, error * 0, rank) == {}


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_changes_of_rows_against_loops_and_magnitudes_set_back(kind):
    layers = adapted_layers(support.adapted_model(quant="nf4", kind=kind))
    name = next(iter(layers))
    before = weight_changes(layers)
    assert set(before) == set(layers)
    directions, magnitudes, lengths = [], [], []
    base = layers[name].base.dequantized(torch.float64).tolist()
    for w, v in zip(base, expected_weight(layers[name]).tolist(), strict=True):
        norms = [math.sqrt(sum(value**2 for value in row)) for row in (w, v)]
        directions.append(1 - sum(a * b for a, b in zip(w, v, strict=True)) / norms[0] / norms[1])
        magnitudes.append(abs(norms[1] / norms[0] - 1))
        lengths.append(abs(norms[1] - norms[0]))
    found = before[name]
    wanted = [sum(each) / len(each) for each in (directions, magnitudes, lengths)]
    assert list(found.values()) == pytest.approx(wanted, rel=1e-3)
    assert min(found["direction"], found["magnitude"]) > 1e-4
    if kind == "lora":
        return
    for layer in layers.values():
        layer.gain(torch.float32)  # which is kept until the parameters change
        set_magnitude_back_(layer)
    after = weight_changes(layers)
    for name, layer in layers.items():
        assert after[name]["direction"] == pytest.approx(before[name]["direction"], rel=1e-3)
        assert after[name]["magnitude"] < 1e-5 < before[name]["magnitude"]
        rows, base_rows = layer.merged_weight().norm(dim=1), layer.base.dequantized().norm(dim=1)
        torch.testing.assert_close(rows, base_rows, rtol=1e-5, atol=1e-6)
