"""Every export of one trained adapter against an independent float32 reference, beside PEFT's merge of the same file.

    python benchmarks/export_exactness.py DATA [--steps 60] [--run RUN] [--out benchmarks/results/export_exactness.json]

SmolLM2-135M-Instruct (`builtin`) in NF4, block size 64, double quantisation; DoRA r16 trained on PIQA and ARC-Easy in
DATA (<task>/<split>.parquet), or before, by the same recipe, in RUN. With --smoke: a random model and made-up data.

Reference: plain transformers in float32 with weights merged by numpy in float64 from the adapter file and bitsandbytes'
own dequantisation. Every form is loaded by stock transformers, bitsandbytes and PEFT and computed in float32 and in
bfloat16 on the same validation text: differences of logits, KL, NLL per token. Floor: float32 sums in another order,
and in bfloat16 the rounding of the reference itself, computed in bfloat16.

    merged           `qdora export`, in the dtype that it is computed in
    nf4-lora         `qdora export --format nf4-lora`
    requantised      `qdora export --requantize`: what merging and quantising again costs
    PEFT running     PEFT's DoRA on Linear4bit
    PEFT merged      its merge_and_unload on Linear4bit, which quantises again
"""

from __future__ import annotations

import copy
import gc
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from byte_tokenizer import write_model, write_sums
from contenders import on_linear4bit
from measure import facts, parsed, parser_of, write
from peft_interop import bnb_weights, dense, merged_by_numpy, with_peft
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from qdora.export.export_run import export_run
from qdora.export.logit_comparison import LogitDifference, texts_of, validation_examples
from qdora.export.options import ExportOptions
from qdora.recipe.recipe_file import load_recipe, recipe_from
from qdora.run.load_run import load_run
from qdora.run.train import train_run

TASKS = ("piqa", "arc_e")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Train, export, compare, write the figures."""
    parser = parser_of(__doc__, "export_exactness", smoke="a random model and made-up data", data=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--run", type=Path, help="A run of this recipe; one is made if left out.")
    settings = parsed(parser)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document = smoke_recipe(folder) if settings.smoke else recipe(settings.data.resolve(), settings.steps)
        run = trained(document, settings.run, folder)
        result = {
            **facts(f"python benchmarks/export_exactness.py {'--smoke' if settings.smoke else 'DATA'}"),
            "model": document["model"]["source"] if settings.smoke is False else "random",
            "steps": document["train"]["steps"],
            **compare(run, folder),
        }
    write(settings.out, result)


def trained(document: dict[str, Any], run: Path | None, folder: Path) -> Path:
    """A run of the recipe: the given one, which must be of it, or a new one in `folder`."""
    if run is None:
        train_run(recipe_from(document), folder / "run")
        return folder / "run"
    if load_recipe(run / "recipe.yaml") != recipe_from(document):
        raise SystemExit(f"{run} is a run of another recipe")
    return run


def recipe(data: Path, steps: int) -> dict[str, Any]:
    """A short run on real data."""
    return {
        "model": {"source": "builtin"},
        "adapter": {"kind": "dora", "rank": 16, "alpha": 32.0},
        "data": {
            "mix": [{"task": task, "path": str(data / task)} for task in TASKS],
            "max_length": 256,
            "too_long": "drop",
        },
        "train": {"steps": steps, "batch": 8, "lr": 5e-4, "optimizer": "adamw", "checkpoint_every": steps},
        "eval": {"at_start": False, "at_end": False},
    }


def smoke_recipe(folder: Path) -> dict[str, Any]:
    """A random model, a byte tokenizer and sums."""
    write_sums(folder / "sums.jsonl")
    return {
        "model": {"source": write_model(folder / "model")},
        "adapter": {"kind": "dora", "rank": 4, "alpha": 8.0},
        "data": {"mix": [{"source": str(folder / "sums.jsonl")}], "max_length": 64},
        "train": {"steps": 3, "batch": 4, "lr": 1e-2, "optimizer": "adamw", "checkpoint_every": 3},
        "eval": {"at_start": False, "at_end": False},
    }


@torch.no_grad()
def compare(run: Path, folder: Path) -> dict[str, Any]:
    """All forms against the reference, in both dtypes; exports are written to `folder`."""
    quiet = Console(quiet=True)
    loaded = load_run(run, base_only=True)
    base = loaded.model
    _, tokens = validation_texts(loaded)
    weights = bnb_weights(base)
    merged = merged_by_numpy(weights, run / "adapter")
    reference = logits(dense(base, merged), tokens)
    spread = torch.cat([each.std(dim=-1) for each in reference]).mean()
    forms: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        export_run(run, folder / f"merged-{name}", ExportOptions(dtype=name), console=quiet)
        plain = {"reference": lambda: dense(base, merged), "base": lambda: dense(base, weights)}
        loaders = {
            **{form: lambda make=make, dtype=dtype: make().to(dtype) for form, make in plain.items()},
            "merged": lambda name=name, dtype=dtype: AutoModelForCausalLM.from_pretrained(
                folder / f"merged-{name}", dtype=dtype
            ),
            "nf4-lora": lambda name=name: with_lora(folder / f"nf4-lora-{name}", run, name, quiet),
            "requantised": lambda name=name: requantised(folder / f"requantised-{name}", run, name, quiet),
            "PEFT running": lambda dtype=dtype: with_peft(on_linear4bit(base, dtype).eval(), run / "adapter"),
            "PEFT merged": lambda dtype=dtype: peft_merged(base, run / "adapter", dtype),
        }
        forms[name] = {}
        for form, load in loaders.items():
            found = logits(load(), tokens)
            forms[name][form] = against(found, reference, tokens)
            gc.collect()
    return {
        "num_texts": len(tokens),
        "num_positions": sum(each.shape[1] for each in tokens),
        "logit_spread": float(spread),
        "reference_nll_per_token": nll(reference, tokens),
        "forms": forms,
    }


def validation_texts(run: Any) -> tuple[list[str], list[Tensor]]:
    """Texts of a loaded run's validation examples, and the ids (1, length) of those with more than one token."""
    texts = texts_of(validation_examples(run.recipe))
    ids = [run.tokenizer(text, return_tensors="pt")["input_ids"][:, :256] for text in texts]
    return texts, [each for each in ids if each.shape[1] > 1]


