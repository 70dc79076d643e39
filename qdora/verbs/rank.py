"""qdora rank: a rank for each layer of a run, from curvature, from the trained update, the gradient or gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qdora.analysis.allocate import LayerSpectrum, allocate, effective_rank
from qdora.analysis.rank_figures import draw_rank_map, draw_spectra
from qdora.config import Recipe
from qdora.errors import UserError, nearest
from qdora.model.inject import adapted_layers, matches
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.recipe_file import load_recipe
from qdora.record import open_run
from qdora.train.allocator import keep_freed_memory
from qdora.verbs.gate_ranks import ranks_of_gates
from qdora.verbs.rank_recipe import write_recipe
from qdora.verbs.rank_settings import RankSettings
from qdora.verbs.rank_spectra import measured_spectra
from qdora.verbs.show import default_console
from qdora.verbs.trained import TrainedRun, load_run

THRESHOLD = 0.9

_MEASURES = {
    "curvature": "worth in nats",
    "svd": "squared singular value of the update",
    "gradient": "squared singular value of the gradient",
}


def rank_run(
    path: Path, asked: RankSettings, *, step: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Measure each layer's spectrum, choose the ranks, write them as a recipe.

    Everything is computed in float32 on the dequantised base, whatever the run computed in. Nothing of the run itself
    changes; results go to <run>/rank/, and what curvature has computed is kept there for a next call.

    Args:
        path: Run directory with an adapter.
        asked: What to do.
        step: Checkpoint of the run; None takes the finished adapter.
        console: Where progress and ranks are shown; standard error by default.
    Returns:
        JSON values, as in <run>/rank/<method>.json.
    Raises:
        UserError: Wrong arguments, or a run without adapters.
    """
    asked.check()
    console = console or default_console()
    keep_freed_memory()
    recipe = load_recipe(open_run(path).recipe_file)
    if recipe.adapter.kind not in ("dora", "lora"):
        raise UserError(f"{path}: adapter.kind {recipe.adapter.kind} has no ranks, allowed: a run of dora or lora.")
    if asked.method == "gates":
        return ranks_of_gates(open_run(path), recipe, step, console)
    if recipe.adapter.resume_from is not None:
        raise UserError(f"{path}: its ranks come from adapter.resume_from, allowed: a run that made its own adapter.")
    if asked.norm is not None and recipe.adapter.kind == "lora":
        raise UserError("--norm: LoRA has no norm, allowed: leave it out.")
    if recipe.adapter.mask == "keep" and asked.method == "svd":
        raise UserError(
            f"{path}: --method svd: under adapter.mask keep the update is not of the rank of B A, so its singular "
            "values say nothing of ranks, allowed: --method curvature or gradient."
        )
    trained = load_run(path, step=step, widened=True)
    adapted = adapted_layers(trained.model)
    chosen = _chosen(adapted, asked.layers)
    ranks_now = {name: layer.rank for name, layer in adapted.items()}
    budget = _budget(asked, chosen)
    most = asked.max_rank or 2 * max(ranks_now.values())
    spectra, details = measured_spectra(trained, asked, chosen, most, console)
    threshold = asked.threshold or THRESHOLD
    effective = {name: effective_rank(spectrum, threshold) for name, spectrum in spectra.items()}
    if asked.threshold is None:
        ranks = allocate(spectra, budget)
    else:
        ranks = {name: rank or len(spectra[name].energies) for name, rank in effective.items()}
    document = {
        "run": str(path),
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
    }
    document |= _write(trained, asked, recipe, {**ranks_now, **ranks}, spectra)
    trained.run.write_json(f"rank/{asked.method}.json", document)
    _show(console, document)
    return document


def _chosen(adapted: Mapping[str, AdaptedLinear], patterns: Sequence[str]) -> dict[str, AdaptedLinear]:
    last_parts = sorted({name.rpartition(".")[2] for name in adapted})
    faults = [
        f"--layers: {pattern!r} is no adapted layer, allowed: {', '.join(last_parts)}, a path or a pattern."
        f"{nearest(pattern, last_parts)}"
        for pattern in patterns
        if not any(matches(name, pattern) for name in adapted)
    ]
    if faults:
        raise UserError(*faults)
    return {n: layer for n, layer in adapted.items() if not patterns or any(matches(n, each) for each in patterns)}


def _budget(asked: RankSettings, chosen: Mapping[str, AdaptedLinear]) -> int:
    own = sum(layer.rank * (layer.in_features + layer.out_features) for layer in chosen.values())
    text = asked.budget or "100%"
    try:
        budget = int(own * float(text[:-1]) / 100) if text.endswith("%") else int(text)
    except ValueError:
        budget = 0
    if budget < 1:
        raise UserError(f"--budget: {text!r}, allowed: parameters ({own:,} are the run's own) or a share such as 50%.")
    return budget


def _write(
    trained: TrainedRun,
    asked: RankSettings,
    recipe: Recipe,
    ranks: Mapping[str, int],
    spectra: Mapping[str, LayerSpectrum],
) -> dict[str, Any]:
    """The run's recipe with the new ranks, as a file to train; the fragment; the figures."""
    written = write_recipe(trained.run, recipe, asked.method, ranks)
    folder = trained.run.inside("rank")
    figures = {kind: folder / f"{asked.method}-{kind}.svg" for kind in ("spectra", "ranks")}
    chosen = {name: ranks[name] for name in spectra}
    draw_spectra(spectra, chosen, figures["spectra"], measure=_MEASURES[asked.method])
    draw_rank_map(ranks, figures["ranks"])
    return {**written, "figures": [str(each) for each in figures.values()]}


def _show(console: Console, document: Mapping[str, Any]) -> None:
    title = f"{document['method']}: {document['num_parameters']:,} parameters in the factors, the run has "
    table = Table(title=f"{title}{document['num_parameters_of_run']:,}", title_justify="left")
    for name in ("layer", "rank", "in the run", f"for {document['threshold']:.0%} of the energy"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for name, layer in document["layers"].items():
        effective = layer["effective_rank"]
        reached = f"over {len(layer['energies'])}" if effective is None else str(effective)
        table.add_row(name, str(layer["rank"]), str(layer["rank_of_run"]), reached)
    console.print(table)
    console.print(
        f"to train with these ranks: qdora train {document['recipe']}", markup=False, highlight=False, soft_wrap=True
    )
