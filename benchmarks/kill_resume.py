"""Runs that are killed, run out of disk or lose a part of a checkpoint: is what they end with the same, bit for bit?

    python benchmarks/kill_resume.py [--kills 20] [--seed 0] [--out benchmarks/results/kill_resume.json] [--smoke]

A random Llama of two blocks in NF4 with DoRA and dropout, twelve steps on a mix of two sources, a checkpoint after each
step. Every run is a process of its own, and is compared with one that nothing disturbed: adapter/ byte for byte, and
metrics.jsonl without its times.

    kill        SIGKILL after a random share of the CPU time that the undisturbed run took, then --resume
    full disk   the kernel refuses to write more than half of the optimizer's file (RLIMIT_FSIZE) at step 7: the run
                must say so, name the checkpoint of step 6 and leave it whole; then --resume without the limit
    truncated   one file of the newest checkpoint is cut at a random byte: --resume must say so and take the one before

CPU time, not the clock: a busy machine then has no say in where the kills fall. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from measure import RESULTS, facts, write
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.files.atomic import is_leftover
from qdora.files.run_directory import RunDirectory
from qdora.recipe.recipe_file import recipe_from
from qdora.run import writer
from qdora.run.train import train_run

STEPS, FULL_AT = 12, 7
FILES = (
    "adapter/adapter_model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "complete.json",
)


def main() -> None:
    """All cases; exits with 1 if one of them differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_resume.json")
    parser.add_argument("--smoke", action="store_true", help="one kill, one cut file: shows that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork takes no threads along
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    generator = random.Random(args.seed)
    num_kills, files = (1, FILES[1:2]) if args.smoke else (args.kills, FILES)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        seconds = finished(root, root / "whole")  # what all others are compared with
        shares = [generator.random() for _ in range(num_kills)]
        kills = [killed(root, index, share, seconds) for index, share in enumerate(shares)]
        full = full_disk(root)
        cuts = [truncated(root, file, generator.random()) for file in files]
    cases = [*kills, full, *cuts]
    result = facts("python benchmarks/kill_resume.py") | {
        "seed": args.seed,
        "num_steps": STEPS,
        "run_cpu_seconds": seconds,
        "kills": kills,
        "full_disk": full,
        "truncated": cuts,
        "num_cases": len(cases),
        "num_identical": sum(case["identical"] for case in cases),
        "all_said": full["said"] and all(cut["said"] for cut in cuts),
    }
    write(args.out, result)
    sys.exit(0 if result["num_identical"] == len(cases) and result["all_said"] else 1)


def prepare(root: Path) -> None:
    """Model, tokenizer (a token per byte) and data."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(root / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    for sign, apply in (("+", int.__add__), ("-", int.__sub__)):
        rows = [{"prompt": f"{a} {sign} {b} =", "completion": f" {apply(a, b)}"} for a in range(6) for b in range(5)]
        (root / f"data{sign}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(root: Path, run: Path) -> None:
    """The run from its start, or from where it stopped."""
    recipe = recipe_from(
        {
            "model": {"source": str(root / "model"), "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
            "data": {"mix": [{"source": str(root / f"data{sign}.jsonl")} for sign in "+-"], "max_length": 96},
            "train": {"steps": STEPS, "batch": 4, "lr": 1e-3, "optimizer": "adamw", "checkpoint_every": 1},
        }
    )
    train_run(recipe, run, resume=RunDirectory(run).recipe_file.exists(), console=Console(quiet=True))


def started(action: Callable[[], None], said: Path) -> int:
    """Run the action in a process of its own, what it says in a file; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with said.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            action()
        status = 0
    except Exception as error:
        with said.open("a") as stream:
            stream.write(f"{type(error).__name__}: {error}\n")
            traceback.print_exc(file=stream)
    finally:
        os._exit(status)


def finished(root: Path, run: Path) -> float:
    """Train to the end; the CPU seconds that it took.

    Raises:
        RuntimeError: If it fails, with what it said.
    """
    said = root / f"{run.name}.txt"
    _, status, usage = os.wait4(started(lambda: train(root, run), said), 0)
    if status != 0:
        raise RuntimeError(f"{run.name}: status {status}\n{said.read_text()[-4000:]}")
    return usage.ru_utime + usage.ru_stime


def killed(root: Path, index: int, share: float, seconds: float) -> dict[str, Any]:
    """SIGKILL after that share of the run's CPU seconds, resume, compare."""
    run = root / f"kill-{index}"
    child = started(lambda: train(root, run), root / f"{run.name}.txt")
    while cpu_seconds(child) < share * seconds and os.waitid(os.P_PID, child, _STILL) is None:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    newest = RunDirectory(run).newest_checkpoint()
    found = {
        "share": share,
        "killed": os.WIFSIGNALED(status),
        "newest_step": newest.step if newest else 0,
        "leftovers": len([path for path in run.rglob("*") if is_leftover(path)]),
    }
    finished(root, run)
    return found | {"identical": same(root, run)}


_STILL = os.WEXITED | os.WNOHANG | os.WNOWAIT


def cpu_seconds(child: int) -> float:
    """User and system time of a process, in steps of a clock tick."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def full_disk(root: Path) -> dict[str, Any]:
    """No room for the whole of a checkpoint; then room again."""
    run, said = root / "full", root / "full.txt"
    half = (root / f"whole/checkpoints/step-{STEPS}/optimizer.safetensors").stat().st_size // 2

    def train_short_of_room() -> None:
        real = writer.write_state

        def filling(directory: Path, **state: Any) -> None:
            if state["step"] >= FULL_AT:
                resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
            real(directory, **state)

        writer.write_state = filling
        train(root, run)

    _, status = os.waitpid(started(train_short_of_room, said), 0)
    newest = RunDirectory(run).newest_checkpoint()
    text = said.read_text()
    whole_before = newest is not None and newest.step == FULL_AT - 1
    told = status != 0 and "the disk is full" in text and f"step-{FULL_AT - 1}." in text
    finished(root, run)
    return {"said": told and whole_before, "identical": same(root, run)}


def truncated(root: Path, file: str, share: float) -> dict[str, Any]:
    """One file of the newest checkpoint cut short, the adapter gone; resume, compare."""
    run = root / f"cut-{file.replace('/', '-')}"
    shutil.copytree(root / "whole", run)
    shutil.rmtree(run / "adapter")
    path = run / f"checkpoints/step-{STEPS}" / file
    kept = int(share * path.stat().st_size)
    os.truncate(path, kept)
    finished(root, run)
    log = (run / "log.txt").read_text()
    told = f"Skipped a damaged checkpoint: step-{STEPS}" in log and f"step-{STEPS - 1}" in log
    return {"file": file, "kept_bytes": kept, "said": told, "identical": same(root, run)}


def same(root: Path, run: Path) -> bool:
    """Whether the adapter and the metrics are those of the undisturbed run."""
    adapter = "adapter/adapter_model.safetensors"
    one, two = root / "whole", run
    return (one / adapter).read_bytes() == (two / adapter).read_bytes() and timeless(one) == timeless(two)


def timeless(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock has put into it."""
    lines = RunDirectory(run).metrics()
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


if __name__ == "__main__":
    main()
