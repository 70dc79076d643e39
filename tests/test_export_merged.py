"""The merged export: exact values from a model or from files, whole directories only, and a check that can fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig, Qwen2Config

from qdora.errors import RunFailure, UserError
from qdora.export import verify as checks
from qdora.export.checkpoints import export_merged, no_original
from qdora.export.verify import (
    ComparisonText,
    float32_arithmetic,
    logit_differences,
    summary,
    verdict,
    verify_merged,
)
from qdora.files.atomic import atomic_directory
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.inject import adapted_layers, inject
from qdora.model.load import load_model
from qdora.model.source import resolve
from tests import reference, support
from tests.adapter_numbers import expected_weight
from tests.support import CHECKPOINT_SIZES, checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def stored(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def reload(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def export_aside(model: Any, directory: Path, **options: Any) -> dict[str, Any]:
    with atomic_directory(directory) as aside:
        return export_merged(model, None, aside, **options)


def assert_reloads(directory: Path, model: Any) -> None:
    expected = support.logits_of(model)
    torch.testing.assert_close(support.logits_of(reload(directory)), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("architecture", "quant", "kind", "compute"),
    [
        ("qwen2", None, "dora", torch.float32),
        ("qwen2", "nf4", "lora", torch.bfloat16),
        ("llama", "int8", "dora", torch.bfloat16),
        ("gemma2", "nf4", "dora", torch.float32),
    ],
)
def test_merged_weights_are_the_float64_formula_rounded_once(tmp_path, architecture, quant, kind, compute, dtype):
    model = support.adapted_model(architecture, quant=quant, kind=kind, dtype=compute)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = export_merged(model, None, tmp_path / "out", dtype=dtype)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    tensors, layers = stored(tmp_path / "out"), adapted_layers(model)
    assert len(layers) == result["num_merged_layers"] == 14
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    for path, layer in layers.items():
        expected = expected_weight(layer)
        found = tensors[f"{path}.weight"].double().numpy()
        # half a step of the dtype, and what the float32 merge may be off by before the cast
        allowed = ROUNDING[dtype] * np.abs(expected) + 1e-6 * np.abs(expected).max() + 2.0**-25
        assert (np.abs(found - expected) <= allowed).all(), path
    check = verify(model, tmp_path / "out")
    assert check["passed"], check["faults"]
    assert (check["num_positions"], check["weights"]["num_layers"]) == (14, 14)
    assert json.loads(json.dumps(check)) == check
    assert (check["reference_vs_running"]["max_logit_difference"] == 0.0) == (compute == torch.float32)
    assert check["exported_vs_reference"]["argmax_agreement"] > 0.9
    merged = reload(tmp_path / "out")
    assert merged.config.tie_word_embeddings == (architecture != "qwen2")
    if compute == dtype == torch.float32:
        assert_reloads(tmp_path / "out", model)


def test_what_training_keeps_in_float32_stays_so(tmp_path):
    """Experts are chosen by differences between biases that bf16 cannot hold."""
    model = support.mixture("deepseek_v3", torch.bfloat16)
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    assert biases
    for bias in biases.values():
        bias.data = 7.0 + torch.randn(bias.shape) * 2e-3
    support.move_adapters_(inject(model, rank=2, alpha=4.0, targets=["o_proj"]))
    export_merged(model, None, tmp_path / "out", dtype=torch.bfloat16)
    tensors = stored(tmp_path / "out")
    for name, bias in biases.items():
        assert tensors[name].dtype == torch.float32
        assert torch.equal(tensors[name], bias)
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_shards_index_config_and_tokenizer(tmp_path):
    model = support.adapted_model("llama", quant="nf4")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    # as the publisher has it and save_pretrained refuses it: a temperature without sampling
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    steps: list[tuple[int, int]] = []
    options: dict[str, Any] = {"max_shard_bytes": 20_000}
    options["progress"] = lambda done, total: steps.append((done, total))
    out = tmp_path / "out"
    result = export_merged(model, support.tokenizer(), out, **options)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == list(result["files"])
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    tensors, held = stored(out), {file: load_file(out / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert all(sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1 for tensors in held.values())
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    assert index["metadata"] == {"total_parameters": num_parameters, "total_size": 2 * num_parameters}
    assert result["num_bytes"] == 2 * num_parameters == steps[-1][0] == steps[-1][1]
    assert result["num_tensors"] == len(tensors) == len(steps)
    assert "lm_head.weight" not in tensors  # tied, written once
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000  # where older readers look
    assert model.config.quantization_config["load_in_4bit"]
    assert (config["dtype"], config["architectures"]) == ("float16", ["LlamaForCausalLM"])
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5
    assert AutoTokenizer.from_pretrained(str(out)).chat_template == support.CHATML
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("named", "expected"), [(0, [0, 3]), ([0, 3], [0, 3]), (3, 3), (None, 3)])
def test_an_export_stops_where_its_run_stops(tmp_path, named, expected):
    """The tokenizer may be of another model, with another end."""
    model, tokenizer = support.adapted_model("llama"), support.tokenizer(eos="<|im_end|>")
    assert tokenizer.eos_token_id == 3
    model.generation_config.eos_token_id = named
    export_merged(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == expected
    assert model.generation_config.eos_token_id == named


def test_weights_outside_float16_are_named_and_nothing_is_left(tmp_path):
    model, other = support.adapted_model(quant="nf4"), support.adapted_model(quant="nf4")
    model.model.norm.weight.data[:2] = torch.tensor([-65504.0, 1e-9])
    export_merged(model, None, tmp_path / "largest")
    assert stored(tmp_path / "largest")[NORM][0] == -65504.0
    adapted_layers(model)["model.layers.1.mlp.up_proj"].magnitude.data[4] = 4e5
    other.model.norm.weight.data[0] = 65505.0
    with pytest.raises(UserError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: largest \|w\| is "):
        export_aside(model, tmp_path / "out")
    with pytest.raises(UserError, match=r"^model\.norm\.weight: largest \|w\| is 65505, must be at most 65504 in"):
        export_aside(other, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["largest"]
    export_merged(model, None, tmp_path / "out", dtype=torch.bfloat16)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_is_a_failure_in_every_dtype(tmp_path, value):
    model = support.adapted_model()
    adapted_layers(model)["model.layers.0.mlp.gate_proj"].lora_B.data[3, 1] = value
    with pytest.raises(RunFailure, match=r"gate_proj.weight: 32 of 1536 values are NaN or infinite"):
        export_aside(model, tmp_path / "out", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_aside(support.adapted_model(), tmp_path / "out", max_shard_bytes=20_000, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


CONFIGS = {
    "llama": LlamaConfig(**CHECKPOINT_SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**CHECKPOINT_SIZES, tie_word_embeddings=False),
}


def prepare(folder: Path, config: str = "qwen2", *, targets: Any = "all-linear", quant: str = "nf4") -> Any:
    """A checkpoint in bf16, an adapter on it, and a function that loads both on a base of some form."""
    checkpoint(folder / "base", CONFIGS[config], dtype=torch.bfloat16)

    def load(quant: str = quant) -> Any:
        model = load_model(resolve(str(folder / "base")), quant=quant, compute_dtype=torch.float32)
        load_adapter(model, folder / "adapter")
        return model

    model = load_model(resolve(str(folder / "base")), quant=quant, compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    support.move_adapters_(inject(model, rank=3, alpha=6.0, targets=targets, generator=generator))
    save_adapter(model, folder / "adapter", base_name_or_path="base", revision=None, base_quant={"quant": quant})
    return load


@pytest.mark.parametrize(
    ("config", "quant", "targets"),
    [
        ("qwen2", "nf4", "all-linear"),
        ("llama", "int8", "all-linear"),
        ("qwen2", "none", "all-linear"),
        ("llama", "nf4", ["lm_head", "q_proj"]),
    ],
)
def test_an_adapted_head_is_untied(tmp_path, config, quant, targets):
    model, num_layers = prepare(tmp_path, config, quant=quant, targets=targets)(), 14 if targets == "all-linear" else 3
    result = export_merged(model, None, tmp_path / "out", max_shard_bytes=30_000)
    assert result["num_merged_layers"] == num_layers
    is_tied = json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    assert is_tied == (config == "llama" and num_layers != 3)


def test_the_original_base_takes_the_norm_anew(tmp_path):
    load = prepare(tmp_path)
    export_merged(load("none"), None, tmp_path / "out", dtype=torch.float32)
    found, source, layers = stored(tmp_path / "out"), stored(tmp_path / "base"), adapted_layers(load())
    for path, layer in layers.items():
        weight, *parts = (
            each.detach().double().numpy()
            for each in (source[f"{path}.weight"], layer.lora_A, layer.lora_B, layer.magnitude)
        )
        expected = reference.merged_weight(weight, *parts[:2], 2.0, parts[2])
        error = np.abs(found[f"{path}.weight"].double().numpy() - expected).max()
        assert error < 1e-6 * np.abs(expected).max()
    for name in source.keys() - {f"{path}.weight" for path in layers}:
        assert torch.equal(found[name], source[name].float())


def test_requantised_is_what_bitsandbytes_loads(tmp_path):
    model = prepare(tmp_path, targets=["q_proj", "down_proj"])()
    options: dict[str, Any] = {"dtype": torch.float32, "max_shard_bytes": 30_000}
    result = export_merged(model, None, tmp_path / "out", requantize=True, **options)
    export_merged(model, None, tmp_path / "one-file", dtype=torch.float16, requantize=True)
    assert len(result["files"]) > 2
    loaded, half = (AutoModelForCausalLM.from_pretrained(str(tmp_path / name)) for name in ("out", "one-file"))
    again = load_model(resolve(str(tmp_path / "out")), quant="nf4", compute_dtype=torch.float32)
    for path, layer in adapted_layers(model).items():
        state = loaded.get_submodule(path).weight.quant_state
        assert (state.nested, state.blocksize, state.quant_type, state.dtype) == (True, 64, "nf4", torch.float32)
        merged = layer.merged_weight()
        error = float((again.get_submodule(path).dequantized() - merged).norm() / merged.norm())
        assert 0.05 < error < 0.13  # NF4 on Gaussian weights: 0.09
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"):  # adapted, and not
        assert half.get_submodule(path).weight.quant_state.dtype == torch.float16  # of the export
    base = load_model(resolve(str(tmp_path / "base")), quant="nf4", compute_dtype=torch.float32)
    kept, one = stored(tmp_path / "out"), stored(tmp_path / "one-file")
    assert torch.equal(kept[UP].reshape(-1), base.model.layers[0].mlp.up_proj.packed)
    assert all(torch.equal(kept[name], one[name]) for name in kept if name.endswith("proj.weight"))


def test_bases_without_16_bit_weights(tmp_path):
    recipe, unquantised = (support.tiny_recipe(tmp_path, base__quant=quant) for quant in ("nf4", "none"))
    export_merged(prepare(tmp_path)(), None, tmp_path / "packed", requantize=True)
    dense, packed = resolve(str(tmp_path / "base")), resolve(str(tmp_path / "packed"))
    assert no_original(recipe, dense) == ""
    assert no_original(unquantised, dense) == "the base was not quantised in training"
    assert "stored in nf4 and has no 16-bit weights" in no_original(recipe, packed)
    assert "is a GGUF file, not the 16-bit model" in no_original(recipe, replace(dense, kind="gguf"))


@pytest.fixture
def running() -> Any:
    return support.adapted_model("llama", quant="nf4", dtype=torch.bfloat16)


def verify(model: Any, directory: Path) -> dict[str, Any]:
    return verify_merged(model, directory, ComparisonText([support.LM_IDS[0].tolist(), [5, 6, 7]]))


def damage(directory: Path, name: str, change: Callable[[Tensor], Tensor] | None) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop(name)
    save_file(tensors if change is None else tensors | {name: change(tensor)}, file, metadata={"format": "pt"})


def test_a_model_larger_than_memory_is_compared_from_the_disk_or_by_its_weights(tmp_path, running, monkeypatch, caplog):
    def full(_model: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.96 GiB")

    export_merged(running, None, tmp_path / "out", max_shard_bytes=20_000)
    expected = verify(running, tmp_path / "out")
    assert expected["passed"]
    monkeypatch.setattr(checks, "available_memory_bytes", lambda: 70_000)
    assert verify(running, tmp_path / "out") == expected
    monkeypatch.undo()
    export_merged(running, None, tmp_path / "one-file")
    monkeypatch.setattr(checks, "float32_arithmetic", full)
    found = verify(running, tmp_path / "one-file")
    assert (found["passed"], found["num_positions"], found["weights"]["num_layers"]) == (True, 0, 14)
    assert "their logits are not compared" in caplog.text
    damage(tmp_path / "one-file", UP, lambda weight: 1.005 * weight)
    assert not verify(running, tmp_path / "one-file")["passed"]


def test_kl_by_hand():
    pair = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]]), torch.tensor([[math.log(3.0), 0.0], [1.0, 1.0]])
    found = summary(logit_differences(*pair))
    # P = (1/4, 3/4), Q = (3/4, 1/4): KL = 1/4 log(1/3) + 3/4 log 3 = 1/2 log 3
    assert found["kl_max"] == pytest.approx(0.5 * math.log(3.0))
    assert found["kl_mean"] == pytest.approx(0.25 * math.log(3.0))
    assert found["max_logit_difference"] == pytest.approx(math.log(3.0))
    assert found["mean_logit_difference"] == pytest.approx(0.5 * math.log(3.0))
    assert found["argmax_agreement"] == 0.5
    rows = logit_differences(torch.tensor([[math.nan, 0.0], [1.0, 1.0]]), torch.zeros(2, 2))
    assert math.isnan(summary(rows)["max_logit_difference"])


V_PROJ = "model.layers.1.self_attn.v_proj.weight"
LOGITS = "the logits of the export differ from those of the trained model by "


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        (V_PROJ, lambda each: each.index_copy(0, torch.tensor([2]), 1.005 * each[2:3]), "the weight of "),
        (V_PROJ, lambda each: each * math.nan, "the weight of "),
        ("model.embed_tokens.weight", lambda each: each * 1.1, LOGITS),
        (NORM, lambda each: each * 1.1, LOGITS),
        (UP, None, f"missing keys on reloading: {UP}"),
    ],
)
def test_a_wrong_tensor_fails(tmp_path, running, name, change, fault):
    export_merged(running, None, tmp_path / "out")
    damage(tmp_path / "out", name, change)
    found = verify(running, tmp_path / "out")
    assert any(each.startswith(fault) for each in found["faults"]), found["faults"]
    assert not found["passed"]
    if name == V_PROJ:
        assert found["weights"]["worst_layer"] == V_PROJ.removesuffix(".weight")
    elif fault == LOGITS:
        assert found["weights"]["max_error"] <= 1.0


def test_another_tokenizer_fails(tmp_path, running):
    export_merged(running, support.tokenizer(), tmp_path / "out")
    more = support.tokenizer()
    more.add_tokens(["<tool>"])  # the text has none
    others = "the reloaded tokenizer has other added tokens or another chat template"
    for tokenizer, faults in (
        (support.tokenizer(), []),
        (support.tokenizer(bos=True), ["the reloaded tokenizer gives other ids"]),
        (support.tokenizer(chat_template=None), [others]),
        (more, [others]),
    ):
        text = "the brown cow"
        given = ComparisonText([tokenizer(text)["input_ids"]], [text], tokenizer)
        assert verify_merged(running, tmp_path / "out", given)["faults"] == faults


def test_what_cannot_be_verified_is_refused(tmp_path, running):
    out, index = tmp_path / "out", tmp_path / "out/model.safetensors.index.json"
    export_merged(running, None, out, max_shard_bytes=20_000)
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    with pytest.raises(UserError, match=r"'\.\./model-00002-.*' is not a .safetensors file"):
        verify(running, out)


# --- the verdict: what the running model's own error at a position explains, and what it does not


def judged(
    error: float, noise: float, *, stored: Any = torch.float16, running: Any = torch.bfloat16, at: int = 4
) -> dict[str, Any]:
    """An export off by 0.003 everywhere and a running model off by 0.2, but for one position and one token of it."""
    generator = torch.Generator().manual_seed(1)
    logits = 3.0 * torch.randn(12, 50, generator=generator, dtype=torch.float64)
    exported, in_use = logits + 0.003, logits + (0.0 if running == torch.float32 else 0.2)
    exported[at, 7] = logits[at, 7] + error
    in_use[at, 7] = logits[at, 7] + noise
    total = {"exported_vs_reference": logit_differences(logits, exported), "spread": torch.full((12,), 3.0)}
    total["reference_vs_running"] = logit_differences(in_use, logits)
    total["exported_vs_running"] = logit_differences(in_use, exported)
    return verdict(total, [], stored, running)


@pytest.mark.parametrize(
    "error, noise, dtypes, num_explained, refused",
    [
        (-2.9, -30.0, {}, 1, False),  # a position that bfloat16 itself gets wrong
        (0.003, 0.2, {}, 0, False),
        (-2.9, 0.2, {}, 0, True),  # one wrong position in a model that is right everywhere
        (-2.9, 10.0, {}, 0, True),  # bfloat16 is off by 10: float16 has 8 times as many steps, twice 1.25 is allowed
        (-2.9, 0.0, {"running": torch.float32}, 0, True),  # no error of its own: nothing is explained
        (-2.9, -30.0, {"stored": torch.float32}, 0, True),  # float32 rounds 65,536 times less than bfloat16
        (math.nan, 30.0, {}, 0, True),
        (-2.9, math.nan, {}, 0, True),
    ],
)
def test_only_what_the_running_model_itself_gets_wrong_is_explained(error, noise, dtypes, num_explained, refused):
    found = judged(error, noise, **dtypes)
    assert (found["passed"], found["ill_conditioned"]) == (not refused, num_explained), found["faults"]
    assert any("by up to" in fault and fault.endswith("most at position 4") for fault in found["faults"]) == refused
    assert math.isnan(error) or error == 0.003 or found["tolerance"]["max_logit_difference"] < 2.9


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_float32_arithmetic_is_exact_and_undone(quant):
    running = support.adapted_model("qwen2", quant=quant, dtype=torch.bfloat16).train()
    running.model.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in running.state_dict().items()}
    wide = support.adapted_model("qwen2", quant=quant)
    values = dict(running.named_parameters())
    for name, parameter in wide.named_parameters():
        parameter.data = values[name].data.to(parameter.dtype)
    narrow = adapted_layers(running)
    for path, layer in adapted_layers(wide).items():
        layer.base.load_state_dict(narrow[path].base.state_dict())
        layer.base_squared.copy_(narrow[path].base_squared)
    with float32_arithmetic(running):
        assert torch.equal(support.logits_of(running), support.logits_of(wide))
        assert running.model.scale.dtype == torch.float32
    assert support.logits_of(running).dtype == torch.bfloat16
    assert before == {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in running.state_dict().items()}
    assert running.training


@pytest.mark.parametrize(("softcap", "expected"), [(None, "sdpa"), (30.0, "eager")])
def test_float32_arithmetic_takes_an_attention_that_the_model_has(softcap, expected, monkeypatch):
    """flash kernels have no float32, and sdpa has no soft-cap: releases of transformers refuse it or drop the cap."""
    config = Gemma2Config(**support.LM_SIZES, head_dim=8, attn_logit_softcapping=softcap)
    model, asked = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), list[str]()
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(model, "set_attn_implementation", asked.append)
    with float32_arithmetic(model):
        pass
    assert asked == [expected]
