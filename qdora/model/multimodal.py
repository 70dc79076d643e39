"""The language part of a multimodal model. The rest (vision tower, projector) is not loaded, and exports copy it.

The model keeps its multimodal class and the names of its layers, so an adapter fits the whole model in PEFT. Parts that
only images need are replaced by an empty `NotLoaded`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from qdora.errors import UserError
from qdora.files.atomic import read_json_object
from qdora.model.checkpoint import Stored, StoredTensor

_FAMILIES = ("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""model_type of the configs whose text logits were compared with those of the whole model."""

TRAINED_PART = "the language part; what is for images is neither loaded nor trained, and unchanged in exports"


class NotLoaded(nn.Module):
    """Stands for a part that stays in the files of its source."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.is_linear = {path: isinstance(module, nn.Linear) for path, module in part.named_modules()}
        self.stored: dict[str, StoredTensor] = {}
        self.directory: Path | None = None


def is_multimodal(config: PreTrainedConfig) -> bool:
    return config.model_type in _FAMILIES


def auto_class(config: PreTrainedConfig, name: str = "") -> Any:
    if is_multimodal(config):
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    ):
        raise UserError(f"model.source: {name}: must be of {', '.join(_FAMILIES)} (got {config.model_type}).")
    return AutoModelForCausalLM


def settle_tying(config: PreTrainedConfig, directory: Path) -> None:
    """Give a Mistral 3 config the tying of its text model: a plan, which sees no tensors, would leave out the head."""
    if config.model_type == "mistral3" and "tie_word_embeddings" not in read_json_object(
        directory / "config.json"
    ):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings


def leave_out_other_parts_(model: PreTrainedModel) -> None:
    """Replace all modules of a multimodal model but the text model and the output head by `NotLoaded`s, in place."""
    if not is_multimodal(model.config):
        return
    text: Any = model.get_decoder()
    head = model.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is text)
    holder: nn.Module = model
    for step in path.split("."):
        for name, module in list(holder.named_children()):
            if name != step and module is not head:
                setattr(holder, name, NotLoaded(module))
        holder = getattr(holder, step)
    # Their text models find the borders of packed examples only in a fourth row of positions; qwen3_vl adds it itself.
    if model.config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        text.register_forward_pre_hook(_with_text_positions, with_kwargs=True)


def _with_text_positions(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Positions of a text, (rows, length), in the form (text, time, height, width), which is (4, rows, length)."""
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 2:
        kwargs = kwargs | {"position_ids": positions.unsqueeze(0).expand(4, -1, -1)}
    return args, kwargs


def not_loaded(model: nn.Module) -> dict[str, NotLoaded]:
    """Path -> part that is not loaded; empty for a model of text alone."""
    return {path: module for path, module in model.named_modules() if isinstance(module, NotLoaded)}


def set_aside(stored: Mapping[str, Stored], model: nn.Module, directory: Path) -> dict[str, Stored]:
    """The tensors of the language part of a whole model, in `directory`; the others go to their `NotLoaded`."""
    parts, language = not_loaded(model), {}
    for part in parts.values():
        part.stored, part.directory = {}, directory
    for name, item in stored.items():
        holder = next((path for path in parts if name.startswith(f"{path}.")), None)
        if holder is None:
            language[name] = item
        elif isinstance(item, StoredTensor):
            parts[holder].stored[item.key] = item
        else:
            raise UserError(f"model.source: {directory}: {name} must not be quantised.")
    return language


def carried(model: nn.Module) -> dict[str, StoredTensor]:
    """Key in the source -> tensor of the parts that are not loaded, for an export."""
    return {key: item for part in not_loaded(model).values() for key, item in part.stored.items()}


def all_paths(model: nn.Module) -> list[str]:
    """Paths of all modules, also of those that are not loaded."""
    others = [
        f"{path}.{inner}" for path, part in not_loaded(model).items() for inner in part.is_linear if inner
    ]
    return [path for path, _ in model.named_modules()] + others


def linear_not_loaded(model: nn.Module) -> list[str]:
    return [
        f"{path}.{inner}".removesuffix(".")
        for path, part in not_loaded(model).items()
        for inner, is_linear in part.is_linear.items()
        if is_linear
    ]


def processor_files(model: nn.Module) -> dict[str, str]:
    """Name -> text of the files that make images into tensors."""
    names = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    files = [part.directory / name for part in not_loaded(model).values() if part.directory for name in names]
    return {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}
