"""qdora export of a whole run, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.errors import UserError
from qdora.verbs.export import export_run
from qdora.verbs.train import train_run
from tests import tiny_adapted, tiny_run, tiny_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of DoRA on a model whose rows are whole blocks of 64."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    sizes = tiny_adapted.SIZES | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 400}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(root / "model")
    tiny_tokenizer.make().save_pretrained(root / "model")
    train_run(tiny_run.recipe(root, train__steps=3, train__lr=0.02), root / "run")
    return root / "run"


def test_nf4_lora(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = export_run(run, out, format_="nf4-lora")
    check = exported["verification"]
    assert check["passed"], check["faults"]
    assert check["exported_vs_reference"]["max_logit_difference"] < 1e-5
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(exported))
    assert exported["dtype"] == "float32"
    assert exported["scale_error_if_double_quantised"]["mean"] > 1e-4
    card = (out / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert "| 4-bit base and LoRA, adapter in float32 |" in card
    assert (out / "adapter/adapter_config.json").is_file()


def test_options_without_effect_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype: has no effect on --format peft"):
        export_run(run, tmp_path / "out", format_="peft", dtype="float16")
    with pytest.raises(UserError, match=r"allowed: merged, peft, nf4-lora\. Did you mean 'nf4-lora'\?"):
        export_run(run, tmp_path / "out", format_="nf4lora")
    assert not (tmp_path / "out").exists()
