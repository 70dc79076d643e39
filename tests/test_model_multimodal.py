"""Multimodal checkpoints: the language part alone is loaded and trained, the rest is copied into exports."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.export.merged import StreamedMerge, export_merged
from qdora.export.verify import load_with_transformers
from qdora.model.adapter_file import save_adapter
from qdora.model.inject import inject
from qdora.model.language_part import carried, in_words
from qdora.model.load import DEFAULT_SKIP, Quantization
from qdora.model.packed_base import BaseCache
from qdora.model.source import load_tokenizer, resolve
from qdora.recipe.recipe_file import resolved_yaml
from qdora.train.checks import packed_layout
from tests import support
from tests.support import load_checkpoint

LANGUAGE = ("model.language_model.", "lm_head.")
NF4 = Quantization("nf4", 64, True, DEFAULT_SKIP)
TEXTS = torch.randint(4, 396, (2, 40), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def whole_model(directory: Path) -> Any:
    """The model as a stranger loads it, in float32."""
    model, info = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = TEXTS, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return found


def is_text(name: str) -> bool:
    """Whether a tensor of a checkpoint, under any of its names, belongs to the language part."""
    return not any(part in name for part in ("visual.", "vision_tower.", "multi_modal_projector."))


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("family", support.FAMILIES)
def test_a_text_gets_the_logits_of_the_whole_model(family, published, tmp_path):
    stored = support.write_multimodal(tmp_path, family, published=published)
    whole, model = whole_model(tmp_path), load_checkpoint(tmp_path)
    expected = logits(whole)
    assert type(model) is type(whole)
    assert model.config.tie_word_embeddings == (family in ("gemma3", "qwen3_vl", "qwen3_5"))
    assert all(name.startswith(LANGUAGE) for name, _ in (*model.named_parameters(), *model.named_buffers()))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    # Padding on the left, and two examples in a row.
    mask = torch.ones_like(TEXTS)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = logits(model, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[:1, 9:], logits(whole, TEXTS[:1, 9:]), **CLOSE)
    torch.testing.assert_close(logits(model.train()), expected, **CLOSE)
    assert carried(model).keys() == {name for name in stored if not is_text(name)}
    if family != "qwen3_5":  # its linear attention does not keep packed examples apart, and the check says so
        packed = logits(model.eval(), TEXTS.reshape(1, -1), position_ids=torch.arange(40).repeat(2)[None])
        torch.testing.assert_close(packed.view(2, 40, -1), expected, **CLOSE)
        packed_layout(model)
    if family == "gemma3":
        with pytest.raises(UserError, match="images are not supported: only the language part of the model is loaded"):
            model(input_ids=TEXTS, pixel_values=torch.zeros(1, 3, 28, 28))


def adapted(directory: Path, quant: str) -> Any:
    """A model with an adapter off its start, which is saved beside it."""
    model = load_checkpoint(directory / "model", quant=quant)
    inject(model, rank=4, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    support.move_all_parameters_(model)
    save_adapter(model, directory / "adapter", base_name_or_path=None, revision=None, base_quant={"quant": quant})
    return model


def test_an_adapter_fits_the_whole_model_in_peft(tmp_path):
    """Gemma 3's vision tower has layers with the names of its text layers; they must stay without an adapter."""
    support.write_multimodal(tmp_path / "model", "gemma3")
    model, whole = adapted(tmp_path, "none"), whole_model(tmp_path / "model")
    plain = logits(whole)
    theirs: Any = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
    trained = [name for name, _ in theirs.named_modules() if name.endswith(".lora_A.default")]
    assert len(trained) == 14
    assert not [name for name in trained if ".vision_tower." in name]
    assert float((logits(theirs) - plain).abs().max()) > 0.01
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


def check_files(directory: Path, stored: dict[str, Tensor]) -> None:
    """An export has all names of its source, and what is not of the language part is equal in every bit."""
    files = load_file(directory / "model.safetensors")
    others = [name for name in stored if not is_text(name)]
    assert len(others) > 20
    for name in others:
        assert files[name].dtype == torch.bfloat16
        assert torch.equal(files[name], stored[name]), name
    text = [name for name in stored if name.endswith("q_proj.weight") and name not in others]
    assert not any(torch.equal(files[name].float(), stored[name].float()) for name in text)
    names = {re.sub(r"(\.weight)\.(absmax|quant_|nested_).*", r"\1", name) for name in files}
    assert names == stored.keys()


