"""Which layers are adapted, what an adapted one keeps, reads and writes, and the rows that a process has of one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.falcon.modeling_falcon import FalconLinear

from qdora.adapter import layer as module
from qdora.adapter.algebra import row_norm
from qdora.adapter.expert_product import ExpertTokens
from qdora.adapter.layer import AdaptedLinear, FrozenLinear, is_plain_linear
from qdora.adapter.rows import RowShare, divided_tensors, span
from qdora.plan.live_bytes import LiveBytes
from qdora.quant import tiles
from qdora.quant.packed import dequantize, mask_bits, mask_from_bits, quantize
from tests import reference, support
from tests.adapter_numbers import assert_close, expected, make, results, to_numpy


def saved_storages(run: Any) -> tuple[Any, dict[int, Tensor]]:
    """The result of `run` and the tensors that autograd keeps for backward, one for each storage."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), kept


def layer_of(kind: str = "dora", **options: Any) -> AdaptedLinear:
    return make(kind=kind, **{"rank": 2, "bias": False, "dtype": torch.bfloat16, "quant": "nf4"} | options)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_saved_are_the_input_the_low_rank_activations_the_output_and_nothing_else_of_token_size(kind, dropout):
    """The input is that of the model, not a copy: q, k and v keep it once."""
    layer = layer_of(kind, dropout=dropout)
    x = torch.randn(2, 25, 64).bfloat16().requires_grad_()
    y, kept = saved_storages(lambda: layer(x))
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    sizes = sorted(t.numel() for key, t in kept.items() if key not in parameters and t.shape != (24,))
    assert sizes == sorted([50 * 64, 50 * 2] + ([50 * 24] if kind == "dora" else []))
    assert x.untyped_storage().data_ptr() in kept
    if kind == "dora":  # the output itself, not a copy of it
        assert y.untyped_storage().data_ptr() in kept


@pytest.mark.parametrize("masked", [False, True])
def test_a_frozen_magnitude_keeps_no_output(masked):
    layer = make(masked=masked, in_=8, bias=False)
    sizes = {}
    for trains in (True, False):
        layer.magnitude.requires_grad_(trains)
        y, kept = saved_storages(lambda: layer(torch.randn(5, 8, dtype=torch.float64)))
        sizes[trains] = [t.numel() for t in kept.values() if t.shape == y.shape]
    assert sizes == {True: [5 * 24], False: []}


def test_of_a_stack_nothing_dense_is_kept():
    layer, x = make(num_experts=5, out=12, in_=64, dtype=torch.float32, quant="nf4"), torch.randn(14, 64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_(), ExpertTokens((2, 0, 5, 1, 6)))
    sizes = sorted(tuple(tensor.shape) for tensor in kept)
    assert sizes == sorted([(5, 12, 3), (5, 3, 64), (5, 12), (14, 64), (14, 12), (14, 3)])


# A row takes 2 KiB in float32, so runs of 16 rows (or columns, of 512 outputs) take the whole budget.
WIDE, TILE_BYTES = 512, 32 * 1024


@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_one_tile_at_a_time(kind, monkeypatch):
    """Counted by hand; plain torch decodes the tiles of int8, so that all of their bytes are seen."""
    for name, value in (("_CPU_TILE_BYTES", TILE_BYTES), ("_LONG", 16), ("_SHORT", 16)):
        monkeypatch.setattr(tiles, name, value)
    generator = torch.Generator().manual_seed(0)
    layer: Any = FrozenLinear(quantize(torch.randn(WIDE, WIDE, generator=generator), "int8"))
    if kind is not None:
        layer = AdaptedLinear(layer, kind=kind, rank=1, dtype=torch.float32)
        support.move_all_parameters_(layer)
    x = torch.ones(1, WIDE, requires_grad=True)
    layer(x)  # the norm
    peaks = []
    with LiveBytes() as live:
        y = layer(x)
        peaks.append(live.peak_bytes)
        live.reset_peak()
        y.sum().backward()
        peaks.append(live.peak_bytes)
    if kind == "dora":
        factors = (layer.base.stored_weight, layer.lora_A, layer.lora_B, 1.0)
        with LiveBytes() as live:
            row_norm(*factors, base_squared=layer.base_squared, dtype=torch.float32)
            peaks.append(live.peak_bytes)
    assert all(TILE_BYTES <= peak < 2 * TILE_BYTES for peak in peaks), peaks


