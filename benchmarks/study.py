"""How far can a base be quantised and pruned before an adapter stops repairing it, and does DoRA go farther than LoRA?

    python benchmarks/study.py DATA [--dir runs/studies/compressed] [--processes 2] [--bases nf4,nf2,...]

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. A `qdora study` of SmolLM2-135M on the
commonsense tasks, in two passes over one directory: every learning rate with the first seed; then, at the rate that the
choosing half of the validation examples prefers for each arm on each base, the other seeds. Stopped, it goes on where
it was. The report is then copied to `--out`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from measure import RESULTS, facts
from two_passes import RATES, SEEDS, common_settings, keep, two_passes

DENSE = {"base.quant": "none", "base.block_size": None, "base.double_quant": None}
WANDA = {
    "base.prune.method": "wanda",
    "base.prune.calibration.sequences": 64,
    "base.prune.calibration.length": 128,
}


def quantised(name: str, **more: Any) -> dict[str, Any]:
    """Settings of a 4-bit code book or a research one."""
    return {"base.quant": name, **more}


def pruned(base: dict[str, Any], share: float | None = None, pattern: str = "unstructured") -> dict[str, Any]:
    """Wanda on top of a base."""
    sparsity = {} if share is None else {"base.prune.sparsity": share}
    return {**base, **WANDA, "base.prune.pattern": pattern, **sparsity}


BASES: dict[str, dict[str, Any]] = {
    "16 bits": DENSE,
    "int8": {"base.quant": "int8", "base.block_size": None, "base.double_quant": None},
    "nf4": quantised("nf4"),
    "nf3": quantised("nf3"),
    "nf2": quantised("nf2"),
    "30 %": pruned(DENSE, 0.3),
    "50 %": pruned(DENSE, 0.5),
    "70 %": pruned(DENSE, 0.7),
    "2:4": pruned(DENSE, pattern="2:4"),
    "nf4, 50 %": pruned(quantised("nf4"), 0.5),
    "nf4, 2:4": pruned(quantised("nf4"), pattern="2:4"),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter.kind": "lora"},
    "dora": {"adapter.kind": "dora"},
    "dora, masked": {"adapter.kind": "dora", "adapter.mask": "keep"},
}


def main() -> None:
    """Both passes and the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="not needed with --smoke")
    parser.add_argument("--dir", type=Path, default=Path("runs/studies/compressed"))
    parser.add_argument("--out", type=Path, default=RESULTS / "study")
    parser.add_argument("--bases", default=",".join(BASES).replace(", ", "+"), help="names; + stands for ', '")
    parser.add_argument("--adapters", default="lora,dora,dora+masked")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=24, help="validation examples of each task")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--smoke", action="store_true", help="a random model and two steps: shows that it runs")
    args = parser.parse_args()
    if not args.smoke and args.data is None:
        parser.error("DATA is missing")
    command = f"python benchmarks/study.py DATA --bases {shlex.quote(args.bases)} --adapters {args.adapters}"
    command += f" --steps {args.steps} --batch {args.batch} --limit {args.limit}"
    head = facts(command)
    args.dir.mkdir(parents=True, exist_ok=True)
    two_passes(grid(args), args.dir, partial(run, processes=0 if args.report else args.processes))
    keep(args.dir, args.out, head)


def names(text: str, known: dict[str, Any]) -> dict[str, Any]:
    """The named entries, in the order of the table."""
    wanted = [name.replace("+", ", ") for name in text.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"no such name: {', '.join(unknown)}; allowed: {', '.join(known)}")
    return {name: settings for name, settings in known.items() if name in wanted}


def grid(args: argparse.Namespace) -> dict[str, Any]:
    """The first pass as a study file."""
    bases, adapters = names(args.bases, BASES), names(args.adapters, ADAPTERS)
    dense = [name for name, settings in bases.items() if "base.prune.method" not in settings]
    return {
        "recipe": "quickstart",
        "settings": {"adapter.rank": 16, "adapter.alpha": 32.0, **common_settings(args)},
        "product": {"base": bases, "adapter": adapters, "train.lr": list(RATES), "train.seed": [SEEDS[0]]},
        "exclude": [{"adapter": "dora, masked", "base": dense}] if dense and "dora, masked" in adapters else [],
        "compare": {
            "arm": "adapter",
            "choose": ["train.lr"],
            "seed": "train.seed",
            "reference": next(iter(adapters)),
            "metric": "nll_per_token",
        },
    }


def run(file: Path, directory: Path, processes: int) -> None:
    """`qdora study` in some processes at once; a failure of one ends this."""
    call = [sys.executable, "-m", "qdora.cli", "study", str(file), "--dir", str(directory)]
    started = [subprocess.Popen(call) for _ in range(processes)]
    codes = [each.wait() for each in started]
    if any(codes):
        raise SystemExit(f"qdora study ended with {codes}; the same command goes on")


if __name__ == "__main__":
    main()
