"""Adapters on disk: PEFT's format, which `peft.PeftModel.from_pretrained` loads, plus `qdora.json`.

    adapter_model.safetensors    base_model.model.<path>.lora_A.weight (rank, in), .lora_B.weight (out, rank) as stored;
                                 .lora_magnitude_vector (out,) float32; of trained embeddings and heads
                                 <path>.weight, or <path>.token_adapter.trainable_tokens_delta (rows, features)
                                 of experts <owner>.lora_A.weight (experts * rank, in) and .lora_B.weight (out, rank *
                                 experts), as PEFT has them for target_parameters, .lora_magnitude_vector (experts, out)
    adapter_config.json          PEFT's settings, read by `peft.LoraConfig`
    qdora.json                   facts without a PEFT field: exact scaling per layer, the base's quantisation

PEFT has no DoRA for experts and refuses it. It takes a name in `target_modules` (gate_proj) for the stack of experts if
single experts in published checkpoints have such a projection, so other layers of that name are listed in
`target_parameters`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qdora import __version__
from qdora.adapter.experts import AdaptedExperts, BareExperts, ExpertLinear, Stack
from qdora.adapter.layer import AdaptedLinear, FrozenLinear, Kind
from qdora.errors import UserError, first_few, refuse
from qdora.files.atomic import atomic_directory, json_bytes, read_json_object
from qdora.files.tensor_file import write_tensors
from qdora.model.checkpoint import reading, taken_for_experts
from qdora.model.inject import (
    ALL_LINEAR,
    adapted_layer,
    adapted_layers,
    check_masks,
    is_linear,
    linear_layers,
    put_layers,
)
from qdora.model.multimodal import all_paths
from qdora.model.tokens import (
    TrainedMatrix,
    check_trainable,
    embedding_paths,
    is_tied,
    put_trained,
    trained_matrices,
)

if TYPE_CHECKING:
    from peft import LoraConfig  # whose import takes a second

CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE = "adapter_config.json", "adapter_model.safetensors", "qdora.json"
MASKED = "QDORA_MASKED_LORA"
"""peft_type of an adapter that keeps the zeros of its base. PEFT refuses it; it would compute something else."""
_PREFIX = "base_model.model."
_FORMULA = "y = g (x W^T + s (x A^T) B^T) + bias, g = m / ||W + s B A|| per row, W dequantised, m in float32"

_COMPUTED = {"r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules", "target_parameters"}
_COMPUTED |= {"exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"}
_COMPUTED |= {"modules_to_save", "trainable_token_indices", "ensure_weight_tying"}
# Who wrote the file, how training started, run-time options. LoraConfig would import what auto_mapping names.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
}
_WITHOUT_EFFECT |= {"megatron_core", "peft_version", "qalora_group_size", "runtime_config"}
_WITHOUT_EFFECT |= {"base_model_name_or_path", "revision"}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", MASKED),
    "task_type": ("CAUSAL_LM", None),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a part of W into the adapter.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}


@dataclass(frozen=True)
class AdapterDescription:
    """The JSON files of an adapter; `extra` and `base` (name_or_path, revision, quant) are of qdora.json.

    `all_linear`: of the modules that `config` selects only the linear layers but the head and routers. `masked`: B A
    keeps the zeros of a pruned base, which PEFT cannot do.
    """

    config: LoraConfig
    all_linear: bool
    masked: bool
    extra: dict[str, Any]
    base: dict[str, Any]

    @property
    def kind(self) -> Kind:
        return "dora" if self.config.use_dora else "lora"

    def rank_of(self, path: str) -> int:
        return int(self._match(self.config.rank_pattern, path, self.config.r))

    def alpha_of(self, path: str) -> float:
        return float(self._match(self.config.alpha_pattern, path, self.config.lora_alpha))

    def _match(self, patterns: Mapping[str, Any], path: str, default: Any) -> Any:
        from peft.utils.other import get_pattern_key

        name = f"{path}.weight" if self.selects_parameter(f"{path}.weight") else path
        return patterns.get(get_pattern_key(patterns, name), default)

    def selects_parameter(self, name: str) -> bool:
        """Whether a parameter carries an adapter: a stack of experts by its path, a linear layer as <path>.weight."""
        return f".{name}".endswith(tuple(f".{target}" for target in self.config.target_parameters or ()))


def describe_adapter(directory: Path) -> AdapterDescription:
    """The two JSON files of an adapter. A setting that is neither computed here nor at PEFT's default is refused.

    No code that the file names is imported, nothing is downloaded.
    """
    from peft import LoraConfig

    where, settings = str(directory / CONFIG_FILE), read_json_object(directory / CONFIG_FILE)
    defaults = {each.name: each.default for each in fields(LoraConfig)}
    faults = [
        f"{where}: {name}: {value!r} is not supported."
        for name, value in {"peft_type": None, **settings}.items()
        if name not in _COMPUTED | _WITHOUT_EFFECT
        # The default, or off, which may be of a release to come.
        and value not in _ALLOWED.get(name, (defaults.get(name), False, None, [], {}, ""))
    ]
    read = {name: value for name, value in settings.items() if name in _COMPUTED and value is not None}
    if not read.get("target_modules") and not read.get("target_parameters"):
        # PEFT has a table of layers for some types of models where it is null.
        faults.append(f"{where}: target_modules: must name layers.")
    refuse(faults)
    all_linear = str(read.get("target_modules")).lower() == ALL_LINEAR  # PEFT needs a live model for it
    with reading(where):
        config = LoraConfig(**read | ({"target_modules": ".*"} if all_linear else {}))
    file = directory / RECORD_FILE
    record = read_json_object(file) if file.exists() else {}
    is_masked = settings["peft_type"] == MASKED
    return AdapterDescription(config, all_linear, is_masked, record.get("extra", {}), record.get("base", {}))


def adapter_config(
    model: nn.Module, base_name_or_path: str | None, revision: str | None, *, use_dora: bool
) -> dict[str, Any]:
    """The `adapter_config.json` from which PEFT builds exactly these layers (it refuses masked ones).

    `r` and `lora_alpha` are the commonest values; a layer that differs gets a pattern anchored to its path. LoRA on a
    linear layer that PEFT would take for an expert is named by its weight, as stacks are.
    """
    layers = adapted_layers(model)
    first = next(iter(layers.values()))
    by_weight = set() if use_dora else taken_for_experts(model, layers)
    names = {path: f"{path}.weight" if path in by_weight else path for path in layers}
    parameters = [
        names[path] for path, layer in layers.items() if path in by_weight or isinstance(layer, AdaptedExperts)
    ]
    ranks = {names[path]: layer.rank for path, layer in layers.items()}
    alphas = {
        names[path]: int(layer.alpha) if layer.alpha.is_integer() else layer.alpha
        for path, layer in layers.items()
    }
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    targets = {path for path, name in names.items() if name not in parameters}
    last_parts = {path.rpartition(".")[2] for path in targets}
    if {path for path in all_paths(model) if path.rpartition(".")[2] in last_parts} <= targets:
        targets = last_parts
    return {
        "peft_type": MASKED if first.masked else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name_or_path,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else first.dropout,  # PEFT refuses any other with parameters
        "use_dora": use_dora,
        "use_rslora": first.rank_stabilized,
        "target_modules": sorted(targets),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **({"target_parameters": parameters} if parameters else {}),
    }


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """One entry for each value but the default, since PEFT tries every key on every layer."""
    paths: dict[Any, list[str]] = {}
    for path, value in values.items():
        if value != default:
            paths.setdefault(value, []).append(re.escape(path))
    return {
        f"^({'|'.join(group)})" if len(group) > 1 else f"^{group[0]}": value for value, group in paths.items()
    }


def sizes_in_words(directory: Path, rank: int, alpha: float) -> str:
    """Rank and alpha of an adapter on disk, such as "rank 2 to 8, alpha 16", or those given."""
    path, words = directory / CONFIG_FILE, []
    config: Any = read_json_object(path) if path.exists() else {"r": rank, "lora_alpha": alpha}
    for name, key in (("rank", "r"), ("alpha", "lora_alpha")):
        sizes = config[key], *config.get(f"{name}_pattern", {}).values()
        words.append(f"{name} {' to '.join(f'{size:g}' for size in sorted({min(sizes), max(sizes)}))}")
    return ", ".join(words)


def save_adapter(
    model: nn.Module,
    directory: Path,
    *,
    base_name_or_path: str | None,
    revision: str | None,
    base_quant: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the adapters of `model` as a directory that appears whole or not at all and replaces an older adapter.

    `base_quant` is how the base was quantised ({"quant": "nf4", "block_size": 64, ...}), `extra` more facts for
    qdora.json (step, data, metrics).
    """
    layers = adapted_layers(model)
    if directory.exists() and not (directory / CONFIG_FILE).is_file() and any(directory.iterdir()):
        raise UserError(f"{directory}: is not empty and holds no adapter.")
    matrices = trained_matrices(model)
    whole = sorted(path for path, matrix in matrices.items() if matrix.ids is None)
    rows = {path: list(matrix.ids) for path, matrix in matrices.items() if matrix.ids is not None}
    kind = next(iter(layers.values())).kind
    config = adapter_config(model, base_name_or_path, revision, use_dora=kind == "dora")
    if whole:
        config |= {"modules_to_save": whole} | ({"ensure_weight_tying": True} if is_tied(model) else {})
    if rows:
        config["trainable_token_indices"] = rows
    record = {
        "format": 1,
        "qdora_version": __version__,
        "kind": kind,
        "formula": _FORMULA,
        "base": {"name_or_path": base_name_or_path, "revision": revision, "quant": base_quant},
        "layers": {
            path: {"rank": layer.rank, "alpha": layer.alpha, "scaling": layer.scaling}
            for path, layer in layers.items()
        },
        "extra": extra or {},
    }
    tensors = {_matrix_name(path, matrix.ids): matrix.values.detach() for path, matrix in matrices.items()}
    if whole and is_tied(model):  # a copy as the head, without which PEFT does not load a tied pair
        tensors[_matrix_name(embedding_paths(model)[1], None)] = tensors[_matrix_name(whole[0], None)]
    tensors |= factor_tensors(model, AdaptedLinear.stored_B)
    for path, name in _peft_paths(layers).items():
        magnitude = layers[path].magnitude
        if magnitude is not None:
            tensors[_names(name)[2]] = magnitude.detach().float()
    with atomic_directory(directory) as partial:
        write_tensors(partial / WEIGHTS_FILE, dict(sorted(tensors.items())))
        for file, content in ((CONFIG_FILE, config), (RECORD_FILE, record)):
            (partial / file).write_bytes(json_bytes(content, indent=2))


