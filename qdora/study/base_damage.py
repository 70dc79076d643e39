"""What compression did to a base, told without training: perplexity of texts, and errors of the hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qdora.data.build_data import run_examples
from qdora.data.tokenize import encode_pairs
from qdora.evaluate.hidden_states import hidden_state_errors
from qdora.evaluate.perplexity import text_perplexity
from qdora.evaluate.suite import spread
from qdora.model.build_model import choose_compute, find_model
from qdora.recipe.settings import BaseWeightsConfig, Recipe
from qdora.run.base import load_base
from qdora.run.load_run import load_run

TEXTS_OF_TASK = 25
"""Examples of each evaluated task whose prompts with their answers are the texts."""


def base_damage(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Measures of the base of a run without an adapter, as JSON values.

    perplexity: Of prompts with their right answers, all tokens. hidden_errors: Of each block against the uncompressed
    base, which is loaded beside it; hidden_error is the last one. Not for the uncompressed base itself, and neither of
    chats.

    Args:
        recipe: Of the run, with adapter.kind none.
        directory: The run, which is finished.
    """
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
