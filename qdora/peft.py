"""LoRA and DoRA of PEFT on a bitsandbytes 4-bit base, computed by qdora's layer, in the trainer that you have.

    import qdora.peft
    config = qdora.peft.use(LoraConfig(use_dora=True, target_modules="all-linear"))    # this config; or
    qdora.peft.patch()                # every PEFT model of this process, those that exist, too; or
    qdora.peft.accelerate(model)      # this PeftModel
    print(qdora.peft.report(model))   # which layers are fast, and why the others are not

    python -m qdora.peft llamafactory-cli train qdora.yaml    # patch() in a command and in its processes
    plugins: [qdora.peft.AxolotlPlugin]                       # in axolotl's YAML

Config, trainer, files and the LoraLayer interface stay PEFT's. Besides speed and memory three things differ:

- Magnitudes start at the norm of the dequantised base in float32 and stay float32; 8-bit optimizers of bitsandbytes
  keep 32-bit states for them. A zero row stays zero.
- `unmerge` puts the packed base back bit for bit; PEFT quantises it anew.
- Dropout acts on the adapter's input alone; with DoRA PEFT drops the input of the base, too.

A DoRA layer's norm is kept until an optimizer's step, a `copy_`, a loaded state, a backward pass of the layer or a
change of train/eval. After other writes through `.data` call `changed(model)`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports of torch and PEFT, which only the command needs
    if len(sys.argv) < 2:
        sys.exit("usage: python -m qdora.peft COMMAND [ARGUMENT]...")
    _folders = [str(Path(__file__).parent / "peft_launcher"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _folders))
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except OSError as error:
        sys.exit(f"qdora.peft: {sys.argv[1]}: {error.strerror}")

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn

from qdora.adapter.algebra import (
    checked_norms,
    entries_at_a_time,
    gain_of_sum,
    merged_weight,
    rounded,
    row_norm,
    squared_row_norm,
)
from qdora.adapter.norms import operands_of_alike
from qdora.adapter.product import Kept, Operands, adapted_linear, operands_of, product_dtype
from qdora.adapter.rows import never_narrowed
from qdora.quant.packed import PackedWeight, dequantize, from_tensors

try:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
    from peft.tuners.lora.bnb import Linear4bit as _Peft
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    _METHODS = ("resolve_lora_variant", "forward", "merge", "unmerge")
    _OWN: dict[str, Callable[..., Any]] = {name: getattr(_Peft, name) for name in _METHODS}
except (ImportError, AttributeError) as error:
    versions = f"PEFT {peft.__version__} and bitsandbytes {bnb.__version__}"
    raise ImportError(
        f"qdora.peft knows PEFT 0.18 to 0.21 with bitsandbytes 0.50, got {versions}: {error}"
    ) from error

_BASE_FORWARD = bnb.nn.Linear4bit.forward


class Magnitude(DoraLinearLayer):  # type: ignore[misc]
    """PEFT's magnitudes of a layer, (out,) float32, with the products' operands of their present values."""

    weight: nn.Parameter
    operands: Kept[Operands]
    # Shares the memory of the float32 weight: a cast of its .data leaves the values here
    latest: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Magnitude:
        super()._apply(never_narrowed(fn, [self.weight]), recurse)
        return self

    def train(self, mode: bool = True) -> Magnitude:
        if mode != self.training:
            self.operands.clear()
        super().train(mode)
        return self

    def widen(self) -> None:
        """Make the weight float32 again after a cast of its `.data`."""
        weight, latest = self.weight, self.latest
        if weight.dtype.itemsize < 4:
            only_cast = latest is not None and torch.equal(latest.to(weight), weight)
            weight.data = latest.to(weight.device) if latest is not None and only_cast else weight.data.float()
            self.operands.clear()
        self.latest = weight.detach()


class Dora(DoraLinearVariant):  # type: ignore[misc]
    """PEFT's variant with float32 magnitudes and a merge in float32, in which a zero row stays zero."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        DoraLinearVariant.init(module, adapter_name=adapter_name, **kwargs)
        magnitude = _adopt(module, adapter_name)
        base = module.get_base_layer()
        if _is_quantized(base) and magnitude.weight.device.type != "meta":
            a, b, s = _factors(module, adapter_name)
            weight, squared = _packed(module)
            norm = row_norm(weight, a, b, s, base_squared=squared, dtype=torch.float32)
            magnitude.weight.data = norm.to(magnitude.weight.device)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        unmerged = module.__dict__["_qdora_unmerged"][0]
        base = dequantize(_packed(module, unmerged)[0], torch.float32)
        a, b, s = _factors(module, active_adapter)
        own_gain = gain_of_sum(
            merged_weight(base, a, b, s), module.lora_magnitude_vector[active_adapter].weight
        )
        before = orig_weight.float() if module.merged_adapters else base
        return merged_weight(before, a, b, s).mul_(own_gain.unsqueeze(1)).to(orig_weight.dtype)


