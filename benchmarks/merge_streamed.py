"""Memory and speed of the streamed merge at the shapes of an 8B model.

    python benchmarks/merge_streamed.py [--layers 4] [--out benchmarks/results/merge_streamed.json]

Writes a random bf16 checkpoint with the vocabulary, widths and untied head of Llama-3-8B and a DoRA adapter of rank 16
on every linear layer, and merges it to fp16 on the NF4 base in a fresh process; memory does not depend on the number of
layers, so four stand for thirty-two. Peak: VmHWM of the whole process, mapped pages counted. Asked: under 2.5 GB. The
speed is set beside a plain copy of the checkpoint's files on the same disk. The temporary directory takes 8 GB. With
--smoke: small shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu.plan import FULL
from load_memory import write_checkpoint
from measure import facts, fresh, parser_of, peak_rss_bytes, write

ASKED_BYTES = 2_500_000_000
SHAPE = FULL.middle | {"tie_word_embeddings": False}
del SHAPE["num_hidden_layers"]
SMALL = SHAPE | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2}
RANK = 16


def write_adapter(base: Path, adapter: Path) -> None:
    """A DoRA adapter with every parameter off its start."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path, module in model.named_modules():
        if type(module) is torch.nn.Linear and path != "lm_head":
            out_features, in_features = module.weight.shape
            start = f"base_model.model.{path}"
            a = torch.randn(RANK, in_features, generator=generator) * in_features**-0.5
            tensors[f"{start}.lora_A.weight"] = a.bfloat16()
            b = torch.randn(out_features, RANK, generator=generator) * 0.02
            tensors[f"{start}.lora_B.weight"] = b.bfloat16()
            factor = 0.9 + 0.2 * torch.rand(out_features, generator=generator)
            tensors[f"{start}.lora_magnitude_vector"] = factor * 0.02 * in_features**0.5
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "use_dora": True}
    config |= {"target_modules": "all-linear", "base_model_name_or_path": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def export(folder: Path, out: Path, shard_bytes: int) -> dict[str, Any]:
    """Run in a fresh process: merge."""
    import torch

    from qdora.export.merged import StreamedMerge, export_merged
    from qdora.memory.allocator import keep_freed_memory
    from qdora.model.load import Quantization
    from qdora.model.source import resolve

    keep_freed_memory()
    held = Quantization("nf4", 64, True, ("lm_head",))
    merge = StreamedMerge(resolve(str(folder / "base")), folder / "adapter", held, torch.bfloat16)
    began = time.perf_counter()
    result = export_merged(merge, None, out, max_shard_bytes=shard_bytes)
    seconds = time.perf_counter() - began
    return {
        "peak_bytes": peak_rss_bytes(),
        "seconds": seconds,
        "num_bytes": result["num_bytes"],
        "files": result["files"],
    }


def copy_synced(source: Path, target: Path) -> float:
    """Seconds of a plain copy of the files until they are on the disk, as an export's are."""
    began = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def main() -> None:
    """Write the model, merge it, copy it."""
    parser = parser_of(__doc__, "merge_streamed", smoke="a small shape")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.export:
        folder, name, shard_bytes = settings.export
        print(json.dumps(export(Path(folder), Path(folder) / name, int(shard_bytes))))
        return
    shape = SMALL if settings.smoke else SHAPE
    shard_bytes = 200_000 if settings.smoke else 10**9
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total, largest, _ = write_checkpoint(folder / "base", settings.layers, shape)
        write_adapter(folder / "base", folder / "adapter")
        whole = fresh(sys.argv[0], "--export", name, "whole", str(shard_bytes))
        copy_seconds = copy_synced(folder / "base", folder / "copy")
    rate = whole["num_bytes"] / whole["seconds"] / 1e9
    copy_rate = total / copy_seconds / 1e9
    write(
        settings.out,
        {
            **facts(f"python benchmarks/merge_streamed.py --layers {settings.layers}"),
            "shape": shape | {"num_hidden_layers": settings.layers},
            "checkpoint_bytes": total,
            "largest_tensor_bytes": largest,
            "num_bytes": whole["num_bytes"],
            "num_files": len(whole["files"]),
            "peak_bytes": whole["peak_bytes"],
            "asked_bytes": ASKED_BYTES,
            "seconds": whole["seconds"],
            "gigabytes_per_second": rate,
            "copy_gigabytes_per_second": copy_rate,
            "passes": whole["peak_bytes"] < ASKED_BYTES,
        },
    )


if __name__ == "__main__":
    main()
