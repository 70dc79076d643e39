"""qdora rank: a rank for each layer of a run, from its curvature, gradient, trained update or gates, as a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.data.batches import Batching, MicroBatch, StepLoader
from qdora.data.sources import read_data, tokenized_mix
from qdora.errors import UserError
from qdora.files.atomic import atomic_write_text
from qdora.files.console import bar, consoles
from qdora.files.run_directory import RunDirectory, open_run
from qdora.memory.oom import keep_freed_memory
from qdora.model.adapter_file import describe_adapter
from qdora.model.inject import adapted_layers, matches, most_rank, unmatched
from qdora.rank.allocate import LayerSpectrum, allocate, effective_rank
from qdora.rank.components import drawn_curvatures, exact_curvatures, layer_directions
from qdora.rank.curvature import layer_spectrum
from qdora.rank.differentiable import Norm
from qdora.rank.rank_figures import draw_rank_map, draw_spectra
from qdora.rank.update_gradient import gradient_spectra, update_spectrum
from qdora.recipe.options import RankSettings
from qdora.recipe.recipe_file import recipe_from, recipe_of_run, resolved_yaml, settings
from qdora.recipe.settings import Recipe
from qdora.run.load_run import TrainedRun, adapter_of, load_run, trained_state

THRESHOLD = 0.9
"""Share of the energy for the effective ranks that are shown."""

_ENERGY_IN_WORDS = {
    "curvature": "worth in nats",
    "svd": "squared singular value of the update",
    "gradient": "squared singular value of the gradient",
}

Spectra = dict[str, LayerSpectrum]
Details = dict[str, dict[str, Any]]
"""Layer -> JSON values about it; under "" those about all layers."""


def rank_run(
    path: Path, asked: RankSettings, *, step: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Measure each layer's spectrum, choose the ranks, write them as a recipe.

    Everything is computed in float32 on the dequantised base, whatever dtype the run used. The run itself does not
    change: results go to <run>/rank/.

    Args:
        path: Run directory with an adapter.
        asked: How to choose.
        step: Checkpoint of the run; None: the finished adapter.
        console: For progress and ranks; default: standard error and standard output.
    Returns:
        JSON values, as in <run>/rank/<method>.json.
    Raises:
        UserError: Wrong arguments, or a run without low-rank adapters.
    """
    progress, results = consoles(console)
    keep_freed_memory()
    run = open_run(path)
    recipe = recipe_of_run(run.recipe_file)
    faults = rank_faults(path, recipe, asked)
    if faults:
        raise UserError(*faults)
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
    if asked.method == "gates" and adapter.gates is None:
        faults.append(f"{path}: has no gates. Fix: name a run with adapter.gates, or use another --method.")
    elif asked.method == "gates" and adapter.has_own_ranks and not adapter.same_scaling:
        # Each layer keeps the alpha / rank that it started with, but a recipe has one alpha.
        own = "adapter.rank_pattern" if adapter.rank_pattern else "adapter.experts.rank"
        faults.append(
            f"{path}: {own} without adapter.same_scaling: the layers started with different scalings, "
            "which a recipe of the new ranks cannot express. Fix: name a run with adapter.same_scaling: true."
        )
    if asked.method != "gates" and adapter.resume_from is not None:
        faults.append(
            f"{path}: its ranks come from adapter.resume_from, not from its recipe. "
            "Fix: name a run without adapter.resume_from."
        )
    if asked.has("norm") and adapter.kind == "lora":
        faults.append("--norm: is not used with LoRA, which has no norm. Fix: remove --norm.")
    if adapter.mask == "keep" and asked.method == "svd":
        faults.append(
            f"{path}: --method svd: with adapter.mask keep the rank of the update is not that of B A, so its singular "
            "values say nothing about ranks. Fix: use --method curvature or gradient."
        )
    return faults


