"""LoRA and DoRA on the combined commonsense data with SmolLM2-135M in NF4: answer NLL and accuracy before and after.

    python benchmarks/real_data.py DATA --out benchmarks/results/real_data.json [--arms lora,dora] [--seeds 0]

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. Arms and seeds run in processes of
one thread each, as many at once as there are cores. Nothing is chosen by a score: learning rate and length of the runs
are fixed beforehand, validation is shown, and test is scored once, after the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import OFFLINE, ONE_THREAD, facts, fresh, parser_of, write

from qdora.recipe.data_settings import COMMONSENSE_TASKS


def recipe(data: Path, kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One arm; the two arms differ in adapter.kind only."""
    return {
        "model": {"source": "builtin"},
        "base": {"quant": "nf4"},
        "adapter": {"kind": kind, "rank": 16, "alpha": 32.0},
        "data": {
            "mix": [{"task": task, "path": str(data / task)} for task in COMMONSENSE_TASKS],
            "strategy": "equal",
            "max_length": 512,
            "too_long": "drop",
            "seed": seed,
        },
        "train": {
            "steps": args.steps,
            "batch": args.batch,
            "lr": args.lr,
            "schedule": "linear",
            "warmup": 10,
            "optimizer": "adamw",
            "seed": seed,
            "checkpoint_every": 25,
        },
        "eval": {"limit": args.limit},
        "memory": {"checkpointing": False},
    }


def run_arm(data: Path, kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm in this process, then score the test split once, base and adapter."""
    from qdora.recipe.recipe_file import recipe_from
    from qdora.run.evaluate import EvalOptions, evaluate_target
    from qdora.run.train import train_run

    directory = Path(args.runs) / f"{kind}-seed{seed}"
    started = time.perf_counter()
    resume = (directory / "recipe.yaml").exists()
    summary = train_run(recipe_from(recipe(data, kind, seed, args)), directory, resume=resume)
    seconds = time.perf_counter() - started
    after = evaluate_target(str(directory), EvalOptions(split="test", limit=args.test_limit))
    result = {
        "kind": kind,
        "seed": seed,
        "train_seconds": seconds,
        "final_loss": summary["final_loss"],
        "num_trainable": summary["num_trainable"],
        "validation": {label: _short(document) for label, document in summary["evaluations"].items()},
        "test": {"adapter": _short(after["evaluation"])},
    }
    if kind == "lora" and seed == 0:  # the base is the same for all
        before = evaluate_target(str(directory), EvalOptions(split="test", limit=args.test_limit, base_only=True))
        result["test"]["base"] = _short(before["evaluation"])
    return result


def _short(document: dict[str, Any]) -> dict[str, Any]:
    keep = ("num_examples", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "chance", "majority", "nll")
    keep += ("nll_stderr", "nll_per_token", "nll_per_token_stderr", "num_answer_tokens")
    rows = {**document["tasks"], "average": document["average"]}
    return {task: {name: row[name] for name in keep} for task, row in rows.items()}


def main() -> None:
    """Start one process per arm and seed, gather their results."""
    parser = parser_of(__doc__, "real_data")
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/real_data"))
    parser.add_argument("--arms", default="lora,dora")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--test-limit", type=int, default=250)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    data = args.data.resolve()
    if args.worker:
        kind, seed = args.worker.split(":")
        print(json.dumps(run_arm(data, kind, int(seed), args)))
        return
    jobs = [f"{kind}:{seed}" for seed in args.seeds.split(",") for kind in args.arms.split(",")]

    def start(job: str) -> Any:
        log = args.runs / f"{job.replace(':', '-seed')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            options = (*sys.argv[1:], "--worker", job)
            return fresh(__file__, *options, variables=ONE_THREAD | OFFLINE, errors=errors)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(start, jobs))
    command = f"python benchmarks/real_data.py DATA --steps {args.steps} --batch {args.batch} --lr {args.lr} "
    command += f"--limit {args.limit} --test-limit {args.test_limit} --arms {args.arms} --seeds {args.seeds}"
    document = {
        **facts(command),
        "num_training_examples": args.steps * args.batch,
        "settings": recipe(Path("DATA"), "lora|dora", 0, args),
        "arms": results,
    }
    write(args.out, document)


if __name__ == "__main__":
    main()
