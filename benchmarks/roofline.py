"""An estimate of a layer's time on an A100: launches, bytes and FLOPs counted on the false GPU. Nothing runs on a GPU.

    python benchmarks/roofline.py [--out benchmarks/results/roofline.json] [--smoke]

One later micro-batch of a step with checkpointing, 2 F + B: gradients are there, and what follows from the parameters
(norms, s g B, scales) has been made for the step. Both layers are NF4 in blocks of 64 with double quantisation, of rank
16, on the same inputs in bf16: qdora's QDoRA, and PEFT's QLoRA on bitsandbytes' `matmul_4bit`, which at these token
counts makes the weight dense (bitsandbytes' own rule for an A100).

    time = sum over launches of 5 us + max(bytes / 1.55 TB/s, FLOPs / peak)

The peak is 312 TFLOP/s for products of 16-bit numbers and 19.5 TFLOP/s for those of float32. Bytes are those of all
tensors that a launch reads or writes, each once. Dropout of torch counts as one launch in each direction, as on CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import bitsandbytes as bnb
import peft
import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from measure import facts, parser_of, write
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the false GPU of the tests
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.codebooks import NESTED_BLOCK_SIZE
from qdora.ops.packed import PackedWeight, empty_packed
from qdora.train.optimizer import AdapterOptimizer
from tests.false_gpu import FalseGpu

LAUNCH_SECONDS, BYTES_PER_SECOND = 5e-6, 1.55e12
FLOPS_PER_SECOND = {2: 312e12, 4: 19.5e12}
"""By the bytes of a factor."""
RANK = 16
DROPOUT = 0.05
BARS = {2048: 0.9, 512: 1.0}
"""Tokens -> most time of our layer, PEFT's QLoRA = 1."""


class Case(NamedTuple):
    """A layer and its input."""

    in_features: int
    out_features: int
    num_tokens: int
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16  # of the adapter


CASES = {
    "4096 → 4096, 2,048 tokens": Case(4096, 4096, 2048),
    "4096 → 4096, 512 tokens": Case(4096, 4096, 512),
    "4096 → 11008, 2,048 tokens": Case(4096, 11008, 2048),
    "4096 → 11008, 512 tokens": Case(4096, 11008, 512),
    "4096 → 1024, 2,048 tokens": Case(4096, 1024, 2048),
    "dropout, 4096 → 4096, 2,048 tokens": Case(4096, 4096, 2048, dropout=DROPOUT),
    "float32 adapters, 4096 → 4096, 2,048 tokens": Case(4096, 4096, 2048, dtype=torch.float32),
}
SMOKE = {"64 → 128, 8 tokens": Case(64, 128, 8), "dropout": Case(128, 64, 8, DROPOUT, torch.float32)}


class Launch(NamedTuple):
    """A launch, and what bounds it."""

    phase: str
    num_bytes: int
    flops: float
    flops_per_second: float

    @property
    def seconds(self) -> float:
        """By the roofline."""
        return LAUNCH_SECONDS + max(self.num_bytes / BYTES_PER_SECOND, self.flops / self.flops_per_second)


