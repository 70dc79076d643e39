"""Frozen layers: which modules they may replace, and the rows of a divided weight that each process holds."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from qdora.nn.plain_linear import is_plain_linear
from qdora.nn.row_share import RowShare, divided_tensors, span
from qdora.ops.packed import dequantize, quantize
from qdora.ops.sparsity import mask_bits, mask_from_bits


class Tagged(nn.Linear):
    """The constructor wants an argument of its own; the code is that of nn.Linear."""

    def __init__(self, in_: int, out: int, tag: str) -> None:
        super().__init__(in_, out)
        self.tag = tag


class Scaled(nn.Linear):
    """Computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Stateful(Scaled):
    """Has a state that changes what it computes."""

    def __init__(self, in_: int, out: int) -> None:
        super().__init__(in_, out)
        self.factor = 3.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.factor * nn.Linear.forward(self, input)


OTHERS: dict[str, Any] = {
    "scaled": lambda: Scaled(4, 3),
    "stateful": lambda: Stateful(4, 3),
    "4bit": lambda: bnb.nn.Linear4bit(64, 64),
    "8bit": lambda: bnb.nn.Linear8bitLt(64, 64),
    "router": lambda: PhimoeTopKRouter.__new__(PhimoeTopKRouter),
    "embedding": lambda: nn.Embedding(4, 3),
}


def test_a_module_is_linear_if_its_code_computes_the_linear_map():
    layers = [nn.Linear(4, 3), FalconLinear(4, 3), Tagged(4, 3, "x")]
    state = torch.get_rng_state()
    assert [is_plain_linear(layer) for layer in layers] == [True] * 3
    assert torch.equal(torch.get_rng_state(), state), "the trial draws from no global generator"
    assert [name for name, make in OTHERS.items() if is_plain_linear(make())] == []

    class Plain(nn.Linear):
        pass

    layer = Plain(4, 4)
    with FakeTensorMode():  # a class that a plan meets first is judged by values
        assert is_plain_linear(layer)


class Group:
    """What a share asks of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def shares(weight: Any, size: int, keep_bits: torch.Tensor | None = None) -> list[RowShare]:
    found = []
    for rank in range(size):
        share = RowShare(weight, keep_bits, Group(rank, size))  # type: ignore[arg-type]
        tensors = divided_tensors(weight, keep_bits)
        share.parts = {name: share.mine(share.cut(tensor)) for name, tensor in tensors.items()}
        found.append(share)
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("quant", ["nf4 nested", "nf4", "int8", "nf3 nested", None])
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
