"""The memory plan of real runs on a CPU against what they take: live tensors by the counter, and the resident set.

    python benchmarks/plan_accuracy.py [--out benchmarks/results/plan_accuracy.json] [--smoke]

Random models of 25 to 190 million weights, made from a config and written as a checkpoint; their data is random text.
Every run is planned from the recipe, the config and the tokenised data, then run twice, three steps each: once with
`LiveBytes` active from before the load on, and once without it in a process of its own, for the largest resident set
(VmHWM). Planned resident set: the plan's tensors and its constant for a process (`CONTEXT_BYTES["cpu"]`), which every
run here also measures, before it loads its model.

Bars: planned / measured tensor bytes within 3 % for each run, planned / measured resident set within 10 %, the constant
included in both.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import ONE_THREAD, facts, fresh, parser_of, peak_rss_bytes, save, write

NUM_STEPS = 3
BARS = {"tensor": 0.03, "rss": 0.10}
_SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192}
_MIDDLE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 16384}
_DEEP = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "vocab_size": 8192}
_WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3, "vocab_size": 32768}
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
SIZES = {"small": _SMALL, "middle": _MIDDLE, "deep": _DEEP, "wide": _WIDE, "tiny": _TINY}

# Name -> size, model type, and the settings of the recipe that differ from `recipe_of`.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "small, r16": ("small", "llama", {}),
    "middle, r16": ("middle", "llama", {}),
    "middle, r64, dropout": ("middle", "llama", {"adapter.rank": 64, "adapter.dropout": 0.05}),
    "middle, LoRA, 32-bit AdamW": ("middle", "llama", {"adapter.kind": "lora", "train.optimizer": "adamw"}),
    "deep, r16": ("deep", "llama", {}),
    "deep, all activations": ("deep", "llama", {"memory.checkpointing": False}),
    "small, LoRA, all activations": ("small", "llama", {"adapter.kind": "lora", "memory.checkpointing": False}),
    "wide, r16": ("wide", "llama", {}),
    "wide, 2,048 tokens": ("wide", "llama", {"data.max_length": 512, "train.micro_batch_tokens": 2048}),
    "wide, 512 tokens, one micro-batch": ("wide", "llama", {"train.micro_batch_tokens": 512, "train.batch": 2}),
    "middle, packed": ("middle", "llama", {"data.packing": True}),
    "middle, Qwen2 with biases": ("middle", "qwen2", {}),
    "small, int8": ("small", "llama", {"base.quant": "int8"}),
    "small, 16-bit base, Lion": ("small", "llama", {"base.quant": "none", "train.optimizer": "lion"}),
    "middle, q and v, plain scales": (
        "middle",
        "llama",
        {"adapter.targets": ["q_proj", "v_proj"], "base.double_quant": False},
    ),
    "small, all of it trained": (
        "small",
        "llama",
        {"base.quant": "none", "adapter.kind": "full", "train.optimizer": "adamw"},
    ),
    "middle, pruned to 2:4, masked": (
        "middle",
        "llama",
        {"base.prune": {"method": "magnitude", "pattern": "2:4"}, "adapter.mask": "keep"},
    ),
    "small, 16-bit base, pruned to a half": (
        "small",
        "llama",
        {"base.quant": "none", "base.prune": {"method": "magnitude", "sparsity": 0.5}},
    ),
    "wide, float32": ("wide", "llama", {"model.dtype": "float32", "train.micro_batch_tokens": 512}),
}
SMOKE = {
    "tiny, packed, all activations": ("tiny", "llama", {"data.packing": True, "memory.checkpointing": False}),
}


def main() -> None:
    """All cases, then how far off each is."""
    parser = parser_of(__doc__, "plan_accuracy", smoke="tiny models")
    parser.add_argument("--only", choices=(*CASES, *SMOKE), help="this case alone; the file keeps the others")
    parser.add_argument("--resident", nargs=2, metavar=("NAME", "DIRECTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident:
        name, directory = args.resident
        print(json.dumps(run_of(recipe_of(Path(directory), {**CASES, **SMOKE}[name]), counting=False)))
        return
    names = [args.only] if args.only else list(SMOKE if args.smoke else CASES)
    cases: dict[str, dict[str, Any]] = {}
    if args.only and args.out.exists():
        cases = json.loads(args.out.read_text(encoding="utf-8"))["cases"]
    for name in names:
        cases[name] = counted(name)
        save(args.out, result_of(cases))
    for name in names:
        cases[name] |= resident(name, cases[name]["planned_rss_bytes"])
        save(args.out, result_of(cases))
    write(args.out, result_of(cases))


def result_of(cases: dict[str, Any]) -> dict[str, Any]:
    """The file: the cases so far, and how far off the worst of them is."""
    errors = {
        what: [abs(each[f"{what}_ratio"] - 1) for each in cases.values() if f"{what}_ratio" in each] for what in BARS
    }
    worst = {what: max(found, default=None) for what, found in errors.items()}
    return {
        **facts("python benchmarks/plan_accuracy.py"),
        "num_steps": NUM_STEPS,
        "cases": cases,
        "num_measured": {what: len(found) for what, found in errors.items()},
        "largest_error": worst,
        "bars": BARS,
        "passes": {
            what: bool(errors[what]) and all(each <= bar for each in errors[what]) for what, bar in BARS.items()
        },
    }


def counted(name: str) -> dict[str, Any]:
    """Planned and counted bytes of one case."""
    with case_in_folder(name) as recipe:
        planned = plan_of(recipe)
        found = run_of(recipe, counting=True)
    tensors = planned["tensor_bytes"]
    ratio = tensors / found["peak_bytes"]
    print(f"{name}: tensors {ratio:.4f}", file=sys.stderr)
    return {
        "micro_batch": planned["micro_batch"],
        "planned_tensor_bytes": tensors,
        "measured_tensor_bytes": found["peak_bytes"],
        "tensor_ratio": ratio,
        "planned_rss_bytes": planned["peak_bytes"],
        "planned_components": planned["components"],
        "planned_peak_in": planned["peak_in"],
    }


def resident(name: str, planned_bytes: int) -> dict[str, Any]:
    """The largest resident set of one case, in a process of its own."""
    with case_in_folder(name) as recipe:
        folder = str(Path(recipe.model.source).parent)
        found = fresh(__file__, "--resident", name, folder, variables=ONE_THREAD)
    ratio = planned_bytes / found["rss_bytes"]
    print(f"{name}: resident {ratio:.3f}", file=sys.stderr)
    return {"measured_rss_bytes": found["rss_bytes"], "process_bytes": found["process_bytes"], "rss_ratio": ratio}


@contextmanager
def case_in_folder(name: str) -> Iterator[Any]:
    """A case's recipe, while its model and data are on the disk."""
    case = {**CASES, **SMOKE}[name]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_model(directory / "model", case[1], SIZES[case[0]])
        write_data(directory / "data.jsonl", num_rows=64, longest=48 if case[0] == "tiny" else 240)
        yield recipe_of(directory, case)