def load_adapter(
    model: nn.Module, directory: Path, *, dtype: torch.dtype | None = None
) -> dict[str, AdaptedLinear]:
    """Put the adapter of `directory`, written by qdora or by PEFT, on `model`; everything else is frozen.

    The model changes only if the whole adapter fits. lora_A and lora_B get `dtype`, by default the wider one of the
    file; magnitudes are float32. Returns path -> layer.
    """
    described, stored, matrices = read_adapter(model, directory)
    adapted = {}
    for path, (lora_A, lora_B, magnitude) in stored.items():
        layer = adapted_layer(
            model.get_submodule(path),
            kind=described.kind,
            rank=described.rank_of(path),
            alpha=described.alpha_of(path),
            rank_stabilized=described.config.use_rslora,
            dropout=described.config.lora_dropout,
            dtype=torch.promote_types(lora_A.dtype, lora_B.dtype) if dtype is None else dtype,
            masked=described.masked,
            # Overwritten below; the global generator stays as it is
            generator=torch.Generator().manual_seed(0),
        )
        with torch.no_grad():
            layer.lora_A.copy_(lora_A)
            layer.lora_B.copy_(lora_B)
            if layer.magnitude is not None and magnitude is not None:
                layer.magnitude.copy_(magnitude)
        adapted[path] = layer
    put_layers(model, adapted)
    if matrices:
        put_trained(model, matrices)
    return adapted


