"""A trained DoRA with its magnitudes set back: what the trained magnitudes contribute."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdora.analysis.weight_changes import set_magnitude_back_
from qdora.data.build_data import run_examples
from qdora.evaluation.suite import evaluate
from qdora.files.atomic import atomic_write_json
from qdora.model.inject import adapted_layers
from qdora.model.model_size import model_size
from qdora.run.load_run import load_run

SCORES_FILE = "eval/set-back.json"


def evaluate_set_back(trained: Path, directory: Path) -> dict[str, Any]:
    """Evaluate the run `trained` with its magnitudes set back, on the examples of its own evaluation.

    The scores are written to `directory`. Returns sizes and files.
    """
    run = load_run(trained)
    for layer in adapted_layers(run.model).values():
        set_magnitude_back_(layer)
    asked = run.recipe.eval
    examples = run_examples(run.recipe, "validation", asked.tasks)
    scored = evaluate(run.model, run.tokenizer, examples, limit=asked.limit, block=asked.block)
    (directory / "eval").mkdir(parents=True, exist_ok=True)
    atomic_write_json(directory / SCORES_FILE, scored.to_dict(per_example=True))
    return {"size": asdict(model_size(run.model)), "files": {"scores": SCORES_FILE}}
