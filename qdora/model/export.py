"""The merged model: base and adapter in one dense weight per layer, written tensor by tensor.

The merge is exact: the base is dequantised in float32, the adapter applied in float32, the result cast once. Only one
tensor of the output is in memory at a time.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.atomic_files import atomic_directory
from qdora.errors import RunFailure
from qdora.model.export_directory import (
    MAX_SHARD_BYTES,
    Progress,
    check_space,
    check_target,
    write_rest,
    write_weights,
)
from qdora.model.export_plan import plan_export
from qdora.model.inject import adapted_layers


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


def export_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: Path,
    *,
    dtype: torch.dtype = torch.float16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
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
    check_target(out_dir, dtype, max_shard_bytes)
    planned, config = plan_export(model, dtype)
    check_space(out_dir, planned)
    try:
        with atomic_directory(out_dir) as partial:
            written = write_weights(partial, planned, max_shard_bytes, progress)
            write_rest(partial, model, config, tokenizer, extra_files or {})
    except OSError as error:
        raise RunFailure(f"{out_dir}: cannot be written: {error}. Nothing is left there.") from error
    return ExportResult(
        directory=str(out_dir),
        dtype=str(dtype).removeprefix("torch."),
        num_merged_layers=len(adapted_layers(model)),
        num_parameters=sum(torch.Size(item.spec.shape).numel() for item in planned),
        seconds=time.perf_counter() - start,
        **asdict(written),
    )
