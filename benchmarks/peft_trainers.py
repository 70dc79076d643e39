"""qdora's layer inside TRL's trainers, beside PEFT's own: the same losses, and magnitudes that move in float32.

    pip install trl
    python benchmarks/peft_trainers.py [--smoke] [--steps 10] [--only exports] [--out results/peft_trainers.json]

A random Llama of two blocks, loaded by transformers in NF4, DoRA of rank 8 on all linear layers, no dropout. Each
trainer runs with PEFT's layer and with qdora's, which comes in by `qdora.peft.use` on the config, by `patch` with the
config untouched, and by `accelerate` on an adapter that PEFT has loaded from disk. Seeds, data and order are the same.
DPO's first loss is ln 2. bitsandbytes' rewriting of weights for AVX512-BF16 is off in all runs, since PEFT's layer is
wrong behind it.

Two more runs with `patch`: one that goes on from a checkpoint of its middle, and one in which the model is cast to
bfloat16 between two steps.

Exports: the builtin model is trained by DPO with PEFT's own layer, and `qdora export` writes its adapter in each form.
Largest difference of a logit from the trained model in memory, where TRL has made the adapter bfloat16, and from the
same adapter loaded again by PEFT, in float32. QDORA_LLAMA_CPP names llama.cpp's folder. `--only exports` measures these
alone and keeps the rest of the file.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import trl
from byte_tokenizer import write_model
from datasets import Dataset
from measure import facts, parser_of, write
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import qdora.peft
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.model.load import load_model
from qdora.model.source import load_tokenizer, resolve

LOSS_TOLERANCE = 5e-3
SUMS = [(a, b) for a in range(6) for b in range(5)]
PAIRS = [{"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a * b + 7}"} for a, b in SUMS]


def load(source: str, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The base in NF4."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    torch.manual_seed(0)
    model = kind.from_pretrained(source, quantization_config=quantization, dtype=torch.float32, **options)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def config(task: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(use_dora=True, r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type=task)


def options(steps: int, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "disable_tqdm": True,
        "seed": 0,
    }


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(character.isdigit() for character in text)) for text in completions]


# For each trainer: its class, its settings, its rows, what else it takes.
ROWS = {
    "SFT": [{"text": row["prompt"] + row["chosen"]} for row in PAIRS],
    "DPO": PAIRS,
    "KTO": [
        {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"}
        for r in PAIRS
        for k in ("chosen", "rejected")
    ],
    "Reward": PAIRS,
    "RLOO": [{"prompt": row["prompt"]} for row in PAIRS],
    "GRPO": [{"prompt": row["prompt"]} for row in PAIRS],
}
MORE: dict[str, dict[str, Any]] = {
    "Reward": {"bf16": True},  # TRL casts the trained head to bfloat16, so that float32 runs fail, PEFT's own, too
    "RLOO": {"max_completion_length": 8, "num_generations": 2},
    "GRPO": {"max_completion_length": 8, "num_generations": 2},
}


def trainer_of(name: str, source: str, way: str, steps: int, folder: str, **more: Any) -> Any:
    """A trainer of TRL on a fresh base, with qdora's layer by one of its ways in, or PEFT's: "peft", and "loaded",
    where the trainer gets an adapter loaded from disk, as with "accelerate"."""
    task, model = "CAUSAL_LM", partial(load, source)
    if name == "Reward":
        task, model = "SEQ_CLS", partial(load, source, AutoModelForSequenceClassification, num_labels=1)
    settings = getattr(trl, f"{name}Config")(**(options(steps, folder) | MORE.get(name, {}) | more))
    arguments: dict[str, Any] = {"reward_funcs": length_reward} if name in ("RLOO", "GRPO") else {}
    base, adapter = model(), config(task)
    torch.manual_seed(1)
    if way in ("loaded", "accelerate"):
        get_peft_model(model(), adapter).save_pretrained(f"{folder}/adapter")
        base = PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True)
        assert way == "loaded" or qdora.peft.accelerate(base) > 0
    else:
        arguments["peft_config"] = qdora.peft.use(adapter) if way == "use" else adapter
    data = Dataset.from_list(ROWS[name])
    return getattr(trl, f"{name}Trainer")(
        base, args=settings, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(source), **arguments
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


def run(name: str, source: str, way: str, steps: int) -> dict[str, Any]:
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
    found = {way: run(name, source, way, steps) for way in ("peft", "loaded", "use", "accelerate")}
    with patched():
        found["patch"] = run(name, source, "patch", steps)
    for way, control in (("use", "peft"), ("patch", "peft"), ("accelerate", "loaded")):
        ours = found[way]
        for key, of in (("losses", "loss"), ("gradient_norms", "gradient_norm")):
            pairs = list(zip(ours[key], found[control][key], strict=True))
            assert len(pairs) == steps
            ours[f"largest_difference_of_{of}"] = max(abs(a - b) for a, b in pairs)
        fast = ours["num_fast"] == ours["num_layers"] > 0 and ours["magnitude_dtypes"] == ["torch.float32"]
        ours["passed"] = (
            ours["largest_difference_of_loss"] <= LOSS_TOLERANCE and fast and ours["share_of_magnitudes_moved"] > 0.999
        )
        if name == "DPO":
            ours["first_loss_minus_ln_2"] = ours["losses"][0] - math.log(2)
    return found


def resumed(source: str) -> dict[str, Any]:
    """Losses of steps 4 to 6 of a run, and of another that begins at the first one's checkpoint of step 3. By
    transformers' own trainer, since TRL makes the adapter bfloat16 and PEFT reads it as float32: TRL's runs change."""
    rows = torch.randint(2, 250, (24, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder, patched():
        arguments = TrainingArguments(**options(6, folder) | {"save_strategy": "steps", "save_steps": 3})
        trainers = []
        for _ in range(2):
            base = load(source)
            torch.manual_seed(1)
            trainers.append(Trainer(get_peft_model(base, config()), arguments, train_dataset=data))
        trainers[0].train()
        trainers[1].train(resume_from_checkpoint=f"{folder}/checkpoint-3")
        ways = {row.way for row in qdora.peft.report(trainers[1].model).values()}
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row][3:] for each in trainers]
    return {"whole": losses[0], "resumed": losses[1], "passed": losses[0] == losses[1] and ways == {"fast"}}


class CastToBfloat16(TrainerCallback):  # type: ignore[misc]
    """After the second step, as TRL does for continuous batching. Remembers the magnitudes."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 2:
            magnitudes = {n: p.detach().clone() for n, p in model.named_parameters() if "magnitude" in n}
            model.to(torch.bfloat16)
            self.kept = all(torch.equal(p, magnitudes[n]) for n, p in model.named_parameters() if n in magnitudes)
            self.magnitudes = magnitudes


