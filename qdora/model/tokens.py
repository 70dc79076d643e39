"""New tokens in a model, and the training of its input embedding and output head: whole, or the rows of some tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.rows import RowEmbedding, RowHead, TrainedRows
from qdora.errors import UserError
from qdora.model.checkpoint import tied_weights
from qdora.model.inject import HEAD, replace_module
from qdora.model.load import load_config, published_generation
from qdora.model.source import ModelSource

EMBEDDING = "embed_tokens"
"""Stands for the input embedding, under any name, as `HEAD` does for the output head."""

_MEAN_ROWS = 4096  # rows widened to float32 at a time
_UNTRAINED = 1e-16
"""Largest number of a row that the base never trained. Source: unsloth."""


@dataclass(frozen=True, eq=False)
class TrainedMatrix:
    """The trained values of an embedding or a head: the rows `ids`, ascending, or with None the whole matrix."""

    values: Tensor
    ids: tuple[int, ...] | None


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer; they get the next ids in the order of `tokens`.

    They are not special: decoded text keeps them. Text is never split inside them.
    """
    if not tokens:
        return
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary:
            raise UserError(
                f"model.add_tokens: {token!r} is token {vocabulary[token]} of this tokenizer already."
            )
    first = max(vocabulary.values()) + 1
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    if list(new_token_ids(tokenizer, tokens)) != list(range(first, first + len(tokens))):
        raise UserError("model.add_tokens: this tokenizer does not number new tokens one after the other.")


def new_token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


