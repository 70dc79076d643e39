""""""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json


@verb
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="merged (if left out): one dense model; nf4-lora: 4-bit base and LoRA; peft: the adapter; gguf: a "
            "file for llama.cpp.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32; float16 (merged), the run's own (nf4-lora).")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Merge on the dequantized base, which was trained, or on the original weights.")
    ] = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Quantise the merge to 4 bits again.")] = False,
    shard_size: Annotated[str | None, typer.Option(help="Of a weights file, as in 2GB; 5GiB if left out.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; the finished adapter if left out.")] = None,
    audit: Annotated[
        bool,
        typer.Option("--audit", help="Compare all forms of the model and recommend one (slow)."),
    ] = False,
    push: Annotated[str | None, typer.Option(help="Upload it to this repository of the Hub, private if new.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository of --push public.")] = False,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="What is to run it: transformers, vllm, sglang, tensorrt-llm, llama.cpp or ollama. Chooses the "
            "format, or refuses one that it does not load.",
        ),
    ] = None,
    gguf_type: Annotated[
        str | None, typer.Option(help="Of --format gguf: f32, f16 (if left out), bf16, q8_0, q4_0 or q4_k_m.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Of --format gguf: llama.cpp's folder; else QDORA_LLAMA_CPP, else PATH.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write the model in a form to deploy, reload it plainly and compare it with the running one."""
    from qdora.export.export_run import export_run
    from qdora.export.options import ExportOptions

    options = ExportOptions(
        format_=format_,
        dtype=dtype,
        base=base,
        requantize=requantize,
        shard_size=shard_size,
        step=step,
        audit=audit,
        push=push,
        public=public,
        target=target,
        gguf=gguf_type,
        llama_cpp=llama_cpp,
    )
    emit(export_run(run, out, options), json_)