def _measured_ranks(trained: TrainedRun, recipe: Recipe, asked: RankSettings, progress: Console) -> dict[str, Any]:
    """Ranks from the spectra of the layers, as the document of <run>/rank/<method>.json; writes recipe and figures."""
    adapted = adapted_layers(trained.model)
    layers = _chosen(adapted, asked.layers)
    ranks_now = {name: layer.rank for name, layer in adapted.items()}
    budget = _budget(asked, layers)
    measured = _Measured(
        trained=trained,
        asked=asked,
        layers=layers,
        most=asked.max_rank or 2 * max(ranks_now.values()),
        norm=asked.norm if recipe.adapter.kind == "dora" else "none",
        progress=progress,
    )
    spectra, details = _MEASURE[asked.method](measured)
    threshold = asked.threshold or THRESHOLD
    effective = {name: effective_rank(spectrum, threshold) for name, spectrum in spectra.items()}
    if asked.threshold is None:
        ranks = allocate(spectra, budget)
    else:
        ranks = {name: rank or len(spectra[name].energies) for name, rank in effective.items()}
    written = write_recipe(trained.run, recipe, asked.method, {**ranks_now, **ranks})
    figures = [trained.run.inside("rank") / f"{asked.method}-{kind}.svg" for kind in ("spectra", "ranks")]
    energies = {name: spectrum.energies for name, spectrum in spectra.items()}
    draw_spectra(energies, figures[0], measure=_ENERGY_IN_WORDS[asked.method], ranks=ranks)
    draw_rank_map({**ranks_now, **ranks}, figures[1])
    if asked.eigenvalues:
        figures.append(trained.run.inside("rank") / f"{asked.method}-eigenvalues.svg")
        values = {name: np.array(details[name]["spectrum"]["eigenvalues"]) for name in spectra}
        draw_spectra(values, figures[2], measure=f"eigenvalue of the {asked.curvature}, magnitude", ranks={})
    return {
        "run": str(trained.run.path),
        "state": trained.state,
        "method": asked.method,
        **details.pop("", {}),
        "budget": budget if asked.threshold is None else None,
        "threshold": threshold,
        "num_parameters": sum(rank * spectra[name].cost for name, rank in ranks.items()),
        "num_parameters_of_run": sum(ranks_now[name] * spectra[name].cost for name in ranks),
        "layers": {
            name: {
                "rank": ranks[name],
                "rank_of_run": ranks_now[name],
                "effective_rank": effective[name],
                "parameters_per_rank": spectrum.cost,
                "total_energy": spectrum.total,
                "energies": spectrum.energies.tolist(),
                **details.get(name, {}),
            }
            for name, spectrum in spectra.items()
        },
        **written,
        "figures": [str(each) for each in figures],
    }


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A run whose layers are measured."""

    trained: TrainedRun
    asked: RankSettings
    layers: Mapping[str, AdaptedLinear]
    """Those that get a rank."""
    most: int
    """Largest rank that is asked for."""
    norm: Norm
    progress: Console

    @property
    def limits(self) -> dict[str, int]:
        """Layer -> its largest possible rank, at most `most`."""
        return {name: min(self.most, most_rank(each)) for name, each in self.layers.items()}

    def batches(self) -> tuple[list[MicroBatch], dict[str, Any]]:
        """As `training_batches`."""
        asked = self.asked
        return training_batches(self.trained, asked.examples, asked.micro_batch_tokens)


def _by_update(run: _Measured) -> tuple[Spectra, Details]:
    """Squared singular values of each layer's trained update."""
    return {name: _first(update_spectrum(layer), run.most) for name, layer in run.layers.items()}, {}


def _by_gradient(run: _Measured) -> tuple[Spectra, Details]:
    """Squared singular values of the gradient by each layer's weight."""
    batches, about = run.batches()
    norm: Norm = "none" if run.norm == "none" else "held"  # training follows the gradient with the norm held
    with bar(run.progress, "gradients") as progress:
        found = gradient_spectra(run.trained.model, list(run.layers), batches, run.most, norm=norm, progress=progress)
    limits = run.limits
    return {name: _first(each, limits[name]) for name, each in found.items()}, {"": {**about, "norm": norm}}


def _by_curvature(run: _Measured) -> tuple[Spectra, Details]:
    """Worths of each layer's components; beside them, if asked for, eigenvalues of the curvature by A and B."""
    batches, about = run.batches()
    model, limits = run.trained.model, run.limits
    draws = run.asked.draws
    with bar(run.progress, "directions of new components") as progress:
        directions = layer_directions(model, limits, batches, norm=run.norm, progress=progress)
    with bar(run.progress, f"their curvature, {draws} draws" if draws else "their curvature, exact") as progress:
        if draws:
            components = drawn_curvatures(model, directions, batches, norm=run.norm, draws=draws, progress=progress)
        else:
            components = exact_curvatures(model, directions, batches, norm=run.norm, progress=progress)
    spectra: Spectra = {}
    details: Details = {"": {**about, "norm": run.norm, "draws": draws}}
    for name, layer in run.layers.items():
        spectra[name] = components[name].spectrum(limits[name], layer.parameters_per_rank)
        details[name] = {"components": components[name].to_dict()}
    if num := run.asked.eigenvalues:
        with bar(run.progress, f"eigenvalues of the {run.asked.curvature}") as progress:
            for number, name in enumerate(run.layers, start=1):
                details[name]["spectrum"] = layer_spectrum(
                    model, name, batches, num, curvature=run.asked.curvature, norm=run.norm
                )
                progress(number, len(run.layers))
    return spectra, details


_MEASURE = {"svd": _by_update, "gradient": _by_gradient, "curvature": _by_curvature}


def training_batches(
    trained: TrainedRun, num_examples: int, micro_batch_tokens: int
) -> tuple[list[MicroBatch], dict[str, Any]]:
    """The first examples of the run's training mix in micro-batches, and their counts."""
    recipe = trained.recipe
    train, _ = read_data(recipe.data)
    mix = tokenized_mix(recipe, trained.tokenizer, train)
    loader = StepLoader(
        mix.sets,
        mix.order,
        tokens_per_step=None,
        batch=num_examples,
        batching=Batching(micro_batch_tokens, cast(int, trained.tokenizer.pad_token_id)),
    )
    taken = loader.next_step()
    about = {
        "num_examples": taken.num_examples,
        "num_tokens": taken.num_tokens,
        "num_label_tokens": taken.num_label_tokens,
        "num_micro_batches": len(taken.micro_batches),
    }
    return taken.micro_batches, about


