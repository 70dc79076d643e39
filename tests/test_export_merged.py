"""The merged export: exact values, whole directories only, and a verification that can fail."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, MixtralConfig

from qdora.data.example import Example
from qdora.errors import RunFailure, UserError
from qdora.export import checkpoint_writer, logit_comparison
from qdora.export.logit_comparison import (
    ComparisonText,
    LogitDifference,
    compare_logits,
    comparison_text,
    float32_arithmetic,
)
from qdora.export.merged import export_merged
from qdora.export.verify import verify_merged
from qdora.files.tensor_file import TensorSpec
from qdora.model.inject import adapted_layers, inject
from tests import tiny_adapted, tiny_experts, tiny_tokenizer

KINDS = ["lora", "dora"]
ARCHITECTURES = ["llama", "qwen2", "gemma2"]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
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


# --- values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_weights_are_the_float64_formula_rounded_once(
    tmp_path: Path, quant: str | None, kind: str, dtype: torch.dtype
) -> None:
    model = tiny_adapted.adapted("qwen2", quant=quant, kind=kind, targets=["q_proj", "down_proj"])
    result = export_merged(model, None, tmp_path / "out", dtype=dtype)
    tensors = stored(tmp_path / "out")
    layers = adapted_layers(model)
    assert len(layers) == result["num_merged_layers"] == 4
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    for path, layer in layers.items():
        expected = tiny_adapted.expected_weight(layer)
        found = tensors[f"{path}.weight"].double().numpy()
        # half a step of the dtype, and what the float32 merge may be off by before the cast
        rounding = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
        allowed = rounding * np.abs(expected) + 1e-6 * np.abs(expected).max() + 2.0**-25
        assert (np.abs(found - expected) <= allowed).all(), path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_reloaded_by_transformers_it_gives_the_adapters_logits(
    tmp_path: Path, architecture: str, kind: str, quant: str | None
) -> None:
    model = tiny_adapted.adapted(architecture, quant=quant, kind=kind)
    export_merged(model, None, tmp_path / "out", dtype=torch.float32)
    expected = tiny_adapted.logits(model)
    merged = reload(tmp_path / "out")
    assert (expected - tiny_adapted.logits(tiny_adapted.base(architecture, quant=quant))).abs().max() > 0.05
    torch.testing.assert_close(tiny_adapted.logits(merged), expected, rtol=1e-5, atol=2e-5)
    assert merged.config.tie_word_embeddings == (architecture != "qwen2")


def test_a_bare_base_is_written_dequantised(tmp_path: Path) -> None:
    model = tiny_adapted.base(quant="nf4")
    result = export_merged(model, None, tmp_path / "out", dtype=torch.float32)
    assert result["num_merged_layers"] == 0
    assert torch.equal(tiny_adapted.logits(reload(tmp_path / "out")), tiny_adapted.logits(model))


def test_exporting_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = tiny_adapted.adapted(quant="nf4", dtype=torch.bfloat16)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_merged(model, None, tmp_path / "out")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.quantization_config == {"quant_method": "bitsandbytes"}
    assert model.config.tie_word_embeddings is True


# --- files


def test_shards_index_config_and_tokenizer(tmp_path: Path) -> None:
    model = tiny_adapted.adapted("llama", quant="nf4")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    # as the publisher has it and save_pretrained refuses it: a temperature without sampling
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = False
    steps: list[tuple[int, int]] = []
    result = export_merged(
        model,
        tiny_tokenizer.make(),
        tmp_path / "out",
        max_shard_bytes=20_000,
        progress=lambda done, total: steps.append((done, total)),
        extra_files={"README.md": "a card"},
    )
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == list(result["files"])
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        names = load_file(out / file).keys()
        assert names == {name for name, where in index["weight_map"].items() if where == file}
        size = sum(tensor.numel() * 2 for tensor in load_file(out / file).values())
        assert size <= 20_000 or len(names) == 1
    tensors = stored(out)
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    assert index["metadata"] == {"total_parameters": num_parameters, "total_size": 2 * num_parameters}
    assert result["num_bytes"] == 2 * num_parameters == steps[-1][0] == steps[-1][1]
    assert result["num_tensors"] == len(tensors) == len(steps)
    assert "lm_head.weight" not in tensors  # tied, written once
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["architectures"]) == ("float16", ["LlamaForCausalLM"])
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5
    assert (out / "README.md").read_text() == "a card"
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    assert tokenizer.chat_template == tiny_tokenizer.CHATML
    assert tokenizer("the answer")["input_ids"] == tiny_tokenizer.make()("the answer")["input_ids"]
    largest = max(tensors, key=lambda name: tensors[name].abs().max())
    assert result["max_abs_tensor"] == largest
    assert result["max_abs"] == pytest.approx(float(tensors[largest].abs().max()), rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_file_needs_no_index_and_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        export_merged(tiny_adapted.adapted(), None, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_an_adapted_head_is_untied(tmp_path: Path) -> None:
    model = tiny_adapted.base("llama")
    tiny_adapted.move(inject(model, targets=["lm_head", "q_proj"], rank=3, alpha=6.0))
    export_merged(model, None, tmp_path / "out", dtype=torch.float32)
    assert "lm_head.weight" in stored(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(
        tiny_adapted.logits(reload(tmp_path / "out")), tiny_adapted.logits(model), rtol=1e-5, atol=2e-5
    )


def test_stacked_experts_keep_names_that_transformers_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**tiny_adapted.SIZES, num_local_experts=2, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tiny_adapted.move(inject(model, targets=["q_proj"], rank=3, alpha=6.0))
    export_merged(model, None, tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(
        tiny_adapted.logits(reload(tmp_path / "out")), tiny_adapted.logits(model), rtol=1e-5, atol=2e-5
    )


def test_only_one_merged_tensor_is_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    parts = checkpoint_writer.cast_parts

    def watched(spec: TensorSpec, tensor: torch.Tensor, seen: Any) -> Iterator[torch.Tensor]:
        nonlocal most
        for part in parts(spec, tensor, seen):
            alive.append(weakref.ref(part))
            most = max(most, sum(ref() is not None for ref in alive))
            yield part
            del part

    monkeypatch.setattr(checkpoint_writer, "cast_parts", watched)
    monkeypatch.setattr(checkpoint_writer, "_SLICE", 1000)
    export_merged(tiny_adapted.adapted(), None, tmp_path / "out")
    assert len(alive) > 28
    assert most == 1


# --- refusals


def test_weights_outside_float16_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    model = tiny_adapted.adapted(quant="nf4")
    layers = adapted_layers(model)
    with torch.no_grad():
        layers["model.layers.1.mlp.up_proj"].magnitude[4] = 4e5  # type: ignore[index]
        model.model.norm.weight[0] = 65505.0
    with pytest.raises(UserError) as raised:
        export_merged(model, None, tmp_path / "out")
    first, second = raised.value.faults
    assert first.startswith("model.layers.1.mlp.up_proj.weight: largest |w| is ")
    assert second == (
        "model.norm.weight: largest |w| is 65505, must be at most 65504 in float16. Fix: export in bfloat16 or float32."
    )
    assert list(tmp_path.iterdir()) == []
    result = export_merged(model, None, tmp_path / "out", dtype=torch.bfloat16)
    assert result["max_abs_tensor"] == "model.layers.1.mlp.up_proj.weight"


def test_the_largest_float16_is_allowed(tmp_path: Path) -> None:
    model = tiny_adapted.base()
    model.model.norm.weight.data[0] = -65504.0
    model.model.norm.weight.data[1] = 1e-9
    result = export_merged(model, None, tmp_path / "out")
    assert result["max_abs"] == 65504.0
    assert result["num_underflowed"] == 1
    assert stored(tmp_path / "out")["model.norm.weight"][0] == -65504.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_is_a_failure_in_every_dtype(tmp_path: Path, value: float) -> None:
    model = tiny_adapted.adapted()
    adapted_layers(model)["model.layers.0.mlp.gate_proj"].lora_B.data[3, 1] = value
    with pytest.raises(RunFailure, match=r"gate_proj.weight: 32 of 1536 values are NaN or infinite"):
        export_merged(model, None, tmp_path / "out", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    model = tiny_adapted.adapted()
    for name in ("full", "file", "link"):
        with pytest.raises(UserError, match="must be a new or empty directory"):
            export_merged(model, None, tmp_path / name)
    assert (tmp_path / "full" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    export_merged(model, None, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_paths_for_extra_files_are_refused(tmp_path: Path) -> None:
    model = tiny_adapted.adapted()
    with pytest.raises(ValueError, match="a plain file name"):
        export_merged(model, None, tmp_path / "out", extra_files={"../escaped": ""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write = checkpoint_writer.write_safetensors

    def failing(path: Path, specs: list[TensorSpec], tensors: Iterator[torch.Tensor], **options: Any) -> int:
        if "model-00003" in path.name:
            raise error
        return write(path, specs, tensors, **options)

    monkeypatch.setattr(checkpoint_writer, "write_safetensors", failing)
    expected = RunFailure if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export_merged(tiny_adapted.adapted(), None, tmp_path / "out", max_shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(RunFailure, match=r"out: needs 0.0 GiB, and 0.0 GiB are free on this disk\. Fix: free"):
        export_merged(tiny_adapted.adapted(), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- verification


@pytest.fixture
def running() -> Any:
    return tiny_adapted.adapted("llama", quant="nf4", dtype=torch.bfloat16)


def verify(model: Any, directory: Path) -> dict[str, Any]:
    return verify_merged(model, directory, ComparisonText([tiny_adapted.IDS[0].tolist(), [5, 6, 7]]))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_right_merge_passes(tmp_path: Path, architecture: str, dtype: torch.dtype, compute: torch.dtype) -> None:
    model = tiny_adapted.adapted(architecture, quant="nf4", dtype=compute)
    export_merged(model, None, tmp_path / "out", dtype=dtype)
    found = verify(model, tmp_path / "out")
    assert found["passed"], found["faults"]
    assert (found["num_texts"], found["num_positions"]) == (2, 14)
    assert found["weights"]["num_layers"] == 14
    assert json.loads(json.dumps(found)) == found
    if compute == torch.float32:
        assert found["reference_vs_running"]["max_logit_difference"] == 0.0
    else:
        assert found["reference_vs_running"]["max_logit_difference"] > 0.0
    assert found["exported_vs_reference"]["argmax_agreement"] > 0.9


def test_a_model_larger_than_memory_is_compared_from_the_disk(
    tmp_path: Path, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_merged(running, None, tmp_path / "out", max_shard_bytes=20_000)
    expected = verify(running, tmp_path / "out")
    monkeypatch.setattr("qdora.export.verify.get_max_memory", lambda: {"cpu": 70_000})
    found = verify(running, tmp_path / "out")
    assert found == expected
    assert found["passed"]


def test_logits_of_a_model_on_another_device_are_compared(running: Any) -> None:
    """Where a GPU has no room for any of its layers, accelerate puts a whole model on the host and leaves it alone."""

    class Elsewhere(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            assert input_ids.device.type == "meta"
            return SimpleNamespace(logits=tiny_adapted.logits(running)[None])

    exported: Any = Elsewhere()
    found = compare_logits(running, exported, [tiny_adapted.IDS[0].tolist()])
    assert found.exported_vs_running.max_logit_difference == 0.0


def test_without_room_for_float32_copies_weights_are_checked_and_logits_are_not(
    tmp_path: Path, running: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_model: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.96 GiB")

    export_merged(running, None, tmp_path / "out")
    monkeypatch.setattr(logit_comparison, "float32_arithmetic", full)
    found = verify(running, tmp_path / "out")
    assert (found["passed"], found["num_positions"]) == (True, 0)
    assert found["weights"]["num_layers"] == 14
    assert "their logits are not compared" in caplog.text
    damage(tmp_path / "out", "model.layers.0.mlp.up_proj.weight", lambda weight: 1.005 * weight)
    assert not verify(running, tmp_path / "out")["passed"]
    monkeypatch.setattr(logit_comparison, "float32_arithmetic", lambda _model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify(running, tmp_path / "out")


def test_the_differences_of_the_verdict(tmp_path: Path, running: Any) -> None:
    export_merged(running, None, tmp_path / "out")
    found = verify_merged(running, tmp_path / "out", ComparisonText([tiny_adapted.IDS[0].tolist()]))
    first = tiny_adapted.logits(running).double().numpy()
    second = tiny_adapted.logits(reload(tmp_path / "out")).double().numpy()

    def log_softmax(x: Any) -> Any:
        shifted = x - x.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = log_softmax(first), log_softmax(second)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    expected = {
        "max_logit_difference": np.abs(first - second).max(),
        "mean_logit_difference": np.abs(first - second).mean(),
        "kl_max": kl.max(),
        "kl_mean": kl.mean(),
        "argmax_agreement": (first.argmax(axis=1) == second.argmax(axis=1)).mean(),
    }
    assert found["exported_vs_running"] == pytest.approx(expected, rel=1e-4)


def test_kl_by_hand() -> None:
    difference = LogitDifference()
    difference.add(torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]]), torch.tensor([[math.log(3.0), 0.0], [1.0, 1.0]]))
    found = difference.to_dict()
    # P = (1/4, 3/4), Q = (3/4, 1/4): KL = 1/4 log(1/3) + 3/4 log 3 = 1/2 log 3
    assert found["kl_max"] == pytest.approx(0.5 * math.log(3.0))
    assert found["kl_mean"] == pytest.approx(0.25 * math.log(3.0))
    assert found["max_logit_difference"] == pytest.approx(math.log(3.0))
    assert found["argmax_agreement"] == 0.5
    difference.add(torch.tensor([[math.nan, 0.0]]), torch.tensor([[0.0, 0.0]]))
    assert math.isnan(difference.to_dict()["max_logit_difference"])


def damage(directory: Path, name: str, change: Any) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_one_row_that_is_half_a_percent_off_fails(tmp_path: Path, compute: torch.dtype) -> None:
    model = tiny_adapted.adapted("llama", quant="nf4", dtype=compute)
    export_merged(model, None, tmp_path / "out")

    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[2] *= 1.005
        return weight

    damage(tmp_path / "out", "model.layers.1.self_attn.v_proj.weight", change)
    found = verify(model, tmp_path / "out")
    assert not found["passed"]
    assert found["weights"]["worst_layer"] == "model.layers.1.self_attn.v_proj"
    assert (
        "the merged weight of model.layers.1.self_attn.v_proj differs from the computed one by " in found["faults"][0]
    )


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_wrong_tensor_outside_the_adapters_fails_by_the_logits(tmp_path: Path, running: Any, name: str) -> None:
    export_merged(running, None, tmp_path / "out")
    damage(tmp_path / "out", name, lambda tensor: tensor * 1.1)
    found = verify(running, tmp_path / "out")
    assert found["faults"][0].startswith("the logits of the export differ from those of the trained model by ")
    assert found["weights"]["max_error"] <= 1.0


def test_not_a_number_fails(tmp_path: Path, running: Any) -> None:
    export_merged(running, None, tmp_path / "out")
    damage(tmp_path / "out", "model.layers.0.self_attn.q_proj.weight", lambda tensor: tensor * math.nan)
    found = verify(running, tmp_path / "out")
    assert found["weights"]["worst_layer"] == "model.layers.0.self_attn.q_proj"
    assert len(found["faults"]) == 4


def test_the_usual_wrong_merges_fail(tmp_path: Path, running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer_type = type(next(iter(adapted_layers(running).values())))
    right = layer_type.merged_weight

    def without_gain(self: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (self.base.dequantized() + self.scaling * (self.lora_B.float() @ self.lora_A.float())).to(dtype)

    def on_the_requantised(self: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        from qdora.ops.packed import dequantize, quantize

        return dequantize(quantize(right(self), "nf4", 64)).to(dtype)

    def in_bfloat16(self: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        merged = self.base.dequantized().bfloat16() + self.scaling * (self.lora_B @ self.lora_A)
        norm = torch.linalg.norm(merged, dim=1)
        return ((self.magnitude.bfloat16() / norm).unsqueeze(1) * merged).to(dtype)

    for wrong in (without_gain, on_the_requantised, in_bfloat16):
        with monkeypatch.context() as patch:
            patch.setattr(layer_type, "merged_weight", wrong)
            export_merged(running, None, tmp_path / wrong.__name__)
        found = verify(running, tmp_path / wrong.__name__)
        assert not found["passed"], wrong.__name__
        assert found["weights"]["max_error"] > 3, wrong.__name__


def test_a_missing_tensor_and_another_tokenizer_fail(tmp_path: Path, running: Any) -> None:
    export_merged(running, tiny_tokenizer.make(), tmp_path / "out")

    def verify_with(tokenizer: Any) -> dict[str, Any]:
        texts = ["the brown cow"]
        text = ComparisonText([tokenizer(texts[0])["input_ids"]], texts, tokenizer)
        return verify_merged(running, tmp_path / "out", text)

    found = verify_with(tiny_tokenizer.make())
    assert found["passed"], found["faults"]
    found = verify_with(tiny_tokenizer.make(bos=True))
    assert found["faults"] == ["the reloaded tokenizer gives other ids"]
    found = verify_with(tiny_tokenizer.make(chat_template=None))
    assert found["faults"] == ["the reloaded tokenizer has another chat template"]
    more = tiny_tokenizer.make()
    more.add_tokens(["<tool>"])  # the text has none
    assert verify_with(more)["faults"] == ["the reloaded tokenizer has other added tokens"]
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    found = verify(running, tmp_path / "out")
    assert "missing keys on reloading: model.layers.0.mlp.up_proj.weight (1 in all)" in found["faults"]


def test_an_index_that_points_outside_is_refused(tmp_path: Path, running: Any) -> None:
    export_merged(running, None, tmp_path / "out", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    outside = tmp_path / "outside.safetensors"
    (tmp_path / "out" / index["weight_map"]["model.norm.weight"]).rename(outside)
    wrong = {n: "../outside.safetensors" if n == "model.norm.weight" else f for n, f in index["weight_map"].items()}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": wrong}))
    with pytest.raises(UserError, match=r"'\.\./outside\.safetensors' is not a plain"):
        verify(running, tmp_path / "out")


def test_what_verification_needs(tmp_path: Path, running: Any) -> None:
    with pytest.raises(UserError, match="no tokens to compare"):
        verify_merged(running, tmp_path / "out", ComparisonText([[]]))
    with pytest.raises(UserError, match="cannot load it"):
        verify(running, tmp_path / "nowhere")


def test_lengths_are_bounded() -> None:
    tokenizer = tiny_tokenizer.make()
    long = "the brown cow " * 10
    found = comparison_text(tokenizer, {"task": [Example("task", "0", "", long)] * 3}, max_length=8, max_tokens=12)
    ids = tokenizer(long)["input_ids"]
    assert len(ids) > 8
    assert found.sequences == [ids[:8], ids[:4]]


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_float32_arithmetic_is_exact_and_undone(quant: str | None) -> None:
    running = tiny_adapted.adapted("qwen2", quant=quant, dtype=torch.bfloat16).train()
    running.model.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in running.state_dict().items()}
    wide = tiny_adapted.adapted("qwen2", quant=quant)
    values = dict(running.named_parameters())
    for name, parameter in wide.named_parameters():
        parameter.data = values[name].data.to(parameter.dtype)
    for path, layer in adapted_layers(wide).items():
        layer.base.load_state_dict(adapted_layers(running)[path].base.state_dict())
        if layer.base_squared is not None:
            layer.base_squared.copy_(adapted_layers(running)[path].base_squared)
    with float32_arithmetic(running):
        inside = tiny_adapted.logits(running)
        assert running.model.scale.dtype == torch.float32
    assert torch.equal(inside, tiny_adapted.logits(wide))
    assert tiny_adapted.logits(running).dtype == torch.bfloat16
    assert before == {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in running.state_dict().items()}
    assert running.training


@pytest.mark.parametrize(("softcap", "expected"), [(None, "sdpa"), (30.0, "eager")])
def test_float32_arithmetic_takes_an_attention_that_the_model_has(
    softcap: float | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash kernels have no float32, and sdpa has no soft-cap: releases of transformers refuse it or drop the cap."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, attn_logit_softcapping=softcap)).bfloat16()
    model.config._attn_implementation = "flash_attention_2"
    asked: list[str] = []
    monkeypatch.setattr(model, "set_attn_implementation", asked.append)
    with float32_arithmetic(model):
        pass
    assert asked == [expected]


def test_what_training_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    """Experts are chosen by differences between biases that bf16 cannot hold."""
    model = tiny_experts.make("deepseek_v3", torch.bfloat16)
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    assert biases
    for bias in biases.values():
        bias.data = 7.0 + torch.randn(bias.shape) * 2e-3
    tiny_adapted.move(inject(model, rank=2, alpha=4.0, targets=["o_proj"]))
    export_merged(model, None, tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out/model.safetensors")
    for name, bias in biases.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], bias)
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(("named", "expected"), [(0, [0, 3]), ([0, 3], [0, 3]), (3, 3), (None, 3)])
def test_an_export_stops_where_its_run_stops(tmp_path: Path, named: Any, expected: Any) -> None:
    """The tokenizer may be of another model, with another end."""
    model, tokenizer = tiny_adapted.adapted("llama"), tiny_tokenizer.make(eos="<|im_end|>")
    assert tokenizer.eos_token_id == 3
    model.generation_config.eos_token_id = named
    export_merged(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == expected
    assert model.generation_config.eos_token_id == named
