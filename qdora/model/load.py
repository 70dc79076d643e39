"""Loading a frozen base: a skeleton without weights, then tensor by tensor read, quantise, place.

Host memory holds the model in its final form and one tensor of the checkpoint; so does a GPU.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from qdora.adapter.layer import FrozenLinear
from qdora.errors import UserError, refuse
from qdora.files.atomic import read_json_object
from qdora.files.console import Progress
from qdora.model.attention import with_attention
from qdora.model.checkpoint import (
    Stored,
    StoredPacked,
    StoredTensor,
    gather_packed,
    match_to_model,
    open_safetensors,
    reading,
    rename_to_model,
    tied_weights,
)
from qdora.model.experts import stacks, use_expert_layers_
from qdora.model.gguf import config_of_gguf, open_gguf
from qdora.model.inject import HEAD, check_matches, frozen_like, linear_layers, matches, replace_module
from qdora.model.multimodal import auto_class, leave_out_other_parts_, not_loaded, set_aside, settle_tying
from qdora.model.quantised import form_of_config, join_parts, left_dense
from qdora.model.source import ModelSource
from qdora.quant.bnb import FOUR_BIT_KINDS
from qdora.quant.codebooks import FIXED_BLOCK_SIZES, INT4_GROUPS, MXFP4, NVFP4
from qdora.quant.packed import dequantize, quantize_parts
from qdora.quant.tiles import Weight
from qdora.recipe.section import with_settings
from qdora.recipe.settings import BaseWeightsConfig, Recipe

log = logging.getLogger("qdora")

_CPU = torch.device("cpu")
LEFT_DENSE = "left_dense"
"""Attribute of the linear layers of a `skeleton` that the checkpoint's quantisation leaves out."""


@dataclass(frozen=True)
class Quantization:
    """How to hold the linear layers. `kind` is base.quant; "none" keeps them dense in the compute dtype."""

    kind: str
    block_size: int
    double_quant: bool
    skip: tuple[str, ...]


def quantization_of(base: BaseWeightsConfig) -> Quantization:
    """auto stands for nf4, unless `with_quant` has found another format in the checkpoint."""
    kind = "nf4" if base.quant == "auto" else base.quant
    return Quantization(kind, base.block_size, base.double_quant, base.skip)


def with_quant(recipe: Recipe, config: PreTrainedConfig) -> Recipe:
    """A recipe whose base.quant auto is settled: the checkpoint's own format, or nf4 for one in 16 bits or FP8."""
    if recipe.base.quant != "auto":
        return recipe
    form = form_of_config(config)
    if form["quant"] == "none" or (form["quant"] == MXFP4 and recipe.base.is_made_once):
        return with_settings(recipe, base={"quant": "nf4"})
    log.info("The checkpoint is in %s, which is kept (base.quant: auto).", form["quant"])
    return with_settings(recipe, base=form)


@dataclass(frozen=True)
class Loading:
    """A model that is being filled. `stored`: model name -> tensor to read.

    `layers`: paths of the linear layers that are not skipped, none in a quantised checkpoint. `compute_dtype`: of all
    other floating-point tensors.
    """

    model: PreTrainedModel
    stored: Mapping[str, Stored]
    layers: set[str]
    wanted: Quantization
    device: torch.device
    compute_dtype: torch.dtype
    progress: Progress | None = None

    def quantizes(self, name: str, item: Stored) -> bool:
        is_layer = name.removesuffix(".weight") in self.layers and self.wanted.kind != "none"
        return is_layer and isinstance(item, StoredTensor) and item.keep_bits is None

    def read(self, name: str, item: Stored) -> Weight:
        """A tensor, perhaps a read-only view of the file, or the weight of a layer quantised on `device`."""
        if not self.quantizes(name, item):
            return item.read()
        assert isinstance(item, StoredTensor)
        layer, wanted = self.model.get_submodule(name.removesuffix(".weight")), self.wanted
        read: Iterable[Tensor] = map(item.read, range(item.num_experts))
        if item.num_experts == 1:
            read = torch.split(values := item.read(), getattr(layer, "expert_features", len(values)))
        parts = (part.to(self.device) for part in read)  # a stack goes to the device expert by expert
        return quantize_parts(parts, wanted.kind, wanted.block_size, wanted.double_quant, name=name)

    def dtype_of(self, name: str) -> torch.dtype:
        return dense_dtype(self.model, name, self.compute_dtype)


