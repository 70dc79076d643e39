"""Does an untrained LoRA that approximates the compression error help? Perplexity of SmolLM2-135M, with and without it.

    python benchmarks/error_adapters.py DATA [--out benchmarks/results/error_adapters.json]

Bases are pruned by Wanda to 50 % and to 2:4, in 16 bits and in NF4. The adapter is `adapter.init: loftq`, the matrix of
its rank that is nearest to the error of each weight, as the Naive-LoRA of SLiM (arXiv 2410.09615), whose rank is a
tenth of the width; here 58 of 576, and 16, the rank of the study. `error_left` is the share of the weights' error that
the larger rank leaves. DATA is that of `pruning.py`, and so is the text that Wanda measures inputs on; perplexity is of
validation examples, each written out with its right answer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import facts, parsed, parser_of, write
from mixed_data import recipe
from pruning import smoke_setup, texts_of
from torch import nn

from qdora.data.build_data import read_data
from qdora.data.tokenize import encode_batch, special_prefix
from qdora.evaluation.perplexity import text_perplexity
from qdora.model.inject import inject
from qdora.model.load import load_model
from qdora.model.loftq import start_from_error_
from qdora.model.pruning import Pruner
from qdora.model.source import load_tokenizer, resolve
from qdora.recipe.settings import CalibrationConfig, PruneConfig
from qdora.run.calibration import pieces

RANKS = (58, 16)
PATTERNS = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}


def losses(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """(texts, 2): NLL in nats and number of tokens of each text."""
    found = [text_perplexity(model, tokenizer, [text]) for text in texts]
    return np.array([(each.nll_sum, each.num_tokens) for each in found])


def told(scores: np.ndarray, base: np.ndarray | None = None) -> dict[str, float]:
    """Perplexity; against `base` also the nats per token that are gained, with a 95 % interval over the texts."""
    per_token, tokens = scores[:, 0].sum() / scores[:, 1].sum(), scores[:, 1]
    found = {"perplexity": float(np.exp(per_token))}
    if base is None:
        return found
    gained = base[:, 0] - scores[:, 0]
    mean, number = gained.sum() / tokens.sum(), len(gained)
    error = np.sqrt(number / (number - 1) * ((gained - mean * tokens) ** 2).sum()) / tokens.sum()
    return found | {"gained": float(mean), "lower": float(mean - 1.96 * error), "upper": float(mean + 1.96 * error)}


@torch.no_grad()
def main() -> None:
    """Measure all cases and write them."""
    parser = parser_of(__doc__, "error_adapters", smoke="a random model and text of bytes", data=True)
    parser.add_argument("--examples", type=int, default=25, help="validation examples of each task")
    args = parsed(parser)
    with tempfile.TemporaryDirectory() as directory:
        if args.smoke:
            source, tokenizer, size, train = smoke_setup(Path(directory))
            ranks, texts = (8, 4), [f"This is sentence {number}." for number in range(6)]
        else:
            source = resolve("builtin")
            tokenizer, size, ranks = load_tokenizer(source), CalibrationConfig(sequences=64, length=256), RANKS
            train, _ = texts_of(args.data.resolve(), 1)
            _, validation = read_data(recipe(args.data.resolve(), batch=1, checkpointing=False).data)
            texts = [each.prompt + each.answer for found in validation.values() for each in found[: args.examples]]
        (ids,) = encode_batch(tokenizer, [train])
        calibration = pieces(ids, special_prefix(tokenizer), size)
        result: dict[str, Any] = {
            **facts(f"python benchmarks/error_adapters.py DATA --examples {args.examples}"),
            "num_texts": len(texts),
            "dense": told(losses(load_model(source, quant="none"), tokenizer, texts)),
            "cases": [],
        }
        for quant in ("none", "nf4"):
            for pattern, form in PATTERNS.items():
                placer = Pruner(PruneConfig(method="wanda", **form), calibration)
                model = load_model(source, quant=quant, placer=placer)
                base = losses(model, tokenizer, texts)
                case: dict[str, Any] = {"quant": quant, "pattern": pattern, **told(base), "ranks": {}}
                layers = inject(model, kind="lora", rank=ranks[0], alpha=float(ranks[0]))
                left = start_from_error_(model, source)
                case["error_left"] = sum(left.values()) / len(left)
                for rank in ranks:
                    for layer in layers.values():  # components are in the order of their size
                        layer.lora_B[:, rank:] = 0
                        layer.parameters_changed()
                    case["ranks"][str(rank)] = told(losses(model, tokenizer, texts), base)
                result["cases"].append(case)
        write(args.out, result)


if __name__ == "__main__":
    main()
