"""What can serve which export: a form that a program cannot load is refused, with the ones that it can.

The table says what the programs' releases of 2026 load. None of the servers takes a DoRA adapter as PEFT writes it:
vLLM's and SGLang's readers refuse it (vllm#47395, which would change that for dense bases, is open); the converter of
llama.cpp, which Ollama's adapters go through, knows lora_A and lora_B only; TensorRT-LLM took magnitudes that a script
of its own had divided by the norms of a 16-bit base, in the engines that it removed in 2026 (TensorRT-LLM#15918).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qdora.errors import UserError, nearest
from qdora.model.adapter_file import AdapterDescription
from qdora.model.peft_config import AdapterLayout
from qdora.recipe.settings import Recipe

Loadable = Literal["merged", "gguf", "nf4-lora", "requantized", "lora", "dora"]

_OPTIONS: dict[Loadable, str] = {
    "merged": "--format merged",
    "gguf": "--format gguf",
    "nf4-lora": "--format nf4-lora (4 bits)",
    "requantized": "--format merged --requantize (4 bits)",
    "lora": "--format peft",
    "dora": "--format peft",
}
_NAMES: dict[Loadable, str] = {
    "merged": "a merged checkpoint",
    "gguf": "GGUF files",
    "nf4-lora": "a bitsandbytes checkpoint with an adapter",
    "requantized": "a bitsandbytes checkpoint",
    "lora": "LoRA adapters",
    "dora": "DoRA adapters",
}


@dataclass(frozen=True)
class ServingTarget:
    """A program that runs models.

    Attributes:
        title: Its name.
        loads: Forms, the best one first.
        reads: What it takes from the settings of a LoRA adapter: the patterns, too, as PEFT does, or alpha / rank. With
            "one_rank" that is one number for all layers, with "own_rank" each layer's rank is that of its factors.
        reads_rank_stabilized: Whether it knows alpha / sqrt(rank).
    """

    title: str
    loads: tuple[Loadable, ...]
    reads: Literal["patterns", "one_rank", "own_rank"]
    reads_rank_stabilized: bool = True


TARGETS: dict[str, ServingTarget] = {
    "transformers": ServingTarget(
        "transformers with PEFT", ("merged", "nf4-lora", "requantized", "lora", "dora"), "patterns"
    ),
    "vllm": ServingTarget("vLLM", ("merged", "nf4-lora", "requantized", "lora"), "one_rank"),
    "sglang": ServingTarget("SGLang", ("merged", "lora"), "one_rank", reads_rank_stabilized=False),
    "tensorrt-llm": ServingTarget("TensorRT-LLM", ("merged", "lora"), "own_rank"),
    "llama.cpp": ServingTarget("llama.cpp", ("gguf", "lora"), "own_rank", reads_rank_stabilized=False),
    "ollama": ServingTarget("Ollama", ("gguf", "merged", "lora"), "own_rank", reads_rank_stabilized=False),
}


def check_target_name(name: str) -> None:
    """Raise UserError for a program that is not in the table."""
    if name not in TARGETS:
        raise UserError(f"--for: {name!r}, allowed: {', '.join(TARGETS)}.{nearest(name, TARGETS)}")


def check_target(name: str, form: str, recipe: Recipe) -> None:
    """Refuse an export that the program it is meant for cannot load.

    Args:
        name: One of TARGETS.
        form: "merged", "original", "requantized", "nf4-lora", "gguf" or "peft".
        recipe: Of the run: whether its adapter is LoRA or DoRA, and how its base is held.
    Raises:
        UserError: With what the program can load, as options of `qdora export`.
    """
    target = TARGETS[name]
    offered = _loadable(form, recipe)
    if offered in target.loads:
        return
    possible = [each for each in target.loads if _can_be_had(each, recipe)]
    options = " or ".join(_OPTIONS[each] for each in possible)
    raise UserError(f"--for {name}: {target.title} does not load {_NAMES[offered]}; use {options}.")


def check_scalings(name: str, adapter: AdapterDescription) -> None:
    """Refuse a LoRA adapter of which a program would compute something else, since it takes another alpha / rank.

    Args:
        name: One of TARGETS.
        adapter: As the run has it; an export has the same settings.
    Raises:
        UserError: With a layer, what its scaling is and what it would be.
    """
    target, layout = TARGETS[name], adapter.layout
    if target.reads == "patterns":
        return
    scalings = adapter.scalings or {}
    served = {path: _served_scaling(target, layout, path) for path in scalings}
    wrong = [path for path, scaling in scalings.items() if not math.isclose(served[path], scaling, rel_tol=1e-6)]
    if wrong:
        path = wrong[0]
        reason = "knows no rank_stabilized" if _ignores(target, layout) else "has one alpha for all layers"
        options = " or ".join(_OPTIONS[each] for each in target.loads if each in ("merged", "gguf"))
        raise UserError(
            f"--for {name}: {target.title} {reason}, and would scale {len(wrong)} of {len(scalings)} layers wrongly: "
            f"{path} by {served[path]:.4g}, trained with {scalings[path]:.4g}; use {options}."
        )


def _ignores(target: ServingTarget, layout: AdapterLayout) -> bool:
    return layout.rank_stabilized and not target.reads_rank_stabilized


def _served_scaling(target: ServingTarget, layout: AdapterLayout, path: str) -> float:
    rank = layout.rank if target.reads == "one_rank" else layout.rank_of(path)
    return layout.alpha / (math.sqrt(rank) if layout.rank_stabilized and not _ignores(target, layout) else rank)


def _loadable(form: str, recipe: Recipe) -> Loadable:
    forms: dict[str, Loadable] = {
        "merged": "merged",
        "original": "merged",
        "requantized": "requantized",
        "nf4-lora": "nf4-lora",
        "gguf": "gguf",
        "peft": "lora" if recipe.adapter.kind == "lora" else "dora",
    }
    return forms[form]


def _can_be_had(loadable: Loadable, recipe: Recipe) -> bool:
    """Whether the run can be exported so; what else may stand against it is said by the export itself."""
    if loadable in ("lora", "dora"):
        return loadable == ("lora" if recipe.adapter.kind == "lora" else "dora")
    return loadable in ("merged", "gguf") or recipe.base.quant in ("nf4", "fp4")
