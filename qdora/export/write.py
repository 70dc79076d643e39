"""Plan and write a checkpoint directory: weights cast and written shard by shard, config, tokenizer and other files.

A plan has each tensor's published name, shape and dtype, and the function that makes it when it is written, so one
tensor of the output is in memory at a time.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from qdora.adapter.experts import AdaptedExperts, FrozenExperts
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.adapter.rows import RowEmbedding, RowHead, merged_rows
from qdora.errors import RunFailure, UserError
from qdora.files.atomic import json_bytes
from qdora.files.console import Progress
from qdora.files.tensor_file import DTYPES, TensorSpec, write_safetensors
from qdora.model.checkpoint import INDEX_FILE, published_form, tied_weights
from qdora.model.experts import library_names, stacks
from qdora.model.load import dense_dtype
from qdora.model.multimodal import carried, linear_not_loaded, processor_files
from qdora.quant.bnb import STATE_NAME, to_bnb_state
from qdora.quant.packed import PackedWeight, empty_packed
from qdora.quant.tiles import Weight
from qdora.recipe.section import size_text

MAX_SHARD_BYTES = 5 * 2**30
_STATE_BYTES = 256
"""Length of the JSON beside a packed weight, padded with blanks: it must be known before the scales are."""

Layer = AdaptedLinear | FrozenLinear


@dataclass(frozen=True)
class Source:
    """A tensor before it has a name in the output: a meta tensor of its shape, and what returns it.

    `held` is the tensor itself if the model holds it dense: tied weights are recognised by it. `dtype` is set where the
    format fixes it (packed weights, block scales).
    """

    shaped: Tensor
    make: Callable[[], Tensor]
    held: Tensor | None = None
    dtype: torch.dtype | None = None


def base_of(layer: Layer) -> FrozenLinear:
    """The frozen layer in an adapted one, or itself."""
    return layer.base if isinstance(layer, AdaptedLinear) else layer


def merged(layer: Layer) -> Tensor:
    """The dense weight of a layer, merged or dequantised; a stack of experts takes the device one at a time."""
    wide = base_of(layer).wide_dtype
    if isinstance(layer, FrozenExperts | AdaptedExperts):
        rows = layer.merged_rows if isinstance(layer, AdaptedExperts) else layer.dequantized_rows
        starts, size = range(0, layer.out_features, layer.expert_features), layer.expert_features
        return torch.cat([rows(slice(start, start + size), wide).cpu() for start in starts])
    return layer.merged_weight(wide) if isinstance(layer, AdaptedLinear) else layer.dequantized(wide)


@dataclass(frozen=True)
class CheckpointPlan:
    """What a checkpoint directory holds. `makers`, in the order of writing, return float32 or the dtype of the spec."""

    model: PreTrainedModel
    config: PreTrainedConfig
    specs: Mapping[str, TensorSpec]
    makers: Mapping[str, Callable[[], Tensor]]


def plan_export(
    model: PreTrainedModel,
    dtype: torch.dtype,
    weight_of: Callable[[Layer], Weight] = merged,
    *,
    packed: bool = False,
    double_quant: bool = True,
) -> CheckpointPlan:
    """Plan the checkpoint of a model in memory. `weight_of` makes the weight of a layer when it is written: dense, or,
    if `packed`, of a layer with a packed base a packed one for bitsandbytes, with float32 scales or `double_quant`.

    Tensors have the names of the model's published checkpoints, and `dtype`, unless their source fixes one or training
    keeps float32 (`dense_dtype`). Parts of a multimodal model that are not loaded are copied from its source. Tied
    weights are listed once; a head with a weight of its own (quantised or adapted) is no longer tied in the config.
    """

    def tensors(layer: Layer) -> dict[str, Source]:
        base = base_of(layer)
        make: Any = partial(weight_of, layer)
        if packed and base.kind != "dense":
            return packed_sources(base, make, dtype, double_quant)
        shape = torch.empty(layer.out_features, layer.in_features, device="meta")
        own = layer.get_buffer("weight") if isinstance(layer, FrozenLinear) and base.kind == "dense" else None
        return {"weight": Source(shape, make, own)}

    sources = dict(_sources(model, tensors))
    config = _plain_config(model, dtype)
    redundant = set()
    for target, origin in tied_weights(model).items():
        if target not in sources or origin not in sources:
            continue
        first, second = sources[target].held, sources[origin].held
        if first is not None and second is not None and first.data_ptr() == second.data_ptr():
            redundant.add(target)
        else:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    stacked = {f"{path}.weight": path for path in stacks(model)}
    single = {name: source.shaped for name, source in sources.items() if name not in redundant | stacked.keys()}
    # If the published form stacks or splits tensors, the module's names stay.
    theirs = library_names(model)
    named = {theirs.get(name, name): tensor for name, tensor in single.items()}
    published = {id(tensor): name for name, tensor in revert_weight_conversion(model, named).items()}
    renames = published.keys() == {id(tensor) for tensor in single.values()}
    names = {name: published[id(tensor)] if renames else name for name, tensor in single.items()}
    specs: dict[str, TensorSpec] = {}
    makers: dict[str, Callable[[], Tensor]] = {}
    for name, source in sources.items():
        if name in stacked:
            form = partial(published_form, model, stacked[name])
            layout = form(source.shaped)
            specs |= {key: TensorSpec(key, dtype, tuple(empty.shape)) for key, empty in layout.items()}
            makers |= made_together(layout, form, source.make)
        elif name in names:
            key, kind = names[name], source.dtype or dense_dtype(model, name, dtype)
            specs[key], makers[key] = TensorSpec(key, kind, tuple(source.shaped.shape)), source.make
    for key, item in carried(model).items():
        specs[key], makers[key] = TensorSpec(key, DTYPES[item.dtype], item.shape), item.read
    return CheckpointPlan(model, config, specs, makers)


def _sources(
    model: nn.Module, tensors_of: Callable[[Layer], Mapping[str, Source]]
) -> Iterator[tuple[str, Source]]:
    inner: set[str] = set()
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        if path in inner:
            continue
        if isinstance(module, RowEmbedding | RowHead):
            inner |= {f"{path}.base", f"{path}.trained"}
            weight: Any = module.base.weight
            yield f"{dot}weight", replace(held(weight), make=partial(merged_rows, module))
        elif isinstance(module, AdaptedLinear | FrozenLinear):
            inner.add(f"{path}.base")
            for name, source in tensors_of(module).items():
                yield f"{dot}{name}", source
            if (bias := base_of(module).bias) is not None:
                yield f"{dot}bias", held(bias)
        else:
            own: dict[str, Tensor] = {}
            module._save_to_state_dict(own, dot, False)
            for name, tensor in own.items():
                yield name, held(tensor)


def made_together(
    names: Iterable[str], convert: Callable[[Any], dict[str, Tensor]], make: Callable[[], Any]
) -> dict[str, Callable[[], Tensor]]:
    """What returns each tensor of `convert(make())`: the writer asks for each once, one after the other.

    It is made when the first is written: by then, the tensors of a streamed block hold another block.
    """
    made: dict[str, Tensor] = {}

    def one(name: str) -> Tensor:
        if not made:
            made.update(convert(make()))
        return made.pop(name)

    return {name: partial(one, name) for name in names}


def packed_sources(
    base: FrozenLinear, make: Callable[[], PackedWeight], dtype: torch.dtype, double_quant: bool
) -> dict[str, Source]:
    """The tensors of bitsandbytes for a weight like that of `base`; without `double_quant` its scales are float32."""

    def state(packed: PackedWeight) -> dict[str, Tensor]:
        tensors, name = to_bnb_state(packed, dtype), f"{STATE_NAME}{packed.kind}"
        if name in tensors:
            missing = _STATE_BYTES - len(tensors[name])
            tensors[name] = nn.functional.pad(tensors[name], (0, missing), value=ord(" "))
        return tensors

    nested = double_quant and hasattr(base, "nested_code")
    layout = state(empty_packed(base.kind, (base.out_features, base.in_features), base.block_size, nested))
    makers = made_together(layout, state, make)
    return {name: Source(each.to("meta"), makers[name], dtype=each.dtype) for name, each in layout.items()}


def dense_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers that stay dense."""
    dense, inside = list[str](), "-"
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, AdaptedLinear | RowHead):
            inside = f"{path}."
        is_ours = isinstance(module, FrozenLinear | AdaptedLinear)
        if isinstance(module, nn.Linear | RowHead) or (is_ours and base_of(module).kind == "dense"):
            dense.append(path)
    return dense + linear_not_loaded(model)