@torch.no_grad()
def extend_vocabulary(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Give new tokens rows in the embedding and in the head, which start at the mean of the rows of all older tokens.

    Rows that no token has yet are used first, and start anew, too. `ids` follow those of all other tokens.
    """
    if not ids:
        return
    embedding, head = _modules(model)
    check_trainable(model, embedding_paths(model)[1:], "model.add_tokens")
    if hasattr(model.config.get_text_config(), "vocab_size_per_layer_input"):
        raise UserError("model.add_tokens: the model has a table of the vocabulary in each layer.")
    older = ids[0]
    for module in (embedding,) if is_tied(model) else (embedding, head):
        weight = module.weight
        if older > len(weight):
            raise UserError(
                f"model.add_tokens: the tokenizer has {older} tokens and the model {len(weight)} rows."
            )
        known = weight[:older]
        total = torch.stack([part.float().sum(0) for part in known.split(_MEAN_ROWS)]).sum(0)
        new = (total / older).to(weight.dtype).expand(len(ids), -1)
        longer = torch.cat([known, new, weight[older + len(ids) :]])
        module.weight = nn.Parameter(longer, requires_grad=weight.requires_grad)
        setattr(module, "out_features" if isinstance(module, nn.Linear) else "num_embeddings", len(longer))
    if is_tied(model):
        head.weight, head.out_features = embedding.weight, len(embedding.weight)
    size = len(head.weight)
    for owner in (model.config, model.config.get_text_config(), model):
        if hasattr(owner, "vocab_size"):
            owner.vocab_size = size


def train_embeddings(
    model: PreTrainedModel, names: Sequence[str], ids: Sequence[int] | None, *, has_new: bool = False
) -> None:
    """Make the embedding, the head or both trainable, after the adapters are on.

    `names` are `EMBEDDING`, `HEAD` or both; a tied head is trained with the embedding. `ids` are the rows to train
    (None: all). `has_new`: the model has new tokens, and `ids` are those.
    """
    embedding_path, head_path = embedding_paths(model)
    needed = {EMBEDDING} if is_tied(model) else {EMBEDDING, HEAD} if ids is not None or has_new else set()
    if not needed <= set(names):  # the rows of new tokens would stay at their start
        raise UserError(f"adapter.also_train: must have {' and '.join(sorted(needed))} for this model.")
    paths = [{EMBEDDING: embedding_path, HEAD: head_path}[name] for name in names]
    check_trainable(model, [*paths, head_path] if is_tied(model) else paths)
    wanted = None if ids is None else tuple(sorted(ids))
    matrices = {}
    for path in paths:
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        matrices[path] = TrainedMatrix(weight if wanted is None else weight[list(wanted)].float(), wanted)
    put_trained(model, matrices)


def put_trained(model: nn.Module, matrices: Mapping[str, TrainedMatrix]) -> None:
    """Train the matrices at these paths, from these values; of a tied pair one is enough."""
    paths, shared = embedding_paths(model), dict[TrainedMatrix, TrainedRows]()
    if is_tied(model) and matrices:
        matrices = dict.fromkeys(paths, next(iter(matrices.values())))
    for path, matrix in matrices.items():
        module: Any = model.get_submodule(path)
        if matrix.ids is None:
            if matrix.values is not module.weight:
                # Not in place: it may be of a file
                module.weight.data = matrix.values.to(module.weight, copy=True)
            module.weight.requires_grad_(True)
            continue
        if matrix not in shared:
            values = matrix.values.detach().to(module.weight.device, torch.float32, copy=True)
            shared[matrix] = TrainedRows(matrix.ids, values)
        made = RowHead if path == paths[1] else RowEmbedding
        replace_module(model, path, made(module, shared[matrix]))


def trained_matrices(model: nn.Module) -> dict[str, TrainedMatrix]:
    """Path -> trained embedding or head, in this order; a tied head is not listed."""
    found: dict[str, TrainedMatrix] = {}
    if not hasattr(model, "get_input_embeddings"):
        return found
    for path, module in zip(embedding_paths(model), _modules(model), strict=True):
        is_rows = isinstance(module, RowEmbedding | RowHead)
        parameter: Any = module.trained.rows if is_rows else getattr(module, "weight", None)
        is_trained = isinstance(parameter, nn.Parameter) and parameter.requires_grad
        if is_trained and all(each.values is not parameter for each in found.values()):
            found[path] = TrainedMatrix(parameter, tuple(module.trained.ids.tolist()) if is_rows else None)
    return found


def trained_parameters(model: nn.Module) -> list[str]:
    matrices = trained_matrices(model).items()
    return [f"{path}.{'weight' if matrix.ids is None else 'trained.rows'}" for path, matrix in matrices]


@torch.no_grad()
def untrained_rows(model: nn.Module, read: Sequence[int], learnt: Sequence[int]) -> list[int]:
    """Tokens whose rows are zero and not trained; `read` are of the embedding, `learnt` of the head."""
    found: set[int] = set()
    for module, ids in zip(_modules(model), (read, learnt), strict=True):
        plain: Any = module.base if isinstance(module, RowEmbedding | RowHead) else module
        if not (isinstance(plain, nn.Embedding) or type(plain) is nn.Linear) or plain.weight.requires_grad:
            continue
        for some in torch.split(torch.tensor(ids, dtype=torch.long, device=plain.weight.device), _MEAN_ROWS):
            found.update(some[plain.weight[some].abs().amax(1) <= _UNTRAINED].tolist())
    return sorted(found)


def check_trainable(model: nn.Module, paths: Sequence[str], where: str = "adapter.also_train") -> None:
    """Refuse an embedding or a head at one of these paths that cannot be trained."""
    (embedding_path, head_path), (embedding, head) = embedding_paths(model), _modules(model)
    if (
        embedding_path in paths
        and type(embedding) is not nn.Embedding
        and not hasattr(embedding, "embed_scale")
    ):
        raise UserError(f"{where}: the embedding is a {type(embedding).__name__}.")
    if head_path in paths and (type(head) is not nn.Linear or head.bias is not None):
        raise UserError(
            f"{where}: the head must be dense, without bias and adapter (got {type(head).__name__})."
        )


def is_tied(model: nn.Module) -> bool:
    names = {f"{path}.weight" for path in embedding_paths(model)}
    return any({target, origin} == names for target, origin in tied_weights(model).items())


def embedding_paths(model: Any) -> tuple[str, str]:
    """Paths of the input embedding and of the output head ("" for a model without one)."""
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = _modules(model)
    return paths.get(id(embedding), ""), paths.get(id(head), "")


def _modules(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def stop_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens at which the model ends an answer: of its generation config, else its config, and the tokenizer's end."""
    config: Any = published_generation(source)
    if config is None:
        config = load_config(source)
        if getattr(config, "eos_token_id", None) is None:  # multimodal models keep it with their text model
            config = config.get_text_config()
    return _stops(config, tokenizer)


def stop_ids_of_model(model: Any, tokenizer: Any) -> frozenset[int]:
    return _stops(getattr(model, "generation_config", None), tokenizer)


def _stops(config: Any, tokenizer: Any) -> frozenset[int]:
    named = getattr(config, "eos_token_id", None)
    listed = named if isinstance(named, list | tuple) else [named]
    return frozenset(int(id) for id in (*listed, tokenizer.eos_token_id) if id is not None)
