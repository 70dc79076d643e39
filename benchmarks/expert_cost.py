"""Cost of the experts of one block: own QDoRA against own QLoRA on NF4, and against LoRA by PEFT on dense experts.

    OMP_NUM_THREADS=2 python benchmarks/expert_cost.py [--tokens 1024,4096] [--repeats 5] [--out FILE] [--smoke]

Both projections of all experts, forward and backward, in turns, in the shapes of OLMoE-1B-7B (64 experts) and
Qwen3-30B-A3B (128), for 1,024 and 4,096 tokens whose 8 experts each are drawn evenly, or so that a tenth of the experts
gets most of them. PEFT adapts the same dequantised weights, dense, by `target_parameters`, which has no DoRA; its
experts run as transformers runs them. QDoRA uses the norms of its step; `norms` is the time of computing them all.

    held        bytes that autograd keeps after the forward pass, without parameters and the base
    peak        growth of the largest resident set over that before the step, each contender in a process of its own
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import facts, fresh, in_turns, parser_of, peak_rss_bytes, ratio, reset_peak_rss, spread, write
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qdora.memory.allocator import keep_freed_memory
from qdora.model.experts import stacks, use_expert_layers_
from qdora.model.inject import adapted_layer, frozen_like, replace_module
from qdora.nn.expert_linear import AdaptedExperts
from qdora.ops.packed import PackedWeight, dequantize, quantize

SHAPES = {
    "OLMoE-1B-7B": {"num_experts": 64, "hidden_size": 2048, "moe_intermediate_size": 1024},
    "Qwen3-30B-A3B": {"num_experts": 128, "hidden_size": 2048, "moe_intermediate_size": 768},
}
TINY = {"num_experts": 4, "hidden_size": 64, "moe_intermediate_size": 64}
CHOICES, RANK = 8, 8
CONTENDERS = ("own_dora", "own_lora", "frozen", "peft_lora")
RATIOS = (("own_dora", "own_lora"), ("own_dora", "frozen"), ("own_dora", "peft_lora"))
BAR = 1.05


def main() -> None:
    """Times in turns, bytes in processes of their own."""
    parser = parser_of(__doc__, "expert_cost", smoke="four tiny experts")
    parser.add_argument("--tokens", type=lambda text: [int(each) for each in text.split(",")], default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs=3, metavar=("SHAPE", "CONTENDER", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.peak:
        shape, contender, tokens = args.peak
        write(args.out, {"bytes": peak_of_step(sizes_of(shape), contender, int(tokens))})
        return
    names = ("tiny",) if args.smoke else tuple(SHAPES)
    counts = [64] if args.smoke else args.tokens
    dtype = compute_dtype()
    shown = ",".join(map(str, args.tokens))
    command = f"python benchmarks/expert_cost.py --tokens {shown} --repeats {args.repeats}"
    result = facts(command) | {"dtype": str(dtype).removeprefix("torch."), "rank": RANK}
    cases: list[dict[str, Any]] = []
    for name in names:
        weight_of = functools.cache(random_stack)  # packing takes longer than all else
        holders = {each: adapted_experts(sizes_of(name), each, weight_of) for each in CONTENDERS}
        for tokens in counts:
            cases += [
                case(name, holders, tokens, skewed, 2 if args.smoke else args.repeats) for skewed in (False, True)
            ]
    within = [row["ratios"]["own_dora / own_lora"]["median"] <= BAR for row in cases]
    found = result | {"cases": cases, "bar": {"limit": BAR, "within": sum(within), "of": len(within)}}
    write(args.out, found)  # the peaks, which depend on no other load, take long
    for row in cases:
        if not row["skewed"]:
            peak = partial(fresh, str(Path(__file__)), "--out", str(args.out.with_suffix(".peak.json")), "--peak")
            row["peak"] = {each: peak(row["shape"], each, str(row["tokens"]))["bytes"] for each in CONTENDERS}
    args.out.with_suffix(".peak.json").unlink(missing_ok=True)
    write(args.out, found)


def compute_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies in it, else float32."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def sizes_of(name: str) -> dict[str, int]:
    """The sizes of a shape by its name."""
    return TINY if name == "tiny" else SHAPES[name]


def case(name: str, holders: dict[str, nn.ModuleDict], tokens: int, skewed: bool, repeats: int) -> dict[str, Any]:
    """One shape, number of tokens and routing."""
    sizes = sizes_of(name)
    steps = {each: make_step(holder, sizes, tokens, skewed=skewed) for each, holder in holders.items()}
    times = in_turns({each: step.run for each, step in steps.items()}, repeats)
    return {
        "shape": name,
        "tokens": tokens,
        "skewed": skewed,
        "reached": steps["own_dora"].reached,
        "most_tokens": steps["own_dora"].most,
        "seconds": {each: spread(values) for each, values in times.items()},
        "ratios": {f"{a} / {b}": ratio(times[a], times[b]) for a, b in RATIOS},
        "norms": spread(in_turns({"norms": steps["own_dora"].norms}, repeats)["norms"]),
        "held": {each: step.held() for each, step in steps.items()},
    }


class Step:
    """Forward and backward of the experts of a block."""

    def __init__(self, holder: nn.Module, x: Tensor, index: Tensor, share: Tensor, dy: Tensor) -> None:
        self.holder, self.inputs, self.dy = holder, (x, index, share), dy
        counts = torch.bincount(index.reshape(-1))
        self.reached, self.most = int((counts > 0).sum()), int(counts.max())

    def forward(self) -> Tensor:
        """The output of all tokens."""
        x, index, share = self.inputs
        out: Tensor = self.holder.experts(x, index, share)  # type: ignore[operator]
        return out

    def run(self) -> None:
        """One micro-batch; the gradients of earlier ones are dropped."""
        self.holder.zero_grad()
        self.inputs[0].grad = None
        self.forward().backward(self.dy)

    def norms(self) -> None:
        """The row norms of all experts, computed anew."""
        for layer in self.holder.modules():
            if isinstance(layer, AdaptedExperts):
                layer.parameters_changed()
                layer.gain(self.dy.dtype)

    def held(self) -> int:
        """Bytes that autograd keeps for the backward pass, beside parameters and buffers."""
        own = {each.untyped_storage().data_ptr() for each in (*self.holder.parameters(), *self.holder.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        return sum(size for address, size in kept.items() if address not in own)


def random_stack(shape: tuple[int, int]) -> PackedWeight:
    """A random stack of experts in NF4."""
    return quantize(torch.randn(shape) * 0.02, "nf4")


def adapted_experts(
    sizes: dict[str, int], contender: str, weight_of: Callable[[tuple[int, int]], PackedWeight]
) -> nn.ModuleDict:
    """Experts with a contender's adapters."""
    holder = nn.ModuleDict({"experts": bare_experts(sizes)})
    if contender == "peft_lora":
        put_dense_(holder, compute_dtype(), weight_of)
    else:
        put_packed_(holder, contender, weight_of)
    return holder


