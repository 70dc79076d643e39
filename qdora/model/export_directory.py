"""An exported checkpoint directory: weights cast and written shard by shard, config, tokenizer and further files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.atomic_files import json_text
from qdora.errors import RunFailure, UserError
from qdora.model.export_plan import Planned
from qdora.model.safetensors_writer import TensorSpec, plan_shards, shard_index, write_safetensors

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_SHARD_BYTES = 5 * 2**30
_SLICE = 1 << 24  # elements cast at a time: bounds the float32 copy of an embedding to 64 MiB
_FAULTS_SHOWN = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WrittenWeights:
    """What `write_weights` wrote. `max_abs` is the largest |w|, in `max_abs_tensor`; `num_underflowed` counts weights
    that were not zero and became zero in the output's dtype."""

    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    max_abs: float
    max_abs_tensor: str
    num_underflowed: int


def check_target(out_dir: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Refuse a directory that is taken, and settings that no export has.

    Raises:
        UserError: Saying which.
    """
    if dtype not in DTYPES.values():
        raise UserError(f"export dtype: is {dtype}, allowed: {', '.join(DTYPES)}.")
    if max_shard_bytes < 1:
        raise UserError(f"export max_shard_bytes: is {max_shard_bytes}, allowed: at least 1.")
    if out_dir.is_symlink() or (out_dir.exists() and not out_dir.is_dir()):
        raise UserError(f"{out_dir}: exists and is not a directory; allowed: a new or empty directory.")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir}: is not empty; allowed: a new or empty directory.")


def check_space(out_dir: Path, planned: Sequence[Planned]) -> None:
    """Raise RunFailure where the disk cannot take the tensors."""
    num_bytes = sum(item.spec.num_bytes for item in planned)
    existing = next(parent for parent in out_dir.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise RunFailure(
            f"{out_dir}: the exported model needs {num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free."
        )


def write_weights(
    partial: Path, planned: Sequence[Planned], max_shard_bytes: int, progress: Progress | None = None
) -> WrittenWeights:
    """Write the shards and their index; one tensor of the output is in memory at a time.

    Args:
        partial: Directory that is being filled.
        planned: The tensors.
        max_shard_bytes: Size of a file; a single larger tensor gets a file of its own.
        progress: Called after each tensor with (bytes done, bytes in all).
    Raises:
        UserError: A weight outside the range of its dtype (named, with the largest value).
        RunFailure: A weight that is NaN or infinite.
        OSError: The disk is full.
    """
    shards = plan_shards([item.spec for item in planned], max_shard_bytes)
    total = sum(item.spec.num_bytes for item in planned)
    makers = {item.spec.name: item.make for item in planned}
    caster = Caster()
    done = 0

    def values(specs: list[TensorSpec]) -> Iterator[Tensor]:
        nonlocal done
        for spec in specs:
            tensor = caster.cast(spec, makers[spec.name]())
            yield tensor
            # Dropped before the next is made, or two would be in memory.
            del tensor
            done += spec.num_bytes
            if progress is not None:
                progress(done, total)

    for file, specs in shards.items():
        write_safetensors(partial / file, specs, values(specs))
    caster.raise_faults()
    if len(shards) > 1:
        (partial / INDEX_FILE).write_text(json_text(shard_index(shards), indent=2) + "\n", encoding="utf-8")
    return WrittenWeights(
        tuple(shards), len(planned), total, caster.max_abs, caster.max_abs_tensor, caster.num_underflowed
    )


class Caster:
    """Casts to the output's dtype, and remembers what did not fit.

    After the first fault values are still checked, so that one run names all of them.
    """

    def __init__(self) -> None:
        self.max_abs = 0.0
        self.max_abs_tensor = ""
        self.num_underflowed = 0
        self.too_large: list[str] = []
        self.not_finite: list[str] = []

    def cast(self, spec: TensorSpec, tensor: Tensor) -> Tensor:
        """`tensor` in the dtype of `spec` on the CPU; integer tensors as they are."""
        if not tensor.is_floating_point():
            return tensor.cpu()
        flat = tensor.detach().reshape(-1)
        out = torch.empty(flat.shape, dtype=spec.dtype)
        largest, num_bad = 0.0, 0
        for start in range(0, flat.numel(), _SLICE):
            part = flat[start : start + _SLICE]
            finite = torch.isfinite(part)
            num_bad += part.numel() - int(finite.sum())
            largest = max(largest, float(torch.where(finite, part, 0).abs().max()))
            cast = part.to(spec.dtype)
            self.num_underflowed += int(((cast == 0) & (part != 0)).sum())
            out[start : start + _SLICE] = cast
        if largest > self.max_abs:
            self.max_abs, self.max_abs_tensor = largest, spec.name
        limit = torch.finfo(spec.dtype).max
        if num_bad:
            self.not_finite.append(f"{spec.name}: {num_bad} of {flat.numel()} values are NaN or infinite.")
        elif largest > limit:
            self.too_large.append(
                f"{spec.name}: largest |w| is {largest:.6g}, allowed in {str(spec.dtype).removeprefix('torch.')}: at "
                f"most {limit:.6g}. Export in bfloat16 or float32."
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


def write_rest(
    partial: Path,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    extra_files: Mapping[str, str],
) -> None:
    """Config, generation config, tokenizer with its chat template, and further text files (name -> text)."""
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
