"""Stacks of experts against float64, expert by expert: forward, gradients, norm, merge, gradients of gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qdora.nn.expert_linear import AdaptedExperts, ExpertLinear, FrozenExperts
from qdora.ops import expert_product, expert_tokens
from qdora.ops.expert_product import expert_rows
from qdora.ops.expert_tokens import ExpertTokens, padded_tokens
from qdora.ops.packed import dequantize, quantize
from tests import reference
from tests.test_nn_parameter_cache import HostWaits
from tests.test_ops_adapted_product import to_numpy

COUNTS = {"none, one and many": (0, 1, 9, 0, 4), "all with one": (0, 0, 14, 0, 0), "even": (3, 3, 3, 3, 2)}
EXPERTS, OUT, IN, RANK = 5, 12, 64, 3


def stack(quant: str | None = "nf4", *, bias: bool = True, dtype: torch.dtype = torch.float32) -> FrozenExperts:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(EXPERTS * OUT, IN, generator=generator) * 0.1
    offset = torch.randn(EXPERTS, OUT, generator=generator).to(dtype) if bias else None
    return FrozenExperts(quantize(weight, quant, 64) if quant else weight.to(dtype), EXPERTS, offset)


def layer_of(quant: str | None = "nf4", **options: Any) -> AdaptedExperts:
    """Its parameters are off their start."""
    bias, dtype = options.pop("bias", True), options.pop("dtype", torch.float32)
    generator = torch.Generator().manual_seed(4)
    layer = AdaptedExperts(
        stack(quant, bias=bias, dtype=dtype), **({"rank": RANK, "alpha": 5.0, "generator": generator} | options)
    ).to(dtype)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
        if layer.magnitude is not None:
            layer.magnitude *= 0.7 + 0.6 * torch.rand(layer.magnitude.shape, generator=generator)
    return layer


def of_expert(layer: AdaptedExperts, expert: int) -> dict[str, Any]:
    """The numbers of one expert for the reference."""
    weight = to_numpy(layer.base.dequantized(torch.float64))[expert * OUT : (expert + 1) * OUT]
    a, b = (to_numpy(each[0 if len(each) == 1 else expert]) for each in (layer.lora_A, layer.lora_B))
    m = None if layer.magnitude is None else to_numpy(layer.magnitude[expert])
    return {"weight": weight, "lora_a": a, "lora_b": b, "scaling": layer.scaling, "magnitude": m}


@pytest.fixture(params=["cpu", "cuda", "padded"])
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs of one expert as on a CPU, and of two as on a GPU whose launches hold two; padded: ordered by count, too."""
    monkeypatch.setattr(expert_tokens, "_MOST_PADDING", 1.0)
    monkeypatch.setattr(expert_tokens, "_WORTH_COPIES", -1)
    if request.param != "cpu":
        monkeypatch.setattr(expert_product, "device_kind", lambda device: "cuda")
        monkeypatch.setattr(expert_product, "_RUN_BYTES", 2 * OUT * IN * 4)
        monkeypatch.setattr(expert_product, "_ENTRIES_PER_SUM", 40)
    return str(request.param)


def laid_out(counts: tuple[int, ...], schedule: str) -> tuple[ExpertTokens, torch.Tensor]:
    """How a schedule has tokens divided, and the places of those that `counts` divide in ascending order."""
    tokens = padded_tokens(counts) if schedule == "padded" else ExpertTokens(counts)
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return tokens, torch.arange(len(owners)) + torch.tensor(tokens.shifts or [0] * len(counts))[owners]


