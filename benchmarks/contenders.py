"""The layers and models that are compared: our own, PEFT's on the same packed bytes, and the floors without an adapter.

PEFT is needed by the benchmarks alone. bitsandbytes' own layer repacks its bytes on some CPUs, and what it dequantises
to afterwards is garbage; `linear4bit` forbids that.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import AutoModelForCausalLM

import qdora.peft
from qdora.adapter.layer import FrozenLinear
from qdora.model.experts import is_transposed, library_names, stacks
from qdora.model.inject import frozen_layers, inject, replace_module
from qdora.quant.codebooks import NESTED_BLOCK_SIZE
from qdora.quant.packed import PackedWeight, dequantize, quantize

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Contender:
    """One way to train a linear layer, with PEFT's adapter on bitsandbytes' Linear4bit or our own.

    The variant is of PEFT's layer. "addmm": its norm with one addmm in place of a sum over a transposed view, its
    strongest form; "qdora": `qdora.peft.accelerate`.
    """

    engine: Literal["own", "peft", "dense"]  # dense: a frozen 16-bit nn.Linear
    kind: Literal["lora", "dora"] | None  # None: the frozen layer alone
    dropout: float = 0.0
    adapter_dtype: torch.dtype = torch.bfloat16  # of A and B, and of PEFT's magnitude (ours is always float32)
    variant: Literal["addmm", "qdora"] | None = None


CONTENDERS = {
    "dense": Contender("dense", None),
    "frozen": Contender("own", None),
    "own_lora": Contender("own", "lora"),
    "own_dora": Contender("own", "dora"),
    "own_dora_dropout": Contender("own", "dora", dropout=0.05),
    "peft_lora": Contender("peft", "lora"),
    "peft_dora": Contender("peft", "dora"),
    "peft_dora_addmm": Contender("peft", "dora", variant="addmm"),
    "qdora_peft_lora": Contender("peft", "lora", variant="qdora"),
    "qdora_peft_dora": Contender("peft", "dora", variant="qdora"),
    "peft_lora_defaults": Contender("peft", "lora", dropout=0.05, adapter_dtype=torch.float32),
    "peft_dora_defaults": Contender("peft", "dora", dropout=0.05, adapter_dtype=torch.float32),
}
"""By the name that result files use. "defaults": float32 adapters, and the dropout of 0.05 that most recipes take."""
NEW_NORM = "_new_norm"
"""Ending of a name: the norm is computed in each call."""

_ENDINGS = {
    "": "",
    "_8bit": ", 8-bit AdamW",
    "_bf16_adam": ", AdamW in bf16",
    "_defaults": ", float32, dropout",
    "_prepared": ", float32, dropout, head float32",
    "_same_loop": " in qdora's loop",
}
TITLES = {
    f"{engine}_{kind}{ending}": f"{name} {kind[0].upper()}oRA{said}"
    for engine, name in (("own", "qdora"), ("peft", "PEFT"), ("qdora_peft", "qdora.peft"))
    for kind in ("lora", "dora")
    for ending, said in _ENDINGS.items()
} | {"frozen": "frozen NF4 model, no adapter", "dense": "frozen 16-bit model, no adapter"}
"""What they are called in the tables, those with another optimizer or loop too."""


class AddmmNormDora(DoraLinearLayer):
    """PEFT's DoRA with ||W + s B A|| from one addmm, in the dtype that PEFT takes."""

    def forward(
        self, x: Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, base_result: Tensor, **_: Any
    ) -> Tensor:
        """What is added to the base layer's output."""
        weight = peft.utils.integrations.dequantize_module_weight(base_layer).to(x.dtype)
        with torch.no_grad():
            total = torch.addmm(weight, lora_B.weight.to(x.dtype), lora_A.weight.to(x.dtype), alpha=scaling)
            norm = torch.linalg.vector_norm(total, dim=1)
        gain = (self.weight / norm).view(1, -1)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (gain - 1) * base_result + gain * lora_B(lora_A(x)) * scaling


