"""How far can a base be quantised and pruned before an adapter stops repairing it, and does DoRA go farther than LoRA?

    python benchmarks/study.py DATA [--dir runs/studies/compressed] [--processes 2] [--bases nf4,nf2,...]

DATA holds <task>/<split>.parquet in the schema of the README ("Your own data"). A `qdora study` of SmolLM2-135M on the
commonsense tasks, in two passes over one directory: every learning rate with the first seed; then, at the rate that the
choosing half of the validation examples prefers for each arm on each base, the other seeds. Stopped, it goes on where
it was. The report is then copied to `--out`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from curvature import write_small_model
from measure import RESULTS, facts
from mixed_data import TASKS

from qdora.atomic_files import atomic_write_json, atomic_write_text
from qdora.study.arms import Results, find_arms
from qdora.study.config import load_study
from qdora.study.grid import expand
from qdora.study.store import StudyDirectory
from qdora.verbs.report import report_run

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
RATES = (1e-3, 3e-3, 6e-3)
SEEDS = (0, 1, 2)


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
    command = f"python benchmarks/study.py DATA --bases {args.bases} --adapters {args.adapters}"
    command += f" --steps {args.steps} --batch {args.batch} --limit {args.limit}"
    head = facts(command)
    args.dir.mkdir(parents=True, exist_ok=True)
    file = args.dir / "grid.yaml"
    for chosen in (False, True):
        document = grid(args) | ({"include": others(args.dir)} if chosen else {})
        atomic_write_text(file, yaml.safe_dump(document, sort_keys=False))
        if not args.report:
            run(file, args.dir, args.processes)
    report_run(args.dir)
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
    if args.smoke:
        mix: list[dict[str, Any]] = [{"task": "demo/facts", "limit": 40}]
        model = write_small_model(args.dir / "model")
    else:
        mix = [{"task": task, "path": str(args.data.resolve() / task), "limit": 2000} for task in TASKS]
        model = "builtin"
    return {
        "recipe": "quickstart",
        "settings": {
            "model.source": model,
            "adapter.rank": 16,
            "adapter.alpha": 32.0,
            "data.mix": mix,
            "data.strategy": "equal",
            "data.max_length": 256,
            "data.too_long": "drop",
            "train.steps": args.steps,
            "train.batch": args.batch,
            "eval.limit": args.limit,
            "eval.at_start": False,
            "memory.checkpointing": False,
        },
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


def others(directory: Path) -> list[dict[str, Any]]:
    """The other seeds of every trained arm, at the learning rate that was chosen for it."""
    study = load_study(directory / "grid.yaml")
    store = StudyDirectory(directory)
    cells = [cell.record() for cell in expand(study)]
    arms = find_arms(cells, study.compare, Results(store, "validation"))
    return [
        {
            **arm.context,
            "adapter": arm.name,
            "train.lr": float(arm.chosen["train.lr"]),
            "train.seed": list(SEEDS[1:]),
        }
        for arm in arms
        if arm.is_trained
    ]


def run(file: Path, directory: Path, processes: int) -> None:
    """`qdora study` in some processes at once; a failure of one ends this."""
    call = [sys.executable, "-m", "qdora.cli", "--quiet", "study", str(file), "--dir", str(directory)]
    started = [subprocess.Popen(call) for _ in range(processes)]
    codes = [each.wait() for each in started]
    if any(codes):
        raise SystemExit(f"qdora study ended with {codes}; the same command goes on")


def keep(directory: Path, out: Path, head: dict[str, Any]) -> None:
    """The report and the grid, without the paths of this machine."""
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(directory / "report", out)
    document = yaml.safe_load((directory / "grid.yaml").read_text(encoding="utf-8"))
    for source in document["settings"]["data.mix"]:
        if "path" in source:
            source["path"] = f"DATA/{source['task']}"
    atomic_write_text(out / "grid.yaml", yaml.safe_dump(document, sort_keys=False))
    atomic_write_json(out / "run.json", head)
    print(json.dumps(head))


if __name__ == "__main__":
    main()
