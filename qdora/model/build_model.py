"""From a recipe: device and dtype, source and tokenizer, adapters on the model, and their file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.layer import AdaptedLinear, Kind
from qdora.data.chats import set_chat_settings, use_data_settings
from qdora.errors import UserError
from qdora.files.machine import check_gpu, cpu_has_bfloat16
from qdora.model.adapter_file import CONFIG_FILE, describe_adapter, load_adapter, save_adapter
from qdora.model.checkpoint import tied_weights
from qdora.model.inject import HEAD, adapted_layers, inject
from qdora.model.load import load_config, skeleton, tensors_of_source
from qdora.model.source import ADAPTER_DIRECTORY, ModelSource, load_tokenizer, public_name, resolve
from qdora.model.tokens import (
    EMBEDDING,
    add_tokens,
    embedding_paths,
    extend_vocabulary,
    is_tied,
    new_token_ids,
    stop_ids,
    train_embeddings,
    trained_matrices,
)
from qdora.recipe.recipe_file import settings
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Compute:
    device: torch.device
    dtype: torch.dtype


def choose_compute(dtype: str) -> Compute:
    """The GPU if there is one; dtype `auto` is bfloat16 if the device multiplies in it, else float32."""
    check_gpu()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto":
        return Compute(device, DTYPES[dtype])
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bfloat16()
    )
    chosen = torch.bfloat16 if native else torch.float32
    logger.info("Computing on %s in %s.", device.type, str(chosen).removeprefix("torch."))
    return Compute(device, chosen)


def find_source(recipe: Recipe, *, weights: bool = True) -> ModelSource:
    """The source of the recipe's model; `weights` False does not download the weights of a model on the Hub."""
    model = recipe.model
    source = resolve(model.source, model.revision, trust_remote_code=model.trust_remote_code, weights=weights)
    own = source.path / ADAPTER_DIRECTORY
    if (own / CONFIG_FILE).is_file() and recipe.adapter.resume_from is None:
        raise UserError(f"model.source: {source.name} has an adapter. Fix: set adapter.resume_from={own}.")
    return source


def find_model(recipe: Recipe, *, weights: bool = True) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    source = find_source(recipe, weights=weights)
    return source, find_tokenizer(recipe, source, find_tokenizer_source(recipe, source))


def find_tokenizer_source(recipe: Recipe, source: ModelSource) -> ModelSource:
    """Where the recipe's tokenizer is: the base `source` itself, or what model.tokenizer names."""
    model = recipe.model
    if model.tokenizer is None:
        return source
    return resolve(
        model.tokenizer, model.tokenizer_revision, config=False, weights=False, setting="model.tokenizer"
    )


def find_tokenizer(
    recipe: Recipe, source: ModelSource, tokenizer_source: ModelSource
) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe whose base is `source`, with new tokens and the data section's chat settings."""
    tokenizer = load_tokenizer(tokenizer_source)
    add_tokens(tokenizer, recipe.model.add_tokens)
    use_data_settings(tokenizer, recipe.data)
    set_chat_settings(tokenizer, stop_ids=stop_ids(source, tokenizer))
    return tokenizer


def recompute_activations(model: PreTrainedModel) -> None:
    # transformers 5.2x renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def adapt(
    model: PreTrainedModel,
    recipe: Recipe,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: Path | None = None,
) -> None:
    """Make a loaded base the model that is trained: rows for new tokens, and fresh adapters or those of `adapter`."""
    new_tokens = new_token_ids(tokenizer, recipe.model.add_tokens)
    extend_vocabulary(model, new_tokens)
    put_adapters(model, recipe, adapter, new_tokens=new_tokens)
    head = model.get_output_embeddings()
    if isinstance(head, AdaptedLinear) and head.base.share is not None:
        # Its loss reads it in chunks, whose number differs between processes.
        raise UserError(f"adapter.targets: must not have the head with train.parallel {recipe.train.parallel}.")
    settings = recipe.adapter
    if settings.init == "loftq" and settings.kind in ("lora", "dora") and not (adapter or settings.resume_from):
        start_from_error_(model, source)


