"""Rounding and GPTQ in every format, against HQQ, gptqmodel and llm-compressor: loss, error, memory and time.

Others run in environments of their own, named by their Python (`--hqq hqq/bin/python`). See `quantiser_peers.py`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import write_model, write_sums
from contenders import LayerCall, packed_layers, plain, random_base
from frame import GIB, bench, main
from host_memory import MODEL, SMALL, write_checkpoint
from measure import alone, in_turns, peak_rss_bytes, ratios, spread
from mixed_data import random_step
from quantiser_peers import by_program
from safetensors.torch import save_file
from step_times import trainer
from tables.quantisers import draw
from torch import Tensor

from qdora.data.example import Example
from qdora.data.sources import read_data, task_examples
from qdora.data.tokenize import encode_batch, special_prefix
from qdora.evaluate.suite import average_of, evaluate
from qdora.evaluate.suite import spread as evenly
from qdora.memory.oom import keep_freed_memory
from qdora.model.build_model import Compute, find_model, find_source
from qdora.model.inject import linear_layers
from qdora.model.store import compressed_layers
from qdora.plan.plan import public_shapes
from qdora.prune.grid import Grid, fitted_scales
from qdora.prune.scores import InputStatistics, sweep
from qdora.quant.blockwise import nearest_codes
from qdora.quant.codebooks import code_values
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import override, recipe_from
from qdora.recipe.settings import CalibrationConfig, Recipe
from qdora.run.base import compress_base, load_base, pieces

TEXTS, KINDS = ("passages", "tasks"), ("nf4", "int4", "nf3", "int3", "nf2", "int2")
CELLS = (
    *(f"{kind} round" for kind in ("none", "int8", "nvfp4", "mxfp4", *KINDS)),
    *(f"{kind} gptq {text}" for text in TEXTS for kind in KINDS),
    *(f"int{bits} hqq {axis}" for bits in (4, 3, 2) for axis in (0, 1)),
    *(f"int{bits} gptqmodel {text}" for text in TEXTS for bits in (4, 3)),
)
SCORES = ("nll_per_token", "nll_per_token_stderr", "num_examples", "num_answer_tokens")


class Bed:
    """A model, calibration tokens from each kind of text, and other texts of both to score."""

    def __init__(self, source: str, data: Path | None, folder: Path, tokens: int, texts: int, limit: int) -> None:
        if data is None:
            source, length, rows = write_model(folder), 64, task_examples("demo/facts", split="test", data=None)
            write_sums(folder / "sums.jsonl")
            mix: list[dict[str, Any]] = [{"source": str(folder / "sums.jsonl")}]
        else:
            length, rows = 512, task_examples("boolq", split="test", data=data)
            mix = [{"task": task, "path": str(data.resolve() / task), "limit": 400} for task in COMMONSENSE_TASKS]
        model, train = {"source": source, "dtype": "float32"}, {"steps": 1, "batch": 1}
        self.recipe = recipe_from({"model": model, "data": {"mix": mix}, "train": train})
        self.source, self.tokenizer = find_model(self.recipe)
        examples, validation = read_data(self.recipe.data)
        passages = list(dict.fromkeys(row.prompt.rpartition("\nQuestion: ")[0] for row in rows))
        written = {
            "passages": passages[:-texts],
            "tasks": [each.prompt + each.answer for each in chain(*examples.values())],
        }
        prefix, asked = special_prefix(self.tokenizer), CalibrationConfig(sequences=tokens // length, length=length)
        self.calibration: dict[str, Tensor] = {}
        for name, each in written.items():
            self.calibration[name] = pieces(encode_batch(self.tokenizer, ["\n\n".join(each)])[0], prefix, asked)
        texts_to_score = [Example("passages", str(index), "", text) for index, text in enumerate(passages[-texts:])]
        self.held_out = {"passages": texts_to_score}
        for task, found in validation.items():  # the right answer alone
            self.held_out[task] = [replace(each, choices=(), gold=None) for each in evenly(found, limit)]

    def own(self, kind: str, text: str | None = None) -> Any:
        """The base in a format: rounded, or by GPTQ on a kind of text."""
        calibration = None if text is None else self.calibration[text]
        return own_model(override(self.recipe, [f"base.quant={kind}"]), self.source, calibration)

    def by_peer(self, python: str, method: str, kind: str, option: str) -> tuple[Any, dict[str, Any]]:
        """The base with the weights that another program made, and what it says of them."""
        base = self.own("none")
        paths = [path for path in linear_layers(base) if not path.endswith("lm_head")]
        ids = self.calibration[option].tolist() if option in TEXTS else None
        settings = {"bits": int(kind[-1]), "group": 64, "layers": paths, "calibration": ids, "option": option}
        with tempfile.TemporaryDirectory() as name:
            plain(base, torch.float32).save_pretrained(Path(name, "model"))
            self.tokenizer.save_pretrained(Path(name, "model"))
            weights, found = by_program(python, method, Path(name), settings)
        for path, weight in weights.items():
            base.get_submodule(path).weight.data.copy_(weight)
        return base, found

    def scores(self, model: Any) -> dict[str, Any]:
        """NLL per token of the passages and per answer token of the tasks, each of which counts once."""
        tasks = evaluate(model, self.tokenizer, self.held_out).tasks
        both = {"passages": tasks.pop("passages"), "tasks": average_of(list(tasks.values()))}
        return {text: {name: getattr(found, name) for name in SCORES} for text, found in both.items()}


def own_model(recipe: Recipe, source: Any, calibration: Tensor | None) -> Any:
    """The base of a recipe on the CPU: rounded, or by GPTQ on token ids (sequences, length)."""
    compute = Compute(torch.device("cpu"), getattr(torch, recipe.model.dtype))
    if calibration is None:
        return load_base(recipe, source, compute)
    with tempfile.TemporaryDirectory() as name:
        recipe = override(recipe, ["base.method=gptq"])
        compress_base(recipe, source, compute, calibration, Path(name), key="none")
        return load_base(recipe, source, compute, compressed=compressed_layers(Path(name)))


@bench(smoke={"cells": ("none round", "nf3 round", "nf3 gptq tasks"), "tokens": 1024, "texts": 4}, keep=True)
def quantisers(
    data: Path | None,
    models: tuple[str, ...] = ("builtin",),
    cells: tuple[str, ...] = CELLS,
    tokens: int = 20_480,
    texts: int = 100,
    limit: int = 50,
    hqq: str | None = None,
    gptqmodel: str | None = None,
    *,
    out: Path,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """NLL of whole models by format and quantiser, on two kinds of text, and bits a weight as they are stored.

    passages: BoolQ's; the last --texts of the test file are scored. tasks: prompts and answers of the eight tasks;
    --limit validation examples of each are scored, the right answer alone. GPTQ is calibrated on either: --tokens in
    pieces of 512, from other passages or from training examples. --models: builtin, or .gguf files. A cell is FORMAT
    METHOD [OPTION]. hqq: groups of 64, scale and zero in 16 bits, along axis 0 or 1. gptqmodel: groups of 64 and the
    settings that are used here.
    """
    pythons = {"hqq": hqq, "gptqmodel": gptqmodel}
    for source in models:
        label = "SmolLM2" if source == "builtin" else Path(source).stem
        with tempfile.TemporaryDirectory() as name:
            bed = Bed(source, data, Path(name), tokens, texts, limit)
            for each in cells:
                kind, method, *option = each.split()
                row = {"model": label, "format": kind, "method": " ".join([method, *option])}
                if method not in pythons:
                    began = time.perf_counter()
                    model = bed.own(kind, *option)
                    row |= {"bits": bits_of(model), "seconds": time.perf_counter() - began}
                elif (python := pythons[method]) is not None:
                    model, found = bed.by_peer(python, method, kind, *option)
                    row |= found
                else:
                    continue
                yield f"{label}, {each}", row | bed.scores(model)
    draw(json.loads(out.read_text())["cases"], out.with_suffix(".svg"))


def bits_of(model: Any) -> float:
    """Stored bits of a weight of the quantised layers; 16 without any."""
    packed = [layer.stored_weight for layer in packed_layers(model).values()]
    num_weights = sum(math.prod(each.shape) for each in packed)
    return 8 * sum(each.num_bytes for each in packed) / num_weights if packed else 16.0


@bench(smoke={"layer": "model.layers.0.mlp.down_proj", "group": 64, "tokens": 1024}, keep=True)
def quantisers_layer(
    data: Path | None,
    layer: str = "model.layers.10.mlp.down_proj",
    bits: tuple[int, ...] = (4, 3, 2),
    group: int = 128,
    tokens: int = 16_384,
    gptqmodel: str | None = None,
    llmcompressor: str | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """GPTQ of one layer of SmolLM2 against other programs', on the inputs that passages give it.

    Equal settings: groups of --group whose scale is the largest magnitude, before the sweep; columns in descending
    order of diag(H), damping 0.01, blocks of 128. Defaults: what each program does unasked, in such groups; those of
    llm-compressor are the equal ones. equal_codes: share of the codes that are those of the equal settings here; at 4
    bits the others have 16 values, int4 15. Error: tr(E H E^T) over tr(W H W^T), with E = W' - W and H = X^T X.
    """
    with tempfile.TemporaryDirectory() as name:
        bed, inputs = Bed("builtin", data, Path(name), tokens, 10, 1), list[Tensor]()
        model = bed.own("none")
        linear = model.get_submodule(layer)
        linear.register_forward_pre_hook(lambda _layer, args: inputs.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model.model(input_ids=bed.calibration["passages"], use_cache=False)
        x, weight = torch.cat(inputs), linear.weight.detach()
        products = x.T @ x
        save_file({"weight": weight, "inputs": x, "products": products}, Path(name, "layer.safetensors"))
        scale = weight.unflatten(1, (-1, group)).abs().amax(dim=2).repeat_interleave(group, dim=1)
        for n in bits:
            kind = f"int{n}"
            rounded = code_values(kind)[nearest_codes(weight / scale, kind).int()] * scale
            ways: dict[str, Any] = {"rounded": (rounded, {})}
            for title, clip in {"equal settings": False, "defaults": n <= 3}.items():
                ways[f"qdora, {title}"] = own_layer(weight, x, kind, group, clip), {}
            others = ("gptqmodel", "equal settings", gptqmodel), ("gptqmodel", "defaults", gptqmodel)
            for program, title, python in (*others, ("llmcompressor", "equal settings", llmcompressor)):
                if python is not None:
                    settings = {"bits": n, "group": group, "equal": title == "equal settings"}
                    dense, found = by_program(python, f"{program}_layer", Path(name), settings)
                    ways[f"{program}, {title}"] = dense["weight"], found
            codes = {way: (dense / scale * (2**n - 1) / 2).round() for way, (dense, _) in ways.items()}
            for way, (dense, facts) in ways.items():
                pair = (dense - weight).double(), weight.double()
                error, whole = (float(((each @ products.double()) * each).sum()) for each in pair)
                equal = float((codes[way] == codes["qdora, equal settings"]).float().mean())
                yield f"{n} bits, {way}", {"error": error / whole, "equal_codes": equal} | facts


def own_layer(weight: Tensor, x: Tensor, kind: str, group: int, clip: bool) -> Tensor:
    """The weight (out, in) by GPTQ on the inputs x (tokens, in), dequantised; `group` divides `in`."""
    statistics, values = InputStatistics(weight.shape[1], weight.device, products=True), code_values(kind)
    statistics.add(x)
    absmax = fitted_scales(weight, statistics.column_squares[None], kind, group, clip=clip)
    codes, _ = sweep(weight, statistics, grid=Grid(kind, group, absmax, values))
    return values[codes.int()] * absmax.repeat_interleave(group).view(weight.shape)


@bench(smoke={"layers": 1, "tokens": 64}, keep=True)
def quantisers_memory(
    layers: int = 4, tokens: int = 16_384, formats: tuple[str, ...] = ("int3",), *, smoke: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Peak and time of loading blocks of Llama-3-8B's shape, rounded and by GPTQ on random tokens in pieces of 2,048.

    Each in a process of its own that only loads; VmHWM. Bar: GPTQ at most 3 GiB above rounding.
    """
    shape = {name: value for name, value in public_shapes()[MODEL].values.items() if name != "model_type"}
    shape |= SMALL if smoke else {"vocab_size": 32_768}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), shape | {"num_hidden_layers": layers})
        for kind in formats:
            found = {method: alone(loaded, folder, kind, method, tokens) for method in ("round", "gptq")}
            more = found["gptq"]["peak_bytes"] - found["round"]["peak_bytes"]
            yield kind, found | {"layers": layers, "tokens": tokens, "more_bytes": more, "passes": more <= 3 * GIB}


