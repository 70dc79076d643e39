"""From a recipe to the things a run is made of: device, data, model, adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.config import Recipe
from qdora.data.example import Example
from qdora.data.loader import StepLoader
from qdora.data.mix import Mix, make_mix
from qdora.data.sources import SourceSpec, has_split, load_mix, load_source, open_shards
from qdora.data.stream import ExampleStream, StreamSettings
from qdora.data.tokenize import TokenizedSet, tokenize_all
from qdora.data_config import COMMONSENSE_TASKS, DataConfig, SourceConfig
from qdora.doctor import cpu_has_bfloat16
from qdora.errors import UserError
from qdora.memory.activation_offload import ActivationOffload
from qdora.memory.disk_residency import DiskResidency
from qdora.memory.host_embedding import keep_embedding_on_host
from qdora.memory.host_residency import HostResidency
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.base_cache import BaseCache, default_cache
from qdora.model.error_init import start_from_error_
from qdora.model.inject import adapted_layers, inject
from qdora.model.load import Placer, Quantization, load_model
from qdora.model.source import ModelSource, public_name, resolve
from qdora.model.tokenizer import load_tokenizer
from qdora.train.distributed import free_host_bytes

logger = logging.getLogger("qdora")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

NO_GPU = "base.residency: host is for a GPU, and this machine has none that can be used, allowed: device, disk."

AUTO_MICRO_BATCH_TOKENS = 2048
"""train.micro_batch_tokens: auto, unless a longer example needs more."""


@dataclass(frozen=True)
class Compute:
    """Where and in which dtype the products run."""

    device: torch.device
    dtype: torch.dtype


def choose_compute(dtype: str) -> Compute:
    """The GPU where there is one; `auto` takes bfloat16 where the device multiplies in it, else float32. Logged."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto":
        return Compute(device, DTYPES[dtype])
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bfloat16()
    chosen = torch.bfloat16 if native else torch.float32
    logger.info("Computing on %s in %s.", device.type, str(chosen).removeprefix("torch."))
    return Compute(device, chosen)


def find_source(recipe: Recipe, *, weights: bool = True) -> ModelSource:
    """Where the recipe's model is. Without `weights` those of a model on the Hub are not fetched."""
    model = recipe.model
    return resolve(model.source, model.revision, trust_remote_code=model.trust_remote_code, weights=weights)


def find_model(recipe: Recipe, *, weights: bool = True) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    """`find_source`, and the tokenizer: done before anything large is read."""
    source, named = find_source(recipe, weights=weights), recipe.model.tokenizer
    return source, load_tokenizer(source if named is None else resolve(named, weights=False))


def load_base(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    progress: Callable[[int, int], None] | None = None,
    *,
    placer: Placer | None = None,
) -> PreTrainedModel:
    """The frozen base of the recipe; for full fine-tuning every parameter is trainable.

    `placer` is what prunes it (`verbs.pruned_base`), given exactly where the recipe has base.prune. Raises as
    `load_model`.
    """
    assert (recipe.base.prune is None) == (placer is None), "a pruned base is loaded by verbs.pruned_base"
    base, cache = recipe.base, base_cache(recipe, compute, progress)
    if base.residency != "device" and base.quant != "none":
        placer = _away(recipe, compute, cache)
    on_host = recipe.memory.host_embeddings and compute.device.type == "cuda"
    model = load_model(
        source,
        quant=base.quant,
        block_size=base.block_size,
        double_quant=base.double_quant,
        skip=base.skip,
        device=compute.device,
        compute_dtype=compute.dtype,
        attention=recipe.model.attention,
        progress=progress,
        reader=cache,
        placer=placer,
        before_reading=keep_embedding_on_host if on_host else None,
    )
    if recipe.adapter.kind == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    if recipe.memory.checkpointing:
        recompute_activations(model)
        if recipe.memory.offload_activations and compute.device.type == "cuda":
            ActivationOffload(model)
    return model


def _away(recipe: Recipe, compute: Compute, cache: BaseCache | None) -> Placer:
    """What keeps the blocks of the base where the recipe says. Raises UserError where this machine cannot."""
    base, here = recipe.base, compute.device.type
    if base.residency == "host":
        if here != "cuda":
            raise UserError(NO_GPU)
        return HostResidency(base.streamed_blocks, free_bytes=free_host_bytes)
    assert cache is not None
    return DiskResidency(cache, base.streamed_blocks)