def random_base(
    in_features: int, out_features: int, device: torch.device | str = "cpu", kind: str = "nf4"
) -> PackedWeight:
    """Weights N(0, 0.02^2), blocks of 64, scales quantised too; the same for one shape and device."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator, device=device).mul_(0.02).bfloat16()
    return quantize(weight, kind, 64, double_quant=True)


class LayerCall:
    """A layer of a contender, whose name may end in `NEW_NORM`, with x (tokens, in) and dy (tokens, out) in bf16, which
    are the same for one shape and device."""

    def __init__(self, name: str, base: PackedWeight, rank: int, num_tokens: int) -> None:
        contender, self.new_norm = CONTENDERS[name.removesuffix(NEW_NORM)], name.endswith(NEW_NORM)
        model: Any = linear4bit(base, torch.bfloat16) if contender.engine == "peft" else FrozenLinear(base)
        if contender.engine == "dense":
            model = FrozenLinear(dequantize(base, torch.bfloat16))
        if contender.kind is not None:
            adapted = adapt(nn.ModuleDict({"proj": model}), contender, rank, targets=("proj",))
            model = (adapted if contender.engine == "own" else adapted.base_model.model)["proj"]
        self.layer = model.train()
        (out_features, in_features), device = base.shape, base.device
        generator = torch.Generator(device).manual_seed(1)
        x = torch.randn(num_tokens, in_features, generator=generator, device=device)
        self.x = x.bfloat16().requires_grad_()
        self.dy = torch.randn(num_tokens, out_features, generator=generator, device=device).bfloat16()

    def clear(self) -> None:
        """Drop the gradients of an earlier call, and the norm, as after an optimizer step."""
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        if self.new_norm:
            self.layer.parameters_changed()

    def step(self) -> None:
        """Forward and backward, from no gradients."""
        self.clear()
        self.layer(self.x).backward(self.dy)


def adapt(model: Any, contender: Contender, rank: int, *, targets: tuple[str, ...] = TARGETS) -> Any:
    """Put the contender's adapter on a model that has its base layers; returns the model to call (PEFT wraps it)."""
    if contender.engine == "own":
        options: dict[str, Any] = {"kind": contender.kind, "dropout": contender.dropout, "targets": targets}
        options |= {"dtype": contender.adapter_dtype, "generator": torch.Generator().manual_seed(0)}
        inject(model, rank=rank, alpha=2.0 * rank, **options)
        return model
    torch.manual_seed(0)
    model.is_loaded_in_4bit = True
    options = {"lora_dropout": contender.dropout, "use_dora": contender.kind == "dora", "target_modules": list(targets)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2.0 * rank, **options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(contender.adapter_dtype)
    if contender.variant == "qdora":
        assert qdora.peft.accelerate(adapted) > 0
    for module in adapted.modules():
        if contender.variant == "addmm" and type(module) is DoraLinearLayer:
            module.__class__ = AddmmNormDora
    return adapted


def quant_state(packed: PackedWeight, dtype: torch.dtype) -> Any:
    """bitsandbytes' description of the same packed bytes, dequantised to `dtype`."""
    make, state2 = bnb.functional.QuantState, None
    if packed.nested_absmax is not None:
        nested = {"absmax": packed.nested_absmax, "code": packed.nested_code}
        state2 = make(**nested, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
    return make(
        absmax=packed.absmax,
        shape=torch.Size(packed.shape),
        code=bnb.functional.get_4bit_type(packed.kind, device=packed.device),
        blocksize=packed.block_size,
        quant_type=packed.kind,
        dtype=dtype,
        offset=packed.nested_offset,
        state2=state2,
    )


def linear4bit(packed: PackedWeight, dtype: torch.dtype, bias: Tensor | None = None, *, copy: bool = True) -> Any:
    """bitsandbytes' layer on a copy of the packed bytes, or on the bytes themselves, which may be fake."""
    rows, columns = packed.shape
    options: dict[str, Any] = {"compute_dtype": dtype, "quant_type": packed.kind, "device": "meta"}
    with unset_fake_temporarily():
        new = bnb.nn.Linear4bit(columns, rows, bias=bias is not None, **options)
    state = quant_state(packed, dtype)
    codes = (packed.packed.clone() if copy else packed.packed).view(-1, 1)
    if isinstance(codes, FakeTensor):
        new._parameters["weight"] = _fake_params4bit(codes, state)
    else:
        new.weight = bnb.nn.Params4bit(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=packed.block_size,
            compress_statistics=packed.nested_absmax is not None,
            quant_type=packed.kind,
            bnb_quantized=True,
            module=new,
        )
    new.quant_state = state
    new.support_avx512bf16_for_cpu = False
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new


class Params4bit(FakeTensor):
    """Under the name by which PEFT knows bitsandbytes' parameter, whose own class refuses fake data."""

    def __deepcopy__(self, memo: Any) -> Any:
        """PEFT copies a layer before it reads its norm. The scales stay: copied fakes would belong to another mode."""
        memo[id(self.quant_state)] = self.quant_state
        return _fake_params4bit(self.detach().clone(), self.quant_state)


def _fake_params4bit(codes: Any, state: Any) -> Any:
    codes.__class__ = Params4bit
    codes._is_param, codes.quant_state, codes.bnb_quantized = True, state, True
    codes.quant_type, codes.compress_statistics = state.quant_type, state.state2 is not None
    return codes


def plain(base: Any, dtype: torch.dtype) -> Any:
    """A plain transformers model with the unquantised parameters of `base` and its attention; its linear layers and
    stacks of experts are still random."""
    settings: dict[str, Any] = {"attn_implementation": base.config._attn_implementation, "dtype": dtype}
    if stacks(base):
        settings["experts_implementation"] = "eager"
    model = AutoModelForCausalLM.from_config(copy.deepcopy(base.config), **settings)
    theirs, known = library_names(base), model.state_dict().keys()
    named = {theirs.get(name, name): tensor for name, tensor in base.state_dict().items()}
    values = {name: tensor.to(dtype) for name, tensor in named.items() if name in known - set(stacks(base))}
    missing = model.load_state_dict(values, strict=False).missing_keys
    assert {name.removesuffix(".weight") for name in missing} == {*packed_layers(base), *stacks(base)}, missing[:5]
    return model.requires_grad_(False)


def put_weight_(model: Any, base: Any, path: str, weight: Tensor) -> None:
    """Give a layer of `plain(base)` its weight (out, in), or a stack of experts (experts * out, in)."""
    stack = stacks(base).get(path)
    if stack is None:
        model.get_submodule(path).weight.data = weight
        return
    parts = weight.view(stack.num_experts, -1, weight.shape[1])
    model.get_parameter(path).data = (parts.mT if is_transposed(base, path) else parts).contiguous()


def on_linear4bit(base: Any, dtype: torch.dtype) -> Any:
    """`plain` with bitsandbytes' layers on copies of the packed bytes of `base`, which has no experts."""
    model = plain(base, dtype)
    for path, frozen in packed_layers(base).items():
        replace_module(model, path, linear4bit(frozen.stored_weight, dtype, frozen.bias))
    model.is_loaded_in_4bit = True
    return model


def packed_layers(base: Any) -> dict[str, Any]:
    """Path -> frozen layer that holds packed weights."""
    return {path: each for path, each in frozen_layers(base).items() if each.packed_form is not None}
