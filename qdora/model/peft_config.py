"""PEFT's `adapter_config.json`: reading the rank and scale of each layer, refusing other methods, and writing it.

The rules are those of PEFT 0.21: a target matches a whole path or its end (`.q_proj`), a string is a regular expression
over the whole path, and the first matching key of `rank_pattern` and `alpha_pattern` wins; it may match the path's end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from qdora.errors import UserError, nearest
from qdora.files.json_file import read_json_object
from qdora.nn.adapted_linear import AdaptedLinear, Kind
from qdora.nn.expert_linear import AdaptedExperts

ALL_LINEAR = "all-linear"
MASKED = "QDORA_MASKED_LORA"
"""peft_type of an adapter that keeps the zeros of its base. PEFT refuses it; it would compute something else."""

# Settings that do not change the trained function: who wrote the file, how training started, run-time options.
_WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode"}
_WITHOUT_EFFECT |= {"loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version"}
_WITHOUT_EFFECT |= {"qalora_group_size", "revision", "runtime_config", "task_type"}
# Settings that change the function in ways that qdora does not compute.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA switches the adapter on in the middle of a text",
    "arrow_config": "Arrow routes each token among several adapters",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "it repeats layers of the base model",
    "lora_bias": "lora_B has a bias of its own",
    "megatron_config": "the layers are Megatron's",
    "monteclora_config": "MonteCLoRA samples the adapter",
    "use_bdlora": "lora_A or lora_B is block-diagonal",
    "use_qalora": "QA-LoRA pools the input of lora_A",
    "velora_config": "VeLoRA compresses the activations",
}
_OF_EMBEDDINGS = ("modules_to_save", "trainable_token_indices")
# These starts move part of W into the adapter, so it does not fit the unchanged base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression") from error
    return pattern


def _all_different(ids: list[int]) -> list[int]:
    if len(set(ids)) < len(ids):
        raise ValueError("a token id is there twice")
    return ids


_Regex = Annotated[str, AfterValidator(_compiles)]
_EMPTY_IS_NONE = BeforeValidator(lambda value: None if _is_empty(value) else value)
_TokenIds = Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(_all_different)]


class _Settings(BaseModel):
    """The settings that are used, with the values that are allowed."""

    model_config = ConfigDict(strict=True)
    peft_type: Literal["LORA", "QDORA_MASKED_LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    target_modules: Annotated[_Regex, Field(min_length=1)] | list[str] | None
    target_parameters: list[str] | None = None
    exclude_modules: _Regex | list[str] | None = None
    rank_pattern: dict[_Regex, PositiveInt] | None = None
    alpha_pattern: dict[_Regex, FiniteFloat] | None = None
    layers_to_transform: NonNegativeInt | list[NonNegativeInt] | None = None
    layers_pattern: _Regex | list[_Regex] | None = None
    modules_to_save: Annotated[list[str] | None, _EMPTY_IS_NONE] = None
    trainable_token_indices: Annotated[_TokenIds | dict[str, _TokenIds] | None, _EMPTY_IS_NONE] = None
    ensure_weight_tying: bool | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """The modules of a PEFT adapter, their ranks and scales."""

    kind: Kind
    rank: int
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    parameters: tuple[str, ...] = ()
    """Stacks of experts and weights of linear layers, by the names of their parameters or the last parts of these."""
    exclude: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    masked: bool = False
    """Whether B A keeps the zeros of a pruned base, which PEFT cannot do."""
    saved: tuple[str, ...] = ()
    """Modules whose weight is trained as a whole."""
    token_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Module -> ids of its trained rows, in the file's order. "" is the input embedding."""
    ties: bool = False
    """Whether a head that is tied to a saved embedding stays tied to it."""

    def rank_of(self, path: str) -> int:
        """Rank of the layer at `path`."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, self._name(path)), self.rank)

    def alpha_of(self, path: str) -> float:
        """Alpha of the layer at `path`."""
        return self.alpha_pattern.get(_first_match(self.alpha_pattern, self._name(path)), self.alpha)

    def scaling_of(self, path: str) -> float:
        """s of the layer at `path`: alpha / rank, or alpha / sqrt(rank)."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def selects_parameter(self, name: str) -> bool:
        """Whether a parameter carries an adapter: a stack of experts by its path, a linear layer as <path>.weight."""
        return name in self.parameters or name.endswith(tuple(f".{each}" for each in self.parameters))

    def _name(self, path: str) -> str:
        """What the patterns of ranks and alphas are compared with."""
        return f"{path}.weight" if self.selects_parameter(f"{path}.weight") else path

    def selects(self, path: str, *, is_linear: bool, is_head: bool) -> bool:
        """Whether the module at `path` carries an adapter; "all-linear" takes linear layers but the head. Not asked for
        experts."""
        if self.selects_parameter(f"{path}.weight"):
            return True
        if _matches_any(self.exclude, path):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            return is_linear and not is_head
        if not _matches_any(self.targets, path):
            return False
        if self.layers is None or isinstance(self.targets, str):
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for match in (re.match(pattern, path) for pattern in patterns) if match), None)
        return found is not None and int(found.group(1)) in self.layers


def _matches_any(names: str | tuple[str, ...], path: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, path) is not None
    return path in names or path.endswith(tuple(f".{name}" for name in names))


def _first_match(patterns: Collection[str], path: str) -> str:
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), path)


