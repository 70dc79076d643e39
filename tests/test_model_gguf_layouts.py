"""Files of architectures that llama.cpp's converter changes, written as it does, against their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Ernie4_5Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    Qwen3Config,
    SmolLM3Config,
)

from qdora.errors import UserError
from qdora.export.gguf import TensorCheck, check_tensors
from qdora.model.gguf_file import open_gguf

gguf = pytest.importorskip("gguf")

from tests.fake_converter import NAMES, TOP, interleaved  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
Change = Callable[[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]


def permuted(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows of q and k as pairs that are rotated together."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    return values if heads is None else interleaved(values, heads)


def plus_one(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Norms as the factors that they are."""
    return values + 1 if name.endswith("norm.weight") else values


def as_it_is(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values


def written(folder: Path, config: Any, architecture: str, change: Change, *, words: int = 48, rows: int = 48) -> Path:
    """A checkpoint in float32 with random norms, and file.gguf beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder / "merged")
    names = NAMES | (FOUR_NORMS if architecture in ("gemma2", "gemma3") else {})
    writer = gguf.GGUFWriter(str(folder / "file.gguf"), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_token_list([f"word{index}" for index in range(words)])
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        values = change(name, parameter.detach().numpy().copy())
        if module in TOP:
            writer.add_tensor(f"{TOP[module]}.{leaf}", values[:rows] if module == "model.embed_tokens" else values)
        else:
            _, _, layer, inner = module.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{names[inner]}.{leaf}", values)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return folder / "file.gguf"


def checked(file: Path, into: Any = None) -> TensorCheck:
    return check_tensors(gguf.GGUFReader(str(file)), file, file.with_name("merged"), into)


@pytest.mark.parametrize(
    "config, architecture, change",
    [
        (SmolLM3Config, "smollm3", permuted),
        (GraniteConfig, "granite", permuted),
        (ArceeConfig, "arcee", permuted),
        (GemmaConfig, "gemma", plus_one),
        (Gemma2Config, "gemma2", plus_one),
        (Qwen3Config, "qwen3", as_it_is),
    ],
)
def test_a_right_file_passes_and_one_without_the_change_does_not(
    tmp_path: Path, config: Any, architecture: str, change: Change
) -> None:
    right = checked(written(tmp_path, config(**SIZES), architecture, change))
    assert right.faults == []
    assert right.unchecked == []
    assert right.dense_error < 1e-6
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    other = permuted if change is as_it_is else as_it_is
    faults = checked(written(wrong, config(**SIZES), architecture, other)).faults
    assert faults
    assert all(("norm" if change is plus_one else "attn_") in fault for fault in faults)


def test_what_differs_in_an_unknown_layout_is_not_checked(tmp_path: Path) -> None:
    found = checked(written(tmp_path, Ernie4_5Config(**SIZES), "ernie4_5", permuted))
    assert found.faults == []
    assert sorted(found.unchecked) == [f"blk.{layer}.attn_{part}.weight" for layer in range(2) for part in "kq"]
    assert found.dense_error == 0, "of those that are checked"
    assert not found.to_dict()["layout_known"]
    assert found.to_dict()["num_unchecked"] == 4


def test_rows_without_a_word_may_be_missing(tmp_path: Path) -> None:
    config = Gemma3TextConfig(**SIZES, layer_types=["full_attention"] * 2)
    file = written(tmp_path, config, "gemma3", plus_one, words=45, rows=45)
    model = AutoModelForCausalLM.from_config(config)
    found = checked(file, model)
    assert found.faults == []
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    embedding, expected = (each.get_input_embeddings().weight for each in (model, stored))
    assert torch.equal(embedding[:45], expected[:45])
    (tmp_path / "other").mkdir()
    file = written(tmp_path / "other", config, "gemma3", plus_one, words=46, rows=45)
    assert checked(file).faults == ["tensor token_embd.weight has shape [45, 32], expected [48, 32]"]


def test_a_scale_that_is_in_no_file_stands_against_reading_only(tmp_path: Path) -> None:
    config = Gemma2Config(**SIZES | {"num_hidden_layers": 46, "hidden_size": 32, "intermediate_size": 32})
    file = written(tmp_path, config, "gemma2", plus_one)
    assert checked(file).faults == []
    with pytest.raises(UserError, match="the attention scale of this gemma2 is not in GGUF files"):
        open_gguf(file, AutoModelForCausalLM.from_config(config))