def held(tensor: Tensor) -> Source:
    """The source of a tensor that is written as the model holds it."""
    tensor = tensor.detach()
    return Source(
        tensor.to("meta"), lambda: tensor, tensor, None if tensor.is_floating_point() else tensor.dtype
    )


def _plain_config(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedConfig:
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for part in [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        part.dtype = str(dtype).removeprefix("torch.")
    return config


def write_checkpoint(
    plan: CheckpointPlan,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint into an empty directory.

    Returns JSON values: `files`, `num_tensors`, `num_bytes`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = split_state_dict_into_shards_factory(
        dict(plan.specs),
        get_storage_size=lambda spec: spec.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    done, total_bytes = 0, shards.metadata["total_size"]
    check_room(directory, total_bytes)

    def tensors(specs: list[TensorSpec]) -> Iterator[Tensor]:
        nonlocal done
        for spec in specs:
            tensor = plan.makers[spec.name]()
            if tensor.is_floating_point():
                _check_range(spec, tensor)
            yield tensor.to(spec.dtype)
            del tensor
            done += spec.num_bytes
            if progress is not None:
                progress(done, total_bytes)

    for file, names in shards.filename_to_tensors.items():
        specs = [plan.specs[name] for name in names]
        write_safetensors(directory / file, specs, tensors(specs))
    if shards.is_sharded:
        num_parameters = sum(torch.Size(spec.shape).numel() for spec in plan.specs.values())
        metadata = {"total_parameters": num_parameters, "total_size": total_bytes}
        index = {"metadata": metadata, "weight_map": shards.tensor_to_filename}
        (directory / INDEX_FILE).write_bytes(json_bytes(index, indent=2))
    _write_config(plan, tokenizer, directory)
    for name, text in processor_files(plan.model).items():
        (directory / name).write_text(text, encoding="utf-8")
    files = tuple(shards.filename_to_tensors)
    return {"files": files, "num_tensors": len(plan.specs), "num_bytes": total_bytes}


def check_room(directory: Path, num_bytes: int) -> None:
    """Refuse a checkpoint that is larger than the free space of its disk."""
    if 0 < (free := shutil.disk_usage(directory).free) < num_bytes:  # some network disks say 0
        text = f"writing the checkpoint needs {size_text(num_bytes)}, and its disk has {size_text(free)} free"
        raise UserError(f"{text}. Fix: name a directory on another one.")


def _check_range(spec: TensorSpec, tensor: Tensor) -> None:
    """Refuse what the dtype of `spec` cannot hold."""
    largest = max(abs(float(end)) for end in tensor.aminmax()) if tensor.numel() else 0.0  # NaN if any value is
    if not largest < torch.inf:
        num_bad = tensor.numel() - int(tensor.isfinite().sum())
        raise RunFailure(f"{spec.name}: {num_bad} of {tensor.numel()} values are NaN or infinite.")
    if largest > (limit := torch.finfo(spec.dtype).max):
        over = f"{spec.name}: largest |w| is {largest:.6g}, must be at most {limit:.6g} in {spec.dtype}"
        raise UserError(f"{over}. Fix: export in bfloat16 or float32.")


def _write_config(plan: CheckpointPlan, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    if has_own_code(plan.model):
        custom_object_save(plan.model, str(directory), config=plan.config)
    config = json.loads(plan.config.to_json_string())
    for part in (config, config.get("text_config") or {}):
        theta = (part.get("rope_parameters") or {}).get("rope_theta")
        if theta is not None:  # where readers older than transformers 5 look
            part.setdefault("rope_theta", theta)
    (directory / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    if plan.model.can_generate() and plan.model.generation_config is not None:
        generation = copy.deepcopy(plan.model.generation_config)
        end = None if tokenizer is None else tokenizer.eos_token_id
        named = generation.eos_token_id
        ids = named if isinstance(named, list) else [] if named is None else [named]
        # A run also stops at its tokenizer's end, which may be of another model
        if end is not None and end not in ids:
            generation.eos_token_id = [*ids, end] if ids else end
        # Not save_pretrained: it refuses settings that publishers' own files have (a temperature without sampling).
        generation.to_json_file(directory / "generation_config.json")
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer. For Gemma and Phi-3, llama.cpp's converter needs the model of sentencepiece and the tokens
    beyond it, which transformers 5 does not write."""
    tokenizer.save_pretrained(str(directory))
    pieces = Path(tokenizer.name_or_path) / "tokenizer.model"
    if pieces.is_file() and not (directory / pieces.name).exists():
        shutil.copyfile(pieces, directory / pieces.name)
        beyond = {token: id for token, id in tokenizer.get_added_vocab().items() if id >= tokenizer.vocab_size}
        (directory / "added_tokens.json").write_bytes(json_bytes(beyond, indent=2))


def has_own_code(loaded: PreTrainedModel | PreTrainedTokenizerBase) -> bool:
    """Whether the class is the publisher's (model.trust_remote_code). An export then has its files."""
    return loaded._auto_class is not None
