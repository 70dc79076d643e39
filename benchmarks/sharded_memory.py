"""What each process holds of a base that 1, 2 and 4 processes divide, and the memory that loading takes.

    python benchmarks/sharded_memory.py --work DIR [--layers 32] [--out FILE] [--smoke]

Writes a random 16-bit checkpoint of the shape of Llama-3-8B to DIR (16 GB), or reads the one there, and loads it as a
run with train.parallel: shard does, in NF4 with double quantisation, over gloo on the CPU.

counted    bytes of all parameters and buffers of a process
resident   resident set behind loading, over that of a process that has connected the same
peak       the largest resident set while loading, over the same

Every process first loads a small model in the same way and frees it, so that what Python imports and torch sets up with
the first one is not taken for memory of the base.

Bars: what each process holds is within 3 % of the plan, which is base / N + what is not divided; its resident set, too;
and loading takes at most its share, twice the largest tensor of the checkpoint, and 300 MB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from load_memory import ALLOWANCE_BYTES, write_checkpoint
from measure import ONE_THREAD, facts, launch_variables, parser_of, peak_rss_bytes, reset_peak_rss, status_bytes, write

from qdora.plan.public_shapes import public_shapes

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096, "num_attention_heads": 8}
SIZES = (1, 2, 4)
BAR = 0.03
RECORD = "checkpoint.json"
"""Says what a checkpoint is made of, beside it: written last, so it is there only if the checkpoint is whole."""


def main() -> None:
    """All numbers of processes, against the plan."""
    parser = parser_of(__doc__, "sharded_memory", smoke="a small shape")
    parser.add_argument("--work", type=Path, help="directory of the checkpoint")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--measure", nargs="+", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measured(*args.measure)
        return
    if args.work is None:
        parser.error("--work must be given: where the checkpoint is written")
    shape = {name: value for name, value in public_shapes()[MODEL].values.items() if name != "model_type"}
    shape |= {**SMALL, "num_hidden_layers": 2} if args.smoke else {"num_hidden_layers": args.layers}
    total, largest, _ = checkpoint(args.work, shape)
    checkpoint(args.work / "small", shape | SMALL | {"num_hidden_layers": 2})
    sizes = SIZES[:2] if args.smoke else SIZES
    found = {str(size): one_division(args.work, size) for size in sizes}
    for size, each in found.items():
        each["planned_bytes"] = planned_bytes(args.work, int(size))
        each["allowed_peak_bytes"] = max(each["held_bytes"]) + 2 * largest + ALLOWANCE_BYTES
    result = {
        **facts(f"python benchmarks/sharded_memory.py --work DIR --layers {shape['num_hidden_layers']}"),
        "model": MODEL,
        "shape": shape,
        "base": "nf4, block size 64, double quantisation, head and embedding in bfloat16",
        "checkpoint_bytes": total,
        "largest_tensor_bytes": largest,
        "bar": BAR,
        "processes": found,
        "passes": verdict(found),
    }
    write(args.out, result)


def checkpoint(directory: Path, shape: dict[str, Any]) -> tuple[int, int, int]:
    """The bytes, the largest tensor's bytes and the files of the checkpoint, which is written if it is not there."""
    record = directory / RECORD
    if not record.is_file() or json.loads(record.read_text())["shape"] != shape:
        directory.mkdir(parents=True, exist_ok=True)
        sizes = {name: value for name, value in shape.items() if name != "num_hidden_layers"}
        made = write_checkpoint(directory, shape["num_hidden_layers"], sizes)
        record.write_text(json.dumps({"shape": shape, "made": made}))
    total, largest, num_files = json.loads(record.read_text())["made"]
    return total, largest, num_files


def one_division(directory: Path, size: int) -> dict[str, Any]:
    """What each of `size` processes holds of the base, and took to load it, over processes that do not load it."""
    idle, began = launched(directory, size, loads=False), time.perf_counter()
    loaded = launched(directory, size, loads=True)
    pairs = list(zip(loaded, idle, strict=True))
    return {
        "held_bytes": [each["held"] for each in loaded],
        "resident_bytes": [each["resident"] - before["resident"] for each, before in pairs],
        "peak_bytes": [each["peak"] - before["peak"] for each, before in pairs],
        "idle_peak_bytes": [each["peak"] for each in idle],
        "seconds": time.perf_counter() - began,
    }


def launched(work: Path, size: int, *, loads: bool) -> list[dict[str, int]]:
    """What `measured` prints in each of `size` processes, which are connected as torchrun's are."""
    call = [sys.executable, __file__, "--measure", str(work / "small"), *([str(work)] if loads else [])]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(call, env={**os.environ, **ONE_THREAD, **variables}, **pipes)
        for variables in launch_variables(size)
    ]
    found = []
    for process in processes:
        out, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(call[1:])}: exit {process.returncode}\n{errors[-4000:]}")
        found.append(json.loads(out.splitlines()[-1]))
    return found


def measured(small: Path, directory: Path | None = None) -> None:
    """Run in a process of a launch: load this process's share of a small model and free it, then that of a base, if it
    is given; prints one JSON line."""
    import torch
    from torch import nn

    from qdora.memory.allocator import return_freed_memory
    from qdora.memory.sharded_base import ShardedBase
    from qdora.model.load import load_model
    from qdora.model.source import resolve
    from qdora.train.distributed import mesh_of, processes_of_launch

    with processes_of_launch() as processes:
        processes = processes.dividing(base=True)
        mesh = mesh_of(processes, torch.device("cpu"), "shard")

        def loaded(source: Path) -> nn.Module:
            placer = None if mesh is None else ShardedBase(mesh)
            return load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.bfloat16, placer=placer)

        loaded(small)
        gc.collect()
        return_freed_memory()
        reset_peak_rss()
        model: nn.Module = nn.Module() if directory is None else loaded(directory)
        processes.gather(None)  # all have loaded
        print(json.dumps({"held": held_bytes(model), "peak": peak_rss_bytes(), "resident": status_bytes("VmRSS")}))


def held_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, each memory once."""
    from torch.distributed.tensor import DTensor

    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memory = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        seen[memory._cdata] = memory.nbytes()
    return sum(seen.values())


def planned_bytes(directory: Path, size: int) -> int:
    """What the plan says that a process holds of the base from step to step."""
    from qdora.plan.division import WholePlans, process_plans
    from qdora.plan.memory_plan import plan
    from qdora.recipe.recipe_file import recipe_from

    train = {"steps": 1, "batch": 1, "parallel": "shard", "checkpoint_every": None}
    data = {"mix": [{"task": "demo/howto"}], "max_length": 64}
    model = {"source": str(directory), "tokenizer": "builtin", "dtype": "bfloat16"}
    found = plan(recipe_from({"model": model, "data": data, "train": train}), device_kind="cpu")
    ways = process_plans(WholePlans(found, found), size)
    return next(each.base_bytes for each in ways if each.num_sharing == size)


def verdict(found: dict[str, Any]) -> dict[str, bool]:
    """Whether all processes keep to the bars."""

    def near(what: str) -> bool:
        return all(
            abs(held / each["planned_bytes"] - 1) <= BAR
            for size, each in found.items()
            if int(size) > 1
            for held in each[what]
        )

    return {
        "counted": near("held_bytes"),
        "resident": near("resident_bytes"),
        "loading": all(max(each["peak_bytes"]) <= each["allowed_peak_bytes"] for each in found.values()),
    }


if __name__ == "__main__":
    main()