class Linear4bit(_Peft):  # type: ignore[misc]
    """PEFT's LoRA and DoRA layer on a 4-bit base with qdora's products; `patch` gives these methods to PEFT's class."""

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        _undo_repacking(self.get_base_layer())
        variant = _OWN["resolve_lora_variant"](self, **kwargs)
        return Dora() if type(variant) is DoraLinearVariant else variant

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # torch.compile takes PEFT's LoRA whole. Its DoRA breaks the graph several times, ours once.
        if not self.lora_variant and torch.compiler.is_compiling():
            return _OWN["forward"](self, x, *args, **kwargs)  # type: ignore[no-any-return]
        return _forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        _undo_repacking(base)
        for name in self.lora_variant:
            _adopt(self, name)
        if not self.merged:
            bias = None if base.bias is None else base.bias.data
            # The base before a merge, with the attributes of its weight, which PEFT's merge changes.
            self.__dict__["_qdora_unmerged"] = base.weight, dict(vars(base.weight)), bias
        _OWN["merge"](self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        if not self.merged or "_qdora_unmerged" not in self.__dict__:
            _OWN["unmerge"](self)
            return
        base, (weight, attributes, bias) = self.get_base_layer(), self.__dict__.pop("_qdora_unmerged")
        vars(weight).clear()
        vars(weight).update(attributes)
        device = base.weight.device
        base.weight = weight if weight.device == device else weight.to(device)
        base.quant_state = base.weight.quant_state
        if bias is not None:
            base.bias.data = bias.to(device)
        self.merged_adapters.clear()


def use(config: Any) -> Any:
    """The same LoraConfig: models made with it have the layers of this file. Nothing is written to disk."""
    config._register_custom_module({bnb.nn.Linear4bit: Linear4bit})
    return config


def accelerate(model: nn.Module) -> int:
    """Change PEFT's Linear4bit layers of a live model. Returns how many there are."""
    layers = [
        layer for _, layer in _layers(model) if type(layer).forward in (_OWN["forward"], Linear4bit.forward)
    ]
    for layer in layers:
        if type(layer) is _Peft:
            layer.__class__ = Linear4bit
        _undo_repacking(layer.get_base_layer())
        for name in layer.lora_variant:
            _adopt(layer, name)
    return len(layers)


def patch() -> None:
    """Change PEFT's Linear4bit in place: all models of this process, those that exist and whoever makes the others."""
    for name in _METHODS:
        setattr(_Peft, name, vars(Linear4bit)[name])


def changed(model: nn.Module) -> None:
    """Forget what is kept of the parameters: after writes through `.data` that no optimizer and no backward tells."""
    for module in model.modules():
        if isinstance(module, Magnitude):
            module.operands.clear()
        module.__dict__.pop("_qdora_base", None)


def report(model: nn.Module) -> dict[str, str]:
    """Path of each of PEFT's Linear4bit layers -> "fast", or why PEFT's own forward runs: of the latest call with an
    adapter, else of a plain call now."""
    ways = {}
    for path, layer in _layers(model):
        ways[path] = "not changed: call qdora.peft.accelerate(model)"
        if type(layer).forward is Linear4bit.forward:
            why = layer.__dict__["_qdora_why"] if "_qdora_why" in layer.__dict__ else _why_not(layer, (), {})
            ways[path] = why or "fast"
    return ways


def __getattr__(name: str) -> Any:
    """`AxolotlPlugin`: made when axolotl asks for it, since its base class is axolotl's."""
    if name != "AxolotlPlugin":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found, unused-ignore]

    # On by default; they call no layer of PEFT
    off = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}
    hooks = {"register": lambda self, cfg: cfg.update(off), "pre_model_load": lambda self, cfg: patch()}
    return type(name, (BasePlugin,), hooks)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, _Peft))


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), float(layer.scaling[name])


