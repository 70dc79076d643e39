"""Kill one of four processes that divide a base, at seeded moments; resume with two, three or four.

    python benchmarks/sharded_kills.py [--count 20] [--seed 0] [--out FILE]

A random Llama of two blocks in NF4, float32, DoRA, `train.parallel: shard`, a checkpoint after each step, joined by
gloo. A moment is a share of the CPU time, of the steps, or (for the process that writes) of the operations on files of
the undisturbed run. The process gets SIGKILL; no launcher ends the others. They must end by themselves and name it. The
same run is resumed with another number of processes, and must end as the undisturbed one, apart from rounding.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from signal import SIGKILL
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hostile.moments import (
    CAME,
    NUM_STEPS,
    OPERATIONS,
    STEPS,
    Child,
    Moment,
    happens,
    leftovers,
    prepare,
    send,
    started,
)
from measure import facts, launch_variables, parser_of, write
from safetensors.torch import load_file

from qdora.files.run_directory import RunDirectory

NUM_PROCESSES = 4
MOST_SECONDS = 300
ROUNDING = 1e-4
"""Difference allowed between two adapters, relative to the largest entry: sums have another order."""
SETTINGS = {
    "train.parallel": "shard",
    "train.lr": 0.01,
    "train.optimizer": "adamw",
    "adapter.dropout": 0.0,
    "adapter.dtype": "float32",
    "eval.every": 3,
    "eval.best_by": "null",
    "memory.budget": "null",
}


def start(root: Path, run: Path, size: int, moment: Moment | None = None, sizes: Any = None) -> list[Child]:
    """Start `size` processes of the run, which resume it if it has begun."""
    changes = [word for name, value in SETTINGS.items() for word in ("-s", f"{name}={value}")]
    more = ["--resume"] if RunDirectory(run).has_begun else changes
    children = []
    for rank, variables in enumerate(launch_variables(size)):
        at: dict[str, Any] = {}
        if moment is not None and rank == moment.rank and moment.way != "time":
            whole = sizes[rank][("operation", "step").index(moment.way)]
            at = {moment.way: 1 + int(moment.share * whole), "action": happens(moment)}
        command = ["train", str(root / "recipe.yaml"), "-d", str(run), *more]
        children.append(started([command], run.parent, environment=variables, **at))
    return children


def finished(children: list[Child], moment: Moment | None = None, sizes: Any = None) -> float:
    """Wait for all to end, and kill one at the moment; returns the seconds from its end to that of the last."""
    began, ended_at, now = time.monotonic(), None, 0.0
    waiting = moment is not None and moment.way == "time"
    while sum(child.is_over() for child in children) < len(children):
        now = time.monotonic()
        if moment is not None and moment.rank is not None:
            hit = children[moment.rank]
            if waiting and hit.spent >= moment.share * sizes[moment.rank][2]:
                waiting = False
                send([hit], SIGKILL)
            ended_at = now if ended_at is None and hit.status is not None else ended_at
        if now - began > MOST_SECONDS:
            for child in children:
                child.hung = child.hung or child.status is None
            send(children, SIGKILL)
        time.sleep(0.01)
    return 0.0 if ended_at is None else now - ended_at


def drawn(seed: int, count: int) -> list[Moment]:
    """Every process in turn."""
    found = []
    for index in range(count):
        draw = random.Random(f"{seed} {index}")
        rank = index % NUM_PROCESSES
        way = draw.choice(["operation", "step", "time"] if rank == 0 else ["step", "time"])
        found.append(Moment("sharded", "kill", way, draw.random(), rank=rank))
    return found


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Lines of the steps in metrics.jsonl."""
    return [line for line in RunDirectory(run).metrics() if "loss" in line] if run.is_dir() else []


def difference(one: Path, two: Path) -> float:
    """Largest difference of an adapter's entries, relative to the largest entry of its tensor."""
    first, second = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, two))
    if first.keys() != second.keys():
        return float("inf")
    return max(float((second[name] - each).abs().max() / each.abs().max()) for name, each in first.items())


def killed(root: Path, whole: Path, moment: Moment, index: int, sizes: Any) -> dict[str, Any]:
    """Kill a process at the moment, resume with another number of processes, and compare with the undisturbed run."""
    run, size = root / f"life-{index}" / "run", 2 + index % 3
    run.parent.mkdir()
    children = start(root, run, NUM_PROCESSES, moment, sizes)
    seconds = finished(children, moment, sizes)
    hit, others = children[moment.rank or 0], [child for child in children if child is not children[moment.rank or 0]]
    faults = ["a process hangs"] if any(child.hung for child in children) else []
    cut = hit.status == -SIGKILL
    # Whoever hosts the store of the others cannot be told from the launcher that would host it otherwise.
    says = re.compile(rf"because process {moment.rank} (\(|or the launcher)")
    named = sum(says.search(child.last_line()) is not None for child in others)
    before = len(steps_of(run))
    newest = RunDirectory(run).newest_checkpoint() if run.is_dir() else None
    safe = 0 if newest is None else newest.step
    again = start(root, run, size)
    finished(again)
    faults += [f"the restart ends with {child.status}: {child.last_line()[:300]}" for child in again if child.status]
    ours, theirs = steps_of(run), steps_of(whole)
    found = {"loss": 0.0, "adapter": 0.0}
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        faults.append("steps are missing")
    elif not faults:
        pairs = zip(ours, theirs, strict=True)
        found["loss"] = max(abs(mine["loss"] - other["loss"]) / other["loss"] for mine, other in pairs)
        found["adapter"] = difference(whole, run)
        faults += [f"{name} differs by {value:.1e}" for name, value in found.items() if not value <= ROUNDING]
        faults += list(leftovers(run))
    if not faults:
        shutil.rmtree(run.parent)
    return {
        "process": moment.rank,
        "way": moment.way,
        "share": round(moment.share, 3),
        "came": bool(hit.counts[CAME]),
        "cut": cut,
        "named_by": named if cut else None,
        "seconds_to_end": round(seconds, 1) if cut else None,
        "steps_done": before,
        "steps_safe": safe,
        "resumed_with": size,
        "difference": found,
        "faults": faults,
        "last_line": re.sub(r"Safe on disk.*", "", others[0].last_line()) if cut else "",
    }


def main() -> None:
    """Exits with 1 if a life does not end right."""
    parser = parser_of(__doc__, "sharded_kills", smoke="one moment")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork takes no threads along
    began, lives = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        whole = root / "whole" / "run"
        whole.parent.mkdir()
        children = start(root, whole, NUM_PROCESSES)
        finished(children)
        if any(child.status for child in children):
            raise RuntimeError(f"the undisturbed run fails:\n{children[0].text()[-4000:]}")
        sizes = [(each.counts[OPERATIONS], each.counts[NUM_STEPS], each.spent) for each in children]
        for index, moment in enumerate(drawn(args.seed, 1 if args.smoke else args.count)):
            lives.append(killed(root, whole, moment, index, sizes))
            print(f"{time.monotonic() - began:.0f} s: {json.dumps(lives[-1])}", file=sys.stderr, flush=True)
    found = {
        "seed": args.seed,
        "num_steps": STEPS,
        "num_moments": len(lives),
        "num_right": sum(not life["faults"] for life in lives),
        "lives": lives,
        "seconds": round(time.monotonic() - began, 1),
    }
    write(args.out, facts(f"python benchmarks/sharded_kills.py --seed {args.seed} --count {args.count}") | found)
    sys.exit(0 if found["num_right"] == found["num_moments"] else 1)


if __name__ == "__main__":
    main()