def read_adapter(
    model: nn.Module, directory: Path
) -> tuple[AdapterDescription, dict[str, tuple[Tensor, Tensor, Tensor | None]], dict[str, TrainedMatrix]]:
    """The adapter of `directory`: its settings, path -> A, B, m in model order, path -> trained embedding or head.

    A tied head is not listed. Only names and shapes of `model` are used; it may be on "meta".
    """
    described, where = describe_adapter(directory), str(directory / CONFIG_FILE)
    selected = selected_modules(model, described)
    linear = {path: module for path, module in selected.items() if is_linear(module)}
    if not linear or len(linear) < len(selected):
        others = first_few(sorted(selected.keys() - linear.keys())) or "none of this model"
        raise UserError(f"{where}: target_modules: must select linear layers (got {others}).")
    if described.masked:
        check_masks(linear, where)
    trained = _trained_rows(model, described, where)
    weights, faults = directory / WEIGHTS_FILE, list[str]()
    layers, matrices, names = {}, {}, _peft_paths(linear)
    with reading(str(weights)), safe_open(weights, framework="pt") as file:
        end = "_magnitude_vector"  # PEFT's own modules have `.weight` behind it
        stored = {name.replace(f"{end}.weight", end): name for name in file.keys()}  # noqa: SIM118

        def take(name: str, *shape: int) -> Tensor:
            tensor: Tensor = file.get_tensor(stored.pop(name)) if name in stored else torch.empty(0)
            if tuple(tensor.shape) == shape and tensor.is_floating_point() and torch.isfinite(tensor).all():
                return tensor
            faults.append(f"{name} must hold finite numbers {list(shape)}")
            return torch.empty(shape)

        for path, module in linear.items():
            assert isinstance(module, (FrozenLinear, ExpertLinear, nn.Linear))
            (a, b, m), rank = _names(names[path]), described.rank_of(path)
            experts = [module.num_experts] if isinstance(module, BareExperts) else []
            out, num_ranks = module.out_features // math.prod(experts), rank * math.prod(experts)
            lora_A, lora_B = take(a, num_ranks, module.in_features), take(b, out, num_ranks)
            if experts:
                lora_A, lora_B = _from_peft(lora_A, lora_B, *experts)
            layers[path] = lora_A, lora_B, take(m, *experts, out) if described.kind == "dora" else None
        for path, ids in trained.items():
            size, width = model.get_submodule(path).weight.shape  # type: ignore[misc]
            shape = (size if ids is None else len(ids), width)
            values = take(_matrix_name(path, ids), *shape)
            if ids is None and is_tied(model):  # its copy as the head
                take(_matrix_name(embedding_paths(model)[1], None), *shape)
            if ids is not None:
                order = sorted(range(len(ids)), key=ids.__getitem__)
                values, ids = values[order], tuple(sorted(ids))
            matrices[path] = TrainedMatrix(values, ids)
    faults += [f"{name} has no place" for name in stored.values()]
    if faults:
        raise UserError(f"{weights}: {first_few(faults)}.")
    return described, layers, matrices


