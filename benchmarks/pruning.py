"""Perplexity of SmolLM2-135M on real text, pruned by magnitude, Wanda and SparseGPT at several sparsities.

    python benchmarks/pruning.py DATA [--out benchmarks/results/pruning.json] [--quant none]

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. Inputs are measured on training
examples, perplexity on validation examples, each written out with its right answer; nothing is chosen by a score. Every
case is written when it is done, and one that the file has already is not computed again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byte_tokenizer import byte_tokenizer, write_model
from measure import facts, parsed, parser_of, save, write
from mixed_data import recipe
from torch import Tensor

from qdora.data.build_data import read_data
from qdora.data.example import Example
from qdora.data.tokenize import encode_batch, special_prefix
from qdora.evaluation.perplexity import text_perplexity
from qdora.model.load import load_model
from qdora.model.pruning import Pruner
from qdora.model.source import ModelSource, load_tokenizer, resolve
from qdora.recipe.settings import CalibrationConfig, PruneConfig
from qdora.run.calibration import pieces

WINDOW = 256
METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = ("30", "50", "60", "70", "2:4")


def texts_of(data: Path, per_task: int) -> tuple[str, str]:
    """Training and held-out text: examples of all tasks in turn, so that any piece of it has several tasks.

    Where a task has no validation split, some of its training examples are held out, as in `qdora train`.
    """
    train, validation = read_data(recipe(data, batch=1, checkpointing=False).data)
    held_out = [examples[:per_task] for examples in validation.values()]
    return _in_turn(train), _in_turn(held_out)


def _in_turn(tasks: Sequence[Sequence[Example]]) -> str:
    rounds = zip(*tasks, strict=False)
    return "\n\n".join(f"{example.prompt}{example.answer}" for each in rounds for example in each)


def smoke_setup(directory: Path) -> tuple[ModelSource, Any, CalibrationConfig, str]:
    """For --smoke: a random model, a tokenizer of bytes, a small calibration, and text."""
    size = CalibrationConfig(sequences=4, length=32)
    return resolve(write_model(directory)), byte_tokenizer(), size, "Whatever is written here, byte by byte. " * 40


def measured(
    source: ModelSource, tokenizer: Any, quant: str, method: str | None, pattern: str, calibration: Tensor, text: str
) -> dict[str, Any]:
    """One case: load, prune, score."""
    began = time.perf_counter()
    pruner = None
    if method is not None:
        form = {"pattern": pattern} if ":" in pattern else {"sparsity": int(pattern) / 100}
        pruner = Pruner(PruneConfig(method=method, **form), None if method == "magnitude" else calibration)
    model = load_model(source, quant=quant, placer=pruner)
    loaded = time.perf_counter()
    found = text_perplexity(model, tokenizer, [text], window=WINDOW, stride=WINDOW)
    layers = {} if pruner is None else pruner.layers
    weights = sum(layer.num_weights for layer in layers.values())
    return {
        "method": method or "dense",
        "pattern": pattern if method else "",
        "sparsity": sum(layer.num_pruned for layer in layers.values()) / weights if weights else 0.0,
        "load_seconds": loaded - began,
        "score_seconds": time.perf_counter() - loaded,
        **found.to_dict(),
    }


def main() -> None:
    """Measure what the result file does not have yet."""
    parser = parser_of(__doc__, "pruning", smoke="a random model and text of bytes", data=True)
    parser.add_argument("--quant", default="none")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--examples", type=int, default=20, help="validation examples of each task")
    args = parsed(parser)
    with tempfile.TemporaryDirectory() as directory:
        if args.smoke:
            source, tokenizer, size, train = smoke_setup(Path(directory))
            text, examples = train, 0
        else:
            source = resolve("builtin")
            tokenizer = load_tokenizer(source)
            size = CalibrationConfig(sequences=args.sequences, length=args.length)
            train, text = texts_of(args.data.resolve(), args.examples)
            examples = args.examples
        (ids,) = encode_batch(tokenizer, [train])
        calibration = pieces(ids, special_prefix(tokenizer), size)
        command = f"python benchmarks/pruning.py DATA --quant {args.quant} --sequences {size.sequences}"
        settings = {"quant": args.quant, "calibration": size.model_dump(), "examples_per_task": examples}
        result = {**facts(f"{command} --length {size.length} --examples {examples}"), **settings, "cases": []}
        if args.out.is_file():
            before = json.loads(args.out.read_text())
            if all(before.get(key) == value for key, value in settings.items()):
                result["cases"] = before["cases"]
        done = {(case["method"], case["pattern"]) for case in result["cases"]}
        wanted = [(None, ""), *((method, pattern) for pattern in PATTERNS for method in METHODS)]
        for method, pattern in wanted:
            if (method or "dense", pattern) in done:
                continue
            case = measured(source, tokenizer, args.quant, method, pattern, calibration, text)
            result["cases"].append(case)
            save(args.out, result)
        result["ordered"] = _ordered(result["cases"])
        write(args.out, result)


def _ordered(cases: list[dict[str, Any]]) -> dict[str, bool]:
    """Per pattern, whether SparseGPT <= Wanda <= magnitude."""
    found = {}
    for pattern in PATTERNS:
        by = {case["method"]: case["perplexity"] for case in cases if case["pattern"] == pattern}
        found[pattern] = by["sparsegpt"] <= by["wanda"] <= by["magnitude"]
    return found


if __name__ == "__main__":
    main()
