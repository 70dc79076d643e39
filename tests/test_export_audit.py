"""The audit: each form in memory is the form in the files, and the verdict follows from the figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.errors import UserError
from qdora.export.audit import DESCRIPTIONS, audit_page, computing, export_forms, layer_errors, recommendation
from qdora.export.export_run import export_run
from qdora.export.logit_comparison import float32_arithmetic
from qdora.export.merged import check_merge, merge_of, open_merge
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
    with float32_arithmetic(model), computing(model, form):
        found = tiny_adapted.logits(model, IDS)
    expected = tiny_adapted.logits(exported, IDS)
    tolerance = 5e-3 if name in ("merged", "original") else 2e-5  # fp16 also rounds the embeddings of the files
    assert (found - expected).abs().max() < tolerance
    assert torch.equal(tiny_adapted.logits(model, IDS), before)


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_the_original_form_has_the_layers_own_formula(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """With the gate in B, and the mask over B A."""
    from qdora.export import audit
    from tests import test_nn_masked_adapter

    layer = test_nn_masked_adapter.layer_of(kind=kind, dtype=torch.float32)
    layer.add_gate()
    assert layer.gate is not None
    layer.gate.data = torch.tensor([0.5, 0.0, 2.0])
    source = torch.randn(13, 24, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(audit, "source_weight", lambda *_: source)
    model: Any = torch.nn.ModuleDict({"layer": layer})
    merge = SimpleNamespace(quant=SimpleNamespace(kind="nf4"), source=SimpleNamespace(is_gguf=False))
    given: Any = SimpleNamespace(merge=merge, stored={}, quantized={"layer"})
    form = export_forms(model, given, torch.float32)["original"]
    assert not isinstance(form, str)
    found = form("layer", layer)
    keep = layer.base.keep_mask()
    assert keep is not None
    product = (layer.lora_B.detach() * layer.gate.detach()).double() @ layer.lora_A.detach().double()
    expected = source.double() + layer.alpha / layer.rank * product * keep
    if layer.magnitude is not None:
        expected *= (layer.magnitude.detach().double() / expected.square().sum(1).sqrt())[:, None]
    torch.testing.assert_close(found, expected.float())


def test_a_gguf_base_has_no_16_bit_weights_to_merge_on(run: Path) -> None:
    """As `check_merge` says, which refuses --base original for it."""
    found = opened(run)
    merge = replace(found.merge, source=replace(found.merge.source, kind="gguf"))
    with pytest.raises(UserError, match="is a GGUF file, not the 16-bit model"):
        check_merge(replace(merge, base="original"))
    form = export_forms(load_run(run).model, replace(found, merge=merge), torch.float16)["original"]
    assert form == "the base is a GGUF file, not the 16-bit model"


def test_layer_errors_are_ratios_of_norms(run: Path) -> None:
    from safetensors.torch import load_file

    model = load_run(run).model
    found = layer_errors(model, opened(run))
    assert len(found) == 14
    assert [each["ratio"] for each in found] == sorted((each["ratio"] for each in found), reverse=True)
    source = load_file(run.parent / "model/model.safetensors")
    for each in found:
        layer: Any = model.get_submodule(each["path"])
        weight = source[each["path"] + ".weight"].double()
        base = layer.base.dequantized().double()
        merged = torch.from_numpy(tiny_adapted.expected_weight(layer))
        assert each["quantization_error"] == pytest.approx(float((base - weight).norm() / weight.norm()), rel=1e-4)
        assert each["update"] == pytest.approx(float((merged - base).norm() / weight.norm()), rel=1e-3)
        assert 0.05 < each["quantization_error"] < 0.13


def test_the_audit_compares_every_form(run: Path, tmp_path: Path) -> None:
    options = ExportOptions(base="original", dtype="float32", audit=True)
    document = export_run(run, tmp_path / "out", options, console=QUIET)
    found = document["audit"]
    assert list(found["forms"]) == list(DESCRIPTIONS)
    assert json.loads((tmp_path / "out/export.json").read_text())["audit"] == json.loads(json.dumps(found))
    for name in ("merged", "nf4-lora"):
        assert found["forms"][name]["logits"]["kl_mean"] < 1e-9
        assert abs(found["forms"][name]["nll_difference"]["mean"]) < 1e-4
    for name in ("original", "requantized", "base"):
        assert found["forms"][name]["logits"]["kl_mean"] > 1e-6
        assert found["forms"][name]["nll_per_token"].keys() == {"sums", "letters"}
    page = (run / "exports/out.md").read_text()
    assert found["verdict"] in page
    assert page == audit_page(run.name, found)
    assert "Ship `--format merged` (16 bits) or `--format nf4-lora` (4 bits): both are" in page
    assert page.count("\n| ") == (2 + 6) + (2 + 5)  # two tables, each with its header


def form(kl: float, mean: float, stderr: float) -> dict[str, Any]:
    logits = {"kl_mean": kl, "argmax_agreement": 0.9, "max_logit_difference": 1.0, "mean_logit_difference": 0.1}
    return {"logits": logits, "nll_difference": {"mean": mean, "stderr": stderr}}


def test_the_verdict_follows_from_the_figures() -> None:
    forms = {
        "merged": form(1e-7, 0.0, 0.0),
        "nf4-lora": {"why_not": "a block crosses from one row into the next"},
        "original": form(0.02, -0.5, 0.1),
        "requantized": form(0.05, 0.1, 0.08),
    }
    text = recommendation(forms, [{"ratio": 2.0}, {"ratio": 0.5}])
    assert text.startswith("Ship `--format merged` (16 bits): it is the model that was trained (mean KL at most 1e-07")
    assert "`--format merged --base original` is another model: mean KL 0.02 nats" in text
    assert "its answers are better by 0.500 +- 0.200 nats each." in text
    assert "its answers do not differ significantly (+0.100 +- 0.160 nats each)" in text
    assert "`--format nf4-lora` is not possible: a block crosses" in text
    assert "Quantisation changed the weights more than training did in 1 of 2 layers" in text
    close = recommendation(forms | {"original": form(3.5e-5, 0.0, 0.1)}, [{"ratio": 2.0}])
    assert "`--format merged --base original` hardly differs from the trained model: mean KL 3.5e-05 nats" in close
    assert close.endswith("in 1 of 1 layers.")
    without = recommendation(forms | {"original": {"why_not": "the base is a GGUF file"}}, [{"ratio": 2.0}])
    assert without.endswith(
        "is not possible: the base is a GGUF file. Quantisation changed the weights more than "
        "training did in 1 of 1 layers."
    )
    worse = recommendation(forms | {"merged": form(0.1, 0.0, 0.1), "requantized": form(0.05, 0.3, 0.1)}, [])
    assert worse.startswith("No form is the model that was trained")
    assert "worse by 0.300 +- 0.200" in worse