@pytest.mark.parametrize(
    ("dropout", "most"),
    [
        (0.0, 4.75),  # y, dy, x and the output again, and the workspace of m's gradient; x and the output then go
        (0.1, 5.5),  # y, dy, x, its gradient, a copy of x, and the dropped positions; the output has gone
    ],
)
def test_under_a_checkpoint_what_was_read_is_let_go(dropout, most):
    tokens, out, in_ = 512, 256, 256
    weight = torch.ones(out, in_)  # its own tile: nothing is made of it
    layer = AdaptedLinear(FrozenLinear(weight), rank=1, dropout=dropout, dtype=torch.float32)
    support.move_all_parameters_(layer)

    z = torch.ones(tokens, 1, requires_grad=True)
    wide = tokens * in_ * 4  # x, the output, and the gradients of both
    layer(torch.ones(1, in_))  # the norm
    with LiveBytes() as live:
        y = checkpoint(lambda z: layer(z.expand(tokens, in_).contiguous()), z, use_reentrant=False)
        dy = torch.ones_like(y)
        live.reset_peak()
        y.backward(dy)
    assert live.peak_bytes < most * wide


def flops_of_addmm_(_out: Any, left: Any, right: Any, **_: Any) -> int:
    """Of a product that is added in place, which torch's counter does not know."""
    return int(2 * left[0] * left[1] * right[1])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_needs_no_gradient_costs_no_product(kind):
    """The first block behind frozen embeddings: the base is not read again in the backward pass."""
    layer, tokens, (out, in_, rank) = make(kind=kind, bias=False), 5, (24, 64, 3)
    through, of_a, of_b = (2 * tokens * rank * size for size in (out, in_, out))  # dy B, dA, dB
    for wanted, flops in (
        (("x", "lora_A", "lora_B"), through + of_a + of_b + 2 * tokens * in_ * (rank + out)),
        (("lora_A", "lora_B"), through + of_a + of_b),
        (("x",), through + 2 * tokens * in_ * (rank + out)),
        (("lora_B",), of_b),
    ):
        layer.zero_grad()
        x = torch.randn(tokens, in_, dtype=torch.float64).requires_grad_("x" in wanted)
        for name in ("lora_A", "lora_B"):
            layer.get_parameter(name).requires_grad_(name in wanted)
        y = layer(x)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops_of_addmm_}) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == flops
        assert (x.grad is not None) == ("x" in wanted)


# ------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("kind", ["frozen", "lora", "dora"])
def test_autocast_sets_the_dtype_of_the_products_as_for_a_linear_layer(kind):
    """transformers' Trainer with bf16=True over a float32 model. It leaves float64 alone."""
    layer: Any = layer_of("lora" if kind == "frozen" else kind, dtype=torch.float32)
    layer = layer.base if kind == "frozen" else layer
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            evaluated = layer(x)
        wide = layer(x.detach().double())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, evaluated)
    assert wide.dtype == torch.float64
    assert torch.equal(wide, layer(x.detach().double()))
    y.float().square().sum().backward()
    twin = x.detach().bfloat16().requires_grad_()
    layer(twin).float().square().sum().backward()
    assert torch.equal(x.grad, twin.grad.float())


