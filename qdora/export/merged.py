"""Base and adapter as one checkpoint.

The merge is exact: the base is dequantised in float32, the adapter applied in float32, and the result cast once. The
tensors come from a model in memory or, with the same bytes, from the files of base and adapter (`StreamedMerge`): each
is read, quantised as in training and merged when it is written, and memory is bounded by the largest weight and a few
slices of it. Besides the merge on the dequantised base, which is the model that was trained, there are two others:

    original      m (W + s B A) / ||W + s B A|| on the source's own 16-bit weights W, with the norm of that sum: free of
                  the base's quantisation error, but not the model that the adapter was fitted to
    requantised   the merge quantised to 4 bits again, as a bitsandbytes checkpoint: small, but rounded a second time
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.dora import merged_weight
from qdora.adapter.expert_product import dense_rows, merged_rows
from qdora.adapter.trained_rows import with_rows
from qdora.errors import UserError
from qdora.export.checkpoint_writer import (
    CheckpointPlan,
    Source,
    WriteOptions,
    checkpoint_directory,
    held,
    plan_export,
    plan_sources,
)
from qdora.files.console import bar
from qdora.files.run_directory import RunDirectory, open_run
from qdora.model.adapter_file import StoredLayer, read_adapter
from qdora.model.build_model import choose_compute, find_model, token_ids
from qdora.model.checkpoint import (
    Stored,
    StoredPacked,
    StoredTensor,
    load_faults,
    quantization_config,
    stored_kind,
    stored_rows,
    tied_weights,
)
from qdora.model.experts import routers, stacks
from qdora.model.inject import adapted_layers, linear_layers
from qdora.model.load import (
    Quantization,
    dense_dtype,
    layers_to_quantize,
    load_config,
    published_generation,
    quantization_of,
    settle_stored,
    skeleton,
    tensors_of_source,
)
from qdora.model.multimodal import carried, linear_not_loaded
from qdora.model.source import ModelSource
from qdora.model.tokens import TrainedMatrix, embedding_paths, extend_vocabulary, is_tied
from qdora.quant.bnb_state import FOUR_BIT_KINDS, STATE_NAME, to_bnb_state
from qdora.quant.packed import PackedWeight, RowParts, dequantize, empty_packed, quantize
from qdora.recipe.options import ExportOptions
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.section import parse_size
from qdora.recipe.settings import Recipe
from qdora.run.base import check_base
from qdora.run.load_run import TrainedRun, adapter_of, load_run, trained_state
from qdora.run.model_card import card_files

_STATE_BYTES = 256
"""Length of the JSON beside a packed weight, padded with blanks: it must be known before the scales are."""


def export_merged(
    source: PreTrainedModel | StreamedMerge,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: Path,
    *,
    dtype: torch.dtype = torch.float16,
    **options: Unpack[WriteOptions],
) -> dict[str, Any]:
    """Write the merged model as a plain transformers checkpoint; `options` are those of `checkpoint_directory`.

    Args:
        source: A model with adapted layers or without (then its dequantised base is written), or files to be merged.
        dtype: float16, bfloat16 or float32, for all float tensors but those that training keeps in float32.
    Returns: What was written, for export.json.
    Raises UserError, RunFailure: See `checkpoint_directory` and `open_merge`.
    """
    start = time.perf_counter()
    if isinstance(source, StreamedMerge):
        opened = open_merge(source)
        plan, num_layers, num_parameters = opened.plan(dtype), len(opened.adapter), opened.num_parameters()
    else:
        plan, num_layers = plan_export(source, dtype), len(adapted_layers(source))
        num_parameters = sum(torch.Size(item.spec.shape).numel() for item in plan.tensors)
    with checkpoint_directory(plan, tokenizer, out_dir, **options) as (_, written):
        pass  # nothing else belongs in the directory
    return written | {
        "directory": str(out_dir),
        "dtype": str(dtype).removeprefix("torch."),
        "num_merged_layers": num_layers,
        "num_parameters": num_parameters,
        "seconds": time.perf_counter() - start,
    }


def write_merge(
    run: Path, out: Path, options: ExportOptions, dtype: torch.dtype, console: Console, *, with_card: bool
) -> tuple[dict[str, Any], Callable[[], TrainedRun]]:
    """Write the merged model of a run, `with_card` with the model card and the licence texts.

    A pruned base and a fully trained model are loaded; any other merge is streamed. Raises as `export_merged`. Returns
    what was written, and a function that gives the running model with its adapter on the base of the merge.
    """
    opened = open_run(run)
    recipe = load_recipe(opened.recipe_file)
    where, state = trained_state(opened, recipe, options.step)
    load = cache(partial(load_run, run, step=options.step, original=options.base == "original"))
    source: PreTrainedModel | StreamedMerge
    if recipe.adapter.kind == "full" or recipe.base.prune is not None:
        if options.has("base") or options.requantize:
            why = "adapter.kind full has no adapter to merge" if recipe.base.prune is None else "the base is pruned"
            given = ["--base"] if options.has("base") else []
            given += ["--requantize"] if options.requantize else []
            raise UserError(f"{', '.join(given)}: not possible, {why}. Fix: remove {' and '.join(given)}.")
        source, tokenizer = load().model, load().tokenizer
    else:
        source, tokenizer = merge_of(opened, recipe, where, options)
    with bar(console, "merging") as progress:
        result = export_merged(
            source,
            tokenizer,
            out,
            dtype=dtype,
            max_shard_bytes=parse_size(options.shard_size),
            progress=progress,
            extra_files=card_files(opened, recipe, state, form=options.form) if with_card else None,
        )
    return result, load


def merge_of(
    run: RunDirectory, recipe: Recipe, trained: Path, options: ExportOptions
) -> tuple[StreamedMerge, PreTrainedTokenizerBase]:
    """The streamed merge of a run's adapter, and the run's tokenizer; `trained` is from `trained_state`.

    Raises UserError if the base has changed.
    """
    compute = choose_compute(recipe.model.dtype)
    source, tokenizer = find_model(recipe)
    check_base(run, source)
    adapter = None if recipe.adapter.kind == "none" else adapter_of(run, trained)
    merge = StreamedMerge(
        source,
        adapter,
        quantization_of(recipe.base),
        compute.dtype,
        base=options.base,
        requantize=options.requantize,
        new_tokens=token_ids(recipe, tokenizer),
    )
    return merge, tokenizer


@dataclass(frozen=True)
class StreamedMerge:
    """A merge that needs no model in memory: of the adapter in a directory, or of the base alone.

    Attributes:
        quant, compute_dtype: How training held the base, and what is not quantised.
        base: The weights on which the adapter is merged.
        requantize: Write the layers that were quantised as nf4 or fp4 again.
        new_tokens: Ids of the new tokens, whose rows are in the adapter.
    """

    source: ModelSource
    adapter: Path | None
    quant: Quantization
    compute_dtype: torch.dtype
    base: Literal["dequantized", "original"] = "dequantized"
    requantize: bool = False
    new_tokens: tuple[int, ...] = ()


def check_merge(merge: StreamedMerge) -> None:
    """Raise UserError if this base does not allow the merge, before any weight is read."""
    faults, name, original = [], merge.source.name, merge.base == "original"
    if original and merge.quant.kind == "none":
        faults.append("--base original: the base was not quantised in training. Fix: remove the option.")
    elif original and merge.source.is_gguf:
        faults.append(f"--base original: {name} is a GGUF file, not the 16-bit model. Fix: use --base dequantized.")
    elif original:
        kind = stored_kind(getattr(load_config(merge.source), "quantization_config", None))
        if kind is not None:
            fix = "Fix: use --base dequantized, or train on the model it was made from."
            faults.append(f"--base original: {name} is stored in {kind} and has no 16-bit weights. {fix}")
    if merge.requantize and merge.quant.kind not in FOUR_BIT_KINDS:
        faults.append(
            f"--requantize: the base must be held in nf4 or fp4 (got {merge.quant.kind}). Fix: remove the option."
        )
    if faults:
        raise UserError(*faults)


def open_merge(merge: StreamedMerge) -> OpenedMerge:
    """Read the adapter and the headers of all files, but no weight of the base.

    Raises UserError: What `check_merge` refuses, or a checkpoint that does not fit its model.
    """
    check_merge(merge)
    config = load_config(merge.source)
    kind = stored_kind(getattr(config, "quantization_config", None))
    if kind is not None:
        del config.quantization_config
    model = skeleton(config, merge.source, merge.compute_dtype, "auto", torch.device("cpu"))
    stored = tensors_of_source(merge.source, model)
    layers = layers_to_quantize(model, merge.quant)
    stored, layers = settle_stored(stored, kind, merge.quant, layers)
    linear = [*linear_layers(model), *sorted(routers(model))]
    if merge.requantize:
        classes = {path: type(model.get_submodule(path)).__name__ for path in sorted(layers)}
        faults = load_faults(model, classes, "--requantize")
        if faults:
            raise UserError(*faults)
    extend_vocabulary(model, merge.new_tokens)
    adapter: dict[str, StoredLayer] = {}
    matrices: dict[str, TrainedMatrix] = {}
    if merge.adapter is not None:
        _, adapter, matrices = read_adapter(model, merge.adapter)
    if (generation := published_generation(merge.source)) is not None:
        model.generation_config = generation
    model.config._name_or_path = merge.source.name
    given: dict[str, Any] = {"adapter": adapter, "matrices": matrices, "linear": linear}
    return OpenedMerge(merge=merge, model=model, stored=stored, quantized=layers, **given)


@dataclass(frozen=True, kw_only=True)
class OpenedMerge:
    """A skeleton of the model (its weights are on "meta"), where its tensors are stored, and what happens to each."""

    merge: StreamedMerge
    model: PreTrainedModel
    stored: Mapping[str, Stored]  # name in the model -> place in the files of the base
    adapter: Mapping[str, StoredLayer]  # path of a layer -> its adapter
    matrices: Mapping[str, TrainedMatrix]  # path of an embedding or a head -> its trained rows; a tied head has none
    linear: Sequence[str]  # paths of all linear layers, routers included
    quantized: set[str]  # paths of those that training quantised from dense weights
    kept: dict[str, PackedWeight] = field(default_factory=dict)  # path -> the stack of experts that is being written

    @cached_property
    def packed_paths(self) -> set[str]:
        """Paths of the layers that training held in low precision."""
        stored = {name.rpartition(".")[0] for name, item in self.stored.items() if isinstance(item, StoredPacked)}
        return self.quantized | stored

    def plan(self, dtype: torch.dtype) -> CheckpointPlan:
        """The checkpoint with float tensors in `dtype`."""
        plan = plan_sources(self.model, self._sources(dtype), dtype)
        if self.merge.requantize:
            quant = self.merge.quant
            dense = [path for path in self.linear if path not in self.packed_paths] + linear_not_loaded(self.model)
            plan.config.quantization_config = quantization_config(
                quant.kind, double_quant=quant.double_quant, dtype=dtype, dense=dense
            )
        return plan

    def num_parameters(self) -> int:
        """Parameters of the merged model, quantised or not."""
        tensors = self.model.state_dict().items()
        own: int = sum(each.numel() for name, each in tensors if self.item(name) is not None or not each.is_meta)
        return own + sum(torch.Size(item.shape).numel() for item in carried(self.model).values())

    def item(self, name: str) -> Stored | None:
        """Where a tensor is stored; None for a copy that stays tied, and for what no checkpoint holds."""
        if name in self.stored or not self._is_changed(name):
            return self.stored.get(name)
        partners = tied_weights(self.model)
        partners |= {origin: target for target, origin in partners.items()}
        return self.stored.get(partners.get(name, ""))

    def _is_changed(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and (path in self.adapter or path in self.packed_paths)

    def _sources(self, dtype: torch.dtype) -> dict[str, Source]:
        """Name in the model -> tensor of the output, in model order. Weights in 4 bits are dequantised to `dtype`."""
        sources: dict[str, Source] = {}
        trained, experts = dict(self.matrices), stacks(self.model)
        if is_tied(self.model) and trained:  # the files may hold the shared matrix under either name
            trained = dict.fromkeys(embedding_paths(self.model), next(iter(trained.values())))
        for name, tensor in self.model.state_dict().items():
            path = name.rpartition(".")[0]
            item = self.item(name)
            if item is None:
                if not tensor.is_meta:
                    sources[name] = held(tensor)
            elif path in trained and name == f"{path}.weight":
                shaped = torch.empty(tensor.shape, dtype=torch.float32, device="meta")
                sources[name] = Source(shaped, partial(self._trained, name, item, trained[path]))
            elif not self._is_changed(name) and not (path in experts and name == f"{path}.weight"):
                sources[name] = Source(tensor.to("meta"), partial(self._dense, name, item))
            elif self.merge.requantize and path in self.packed_paths:
                packed = self._packed_sources(path, item, dtype)
                sources |= {f"{path}.{part}": source for part, source in packed.items()}
            else:
                shaped = torch.empty(item.shape, dtype=torch.float32, device="meta")
                rows = partial(self._merged_rows, path, item, experts[path].num_experts) if path in experts else None
                sources[name] = Source(shaped, partial(self._merged, path, item), rows=rows)
        return sources

    def _dense(self, name: str, item: Stored) -> Tensor:
        value = item.read()
        assert isinstance(value, Tensor)
        if self.merge.base == "original" or not value.is_floating_point():
            return value
        return value.to(dense_dtype(self.model, name, self.merge.compute_dtype))

    def _trained(self, name: str, item: Stored, matrix: TrainedMatrix) -> Tensor:
        """A trained embedding or head."""
        if matrix.ids is None:
            return matrix.values
        weight = self._dense(name, item)
        missing = max(0, max(matrix.ids) + 1 - len(weight))
        return with_rows(torch.cat([weight, weight.new_zeros(missing, weight.shape[1])]), matrix.ids, matrix.values)

    def _base(self, path: str, item: Stored) -> Tensor:
        value = item.read()
        if isinstance(value, PackedWeight):
            return dequantize(value, torch.float32)
        if self.merge.base == "original":
            return value.float()
        if path in self.quantized:
            return dequantize(self._quantized(f"{path}.weight", value), torch.float32)
        return value.to(self.merge.compute_dtype).float()

    def _merged(self, path: str, item: Stored) -> Tensor:
        """The merged or dequantised weight in float32."""
        base, layer = self._base(path, item), self.adapter.get(path)
        if layer is None:
            return base
        return merged_weight(base, layer.lora_A, layer.lora_B, layer.scaling, layer.magnitude)

    def _merged_rows(self, path: str, item: Stored, num_experts: int, rows: slice) -> Tensor:
        """Some rows of the merged or dequantised weight of a stack of experts, in float32."""
        if path in self.packed_paths and self.merge.base != "original":
            if path not in self.kept:
                self.kept.clear()  # the stack that was written last
                value = item.read_rows() if isinstance(item, StoredTensor) else item.read()
                packed = value if isinstance(value, PackedWeight) else self._quantized(f"{path}.weight", value)
                self.kept[path] = packed
            base = dense_rows(self.kept[path], num_experts, rows)
        else:
            assert isinstance(item, StoredTensor)
            base = stored_rows(item, rows)
            base = base.float() if self.merge.base == "original" else base.to(self.merge.compute_dtype).float()
        layer = self.adapter.get(path)
        if layer is None:
            return base
        return merged_rows(base, rows.start, layer.lora_A, layer.lora_B, layer.scaling, magnitude=layer.magnitude)

    def _quantized(self, name: str, weight: Tensor | RowParts) -> PackedWeight:
        quant = self.merge.quant
        return quantize(weight, quant.kind, quant.block_size, quant.double_quant, name=name)

    def _packed_sources(self, path: str, item: Stored, dtype: torch.dtype) -> dict[str, Source]:
        """The merge in 4 bits; a layer without an adapter keeps the bytes that training used."""
        kept: dict[str, Tensor] = {}
        quant = self.merge.quant

        def part(name: str) -> Callable[[], Tensor]:
            def make() -> Tensor:
                if not kept:
                    kept.update(self._packed_state(path, item, dtype))
                return kept.pop(name)  # the writer asks for each part once, one after the other

            return make

        # Only the shapes and dtypes of these tensors are read.
        layout = to_bnb_state(
            empty_packed(quant.kind, (item.shape[0], item.shape[1]), quant.block_size, quant.double_quant),
            dtype,
        )
        layout[f"{STATE_NAME}{quant.kind}"] = torch.empty(_STATE_BYTES, dtype=torch.uint8)
        return {name: Source(tensor.to("meta"), part(name), dtype=tensor.dtype) for name, tensor in layout.items()}

    def _packed_state(self, path: str, item: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
        value = self._merged(path, item) if path in self.adapter else item.read()
        state = to_bnb_state(self._quantized(path, value) if isinstance(value, Tensor) else value, dtype)
        name = f"{STATE_NAME}{self.merge.quant.kind}"
        blanks = torch.full((_STATE_BYTES - state[name].numel(),), ord(" "), dtype=torch.uint8)
        state[name] = torch.cat([state[name], blanks])
        return state
