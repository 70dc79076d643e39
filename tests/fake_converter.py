"""A stand-in for llama.cpp's converter and quantiser: the same arguments, Llama models, the package `gguf`.

    fake_converter.py MODEL --outfile FILE --outtype f16      fake_converter.py IN OUT Q4_0

FAKE_FAULT in the environment makes it wrong in one way: permute, drop, ulp, step, template, words, crash, module.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FAULT = os.environ.get("FAKE_FAULT", "")
Values = np.ndarray[Any, np.dtype[Any]]


def name_of(name: str) -> str:
    """llama.cpp's name of a tensor of a Llama checkpoint."""
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{leaf}"


def interleaved(weight: Values, heads: int) -> Values:
    """Rows of a head as pairs that are rotated together."""
    rows = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for pair in range(rows // 2):
            for half in range(2):
                out[head * rows + 2 * pair + half] = weight[head * rows + half * (rows // 2) + pair]
    return out


def convert(model: Path, out: Path, type_: str) -> None:
    """Write the checkpoint as one file."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    words = json.loads((model / "tokenizer.json").read_text())
    vocabulary = dict(words["model"]["vocab"]) | {each["content"]: each["id"] for each in words["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda word: vocabulary[word])
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config["vocab_size"])]
    if FAULT == "words":
        tokens[40], tokens[41] = tokens[41], tokens[40]
    writer.add_token_list(tokens)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    writer.add_eos_token_id(vocabulary[settings["eos_token"]])
    template = (model / "chat_template.jinja").read_text()
    writer.add_chat_template(template + ("x" if FAULT == "template" else ""))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for file in sorted(model.glob("*.safetensors")):
        for name, values in load_file(file).items():
            part = name.split(".")[-2]
            if FAULT == "drop" and name.endswith("layers.1.mlp.up_proj.weight"):
                continue
            if part in heads and FAULT != "permute":
                values = interleaved(values, heads[part])
            values = values.astype(np.float32)
            if FAULT == "step" and part == "down_proj":
                values[0, 0] = -values[0, 0] - 0.01
            add(writer, name_of(name), values, type_)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


def add(writer: Any, name: str, values: Values, type_: str) -> None:
    """Norms stay in float32, as llama.cpp has them."""
    if type_ == "f32" or values.ndim == 1:
        writer.add_tensor(name, values)
    elif type_ == "f16":
        half = values.astype(np.float16)
        if FAULT == "ulp" and name == "blk.0.ffn_up.weight":
            half[2, 3] = np.nextafter(half[2, 3], np.float16(np.inf))
        writer.add_tensor(name, half)
    else:
        kind = gguf.GGMLQuantizationType[type_.upper()]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def quantize(source: Path, out: Path, type_: str) -> None:
    """Copy a file, its matrices in `type_`."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(out), "llama")
    for name in ("llama.block_count", "tokenizer.ggml.eos_token_id"):
        writer.add_uint32(name, reader.get_field(name).contents())
    writer.add_token_list(reader.get_field("tokenizer.ggml.tokens").contents())
    writer.add_chat_template(reader.get_field("tokenizer.chat_template").contents())
    for tensor in reader.tensors:
        add(writer, tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32), type_)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


if __name__ == "__main__":
    if FAULT == "module":
        import no_such_module_at_all  # noqa: F401
    if FAULT == "crash":
        sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
    given = sys.argv[1:]
    if "--outfile" in given:
        convert(Path(given[0]), Path(given[given.index("--outfile") + 1]), given[given.index("--outtype") + 1])
    else:
        quantize(Path(given[0]), Path(given[1]), given[2].lower())
