"""Runs that go on from an adapter that PEFT trained and wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qdora.errors import UserError
from qdora.ops.packed import dequantize, quantize
from qdora.run.load_run import load_run
from qdora.run.train import train_run
from tests import tiny_run

peft = pytest.importorskip("peft")

IDS = torch.arange(5, 45).reshape(2, 20)
RANKS = {"model.layers.1.mlp.up_proj": 3}


def quantized_base(root: Path) -> Any:
    """The model of the recipe, its linear layers the dequantised NF4 weights that qdora trains on."""
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            module.weight.data = dequantize(quantize(module.weight.data, "nf4", 64, True), torch.float32)
    return model


def trained_by_peft(root: Path, out: Path, use_dora: bool) -> Tensor:
    """Three steps of PEFT in float32, saved; returns its logits."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=use_dora, target_modules=targets, rank_pattern=RANKS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(quantized_base(root), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(out))
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("continue")
    tiny_run.recipe(root)
    return root


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_run_goes_on_where_peft_stopped(root: Path, tmp_path: Path, kind: str) -> None:
    expected = trained_by_peft(root, tmp_path / "peft", kind == "dora")
    changes: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha")}
    changes |= {"adapter__resume_from": str(tmp_path / "peft"), "adapter__kind": kind, "adapter__dtype": "float32"}
    changes |= {"eval__tasks": [], "eval__limit": ..., "train__checkpoint_every": ...}
    # A step that moves nothing that float32 could hold: the run is PEFT's model.
    still = tiny_run.recipe(root, **changes, train__steps=1, train__lr=1e-12)
    train_run(still, tmp_path / "still")
    torch.testing.assert_close(logits(load_run(tmp_path / "still").model), expected, rtol=1e-4, atol=1e-4)
    before = load_file(tmp_path / "peft/adapter_model.safetensors")
    after = load_file(tmp_path / "still/adapter/adapter_model.safetensors")
    assert set(after) == set(before)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-8)
    # Several that do: every tensor trains, and the layout stays the one of the file.
    train_run(tiny_run.recipe(root, **changes, train__steps=3, train__lr=0.01), tmp_path / "on")
    moved = load_file(tmp_path / "on/adapter/adapter_model.safetensors")
    assert all(not torch.equal(moved[name], tensor) for name, tensor in before.items())
    config = json.loads((tmp_path / "on/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 6, kind == "dora")
    # And the way back: what went on here loads in PEFT.
    again = peft.PeftModel.from_pretrained(quantized_base(root), str(tmp_path / "on/adapter"))
    torch.testing.assert_close(logits(again), logits(load_run(tmp_path / "on").model), rtol=1e-4, atol=1e-4)


def test_another_kind_is_refused(root: Path, tmp_path: Path) -> None:
    trained_by_peft(root, tmp_path / "peft", use_dora=False)
    changes: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha")}
    recipe = tiny_run.recipe(root, **changes, adapter__resume_from=str(tmp_path / "peft"))
    with pytest.raises(UserError, match=r"adapter\.kind: got dora, but .* is a lora\. Fix: set adapter\.kind: lora"):
        train_run(recipe, tmp_path / "run")
