"""Perplexity of SmolLM2-135M on real text, pruned by magnitude, Wanda and SparseGPT at several sparsities.

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. Inputs are measured on training examples,
perplexity on validation examples, each written out with its right answer; nothing is chosen by a score.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from byte_tokenizer import byte_tokenizer, write_model
from frame import bench, main, markdown, table
from mixed_data import recipe

from qdora.data.build_data import read_data
from qdora.data.example import Example
from qdora.data.tokenize import encode_batch, special_prefix
from qdora.evaluate.perplexity import text_perplexity
from qdora.model.load import load_model
from qdora.model.source import load_tokenizer, resolve
from qdora.prune.pruner import Pruner
from qdora.recipe.settings import CalibrationConfig, PruneConfig
from qdora.run.base import pieces

WINDOW = 256
METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
PATTERNS = ("30", "50", "60", "70", "2:4")


def in_turn(tasks: Sequence[Sequence[Example]]) -> str:
    """One text in which any piece has several tasks."""
    rounds = zip(*tasks, strict=False)
    return "\n\n".join(f"{example.prompt}{example.answer}" for each in rounds for example in each)


def ordered(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per pattern, whether SparseGPT <= Wanda <= magnitude."""
    by = {(case["method"], case["pattern"]): case["perplexity"] for case in cases}
    done = [pattern for pattern in PATTERNS if all((method, pattern) in by for method in METHODS)]
    return {"ordered": {each: by["sparsegpt", each] <= by["wanda", each] <= by["magnitude", each] for each in done}}


@bench(smoke={"sequences": 4, "length": 32, "examples": 0}, judge=ordered)
def pruning(
    data: Path | None, *, quant: str = "none", sequences: int = 64, length: int = 256, examples: int = 20
) -> Iterator[dict[str, Any]]:
    """The dense model and every method at every pattern; `examples` are validation examples of each task."""
    size = CalibrationConfig(sequences=sequences, length=length)
    if data is None:
        source, tokenizer = resolve(write_model(Path(tempfile.mkdtemp()))), byte_tokenizer()
        train = text = "Whatever is written here, byte by byte. " * 40
    else:
        source = resolve("builtin")
        tokenizer = load_tokenizer(source)
        parts, validation = read_data(recipe(data.resolve(), batch=1, checkpointing=False).data)
        # Without a validation split some training examples are held out, as in `qdora train`
        train, text = in_turn(parts), in_turn([each[:examples] for each in validation.values()])
    (ids,) = encode_batch(tokenizer, [train])
    calibration = pieces(ids, special_prefix(tokenizer), size)
    for method, pattern in [("dense", ""), *((method, pattern) for pattern in PATTERNS for method in METHODS)]:
        began, pruner = time.perf_counter(), None
        if pattern:
            form = {"pattern": pattern} if ":" in pattern else {"sparsity": int(pattern) / 100}
            pruner = Pruner(PruneConfig(method=method, **form), None if method == "magnitude" else calibration)
        model = load_model(source, quant=quant, placer=pruner)
        loaded = time.perf_counter()
        found = text_perplexity(model, tokenizer, [text], window=WINDOW, stride=WINDOW)
        layers = pruner.layers.values() if pruner else []
        weights = sum(layer.num_weights for layer in layers)
        yield {
            "method": method,
            "pattern": pattern,
            "sparsity": sum(layer.num_pruned for layer in layers) / weights if weights else 0.0,
            "load_seconds": loaded - began,
            "score_seconds": time.perf_counter() - loaded,
            **found.to_dict(),
        }
    calibrated = {"quant": quant, "calibration": size.model_dump(), "examples_per_task": examples}
    return calibrated  # type: ignore[return-value]  # a generator's last word is added to the result


@table("pruning")
def pruning_table(result: Any) -> str:
    """Perplexity of every method at every pattern."""
    cases = {(case["method"], case["pattern"]): case for case in result["cases"]}
    patterns = list(result["ordered"])
    rows = [
        [label, *(f"{cases[method, each]['perplexity']:,.1f}" for each in patterns)]
        for method, label in METHODS.items()
    ]
    dense, size = cases["dense", ""], result["calibration"]
    off = [pattern for pattern, is_ordered in result["ordered"].items() if not is_ordered]
    order = f"the usual order fails at {', '.join(off)}" if off else "SparseGPT ≤ Wanda ≤ magnitude in every column"
    note = (
        f"\nDense: {dense['perplexity']:.1f}, on {dense['num_tokens']:,} tokens of validation examples; inputs "
        f"measured on {size['sequences']} pieces of {size['length']} tokens of training examples; {order}.\n"
    )
    return markdown(["perplexity", *(each if ":" in each else f"{each} %" for each in patterns)], rows) + note


if __name__ == "__main__":
    main()
