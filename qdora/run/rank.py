"""What `qdora rank` can be asked for, and what of it does not go together.

Chosen ranks as a recipe: the run's own with another rank_pattern, and the fragment to put into any other.

qdora rank --method gates: the ranks that a run's gates have come to, read from its adapter without the model.

What `qdora rank` measures of a run: the spectrum of each layer, and what else is said of it.

qdora rank: a rank for each layer of a run, from curvature, from the trained update, the gradient or gates.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from qdora.analysis.allocate import LayerSpectrum, allocate, effective_rank
from qdora.analysis.components import LEAST_DRAWS, drawn_curvatures, exact_curvatures, layer_directions
from qdora.analysis.curvature import CURVATURES, Curvature, CurvatureSettings, curvature_spectrum, fingerprint
from qdora.analysis.differentiable import NORMS, Norm
from qdora.analysis.rank_figures import draw_rank_map, draw_spectra
from qdora.analysis.update_gradient import gradient_spectra, update_spectrum
from qdora.data.batching import MicroBatch
from qdora.data.build_data import read_data, tokenized_mix
from qdora.data.loader import StepLoader
from qdora.errors import UserError, nearest
from qdora.files.atomic import atomic_write_text
from qdora.files.console import bar, consoles
from qdora.files.run_directory import RunDirectory, open_run
from qdora.memory.allocator import keep_freed_memory
from qdora.model.adapter_file import describe_adapter
from qdora.model.inject import adapted_layers, matches
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.recipe.recipe_file import load_recipe, recipe_from, resolved_yaml, settings
from qdora.recipe.settings import Recipe
from qdora.run.load_run import TrainedRun, load_run, trained_state

METHODS = ("curvature", "svd", "gradient", "gates")


@dataclass(frozen=True)
class RankSettings:
    """What `qdora rank` was asked for; None where an option was left out.

    Attributes:
        method: curvature, svd, gradient or gates; the last has been chosen while training, so no other option counts.
        budget: Parameters of the low-rank factors of the chosen layers, or a share of the run's own ("50%"); the
            run's own if left out.
        threshold: In place of a budget, each layer gets the fewest components that hold this share of its energy.
        max_rank: Largest rank of a layer; twice the largest of the run, and with svd that of the layer.
        draws: Labels drawn for each labelled token, to estimate the curvature along each component; 16. 0 computes it
            exactly, by one product with the curvature a component (benchmarks/curvature_draws.py compares them).
        eigenvalues: How many of the curvature by A and B are written beside the ranks, which do not depend on them and
            cost far less; 0.
        curvature: Of which matrix they are; hessian.
        norm: Of DoRA, attached or held, in worths and eigenvalues; attached.
        layers: Names or patterns; all adapted layers if left out. Those left out keep their rank.
        examples: Of the run's training mix, from its start; 64.
        micro_batch_tokens: Most tokens of a micro-batch, padding counted; its graph is most of the memory beyond the
            model's, with the gradients (`update_gradients`) and the components' directions.
        over_all: Also the eigenvalues of all chosen layers together.
    """

    method: str = "curvature"
    budget: str | None = None
    threshold: float | None = None
    max_rank: int | None = None
    draws: int | None = None
    eigenvalues: int | None = None
    curvature: str | None = None
    norm: str | None = None
    layers: Sequence[str] = ()
    examples: int | None = None
    micro_batch_tokens: int | None = None
    over_all: bool = False

    def check(self) -> None:
        """Raises UserError with every fault that shows without the run."""
        faults = []
        if self.method not in METHODS:
            faults.append(f"--method: {self.method!r}, allowed: {', '.join(METHODS)}.{nearest(self.method, METHODS)}")
        for option, value, allowed in (("--curvature", self.curvature, CURVATURES), ("--norm", self.norm, NORMS)):
            if value is not None and value not in allowed:
                faults.append(f"{option}: {value!r}, allowed: {', '.join(allowed)}.{nearest(value, allowed)}")
            if value is not None and self.method != "curvature":
                faults.append(f"{option}: has no effect with --method {self.method}, allowed: --method curvature.")
        with_number = (("--draws", self.draws is not None), ("--eigenvalues", self.eigenvalues is not None))
        for option, given in (("--over-all", self.over_all), *with_number):
            if given and self.method != "curvature":
                faults.append(f"{option}: has no effect with --method {self.method}, allowed: --method curvature.")
        for option, given in (("--over-all", self.over_all), ("--curvature", self.curvature is not None)):
            if given and not self.eigenvalues:
                faults.append(f"{option}: has no effect without --eigenvalues, allowed: with --eigenvalues 20.")
        if self.draws is not None and self.draws != 0 and self.draws < LEAST_DRAWS:
            faults.append(f"--draws: {self.draws}, allowed: 0 (exact), or {LEAST_DRAWS} and more.")
        for option, number in (("--examples", self.examples), ("--micro-batch-tokens", self.micro_batch_tokens)):
            if number is not None and self.method == "svd":
                faults.append(f"{option}: --method svd reads no data, allowed: --method curvature or gradient.")
        if self.method == "gates":
            options: dict[str, Any] = {"--budget": self.budget, "--threshold": self.threshold}
            options |= {"--max-rank": self.max_rank, "--layers": self.layers or None, "--examples": self.examples}
            options |= {"--micro-batch-tokens": self.micro_batch_tokens}
            chosen = "has no effect with --method gates, whose ranks the run has chosen, allowed: leave it out."
            faults += [f"{option}: {chosen}" for option, value in options.items() if value is not None]
        elif self.budget is not None and self.threshold is not None:
            faults.append("--threshold: given with --budget, allowed: one of them.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            faults.append(f"--threshold: {self.threshold:g}, allowed: above 0, at most 1.")
        if self.method == "svd" and self.threshold is None and self.budget in (None, "100%"):
            faults.append(
                "--budget: an update of the run's ranks says nothing of larger ones, so all ranks would stay; "
                "allowed: less than 100%, such as 50%, or --threshold."
            )
        if faults:
            raise UserError(*faults)


def write_recipe(run: RunDirectory, recipe: Recipe, method: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Write rank/<method>.yaml: the run's recipe with these ranks and without gates.

    Args:
        run: Where to.
        recipe: Of the run.
        method: How the ranks were found.
        ranks: Path -> rank, of all adapted layers.
    Returns:
        "fragment" and "recipe", the file's path.
    """
    pattern = {name: rank for name, rank in ranks.items() if rank != recipe.adapter.rank}
    plain = settings(recipe)
    fragment: dict[str, Any] = {"rank": recipe.adapter.rank, "rank_pattern": pattern}
    if pattern and not recipe.adapter.rank_pattern:
        # alpha / rank would be 16 times as large at rank 1 as at rank 16, and training with it
        fragment["same_scaling"] = True
    elif pattern:
        # Another value would also change alpha / rank of the layers that were left out
        fragment["same_scaling"] = recipe.adapter.same_scaling
    kept = {key: value for key, value in plain["adapter"].items() if key not in ("same_scaling", "gates")}
    plain["adapter"] = kept | fragment
    folder = run.inside("rank")
    folder.mkdir(exist_ok=True)
    out = folder / f"{method}.yaml"
    atomic_write_text(out, resolved_yaml(recipe_from(plain)))
    return {"fragment": {"adapter": fragment}, "recipe": str(out)}


