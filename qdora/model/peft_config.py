"""PEFT's `adapter_config.json`: read by `peft.LoraConfig`, matched by PEFT's own functions, and written.

A setting is computed here (`_TAKEN`), has no effect on a trained adapter (`_WITHOUT_EFFECT`), has PEFT's default or is
off, or is refused by name. PEFT is imported where a file is read: that takes a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from qdora.adapter.experts import AdaptedExperts
from qdora.adapter.layer import AdaptedLinear, Kind
from qdora.errors import UserError, first_line, nearest
from qdora.files.json_file import read_json_object

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
MASKED = "QDORA_MASKED_LORA"
"""peft_type of an adapter that keeps the zeros of its base. PEFT refuses it; it would compute something else."""

_Regex = re.Pattern[str]
# PEFT checks no types: a wrong one fails in the middle of loading, or counts as another value.
_TAKEN: dict[str, Any] = {
    "peft_type": Literal["LORA", "QDORA_MASKED_LORA"],
    "task_type": Literal["CAUSAL_LM"] | None,
    # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a part of W into the adapter.
    "init_lora_weights": Literal[True, False, "gaussian", "eva", "orthogonal", "mica"],
    "r": PositiveInt,
    "lora_alpha": FiniteFloat,
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "use_dora": bool,
    "use_rslora": bool,
    "target_modules": _Regex | list[str] | None,
    "target_parameters": list[str] | None,
    "exclude_modules": _Regex | list[str] | None,
    "rank_pattern": dict[_Regex, PositiveInt] | None,
    "alpha_pattern": dict[_Regex, FiniteFloat] | None,
    "layers_to_transform": NonNegativeInt | list[NonNegativeInt] | None,
    "layers_pattern": _Regex | list[_Regex] | None,
    "modules_to_save": list[_Regex] | None,
    "trainable_token_indices": list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None,
    "ensure_weight_tying": bool | None,
    "base_model_name_or_path": str | None,
    "revision": str | None,
}
# Who wrote the file, how training started, run-time options.
_WITHOUT_EFFECT = {"auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_ga_config"}
_WITHOUT_EFFECT |= {"megatron_core", "peft_version", "qalora_group_size", "runtime_config"}


@dataclass(frozen=True, kw_only=True)
class AdapterDescription:
    """The JSON files of an adapter; the last three are what qdora.json adds.

    `all_linear`: of the modules that `config` selects only the linear layers but the head and routers. `masked`: B A
    keeps the zeros of a pruned base, which PEFT cannot do. `base`: name_or_path, revision and quant of the base.
    """

    config: LoraConfig
    all_linear: bool = False
    masked: bool = False
    extra: dict[str, Any] | None = None
    scalings: dict[str, float] | None = None
    base: Mapping[str, Any] | None = None

    @property
    def kind(self) -> Kind:
        return "dora" if self.config.use_dora else "lora"

    def rank_of(self, path: str) -> int:
        """Rank of the layer at `path`."""
        return int(self._match(self.config.rank_pattern, path, self.config.r))

    def alpha_of(self, path: str) -> float:
        """Alpha of the layer at `path`."""
        return float(self._match(self.config.alpha_pattern, path, self.config.lora_alpha))

    def scaling_of(self, path: str) -> float:
        """s of the layer at `path`: alpha / rank, or alpha / sqrt(rank)."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.config.use_rslora else rank)

    def _match(self, patterns: Mapping[str, Any], path: str, default: Any) -> Any:
        from peft.utils.other import get_pattern_key

        name = f"{path}.weight" if self.selects_parameter(f"{path}.weight") else path
        return patterns.get(get_pattern_key(patterns, name), default)

    def selects_parameter(self, name: str) -> bool:
        """Whether a parameter carries an adapter: a stack of experts by its path, a linear layer as <path>.weight."""
        return f".{name}".endswith(tuple(f".{target}" for target in self.config.target_parameters or ()))

    def selects(self, path: str, *, in_all_linear: bool) -> bool:
        """Whether the module at `path` carries an adapter, if it is no stack of experts."""
        from peft.tuners.tuners_utils import check_target_module_exists

        if self.selects_parameter(f"{path}.weight"):
            return True
        return (in_all_linear or not self.all_linear) and bool(check_target_module_exists(self.config, path))


