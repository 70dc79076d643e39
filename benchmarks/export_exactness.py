"""Every export of one trained adapter against an independent float32 reference, beside PEFT's merge of the same file.

Reference: plain transformers in float32 with weights merged by numpy in float64 from the adapter file and bitsandbytes'
own dequantisation. Floor: float32 sums in another order, and in bfloat16 the rounding of the reference itself.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import peft
import torch
from byte_tokenizer import write_model, write_sums
from contenders import on_linear4bit, packed_layers, plain, put_weight_, quant_state
from frame import bench, main, markdown, table
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qdora.export.export import export_run
from qdora.export.verify import logit_differences, summary, texts_of, validation_examples
from qdora.recipe.options import ExportOptions
from qdora.recipe.recipe_file import recipe_from
from qdora.run.load_run import load_run
from qdora.run.run import train_run

QUIET = Console(quiet=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = {
    "reference": "the reference itself",
    "base": "base, no adapter",
    "merged": "`--format merged`",
    "nf4-lora": "`--format nf4-lora`",
    "requantised": "`--requantize` (merged, then NF4 again)",
    "PEFT running": "PEFT's DoRA on Linear4bit",
    "PEFT merged": "PEFT's `merge_and_unload`",
}


@bench(smoke={"steps": 3})
def export_exactness(data: Path | None, *, steps: int = 60) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        return {"steps": steps, **compared(trained(data, steps, Path(name)), Path(name))}


def trained(data: Path | None, steps: int, folder: Path) -> Path:
    """A short run; without data of a random model."""
    warnings.simplefilter("ignore")
    if data is not None:
        mix = [{"task": task, "path": str(data.resolve() / task)} for task in ("piqa", "arc_e")]
    else:
        write_sums(folder / "sums.jsonl")
        mix = [{"source": str(folder / "sums.jsonl")}]
    recipe = {
        "model": {"source": "builtin" if data else write_model(folder / "model")},
        "adapter": {"kind": "dora", "rank": 16, "alpha": 32.0},
        "data": {"mix": mix, "max_length": 256, "too_long": "drop"},
        "train": {"steps": steps, "batch": 8, "lr": 5e-4, "optimizer": "adamw", "checkpoint_every": steps},
        "eval": {"at_start": False, "at_end": False},
    }
    train_run(recipe_from(recipe), folder / "run")
    return folder / "run"


@torch.no_grad()
def compared(run: Path, folder: Path) -> dict[str, Any]:
    """All forms against the reference, in both dtypes; exports are written to `folder`."""
    loaded = load_run(run, base_only=True)
    base, texts = loaded.model, texts_of(validation_examples(loaded.recipe))
    ids = [loaded.tokenizer(text, return_tensors="pt")["input_ids"][:, :256] for text in texts]
    tokens = [each for each in ids if each.shape[1] > 1]
    weights = bnb_weights(base)
    merged = merged_by_numpy(weights, run / "adapter")
    reference = logits(dense(base, merged), tokens)

    def load(form: str, name: str) -> Any:
        if form in ("reference", "base"):
            return dense(base, merged if form == "reference" else weights).to(DTYPES[name])
        if form == "PEFT running":
            return with_peft(on_linear4bit(base, DTYPES[name]).eval(), run / "adapter")
        if form == "PEFT merged":
            bare = copy.deepcopy(on_linear4bit(base, DTYPES[name]))
            return never_repacked(peft.PeftModel.from_pretrained(bare, str(run / "adapter")).merge_and_unload())
        options: dict[str, Any] = {"nf4-lora": {"format": "nf4-lora"}, "requantised": {"requantize": True}}
        out = folder / f"{form}-{name}"
        export_run(run, out, ExportOptions(dtype=name, **options.get(form, {})), console=QUIET)
        if form == "merged":
            return AutoModelForCausalLM.from_pretrained(out, dtype=DTYPES[name])
        return peft.PeftModel.from_pretrained(on_bnb(out), str(out / "adapter")) if form == "nf4-lora" else on_bnb(out)

    forms: dict[str, Any] = {}
    for name in DTYPES:
        forms[name] = {}
        for form in FORMS:
            forms[name][form] = against(logits(load(form, name), tokens), reference, tokens)
            gc.collect()
    return {
        "num_positions": sum(each.shape[1] for each in tokens),
        "logit_spread": float(torch.cat([each.std(dim=-1) for each in reference]).mean()),
        "reference_nll_per_token": nll(reference, tokens),
        "forms": forms,
    }


def on_bnb(directory: Path) -> Any:
    """A bitsandbytes checkpoint as transformers loads it, its bytes never repacked."""
    return never_repacked(AutoModelForCausalLM.from_pretrained(directory))


def never_repacked(model: Any) -> Any:
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model


def logits(model: Any, tokens: list[Tensor]) -> list[Tensor]:
    """Of each text, (positions, vocabulary) float32."""
    model.eval()
    return [model(input_ids=ids, use_cache=False).logits[0].float() for ids in tokens]


def nll(found: list[Tensor], tokens: list[Tensor]) -> float:
    """Per token of all texts, nats; the first token of a text has none."""
    pairs = [(each[:-1].double(), ids[0, 1:]) for each, ids in zip(found, tokens, strict=True)]
    total = sum(float(nn.functional.cross_entropy(*pair, reduction="sum")) for pair in pairs)
    return total / sum(ids.shape[1] - 1 for ids in tokens)


def against(found: list[Tensor], reference: list[Tensor], tokens: list[Tensor]) -> dict[str, float]:
    pairs = zip(reference, found, strict=True)
    return {**summary(torch.cat([logit_differences(*pair) for pair in pairs])), "nll_per_token": nll(found, tokens)}


def bnb_weights(base: Any) -> dict[str, Tensor]:
    """Path -> dequantised weight (out, in) float32, by bitsandbytes."""
    result = {}
    for path, layer in packed_layers(base).items():
        packed = layer.stored_weight
        state = quant_state(packed, torch.float32)
        # As one row: on a CPU, bitsandbytes 0.50 gives blocks that cross rows the scales of others.
        state.shape = torch.Size((1, packed.shape[0] * packed.shape[1]))
        flat = bnb.functional.dequantize_4bit(packed.packed.view(-1, 1), quant_state=state)
        result[path] = flat.view(packed.shape)
    return result


def dense(base: Any, weights: dict[str, Tensor]) -> Any:
    """`plain` in float32 with the given linear weights."""
    model = plain(base, torch.float32)
    for path, weight in weights.items():
        put_weight_(model, base, path, weight)
    return model.eval()


def with_peft(model: nn.Module, directory: Path) -> Any:
    """The adapter loaded by PEFT, which must use every tensor of the file."""
    adapted = peft.PeftModel.from_pretrained(model, str(directory)).eval()
    stored = load_file(directory / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(adapted)
    assert held.keys() == stored.keys(), held.keys() ^ stored.keys()
    return adapted


def merged_by_numpy(weights: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """The merge by the formula in float64, from the files alone: g (W + s B A), s = alpha / rank.

    A stack of experts is (experts * out, in). PEFT has its tensors at the module of the experts, those of the first of
    two stacks one level further in: A (experts * rank, in), B (out, rank * experts) with the expert last.
    """
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    assert not config["use_rslora"]
    assert not config["alpha_pattern"]
    tensors = load_file(directory / "adapter_model.safetensors")
    stored = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    experts, merged = config.get("target_parameters") or [], {}
    for path, weight in weights.items():
        start = f"base_model.model.{path}"
        if path in experts:
            owner, _, name = path.rpartition(".")
            start = f"base_model.model.{owner}"
            if name != "down_proj" and f"{owner}.down_proj" in experts:
                start += ".base_layer"
        a, b = stored[f"{start}.lora_A.weight"], stored[f"{start}.lora_B.weight"]
        num_experts = weight.shape[0] // b.shape[0]
        a = a.reshape(num_experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, num_experts).transpose(2, 0, 1)
        update = config["lora_alpha"] / a.shape[1] * (b @ a)
        total = weight.double().numpy() + update.reshape(weight.shape)
        if config["use_dora"]:
            gain = stored[f"{start}.lora_magnitude_vector"].reshape(-1) / np.sqrt((total**2).sum(axis=1))
            total = total * gain[:, None]
        merged[path] = torch.from_numpy(total).float()
    return merged


@table("export_exactness")
def export_exactness_table(result: Any) -> str:
    columns = ("largest difference", "mean", "mean KL", "same argmax", "NLL")
    rows = []
    for form, label in FORMS.items():
        row = [label]
        for forms in result["forms"].values():
            found = forms[form]
            row += [f"{found[key]:.1e}" for key in ("max_logit_difference", "mean_logit_difference", "kl_mean")]
            row += [f"{found['argmax_agreement']:.1%}", f"{found['nll_per_token']:.4f}"]
        rows.append(row)
    note = (
        f"\nSmolLM2-135M, {result['steps']} steps on PIQA and ARC-Easy; {result['num_positions']:,} tokens of "
        f"held-out text. The standard deviation of the logits is {result['logit_spread']:.1f}; the NLL of the "
        f"reference is {result['reference_nll_per_token']:.4f}.\n"
    )
    return markdown(["form", *(f"{dtype}: {column}" for dtype in result["forms"] for column in columns)], rows) + note


if __name__ == "__main__":
    main()
