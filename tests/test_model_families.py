"""Mixtures of experts and multimodal models: published files, adapters, exports, and what they compute."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlavaConfig
from typer.testing import CliRunner

from qdora.adapter import expert_product
from qdora.adapter.experts import AdaptedExperts, FrozenExperts
from qdora.cli import app
from qdora.errors import UserError
from qdora.export.checkpoints import export_merged
from qdora.export.verify import load_with_transformers
from qdora.model import experts
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.checkpoint import taken_for_experts
from qdora.model.experts import routers, stacks, use_expert_layers_
from qdora.model.inject import inject
from qdora.model.load import Quantization
from qdora.model.multimodal import carried
from qdora.model.source import load_tokenizer, resolve
from qdora.model.store import BaseCache
from qdora.quant.packed import dequantize, quantize
from qdora.recipe.recipe_file import resolved_yaml
from qdora.train.guards import packed_layout
from tests import support
from tests.support import load_checkpoint

IDS = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(IDS).logits
    return found


def results(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their squares with respect to the inputs: through routers and experts."""
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    out = model.eval()(inputs_embeds=x).logits
    return out.detach(), torch.autograd.grad(out.square().mean(), x)[0]


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.std()))


def saved(model: Any, directory: Path, quant: str) -> Path:
    save_adapter(model, directory, base_name_or_path="model", revision=None, base_quant={"quant": quant})
    return directory


@pytest.mark.parametrize("name", support.MIXTURES)
def test_a_published_checkpoint_gives_the_logits_of_transformers(tmp_path, name):
    """Experts are quantised as they are read; the result is as if the stack had been quantised at once."""
    support.write_mixture(tmp_path, name)
    library = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load_checkpoint(tmp_path)
    if name == "granitemoe" and not stacks(model):
        pytest.skip("this release of transformers has no interface for Granite's experts")
    assert len(stacks(model)) >= 2
    library.requires_grad_(False)
    for found, wanted in zip(results(model), results(library), strict=True):
        assert_close(found, wanted, 1e-4)
    if name in ("qwen3_moe", "granitemoe", "gpt_oss"):
        for path, stack in stacks(load_checkpoint(tmp_path, quant="nf4")).items():
            assert isinstance(stack, FrozenExperts)
            weight = library.get_parameter(path).detach()
            matrix = (weight.mT if name == "gpt_oss" else weight).flatten(0, 1)
            assert torch.equal(stack.dequantized(), dequantize(quantize(matrix, "nf4")))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("options", [{"gated": True}, {"kind": "lora"}], ids=str)