def put_adapters(
    model: PreTrainedModel, recipe: Recipe, adapter: Path | None = None, *, new_tokens: Sequence[int] = ()
) -> None:
    """Put fresh adapters on, or those of the directory `adapter` (default adapter.resume_from), and train embeddings.

    `new_tokens`: ids of the recipe's new tokens, whose rows `extend_vocabulary` has made.
    """
    settings, dtype = recipe.adapter, DTYPES[recipe.adapter.dtype]
    if settings.kind in ("none", "full"):
        return
    only_magnitudes = settings.kind == "magnitude"
    # DoRA whose B stays 0, so every program that reads DoRA reads it.
    kind: Kind = "lora" if settings.kind == "lora" else "dora"
    directory = adapter or (Path(settings.resume_from) if settings.resume_from else None)
    if directory is not None:
        layers = load_adapter(model, directory, dtype=None if only_magnitudes else dtype)
        held = next(iter(layers.values())).kind
        if held != kind:
            raise UserError(f"adapter.kind: must be {held}, as in {directory} (got {settings.kind}).")
        for layer in layers.values():
            layer.dropout = layer.dropout if only_magnitudes else settings.dropout
    elif only_magnitudes:
        layers = inject(model, kind=kind, rank=1, alpha=1.0, targets=settings.targets, dtype=dtype)
    else:
        layers = inject(
            model,
            kind=kind,
            rank=settings.rank,
            alpha=settings.alpha,
            rank_stabilized=settings.rank_stabilized,
            dropout=settings.dropout,
            targets=settings.targets,
            rank_pattern=settings.rank_pattern,
            same_scaling=settings.same_scaling,
            expert_rank=settings.experts.rank,
            init="gaussian" if settings.init == "gaussian" else "kaiming",  # `adapt` replaces it for loftq
            dtype=dtype,
            masked=settings.mask == "keep",
            generator=torch.Generator().manual_seed(recipe.train.seed),
        )
    if only_magnitudes:
        for layer in layers.values():
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
    set_kept_scales_(model, recipe)
    ids = None if settings.also_train_rows == "all" else tuple(new_tokens)
    trained = trained_matrices(model)
    if not trained:
        if settings.also_train:
            train_embeddings(model, settings.also_train, ids, has_new=bool(new_tokens))
        return
    assert directory is not None
    paths = dict(zip((EMBEDDING, HEAD), embedding_paths(model), strict=True))
    named = {paths[name] for name in settings.also_train}
    if is_tied(model) and named:
        named = {paths[EMBEDDING]}
    before = describe_adapter(directory).extra.get("add_tokens", [])
    is_same = trained.keys() == named and all(each.ids == ids for each in trained.values())
    if not is_same or before != list(recipe.model.add_tokens):
        raise UserError(
            f"model.add_tokens: must be {before}, with also_train and also_train_rows as in {directory}."
        )


def set_kept_scales_(model: PreTrainedModel, recipe: Recipe) -> None:
    for layer in adapted_layers(model).values():
        layer.keeps_scales = keeps_scales(recipe)


def keeps_scales(recipe: Recipe) -> bool:
    """Whether adapted layers keep decoded scales: `memory.keep_scales`, unless the base is streamed or divided."""
    return recipe.memory.keep_scales and recipe.base.residency == "device" and not recipe.train.divides_base


def write_adapter(
    model: PreTrainedModel,
    recipe: Recipe,
    directory: Path,
    *,
    shipped: bool = False,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the adapter of a run in PEFT's format; if `shipped`, a base that only this machine has is not named."""
    if recipe.model.add_tokens:
        extra = {"add_tokens": list(recipe.model.add_tokens), **(extra or {})}
    base, quant = recipe.base, dict[str, Any](quant=recipe.base.quant)
    if base.has_blocks:
        quant |= {"block_size": base.block_size, "double_quant": base.double_quant}
    if base.method == "gptq":
        quant |= {"method": base.method, "clip": base.clips}
    if base.prune is not None:
        quant["prune"] = settings(recipe)["base"]["prune"]
    save_adapter(
        model,
        directory,
        base_name_or_path=public_name(recipe.model.source) if shipped else recipe.model.source,
        revision=recipe.model.revision,
        base_quant=quant,
        extra=extra,
    )


def describe_adapters(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of adapted layers, of trainable parameters, and of base weights in adapted layers."""
    layers = adapted_layers(model)
    frozen = sum(layer.in_features * layer.out_features for layer in layers.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"num_layers": len(layers), "num_trainable": trainable, "num_adapted": frozen}


@torch.no_grad()
def nearest_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors L (out, rank), R (rank, in) of the matrix of at most `rank` nearest to `matrix` in the Frobenius norm.

    L = U sqrt(S), R = sqrt(S) V^T of the largest singular values; `matrix` (out, in) is float32 or float64. By the
    eigenvectors of the smaller Gram matrix: in float32 singular values below 1e-3 of the largest are inexact.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right = nearest_low_rank(matrix.T, rank)
        return right.T, left.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
    image = matrix.T @ vectors  # V S
    root = image.norm(dim=0).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    return vectors * root, (image * inverse).T


@torch.no_grad()
def start_from_error_(model: PreTrainedModel, source: ModelSource) -> None:
    """Set lora_A and lora_B of every adapted layer so that s B A is nearest to W - W_q, and m so that the gain is 1.

    Source: LoftQ, arXiv 2310.08659, algorithm 1 with one step. The paper quantises the base anew between the steps;
    here it stays as it is, so that the adapter can be used on it anywhere. One weight is read at a time.
    """
    empty = skeleton(load_config(source), source, model.dtype)
    stored, tied = tensors_of_source(source, empty), tied_weights(empty)
    for path, layer in adapted_layers(model).items():
        name = f"{path}.weight"
        weight = stored[name if name in stored else tied[name]].read()  # a tied head is stored as the embedding
        if not isinstance(weight, Tensor):
            raise UserError(f"adapter.init: loftq: {path} is quantised in the source.")
        base = layer.base.dequantized()
        error = weight.to(base.device).float() - base
        if layer.masked and (keep := layer.base.keep_mask()) is not None:
            error.masked_fill_(~keep, 0)
        parts = layer.approximated_parts(error / layer.scaling)
        pairs = zip(*(nearest_low_rank(part, layer.rank) for part in parts), strict=True)
        for parameter, factors in zip((layer.lora_B, layer.lora_A), pairs, strict=True):
            parameter.copy_(torch.stack(factors).view(parameter.shape))
        if layer.magnitude is not None:
            layer.magnitude.copy_(layer.row_norm())
