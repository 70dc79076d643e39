"""Plan and write a checkpoint directory: weights cast and written shard by shard, config, tokenizer and other files.

A plan has each tensor's published name, shape and dtype, and the function that makes it when the writer asks for it.
Every export that writes weights goes through `checkpoint_directory`. One tensor of the output is in memory at a time.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from qdora.adapter.experts import AdaptedExperts, FrozenExperts
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.adapter.rows import RowEmbedding, RowHead, merged_rows
from qdora.errors import RunFailure, UserError
from qdora.files.atomic import atomic_directory, disk_reason, json_bytes
from qdora.files.console import Progress
from qdora.files.tensor_file import TensorSpec, plan_shards, shard_index, torch_dtype, write_safetensors
from qdora.model.checkpoint import INDEX_FILE, Published, published_pieces, shorten, tied_weights
from qdora.model.experts import library_names, stacks
from qdora.model.load import dense_dtype
from qdora.model.multimodal import carried, processor_files

MAX_SHARD_BYTES = 5 * 2**30
UNFINISHED = ".unfinished"
"""End of the name of the hidden directory in which a command makes its export."""
_SLICE = 1 << 20  # elements cast at a time: they stay in a CPU's cache while they are checked, cast and written


@dataclass(frozen=True)
class Planned:
    """A tensor of the output and the function that makes it, in float32 or in the dtype that it is stored in."""

    spec: TensorSpec
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class CheckpointPlan:
    """Everything that a checkpoint directory holds; `model` gives the generation config and may be on "meta".

    `files` are texts of further files by name: the settings of a multimodal model's processor.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    tensors: list[Planned]
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A tensor of the model before it has a name in the output: a meta tensor of its shape, and what returns it.

    `held` is the tensor itself if the model holds it dense: tied weights are recognised by it. `dtype` is that of the
    output if the format fixes it (packed weights, block scales), else that of the export. `rows` returns some rows of
    the tensor; a stack of experts has it, since checkpoints may hold the experts one by one.
    """

    shaped: Tensor
    make: Callable[[], Tensor]
    held: Tensor | None = None
    dtype: torch.dtype | None = None
    rows: Callable[[slice], Tensor] | None = None


WeightSources = Callable[[AdaptedLinear | FrozenLinear], Mapping[str, Source]]
"""Layer -> the tensors that stand for its weight, by their names in the layer: "weight", "weight.absmax", ..."""


def plan_export(model: PreTrainedModel, dtype: torch.dtype, weights: WeightSources | None = None) -> CheckpointPlan:
    """Plan the checkpoint of a model in memory; `weights` gives the tensors of a layer (default: one dense)."""
    return plan_sources(model, dict(_sources(model, weights or dense_weight_sources)), dtype)


def plan_sources(model: PreTrainedModel, sources: Mapping[str, Source], dtype: torch.dtype) -> CheckpointPlan:
    """Plan a checkpoint of tensors by their names in the model; the model gives names and config, and may be on "meta".

    Tensors are in the order of `sources`, under the names of the model's published checkpoints. Float tensors whose
    source does not fix a dtype get `dtype`, or float32 where training keeps that (`dense_dtype`). Parts of a multimodal
    model that are not loaded are copied from its source, with its names and dtypes. Tied weights are listed once if the
    config ties them. A head that got a weight of its own (it was quantised or adapted) is listed, and the config no
    longer ties it.
    """
    config = _plain_config(model, dtype)
    redundant = set()
    for target, origin in tied_weights(model).items():
        if target not in sources or origin not in sources:
            continue
        first, second = sources[target].held, sources[origin].held
        if first is not None and second is not None and _memory(first) == _memory(second):
            redundant.add(target)
        else:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    stacked = {f"{path}.weight": path for path in stacks(model)}
    single = {name: source.shaped for name, source in sources.items() if name not in redundant | stacked.keys()}
    names = _checkpoint_names(model, single)
    planned: list[Planned] = []
    for name, source in sources.items():
        if name in stacked:
            planned += _stack_tensors(model, stacked[name], source, dtype)
        if name not in names:
            continue
        stored_name = names[name]
        kept = source.shaped.dtype if not source.shaped.is_floating_point() else source.dtype
        kept = kept or dense_dtype(model, name, dtype)
        planned.append(Planned(TensorSpec(stored_name, kept, tuple(source.shaped.shape)), source.make))
    for key, item in carried(model).items():
        spec = TensorSpec(key, torch_dtype(item.dtype), item.shape)
        planned.append(Planned(spec, item.read))
    return CheckpointPlan(model, config, planned, processor_files(model))


def _sources(model: nn.Module, weights: WeightSources) -> Iterator[tuple[str, Source]]:
    adapted: set[str] = set()
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        if path in adapted:
            continue
        if isinstance(module, RowEmbedding | RowHead):
            adapted |= {f"{path}.base", f"{path}.trained"}
            weight: Any = module.base.weight
            yield f"{dot}weight", Source(weight.detach().to("meta"), partial(merged_rows, module), weight.detach())
            continue
        if isinstance(module, AdaptedLinear):
            adapted.add(f"{path}.base")
        elif not isinstance(module, FrozenLinear):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{dot}{name}", held(parameter.detach())
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield f"{dot}{name}", held(buffer)
            continue
        for name, source in weights(module).items():
            yield f"{dot}{name}", source
        bias = (module.base if isinstance(module, AdaptedLinear) else module).bias
        if bias is not None:
            yield f"{dot}bias", held(bias)


def dense_weight_sources(layer: AdaptedLinear | FrozenLinear) -> dict[str, Source]:
    """One dense weight: merged, dequantised, or as the layer holds it."""
    if isinstance(layer, FrozenExperts | AdaptedExperts):
        wide = (layer.base if isinstance(layer, AdaptedExperts) else layer).wide_dtype
        rows = layer.merged_rows if isinstance(layer, AdaptedExperts) else layer.dequantized_rows
        every = slice(0, layer.out_features)
        shape = torch.empty(layer.out_features, layer.in_features, dtype=torch.float32, device="meta")
        return {"weight": Source(shape, lambda: rows(every, wide), rows=lambda some: rows(some, wide))}
    if isinstance(layer, FrozenLinear) and isinstance(layer.stored_weight, Tensor):
        return {"weight": held(layer.stored_weight)}
    shaped = torch.empty(layer.out_features, layer.in_features, dtype=torch.float32, device="meta")
    if isinstance(layer, AdaptedLinear):
        return {"weight": Source(shaped, lambda: layer.merged_weight(layer.base.wide_dtype))}
    return {"weight": Source(shaped, lambda: layer.dequantized(layer.wide_dtype))}


def held(tensor: Tensor) -> Source:
    """The source of a tensor that is written as the model holds it."""
    return Source(tensor.to("meta"), lambda: tensor, tensor)


def _stack_tensors(model: PreTrainedModel, path: str, source: Source, dtype: torch.dtype) -> Iterator[Planned]:
    """The tensors that hold a stack of experts in published checkpoints."""

    def rows(some: slice) -> Tensor:
        return source.make()[some] if source.rows is None else source.rows(some)

    for key, piece in published_pieces(model, path).items():

        def make(piece: Published = piece) -> Tensor:
            found = rows(piece.rows)
            if piece.transposed:
                experts, columns, size = piece.shape
                return found.view(experts, size, columns).mT
            return found.view(piece.shape)

        yield Planned(TensorSpec(key, dtype, piece.shape), make)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _checkpoint_names(model: PreTrainedModel, shaped: dict[str, Tensor]) -> dict[str, str]:
    """Module name -> name in the model's published checkpoints; transformers renames some tensors on loading.

    If the published form stacks or splits tensors, the module's names stay: transformers reads those, too.
    """
    by_identity = {id(tensor): name for name, tensor in shaped.items()}
    theirs = library_names(model)
    named = {theirs.get(name, name): tensor for name, tensor in shaped.items()}
    stored = {id(tensor): name for name, tensor in revert_weight_conversion(model, named).items()}
    if stored.keys() != by_identity.keys():
        return {name: name for name in shaped}
    return {name: stored[id(tensor)] for name, tensor in shaped.items()}


def _plain_config(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedConfig:
    """The config of a dense model in `dtype`: without quantisation, with the name of the architecture."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for part in [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        part.dtype = str(dtype).removeprefix("torch.")
    return config