def base_cache(
    recipe: Recipe, compute: Compute, progress: Callable[[int, int], None] | None = None
) -> BaseCache | None:
    """What reads the packed base from where the recipe keeps it; None where it keeps none."""
    base = recipe.base
    on_disk = base.residency == "disk"
    if base.quant == "none" or (base.cache is None and not on_disk):
        return None
    root = default_cache() if base.cache in (None, "auto") else Path(base.cache).expanduser()
    wanted = Quantization(base.quant, base.block_size, base.double_quant, base.skip)
    return BaseCache(root, wanted, compute.device, mapped=on_disk, progress=progress)


def recompute_activations(model: PreTrainedModel) -> None:
    # transformers 5.2x renamed it; the old name warns there, the new one is missing in earlier releases.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def put_adapters(model: PreTrainedModel, recipe: Recipe, adapter: Path | None = None) -> None:
    """Adapters as the recipe asks, or as they stand in the directory `adapter`."""
    settings = recipe.adapter
    if settings.kind == "none" or settings.kind == "full":
        return
    directory = adapter or (Path(settings.resume_from) if settings.resume_from else None)
    if settings.kind == "magnitude":
        # DoRA whose B stays 0, so any reader of DoRA adapters reads it.
        if directory is None:
            layers = inject(model, kind="dora", rank=1, alpha=1.0, targets=_targets(recipe))
        else:
            layers = load_adapter(model, directory)
        for layer in layers.values():
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
        return
    if directory is None:
        inject(
            model,
            kind=settings.kind,
            rank=settings.rank,
            alpha=settings.alpha,
            rank_stabilized=settings.rank_stabilized,
            dropout=settings.dropout,
            targets=_targets(recipe),
            rank_pattern=settings.rank_pattern,
            same_scaling=settings.same_scaling,
            init="gaussian" if settings.init == "gaussian" else "kaiming",  # loftq: replaced by `start_adapters`
            dtype=DTYPES[settings.dtype],
            masked=settings.mask == "keep",
            generator=torch.Generator().manual_seed(recipe.train.seed),
        )
        return
    layers = load_adapter(model, directory, dtype=DTYPES[settings.dtype])
    kinds = {layer.kind for layer in layers.values()}
    if kinds != {settings.kind}:
        raise UserError(f"adapter.kind: {settings.kind!r}, but {directory} holds {', '.join(sorted(kinds))}.")
    for layer in layers.values():
        layer.dropout = settings.dropout


def start_adapters(model: PreTrainedModel, recipe: Recipe, source: ModelSource) -> None:
    """Give fresh adapters a start that is read from the source, where the recipe asks for one."""
    settings = recipe.adapter
    if settings.kind in ("lora", "dora") and settings.init == "loftq" and settings.resume_from is None:
        start_from_error_(model, source)


def _targets(recipe: Recipe) -> str | list[str]:
    targets = recipe.adapter.targets
    return targets if isinstance(targets, str) else list(targets)


def write_adapter(
    model: PreTrainedModel,
    recipe: Recipe,
    directory: Path,
    *,
    shipped: bool = False,
    extra: dict[str, Any] | None = None,
) -> None:
    """The adapter of a run in PEFT's format, with the base that it belongs to. Raises as `save_adapter`.

    `shipped`: It leaves this machine, so that a base that only this machine has is not named. `extra`: For its record.
    """
    base = recipe.base
    quant: dict[str, Any] = {"quant": base.quant}
    if base.quant not in ("int8", "none"):
        quant |= {"block_size": base.block_size, "double_quant": base.double_quant}
    if base.prune is not None:
        quant["prune"] = base.prune.model_dump(mode="json", exclude=set(base.prune.unused()))
    save_adapter(
        model,
        directory,
        base_name_or_path=public_name(recipe.model.source) if shipped else recipe.model.source,
        revision=recipe.model.revision,
        base_quant=quant,
        extra=extra,
    )


def describe_adapters(model: PreTrainedModel) -> dict[str, int]:
    """Number of adapted layers and of trainable and frozen parameters."""
    layers = adapted_layers(model)
    frozen = sum(layer.in_features * layer.out_features for layer in layers.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"num_layers": len(layers), "num_trainable": trainable, "num_adapted": frozen}


def source_spec(source: SourceConfig, data: DataConfig) -> SourceSpec:
    """A recipe's source as the data package takes it."""
    return SourceSpec(
        task=source.task,
        source=source.source,
        path=source.path,
        format=source.format,
        split=source.split,
        limit=source.limit,
        name=source.name,
        revision=source.revision,
        seed=data.seed,
        stream=source.stream,
    )


def read_data(data: DataConfig) -> tuple[list[list[Example]], dict[str, list[Example]]]:
    """Training examples per source, and validation examples by the source's name (left out where there are none).

    Raises:
        UserError: The faults of all sources, each with its place in the recipe.
    """
    specs = [source_spec(source, data) for source in data.mix]
    loaded = load_mix(specs, [source.validation for source in data.mix], fraction=data.validation_fraction)
    validation = {spec.label: held_out for spec, (_, held_out) in zip(specs, loaded, strict=True) if held_out}
    return [train for train, _ in loaded], validation