def applied(layer: Any, x: torch.Tensor, tokens: ExpertTokens, places: torch.Tensor) -> torch.Tensor:
    padded = x.new_zeros(sum(tokens.counts), x.shape[1]).index_copy(0, places, x)
    return layer(padded, tokens)[places]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("share", ["none", "A", "B"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_forward_and_gradients_are_those_of_each_expert_alone(counts, share, kind, quant, schedule):
    layer = layer_of(quant, kind=kind, share=share)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(14, IN, generator=generator).requires_grad_()
    dy = torch.randn(14, OUT, generator=generator)
    y = applied(layer, x, *laid_out(counts, schedule))
    y.backward(dy)

    expected = np.zeros((14, OUT))
    dx = np.zeros((14, IN))
    da, db = np.zeros(layer.lora_A.shape), np.zeros(layer.lora_B.shape)
    dm = np.zeros((EXPERTS, OUT))
    for run in ExpertTokens(counts).reached:
        (expert,), rows = run.experts, run.tokens
        numbers = of_expert(layer, expert)
        expected[rows] = reference.forward(to_numpy(x)[rows], bias=to_numpy(layer.base.bias[expert]), **numbers)
        grads = reference.gradients(to_numpy(x)[rows], to_numpy(dy)[rows], **numbers)
        dx[rows] = grads.x
        da[0 if share == "A" else expert] += grads.lora_a
        db[0 if share == "B" else expert] += grads.lora_b
        if kind == "dora":
            dm[expert] = grads.magnitude
    pairs = [(y, expected), (x.grad, dx), (layer.lora_A.grad, da), (layer.lora_B.grad, db)]
    if kind == "dora":
        pairs.append((layer.magnitude.grad, dm))
    for got, wanted in pairs:
        assert reference.relative_error(to_numpy(got), wanted) < 3e-6
    unreached = [expert for expert, count in enumerate(counts) if count == 0]
    if share == "none":
        assert not layer.lora_A.grad[unreached].any()
        assert not layer.lora_B.grad[unreached].any()


@pytest.mark.parametrize("share", ["none", "A", "B"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_merged_stack_gives_the_outputs_of_the_layer(kind, share):
    layer = layer_of(kind=kind, share=share)
    tokens = ExpertTokens((2, 0, 5, 1, 6))
    x = torch.randn(14, IN, generator=torch.Generator().manual_seed(1))
    merged = layer.merged_weight()
    plain = FrozenExperts(merged, EXPERTS, layer.base.bias)
    with torch.no_grad():
        torch.testing.assert_close(plain(x, tokens), layer(x, tokens), rtol=0, atol=5e-6)
    for expert in range(EXPERTS):
        wanted = reference.merged_weight(**of_expert(layer, expert))
        got = merged[expert * OUT : (expert + 1) * OUT]
        assert reference.relative_error(to_numpy(got), wanted) < 1e-6
    if kind == "dora":
        ratio = layer.magnitude / layer.row_norm()
        torch.testing.assert_close(layer.merged_gain(), ratio, rtol=1e-5, atol=0)


def test_a_fresh_layer_is_its_base_to_the_bit():
    base = stack()
    layer = AdaptedExperts(base, rank=RANK)
    tokens, x = ExpertTokens((2, 0, 5, 1, 6)), torch.randn(14, IN)
    assert torch.equal(layer(x, tokens), base(x, tokens))


@pytest.mark.parametrize("share", ["none", "A"])
def test_row_norms_are_of_the_experts_that_tokens_reached_and_are_computed_once_a_change(share, schedule, monkeypatch):
    layer = layer_of(share=share)
    asked: list[list[int]] = []
    compute = layer._norm_of
    monkeypatch.setattr(
        layer, "_norm_of", lambda tokens, *rest: (asked.append(list(tokens.experts)), compute(tokens, *rest))[1]
    )
    x = torch.randn(6, IN)
    layer(x, ExpertTokens((0, 4, 0, 2, 0)))
    layer(x, ExpertTokens((0, 3, 0, 3, 0)))
    assert asked == [[1, 3]]
    layer(x, ExpertTokens((1, 4, 0, 1, 0)))
    assert asked == [[1, 3], [0]]
    for expert in (0, 1, 3):
        numbers = of_expert(layer, expert)
        numbers.pop("magnitude")
        wanted = reference.row_norm(**numbers)
        found = layer._cache._entries["row_norm"].value.norm[expert]
        assert reference.relative_error(to_numpy(found), wanted) < 1e-6
    with torch.no_grad():
        layer.lora_B.mul_(1.5)
    layer(x, ExpertTokens((0, 4, 0, 2, 0)))
    assert asked[2:] == [[1, 3]]


def test_a_row_that_the_adapter_removes_gets_its_direct_norm(schedule):
    layer = layer_of(None, rank=1, alpha=1.0, bias=False)
    with torch.no_grad():  # expert 2: its first row is taken away but for a thousandth
        layer.lora_A[2, 0] = layer.base.stored_weight[2 * OUT]
        layer.lora_B[2, 0, 0] = -0.999
    norm = layer.gain(torch.float32) and layer._cache._entries["row_norm"].value.norm[2, 0]
    direct = layer.base.stored_weight[2 * OUT].norm() * 0.001
    assert float(norm) == pytest.approx(float(direct), rel=1e-3)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("experts", [(0,), (4,), (1, 2, 3), (0, 2, 4), (3, 0)])
@pytest.mark.parametrize("kind", ["nf4", "nf3", "int8"])
@pytest.mark.parametrize("columns", [192, 512])  # 288 blocks an expert, 1.1 groups of scales; 768, three groups
def test_the_rows_of_some_experts_are_those_of_the_whole_stack(kind, experts, double_quant, columns):
    weight = torch.randn(5 * 96, columns, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, kind, 64, double_quant)
    whole = dequantize(packed).view(5, 96, columns)
    (run,) = ExpertTokens([int(e in experts) for e in range(5)], experts).all_runs(5)
    some = expert_rows(packed, 5, run)
    assert torch.equal(dequantize(some).view(-1, 96, columns), whole[list(experts)])


PADDED = {
    "even": ((128, 120, 131, 125), (131,) * 4, (0, 1, 2, 3)),
    "one busy": ((4, 90, 5, 0, 6), (4, 90, 6, 0, 6), (0, 1, 2, 4)),
    "few groups by count": (20 * (10, 100), 20 * (10, 100), (*range(1, 40, 2), *range(0, 40, 2))),
}


@pytest.mark.parametrize("case", PADDED)
def test_neighbours_are_padded_to_one_count(case):
    counts, padded, experts = PADDED[case]
    tokens = padded_tokens(counts)
    assert (tokens.counts, tokens.experts) == (padded, experts)
    starts = dict(zip(experts, np.cumsum([0, *(padded[expert] for expert in experts)]).tolist(), strict=False))
    before = np.cumsum([0, *counts]).tolist()
    assert [tokens.shifts[expert] + before[expert] for expert in experts] == [starts[expert] for expert in experts]


def test_padding_is_bounded():
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = generator.geometric(generator.uniform(0.001, 0.5), size=64) - 1
        assert sum(padded_tokens(counts.tolist()).counts) <= 1.25 * counts.sum()


def test_a_stack_whose_blocks_cross_experts_is_computed_right():
    weight = torch.randn(4 * 3, 40, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, "nf4", 64)
    base = FrozenExperts(packed, 4)
    x = torch.randn(7, 40)
    out = base(x, ExpertTokens((3, 0, 2, 2)))
    dense = dequantize(packed).view(4, 3, 40)
    wanted = torch.cat([x[:3] @ dense[0].T, x[3:5] @ dense[2].T, x[5:] @ dense[3].T])
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)


def test_dropout_zeroes_the_same_elements_in_the_backward_pass(schedule):
    layer = layer_of(dropout=0.4, bias=False).train()
    x = torch.randn(14, IN).requires_grad_()
    tokens, places = laid_out((2, 0, 5, 1, 6), schedule)
    torch.manual_seed(7)
    y = applied(layer, x, tokens, places)
    dy = torch.randn_like(y)
    y.backward(dy)
    # y is linear in x: its derivative along x itself is y, so <dy, y> = <dx, x> only for one and the same mask.
    assert float((dy * y).sum()) == pytest.approx(float((x.grad * x).sum()), rel=1e-4)
    assert float((layer.lora_B.grad * layer.lora_B).sum()) == pytest.approx(
        float((layer.lora_A.grad * layer.lora_A).sum()), rel=1e-3
    )
    layer.eval()
    assert not torch.allclose(applied(layer, x, tokens, places), y)


def test_a_dense_stack_trains_as_torch_has_it():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(EXPERTS * OUT, IN, generator=generator))
    bias = torch.nn.Parameter(torch.randn(EXPERTS, OUT, generator=generator))
    layer, counts = ExpertLinear(weight, EXPERTS, bias), (2, 0, 5, 1, 6)
    x = torch.randn(14, IN, generator=generator)
    owner = torch.tensor([0] * 2 + [2] * 5 + [3] + [4] * 6)
    wanted = torch.einsum("ti,toi->to", x, weight.detach().view(EXPERTS, OUT, IN)[owner]) + bias.detach()[owner]
    out = layer(x, ExpertTokens(counts))
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert not weight.grad[OUT : 2 * OUT].any()
    assert torch.equal(bias.grad[:, 0], torch.tensor(counts, dtype=torch.float32))


def test_a_frozen_stack_has_gradients_of_gradients():
    base = stack(None, bias=False, dtype=torch.float64)
    tokens = ExpertTokens((2, 0, 1, 0, 1))
    x = torch.randn(4, IN, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: base(value, tokens).tanh(), (x,))


def test_the_gradients_are_those_of_finite_differences():
    layer = layer_of(None, dtype=torch.float64)
    layer.magnitude = None  # the norm counts as constant in the gradients of DoRA, which differences do not know
    tokens = ExpertTokens((2, 0, 1, 0, 1))
    x = torch.randn(4, IN, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda *values: layer(values[0], tokens), (x, layer.lora_A, layer.lora_B))


def test_nothing_dense_is_kept_for_backward():
    layer = layer_of(dtype=torch.float32)
    x = torch.randn(14, IN).requires_grad_()
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, ExpertTokens((2, 0, 5, 1, 6)))
    sizes = sorted(tuple(tensor.shape) for tensor in kept)
    factors = [(EXPERTS, OUT, RANK), (EXPERTS, RANK, IN), *[(EXPERTS, OUT)] * 3]
    assert sizes == sorted([*factors, (14, IN), (14, OUT), (14, RANK)])


def test_torchs_grouped_product_gives_the_results_of_single_products(monkeypatch):
    """The kernel of a GPU, which takes bf16 alone, has a form for the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4 * 16, 64, generator=generator) * 0.1
    layer = AdaptedExperts(FrozenExperts(quantize(weight, "nf4", 64), 4), rank=8, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
    x = torch.randn(24, 64, generator=generator).bfloat16()
    dy = torch.randn(24, 16, generator=generator).bfloat16()
    calls = grouped_calls(monkeypatch)

    def results() -> list[torch.Tensor]:
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = layer(given, ExpertTokens((7, 0, 9, 8)))
        y.backward(dy)
        found = [y, given.grad, layer.lora_A.grad, layer.lora_B.grad, layer.magnitude.grad]
        return [each.detach().float() for each in found]

    single = results()
    assert not calls
    on_card(monkeypatch)
    for one, other in zip(single, results(), strict=True):
        assert reference.relative_error(to_numpy(other), to_numpy(one)) < 4e-3
    assert len(calls) >= 7, "two factors and the base, forward and backward, and the gradients of the factors"


@pytest.mark.parametrize("share", ["none", "A", "B"])
def test_a_gate_belongs_to_a_component_of_all_experts(share):
    layer, tokens = layer_of(share=share), ExpertTokens((2, 0, 5, 1, 6))
    x = torch.randn(14, IN, generator=torch.Generator().manual_seed(1))
    layer.add_gate()
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([0.5, 0.0, 1.5]))
    y = layer(x, tokens)
    y.square().sum().backward()
    b = (layer.lora_B.detach() * layer.gate.detach()).requires_grad_()
    plain = layer_of(share=share)
    plain.lora_B = torch.nn.Parameter(b.detach().clone())
    expected = plain(x, tokens)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    expected.square().sum().backward()
    wanted = (plain.lora_B.grad * layer.lora_B.detach()).flatten(0, -2).sum(0)
    torch.testing.assert_close(layer.gate.grad, wanted, rtol=1e-4, atol=1e-4)
    layer.keep_components_(torch.tensor([0, 2]))
    assert (layer.rank, layer.lora_A.shape[1], layer.lora_B.shape[2]) == (2, 2, 2)
    assert layer.parameters_per_rank * 2 == layer.lora_A.numel() + layer.lora_B.numel()
    torch.testing.assert_close(layer(x, tokens), y, rtol=0, atol=1e-6)


def on_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Stacks take the branches of an NVIDIA card; its products are the CPU's."""
    monkeypatch.setattr(expert_product, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def grouped_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry at each call of torch's grouped product."""
    calls: list[int] = []
    kernel = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: (calls.append(1), kernel(*a, **k))[1])
    return calls


def layer_with_kernel(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> AdaptedExperts:
    """Five experts in bf16, two for each launch, as the grouped kernel of a card takes them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5 * 16, 64, generator=generator) * 0.1
    base = FrozenExperts(quantize(weight, "nf4", 64), 5, torch.randn(5, 16, generator=generator).bfloat16())
    layer = AdaptedExperts(base, rank=8, dtype=torch.bfloat16, generator=generator)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
    on_card(monkeypatch, capability)
    monkeypatch.setattr(expert_product, "_RUN_BYTES", 2 * 16 * 64 * 2)
    return layer


@pytest.mark.parametrize(
    ("capability", "hip", "is_shared"),
    [
        ((8, 0), None, False),
        ((9, 0), None, True),
        ((10, 0), None, True),
        ((12, 0), None, False),
        ((9, 4), "7.0", False),
    ],
)
def test_experts_share_products_only_on_cards_that_torchs_kernel_is_for(monkeypatch, capability, hip, is_shared):
    """torch has the grouped product for every card, and where it has no kernel, a loop for which the host waits."""
    layer, tokens = layer_with_kernel(monkeypatch, capability), ExpertTokens((7, 0, 9, 0, 8))
    monkeypatch.setattr(torch.version, "hip", hip)
    calls = grouped_calls(monkeypatch)
    layer(torch.randn(24, 64).bfloat16().requires_grad_(), tokens).sum().backward()
    assert bool(calls) == is_shared


def test_a_routing_goes_to_a_gpu_once_and_norms_ask_it_once(monkeypatch):
    layer, tokens = layer_with_kernel(monkeypatch), ExpertTokens((7, 0, 9, 0, 8))
    lists, read = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (lists.append(1), read(tensor))[1])
    x = torch.randn(24, 64).bfloat16().requires_grad_()
    with HostWaits() as waits:
        layer(x, tokens).square().sum().backward()
    assert (waits.names, len(lists)) == (["lift_fresh"], 1), "the numbers of the routing; whether a row has cancelled"
    with HostWaits() as waits:
        layer(x, tokens).square().sum().backward()
    assert (waits.names, len(lists)) == ([], 1)


def test_sums_over_tokens_do_not_check_their_lengths_which_a_gpu_would_wait_for(monkeypatch):
    layer, checks, sums = layer_with_kernel(monkeypatch), [], torch.segment_reduce
    monkeypatch.setattr(
        torch, "segment_reduce", lambda *a, **k: (checks.append(not k.get("unsafe", False)), sums(*a, **k))[1]
    )
    layer(torch.randn(24, 64).bfloat16(), ExpertTokens((7, 0, 9, 0, 8))).sum().backward()
    assert checks
    assert not any(checks)


def fits_kernel(tensor: torch.Tensor) -> bool:
    """What the GPU's kernel asks of each operand: 16 bytes between rows or columns, and single numbers within."""
    inner, outer = sorted(tensor.stride()[-2:])
    return inner == 1 and outer % 8 == 0 and outer > 0 and tensor.data_ptr() % 16 == 0


@pytest.mark.parametrize("adapted", [True, False])
def test_a_gradient_that_is_one_number_for_all_reaches_the_kernel_as_a_matrix(monkeypatch, adapted):
    layer, tokens = layer_with_kernel(monkeypatch), ExpertTokens((7, 0, 9, 0, 8))
    kernel, operands = torch.nn.functional.grouped_mm, []
    monkeypatch.setattr(
        torch.nn.functional,
        "grouped_mm",
        lambda a, b, **k: (operands.extend([a, b]), kernel(a.contiguous(), b, **k))[1],
    )
    x = torch.randn(24, 128).bfloat16()[:, ::2].requires_grad_()
    (layer if adapted else layer.base)(x, tokens).sum().backward()
    assert len(operands) >= 4
    assert all(fits_kernel(each) for each in operands)


def test_a_model_that_writes_into_the_output_of_a_stack_gets_the_true_gradient():
    x = torch.randn(14, IN, generator=torch.Generator().manual_seed(1))
    tokens = ExpertTokens((2, 0, 5, 1, 6))
    first, second = layer_of(bias=False), layer_of(bias=False)
    (first(x, tokens) * 3.0).square().sum().backward()
    second.keeps_copy = True
    second(x, tokens).mul_(3.0).square().sum().backward()
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name).grad, parameter.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_stack_runs_in_inference_mode(kind):
    layer = layer_of(kind=kind).eval()
    tokens, x = ExpertTokens((2, 0, 5, 1, 6)), torch.randn(14, IN)
    expected = layer(x, tokens)
    with torch.inference_mode():
        assert torch.equal(layer(x, tokens), expected)
