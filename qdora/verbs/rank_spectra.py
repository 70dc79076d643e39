"""What `qdora rank` measures of a run: the spectrum of each layer, and what else is said of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

from rich.console import Console

from qdora.analysis.allocate import LayerSpectrum
from qdora.analysis.component_curvature import drawn_curvatures, exact_curvatures
from qdora.analysis.components import Components, layer_directions
from qdora.analysis.curvature import Curvature
from qdora.analysis.curvature_cache import CurvatureSettings, curvature_spectrum, fingerprint
from qdora.analysis.plain import Norm
from qdora.analysis.rivals import gradient_spectra, update_spectrum
from qdora.data.batching import MicroBatch
from qdora.data.loader import StepLoader
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.verbs.assemble import read_data, tokenized_mix
from qdora.verbs.rank_settings import RankSettings
from qdora.verbs.show import bar
from qdora.verbs.trained import TrainedRun

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
        curvatures = along(trained.model, directions, batches, progress=progress, **given)
    spectra: dict[str, LayerSpectrum] = {}
    details: dict[str, dict[str, Any]] = {"": {**about, "norm": norm, "draws": draws}}
    for name, layer in chosen.items():
        found, curvature = directions[name], curvatures[name]
        components = Components(found.sizes, found.slopes, curvature.values, curvature.errors, found.tail)
        spectra[name] = components.spectrum(limits[name], layer.in_features + layer.out_features)
        details[name] = {"components": components.to_dict()}
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
