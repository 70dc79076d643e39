"""The model card of a run and of what is exported from it."""

from __future__ import annotations

from typing import Any

from qdora.config import Recipe
from qdora.environment import package_versions
from qdora.evaluation.against_base import worse_than_base
from qdora.model.card import CardFacts, Form, model_card
from qdora.record import RunDirectory
from qdora.verbs.evaluate import stored_results
from qdora.verbs.interference import interference_in_words
from qdora.verbs.selection import adapter_in_words


def run_card(
    run: RunDirectory, recipe: Recipe, state: str, check: dict[str, Any] | None = None, *, form: Form = "run"
) -> str:
    """README.md of a run or of an export.

    Args:
        run: For the name and the kept evaluations.
        recipe: Of the run.
        state: "final" or "step-N": which evaluation stands for the adapter.
        form: What the directory holds: the run, or one of the export formats.
        check: What the verification of an export returned.
    """
    adapter, base = recipe.adapter, recipe.base
    versions = package_versions(("torch", "transformers"))
    step = int(state.removeprefix("step-")) if state.startswith("step-") else None
    results = stored_results(run, step)
    tasks = list(results["adapter"].tasks) if "adapter" in results else []
    worse = worse_than_base(results["base"], results["adapter"]) if len(results) == 2 else []
    sizes = f", rank {adapter.rank}, alpha {adapter.alpha:g}" if adapter.kind in ("lora", "dora") else ""
    return model_card(
        CardFacts(
            base_name=recipe.model.source,
            base_revision=recipe.model.revision,
            title=run.path.resolve().name,
            form=form,
            method={
                "adapter": adapter.kind + sizes,
                "base": base.quant if base.quant in ("none", "int8") else f"{base.quant}, block size {base.block_size}",
                "learning rate": recipe.train.lr,
                "state": adapter_in_words(run) if state == "final" else state,
            },
            data=[source.label for source in recipe.data.mix],
            metric_names=[f"answer NLL, {label}" for label in results] if tasks else [],
            metrics={task: [result.tasks[task].nll_per_token for result in results.values()] for task in tasks},
            notes=[f"{each.in_words()}." for each in worse],
            verification=check,
            interference=interference_in_words(run),
            versions={name: version for name, version in versions.items() if version},
        )
    )
