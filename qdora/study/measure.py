"""What cells measure besides scores: damage of a base, an adapter by layer or with other magnitudes, guesses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from qdora.adapter.layer import AdaptedLinear
from qdora.data.sources import run_examples
from qdora.data.tokenize import encode_pairs
from qdora.evaluate.loglikelihood import score_examples
from qdora.evaluate.perplexity import hidden_state_errors, text_perplexity
from qdora.evaluate.suite import EvaluationResult, evaluate, spread
from qdora.files.atomic import atomic_write_json, read_json_object
from qdora.model.build_model import choose_compute, find_model
from qdora.model.inject import adapted_layers, block_of, model_size
from qdora.model.load import load_config
from qdora.rank.changes import error_undone, full_weight_changes, set_magnitude_back_, weight_changes
from qdora.recipe.settings import BaseWeightsConfig, Recipe
from qdora.run.base import load_base
from qdora.run.load_run import TrainedRun, load_run

TEXTS_OF_TASK = 25
"""Examples of each evaluated task whose prompts with their answers are the texts."""


def base_damage(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """perplexity: of prompts with answers, all tokens. hidden_errors: of each block against the uncompressed
    base; hidden_error is the last one. Not of chats."""
    base = load_run(directory)
    examples = run_examples(recipe, "validation", recipe.eval.tasks)
    chosen = [each for found in examples.values() for each in spread(found, TEXTS_OF_TASK)]
    texts = [each.prompt + each.answer for each in chosen if not each.messages]
    if not texts:
        return {}
    measured: dict[str, Any] = {"perplexity": text_perplexity(base.model, base.tokenizer, texts).perplexity}
    reference = uncompressed_base(recipe)
    if reference is None:
        return measured
    ids = [encoded for encoded, _ in encode_pairs(base.tokenizer, [("", text) for text in texts])]
    errors = hidden_state_errors(base.model, reference, ids)
    return measured | {"hidden_errors": errors, "hidden_error": errors[-1]}


def uncompressed_base(recipe: Recipe) -> PreTrainedModel | None:
    """The base of a recipe before it is quantised or pruned; None if the recipe does neither."""
    if recipe.base.quant == "none" and recipe.base.prune is None:
        return None
    dense = recipe.model_copy(update={"base": BaseWeightsConfig(quant="none")})
    return load_base(dense, find_model(dense)[0], choose_compute(dense.model.dtype))


def evaluate_magnitudes(source: Path, directory: Path, *, rescaled: bool) -> dict[str, Any]:
    """Evaluate the run `source` with its magnitudes `rescaled` or set back; the scores are written to `directory`."""
    run = load_run(source)
    layers = adapted_layers(run.model)
    if rescaled:
        rescale_(layers, run.recipe)
    else:
        for layer in layers.values():
            set_magnitude_back_(layer)
    (directory / "eval").mkdir(parents=True, exist_ok=True)
    atomic_write_json(directory / "eval/set-back.json", _own_evaluation(run).to_dict(per_example=True))
    return {"size": model_size(run.model), "files": {"scores": "eval/set-back.json"}}


def _own_evaluation(run: TrainedRun) -> EvaluationResult:
    asked = run.recipe.eval
    examples = run_examples(run.recipe, "validation", asked.tasks)
    return evaluate(run.model, run.tokenizer, examples, limit=asked.limit, block=asked.block)


@torch.no_grad()
def rescale_(layers: Mapping[str, AdaptedLinear], recipe: Recipe) -> None:
    """Multiply each magnitude by ||w|| / ||w'||, w a row of the compressed base and w' of the uncompressed one."""
    reference = uncompressed_base(recipe)
    assert reference is not None, "the base is not compressed"
    for path, layer in layers.items():
        assert layer.magnitude is not None, "only DoRA has magnitudes"
        before = reference.get_submodule(path).weight.float().norm(dim=-1)
        layer.magnitude.mul_((layer.base.squared_row_norm().sqrt() / before).view_as(layer.magnitude))


EXAMPLES_OF_TASK = 15
"""Examples of each evaluated task that the loss without a block's adapter is measured on."""


def measure_by_layer(trained: Path) -> dict[str, Any]:
    """changes: path of a layer -> columns of `WeightChange` and, of a compressed base, `ErrorUndone`.

    blocks: the rise of the NLL per answer token without the adapter of each; nll: with all adapters.
    """
    run = load_run(trained)
    layers = adapted_layers(run.model)
    changes: dict[str, dict[str, Any]] = {path: asdict(change) for path, change in weight_changes(layers).items()}
    for path, found in _errors_undone(run.recipe, layers):
        changes[path] |= found
    asked = run.recipe.eval
    examples = [
        replace(each, choices=(), gold=None)  # only the answer is scored
        for found in run_examples(run.recipe, "validation", asked.tasks).values()
        for each in spread(found, EXAMPLES_OF_TASK, asked.block)
    ]

    def nll() -> float:
        scores = score_examples(run.model, run.tokenizer, examples)
        return sum(each.nll for each in scores) / sum(each.num_answer_tokens for each in scores)

    whole, blocks = nll(), []
    for block in sorted({block for path in layers if (block := block_of(path)) is not None}):
        with without_adapter([layer for path, layer in layers.items() if block_of(path) == block]):
            blocks.append({"block": block, "rise": nll() - whole})
    return {"size": model_size(run.model), "changes": changes, "blocks": blocks, "nll": whole}


