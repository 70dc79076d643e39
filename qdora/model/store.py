"""Packed bases on disk, in bitsandbytes' checkpoint format under the model's own names, read like any checkpoint.

    a base cache                      model-00000.safetensors, ...          all weights of a model
    base/ in a run with base.prune    compressed.json, model.safetensors    the pruned layers and `<path>.keep_bits`

The directory of a cached base is named for a hash of the settings, the names and shapes of the model's tensors, and the
model's files. Weights that are not quantised keep the checkpoint's dtype, so the compute dtype is not part of it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.adapter.layer import FrozenLinear
from qdora.files.atomic import (
    atomic_directory,
    disk_failures,
    in_turn,
    json_bytes,
    json_text,
    read_json_object,
    sampled_digest,
)
from qdora.files.console import Progress
from qdora.files.tensor_file import write_tensors
from qdora.model.checkpoint import Stored, StoredTensor, gather_packed, match_to_model, open_safetensors, shard_files
from qdora.model.load import Loading, Quantization, layers_to_quantize, place_all, settle_stored, tensors_of_source
from qdora.model.multimodal import not_loaded
from qdora.model.source import ModelSource
from qdora.quant.bnb import to_bnb_state
from qdora.quant.codebooks import MXFP4
from qdora.quant.packed import PackedWeight
from qdora.quant.tiles import Weight

log = logging.getLogger("qdora")

# A file's tensors are in memory until it is written.
_FILE_BYTES = 256 << 20
_PRUNED_RECORD_FILE = "compressed.json"
_PRUNED_FILE_BYTES = 5 * 2**30


@dataclass(frozen=True)
class PrunedLayer:
    """Counts and error of a pruned and quantised layer.

    `num_zeros`: also the weights that are quantised to 0. `relative_error`: ||W' - W|| / ||W|| (Frobenius norm) of the
    dense weight W and the result W'. `num_packed_bytes`: of all tensors of W'.
    """

    num_weights: int
    num_pruned: int
    num_zeros: int
    relative_error: float
    num_packed_bytes: int

    @property
    def sparsity(self) -> float:
        return self.num_pruned / self.num_weights


def _stored_in(directory: Path) -> dict[str, Stored]:
    return gather_packed(open_safetensors(directory, sorted(directory.glob("*.safetensors"))))


def _write_weights(folder: Path, weights: Iterable[tuple[str, Weight]], max_file_bytes: int) -> None:
    """Write (model name, weight) to safetensors files of at most `max_file_bytes`; memory holds one of them."""
    files = (folder / f"model-{number:05d}.safetensors" for number in range(10**5))
    held: dict[str, Tensor] = {}
    for name, weight in weights:
        parts = {name: weight} if isinstance(weight, Tensor) else {}
        if isinstance(weight, PackedWeight):
            parts = {name.removesuffix("weight") + part: each for part, each in to_bnb_state(weight).items()}
        if held and sum(tensor.nbytes for tensor in (*held.values(), *parts.values())) > max_file_bytes:
            write_tensors(next(files), held)
            held.clear()
        held.update(parts)
        del weight, parts  # before the next weight is made
    write_tensors(next(files), held)


def save_pruned_base(
    model: nn.Module, layers: Mapping[str, PrunedLayer], directory: Path, *, key: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the pruned layers of a freshly loaded base; the directory appears whole and replaces an older one.

    `layers` is `Pruner.layers`; `key` a hash of all that decides the pruned weights. Returns compressed.json.
    """
    num_weights = sum(layer.num_weights for layer in layers.values())
    num_pruned = sum(layer.num_pruned for layer in layers.values())
    counts = {"num_weights": num_weights, "num_pruned": num_pruned, "sparsity": num_pruned / num_weights}
    record: dict[str, Any] = {"format": 1, "key": key, "settings": dict(settings), **counts, "layers": {}}

    def weights() -> Iterator[tuple[str, Weight]]:
        for path, report in layers.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, FrozenLinear)
            assert layer.keep_bits is not None
            shape = (layer.out_features, layer.in_features)
            record["layers"][path] = layer_record(layer.kind, shape, layer.block_size, report)
            yield f"{path}.weight", layer.stored_weight
            yield f"{path}.keep_bits", layer.keep_bits

    with atomic_directory(directory) as folder:
        _write_weights(folder, weights(), _PRUNED_FILE_BYTES)
        files = list(folder.iterdir())
        if len(files) == 1:
            files[0].rename(folder / "model.safetensors")
        (folder / _PRUNED_RECORD_FILE).write_bytes(json_bytes(record, indent=2))
    return record


