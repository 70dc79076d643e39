"""The largest curvatures of single layers of SmolLM2-135M on real data: values, residuals, products, seconds.

    python benchmarks/curvature.py DATA --out benchmarks/results/curvature.json

DATA holds <task>/<split>.parquet. A DoRA of rank 16 in NF4 is trained for a few steps on the combined tasks, so that B
is off its start. Then, for each layer, in float32 on the dequantised base and on one micro-batch of training examples:
the eigenvalues of largest magnitude of the Hessian with the norm attached, and held in the last block.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from byte_tokenizer import write_model
from measure import facts, parsed, parser_of, peak_rss_bytes, write

from qdora.analysis.curvature import layer_spectrum
from qdora.analysis.differentiable import NORMS
from qdora.memory.allocator import keep_freed_memory
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import recipe_from
from qdora.run.load_run import load_run
from qdora.run.rank import training_batches
from qdora.run.train import train_run

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def recipe(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """The run whose curvature is measured."""
    tasks = ("demo/facts", "demo/odd") if args.smoke else COMMONSENSE_TASKS
    places = {} if args.smoke else {task: {"path": str(args.data.resolve() / task)} for task in tasks}
    return {
        "model": {"source": model, "dtype": "float32"},
        "adapter": {"kind": "dora", "rank": 16, "alpha": 32.0},
        "data": {
            "mix": [{"task": task, "limit": 64, **places.get(task, {})} for task in tasks],
            "strategy": "equal",
            "max_length": 128,
            "too_long": "truncate",
        },
        "train": {"steps": args.steps, "batch": 8, "lr": 1e-3, "optimizer": "adamw"},
        "eval": {"at_start": False, "at_end": False},
        "memory": {"checkpointing": False},
    }


def trained_run(args: argparse.Namespace, work: Path) -> Path:
    """The run, in `work`."""
    train_run(recipe_from(recipe(args, write_model(work / "model") if args.smoke else "builtin")), work / "run")
    return work / "run"


def measure(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Each layer's spectrum, with the norm attached, and held in the last of the blocks."""
    trained = load_run(run, widened=True)
    batches, about = training_batches(trained, args.examples, 8192)
    found = []
    blocks = [int(each) for each in args.blocks.split(",")]
    for block in blocks:
        for norm in NORMS if block == blocks[-1] else NORMS[:1]:
            for kind in KINDS:
                name = f"model.layers.{block}.{kind}"
                began = time.process_time()  # not the wall clock: a machine that others use stops and goes on
                result = layer_spectrum(trained.model, name, batches, args.top, curvature="hessian", norm=norm)
                result["cpu_seconds"] = time.process_time() - began
                found.append({"layer": name, **result})
                print(
                    f"{name} {norm}: {result['num_matvecs']} products, {result['cpu_seconds']:.1f} s of CPU", flush=True
                )
    return {**about, "layers": found}


def main() -> None:
    """Train, measure, write."""
    parser = parser_of(__doc__, "curvature", smoke="a random model", data=True)
    parser.add_argument("--steps", type=int, default=8, help="of training before")
    parser.add_argument("--examples", type=int, default=4, help="the curvature is taken on")
    parser.add_argument("--blocks", default="20,25,29")
    parser.add_argument("--top", type=int, default=20)
    args = parsed(parser)
    keep_freed_memory()
    if args.smoke:
        args.steps, args.blocks, args.top = 2, "1", 4
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(trained_run(args, Path(folder)), args)
    command = f"python benchmarks/curvature.py DATA --steps {args.steps} --examples {args.examples}"
    command += f" --blocks {args.blocks} --top {args.top}"
    write(args.out, facts(command) | measured | {"peak_memory_bytes": peak_rss_bytes()})


if __name__ == "__main__":
    main()
