"""What was tried and did not help, measured against what is in use, both in one run.

python benchmarks/tried.py --out benchmarks/results/tried.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdora.environment import environment
from qdora.ops.packed import quantize
from qdora.train.allocator import keep_freed_memory
from qdora.train.optimizer import AdapterOptimizer


def alternating(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> float:
    """Median time of `first` over that of `second`, run in turns after one warm-up of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for index, function in enumerate((first, second)):
            began = time.perf_counter()
            function()
            if repeat:
                times[index].append(time.perf_counter() - began)
    return statistics.median(times[0]) / statistics.median(times[1])


def quantiser() -> dict[str, str]:
    """bitsandbytes' NF4 quantiser on CPU against the plain torch one."""
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    ratio = alternating(
        lambda: quantize(weight, "nf4", 64, backend="bnb"), lambda: quantize(weight, "nf4", 64, backend="torch"), 7
    )
    return {
        "tried": "bitsandbytes' NF4 quantiser on CPU",
        "instead": "the plain torch definition (same codes, bit for bit)",
        "figure": f"{ratio:.1f} times as long for 2048 x 2048",
    }


def eight_bit_states() -> dict[str, str]:
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
    ratio = alternating(lambda: eight.step(1e-4), lambda: fused.step(1e-4), 11)
    return {
        "tried": "8-bit AdamW states on CPU",
        "instead": "torch's fused AdamW (`optimizer: adamw`); 8-bit states are for CUDA",
        "figure": f"{ratio:.1f} times as long a step for {16 * 2 * 16 * 4096:,} parameters",
    }


def gain_form() -> dict[str, str]:
    """Rounding the gain itself to bf16 against rounding g - 1, at gains within 5 % of 1."""
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(2048, 1024, generator=generator)
    gain = 1 + 0.05 * (2 * torch.rand(1024, generator=generator, dtype=torch.float64) - 1)
    low = out.bfloat16()
    exact = low.double() * gain
    direct = (low * gain.bfloat16()).double()
    difference = torch.addcmul(low, low, (gain - 1).bfloat16()).double()
    ratio = float((direct - exact).norm() / (difference - exact).norm())
    return {
        "tried": "the gain rounded to bf16",
        "instead": "y + (g - 1) y with g - 1 rounded",
        "figure": f"{ratio:.2f} times the error of the output for gains within 5 % of 1",
    }


def main() -> None:
    """Measure all, write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tried.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [quantiser(), eight_bit_states(), gain_form()]
    document = {"command": "python benchmarks/tried.py", "rows": rows, "environment": environment()}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
