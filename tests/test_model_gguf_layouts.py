"""Files of architectures that llama.cpp's converter changes, written as it does, against their checkpoints."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
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
from qdora.model.gguf_layout import knows_layout
from tests import tiny_experts

gguf = pytest.importorskip("gguf")

from tests.fake_converter import NAMES, TOP, Values, finish, interleaved  # noqa: E402

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
    finish(writer)
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


# --- mixtures: the names of published checkpoints by the table of the package gguf, as the converter does

MIXTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "glm4_moe": "glm4moe",
    "lfm2_moe": "lfm2moe",
    "llama4_text": "llama4",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "minimax_m2": "minimax-m2",
}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def pieces(name: str, values: Values, config: Any) -> dict[str, Values]:
    """The tensors that the converter makes of one of a checkpoint, by names for the table."""
    part = name.split(".")[-2]
    if part in ("q_proj", "k_proj") and config.model_type in ("mixtral", "granitemoe"):
        return {name: interleaved(values, config.num_attention_heads if part == "q_proj" else 2)}
    if part == "kv_b_proj":
        keys, heads = config.qk_nope_head_dim, config.num_attention_heads
        by_head = values.reshape(heads, -1, values.shape[-1])
        names = [name.replace("kv_b_proj", f"{letter}_b_proj") for letter in "kv"]
        return dict(zip(names, (by_head[:, :keys].transpose(0, 2, 1), by_head[:, keys:]), strict=True))
    if part == "input_linear":
        gate, up = np.split(values, 2, axis=1)
        stem = name.removesuffix("input_linear.weight")
        return {f"{stem}experts.w1.weight": gate, f"{stem}experts.w3.weight": up}
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(values.transpose(0, 2, 1), 2, axis=1)
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": values.transpose(0, 2, 1)}
    return {re.sub(r"(expert|correction)_bias$", r"\1_bias.bias", name): values.squeeze()}


def table_name(name: str, table: Any) -> str:
    """The name in the file."""
    name = name.replace("correction_bias.bias", "correction.bias").replace("block_sparse_moe.exp", "feed_forward.exp")
    tries = (name, name.removeprefix("model."))  # the table has experts of w1, w2 and w3 without the first part
    found = next(filter(None, (table.get_name(each, try_suffixes=(".weight", ".bias")) for each in tries)), None)
    assert found is not None, name
    return str(found)


def mixture(folder: Path, name: str, type_: str = "F32", swap: str | None = None) -> Path:
    """A published checkpoint and file.gguf beside it; in tensors called `swap` two parts change places."""
    model = tiny_experts.make(name, tie_word_embeddings=name == "lfm2_moe")
    model.save_pretrained(folder / "merged")
    checkpoint: dict[str, Values] = {}
    for file in (folder / "merged").glob("*.safetensors"):
        checkpoint |= load_file(file)
    single: dict[str, dict[int, Values]] = defaultdict(dict)
    for key in list(checkpoint):
        if match := EXPERT.fullmatch(key):
            single[f"{match[1]}.{match[3]}.weight"][int(match[2])] = checkpoint.pop(key)
    tensors = {key: np.stack([each[index] for index in sorted(each)]) for key, each in single.items()}
    for key, values in checkpoint.items():
        tensors |= pieces(key, values, model.config)
    architecture = MIXTURES[name]
    known = next(key for key, each in gguf.MODEL_ARCH_NAMES.items() if each == architecture)
    table = gguf.get_tensor_name_map(known, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(folder / "file.gguf"), architecture)
    writer.add_block_count(model.config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType[type_]
    for key, values in tensors.items():
        place = table_name(key, table)
        values = np.ascontiguousarray(values[[1, 0, *range(2, len(values))]] if place == swap else values)
        if values.ndim == 3 and values.shape[-1] % 32 == 0:
            writer.add_tensor(place, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, values)
    finish(writer)
    return folder / "file.gguf"


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_compared_part_by_part(tmp_path: Path, name: str) -> None:
    right = checked(mixture(tmp_path, name, "Q8_0"))
    assert right.faults == []
    if name == "granitemoe" and not right.layout_known:
        pytest.skip("this release of transformers has no interface for Granite's experts")
    assert right.unchecked == []
    assert right.layout_known
    assert 0.5 < right.q8_0_error <= 1


@pytest.mark.parametrize(
    "name, swap",
    [
        ("olmoe", "blk.1.ffn_up_exps.weight"),
        ("llama4_text", "blk.0.ffn_down_exps.weight"),
        ("deepseek_v2", "blk.1.ffn_gate_exps.weight"),
        ("deepseek_v2", "blk.0.attn_k_b.weight"),
        ("deepseek_v3", "blk.1.attn_v_b.weight"),
    ],
)
def test_parts_at_each_others_place_are_a_fault(tmp_path: Path, name: str, swap: str) -> None:
    (fault,) = checked(mixture(tmp_path, name, swap=swap)).faults
    assert swap in fault


@pytest.mark.parametrize("name", ["qwen2_moe", "llama4_text", "deepseek_v2", "mixtral"])
def test_a_model_is_filled_with_the_values_of_a_file(tmp_path: Path, name: str) -> None:
    file = mixture(tmp_path, name)
    model = AutoModelForCausalLM.from_config(tiny_experts.make(name).config, dtype=torch.float32)
    checked(file, model)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert all(torch.equal(values, wanted[key]) for key, values in model.state_dict().items())


def test_the_shared_mlp_of_granite_is_not_known() -> None:
    model = nn.Module()
    assert knows_layout("granitemoe", [], model)
    model.add_module("shared_mlp", nn.Linear(2, 2))
    assert not knows_layout("granitemoe", [], model)
