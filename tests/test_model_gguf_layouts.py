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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
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
from qdora.export.gguf import _error, compare_tensors
from qdora.model.gguf_file import check_gguf, read_header
from tests import tiny_experts

gguf = pytest.importorskip("gguf")

from tests.fake_converter import Values, finish, interleaved, name_of  # noqa: E402

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


def written(folder: Path, config: Any, architecture: str, change: Change, *, rows: int = 48) -> Path:
    """A checkpoint in float32 with random norms, and file.gguf beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder / "merged")
    writer = gguf.GGUFWriter(str(folder / "file.gguf"), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_token_list([f"word{index}" for index in range(rows)])
    for name, parameter in model.named_parameters():
        values = change(name, parameter.detach().numpy().copy())
        writer.add_tensor(
            name_of(name, architecture), values[:rows] if name.startswith("model.embed_tokens") else values
        )
    finish(writer)
    return folder / "file.gguf"


def checked(file: Path) -> tuple[dict[str, Any], list[str]]:
    return compare_tensors(read_header(file), file.with_name("merged"))


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
    right, faults = checked(written(tmp_path, config(**SIZES), architecture, change))
    assert faults == []
    assert right["num_unchecked"] == 0
    assert right["dense_error"] < 1e-6
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    other = permuted if change is as_it_is else as_it_is
    _, faults = checked(written(wrong, config(**SIZES), architecture, other))
    assert faults
    assert all(("norm" if change is plus_one else "attn_") in fault for fault in faults)


def test_an_unknown_layout_is_not_compared(tmp_path: Path) -> None:
    file = written(tmp_path, Ernie4_5Config(**SIZES), "ernie4_5", permuted)
    found, faults = checked(file)
    assert faults == []
    assert found["num_unchecked"] == found["num_tensors"] == 20
    with pytest.raises(UserError, match="'ernie4_5' in GGUF files is not known"):
        check_gguf(file)


def test_rows_without_a_word_may_be_missing(tmp_path: Path) -> None:
    config = Gemma3TextConfig(**SIZES, layer_types=["full_attention"] * 2)
    found, faults = checked(written(tmp_path, config, "gemma3", plus_one, rows=45))
    assert faults == []
    assert found["dense_error"] < 1e-6


def test_a_scale_that_is_in_no_file(tmp_path: Path) -> None:
    config = Gemma2Config(**SIZES | {"num_hidden_layers": 46, "hidden_size": 32, "intermediate_size": 32})
    file = written(tmp_path, config, "gemma2", plus_one)
    assert checked(file)[1] == []
    with pytest.raises(UserError, match="the attention scale of this gemma2 is not in GGUF files"):
        check_gguf(file)


# --- mixtures: the names of published checkpoints by the table of the package gguf, as the converter does

MIXTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe",
    "glm4_moe": "glm4moe",
    "lfm2_moe": "lfm2moe",
    "llama4_text": "llama4",
    "minimax_m2": "minimax-m2",
}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def pieces(name: str, values: Values, config: Any) -> dict[str, Values]:
    """The tensors that the converter makes of one of a checkpoint, by names for the table."""
    part = name.split(".")[-2]
    if part in ("q_proj", "k_proj") and config.model_type == "mixtral":
        return {name: interleaved(values, config.num_attention_heads if part == "q_proj" else 2)}
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
def test_mixtures_are_compared_expert_by_expert(tmp_path: Path, name: str) -> None:
    right, faults = checked(mixture(tmp_path, name, "Q8_0"))
    assert faults == []
    assert right["num_unchecked"] == 0
    assert 0.5 < right["q8_0_error"] <= 1


@pytest.mark.parametrize(
    "name, swap", [("olmoe", "blk.1.ffn_up_exps.weight"), ("llama4_text", "blk.0.ffn_down_exps.weight")]
)
def test_experts_at_each_others_place_are_a_fault(tmp_path: Path, name: str, swap: str) -> None:
    faults = checked(mixture(tmp_path, name, swap=swap))[1]
    assert len(faults) == 1


Q8_0 = gguf.GGMLQuantizationType.Q8_0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(-24, 10), st.sampled_from([0.0, 0.5, 0.99]))
def test_q8_0_stays_within_its_rounding(seed: int, exponent: int, zeros: float) -> None:
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((3, 64)) * 2.0**exponent).astype(np.float32)
    weight[random.random(weight.shape) < zeros] = 0
    values = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, Q8_0), Q8_0))
    assert _error("Q8_0", values, torch.from_numpy(weight))[2] <= 1
    # A weight that is more than another step away is seen.
    steps = np.abs(weight).reshape(3, 2, 32).max(axis=2) / 127
    if steps[1, 1] > 2.0**-13:
        values[1, 40] += 1.2 * float(steps[1, 1])
        assert _error("Q8_0", values, torch.from_numpy(weight))[2] > 1


def test_nan_is_no_small_error() -> None:
    for type_ in ("F16", "Q8_0", "Q4_K"):
        assert not _error(type_, torch.full((2, 32), torch.nan), torch.ones(2, 32))[2] <= 1
