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
from qdora.model.load import DEFAULT_SKIP, Quantization, load_model
from qdora.model.packed_base import BaseCache
from qdora.model.source import load_tokenizer, resolve
from qdora.recipe.recipe_file import resolved_yaml
from qdora.train.packed_attention import packed_layout
from tests import tiny, tiny_multimodal, tiny_run

LANGUAGE = ("model.language_model.", "lm_head.")
NF4 = Quantization("nf4", 64, True, DEFAULT_SKIP)
TEXTS = torch.randint(4, 396, (2, 40), generator=torch.Generator().manual_seed(0))


def whole_model(directory: Path, **options: Any) -> Any:
    """The model as a stranger loads it, in float32."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def logits(model: Any, ids: Tensor = TEXTS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return found


def load(directory: Path, quant: str = "none", **options: Any) -> Any:
    return load_model(resolve(str(directory)), quant=quant, compute_dtype=torch.float32, **options)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("family", tiny_multimodal.FAMILIES)
def test_a_text_gets_the_logits_of_the_whole_model(family: str, published: bool, tmp_path: Path) -> None:
    stored = tiny_multimodal.write_model(tmp_path, family, published=published)
    whole, model = whole_model(tmp_path), load(tmp_path)
    assert type(model) is type(whole)
    assert model.config.tie_word_embeddings == (family in ("gemma3", "qwen3_vl", "qwen3_5"))
    assert all(name.startswith(LANGUAGE) for name, _ in (*model.named_parameters(), *model.named_buffers()))
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-6)
    # Padding on the left, and two examples in a row.
    mask = torch.ones_like(TEXTS)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = logits(model, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[:1, 9:], logits(whole, TEXTS[:1, 9:]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.train()), logits(whole), rtol=1e-4, atol=1e-5)
    assert carried(model).keys() == {name for name in stored if not is_text(name)}
    if family == "qwen3_5":  # its linear attention does not keep packed examples apart, and the check says so
        return
    packed = logits(model.eval(), TEXTS.reshape(1, -1), position_ids=torch.arange(40).repeat(2)[None])
    torch.testing.assert_close(packed.view(2, 40, -1), logits(whole), rtol=1e-4, atol=1e-5)
    packed_layout(model)


def is_text(name: str) -> bool:
    """Whether a tensor of a checkpoint, under any of its names, belongs to the language part."""
    return not any(part in name for part in ("visual.", "vision_tower.", "multi_modal_projector."))


def test_an_adapter_fits_the_whole_model_in_peft(tmp_path: Path) -> None:
    """Gemma 3's vision tower has layers with the names of its text layers; they must stay without an adapter."""
    tiny_multimodal.write_model(tmp_path / "model", "gemma3")
    model = load(tmp_path / "model")
    layers = inject(model, rank=4, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    assert layers.keys() == {name for name, each in model.named_modules() if hasattr(each, "lora_A")}
    tiny.move_all_parameters_(model)
    save_adapter(model, tmp_path / "adapter", base_name_or_path=None, revision=None, base_quant={"quant": "none"})
    whole = whole_model(tmp_path / "model")
    plain = logits(whole)
    adapted: Any = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
    trained = [name for name, _ in adapted.named_modules() if name.endswith(".lora_A.default")]
    assert len(trained) == 14
    assert not [name for name in trained if ".vision_tower." in name]
    assert float((logits(adapted) - plain).abs().max()) > 0.01
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-4, atol=1e-5)


