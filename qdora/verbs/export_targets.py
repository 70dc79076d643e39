"""What can serve which export: a form that a program cannot load is refused, with the ones that it can.

The table says what the programs' releases of 2026 load. None of the servers takes DoRA adapters: vLLM's and SGLang's
readers refuse them, the converter of llama.cpp, which Ollama's adapters go through, knows lora_A and lora_B only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qdora.config import Recipe
from qdora.errors import UserError, nearest

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
class Target:
    """A program that runs models; `loads` has its best form first."""

    title: str
    loads: tuple[Loadable, ...]


TARGETS: dict[str, Target] = {
    "transformers": Target("transformers with PEFT", ("merged", "nf4-lora", "requantized", "lora", "dora")),
    "vllm": Target("vLLM", ("merged", "nf4-lora", "requantized", "lora")),
    "sglang": Target("SGLang", ("merged", "lora")),
    "tensorrt-llm": Target("TensorRT-LLM", ("merged", "lora")),
    "llama.cpp": Target("llama.cpp", ("gguf", "lora")),
    "ollama": Target("Ollama", ("gguf", "merged", "lora")),
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
