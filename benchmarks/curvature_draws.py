"""Curvature along rank components: drawn labels, one pass for all layers, against products with the exact matrix.

DATA holds <task>/<split>.parquet. A DoRA of rank 16 in NF4 on SmolLM2-135M is trained for a few steps on the combined
tasks. Then, on the same examples, the curvature along the components of its trained update and as many new ones: of all
layers by drawn labels, and of some by a product a component, which is exact. What the draws are off by, what they say
of themselves, the ranks that both choose for these layers at half of their parameters, and the CPU seconds of both.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from byte_tokenizer import write_model
from frame import bench, main, table, tabulated

from qdora.memory.allocator import keep_freed_memory
from qdora.model.inject import adapted_layers
from qdora.rank.allocate import LayerSpectrum, allocate
from qdora.rank.components import Components, drawn_curvatures, exact_curvatures, layer_directions
from qdora.rank.rank import training_batches
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import recipe_from
from qdora.run.load_run import load_run
from qdora.run.run import train_run

KINDS, MICRO_BATCH_TOKENS = ("self_attn.v_proj", "mlp.down_proj"), 512
RANK = 16
"""Of the trained run; as many new components are looked at."""


def trained_run(data: Path | None, steps: int, work: Path) -> Path:
    """The run whose curvature is measured."""
    mix = [{"task": task, "path": str(data.resolve() / task)} for task in COMMONSENSE_TASKS] if data else []
    mix = mix or [{"task": task} for task in ("demo/facts", "demo/odd")]
    data_settings = {"mix": [{**source, "limit": 64} for source in mix], "strategy": "equal", "max_length": 128}
    recipe = {
        "model": {"source": "builtin" if data else write_model(work / "model"), "dtype": "float32"},
        "adapter": {"kind": "dora", "rank": RANK, "alpha": 2.0 * RANK},
        "data": data_settings | {"too_long": "truncate"},
        "train": {"steps": steps, "batch": 8, "lr": 1e-3, "optimizer": "adamw"},
        "eval": {"at_start": False, "at_end": False},
        "memory": {"checkpointing": False},
    }
    train_run(recipe_from(recipe), work / "run")
    return work / "run"


@bench(smoke={"steps": 2, "blocks": "1"})
def curvature_draws(
    data: Path | None, *, steps: int = 8, examples: int = 8, blocks: str = "10,20,29", draws: int = 16
) -> dict[str, Any]:
    """Both ways on the same components, after `steps` of training; layers of `blocks` are computed exactly, too."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        trained = load_run(trained_run(data, steps, Path(folder)), widened=True)
        batches, about = training_batches(trained, examples, MICRO_BATCH_TOKENS)
    adapted = adapted_layers(trained.model)
    began = time.process_time()  # not the wall clock: a machine that others use stops and goes on
    directions = layer_directions(trained.model, dict.fromkeys(adapted, RANK), batches, norm="attached")
    found_after = time.process_time()
    drawn = drawn_curvatures(trained.model, directions, batches, norm="attached", draws=draws)
    about |= {
        "num_layers": len(directions),
        "num_components": sum(len(each.sizes) for each in directions.values()),
        "draws": draws,
        "directions_cpu_seconds": found_after - began,
        "drawn_cpu_seconds": time.process_time() - found_after,
    }
    layers: list[dict[str, Any]] = []
    spectra: dict[str, dict[str, LayerSpectrum]] = {"drawn": {}, "exact": {}}
    for name in (f"model.layers.{block}.{kind}" for block in blocks.split(",") for kind in KINDS):
        began = time.process_time()
        (exact,) = exact_curvatures(trained.model, {name: directions[name]}, batches, norm="attached").values()
        seconds = time.process_time() - began
        layers.append({"layer": name, "exact_cpu_seconds": seconds, **deviation(drawn[name], exact)})
        for way, found in (("drawn", drawn[name]), ("exact", exact)):
            spectra[way][name] = found.spectrum(RANK, sum(adapted[name].merged_weight().shape))
    budget = sum(spectrum.cost for spectrum in spectra["exact"].values()) * RANK // 2
    for way, found in spectra.items():
        ranks = allocate(found, budget)
        for layer in layers:
            layer[f"{way}_rank"] = ranks[layer["layer"]]
    return {**about, "layers": layers}


def deviation(drawn: Components, exact: Components) -> dict[str, Any]:
    """What the draws are off by, in their own standard errors, too; by how much they make the components worth more."""
    off = np.abs(drawn.curvatures - exact.curvatures)
    relative = off / exact.curvatures
    return {
        "num_components": len(exact.curvatures),
        "relative_error": {"median": float(np.median(relative)), "largest": float(relative.max())},
        "own_error": float(np.median(drawn.errors / drawn.curvatures)),
        "root_mean_square_in_own_errors": float(np.sqrt(np.mean((off / drawn.errors) ** 2))),
        "summed_worth_drawn_by_exact": float(drawn.worths().sum() / exact.worths().sum()),
    }


@table("curvature_draws")
def curvature_draws_table(result: Any) -> str:
    """The error of estimated curvatures, and what both ways cost."""
    columns = {
        "layer": lambda row: row["layer"].removeprefix("model.layers."),
        "components": "{num_components}",
        "error, median": "{relative_error[median]:.1%}",
        "largest": "{relative_error[largest]:.0%}",
        "reported standard error": "{own_error:.1%}",
        "RMS of error / reported error": "{root_mean_square_in_own_errors:.2f}",
        "summed worth, exact = 1": "{summed_worth_drawn_by_exact:.2f}",
        "rank, drawn and exact": "{drawn_rank}, {exact_rank}",
        "exact: CPU seconds": "{exact_cpu_seconds:.0f}",
    }
    seconds = result["directions_cpu_seconds"] + result["drawn_cpu_seconds"]
    return tabulated(result["layers"], columns) + (
        f"\nWith {result['draws']} label samples, all {result['num_layers']} layers, {result['num_components']:,} "
        f"components, took {seconds:.0f} CPU seconds, gradients included. *Rank*: chosen for these layers at half of "
        f"their parameters. One seed, {result['num_label_tokens']} labelled tokens. `{result['command']}`\n"
    )


if __name__ == "__main__":
    main()
