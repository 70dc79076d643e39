"""GGUF exports of one trained adapter in llama.cpp, against transformers.

    python benchmarks/gguf_logits.py DATA [--steps 60] [--run RUN] [--llama-cpp DIR] [--out results/gguf_logits.json]

SmolLM2-135M-Instruct (`builtin`) in NF4; DoRA r16 trained on PIQA and ARC-Easy in DATA (<task>/<split>.parquet), or
before, by the same recipe, in RUN. Each type is written by what `qdora export --format gguf` uses, llama.cpp's own
converter and quantiser, and run by llama-cpp-python with its key-value cache in float32. Reference: the adapter in
float32 arithmetic. Floor: the reference's own figures in bfloat16, and for each type transformers' model with the
file's values, which rounds no activation; llama.cpp rounds those of a product to float16, or for quantised types to 8
bits. With --smoke: two steps on a demo task, f16 alone.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from export_exactness import against, logits, nll, recipe, trained, validation_texts
from measure import facts, parsed, parser_of, write
from rich.console import Console

from qdora.export.gguf import InLlamaCpp, compare_tensors, find_llama_cpp, write_gguf
from qdora.export.gguf_types import GgufType
from qdora.export.logit_comparison import float32_arithmetic
from qdora.export.merged import write_merge
from qdora.export.options import ExportOptions
from qdora.files.environment import package_versions
from qdora.model.gguf_file import read_header
from qdora.model.load import load_model
from qdora.model.source import ModelSource
from qdora.run.load_run import load_run

# Type of the file -> dtype of the merge that it is made from, as `qdora export` has it.
TYPES: dict[GgufType, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "q8_0": torch.float16,
    "q4_k_m": torch.float16,
    "q4_0": torch.float16,
}


def main() -> None:
    """Train, export every type, run each, write the figures."""
    parser = parser_of(__doc__, "gguf_logits", smoke="two steps on a demo task, f16 alone", data=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--run", type=Path, help="A run of this recipe; one is made if left out.")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's folder, for its converter.")
    settings = parsed(parser)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document = smoke_recipe() if settings.smoke else recipe(settings.data.resolve(), settings.steps)
        run = trained(document, settings.run, folder)
        types = {"f16": TYPES["f16"]} if settings.smoke else TYPES
        result = {
            **facts(f"python benchmarks/gguf_logits.py {'--smoke' if settings.smoke else 'DATA'}"),
            "llama_cpp": package_versions(("llama-cpp-python", "gguf")),
            "model": "builtin",
            "steps": document["train"]["steps"],
            **compare(run, folder, types, settings.llama_cpp),
        }
    write(settings.out, result)


def smoke_recipe() -> dict[str, Any]:
    """Two steps on a task that ships with qdora."""
    return {
        "model": {"source": "builtin"},
        "adapter": {"kind": "dora", "rank": 4, "alpha": 8.0},
        "data": {"mix": [{"task": "demo/facts", "limit": 16}], "max_length": 128},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "optimizer": "adamw", "checkpoint_every": 2},
        "eval": {"at_start": False, "at_end": False},
    }


@torch.no_grad()
def compare(run: Path, folder: Path, types: dict[GgufType, torch.dtype], place: Path | None) -> dict[str, Any]:
    """Every type in llama.cpp, and transformers with the same values, against the adapter in float32."""
    loaded = load_run(run)
    texts, tokens = validation_texts(loaded)
    with float32_arithmetic(loaded.model):
        reference = logits(loaded.model, tokens)
    running = against(logits(loaded.model, tokens), reference, tokens)
    forms = {}
    for type_, dtype in types.items():
        merged = folder / str(dtype)
        if not merged.exists():
            write_merge(run, merged, ExportOptions(), dtype, Console(quiet=True), with_card=False)
        file = folder / f"model-{type_}.gguf"
        write_gguf(find_llama_cpp(place, type_), merged, file, type_)
        tensors, faults = compare_tensors(read_header(file), merged)
        source = ModelSource("gguf", file, file.name)
        plain = logits(load_model(source, quant="none", compute_dtype=torch.float32), tokens)
        model = InLlamaCpp(file)
        found = logits(model, tokens)
        own = [model.llama.tokenize(text.encode(), add_bos=False, special=True)[:256] for text in texts]
        forms[type_] = {
            "num_bytes": file.stat().st_size,
            "tensors": {**tensors, "faults": faults},
            "same_tokens": [each for each in own if len(each) > 1] == [ids[0].tolist() for ids in tokens],
            "llama.cpp": against(found, reference, tokens),
            "transformers": against(plain, reference, tokens),
            "between": against(found, plain, tokens),
        }
        file.unlink()
        del plain, found, model
        gc.collect()
    return {
        "num_texts": len(tokens),
        "num_positions": sum(each.shape[1] for each in tokens),
        "logit_spread": float(torch.cat([each.std(dim=-1) for each in reference]).mean()),
        "reference_nll_per_token": nll(reference, tokens),
        "running": {"dtype": str(loaded.model.dtype).removeprefix("torch."), **running},
        "forms": forms,
    }


if __name__ == "__main__":
    main()