Placer = Callable[[Loading], None]
"""Reads the stored tensors and puts them into the model: `place_all`, or one that compresses, streams or divides."""


def load_model(
    source: ModelSource,
    *,
    quant: str,
    block_size: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] = (HEAD,),
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype = torch.bfloat16,
    attention: str = "auto",
    progress: Progress | None = None,
    reader: Callable[[ModelSource, PreTrainedModel], dict[str, Stored]] | None = None,
    compressed: Mapping[str, Stored] | None = None,
    placer: Placer | None = None,
) -> PreTrainedModel:
    """Load a causal LM with frozen weights; every linear layer is quantised except the skipped ones.

    Source -> config -> skeleton -> tensors to read (`reader`) -> layers to quantise -> placed one by one (`placer`).
    A weight is quantised from the dtype of the file, without a rounding in between. Embeddings, norms, biases and
    skipped layers are in `compute_dtype` (or float32 if the model demands it).

    Args:
        quant: As base.quant; "none" loads a dense model. A quantised checkpoint is used as it is and must match.
        skip: Layers left dense: last part of a module's path, whole path or shell pattern. "lm_head" means the output
            head under any name.
        compressed: Model name -> weight that is read instead of the source's.
    """
    wanted, device = Quantization(quant, block_size, double_quant, tuple(skip)), torch.device(device)
    config = load_config(source)
    kind = form_of_config(config)["quant"]
    model = skeleton(config, source, compute_dtype, attention, device)
    stored = (reader or tensors_of_source)(source, model)
    if not_loaded(model):
        log.info("The model is multimodal, and only its language part is loaded and trained.")
    layers = (layers_to_quantize if placer is None else chosen_layers)(model, wanted)
    stored, layers = settle_stored(stored, kind, wanted, layers)
    stored |= compressed or {}
    (placer or place_all)(Loading(model, stored, layers, wanted, device, compute_dtype, progress))
    tie_and_move_buffers(model, device)
    model.requires_grad_(False)
    if (generation := published_generation(source)) is not None:
        model.generation_config = generation
    model.config._name_or_path = source.name
    model.eval()
    if device.type == "cuda":
        # The allocator keeps the freed 16-bit tensors; training's first allocations differ in size from them.
        torch.cuda.empty_cache()
    return model


def load_config(source: ModelSource) -> PreTrainedConfig:
    with reading(f"model.source: {source.name}: its config"):
        if source.is_gguf:
            config = config_of_gguf(source.path)
        else:
            config = AutoConfig.from_pretrained(str(source.path), trust_remote_code=source.trust_remote_code)
            settle_tying(config, source.path)
    return config


def skeleton(
    config: PreTrainedConfig,
    source: ModelSource,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    device: torch.device = _CPU,
) -> PreTrainedModel:
    """The model with its parameters on the meta device; buffers are real, since checkpoints do not hold all of them.

    Of a multimodal model only the language part has parameters (`model/multimodal.py`).
    """
    # The layers are not transformers' own: with this entry the model would refuse to be saved.
    settings = vars(config).pop("quantization_config", None)
    family = auto_class(config, source.name)

    def build(choice: str | None) -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = family.from_config(
                config, dtype=dtype, attn_implementation=choice, trust_remote_code=source.trust_remote_code
            )
        leave_out_other_parts_(model)
        use_expert_layers_(model)
        for path in left_dense(settings, linear := linear_layers(model)):
            vars(linear[path])[LEFT_DENSE] = True
        return model

    with reading(f"model.source: {source.name}: its config"):
        return with_attention(build, config, attention, name=source.name, device=device, dtype=dtype)


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Path and list of the decoder blocks: the longest list of `GradientCheckpointingLayer`s."""
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module
    ]
    of_blocks = [
        each for each in lists if all(isinstance(block, GradientCheckpointingLayer) for block in each[1])
    ]
    return max(of_blocks, key=lambda each: len(each[1]), default=None)


def blocks_of(model: PreTrainedModel, needed: str) -> tuple[str, nn.ModuleList]:
    """`block_list`; a UserError that says what is `needed` of a model without blocks."""
    found = block_list(model)
    if found is None:
        raise UserError(f"{needed}: {model.config.model_type} has no list of blocks.")
    return found


def tensors_of_source(source: ModelSource, model: PreTrainedModel) -> dict[str, Stored]:
    """Model name -> stored tensor, in the model's order; nothing is read yet."""
    if source.is_gguf:
        return match_to_model(open_gguf(source.path, model), model)
    renamed = rename_to_model(_weights_of(source), model)
    return match_to_model(set_aside(renamed, model, source.path), model)


