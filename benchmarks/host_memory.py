"""Host memory of loading a 16-bit checkpoint into NF4, and of a base divided among processes.

Random checkpoints of published shapes, each measurement in a process of its own. Peak: VmHWM, which counts the pages of
mapped files: a reader that keeps its files mapped would show the whole checkpoint.
"""

from __future__ import annotations

import gc
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (the kernels import it at their first use; the baseline must have it, too)
import torch
from accelerate import init_empty_weights
from frame import bench, cell, main, table, tabulated
from measure import ONE_THREAD, alone, launch_variables, peak_rss_bytes, reset_peak_rss, status_bytes
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from qdora.memory.oom import return_freed_memory
from qdora.memory.shard import ShardedBase
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.plan.fit import plan
from qdora.plan.plan import public_shapes
from qdora.plan.show import process_plans
from qdora.quant.packed import quantize
from qdora.recipe.recipe_file import recipe_from
from qdora.train.distributed import mesh_of, processes_of_launch

ALLOWANCE_BYTES, SHARD_BYTES = 300 * 10**6, 500 * 10**6
_COMMON = {"vocab_size": 32_768, "max_position_embeddings": 4096, "num_attention_heads": 32}
_COMMON |= {"tie_word_embeddings": False}
# Llama-2-7B's layer and Mistral's vocabulary; untied, so that embedding and head are both there in 16 bits.
DENSE = _COMMON | {"hidden_size": 4096, "intermediate_size": 11_008, "num_key_value_heads": 32}
# Qwen3-30B-A3B's blocks, with Mistral's vocabulary: with its own, the embedding would dwarf the experts.
EXPERTS = _COMMON | {"hidden_size": 2048, "intermediate_size": 6144, "num_key_value_heads": 4, "head_dim": 128}
EXPERTS |= {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}


