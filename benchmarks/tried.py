"""What was tried and did not help, measured against what is in use, both in one run. A function makes a row: what was
tried, what is in use instead, and the figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from bitsandbytes import functional as bnb_functional
from contenders import random_base
from frame import bench, main
from measure import in_turns, ratio
from torch import nn

from qdora.memory.allocator import keep_freed_memory
from qdora.ops import tiles
from qdora.ops.adapted_product import column_dot
from qdora.ops.dropout import dropped_slices, zeroed_
from qdora.ops.frozen_product import frozen_linear
from qdora.ops.packed import quantize
from qdora.train.optimizer import AdapterOptimizer

Row = tuple[str, str, str]


def time_ratio(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> float:
    """Median time of `first` over that of `second`."""
    seconds = in_turns({"first": first, "second": second}, repeats)
    return ratio(seconds["first"], seconds["second"])["of_medians"]


def quantiser() -> Row:
    """bitsandbytes' NF4 quantiser on CPU against the plain torch one."""
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    times = time_ratio(
        lambda: bnb_functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True),
        lambda: quantize(weight, "nf4", 64),
        7,
    )
    figure = f"{times:.1f} times as long for 2048 x 2048"
    return "bitsandbytes' NF4 quantiser on CPU", "the plain torch definition (same codes, bit for bit)", figure


def eight_bit_states() -> Row:
    """8-bit AdamW on CPU against torch's fused one, both on bf16 storage."""

    def make(name: Any) -> AdapterOptimizer:
        generator = torch.Generator().manual_seed(0)
        shapes = [(16, 4096), (4096, 16)] * 16
        parameters = {
            str(i): nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for i, s in enumerate(shapes)
        }
        for parameter in parameters.values():
            parameter.grad_dtype = torch.float32
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return AdapterOptimizer(parameters, name=name)

    eight, fused = make("paged_adamw_8bit"), make("adamw")
    times = time_ratio(lambda: eight.step(1e-4), lambda: fused.step(1e-4), 11)
    figure = f"{times:.1f} times as long a step for {16 * 2 * 16 * 4096:,} parameters"
    return "8-bit AdamW states on CPU", "torch's fused AdamW (`optimizer: adamw`); 8-bit states are for CUDA", figure


def gain_form() -> Row:
    """The gain rounded to bf16, and g - 1 rounded to bf16, against the gain in float32: error of a bf16 output."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(2048, 1024, generator=generator).bfloat16()

    def errors(gain: torch.Tensor) -> tuple[float, float, float]:
        exact = low.double() * gain
        forms = (low * gain.bfloat16(), torch.addcmul(low, low, (gain - 1).bfloat16()), (low * gain.float()).bfloat16())
        rounded, minus_one, wide = (float((form.double() - exact).norm() / exact.norm()) for form in forms)
        return rounded, minus_one, wide

    near = errors(1 + 0.05 * (2 * torch.rand(1024, generator=generator, dtype=torch.float64) - 1))
    small = errors(torch.full((1024,), 0.02, dtype=torch.float64) + 0.01 * torch.rand(1024, dtype=torch.float64))
    figure = f"{near[0] / near[2]:.2f} times the error near g = 1, {small[1] / small[2]:.0f} times near g = 0.025"
    return "the gain, or g - 1, rounded to bf16", "the gain in float32, the product rounded once", figure


def magnitude_gradient() -> Row:
    """Three ways to write the sums over tokens of dy * y against one pass."""
    dy, y = torch.randn(2, 1024, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    factor = torch.ones(4096)
    ways: dict[str, Callable[[], Any]] = {
        "own": lambda: column_dot(dy, y, factor),
        "product, then sum": lambda: (dy * y).sum(0, dtype=torch.float32),
        "einsum": lambda: torch.einsum("ti,ti->i", dy, y),
        "bmm": lambda: torch.bmm(dy.T.unsqueeze(1), y.T.unsqueeze(2)),
    }
    seconds = in_turns(ways, 15)
    figures = [f"{name} {ratio(found, seconds['own'])['of_medians']:.1f}" for name, found in seconds.items()][1:]
    figure = f"{', '.join(figures)} times as long, 1,024 tokens of 4,096"
    return (
        "the gradient of the magnitude by torch's reductions",
        "the kernel of batch normalisation's weight gradient, which sums in float32",
        figure,
    )


def bernoulli_mask() -> Row:
    """A random number for each element against one for each zero."""
    x = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    generator = torch.Generator().manual_seed(0)

    def masked() -> None:
        x * torch.empty_like(x).bernoulli_(0.95, generator=generator)

    def drawn() -> None:
        for tokens, positions in dropped_slices(x, 0.05, 0):
            zeroed_(x[tokens].clone(), positions)

    figure = f"{time_ratio(masked, drawn, 9):.1f} times as long at p = 0.05"
    return "a Bernoulli mask for dropout", "drawing the positions of the zeros", figure


def large_tiles() -> Row:
    """A layer whose weight is read in two tiles against four."""
    base = random_base(4096, 4096)
    x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()

    def step(cut_bytes: int) -> None:
        with mock.patch.object(tiles, "_CPU_CUT_BYTES", cut_bytes):
            frozen_linear(x, base).sum().backward()

    times = time_ratio(lambda: step(16 << 20), lambda: step(8 << 20), 21)
    figure = f"{times:.3f} times as long for a frozen 4096 x 4096 layer at 256 tokens"
    return "dense tiles of 16 MiB on a CPU", "tiles of 8 MiB, multiplied with while in the cache", figure


@bench()
def tried() -> dict[str, Any]:
    """All rows, with one thread."""
    torch.set_num_threads(1)
    keep_freed_memory()
    parts = (quantiser, eight_bit_states, gain_form, magnitude_gradient, bernoulli_mask, large_tiles)
    return {"rows": [dict(zip(("tried", "instead", "figure"), part(), strict=True)) for part in parts]}


if __name__ == "__main__":
    main()