def test_padding_for_cards_without_a_grouped_product_changes_no_number(tmp_path, monkeypatch, name, options):
    """Outputs and gradients, in float64."""
    options = dict(options)
    gated = options.pop("gated", False)
    model, layers = support.adapted_mixture(tmp_path, name, **options)
    for layer in layers.values() if gated else ():
        layer.add_gate()
        nn.init.uniform_(layer.gate, 0.5, 1.5)
    parameters = [each for each in model.parameters() if each.requires_grad]

    def results() -> list[Tensor]:
        out = model(IDS).logits
        return [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]

    plain, spread = results(), list[Tensor]()
    monkeypatch.setattr(expert_product, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(expert_product, "_MOST_PADDING", 1.0)
    monkeypatch.setattr(expert_product, "_WORTH_COPIES", -1)
    apply = experts._Spread.apply
    monkeypatch.setattr(experts._Spread, "apply", lambda x, *rest: (spread.append(x), apply(x, *rest))[1])
    for one, other in zip(plain, results(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
    assert spread
    monkeypatch.undo()
    order, inverse = torch.tensor([1, -1, 0, 3, 2, -1]), torch.tensor([2, 0, 4, 3])
    x = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    assert not apply(x, order, inverse, 2)[[1, 5]].any()
    assert torch.autograd.gradcheck(lambda x: apply(x, order, inverse, 2).tanh(), (x,))
    assert torch.autograd.gradgradcheck(lambda x: apply(apply(x, order, inverse, 2).tanh(), inverse, order, 1), (x,))


# --- adapters


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_an_adapter_file_holds_the_layers(tmp_path, kind):
    support.write_mixture(tmp_path / "model", "mixtral")
    model, again = (load_checkpoint(tmp_path / "model", quant="nf4") for _ in range(2))
    layers = inject(model, kind=kind, rank=4, expert_rank=2, targets=["q_proj", "experts"])
    assert sum(isinstance(layer, AdaptedExperts) for layer in layers.values()) == 4
    support.move_adapters_(layers)
    directory = saved(model, tmp_path / "adapter", "nf4")
    shapes = {path: layer.lora_A.shape for path, layer in load_adapter(again, directory).items()}
    assert shapes == {path: layer.lora_A.shape for path, layer in layers.items()}
    assert torch.equal(logits(again), logits(model))
    name = "base_model.model.model.layers.0.mlp.experts.lora_magnitude_vector"
    tensors = load_file(directory / "adapter_model.safetensors")
    assert (tensors[name].shape == (4, 64)) if kind == "dora" else (name not in tensors)


FAST = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in support.MIXTURES]
)
def test_peft_computes_the_logits_of_lora_on_all_layers(tmp_path, name):
    """Dense layers whose names are those of single experts are there, too, and have ranks and scalings of their own."""
    support.write_mixture(tmp_path / "model", name)
    model = load_checkpoint(tmp_path / "model")
    layers = inject(model, kind="lora", rank=4, expert_rank=2, rank_pattern={"down_proj": 3})
    support.move_adapters_(layers)
    directory = saved(model, tmp_path / "adapter", "none")
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before, wanted = logits(library), logits(model)
    adapted = PeftModel.from_pretrained(library, str(directory))
    assert float((before - wanted).abs().max()) > 0.1 * float(wanted.std())
    assert_close(logits(adapted), wanted, 1e-4)
    again = load_checkpoint(tmp_path / "model")
    read = load_adapter(again, directory)
    assert {path: layer.rank for path, layer in read.items()} == {path: layer.rank for path, layer in layers.items()}
    assert torch.equal(logits(again), wanted)


def test_ranks_of_experts_and_routers_that_stay_as_they_are(tmp_path):
    support.write_mixture(tmp_path, "qwen2_moe", torch.bfloat16)

    def adapted(**options: Any) -> tuple[Any, dict[str, Any]]:
        model = load_checkpoint(tmp_path, quant="nf4", compute_dtype=torch.bfloat16)
        return model, inject(model, rank=4, **options)

    model, layers = adapted(rank_pattern={"down_proj": 3}, expert_rank=2)
    ranks = {path.rpartition(".mlp.")[2]: layer.rank for path, layer in layers.items() if ".mlp." in path}
    shared = {"shared_expert.gate_proj": 4, "shared_expert.up_proj": 4, "shared_expert.down_proj": 3}
    assert ranks == {"experts.gate_up_proj": 2, "experts.down_proj": 3} | shared
    assert routers(model) == {f"model.layers.{index}.mlp.shared_expert_gate" for index in range(2)}
    for block in model.model.layers:
        assert type(block.mlp.shared_expert_gate) is nn.Linear
        assert block.mlp.gate.weight.dtype == torch.bfloat16
        assert not block.mlp.gate.weight.requires_grad
    with pytest.raises(UserError, match="no target is an expert"):
        adapted(expert_rank=2, targets=["q_proj"])
    with pytest.raises(UserError, match=r"'expert' matches no linear layer; must be .* v_proj"):
        adapted(targets=["expert"])


@pytest.mark.parametrize("name", support.MIXTURES)
def test_dense_layers_that_peft_takes_for_experts(name):
    """By PEFT's own change of a config that names each of them by its path."""
    model, ours = support.mixture(name), support.mixture(name)
    use_expert_layers_(ours)
    ends = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    dense = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and path.endswith(ends)]
    config = LoraConfig(target_modules=[*dense, "o_proj"])
    convert_peft_config_for_transformers(config, model, None)
    assert taken_for_experts(ours, dense) == set(dense) - set(config.target_modules)


# --- MXFP4, and checkpoints that do not fit


def test_mxfp4_is_kept_bit_for_bit_or_quantised_again(tmp_path):
    """transformers dequantises the experts on a machine without a GPU."""
    support.write_mxfp4(tmp_path)
    library = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float()
    kept, again, dense = (load_checkpoint(tmp_path, quant=quant) for quant in ("mxfp4", "nf4", "none"))
    for path, stack in stacks(kept).items():
        assert isinstance(stack, FrozenExperts)
        assert stack.kind == "mxfp4"
        assert stack.get_buffer("absmax").dtype == torch.uint8
        weight = library.get_parameter(path).detach().mT.flatten(0, 1)
        assert torch.equal(stack.dequantized(), weight)
        assert torch.equal(dense.get_submodule(path).weight, weight)
        assert torch.equal(again.get_submodule(path).dequantized(), dequantize(quantize(weight, "nf4")))
    assert type(kept.model.layers[0].self_attn.q_proj) is nn.Linear
    assert_close(logits(kept), logits(library))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 3, 0] = 255  # NaN
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor .model\.layers\.1\.mlp\.experts\.down_proj_scales. has NaN"):
        load_checkpoint(tmp_path, quant="mxfp4")


LOST = [f"model.layers.1.mlp.experts.{part}_proj.weight" for part in ("3.gate", "3.up", "3.down")]
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}
# Model, what is done to its tensors and its config, quantisation, and words of each fault.
REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], dict[str, Any], str, list[str]]] = {
    "config": ("gpt_oss", dict, MXFP4, "mxfp4", ["its config names mxfp4, but it holds no weights"]),
    "dense": ("gpt_oss", dict, {}, "nvfp4", [r"base\.quant: nvfp4 cannot hold stacks of experts"]),
    "one lost": ("qwen3_moe", lambda t: t.pop(LOST[1]), {}, "nf4", ["tensors are missing or do not fit"]),
    "expert lost": ("qwen3_moe", lambda t: [t.pop(name) for name in LOST], {}, "nf4", ["experts"] * 2),
}


