"""Stand-ins for what this machine lacks: NVIDIA's driver, and llama.cpp's converter. Nothing imports torch.

A stand-in for llama.cpp's converter and quantiser: the same arguments, the package `gguf`, few models
(`ARCHITECTURES`).

    fakes.py MODEL --outfile FILE --outtype f16      fakes.py IN OUT Q4_0

The package writes no type of 256 weights a block. For those of K the stand-in takes the type that llama.cpp has for
other rows (`SMALL_BLOCKS`), but makes Q2_K itself where the rows fit.

FAKE_FAULT in the environment makes it wrong in one way: permute, drop, ulp, step, template, crash, module, experts (two
change places), halves (gate and up do), gone (up is not there).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

CDLL = ctypes.CDLL


class CudaLibrary:
    """libcuda with the given attributes of each device; CUDA's errors for what it does not have."""

    def __init__(self, devices: Sequence[Mapping[int, int]], called: Callable[[], Any]) -> None:
        self.devices, self.called = devices, called

    def cuInit(self, flags: int) -> int:
        self.called()
        return 0 if self.devices else 100  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:
        handle._obj.value = ordinal + 7  # a handle is no ordinal
        return 0 if ordinal < len(self.devices) else 101  # CUDA_ERROR_INVALID_DEVICE

    def cuDeviceGetAttribute(self, value: Any, number: int, handle: Any) -> int:
        found = self.devices[handle.value - 7].get(number)
        value._obj.value = found or 0
        return 1 if found is None else 0  # CUDA_ERROR_INVALID_VALUE


def install_driver(
    monkeypatch: pytest.MonkeyPatch | None,
    devices: Sequence[Mapping[int, int]] | None,
    called: Callable[[], Any] = lambda: None,
) -> None:
    """Let ctypes load the library, or fail if `devices` is None; without monkeypatch for good."""

    def load(name: Any, *arguments: Any, **options: Any) -> Any:
        if name != "libcuda.so.1":
            return CDLL(name, *arguments, **options)
        if devices is None:
            raise OSError(f"{name}: cannot open shared object file")
        return CudaLibrary(devices, called)

    if monkeypatch is None:
        ctypes.CDLL = load  # type: ignore[misc,assignment]
    else:
        monkeypatch.setattr(ctypes, "CDLL", load)


ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "minimax_m2": "minimax-m2",
    "olmoe": "olmoe",
    "glm4_moe": "glm4moe",
    "lfm2_moe": "lfm2moe",
}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
SMALL_BLOCKS = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "q4_0", "q2_k": "q4_0"}
FAULT = os.environ.get("FAKE_FAULT", "")
Values = np.ndarray[Any, np.dtype[Any]]


@cache
def table_of(architecture: str) -> Any:
    """llama.cpp's own table of names."""
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(known, 64)


def name_of(name: str, architecture: str = "llama") -> str:
    """llama.cpp's name of a tensor of a checkpoint."""
    for before, after in (
        (r"correction_bias$", "correction.bias"),
        (r"expert_bias$", "expert_bias.bias"),
        (r"block_sparse_moe\.exp", "feed_forward.exp"),
    ):
        name = re.sub(before, after, name)
    tries = (name, name.removeprefix("model."))  # the table has experts of w1, w2 and w3 without the first part
    names = (table_of(architecture).get_name(each, try_suffixes=(".weight", ".bias")) for each in tries)
    return str(next(filter(None, names)))


def interleaved(weight: Values, heads: int) -> Values:
    """Rows of a head as pairs that are rotated together."""
    rows = weight.shape[0] // heads
    places = [
        head * rows + half * rows // 2 + pair for head in range(heads) for pair in range(rows // 2) for half in (0, 1)
    ]
    return weight[places]


def expert_tensors(checkpoint: dict[str, Values], architecture: str) -> dict[str, Values]:
    """The tensors of all experts of a block, (experts, out, in), taken out of a checkpoint."""
    single: dict[str, dict[int, Values]] = defaultdict(dict)
    for name in list(checkpoint):
        if match := EXPERT.fullmatch(name):
            single[f"{match[1]}.{match[3]}.weight"][int(match[2])] = checkpoint.pop(name)
    stacked = {name: np.stack([each[index] for index in sorted(each)]) for name, each in single.items()}
    found = {name_of(name, architecture): values for name, values in stacked.items()}
    gate, up = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"
    if FAULT == "experts":
        found[up] = found[up][[1, 0, *range(2, len(found[up]))]]
    elif FAULT == "halves":
        found[gate], found[up] = found[up], found[gate]
    elif FAULT == "gone":
        del found[up]
    return found