class CountingGpu(FalseGpu):
    """A false GPU that counts FLOPs of products, and leaves out their values, which nothing here reads."""

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[int, tuple[float, int]] = {}
        """Number of a launch's event -> FLOPs, and bytes of a factor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.bitsandbytes.gemm_4bit.default:  # several launches, where it makes the weight dense
            with self:
                return _gemm_4bit_default_impl(*args, **(kwargs or {}))
        before = len(self.events)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.partition("::")[2]
        if name in ("mm", "addmm", "addmm_", "linear") and len(self.events) > before:
            left, right = [each for each in args if isinstance(each, Tensor)][-2:]
            columns = right.shape[0 if name == "linear" else 1]
            self.products[before] = 2.0 * left.shape[0] * left.shape[1] * columns, left.itemsize
        return result

    def kernel(self, func: Any) -> Callable[..., Any]:
        """Products are not computed."""
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.dtype):
            return _no_product
        if func is torch.ops.aten.linear.default:
            return lambda x, weight: _no_product(x, weight.T)
        if func is torch.ops.aten.mm.out:
            return lambda _left, _right, out: out
        return (lambda out, *_args, **_options: out) if func is torch.ops.aten.addmm_.default else super().kernel(func)

    def launches(self) -> list[Launch]:
        """All launches so far."""
        found = []
        for number, event in enumerate(self.events):
            flops, itemsize = self.products.get(number, (0.0, 2))
            if event.kind == "launch":
                found.append(Launch(event.phase, event.num_bytes, flops, FLOPS_PER_SECOND[itemsize]))
        return found


def _no_product(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros(left.shape[0], right.shape[1], dtype=out_dtype or left.dtype)


def main() -> None:
    """Every case, then the bars."""
    args = parser_of(__doc__, "roofline", smoke="small layers").parse_args()
    cases = {name: case_result(case) for name, case in (SMOKE if args.smoke else CASES).items()}
    result = {
        **facts("python benchmarks/roofline.py"),
        "rank": RANK,
        "launch_seconds": LAUNCH_SECONDS,
        "bytes_per_second": BYTES_PER_SECOND,
        "flops_per_second": FLOPS_PER_SECOND,
        "bars": BARS,
        "cases": cases,
    }
    write(args.out, {**result, "passes": all(case["passes"] for case in cases.values())})


def case_result(case: Case) -> dict[str, Any]:
    """Counts and times of both layers, and their ratio."""
    found = {}
    for name, make in (("own_dora", own_layer), ("peft_lora", peft_layer)):
        with CountingGpu() as gpu:
            found[name] = counted(gpu, make(gpu, case), case)
    ratio = found["own_dora"]["seconds"] / found["peft_lora"]["seconds"]
    bar = BARS.get(case.num_tokens)
    settings = {"num_tokens": case.num_tokens, "dropout": case.dropout, "adapter_dtype": str(case.dtype)}
    return {**settings, **found, "ratio": ratio, "bar": bar, "passes": bar is None or ratio <= bar}


def counted(gpu: CountingGpu, layer: nn.Module, case: Case) -> dict[str, Any]:
    """What a later micro-batch asks of the GPU, by phase, and its time by the roofline."""
    x, dy = (
        torch.ones(case.num_tokens, features, dtype=torch.bfloat16, device=gpu.device)
        for features in (case.in_features, case.out_features)
    )
    for _ in range(2):
        each = x.clone().requires_grad_()
        gpu.clear()
        gpu.products.clear()
        with gpu.phase("forward"), patch.object(nn.functional, "dropout", _one_launch):
            out: Any = checkpoint(layer, each, use_reentrant=False)
            out.backward(dy)
    launches = gpu.launches()
    phases = {
        phase: {
            "launches": len(some := [each for each in launches if each.phase == phase]),
            "bytes": sum(each.num_bytes for each in some),
            "seconds": sum(each.seconds for each in some),
        }
        for phase in ("forward", "recompute", "backward")
    }
    # A checkpoint stops its recompute at the last tensor that is read; in a block that is not the layer's own last.
    seconds = 2 * phases["forward"]["seconds"] + phases["backward"]["seconds"]
    return {**phases, "seconds": seconds}


def _one_launch(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0]


def own_layer(gpu: FalseGpu, case: Case) -> nn.Module:
    """QDoRA of this project."""
    layer = AdaptedLinear(FrozenLinear(_base(gpu, case)), rank=RANK, dropout=case.dropout, dtype=case.dtype)
    layer.to(gpu.device)
    AdapterOptimizer(dict(layer.named_parameters()))  # lets gradients of bf16 parameters arrive in float32
    return layer


def peft_layer(gpu: FalseGpu, case: Case) -> nn.Module:
    """PEFT's LoRA around a Linear4bit, whose forward pass takes the packed tensors of the false GPU."""
    packed = _base(gpu, case)
    base = bnb.nn.Linear4bit(
        case.in_features, case.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    assert packed.nested is not None
    inner = bnb.functional.QuantState(
        absmax=packed.nested.absmax, code=packed.nested.code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
    )
    state = bnb.functional.QuantState(
        absmax=packed.absmax,
        shape=torch.Size(packed.shape),
        blocksize=packed.block_size,
        code=torch.zeros(16, device=gpu.device),
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=packed.nested.offset,
        state2=inner,
    )
    codes = packed.packed.view(-1, 1)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=case.dropout)
    layer = Linear4bit(base, "default", config=config, r=RANK, lora_alpha=2 * RANK, lora_dropout=case.dropout)
    base.forward = lambda x: bnb.matmul_4bit(x, codes.t(), quant_state=state)  # as Linear4bit's own, at the end
    for factors in (layer.lora_A, layer.lora_B):
        factors["default"].to_empty(device=gpu.device).to(case.dtype)
    return layer.train()


def _base(gpu: FalseGpu, case: Case) -> PackedWeight:
    packed = empty_packed("nf4", (case.out_features, case.in_features), device=gpu.device)
    for tensor in packed.tensors().values():
        tensor.fill_(1)
    return packed


if __name__ == "__main__":
    main()
