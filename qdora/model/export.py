"""The merged model: base and adapter in one dense weight per layer, written tensor by tensor.

The merge is exact: the base is dequantised in float32, the adapter applied in float32, the result cast once. Only one
tensor of the output is in memory at a time.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from qdora.atomic_files import atomic_directory, json_text
from qdora.errors import RunFailure, UserError
from qdora.model.safetensors_writer import TensorSpec, plan_shards, shard_index, write_safetensors
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SLICE = 1 << 24  # elements cast at a time: bounds the float32 copy of an embedding to 64 MiB
_FAULTS_SHOWN = 8


@dataclass(frozen=True)
class ExportResult:
    """What was written. `max_abs` is the largest |w| of the output, in `max_abs_tensor`; `num_underflowed` counts
    weights that were not zero and became zero in the output's dtype."""

    directory: str
    dtype: str
    files: tuple[str, ...]
    num_tensors: int
    num_merged_layers: int
    num_parameters: int
    num_bytes: int
    max_abs: float
    max_abs_tensor: str
    num_underflowed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For export.json."""
        return asdict(self)


@dataclass(frozen=True)
class _Planned:
    """A tensor of the output and how to get it, in float32 or in the dtype it is held in."""

    spec: TensorSpec
    make: Callable[[], Tensor]


def export_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: Path,
    *,
    dtype: torch.dtype = torch.float16,
    max_shard_bytes: int = 5 * 2**30,
    progress: Callable[[int, int], None] | None = None,
    extra_files: dict[str, str] | None = None,
) -> ExportResult:
    """Write `model` with its adapters merged as a plain transformers checkpoint.

    The directory gets its name when all of it is on disk; until then it is `.<name>.partial` beside it. Every value is
    checked against the range of `dtype` before it is written.

    Args:
        model: With adapted layers, or without (then the dequantised base is written). Not changed.
        tokenizer: Written beside the weights with its chat template, or None.
        out_dir: New or empty directory.
        dtype: float16, bfloat16 or float32, for all float tensors.
        max_shard_bytes: Size of a file; a single larger tensor gets a file of its own.
        progress: Called after each tensor with (bytes done, bytes in all).
        extra_files: Name -> text of further files (a model card).
    Raises:
        UserError: `out_dir` is taken, or a weight is outside the range of `dtype` (named, with the largest value).
        RunFailure: A weight that is NaN or infinite, or a disk that is full; nothing is left at `out_dir`.
    """
    start = time.perf_counter()
    if dtype not in DTYPES.values():
        raise UserError(f"export dtype: is {dtype}, allowed: {', '.join(DTYPES)}.")
    if max_shard_bytes < 1:
        raise UserError(f"export max_shard_bytes: is {max_shard_bytes}, allowed: at least 1.")
    _check_target(out_dir)
    planned, config = plan_export(model, dtype)
    shards = plan_shards([item.spec for item in planned], max_shard_bytes)
    total = sum(item.spec.num_bytes for item in planned)
    _check_space(out_dir, total)
    caster = _Caster(dtype)
    sources = {item.spec.name: item.make for item in planned}
    try:
        with atomic_directory(out_dir) as partial:
            done = 0

            def values(specs: list[TensorSpec]) -> Iterator[Tensor]:
                nonlocal done
                for spec in specs:
                    tensor = caster.cast(spec.name, sources[spec.name]())
                    yield tensor
                    # Dropped before the next is made, or two would be in memory.
                    del tensor
                    done += spec.num_bytes
                    if progress is not None:
                        progress(done, total)

            for file, specs in shards.items():
                write_safetensors(partial / file, specs, values(specs))
            caster.raise_faults()
            _write_rest(partial, model, config, tokenizer, shards, extra_files or {})
    except OSError as error:
        raise RunFailure(f"{out_dir}: cannot be written: {error}. Nothing is left there.") from error
    merged = sum(isinstance(module, AdaptedLinear) for module in model.modules())
    return ExportResult(
        directory=str(out_dir),
        dtype=str(dtype).removeprefix("torch."),
        files=tuple(shards),
        num_tensors=len(planned),
        num_merged_layers=merged,
        num_parameters=sum(torch.Size(item.spec.shape).numel() for item in planned),
        num_bytes=total,
        max_abs=caster.max_abs,
        max_abs_tensor=caster.max_abs_tensor,
        num_underflowed=caster.num_underflowed,
        seconds=time.perf_counter() - start,
    )


def _check_target(out_dir: Path) -> None:
    if out_dir.is_symlink() or (out_dir.exists() and not out_dir.is_dir()):
        raise UserError(f"{out_dir}: exists and is not a directory; allowed: a new or empty directory.")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir}: is not empty; allowed: a new or empty directory.")


def _check_space(out_dir: Path, num_bytes: int) -> None:
    existing = next(parent for parent in out_dir.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise RunFailure(
            f"{out_dir}: the merged model needs {num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free."
        )


def plan_export(model: PreTrainedModel, dtype: torch.dtype) -> tuple[list[_Planned], PreTrainedConfig]:
    """All tensors of the output in model order under the names of the model's checkpoints, and its config.

    Tied weights are listed once where the config ties them; a head that got a weight of its own (it was quantised or
    adapted) is listed, and the config no longer ties it.
    """
    config = _plain_config(model, dtype)
    sources = dict(_sources(model))
    redundant = set()
    for target, origin in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        first, second = sources.get(target), sources.get(origin)
        if first is None or second is None:
            continue
        if first[1] is not None and second[1] is not None and _same_memory(first[1], second[1]):
            redundant.add(target)
        else:
            config.tie_word_embeddings = False
    names = _checkpoint_names(model, {name: source[0] for name, source in sources.items() if name not in redundant})
    planned = []
    for name, stored_name in names.items():
        shaped, _, make = sources[name]
        floating = shaped.is_floating_point()
        spec = TensorSpec(stored_name, dtype if floating else shaped.dtype, tuple(shaped.shape))
        planned.append(_Planned(spec, make))
    return planned, config


# A meta tensor of the right shape; the tensor itself where it is held dense; how to make it where it is not.
_Source = tuple[Tensor, Tensor | None, Callable[[], Tensor]]


def _sources(model: nn.Module) -> Iterator[tuple[str, _Source]]:
    adapted: set[str] = set()
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        if isinstance(module, AdaptedLinear):
            adapted.add(f"{path}.base")
            yield f"{dot}weight", (_meta(module.out_features, module.in_features), None, _merge(module))
            if module.base.bias is not None:
                yield f"{dot}bias", _held(module.base.bias)
        elif isinstance(module, FrozenLinear) and path not in adapted:
            dense = module.stored_weight
            if isinstance(dense, Tensor):
                yield f"{dot}weight", _held(dense)
            else:
                yield f"{dot}weight", (_meta(module.out_features, module.in_features), None, _dequantise(module))
            if module.bias is not None:
                yield f"{dot}bias", _held(module.bias)
        elif not isinstance(module, FrozenLinear):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{dot}{name}", _held(parameter.detach())
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield f"{dot}{name}", _held(buffer)


def _meta(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.float32, device="meta")


def _held(tensor: Tensor) -> _Source:
    return tensor.to("meta"), tensor, lambda: tensor


def _merge(layer: AdaptedLinear) -> Callable[[], Tensor]:
    return lambda: layer.merged_weight(layer.base.wide_dtype)


def _dequantise(layer: FrozenLinear) -> Callable[[], Tensor]:
    return lambda: layer.dequantized(layer.wide_dtype)


def _same_memory(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()


def _checkpoint_names(model: PreTrainedModel, shaped: dict[str, Tensor]) -> dict[str, str]:
    """Module name -> name in the model's published checkpoints.

    transformers renames some tensors on loading; other programs expect the published names. Where the published
    form stacks or splits tensors, the module's own names stay: transformers reads those, too.
    """
    by_identity = {id(tensor): name for name, tensor in shaped.items()}
    stored = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(shaped)).items()}
    if stored.keys() != by_identity.keys():
        return {name: name for name in shaped}
    return {name: stored[id(tensor)] for name, tensor in shaped.items()}


def _plain_config(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedConfig:
    """The model's config as of a dense model in `dtype`: quantisation forgotten, architecture named."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for part in [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        part.dtype = str(dtype).removeprefix("torch.")
    return config


