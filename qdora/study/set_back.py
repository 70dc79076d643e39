"""A trained DoRA with its magnitudes set back: what they contribute, and how far directions and magnitudes moved."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdora.analysis.weight_changes import set_magnitude_back_, weight_changes
from qdora.data.build_data import run_examples
from qdora.evaluation.suite import evaluate
from qdora.files.atomic import atomic_write_json
from qdora.model.inject import adapted_layers
from qdora.model.model_size import model_size
from qdora.run.load_run import load_run

SCORES_FILE = "eval/set-back.json"


def evaluate_set_back(trained: Path, directory: Path) -> dict[str, Any]:
    """Evaluate the run `trained` with its magnitudes set back, on the examples of its own evaluation.

    The scores are written to `directory`. Returns sizes, files, and the changes of every layer before the
    magnitudes were set back.
    """
    run = load_run(trained)
    layers = adapted_layers(run.model)
    changes = {path: asdict(change) for path, change in weight_changes(layers).items()}
    for layer in layers.values():
        set_magnitude_back_(layer)
    asked = run.recipe.eval
    examples = run_examples(run.recipe, "validation", asked.tasks)
    scored = evaluate(run.model, run.tokenizer, examples, limit=asked.limit, block=asked.block, per_example=True)
    (directory / "eval").mkdir(parents=True, exist_ok=True)
    atomic_write_json(directory / SCORES_FILE, scored.to_dict(per_example=True))
    return {
        "size": asdict(model_size(run.model)),
        "files": {"scores": SCORES_FILE},
        "changes": changes,
    }