def cast(source: str) -> dict[str, Any]:
    """The magnitudes after a cast of the model in the middle of a run. An optimizer of bitsandbytes, since torch's has
    no float32 states for parameters that became bfloat16."""
    with tempfile.TemporaryDirectory() as folder, patched():
        trainer = trainer_of("SFT", source, "patch", 4, folder, optim="adamw_8bit")
        callback = CastToBfloat16()
        trainer.add_callback(callback)
        trainer.train()
        ways = {row.way for row in qdora.peft.report(trainer.model).values()}
    after = {n: p for n, p in trainer.model.named_parameters() if "magnitude" in n}
    moved = [float((p != callback.magnitudes[n]).float().mean()) for n, p in after.items()]
    dtypes = sorted({str(p.dtype) for p in after.values()})
    share = sum(moved) / len(moved)
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "magnitude_dtypes": dtypes,
        "magnitudes_keep_their_digits": callback.kept,
        "share_of_magnitudes_moved_after_the_cast": share,
        "other_dtypes": sorted({str(p.dtype) for n, p in trainer.model.named_parameters() if "lora_A" in n}),
        "passed": callback.kept and dtypes == ["torch.float32"] and share > 0.999 and ways == {"fast"},
    }


# What each form writes; its matrices are float16 unless it says another dtype.
FORMS: dict[str, dict[str, Any]] = {
    "merged": {},
    "merged, float32": {"dtype": "float32"},
    "nf4-lora": {"format_": "nf4-lora"},
    "GGUF": {"format_": "gguf"},
}


def exported(source: str, steps: int, forms: Iterable[str]) -> dict[str, Any]:
    """DPO with PEFT's layer, then each form against the trained model, and against its adapter loaded by PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(" ".join(row["prompt"] + row["chosen"] for row in PAIRS), return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        found: torch.Tensor = model.eval()(input_ids=ids.to(model.device)).logits
        return found.float().cpu()

    def largest(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max())

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of("DPO", source, "peft", steps, folder, learning_rate=1e-4)
        trainer.train()
        trainer.save_model(f"{folder}/adapter")
        live, base = logits(trainer.model), logits(load(source))
        again = logits(PeftModel.from_pretrained(load(source), f"{folder}/adapter"))
        found: dict[str, Any] = {"num_tokens": ids.numel(), "spread_of_logits": float(live.std(dim=-1).mean())}
        found |= {"adapter_against_base": largest(live, base), "peft_again_against_live": largest(again, live)}
        for form in forms:
            out = Path(folder, form)
            written = export_run(Path(folder, "adapter"), out, ExportOptions(**FORMS[form]))
            if form == "nf4-lora":
                theirs = logits(PeftModel.from_pretrained(load(str(out)), str(out / "adapter")))
            else:
                file = next((path.name for path in out.glob("*.gguf")), None)
                theirs = logits(AutoModelForCausalLM.from_pretrained(out, gguf_file=file, dtype=torch.float32))
            found[form] = {"against_live": largest(theirs, live), "against_peft_again": largest(theirs, again)}
            found[form]["passed"] = written["verification"]["passed"]
    return found


def main() -> None:
    parser = parser_of(__doc__, "peft_trainers", smoke="SFT and DPO, three steps, exports of a random model, no GGUF")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", choices=["exports"], help="measure this part and keep the others of the file")
    args = parser.parse_args()
    names, steps = (("SFT", "DPO"), 3) if args.smoke else (tuple(ROWS), args.steps)
    command = f"python benchmarks/peft_trainers.py --steps {steps}"
    versions = {"peers": {package: importlib.metadata.version(package) for package in ("trl", "peft")}}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as builtin:
        source, forms = write_model(Path(folder)), [form for form in FORMS if form != "GGUF" or not args.smoke]
        if args.only is None:
            found = {name: compared(name, source, steps) for name in names}
            result = {**facts(command), **versions, "tolerance": LOSS_TOLERANCE, "trainers": found}
            result |= {"resumed": resumed(source), "cast": cast(source)}
        else:
            result = json.loads(args.out.read_text())
        if not args.smoke:  # the random model has a tokenizer of bytes, which llama.cpp does not know
            load_model(resolve("builtin"), quant="none", compute_dtype=torch.float32).save_pretrained(builtin)
            load_tokenizer(resolve("builtin")).save_pretrained(builtin)
            source = builtin
        result["exports"] = {**facts(f"{command} --only exports"), **versions, **exported(source, steps, forms)}
    write(args.out, result)


if __name__ == "__main__":
    main()