def parse_adapter_config(config: Mapping[str, Any], where: str) -> AdapterLayout:
    """Read the settings that matter from the JSON object of the file `where`.

    Raises UserError with one line for each setting that is malformed, unknown and set, or not supported.
    """
    given, faults = None, []
    try:
        given = _Settings.model_validate(config)
    except ValidationError as error:
        faults = _value_faults(config, error)
    faults += _method_faults(config)
    if given is None or faults:
        raise UserError(*(f"{where}: {fault}" for fault in faults))
    targets, exclude = given.target_modules or (), given.exclude_modules or ()
    layers, layers_pattern = given.layers_to_transform, given.layers_pattern or ()
    return AdapterLayout(
        kind="dora" if given.use_dora else "lora",
        rank=given.r,
        alpha=given.lora_alpha,
        rank_stabilized=given.use_rslora,
        dropout=given.lora_dropout,
        targets=targets if isinstance(targets, str) else tuple(targets),
        parameters=tuple(given.target_parameters or ()),
        exclude=exclude if isinstance(exclude, str) else tuple(exclude),
        rank_pattern=given.rank_pattern or {},
        alpha_pattern=given.alpha_pattern or {},
        layers=None if layers in (None, []) else (layers,) if isinstance(layers, int) else tuple(layers),
        layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern),
        masked=given.peft_type == MASKED,
        saved=tuple(given.modules_to_save or ()),
        token_rows=_token_rows(given.trainable_token_indices),
        ties=bool(given.ensure_weight_tying),
    )


def _token_rows(given: Any) -> dict[str, tuple[int, ...]]:
    by_module = {"": given} if isinstance(given, list) else given or {}
    return {name: tuple(ids) for name, ids in by_module.items()}


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _value_faults(config: Mapping[str, Any], error: ValidationError) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for each in error.errors():
        reason = each["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
        reasons.setdefault(str(each["loc"][0]), []).append(reason)
    return [f"{key}: {' or '.join(dict.fromkeys(all_))} (got {config.get(key)!r})." for key, all_ in reasons.items()]


def _method_faults(config: Mapping[str, Any]) -> list[str]:
    faults = [
        f"{key}: is not supported: {reason}." for key, reason in _REFUSED.items() if not _is_empty(config.get(key))
    ]
    if config.get("target_modules") in ([], None) and not config.get("target_parameters"):
        # PEFT has a table of layers for some types of models where it is null.
        given = "null" if config.get("target_modules") is None else "[]"
        faults.append(f"target_modules: must name layers (got {given}). Fix: write the names that the tensors have.")
    if config.get("ensure_weight_tying") and all(_is_empty(config.get(key)) for key in _OF_EMBEDDINGS):
        faults.append("ensure_weight_tying: is not supported: it ties adapters of the embedding and the head.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        faults.append(
            f"init_lora_weights: {init!r} changes the base weights when training starts, so the adapter does not fit "
            "the original base. Fix: convert it by PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    elif init not in _HARMLESS_INITS:
        faults.append(f"init_lora_weights: must be one of {', '.join(map(repr, _HARMLESS_INITS))} (got {init!r}).")
    known = _WITHOUT_EFFECT | _REFUSED.keys() | _Settings.model_fields.keys() | {"init_lora_weights"}
    faults.extend(
        f"{key}: unknown setting {config[key]!r}; it may change what the adapter computes.{nearest(key, known)}"
        for key in sorted(config.keys() - known)
        if not _is_empty(config[key])
    )
    return faults


def adapter_config(
    layers: Mapping[str, AdaptedLinear],
    all_paths: Collection[str],
    *,
    base_name_or_path: str | None,
    revision: str | None,
    saved: Collection[str] = (),
    token_rows: Mapping[str, Collection[int]] | None = None,
    ties: bool = False,
    as_parameters: Collection[str] = (),
) -> dict[str, Any]:
    """The `adapter_config.json` from which PEFT builds exactly these layers (it refuses masked ones).

    `r` and `lora_alpha` are the commonest values; a layer that differs gets a pattern anchored to its path.

    Args:
        layers, all_paths: Path -> layer, at least one; paths of all modules of the model.
        base_name_or_path, revision: Where PEFT users load the base from, and its commit on the Hub, or None.
        saved, token_rows, ties: As in `AdapterLayout`, by paths.
        as_parameters: Paths of linear layers that are named by their weights, as stacks of experts are by theirs.
    Raises:
        ValueError: Layers differ in kind, mask, dropout or rank stabilisation; the format has one value for all.
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
    rank, alpha = _commonest(ranks), _commonest(alphas)
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
        "modules_to_save": sorted(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "auto_mapping": None,
        **({"target_parameters": parameters} if parameters else {}),
        **({"ensure_weight_tying": True} if ties else {}),  # older releases of PEFT do not know these settings
        **({"trainable_token_indices": {path: list(ids) for path, ids in token_rows.items()}} if token_rows else {}),
    }


def sizes_in_words(directory: Path, rank: int, alpha: float) -> tuple[str, str]:
    """Rank and alpha of an adapter on disk, such as ("2 to 8", "16"), or those given if it does not tell."""
    try:
        config = read_json_object(directory / "adapter_config.json")
        found = [
            sorted({float(config[name]), *map(float, config[pattern].values())})
            for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        found = [[rank], [alpha]]
    ranks, alphas = (f"{sizes[0]:g}" + (f" to {sizes[-1]:g}" if len(sizes) > 1 else "") for sizes in found)
    return ranks, alphas


def _commonest(values: Mapping[str, Any]) -> Any:
    counted = list(values.values())
    return max(sorted(set(counted)), key=counted.count)


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
