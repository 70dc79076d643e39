"""The cost of the experts of one block, against LoRA and PEFT."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from frame import Column, bench, main, table, tabulated
from measure import alone, in_turns, peak_rss_bytes, ratios, reset_peak_rss, spread
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qdora.adapter.expert_linear import AdaptedExperts
from qdora.memory.allocator import keep_freed_memory
from qdora.model.experts import stacks, use_expert_layers_
from qdora.model.inject import adapted_layer, frozen_like, replace_module
from qdora.quant.packed import PackedWeight, dequantize, quantize

Sizes = dict[str, int]
SHAPES: dict[str, Sizes] = {
    "OLMoE-1B-7B": {"num_experts": 64, "hidden_size": 2048, "moe_intermediate_size": 1024},
    "Qwen3-30B-A3B": {"num_experts": 128, "hidden_size": 2048, "moe_intermediate_size": 768},
    "tiny": {"num_experts": 4, "hidden_size": 64, "moe_intermediate_size": 64},
}
CHOICES, RANK = 8, 8
CONTENDERS = ("own_dora", "own_lora", "frozen", "peft_lora")
RATIOS = ("own_dora / own_lora", "own_dora / frozen", "own_dora / peft_lora")
BAR = 1.05


@bench(smoke={"shapes": ("tiny",), "tokens": (64,), "repeats": 2})
def expert_cost(
    shapes: tuple[str, ...] = ("OLMoE-1B-7B", "Qwen3-30B-A3B"), tokens: tuple[int, ...] = (1024, 4096), repeats: int = 5
) -> dict[str, Any]:
    """Own QDoRA against own QLoRA on NF4, and against LoRA by PEFT on dense experts.

    Both projections of all experts, forward and backward, in turns (OMP_NUM_THREADS=2), for tokens whose 8 experts each
    are drawn evenly, or so that a tenth of the experts gets most of them. PEFT adapts the same dequantised weights,
    dense, by `target_parameters`, which has no DoRA; its experts run as transformers runs them. QDoRA uses the norms of
    its step; `norms` is the time of computing them all.

        held        bytes that autograd keeps after the forward pass, without parameters and the base
        peak        growth of the largest resident set over that before the step, each in a process of its own
    """
    keep_freed_memory()
    cases: list[dict[str, Any]] = []
    for shape in shapes:
        weight_of = functools.cache(random_stack)  # packing takes longer than all else
        holders = {each: adapted_experts(shape, each, weight_of) for each in CONTENDERS}
        for num_tokens in tokens:
            for skewed in (False, True):
                steps = {each: Step(holder, SHAPES[shape], num_tokens, skewed) for each, holder in holders.items()}
                times = in_turns({each: step.run for each, step in steps.items()}, repeats)
                case = {
                    "shape": shape,
                    "tokens": num_tokens,
                    "skewed": skewed,
                    "reached": int((steps["own_dora"].counts > 0).sum()),
                    "most_tokens": int(steps["own_dora"].counts.max()),
                    "seconds": {each: spread(values) for each, values in times.items()},
                    "ratios": ratios(times, RATIOS),
                    "norms": spread(in_turns({"norms": steps["own_dora"].norms}, repeats)["norms"]),
                    "held": {each: step.held() for each, step in steps.items()},
                }
                if not skewed:
                    case["peak"] = {each: alone(peak_of_step, shape, each, num_tokens) for each in CONTENDERS}
                cases.append(case)
    within = [case["ratios"]["own_dora / own_lora"]["median"] <= BAR for case in cases]
    bar = {"limit": BAR, "within": sum(within), "of": len(within)}
    return {"dtype": str(compute_dtype()).removeprefix("torch."), "rank": RANK, "cases": cases, "bar": bar}


def compute_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies in it, else float32."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def random_stack(shape: tuple[int, int]) -> PackedWeight:
    """A random stack of experts in NF4."""
    return quantize(torch.randn(shape) * 0.02, "nf4")


class Step:
    """Forward and backward of the experts of a block, with random tokens."""

    def __init__(self, holder: Any, sizes: Sizes, num_tokens: int, skewed: bool) -> None:
        dtype, generator = compute_dtype(), torch.Generator().manual_seed(1)
        x = torch.randn(num_tokens, sizes["hidden_size"], generator=generator).to(dtype).requires_grad_()
        weights = torch.ones(sizes["num_experts"])
        if skewed:
            weights[: max(1, sizes["num_experts"] // 10)] = 100.0
        choices = min(CHOICES, sizes["num_experts"])
        index = torch.multinomial(weights.expand(num_tokens, -1), choices, generator=generator)
        share = torch.rand(num_tokens, choices, generator=generator).to(dtype)
        self.holder, self.inputs, self.counts = holder, (x, index, share), torch.bincount(index.reshape(-1))
        self.dy = torch.randn(x.shape, generator=generator).to(dtype)

    def run(self) -> None:
        """One micro-batch; the gradients of earlier ones are dropped."""
        self.holder.zero_grad()
        self.inputs[0].grad = None
        self.holder.experts(*self.inputs).backward(self.dy)

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
            self.holder.experts(*self.inputs)
        return sum(size for address, size in kept.items() if address not in own)


def adapted_experts(shape: str, contender: str, weight_of: Callable[[tuple[int, int]], PackedWeight]) -> Any:
    """transformers' experts with a contender's adapters: in NF4, or dense with LoRA by PEFT. The adapters are off their
    start, where half of their products would be by zeros."""
    config = AutoConfig.for_model("qwen3_moe", **SHAPES[shape])
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(config)
    holder, is_peft = nn.ModuleDict({"experts": experts}), contender == "peft_lora"
    if is_peft:
        for name in ("gate_up_proj", "down_proj"):
            size = getattr(experts, name).shape
            weight = dequantize(weight_of((size[0] * size[1], size[2])), compute_dtype()).view(size)
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
        names = ["experts.gate_up_proj", "experts.down_proj"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=names)
            inject_adapter_in_model(settings, holder)
    else:
        use_expert_layers_(holder)  # type: ignore[arg-type]
        for path, stack in stacks(holder).items():
            layer: nn.Module = frozen_like(stack, weight_of((stack.out_features, stack.in_features)), None)
            if contender != "frozen":
                kind: Any = contender.removeprefix("own_")
                layer = adapted_layer(layer, kind=kind, rank=RANK, alpha=2.0 * RANK, dtype=torch.bfloat16)
            replace_module(holder, path, layer)
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(0, 0.01)
            if parameter.requires_grad and is_peft:
                parameter.data = parameter.data.to(compute_dtype())
    return holder


def peak_of_step(shape: str, contender: str, num_tokens: int) -> int:
    """In a process of its own: growth of the peak over what is held before the first step."""
    keep_freed_memory()
    step = Step(adapted_experts(shape, contender, random_stack), SHAPES[shape], num_tokens, skewed=False)
    before = reset_peak_rss()
    step.run()
    return peak_rss_bytes() - before


@table("expert_cost")
def expert_cost_table(result: Any) -> str:
    """Ratios of the time of a block's experts, bytes held for backward, growth of the peak."""

    def label(case: Any) -> str:
        routing = f"skewed, {case['reached']} reached" if case["skewed"] else "even"
        return f"{case['shape']}, {case['tokens']:,}, {routing}"

    def peaks(case: Any) -> str:
        names = ("own_dora", "own_lora", "peft_lora")
        return " / ".join(f"{case['peak'][name] / 2**20:,.0f}" for name in names) if case.get("peak") else ""

    columns: dict[str, Column] = {
        "shape, tokens, routing": label,
        "QDoRA / QLoRA": "{ratios[own_dora / own_lora][median]:.3f}",
        "QDoRA / frozen": "{ratios[own_dora / frozen][median]:.3f}",
        "QDoRA / PEFT LoRA": "{ratios[own_dora / peft_lora][median]:.3f}",
        "held, QDoRA": "{held[own_dora]:,.0fMiB}",
        "QLoRA": "{held[own_lora]:,.0fMiB}",
        "PEFT LoRA": "{held[peft_lora]:,.0fMiB}",
        "peak: QDoRA / QLoRA / PEFT LoRA": peaks,
    }
    bar = result["bar"]
    within = f"Target met: QDoRA at most {bar['limit']} times QLoRA in {bar['within']} of {bar['of']} cases."
    return tabulated(result["cases"], columns) + f"\nMedians of rounds; bytes in MiB. {within}\n"


if __name__ == "__main__":
    main()