class _Caster:
    """Casts to the output's dtype, and remembers what did not fit.

    After the first fault values are still checked, so that one run names all of them.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.limit = torch.finfo(dtype).max
        self.max_abs = 0.0
        self.max_abs_tensor = ""
        self.num_underflowed = 0
        self.too_large: list[str] = []
        self.not_finite: list[str] = []

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` in the output's dtype on the CPU; integer tensors as they are."""
        if not tensor.is_floating_point():
            return tensor.cpu()
        flat = tensor.detach().reshape(-1)
        out = torch.empty(flat.shape, dtype=self.dtype)
        largest, num_bad = 0.0, 0
        for start in range(0, flat.numel(), _SLICE):
            part = flat[start : start + _SLICE]
            finite = torch.isfinite(part)
            num_bad += part.numel() - int(finite.sum())
            largest = max(largest, float(torch.where(finite, part, 0).abs().max()))
            cast = part.to(self.dtype)
            self.num_underflowed += int(((cast == 0) & (part != 0)).sum())
            out[start : start + _SLICE] = cast
        if largest > self.max_abs:
            self.max_abs, self.max_abs_tensor = largest, name
        if num_bad:
            self.not_finite.append(f"{name}: {num_bad} of {flat.numel()} values are NaN or infinite.")
        elif largest > self.limit:
            self.too_large.append(
                f"{name}: largest |w| is {largest:.6g}, allowed in {str(self.dtype).removeprefix('torch.')}: at most "
                f"{self.limit:.6g}. Export in bfloat16 or float32."
            )
        return out.reshape(tensor.shape)

    def raise_faults(self) -> None:
        """Raise what was remembered; NaN first, which no other dtype would cure."""
        if self.not_finite:
            raise RunFailure("The merged model is broken, nothing was written. " + " ".join(_few(self.not_finite)))
        if self.too_large:
            raise UserError(*_few(self.too_large))


def _few(faults: list[str]) -> list[str]:
    more = len(faults) - _FAULTS_SHOWN
    return faults[:_FAULTS_SHOWN] + ([f"... and {more} more tensors like these."] if more > 0 else [])


def _write_rest(
    partial: Path,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    shards: dict[str, list[TensorSpec]],
    extra_files: dict[str, str],
) -> None:
    if len(shards) > 1:
        (partial / INDEX_FILE).write_text(json_text(shard_index(shards), indent=2) + "\n", encoding="utf-8")
    config.to_json_file(partial / "config.json")
    if model.can_generate() and model.generation_config is not None:
        # Not save_pretrained: it refuses settings that the publisher's own file has (a temperature without sampling).
        model.generation_config.to_json_file(partial / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(partial))
    for name, text in extra_files.items():
        if Path(name).name != name:
            raise ValueError(f"extra file {name!r}: allowed: a plain file name.")
        (partial / name).write_text(text, encoding="utf-8")
