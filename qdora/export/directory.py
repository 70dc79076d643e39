"""An exported checkpoint directory: weights cast and written shard by shard, config, tokenizer and further files."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.errors import RunFailure, UserError
from qdora.export.tensor_plan import Planned
from qdora.files.atomic import PARTIAL, atomic_write_json, json_text
from qdora.files.tensor_file import TensorSpec, plan_shards, shard_index, write_safetensors
from qdora.model.stored_tensors import INDEX_FILE

DONE_FILE = ".done.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_SHARD_BYTES = 5 * 2**30
_SLICE = 1 << 20  # elements cast at a time: they stay in a CPU's cache while they are looked at, cast and written
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
    partial: Path,
    planned: Sequence[Planned],
    max_shard_bytes: int,
    progress: Progress | None = None,
    *,
    resumable: bool = False,
) -> WrittenWeights:
    """Write the shards and their index; one tensor of the output is in memory at a time.

    Args:
        partial: Directory that is being filled. Where `resumable`, shards that `DONE_FILE` in it names are kept.
        planned: The tensors.
        max_shard_bytes: Size of a file; a single larger tensor gets a file of its own.
        progress: Called after each tensor with (bytes done, bytes in all).
        resumable: Note each whole shard in `DONE_FILE`.
    Raises:
        UserError: A weight outside the range of its dtype (named, with the largest value).
        RunFailure: A weight that is NaN or infinite.
        OSError: The disk is full.
    """
    shards = plan_shards([item.spec for item in planned], max_shard_bytes)
    total = sum(item.spec.num_bytes for item in planned)
    makers = {item.spec.name: item.make for item in planned}
    caster = Caster()
    whole = _whole_shards(partial) if resumable else {}
    done = 0

    def count(spec: TensorSpec) -> None:
        nonlocal done
        done += spec.num_bytes
        if progress is not None:
            progress(done, total)

    def values(specs: Sequence[TensorSpec]) -> Iterator[Iterator[Tensor]]:
        for spec in specs:
            yield caster.parts(spec, makers[spec.name]())
            count(spec)

    for file, specs in shards.items():
        names = {spec.name for spec in specs}
        if file in whole:
            caster.add(whole[file])
            for spec in specs:
                count(spec)
            continue
        caster.begin_shard()
        # In the order of the plan, in which tensors that are made together stand together.
        order = [item.spec for item in planned if item.spec.name in names]
        aside = partial / f".{file}{PARTIAL}"
        aside.unlink(missing_ok=True)
        write_safetensors(aside, specs, values(order), order=order)
        os.replace(aside, partial / file)
        whole[file] = caster.shard
        if resumable:
            atomic_write_json(partial / DONE_FILE, {name: asdict(found) for name, found in whole.items()})
    caster.raise_faults()
    if len(shards) > 1:
        (partial / INDEX_FILE).write_text(json_text(shard_index(shards), indent=2) + "\n", encoding="utf-8")
    (partial / DONE_FILE).unlink(missing_ok=True)
    found = caster.total
    return WrittenWeights(
        tuple(shards), len(planned), total, found.max_abs, found.max_abs_tensor, found.num_underflowed
    )


def _whole_shards(partial: Path) -> dict[str, Seen]:
    """The shards that an interrupted export finished, and what was seen in them."""
    file = partial / DONE_FILE
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {name: Seen(**seen) for name, seen in found.items() if (partial / name).is_file()}


@dataclass
class Seen:
    """What was seen in the values of a shard."""

    max_abs: float = 0.0
    max_abs_tensor: str = ""
    num_underflowed: int = 0
    too_large: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


class Caster:
    """Casts to the output's dtype, and remembers what did not fit.

    After the first fault values are still checked, so that one run names all of them.
    """

    def __init__(self) -> None:
        self.total = Seen()
        self.shard = Seen()

    def begin_shard(self) -> None:
        """From here on values belong to a new shard."""
        self.shard = Seen()

    def parts(self, spec: TensorSpec, tensor: Tensor) -> Iterator[Tensor]:
        """The flat parts of `tensor`, in the dtype of `spec`, on the CPU; an integer tensor in one, as it is."""
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
        seen = Seen(largest, spec.name, num_underflowed)
        limit = torch.finfo(spec.dtype).max
        if num_bad:
            seen.not_finite.append(f"{spec.name}: {num_bad} of {flat.numel()} values are NaN or infinite.")
        elif largest > limit:
            seen.too_large.append(
                f"{spec.name}: largest |w| is {largest:.6g}, allowed in {str(spec.dtype).removeprefix('torch.')}: at "
                f"most {limit:.6g}. Export in bfloat16 or float32."
            )
        _add(self.shard, seen)
        _add(self.total, seen)

    def add(self, seen: Seen) -> None:
        """Count a shard that was written before."""
        _add(self.total, seen)

    def raise_faults(self) -> None:
        """Raise what was remembered; NaN first, which no other dtype would cure."""
        if self.total.not_finite:
            faults = " ".join(_few(self.total.not_finite))
            raise RunFailure(f"The merged model is broken, nothing was written. {faults}")
        if self.total.too_large:
            raise UserError(*_few(self.total.too_large))


def _extent(part: Tensor) -> tuple[int, float]:
    """How many values are NaN or infinite, and the largest |value| of the others."""
    low, high = (float(end) for end in part.aminmax())  # NaN where one is: one pass, without a mask
    if math.isfinite(low) and math.isfinite(high):
        return 0, max(-low, high)
    finite = part.isfinite()
    return part.numel() - int(finite.sum()), float(torch.where(finite, part, 0).abs().max())


def _add(total: Seen, seen: Seen) -> None:
    if seen.max_abs > total.max_abs:
        total.max_abs, total.max_abs_tensor = seen.max_abs, seen.max_abs_tensor
    total.num_underflowed += seen.num_underflowed
    total.too_large += seen.too_large
    total.not_finite += seen.not_finite


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