def factor_tensors(model: nn.Module, b_of: Callable[[AdaptedLinear], Tensor]) -> dict[str, Tensor]:
    """lora_A and lora_B of all adapted layers as PEFT names and shapes them; `b_of` gives the B."""
    layers = adapted_layers(model)
    tensors: dict[str, Tensor] = {}
    for path, name in _peft_paths(layers).items():
        layer = layers[path]
        a, b = layer.lora_A.detach(), b_of(layer)
        if isinstance(layer, AdaptedExperts):
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        a_name, b_name, _ = _names(name)
        tensors |= {a_name: a, b_name: b}
    return tensors


def stored_factors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The inverse of `factor_tensors`: path -> A and B of the layers that have both."""
    factors, layers = {}, adapted_layers(model)
    for path, name in _peft_paths(layers).items():
        layer, (a, b, _) = layers[path], (tensors.get(each) for each in _names(name))
        if a is not None and b is not None:
            if isinstance(layer, AdaptedExperts):
                a, b = _from_peft(a, b, layer.num_experts)
            factors[path] = a, b
    return factors


def _names(path: str) -> tuple[str, str, str]:
    start = f"{_PREFIX}{path}.lora_"
    return f"{start}A.weight", f"{start}B.weight", f"{start}magnitude_vector"


def _matrix_name(path: str, ids: Sequence[int] | None) -> str:
    return f"{_PREFIX}{path}.{'weight' if ids is None else 'token_adapter.trainable_tokens_delta'}"


def _peft_paths(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path of a layer -> where PEFT has its tensors: those of experts at the module that owns the parameter.

    PEFT wraps that module once for each parameter, so the first of two is inside.
    """
    paths = {}
    last: dict[str, str] = {}
    for path, layer in layers.items():
        paths[path] = path
        if isinstance(layer, Stack):
            owner = path.rpartition(".")[0]
            if owner in last:
                paths[last[owner]] += ".base_layer"
            paths[path], last[owner] = owner, path
    return paths


