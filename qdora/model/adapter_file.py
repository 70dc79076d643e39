"""Adapters on disk: PEFT's format, which `peft.PeftModel.from_pretrained` loads, plus `qdora.json`.

    adapter_model.safetensors    base_model.model.<path>.lora_A.weight (rank, in), .lora_B.weight (out, rank) as stored;
                                 .lora_magnitude_vector (out,) float32; of trained embeddings and heads
                                 <path>.weight, or <path>.token_adapter.trainable_tokens_delta (rows, features)
                                 of experts <owner>.lora_A.weight (experts * rank, in) and .lora_B.weight (out, rank *
                                 experts), as PEFT has them for target_parameters, .lora_magnitude_vector (experts, out)
    adapter_config.json          PEFT's settings
    qdora.json                   facts without a PEFT field: exact scaling per layer, the base's quantisation

The tensor names are those that PEFT writes: a magnitude's name does not end in `.weight`. PEFT has no DoRA for experts
and refuses it. It takes the inputs of Llama 4's experts for their outputs, so A and B are swapped in the file. PEFT
takes a name in `target_modules` (gate_proj) for the stack of experts if single experts in published checkpoints have a
projection of that name. So other layers of that name are listed by their weights in `target_parameters`, with the same
tensors (not for DoRA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qdora import __version__
from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.adapter.expert_linear import AdaptedExperts, BareExperts, ExpertLinear, Share, Stack
from qdora.adapter.frozen_linear import FrozenLinear
from qdora.errors import UserError, first_few
from qdora.files.atomic import atomic_directory, json_bytes, read_json_object
from qdora.files.tensor_file import write_tensors
from qdora.model.experts import peft_swaps, routers
from qdora.model.inject import adapted_layer, adapted_layers, check_masks, is_linear, most_rank, put_layers
from qdora.model.multimodal import all_paths
from qdora.model.names import taken_for_experts
from qdora.model.peft_config import AdapterDescription, adapter_config, parse_adapter_config
from qdora.model.source import ADAPTER_DIRECTORY
from qdora.model.tokens import (
    TrainedMatrix,
    embedding_paths,
    is_tied,
    put_trained,
    trainable_faults,
    trained_matrices,
)

CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE = "adapter_config.json", "adapter_model.safetensors", "qdora.json"
PICKLE_FILE = "adapter_model.bin"
FORMAT = 1
_PREFIX = "base_model.model."
_MAGNITUDE_NOTE = (
    "y = g (x W^T + s (x A^T) B^T) + bias, g = m / ||W + s B A|| per row, W the base dequantised as `base.quant` says; "
    "lora_magnitude_vector is m in float32. For peft_type QDORA_MASKED_LORA B A counts only where W was not pruned."
)


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

    The bytes depend only on the arguments and the version of qdora. `base_quant` is how the base was quantised
    ({"quant": "nf4", "block_size": 64, ...}), `extra` more facts for qdora.json (step, data, metrics).
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model carries no adapters to save; call inject() first.")
    if directory.exists() and not (directory / CONFIG_FILE).is_file() and any(directory.iterdir()):
        raise UserError(f"{directory}: is not empty and holds no adapter ({CONFIG_FILE}). Fix: name a new directory.")
    matrices = trained_matrices(model)
    saved = [path for path, matrix in matrices.items() if matrix.ids is None]
    config = adapter_config(
        layers,
        all_paths(model),
        base_name_or_path=base_name_or_path,
        revision=revision,
        as_parameters=() if next(iter(layers.values())).kind == "dora" else taken_for_experts(model, layers),
    )
    if saved:
        config |= {"modules_to_save": sorted(saved)} | ({"ensure_weight_tying": True} if is_tied(model) else {})
    if len(saved) < len(matrices):
        rows = {path: list(matrix.ids) for path, matrix in matrices.items() if matrix.ids is not None}
        config["trainable_token_indices"] = rows
    record = {
        "format": FORMAT,
        "qdora_version": __version__,
        "kind": "dora" if config["use_dora"] else "lora",
        "formula": _MAGNITUDE_NOTE,
        "base": {"name_or_path": base_name_or_path, "revision": revision, "quant": base_quant},
        "layers": {
            path: {"rank": layer.rank, "alpha": layer.alpha, "scaling": layer.scaling}
            | ({"share": layer.share} if isinstance(layer, AdaptedExperts) else {})
            for path, layer in layers.items()
        },
        "extra": extra or {},
    }
    tensors = {_matrix_name(path, matrix.ids): matrix.values.detach() for path, matrix in matrices.items()}
    tensors |= {copy: tensors[name] for name, copy in _tied_copies(model, saved).items()}
    tensors |= factor_tensors(model, AdaptedLinear.stored_B)
    for path, place in _places(layers).items():
        magnitude = layers[path].magnitude
        if magnitude is not None:
            tensors[_names(place)[2]] = magnitude.detach().float()
    with atomic_directory(directory) as partial:
        write_tensors(partial / WEIGHTS_FILE, dict(sorted(tensors.items())))
        for name, content in ((CONFIG_FILE, config), (RECORD_FILE, record)):
            (partial / name).write_bytes(json_bytes(content, indent=2))


def describe_adapter(directory: Path) -> AdapterDescription:
    """Read and check the two JSON files of an adapter."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory. Fix: name a directory with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    inside = directory / ADAPTER_DIRECTORY
    if not (directory / CONFIG_FILE).exists() and (inside / CONFIG_FILE).is_file():
        raise UserError(f"adapter.resume_from: {directory} is not an adapter but holds one. Fix: name {inside}.")
    if not (directory / WEIGHTS_FILE).is_file():
        advice = " A pickle can run code when it is read. Fix: load it in PEFT and save it again."
        raise UserError(f"{directory / WEIGHTS_FILE}: missing.{advice if (directory / PICKLE_FILE).exists() else ''}")
    described = parse_adapter_config(read_json_object(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
    if not (directory / RECORD_FILE).exists():
        return described
    record = read_json_object(directory / RECORD_FILE)
    if record.get("format") != FORMAT:
        what = f"must be {FORMAT} (got {record.get('format')!r}): another version of qdora wrote it."
        raise UserError(f"{directory / RECORD_FILE}: format: {what}")
    listed = record.get("layers")
    layers = {path: each for path, each in listed.items() if isinstance(each, dict)} if isinstance(listed, dict) else {}
    return replace(
        described,
        extra=record.get("extra"),
        scalings={p: each["scaling"] for p, each in layers.items() if isinstance(each.get("scaling"), (int, float))},
        shares={path: each["share"] for path, each in layers.items() if each.get("share") in ("none", "A", "B")},
        base=record["base"] if isinstance(record.get("base"), dict) else None,
    )


def load_adapter(model: nn.Module, directory: Path, *, dtype: torch.dtype | None = None) -> dict[str, AdaptedLinear]:
    """Put the adapter of `directory`, written by qdora or by PEFT, on `model`; everything else is frozen.

    The model changes only if the whole adapter fits. No file but the three named ones is opened. lora_A and lora_B get
    `dtype`, by default the file's (the wider of the two); magnitudes are float32. Returns path -> layer.
    """
    if adapted_layers(model):
        raise ValueError("the model already carries adapters; load_adapter needs the bare base.")
    described, stored, matrices = read_adapter(model, directory)
    adapted = {}
    for path, found in stored.items():
        layer = adapted_layer(
            model.get_submodule(path),
            share=found.share,
            kind=described.kind,
            rank=described.rank_of(path),
            alpha=described.alpha_of(path),
            rank_stabilized=described.config.use_rslora,
            dropout=described.config.lora_dropout,
            dtype=torch.promote_types(found.lora_A.dtype, found.lora_B.dtype) if dtype is None else dtype,
            masked=described.masked,
            generator=torch.Generator().manual_seed(0),  # overwritten below; the global generator stays as it is
        )
        with torch.no_grad():
            layer.lora_A.copy_(found.lora_A)
            layer.lora_B.copy_(found.lora_B)
            if layer.magnitude is not None and found.magnitude is not None:
                layer.magnitude.copy_(found.magnitude)
        adapted[path] = layer
    put_layers(model, adapted)
    if matrices:
        put_trained(model, matrices)
    return adapted


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """One layer of an adapter file, on the CPU, in the shapes of `AdaptedLinear` or `AdaptedExperts`.

    `magnitude` is None for LoRA, `scaling` is s.
    """

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    scaling: float
    share: Share = "none"


def read_adapter(
    model: nn.Module, directory: Path
) -> tuple[AdapterDescription, dict[str, StoredLayer], dict[str, TrainedMatrix]]:
    """The adapter of `directory`: its settings, path -> tensors in model order, path -> trained embedding or head.

    UserError names all settings that are not supported, and all tensors that do not fit. A tied head is not listed.
    Only names and shapes of `model` are used; it may be on "meta".
    """
    described, where = describe_adapter(directory), str(directory / CONFIG_FILE)
    selected = selected_modules(model, described)
    linear = {path: module for path, module in selected.items() if is_linear(module)}
    others = [f"{path} ({type(selected[path]).__name__})" for path in selected.keys() - linear.keys()]
    faults = []
    if others:
        faults.append(f"{where}: target_modules: must select linear layers (got {first_few(sorted(others))}).")
    if not linear:
        faults.append(f"{where}: target_modules: matches no linear layer of this model.")
    swapped = {path for path, module in linear.items() if isinstance(module, BareExperts) and peft_swaps(model, path)}
    expected, layer_faults = _expected_shapes(linear, described, directory, swapped)
    trained, matrix_faults = _trained_shapes(model, described, where)
    both = set(linear) & {*trained, *(embedding_paths(model) if trained and is_tied(model) else ())}
    faults += layer_faults + matrix_faults
    faults += [f"{where}: target_modules: {path} is trained whole or in rows." for path in both]
    expected |= {_matrix_name(path, ids): shape for path, (ids, shape) in trained.items()}
    whole = [path for path, (ids, _) in trained.items() if ids is None]
    expected |= {copy: expected[name] for name, copy in _tied_copies(model, whole).items()}
    tensors, tensor_faults = _read_tensors(directory / WEIGHTS_FILE, expected)
    if faults or tensor_faults:
        raise UserError(*faults, *tensor_faults)
    for name, copy in _tied_copies(model, whole).items():
        if not torch.equal(tensors[name], tensors[copy]):
            raise UserError(f"{directory / WEIGHTS_FILE}: {copy} differs from {name}, to which it is tied.")
    if described.masked:
        check_masks(linear, where)
    found, places = {}, _places(linear)
    for path, module in linear.items():
        a_name, b_name, m_name = _names(places[path])
        a, b, share = tensors[a_name], tensors[b_name], described.shares.get(path, "none")
        if isinstance(module, BareExperts):
            a, b = _from_peft(a, b, module.num_experts, swapped=path in swapped)
            factors = {"A": a, "B": b}
            if share != "none":
                where = f"{directory / WEIGHTS_FILE}: {path}"
                if not torch.equal(factors[share], factors[share][:1].expand_as(factors[share])):
                    raise UserError(f"{where}: lora_{share} differs between experts, which share it by {RECORD_FILE}.")
                factors[share] = factors[share][:1]
            a, b = factors["A"], factors["B"]
        found[path] = StoredLayer(a, b, tensors.get(m_name), described.scaling_of(path), share)
    matrices = {}
    for path, (ids, _) in trained.items():
        values = tensors[_matrix_name(path, ids)]
        if ids is not None:
            order = sorted(range(len(ids)), key=ids.__getitem__)
            values, ids = values[order], tuple(ids[index] for index in order)
        matrices[path] = TrainedMatrix(values, ids)
    return described, found, matrices


def factor_tensors(model: nn.Module, b_of: Callable[[AdaptedLinear], Tensor]) -> dict[str, Tensor]:
    """lora_A and lora_B of all adapted layers as PEFT names and shapes them; `b_of` gives the B of a layer."""
    layers = adapted_layers(model)
    tensors: dict[str, Tensor] = {}
    for path, place in _places(layers).items():
        layer = layers[path]
        a, b = layer.lora_A.detach(), b_of(layer)
        if isinstance(layer, AdaptedExperts):
            a, b = _as_peft(a, b, layer.num_experts, swapped=peft_swaps(model, path))
        a_name, b_name, _ = _names(place)
        tensors |= {a_name: a, b_name: b}
    return tensors


def stored_factors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The inverse of `factor_tensors`: path -> A and B, those of experts without sharing, of layers that have both."""
    found, layers = {}, adapted_layers(model)
    for path, place in _places(layers).items():
        layer, (a, b, _) = layers[path], (tensors.get(name) for name in _names(place))
        if a is not None and b is not None:
            if isinstance(layer, AdaptedExperts):
                a, b = _from_peft(a, b, layer.num_experts, swapped=peft_swaps(model, path))
            found[path] = a, b
    return found


def _names(place: str) -> tuple[str, str, str]:
    """Names in the file of a layer's lora_A, lora_B and magnitude."""
    start = f"{_PREFIX}{place}.lora_"
    return f"{start}A.weight", f"{start}B.weight", f"{start}magnitude_vector"


def _matrix_name(path: str, ids: Sequence[int] | None) -> str:
    return f"{_PREFIX}{path}.{'weight' if ids is None else 'token_adapter.trainable_tokens_delta'}"


def _tied_copies(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Name of a whole embedding -> name of its copy as the head, without which PEFT does not load a tied pair."""
    if not paths or not is_tied(model):
        return {}
    return {_matrix_name(path, None): _matrix_name(embedding_paths(model)[1], None) for path in paths}


def _places(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path of a layer -> where PEFT has its tensors: those of experts at the module that owns the parameter.

    PEFT wraps that module once for each parameter, so the first of two is inside.
    """
    found: dict[str, str] = {}
    last: dict[str, str] = {}
    for path, layer in layers.items():
        found[path] = path
        if isinstance(layer, Stack):
            owner = path.rpartition(".")[0]
            if owner in last:
                found[last[owner]] += ".base_layer"
            found[path], last[owner] = owner, path
    return found


def _as_peft(lora_A: Tensor, lora_B: Tensor, num_experts: int, *, swapped: bool) -> tuple[Tensor, Tensor]:
    """The factors of experts as PEFT has them: (experts * rank, in), (out, rank * experts) with the expert last.

    If `swapped` they are those of the transposed update, A^T B^T (`peft_swaps`).
    """
    if swapped:
        lora_A, lora_B = lora_B.mT, lora_A.mT
    a = lora_A.expand(num_experts, -1, -1).flatten(0, 1)
    b = lora_B.expand(num_experts, -1, -1).permute(1, 2, 0).flatten(1)
    return a.contiguous(), b.contiguous()


def _from_peft(a: Tensor, b: Tensor, num_experts: int, *, swapped: bool) -> tuple[Tensor, Tensor]:
    """The inverse of `_as_peft`, without sharing."""
    lora_A, lora_B = a.view(num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)
    if swapped:
        lora_A, lora_B = lora_B.mT, lora_A.mT
    return lora_A.contiguous(), lora_B.contiguous()


def selected_modules(model: nn.Module, described: AdapterDescription) -> dict[str, nn.Module]:
    """Path -> module that the settings select, in model order; it may be of a kind that carries no adapter."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left_out, found = routers(model), {}
    for path, module in model.named_modules():
        in_all_linear = is_linear(module) and path not in left_out and module is not head
        if isinstance(module, BareExperts):
            selected = described.selects_parameter(path)
        else:
            selected = bool(path) and described.selects(path, in_all_linear=in_all_linear)
        if selected:
            found[path] = module
    return found


def _trained_shapes(
    model: nn.Module, described: AdapterDescription, where: str
) -> tuple[dict[str, tuple[tuple[int, ...] | None, tuple[int, ...]]], list[str]]:
    """Path -> (ids of the trained rows, or None for all; shape) of trained embeddings and heads, and faults.

    PEFT unties a tied head that it does not train in the same way, which is not supported.
    """
    found: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...]]] = {}
    config, faults = described.config, []
    rows = config.trainable_token_indices or {}  # a list is of the input embedding
    rows = rows if isinstance(rows, dict) else {"": rows}
    asked: list[tuple[str, str, tuple[int, ...] | None]]
    asked = [("modules_to_save", name, None) for name in config.modules_to_save or ()]
    asked += [("trainable_token_indices", name, tuple(ids)) for name, ids in rows.items()]
    if not asked:
        return found, []
    known = embedding_paths(model)
    for setting, name, ids in asked:
        where_ = f"{where}: {setting}"
        path = known[0] if not name else next((path for path in known if path and f".{path}".endswith(f".{name}")), "")
        if not path:
            faults.append(f"{where_}: {name!r} must be the input embedding or the output head ({', '.join(known)}).")
            continue
        if obstacles := trainable_faults(model, [path]):
            faults += obstacles
            continue
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        size, width = weight.shape
        if found.get(path, (ids,))[0] != ids or (ids is not None and len(set(ids)) < len(ids)):
            faults.append(f"{where_}: rows of {path} are named twice.")
        if ids is not None and max(ids, default=0) >= size:
            what = f"the model has {size} rows, got token {max(ids)}"
            faults.append(f"{where_}: {what}. Fix: load it with qdora's recipe, which has model.add_tokens.")
        found[path] = ids, (size if ids is None else len(ids), width)
    if is_tied(model) and found:
        settings = {ids for ids, _ in found.values()}
        if known[0] not in found or len(settings) > 1 or (settings == {None} and not config.ensure_weight_tying):
            what = "the adapter unties the model's head from its embedding, which is not supported"
            faults.append(f"{where}: {asked[0][0]}: {what}.")
        found.pop(known[1], None)
    return ({} if faults else found), faults


def _expected_shapes(
    linear: Mapping[str, nn.Module], described: AdapterDescription, directory: Path, swapped: Collection[str]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shape of each tensor, and faults: layers with too large a rank or with another scaling than recorded.

    `swapped` are the stacks of `peft_swaps`. qdora.json repeats the scaling that follows from PEFT's settings, which
    reveals edited or mixed-up files.
    """
    recorded = described.scalings
    shapes: dict[str, tuple[int, ...]] = {}
    too_large, differ = [], []
    places = _places(linear)
    for path, module in linear.items():
        assert isinstance(module, (FrozenLinear, ExpertLinear, nn.Linear))
        rows, columns, rank = module.out_features, module.in_features, described.rank_of(path)
        a, b, m = _names(places[path])
        shapes[a], shapes[b], shapes[m] = (rank, columns), (rows, rank), (rows,)
        if isinstance(module, BareExperts):
            experts, size = module.num_experts, module.expert_features
            shapes[m] = (experts, size)
            size, columns = (columns, size) if path in swapped else (size, columns)
            shapes[a], shapes[b] = (experts * rank, columns), (size, rank * experts)
        if described.kind != "dora":
            del shapes[m]
        if rank > most_rank(module):
            too_large.append(f"{path} (rank {rank}, at most {most_rank(module)})")
        scaling = described.scaling_of(path)
        if recorded is not None and not math.isclose(recorded.get(path, math.nan), scaling, rel_tol=1e-12):
            differ.append(f"{path} ({recorded.get(path)} recorded, {scaling} by {CONFIG_FILE})")
    faults = []
    if too_large:
        faults.append(f"{directory / CONFIG_FILE}: r or rank_pattern: too large for {first_few(too_large)}.")
    if differ:
        faults.append(f"{directory / RECORD_FILE}: layers: scaling differs for {first_few(differ)}.")
    return shapes, faults


def _read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the file on the CPU, and one line for each kind of difference from `expected`."""
    tensors: dict[str, Tensor] = {}
    wrong: dict[str, list[str]] = {"missing": [], "unexpected (no adapted layer of this model has them)": []}
    missing, unexpected = wrong.values()
    try:
        with safe_open(path, framework="pt") as file:
            end = "_magnitude_vector"  # PEFT's own modules have `.weight` behind it
            stored = {name.replace(f"{end}.weight", end): name for name in file.keys()}  # noqa: SIM118
            unexpected += sorted(original for name, original in stored.items() if name not in expected)
            for name, shape in expected.items():
                if name not in stored:
                    missing.append(name)
                    continue
                found = list(file.get_slice(stored[name]).get_shape())
                if found != list(shape):
                    wrong.setdefault("of the wrong shape", []).append(f"{name} {found} instead of {list(shape)}")
                    continue
                tensors[name] = tensor = file.get_tensor(stored[name])
                if not tensor.is_floating_point():
                    wrong.setdefault("not of a float dtype", []).append(f"{name} ({tensor.dtype})")
                elif not bool(torch.isfinite(tensor).all()):
                    wrong.setdefault("holding NaN or infinity", []).append(name)
    except (OSError, SafetensorError) as error:
        return {}, [f"{path}: cannot be read as safetensors: {error}"]
    faults = [
        f"{path}: {len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {first_few(names)}."
        for what, names in wrong.items()
        if names
    ]
    if any(name.endswith(".lora_magnitude_vector") for name in missing):
        faults.append(f"{path}: {CONFIG_FILE} has use_dora: true, but the magnitudes of DoRA are missing.")
    return tensors, faults