def ranks_of_gates(run: RunDirectory, recipe: Recipe, step: int | None, console: Console) -> dict[str, Any]:
    """Write the ranks of a run with gates as a recipe and as a map over depth and kind of layer.

    Args:
        run: Of which.
        recipe: Its recipe.
        step: Checkpoint; None: the finished adapter.
        console: Where the ranks are shown.
    Returns:
        JSON values, as in rank/gates.json; "removed_after" has one entry for each component of the start: the steps
        that had been done when it went, or null.
    Raises:
        UserError: A run without gates, or whose layers differ in alpha / rank.
    """
    if recipe.adapter.gates is None:
        raise UserError(f"{run.path}: has no gates, allowed with --method gates: a run with adapter.gates.")
    if recipe.adapter.rank_pattern and not recipe.adapter.same_scaling:
        # Each layer has kept the alpha / rank that it started with, and a recipe has one alpha
        raise UserError(
            f"{run.path}: adapter.rank_pattern without same_scaling: a recipe cannot say with which scaling the layers "
            "that have shrunk were trained, allowed with --method gates: runs whose layers start with the same one."
        )
    trained, state = trained_state(run, recipe, step)
    extra = describe_adapter(trained if trained == run.adapter else trained / "adapter").extra or {}
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
    run.write_json("rank/gates.json", document)
    title = f"gates: {document['num_parameters']:,} parameters in the factors, at the start "
    table = Table(title=f"{title}{document['num_parameters_of_run']:,}", title_justify="left")
    for name in ("layer", "rank", "at the start"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for name, rank in ranks.items():
        table.add_row(name, str(rank), str(starts[name]))
    console.print(table)
    hint = f"to train with these ranks: qdora train {document['recipe']}"
    console.print(hint, markup=False, highlight=False, soft_wrap=True)
    return document


logger = logging.getLogger("qdora")

NUM_EXAMPLES = 64
NUM_DRAWS = 16
MICRO_BATCH_TOKENS = 512
"""Of a graph over a graph (eigenvalues, exact curvature) nothing is recomputed: about 8 MiB a token of a 135M model."""


def measured_spectra(
    trained: TrainedRun, asked: RankSettings, chosen: Mapping[str, AdaptedLinear], most: int, console: Console
) -> tuple[dict[str, LayerSpectrum], dict[str, dict[str, Any]]]:
    """The spectrum of each layer, and what else is said of it; under "" what is said of all."""
    if asked.method == "svd":
        found = {name: update_spectrum(layer) for name, layer in chosen.items()}
        return {name: _first(each, most) for name, each in found.items()}, {}
    batches, about = training_batches(
        trained, asked.examples or NUM_EXAMPLES, asked.micro_batch_tokens or MICRO_BATCH_TOKENS
    )
    kind = next(iter(chosen.values())).kind
    limits = {name: min(most, layer.in_features, layer.out_features) for name, layer in chosen.items()}
    if asked.method == "gradient":
        with bar(console, "gradients") as progress:
            # Held is what training follows
            norm: Norm = "held" if kind == "dora" else "none"
            found = gradient_spectra(trained.model, list(chosen), batches, most, norm=norm, progress=progress)
        return {name: _first(each, limits[name]) for name, each in found.items()}, {"": {**about, "norm": norm}}
    norm = cast(Norm, asked.norm or "attached") if kind == "dora" else "none"
    return _curvature(trained, asked, chosen, batches, limits, norm, about, console)


def _curvature(
    trained: TrainedRun,
    asked: RankSettings,
    chosen: Mapping[str, AdaptedLinear],
    batches: list[MicroBatch],
    limits: Mapping[str, int],
    norm: Norm,
    about: Mapping[str, Any],
    console: Console,
) -> tuple[dict[str, LayerSpectrum], dict[str, dict[str, Any]]]:
    """The worths of each layer's components; beside them, where asked for, eigenvalues of the curvature by A and B."""
    state = fingerprint(trained.model, batches)
    given: dict[str, Any] = {"norm": norm, "cache": trained.run.inside("rank", "cache"), "state": state}
    draws = NUM_DRAWS if asked.draws is None else asked.draws
    with bar(console, f"components, norm {norm}") as progress:
        directions = layer_directions(trained.model, limits, batches, progress=progress, **given)
    given |= {"draws": draws} if draws else {}
    with bar(console, f"their curvature, {draws} draws" if draws else "their curvature, exact") as progress:
        along = drawn_curvatures if draws else exact_curvatures
        components = along(trained.model, directions, batches, progress=progress, **given)
    spectra: dict[str, LayerSpectrum] = {}
    details: dict[str, dict[str, Any]] = {"": {**about, "norm": norm, "draws": draws}}
    for name, layer in chosen.items():
        spectra[name] = components[name].spectrum(limits[name], layer.in_features + layer.out_features)
        details[name] = {"components": components[name].to_dict()}
    for name, spectrum in _eigenvalues(trained, asked, list(chosen), batches, norm, state, console).items():
        details[name]["spectrum" if name else "over_all"] = spectrum
    return spectra, details


def _eigenvalues(
    trained: TrainedRun,
    asked: RankSettings,
    names: list[str],
    batches: list[MicroBatch],
    norm: Norm,
    state: str,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Layer -> the largest eigenvalues of the curvature by its factors; under "" of all layers' together."""
    if not asked.eigenvalues:
        return {}
    settings = CurvatureSettings(cast(Curvature, asked.curvature or "hessian"), norm, num_eigenvalues=asked.eigenvalues)
    cache = trained.run.inside("rank", "cache")
    scopes = {name: [name] for name in names} | ({"": names} if asked.over_all else {})
    found = {}
    with bar(console, f"{settings.curvature}, norm {norm}") as progress:
        for number, (scope, layers) in enumerate(scopes.items()):
            progress(number, len(scopes))
            result = curvature_spectrum(trained.model, layers, batches, settings, cache=cache, state=state)
            found[scope] = result.to_dict()
            logger.info(
                "%s: largest eigenvalue %.4g, %d products, %.1f s.",
                scope or "all layers",
                result.top.values[0],
                result.num_matvecs,
                result.seconds,
            )
    return found


def training_batches(
    trained: TrainedRun, num_examples: int, micro_batch_tokens: int
) -> tuple[list[MicroBatch], dict[str, Any]]:
    """The first examples of the run's training mix in micro-batches, and how many tokens they are."""
    recipe = trained.recipe
    train, _ = read_data(recipe.data)
    mix = tokenized_mix(recipe, trained.tokenizer, train)
    loader = StepLoader(
        mix.sets,
        mix.order,
        tokens_per_step=None,
        batch=num_examples,
        micro_batch_tokens=micro_batch_tokens,
        pad_id=cast(int, trained.tokenizer.pad_token_id),
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
    console, results = consoles(console)
    keep_freed_memory()
    recipe = load_recipe(open_run(path).recipe_file)
    if recipe.adapter.kind not in ("dora", "lora"):
        raise UserError(f"{path}: adapter.kind {recipe.adapter.kind} has no ranks, allowed: a run of dora or lora.")
    if asked.method == "gates":
        return ranks_of_gates(open_run(path), recipe, step, results)
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
    _show(results, document)
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
