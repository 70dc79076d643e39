"""The audit: each form in memory is the form in the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.export.audit import audit_table, export_forms, in_form
from qdora.export.export_run import export_run
from qdora.export.logit_comparison import float32_arithmetic
from qdora.export.merged import merge_of, open_merge
from qdora.export.options import ExportOptions
from qdora.files.run_directory import open_run
from qdora.model.adapter_file import load_adapter
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.run.load_run import load_run
from qdora.run.train import train_run
from tests import tiny_adapted, tiny_run, tiny_tokenizer

IDS = torch.tensor([[1, 17, 30, 5, 44, 26, 9, 120, 3, 3, 77]])
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audit")
    torch.manual_seed(0)
    sizes = tiny_adapted.SIZES | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 400}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data *= 5
    model.save_pretrained(root / "model")
    tiny_tokenizer.make().save_pretrained(root / "model")
    train_run(tiny_run.recipe(root, train__steps=3, train__lr=0.02), root / "run")
    return root / "run"


def opened(run: Path) -> Any:
    directory = open_run(run)
    return open_merge(merge_of(directory, load_run(run).recipe, directory.adapter, ExportOptions())[0])


@pytest.mark.parametrize(
    "name, options",
    [
        ("merged", ExportOptions(dtype="float16")),
        ("original", ExportOptions(dtype="float16", base="original")),
        ("requantized", ExportOptions(dtype="float32", requantize=True)),
        ("nf4-lora", ExportOptions(format_="nf4-lora")),
    ],
)
def test_a_form_in_memory_is_the_form_in_the_files(
    run: Path, tmp_path: Path, name: str, options: ExportOptions
) -> None:
    export_run(run, tmp_path / "out", options, console=QUIET)
    quant = "none" if name in ("merged", "original") else "nf4"
    double_quant = name != "nf4-lora"
    exported = load_model(
        resolve(str(tmp_path / "out")), quant=quant, double_quant=double_quant, compute_dtype=torch.float32
    )
    if name == "nf4-lora":
        load_adapter(exported, tmp_path / "out/adapter")
    model = load_run(run).model
    before = tiny_adapted.logits(model, IDS)
    form = export_forms(model, opened(run), torch.float16)[name]
    assert not isinstance(form, str)
    with float32_arithmetic(model), in_form(model, form):
        found = tiny_adapted.logits(model, IDS)
    expected = tiny_adapted.logits(exported, IDS)
    tolerance = 5e-3 if name in ("merged", "original") else 2e-5  # fp16 also rounds the embeddings of the files
    assert (found - expected).abs().max() < tolerance
    assert torch.equal(tiny_adapted.logits(model, IDS), before)


def test_a_gguf_base_has_no_16_bit_weights_to_merge_on(run: Path) -> None:
    found = opened(run)
    merge = replace(found.merge, source=replace(found.merge.source, kind="gguf"))
    form = export_forms(load_run(run).model, replace(found, merge=merge), torch.float16)["original"]
    assert isinstance(form, str)
    assert "is a GGUF file, not the 16-bit model" in form


def test_the_audit_compares_every_form(run: Path, tmp_path: Path) -> None:
    options = ExportOptions(base="original", dtype="float32", audit=True)
    found = export_run(run, tmp_path / "out", options, console=QUIET)["audit"]
    assert json.loads((tmp_path / "out/export.json").read_text())["audit"] == json.loads(json.dumps(found))
    forms = found["forms"]
    assert forms["adapter"]["logits"]["max_logit_difference"] == 0
    for name in ("merged", "nf4-lora"):
        assert forms[name]["logits"]["kl_mean"] < 1e-9
        assert abs(forms[name]["nll_difference"]["mean"]) < 1e-4
    for name in ("original", "requantized", "base"):
        assert forms[name]["logits"]["kl_mean"] > 1e-6
        assert forms[name]["nll_per_token"].keys() == {"sums", "letters"}
    rows = audit_table(found).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(forms)