def tokenized_mix(recipe: Recipe, tokenizer: Any, train: Sequence[Sequence[Example]]) -> Mix:
    """Tokenise every source and put them together; faults of all sources at once."""
    data = recipe.data
    sets: list[TokenizedSet | ExampleStream] = []
    faults: list[str] = []
    for number, (source, examples) in enumerate(zip(data.mix, train, strict=True)):
        try:
            if source.stream:
                sets.append(_stream(data, number, tokenizer))
                continue
            sets.append(
                tokenize_all(
                    examples,
                    tokenizer,
                    name=source.label,
                    max_length=data.max_length,
                    loss_on=data.loss_on,
                    too_long=data.too_long,
                )
            )
        except UserError as error:
            faults.extend(error.faults)
    if faults:
        raise UserError(*faults)
    return make_mix(
        sets,
        strategy=data.strategy,
        temperature=data.temperature,
        weights=[source.weight or 0.0 for source in data.mix] if data.strategy == "weights" else None,
        max_epochs=[source.max_epochs for source in data.mix],
        seed=data.seed,
    )


def _stream(data: DataConfig, number: int, tokenizer: Any) -> ExampleStream:
    """Source `number` of the mix as a stream; only its first rows are read."""
    source = data.mix[number]
    settings = StreamSettings(
        name=source.label,
        format=source.format,
        max_length=data.max_length,
        loss_on=data.loss_on,
        too_long=data.too_long,
        window=source.shuffle_window,
        size=source.size,
        seed=data.seed,
        number=number,
    )
    return ExampleStream(open_shards(source_spec(source, data)), settings, tokenizer)


def make_loader(recipe: Recipe, mix: Mix, tokenizer: Any, rank: int = 0, num_processes: int = 1) -> StepLoader:
    """The loader of the recipe's steps, or of a process's share of each of them.

    With data.packing it packs in "rows", until the loaded model shows what its attention takes.
    """
    return StepLoader(
        mix.sets,
        mix.order,
        tokens_per_step=recipe.train.tokens_per_step,
        batch=recipe.train.batch,
        micro_batch_tokens=micro_batch_tokens(recipe),
        pad_id=tokenizer.pad_token_id,
        packed="rows" if recipe.data.packing else None,
        row_tokens=recipe.data.max_length if recipe.data.packing else None,
        rank=rank,
        num_processes=num_processes,
    )


def micro_batch_tokens(recipe: Recipe) -> int:
    """Most tokens of a micro-batch, padding counted."""
    asked = recipe.train.micro_batch_tokens
    return max(recipe.data.max_length, AUTO_MICRO_BATCH_TOKENS) if asked == "auto" else asked


def num_steps_of(recipe: Recipe, loader: StepLoader) -> int:
    """Optimizer steps of the run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None
    return loader.steps_for_epochs(recipe.train.epochs)


def task_examples(task: str, *, split: str, data: Path | None, by_name: bool = False) -> list[Example]:
    """Examples of a built-in task, from the Hub or from <data>/<task>/<split> files.

    `by_name`: the commonsense tasks ask for the name of a choice, as the DoRA paper does, and not for its text.
    """
    path = None if data is None or task.startswith("demo/") else str(data / task)
    asked = "commonsense170k" if by_name and task in COMMONSENSE_TASKS else "auto"
    return load_source(SourceSpec(task=task, path=path, split=split, format=asked))


def run_examples(recipe: Recipe, split: str) -> dict[str, list[Example]]:
    """The examples of a run's sources in one split: train and validation as in training, or test.

    Raises:
        UserError: A source without that split; its training examples are never taken for it.
    """
    streamed = [source.label for source in recipe.data.mix if source.stream]
    if split == "train" and streamed:
        raise UserError(f"--split: {', '.join(streamed)}: a stream is not evaluated on, allowed: validation, test.")
    if split in ("train", "validation"):
        train, validation = read_data(recipe.data)
        labels = [source.label for source in recipe.data.mix]
        return validation if split == "validation" else dict(zip(labels, train, strict=True))
    specs = {source.label: source_spec(source, recipe.data) for source in recipe.data.mix}
    faults = [
        f"--split: {label} has no {split} split, allowed: validation, train."
        for label, spec in specs.items()
        if not has_split(spec, split)
    ]
    if faults:
        raise UserError(*faults)
    return {label: load_source(replace(spec, split=split, limit=None)) for label, spec in specs.items()}
