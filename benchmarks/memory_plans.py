"""Memory plans: against real runs, and of the shipped recipes."""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_tokenizer import byte_tokenizer
from frame import GIB, Column, bench, cell, main, markdown, read, table, tabulated
from measure import ONE_THREAD, alone, peak_rss_bytes
from mixed_data import fitted
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from qdora.data.sources import make_loader, read_data, tokenized_mix
from qdora.memory.oom import keep_freed_memory
from qdora.model.build_model import Compute, find_model, put_adapters
from qdora.model.inject import adapter_parameters
from qdora.model.store import compressed_layers
from qdora.plan.fit import num_sharing, plan, workload_of_data
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.plan import Plan, public_shapes
from qdora.plan.show import process_plans, whole_plans
from qdora.recipe.recipe_file import load_recipe, override, recipe_from, with_overrides
from qdora.recipe.section import parse_size, size_text
from qdora.recipe.settings import Recipe, TrainConfig
from qdora.run.base import compress_base, compression_key, load_base
from qdora.train.guards import packed_layout
from qdora.train.optimizer import AdapterOptimizer

NUM_STEPS = 3
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
SIZES = {
    "small": (512, 1408, 8, 8192),
    "middle": (1024, 2816, 8, 16_384),
    "deep": (512, 1408, 24, 8192),
    "wide": (2048, 5632, 3, 32_768),
    "tiny": (64, 128, 2, 512),
}
_TINY = "tiny, packed, all activations"
CASES = {
    "small, r16": "",
    "middle, r16": "",
    "middle, r64, dropout": "adapter.rank=64 adapter.dropout=0.05",
    "middle, LoRA, 32-bit AdamW": "adapter.kind=lora train.optimizer=adamw",
    "deep, r16": "",
    "deep, all activations": "memory.checkpointing=false",
    "small, LoRA, all activations": "adapter.kind=lora memory.checkpointing=false",
    "wide, r16": "",
    "wide, 2,048 tokens": "data.max_length=512 train.micro_batch_tokens=2048",
    "wide, 512 tokens, one micro-batch": "train.micro_batch_tokens=512 train.batch=2",
    "middle, packed": "data.packing=true",
    "middle, Qwen2 with biases": "",
    "small, int8": "base.quant=int8",
    "small, 16-bit base, Lion": "base.quant=none train.optimizer=lion",
    "middle, q and v, plain scales": "adapter.targets=[q_proj,v_proj] base.double_quant=false",
    "small, all of it trained": "base.quant=none adapter.kind=full train.optimizer=adamw",
    "middle, pruned to 2:4, masked": "base.prune.method=magnitude base.prune.pattern=2:4 adapter.mask=keep",
    "small, 16-bit base, pruned to a half": "base.quant=none base.prune.method=magnitude base.prune.sparsity=0.5",
    "wide, float32": "model.dtype=float32 train.micro_batch_tokens=512",
    _TINY: "data.packing=true memory.checkpointing=false",
}
"""The first word is a size; the settings of the recipe that differ from `_case_recipe`."""


