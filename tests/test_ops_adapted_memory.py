"""Bytes of the adapted layer at work, counted by hand: one dense tile at a time, recomputed tensors let go early."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops import tiles
from qdora.ops.dora import row_norm
from qdora.ops.packed import quantize
from qdora.plan.live_bytes import LiveBytes
from tests import tiny

# A row takes 2 KiB in float32, so runs of 16 rows (or columns, of 512 outputs) take the whole budget.
OUT = IN = 512
TILE_BYTES = 32 * 1024


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_CPU_TILE_BYTES", TILE_BYTES)
    monkeypatch.setattr(tiles, "_LONG", 16)
    monkeypatch.setattr(tiles, "_SHORT", 16)


def int8_layer(kind: str | None) -> AdaptedLinear | FrozenLinear:
    """Of a base whose tiles plain torch decodes, so that all of their bytes are seen."""
    generator = torch.Generator().manual_seed(0)
    base = FrozenLinear(quantize(torch.randn(OUT, IN, generator=generator), "int8"))
    if kind is None:
        return base
    layer = AdaptedLinear(base, kind=kind, rank=1, dtype=torch.float32)  # type: ignore[arg-type]
    tiny.move_all_parameters_(layer)
    return layer


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_one_tile_at_a_time(kind: str | None) -> None:
    layer = int8_layer(kind)
    x = torch.ones(1, IN, requires_grad=True)
    layer(x)  # the norm
    with LiveBytes() as live:
        y = layer(x)
        forward = live.peak_bytes
        live.reset_peak()
        y.sum().backward()
        backward = live.peak_bytes
    assert TILE_BYTES <= forward < 2 * TILE_BYTES
    assert TILE_BYTES <= backward < 2 * TILE_BYTES


@pytest.mark.usefixtures("small_tiles")
def test_the_norm_reads_one_tile_at_a_time() -> None:
    layer = int8_layer("dora")
    assert isinstance(layer, AdaptedLinear)
    squared = layer.base_squared
    with LiveBytes() as live:
        factors = (layer.lora_A, layer.lora_B, 1.0)
        row_norm(layer.base.stored_weight, *factors, base_squared=squared, dtype=torch.float32)
        assert TILE_BYTES <= live.peak_bytes < 2 * TILE_BYTES


@pytest.mark.parametrize(
    ("dropout", "most"),
    [
        (0.0, 4.75),  # y, dy, x and the output again, and the workspace of m's gradient; x and the output then go
        (0.1, 5.5),  # y, dy, x, its gradient, a copy of x, and the dropped positions; the output has gone
    ],
)
def test_under_a_checkpoint_what_was_read_is_let_go(dropout: float, most: float) -> None:
    tokens, out, in_ = 512, 256, 256
    weight = torch.ones(out, in_)  # its own tile: nothing is made of it
    layer = AdaptedLinear(FrozenLinear(weight), rank=1, dropout=dropout, dtype=torch.float32)
    tiny.move_all_parameters_(layer)

    def block(z: Tensor) -> Tensor:
        y: Tensor = layer(z.expand(tokens, in_).contiguous())
        return y

    z = torch.ones(tokens, 1, requires_grad=True)
    wide = tokens * in_ * 4  # x, the output, and the gradients of both
    layer(torch.ones(1, in_))  # the norm
    with LiveBytes() as live:
        y = checkpoint(block, z, use_reentrant=False)
        dy = torch.ones_like(y)
        live.reset_peak()
        y.backward(dy)
    assert live.peak_bytes < most * wide