def invoke(*arguments: Any) -> Any:
    """What a command prints with --json."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def written(root: Path, **changes: Any) -> Path:
    """The file of a recipe of two steps."""
    recipe = tiny_run.recipe(root, **{"train__steps": 2, "train__checkpoint_every": 1, "train__lr": 0.02} | changes)
    (root / "recipe.yaml").write_text(resolved_yaml(recipe))
    return root / "recipe.yaml"


def test_a_merged_export_is_the_whole_model(tmp_path: Path) -> None:
    stored = tiny_multimodal.write_model(tmp_path / "model", "qwen2_5_vl")
    model = load(tmp_path / "model", "nf4")
    inject(model, rank=4, dtype=torch.float32)
    tiny.move_all_parameters_(model)
    save_adapter(model, tmp_path / "adapter", base_name_or_path=None, revision=None, base_quant={"quant": "nf4"})
    merge = StreamedMerge(resolve(str(tmp_path / "model")), tmp_path / "adapter", NF4, torch.float32)
    export_merged(merge, None, tmp_path / "merged", dtype=torch.float32)
    check_files(tmp_path / "merged", stored)
    torch.testing.assert_close(logits(whole_model(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-5)
    reloaded, faults = load_with_transformers(tmp_path / "merged", model)  # as an export's own check does
    assert not faults
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)


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


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_multimodal.FAMILIES)
def test_a_run_from_start_to_exports(family: str, tmp_path: Path) -> None:
    stored = tiny_multimodal.write_model(tmp_path / "model", family)
    run = tmp_path / "run"
    planned = invoke("plan", written(tmp_path, train__steps=1), "--device", "cpu")
    assert planned["memory"]["num_weights"] == sum(each.numel() for name, each in stored.items() if is_text(name))
    invoke("train", tmp_path / "recipe.yaml", "--run-dir", run)
    invoke("train", written(tmp_path), "--run-dir", run, "--resume")
    log = (tmp_path / "run/log.txt").read_text()
    assert "only its language part is loaded and trained." in log
    card = (tmp_path / "run/README.md").read_text()
    assert "| trained part | the language part;" in card
    invoke("eval", run, "--limit", "2")
    assert invoke("generate", run, "--prompt", "1 + 1 =", "--raw", "--max-new-tokens", "3")["num_new_tokens"] > 0

    merged = invoke("export", run, tmp_path / "merged")
    assert merged["verification"]["passed"], merged["verification"]["faults"]
    assert "\npipeline_tag: image-text-to-text\n" in (tmp_path / "merged/README.md").read_text()
    check_files(tmp_path / "merged", stored)
    assert (tmp_path / "merged/preprocessor_config.json").read_bytes() == (
        tmp_path / "model/preprocessor_config.json"
    ).read_bytes()
    source, reloaded = AutoConfig.from_pretrained(tmp_path / "model"), whole_model(tmp_path / "merged").config
    assert reloaded.architectures == source.architectures
    found, wanted = (each.text_config.rope_parameters for each in (reloaded, source))
    assert found.pop("type", None) in (None, "mrope")  # the name of transformers 4, which not every source has
    wanted.pop("type", None)
    assert found == wanted

    exported = invoke("export", run, tmp_path / "4bit", "--format", "nf4-lora")
    assert exported["verification"]["passed"], exported["verification"]["faults"]
    assert "AutoModelForImageTextToText" in (tmp_path / "4bit/README.md").read_text()
    check_files(tmp_path / "4bit", stored)
    exported = invoke("export", run, tmp_path / "again", "--requantize")
    assert exported["verification"]["passed"], exported["verification"]["faults"]
    check_files(tmp_path / "again", stored)


def test_exports_need_no_second_reading_of_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A base from the cache still knows what an export copies."""
    stored = tiny_multimodal.write_model(tmp_path / "model", "qwen3_vl")
    cache = BaseCache(tmp_path / "cache", NF4, torch.device("cpu"))
    for words in ("Writing the packed base", "Reading the packed base"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "qdora"):
            model = load(tmp_path / "model", "nf4", reader=cache)
        assert words in caplog.text
        assert carried(model).keys() == {name for name in stored if name.startswith("model.visual.")}
        assert in_words(model) in caplog.text


def test_images_do_not_reach_the_model(tmp_path: Path) -> None:
    tiny_multimodal.write_model(tmp_path, "gemma3")
    with pytest.raises(UserError, match="images are not supported: only the language part of the model is loaded"):
        load(tmp_path)(input_ids=TEXTS, pixel_values=torch.zeros(1, 3, 28, 28))


def test_other_families_are_refused_in_one_line(tmp_path: Path) -> None:
    LlavaConfig().save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    match = r"the language part of a multimodal model can be trained for gemma3, .*qwen3_5 \(got llava\)\."
    with pytest.raises(UserError, match=match):
        load(tmp_path)


def test_a_chat_template_that_only_the_processor_has(tmp_path: Path) -> None:
    tiny_multimodal.write_model(tmp_path, "qwen3_vl")
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(resolve(str(tmp_path))).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(resolve(str(tmp_path))).chat_template == "{{ messages }}"
