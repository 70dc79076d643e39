"""The 4-bit export: the gain in the block scales and plain LoRA, run by programs that know nothing of DoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from qdora.errors import UserError
from qdora.export import verify
from qdora.export.checkpoints import export_nf4_lora
from qdora.export.verify import ComparisonText, float32_arithmetic, verify_packed
from qdora.model.build_model import find_source
from qdora.model.inject import adapted_layers, inject
from qdora.recipe.recipe_file import recipe_from
from qdora.run.load_run import load_target
from tests import reference_quant, support
from tests.adapter_numbers import expected_weight

# Rows of whole blocks of 64.
SIZES = support.LM_SIZES | {"hidden_size": 64, "intermediate_size": 128}
TEXT = ComparisonText([support.LM_IDS[0].tolist(), [5, 6, 7]])
BASE, ADAPTER = "model.safetensors", "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.LM_CONFIGS, "llama", lambda: LlamaConfig(**SIZES, tie_word_embeddings=True))
    monkeypatch.setitem(support.LM_CONFIGS, "qwen2", lambda: Qwen2Config(**SIZES, tie_word_embeddings=False))


def with_peft(directory: Path) -> Any:
    """As the README tells a stranger to load it, in float32."""
    base = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, attn_implementation="eager")
    assert sum(type(module).__name__ == "Linear4bit" for module in base.modules()) == 14
    return peft.PeftModel.from_pretrained(support.in_float32(base), str(directory / "adapter")).eval()


def adapted_head(architecture: str, **options: Any) -> Any:
    model = support.base_model(architecture, quant="nf4", **options)
    support.move_adapters_(inject(model, targets=["lm_head", "q_proj"], rank=3, alpha=6.0))
    return model


@pytest.mark.parametrize(
    ("architecture", "kind", "dtype"),
    [
        ("llama", "dora", torch.float32),
        ("qwen2", "lora", torch.float32),
        ("llama", "lora", torch.bfloat16),
        ("qwen2", "dora", torch.bfloat16),
    ],
)
def test_transformers_bitsandbytes_and_peft_give_the_running_logits(tmp_path, architecture, kind, dtype):
    model = support.adapted_model(architecture, quant="nf4", kind=kind, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = export_nf4_lora(model, None, tmp_path / "out")
    assert result["num_adapted_layers"] == 14
    assert result["num_folded_layers"] == (14 if kind == "dora" else 0)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["use_dora"] is False
    with float32_arithmetic(model):
        expected = support.logits_of(model)
        bare = support.logits_of(support.base_model(architecture, quant="nf4"))
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(support.logits_of(with_peft(tmp_path / "out")), expected, rtol=1e-5, atol=5e-6)
    found = verify_packed(model, tmp_path / "out", TEXT)
    assert found["passed"], found["faults"]
    assert found["weights"]["num_layers"] == 14
    assert found["exported_vs_reference"]["max_logit_difference"] < 1e-5
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_the_files_are_the_float64_formula(tmp_path, quant):
    model = support.adapted_model(quant=quant)
    layers = adapted_layers(model)
    layers["model.layers.0.mlp.up_proj"].magnitude.data[2] = 0.0
    export_nf4_lora(model, None, tmp_path / "out")
    base, adapter = load_file(tmp_path / "out" / BASE), load_file(tmp_path / "out" / ADAPTER)
    assert not [name for name in (*base, *adapter) if "nested" in name or "magnitude" in name]
    for path, layer in layers.items():
        packed = layer.base.stored_weight
        codes = base[f"{path}.weight"].reshape(-1)
        assert torch.equal(codes, packed.packed)
        assert base[f"{path}.weight.absmax"].dtype == torch.float32
        nibbles = np.stack([codes.numpy() >> 4, codes.numpy() & 15], axis=1).reshape(-1, 64)
        values = np.array(reference_quant.VALUES[quant], dtype=np.float64)[nibbles]
        weight = (values * base[f"{path}.weight.absmax"].double().numpy()[:, None]).reshape(packed.shape)
        a, b = (adapter[f"base_model.model.{path}.lora_{name}.weight"].double().numpy() for name in "AB")
        expected = expected_weight(layer)
        assert np.abs(weight + 2.0 * b @ a - expected).max() < 1e-6 * np.abs(expected).max()
    assert "model.embed_tokens.weight" in base


def test_files_config_and_tokenizer(tmp_path):
    model, out = support.base_model("llama", quant="nf4", dtype=torch.bfloat16), tmp_path / "out"
    support.move_adapters_(inject(model, rank=3, alpha=6.0, rank_pattern={"q_proj": 2}, targets=["q_proj", "v_proj"]))
    export_nf4_lora(model, support.tokenizer(), out, max_shard_bytes=20_000)
    config = json.loads((out / "config.json").read_text())
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    settings |= {"bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"]}
    assert config["quantization_config"] | settings == config["quantization_config"]
    assert config["dtype"] == "bfloat16"
    assert len(list(out.glob("*.safetensors"))) > 2
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert {adapter["r"], *adapter["rank_pattern"].values()} == {2, 3}
    # as deployed, in bfloat16: the block scales stay float32
    base = AutoModelForCausalLM.from_pretrained(str(out), dtype="auto")
    assert base.dtype == torch.bfloat16
    assert base.model.layers[0].mlp.up_proj.weight.quant_state.absmax.dtype == torch.float32


def test_an_adapted_head_in_float32_and_an_export_in_a_narrower_dtype_than_the_models(tmp_path):
    """A CPU without bfloat16 runs in float32; then embeddings, norms and head lose digits in a bfloat16 export."""
    model = adapted_head("llama")
    export_nf4_lora(model, None, tmp_path / "head")
    assert json.loads((tmp_path / "head" / "config.json").read_text())["tie_word_embeddings"] is False
    found = support.logits_of(with_peft(tmp_path / "head"))
    torch.testing.assert_close(found, support.logits_of(model), rtol=1e-5, atol=5e-6)
    model = support.adapted_model("llama", quant="nf4")
    export_nf4_lora(model, None, tmp_path / "out", dtype=torch.bfloat16)
    check = verify_packed(model, tmp_path / "out", TEXT)
    assert check["passed"], check["faults"]
    assert check["exported_vs_reference"]["max_logit_difference"] > 1e-4
    assert check["dtype"] == "bfloat16"


def test_what_it_cannot_hold_is_refused_with_the_format_to_use_instead(tmp_path, monkeypatch):
    crossing = LlamaConfig(**SIZES | {"intermediate_size": 96}, tie_word_embeddings=True)
    monkeypatch.setitem(support.LM_CONFIGS, "gemma2", lambda: crossing)
    no_multiple = r"layers\.0\.mlp\.down_proj: in_features 96 is no multiple of the block size 64"
    for model, num_faults, words in (
        (support.base_model(quant="nf4"), 1, "no LoRA or DoRA adapter"),
        (support.adapted_model(quant="int8"), 1, r"the base must be in nf4 or fp4 \(got int8"),
        (support.adapted_model(), 1, r"\(got full precision\)"),
        (adapted_head("qwen2", dtype=torch.bfloat16), 1, "lm_head is a DoRA layer on a dense weight"),
        (support.adapted_model("gemma2", quant="nf4"), 2, no_multiple),
    ):
        with pytest.raises(UserError, match=words) as raised:
            export_nf4_lora(model, None, tmp_path / "out")
        assert ["--format merged" in fault for fault in raised.value.faults] == [True] * num_faults
    assert not (tmp_path / "out").exists()


PLACE = "model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize("has_room", [True, False])
def test_wrong_files_fail_beside_the_model_and_where_there_is_no_room_for_logits(tmp_path, monkeypatch, has_room):
    model, out = support.adapted_model("llama", quant="nf4", dtype=torch.bfloat16), tmp_path / "out"
    export_nf4_lora(model, None, out)
    needed = (out / BASE).stat().st_size
    monkeypatch.setattr(verify, "available_memory_bytes", lambda: 10 * needed if has_room else needed)
    found = verify_packed(model, out, TEXT)
    assert found["passed"], found["faults"]
    assert ("exported_vs_reference" in found) == has_room
    assert (found["num_positions"], found["weights"]["num_layers"]) == (14 if has_room else 0, 14)
    lora, rounding = f"base_model.model.{PLACE}.lora_", "times the rounding error"
    cases: list[tuple[str, str, Any, str]] = [
        (BASE, f"{PLACE}.weight.absmax", lambda each: each * 1.005, rounding),
        (ADAPTER, f"{lora}B.weight", lambda each: each * 1.005, rounding),
        (BASE, "model.norm.weight", None, "model.norm.weight"),
        (ADAPTER, f"{lora}B.weight", None, f"{PLACE}.lora_B"),
        (ADAPTER, f"{lora}C.weight", lambda _: torch.ones(3), f"{lora}C.weight"),
    ]
    for file, name, change, words in cases:
        tensors = load_file(out / file)
        wrong = {key: each for key, each in tensors.items() if key != name}
        wrong |= {} if change is None else {name: change(tensors.get(name))}
        save_file(wrong, out / file, metadata={"format": "pt"})
        found = verify_packed(model, out, TEXT)
        save_file(tensors, out / file, metadata={"format": "pt"})
        assert not found["passed"]
        assert any(words in fault for fault in found["faults"]), found["faults"]
        assert words != rounding or found["weights"]["worst_layer"] == PLACE


def test_its_adapter_is_not_left_out(tmp_path, monkeypatch):
    model, commit = support.adapted_model("llama", quant="nf4"), "a" * 40
    export_nf4_lora(model, support.tokenizer(), tmp_path / commit)
    monkeypatch.setattr("qdora.model.source.snapshot_download", lambda *_, **__: str(tmp_path / commit))
    for name in (str(tmp_path / commit), "org/name"):
        loaded = load_target(name, verb="generate")
        expected = support.logits_of(model)
        torch.testing.assert_close(support.logits_of(loaded.model).float(), expected, rtol=0, atol=0.05)
        recipe: dict[str, Any] = {"model": {"source": name}, "data": {"mix": [{"task": "demo/facts"}]}}
        recipe["train"] = {"steps": 1, "batch": 1, "lr": 1e-4}
        with pytest.raises(UserError, match=r"has an adapter\. Fix: set adapter\.resume_from="):
            find_source(recipe_from(recipe))
        find_source(recipe_from(recipe | {"adapter": {"resume_from": str(tmp_path / commit / "adapter")}}))
