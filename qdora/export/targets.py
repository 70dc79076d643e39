"""Which programs load which form of export (`--for`). Each row describes the release in its title.

No server loads a DoRA adapter as PEFT writes it: vLLM and SGLang refuse it (vllm#47395, which would change that for
dense bases, is open); the converter of llama.cpp knows lora_A and lora_B only; TensorRT-LLM loaded magnitudes that its
own script had divided by the norms of a 16-bit base, in the engines that it removed in 2026 (TensorRT-LLM#15918).

vLLM moved bitsandbytes (vllm#43529, in 0.28) and GGUF (vllm#39612) into plugins, which are on PyPI. SGLang lists
bitsandbytes in docs/advanced_features/quantization.md; with LoRA adapters on top it failed (sglang#4431, closed without
a fix). Its buffers have one rank for all layers of an adapter (lora/mem_pool.py asserts it). TensorRT-LLM skips the
factors of an output head (iterate_hf_lora in lora_manager.py). Ollama makes no models with adapters since 0.34.1
(ollama#14969).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qdora.errors import UserError, not_one_of
from qdora.model.peft_config import AdapterDescription
from qdora.ops.bnb_state import FOUR_BIT_KINDS
from qdora.recipe.settings import Recipe

Loadable = Literal["merged", "gguf", "nf4-lora", "requantized", "lora", "dora"]

# Options of `qdora export`, and the name of what they write.
_FORMS: dict[str, tuple[str, str]] = {
    "merged": ("--format merged", "a merged checkpoint"),
    "gguf": ("--format gguf", "GGUF files"),
    "nf4-lora": ("--format nf4-lora (4 bits)", "a bitsandbytes checkpoint with an adapter"),
    "requantized": ("--format merged --requantize (4 bits)", "a bitsandbytes checkpoint"),
    "lora": ("--format peft", "LoRA adapters"),
    "dora": ("--format peft", "DoRA adapters"),
}


@dataclass(frozen=True)
class ServingTarget:
    """A program that runs models."""

    title: str  # with the release that the row describes
    loads: tuple[Loadable, ...]  # the best form first
    # How it scales a LoRA adapter. patterns: alpha and rank of each layer, as PEFT does; one_rank: one alpha / rank for
    # all layers; own_rank: one alpha, and the rank of each layer's own factors. None: it loads no adapters.
    reads: Literal["patterns", "one_rank", "own_rank"] | None = None
    reads_rank_stabilized: bool = True  # alpha / sqrt(rank)
    reads_other_ranks: bool = True  # layers whose rank is not that of the settings
    reads_head: bool = True  # layers outside of the blocks
    installs: Mapping[str, str] = field(default_factory=dict)
    """Form -> the package that has to be installed beside the program to load it."""


_BNB, _GGUF = "vllm-bnb-plugin", "vllm-gguf-plugin"

TARGETS: dict[str, ServingTarget] = {
    "transformers": ServingTarget(
        "transformers 5 with PEFT", ("merged", "nf4-lora", "requantized", "lora", "dora"), "patterns"
    ),
    "vllm": ServingTarget(
        "vLLM 0.28",
        ("merged", "nf4-lora", "requantized", "lora", "gguf"),
        "one_rank",
        installs={"nf4-lora": _BNB, "requantized": _BNB, "gguf": _GGUF},
    ),
    "sglang": ServingTarget(
        "SGLang 0.5.23",
        ("merged", "requantized", "lora"),
        "one_rank",
        reads_rank_stabilized=False,
        reads_other_ranks=False,
        installs={"requantized": "bitsandbytes"},
    ),
    "tensorrt-llm": ServingTarget("TensorRT-LLM 1.2", ("merged", "lora"), "own_rank", reads_head=False),
    "llama.cpp": ServingTarget("llama.cpp (2026)", ("gguf", "lora"), "own_rank", reads_rank_stabilized=False),
    "ollama": ServingTarget("Ollama 0.34", ("gguf", "merged")),
}


def check_target_name(name: str) -> None:
    """Raise UserError unless the table has this program."""
    if name not in TARGETS:
        raise UserError(
            f"{not_one_of('--for', name, TARGETS)} Fix: for another program leave it out; most load --format merged."
        )


def check_target(name: str, form: str, recipe: Recipe) -> None:
    """Raise UserError, with what to use instead, if the program cannot load a form (`ExportOptions.form`)."""
    target = TARGETS[name]
    adapter: Loadable = "lora" if recipe.adapter.kind == "lora" else "dora"
    offered = {"original": "merged", "peft": adapter}.get(form, form)
    if form == "peft" and recipe.adapter.also_train and name != "transformers":
        raise UserError(
            f"--for {name}: no server loads an adapter that holds embeddings (adapter.also_train). Fix: use "
            "--format merged."
        )
    if offered in target.loads:
        return
    # The export itself checks the rest.
    possible = {
        "merged",
        "gguf",
        adapter,
        *(("nf4-lora", "requantized") if recipe.base.quant in FOUR_BIT_KINDS else ()),
    }
    options = " or ".join(_FORMS[each][0] for each in target.loads if each in possible)
    raise UserError(f"--for {name}: {target.title} does not load {_FORMS[offered][1]}. Fix: use {options}.")


def check_adapter(name: str, form: str, adapter: AdapterDescription) -> None:
    """Raise UserError if a program does not compute what a run's adapter does.

    `form` is "peft", or "nf4-lora", which holds a LoRA adapter.
    """
    _check_experts(name, form, adapter)
    _check_layers(name, adapter)
    _check_scalings(name, adapter)


def _check_experts(name: str, form: str, adapter: AdapterDescription) -> None:
    """Refuse what the program does not compute on stacks of experts."""
    if not adapter.shares:
        return
    if name != "transformers":
        raise UserError(
            f"--for {name}: {TARGETS[name].title} is not known to read LoRA on stacks of experts, and the adapter has "
            f"{len(adapter.shares)} (e.g. {next(iter(adapter.shares))}). Fix: use --format merged."
        )
    if form == "peft" and adapter.kind == "dora":
        raise UserError(
            f"--for {name}: PEFT has no DoRA for experts, and {len(adapter.shares)} stacks of experts have some (e.g. "
            f"{next(iter(adapter.shares))}). Fix: use --format merged."
        )


def _check_layers(name: str, adapter: AdapterDescription) -> None:
    """Refuse layers on which the program does not read LoRA, for their rank or their place."""
    target, rank, paths = TARGETS[name], adapter.config.r, list(adapter.scalings or {})
    others = [path for path in paths if adapter.rank_of(path) != rank]
    outside = [path for path in paths if not any(part.isdecimal() for part in path.split("."))]
    options = " or ".join(_FORMS[each][0] for each in target.loads if each in ("merged", "gguf"))
    faults = []
    if others and not target.reads_other_ranks:
        faults.append(
            f"--for {name}: {target.title} has one rank for an adapter, and {len(others)} of {len(paths)} layers "
            f"differ: {others[0]} has {adapter.rank_of(others[0])}, not {rank}. Fix: use {options}."
        )
    if outside and not target.reads_head:
        faults.append(f"--for {name}: {target.title} ignores LoRA on {outside[0]}. Fix: use {options}.")
    if faults:
        raise UserError(*faults)


def _check_scalings(name: str, adapter: AdapterDescription) -> None:
    """Refuse layers whose LoRA the program would scale by another alpha / rank than training."""
    target, config = TARGETS[name], adapter.config
    if target.reads in (None, "patterns"):
        return
    scalings = adapter.scalings or {}
    ignores = config.use_rslora and not target.reads_rank_stabilized

    def served(path: str) -> float:
        rank = config.r if target.reads == "one_rank" else adapter.rank_of(path)
        return float(config.lora_alpha / (math.sqrt(rank) if config.use_rslora and not ignores else rank))

    wrong = [path for path, scaling in scalings.items() if not math.isclose(served(path), scaling, rel_tol=1e-6)]
    if wrong:
        path = wrong[0]
        reason = "does not know rank_stabilized" if ignores else "has one alpha for all layers"
        options = " or ".join(_FORMS[each][0] for each in target.loads if each in ("merged", "gguf"))
        raise UserError(
            f"--for {name}: {target.title} {reason}, and would scale {len(wrong)} of {len(scalings)} layers wrongly: "
            f"{path} by {served(path):.4g}, trained with {scalings[path]:.4g}. Fix: use {options}."
        )
