"""Exports and the programs that are to run them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdora.errors import UserError
from qdora.verbs.export_options import ExportOptions, check_options
from qdora.verbs.export_targets import TARGETS, check_target
from tests import tiny_run

SERVERS = [name for name in TARGETS if name != "transformers"]


@pytest.mark.parametrize("name", SERVERS)
def test_no_server_loads_dora(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="does not load DoRA adapters; use --format ") as raised:
        check_target(name, "peft", tiny_run.recipe(tmp_path))
    assert len(raised.value.faults) == 1
    assert "--format peft" not in str(raised.value)
    best = ExportOptions(target=name)
    check_options(best)
    assert f"use --format {best.format}" in str(raised.value)


@pytest.mark.parametrize("name", TARGETS)
def test_plain_lora_is_let_through(tmp_path: Path, name: str) -> None:
    check_target(name, "peft", tiny_run.recipe(tmp_path, adapter__kind="lora"))


def test_the_adapter_of_trained_magnitudes_is_dora(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(
        tmp_path,
        adapter__kind="magnitude",
        **dict.fromkeys(("adapter__rank", "adapter__alpha", "adapter__dropout"), ...),
    )
    with pytest.raises(UserError, match="vLLM does not load DoRA adapters"):
        check_target("vllm", "peft", recipe)
    check_target("transformers", "peft", recipe)


def test_four_bits_only_where_there_are_four_bits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"use --format merged or --format nf4-lora \(4 bits\) or .* --req"):
        check_target("vllm", "peft", tiny_run.recipe(tmp_path))
    with pytest.raises(UserError, match=r"use --format merged\.$"):
        check_target("vllm", "peft", tiny_run.recipe(tmp_path, base__quant="int8"))


@pytest.mark.parametrize(
    "name, form, message",
    [
        ("llama.cpp", "merged", r"--for llama.cpp: llama.cpp does not load a merged checkpoint; use --format gguf\.$"),
        ("ollama", "nf4-lora", "Ollama does not load a bitsandbytes checkpoint with an adapter; use --format gguf or"),
        ("tensorrt-llm", "requantized", r"does not load a bitsandbytes checkpoint; use --format merged\.$"),
        ("vllm", "gguf", "vLLM does not load GGUF files; use --format merged"),
    ],
)
def test_other_forms(tmp_path: Path, name: str, form: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_target(name, form, tiny_run.recipe(tmp_path))


def test_an_unknown_program() -> None:
    with pytest.raises(UserError, match=r"--for: 'vlm', allowed: transformers, vllm, .*Did you mean 'vllm'\?"):
        check_options(ExportOptions(target="vlm"))
