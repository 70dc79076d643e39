"""qdora's layer inside TRL's trainers, beside PEFT's own: the same losses, and magnitudes that move in float32.

Needs `pip install trl`. A random Llama of two blocks, loaded by transformers in NF4, DoRA of rank 8 on all linear
layers, no dropout. Each trainer runs with PEFT's layer and with qdora's, which comes in by `qdora.peft.use` on the
config, by `patch` with the config untouched, and by `accelerate` on an adapter that PEFT has loaded from disk. Seeds,
data and order are the same. bitsandbytes' rewriting of weights for AVX512-BF16 is off in all runs, since PEFT's layer
is wrong behind it. (An earlier version also resumed and cast a run, and exported an adapter: the other keys of the
result files.)
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from byte_tokenizer import write_model
from frame import bench, main, table, tabulated
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

import qdora.peft

LOSS_TOLERANCE = 5e-3
WAYS = ("use", "patch", "accelerate")
SUMS = [(a, b) for a in range(6) for b in range(5)]
PAIRS = [{"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a * b + 7}"} for a, b in SUMS]
SINGLE = [
    {"prompt": row["prompt"], "completion": row[k], "label": k == "chosen"} for row in PAIRS for k in list(row)[1:]
]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
SHORT = {"max_completion_length": 8, "num_generations": 2}
TRAINERS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "SFT": ([{"text": row["prompt"] + row["chosen"]} for row in PAIRS], {}),
    "DPO": (PAIRS, {}),
    "KTO": (SINGLE, {}),
    "Reward": (PAIRS, {"bf16": True}),  # TRL casts the trained head, so that float32 runs fail, PEFT's own, too
    "RLOO": (PROMPTS, SHORT),
    "GRPO": (PROMPTS, SHORT),
}
"""Trainer -> its rows, and its settings."""


@bench(smoke={"steps": 3, "trainers": "SFT,DPO"}, rows="trainers")
def peft_trainers(*, steps: int = 10, trainers: str = ",".join(TRAINERS)) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each trainer with PEFT's layer and with qdora's by each way in."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_model(Path(folder))
        for name in trainers.split(","):
            yield name, compared(name, source, steps)
    versions = {package: importlib.metadata.version(package) for package in ("trl", "peft")}
    return {"peers": versions, "tolerance": LOSS_TOLERANCE}  # type: ignore[return-value]  # added to the result


def load(source: str, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The base in NF4."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    torch.manual_seed(0)
    model = kind.from_pretrained(source, quantization_config=quantization, dtype=torch.float32, **options)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def trainer_of(name: str, source: str, way: str, steps: int, folder: str) -> Any:
    """A trainer of TRL on a fresh base, with qdora's layer by one of its ways in, or PEFT's: "peft", and "loaded",
    where the trainer gets an adapter loaded from disk, as with "accelerate"."""
    import trl
    from datasets import Dataset

    task, model = "CAUSAL_LM", partial(load, source)
    if name == "Reward":
        task, model = "SEQ_CLS", partial(load, source, AutoModelForSequenceClassification, num_labels=1)
    rows, more = TRAINERS[name]
    options = {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    options |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "disable_tqdm": True}
    options |= {"use_cpu": not torch.cuda.is_available(), "seed": 0}
    arguments: dict[str, Any] = {}
    if name in ("RLOO", "GRPO"):
        arguments["reward_funcs"] = lambda completions, **_: [
            float(sum(character.isdigit() for character in text)) for text in completions
        ]
    adapter = LoraConfig(
        use_dora=True, r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type=task
    )
    base = model()
    torch.manual_seed(1)
    if way in ("loaded", "accelerate"):
        get_peft_model(model(), adapter).save_pretrained(f"{folder}/adapter")
        base = PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True)
        assert way == "loaded" or qdora.peft.accelerate(base) > 0
    else:
        arguments["peft_config"] = qdora.peft.use(adapter) if way == "use" else adapter
    return getattr(trl, f"{name}Trainer")(
        base,
        args=getattr(trl, f"{name}Config")(**options | more),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
        **arguments,
    )


@contextmanager
def patched() -> Iterator[None]:
    """PEFT's class as `qdora.peft.patch` leaves it, for a while."""
    before = {name: vars(Linear4bit)[name] for name in ("resolve_lora_variant", "forward", "merge", "unmerge")}
    qdora.peft.patch()
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Linear4bit, name, method)


def trained(name: str, source: str, way: str, steps: int) -> dict[str, Any]:
    """Train; the losses, and what has become of the magnitudes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(name, source, way, steps, folder)
        magnitudes = {n: p for n, p in trainer.model.named_parameters() if "magnitude" in n and p.requires_grad}
        before = {n: p.detach().clone() for n, p in magnitudes.items()}
        trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    moved = [float((p != before[n]).float().mean()) for n, p in magnitudes.items()]
    ways = [row.way for row in qdora.peft.report(trainer.model).values()]
    return {
        "losses": [row["loss"] for row in logged],
        "gradient_norms": [row["grad_norm"] for row in logged],  # GRPO's and RLOO's losses are 0 by construction
        "magnitude_dtypes": sorted({str(p.dtype) for p in magnitudes.values()}),
        "share_of_magnitudes_moved": sum(moved) / len(moved),
        "num_layers": len(ways),
        "num_fast": ways.count("fast"),
        "reasons": sorted(set(ways) - {"fast"}),
    }


def compared(name: str, source: str, steps: int) -> dict[str, Any]:
    """One trainer with PEFT's layer and with qdora's by each way in."""
    found = {way: trained(name, source, way, steps) for way in ("peft", "loaded", "use", "accelerate")}
    with patched():
        found["patch"] = trained(name, source, "patch", steps)
    for way in WAYS:
        ours, control = found[way], found["loaded" if way == "accelerate" else "peft"]
        for key, of in (("losses", "loss"), ("gradient_norms", "gradient_norm")):
            pairs = list(zip(ours[key], control[key], strict=True))
            assert len(pairs) == steps
            ours[f"largest_difference_of_{of}"] = max(abs(a - b) for a, b in pairs)
        fast = ours["num_fast"] == ours["num_layers"] > 0 and ours["magnitude_dtypes"] == ["torch.float32"]
        is_close = ours["largest_difference_of_loss"] <= LOSS_TOLERANCE
        ours["passed"] = is_close and fast and ours["share_of_magnitudes_moved"] > 0.999
    return found


@table("peft_trainers", "peft_trainers_trl_1_14")
def peft_trainers_table(result: Any, older: Any) -> str:
    """The largest difference of the three ways in, by version."""

    def runs(name: str, *documents: Any) -> list[dict[str, Any]]:
        return [each["trainers"][name][way] for each in documents or (result, older) for way in WAYS]

    def largest(document: Any) -> Any:
        return lambda name: f"{max(each['largest_difference_of_loss'] for each in runs(name, document)):.1e}"

    def fast(name: str) -> str:
        return ", ".join(sorted({f"{each['num_fast']} of {each['num_layers']}" for each in runs(name)}))

    columns = {
        "trainer": str,
        **{f"loss, TRL {each['peers']['trl']}": largest(each) for each in (result, older)},
        "fast layers": fast,
        "magnitudes moved": lambda name: f"{min(each['share_of_magnitudes_moved'] for each in runs(name)):.0%}",
    }
    return tabulated(result["trainers"], columns)


if __name__ == "__main__":
    main()
