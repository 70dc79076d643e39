"""Adapters that plain PEFT wrote on bitsandbytes' 4-bit base: exported, evaluated and used like a run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qdora.cli import main
from qdora.errors import UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.generate import Sampling, generate_from
from qdora.run.load_run import load_target
from tests import reference, tiny_run

peft = pytest.importorskip("peft")

IDS = torch.arange(5, 45).reshape(2, 20)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def bnb_base(model: Path, **settings: Any) -> Any:
    """A model that bitsandbytes quantises, computing in float32; its CPU kernel for AVX512-BF16 is wrong."""
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=quant, dtype=torch.float32)
    for module in loaded.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return loaded


ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {
        "settings": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "peft": {"use_dora": True, "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"},
        "quant": None,
        "dtype": torch.float32,
    },
    "lora": {
        "settings": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        "peft": {"use_rslora": True, "r": 2, "lora_alpha": 3, "rank_pattern": {"layers.1.mlp.up_proj": 5}},
        "quant": "fp4-single",
        "dtype": torch.bfloat16,
    },
}


def trained(model: Path, out: Path, case: dict[str, Any]) -> Path:
    """PEFT's adapter with all its tensors moved off their start, saved; and what trainers leave beside it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**case["peft"], target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    adapted = peft.get_peft_model(bnb_base(model, **case["settings"]), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter *= 0.9 + 0.2 * torch.rand_like(parameter)
            elif "lora_" in name:
                parameter.copy_((0.2 * torch.randn_like(parameter)).to(case["dtype"]))
    adapted.save_pretrained(str(out))
    tensors = load_file(out / WEIGHTS)
    save_file({n: t if "magnitude" in n else t.to(case["dtype"]) for n, t in tensors.items()}, out / WEIGHTS)
    (out / "optimizer.pt").write_bytes(b"not read")
    return out


def expected_logits(model: Path, adapter: Path, case: dict[str, Any]) -> Tensor:
    """Logits in float64: each layer g (W + s B A) by the plain loops, W what bitsandbytes dequantises."""
    from bitsandbytes.functional import dequantize_4bit

    packed, dense = bnb_base(model, **case["settings"]), AutoModelForCausalLM.from_pretrained(model).double()
    factors = {n: t.double().numpy() for n, t in load_file(adapter / WEIGHTS).items()}
    for path, module in packed.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).double().numpy()
        a, b, m = (
            factors.get(f"base_model.model.{path}.{name}")
            for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        if a is not None and b is not None:
            rank = len(a)
            scaling = case["peft"]["lora_alpha"] / (np.sqrt(rank) if case["peft"].get("use_rslora") else rank)
            weight = reference.merged_weight(weight, a, b, scaling, m)
        dense.get_submodule(path).weight.data = torch.from_numpy(weight)
    return logits(dense)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found.double()


def content(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("adopted") / "model", intermediate_size=128)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """The DoRA adapter, for what does not depend on the kind."""
    return trained(model, model.parent / "dora", ADAPTERS["dora"])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_exports_of_an_adapter_of_peft(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    case = ADAPTERS[kind]
    adapter = trained(model, tmp_path / "theirs", case)
    before, expected = content(adapter), expected_logits(model, adapter, case)
    # The adapter does something, and PEFT agrees with the float64 formula.
    assert (expected - logits(bnb_base(model, **case["settings"]))).abs().max() > 0.1
    theirs = logits(peft.PeftModel.from_pretrained(bnb_base(model, **case["settings"]), str(adapter)))
    torch.testing.assert_close(theirs, expected, rtol=0, atol=2e-5)
    loaders: dict[str, Callable[[Path], Any]] = {
        "merged": AutoModelForCausalLM.from_pretrained,
        "nf4-lora": lambda out: peft.PeftModel.from_pretrained(bnb_as_stored(out), str(out / "adapter")),
        "peft": lambda out: peft.PeftModel.from_pretrained(bnb_base(model, **case["settings"]), str(out)),
    }
    caplog.set_level("INFO", "qdora")
    for form, load in loaders.items():
        dtype = None if form == "peft" else "float32"
        written = export_run(adapter, tmp_path / form, ExportOptions(format_=form, dtype=dtype, quant=case["quant"]))
        torch.testing.assert_close(logits(load(tmp_path / form)), expected, rtol=0, atol=2e-5)
        assert form == "peft" or written["verification"]["passed"]
        assert (written["run"], written["state"]) == ("theirs", "final")
        card = (tmp_path / form / "README.md").read_text()
        assert ", exported with qdora" in card
        assert not [word for word in ("learning rate", "demo/", "## Data\n", str(tmp_path)) if word in card]
        assert ("assumed" if case["quant"] is None else "--quant") in card
    known = {"quant": None, "known": None} | written["adopted"]
    assert (known["base"], known["quant"].split(",")[0]) == (None, case["settings"]["bnb_4bit_quant_type"])
    assert f"taken as trained on {model}, held in {known['quant']}" in caplog.text
    stored, copied = load_file(adapter / WEIGHTS), load_file(tmp_path / "peft" / WEIGHTS)
    assert all(torch.equal(copied[n], t) and copied[n].dtype == t.dtype for n, t in stored.items())
    assert content(adapter) == before


def bnb_as_stored(directory: Path) -> Any:
    """A checkpoint in 4 bits, as its own config says."""
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    for module in loaded.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return loaded