def with_lora(directory: Path, run: Path, dtype: str, quiet: Console) -> Any:
    """The nf4-lora export through transformers, bitsandbytes and PEFT."""
    export_run(run, directory, ExportOptions(format_="nf4-lora", dtype=dtype), console=quiet)
    return peft.PeftModel.from_pretrained(on_bnb(directory), str(directory / "adapter")).eval()


def requantised(directory: Path, run: Path, dtype: str, quiet: Console) -> Any:
    """The merge in 4 bits again."""
    export_run(run, directory, ExportOptions(requantize=True, dtype=dtype), console=quiet)
    return on_bnb(directory)


def on_bnb(directory: Path) -> Any:
    """A bitsandbytes checkpoint as transformers loads it, its bytes never repacked."""
    return never_repacked(AutoModelForCausalLM.from_pretrained(directory))


def never_repacked(model: Any) -> Any:
    """The model, whose layers of bitsandbytes keep their bytes as they are."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model


def peft_merged(base: Any, adapter: Path, dtype: torch.dtype) -> Any:
    """PEFT's own merge on 4-bit layers."""
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(on_linear4bit(base, dtype)), str(adapter))
    return never_repacked(adapted.merge_and_unload())


def logits(model: Any, tokens: list[Tensor]) -> list[Tensor]:
    """Of each text, (positions, vocabulary) float32."""
    model.eval()
    return [model(input_ids=ids, use_cache=False).logits[0].float() for ids in tokens]


def nll(found: list[Tensor], tokens: list[Tensor]) -> float:
    """Per token of all texts, nats; the first token of a text has none."""
    total = sum(
        float(torch.nn.functional.cross_entropy(each[:-1].double(), ids[0, 1:], reduction="sum"))
        for each, ids in zip(found, tokens, strict=True)
    )
    return total / sum(ids.shape[1] - 1 for ids in tokens)


def against(found: list[Tensor], reference: list[Tensor], tokens: list[Tensor]) -> dict[str, float]:
    """Differences from the reference, and the NLL."""
    difference = LogitDifference()
    for expected, other in zip(reference, found, strict=True):
        difference.add(expected, other)
    return {**difference.to_dict(), "nll_per_token": nll(found, tokens)}


if __name__ == "__main__":
    main()
