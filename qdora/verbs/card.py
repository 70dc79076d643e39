"""The model card of a run and of what is exported from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qdora.config import Recipe
from qdora.data.hub import HUB_TASKS
from qdora.data_config import SourceConfig, is_path
from qdora.environment import package_versions
from qdora.errors import UserError
from qdora.evaluation.against_base import worse_than_base
from qdora.model.card import CardFacts, Form, model_card
from qdora.model.licence import licence_files, licence_of
from qdora.model.source import BUILTIN, BUILTIN_HUB_ID, ModelSource, public_name
from qdora.record import RunDirectory
from qdora.sizes import size_text
from qdora.verbs.assemble import find_source
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
    source = _source(recipe)
    ids = [_data_id(each) for each in recipe.data.mix]
    seen = _seen(run)
    step = int(state.removeprefix("step-")) if state.startswith("step-") else None
    results = stored_results(run, step)
    tasks = list(results["adapter"].tasks) if "adapter" in results else []
    worse = worse_than_base(results["base"], results["adapter"]) if len(results) == 2 else []
    sizes = f", rank {adapter.rank}, alpha {adapter.alpha:g}" if adapter.kind in ("lora", "dora") else ""
    return model_card(
        CardFacts(
            base_name=base_name(recipe),
            base_revision=recipe.model.revision if source is None else source.revision,
            title=run.path.resolve().name,
            form=form,
            licence=None if source is None else licence_of(source),
            licence_files=() if source is None or form == "run" else list(licence_files(source)),
            method={
                "adapter": adapter.kind + sizes,
                "base": base.quant if base.quant in ("none", "int8") else f"{base.quant}, block size {base.block_size}",
                "learning rate": recipe.train.lr,
                "state": adapter_in_words(run) if state == "final" else state,
                **_planned(run),
            },
            data=[_data(each, id_) + seen.get(each.label, "") for each, id_ in zip(recipe.data.mix, ids, strict=True)],
            data_ids=[id_ for id_ in ids if id_ is not None],
            metric_names=[f"answer NLL, {label}" for label in results] if tasks else [],
            metrics={task: [result.tasks[task].nll_per_token for result in results.values()] for task in tasks},
            notes=[f"{each.in_words()}." for each in worse],
            verification=check,
            interference=interference_in_words(run),
            versions={name: version for name, version in versions.items() if version},
        )
    )


def card_files(
    run: RunDirectory, recipe: Recipe, state: str, check: dict[str, Any] | None = None, *, form: Form
) -> dict[str, str]:
    """Name -> text of the card of an export and of the licence files of its base."""
    source = _source(recipe)
    files = {} if source is None else licence_files(source)
    return files | {"README.md": run_card(run, recipe, state, check, form=form)}


def base_name(recipe: Recipe) -> str:
    """The base as strangers know it: its Hub id, or the last part of its path here."""
    source = recipe.model.source
    if source == BUILTIN:
        return BUILTIN_HUB_ID
    return public_name(source) or Path(source).name


def _source(recipe: Recipe) -> ModelSource | None:
    try:
        return find_source(recipe, weights=False)
    except UserError:  # moved, or not to be reached: the card says less
        return None


def _data_id(source: SourceConfig) -> str | None:
    if source.task in HUB_TASKS:
        return HUB_TASKS[source.task].id
    return None if source.source is None or is_path(source.source) else source.source


def _data(source: SourceConfig, id_: str | None) -> str:
    return source.label if id_ is None else f"{source.label}: [{id_}](https://huggingface.co/datasets/{id_})"


def _planned(run: RunDirectory) -> dict[str, str]:
    """Of the run's plans: its steps, and its peak of memory where it was planned."""
    mix, plan = _read(run, "mix.json"), _read(run, "plan.json")
    found = {"steps": f"{mix['num_steps']:,}, {mix['num_draws']:,} examples"} if mix else {}
    if plan:
        found["planned peak"] = f"{size_text(plan['peak_bytes'])} on {plan['device']}"
    return found


def _seen(run: RunDirectory) -> dict[str, str]:
    """Source -> how much of it the run has seen."""
    return {
        each["name"]: f" ({each['num_draws']:,} examples, {each['share_seen']:.1%} of all)"
        for each in (_read(run, "mix.json") or {}).get("sources", ())
    }


def _read(run: RunDirectory, name: str) -> dict[str, Any] | None:
    file = run.inside(name)
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
