"""Curvature and components of stacks of experts, against float64 autograd through transformers' own experts."""

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

from qdora.analysis.components import (
    Components,
    Directions,
    StackProbe,
    drawn_curvatures,
    exact_curvatures,
    layer_directions,
    squared_slopes,
)
from qdora.analysis.curvature import CURVATURES, curvature_of, top_eigenpairs
from qdora.model.inject import inject, replace_module
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.nn.expert_linear import FrozenExperts
from qdora.ops.sparsity import mask_bits
from tests import tiny_adapted, tiny_curvature, tiny_experts

EXPERTS, RANK = 8, 2
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "moe_intermediate_size": 8,
    "intermediate_size": 16,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": EXPERTS,
}
STACKS = ("model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj")
SHARES = ("none", "A", "B")
KINDS = [("lora", "none"), ("dora", "attached"), ("dora", "held")]
CASES = [(kind, norm, share, masked) for kind, norm in KINDS for share in SHARES for masked in (False, True)]
FAST = [("dora", "attached", "none", False), ("lora", "none", "B", False), ("dora", "held", "A", True)]
SOME = [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]


def plain_mixture() -> Any:
    """transformers' own model in float64; its router's softmax alone is float32."""
    model = tiny_experts.make("qwen3_moe", torch.float64, **SIZES)
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("eager")
    tiny_curvature.widen_norms(model)
    return model.requires_grad_(False)


def mixture(directory: Path, *, kind: Any, share: Any = "none", masked: bool = False) -> tuple[Any, dict[str, Any]]:
    """The same with adapters on `STACKS`, off their start, pruned there if masked."""
    if not (directory / "config.json").exists():
        tiny_experts.make("qwen3_moe", torch.float64, **SIZES).save_pretrained(directory)
    model = load_model(resolve(str(directory)), quant="none", compute_dtype=torch.float64)
    tiny_curvature.widen_norms(model)
    for name in STACKS if masked else ():
        weight = model.get_submodule(name).weight.detach()
        keep = tiny_curvature.keep_mask(weight.shape)
        replace_module(model, name, FrozenExperts(weight * keep, EXPERTS, None, mask_bits(keep)))
    layers = inject(
        model.requires_grad_(False),
        kind=kind,
        rank=RANK,
        alpha=3.0,
        targets=list(STACKS),
        share=share,
        dtype=torch.float64,
        masked=masked,
        generator=torch.Generator().manual_seed(1),
    )
    tiny_adapted.move(layers)
    return model.eval(), layers


def values_of(layer: Any) -> dict[str, Tensor]:
    return {part: value.detach() for part, value in layer.named_parameters(recurse=False)}


def update_of(layer: Any, values: dict[str, Tensor]) -> Tensor:
    """s B A of each expert, (experts * out, in)."""
    a, b = values["lora_A"], values["lora_B"]
    scaling = layer.alpha / layer.rank
    experts = [scaling * b[e if len(b) > 1 else 0] @ a[e if len(a) > 1 else 0] for e in range(EXPERTS)]
    return torch.cat(experts)


def labelled(layers: dict[str, Any], *, held: bool) -> Callable[[dict[str, Tensor]], Tensor]:
    """From s B A of the stacks to the logits of all labelled tokens, through weights merged here."""
    plain = plain_mixture()

    def logits(updates: dict[str, Tensor]) -> Tensor:
        weights = {}
        for name, layer in layers.items():
            base = plain.get_parameter(name)
            magnitude = None if layer.magnitude is None else layer.magnitude.detach().flatten()
            flat = base.detach().flatten(0, 1)
            merged = tiny_curvature.merged(flat, updates[name], magnitude, held=held, masked=layer.masked)
            weights[name] = merged.view(base.shape)
        found = []
        for batch in tiny_curvature.batches():
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            with sdpa_kernel(SDPBackend.MATH):
                out = functional_call(plain, weights, kwargs=inputs).logits[:, :-1]
            found.append(out[batch.labels[:, 1:] != -100])
        return torch.cat(found)

    return logits


def labels() -> Tensor:
    return torch.cat([tiny_curvature.targets(batch) for batch in tiny_curvature.batches()])


def idle(model: Any) -> dict[str, set[int]]:
    """Stack -> the experts that no token of the batches reaches."""
    reached: dict[str, set[int]] = {name: set() for name in STACKS}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: reached[name].update(e for e, n in enumerate(args[1].counts) if n)
        )
        for name in STACKS
    ]
    with torch.no_grad():
        for batch in tiny_curvature.batches():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for hook in hooks:
        hook.remove()
    return {name: set(range(EXPERTS)) - each for name, each in reached.items()}


