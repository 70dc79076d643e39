"""Exports and the programs that are to run them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from rich.console import Console

import qdora
from qdora.errors import UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions, check_options
from qdora.export.targets import TARGETS, check_adapter, check_target
from qdora.model.peft_config import AdapterDescription
from qdora.run.train import train_run
from tests import tiny_run

SERVERS = [name for name in TARGETS if name != "transformers"]


@pytest.mark.parametrize("name", SERVERS)
def test_no_server_loads_dora(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"does not load DoRA adapters\. Fix: use --format ") as raised:
        check_target(name, "peft", tiny_run.recipe(tmp_path))
    assert len(raised.value.faults) == 1
    assert "--format peft" not in str(raised.value)
    best = ExportOptions(target=name)
    check_options(best)
    assert f"use --format {best.format}" in str(raised.value)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "ollama"])
def test_plain_lora_is_let_through(tmp_path: Path, name: str) -> None:
    check_target(name, "peft", tiny_run.recipe(tmp_path, adapter__kind="lora"))


def test_the_adapter_of_trained_magnitudes_is_dora(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(
        tmp_path,
        adapter__kind="magnitude",
        **dict.fromkeys(("adapter__rank", "adapter__alpha", "adapter__dropout"), ...),
    )
    with pytest.raises(UserError, match=r"vLLM 0\.28 does not load DoRA adapters"):
        check_target("vllm", "peft", recipe)
    check_target("transformers", "peft", recipe)


def test_four_bits_only_where_there_are_four_bits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"use --format merged or --format nf4-lora \(4 bits\) or .* --req"):
        check_target("vllm", "peft", tiny_run.recipe(tmp_path))
    with pytest.raises(UserError, match=r"use --format merged or --format gguf\.$"):
        check_target("vllm", "peft", tiny_run.recipe(tmp_path, base__quant="int8"))


@pytest.mark.parametrize(
    "name, form, message",
    [
        (
            "llama.cpp",
            "merged",
            r"--for llama.cpp: llama.cpp \(2026\) does not load a merged checkpoint\. Fix: use --format g",
        ),
        (
            "ollama",
            "nf4-lora",
            r"Ollama 0\.34 does not load a bitsandbytes checkpoint with an adapter\. Fix: use --format gguf or",
        ),
        ("tensorrt-llm", "requantized", r"does not load a bitsandbytes checkpoint. Fix: use --format merged\.$"),
        ("sglang", "gguf", r"SGLang 0\.5\.23 does not load GGUF files\. Fix: use --format merged or .* --requantize"),
        (
            "sglang",
            "nf4-lora",
            r"SGLang 0\.5\.23 does not load a bitsandbytes checkpoint with an adapter\. Fix: use --f",
        ),
    ],
)
def test_other_forms(tmp_path: Path, name: str, form: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_target(name, form, tiny_run.recipe(tmp_path))


def described(scaling: Callable[[int], float], *, rank_stabilized: bool = False) -> AdapterDescription:
    """Most layers have rank 8, two have 4 and 2; their alphas are those of the scaling that a rank shall have."""
    ranks = {f"layers.0.{name}": rank for name, rank in (("up", 8), ("down", 8), ("gate", 8), ("q", 4), ("k", 2))}
    root = math.sqrt if rank_stabilized else float
    alphas = {path: scaling(rank) * root(rank) for path, rank in ranks.items()}
    config = LoraConfig(
        r=8,
        lora_alpha=alphas["layers.0.up"],
        use_rslora=rank_stabilized,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != 8},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != alphas["layers.0.up"]},
    )
    return AdapterDescription(config=config, scalings={path: scaling(rank) for path, rank in ranks.items()})


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if "lora" in target.loads])
@pytest.mark.parametrize(
    "scaling, rank_stabilized, right",
    [
        # One scaling for all: what alpha / rank of the settings gives without a look at the patterns
        (lambda rank: 2.0, False, {"transformers", "vllm"}),
        (lambda rank: 2.0, True, {"transformers", "vllm"}),
        # One alpha for all: what is left to each layer is its own rank
        (lambda rank: 16.0 / rank, False, {"transformers", "llama.cpp", "tensorrt-llm"}),
        (lambda rank: 16.0 / math.sqrt(rank), True, {"transformers", "tensorrt-llm"}),
        (lambda rank: float(rank), False, {"transformers"}),
    ],
)
def test_scalings_that_a_program_would_not_see(
    name: str, scaling: Callable[[int], float], rank_stabilized: bool, right: set[str]
) -> None:
    adapter = described(scaling, rank_stabilized=rank_stabilized)
    if name in right:
        check_adapter(name, "peft", adapter)
        return
    reason = r"2 of 5 layers differ: layers\.0\.q has 4, not 8" if name == "sglang" else "of 5 layers wrongly: "
    with pytest.raises(UserError, match=rf"--for {name}: .*{reason}") as raised:
        check_adapter(name, "peft", adapter)
    assert "--format peft" not in str(raised.value)
    best = ExportOptions(target=name)
    check_options(best)
    assert f"use --format {best.format}" in str(raised.value)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if "lora" in target.loads])
def test_layers_of_one_rank_and_an_output_head(name: str) -> None:
    def adapter(*paths: str, rank_stabilized: bool = False) -> AdapterDescription:
        config = LoraConfig(r=4, lora_alpha=8, use_rslora=rank_stabilized)
        return AdapterDescription(config=config, scalings=dict.fromkeys(paths, 4.0 if rank_stabilized else 2.0))

    inside = ("model.layers.0.self_attn.q_proj", "transformer.h.11.mlp.up")
    check_adapter(name, "peft", adapter(*inside))
    if name in ("sglang", "llama.cpp"):
        with pytest.raises(UserError, match=r"does not know rank_stabilized, .* 2 of 2 layers wrongly"):
            check_adapter(name, "peft", adapter(*inside, rank_stabilized=True))
    if name == "tensorrt-llm":
        with pytest.raises(UserError, match=r"TensorRT-LLM 1\.2 ignores LoRA on lm_head\. Fix: use --format merged\.$"):
            check_adapter(name, "peft", adapter(*inside, "lm_head"))
    else:
        check_adapter(name, "peft", adapter(*inside, "lm_head"))


@pytest.mark.parametrize("kind, format_", [("lora", "peft"), ("dora", "nf4-lora")])
def test_an_export_looks_at_the_scalings_of_its_run(tmp_path: Path, kind: str, format_: str) -> None:
    asked: dict[str, Any] = {"adapter__kind": kind, "adapter__rank_pattern": {"q_proj": 2}}
    changes: dict[str, Any] = {"train__steps": 1, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    tiny_run.write_model(tmp_path / "model", intermediate_size=64)  # its rows are whole blocks
    train_run(tiny_run.recipe(tmp_path, **asked, **changes), tmp_path / "run")
    options = ExportOptions(target="vllm", format_=format_)
    with pytest.raises(
        UserError, match=r"vLLM 0\.28 has one alpha for all layers, .* 2 of 14 .*q_proj by 2, trained with 4\. Fix: use"
    ):
        export_run(tmp_path / "run", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    if format_ == "peft":  # one alpha / rank for all layers, but not one rank
        with pytest.raises(UserError, match=r"SGLang 0\.5\.23 has one rank .* 2 of 14 .*q_proj has 2, not 4"):
            export_run(tmp_path / "run", tmp_path / "out", ExportOptions(target="sglang", format_="peft"))
    other = {"peft": "llama.cpp", "nf4-lora": "transformers"}
    export_run(tmp_path / "run", tmp_path / "out", ExportOptions(target=other[format_], format_=format_))


@pytest.mark.parametrize(
    "name, form, message",
    [("vllm", "peft", "known"), ("vllm", "nf4-lora", "known"), ("transformers", "peft", "PEFT has")],
)
def test_stacks_of_experts_that_a_program_would_not_read(name: str, form: str, message: str) -> None:
    config = LoraConfig(use_dora=True, lora_alpha=16)
    stacks = AdapterDescription(config=config, shares={"layers.0.experts.down": "none"})
    with pytest.raises(
        UserError, match=rf"--for {name}: .*{message}.* \(e\.g\. layers\.0\.experts\.down\)\. Fix: use --f"
    ):
        check_adapter(name, form, stacks)
    check_adapter("transformers", "nf4-lora", stacks)
    check_adapter(name, form, AdapterDescription(config=config))


def test_a_run_without_an_adapter_has_no_scalings(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"base__quant": "none", "train__optimizer": ..., "eval__limit": ...}
    asked |= {f"adapter__{name}": ... for name in ("rank", "alpha", "dropout")} | {"adapter__kind": "full"}
    changes = {"train__steps": 1, "eval__at_start": False, "eval__at_end": False}
    train_run(tiny_run.recipe(tmp_path, **asked, **changes), tmp_path / "run")
    options = ExportOptions(target="transformers", format_="peft")
    with pytest.raises(UserError, match=r"the run has no adapter \(adapter\.kind: full\)"):
        export_run(tmp_path / "run", tmp_path / "out", options)
    with pytest.raises(UserError, match=r"--audit: .* LoRA or DoRA adapter, got adapter\.kind: full\. Fix: remove"):
        export_run(tmp_path / "run", tmp_path / "out", ExportOptions(audit=True))
    assert not (tmp_path / "out").exists()


def test_a_form_that_needs_a_package_says_which(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train__steps": 1, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    train_run(tiny_run.recipe(tmp_path, **changes), tmp_path / "run")
    shown = io.StringIO()
    options = ExportOptions(target="vllm", format_="merged", requantize=True)
    written = export_run(tmp_path / "run", tmp_path / "out", options, console=Console(file=shown, width=200))
    assert written["install"] == "vllm-bnb-plugin"
    assert "vLLM 0.28 loads it with: pip install vllm-bnb-plugin" in shown.getvalue()
    assert TARGETS["vllm"].installs["gguf"] == "vllm-gguf-plugin"
    assert all(target.installs.keys() < set(target.loads) for target in TARGETS.values())


def test_the_guide_has_every_program_with_its_release_and_packages() -> None:
    guide = (Path(qdora.__file__).parent / "guide/exports.md").read_text()
    for name, target in TARGETS.items():
        (row,) = [line for line in guide.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"| {target.title} |" in row
        assert ("LoRA" in row) == ("lora" in target.loads)
        assert all(f"`{package}`" in guide for package in target.installs.values())


def test_an_unknown_program() -> None:
    with pytest.raises(
        UserError, match=r"--for: got 'vlm', must be one of transformers, vllm, .*\. Did you mean 'vllm'\?"
    ):
        check_options(ExportOptions(target="vlm"))
