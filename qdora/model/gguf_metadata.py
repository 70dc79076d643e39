"""The config and the tokenizer of a GGUF file, as transformers reads them from its header.

transformers turns each word of the vocabulary into arrays whenever it reads a header, which takes seconds for a config
and again for a tokenizer. The usual small files that they are saved as are kept in the user's cache directory
(qdora/gguf), and later commands read those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, MixtralConfig, PreTrainedConfig

from qdora.files.atomic import atomic_directory, disk_reason
from qdora.files.environment import package_versions
from qdora.files.user_paths import cache_folder
from qdora.files.work_lock import in_turn
from qdora.model.gguf_file import GgufHeader, read_header

_PACKAGES = ("transformers", "tokenizers", "gguf")


def config_of_gguf(path: Path) -> PreTrainedConfig:
    """The config. Raises what transformers raises for a header that it cannot use."""
    header = read_header(path)
    return _with_experts(_kept(header, "config", AutoConfig.from_pretrained), header)


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
    return _kept(read_header(path), "tokenizer", AutoTokenizer.from_pretrained)


def _kept(header: GgufHeader, name: str, load: Callable[..., Any]) -> Any:
    """What `load` makes of the file, through a kept copy if the disk takes one."""
    path = header.path
    folder = cache_folder("gguf") / _identity(header) / name
    if not folder.is_dir():
        with in_turn(folder):
            if not folder.is_dir():  # another process may have made it meanwhile
                made = load(str(path.parent), gguf_file=path.name)
                try:
                    with atomic_directory(folder) as aside:
                        made.save_pretrained(aside)
                except Exception as error:
                    if disk_reason(error) is None:
                        raise
                    return made
    kept = load(str(folder), local_files_only=True)
    kept.name_or_path = str(path.parent)
    return kept


def _identity(header: GgufHeader) -> str:
    """Stands for the header and for the versions that read it."""
    start = min((tensor.offset for tensor in header.tensors), default=header.path.stat().st_size)
    with header.path.open("rb") as file:
        digest = hashlib.sha256(file.read(start))
    digest.update(repr(package_versions(_PACKAGES)).encode())
    return digest.hexdigest()[:32]
