"""The config and the tokenizer of an export, with the names of transformers 4 beside those of transformers 5.

transformers 5 writes the settings of the rotary embedding as `rope_parameters` alone, tied heads of the language part
for the whole model alone, the number of Qwen3's experts under another name, chat templates to files of their
own, and names of its own classes. It reads the older names, too, and other programs read only these: Ollama and mlx-lm
take a missing `rope_theta` for the default, and TensorRT-LLM 1.2 (transformers 4.57) knows no class TokenizersBackend.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qdora.files.json_file import read_json_object

_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
"""Model type -> transformers 4's names of the base and of the rotated share, if not those of most models."""
_PIECES = "tokenizer.model"
_LOCAL_BASE = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq", "olmo3": None}
"""Model types whose sliding layers have a rotary embedding of their own -> transformers 4's name of its base; None if
it is the base of all layers. Scaling was always that of full attention alone."""


def config_text(config: PreTrainedConfig) -> str:
    """The text of config.json: that of transformers, and the rotary embedding under its older names."""
    document: dict[str, Any] = json.loads(config.to_json_string())
    _add_older_names(document)
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _add_older_names(config: dict[str, Any]) -> None:
    """Add them to a config and to those inside it."""
    for value in list(config.values()):
        if isinstance(value, dict) and "model_type" in value:
            _add_older_names(value)
    rope = config.get("rope_parameters") or {}
    kind = config.get("model_type")
    if isinstance(config.get("text_config"), dict) and "tie_word_embeddings" in config:
        config["text_config"].setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    if kind == "qwen3_moe" and "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    if "rope_theta" in rope:
        base, share = _NAMES.get(str(kind), ("rope_theta", "partial_rotary_factor"))
        config[base] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            config[share] = rope["partial_rotary_factor"]
    elif kind == "modernbert-decoder" and rope.keys() == {"full_attention", "sliding_attention"}:
        config["global_rope_theta"] = rope["full_attention"]["rope_theta"]
        config["local_rope_theta"] = rope["sliding_attention"]["rope_theta"]
        return
    elif kind in _LOCAL_BASE and rope.keys() == {"full_attention", "sliding_attention"}:
        local, local_base = rope["sliding_attention"], _LOCAL_BASE[kind]
        rope = rope["full_attention"]
        if _scaling(local) or (local_base is None and local["rope_theta"] != rope["rope_theta"]):
            return  # transformers 4 had no names for this
        config["rope_theta"] = rope["rope_theta"]
        if local_base is not None:
            config[local_base] = local["rope_theta"]
    else:
        return
    scaling = _scaling(rope)
    if kind in ("phi3", "phi4_multimodal"):  # took type and factors alone
        scaling = {key: scaling[key] for key in scaling.keys() - {"rope_type", "original_max_position_embeddings"}}
    if scaling:
        config["rope_scaling"] = scaling
    elif kind == "apertus":
        config["rope_scaling"] = None  # transformers 4 had a scaling by default


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """The `rope_scaling` of transformers 4; empty without scaling. `type` is the first name of `rope_type`."""
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor", "type")}
    if scaling in ({}, {"rope_type": "default"}):
        return {}
    return scaling | {"type": "mrope" if "mrope_section" in scaling else rope.get("rope_type", "default")}


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer so that older programs read it, too: class, special tokens, chat template.

    Of the directory that it was loaded from it keeps what transformers 5 leaves out: whether texts begin and end with
    marks, and the model of sentencepiece, which llama.cpp's converter needs for Gemma and Phi-3.
    """
    tokenizer.save_pretrained(str(directory))
    file = directory / "tokenizer_config.json"
    if not file.is_file():  # one of mistral-common, which is a file of its own
        return
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    source = Path(tokenizer.name_or_path)
    given = read_json_object(source / file.name) if (source / file.name).is_file() else {}
    settings |= {key: given[key] for key in ("add_bos_token", "add_eos_token") if key in given}
    if (source / _PIECES).is_file() and not (directory / _PIECES).exists():
        shutil.copyfile(source / _PIECES, directory / _PIECES)
        beyond = {token: id for token, id in tokenizer.get_added_vocab().items() if id >= tokenizer.vocab_size}
        (directory / "added_tokens.json").write_text(json.dumps(beyond, indent=2, ensure_ascii=False) + "\n", "utf-8")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        settings["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    elif template is not None:
        settings["chat_template"] = template
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