def measure_checkpoints(trained: Path, steps: Sequence[int]) -> dict[str, Any]:
    """checkpoints: of each step the NLL per token of the run's own evaluation; path of a layer -> `WeightChange`."""
    found: list[dict[str, Any]] = []
    for step in steps:
        run = load_run(trained, step=step)
        changes = weight_changes(adapted_layers(run.model)) or full_weight_changes(
            load_run(trained, base_only=True).model, run.model
        )
        scored = _own_evaluation(run).per_example
        nll = sum(row["nll"] for row in scored) / sum(row["num_answer_tokens"] for row in scored)
        told = {path: asdict(change) for path, change in changes.items() if block_of(path) is not None}
        found.append({"step": step, "nll": nll, "changes": told})
    return {"size": model_size(run.model), "checkpoints": found}


@contextmanager
@torch.no_grad()
def without_adapter(layers: Sequence[AdaptedLinear]) -> Iterator[None]:
    """While the block runs, these layers are their bases: B is zero, and magnitudes are the row norms of the base."""
    kept = []
    for layer in layers:
        kept.append((layer.lora_B.clone(), None if layer.magnitude is None else layer.magnitude.clone()))
        layer.lora_B.zero_()
        if layer.magnitude is not None:
            set_magnitude_back_(layer)
        layer.parameters_changed()
    try:
        yield
    finally:
        for layer, (lora_B, magnitude) in zip(layers, kept, strict=True):
            layer.lora_B.copy_(lora_B)
            if layer.magnitude is not None and magnitude is not None:
                layer.magnitude.copy_(magnitude)
            layer.parameters_changed()


@torch.no_grad()
def _errors_undone(recipe: Recipe, layers: Mapping[str, AdaptedLinear]) -> Iterator[tuple[str, dict[str, float]]]:
    reference = uncompressed_base(recipe)
    if reference is None:
        return
    for path, layer in layers.items():
        base = layer.base.dequantized(torch.float32)
        error = base - reference.get_submodule(path).weight.float()
        update = layer.merged_weight(torch.float32) - base
        # (parts, rows, columns): what a product of the rank approximates, such as each expert of a stack
        of_update, of_error = (torch.stack(layer.approximated_parts(each)) for each in (update, error))
        found = error_undone(of_update, of_error, layer.rank)
        if found is not None:
            yield path, {f"error_{name}": value for name, value in asdict(found).items()}


GUESSES_FILE = "guesses.json"
MOST_OF_TASK = 2000
"""Training examples of each task whose answers are counted."""
UNIFORM_SHARE = 0.01
"""Part of the unigram model that is uniform, for tokens that no training answer has."""


def write_guesses(recipe: Recipe, directory: Path) -> None:
    """Write what uniform and unigram models reach to `directory`, nats a token of the evaluated answers."""
    source, tokenizer = find_model(recipe, weights=False)
    num_vocabulary = load_config(source).get_text_config().vocab_size
    found = {"uniform": math.log(num_vocabulary)}

    def answer_tokens(split: str, most: int | None) -> list[int]:
        examples = run_examples(recipe, split, recipe.eval.tasks)
        chosen = [each for own in examples.values() for each in spread(own, most) if not each.messages]
        encoded = encode_pairs(tokenizer, [(each.prompt, each.answer) for each in chosen])
        return [token for ids, start in encoded for token in ids[start:]]

    if not any(each.stream for each in recipe.data.mix):
        counted, scored = answer_tokens("train", MOST_OF_TASK), answer_tokens("validation", recipe.eval.limit)
        if counted and scored:
            found["unigram"] = unigram_nll(counted, scored, num_vocabulary)
    atomic_write_json(directory / GUESSES_FILE, found)


def read_guesses(directory: Path) -> dict[str, float]:
    return read_json_object(directory / GUESSES_FILE) if (directory / GUESSES_FILE).is_file() else {}


def unigram_nll(counted: Sequence[int], scored: Sequence[int], num_vocabulary: int) -> float:
    """Mean of -ln p over the scored tokens, nats.

    p = (1 - u) count / tokens counted + u / vocabulary,        u = UNIFORM_SHARE
    """
    counts = np.bincount(np.asarray(counted), minlength=num_vocabulary)
    shares = (1 - UNIFORM_SHARE) * counts / len(counted) + UNIFORM_SHARE / num_vocabulary
    return float(-np.log(shares[np.asarray(scored)]).mean())