class WriteOptions(TypedDict, total=False):
    """Options of `checkpoint_directory` that every export takes."""

    max_shard_bytes: int
    progress: Progress | None
    extra_files: Mapping[str, str] | None


def check_new_directory(out_dir: Path) -> None:
    """Raise UserError unless `out_dir` is empty or does not exist, and is no mount point nor the working directory."""
    if out_dir.is_symlink() or (out_dir.exists() and not out_dir.is_dir()):
        raise UserError(f"{out_dir}: exists and is not a directory; must be a new or empty directory.")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise UserError(
            f"{out_dir}: is not empty; must be a new or empty directory. Fix: delete it, or name another directory."
        )
    if os.path.ismount(out_dir):  # it cannot be replaced
        raise UserError(f"{out_dir}: is a mount point. Fix: name a directory inside it.")
    if out_dir.is_dir() and os.path.samefile(out_dir, os.curdir):  # whoever stands in it would not see the new one
        raise UserError(f"{out_dir}: is the working directory. Fix: name a directory inside it.")


@contextmanager
def checkpoint_directory(
    plan: CheckpointPlan,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write a checkpoint; the block gets the unfinished directory, and may add files to it, and what was written.

    The directory is `.<name>.partial` beside `out_dir` until the block ends, then it is renamed to `out_dir`. A failure
    leaves nothing. What was written are JSON values: `files`, `num_tensors`, `num_bytes`, `max_abs`, the largest |w|,
    in the tensor `max_abs_tensor`, and `num_underflowed`, the weights that became zero in the output's dtype only.

    Args:
        tokenizer: Written beside the weights with its chat template, or None.
        out_dir: New or empty directory.
        max_shard_bytes: Size of a weights file. A larger tensor gets a file of its own.
        progress: Called after each tensor with the bytes written and all bytes.
        extra_files: Name -> text of further files (a model card).
    Raises:
        UserError: `out_dir` is not new or empty, or a weight is outside the range of its dtype (the message names it).
        RunFailure: A weight is NaN or infinite, or the disk is full.
    """
    check_new_directory(out_dir)
    try:
        with atomic_directory(out_dir) as partial:
            _check_space(out_dir, partial, plan.tensors)
            written = _write_weights(partial, plan.tensors, max_shard_bytes, progress)
            _write_rest(partial, plan, tokenizer, extra_files or {})
            yield partial, written
    except OSError as error:
        place = _place_of(out_dir)
        raise RunFailure(f"{place}: cannot be written: {disk_reason(error)}. Nothing is left there.") from error


def _check_space(out_dir: Path, partial: Path, planned: Sequence[Planned]) -> None:
    """Raise RunFailure unless there is room for all tensors."""
    num_bytes = sum(item.spec.num_bytes for item in planned)
    free = shutil.disk_usage(partial).free
    if free < num_bytes:
        room = f"{num_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on this disk"
        fix = "Fix: free space, or name a directory on another disk."
        raise RunFailure(f"{_place_of(out_dir)}: needs {room}. {fix}")


def _place_of(out_dir: Path) -> Path:
    """The directory that the user named: a command makes its export in a hidden one, `.<name>.unfinished`, first."""
    hidden = out_dir.parent
    is_hidden = hidden.name.startswith(".") and hidden.name.endswith(UNFINISHED)
    return hidden.with_name(hidden.name[1 : -len(UNFINISHED)]) if is_hidden else out_dir


def _write_weights(
    partial: Path, planned: Sequence[Planned], max_shard_bytes: int, progress: Progress | None
) -> dict[str, Any]:
    """Write the shards and their index."""
    shards = plan_shards([item.spec for item in planned], max_shard_bytes)
    total_bytes = sum(item.spec.num_bytes for item in planned)
    makers = {item.spec.name: item.make for item in planned}
    done, seen = 0, ValueSummary()

    def count(spec: TensorSpec) -> None:
        nonlocal done
        done += spec.num_bytes
        if progress is not None:
            progress(done, total_bytes)

    def values(specs: Sequence[TensorSpec]) -> Iterator[Iterator[Tensor]]:
        for spec in specs:
            yield cast_parts(spec, makers[spec.name](), seen)
            count(spec)

    for file, specs in shards.items():
        names = {spec.name for spec in specs}
        # In the order of the plan: tensors that are made together are next to each other there.
        order = [item.spec for item in planned if item.spec.name in names]
        write_safetensors(partial / file, specs, values(order), order=order)
    seen.raise_faults()
    if len(shards) > 1:
        (partial / INDEX_FILE).write_bytes(json_bytes(shard_index(shards), indent=2))
    return {
        "files": tuple(shards),
        "num_tensors": len(planned),
        "num_bytes": total_bytes,
        "max_abs": seen.max_abs,
        "max_abs_tensor": seen.max_abs_tensor,
        "num_underflowed": seen.num_underflowed,
    }


@dataclass
class ValueSummary:
    """Range and faults of written values. All tensors are checked after a first fault, so one run names all faults."""

    max_abs: float = 0.0
    max_abs_tensor: str = ""
    num_underflowed: int = 0
    too_large: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)

    def add(self, other: ValueSummary) -> None:
        """Include the values of another summary."""
        if other.max_abs > self.max_abs:
            self.max_abs, self.max_abs_tensor = other.max_abs, other.max_abs_tensor
        self.num_underflowed += other.num_underflowed
        self.too_large += other.too_large
        self.not_finite += other.not_finite

    def raise_faults(self) -> None:
        """Raise the faults; those of NaN first, which no other dtype would fix."""
        if self.not_finite:
            faults = " ".join(shorten(self.not_finite))
            raise RunFailure(f"The merged model is broken, nothing was written. {faults}")
        if self.too_large:
            raise UserError(*shorten(self.too_large))


def cast_parts(spec: TensorSpec, tensor: Tensor, seen: ValueSummary) -> Iterator[Tensor]:
    """Yield flat parts of `tensor` in the dtype of `spec`, on the CPU (an integer tensor as one part). Fill `seen`."""
    if not tensor.is_floating_point():
        yield tensor.cpu().reshape(-1)
        return
    flat = tensor.detach().reshape(-1)
    largest, num_bad, num_underflowed = 0.0, 0, 0
    for start in range(0, flat.numel(), _SLICE):
        part = flat[start : start + _SLICE]
        bad, part_largest = _extent(part)
        num_bad += bad
        largest = max(largest, part_largest)
        cast = part.to(spec.dtype)
        if cast.dtype != part.dtype:
            num_underflowed += int(part.count_nonzero()) - int(cast.count_nonzero())
        del part
        yield cast.cpu()
        del cast
    found = ValueSummary(largest, spec.name, num_underflowed)
    limit = torch.finfo(spec.dtype).max
    if num_bad:
        found.not_finite.append(f"{spec.name}: {num_bad} of {flat.numel()} values are NaN or infinite.")
    elif largest > limit:
        found.too_large.append(
            f"{spec.name}: largest |w| is {largest:.6g}, must be at most {limit:.6g} in "
            f"{str(spec.dtype).removeprefix('torch.')}. Fix: export in bfloat16 or float32."
        )
    seen.add(found)


def _extent(part: Tensor) -> tuple[int, float]:
    """Number of values that are NaN or infinite, and the largest |value| of the others."""
    low, high = (float(end) for end in part.aminmax())  # NaN if any value is NaN: one pass, without a mask
    if math.isfinite(low) and math.isfinite(high):
        return 0, max(-low, high)
    finite = part.isfinite()
    return part.numel() - int(finite.sum()), float(torch.where(finite, part, 0).abs().max())


def _write_rest(
    partial: Path, plan: CheckpointPlan, tokenizer: PreTrainedTokenizerBase | None, extra_files: Mapping[str, str]
) -> None:
    if has_own_code(plan.model):
        custom_object_save(plan.model, str(partial), config=plan.config)
    config = json.loads(plan.config.to_json_string())
    for part in (config, config.get("text_config") or {}):
        theta = (part.get("rope_parameters") or {}).get("rope_theta")
        if theta is not None:  # readers older than transformers 5 look for it beside rope_parameters
            part.setdefault("rope_theta", theta)
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if plan.model.can_generate() and plan.model.generation_config is not None:
        generation = copy.deepcopy(plan.model.generation_config)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            generation.eos_token_id = _with_end(generation.eos_token_id, int(tokenizer.eos_token_id))
        # Not save_pretrained: it refuses settings that publishers' own files have (a temperature without sampling).
        generation.to_json_file(partial / "generation_config.json")
    if tokenizer is not None:
        save_tokenizer(tokenizer, partial)
    for name, text in {**plan.files, **extra_files}.items():
        if Path(name).name != name:
            raise ValueError(f"extra file {name!r}: must be a plain file name.")
        (partial / name).write_text(text, encoding="utf-8")


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


def _with_end(named: int | list[int] | None, end: int) -> int | list[int]:
    """Ids that stop the model, with the tokenizer's end, which a run stops at, too: it may be of another tokenizer."""
    if named is None:
        return end
    ids = named if isinstance(named, list) else [named]
    return named if end in ids else [*ids, end]