def loaded(folder: str, kind: str, method: str, tokens: int) -> dict[str, float]:
    model, data = {"source": folder, "dtype": "bfloat16"}, {"mix": [{"task": "demo/howto"}]}
    rest = {"base": {"quant": kind}, "train": {"steps": 1, "batch": 1}}
    recipe = recipe_from({"model": model, "data": data, **rest})
    size = tokens // min(tokens, 2048), min(tokens, 2048)
    ids = torch.randint(0, 512, size, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    own_model(recipe, find_source(recipe), ids if method == "gptq" else None)
    return {"peak_bytes": peak_rss_bytes(), "seconds": time.perf_counter() - began}


@bench(smoke={"shape": "64x96", "tokens": (8,), "rounds": 2}, keep=True)
def quantisers_time(
    shape: str = "4096x4096", tokens: tuple[int, ...] = (256, 1024), rounds: int = 15, *, smoke: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A DoRA layer, forward and backward, and a step of SmolLM2, in turns: each format against nf4 and int4.

    int4 is decoded in plain torch from 4 bits, as nf3 and nf2 were before they were packed tightly.
    """
    keep_freed_memory()
    bases = {kind: random_base(*map(int, shape.split("x")), kind=kind) for kind in KINDS}
    cases = dict[str, dict[str, Any]]()
    for n in tokens:
        turns = {kind: LayerCall("own_dora", base, 16, n).step for kind, base in bases.items()}
        cases[f"layer {shape}, {n:,} tokens"] = turns
    step = random_step([[128] * 4], torch.Generator().manual_seed(0))
    steps = {kind: partial(trainer("own_dora", "off", smoke=smoke, quant=kind), step) for kind in KINDS}
    for name, turns in (cases | {"step of SmolLM2, 4 x 128 tokens": steps}).items():
        seconds = in_turns(turns, rounds, warmup=2)
        pairs = [f"{kind} / {other}" for other in ("nf4", "int4") for kind in KINDS if kind != other]
        times = {kind: spread(each) for kind, each in seconds.items()}
        yield name, {"seconds": times, "ratios": ratios(seconds, pairs)}


if __name__ == "__main__":
    main()
