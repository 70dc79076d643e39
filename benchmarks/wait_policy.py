"""Tokens a second of training on the CPU, with OpenMP's threads spinning as they wait, sleeping, or as qdora chooses.

    python benchmarks/wait_policy.py [--steps 10] [--repeats 5] [--busy-repeats 2] [--smoke]

Spinning is OpenMP's default. The command line sets OMP_WAIT_POLICY=PASSIVE on busy cores unless the user has chosen.
Each reading is `qdora train` of the quick start's recipe in a process of its own, with as many threads as cores: on
idle cores, and beside one busy loop per core. The policies take turns.

The bar: on idle cores the choice costs at most 2 %.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from byte_tokenizer import write_model, write_sums
from measure import alternating, facts, parser_of, printed, ratio, spread, write

from qdora.cli import WAITING
from qdora.files.environment import num_cpus
from qdora.files.run_directory import RunDirectory

# libgomp does not know KMP_BLOCKTIME; 200 is libomp's default. Set, it keeps the command line from choosing.
POLICIES: dict[str, dict[str, str]] = {"spinning": {"KMP_BLOCKTIME": "200"}, "sleeping": WAITING, "chosen": {}}
WARMUP_STEPS, BAR = 2, 0.02


def main() -> None:
    """Idle cores, then busy ones."""
    parser = parser_of(__doc__, "wait_policy", smoke="a random model")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a reading, after 2 others")
    parser.add_argument("--repeats", type=int, default=5, help="readings of each policy on idle cores")
    parser.add_argument("--busy-repeats", type=int, default=2, help="the same on busy ones, where spinning takes long")
    args = parser.parse_args()
    cores, more = num_cpus(), {}
    if args.smoke:
        args.steps, args.repeats, args.busy_repeats, more = 2, 1, 1, {"OMP_NUM_THREADS": "1"}
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        recipe = ["quickstart"]
        if args.smoke:
            write_model(root / "model")
            write_sums(root / "sums.jsonl")
            recipe = [str(smoke_recipe(root))]
        for name, num_loops, repeats in (("idle", 0, args.repeats), ("busy", cores, args.busy_repeats)):
            with busy_loops(num_loops):
                readings = {
                    policy: partial(tokens_per_second, recipe, args.steps, variables | more, root / name / policy)
                    for policy, variables in POLICIES.items()
                }
                found = alternating(readings, repeats, warmup=0)
            cases[name] = {
                "num_busy_loops": num_loops,
                "tokens_per_second": found,
                "spread": {policy: spread(values) for policy, values in found.items()},
                "sleeping / spinning": ratio(found["sleeping"], found["spinning"]),
                "chosen / spinning": ratio(found["chosen"], found["spinning"]),
            }
    command = f"python benchmarks/wait_policy.py --steps {args.steps} --repeats {args.repeats}"
    command += f" --busy-repeats {args.busy_repeats}"
    result = facts(command) | {
        "num_cores": cores,
        "num_steps": args.steps,
        "cases": cases,
        "bar": BAR,
        "passes": cases["idle"]["chosen / spinning"]["of_medians"] >= 1 - BAR,
    }
    write(args.out, result)


def smoke_recipe(root: Path) -> Path:
    """A recipe of a random model."""
    recipe = {
        "model": {"source": str(root / "model"), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8.0},
        "data": {"mix": [{"source": str(root / "sums.jsonl")}], "max_length": 96},
        "train": {"steps": 4, "batch": 4, "lr": 1e-3, "optimizer": "adamw"},
    }
    path = root / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep `count` processes computing."""
    # A loop ends with this process, even if that is killed.
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10_000))"
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait()


def tokens_per_second(recipe: list[str], num_steps: int, variables: dict[str, str], folder: Path) -> float:
    """Of the steps after the first two of a run in a process with these variables and no others of OpenMP."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    prefixes = ("OMP_", "GOMP_", "KMP_", "MKL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)} | variables
    settings = {"train.steps": WARMUP_STEPS + num_steps, "eval.at_start": "false", "eval.at_end": "false"}
    options = [part for key, value in settings.items() for part in ("-s", f"{key}={value}")]
    call = ("-m", "qdora.cli", "--quiet", "train", *recipe, *options, "--run-dir", str(run))
    printed(*call, environment=environment)
    steps = [line for line in RunDirectory(run).metrics() if "time" in line][WARMUP_STEPS:]
    assert len(steps) == num_steps, f"{len(steps)} steps in {run}"
    return float(sum(s["num_tokens"] for s in steps) / sum(s["time"]["step_seconds"] for s in steps))


if __name__ == "__main__":
    main()
