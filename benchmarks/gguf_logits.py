"""GGUF exports of one trained adapter in llama.cpp, against transformers.

    python benchmarks/gguf_logits.py DATA [--steps 60] [--llama-cpp DIR] [--out benchmarks/results/gguf_logits.json]

SmolLM2-135M-Instruct (`builtin`) in NF4; DoRA r16 trained on PIQA and ARC-Easy in DATA (<task>/<split>.parquet). Each
type is written by `qdora export --format gguf`, with llama.cpp's converter and quantiser, and run by llama-cpp-python
with its key-value cache in float32. Reference: the adapter in float32 arithmetic. Floor: the reference's own figures in
bfloat16, and for each type transformers' model with the file's values, which rounds no activation; llama.cpp rounds
those of a product to float16, or for quantised types to 8 bits. With --smoke: two steps on a demo task, f16 alone.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import warnings
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from export_exactness import against, logits, nll, recipe
from gguf import GGUFReader
from measure import facts, write
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from qdora.environment import package_versions
from qdora.model.logit_comparison import float32_arithmetic
from qdora.model.verify_gguf import check_tensors
from qdora.recipe_file import recipe_from
from qdora.verbs.export import export_run
from qdora.verbs.export_options import ExportOptions
from qdora.verbs.held_out import held_out, texts_of
from qdora.verbs.train import train_run
from qdora.verbs.trained import load_run

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_k_m", "q4_0")
_FLOAT32 = 0  # GGML_TYPE_F32


def main() -> None:
    """Train, export every type, run each, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's folder, for its converter.")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gguf_logits.json")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document = smoke_recipe() if settings.smoke else recipe(settings.data.resolve(), settings.steps)
        summary = train_run(recipe_from(document), folder / "run")
        types = ("f16",) if settings.smoke else TYPES
        result = {
            **facts(f"python benchmarks/gguf_logits.py {'--smoke' if settings.smoke else 'DATA'}"),
            "llama_cpp": package_versions(("llama-cpp-python", "gguf")),
            "model": "builtin",
            "steps": document["train"]["steps"],
            "final_loss": summary["final_loss"],
            **compare(folder, types, settings.llama_cpp),
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
def compare(folder: Path, types: tuple[str, ...], place: Path | None) -> dict[str, Any]:
    """Every type in llama.cpp, and transformers with the same values, against the adapter in float32."""
    trained = load_run(folder / "run")
    texts = texts_of(held_out(trained.recipe))
    ids = [trained.tokenizer(text, return_tensors="pt")["input_ids"][:, :256] for text in texts]
    tokens = [each for each in ids if each.shape[1] > 1]
    with float32_arithmetic(trained.model):
        reference = logits(trained.model, tokens)
    running = against(logits(trained.model, tokens), reference, tokens)
    export_run(folder / "run", folder / "merged", ExportOptions(dtype="float32", audit=False), console=QUIET)
    forms = {}
    for type_ in types:
        options = ExportOptions(format_="gguf", gguf=type_, llama_cpp=place, audit=False)
        exported = export_run(folder / "run", folder / type_, options, console=QUIET)
        file = folder / type_ / f"model-{type_}.gguf"
        found, same_tokens = in_llama_cpp(file, texts, tokens)
        plain = logits(with_values(file, folder / "merged"), tokens)
        forms[type_] = {
            "num_bytes": file.stat().st_size,
            "tensors": exported["verification"]["tensors"],
            "same_tokens": same_tokens,
            "llama.cpp": against(found, reference, tokens),
            "transformers": against(plain, reference, tokens),
            "between": against(found, plain, tokens),
        }
        del plain, found
        gc.collect()
    return {
        "num_texts": len(tokens),
        "num_positions": sum(each.shape[1] for each in tokens),
        "logit_spread": float(torch.cat([each.std(dim=-1) for each in reference]).mean()),
        "reference_nll_per_token": nll(reference, tokens),
        "running": {"dtype": str(trained.model.dtype).removeprefix("torch."), **running},
        "forms": forms,
    }


QUIET = Console(quiet=True)


def in_llama_cpp(file: Path, texts: list[str], tokens: list[Tensor]) -> tuple[list[Tensor], bool]:
    """Of each text, (positions, vocabulary) float32; and whether llama.cpp's own tokenizer gives the same ids."""
    model = llama_cpp.Llama(
        str(file), n_ctx=512, n_batch=512, logits_all=True, type_k=_FLOAT32, type_v=_FLOAT32, verbose=False
    )
    found = []
    for ids in tokens:
        model.reset()
        model.eval(ids[0].tolist())
        found.append(torch.from_numpy(model.scores[: ids.shape[1]].copy()))
    own = [model.tokenize(text.encode(), add_bos=False, special=True)[:256] for text in texts]
    model.close()
    return found, [each for each in own if len(each) > 1] == [ids[0].tolist() for ids in tokens]


def with_values(file: Path, merged: Path) -> Any:
    """transformers' model in float32 with the values of the file."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    check_tensors(GGUFReader(str(file)), file, merged, into=model)
    return model


if __name__ == "__main__":
    main()
