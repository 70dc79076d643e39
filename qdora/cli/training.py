"""Verbs of a run: train, eval, export, generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.options import Json, RunDir, Set, Tasks
from qdora.command import emit, verb


@verb
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see `qdora recipes`) or a YAML file.")],
    set_: Set = None,
    run_dir: RunDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start although the plan is over memory.budget.")] = False,
    json_: Json = False,
) -> None:
    """Train an adapter: load the base in 4 bits, train on the mix, evaluate, save."""
    from qdora.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    directory = run_dir or Path("runs") / Path(recipe).stem
    from qdora.verbs.train import train_run

    result = train_run(loaded, directory, resume=resume, force=force)
    if result:  # empty in all processes of a launch but the first
        emit(result, json_)


@verb
def evaluate(
    target: Annotated[str, typer.Argument(help="A run directory, a model directory, a Hub id, or builtin.")],
    tasks: Tasks = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "validation",
    data: Annotated[Path | None, typer.Option(help="Folder of <task>/<split>.parquet for the built-in tasks.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file whose perplexity is measured; repeatable.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; the finished adapter if left out.")] = None,
    like: Annotated[Path | None, typer.Option(help="Use this run's data; show its results beside.")] = None,
    quant: Annotated[str | None, typer.Option(help="Of a bare model: nf4, fp4 or int8; dense if left out.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a run, evaluate the base without the adapter.")] = False,
    method: Annotated[
        str | None, typer.Option(help="loglikelihood, or generate: also let it answer. The run's if left out.")
    ] = None,
    harness: Annotated[
        list[str] | None, typer.Option(help="Task, group or pattern of lm-evaluation-harness; repeatable.")
    ] = None,
    harness_include: Annotated[
        Path | None, typer.Option(help="Folder of further harness tasks in YAML; they may run code.")
    ] = None,
    json_: Json = False,
) -> None:
    """Score a run, a merged directory or a bare model: accuracy, answer NLL, perplexity."""
    from qdora.verbs.evaluate import evaluate_target

    result = evaluate_target(
        target,
        tasks=tasks,
        limit=limit,
        split=split,
        data=data,
        texts=text or [],
        step=step,
        base_only=base,
        like=like,
        quant=quant,
        method=method,
        harness=harness or [],
        harness_include=harness_include,
    )
    emit(result, json_)


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
    audit: Annotated[bool, typer.Option(help="Compare all forms of the model and say which one to ship.")] = True,
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
    from qdora.verbs.export import export_run
    from qdora.verbs.export_options import ExportOptions

    merge = (dtype, base, requantize, shard_size)
    options = ExportOptions(format_, *merge, step, audit, push, public, target, gguf_type, llama_cpp)
    emit(export_run(run, out, options), json_)


@verb
def generate(
    target: Annotated[str, typer.Argument(help="A run directory, a model directory, a Hub id, or builtin.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the model is given; - reads standard input.")],
    system: Annotated[str | None, typer.Option(help="System message, where there is a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: the model goes on from the prompt.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; the finished adapter if left out.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a run, the base without the adapter.")] = False,
    quant: Annotated[str | None, typer.Option(help="Of a dense model: nf4, fp4 or int8.")] = None,
    json_: Json = False,
) -> None:
    """Stream what a run, an export or a bare model says to a prompt."""
    from qdora.verbs.generate import Sampling, generate_from

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    sampling = Sampling(temperature, top_p, top_k, seed, max_new_tokens)
    result = generate_from(
        target,
        sys.stdin.read() if prompt == "-" else prompt,
        sampling,
        system=system,
        raw=raw,
        step=step,
        base_only=base,
        quant=quant,
        write=None if json_ else write,
    )
    emit(result, json_)
