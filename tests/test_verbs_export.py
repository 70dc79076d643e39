"""qdora export of a whole run, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.errors import UserError
from qdora.model.inject import adapted_layers
from qdora.verbs.export import ExportOptions, check_servable, export_run, parse_size
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
    exported = export_run(run, out, ExportOptions(format_="nf4-lora"))
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
        export_run(run, tmp_path / "out", ExportOptions(format_="peft", dtype="float16"))
    with pytest.raises(UserError, match=r"allowed: merged, peft, nf4-lora\. Did you mean 'nf4-lora'\?"):
        export_run(run, tmp_path / "out", ExportOptions(format_="nf4lora"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, row",
    [
        (ExportOptions(dtype="bfloat16", shard_size="30KB"), "| merged, adapter in float32 |"),
        (ExportOptions(dtype="float32", base="original"), "| merged on the original weights, adapter in float32 |"),
        (ExportOptions(requantize=True), "| merged and quantised again, adapter in float32 |"),
    ],
)
def test_the_merges(run: Path, tmp_path: Path, options: ExportOptions, row: str) -> None:
    out = tmp_path / "out"
    exported = export_run(run, out, options)
    check = exported["verification"]
    assert check["passed"], check["faults"]
    assert row in (out / "README.md").read_text()
    assert (len(exported["files"]) > 3) == (options.shard_size is not None)
    assert (exported["base"], exported["requantized"]) == (options.base or "dequantized", options.requantize)
    difference = check["exported_vs_reference"]["mean_logit_difference"]
    if options.requantize:
        assert difference > 1e-3
        assert "quantization_config" in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("text, size", [("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("500 MB", 5 * 10**8)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "-1GB", "0GB", "2TB", "2gb"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="allowed: a number and one of KB, MB, GB, KiB, MiB, GiB"):
        parse_size(text)


def test_bases_and_requantisation_are_of_the_merge_alone(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        export_run(run, tmp_path / "out", ExportOptions(format_="nf4-lora", base="original", requantize=True))
    assert raised.value.faults[:2] == (
        "--base: has no effect on --format nf4-lora.",
        "--requantize: has no effect on --format nf4-lora.",
    )
    with pytest.raises(UserError, match=r"--base: 'orignal', allowed: dequantized, original\. Did you mean 'original'"):
        export_run(run, tmp_path / "out", ExportOptions(base="orignal"))


def test_zero_rows_are_refused_for_peft_which_would_compute_nan() -> None:
    model = tiny_adapted.adapted()
    check_servable(model)
    layer = adapted_layers(model)["model.layers.1.mlp.up_proj"]
    layer.base.stored_weight[3] = 0.0  # type: ignore[index]
    with torch.no_grad():
        layer.lora_B[3] = 0.0
    layer.base_squared[3] = 0.0  # type: ignore[index]
    with pytest.raises(UserError, match=r"up_proj: 1 of 48 rows .* use --format merged or --format nf4-lora"):
        check_servable(model)
