"""The merge that streams: the bytes of the merge of a loaded model, and on other bases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from qdora.errors import RunFailure, UserError
from qdora.export import checkpoint_writer
from qdora.export.logit_comparison import ComparisonText
from qdora.export.merged import StreamedMerge, check_merge, export_merged
from qdora.export.verify import verify_requantized
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.inject import adapted_layers, inject
from qdora.model.load import Quantization, load_model
from qdora.model.source import resolve
from tests import reference, tiny_adapted
from tests.checkpoints import SMALL, checkpoint

CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),
}


def prepare(
    folder: Path, config: str = "qwen2", *, targets: Any = "all-linear", quant: str = "nf4", **form: Any
) -> Any:
    """A checkpoint in bf16, an adapter on it, the model that runs, and the merge that is to equal it."""
    checkpoint(folder / "base", CONFIGS[config], dtype=torch.bfloat16)
    source = resolve(str(folder / "base"))
    compute = torch.float32

    def base() -> Any:
        return load_model(source, quant=quant, compute_dtype=compute)

    model = base()
    tiny_adapted.move(inject(model, rank=3, alpha=6.0, targets=targets, generator=torch.Generator().manual_seed(1)))
    save_adapter(model, folder / "adapter", base_name_or_path="base", revision=None, base_quant={"quant": quant})
    again = base()
    load_adapter(again, folder / "adapter")
    held = Quantization(quant, 64, True, ("lm_head",))
    return again, StreamedMerge(source, folder / "adapter", held, compute, **form)


def files(directory: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert found
    return found


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize("config", ["llama", "qwen2"])
def test_the_bytes_are_those_of_the_loaded_model(tmp_path: Path, config: str, quant: str) -> None:
    model, merge = prepare(tmp_path, config, quant=quant)
    export_merged(model, None, tmp_path / "loaded", max_shard_bytes=30_000)
    result = export_merged(merge, None, tmp_path / "streamed", max_shard_bytes=30_000)
    loaded = files(tmp_path / "loaded")
    assert len(loaded) > 4
    assert files(tmp_path / "streamed") == loaded
    assert result["num_merged_layers"] == 14
    assert result["num_parameters"] == sum(tensor.numel() for tensor in stored(tmp_path / "loaded").values())


def test_an_adapted_tied_head_and_a_bare_base(tmp_path: Path) -> None:
    model, merge = prepare(tmp_path, "llama", targets=["lm_head", "q_proj"])
    export_merged(model, None, tmp_path / "loaded")
    export_merged(merge, None, tmp_path / "streamed")
    assert files(tmp_path / "streamed") == files(tmp_path / "loaded")
    bare = StreamedMerge(merge.source, None, merge.quant, merge.compute_dtype)
    export_merged(load_model(merge.source, quant="nf4", compute_dtype=torch.float32), None, tmp_path / "bare")
    export_merged(bare, None, tmp_path / "streamed-bare")
    assert files(tmp_path / "streamed-bare") == files(tmp_path / "bare")


def test_the_original_base_takes_the_norm_anew(tmp_path: Path) -> None:
    model, merge = prepare(tmp_path, base="original")
    export_merged(merge, None, tmp_path / "out", dtype=torch.float32)
    found, source = stored(tmp_path / "out"), stored(tmp_path / "base")
    layers = adapted_layers(model)
    for path, layer in layers.items():
        assert layer.magnitude is not None
        expected = reference.merged_weight(
            source[f"{path}.weight"].double().numpy(),
            layer.lora_A.detach().double().numpy(),
            layer.lora_B.detach().double().numpy(),
            2.0,
            layer.magnitude.detach().double().numpy(),
        )
        error = np.abs(found[f"{path}.weight"].double().numpy() - expected).max()
        assert error < 1e-6 * np.abs(expected).max()
    for name in source.keys() - {f"{path}.weight" for path in layers}:
        assert torch.equal(found[name], source[name].float())


def test_requantised_is_what_bitsandbytes_loads(tmp_path: Path) -> None:
    model, merge = prepare(tmp_path, requantize=True, targets=["q_proj", "down_proj"])
    result = export_merged(merge, None, tmp_path / "out", dtype=torch.float32, max_shard_bytes=30_000)
    export_merged(merge, None, tmp_path / "one-file", dtype=torch.float32)
    assert len(result["files"]) > 2
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert quantization["bnb_4bit_use_double_quant"] is True
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    for path, layer in adapted_layers(model).items():
        state = loaded.get_submodule(path).weight.quant_state
        assert (state.nested, state.blocksize, state.quant_type) == (True, 64, "nf4")
        merged = layer.merged_weight()
        again = (
            load_model(resolve(str(tmp_path / "out")), quant="nf4", compute_dtype=torch.float32)
            .get_submodule(path)
            .dequantized()
        )
        error = float((again - merged).norm() / merged.norm())
        assert 0.05 < error < 0.13  # NF4 on Gaussian weights: 0.09
    base = load_model(merge.source, quant="nf4", compute_dtype=torch.float32)
    kept, one = stored(tmp_path / "out"), stored(tmp_path / "one-file")
    assert torch.equal(kept["model.layers.0.mlp.up_proj.weight"].reshape(-1), base.model.layers[0].mlp.up_proj.packed)
    assert kept.keys() == one.keys()
    assert all(torch.equal(kept[name], one[name]) for name in kept)


def test_requantised_weights_are_dequantised_to_the_dtype_of_the_export(tmp_path: Path) -> None:
    _, merge = prepare(tmp_path, requantize=True, targets=["q_proj"])
    assert merge.compute_dtype == torch.float32
    export_merged(merge, None, tmp_path / "out", dtype=torch.float16)
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"):  # adapted, and not
        weight = loaded.get_submodule(path).weight
        assert weight.quant_state.dtype == torch.float16


def test_what_a_killed_export_left_is_not_taken_up(tmp_path: Path) -> None:
    _, merge = prepare(tmp_path)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/model-00001-of-00009.safetensors").touch()
    export_merged(merge, None, tmp_path / "out", max_shard_bytes=30_000)
    export_merged(merge, None, tmp_path / "fresh", max_shard_bytes=30_000)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, merge = prepare(tmp_path)

    def full(*arguments: Any, **options: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_safetensors", full)
    with pytest.raises(RunFailure, match="the disk is full"):
        export_merged(merge, None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_bases_without_16_bit_weights_are_refused(tmp_path: Path) -> None:
    _, merge = prepare(tmp_path, quant="none", base="original")
    with pytest.raises(UserError, match="the base was not quantised in training"):
        check_merge(merge)
    nf4 = Quantization("nf4", 64, True, ("lm_head",))
    bare = StreamedMerge(merge.source, None, nf4, torch.float32, requantize=True)
    export_merged(bare, None, tmp_path / "packed")
    packed = StreamedMerge(resolve(str(tmp_path / "packed")), None, nf4, torch.float32, base="original")
    with pytest.raises(UserError, match=r"stored in nf4 and has no 16-bit weights. Fix: use --base dequantized"):
        check_merge(packed)
    int8 = Quantization("int8", 64, True, ("lm_head",))
    with pytest.raises(UserError, match="--requantize: the base must be held in nf4 or fp4 \\(got int8\\)"):
        check_merge(StreamedMerge(merge.source, None, int8, torch.float32, requantize=True))


def test_a_requantised_export_fails_by_a_missing_tensor_and_by_logits_that_are_not_finite(tmp_path: Path) -> None:
    model, merge = prepare(tmp_path, requantize=True)
    export_merged(merge, None, tmp_path / "out", dtype=torch.float32)
    text = ComparisonText([[5, 6, 7, 8]])
    right = verify_requantized(model, tmp_path / "out", text)
    assert right["passed"], right["faults"]
    file = tmp_path / "out/model.safetensors"
    tensors, norm = load_file(file), "model.norm.weight"
    save_file({name: each for name, each in tensors.items() if name != norm}, file, metadata={"format": "pt"})
    missing = verify_requantized(model, tmp_path / "out", text)
    assert not missing["passed"]
    assert missing["faults"] == ["missing keys on reloading: model.norm.weight (1 in all)"]
    save_file(tensors | {norm: tensors[norm] * math.nan}, file, metadata={"format": "pt"})
    broken = verify_requantized(model, tmp_path / "out", text)
    assert not broken["passed"]
    average, divergence, most = broken["faults"]
    assert average.startswith("the logits of the export differ from those of the trained model by nan on average")
    assert "(KL, in nats) by nan on average" in divergence
    assert "by up to nan" in most
