"""Loading: the weights are those of transformers, quantised where asked, and every fault of a checkpoint is named."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXJapaneseConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel

from qdora.errors import UserError
from qdora.model import build_model
from qdora.model.attention import with_attention
from qdora.model.inject import frozen_layers
from qdora.model.load import place_dense
from qdora.model.stored_tensors import open_safetensors
from qdora.ops.packed import dequantize, quantize
from tests import reference
from tests.checkpoints import CONFIGS, SMALL, checkpoint, load, logits, one_file


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


def test_dense_logits_equal_transformers(saved: Path) -> None:
    assert len(list(saved.glob("*.safetensors"))) > 1
    model = load(saved)
    attention = model.config._attn_implementation
    assert attention == ("eager" if model.config.model_type == "gemma2" else "sdpa")
    reference = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, attn_implementation=attention)
    assert torch.equal(logits(model), logits(reference))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ours = {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    theirs = {name: tensor.dtype for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]}
    assert ours == theirs


def test_bfloat16_keeps_the_dtypes_of_transformers(saved: Path) -> None:
    model = load(saved, compute_dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.bfloat16, attn_implementation=model.config._attn_implementation
    )
    ours = {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    theirs = {name: tensor.dtype for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]}
    assert ours == theirs
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_quantised_logits_equal_transformers_on_dequantised_weights(saved: Path, quant: str) -> None:
    model = load(saved, quant=quant)
    reference = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32, attn_implementation=model.config._attn_implementation
    )
    replaced = 0
    for name, module in reference.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            module.weight.data = dequantize(quantize(module.weight.data, quant, 64, True))
            replaced += 1
    assert replaced == 14
    assert set(frozen_layers(model)) == {
        n for n, m in reference.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"
    }
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)


def test_tied_embedding_is_one_tensor(saved: Path) -> None:
    model = load(saved, quant="nf4")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_weights_are_quantised_from_the_dtype_of_the_file(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, CONFIGS["llama"])
    file_weight = next(
        load_file(shard)["model.layers.0.mlp.up_proj.weight"]
        for shard in sorted(directory.glob("*.safetensors"))
        if "model.layers.0.mlp.up_proj.weight" in load_file(shard)
    )
    layer = load(directory, quant="nf4", double_quant=False, compute_dtype=torch.bfloat16).model.layers[0].mlp.up_proj
    expected = quantize(file_weight, "nf4", 64, False)
    assert torch.equal(layer.packed, expected.packed)
    assert torch.equal(layer.absmax, expected.absmax)
    assert not torch.equal(expected.absmax, quantize(file_weight.bfloat16(), "nf4", 64, False).absmax)


def test_loaded_model_does_not_depend_on_the_file(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, CONFIGS["qwen2"], shard="1GB")
    model = load(directory)
    before = logits(model)
    file = directory / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:  # in place: a mapped view would see it
        stream.seek(size - 40000)
        stream.write(b"\x7f" * 40000)
    assert torch.equal(logits(model), before)


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(checkpoint(tmp_path, CONFIGS["llama"]), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 21) for done in range(1, 22)]  # 2 layers of 9, embedding, norm, head


def resident_file_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell resident file pages")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_keeps_one_tensor_resident(tmp_path: Path) -> None:
    size = 8 * 2**20
    save_file({f"t{i}": torch.ones(size // 4) for i in range(16)}, tmp_path / "model.safetensors")
    stored = open_safetensors(tmp_path)
    before = most = resident_file_bytes()
    for item in stored.values():
        tensor = item.read()
        assert isinstance(tensor, torch.Tensor)
        assert tensor.sum() == size // 4
        most = max(most, resident_file_bytes())
    assert most - before < 3 * size  # of 16: the one in use, the one before, and slack


# --- which layers are quantised


def test_skip_takes_last_parts_and_patterns(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, CONFIGS["llama"])
    model = load(directory, quant="nf4", skip=["lm_head", "up_proj", "model.layers.1.self_attn.*"])
    expected = {f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"}
    expected |= {f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 1) for part in ("gate", "down")}
    assert set(frozen_layers(model)) == expected
    assert "lm_head" in frozen_layers(load(directory, quant="nf4", skip=[]))


def test_unmatched_skip_names_the_nearest(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, CONFIGS["llama"])
    with pytest.raises(UserError, match=r"base\.skip: 'upproj' matches no linear layer.*Did you mean 'up_proj'"):
        load(directory, quant="nf4", skip=["lm_head", "upproj"])


def test_tied_head_cannot_be_quantised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lm_head shares its weight with the embedding"):
        load(checkpoint(tmp_path, CONFIGS["qwen2"]), quant="nf4", skip=[])


def test_gpt2_is_refused_when_quantised_and_loads_dense(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
    directory = checkpoint(tmp_path, config)
    with pytest.raises(UserError, match=r"gpt2 keeps its weights transposed .*Fix: set base\.quant: none"):
        load(directory, quant="nf4")
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert torch.equal(logits(load(directory)), logits(reference))


def test_a_checkpoint_that_permutes_columns_is_refused_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, CONFIGS["llama"])
    name = "self_attn.o_proj.weight"
    turned = WeightConverter(name, name, [Transpose(0, 1)])
    monkeypatch.setattr("qdora.model.weight_conversion.get_model_conversion_mapping", lambda model: [turned])
    with pytest.raises(UserError, match=r"llama checkpoints hold tensors that must be cut or permuted \(model\.layers"):
        load(tmp_path, quant="nf4")


def test_settings_are_gathered(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, CONFIGS["llama"])
    with pytest.raises(UserError) as caught:
        load(directory, quant="nf5", attention="flash", compute_dtype=torch.int8)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["base.quant", "model.attention", "model.dtype"]
    with pytest.raises(UserError, match=r"base\.block_size: got 100, must be one of 16, "):
        load(directory, quant="fp4", block_size=100)


def test_weights_that_are_not_finite_name_the_model(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, CONFIGS["llama"], shard="1GB")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, :2] = math.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    said = rf"^model\.source: {re.escape(str(directory))}: model\.layers\.0\.mlp\.up_proj\.weight: 2 of .*Fix: download"
    with pytest.raises(UserError, match=said):
        load(directory, quant="nf4")


def test_a_convolution_is_not_called_an_expert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Lfm2Config(**sizes, vocab_size=97, num_key_value_heads=1, layer_types=["conv", "full_attention"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path, quant="nf4")
    assert any(isinstance(module, torch.nn.Conv1d) for module in model.modules())
    assert "expert" not in caplog.text


def test_attention_is_logged_and_eager_can_be_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = checkpoint(tmp_path, CONFIGS["llama"])
    with caplog.at_level(logging.DEBUG, "qdora"):
        assert load(directory).config._attn_implementation == "sdpa"
    assert "sdpa" in caplog.text
    assert load(directory, attention="eager").config._attn_implementation == "eager"


NEEDS_MORE_THAN_SDPA = {
    "a soft-cap": (CONFIGS["gemma2"], Gemma2PreTrainedModel, r"soft-caps its scores \(attn_logit_softcapping 2\)"),
    "sinks": (
        GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
        GptOssPreTrainedModel,
        r"has sinks \(model\.layers\.0\.self_attn\.sinks\)",
    ),
}


@pytest.mark.parametrize("need", NEEDS_MORE_THAN_SDPA)
def test_attention_is_chosen_by_what_the_model_needs(
    need: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers 5.0 to 5.18 say that Gemma 2 can have sdpa, which drops its soft-cap; later ones do not."""
    config, family, what = NEEDS_MORE_THAN_SDPA[need]

    def build(choice: str | None) -> PreTrainedModel:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=choice)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
        return model.eval()

    eager = build("eager")
    monkeypatch.setattr(family, "_supports_sdpa", True)
    given = {"name": "it", "device": torch.device("cpu"), "dtype": torch.float32}
    with caplog.at_level(logging.INFO, "qdora"):
        model = with_attention(build, config, "auto", **given)
    assert re.search(rf"Attention of it: eager, since its attention {what}, which sdpa does not compute", caplog.text)
    assert torch.equal(logits(model), logits(eager))
    with pytest.raises(UserError, match=rf"model\.attention: got sdpa, but .* {what}.* must be auto or eager"):
        with_attention(build, config, "sdpa", **given)


