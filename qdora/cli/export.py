"""qdora export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.shared_options import AdapterQuant, BaseModel, Step
from qdora.cli.verb import emit, verb
from qdora.export.gguf_types import GGUF_TYPES


@verb
def export(
    run: Annotated[Path, typer.Argument(help="A run, or an adapter in PEFT's format of any trainer.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="merged: one dense model; nf4-lora: 4-bit base and LoRA; peft: the adapter; gguf: a file for "
            "llama.cpp.",
        ),
    ] = "merged",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16, bfloat16 or float32. Default: float16 (merged; bfloat16 for Gemma 2, Gemma 3, GLM-4), that "
            "of the run (nf4-lora)."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Weights to merge on: dequantized (default; the adapter was trained on them) or original."),
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Quantise the merged model to 4 bits again.")
    ] = False,
    shard_size: Annotated[str | None, typer.Option(help="Largest weights file, such as 2GB; default: 5GiB.")] = None,
    step: Step = None,
    base_model: BaseModel = None,
    quant: AdapterQuant = None,
    audit: Annotated[bool, typer.Option("--audit", help="Also compare all forms of the model (slow).")] = False,
    push: Annotated[
        str | None, typer.Option(help="Upload it to this repository of the Hub; a new one is private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository of --push public.")] = False,
    gguf_type: Annotated[
        str | None, typer.Option(help=f"With --format gguf: {', '.join(GGUF_TYPES)}. Default: f16.")
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="With --format gguf: folder of llama.cpp; default: QDORA_LLAMA_CPP, then PATH."),
    ] = None,
) -> None:
    """Export a run or an adapter, and check the export.

    The export is a merged model (default), 4-bit files, a GGUF file or an adapter in PEFT's format.
    """
    from qdora.export.export_run import export_run
    from qdora.export.options import ExportOptions
    from qdora.files.run_directory import failures_logged

    options = ExportOptions(
        format_=format_,
        dtype=dtype,
        base=base,
        requantize=requantize,
        shard_size=shard_size,
        step=step,
        base_model=base_model,
        quant=quant,
        audit=audit,
        push=push,
        public=public,
        gguf=gguf_type,
        llama_cpp=llama_cpp,
    )
    with failures_logged(run, "export"):
        emit(export_run(run, out, options))