def add_settings(writer: Any, config: dict[str, Any]) -> None:
    """What the converter writes of a config."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    for name, value in {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": heads,
        "head_count_kv": config["num_key_value_heads"],
        "layer_norm_rms_eps": config.get("rms_norm_eps", 1e-5),
        "rope_freq_base": rope["rope_theta"],
        "key_length": head_dim,
    }.items():
        getattr(writer, f"add_{name}")(value)
    if config["model_type"] in ("llama", "mixtral", "minimax_m2"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "minimax_m2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def convert_to_gguf(model: Path, out: Path, type_: str, *, fused: bool = False) -> None:
    """Write the checkpoint as one file; `fused` keeps gate and up of experts together."""
    config = json.loads((model / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(str(out), architecture)
    add_settings(writer, config)
    words = json.loads((model / "tokenizer.json").read_text())
    vocabulary = dict(words["model"]["vocab"]) | {each["content"]: each["id"] for each in words["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda word: vocabulary[word])
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    added = {each["content"] for each in words["added_tokens"]}
    writer.add_token_types([gguf.TokenType.CONTROL if word in added else gguf.TokenType.NORMAL for word in tokens])
    writer.add_token_merges([" ".join(pair) for pair in words["model"]["merges"]])
    settings = json.loads((model / "tokenizer_config.json").read_text())
    writer.add_eos_token_id(vocabulary[settings["eos_token"]])
    template = (model / "chat_template.jinja").read_text()
    writer.add_chat_template(template + ("x" if FAULT == "template" else ""))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    checkpoint: dict[str, Values] = {}
    for file in sorted(model.glob("*.safetensors")):
        checkpoint |= load_file(file)
    experts = expert_tensors(checkpoint, architecture)
    if fused:
        for layer in range(config["num_hidden_layers"]):
            halves = [experts.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
            experts[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(halves, axis=1)
    for name, values in experts.items():
        add_tensor(writer, name, np.ascontiguousarray(values, np.float32), type_)
    for name, values in checkpoint.items():
        part = name.split(".")[-2]
        if FAULT == "drop" and name.endswith("layers.1.mlp.up_proj.weight"):
            continue
        if part in heads and architecture == "llama" and FAULT != "permute":
            values = interleaved(values, heads[part])
        values = values.astype(np.float32).squeeze()  # convolutions, and the gates of shared experts
        if FAULT == "step" and part == "down_proj":
            values[0, 0] = -values[0, 0] - 0.01
        add_tensor(writer, name_of(name, architecture), values, type_)
    finish(writer)


def finish(writer: Any) -> None:
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


def add_tensor(writer: Any, name: str, values: Values, type_: str) -> None:
    """Norms, routers, biases and convolutions stay in float32, as llama.cpp has them."""
    if type_ == "f32" or values.ndim == 1 or values.shape[-1] % 32 or "ffn_gate_inp" in name:
        writer.add_tensor(name, values)
    elif type_ == "f16":
        half = values.astype(np.float16)
        if FAULT == "ulp" and name == "blk.0.ffn_up.weight":
            half[2, 3] = np.nextafter(half[2, 3], np.float16(np.inf))
        writer.add_tensor(name, half)
    elif type_ == "q2_k" and values.shape[-1] % 256 == 0:
        writer.add_tensor(name, q2_k(values), raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    else:
        kind = gguf.GGMLQuantizationType[SMALL_BLOCKS.get(type_[:4], type_).upper()]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def q2_k(values: Values) -> Values:
    """Blocks of 256: a step and a minimum in 4 bits for each 16 weights, two scales of these, weights in 2 bits."""
    groups = values.reshape(-1, 16, 16)
    lows = np.maximum(-groups.min(-1), 0)
    steps = (groups.max(-1) + lows) / 3
    scales = [(each.max(-1, keepdims=True) / 15).astype(np.float16) for each in (steps, lows)]
    held = [np.round(each / scale).astype(np.uint8) for each, scale in zip((steps, lows), scales, strict=True)]
    step, low = (each * scale.astype(np.float32) for each, scale in zip(held, scales, strict=True))
    codes = np.clip(np.round((groups + low[..., None]) / np.maximum(step, 1e-9)[..., None]), 0, 3).astype(np.uint8)
    fours = codes.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed = [held[0] | held[1] << 4, fours.sum(2, dtype=np.uint8).reshape(-1, 64)]
    return np.concatenate([*packed, *(each.view(np.uint8) for each in scales)], axis=1).reshape(len(values), -1)


def quantize_gguf(source: Path, out: Path, type_: str) -> None:
    """Copy a file, its matrices in `type_`."""
    reader = gguf.GGUFReader(str(source))
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(str(out), architecture)
    for name in (f"{architecture}.block_count", "tokenizer.ggml.eos_token_id"):
        writer.add_uint32(name, reader.get_field(name).contents())
    if base := reader.get_field(f"{architecture}.rope.freq_base"):
        writer.add_rope_freq_base(base.contents())
    writer.add_token_list(reader.get_field("tokenizer.ggml.tokens").contents())
    writer.add_chat_template(reader.get_field("tokenizer.chat_template").contents())
    for tensor in reader.tensors:
        add_tensor(writer, tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32), type_)
    finish(writer)


if __name__ == "__main__":
    if FAULT == "module":
        import no_such_module_at_all  # noqa: F401
    if FAULT == "crash":
        sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
    given = sys.argv[1:]
    if "--outfile" in given:
        convert_to_gguf(Path(given[0]), Path(given[given.index("--outfile") + 1]), given[given.index("--outtype") + 1])
    else:
        quantize_gguf(Path(given[0]), Path(given[1]), given[2].lower())