def built_except(config: PreTrainedConfig, *choices: str | None) -> Callable[[str | None], PreTrainedModel]:
    """Builds a model, and fails as on a damaged config for some kinds of attention."""

    def build(choice: str | None) -> PreTrainedModel:
        if choice in choices:
            raise KeyError("hidden_act")
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    return build


ON_GPU = {"name": "it", "device": torch.device("cuda"), "dtype": torch.bfloat16}


def flash_attention_installed(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Beside a GPU of this compute capability."""
    monkeypatch.setattr("qdora.model.attention.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)


@pytest.mark.parametrize(
    ("capability", "takes_flash"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)]
)
def test_auto_takes_flash_attention_only_on_gpus_that_have_its_kernels(monkeypatch, capability, takes_flash):
    flash_attention_installed(monkeypatch, capability)
    tried: list[str | None] = []

    def build(choice: str | None) -> PreTrainedModel:
        tried.append(choice)
        return AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.bfloat16)

    with_attention(build, CONFIGS["llama"], "auto", **ON_GPU)
    assert tried == ["flash_attention_2" if takes_flash else None]


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.float32, "needs a GPU of compute capability 8.0 or more, and this one has 7.5"),
        ((8, 0), torch.float32, r"has no kernels for float32 \(model.dtype\)"),
    ],
)
def test_flash_attention_that_cannot_run_is_refused(monkeypatch, capability, dtype, reason):
    flash_attention_installed(monkeypatch, capability)

    def build(choice: str | None) -> PreTrainedModel:
        raise AssertionError("nothing is built")

    with pytest.raises(UserError, match=rf"^model\.attention: got flash_attention_2, which {reason}; must be auto, "):
        with_attention(build, CONFIGS["llama"], "flash_attention_2", **{**ON_GPU, "dtype": dtype})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
            "has a class of its own for each attention",
        ),
        (
            FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True),
            "has a class of its own for each attention",
        ),
        (LlamaConfig(**SMALL | {"head_dim": 320}), "has heads of 320 features, more than the 256 of flash-attn"),
    ],
)
def test_flash_attention_is_not_taken_where_it_fails_or_computes_something_else(
    config: PreTrainedConfig, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flash_attention_installed(monkeypatch, (8, 0))
    tried: list[str | None] = []

    def build(choice: str | None) -> PreTrainedModel:
        tried.append(choice)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # flash-attn is not installed here

    with caplog.at_level(logging.INFO, "qdora"):
        with_attention(build, config, "auto", **ON_GPU)
    assert tried == ["flash_attention_2", None]
    assert f"it is not run with flash_attention_2: it {reason}." in caplog.text
    with pytest.raises(UserError, match=rf"got flash_attention_2, but it {reason}; must be auto or eager\.$"):
        with_attention(build, config, "flash_attention_2", **ON_GPU)


def test_a_model_that_cannot_be_built_is_not_said_to_lack_an_attention(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flash_attention_installed(monkeypatch, (8, 0))
    config = CONFIGS["llama"]
    with caplog.at_level(logging.INFO, "qdora"):
        with pytest.raises(UserError, match=r"^model: it: cannot be built: 'hidden_act'$"):
            with_attention(built_except(config, "flash_attention_2", None), config, "auto", **ON_GPU)
        assert caplog.text == ""
        with_attention(built_except(config, "flash_attention_2"), config, "auto", **ON_GPU)
        assert "it has no flash_attention_2 ('hidden_act')." in caplog.text


def test_a_model_that_cannot_be_built_with_the_attention_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    config, family, _ = NEEDS_MORE_THAN_SDPA["sinks"]
    monkeypatch.setattr(family, "_supports_sdpa", True)
    with pytest.raises(UserError, match=r"^model: it: cannot be built: 'hidden_act'$"):
        with_attention(built_except(config, "eager"), config, "auto", **ON_GPU)


def test_gemma2_is_loaded_with_eager_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    directory = checkpoint(tmp_path, CONFIGS["gemma2"])
    assert load(directory).config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"model\.attention: got sdpa, but the attention of .* soft-caps its scores"):
        load(directory, attention="sdpa")


def test_gemma2_without_a_soft_cap_may_have_sdpa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Gemma2Config(**SMALL, attn_logit_softcapping=None)
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    assert load(checkpoint(tmp_path, config)).config._attn_implementation == "sdpa"


def test_eager_computes_the_soft_cap(tmp_path: Path) -> None:
    """Against the formula in float64: one layer's attention with large scores."""
    model = load(checkpoint(tmp_path, CONFIGS["gemma2"]), compute_dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1].self_attn
    with torch.no_grad():
        layer.q_proj.weight.mul_(16)
    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, out: seen.update(x=kwargs["hidden_states"], out=out[0]), with_kwargs=True
        ),
        model.model.rotary_emb.register_forward_hook(lambda _, args, out: seen.update(cos=out[0], sin=out[1])),
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    arrays = {name: value.numpy() for name, value in seen.items()}
    weights = [getattr(layer, f"{name}_proj").weight.detach().numpy() for name in "qkvo"]
    given = (arrays["x"], *weights, arrays["cos"], arrays["sin"])
    capped, free = (reference.soft_capped_attention(*given, head_dim=16, scale=16**-0.5, cap=cap) for cap in (2.0, 1e9))
    # transformers takes this softmax in float32.
    np.testing.assert_allclose(arrays["out"], capped, rtol=0, atol=1e-6)
    assert np.abs(capped - free).max() > 0.1


