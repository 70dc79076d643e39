"""A model whose classes are its publisher's, in files of its repository: trained, exported, checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qdora.export.export import export_run
from qdora.recipe.options import ExportOptions
from qdora.run.run import train_run
from tests import support

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "configuration_toy.py": """
from transformers import LlamaConfig


class ToyConfig(LlamaConfig):
    model_type = "toy_of_a_test"
""",
    "modeling_toy.py": """
from transformers import LlamaForCausalLM

from .configuration_toy import ToyConfig


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig

    def forward(self, input_ids=None, **options):
        found = super().forward(input_ids, **options)
        found.logits = 2 * found.logits
        return found
""",
}
MAP = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}


def test_an_export_has_the_code_that_the_run_trained_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = support.write_llama(tmp_path / COMMIT, intermediate_size=128)
    config = json.loads((snapshot / "config.json").read_text())
    changes = {"model_type": "toy_of_a_test", "architectures": ["ToyForCausalLM"], "auto_map": MAP}
    (snapshot / "config.json").write_text(json.dumps(config | changes))
    for name, text in FILES.items():
        (snapshot / name).write_text(text)
    monkeypatch.setattr("qdora.model.source.snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = {"model__source": "org/toy", "model__revision": COMMIT, "model__trust_remote_code": True}
    train_run(support.tiny_recipe(tmp_path, train__steps=2, **model), tmp_path / "run")
    for kind in ("merged", "nf4-lora"):
        out = tmp_path / kind
        check = export_run(tmp_path / "run", out, ExportOptions(format=kind))["verification"]
        assert check["passed"], check["faults"]
        assert {each.name: each.read_text() for each in out.glob("*.py")} == FILES
        assert "trust_remote_code=True" in (out / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), trust_remote_code=True)
    assert type(loaded).__name__ == "ToyForCausalLM"
    ids = torch.tensor([[5, 6, 7]])
    twice = super(type(loaded), loaded).forward(ids).logits * 2
    torch.testing.assert_close(loaded(ids).logits, twice)