def _from_peft(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The factors of experts from PEFT's: (experts * rank, in), (out, rank * experts) with the expert last."""
    lora_B = b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)
    return a.view(num_experts, -1, a.shape[1]), lora_B.contiguous()


def selected_modules(model: nn.Module, described: AdapterDescription) -> dict[str, nn.Module]:
    """Path -> module that the settings select, in model order; it may be of a kind that carries no adapter."""
    from peft.tuners.tuners_utils import check_target_module_exists

    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear, modules = linear_layers(model), {}
    for path, module in model.named_modules():
        is_stack = isinstance(module, BareExperts)
        is_open = not described.all_linear or (path in linear and module is not head)
        if path and (
            described.selects_parameter(path if is_stack else f"{path}.weight")
            or (is_open and not is_stack and check_target_module_exists(described.config, path))
        ):
            modules[path] = module
    return modules


def _trained_rows(
    model: nn.Module, described: AdapterDescription, where: str
) -> dict[str, tuple[int, ...] | None]:
    """Path of a trained embedding or head -> ids of its trained rows, None for all."""
    config, trained = described.config, dict[str, tuple[int, ...] | None]()
    rows, whole = config.trainable_token_indices or {}, config.modules_to_save or ()
    if not rows and not whole:
        return trained
    embedding, head = embedding_paths(model)
    rows = rows if isinstance(rows, dict) else {embedding: rows}
    for name, ids in {**dict.fromkeys(whole), **rows}.items():
        path = next((path for path in (embedding, head) if path and f".{path}".endswith(f".{name}")), None)
        if path is None:
            raise UserError(f"{where}: {name!r} must be the input embedding or the output head.")
        check_trainable(model, [path])
        size = len(model.get_submodule(path).weight)  # type: ignore[arg-type]
        if max(ids or (), default=0) >= size:
            raise UserError(f"{where}: trainable_token_indices: must be below {size}.")
        trained[path] = None if ids is None else tuple(ids)
    if is_tied(model):
        settings = set(trained.values())
        # PEFT unties a tied head that it does not train in the same way.
        if (
            embedding not in trained
            or len(settings) > 1
            or (settings == {None} and not config.ensure_weight_tying)
        ):
            raise UserError(f"{where}: the adapter unties the model's head, which is not supported.")
        trained.pop(head, None)
    return trained