@pytest.mark.parametrize("case", REFUSED)
def test_experts_that_do_not_fit_are_named(tmp_path, case):
    name, change, config, quant, words = REFUSED[case]
    support.mixture(name).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    support.assert_refused(words, load_checkpoint, tmp_path, quant=quant)


# --- multimodal checkpoints: the language part alone is loaded and trained, the rest is copied into exports

LANGUAGE = ("model.language_model.", "lm_head.")
NF4 = Quantization("nf4", 64, True, ("lm_head",))
TEXTS = torch.randint(4, 396, (2, 40), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def whole_model(directory: Path) -> Any:
    """The model as a stranger loads it, in float32."""
    model, info = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def text_logits(model: Any, ids: Tensor = TEXTS, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return found


def is_text(name: str) -> bool:
    """Whether a tensor of a checkpoint, under any of its names, belongs to the language part."""
    return not any(part in name for part in ("visual.", "vision_tower.", "multi_modal_projector."))


PUBLISHED = [(family, True) for family in support.FAMILIES] + [("gemma3", False), ("qwen2_5_vl", False)]


@pytest.mark.parametrize(("family", "published"), PUBLISHED)
def test_a_text_gets_the_logits_of_the_whole_model(family, published, tmp_path):
    stored = support.write_multimodal(tmp_path, family, published=published)
    whole, model = whole_model(tmp_path), load_checkpoint(tmp_path)
    expected = text_logits(whole)
    assert type(model) is type(whole)
    assert model.config.tie_word_embeddings == (family in ("gemma3", "qwen3_vl", "qwen3_5"))
    assert all(name.startswith(LANGUAGE) for name, _ in (*model.named_parameters(), *model.named_buffers()))
    torch.testing.assert_close(text_logits(model), expected, rtol=0, atol=1e-6)
    # Padding on the left, and two examples in a row.
    mask = torch.ones_like(TEXTS)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = text_logits(model, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[:1, 9:], text_logits(whole, TEXTS[:1, 9:]), **CLOSE)
    torch.testing.assert_close(text_logits(model.train()), expected, **CLOSE)
    assert carried(model).keys() == {name for name in stored if not is_text(name)}
    if family != "qwen3_5":  # its linear attention does not keep packed examples apart, and the check says so
        packed = text_logits(model.eval(), TEXTS.reshape(1, -1), position_ids=torch.arange(40).repeat(2)[None])
        torch.testing.assert_close(packed.view(2, 40, -1), expected, **CLOSE)
        packed_layout(model)


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
    plain = text_logits(whole)
    theirs: Any = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
    trained = [name for name, _ in theirs.named_modules() if name.endswith(".lora_A.default")]
    assert ["vision_tower" in name for name in trained] == [False] * 14
    assert float((text_logits(theirs) - plain).abs().max()) > 0.01
    torch.testing.assert_close(text_logits(theirs), text_logits(model), **CLOSE)


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
    export_merged(model, None, tmp_path / "merged", dtype=torch.float32)
    check_files(tmp_path / "merged", stored)
    torch.testing.assert_close(text_logits(whole_model(tmp_path / "merged")), text_logits(model), **CLOSE)
    reloaded, faults = load_with_transformers(tmp_path / "merged", model)  # as an export's own check does
    assert not faults
    torch.testing.assert_close(text_logits(reloaded), text_logits(model), **CLOSE)


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
    assert (tmp_path / "merged/preprocessor_config.json").read_text() == '{"image_processor_type": "of a test"}\n'
    source, reloaded = AutoConfig.from_pretrained(tmp_path / "model"), whole_model(tmp_path / "merged").config
    assert reloaded.architectures == source.architectures
    found, wanted = (each.text_config.rope_parameters for each in (reloaded, source))
    assert found.pop("type", None) in (None, "mrope")  # the name of transformers 4, which not every source has
    wanted.pop("type", None)
    assert found == wanted


def test_other_families_a_processors_chat_template_and_a_base_from_the_cache(tmp_path, caplog):
    LlavaConfig().save_pretrained(tmp_path / "llava")
    save_file({"weight": torch.zeros(1)}, tmp_path / "llava/model.safetensors")
    match = r"must be of gemma3, .*qwen3_5 \(got llava\)\."
    with pytest.raises(UserError, match=match):
        load_checkpoint(tmp_path / "llava")
    stored = support.write_multimodal(tmp_path / "model", "qwen3_vl")
    (tmp_path / "model/chat_template.jinja").unlink()
    source = resolve(str(tmp_path / "model"))
    assert load_tokenizer(source).chat_template is None
    (source.path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(source).chat_template == "{{ messages }}"
    cache = BaseCache(tmp_path / "cache", NF4, torch.device("cpu"))
    for words in ("Writing the packed base", "Reading the packed base"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "qdora"):
            model = load_checkpoint(source.path, quant="nf4", reader=cache)
        assert words in caplog.text
        assert "only its language part" in caplog.text
        # It still knows what an export copies.
        assert carried(model).keys() == {name for name in stored if name.startswith("model.visual.")}
