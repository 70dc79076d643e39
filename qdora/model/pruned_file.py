"""A compressed base on disk, so that it is measured once: what a run trains on is what it is evaluated and merged with.

    compressed.json             settings, and per layer: format, shape, block size, counts, error
    model*.safetensors          per layer `<path>.keep_bits`, and `<path>.weight` or the tensors of its packed form

Only the pruned layers are there; everything else comes from the model's own checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.files.atomic import atomic_directory, json_text
from qdora.files.tensor_file import TensorSpec, plan_shards, shard_index, write_safetensors
from qdora.model.load import Quantization, place_all, place_frozen
from qdora.model.pruning import CompressedLayer, layer_record
from qdora.model.stored_tensors import INDEX_FILE, Stored, open_safetensors
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import from_tensors
from qdora.ops.tiles import Weight

RECORD_FILE = "compressed.json"
FORMAT = 1
_SHARD_BYTES = 5 * 2**30


def save_compressed(
    model: nn.Module, layers: Mapping[str, CompressedLayer], directory: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the compressed layers of a base; the directory appears whole or not at all, in place of an older one.

    Args:
        model: Freshly loaded, without adapters.
        layers: What `Compression.layers` says.
        directory: Where to.
        settings: The recipe's section, JSON values.
    Returns:
        What stands in compressed.json.
    """
    frozen: dict[str, FrozenLinear] = {}
    for path in layers:
        module = model.get_submodule(path)
        assert isinstance(module, FrozenLinear), path
        frozen[path] = module
    tensors = {f"{path}.{name}": tensor for path, layer in frozen.items() for name, tensor in _tensors(layer).items()}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    shards = plan_shards(specs, _SHARD_BYTES)
    weights = sum(layer.num_weights for layer in layers.values())
    record: dict[str, Any] = {
        "format": FORMAT,
        "settings": dict(settings),
        "num_weights": weights,
        "num_pruned": sum(layer.num_pruned for layer in layers.values()),
        "sparsity": sum(layer.num_pruned for layer in layers.values()) / weights,
        "layers": {
            path: layer_record(layer.kind, (layer.out_features, layer.in_features), layer.block_size, layers[path])
            for path, layer in frozen.items()
        },
    }
    with atomic_directory(directory) as partial:
        for file, some in shards.items():
            write_safetensors(partial / file, some, (tensors[spec.name] for spec in some))
        if len(shards) > 1:
            (partial / INDEX_FILE).write_text(json_text(shard_index(shards), indent=2) + "\n", encoding="utf-8")
        (partial / RECORD_FILE).write_text(json_text(record, indent=2) + "\n", encoding="utf-8")
    return record


def _tensors(layer: FrozenLinear) -> dict[str, Tensor]:
    packed = layer.packed_weight
    held = {"weight": layer.get_buffer("weight")} if packed is None else packed.tensors()
    assert layer.keep_bits is not None
    return {**held, "keep_bits": layer.keep_bits}


class StoredCompression:
    """A `Placer` that takes the compressed layers from a directory of `save_compressed`.

    Args:
        directory: Where they are.
    Raises:
        UserError: Nothing there, or files that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        file = directory / RECORD_FILE
        try:
            self.record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            known = self.record["format"] == FORMAT
            self.layers: dict[str, dict[str, Any]] = dict(self.record["layers"])
        except FileNotFoundError:
            raise UserError(f"{directory}: holds no compressed base ({RECORD_FILE} is missing).") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{file}: is damaged: {type(error).__name__}: {error}.") from error
        if not known:
            raise UserError(f"{file}: format {self.record['format']!r}, allowed: {FORMAT}.")

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, Stored],
        layers: set[str],
        wanted: Quantization,
        device: torch.device,
        compute_dtype: torch.dtype,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Put the compressed layers in as they are stored, all else as `place_all` does.

        Args:
            As of `load.place_all`.
        Raises:
            UserError: Layers that the model does not have, or tensors that do not fit.
        """
        missing = sorted(self.layers.keys() - layers)
        if missing:
            raise UserError(f"{self.directory}: its layer {missing[0]} is none that this model and recipe compress.")
        rest = {name: item for name, item in stored.items() if name.removesuffix(".weight") not in self.layers}
        quantized = layers if wanted.kind != "none" else set()
        place_all(model, rest, quantized, wanted, device, compute_dtype, progress)
        for path, weight, keep_bits in self._weights():
            moved = weight.to(compute_dtype) if isinstance(weight, Tensor) else weight
            place_frozen(model, path, moved.to(device), keep_bits.to(device))

    def _weights(self) -> Iterator[tuple[str, Weight, Tensor]]:
        held = open_safetensors(self.directory)
        for path, facts in self.layers.items():
            names = [name for name in held if name.rpartition(".")[0] == path]
            try:
                # Copies: what is read is a view of the file.
                tensors = {name.rpartition(".")[2]: held[name].read().clone() for name in names}
                shape = (int(facts["shape"][0]), int(facts["shape"][1]))
                keep_bits = tensors.pop("keep_bits")
                if facts["kind"] == "dense":
                    yield path, tensors["weight"].view(shape), keep_bits
                else:
                    yield path, from_tensors(facts["kind"], shape, int(facts["block_size"]), tensors), keep_bits
            except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
                raise UserError(f"{self.directory}: {path}: cannot be read: {error}") from error
