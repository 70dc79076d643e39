"""GGUF exports of one trained adapter in llama.cpp, against transformers.

SmolLM2-135M-Instruct (`builtin`) in NF4; DoRA r16 trained on PIQA and ARC-Easy in DATA (<task>/<split>.parquet). Each
type is written by what `qdora export --format gguf` uses, llama.cpp's own converter and quantiser, and run by
llama-cpp-python with its key-value cache in float32. Reference: the adapter in float32 arithmetic. Floor: the
reference's own figures in bfloat16, and for each type transformers' model with the file's values, which rounds no
activation; llama.cpp rounds those of a product to float16, or for quantised types to 8 bits. With --smoke: a few steps
on a demo task.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from export_exactness import QUIET, against, logits, nll, trained, validation_texts
from frame import bench, main, table, tabulated

from qdora.export.gguf import InLlamaCpp, compare_tensors, find_llama_cpp, write_gguf
from qdora.export.logit_comparison import float32_arithmetic
from qdora.export.merged import write_merge
from qdora.files.environment import package_versions
from qdora.model.gguf_file import read_header
from qdora.model.load import load_model
from qdora.model.source import ModelSource
from qdora.recipe.options import ExportOptions, GgufType
from qdora.run.load_run import load_run

TYPES: dict[GgufType, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "q8_0": torch.float16,
    "q4_k_m": torch.float16,
    "q4_0": torch.float16,
}
"""Type of the file -> dtype of the merge that it is made from, as `qdora export` has it."""


@bench(smoke={"steps": 2})
@torch.no_grad()
def gguf_logits(data: Path | None, *, steps: int = 60, llama_cpp: str | None = None, smoke: bool) -> dict[str, Any]:
    """Every type in llama.cpp, and transformers with the same values; `llama_cpp` is its folder, for its converter."""
    with tempfile.TemporaryDirectory() as name:
        folder, forms = Path(name), {}
        with torch.enable_grad():
            run_folder = trained(data, steps, folder, demo="demo/facts")
        loaded = load_run(run_folder)
        texts, tokens = validation_texts(loaded)
        with float32_arithmetic(loaded.model):
            reference = logits(loaded.model, tokens)
        running = against(logits(loaded.model, tokens), reference, tokens)
        for type_, dtype in TYPES.items():
            merged, file = folder / str(dtype), folder / f"model-{type_}.gguf"
            if smoke and type_ != "f16":
                continue
            if not merged.exists():
                write_merge(run_folder, merged, ExportOptions(), dtype, QUIET, with_card=False)
            write_gguf(find_llama_cpp(Path(llama_cpp) if llama_cpp else None, type_), merged, file, type_)
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
        "llama_cpp": package_versions(("llama-cpp-python", "gguf")),
        "steps": steps,
        "num_positions": sum(each.shape[1] for each in tokens),
        "logit_spread": float(torch.cat([each.std(dim=-1) for each in reference]).mean()),
        "reference_nll_per_token": nll(reference, tokens),
        "running": {"dtype": str(loaded.model.dtype).removeprefix("torch."), **running},
        "forms": forms,
    }


@table("gguf_logits")
def gguf_logits_table(result: Any) -> str:
    """Every GGUF type in llama.cpp, against the adapter in float32 and against transformers with the same values."""

    def distance(row: tuple[str, Any]) -> str:
        tensors = row[1]["tensors"]
        if tensors["lossy_error"]:
            return f"{tensors['lossy_error']:.1%} of a tensor's norm"
        return f"{tensors['q8_0_error']:.2f} of half a step" if tensors["q8_0_error"] else f"{tensors['dense_error']:g}"

    columns = {
        "file": "{0}",
        "MB": lambda row: f"{row[1]['num_bytes'] / 1e6:.0f}",
        "error against the merge": distance,
        "mean KL in llama.cpp": "{1[llama.cpp][kl_mean]:.1e}",
        "same argmax": "{1[llama.cpp][argmax_agreement]:.1%}",
        "NLL": "{1[llama.cpp][nll_per_token]:.4f}",
        "mean KL, transformers": "{1[transformers][kl_mean]:.1e}",
        "mean logit difference between the two": "{1[between][mean_logit_difference]:.1e}",
    }
    running, has_same = result["running"], all(each["same_tokens"] for each in result["forms"].values())
    return tabulated(result["forms"].items(), columns) + (
        f"\n{result['num_positions']:,} tokens. The standard deviation of the logits is {result['logit_spread']:.1f}; "
        f"the NLL of the adapter in float32 is {result['reference_nll_per_token']:.4f}. The adapter running in "
        f"{running['dtype']} has a mean KL of {running['kl_mean']:.1e} from it. llama.cpp's own tokenizer gives "
        f"{'the same' if has_same else 'other'} tokens.\n"
    )


if __name__ == "__main__":
    main()
