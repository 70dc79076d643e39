"""The 4-bit export: the gain in the block scales and plain LoRA, run by programs that know nothing of DoRA."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from qdora.errors import UserError
from qdora.export.logit_comparison import ComparisonText, float32_arithmetic
from qdora.export.nf4_lora import export_nf4_lora
from qdora.export.verify import OWN_LOADER, PEFT_LOADER, verify_nf4_lora
from qdora.model.build_model import find_source
from qdora.model.inject import adapted_layers, inject
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.recipe.recipe_file import recipe_from
from qdora.run.load_run import load_target
from tests import reference_quant, tiny_adapted, tiny_tokenizer

# Rows of whole blocks of 64.
SIZES = tiny_adapted.SIZES | {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(autouse=True)
def whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_adapted.CONFIGS, "llama", lambda: LlamaConfig(**SIZES, tie_word_embeddings=True))
    monkeypatch.setitem(tiny_adapted.CONFIGS, "qwen2", lambda: Qwen2Config(**SIZES, tie_word_embeddings=False))


def with_peft(directory: Path) -> Any:
    """As the README tells a stranger to load it, in float32."""
    base = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, attn_implementation="eager")
    found = 0
    for parameter in base.parameters():  # transformers leaves what is beside quantised weights in the file's dtype
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            found += 1
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    assert found == 14
    return peft.PeftModel.from_pretrained(base, str(directory / "adapter")).eval()


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_bitsandbytes_and_peft_give_the_running_logits(
    tmp_path: Path, architecture: str, kind: str, dtype: torch.dtype
) -> None:
    model = tiny_adapted.adapted(architecture, quant="nf4", kind=kind, dtype=dtype)
    result = export_nf4_lora(model, None, tmp_path / "out")
    assert result["num_adapted_layers"] == 14
    assert result["num_folded_layers"] == (14 if kind == "dora" else 0)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] is False
    with float32_arithmetic(model):
        expected = tiny_adapted.logits(model)
        bare = tiny_adapted.logits(tiny_adapted.base(architecture, quant="nf4"))
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(tiny_adapted.logits(with_peft(tmp_path / "out")), expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_the_files_are_the_float64_formula(tmp_path: Path, quant: str) -> None:
    model = tiny_adapted.adapted(quant=quant)
    layers = adapted_layers(model)
    layers["model.layers.0.mlp.up_proj"].magnitude.data[2] = 0.0  # type: ignore[union-attr]
    export_nf4_lora(model, None, tmp_path / "out")
    base = load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert not [name for name in base if "nested" in name or "magnitude" in name]
    assert not [name for name in adapter if "magnitude" in name]
    for path, layer in layers.items():
        packed = layer.base.packed_weight
        codes = base[f"{path}.weight"].reshape(-1)
        assert packed is not None
        assert torch.equal(codes, packed.packed)
        assert base[f"{path}.weight.absmax"].dtype == torch.float32
        nibbles = np.stack([codes.numpy() >> 4, codes.numpy() & 15], axis=1).reshape(-1, 64)
        values = np.array(reference_quant.VALUES[quant], dtype=np.float64)[nibbles]
        weight = (values * base[f"{path}.weight.absmax"].double().numpy()[:, None]).reshape(packed.shape)
        a = adapter[f"base_model.model.{path}.lora_A.weight"].double().numpy()
        b = adapter[f"base_model.model.{path}.lora_B.weight"].double().numpy()
        expected = tiny_adapted.expected_weight(layer)
        assert np.abs(weight + 2.0 * b @ a - expected).max() < 1e-6 * np.abs(expected).max()
    assert "model.embed_tokens.weight" in base


def test_files_config_and_tokenizer(tmp_path: Path) -> None:
    model = tiny_adapted.base("llama", quant="nf4", dtype=torch.bfloat16)
    tiny_adapted.move(inject(model, rank=3, alpha=6.0, rank_pattern={"q_proj": 2}, targets=["q_proj", "v_proj"]))
    export_nf4_lora(
        model, tiny_tokenizer.make(), tmp_path / "out", max_shard_bytes=20_000, extra_files={"README.md": "a card"}
    )
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    assert (quantization["load_in_4bit"], quantization["bnb_4bit_quant_type"]) == (True, "nf4")
    assert quantization["bnb_4bit_use_double_quant"] is False
    assert quantization["bnb_4bit_compute_dtype"] == config["dtype"] == "bfloat16"
    assert quantization["llm_int8_skip_modules"] == ["lm_head"]
    assert len(list(out.glob("*.safetensors"))) > 2
    assert (out / "README.md").read_text() == "a card"
    assert AutoTokenizer.from_pretrained(str(out)).chat_template == tiny_tokenizer.CHATML
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert {adapter["r"], *adapter["rank_pattern"].values()} == {2, 3}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # as deployed, in bfloat16: the block scales stay float32
    base = AutoModelForCausalLM.from_pretrained(str(out), dtype="auto")
    assert base.dtype == torch.bfloat16
    assert base.model.layers[0].mlp.up_proj.weight.quant_state.absmax.dtype == torch.float32


def test_exporting_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = tiny_adapted.adapted(quant="nf4", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_nf4_lora(model, None, tmp_path / "out")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_double_quantising_the_scales_again_would_lose_what_is_reported(tmp_path: Path) -> None:
    result = export_nf4_lora(tiny_adapted.adapted(quant="nf4"), None, tmp_path / "out")
    found = result["scale_error_if_double_quantised"]
    scales = load_file(tmp_path / "out" / "model.safetensors")[f"{found['layer']}.weight.absmax"].double().numpy()
    code = np.array(reference_quant.dynamic_map())
    shifted = scales - scales.mean()
    blocks = [shifted[at : at + 256] for at in range(0, len(shifted), 256)]
    again = np.concatenate(
        [
            code[np.abs(block[:, None] / np.abs(block).max() - code[None]).argmin(axis=1)] * np.abs(block).max()
            for block in blocks
        ]
    )
    expected = np.linalg.norm(again - shifted) / np.linalg.norm(scales)
    assert found["max"] == pytest.approx(expected, rel=1e-3)
    assert found["mean"] <= found["max"]


# --- refusals


def refused(model: Any, out: Path, **options: Any) -> list[str]:
    with pytest.raises(UserError) as raised:
        export_nf4_lora(model, None, out, **options)
    assert not out.exists()
    return list(raised.value.faults)


def test_what_it_cannot_hold_is_refused_with_the_format_to_use_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert refused(tiny_adapted.base(quant="nf4"), out)[0].endswith(
        "no LoRA or DoRA adapter. Fix: use --format merged."
    )
    assert "the base must be in nf4 or fp4 (got int8" in refused(tiny_adapted.adapted(quant="int8"), out)[0]
    assert "(got full precision)" in refused(tiny_adapted.adapted(), out)[0]
    model = tiny_adapted.base("qwen2", quant="nf4", dtype=torch.bfloat16)
    tiny_adapted.move(inject(model, targets=["lm_head", "q_proj"], rank=3, alpha=6.0))
    (fault,) = refused(model, out)
    assert "lm_head is a DoRA layer on a dense weight" in fault
    assert "Fix: use --dtype float32 or --format merged" in fault
    monkeypatch.setitem(
        tiny_adapted.CONFIGS,
        "llama",
        lambda: LlamaConfig(**SIZES | {"intermediate_size": 96}, tie_word_embeddings=True),
    )
    faults = refused(tiny_adapted.adapted(quant="nf4"), out)
    assert len(faults) == 2
    assert "model.layers.0.mlp.down_proj: in_features 96 is no multiple of the block size 64" in faults[0]
    assert all(fault.endswith("Fix: use --format merged.") for fault in faults)


def test_an_adapted_head_in_float32(tmp_path: Path) -> None:
    model = tiny_adapted.base("llama", quant="nf4")
    tiny_adapted.move(inject(model, targets=["lm_head", "q_proj"], rank=3, alpha=6.0))
    export_nf4_lora(model, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(
        tiny_adapted.logits(with_peft(tmp_path / "out")), tiny_adapted.logits(model), rtol=1e-5, atol=5e-6
    )


# --- verification and the way back


TEXT = ComparisonText([tiny_adapted.IDS[0].tolist(), [5, 6, 7]])


@pytest.mark.parametrize("loader", [PEFT_LOADER, OWN_LOADER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_export_passes(
    tmp_path: Path, loader: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_adapted.adapted("qwen2", quant="nf4", dtype=dtype)
    export_nf4_lora(model, None, tmp_path / "out")
    if loader == OWN_LOADER:
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest)
        )
    found = verify_nf4_lora(model, tmp_path / "out", TEXT)
    assert found["passed"], found["faults"]
    assert found["loaded_by"] == loader
    assert found["weights"]["num_layers"] == 14
    assert found["exported_vs_reference"]["max_logit_difference"] < 1e-5
    assert json.loads(json.dumps(found)) == found


def test_an_export_in_a_narrower_dtype_than_the_models_is_judged_by_that_dtype(tmp_path: Path) -> None:
    """A CPU without bfloat16 runs in float32; then embeddings, norms and head lose digits in a bfloat16 export."""
    model = tiny_adapted.adapted("llama", quant="nf4")
    export_nf4_lora(model, None, tmp_path / "out", dtype=torch.bfloat16)
    found = verify_nf4_lora(model, tmp_path / "out", TEXT)
    assert found["passed"], found["faults"]
    assert found["exported_vs_reference"]["max_logit_difference"] > 1e-4
    assert found["dtype"] == "bfloat16"


def test_a_scale_or_a_factor_that_is_half_a_percent_off_fails(tmp_path: Path) -> None:
    model = tiny_adapted.adapted("llama", quant="nf4", dtype=torch.bfloat16)
    for file, name in (
        ("model.safetensors", "model.layers.1.self_attn.v_proj.weight.absmax"),
        ("adapter/adapter_model.safetensors", "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"),
    ):
        out = tmp_path / file.replace("/", "-")
        export_nf4_lora(model, None, out)
        tensors = load_file(out / file)
        tensors[name] *= 1.005
        save_file(tensors, out / file, metadata={"format": "pt"})
        found = verify_nf4_lora(model, out, TEXT)
        assert not found["passed"]
        assert found["weights"]["worst_layer"] == "model.layers.1.self_attn.v_proj"


def test_an_export_that_does_not_fit_beside_the_model_is_checked_without_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_adapted.adapted("llama", quant="nf4", dtype=torch.bfloat16)
    export_nf4_lora(model, None, tmp_path / "out")
    (needed,) = (file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    monkeypatch.setattr("qdora.export.verify.get_max_memory", lambda: {"cpu": 10 * needed})
    monkeypatch.setattr("qdora.export.verify.load_with_transformers", None)
    with pytest.raises(TypeError):  # it would fit, and be loaded
        verify_nf4_lora(model, tmp_path / "out", TEXT)
    monkeypatch.setattr("qdora.export.verify.get_max_memory", lambda: {"cpu": needed})
    found = verify_nf4_lora(model, tmp_path / "out", TEXT)
    assert found["passed"], found["faults"]
    assert (found["num_positions"], found["loaded_by"], found["weights"]["num_layers"]) == (0, None, 14)
    assert "exported_vs_reference" not in found
    assert "does not fit in memory beside the running model: their logits are not compared" in caplog.text
    place = "model.layers.1.self_attn.v_proj"
    for file, name, change, fault in (
        ("model.safetensors", f"{place}.weight.absmax", lambda each: each * 1.005, "times the rounding error"),
        ("model.safetensors", "model.norm.weight", None, "model.norm.weight"),
        ("adapter/adapter_model.safetensors", f"base_model.model.{place}.lora_B.weight", None, f"{place}.lora_B"),
    ):
        tensors = load_file(tmp_path / "out" / file)
        wrong = {key: change(each) if key == name else each for key, each in tensors.items() if change or key != name}
        save_file(wrong, tmp_path / "out" / file, metadata={"format": "pt"})
        (found_fault,) = verify_nf4_lora(model, tmp_path / "out", TEXT)["faults"]
        assert fault in found_fault
        save_file(tensors, tmp_path / "out" / file, metadata={"format": "pt"})


def test_qdora_trains_on_from_it(tmp_path: Path) -> None:
    """The directory is a base like any other: LoRA goes on from its adapter."""
    from qdora.model.adapter_file import load_adapter

    model = tiny_adapted.adapted("llama", quant="nf4")
    export_nf4_lora(model, None, tmp_path / "out")
    again = load_model(
        resolve(str(tmp_path / "out")), quant="nf4", double_quant=False, compute_dtype=torch.float32, attention="eager"
    )
    load_adapter(again, tmp_path / "out" / "adapter")
    torch.testing.assert_close(tiny_adapted.logits(again), tiny_adapted.logits(model), rtol=1e-5, atol=5e-6)


def test_its_adapter_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, commit = tiny_adapted.adapted("llama", quant="nf4"), "a" * 40
    export_nf4_lora(model, tiny_tokenizer.make(), tmp_path / commit)
    monkeypatch.setattr("qdora.model.source.snapshot_download", lambda *_, **__: str(tmp_path / commit))
    for name in (str(tmp_path / commit), "org/name"):
        loaded = load_target(name, verb="generate")
        expected = tiny_adapted.logits(model)
        torch.testing.assert_close(tiny_adapted.logits(loaded.model).float(), expected, rtol=0, atol=0.05)
        recipe: dict[str, Any] = {"model": {"source": name}, "data": {"mix": [{"task": "demo/facts"}]}}
        recipe["train"] = {"steps": 1, "batch": 1, "lr": 1e-4}
        with pytest.raises(UserError, match=r"is a 4-bit base whose adapter, in adapter/, would be left out"):
            find_source(recipe_from(recipe))
        find_source(recipe_from(recipe | {"adapter": {"resume_from": str(tmp_path / commit / "adapter")}}))


def test_a_tensor_that_the_adapter_file_has_and_peft_does_not_take_fails(tmp_path: Path) -> None:
    model = tiny_adapted.adapted("llama", quant="nf4")
    export_nf4_lora(model, None, tmp_path / "out")
    file = tmp_path / "out/adapter/adapter_model.safetensors"
    tensors = load_file(file)
    more = "base_model.model.model.layers.1.self_attn.v_proj.lora_C.weight"
    save_file(tensors | {more: torch.ones(3)}, file, metadata={"format": "pt"})
    found = verify_nf4_lora(model, tmp_path / "out", TEXT)
    assert not found["passed"]
    assert f"PEFT has other tensors than the adapter file: {more} (1)" in found["faults"]
