"""Does a change of the code change results? Short runs of a checkout, compared with those of another one.

    python benchmarks/same_results.py run CHECKOUT FOLDER [--python PY] [--only CASE ...]     -> FOLDER/results.json
    python benchmarks/same_results.py compare BEFORE/results.json AFTER/results.json

Five runs of six steps are planned, trained, evaluated, ranked and exported; `lora` trains the builtin model, the others
small random ones. Thirty more take two steps, one for each thing that a rebuilt room could lose. One CPU thread, a
process for each verb. Both sides must read the same models and data, which the first call makes in FOLDER/../inputs.

Compared are, for each case:
    training     the numbers of metrics.jsonl but those of evaluations, times and memory: equal
    tensors      of adapters, checkpoints and exports, by name: dtype, shape and bytes equal
    evaluation   of metrics.jsonl, `qdora eval`, `rank` and studies: within 1e-6, accuracies with it
    plan         the peak, within 1 %
    text         what `qdora generate` answers: equal
A key that only one side has is listed as left or new and counts only among tensors; a case whose first command exits
with 2 is listed as left, since its setting is gone. The exit code is 1 if anything differs.

Bits depend on the processor and on versions: `compare` refuses results of two machines. This script needs the standard
library; only making the inputs imports torch, and qdora of CHECKOUT for the tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LLAMA, MIXTURE, CHATS = "{inputs}/llama", "{inputs}/mixture", "{inputs}/chats.jsonl"
TEXTS, CHOICES = "{inputs}/texts.jsonl", "{inputs}/choices.jsonl"
SMALL = {"model.source": LLAMA, "adapter.rank": 8, "adapter.alpha": 16, "adapter.targets": "all-linear"}
LONG = {"train.steps": 6, "train.checkpoint_every": 2, "train.keep_checkpoints": 9, "eval.every": 3}
SVD = ("--method", "svd", "--budget", "50%")
CALIBRATION = "calibration: {sequences: 4, length: 64}"

LONG_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # case -> settings, {rank options, export formats}
    "lora": ({"adapter.kind": "lora", "base.cache": "auto"}, {"formats": ("merged", "nf4-lora", "peft")}),
    "dora": (
        SMALL
        | {"adapter.dropout": 0.1, "data.packing": True, "train.optimizer": "paged_adamw_8bit", "eval.best_by": "macro"}
        | {"interference.every": 3, "interference.examples": 2},
        {"rank": ("--method", "curvature", "--budget", "50%", "--examples", "8")},
    ),
    "masked": (
        SMALL | {"adapter.mask": "keep", "base.prune": f"{{method: wanda, pattern: '2:4', {CALIBRATION}}}"},
        {"formats": ("merged",), "rank": ("--method", "gradient", "--examples", "8")},
    ),
    "gated": (
        SMALL | {"adapter.gates": "{mode: l1, mean_rank: 3, warmup: 1, anneal: 4, shrink_every: 1}"},
        {"rank": SVD},
    ),
    "streamed": (
        SMALL | {"train.optimizer": "lion", "data.strategy": "equal"},
        {"rank": SVD},
    ),
}
SHORT_CASES: dict[str, dict[str, Any]] = {
    "lora on nf4": SMALL | {"adapter.kind": "lora", "adapter.rank_stabilized": True},
    "magnitude on nf4": {"model.source": LLAMA, "adapter": "{kind: magnitude, targets: all-linear}"},
    "full": {"model.source": LLAMA, "adapter": "{kind: full}", "base": "{quant: none}"},
    **{f"dora on {quant}": SMALL | {"base.quant": quant} for quant in ("fp4", "int4", "nf3", "nf2")},
    "dora on int8": SMALL | {"base": "{quant: int8}"},
    "dora on 16 bits": SMALL | {"base": "{quant: none}"},
    "experts on nf4": SMALL | {"model.source": MIXTURE, "adapter.experts": "{rank: 2}"},
    "experts on mxfp4": SMALL | {"model.source": "{inputs}/mxfp4", "base": "{quant: mxfp4}"},
    "adamw 32 bits": SMALL | {"train.optimizer": "paged_adamw_32bit"},
    "lion 8 bits": SMALL | {"train.optimizer": "paged_lion_8bit"},
    "float16": SMALL | {"model.dtype": "float16"},
    "float32": SMALL | {"model.dtype": "float32"},
    "temperature": SMALL | {"data.strategy": "temperature", "data.temperature": 2.0, "data.mix[0].limit": 7},
    "caps": SMALL | {"data.mix[0].max_epochs": 1},
    "loss on all": SMALL | {"data.loss_on": "all"},
    "loss in chunks": SMALL | {"memory.loss_chunk": 16},
    "chats": SMALL | {"data.mix": f"[{{source: {CHATS}, format: messages}}]"},
    "stream": SMALL | {"data.mix": f"[{{source: {TEXTS}, format: completion, stream: true, size: 40}}]"},
    "new tokens": SMALL | {"model.add_tokens": "['<a>', '<b>']", "adapter.also_train": "[embed_tokens, lm_head]"},
    "no checkpointing": SMALL | {"memory.checkpointing": False},
    "magnitude pruning": SMALL | {"base.prune": "{method: magnitude, sparsity: 0.5}"},
    "sparsegpt": SMALL | {"base.prune": f"{{method: sparsegpt, pattern: '2:4', {CALIBRATION}}}"},
    "hard concrete": SMALL | {"adapter.gates": "{mode: hard_concrete, mean_rank: 3, warmup: 0, anneal: 1}"},
    "loftq": SMALL | {"adapter.init": "loftq"},
    "trained rows": SMALL | {"adapter.also_train": "[embed_tokens]", "adapter.also_train_rows": "all"},
    "generated answers": SMALL | {"data.mix": f"[{{source: {CHOICES}, format: choices}}]", "eval.method": "generate"},
    "two processes": SMALL,
    "shard": SMALL | {"train.parallel": "shard"},
    "hybrid": SMALL | {"train.parallel": "hybrid"},
}
STUDY = """
recipe: tiny
settings: {{model.source: {inputs}/llama, adapter.targets: all-linear, train.steps: 2}}
product:
  adapter:
    lora: {{adapter.kind: lora}}
    dora: {{adapter.kind: dora}}