def make_step(holder: nn.ModuleDict, sizes: dict[str, int], tokens: int, *, skewed: bool) -> Step:
    """Random tokens for the experts of a holder."""
    dtype, generator = compute_dtype(), torch.Generator().manual_seed(1)
    x = torch.randn(tokens, sizes["hidden_size"], generator=generator).to(dtype).requires_grad_()
    weights = torch.ones(sizes["num_experts"])
    if skewed:
        weights[: max(1, sizes["num_experts"] // 10)] = 100.0
    choices = min(CHOICES, sizes["num_experts"])
    index = torch.multinomial(weights.expand(tokens, -1), choices, generator=generator)
    share = torch.rand(tokens, choices, generator=generator).to(dtype)
    return Step(holder, x, index, share, torch.randn(x.shape, generator=generator).to(dtype))


def bare_experts(sizes: dict[str, int]) -> nn.Module:
    """transformers' experts without memory."""
    config = AutoConfig.for_model("qwen3_moe", **sizes)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def put_dense_(holder: nn.ModuleDict, dtype: torch.dtype, weight_of: Callable[[tuple[int, int]], PackedWeight]) -> None:
    """Dense weights of the NF4 values, and LoRA by PEFT."""
    experts: Any = holder["experts"]
    for name in ("gate_up_proj", "down_proj"):
        shape = getattr(experts, name).shape
        packed = weight_of((shape[0] * shape[1], shape[2]))
        setattr(experts, name, nn.Parameter(dequantize(packed, dtype).view(shape), requires_grad=False))
    names = [f"experts.{name}" for name in ("gate_up_proj", "down_proj")]
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(settings, holder)
    move_(holder, dtype)


def put_packed_(holder: nn.ModuleDict, contender: str, weight_of: Callable[[tuple[int, int]], PackedWeight]) -> None:
    """NF4 experts, frozen or adapted."""
    use_expert_layers_(holder)  # type: ignore[arg-type]
    for path, stack in stacks(holder).items():
        layer: nn.Module = frozen_like(stack, weight_of((stack.out_features, stack.in_features)), None)
        if contender != "frozen":
            kind: Any = contender.removeprefix("own_")
            layer = adapted_layer(layer, kind=kind, rank=RANK, alpha=2.0 * RANK, dtype=torch.bfloat16)
        replace_module(holder, path, layer)
    move_(holder, None)


def move_(holder: nn.Module, dtype: torch.dtype | None) -> None:
    """Put the adapters off their start, where half of their products would be by zeros."""
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(0, 0.01)
            if parameter.requires_grad and dtype is not None:
                parameter.data = parameter.data.to(dtype)


def peak_of_step(sizes: dict[str, int], contender: str, tokens: int) -> int:
    """Growth of the peak over what is held before the first step."""
    step = make_step(adapted_experts(sizes, contender, random_stack), sizes, tokens, skewed=False)
    before = reset_peak_rss()
    step.run()
    return peak_rss_bytes() - before


if __name__ == "__main__":
    main()
