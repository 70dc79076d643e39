"""The config and the tokenizer of a GGUF file, as transformers reads them from its header.

transformers turns each word of the vocabulary into arrays whenever it reads a header, which takes seconds for a config
and again for a tokenizer. The usual small files that they are saved as are kept in the user's cache directory
(qdora/gguf), and later commands read those.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from qdora.files.atomic import atomic_directory, disk_reason, remove_directory
from qdora.files.console import OF_THIS_PROCESS
from qdora.files.environment import package_versions
from qdora.files.user_paths import cache_folder
from qdora.files.work_lock import in_turn
from qdora.model.gguf_file import GgufHeader, read_header

logger = logging.getLogger("qdora")

_PACKAGES = ("transformers", "tokenizers", "gguf")


def config_of_gguf(path: Path) -> PreTrainedConfig:
    """The config. Raises what transformers raises for a header that it cannot use."""
    header = read_header(path)
    if header.architecture == "gpt-oss":
        return _gpt_oss_config(header)
    config: PreTrainedConfig = _kept(header, "config", AutoConfig.from_pretrained)
    return _with_experts(config, header)


def _gpt_oss_config(header: GgufHeader) -> PreTrainedConfig:
    """transformers 5.24 fails on files of gpt-oss: it takes the length of a setting's name for its value.

    Raises ValueError if a setting is missing.
    """

    def setting(name: str, default: Any = None) -> Any:
        found = header.settings.get(f"gpt-oss.{name}", default)
        if found is None:
            raise ValueError(f"the header has no gpt-oss.{name}")
        return found

    def token(name: str) -> Any:
        return header.settings.get(f"tokenizer.ggml.{name}_token_id")

    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": setting("rope.freq_base")}
    if header.settings.get("gpt-oss.rope.scaling.type") == "yarn":
        # The bounds are not rounded in this family; the file does not say so.
        rope |= {"rope_type": "yarn", "truncate": False, "factor": setting("rope.scaling.factor")}
        rope["original_max_position_embeddings"] = setting("rope.scaling.original_context_length")
        rope["beta_fast"] = setting("rope.scaling.yarn_beta_fast", 32.0)
        rope["beta_slow"] = setting("rope.scaling.yarn_beta_slow", 1.0)
    return GptOssConfig(
        architectures=["GptOssForCausalLM"],
        num_hidden_layers=setting("block_count"),
        max_position_embeddings=setting("context_length"),
        hidden_size=setting("embedding_length"),
        intermediate_size=setting("expert_feed_forward_length"),
        num_attention_heads=setting("attention.head_count"),
        num_key_value_heads=setting("attention.head_count_kv"),
        head_dim=setting("attention.key_length"),
        rms_norm_eps=setting("attention.layer_norm_rms_epsilon"),
        sliding_window=setting("attention.sliding_window"),
        num_local_experts=setting("expert_count"),
        num_experts_per_tok=setting("expert_used_count"),
        vocab_size=shapes["token_embd.weight"][0],
        tie_word_embeddings="output.weight" not in shapes,
        rope_parameters=rope,
        bos_token_id=token("bos"),
        eos_token_id=token("eos"),
        pad_token_id=token("padding"),
    )


def _with_experts(config: PreTrainedConfig, header: GgufHeader) -> PreTrainedConfig:
    """The config with what a file says of its experts and transformers does not read.

    transformers takes a Mixtral, which is a Llama with experts to llama.cpp, for a Llama, and the default width of a
    family for that of its experts.
    """

    def setting(name: str) -> Any:
        return header.settings.get(f"{header.architecture}.{name}")

    if config.model_type == "llama" and setting("expert_count"):
        alike = MixtralConfig().to_dict().keys() - {"model_type", "transformers_version"}
        given = {name: value for name, value in config.to_dict().items() if name in alike}
        given |= {"num_local_experts": setting("expert_count"), "num_experts_per_tok": setting("expert_used_count")}
        config = MixtralConfig(**given | {"architectures": ["MixtralForCausalLM"]})
    widths: dict[str, tuple[str, ...]] = {
        "ffn_down_exps": ("moe_intermediate_size", "intermediate_size"),
        "ffn_down_shexp": ("shared_expert_intermediate_size",),
    }
    for part, names in widths.items():
        shape = next((each.shape for each in header.tensors if each.name.endswith(f".{part}.weight")), None)
        name = next((name for name in names if hasattr(config, name)), None)
        if shape is not None and name is not None:
            setattr(config, name, shape[-1])
    return config


def tokenizer_of_gguf(path: Path) -> Any:
    """The tokenizer. Raises what transformers raises for a header that it cannot use."""
    # The automatic class asks transformers for the config, see `_gpt_oss_config`.
    header = read_header(path)
    kind = PreTrainedTokenizerFast if header.architecture == "gpt-oss" else AutoTokenizer
    return _kept(header, "tokenizer", kind.from_pretrained)


def _kept(header: GgufHeader, name: str, load: Callable[..., Any]) -> Any:
    """What `load` makes of the file, through a kept copy if the disk takes one."""
    path = header.path
    folder = cache_folder("gguf") / _identity(header) / name
    if not folder.is_dir():
        made = _make(folder, path, load)
        if made is not None:
            return made
    try:
        found = load(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: is damaged (%s). It is made anew.", folder, error, extra=OF_THIS_PROCESS)
        with suppress(OSError):  # another process may be removing it, too
            remove_directory(folder)
        return load(str(path.parent), gguf_file=path.name)
    found.name_or_path = str(path.parent)
    return found


def _make(folder: Path, path: Path, load: Callable[..., Any]) -> Any | None:
    """Save in `folder` what `load` makes of the file. Returns None, or what was made if the disk does not take it."""
    with in_turn(folder):
        if folder.is_dir():  # another process has made it meanwhile
            return None
        made = load(str(path.parent), gguf_file=path.name)
        try:
            with atomic_directory(folder) as aside:
                made.save_pretrained(aside)
        except Exception as error:
            if disk_reason(error) is None:
                raise
            logger.debug("%s: the %s of %s is not kept: %s", folder, folder.name, path, error)
            return made
    return None


def _identity(header: GgufHeader) -> str:
    """Stands for the header and for the versions that read it."""
    start = min((tensor.offset for tensor in header.tensors), default=header.path.stat().st_size)
    with header.path.open("rb") as file:
        digest = hashlib.sha256(file.read(start))
    digest.update(repr(package_versions(_PACKAGES)).encode())
    return digest.hexdigest()[:32]
