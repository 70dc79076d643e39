"""qdora rank: a rank for each layer of a run, from its curvature, trained update or gates, as a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from qdora.data.batches import Step
from qdora.data.sources import make_loader, read_data, tokenized_mix
from qdora.errors import UserError, refuse
from qdora.files.atomic import atomic_write_text
from qdora.files.console import bar, consoles
from qdora.files.run_directory import RunDirectory, open_run
from qdora.memory.oom import keep_freed_memory
from qdora.model.adapter_file import describe_adapter
from qdora.model.inject import adapted_layers, check_matches, matches, most_rank
from qdora.rank.allocate import allocate
from qdora.rank.components import drawn_curvatures, exact_curvatures, layer_directions, update_spectrum
from qdora.rank.curvature import Norm, layer_spectrum
from qdora.recipe.options import RankSettings
from qdora.recipe.recipe_file import recipe_from, recipe_of_run, resolved_yaml, settings
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.run.load_run import TrainedRun, adapter_of, load_run, trained_state


def rank_run(
    path: Path, asked: RankSettings, *, step: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Measure each layer's spectrum in float32 on the dequantised base, choose the ranks, write them as a recipe.

    The run, or its checkpoint `step`, does not change. Returns the content of <run>/rank/<method>.json.
    """
    progress, results = consoles(console)
    keep_freed_memory()
    run = open_run(path)
    recipe = recipe_of_run(path)
    refuse(rank_faults(path, recipe, asked))
    if asked.method == "gates":
        document = ranks_of_gates(run, recipe, step)
    else:
        document = _measured_ranks(load_run(path, step=step, widened=True), recipe, asked, progress)
    run.write_json(f"rank/{asked.method}.json", document)
    _show(results, document)
    return document


def rank_faults(path: Path, recipe: Recipe, asked: RankSettings) -> list[str]:
    """Why no ranks can be chosen for a run with this recipe; empty if they can."""
    adapter = recipe.adapter
    if adapter.kind not in ("dora", "lora"):
        return [f"{path}: adapter.kind: got {adapter.kind}, which has no ranks, must be dora or lora."]
    faults = []
    if asked.method == "gates":
        if adapter.gates is None:
            faults.append("has no gates. Fix: name a run with adapter.gates, or use another --method.")
        elif adapter.has_own_ranks and not adapter.same_scaling:
            # Each layer keeps the alpha / rank that it started with, but a recipe has one alpha.
            own = "adapter.rank_pattern" if adapter.rank_pattern else "adapter.experts.rank"
            faults.append(f"{own} without adapter.same_scaling: no recipe has the layers' different scalings.")
    elif adapter.resume_from is not None:
        faults.append("its ranks come from adapter.resume_from, not from its recipe.")
    if adapter.mask == "keep" and asked.method == "svd":
        faults.append("--method svd: with adapter.mask keep the rank of the update is not that of B A.")
    return [f"{path}: {fault}" for fault in faults]


def _measured_ranks(
    trained: TrainedRun, recipe: Recipe, asked: RankSettings, progress: Console
) -> dict[str, Any]:
    adapted = adapted_layers(trained.model)
    check_matches("--layers", asked.layers, adapted, "adapted")
    layers = {
        name: layer
        for name, layer in adapted.items()
        if not asked.layers or any(matches(name, each) for each in asked.layers)
    }
    ranks_now = {name: layer.rank for name, layer in adapted.items()}
    budget = _budget(asked, sum(layer.rank * layer.parameters_per_rank for layer in layers.values()))
    most = asked.max_rank or 2 * max(ranks_now.values())
    limits = {name: min(most, most_rank(layer)) for name, layer in layers.items()}
    norm: Norm = asked.norm if recipe.adapter.kind == "dora" else "none"
    details: dict[str, dict[str, Any]] = {name: {} for name in layers}
    if asked.method == "svd":
        spectra = {name: update_spectrum(layer, limits[name]) for name, layer in layers.items()}
        about: dict[str, Any] = {}
    else:
        taken, draws, model = training_step(trained, asked), asked.draws, trained.model
        batches = taken.micro_batches
        about = {"num_examples": taken.num_examples, "num_label_tokens": taken.num_label_tokens}
        about |= {"norm": norm, "draws": draws}
        with bar(progress, "directions of new components") as done:
            found = layer_directions(model, limits, batches, norm=norm, progress=done)
        with bar(progress, f"their curvature, {draws} draws" if draws else "their curvature, exact") as done:
            measured = partial(drawn_curvatures, draws=draws) if draws else exact_curvatures
            components = measured(model, found, batches, norm=norm, progress=done)
        spectra = {}
        for name, each in components.items():
            spectra[name] = each.spectrum(limits[name], layers[name].parameters_per_rank)
            details[name]["components"] = each.to_dict()
            if asked.eigenvalues:
                progress.print(f"eigenvalues of the {asked.curvature}: {name}")
                details[name]["spectrum"] = layer_spectrum(
                    model, name, batches, asked.eigenvalues, curvature=asked.curvature, norm=norm
                )
    ranks = allocate(spectra, budget)
    return {
        "run": str(trained.run.path),
        "state": trained.state,
        "method": asked.method,
        **about,
        "budget": budget,
        "num_parameters": sum(rank * spectra[name].cost for name, rank in ranks.items()),
        "num_parameters_of_run": sum(ranks_now[name] * spectra[name].cost for name in ranks),
        "layers": {
            name: {
                "rank": ranks[name],
                "rank_of_run": ranks_now[name],
                "parameters_per_rank": spectrum.cost,
                "energies": spectrum.energies.tolist(),
                **details[name],
            }
            for name, spectrum in spectra.items()
        },
        **write_recipe(trained.run, recipe, asked.method, {**ranks_now, **ranks}),
    }