def test_a_cast_of_the_model_leaves_scales_magnitudes_and_gates_in_float32():
    layer = layer_of(dtype=torch.float32, quant="nf4 nested", gated=True)
    dense, kept = layer.base.dequantized(), {"magnitude": layer.magnitude.detach().clone()}
    layer.gate.data.fill_(0.123456789)
    kept |= {"gate": torch.full((2,), 0.123456789), "base_squared": layer.base_squared}
    layer(torch.ones(1, 64))
    layer.to(torch.bfloat16)
    assert layer.lora_A.dtype == torch.bfloat16
    for name, wanted in kept.items():
        found = getattr(layer, name)
        assert found.dtype == torch.float32, name
        assert torch.equal(found, wanted), name
    assert torch.equal(layer.base.dequantized(), dense)
    layer.double()
    assert (layer.magnitude.dtype, layer.gate.dtype) == (torch.float64, torch.float64)
    x, dy = torch.randn(3, 64, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    assert_close(results(layer, x, dy), expected(layer, x, dy), 1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quant", ["nf4", "nf4 nested", "int8", None])
def test_kept_scales_give_the_same_bits_and_follow_the_parameters(kind, quant):
    layer = layer_of(kind, in_=128, quant=quant, bias=True).eval()
    x, dy = torch.randn(2, 128).bfloat16(), torch.randn(2, 24).bfloat16()
    for step in (lambda: None, lambda: layer.lora_B.detach().mul_(-1.5), layer.train, layer.eval):
        step()
        found = {}
        for keeps in (False, True):
            layer.keeps_scales = keeps
            found[keeps] = results(layer, x, dy)
            assert (layer.operands(torch.bfloat16).scales is not None) == (keeps and quant is not None)
            with torch.inference_mode():
                assert torch.equal(layer(x), found[keeps]["y"])
        assert all(torch.equal(found[True][name], each) for name, each in found[False].items())
        wanted = expected(layer, x, dy)["y"]
        assert reference.relative_error(to_numpy(found[True]["y"]), wanted) < 1e-2
    if quant is not None:
        layer.base.residency = SimpleNamespace(use=lambda _layer: None)  # a weight that comes and goes is not kept
        assert layer.operands(torch.bfloat16).scales is None


def test_scales_are_dropped_where_a_gpu_has_no_room_for_them(monkeypatch):
    taken = 24 * 128 // 64 * 4
    for free, dropped in ((None, False), (2 * taken, False), (2 * taken - 1, True)):
        layers = [layer_of(in_=128), layer_of(in_=128, quant=None)]
        monkeypatch.setattr(module, "_free_bytes", lambda _device, free=free: free)
        assert module.drop_scales_without_room(layers) is dropped
        assert [layer.keeps_scales for layer in layers] == [not dropped] * 2
    assert not module.drop_scales_without_room([])


class Tagged(nn.Linear):
    """The constructor wants an argument of its own; the code is that of nn.Linear."""

    def __init__(self, in_: int, out: int, tag: str) -> None:
        super().__init__(in_, out)
        self.tag = tag


class Scaled(nn.Linear):
    """Computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Stateful(Tagged):
    """Has a state that changes what it computes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return len(self.tag) * super().forward(input)


def test_a_module_is_linear_if_its_code_computes_the_linear_map():
    assert all(is_plain_linear(layer) for layer in (nn.Linear(4, 3), FalconLinear(4, 3), Tagged(4, 3, "x")))
    others = (Scaled(4, 3), Stateful(4, 3, "x"), bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64))
    assert not any(is_plain_linear(layer) for layer in (*others, nn.Embedding(4, 3)))

    class Plain(nn.Linear):
        pass

    layer = Plain(4, 4)
    with FakeTensorMode():  # a class that a plan meets first is judged by values
        assert is_plain_linear(layer)


class Group:
    """What a share asks of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def shares(weight: Any, size: int, keep_bits: torch.Tensor | None = None) -> list[RowShare]:
    found = []
    for rank in range(size):
        share = RowShare(weight, keep_bits, Group(rank, size))  # type: ignore[arg-type]
        tensors = divided_tensors(weight, keep_bits)
        share.parts = {name: share.mine(share.cut(tensor)) for name, tensor in tensors.items()}
        found.append(share)
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("quant", ["nf4 nested", "nf4", "int8", "nf3 nested", "int2 nested", None])
def test_the_rows_of_all_are_the_rows_of_the_weight(quant, size):
    """514 rows of four blocks: a group of 256 block scales begins in the rows of one process and ends in another's."""
    dense = torch.randn(514, 64, generator=torch.Generator().manual_seed(0))
    kind, _, nested = (quant or "").partition(" ")
    weight = quantize(dense, kind, 16, bool(nested)) if quant else dense
    keep = dense > 0
    for share in shares(weight, size, mask_bits(keep)):
        assert share.by_rows
        mine, shape = share.weight(), (share.rows.stop - share.rows.start, 64)
        assert torch.equal(dequantize(mine) if quant else mine, (dequantize(weight) if quant else dense)[share.rows])
        assert torch.equal(mask_from_bits(share.keep_bits(), shape), keep[share.rows])
    # Blocks or mask bytes that cross rows are not cut by rows.
    assert not any(share.by_rows for share in shares(quantize(torch.randn(6, 40), "nf4", 64), size))
    assert not any(share.by_rows for share in shares(dense[:, :36], size, mask_bits(keep[:, :36])))


@pytest.mark.parametrize(("length", "size"), [(7, 3), (3, 5), (8, 4), (1, 2), (10, 4)])
def test_spans_are_those_of_torch_chunk(length, size):
    values = torch.arange(length)
    chunks = [*values.chunk(size), *[values[:0]] * size][:size]
    assert [values[span(length, rank, size)].tolist() for rank in range(size)] == [each.tolist() for each in chunks]
