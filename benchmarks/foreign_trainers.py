"""qdora's layer inside TRL, axolotl, ms-swift and LLaMA-Factory, beside PEFT's own: equal losses, magnitudes that move.

Each command of `TRAINERS` trains a random Llama of two blocks in NF4 on the CPU for ten steps, with DoRA of rank 8 on
all linear layers of the blocks: with PEFT's layer, and with qdora's by each way in. In its processes, `HOOK` reports at
the end of transformers' `Trainer.train`. It also makes the runs comparable: A starts at the same values (axolotl makes
the adapter before it sets a seed), and bitsandbytes' rewriting of weights for AVX512-BF16 is off, since PEFT's layer is
wrong behind it. Sections of other trainers stay in the result file.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from byte_tokenizer import write_model, write_sums
from frame import table, tabulated
from measure import OFFLINE, ONE_THREAD, RESULTS, facts, save

HOOK = """
import importlib.util, json, os, sys
from importlib.metadata import version

def watch(transformers_trainer):
    import torch
    train = transformers_trainer.Trainer.train

    def watched(self, *args, **kwargs):
        generator, called = torch.Generator().manual_seed(0), set()
        magnitudes = {n: p for n, p in self.model.named_parameters() if "lora_magnitude_vector" in n}
        before = {n: p.detach().clone() for n, p in magnitudes.items()}
        for path, module in self.model.named_modules():
            module.support_avx512bf16_for_cpu = False
            if hasattr(module, "lora_magnitude_vector"):
                torch.nn.init.normal_(module.lora_A.default.weight, 0.0, 0.1, generator)
                module.register_forward_pre_hook(lambda module, inputs, path=path: called.add(path))
        result = train(self, *args, **kwargs)

        import qdora.peft
        rows = qdora.peft.report(self.model).items()
        ways = [way if path in called else "never called" for path, way in rows]
        moved = [float((p != before[n]).float().mean()) for n, p in magnitudes.items()]
        report = {
            "losses": [row["loss"] for row in self.state.log_history if "loss" in row],
            "magnitude_dtypes": sorted({str(p.dtype) for p in magnitudes.values()}),
            "share_of_magnitudes_moved": sum(moved) / len(moved),
            "num_layers": len(ways),
            "num_fast": ways.count("fast"),
            "reasons": sorted(set(ways) - {"fast"}),
            "versions": {name: version(name) for name in (os.environ["TRAINER"], "transformers", "peft", "trl")},
        }
        with open(os.path.join(os.environ["REPORTS"], os.environ.get("RANK", "0")), "x") as file:
            json.dump(report, file)
        return result

    transformers_trainer.Trainer.train = watched

class AfterImport:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.trainer":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), watch(module))
            return spec

sys.meta_path.insert(0, AfterImport())
"""
AXOLOTL = """
base_model: model, load_in_4bit: true, adapter: qlora, peft_use_dora: true, lora_target_linear: true, lora_r: 8,
lora_alpha: 16, lora_dropout: 0.0, sequence_len: 64, micro_batch_size: 4, gradient_accumulation_steps: 1, max_steps: 10,
learning_rate: 1.0e-3, lr_scheduler: constant, optimizer: adamw_torch, logging_steps: 1, save_strategy: "no",
val_set_size: 0, seed: 0, output_dir: out, special_tokens: {pad_token: <pad>}, datasets: [{path: sums.jsonl, type:
{field_instruction: prompt, field_output: completion, no_input_format: "{instruction}"}}]"""
KERNELS_OFF = "lora_mlp_kernel: false, lora_qkv_kernel: false, lora_o_kernel: false"  # qdora's plugin does this, too
SWIFT = """swift sft --model model --model_type llama --template dummy --dataset sums.jsonl --split_dataset_ratio 0
--tuner_type lora --quant_method bnb --quant_bits 4 --use_dora true --target_modules all-linear --lora_rank 8
--lora_alpha 16 --lora_dropout 0 --torch_dtype float32 --per_device_train_batch_size 4 --gradient_accumulation_steps 1
--max_steps 10 --learning_rate 1e-3 --logging_steps 1 --save_strategy no --report_to none --use_hf true"""
LLAMA_FACTORY = """{model_name_or_path: model, stage: sft, do_train: true, finetuning_type: lora, use_dora: true,
quantization_bit: 4, lora_target: all, lora_rank: 8, lora_alpha: 16, lora_dropout: 0.0, dataset_dir: ., dataset: sums,
template: empty, cutoff_len: 64, per_device_train_batch_size: 4, max_steps: 10, learning_rate: 1.0e-3, logging_steps: 1,
save_strategy: "no", report_to: none, output_dir: out, overwrite_output_dir: true}"""
COLUMNS = '{"sums": {"file_name": "sums.jsonl", "columns": {"prompt": "prompt", "response": "completion"}}}'
LLAMA_FACTORY_TAKES_DORA = """
from types import SimpleNamespace

import llamafactory.model.adapter as adapter
from llamafactory.train.tuner import run_exp

adapter.QuantizationMethod = SimpleNamespace(BNB="bitsandbytes")  # what the launcher mends in version 0.9.5
run_exp()
"""
TRL = """
import sys
import qdora.peft, torch, trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

