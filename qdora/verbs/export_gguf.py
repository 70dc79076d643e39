"""qdora export --format gguf: the merge as one file for llama.cpp, written by its own converter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qdora.atomic_files import atomic_directory, remove_directory
from qdora.errors import RunFailure
from qdora.model.gguf import require_gguf
from qdora.model.llama_cpp import GgufType, find_llama_cpp, write_gguf
from qdora.model.verify_gguf import verify_gguf
from qdora.recipe_file import load_recipe
from qdora.record import open_run
from qdora.verbs.card import card_files
from qdora.verbs.export_merge import write_merge
from qdora.verbs.export_options import ExportOptions
from qdora.verbs.held_out import held_out, texts_of
from qdora.verbs.trained import TrainedRun, trained_state

_MERGED_IN: dict[GgufType, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16}
"""float16 for the others: its rounding is an eighth of the smallest that q8_0 adds."""


def export_gguf(
    run: Path, out: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], dict[str, Any]]:
    """Merge into a folder beside `out`, convert, compare, remove the folder; `out` appears once it is compared.

    Returns:
        The running model; facts for export.json; what `verify_gguf` returned.
    Raises:
        UserError: A program of llama.cpp or the package gguf is missing, or the run cannot be merged so.
        RunFailure: The converter refuses the model, or the disk is full.
    """
    start = time.perf_counter()
    require_gguf()
    type_ = options.gguf_type
    tools = find_llama_cpp(options.llama_cpp, type_)
    opened = open_run(run)
    recipe = load_recipe(opened.recipe_file)
    _, state = trained_state(opened, recipe, options.step)
    merged = out.with_name(f".{out.name}.merged")
    remove_directory(merged)
    file = out / f"model-{type_}.gguf"
    try:
        written = write_merge(run, merged, options, _MERGED_IN.get(type_, torch.float16), console, with_card=False)
        console.print(f"converting to {type_}", highlight=False)
        try:
            with atomic_directory(out) as partial:
                write_gguf(tools, merged, partial / file.name, type_)
                for name, text in card_files(opened, recipe, state, form="gguf").items():
                    (partial / name).write_text(text, encoding="utf-8")
                trained = written.load()
                console.print(
                    "comparing the file with the merge, tensor by tensor, and with the running model", highlight=False
                )
                check = verify_gguf(
                    trained.model,
                    partial / file.name,
                    merged,
                    trained.tokenizer,
                    lossy=type_ not in ("f32", "f16", "bf16"),
                    texts=texts_of(held_out(recipe)),
                )
        except OSError as error:
            raise RunFailure(f"{out}: cannot be written or compared: {error}. Nothing is left there.") from error
    finally:
        remove_directory(merged)
    result = {
        "type": type_,
        "base": options.base or "dequantized",
        "files": [file.name],
        "num_bytes": file.stat().st_size,
        "num_merged_layers": written.result.num_merged_layers,
        "num_parameters": written.result.num_parameters,
        "merged_in": written.result.dtype,
        "seconds": time.perf_counter() - start,
    }
    return trained, result, check