def parse_adapter_config(settings: Mapping[str, Any], where: str) -> AdapterDescription:
    """What the JSON object of the file `where` says. No code that it names is imported, nothing is downloaded."""
    from peft import LoraConfig, __version__

    defaults = {each.name: each.default for each in fields(LoraConfig)}
    faults = []
    for name in sorted({"peft_type", *settings}):
        value = settings.get(name)
        if name in _TAKEN:
            try:
                TypeAdapter(_TAKEN[name], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError as error:
                reasons = dict.fromkeys(each["msg"].replace("Input should be", "must be") for each in error.errors())
                faults.append(f"{name}: {' or '.join(reasons)} (got {value!r}).")
                if name == "init_lora_weights":
                    faults[-1] += " Fix: save it by PEFT with path_initial_model_for_weight_conversion."
        elif not (name in _WITHOUT_EFFECT or value is False or value in (defaults.get(name), None, [], {}, "")):
            known = "is not supported" if name in defaults else f"is unknown to PEFT {__version__}"
            hint = "" if name in defaults else nearest(name, defaults)
            faults.append(f"{name}: {value!r} {known}; it may change what the adapter computes.{hint}")
    read = {name: value for name, value in settings.items() if name in _TAKEN and value is not None}
    if not read.get("target_modules") and not read.get("target_parameters"):
        # PEFT has a table of layers for some types of models where it is null.
        faults.append("target_modules: must name layers. Fix: write the names that the tensors have.")
    if read.get("ensure_weight_tying") and not (read.get("modules_to_save") or read.get("trainable_token_indices")):
        faults.append("ensure_weight_tying: is not supported: it ties adapters of the embedding and the head.")
    if faults:
        raise UserError(*(f"{where}: {fault}" for fault in faults))
    all_linear = str(read.get("target_modules")).lower() == ALL_LINEAR  # PEFT needs a live model for it
    read |= {"peft_type": "LORA", "init_lora_weights": True} | ({"target_modules": ".*"} if all_linear else {})
    try:
        config = LoraConfig(**read)
    except ValueError as error:  # settings that exclude each other
        raise UserError(f"{where}: {first_line(error)}") from error
    return AdapterDescription(config=config, all_linear=all_linear, masked=settings["peft_type"] == MASKED)


def adapter_config(
    layers: Mapping[str, AdaptedLinear],
    all_paths: Collection[str],
    *,
    base_name_or_path: str | None,
    revision: str | None,
    as_parameters: Collection[str] = (),
) -> dict[str, Any]:
    """The `adapter_config.json` from which PEFT builds exactly these layers (it refuses masked ones).

    `r` and `lora_alpha` are the commonest values; a layer that differs gets a pattern anchored to its path. A setting
    that older releases of PEFT do not know is written only where it is used. Linear layers in `as_parameters` are named
    by their weights, as stacks of experts are. `all_paths`: of all modules of the model.
    """
    first = next(iter(layers.values()))
    names = {path: f"{path}.weight" if path in as_parameters else path for path in layers}
    parameters = [
        names[path] for path, layer in layers.items() if isinstance(layer, AdaptedExperts) or path in as_parameters
    ]
    for name in ("kind", "masked", "dropout", "rank_stabilized"):
        shared = {getattr(layer, name) for layer in layers.values()}
        if len(shared) > 1:
            raise ValueError(f"layers differ in {name} ({sorted(shared)}); an adapter file holds one for all layers.")
    ranks = {names[path]: layer.rank for path, layer in layers.items()}
    alphas = {names[path]: float(layer.alpha) for path, layer in layers.items()}
    alphas = {path: int(alpha) if alpha.is_integer() else alpha for path, alpha in alphas.items()}
    rank, alpha = (max(sorted(set(each.values())), key=list(each.values()).count) for each in (ranks, alphas))
    return {
        "peft_type": MASKED if first.masked else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name_or_path,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else first.dropout,  # PEFT refuses any other with parameters
        "use_dora": first.kind == "dora",
        "use_rslora": first.rank_stabilized,
        "target_modules": _target_names([path for path in layers if names[path] not in parameters], all_paths),
        "exclude_modules": None,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "auto_mapping": None,
        **({"target_parameters": parameters} if parameters else {}),
    }


def sizes_in_words(directory: Path, rank: int, alpha: float) -> tuple[str, str]:
    """Rank and alpha of an adapter on disk, such as ("2 to 8", "16"), or those given if there is none."""
    path = directory / "adapter_config.json"
    config: Any = read_json_object(path) if path.exists() else {"r": rank, "lora_alpha": alpha}
    pairs = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    sizes = [sorted({config[name], *config.get(pattern, {}).values()}) for name, pattern in pairs]
    ranks, alphas = (f"{each[0]:g}" + (f" to {each[-1]:g}" if len(each) > 1 else "") for each in sizes)
    return ranks, alphas


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """One entry for each value but the default, since PEFT tries every key on every layer."""
    paths: dict[Any, list[str]] = {}
    for path, value in values.items():
        if value != default:
            paths.setdefault(value, []).append(re.escape(path))
    return {f"^({'|'.join(group)})" if len(group) > 1 else f"^{group[0]}": value for value, group in paths.items()}


def _target_names(adapted: list[str], all_paths: Collection[str]) -> list[str]:
    """Last parts of the paths ("q_proj") if these match exactly the adapted layers, else the full paths."""
    last_parts = sorted({path.rpartition(".")[2] for path in adapted})
    exact = {path for path in all_paths if path.rpartition(".")[2] in last_parts} <= set(adapted)
    return last_parts if exact else sorted(adapted)