def _weights_of(source: ModelSource) -> dict[str, Stored]:
    """Checkpoint key -> weight, with the parts of quantised ones joined."""
    stored, file = open_safetensors(source.path), source.path / "config.json"
    settings = read_json_object(file).get("quantization_config") or {} if file.is_file() else {}
    own = settings.get("quant_method", "bitsandbytes") in ("bitsandbytes", MXFP4)
    return gather_packed(stored) if own else join_parts(stored, settings)


def layers_to_quantize(model: PreTrainedModel, wanted: Quantization) -> set[str]:
    """Paths of the linear layers to quantise. In a mixture MXFP4 is the form of experts alone."""
    experts = stacks(model)
    if wanted.kind == NVFP4 and experts:
        raise UserError("base.quant: nvfp4 cannot hold stacks of experts.")
    chosen = set() if wanted.kind == "none" else chosen_layers(model, wanted)
    if wanted.kind == MXFP4 and experts:
        chosen &= experts.keys()
    if (size := FIXED_BLOCK_SIZES.get(wanted.kind)) is not None:
        odd = sorted(path for path in chosen if model.get_parameter(f"{path}.weight").shape[1] % size)
        why = f"whose rows are no whole blocks of {size} ({wanted.kind})"
        refuse([f"base.skip: must have {path}, {why}." for path in odd])
    return chosen


def chosen_layers(model: PreTrainedModel, wanted: Quantization) -> set[str]:
    """Paths of all linear layers that are not skipped, by default neither by the checkpoint's own quantisation."""
    linear, head = linear_layers(model), model.get_output_embeddings()
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise UserError(
            "base.quant: must be none for a model of Conv1D layers (GPT-2), and adapter.kind full or none."
        )
    check_matches("base.skip", [pattern for pattern in wanted.skip if pattern != HEAD], linear)
    chosen = {name for name in linear if not any(matches(name, pattern) for pattern in wanted.skip)}
    if HEAD in wanted.skip:
        chosen = {name for name in chosen if linear[name] is not head}
    if wanted.skip == (HEAD,):
        chosen = {name for name in chosen if not hasattr(linear[name], LEFT_DENSE)}
    shared = {name for pair in tied_weights(model).items() for name in pair}
    for name in chosen:
        if f"{name}.weight" in shared:
            raise UserError(f"base.skip: must have {name}, which shares its weight with the embedding.")
    # Weights that a model keeps in float32 beside float16 are too sensitive for 4 bits.
    half = torch.float16
    return {name for name in chosen if dense_dtype(model, f"{name}.weight", half) == half}


def dense_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 for a parameter that the model keeps in it beside a 16-bit `dtype`, by transformers' rule."""
    names = {
        torch.float16: ["_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"],
        torch.bfloat16: ["_keep_in_fp32_modules_strict"],
    }
    parts = [part for each in names.get(dtype, ()) for part in getattr(model, each, None) or ()]
    is_wide = any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in parts)
    return torch.float32 if is_wide else dtype


def place(load: Loading, name: str, item: Stored) -> None:
    """Read a tensor, quantise it if it is a weight of `load.layers`, and put it into the model."""
    (path, _, leaf), value = name.rpartition("."), load.read(name, item)
    if isinstance(value, Tensor) and item.keep_bits is None:
        module, dtype = load.model.get_submodule(path), load.dtype_of(name)
        if leaf in module._buffers and not isinstance(module, FrozenLinear):  # keeps its dtype
            dtype = getattr(module, leaf).dtype
        elif not value.is_floating_point():
            dtype = value.dtype
        # copy: the value may be a view of the file.
        placed = value.to(load.device, dtype, copy=True)
        setattr(
            module, leaf, nn.Parameter(placed, requires_grad=False) if leaf in module._parameters else placed
        )
        return
    keep_bits = None if item.keep_bits is None else item.keep_bits().to(load.device, copy=True)
    if isinstance(value, Tensor):
        value = value.to(load.device, load.compute_dtype, copy=True)
    place_frozen(load.model, path, value.to(load.device), keep_bits)


