"""The experts of one block: their cost against LoRA and PEFT, and what a GPU without a grouped product is sent."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from frame import Column, bench, main, table, tabulated
from measure import alone, in_turns, peak_rss_bytes, ratio, reset_peak_rss, spread
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for the false GPU of the tests
from qdora.memory.allocator import keep_freed_memory
from qdora.model.experts import stacks, use_expert_layers_
from qdora.model.inject import adapted_layer, frozen_like, replace_module
from qdora.nn.expert_linear import AdaptedExperts
from qdora.ops.packed import PackedWeight, dequantize, empty_packed, quantize
from tests.false_gpu import FalseGpu

Sizes = dict[str, int]
SHAPES: dict[str, Sizes] = {
    "OLMoE-1B-7B": {"num_experts": 64, "hidden_size": 2048, "moe_intermediate_size": 1024},
    "Qwen3-30B-A3B": {"num_experts": 128, "hidden_size": 2048, "moe_intermediate_size": 768},
    "tiny": {"num_experts": 4, "hidden_size": 64, "moe_intermediate_size": 64},
}
CHOICES, RANK = 8, 8
CONTENDERS = ("own_dora", "own_lora", "frozen", "peft_lora")
RATIOS = (("own_dora", "own_lora"), ("own_dora", "frozen"), ("own_dora", "peft_lora"))
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
                    "ratios": {f"{a} / {b}": ratio(times[a], times[b]) for a, b in RATIOS},
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
    for name, parameter in holder.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(compute_dtype()) if is_peft else parameter.data
            if "lora_B" in name:
                parameter.data.normal_(0, 0.01)
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


PHASES = ("forward", "recompute", "backward")


class WithoutValues(FalseGpu):
    """A false GPU that does not compute products and dequantised weights."""

    def kernel(self, func: Any) -> Callable[..., Any]:
        """What makes the result of an operation, whose values may be any."""
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm"):
            return lambda a, b, *_, out=None: a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out
        if name == "bitsandbytes::dequantize_4bit":
            return lambda codes, absmax, block, quant, shape, dtype: codes.new_zeros(shape, dtype=dtype)
        return super().kernel(func)


@bench(smoke={"shape": "tiny", "tokens": 64})
def expert_launches(shape: str = "Qwen3-30B-A3B", tokens: int = 2048) -> dict[str, Any]:
    """Launches, waits and bytes of the experts of a block on a GPU for which torch has no grouped product.

    Such are an A100, an RTX 4090 and an RTX 5090. A later micro-batch of a step with checkpointing, forward, recompute
    and backward, QDoRA of rank 8, on the false GPU of the tests: which operations a GPU would be sent, and the bytes of
    all tensors that they read or write. Large products and dequantised weights have no values. Tokens choose 8 experts:
    evenly, or with weights 1 / rank (Zipf), ranks in random order.
    """
    after = [counted(shape, tokens, routing) for routing in ("even", "zipf")]
    return {"shape": shape, "rank": RANK, "choices": CHOICES, "after": after}


def counted(shape: str, num_tokens: int, routing: str) -> dict[str, Any]:
    """Launches and bytes by phase, waits and the peak of live bytes of one micro-batch."""
    sizes, generator = SHAPES[shape], torch.Generator().manual_seed(1)
    num_experts = sizes["num_experts"]
    weights = torch.ones(num_experts)
    if routing == "zipf":
        weights = 1 / torch.arange(1.0, num_experts + 1)[torch.randperm(num_experts, generator=generator)]
    choices = min(CHOICES, num_experts)
    index = torch.multinomial(weights.expand(num_tokens, -1), choices, generator=generator)
    with WithoutValues() as gpu:

        def filled(rows: tuple[int, int]) -> Any:
            packed = empty_packed("nf4", rows, device=gpu.device)
            for tensor in packed.tensors().values():
                tensor.fill_(1)
            return packed

        holder = adapted_experts(shape, "own_dora", filled).to(gpu.device)
        x = torch.zeros(num_tokens, sizes["hidden_size"], dtype=torch.bfloat16, device=gpu.device).requires_grad_()
        share = torch.zeros(num_tokens, choices, dtype=torch.bfloat16, device=gpu.device)
        where = index.to(gpu.device)
        for _ in range(2):  # the first computes the norms, which the micro-batches of a step share
            gpu.clear()
            with gpu.phase("forward"):
                made: Any = checkpoint(holder["experts"], x, where, share, use_reentrant=False)
            made.backward(torch.zeros_like(made))
        counts = torch.bincount(index.reshape(-1), minlength=num_experts)
        launched = [event for event in gpu.events if event.kind == "launch"]
        return {
            "tokens": num_tokens,
            "routing": routing,
            "most_tokens": int(counts.max()),
            "fewest_tokens": int(counts.min()),
            "launches": {phase: gpu.count("launch", phase) for phase in PHASES},
            "bytes": {phase: sum(each.num_bytes for each in launched if each.phase == phase) for phase in PHASES},
            "waits": gpu.count("wait"),
            "peak_bytes": gpu.peak_bytes,
        }


@table("expert_launches")
def expert_launches_table(result: Any) -> str:
    """Launches and bytes of a block's experts on a GPU without a grouped product, before and after."""
    sides = [when for when in ("before", "after") if when in result]  # `before` is of an earlier commit

    def each(text: Callable[[Any], str]) -> list[Column]:
        return [lambda row, when=when: text(row[when]) for when in sides]  # type: ignore[misc]

    names = ("launches, {}", "GiB moved, {}", "peak, MiB, {}")
    header = [
        "tokens, routing",
        "tokens of an expert",
        *(name.format(when) for name in names for when in sides),
        "waits",
    ]
    columns: list[Column] = [
        "{after[tokens]:,}, {after[routing]}",
        "{after[fewest_tokens]:,} to {after[most_tokens]:,}",
        *each(lambda found: f"{sum(found['launches'].values()):,}"),
        *each(lambda found: f"{sum(found['bytes'].values()) / 2**30:.1f}"),
        *each(lambda found: f"{found['peak_bytes'] / 2**20:,.0f}"),
        lambda row: " / ".join(str(found["waits"]) for found in row.values()),
    ]
    rows = [dict(zip(sides, row, strict=True)) for row in zip(*(result[when] for when in sides), strict=True)]
    return tabulated(rows, dict(zip(header, columns, strict=True)))


if __name__ == "__main__":
    main()