def write_model(directory: Path, kind: str, sizes: dict[str, int]) -> None:
    """A random checkpoint in bf16, with a tokenizer of bytes."""
    import torch
    from byte_tokenizer import byte_tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    heads = sizes["hidden_size"] // 64
    settings = {"num_attention_heads": max(heads, 2), "num_key_value_heads": max(heads // 4, 1)}
    config = (LlamaConfig if kind == "llama" else Qwen2Config)(
        **sizes, **settings, max_position_embeddings=2048, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def write_data(file: Path, num_rows: int, longest: int) -> None:
    """Prompts and answers of random letters, of very different lengths; the first row is as long as may be."""
    letters = random.Random(0)

    def text(length: int) -> str:
        return "".join(letters.choices("abcdefghij ", k=length))

    lengths = [longest, *(letters.randint(longest // 8, longest) for _ in range(num_rows - 1))]
    rows = [{"prompt": text(n // 2), "completion": text(n - n // 2 - 2)} for n in lengths]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(directory: Path, case: tuple[str, str, dict[str, Any]]) -> Any:
    """DoRA of rank 16 on every linear layer of an NF4 base in bf16, 8-bit AdamW, 1,024 tokens a micro-batch."""
    from qdora.recipe.recipe_file import recipe_from

    size, _, changes = case
    longest = 64 if size == "tiny" else 256
    document: dict[str, dict[str, Any]] = {
        "model": {"source": str(directory / "model"), "dtype": "bfloat16"},
        "adapter": {},
        "base": {},
        "data": {"mix": [{"source": str(directory / "data.jsonl")}], "max_length": longest},
        "train": {
            "steps": NUM_STEPS,
            "batch": 8,
            "micro_batch_tokens": 4 * longest,
            "checkpoint_every": None,
        },
        "memory": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition(".")
        document[section][name] = value
    return recipe_from(document)


def data_of(recipe: Any) -> tuple[Any, Any, Any]:
    """The model's source, the tokenised data and the tokenizer."""
    from qdora.data.build_data import read_data, tokenized_mix
    from qdora.model.build_model import find_model

    source, tokenizer = find_model(recipe)
    train, _ = read_data(recipe.data)
    return source, tokenized_mix(recipe, tokenizer, train), tokenizer


def plan_of(recipe: Any) -> dict[str, Any]:
    """As `qdora plan --device cpu` makes it."""
    from qdora.plan.memory_plan import plan
    from qdora.plan.workload import workload_of_data

    _, mix, tokenizer = data_of(recipe)
    return plan(recipe, device_kind="cpu", workload=workload_of_data(recipe, mix, tokenizer)).to_dict()


def run_of(recipe: Any, *, counting: bool) -> dict[str, Any]:
    """Load, train, and say what was the most that was alive, or resident."""
    import gc
    from contextlib import nullcontext

    import torch

    from qdora.data.build_data import make_loader
    from qdora.memory.allocator import keep_freed_memory
    from qdora.model.build_model import Compute, put_adapters
    from qdora.model.inject import adapter_parameters
    from qdora.model.packed_base import PrunedBase
    from qdora.plan.live_bytes import LiveBytes
    from qdora.recipe.train_settings import TrainConfig
    from qdora.run.load_base import load_base
    from qdora.run.pruned_base import compress_base, compression_key
    from qdora.train.hooks import Hooks
    from qdora.train.interrupt import StopRequest
    from qdora.train.loop import fit
    from qdora.train.optimizer import AdapterOptimizer
    from qdora.train.packed_attention import packed_layout
    from qdora.train.progress import TrainingProgress

    keep_freed_memory()
    source, mix, tokenizer = data_of(recipe)
    loader = make_loader(recipe, mix, tokenizer)
    process = peak_rss_bytes()
    found: dict[str, Any] = {"process_bytes": process}
    with LiveBytes() if counting else nullcontext() as live:
        compute = Compute(torch.device("cpu"), getattr(torch, recipe.model.dtype))
        if recipe.base.prune is None:
            model = load_base(recipe, source, compute)
        else:
            pruned = Path(recipe.model.source).parent / "base"
            compress_base(recipe, source, compute, None, pruned, key=compression_key(recipe, source, compute, None))
            model = load_base(recipe, source, compute, placer=PrunedBase(pruned))
        put_adapters(model, recipe)
        if recipe.data.packing:
            loader.batching.packed = packed_layout(model)[0]
        optimizer = AdapterOptimizer(adapter_parameters(model), name=recipe.train.optimizer)
        gc.collect()
        if live is not None:
            found["load_peak_bytes"] = live.peak_bytes
            live.reset_peak()
        chunk = recipe.memory.loss_chunk
        fit(
            model,
            optimizer,
            loader,
            TrainConfig(steps=NUM_STEPS, batch=1, lr=1e-4, schedule="constant", warmup=0),
            Hooks(write_metrics=lambda _metrics: None, save=lambda _step: Path(), keep_batch=lambda _bad: Path()),
            device=torch.device("cpu"),
            progress=TrainingProgress(NUM_STEPS),
            stop=StopRequest(),
            num_steps=NUM_STEPS,
            loss_chunk=None if chunk == "auto" else chunk,
        )
        if live is not None:
            found |= {"peak_bytes": live.peak_bytes, "phase": dict(live.peak_by_label)}
    return found | {"rss_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    main()