def write_checkpoint(directory: Path, shape: dict[str, Any], family: str = "llama") -> tuple[int, int]:
    """Random bf16 weights in shards, a tensor at a time; returns (bytes, bytes of the largest tensor).

    Stacked experts, (experts, out, in), are a tensor for each expert and projection, as they are published.
    """
    config = AutoConfig.for_model(family, **shape, dtype="bfloat16")
    config.save_pretrained(directory)
    with init_empty_weights():
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in parameters.items():
        if parameter.ndim < 3:
            shapes[name] = tuple(parameter.shape)
            continue
        owner, _, last = name.rpartition(".")
        count, rows, columns = parameter.shape
        names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for expert in range(count):
            shapes |= {f"{owner}.{expert}.{each}.weight": (rows // len(names), columns) for each in names}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = largest = held = 0
    for position, (name, size) in enumerate(shapes.items(), start=1):
        shard[name] = torch.randn(size, generator=generator, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
        num_bytes = shard[name].nbytes
        total, held, largest = total + num_bytes, held + num_bytes, max(largest, num_bytes)
        if held >= SHARD_BYTES or position == len(shapes):
            file = f"model-{position:05d}.safetensors"
            save_file(shard, directory / file)
            weight_map |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, largest


@bench(smoke={"layers": 1})
def load_memory(layers: int = 4, experts: bool = False, *, smoke: bool) -> dict[str, Any]:
    """Peak of loading; with --experts, --layers 3 and --out .../load_memory_experts.json blocks of a mixture."""
    shape = (EXPERTS if experts else DENSE) | {"num_hidden_layers": layers}
    if smoke:
        shape |= {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64, "vocab_size": 512}
    with tempfile.TemporaryDirectory() as folder:
        total, largest = write_checkpoint(Path(folder), shape, "qwen3_moe" if experts else "llama")
        baseline, loaded = (alone(_loaded, source, variables=ONE_THREAD) for source in (None, folder))
    allowed, used = loaded["held"] + 2 * largest + ALLOWANCE_BYTES, loaded["peak"] - baseline["peak"]
    return {
        "shape": shape,
        "checkpoint_bytes": total,
        "packed_model_bytes": loaded["held"],
        "largest_tensor_bytes": largest,
        "used_bytes": used,
        "allowed_bytes": allowed,
    }


def _loaded(directory: str | None) -> dict[str, int]:
    quantize(torch.zeros(64, 64), "nf4")
    model = nn.Module() if directory is None else load_model(resolve(directory), quant="nf4")
    return {"peak": peak_rss_bytes(), "held": _held_bytes(model)}


def _held_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, each memory once; of a divided one this process's share."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memory = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        seen[memory._cdata] = memory.nbytes()
    return sum(seen.values())


@table("load_memory", "load_memory_experts")
def load_memory_table(dense: Any, experts: Any) -> str:
    names = {"checkpoint": "checkpoint", "packed model": "packed_model", "largest tensor": "largest_tensor"}
    names |= {"peak over an empty process": "used", "limit": "allowed"}
    columns = {title: f"{{1[{name}_bytes]:.3fGiB}} GiB" for title, name in names.items()}
    return tabulated([("Llama", dense), ("mixture of experts", experts)], {"model": "{0}", **columns})


MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096, "num_attention_heads": 8}
SMALL |= {"num_hidden_layers": 2}


@bench(smoke={"processes": (1, 2)})
def sharded_memory(
    work: str = "work/sharded_memory", layers: int = 32, processes: tuple[int, ...] = (1, 2, 4), *, smoke: bool
) -> dict[str, Any]:
    """What each process of a launch holds of a divided base, and took to load it, over gloo on the CPU.

    Writes a random 16-bit checkpoint of the shape of Llama-3-8B to --work (16 GB), and loads it as a run with
    train.parallel: shard does. Every process first loads a small model in the same way and frees it, so that what
    Python imports and torch sets up with the first one is not taken for memory of the base.
    """
    base = Path(work)
    shape = {name: value for name, value in public_shapes()[MODEL].values.items() if name != "model_type"}
    shape |= SMALL if smoke else {"num_hidden_layers": layers}
    total, largest = write_checkpoint(base, shape)
    write_checkpoint(base / "small", shape | SMALL)
    found: dict[str, Any] = {}
    for size in processes:
        idle = _launched(size, str(base / "small"))
        pairs = list(zip(_launched(size, str(base / "small"), work), idle, strict=True))
        held = [each["held"] for each, _ in pairs]
        found[str(size)] = {
            "held_bytes": held,
            "resident_bytes": [each["resident"] - before["resident"] for each, before in pairs],
            "peak_bytes": [each["peak"] - before["peak"] for each, before in pairs],
            "planned_bytes": _planned_bytes(base, size),
            "allowed_peak_bytes": max(held) + 2 * largest + ALLOWANCE_BYTES,
        }
    sizes = {"checkpoint_bytes": total, "largest_tensor_bytes": largest}
    return {"model": MODEL, "shape": shape, **sizes, "processes": found}


def _launched(size: int, *directories: str) -> list[dict[str, int]]:
    """What `_share` returns in each of `size` processes, which are connected as torchrun's are."""
    with ThreadPoolExecutor(size) as threads:
        each_variables = [ONE_THREAD | variables for variables in launch_variables(size)]
        calls = [threads.submit(alone, _share, *directories, variables=variables) for variables in each_variables]
        return [call.result() for call in calls]


def _share(small: str, directory: str | None = None) -> dict[str, int]:
    """Load this process's share of a small model and free it, then that of a base, if it is given."""
    with processes_of_launch() as processes:
        processes = processes.dividing(base=True)
        mesh = mesh_of(processes, torch.device("cpu"), "shard")

        def loaded(source: str) -> nn.Module:
            placer = None if mesh is None else ShardedBase(mesh)
            return load_model(resolve(source), quant="nf4", compute_dtype=torch.bfloat16, placer=placer)

        loaded(small)
        gc.collect()
        return_freed_memory()
        reset_peak_rss()
        model = nn.Module() if directory is None else loaded(directory)
        processes.gather(None)  # all have loaded
        return {"held": _held_bytes(model), "peak": peak_rss_bytes(), "resident": status_bytes("VmRSS")}


def _planned_bytes(directory: Path, size: int) -> int:
    """What the plan says that a process holds of the base from step to step."""
    train = {"steps": 1, "batch": 1, "parallel": "shard", "checkpoint_every": None}
    data = {"mix": [{"task": "demo/howto"}], "max_length": 64}
    model = {"source": str(directory), "tokenizer": "builtin", "dtype": "bfloat16"}
    found = plan(recipe_from({"model": model, "data": data, "train": train}), device_kind="cpu")
    ways = process_plans({"replicate": found, "shard": found}, size)
    return next(way["base_bytes"] for way in ways if way["num_sharing"] == size)


@table("sharded_memory")
def sharded_memory_table(result: Any) -> str:
    def beside_plan(what: str, each: Any) -> str:
        most = max(each[what])
        return cell("{0:.3fGiB}", (most,)) + f" ({most / each['planned_bytes'] - 1:+.1%})"

    columns = {
        "processes; GiB of each": "{0}",
        "planned": "{1[planned_bytes]:.3fGiB}",
        "counted": lambda item: beside_plan("held_bytes", item[1]),
        "resident after loading": lambda item: beside_plan("resident_bytes", item[1]),
        "peak while loading": lambda item: cell("{0:.2fGiB}", (max(item[1]["peak_bytes"]),)),
        "limit": "{1[allowed_peak_bytes]:.2fGiB}",
    }
    pairs = [(each["resident_bytes"], each["held_bytes"]) for each in result["processes"].values()]
    more = [(one - other) / 1e6 for pair in pairs for one, other in zip(*pair, strict=True)]
    note = f"\nResident minus counted: {min(more):.0f} to {max(more):.0f} MB. Tolerance: 3%.\n"
    return tabulated(result["processes"].items(), columns) + note


if __name__ == "__main__":
    main()