seeds: [0, 1]
compare: {{reference: lora}}
"""
MAKE_INPUTS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import (GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig,
                          Qwen3MoeForCausalLM)
from qdora.model.source import load_tokenizer, resolve

folder = Path(sys.argv[1])
tokenizer = load_tokenizer(resolve("builtin"))
sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
             vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16)
for name, kind, config in (("llama", LlamaForCausalLM, LlamaConfig(**sizes, tie_word_embeddings=True)),
                           ("mixture", Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, **experts))):
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).bfloat16()
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
model = GptOssForCausalLM(GptOssConfig(**sizes | {"intermediate_size": 64}, head_dim=16, num_local_experts=4,
                                       num_experts_per_tok=2)).bfloat16()
draw, tensors = torch.Generator().manual_seed(0), {}
for key, value in model.state_dict().items():
    if key.endswith(("experts.gate_up_proj", "experts.down_proj")):  # as gpt-oss is published
        shape = (value.shape[0], value.shape[2], value.shape[1] // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{key}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8, generator=draw)
    else:
        tensors[key] = value.contiguous()
model.config.architectures, model.config.quantization_config = ["GptOssForCausalLM"], {"quant_method": "mxfp4"}
model.config.save_pretrained(folder / "mxfp4")
tokenizer.save_pretrained(folder / "mxfp4")
save_file(tensors, folder / "mxfp4/model.safetensors", metadata={"format": "pt"})
says = lambda role, content: {"role": role, "content": content}
chats = [{"messages": [says("user", f"What is {i} plus 2?"), says("assistant", f"It is {i + 2}."),
                       says("user", "Sure?"), says("assistant", "Yes.")]} for i in range(20)]
texts = [{"prompt": f"Count to {i}: ", "completion": " ".join(map(str, range(1, i + 1)))} for i in range(1, 41)]
choices = [{"question": f"Is {i} even?", "choices": ["yes", "no"], "answer": i % 2} for i in range(40)]
for name, rows in (("chats", chats), ("texts", texts), ("choices", choices)):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""

KINDS = ("training", "tensors", "evaluation", "plan", "text")
Results = dict[str, Any]


class Side:
    """A checkout and the folder in which its code runs."""

    def __init__(self, checkout: Path, folder: Path, python: str) -> None:
        self.checkout, self.folder, self.python = checkout.resolve(), folder.resolve(), python
        self.inputs = self.folder.parent / "inputs"
        self.results: Results = {}

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the interpreter on the checkout: one thread, no GPU, no network, caches of this side only."""
        cache = self.folder / "cache"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("QDORA", "HF_", "PYTHON"))}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        caches = {"XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache / "hub"), "MPLCONFIGDIR": str(cache / "figures")}
        own = {"PYTHONPATH": str(self.checkout), "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
        self.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=kept | threads | caches | own,
            capture_output=True,
            text=True,
        )

    def make_inputs(self) -> None:
        """The models and data, unless an earlier call has made them."""
        if self.inputs.is_dir():
            return
        partial = self.inputs.with_name("inputs.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        done = self.start("-c", MAKE_INPUTS, str(partial))
        if done.returncode:
            raise SystemExit(f"making the inputs failed:\n{done.stderr}")
        partial.rename(self.inputs)

    def qdora(self, case: str, *arguments: str, module: tuple[str, ...] = ("-m", "qdora.cli")) -> Any:
        """What a verb prints with --json; None if it failed, which the results of the case note."""
        texts = [argument.replace("{inputs}", str(self.inputs)) for argument in arguments]
        done = self.start(*module, *texts, "--json")
        print(f"{case}: {' '.join(arguments[:1])}: {done.returncode}", file=sys.stderr, flush=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [""]
            self.results[case].setdefault("failed", {})[arguments[0]] = [done.returncode, last[0]]
            return None
        return json.loads(done.stdout)

    def recipe(self, settings: dict[str, Any]) -> list[str]:
        """The recipe `tiny` with settings, as arguments of a verb."""
        texts = [f"{key}={_yaml(value)}" for key, value in ({"train.steps": 2} | settings).items()]
        return ["tiny", *(part for text in texts for part in ("-s", text))]

    def run(self, case: str, settings: dict[str, Any]) -> Path | None:
        """Train a run and keep its numbers; None if it failed."""
        directory = self.folder / "runs" / case.replace(" ", "_")
        shutil.rmtree(directory, ignore_errors=True)
        self.results[case] = {kind: {} for kind in KINDS}
        module: tuple[str, ...] = ("-m", "qdora.cli")
        if case in ("two processes", "shard", "hybrid"):
            module = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", self.python, *module)
        if case == "streamed":
            module = ("-m", "tests.host_streaming")  # host memory without a GPU, by the tests' copies
        if self.qdora(case, "train", *self.recipe(settings), "--run-dir", str(directory), module=module) is None:
            return None
        result = self.results[case]
        for line in (directory / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            step = f"{record.pop('step')}{' eval' if 'eval' in record else ''}"
            kind = "evaluation" if "eval" in record else "training"
            result[kind] |= {f"metrics {step} {key}": value for key, value in numbers(record)}
        result["tensors"] |= tensors(directory, self.folder / "runs")
        return directory

    def long_case(self, case: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
        """A run with its plan, evaluation, answer, ranks and exports."""
        directory = self.run(case, LONG | settings)
        result = self.results[case]
        plan = self.qdora(case, "plan", *self.recipe(LONG | settings))
        if plan is not None:
            result["plan"]["peak"] = plan["memory"]["peak_bytes"]
        if directory is None:
            return
        verbs: dict[str, tuple[str, ...]] = {"eval": (), "rank": options.get("rank", SVD)}
        for verb, more in verbs.items():
            printed = self.qdora(case, verb, str(directory), *more)
            result["evaluation"] |= {f"{verb} {key}": value for key, value in numbers(printed)}
        answer = self.qdora(case, "generate", str(directory), "--prompt", "Name a bird.", "--max-new-tokens", "8")
        result["text"] |= {key: value for key, value in leaves(answer) if key.endswith("text")}
        for form in options.get("formats", ("merged", "nf4-lora")):
            out = self.folder / "exports" / case / form
            shutil.rmtree(out, ignore_errors=True)
            if self.qdora(case, "export", str(directory), str(out), "--format", form) is not None:
                result["tensors"] |= tensors(out, self.folder)
        if case == "dora":  # what a resumed run does once more must be what it did
            shutil.rmtree(directory / "checkpoints/step-6")
            if self.qdora(case, "train", *self.recipe(LONG | settings), "--run-dir", str(directory), "--resume"):
                again = tensors(directory / "checkpoints/step-6", self.folder / "runs")
                result["tensors"] |= {f"resumed {key}": value for key, value in again.items()}

    def study(self) -> None:
        """Four cells of two steps, and their scores."""
        case, file = "study", self.folder / "study.yaml"
        self.results[case] = {kind: {} for kind in KINDS}
        file.write_text(STUDY.format(inputs=self.inputs))
        shutil.rmtree(self.folder / "study", ignore_errors=True)
        printed = self.qdora(case, "study", str(file), "--dir", str(self.folder / "study"))
        if printed is not None:
            self.results[case]["evaluation"] = dict(numbers(self.qdora(case, "report", str(self.folder / "study"))))


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, string, boolean and null of a JSON value with its place, without times and measured memory."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict | list):
        yield path, value
    for key, item in items:
        if not re.search(r"time|seconds|_memory_bytes|version", str(key)):
            yield from leaves(item, f"{path}.{key}" if path else str(key))


def numbers(value: Any) -> list[tuple[str, float]]:
    """The numbers among `leaves`; none of None."""
    return [(key, leaf) for key, leaf in leaves(value) if isinstance(leaf, int | float)]


def tensors(folder: Path, above: Path) -> dict[str, str]:
    """Place and name of each tensor in the safetensors files below a folder -> dtype, shape and SHA-256."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                stream.seek(8 + length + begin)
                digest = hashlib.sha256(stream.read(end - begin)).hexdigest()
                key = f"{file.parent.relative_to(above).as_posix()}: {name}"
                found[key] = f"{entry['dtype']} {entry['shape']} {digest}"
    return found


def differs(kind: str, old: Any, new: Any) -> bool:
    """Whether two values of one key are different results."""
    if kind == "evaluation":
        return not (old == new or abs(old - new) <= 1e-6)
    return bool(abs(old - new) > 0.01 * old if kind == "plan" else old != new)


def compared(before: Results, after: Results) -> dict[str, Any]:
    """Case -> what differs, left and is new."""
    report: dict[str, Any] = {}
    for case, old in before.items():
        new = after.get(case, {"failed": {"train": [2, "not run"]}})
        entry: dict[str, Any] = {"equal": 0, "different": [], "left": [], "new": []}
        failed = {verb: end for verb, end in new.get("failed", {}).items() if verb not in old.get("failed", {})}
        if failed.get("train", [0])[0] == 2:
            entry["left"].append(f"the case: {failed['train'][1]}")
        else:
            entry["different"] += [f"{verb} fails: {end}" for verb, end in failed.items()]
            for kind in KINDS:
                one, other = old.get(kind, {}), new.get(kind, {})
                for key in sorted({*one, *other}):
                    text = f"{kind} {key}: {one.get(key)} -> {other.get(key)}"
                    if key not in one or key not in other:
                        is_lost = key in one and kind == "tensors" and not failed
                        entry["different" if is_lost else "left" if key in one else "new"].append(text)
                    elif differs(kind, one[key], other[key]):
                        entry["different"].append(text)
                    else:
                        entry["equal"] += 1
        report[case] = {key: value for key, value in entry.items() if value or key == "equal"}
    return report


def machine(side: Side) -> dict[str, Any]:
    """What bits depend on beside the code."""
    text = (
        "import json, torch, transformers as t, bitsandbytes as b; print(json.dumps([torch.__version__, t.__version__,"
    )
    done = side.start("-c", f"{text} b.__version__, torch.backends.cpu.get_cpu_capability()]))")
    cpu = re.findall(r"^(?:model name|flags)\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[:2]
    flags = [flag for flag in cpu[1].split() if flag.startswith(("avx", "amx"))]
    return {"versions": json.loads(done.stdout), "cpu": cpu[0], "flags": flags}


def main() -> int:
    """0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("checkout", type=Path)
    run.add_argument("folder", type=Path)
    run.add_argument("--python", default=sys.executable)
    run.add_argument("--only", nargs="+", choices=(*LONG_CASES, *SHORT_CASES, "study"))
    compare = verbs.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.verb == "compare":
        before, after = (json.loads(file.read_text()) for file in (args.before, args.after))
        if before["machine"] != after["machine"]:
            raise SystemExit(f"these are results of two machines: {before['machine']}, {after['machine']}.")
        report = compared(before["cases"], after["cases"])
        num_different = sum(len(entry.get("different", ())) for entry in report.values())
        num_equal = sum(entry["equal"] for entry in report.values())
        print(json.dumps({"num_equal": num_equal, "num_different": num_different, "cases": report}, indent=1))
        return 1 if num_different else 0
    side = Side(args.checkout, args.folder, args.python)
    side.make_inputs()
    chosen = args.only or [*LONG_CASES, *SHORT_CASES, "study"]
    for case in chosen:
        if case in LONG_CASES:
            side.long_case(case, *LONG_CASES[case])
        elif case in SHORT_CASES:
            side.run(case, SHORT_CASES[case])
        else:
            side.study()
        results = {"checkout": str(args.checkout), "machine": machine(side), "cases": side.results}
        (side.folder / "results.json").write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