@bench(smoke={"only": (_TINY,)}, keep=True)
def plan_accuracy(only: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """The plan of real runs on a CPU against what they take: live tensors by the counter, and the resident set.

    Random models of 25 to 190 million weights on random text. Every run is planned, then run twice, three steps each:
    with `LiveBytes` active from before the load on, and without it in a process of its own, for the largest resident
    set (VmHWM). Planned resident set: the plan's tensors and its constant for a process (`CONTEXT_BYTES["cpu"]`), which
    every run here also measures, before it loads its model. --only: cases by name.
    """
    for name in only or [name for name in CASES if name != _TINY]:
        with tempfile.TemporaryDirectory() as folder:
            _write_case(Path(folder), name)
            recipe = _case_recipe(Path(folder), name)
            _, mix, tokenizer = _case_data(recipe)
            planned = plan(recipe, device_kind="cpu", workload=workload_of_data(recipe, mix, tokenizer)).to_dict()
            tensors, most = planned["tensor_bytes"], _run_case(folder, name, True)["peak_bytes"]
            resident = alone(_run_case, folder, name, False, variables=ONE_THREAD)
        row = {
            "micro_batch": planned["micro_batch"],
            "planned_tensor_bytes": tensors,
            "measured_tensor_bytes": most,
            "tensor_ratio": tensors / most,
            "planned_rss_bytes": planned["peak_bytes"],
            "measured_rss_bytes": resident["rss_bytes"],
            "process_bytes": resident["process_bytes"],
            "rss_ratio": planned["peak_bytes"] / resident["rss_bytes"],
        }
        yield name, row


def _write_case(folder: Path, name: str) -> None:
    """A random bf16 checkpoint with a tokenizer of bytes; rows of random letters and very different lengths, the first
    as long as may be."""
    sizes = dict(zip(_KEYS, SIZES[name.partition(",")[0]], strict=True))
    heads = sizes["hidden_size"] // 64
    sizes |= {"num_attention_heads": max(heads, 2), "num_key_value_heads": max(heads // 4, 1)}
    family = "qwen2" if "Qwen2" in name else "llama"
    config = AutoConfig.for_model(family, **sizes, max_position_embeddings=2048, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    letters, longest = random.Random(0), 48 if name == _TINY else 240
    lengths = [longest, *(letters.randint(longest // 8, longest) for _ in range(63))]
    texts = ["".join(letters.choices("abcdefghij ", k=n - 2)) for n in lengths]
    rows = [{"prompt": text[: len(text) // 2], "completion": text[len(text) // 2 :]} for text in texts]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _case_recipe(folder: Path, name: str) -> Recipe:
    """DoRA of rank 16 on every linear layer of an NF4 base in bf16, 8-bit AdamW, 1,024 tokens a micro-batch."""
    longest = 64 if name == _TINY else 256
    document: dict[str, dict[str, Any]] = {
        "model": {"source": str(folder / "model"), "dtype": "bfloat16"},
        "data": {"mix": [{"source": str(folder / "data.jsonl")}], "max_length": longest},
        "train": {"steps": NUM_STEPS, "batch": 8, "micro_batch_tokens": 4 * longest, "checkpoint_every": None},
    }
    return recipe_from(with_overrides(document, CASES[name].split()))


def _case_data(recipe: Recipe) -> tuple[Any, Any, Any]:
    source, tokenizer = find_model(recipe)
    return source, tokenized_mix(recipe, tokenizer, read_data(recipe.data)[0]), tokenizer


def _run_case(folder: str, name: str, counting: bool) -> dict[str, Any]:
    """Load, train, and say what was the most that was alive, or resident."""
    keep_freed_memory()
    recipe = _case_recipe(Path(folder), name)
    source, mix, tokenizer = _case_data(recipe)
    loader = make_loader(recipe, mix, tokenizer)
    found: dict[str, Any] = {"process_bytes": peak_rss_bytes()}
    with LiveBytes() if counting else nullcontext() as live:
        compute = Compute(torch.device("cpu"), getattr(torch, recipe.model.dtype))
        compressed = None
        if recipe.base.prune is not None:
            pruned = Path(folder, "base")
            compress_base(recipe, source, compute, None, pruned, key=compression_key(recipe, source, compute, None))
            compressed = compressed_layers(pruned)
        model = load_base(recipe, source, compute, compressed=compressed)
        put_adapters(model, recipe)
        if recipe.data.packing:
            loader.batching.packed = packed_layout(model)[0]
        optimizer = AdapterOptimizer(adapter_parameters(model), name=recipe.train.optimizer)
        gc.collect()
        if live is not None:
            live.reset_peak()
        train = TrainConfig(steps=NUM_STEPS, batch=1, lr=1e-4, schedule="constant", warmup=0)
        fitted(model, optimizer, loader, train, quiet=True)
        if live is not None:
            found["peak_bytes"] = live.peak_bytes
    return found | {"rss_bytes": peak_rss_bytes()}


@table("plan_accuracy")
def plan_accuracy_table(result: Any) -> str:
    columns: dict[str, Column] = {
        "run": "{0}",
        "micro-batch": "{1[micro_batch][rows]} × {1[micro_batch][length]}",
        "tensors planned, MiB": "{1[planned_tensor_bytes]:,.1fMiB}",
        "counted": "{1[measured_tensor_bytes]:,.1fMiB}",
        "planned / counted": "{1[tensor_ratio]:.4f}",
        "resident planned": "{1[planned_rss_bytes]:,.0fMiB}",
        "measured": "{1[measured_rss_bytes]:,.0fMiB}",
        "planned / measured": "{1[rss_ratio]:.3f}",
    }
    cases, parts = result["cases"], []
    for title, key, limit in (("tensors", "tensor_ratio", "3%"), ("resident", "rss_ratio", "10%")):
        worst = max(abs(case[key] - 1) for case in cases.values())
        parts.append(f"{title} {worst:.2%} in {len(cases)} runs (limit: {limit})")
    return tabulated(cases.items(), columns) + f"\nLargest error: {'; '.join(parts)}.\n"


CARD = "40GB"
"""Budget of the recipes that state none."""
MIXTURES = ("qwen3-30b-a3b-24gb", "gpt-oss-20b-24gb", "qwen3-30b-a3b-8gb")
STREAMED = ("llama-8b-8gb", "qwen-32b-24gb", "llama-70b-40gb")
RECIPES = ("commonsense-8b-40gb", "commonsense-13b-40gb", *MIXTURES, *STREAMED)
SEVERAL = {"llama-70b-2x24gb": 2, "llama-405b-8x80gb": 8}
"""Cards of the recipes for several, which are one machine."""
LARGEST = "Llama-3.1-405B"


@bench()
def plan_recipes(*, smoke: bool) -> dict[str, Any]:
    """Plans of the recipes that are named for a card, from the stored shapes of their models.

    Each recipe as it ships, against the budget that it states, or 40 GB; `ways` are the ways to hold the base on
    several cards. Then Llama-3.1-405B by the recipe of the 70B model with all of its blocks in host memory.
    """
    configs = {name: public_shapes()[load_recipe(name).model.source].config() for name in (*RECIPES, *SEVERAL)}
    if smoke:
        small = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128, "vocab_size": 512}
        of = {name: MixtralConfig if name in MIXTURES else LlamaConfig for name in configs}
        configs = {name: of[name](**small, num_hidden_layers=56) for name in configs}
    plans = {name: _planned(load_recipe(name), configs[name]) for name in RECIPES}
    if not smoke:
        source = f"meta-llama/{LARGEST}-Instruct"
        every = [f"model.source={source}", "base.streamed_blocks=null"]
        plans[LARGEST] = _planned(load_recipe("llama-70b-40gb", every), public_shapes()[source].config())
    # Behind another model, whose plan they cannot take their steps from
    plans |= {name: _planned(load_recipe(name), configs[name], num_cards) for name, num_cards in SEVERAL.items()}
    return {"plans": plans}


def _planned(recipe: Recipe, config: PreTrainedConfig, num_cards: int = 1) -> dict[str, Any]:
    """The plan of a recipe on each of its cards, what it streams, and how long planning took."""
    began = time.process_time()
    budget = recipe.memory.budget or CARD
    plan_of = partial(plan, budget=budget, config=config, num_processes=num_cards)
    found = plan_of(recipe, num_sharing=num_sharing(recipe, num_cards, num_cards)).to_dict()
    streams = recipe.base.residency == "host"
    ways = process_plans(whole_plans(recipe, partial(plan_of, may_change=False)), num_cards) if num_cards > 1 else []
    return {
        **found,
        "num_cards": num_cards,
        "parallel": recipe.train.parallel,
        "ways": ways,
        "model": recipe.model.source,
        "budget": budget,
        "residency": recipe.base.residency,
        "num_streamed": (recipe.base.streamed_blocks or config.num_hidden_layers) if streams else 0,
        "cpu_seconds": time.process_time() - began,
    }


@table("plan_recipes")
def plan_recipes_table(result: Any) -> str:
    plans = result["plans"]

    def line(title: str, column: Column) -> list[str]:
        return [title, *(cell(column, each) for each in plans.values())]

    def component(name: str, each: Any) -> str:
        return f"{each['components'].get(name, 0) / GIB:.2f}"

    def seconds(each: Any) -> str:  # on all cards, over PCIe 4 if they are several
        used = "shard" if _is_divided(each) else "replicate"
        times = [way["step_seconds"]["PCIe 4"] for way in each["ways"] if way["way"] == used]
        return f"{times[0] if times else each['step_seconds']:.0f}"

    names = dict.fromkeys(name for each in plans.values() for name, size in each["components"].items() if size > 2**22)
    rows = [line(name, partial(component, name)) for name in names]
    rows += [
        line("**total**", "**{peak_bytes:.2fGiB}**"),
        line("fits in", lambda each: f"{_card(each)}{'' if each['fits'] else ': no'}"),
        line("base", lambda each: "sharded" if _is_divided(each) else "whole"),
        line("blocks in host memory", "{num_streamed} of {num_blocks}"),
        line("pinned host memory, GiB", "{host_bytes:.1fGiB}"),
        line("s a step, estimated", seconds),
        line("tokens a step", lambda each: f"{each['num_micro_batches'] * each['micro_batch']['num_tokens']:,}"),
        line("seconds to plan, one core", "{cpu_seconds:.0f}"),
    ]
    return markdown(["GiB at the peak", *plans], rows)


def _card(found: dict[str, Any]) -> str:
    """40 GB (37.25 GiB), or 8 × 80 GB (74.51 GiB)."""
    count, budget = found["num_cards"], str(found["budget"])
    card = f"{budget.replace('GB', ' GB')} ({size_text(parse_size(budget))})"
    return f"{count} × {card}" if count > 1 else card


def _is_divided(found: dict[str, Any]) -> bool:
    return bool(found["num_cards"] > 1 and found["parallel"] == "shard")


CARDS = ("8GB", "12GB", "16GB", "24GB", "40GB", "80GB")
_BITS = ("llama-70b-40gb", "llama-70b-40gb-3bit", "llama-70b-24gb")
CHOICES = {
    "meta-llama/Llama-3.2-1B-Instruct": _BITS[:1],
    "meta-llama/Llama-3.2-3B-Instruct": _BITS[:1],
    "meta-llama/Llama-3.1-8B-Instruct": _BITS[:1],
    "Qwen/Qwen3-14B": _BITS[:1],
    "unsloth/gpt-oss-20b-BF16": ("gpt-oss-20b-24gb",),
    "Qwen/Qwen3-30B-A3B": ("qwen3-30b-a3b-24gb",),
    "Qwen/Qwen3-32B": _BITS,
    "meta-llama/Llama-3.3-70B-Instruct": _BITS,
}
"""Model -> shipped recipes with the formats of its base."""
WAYS = {"device": "base.residency=device", "streamed": "base.residency=host"}
COMMON = "memory.budget=null memory.keep_scales=false memory.offload_activations=false base.streamed_blocks=null"


@bench(smoke={"only": ("Llama-3.2-1B-Instruct, nf4",)}, keep=True)
def which_card(only: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """The longest example that fits a card, with the base on it and with all blocks in host memory, by plans alone.

    peaks: length -> bytes. longest: by the line between two of them. checked: a sixth of the cells, each planned at its
    length: peak / card. hours: of 10,000 examples of 500 tokens, four in a micro-batch, by the roofline. host_bytes:
    pinned for all blocks. --only: model and format.
    """
    chosen = [(model, load_recipe(name, COMMON.split())) for model, names in CHOICES.items() for name in names]
    for number, (model, recipe) in enumerate(chosen):
        name = f"{model.partition('/')[2]}, {recipe.base.quant}"
        if not only or name in only:
            yield name, _choice(recipe, model, number % 6)


def _choice(recipe: Recipe, model: str, first_checked: int) -> dict[str, Any]:
    config, context, peaks = public_shapes()[model].config(), public_shapes()[model].context or 0, {}

    def planned(way: str, length: int, tokens: int) -> Plan:
        sizes = f"data.max_length={length} train.micro_batch_tokens={tokens} train.batch=16 train.tokens_per_step=null"
        return plan(override(recipe, [f"model.source={model}", *sizes.split(), WAYS[way]]), config=config)

    def plan_at(length: int) -> None:
        peaks[length] = {way: planned(way, length, length).peak_bytes for way in WAYS}

    def found(way: str, card: str) -> int:
        lengths = sorted(peaks)
        longest = int(np.interp(parse_size(card), [peaks[length][way] for length in lengths], lengths, left=0))
        return longest if longest == context else longest // 100 * 100

    for length in (*(2**n for n in range(8, 30) if 2**n < context), context):
        plan_at(length)
        if min(peaks[length].values()) > parse_size(CARDS[-1]):
            break
    for card, way in 2 * [*product(CARDS, WAYS)]:  # sums that the square of the length, or short rows, make crooked
        if 0 < found(way, card) < (context if "gpt-oss" in model else 4096):
            plan_at(found(way, card))
    longest = {card: {way: found(way, card) for way in WAYS} for card in CARDS}
    cells = [(card, way) for card, way in product(CARDS, WAYS) if 0 < longest[card][way] < context][first_checked::6]
    for card, way in cells:
        plan_at(longest[card][way])
    of_500 = {way: planned(way, 500, 2048) for way in WAYS}
    return {
        "context": context,
        "peaks": {str(length): peaks[length] for length in sorted(peaks)},
        "longest": longest,
        "checked": {f"{card}, {way}": peaks[longest[card][way]][way] / parse_size(card) for card, way in cells},
        "hours": {way: 10_000 / 16 * (each.step_seconds or 0.0) / 3600 for way, each in of_500.items()},
        "host_bytes": of_500["streamed"].host_bytes,
    }


@table("which_card")
def which_card_table(result: Any) -> str:
    return _choices({name: case for name, case in result["cases"].items() if name.endswith("nf4")}, "8 16 24 40 80")


def which_card_guide() -> str:
    """All formats and cards, for the guide."""
    return _choices(read("which_card")["cases"], "8 12 16 24 40 80", **{"pinned, GiB": "{1[host_bytes]:.1fGiB}"})


@table("which_card")
def which_card_checked(result: Any) -> str:
    shares = [share for case in result["cases"].values() for share in case["checked"].values()]
    of = f"Of the cells {len(shares)} were planned again at the length that the table has"
    return f"{of}: the peaks are {min(shares):.2%} to {max(shares):.2%} of the card.\n"


def _choices(cases: dict[str, Any], sizes: str, **more: Column) -> str:
    columns: dict[str, Column] = {"model, format": lambda item: item[0].replace("-BF16", "")}

    def tokens(size: str, item: Any) -> str:
        texts = [f"{length:,}" if length else "–" for length in item[1]["longest"][f"{size}GB"].values()]
        return " / ".join(dict.fromkeys(texts))

    columns |= {f"{size} GB": partial(tokens, size) for size in sizes.split()}
    columns["hours"] = lambda item: " / ".join(dict.fromkeys(f"{hours:.2g}" for hours in item[1]["hours"].values()))
    return tabulated(cases.items(), columns | more)


if __name__ == "__main__":
    main()
