"""Does a change of the code change results? Short runs of a checkout, compared with those of another one.

The cases are in same_results.yaml. Five runs of six steps are planned, trained, evaluated, ranked and exported; `lora`
trains the builtin model, the others small random ones. Thirty more take two steps, one for each thing that a rebuilt
room could lose. One CPU thread, a process for each verb. Both sides read the same models and data, which the first call
makes in FOLDER/../inputs.

Equal must be the numbers of metrics.jsonl but times and memory, what `qdora generate` answers, and dtype, shape and
bytes of all tensors of adapters, checkpoints and exports; evaluations, ranks and studies within 1e-6, the peak of the
plan within 1 %. A key that only one side has is listed as left or new and counts only among tensors; a case whose first
command exits with 2 is listed as left, since its setting is gone. The exit code is 1 if anything differs. Bits depend
on the processor and on versions: `compare` refuses results of two machines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CASES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
ALL = [*CASES["long"], *CASES["short"], "study"]
LONG = {"train.steps": 6, "train.checkpoint_every": 2, "train.keep_checkpoints": 9, "eval.every": 3}
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
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the interpreter on the checkout: one thread, no GPU, no network, caches of this side only."""
        cache = self.folder / "cache"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("QDORA", "HF_", "PYTHON"))}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        caches = {"XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache / "hub"), "MPLCONFIGDIR": str(cache / "figures")}
        own = {"PYTHONPATH": str(self.checkout), "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
        call, environment = [self.python, *arguments], kept | threads | caches | own
        return subprocess.run(call, cwd=self.folder, env=environment, capture_output=True, text=True)

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
        done = self.start(*module, *(each.replace("{inputs}", str(self.inputs)) for each in arguments), "--json")
        print(f"{case}: {arguments[0]}: {done.returncode}", file=sys.stderr, flush=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [""]
            self.results[case].setdefault("failed", {})[arguments[0]] = [done.returncode, last[0]]
            return None
        return json.loads(done.stdout)

    def train(self, case: str, settings: dict[str, Any], *options: str) -> Path | None:
        """Train a run of the recipe `tiny` with settings, or go on with it; None if it failed."""
        directory = self.folder / "runs" / case.replace(" ", "_")
        module: tuple[str, ...] = ("-m", "qdora.cli")
        if case in ("two processes", "shard", "hybrid"):
            module = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", self.python, *module)
        if case == "streamed":
            module = ("-m", "tests.host_streaming")  # host memory without a GPU, by the tests' copies
        words = [*recipe(settings), "--run-dir", str(directory), *options]
        return None if self.qdora(case, "train", *words, module=module) is None else directory

    def run(self, case: str) -> None:
        """A short case, or a long one with its plan, evaluation, answer, ranks and exports."""
        is_long = case in CASES["long"]
        options = CASES["long"].get(case, {})
        settings = LONG | options["settings"] if is_long else {"train.steps": 2} | CASES["short"][case]
        result = self.results[case] = {kind: {} for kind in KINDS}
        shutil.rmtree(self.folder / "runs" / case.replace(" ", "_"), ignore_errors=True)
        directory = self.train(case, settings)
        plan = self.qdora(case, "plan", *recipe(settings)) if is_long else None
        if plan is not None:
            result["plan"]["peak"] = plan["memory"]["peak_bytes"]
        if directory is None:
            return
        for line in (directory / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            step = f"{record.pop('step')}{' eval' if 'eval' in record else ''}"
            kind = "evaluation" if "eval" in record else "training"
            result[kind] |= {f"metrics {step} {key}": value for key, value in numbers(record)}
        result["tensors"] |= tensors(directory, self.folder / "runs")
        if not is_long:
            return
        for verb, more in (("eval", ()), ("rank", options.get("rank", ("--method", "svd", "--budget", "50%")))):
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
            if self.train(case, settings, "--resume"):
                again = tensors(directory / "checkpoints/step-6", self.folder / "runs")
                result["tensors"] |= {f"resumed {key}": value for key, value in again.items()}

    def study(self) -> None:
        case, file, directory = "study", self.folder / "study.yaml", str(self.folder / "study")
        self.results[case] = {kind: {} for kind in KINDS}
        file.write_text(json.dumps(CASES["study"]).replace("{inputs}", str(self.inputs)))  # JSON is YAML
        shutil.rmtree(directory, ignore_errors=True)
        if self.qdora(case, "study", str(file), "--dir", directory) is not None:
            self.results[case]["evaluation"] = dict(numbers(self.qdora(case, "report", directory)))


def recipe(settings: dict[str, Any]) -> list[str]:
    """The recipe `tiny` with settings, as arguments of a verb."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return ["tiny", *(word for key, text in texts.items() for word in ("-s", f"{key}={text}"))]


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
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(content[start + begin : start + end]).hexdigest()
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
    modules = "import json, torch, transformers as t, bitsandbytes as b"
    versions = "[torch.__version__, t.__version__, b.__version__, torch.backends.cpu.get_cpu_capability()]"
    done = side.start("-c", f"{modules}; print(json.dumps({versions}))")
    cpu = re.findall(r"^(?:model name|flags)\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[:2]
    flags = [flag for flag in cpu[1].split() if flag.startswith(("avx", "amx"))]
    return {"versions": json.loads(done.stdout), "cpu": cpu[0], "flags": flags}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run, compare = verbs.add_parser("run"), verbs.add_parser("compare")
    run.add_argument("checkout", type=Path)
    run.add_argument("folder", type=Path)
    run.add_argument("--python", default=sys.executable)
    run.add_argument("--only", nargs="+", choices=ALL)
    for name in ("before", "after"):
        compare.add_argument(name, type=Path)
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
    for case in args.only or ALL:
        side.study() if case == "study" else side.run(case)
        results = {"checkout": str(args.checkout), "machine": machine(side), "cases": side.results}
        (side.folder / "results.json").write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