def _adopt(layer: Any, name: str) -> Any:
    if type(layer.lora_variant[name]) is DoraLinearVariant:
        layer.lora_variant[name] = Dora()
    magnitudes = layer.lora_magnitude_vector
    magnitude: Any = magnitudes[name] if name in magnitudes else None  # noqa: SIM401
    if type(magnitude) is DoraLinearLayer:
        magnitude.__class__ = Magnitude
        magnitude.operands = Kept()
    if isinstance(magnitude, Magnitude):
        magnitude.widen()
    return magnitude


def _keep_32_bit_states(magnitude: Tensor) -> None:
    """In 8-bit optimizers of bitsandbytes, whose overrides go by the id of a parameter."""
    manager = bnb.optim.GlobalOptimManager.get_instance()
    if id(magnitude) not in manager.pid2config:
        manager.override_config(magnitude, "optim_bits", 32)
        # The id will be another tensor's
        weakref.finalize(magnitude, manager.pid2config.pop, id(magnitude), None)


def _is_quantized(base: Any) -> bool:
    weight = base.weight
    return getattr(weight, "quant_state", None) is not None and weight.device.type != "meta"


def _undo_repacking(base: Any) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes rewrites a weight in place, in the first evaluation without gradients,
    into a layout that `dequantize_4bit` misreads."""
    if not getattr(base, "support_avx512bf16_for_cpu", False):
        return
    base.support_avx512bf16_for_cpu = False
    state = getattr(base.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base.weight.data, state = _convert_weight_packed_for_cpu_inverse(base.weight.data, state)
        if not state.nested:  # the inverse forgets these: (blocks of a row, out) bfloat16
            state.absmax = state.absmax.T.reshape(-1).float()


def _why_not(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return f"{len(names)} active adapters"
    if args or kwargs:
        return "arguments beside the input (adapter_names)"
    (name,) = names
    base, a, b = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    if not _is_quantized(base):
        return "its base weight has no quant_state here (sharded, or not quantised)"
    if type(base).forward is not _BASE_FORWARD:
        return f"base_layer is a {type(base).__name__} with a forward of its own"
    if base.bias is not None and base.bias.requires_grad:
        return "its bias is trained"
    variant = layer.lora_variant.get(name)
    parts = {"base_layer": base, "lora_A": a, "lora_B": b, "lora_dropout": layer.lora_dropout[name]}
    if variant is not None:
        if not isinstance(variant, Dora) and type(variant) is not DoraLinearVariant:
            return f"the variant {type(variant).__name__}"
        parts["lora_magnitude_vector"] = layer.lora_magnitude_vector[name]
    for label, part in parts.items():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return f"a hook on {label}"
        # ms-swift's keeps the device of the input, which is the layer's here.
        if "forward" in part.__dict__ and getattr(part.forward, "__name__", "") != "keep_device_forward":
            return f"a forward of its own on {label}"
        if type(part) not in _PLAIN and part is not base:
            return f"{label} is a {type(part).__name__}"
        weight = getattr(part, "weight", None)
        if weight is not None and (type(weight) not in _PARAMETERS or hasattr(weight, "ds_id")):
            return f"the weight of {label} is sharded: a {type(weight).__name__}"
    return "lora_bias" if b.bias is not None else None


_PLAIN = (nn.Linear, nn.Identity, nn.Dropout, Magnitude, DoraLinearLayer)
_PARAMETERS = (nn.Parameter, bnb.nn.Params4bit)


def _packed(layer: Any, weight: Any = None) -> tuple[PackedWeight, Tensor]:
    """The base or another weight for our ops, sharing its memory, and its squared row norm: made once for each."""
    weight = layer.get_base_layer().weight if weight is None else weight
    cache = layer.__dict__.get("_qdora_base")
    if cache is None:
        cache = layer.__dict__["_qdora_base"] = Kept()
    state = weight.quant_state

    def made() -> tuple[PackedWeight, Tensor]:
        tensors = {"packed": weight.data.reshape(-1).view(torch.uint8), "absmax": state.absmax}
        if state.nested:
            tensors |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
            tensors["nested_offset"] = state.offset.float()
        packed = from_tensors(state.quant_type, tuple(state.shape), state.blocksize, tensors)
        return packed, squared_row_norm(packed)

    found: tuple[PackedWeight, Tensor] = cache.get((weight, state.absmax), (state,), made)
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = layer.get_base_layer()
    _undo_repacking(base)
    if not (layer.disable_adapters or layer.merged):
        why = layer.__dict__["_qdora_why"] = _why_not(layer, args, kwargs)
        if why is None:
            return _product(layer, base, x)
    return _OWN["forward"](layer, x, *args, **kwargs)  # type: ignore[no-any-return]


# What layers alike have in common, last the products' dtype, the scaling and the dropout
_Sort = tuple[Any, ...]
_passed: dict[_Sort, weakref.WeakKeyDictionary[Any, str]] = {}
"""Layers alike, with their adapters, that have had a backward pass since their operands were made."""


def _sort(layer: Any, name: str, weight: PackedWeight, dtype: torch.dtype) -> _Sort:
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    base, factors = (weight.kind, weight.block_size, weight.shape), (a.shape, a.dtype, b.dtype, a.device)
    return base, factors, dtype, float(layer.scaling[name]), dropout


def _product(layer: Any, base: Any, x: Tensor) -> Tensor:
    (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    casts = torch.is_autocast_enabled(x.device.type)
    dtype = product_dtype(x) if casts else base.compute_dtype or x.dtype
    out_dtype = dtype if casts else x.dtype
    weight, _ = _packed(layer)
    alike = *_, s, dropout = _sort(layer, name, weight, dtype)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    magnitude = _adopt(layer, name) if name in layer.lora_variant else None
    if magnitude is None:
        # Nothing is kept: PEFT's hot-swap writes through .data in evaluation.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            operands = operands_of(a, b, None, s / (1.0 - dropout), dtype)
    else:
        parameters, settings = (a, b, magnitude.weight), (alike, weight)
        operands = magnitude.operands.get(parameters, settings, lambda: _operands(layer, name, alike))
    y = adapted_linear(
        x.to(dtype).contiguous(),
        weight,
        a,
        b,
        operands,
        bias=base.bias,
        magnitude=None if magnitude is None else magnitude.weight,
        dropout=dropout,
    )
    if magnitude is not None and y.grad_fn is not None:

        def forget(*_: Any) -> None:
            magnitude.operands.clear()
            _passed.setdefault(alike, weakref.WeakKeyDictionary())[layer] = name

        # A backward pass is followed by a step, whoever takes it. After the pass: in it a checkpoint computes again.
        y.grad_fn.register_hook(forget)
    return y.to(out_dtype)


def _operands(layer: Any, name: str, alike: _Sort) -> Operands:
    """The operands of a DoRA layer, made and kept together with those of layers alike that have had a backward pass."""
    others = [(other, its) for other, its in _passed.pop(alike, {}).items() if other is not layer]
    others = [(other, its) for other, its in others if _is_whole(other, its, alike)]
    _, _, dtype, s, dropout = alike
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    limit = entries_at_a_time(factors[0].device) // max(factor.numel() for factor in factors)
    if others[limit:]:
        _passed[alike] = weakref.WeakKeyDictionary(dict(others[limit:]))
    rows = [(layer, name), *others[:limit]]
    weights, squares = zip(*(_packed(each) for each, _ in rows), strict=True)
    magnitudes = [_adopt(each, its) for each, its in rows]
    parameters = [
        (each.lora_A[its].weight, each.lora_B[its].weight, magnitude.weight)
        for (each, its), magnitude in zip(rows, magnitudes, strict=True)
    ]
    a, b, m = (some[0][None] if len(rows) == 1 else torch.stack(some) for some in zip(*parameters, strict=True))
    norm = checked_norms(weights, a, b, s, base_squared=torch.stack(squares), dtype=dtype)
    own = [present[0].detach() for present in parameters]
    made = operands_of_alike(own, rounded(a, dtype), b, m, norm, s / (1.0 - dropout))
    for magnitude, present, weight, operands in zip(magnitudes, parameters, weights, made, strict=True):
        _keep_32_bit_states(magnitude.weight)
        magnitude.operands.put(present, (alike, weight), operands)
    return made[0]


def _is_whole(layer: Any, name: str, alike: _Sort) -> bool:
    if name not in layer.lora_variant or not _is_quantized(layer.get_base_layer()):
        return False
    parts = layer.lora_A[name], layer.lora_B[name], layer.lora_magnitude_vector[name]
    here = all(type(part.weight) is nn.Parameter for part in parts)
    return here and _sort(layer, name, _packed(layer)[0], alike[2]) == alike