@pytest.mark.parametrize(("kind", "norm", "share", "masked"), SOME)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_products_are_those_of_autograd(
    tmp_path: Path, curvature: Any, kind: str, norm: Any, share: str, masked: bool
) -> None:
    model, layers = mixture(tmp_path, kind=kind, share=share, masked=masked)
    logits = labelled(layers, held=norm == "held")
    leaves = {
        (name, part): layers[name].get_parameter(part).detach() for name in STACKS for part in ("lora_A", "lora_B")
    }
    sizes = [leaf.numel() for leaf in leaves.values()]
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(sum(sizes), generator=generator, dtype=torch.float64) for _ in range(2)]

    def logits_of(*parts: Tensor) -> Tensor:
        values = {name: values_of(layer) for name, layer in layers.items()}
        for (name, part), value in zip(leaves, parts, strict=True):
            values[name][part] = value
        return logits({name: update_of(layer, values[name]) for name, layer in layers.items()})

    def loss(*parts: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits_of(*parts), labels())

    start = tuple(leaves.values())
    with curvature_of(model, STACKS, tiny_curvature.batches(), curvature=curvature, norm=norm) as operator:
        assert operator.size == sum(sizes)
        for vector in vectors:
            along = tuple(part.view_as(leaf) for part, leaf in zip(torch.split(vector, sizes), start, strict=True))
            if curvature == "hessian":
                _, image = torch.autograd.functional.hvp(loss, start, along)
            else:
                out, change = torch.autograd.functional.jvp(logits_of, start, along)
                p = torch.softmax(out, -1)
                weighted = (p * change - p * (p * change).sum(-1, keepdim=True)) / len(p)
                _, image = torch.autograd.functional.vjp(logits_of, start, weighted)
            expected = torch.cat([each.flatten() for each in image])
            found = operator.product(vector)
            assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_experts_without_tokens_have_no_curvature(tmp_path: Path) -> None:
    model, layers = mixture(tmp_path, kind="dora")
    batches, name = tiny_curvature.batches(), STACKS[0]
    without = idle(model)[name]
    assert 0 < len(without) < EXPERTS - 1
    with curvature_of(model, [name], batches, curvature="hessian", norm="attached") as operator:
        image = operator.product(torch.ones(operator.size, dtype=torch.float64))
    size = layers[name].lora_A.numel()
    for part, shape in ((image[:size], layers[name].lora_A.shape), (image[size:], layers[name].lora_B.shape)):
        moved = part.view(shape).flatten(1).abs().amax(dim=1).nonzero().flatten().tolist()
        assert len(moved) > 2
        assert without.isdisjoint(moved)
    found = layer_directions(model, {name: 3}, batches, norm="attached")
    drawn = drawn_curvatures(model, found, batches, norm="attached", draws=8)[name]
    for expert in without:
        assert not drawn.curvatures[expert].any()
        assert not drawn.worths()[expert].any()
        assert (drawn.directions.sizes[expert] > 0).sum() == RANK
    assert all(drawn.worths()[expert].sum() > 0 for expert in moved)


def test_eigenvalues_are_those_of_the_dense_matrix(tmp_path: Path) -> None:
    """Column by column from autograd's products."""
    model, layers = mixture(tmp_path, kind="lora", share="B")
    name = STACKS[0]
    logits, values = labelled(layers, held=False), values_of(layers[name])
    others = {other: update_of(layers[other], values_of(layers[other])) for other in STACKS[1:]}

    def loss(lora_B: Tensor) -> Tensor:
        update = update_of(layers[name], values | {"lora_B": lora_B})
        return torch.nn.functional.cross_entropy(logits({name: update, **others}), labels())

    size = values["lora_B"].numel()
    matrix = torch.autograd.functional.hessian(loss, values["lora_B"]).reshape(size, size)
    wanted = torch.linalg.eigvalsh(matrix)
    wanted = wanted[wanted.abs().argsort(descending=True)][:4]
    given: dict[str, Any] = {"curvature": "hessian", "norm": "none", "parts": ("lora_B",)}
    with curvature_of(model, [name], tiny_curvature.batches(), **given) as operator:
        assert operator.size == size
        found = top_eigenpairs(lambda v: operator.product(torch.from_numpy(v)).numpy(), size, 4, tolerance=1e-6)
    np.testing.assert_allclose(found.values, wanted.numpy(), rtol=1e-4)


def stacked(part: int, matrix: Tensor, share: str, shape: torch.Size) -> Tensor:
    """A matrix of one part in the layout of the stack, (experts * out, in); zero in other parts."""
    if share == "A":
        return matrix
    if share == "B":
        return torch.cat(list(matrix.split(shape[1], dim=1)), dim=0)
    whole = torch.zeros(EXPERTS, *matrix.shape, dtype=matrix.dtype)
    whole[part] = matrix
    return whole.flatten(0, 1)