# --- checkpoints that do not fit


def test_missing_unexpected_and_misshapen_tensors_are_gathered(tmp_path: Path) -> None:
    file, tensors = one_file(tmp_path)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.upp_proj.weight"] = torch.zeros(96, 64)
    tensors["lm_head.weight"] = torch.zeros(98, 64)
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    assert "no tensor 'model.layers.0.mlp.up_proj.weight'. Did you mean 'model.layers.0.mlp.upp_proj.weight'?" in text
    assert "no tensor 'model.norm.weight'" in text
    assert "'model.layers.0.mlp.upp_proj.weight' has no place in the model" in text
    assert "'lm_head.weight' has shape [98, 64], config.json asks for [97, 64]" in text


def test_a_weight_of_integers_is_one_line(tmp_path: Path) -> None:
    file, tensors = one_file(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert caught.value.faults == (f"model.source: tensor '{name}' has dtype I32, must be of floating point.",)


def test_rotary_buffers_and_a_repeated_head_are_tolerated(tmp_path: Path) -> None:
    file, tensors = one_file(tmp_path, CONFIGS["qwen2"])
    assert "lm_head.weight" not in tensors
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_differs_from_its_embedding_is_untied(tmp_path: Path) -> None:
    file, tensors = one_file(tmp_path, CONFIGS["qwen2"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    model = load(tmp_path)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.lm_head.weight, 2 * model.model.embed_tokens.weight)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)))


