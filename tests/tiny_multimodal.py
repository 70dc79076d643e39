"""Tiny random multimodal models of several families, saved under the names of the Hub's checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from tests import tiny_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
TOWER: dict[str, Any] = VISION | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
QWEN: dict[str, Any] = VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 64}
QWEN_IDS = {"image_token_id": 396, "video_token_id": 397, "vision_start_token_id": 398, "vision_end_token_id": 399}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def config(family: str) -> Any:
    """Blocks of 64 fit into the rows of every text layer; Gemma 3, Qwen3-VL and Qwen3.5 tie their heads."""
    if family == "gemma3":
        text = TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
        return Gemma3Config(
            text_config=text,
            vision_config=TOWER | {"vision_use_head": False},
            mm_tokens_per_image=4,
            image_token_id=396,
            boi_token_id=397,
            eoi_token_id=398,
        )
    if family == "mistral3":
        text = TEXT | {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
        vision = TOWER | {"model_type": "pixtral", "head_dim": 16}
        return Mistral3Config(text_config=text, vision_config=vision, image_token_id=396, tie_word_embeddings=False)
    if family == "qwen2_5_vl":
        vision = QWEN | {"fullatt_block_indexes": [1]}
        text = TEXT | {"rope_parameters": ROPE}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS)
    if family == "qwen3_5":
        linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        rope = ROPE | {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
        text = TEXT | linear | {"head_dim": 16, "num_hidden_layers": 4, "rope_parameters": rope}
        vision = QWEN | {"num_position_embeddings": 16}
        return transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **QWEN_IDS)
    assert family == "qwen3_vl"
    vision = QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = TEXT | {"head_dim": 16, "rope_parameters": ROPE | {"mrope_interleaved": True}}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **QWEN_IDS)


FAMILIES = ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl")
FAMILIES += ("qwen3_5",) if hasattr(transformers, "Qwen3_5Config") else ()  # not in transformers 5.0

# Names in the model -> names in the files that the publishers gave to the Hub.
_PUBLISHED: dict[str, tuple[tuple[str, str], ...]] = {
    "gemma3": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        (r"^model\.", ""),
    ),
    "mistral3": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    ),
    "qwen2_5_vl": ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    "qwen3_vl": (),
    "qwen3_5": (),
}


def published_name(family: str, name: str) -> str:
    """The name that a tensor has in the family's files on the Hub."""
    for pattern, replacement in _PUBLISHED[family]:
        found = re.sub(pattern, replacement, name)
        if found != name:
            return found
    return name


def write_published_config(file: Path, family: str) -> None:
    """Change a config.json to the form in which the publishers gave it to the Hub."""
    found = json.loads(file.read_text())
    if family == "mistral3":  # says nothing of tying, and transformers' default is wrong for it
        del found["tie_word_embeddings"]
    if family == "qwen2_5_vl":  # one level for the whole and its text part, and the older names of rotary settings
        text = found.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        text |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        found = {**text, **found}
    file.write_text(json.dumps(found))


def write_model(directory: Path, family: str, *, published: bool = True) -> dict[str, torch.Tensor]:
    """Save a model in bfloat16 with a tokenizer and a processor's file; returns the tensors of its files.

    `published`: under the names of the Hub's files, else under those of the model in transformers 5.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config(family), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # norms and biases start at 1 and 0
    tied = set(model.all_tied_weights_keys)
    tensors = {
        published_name(family, name) if published else name: tensor.detach().to(torch.bfloat16).clone()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    model.config.dtype = model.config.text_config.dtype = model.config.vision_config.dtype = "bfloat16"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if published:
        write_published_config(directory / "config.json", family)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    tiny_tokenizer.make().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text('{"image_processor_type": "of a test"}\n')
    return tensors