def place_all(load: Loading, place: Callable[[Loading, str, Stored], None] = place) -> None:
    """Put the stored tensors into the model one by one, so that one tensor of the checkpoint is in memory."""
    for done, (name, item) in enumerate(load.stored.items(), start=1):
        place(load, name, item)
        if load.progress is not None:
            load.progress(done, len(load.stored))


def place_frozen(model: nn.Module, layer: str, weight: Weight, keep_bits: Tensor | None = None) -> FrozenLinear:
    """Replace a linear layer by a frozen one with its bias, which may still be on the meta device."""
    before: Any = model.get_submodule(layer)
    frozen = frozen_like(before, weight, before.bias, keep_bits)
    frozen.replaces = type(before).__name__
    replace_module(model, layer, frozen)
    return frozen


def tie_(model: PreTrainedModel) -> set[str]:
    """Let tied weights be one tensor, which the skeleton may hold twice. Returns their names."""
    pairs = tied_weights(model)
    for target, origin in pairs.items():
        held, other = model.get_parameter(origin), model.get_parameter(target)
        if held.is_meta and not other.is_meta:  # only the other name was stored
            target, origin = origin, target
        path, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter(origin))
    return {name for pair in pairs.items() for name in pair}


def tie_and_move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    tie_(model)
    for module in model.modules():
        away = module.away if isinstance(module, FrozenLinear) else ()
        for name, buffer in module._buffers.items():
            if name not in away and buffer is not None and not buffer.is_meta and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def published_generation(source: ModelSource) -> GenerationConfig | None:
    if not (source.path / "generation_config.json").is_file():
        return None
    with reading(f"model.source: {source.name}: its generation_config.json"):
        return GenerationConfig.from_pretrained(str(source.path))


def stored_form(source: ModelSource) -> dict[str, Any]:
    """The quantisation of the checkpoint, as settings of `load_model` and of a recipe's base."""
    form = form_of_config(load_config(source))
    if form["quant"] not in FOUR_BIT_KINDS:
        return form
    for item in _weights_of(source).values():
        if isinstance(item, StoredPacked):
            return form | {"block_size": item.block_size, "double_quant": item.double_quant}
    return form


def settle_stored(
    stored: Mapping[str, Stored], kind: str, wanted: Quantization, layers: set[str]
) -> tuple[dict[str, Stored], set[str]]:
    """The tensors to read, and those of `layers` that are still to be quantised.

    A quantised checkpoint is used as it is, the experts of MXFP4 only if the recipe asks for it; other blocks or scales
    are a warning. What an FP8 checkpoint keeps in 16 bits stays so unless base.skip is set. `kind` is that of the
    checkpoint's config.
    """
    packed = {name: item for name, item in stored.items() if isinstance(item, StoredPacked)}
    kinds = sorted({item.kind for item in packed.values()})
    if wanted.kind == INT4_GROUPS and not packed:
        raise UserError("base.quant: int4-groups needs a checkpoint of GPTQ, AWQ or compressed-tensors.")
    if wanted.kind != MXFP4 and kinds == [MXFP4]:
        log.info("%d weights in mxfp4 are dequantised; base.quant: mxfp4 would keep them.", len(packed))

        def read(item: StoredPacked) -> Tensor:
            return dequantize(item.read(), torch.bfloat16)

        dense = {
            name: StoredTensor(each.key, each.shape, partial(read, each), "BF16")
            for name, each in packed.items()
        }
        return {**stored, **dense}, layers
    if not packed and kind == "none":
        tensors = ((name, item) for name, item in stored.items() if isinstance(item, StoredTensor))
        in_fp8 = {name.removesuffix(".weight") for name, item in tensors if item.dtype.startswith("F8")}
        return dict(stored), layers & in_fp8 if in_fp8 and wanted.skip == (HEAD,) else layers
    if not packed:
        raise UserError(f"model.source: its config names {kind}, but it holds no weights in that format.")
    if kinds != [wanted.kind]:
        raise UserError(
            f"base.quant: must be auto or {', '.join(kinds)}, as the checkpoint (got {wanted.kind})."
        )
    # A warning, since runs that were trained so must load; a default may be nobody's choice
    default, first = quantization_of(BaseWeightsConfig()), next(iter(packed.values()))
    for key in ("block_size", "double_quant"):
        held, asked, usual = (getattr(each, key) for each in (first, wanted, default))
        if asked not in (held, usual):
            log.warning("base.%s: the checkpoint has %s, which is used (got %s).", key, held, asked)
    return dict(stored), set()
