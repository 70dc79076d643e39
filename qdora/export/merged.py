"""The merged model: base and adapter in one dense weight per layer, written tensor by tensor.

The merge is exact: the base is dequantised in float32, the adapter applied in float32, the result cast once. Only one
tensor of the output is in memory at a time.

The merged model without loading a model: each tensor is read, quantised as in training, merged, cast and written.

Memory is bounded by the largest weight and a few slices of it, whatever the size of the model. Besides the merge on the
dequantised base, which is the model that was trained, there are two others:

    original      m (W + s B A) / ||W + s B A|| on the source's own 16-bit weights W, the norm taken anew there: free of
                  the base's quantisation error, but not the model that the adapter was fitted to
    requantised   the merge in 4 bits again, as a bitsandbytes checkpoint: small, and rounded a second time

Base and adapter of a run as one dense checkpoint, streamed where no model has to be in memory for it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import qdora
from qdora.errors import RunFailure, UserError
from qdora.export.directory import MAX_SHARD_BYTES, Progress, check_space, check_target, write_rest, write_weights
from qdora.export.options import ExportOptions, MergeBase
from qdora.export.tensor_plan import Source, held, plan_export, plan_sources
from qdora.files.atomic import atomic_directory, json_text
from qdora.files.console import bar
from qdora.files.run_directory import RunDirectory, open_run
from qdora.model.adapter_file import StoredLayer, read_adapter
from qdora.model.bnb_checkpoint import quantization_config, stored_kind
from qdora.model.build_model import choose_compute, find_model
from qdora.model.inject import adapted_layers
from qdora.model.load import (
    Quantization,
    check_stored_packed,
    is_wide,
    layers_to_quantize,
    load_config,
    skeleton,
    stored_tensors,
    wide_names,
)
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import Stored, StoredPacked, tied_weights
from qdora.ops.bnb_state import to_bnb_state
from qdora.ops.codebooks import NESTED_BLOCK_SIZE
from qdora.ops.dora import merged_weight
from qdora.ops.packed import PackedWeight, dequantize, quantize
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe
from qdora.run.load_run import TrainedRun, load_run, trained_state
from qdora.run.model_card import card_files


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


FOUR_BIT_KINDS = ("nf4", "fp4")
_STATE_BYTES = 256
"""The JSON beside a packed weight, filled with blanks: its length must be known before the scales are."""


@dataclass(frozen=True)
class StreamedMerge:
    """What is merged, and how the base is to be read.

    Attributes:
        source: Of the base.
        adapter: Directory of the adapter, or None: the bare base.
        quant: How the base was held in training.
        compute_dtype: In which what is not quantised was held in training.
        base: On which weights the adapter is merged.
        requantize: Write the layers that were quantised as nf4 or fp4 again.
    """

    source: ModelSource
    adapter: Path | None
    quant: Quantization
    compute_dtype: torch.dtype
    base: MergeBase = "dequantized"
    requantize: bool = False


def export_streamed(
    merge: StreamedMerge,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: Path,
    *,
    dtype: torch.dtype = torch.float16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    extra_files: dict[str, str] | None = None,
) -> ExportResult:
    """Write the merged model; on the dequantised base the bytes are those of `export_merged` on the loaded model.

    An interrupted export leaves `.<name>.partial` beside `out_dir`; the same call goes on after its last whole shard,
    and the result is the same, byte for byte.

    Args:
        merge: What and how.
        tokenizer, out_dir, dtype, max_shard_bytes, progress, extra_files: As of `export_merged`.
    Raises:
        UserError, RunFailure: As of `export_merged`, and what `check_merge` refuses.
    """
    start = time.perf_counter()
    check_target(out_dir, dtype, max_shard_bytes)
    opened = open_merge(merge)
    planned, config = plan_sources(opened.model, opened.sources(), dtype)
    if merge.requantize:
        dense = [path for path in opened.linear if path not in opened.packed_paths]
        config.quantization_config = quantization_config(
            merge.quant.kind, double_quant=merge.quant.double_quant, dtype=dtype, dense=dense
        )
    check_space(out_dir, planned)
    specs = [(item.spec.name, str(item.spec.dtype), item.spec.shape) for item in planned]
    key = _resume_key(merge, [dtype, max_shard_bytes, *specs])
    try:
        with atomic_directory(out_dir, resume_key=key) as partial:
            written = write_weights(partial, planned, max_shard_bytes, progress, resumable=True)
            write_rest(partial, opened.model, config, tokenizer, extra_files or {})
    except OSError as error:
        raise RunFailure(f"{out_dir}: cannot be written: {error}. Nothing is left there.") from error
    return ExportResult(
        directory=str(out_dir),
        dtype=str(dtype).removeprefix("torch."),
        num_merged_layers=len(opened.adapter),
        num_parameters=opened.num_parameters(),
        seconds=time.perf_counter() - start,
        **asdict(written),
    )


def check_merge(merge: StreamedMerge) -> None:
    """Refuse what has no meaning for this base, before anything is read.

    Raises:
        UserError: `original` without full-precision weights to merge on, or re-quantisation to something else than nf4
            and fp4.
    """
    faults = []
    if merge.base == "original":
        if merge.quant.kind == "none":
            faults.append(
                "--base original: the base was not quantised in training, so that it is the original already."
            )
        elif merge.source.is_gguf:
            faults.append(
                f"--base original: {merge.source.name} is a GGUF file, not the 16-bit model it was made from; use "
                "--base dequantized."
            )
        else:
            kind = stored_kind(getattr(load_config(merge.source), "quantization_config", None))
            if kind is not None:
                faults.append(
                    f"--base original: {merge.source.name} is stored in {kind} and has no 16-bit weights; use --base "
                    "dequantized, or train on the model it was made from."
                )
    if merge.requantize and merge.quant.kind not in FOUR_BIT_KINDS:
        faults.append(
            f"--requantize: the base was held in {merge.quant.kind}, allowed: nf4 or fp4. Leave the option out."
        )
    if faults:
        raise UserError(*faults)


@dataclass(frozen=True)
class OpenedMerge:
    """A skeleton, where its tensors are stored, and what happens to each."""

    merge: StreamedMerge
    model: PreTrainedModel
    stored: Mapping[str, Stored]
    adapter: Mapping[str, StoredLayer]
    linear: Sequence[str]
    quantized: set[str]
    wide: Sequence[str]

    @property
    def packed_paths(self) -> set[str]:
        """Layers that were in low precision in training."""
        stored = {name.rpartition(".")[0] for name, item in self.stored.items() if isinstance(item, StoredPacked)}
        return self.quantized | stored

    def sources(self) -> dict[str, Source]:
        """Name in the model -> tensor of the output, in model order."""
        sources: dict[str, Source] = {}
        for name, tensor in self.model.state_dict().items():
            path = name.rpartition(".")[0]
            item = self.item(name)
            if item is None:
                if not tensor.is_meta:
                    sources[name] = held(tensor)
            elif not self._is_changed(name):
                sources[name] = Source(tensor.to("meta"), self._dense(name, item))
            elif self.merge.requantize and path in self.packed_paths:
                sources |= {f"{path}.{part}": source for part, source in self._packed_sources(path, item).items()}
            else:
                sources[name] = Source(_meta(item), self._weight(path, item))
        return sources

    def num_parameters(self) -> int:
        """Of the output, dense."""
        items = [self.item(name) or tensor for name, tensor in self.model.state_dict().items()]
        return sum(torch.Size(item.shape).numel() for item in items if not isinstance(item, Tensor) or not item.is_meta)

    def _is_changed(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and (path in self.adapter or path in self.packed_paths)

    def item(self, name: str) -> Stored | None:
        """Where a tensor is stored; None for a copy that stays tied, and for what no checkpoint holds."""
        if name in self.stored or not self._is_changed(name):
            return self.stored.get(name)
        partners = tied_weights(self.model)
        partners |= {origin: target for target, origin in partners.items()}
        return self.stored.get(partners.get(name, ""))

    def _dense(self, name: str, item: Stored) -> Callable[[], Tensor]:
        dtype = torch.float32 if is_wide(name, self.wide) else self.merge.compute_dtype

        def make() -> Tensor:
            value = item.read()
            assert isinstance(value, Tensor)
            if self.merge.base == "original" or not value.is_floating_point():
                return value
            return value.to(dtype)

        return make

    def _weight(self, path: str, item: Stored) -> Callable[[], Tensor]:
        """The merged or dequantised weight in float32."""
        return lambda: self._merged(path, self._base(path, item))

    def _base(self, path: str, item: Stored) -> Tensor:
        value = item.read()
        if isinstance(value, PackedWeight):
            return dequantize(value, torch.float32)
        if self.merge.base == "original":
            return value.float()
        if path in self.quantized:
            return dequantize(self._quantized(f"{path}.weight", value), torch.float32)
        return value.to(self.merge.compute_dtype).float()

    def _merged(self, path: str, base: Tensor) -> Tensor:
        layer = self.adapter.get(path)
        if layer is None:
            return base
        return merged_weight(base, layer.lora_A, layer.lora_B, layer.scaling, layer.magnitude)

    def _quantized(self, name: str, weight: Tensor) -> PackedWeight:
        quant = self.merge.quant
        return quantize(weight, quant.kind, quant.block_size, quant.double_quant, name=name)

    def _packed_sources(self, path: str, item: Stored) -> dict[str, Source]:
        """The merge in 4 bits; a layer without an adapter keeps the bytes it was trained with."""
        kept: dict[str, Tensor] = {}

        def part(name: str) -> Callable[[], Tensor]:
            def make() -> Tensor:
                if not kept:
                    kept.update(self._packed_state(path, item))
                return kept.pop(name)  # each is asked for once, one after the other

            return make

        return {
            name: Source(torch.empty(shape, dtype=dtype, device="meta"), part(name), dtype=dtype)
            for name, (shape, dtype) in self._packed_layout(item).items()
        }

    def _packed_state(self, path: str, item: Stored) -> dict[str, Tensor]:
        value = item.read()
        if path in self.adapter:
            del value
            value = self._quantized(path, self._merged(path, self._base(path, item)))
        elif isinstance(value, Tensor):
            value = self._quantized(path, value)
        state = to_bnb_state(value, self.merge.compute_dtype)
        name = _state_name(self.merge.quant.kind)
        blanks = torch.full((_STATE_BYTES - state[name].numel(),), ord(" "), dtype=torch.uint8)
        state[name] = torch.cat([state[name], blanks])
        return state

    def _packed_layout(self, item: Stored) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        quant = self.merge.quant
        numel = item.shape[0] * item.shape[1]
        blocks = -(-numel // quant.block_size)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": (((numel + 1) // 2, 1), torch.uint8),
            "weight.absmax": ((blocks,), torch.uint8 if quant.double_quant else torch.float32),
            "weight.quant_map": ((16,), torch.float32),
        }
        if quant.double_quant:
            layout["weight.nested_absmax"] = ((-(-blocks // NESTED_BLOCK_SIZE),), torch.float32)
            layout["weight.nested_quant_map"] = ((256,), torch.float32)
        return layout | {_state_name(quant.kind): ((_STATE_BYTES,), torch.uint8)}


def _state_name(kind: str) -> str:
    return f"weight.quant_state.bitsandbytes__{kind}"


def _meta(item: Stored) -> Tensor:
    return torch.empty(item.shape, dtype=torch.float32, device="meta")


def open_merge(merge: StreamedMerge) -> OpenedMerge:
    """The headers of all files, and the adapter; no weight of the base is read. Raises as `export_streamed`."""
    check_merge(merge)
    config = load_config(merge.source)
    kind = stored_kind(getattr(config, "quantization_config", None))
    if kind is not None:
        del config.quantization_config
    model = skeleton(config, merge.source, merge.compute_dtype, "auto", torch.device("cpu"))
    stored = stored_tensors(merge.source, model)
    layers = layers_to_quantize(model, merge.quant)
    packed = {name: item for name, item in stored.items() if isinstance(item, StoredPacked)}
    if packed or kind is not None:
        check_stored_packed(packed, kind, merge.quant, layers)
        layers = set()
    linear = [path for path, module in model.named_modules() if type(module) is torch.nn.Linear]
    adapter = {} if merge.adapter is None else read_adapter(model, merge.adapter)[1]
    if not merge.source.is_gguf and (merge.source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(merge.source.path))
    model.config._name_or_path = merge.source.name
    return OpenedMerge(merge, model, stored, adapter, linear, layers, wide_names(model, merge.compute_dtype))


def _resume_key(merge: StreamedMerge, settings: Sequence[object]) -> str:
    """A digest of all that the bytes of the export follow from; the files of the base by size and time."""
    adapter = ""
    if merge.adapter is not None:
        files = sorted(path for path in merge.adapter.iterdir() if path.is_file())
        adapter = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    base = merge.source.path
    files = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = [
        qdora.__version__,
        str(base.resolve()),
        stats,
        adapter,
        asdict(merge.quant),
        merge.base,
        merge.requantize,
    ]
    text = json_text([*content, str(merge.compute_dtype), [str(setting) for setting in settings]])
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class WrittenMerge:
    """A merge on disk, and how to get the model that it is compared with."""

    result: ExportResult
    run: Path
    step: int | None
    original: bool
    loaded: TrainedRun | None

    def load(self) -> TrainedRun:
        """The running model with its adapter, on the base that was merged on; merging did not need it."""
        return self.loaded or load_run(self.run, step=self.step, original=self.original)


def write_merge(
    run: Path, out: Path, options: ExportOptions, dtype: torch.dtype, console: Console, *, with_card: bool
) -> WrittenMerge:
    """Write the merge that is asked for.

    Args:
        run: Run directory.
        out: New or empty directory.
        options: Of the merge: base, requantize, shard_size, step.
        dtype: Of its weights.
        console: For progress.
        with_card: Write the model card and the licence texts beside the weights.
    Raises:
        UserError, RunFailure: As of `export_streamed` and `export_merged`.
    """
    opened = open_run(run)
    recipe = load_recipe(opened.recipe_file)
    where, state = trained_state(opened, recipe, options.step)
    extra = card_files(opened, recipe, state, form=options.form) if with_card else {}
    if recipe.adapter.kind == "full" or recipe.base.prune is not None:
        if options.base is not None or options.requantize:
            why = "adapter.kind full has no adapter to merge" if recipe.base.prune is None else "the base is pruned"
            raise UserError(f"--base, --requantize: {why}; leave them out.")
        trained = load_run(run, step=options.step)
        with bar(console, "writing") as progress:
            result = export_merged(
                trained.model,
                trained.tokenizer,
                out,
                dtype=dtype,
                max_shard_bytes=options.shard_bytes,
                progress=progress,
                extra_files=extra,
            )
        return WrittenMerge(result, run, options.step, False, trained)
    merge, tokenizer = merge_of(opened, recipe, where, options)
    check_merge(merge)
    with bar(console, "merging") as progress:
        result = export_streamed(
            merge,
            tokenizer,
            out,
            dtype=dtype,
            max_shard_bytes=options.shard_bytes,
            progress=progress,
            extra_files=extra,
        )
    return WrittenMerge(result, run, options.step, options.base == "original", None)


def merge_of(
    run: RunDirectory, recipe: Recipe, trained: Path, options: ExportOptions
) -> tuple[StreamedMerge, PreTrainedTokenizerBase]:
    """The merge of a run's adapter (`trained`: from `trained_state`) that is asked for, and the run's tokenizer."""
    source, tokenizer = find_model(recipe)
    adapter = None
    if recipe.adapter.kind != "none":
        adapter = trained if trained == run.adapter else trained / "adapter"
    held = recipe.base
    merge = StreamedMerge(
        source,
        adapter,
        Quantization(held.quant, held.block_size, held.double_quant, tuple(held.skip)),
        choose_compute(recipe.model.dtype).dtype,
        base="original" if options.base == "original" else "dequantized",
        requantize=options.requantize,
    )
    return merge, tokenizer