name, way = sys.argv[1:]
if way == "patch":
    qdora.peft.patch()
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained("model", quantization_config=quantization, dtype=torch.float32)
config = LoraConfig(use_dora=True, r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
rows = [{"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a * b}"} for a in range(6) for b in range(5)]
rows = rows if name == "DPO" else [{"text": row["prompt"] + row["chosen"]} for row in rows]
settings = getattr(trl, f"{name}Config")(
    "out", max_steps=10, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, save_strategy="no",
    report_to="none", use_cpu=True, bf16=False, seed=0)
getattr(trl, f"{name}Trainer")(
    model, args=settings, train_dataset=Dataset.from_list(rows), peft_config=qdora.peft.use(config)
    if way == "use" else config, processing_class=AutoTokenizer.from_pretrained("model")).train()
"""
LAUNCHER = "python -m qdora.peft"
TWO, TORCHRUN = "env NPROC_PER_NODE=2 FORCE_TORCHRUN=1", "python -m torch.distributed.run --nproc_per_node 2"
# For each distribution: the files that its commands need, and its commands.
TRAINERS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "trl": (
        {"train.py": TRL},
        {
            f"{way}{name}": f"python train.py {name[2:] or 'SFT'} {way}"
            for name in ("", ", DPO")
            for way in ("peft", "use", "patch")
        },
    ),
    "axolotl": (
        {
            "peft.yaml": f"{{{AXOLOTL}, {KERNELS_OFF}}}",
            "launcher.yaml": f"{{{AXOLOTL}}}",
            "plugin.yaml": f"{{{AXOLOTL}, plugins: [qdora.peft.AxolotlPlugin]}}",
        },
        {
            "peft": "axolotl train peft.yaml",
            "launcher": f"{LAUNCHER} axolotl train launcher.yaml",
            "plugin": "axolotl train plugin.yaml",
        },
    ),
    "ms-swift": (
        {"plugin.py": "import qdora.peft\n\nqdora.peft.patch()\n"},
        {
            "peft": SWIFT,
            "launcher": f"{LAUNCHER} {SWIFT}",
            "plugin": f"{SWIFT} --external_plugins plugin.py",
            "peft, two processes": f"{TWO} {SWIFT} --ddp_backend gloo",
            "launcher, two processes": f"{TWO} {LAUNCHER} {SWIFT} --ddp_backend gloo",
        },
    ),
    "llamafactory": (
        {"dora.yaml": LLAMA_FACTORY, "dataset_info.json": COLUMNS, "control.py": LLAMA_FACTORY_TAKES_DORA},
        {
            "peft": "python control.py dora.yaml",
            "launcher": f"{LAUNCHER} llamafactory-cli train dora.yaml",
            "peft, two processes": f"{TORCHRUN} control.py dora.yaml ddp_backend=gloo",
            "launcher, two processes": f"{TWO} {LAUNCHER} llamafactory-cli train dora.yaml ddp_backend=gloo",
        },
    ),
}


def section(name: str, python: Path) -> dict[str, Any]:
    """The reports of a trainer's processes, qdora's compared with those of PEFT's layer."""
    files, commands = TRAINERS[name]
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder / "model")
        write_sums(folder / "sums.jsonl")
        (folder / "site").mkdir()
        for file, text in (files | {"site/sitecustomize.py": HOOK}).items():
            (folder / file).write_text(text)
        variables = {
            "PATH": f"{python.absolute().parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{folder / 'site'}:{Path(__file__).resolve().parent.parent}",
            "CUDA_VISIBLE_DEVICES": "",
            "AXOLOTL_DO_NOT_TRACK": "1",  # at its end it waits for a network
            "TRAINER": name,
        }
        for way, command in commands.items():
            reports = Path(tempfile.mkdtemp(dir=folder))
            environment = {**os.environ, **ONE_THREAD, **OFFLINE, **variables, "REPORTS": str(reports)}
            subprocess.run(shlex.split(command), cwd=folder, env=environment, check=True)
            found[way] = [json.loads(file.read_text()) for file in sorted(reports.iterdir())]
    versions = [report.pop("versions") for processes in found.values() for report in processes]
    for way, processes in found.items():
        control = found["peft" + "".join(way.partition(",")[1:])]
        assert len(processes) == (2 if "two" in way else 1)
        if processes is control:
            continue
        for ours, pefts in zip(processes, control, strict=True):
            pairs = list(zip(ours["losses"], pefts["losses"], strict=True))
            ours["largest_difference_of_loss"] = max(abs(a - b) for a, b in pairs)
    return {"versions": versions[0], "processes": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("python", type=Path, help="the Python of an environment in which the trainer is installed")
    parser.add_argument("--out", type=Path, default=RESULTS / "foreign_trainers.json")
    args = parser.parse_args()
    found = json.loads(args.out.read_text())["trainers"] if args.out.exists() else {}
    found[args.trainer] = section(args.trainer, args.python)
    trainers = {name: found[name] for name in TRAINERS if name in found}
    head = facts("python benchmarks/foreign_trainers.py TRAINER PYTHON")
    save(args.out, {**head, "trainers": trainers})


@table("foreign_trainers")
def foreign_trainers_table(result: Any) -> str:
    rows = [
        (name, found["versions"], way, processes)
        for name, found in result["trainers"].items()
        for way, processes in found["processes"].items()
        if not way.startswith("peft")
    ]

    def magnitudes(row: Any) -> str:
        dtypes = sorted({dtype.removeprefix("torch.") for each in row[3] for dtype in each["magnitude_dtypes"]})
        return f"{min(each['share_of_magnitudes_moved'] for each in row[3]):.0%}, {', '.join(dtypes)}"

    columns = {
        "trainer": lambda row: f"{row[0]} {row[1][row[0]]}, PEFT {row[1]['peft']}",
        "way in": "{2}",
        "loss, qdora against PEFT": lambda row: f"{max(each['largest_difference_of_loss'] for each in row[3]):.1e}",
        "fast layers": lambda row: " + ".join(f"{each['num_fast']} of {each['num_layers']}" for each in row[3]),
        "magnitudes moved": magnitudes,
    }
    return tabulated(rows, columns)


if __name__ == "__main__":
    main()
