"""Peak host memory of loading a 16-bit checkpoint into NF4, in a fresh process.

    python benchmarks/load_memory.py [--layers 4] [--out benchmarks/results/load_memory.json]
    python benchmarks/load_memory.py --experts --layers 3 --out benchmarks/results/load_memory_experts.json

Writes a random Llama-shaped checkpoint (or one of Qwen3-30B-A3B's blocks, each expert's projections as tensors of their
own) to a temporary directory, loads it in one fresh process and imports the same
libraries, without loading, in another. Floor: the packed model itself. Allowed: packed bytes + twice the largest tensor
of the checkpoint + 300 MB over the process that only imports. The figure is VmHWM, which counts the pages of mapped
files: a reader that keeps its files mapped would show the whole checkpoint here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import ONE_THREAD, facts, fresh, parser_of, peak_rss_bytes, write

ALLOWANCE_BYTES = 300 * 10**6
SHARD_BYTES = 500 * 10**6
# Llama-2-7B's layer and Mistral's vocabulary; untied, so that embedding and head are both there in 16 bits.
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


# Qwen3-30B-A3B's blocks, with Mistral's vocabulary: with its own, the embedding would dwarf the experts.
EXPERTS_SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def published_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a checkpoint; stacked experts, (experts, out, in), are a tensor each."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 3:
            shapes[name] = tuple(parameter.shape)
            continue
        owner, _, last = name.rpartition(".")
        count, rows, columns = parameter.shape
        names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for expert in range(count):
            shapes |= {f"{owner}.{expert}.{each}.weight": (rows // len(names), columns) for each in names}
    return shapes


def write_checkpoint(
    directory: Path, num_layers: int, shape: dict[str, Any] = SHAPE, family: str = "llama"
) -> tuple[int, int, int]:
    """Random bf16 weights in shards, a tensor at a time; returns (bytes, bytes of the largest tensor, shards)."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **shape, num_hidden_layers=num_layers, dtype="bfloat16")
    config.save_pretrained(directory)
    with init_empty_weights():
        shapes = published_shapes(AutoModelForCausalLM.from_config(config))
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = largest = held = count = 0
    for position, (name, shape) in enumerate(shapes.items(), start=1):
        shard[name] = torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
        size = shard[name].numel() * 2
        total, held, largest = total + size, held + size, max(largest, size)
        if held >= SHARD_BYTES or position == len(shapes):
            count += 1
            file = f"model-{count:05d}.safetensors"
            save_file(shard, directory / file)
            weight_map |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, largest, count


def measured(directory: Path | None) -> None:
    """Run in a fresh process: load `directory`, or nothing; prints one JSON line."""
    import bitsandbytes  # noqa: F401  (imported at the first use by the kernels; the baseline must have it, too)
    import torch

    from qdora.model.load import load_model
    from qdora.model.source import resolve
    from qdora.ops.packed import quantize

    quantize(torch.zeros(64, 64), "nf4")
    held = 0
    if directory is not None:
        model = load_model(resolve(str(directory)), quant="nf4")
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        held = sum(t.numel() * t.element_size() for t in tensors.values())
    print(json.dumps({"peak": peak_rss_bytes(), "held": held}))


def main() -> None:
    parser = parser_of(__doc__, "load_memory")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", action="store_true", help="blocks of a mixture of experts")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.measure is not None:
        measured(Path(settings.measure) if settings.measure else None)
        return
    with tempfile.TemporaryDirectory() as name:
        shape, family = (EXPERTS_SHAPE, "qwen3_moe") if settings.experts else (SHAPE, "llama")
        total, largest, num_shards = write_checkpoint(Path(name), settings.layers, shape, family)
        baseline = fresh(__file__, "--measure", "", variables=ONE_THREAD)
        loaded = fresh(__file__, "--measure", name, variables=ONE_THREAD)
    allowed = loaded["held"] + 2 * largest + ALLOWANCE_BYTES
    used = loaded["peak"] - baseline["peak"]
    result = {
        **facts(f"python benchmarks/load_memory.py{' --experts' * settings.experts} --layers {settings.layers}"),
        "shape": shape | {"num_hidden_layers": settings.layers},
        "checkpoint_dtype": "bfloat16",
        "base": "nf4, block size 64, double quantisation, head and embedding in bfloat16",
        "num_shards": num_shards,
        "checkpoint_bytes": total,
        "packed_model_bytes": loaded["held"],
        "largest_tensor_bytes": largest,
        "baseline_peak_bytes": baseline["peak"],
        "load_peak_bytes": loaded["peak"],
        "used_bytes": used,
        "allowed_bytes": allowed,
        "passes": used <= allowed,
    }
    write(settings.out, result)


if __name__ == "__main__":
    main()