def _first(spectrum: LayerSpectrum, most: int) -> LayerSpectrum:
    return LayerSpectrum(spectrum.energies[:most], spectrum.total, spectrum.cost)


def _chosen(adapted: Mapping[str, AdaptedLinear], patterns: Sequence[str]) -> dict[str, AdaptedLinear]:
    faults = unmatched("--layers", patterns, adapted, "adapted")
    if faults:
        raise UserError(*faults)
    return {n: layer for n, layer in adapted.items() if not patterns or any(matches(n, each) for each in patterns)}


def _budget(asked: RankSettings, chosen: Mapping[str, AdaptedLinear]) -> int:
    own = sum(layer.rank * layer.parameters_per_rank for layer in chosen.values())
    text = asked.budget or "100%"
    try:
        budget = int(own * float(text[:-1]) / 100) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):  # of inf%
        budget = 0
    if budget < 1:
        raise UserError(
            f"--budget: got {text!r}, must be a number of parameters (the run has {own:,}) or a share such as 50%."
        )
    return budget


def ranks_of_gates(run: RunDirectory, recipe: Recipe, step: int | None) -> dict[str, Any]:
    """The ranks that the gates of a run chose, read from its adapter without the model; writes a recipe and a map.

    Args:
        run: A run with gates.
        recipe: Its recipe.
        step: Checkpoint; None: the finished adapter.
    Returns:
        JSON values, as in rank/gates.json. "removed_after" has an entry for each component of the start: the number
        of steps after which it was removed, or null.
    """
    assert recipe.adapter.gates is not None
    trained, state = trained_state(run, recipe, step)
    extra = describe_adapter(adapter_of(run, trained)).extra or {}
    layers = extra["gates"]
    ranks = {name: each["removed_after"].count(None) for name, each in layers.items()}
    cost = {name: each["parameters_per_rank"] for name, each in layers.items()}
    starts = {name: len(each["removed_after"]) for name, each in layers.items()}
    figure = run.inside("rank") / "gates-ranks.svg"
    document = {
        "run": str(run.path),
        "state": state,
        "method": "gates",
        "mode": recipe.adapter.gates.mode,
        "num_parameters": sum(rank * cost[name] for name, rank in ranks.items()),
        "num_parameters_of_run": sum(rank * cost[name] for name, rank in starts.items()),
        "layers": {name: {"rank": ranks[name], "rank_of_run": starts[name], **each} for name, each in layers.items()},
        **write_recipe(run, recipe, "gates", ranks),
        "figures": [str(figure)],
    }
    draw_rank_map(ranks, figure)
    return document


def write_recipe(run: RunDirectory, recipe: Recipe, method: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Write rank/<method>.yaml: the run's recipe with these ranks of all adapted layers, and without gates.

    Returns:
        "fragment", a value of an axis of a study, and "recipe", the file's path.
    """
    # Experts may have a rank of their own, so that no rank is left out as the usual one.
    usual = None if recipe.adapter.experts.rank else recipe.adapter.rank
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    plain = settings(recipe)
    fragment: dict[str, Any] = {"rank": recipe.adapter.rank, "rank_pattern": pattern}
    if pattern and not recipe.adapter.has_own_ranks:
        # alpha / rank would be 16 times as large at rank 1 as at rank 16, and training with it
        fragment["same_scaling"] = True
    elif pattern:
        # Another value would also change alpha / rank of the layers that keep their rank
        fragment["same_scaling"] = recipe.adapter.same_scaling
    kept = {key: value for key, value in plain["adapter"].items() if key not in ("same_scaling", "gates")}
    plain["adapter"] = kept | fragment
    folder = run.inside("rank")
    folder.mkdir(exist_ok=True)
    out = folder / f"{method}.yaml"
    atomic_write_text(out, resolved_yaml(recipe_from(plain)))
    return {"fragment": {f"adapter.{key}": value for key, value in fragment.items()}, "recipe": str(out)}


def _show(console: Console, document: Mapping[str, Any]) -> None:
    """A row for each layer, and the command that trains with the new ranks."""
    threshold = document.get("threshold")  # gates have no energies
    before = "in the run" if threshold else "at the start"
    title = f"{document['method']}: {document['num_parameters']:,} parameters in the factors, {before} "
    table = Table(title=f"{title}{document['num_parameters_of_run']:,}", title_justify="left")
    for name in ("layer", "rank", before, *([f"for {threshold:.0%} of the energy"] if threshold else [])):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for name, layer in document["layers"].items():
        cells = [name, str(layer["rank"]), str(layer["rank_of_run"])]
        if threshold:
            effective = layer["effective_rank"]
            cells.append(f"over {len(layer['energies'])}" if effective is None else str(effective))
        table.add_row(*cells)
    console.print(table)
    hint = f"To train with these ranks: qdora train {document['recipe']}"
    console.print(hint, soft_wrap=True)
