"""Curvature along rank components: drawn labels, one pass for all layers, against products with the exact matrix.

    python benchmarks/curvature_draws.py DATA [--blocks 10,20,29] [--examples 8] [--draws 16]

DATA holds <task>/<split>.parquet. A DoRA of rank 16 in NF4 on SmolLM2-135M is trained for a few steps on the combined
tasks. Then, on the same examples, the curvature along the components of its trained update and as many new ones: of all
layers by drawn labels, and of some by a product a component, which is exact. What the draws are off by, what they say
of themselves, the ranks that both choose for these layers at half of their parameters, and the CPU seconds of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from curvature import trained_run
from measure import facts, parsed, parser_of, peak_rss_bytes, write

from qdora.analysis.allocate import LayerSpectrum, allocate
from qdora.analysis.components import (
    Components,
    drawn_curvatures,
    exact_curvatures,
    layer_directions,
)
from qdora.memory.allocator import keep_freed_memory
from qdora.model.inject import adapted_layers
from qdora.run.load_run import load_run
from qdora.run.rank import training_batches

KINDS = ("self_attn.v_proj", "mlp.down_proj")
MICRO_BATCH_TOKENS = 512
RANK = 16
"""Of the trained run; as many new components are looked at."""


def measure(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways on the same components."""
    trained = load_run(run, widened=True)
    batches, about = training_batches(trained, args.examples, MICRO_BATCH_TOKENS)
    adapted = adapted_layers(trained.model)
    numbers = dict.fromkeys(adapted, RANK)
    began = time.process_time()
    directions = layer_directions(trained.model, numbers, batches, norm="attached")
    found_after = time.process_time()
    drawn = drawn_curvatures(trained.model, directions, batches, norm="attached", draws=args.draws)
    drawn_after = time.process_time()
    about |= {
        "num_layers": len(directions),
        "num_components": sum(len(each.sizes) for each in directions.values()),
        "draws": args.draws,
        "directions_cpu_seconds": found_after - began,
        "drawn_cpu_seconds": drawn_after - found_after,
    }
    layers = []
    spectra: dict[str, dict[str, LayerSpectrum]] = {"drawn": {}, "exact": {}}
    for block in args.blocks.split(","):
        for kind in KINDS:
            name = f"model.layers.{block}.{kind}"
            began = time.process_time()
            (exact,) = exact_curvatures(trained.model, {name: directions[name]}, batches, norm="attached").values()
            seconds = time.process_time() - began
            layers.append({"layer": name, "exact_cpu_seconds": seconds, **deviation(drawn[name], exact)})
            print(layers[-1], flush=True)
            for way, found in (("drawn", drawn[name]), ("exact", exact)):
                spectra[way][name] = found.spectrum(RANK, sum(adapted[name].merged_weight().shape))
    budget = sum(spectrum.cost for spectrum in spectra["exact"].values()) * RANK // 2
    ranks = {way: allocate(each, budget) for way, each in spectra.items()}
    return {
        **about,
        "layers": [{**layer, **{f"{way}_rank": ranks[way][layer["layer"]] for way in ranks}} for layer in layers],
    }


def deviation(drawn: Components, exact: Components) -> dict[str, Any]:
    """What the draws are off by, in their own standard errors, too; by how much they make the components worth more."""
    off = np.abs(drawn.curvatures - exact.curvatures)
    drawn_worths, exact_worths = drawn.worths(), exact.worths()
    return {
        "num_components": len(exact.curvatures),
        "relative_error": {
            "median": float(np.median(off / exact.curvatures)),
            "largest": float((off / exact.curvatures).max()),
        },
        "own_error": float(np.median(drawn.errors / drawn.curvatures)),
        "root_mean_square_in_own_errors": float(np.sqrt(np.mean((off / drawn.errors) ** 2))),
        "summed_worth_drawn_by_exact": float(drawn_worths.sum() / exact_worths.sum()),
    }


def main() -> None:
    """Train, measure, write."""
    parser = parser_of(__doc__, "curvature_draws", smoke="a random model", data=True)
    parser.add_argument("--steps", type=int, default=8, help="of training before")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--blocks", default="10,20,29", help="whose layers are computed exactly, too")
    parser.add_argument("--draws", type=int, default=16)
    args = parsed(parser)
    keep_freed_memory()
    if args.smoke:
        args.steps, args.blocks = 2, "1"
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(trained_run(args, Path(folder)), args)
    command = f"python benchmarks/curvature_draws.py DATA --steps {args.steps} --examples {args.examples}"
    command += f" --blocks {args.blocks} --draws {args.draws}"
    write(args.out, facts(command) | measured | {"peak_memory_bytes": peak_rss_bytes()})


if __name__ == "__main__":
    main()
