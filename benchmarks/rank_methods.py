"""Does a rank for each layer help? Ways to choose ranks against one rank everywhere, at equal trainable parameters.

    python benchmarks/rank_methods.py DATA [--methods uniform,l1,svd,...] [--processes 2] [--hours 2.4]

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. QDoRA on SmolLM2-135M in NF4, the
commonsense tasks but BoolQ in equal shares. A scout of rank 16 is trained with a seed of its own. `qdora rank` finds,
from its update (svd), from the gradient and from the Gauss-Newton matrix (curvature), how to spend half of its
parameters, as many as rank 8 everywhere has. Gates (l1, hard_concrete) start at rank 16 and end with as many. All have
the same scaling. A `qdora study` finds the learning rate of each way with seeds of its own, then compares them. What
each choice costs is kept beside it. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import yaml
from measure import facts, parsed
from shared_study import RATES, SMOKE_RATES, common_settings, run_and_keep, study_parser

from qdora.files.atomic import atomic_write_json
from qdora.memory.allocator import keep_freed_memory
from qdora.rank.rank import RankSettings, rank_run
from qdora.recipe.recipe_file import load_recipe
from qdora.run.run import train_run

NAME = "rank_methods"
RANK = 8
SCALING = 2.0
SCOUT_SEED = 100
GATES = ("l1", "hard_concrete")
SCOUTED = {
    "svd": RankSettings(method="svd", budget="50%"),
    "gradient": RankSettings(method="gradient", budget="50%", examples=32),
    "curvature": RankSettings(method="curvature", budget="50%", examples=32),
}


def main() -> None:
    """The choices that are missing, the study, and the report."""
    parser = study_parser(__doc__, NAME, smoke="a random model and three steps")
    parser.add_argument("--methods", default="uniform,l1,svd,gradient,curvature")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=100, help="test examples of each task")
    args = parsed(parser)
    if args.resume_from is not None and args.methods != parser.get_default("methods"):
        parser.error("--methods: must not be given with --resume-from, whose methods are those of the kept study")
    if args.smoke:
        args.steps, args.batch, args.limit = 3, 4, 4
    options = f"--methods {args.methods} --steps {args.steps} --batch {args.batch} --limit {args.limit}"
    head = facts(f"python benchmarks/rank_methods.py DATA {options}")
    keep_freed_memory()
    args.dir.mkdir(parents=True, exist_ok=True)
    common = {"adapter.kind": "dora", **common_settings(args)}
    if args.resume_from is None:
        methods, costs = arms(args, common)
    else:  # without the scout, which is not kept
        methods = yaml.safe_load((args.resume_from / "grid.yaml").read_text(encoding="utf-8"))["product"]["ranks"]
        costs = json.loads((args.resume_from / "run.json").read_bytes())["costs_in_seconds"]
    run_and_keep(args, grid(common, methods, smoke=args.smoke), head | {"costs_in_seconds": costs}, NAME)


def ranked(rank: int, **more: Any) -> dict[str, Any]:
    """Settings of an adapter, at the scaling of all."""
    return {"adapter.rank": rank, "adapter.alpha": SCALING * rank, **more}


def arms(args: argparse.Namespace, common: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Method -> what it sets, and the seconds that each choice took beyond a run of its own."""
    names = args.methods.split(",")
    unknown = [name for name in names if name not in ("uniform", *GATES, *SCOUTED)]
    if unknown:
        raise SystemExit(f"no such method: {', '.join(unknown)}; allowed: uniform, {', '.join((*GATES, *SCOUTED))}")
    ledger = args.dir / "costs.json"
    costs: dict[str, float] = json.loads(ledger.read_text()) if ledger.exists() else {}

    def timed(name: str, make: Callable[[], Any]) -> None:
        if name not in costs:
            began = time.perf_counter()
            make()
            costs[name] = time.perf_counter() - began
            atomic_write_json(ledger, costs)

    scout = args.dir / "scout"
    start = {**common, **ranked(2 * RANK), "train.lr": RATES["values"][1], "train.seed": SCOUT_SEED}
    recipe = load_recipe("quickstart", [f"{key}={json.dumps(value)}" for key, value in start.items()])
    timed("scout", lambda: train_run(recipe, scout, resume=scout.exists()))
    for name in SCOUTED:
        if name in names:
            timed(name, lambda name=name: rank_run(scout, SCOUTED[name]))  # type: ignore[misc]
    timed("sizes", lambda: rank_run(scout, SCOUTED["svd"]))
    budget = json.loads((scout / "rank/svd.json").read_text())["budget"]
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == "uniform":
            found[name] = ranked(RANK)
        elif name in GATES:
            found[name] = ranked(2 * RANK, **{"adapter.gates.mode": name, "adapter.gates.parameters": budget})
        else:
            found[name] = ranked(2 * RANK, **json.loads((scout / f"rank/{name}.json").read_text())["fragment"])
    return found, costs


def grid(common: dict[str, Any], methods: dict[str, dict[str, Any]], *, smoke: bool) -> dict[str, Any]:
    """The study file."""
    return {
        "recipe": "quickstart",
        "settings": common,
        "product": {"ranks": methods},
        "seeds": [0, 1, 2, 3],
        "rates": SMOKE_RATES if smoke else RATES,
        "compare": {"arm": "ranks", "reference": next(iter(methods)), "metric": "nll_per_token", "split": "test"},
    }


if __name__ == "__main__":
    main()