@pytest.mark.parametrize(("kind", "norm", "share", "masked"), SOME)
def test_components_are_those_of_the_definition(tmp_path: Path, kind: str, norm: Any, share: str, masked: bool) -> None:
    model, layers = mixture(tmp_path, kind=kind, share=share, masked=masked)
    name, batches, num_new = STACKS[0], tiny_curvature.batches(), 2
    logits = labelled(layers, held=norm == "held")
    updates = {each: update_of(layer, values_of(layer)) for each, layer in layers.items()}

    def of_update(update: Tensor) -> Tensor:
        return logits(updates | {name: update})

    here = updates[name].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(of_update(here), labels()), here)
    found = layer_directions(model, {name: num_new}, batches, norm=norm)
    exact = exact_curvatures(model, found, batches, norm=norm)[name]
    p = torch.softmax(of_update(updates[name]), -1)
    pairs = zip(
        tiny_experts.parts_of(updates[name], EXPERTS, share),
        tiny_experts.parts_of(gradient, EXPERTS, share),
        strict=True,
    )
    num_compared = 0
    for part, (update, slope) in enumerate(pairs):
        left, sizes, right = torch.linalg.svd(update)
        left, sizes, right = left[:, :RANK], sizes[:RANK], right[:RANK].T
        across = slope - left @ (left.T @ slope)
        across = across - (across @ right) @ right.T
        u, slopes, vh = torch.linalg.svd(across)
        matrices = [torch.outer(a, b) for a, b in zip(left.T, right.T, strict=True)]
        # Without tokens there is no new component, and with one token there is one.
        some = int((slopes[:num_new] > 1e-6 * slopes[0]).sum())
        matrices += [torch.outer(a, b) for a, b in zip(u.T[:some], vh[:some], strict=True)]
        expected = []
        for matrix in matrices:
            direction = stacked(part, matrix, share, updates[name].shape)
            _, along = torch.autograd.functional.jvp(of_update, updates[name], direction)
            expected.append(float(((p * along.square()).sum(-1) - (p * along).sum(-1).square()).mean()))
        count = len(matrices)
        own = found[name]
        np.testing.assert_allclose(own.sizes[part], [*sizes, *[0.0] * num_new], rtol=1e-9, atol=1e-15)
        wanted = [float((slope * each).sum()) for each in matrices]
        np.testing.assert_allclose(own.slopes[part][:count], wanted, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(exact.curvatures[part][:count], expected, rtol=1e-4, atol=1e-12)
        assert not exact.curvatures[part][count:].any()
        assert own.tail[part] == pytest.approx(float(slopes[num_new:].square().sum()), rel=1e-4, abs=1e-12)
        num_compared += count
    assert num_compared > (RANK + num_new) * len(exact.curvatures) // 2


@pytest.mark.parametrize(("kind", "norm", "share", "masked"), SOME)
def test_drawing_every_label_once_by_its_chance_is_exact(
    tmp_path: Path, kind: str, norm: Any, share: str, masked: bool
) -> None:
    """Of one labelled token: the sum over all labels of p times the squared slope is the form itself."""
    model, layers = mixture(tmp_path, kind=kind, share=share, masked=masked)
    batch = tiny_curvature.batches()[0]
    batch.labels[:, :-1] = -100
    found = layer_directions(model, dict.fromkeys(STACKS, 2), tiny_curvature.batches(), norm=norm)
    exact = exact_curvatures(model, found, [batch], norm=norm)
    probes = {name: StackProbe(layers[name], each, norm) for name, each in found.items()}
    chances = []

    def every_label(logits: Tensor) -> Tensor:
        chances.append(torch.softmax(logits, dim=-1)[0])
        return torch.arange(logits.shape[-1])[:, None]

    squares = squared_slopes(model, probes, batch, every_label, device=torch.device("cpu"))
    for name in STACKS:
        mean = torch.tensordot(chances[0], squares[name], dims=1).numpy()
        assert mean.max() > 0
        np.testing.assert_allclose(mean, exact[name].curvatures, rtol=1e-5, atol=1e-7 * mean.max())


def test_the_worth_of_a_stack_is_the_sum_over_its_parts() -> None:
    """The second part has one component, and the third is flat beside the others, but not by itself."""
    sizes = np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [1e4, 0.0, 0.0]])
    slopes = np.array([[0.0, 0.0, 0.4], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    curvatures = np.array([[2.0, 1.0, 0.1], [4.0, 0.0, 0.0], [1e-8, 0.0, 0.0]])
    vectors, tails = torch.zeros(3, 5, 3), np.array([0.08, 0.0, 0.0])
    found = Components(Directions(vectors, vectors, sizes, slopes, tails), curvatures, curvatures * 0)
    np.testing.assert_allclose(found.worths(), [[1.0, 2.0, 0.8], [18.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    spectrum = found.spectrum(2, 7)
    np.testing.assert_allclose(spectrum.energies, [20.5, 1.0])
    assert spectrum.total == pytest.approx(22.3 + 0.08 * 0.8 / 0.16)
    assert spectrum.cost == 7