def test_a_merged_export_is_the_whole_model(tmp_path):
    stored = support.write_multimodal(tmp_path / "model", "qwen2_5_vl")
    model = adapted(tmp_path, "nf4")
    merge = StreamedMerge(resolve(str(tmp_path / "model")), tmp_path / "adapter", NF4, torch.float32)
    export_merged(merge, None, tmp_path / "merged", dtype=torch.float32)
    check_files(tmp_path / "merged", stored)
    torch.testing.assert_close(logits(whole_model(tmp_path / "merged")), logits(model), **CLOSE)
    reloaded, faults = load_with_transformers(tmp_path / "merged", model)  # as an export's own check does
    assert not faults
    torch.testing.assert_close(logits(reloaded), logits(model), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("family", support.FAMILIES)
def test_a_run_from_start_to_exports(family, tmp_path):
    def invoke(*arguments: Any) -> Any:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    stored, run = support.write_multimodal(tmp_path / "model", family), tmp_path / "run"
    settings: dict[str, Any] = {"train__checkpoint_every": 1, "train__lr": 0.02}
    for steps, resume in ((1, []), (2, ["--resume"])):
        recipe = support.tiny_recipe(tmp_path, train__steps=steps, **settings)
        (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe))
        planned = invoke("plan", tmp_path / "recipe.yaml", "--device", "cpu")
        assert planned["memory"]["num_weights"] == sum(each.numel() for name, each in stored.items() if is_text(name))
        invoke("train", tmp_path / "recipe.yaml", "--run-dir", run, *resume)
    assert "only its language part is loaded and trained." in (run / "log.txt").read_text()
    assert "| trained part | the language part;" in (run / "README.md").read_text()
    invoke("eval", run, "--limit", "2")
    assert invoke("generate", run, "--prompt", "1 + 1 =", "--raw", "--max-new-tokens", "3")["num_new_tokens"] > 0
    for name, options in (("merged", []), ("4bit", ["--format", "nf4-lora"]), ("again", ["--requantize"])):
        verification = invoke("export", run, tmp_path / name, *options)["verification"]
        assert verification["passed"], verification["faults"]
        check_files(tmp_path / name, stored)
    assert "\npipeline_tag: image-text-to-text\n" in (tmp_path / "merged/README.md").read_text()
    assert "AutoModelForImageTextToText" in (tmp_path / "4bit/README.md").read_text()
    processors = [(tmp_path / name / "preprocessor_config.json").read_bytes() for name in ("merged", "model")]
    assert processors[0] == processors[1]
    source, reloaded = AutoConfig.from_pretrained(tmp_path / "model"), whole_model(tmp_path / "merged").config
    assert reloaded.architectures == source.architectures
    found, wanted = (each.text_config.rope_parameters for each in (reloaded, source))
    assert found.pop("type", None) in (None, "mrope")  # the name of transformers 4, which not every source has
    wanted.pop("type", None)
    assert found == wanted


def test_exports_need_no_second_reading_of_the_weights(tmp_path, caplog):
    """A base from the cache still knows what an export copies."""
    stored = support.write_multimodal(tmp_path / "model", "qwen3_vl")
    cache = BaseCache(tmp_path / "cache", NF4, torch.device("cpu"))
    for words in ("Writing the packed base", "Reading the packed base"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "qdora"):
            model = load_checkpoint(tmp_path / "model", quant="nf4", reader=cache)
        assert words in caplog.text
        assert carried(model).keys() == {name for name in stored if name.startswith("model.visual.")}
        assert in_words(model) in caplog.text


def test_other_families_are_refused_and_a_chat_template_may_be_the_processors(tmp_path):
    LlavaConfig().save_pretrained(tmp_path / "llava")
    save_file({"weight": torch.zeros(1)}, tmp_path / "llava/model.safetensors")
    match = r"the language part of a multimodal model can be trained for gemma3, .*qwen3_5 \(got llava\)\."
    with pytest.raises(UserError, match=match):
        load_checkpoint(tmp_path / "llava")
    support.write_multimodal(tmp_path, "qwen3_vl")
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(resolve(str(tmp_path))).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(resolve(str(tmp_path))).chat_template == "{{ messages }}"
