"""Stacks of experts beyond the matrix: how tokens are divided, padded and sent, shared launches, dense stacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qdora.adapter import expert_product
from qdora.adapter.expert_product import ExpertTokens, expert_rows, padded_tokens
from qdora.adapter.experts import ExpertLinear, FrozenExperts
from qdora.errors import UserError
from qdora.quant.packed import dequantize, quantize
from tests import reference
from tests.adapter_numbers import arrays, assert_close, expected, make, results, to_numpy

COUNTS = {"none, one and many": (0, 1, 9, 0, 4), "all with one": (0, 0, 14, 0, 0), "even": (3, 3, 3, 3, 2)}
EXPERTS, OUT, IN = 5, 12, 64


def layer_of(**options: Any) -> Any:
    return make(**{"num_experts": EXPERTS, "out": OUT, "dtype": torch.float32, "quant": "nf4 nested"} | options)


def inputs(count: int = 14, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(count, size, generator=generator, dtype=dtype) for size in (IN, OUT))
    return x, dy


@pytest.fixture(params=["cpu", "cuda", "padded"])
def schedule(request, monkeypatch):
    """Runs of one expert as on a CPU, and of two as on a GPU whose launches hold two; padded: ordered by count, too."""
    monkeypatch.setattr(expert_product, "_MOST_PADDING", 1.0)
    monkeypatch.setattr(expert_product, "_WORTH_COPIES", -1)
    if request.param != "cpu":
        monkeypatch.setattr(expert_product, "device_kind", lambda device: "cuda")
        monkeypatch.setattr(expert_product, "_RUN_BYTES", 2 * OUT * IN * 4)
        monkeypatch.setattr(expert_product, "_ENTRIES_PER_SUM", 40)
    return request.param


class Scheduled(torch.nn.Module):
    """A stack whose tokens, sorted by expert, are laid out as a schedule has them."""

    def __init__(self, layer: Any, counts: tuple[int, ...], schedule: str) -> None:
        super().__init__()
        self.layer, self.tokens = layer, padded_tokens(counts) if schedule == "padded" else ExpertTokens(counts)
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        shifts = torch.tensor(self.tokens.shifts or [0] * len(counts))
        self.places = torch.arange(len(owners)) + shifts[owners]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(sum(self.tokens.counts), x.shape[1]).index_copy(0, self.places, x)
        out: torch.Tensor = self.layer(padded, self.tokens)[self.places]
        return out

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return self.layer.named_parameters()


FORMS = [("lora", "nf4 nested", False), ("dora", "int8", False), ("dora", "nf4", True)]
FORMS += [("dora", None, False), ("dora", "nf4 nested", False), ("lora", None, True)]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("kind", "quant", "masked"), FORMS)
def test_forward_and_gradients_are_those_of_each_expert_alone(counts, kind, quant, masked, schedule):
    layer, (x, dy) = layer_of(kind=kind, quant=quant, masked=masked), inputs()
    found = results(Scheduled(layer, counts, schedule), x, dy)
    assert_close(found, expected(layer, x, dy, counts=counts), 1e-5)
    unreached = [expert for expert, count in enumerate(counts) if count == 0]
    assert not found["lora_A"][unreached].any()
    assert not found["lora_B"][unreached].any()
    frozen, wanted = Scheduled(layer.base, counts, schedule), np.zeros((14, OUT))
    for run in ExpertTokens(counts).reached:
        numbers = arrays(layer, run.experts[0])
        bias = to_numpy(layer.base.bias[run.experts[0]])
        wanted[run.tokens] = to_numpy(x[run.tokens]) @ numbers["weight"].T + bias
    assert_close({"y": frozen(x)}, {"y": wanted}, 1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_row_norms_are_of_the_experts_that_tokens_reached_and_are_computed_once_a_change(masked, schedule):
    layer, (x, _) = layer_of(masked=masked), inputs(6)
    layer(x, ExpertTokens((0, 4, 0, 2, 0)))
    known = layer.kept_norm.value[0]
    known[3] = 7.0  # another computation would overwrite it
    layer(x, ExpertTokens((1, 3, 0, 2, 0)))
    assert torch.equal(known[2:], torch.tensor([1.0, 7.0, 1.0])[:, None].expand(3, OUT))
    with torch.no_grad():
        layer.lora_B.mul_(1.5)
    layer(x, ExpertTokens((0, 0, 1, 5, 0)))
    again = layer.kept_norm.value[0]
    assert torch.equal(again[[0, 1, 4]], torch.ones(3, OUT))
    for expert, norm, change in ((0, known, 1.5), (1, known, 1.5), (2, again, 1.0), (3, again, 1.0)):
        numbers = arrays(layer, expert)
        numbers.pop("magnitude")
        numbers["scaling"] /= change
        assert reference.relative_error(to_numpy(norm[expert]), reference.row_norm(**numbers)) < 1e-6


def test_a_row_that_the_adapter_removes_gets_its_direct_norm(schedule):
    layer = layer_of(quant=None, rank=1, alpha=1.0, bias=False)
    with torch.no_grad():  # expert 2: its first row is taken away but for a thousandth
        layer.lora_A[2, 0] = layer.base.stored_weight[2 * OUT]
        layer.lora_B[2, 0, 0] = -0.999
    direct = float(layer.base.stored_weight[2 * OUT].norm()) * 0.001
    assert float(layer.row_norm()[2, 0]) == pytest.approx(direct, rel=1e-3)
    assert float(layer.gain(torch.float32).value[2, 0] * direct) == pytest.approx(
        float(layer.magnitude[2, 0]), rel=1e-3
    )


@pytest.mark.parametrize("experts", [(0,), (4,), (1, 2, 3), (0, 2, 4), (3, 0)])
@pytest.mark.parametrize("kind", ["nf4", "nf3", "int8"])
@pytest.mark.parametrize("columns", [192, 512])  # 288 blocks an expert, 1.1 groups of scales; 768, three groups
def test_the_rows_of_some_experts_are_those_of_the_whole_stack(kind, experts, columns):
    weight = torch.randn(5 * 96, columns, generator=torch.Generator().manual_seed(0))
    for double_quant in (False, True):
        packed = quantize(weight, kind, 64, double_quant)
        whole = dequantize(packed).view(5, 96, columns)
        (run,) = ExpertTokens([int(e in experts) for e in range(5)], experts).all_runs(5)
        some = expert_rows(packed, 5, run)
        assert torch.equal(dequantize(some).view(-1, 96, columns), whole[list(experts)])
        base = FrozenExperts(packed, 5)
        for rows in (slice(0, 96), slice(90, 200), slice(300, 480)):
            assert torch.equal(base.dequantized_rows(rows), whole.flatten(0, 1)[rows])


def test_a_stack_whose_blocks_cross_experts_is_refused():
    with pytest.raises(UserError, match=r"base\.block_size: 64 .* \(3, 40\)"):
        FrozenExperts(quantize(torch.randn(4 * 3, 40), "nf4", 64), 4)


def test_padding_is_bounded():
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = generator.geometric(generator.uniform(0.001, 0.5), size=64) - 1
        assert sum(padded_tokens(counts.tolist()).counts) <= 1.25 * counts.sum()


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_zeroes_the_same_elements_in_the_backward_pass(masked, schedule):
    layer, (x, dy) = layer_of(dropout=0.4, bias=False, masked=masked, quant=None, dtype=torch.float64), inputs()
    module = Scheduled(layer, (2, 0, 5, 1, 6), schedule)
    torch.manual_seed(7)
    found = results(module, x.double(), dy.double())
    # y is linear in x: its derivative along x itself is y, so <dy, y> = <dx, x> only for one and the same mask.
    assert float((dy * found["y"]).sum()) == pytest.approx(float((found["x"] * x).sum()), rel=1e-9)
    of_a, of_b = (float((found[name] * layer.get_parameter(name)).sum()) for name in ("lora_A", "lora_B"))
    assert of_a == pytest.approx(of_b, rel=1e-9)
    layer.eval()
    evaluated = module(x.double())
    assert not torch.allclose(evaluated, found["y"])
    assert_close({"y": evaluated}, {"y": expected(layer, x, dy, counts=(2, 0, 5, 1, 6))["y"]}, 1e-10)


def test_a_dense_stack_trains_as_torch_has_it():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(EXPERTS * OUT, IN, generator=generator))
    bias = torch.nn.Parameter(torch.randn(EXPERTS, OUT, generator=generator))
    counts, (x, _) = (2, 0, 5, 1, 6), inputs()
    owner = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts))
    wanted = torch.einsum("ti,toi->to", x, weight.detach().view(EXPERTS, OUT, IN)[owner]) + bias.detach()[owner]
    out = ExpertLinear(weight, EXPERTS, bias)(x, ExpertTokens(counts))
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert not weight.grad[OUT : 2 * OUT].any()
    assert torch.equal(bias.grad[:, 0], torch.tensor(counts, dtype=torch.float32))


def test_a_frozen_stack_has_gradients_of_gradients():
    layer, tokens = layer_of(quant=None, bias=False, dtype=torch.float64), ExpertTokens((2, 0, 1, 0, 1))
    x = torch.randn(4, IN, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: layer.base(value, tokens).tanh(), (x,))


def test_a_model_that_writes_into_the_output_of_a_stack_is_refused():
    with pytest.raises(RuntimeError, match="inplace"):
        layer_of(bias=False)(inputs()[0], ExpertTokens((2, 0, 5, 1, 6))).mul_(3.0).square().sum().backward()


def fits_kernel(tensor: torch.Tensor) -> bool:
    """What the GPU's kernel asks of each operand: 16 bytes between rows or columns, and single numbers within."""
    inner, outer = sorted(tensor.stride()[-2:])
    return inner == 1 and outer % 8 == 0 and outer > 0 and tensor.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    "capability, hip", [((8, 0), None), ((9, 0), None), ((10, 0), None), ((12, 0), None), ((9, 4), "7.0")]
)
def test_torchs_grouped_product_serves_the_cards_that_its_kernel_is_for(monkeypatch, capability, hip):
    """For others torch has a loop, for which the host waits. The kernel takes bf16, and has a form for the CPU."""
    layer = make(num_experts=5, out=16, rank=8, dtype=torch.bfloat16, quant="nf4")
    tokens, generator = ExpertTokens((7, 0, 9, 0, 8)), torch.Generator().manual_seed(0)
    x = torch.randn(24, 2 * IN, generator=generator).bfloat16()[:, ::2]
    dy = torch.randn(24, 16, generator=generator).bfloat16()
    wanted = results(layer, x, dy, tokens)
    # Stacks take the branches of an NVIDIA card, two experts a launch; its products are the CPU's.
    monkeypatch.setattr(expert_product, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(expert_product, "_RUN_BYTES", 2 * 16 * IN * 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    operands: list[torch.Tensor] = []
    kernel = torch.nn.functional.grouped_mm

    def grouped_mm(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        operands.extend([a, b])
        return kernel(a.contiguous(), b, **options)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    for name, each in results(layer, x, dy, tokens).items():
        assert reference.relative_error(to_numpy(each), to_numpy(wanted[name])) < 5e-3, name
    if capability not in ((9, 0), (10, 0)):
        assert not operands
        return
    assert len(operands) >= 2 * 7, "two factors and the base, forward and backward, and the gradients of the factors"
    # A gradient that is one number for all reaches the kernel as a matrix.
    operands.clear()
    for module in (layer, layer.base):
        module(x.detach().requires_grad_(), tokens).sum().backward()
    assert len(operands) >= 4
    assert all(fits_kernel(each) for each in operands)
    operands.clear()
    narrow = make(num_experts=5, out=12, rank=8, dtype=torch.bfloat16, quant="nf4")  # 12 features are no 16 bytes
    narrow(x, tokens)
    assert len(operands) == 2, "x A^T alone"
