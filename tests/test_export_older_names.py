"""The names that programs read which know transformers 4 alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    ApertusConfig,
    AutoConfig,
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLTextConfig,
    Qwen3MoeConfig,
)

from qdora.export.older_names import config_text, save_tokenizer
from qdora.files.atomic import json_text
from tests import tiny_tokenizer

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
WIDE = {"hidden_size": 64, "num_attention_heads": 4}
OLDER = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rotary_pct", "rotary_emb_base")

# A config as a file of transformers 4 gives it, and its file's names
CONFIGS: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama": (LlamaConfig(rope_theta=5e5), {"rope_theta": 5e5}),
    "llama3": (
        LlamaConfig(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}, max_position_embeddings=65536),
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3}},
    ),
    "yarn, as Qwen2 has it": (
        LlamaConfig(
            rope_theta=1e6,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            max_position_embeddings=131072,
        ),
        {
            "rope_theta": 1e6,
            "rope_scaling": {
                "rope_type": "yarn",
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
    ),
    "a part of each head": (
        Glm4Config(rope_theta=2e4, partial_rotary_factor=0.5),
        {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
    ),
    "gpt_neox": (
        GPTNeoXConfig(rotary_emb_base=2e4, rotary_pct=0.5),
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
    ),
    "phi3": (
        Phi3Config(**WIDE, rope_scaling={"type": "longrope", **FACTORS}, max_position_embeddings=131072),
        {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "rope_scaling": {"type": "longrope", **FACTORS}},
    ),
    "qwen2_vl": (
        Qwen2VLTextConfig(**WIDE, rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}),
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3]}},
    ),
    "gemma3": (
        Gemma3TextConfig(rope_theta=2e6, rope_local_base_freq=2e4, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        {
            "rope_theta": 2e6,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
        },
    ),
    "olmo3": (Olmo3Config(num_hidden_layers=4, rope_theta=5e5), {"rope_theta": 5e5}),
    "olmo3 with two bases, which had no names": (
        Olmo3Config(
            num_hidden_layers=4,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_has_both_names_and_reads_to_the_same_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    config, expected = CONFIGS[name]
    caplog.clear()
    (tmp_path / "config.json").write_text(config_text(config))
    document = json.loads((tmp_path / "config.json").read_text())
    assert {key: document[key] for key in OLDER if key in document} == expected
    again = AutoConfig.from_pretrained(tmp_path)
    assert not caplog.records
    assert type(again) is type(config)
    assert without_type(again.rope_parameters) == without_type(config.rope_parameters)
    assert json.loads(config_text(again)) == document | {"rope_parameters": again.rope_parameters}


def without_type(rope: dict[str, Any]) -> dict[str, Any]:
    """Settings of a rotary embedding without the first name of rope_type."""
    rope = {key: without_type(value) if isinstance(value, dict) else value for key, value in rope.items()}
    return {key: value for key, value in rope.items() if key != "type"}


def test_a_config_inside_another_has_both_names() -> None:
    config = Gemma3Config(text_config={"rope_theta": 2e6, "num_hidden_layers": 2})
    document = json.loads(config_text(config))
    assert document["text_config"]["rope_theta"] == 2e6
    assert document["text_config"]["rope_local_base_freq"] == 1e4
    assert "rope_theta" not in document


def test_a_tied_head_and_the_experts_have_both_names() -> None:
    tied = json.loads(config_text(Qwen2_5_VLConfig(tie_word_embeddings=True)))
    assert tied["text_config"]["tie_word_embeddings"] is tied["tie_word_embeddings"] is True
    assert json.loads(config_text(Qwen3MoeConfig(num_experts=12)))["num_experts"] == 12
    bases = {
        "full_attention": {"rope_type": "default", "rope_theta": 2e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    decoder = json.loads(config_text(ModernBertDecoderConfig(rope_parameters=bases)))
    assert (decoder["global_rope_theta"], decoder["local_rope_theta"]) == (2e5, 3e4)
    plain = ApertusConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert json.loads(config_text(plain))["rope_scaling"] is None


@pytest.mark.parametrize("templates", [1, 2, 0])
def test_a_tokenizer_is_the_same_under_names_that_older_programs_read(tmp_path: Path, templates: int) -> None:
    tokenizer = tiny_tokenizer.make(chat_template=tiny_tokenizer.CHATML if templates else None)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<tool>"]})
    if templates == 2:
        tokenizer.chat_template = {"default": tiny_tokenizer.CHATML, "tool_use": "{{ tools }}"}
    tmp_path.joinpath("config.json").write_text(json_text({"model_type": "llama"}))
    save_tokenizer(tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>", "<tool>"]
    assert "extra_special_tokens" not in settings  # a list there is an error in transformers 4
    assert (
        settings.get("chat_template")
        == (
            None,
            tiny_tokenizer.CHATML,
            [{"name": "default", "template": tiny_tokenizer.CHATML}, {"name": "tool_use", "template": "{{ tools }}"}],
        )[templates]
    )
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.chat_template == tokenizer.chat_template
    assert again.extra_special_tokens == tokenizer.extra_special_tokens
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_what_transformers_5_leaves_out_of_a_tokenizer_is_kept(tmp_path: Path) -> None:
    tiny_tokenizer.make().save_pretrained(tmp_path / "source")
    file = tmp_path / "source/tokenizer_config.json"
    file.write_text(json_text(json.loads(file.read_text()) | {"add_bos_token": False, "add_eos_token": False}))
    (tmp_path / "source/tokenizer.model").write_bytes(b"pieces")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.add_tokens(["<new>"])
    save_tokenizer(tokenizer, tmp_path / "out")
    kept = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (kept["add_bos_token"], kept["add_eos_token"]) == (False, False)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((tmp_path / "out/added_tokens.json").read_text())["<new>"] == len(tokenizer) - 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a <new>").input_ids == tokenizer("a <new>").input_ids
    save_tokenizer(tiny_tokenizer.make(), tmp_path / "other")  # of no directory
    assert not (tmp_path / "other/tokenizer.model").exists()