def training_step(trained: TrainedRun, asked: RankSettings) -> Step:
    """The first examples of the run's training mix in micro-batches."""
    train, _ = read_data(trained.recipe.data)
    mix = tokenized_mix(trained.recipe, trained.tokenizer, train)
    one = {"batch": asked.examples, "tokens_per_step": None, "micro_batch_tokens": asked.micro_batch_tokens}
    recipe = with_settings(trained.recipe, data={"packing": False}, train=one)
    return make_loader(recipe, mix, trained.tokenizer).next_step()


def _budget(asked: RankSettings, own: int) -> int:
    text = asked.budget or "100%"
    try:
        budget = int(own * float(text[:-1]) / 100) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):  # of inf%
        budget = 0
    if budget < 1:
        raise UserError(
            f"--budget: got {text!r}, must be a number of parameters or a share of the run's {own:,}."
        )
    return budget


def ranks_of_gates(run: RunDirectory, recipe: Recipe, step: int | None) -> dict[str, Any]:
    """The ranks that the gates of a run chose, read from its adapter without the model; writes a recipe.
    "removed_after" has for each component of the start the steps after which it was removed, or null."""
    assert recipe.adapter.gates is not None
    trained, state = trained_state(run, recipe, step)
    extra = describe_adapter(adapter_of(run, trained)).extra or {}
    layers = extra["gates"]
    ranks = {name: each["removed_after"].count(None) for name, each in layers.items()}
    cost = {name: each["parameters_per_rank"] for name, each in layers.items()}
    starts = {name: len(each["removed_after"]) for name, each in layers.items()}
    return {
        "run": str(run.path),
        "state": state,
        "method": "gates",
        "mode": recipe.adapter.gates.mode,
        "num_parameters": sum(rank * cost[name] for name, rank in ranks.items()),
        "num_parameters_of_run": sum(rank * cost[name] for name, rank in starts.items()),
        "layers": {
            name: {"rank": ranks[name], "rank_of_run": starts[name], **each} for name, each in layers.items()
        },
        **write_recipe(run, recipe, "gates", ranks),
    }


def write_recipe(run: RunDirectory, recipe: Recipe, method: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Write rank/<method>.yaml: the run's recipe with these ranks, without gates. Returns "fragment", a value of an
    axis of a study, and "recipe", the file's path."""
    usual = None if recipe.adapter.experts.rank else recipe.adapter.rank
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    plain = settings(recipe)
    fragment: dict[str, Any] = {"rank": recipe.adapter.rank, "rank_pattern": pattern}
    if pattern:  # else alpha / rank would be 16 times as large at rank 1 as at rank 16
        fragment["same_scaling"] = recipe.adapter.same_scaling if recipe.adapter.has_own_ranks else True
    kept = {key: value for key, value in plain["adapter"].items() if key not in ("same_scaling", "gates")}
    plain["adapter"] = kept | fragment
    folder = run.inside("rank")
    folder.mkdir(exist_ok=True)
    out = folder / f"{method}.yaml"
    atomic_write_text(out, resolved_yaml(recipe_from(plain)))
    return {"fragment": {f"adapter.{key}": value for key, value in fragment.items()}, "recipe": str(out)}


def _show(console: Console, document: Mapping[str, Any]) -> None:
    title = f"{document['method']}: {document['num_parameters']:,} parameters in the factors, before "
    columns = "layer", Column("rank", justify="right"), Column("before", justify="right")
    table = Table(*columns, title=f"{title}{document['num_parameters_of_run']:,}", title_justify="left")
    for name, layer in document["layers"].items():
        table.add_row(name, str(layer["rank"]), str(layer["rank_of_run"]))
    console.print(table)
    console.print(f"To train with these ranks: qdora train {document['recipe']}", soft_wrap=True)