def test_only_the_head_of_a_tied_pair_is_stored(tmp_path: Path) -> None:
    file, tensors = one_file(tmp_path, CONFIGS["qwen2"])
    reference = logits(load(tmp_path))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), reference)


def test_names_of_a_checkpoint_without_the_model_prefix(tmp_path: Path) -> None:
    file, tensors = one_file(tmp_path, CONFIGS["qwen2"])
    reference = logits(load(tmp_path))
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, file)
    assert torch.equal(logits(load(tmp_path)), reference)


def test_config_that_transformers_does_not_know(tmp_path: Path) -> None:
    checkpoint(tmp_path, CONFIGS["llama"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(UserError, match="its config cannot be used"):
        load(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000, must be at most 1000"),
        ({"vocab_size": 10**13}, "cannot be built: .*can't allocate memory"),
        ({"num_key_value_heads": -1}, "cannot be built: "),
        ({"num_attention_heads": 0}, "(cannot be built|config cannot be used): "),
        (
            {"head_dim": "x"},
            "config cannot be used: Validation error for field 'head_dim': TypeError: Field ",
        ),
        ({"hidden_act": "none"}, "cannot be built: "),
        ({"dtype": "x" * 1000}, "config cannot be used: module 'torch' has no attribute 'xxx"),
    ],
)
def test_a_config_with_values_that_no_model_has_is_one_line(tmp_path: Path, damage: dict[str, Any], fault: str) -> None:
    checkpoint(tmp_path, CONFIGS["llama"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | damage))
    with pytest.raises(UserError, match=fault) as raised:
        load(tmp_path)
    assert len(str(raised.value)) < 500 + len(str(tmp_path))


def test_the_output_head_stays_dense_whatever_its_name(tmp_path: Path) -> None:
    config = GPTNeoXJapaneseConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_multiple_size=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = load(checkpoint(tmp_path, config), quant="nf4")
    assert {name.rpartition(".")[2] for name in frozen_layers(model)} == {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }


def test_buffers_keep_the_dtype_the_model_gave_them() -> None:
    module = torch.nn.BatchNorm1d(4)
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    place_dense(module, "running_mean", value, torch.device("cpu"), torch.bfloat16)
    place_dense(module, "weight", value, torch.device("cpu"), torch.bfloat16)
    assert module.running_mean.dtype == torch.float32
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.running_mean, value.float())


def test_generation_settings_come_along(tmp_path: Path) -> None:
    checkpoint(tmp_path, CONFIGS["llama"])
    GenerationConfig(do_sample=True, temperature=0.25).save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.temperature == 0.25


def test_the_chosen_dtype_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    build_model._tell.cache_clear()
    with caplog.at_level("INFO", "qdora"):
        for dtype in ("auto", "auto", "float32"):
            build_model.choose_compute(dtype)
    assert ["Computing on" in record.getMessage() for record in caplog.records] == [True]