def layer_record(kind: str, shape: tuple[int, int], block_size: int, layer: PrunedLayer) -> dict[str, Any]:
    form = {"kind": kind, "shape": list(shape), "block_size": block_size, "sparsity": layer.sparsity}
    return {**form, **asdict(layer)}


class PrunedBase:
    """A `Placer` that takes the pruned layers from a directory of `save_pruned_base`."""

    def __init__(self, directory: Path) -> None:
        record, stored = read_json_object(directory / _PRUNED_RECORD_FILE), _stored_in(directory)
        self.key = str(record["key"])
        self.stored = dict[str, Stored]()
        for path in record["layers"]:
            bits = stored[f"{path}.keep_bits"]
            assert isinstance(bits, StoredTensor)
            self.stored[f"{path}.weight"] = replace(stored[f"{path}.weight"], keep_bits=bits.read)

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        place_all(self.added_to(load))

    def added_to(self, load: Loading) -> Loading:
        """With the pruned layers instead of the source's."""
        return replace(load, stored={**load.stored, **self.stored})


@dataclass
class BaseCache:
    """A `reader` of `load_model` that quantises a source into a directory once and reads it from there later.

    `wanted` says how to hold the linear layers (not "none"), `directory` is that of the last base.
    """

    root: Path
    wanted: Quantization
    device: torch.device
    progress: Progress | None = None
    directory: Path | None = None

    def __call__(self, source: ModelSource, model: PreTrainedModel) -> dict[str, Stored]:
        if self.wanted.kind == MXFP4:  # the source holds it packed
            return tensors_of_source(source, model)
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        decides = {"format": 2, "quantization": asdict(self.wanted), "model": shapes}
        key = hashlib.sha256(json_text({**decides, "files": fingerprints(source)}).encode()).hexdigest()
        directory = self.directory = self.root / key[:20]
        with in_turn(directory):
            if not directory.is_dir():
                with disk_failures(directory, "name another directory in base.cache"):
                    self._write(directory, source, model)
            else:
                log.info("Reading the packed base from %s.", directory)
                if not_loaded(model):  # an export copies these from the source
                    tensors_of_source(source, model)
        return match_to_model(_stored_in(directory), model)

    def _write(self, directory: Path, source: ModelSource, model: PreTrainedModel) -> None:
        stored, layers = tensors_of_source(source, model), layers_to_quantize(model, self.wanted)
        stored, layers = settle_stored(stored, None, self.wanted, layers)
        load = Loading(model, stored, layers, self.wanted, self.device, model.dtype)
        log.info("Writing the packed base to %s, for later starts.", directory)

        def weights() -> Iterator[tuple[str, Weight]]:
            for done, (name, item) in enumerate(stored.items(), start=1):
                value = load.read(name, item)
                yield name, value.clone() if isinstance(value, Tensor) else value  # it may be a view of the file
                del value
                if self.progress is not None:
                    self.progress(done, len(stored))

        with atomic_directory(directory) as folder:
            _write_weights(folder, weights(), _FILE_BYTES)


def fingerprints(source: ModelSource) -> list[dict[str, Any]]:
    """Name, size, time and samples of each of a model's files, as JSON values."""
    values = []
    for file in [source.path] if source.is_gguf else [*shard_files(source.path), source.path / "config.json"]:
        facts, samples = sampled_digest(file)
        values.append({"name": file.name, "size": facts.st_size, "time": facts.st_mtime_ns, "samples": samples})
    return values
